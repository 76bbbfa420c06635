package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/server/projection"
)

func (a *app) directoryCommand() *cobra.Command {
	cmd := group("directory", "Load the users and groups of a company directory", a.directoryLoadCommand())
	cmd.Long = "Load the users and groups of a company directory, which policies decide by."
	return cmd
}

// The values of --kind, with the record type of each.
var directoryTypes = map[string]string{"users": "pomerium.io/DirectoryUser", "groups": "pomerium.io/DirectoryGroup"}

// loadBatch is how many records are written at a time: revocations get their turn in between.
const loadBatch = 500

// A directoryLoad is one run of `directory load`.
type directoryLoad struct {
	*app
	path, kind, format string
	atomic, allowEmpty bool

	recordType string
	said       time.Time // of progress, the last time
}

// A loadResult is the output of `directory load -o json`.
type loadResult struct {
	Type      string `json:"type"`
	Inserted  int64  `json:"inserted"`
	Updated   int64  `json:"updated"`
	Deleted   int64  `json:"deleted"`
	Unchanged int64  `json:"unchanged"`
}

func (a *app) directoryLoadCommand() *cobra.Command {
	load := &directoryLoad{app: a}
	cmd := &cobra.Command{
		Use: "load FILE --kind users|groups", Short: "Make the directory what a file says",
		Long: `Make the users or the groups of the directory those of FILE (- is standard input). Only what differs is written, and what the
file does not have is deleted.

The file is CSV, with the names of the fields in the first line and lists separated by semicolons; JSON, a list of objects; or
JSON Lines, an object a line. Each has an id; users have display_name, email and group_ids, groups have name and email, as far
as they are known. Other fields are kept, too.

With --database-url the records go to the database, which compares them; otherwise they go to the server, after they have been
compared here. Either way they are written in batches, so that revocations need not wait, and --atomic makes one of it all, for
which others have to wait: some 4 s for 200,000 new users.`,
		Example: `  pgbroker directory load users.csv --kind users
  pgbroker directory load groups.json --kind groups
  export-directory | pgbroker directory load - --kind users --format jsonl --database-url postgres://...`,
		Args: oneArg(&load.path),
		RunE: a.action(func(cmd *cobra.Command, cfg *configuration) error {
			entries, err := load.read(cmd.Context())
			if err != nil {
				return err
			}
			var result loadResult
			if cfg.Embedded() {
				result, err = load.intoServer(cmd.Context(), cfg, entries)
			} else {
				result, err = load.intoDatabase(cmd.Context(), cfg, entries)
			}
			if err != nil {
				return err
			}
			return load.show(result)
		}),
	}
	flags := cmd.Flags()
	flags.Var(&choice{&load.kind, []string{"users", "groups"}}, "kind", "what the file has: users or groups")
	must(cmd.MarkFlagRequired("kind"))
	flags.Var(&choice{&load.format, []string{"csv", "json", "jsonl"}}, "format", "form of the file (default: by the ending of its name)")
	flags.BoolVar(&load.atomic, "atomic", false, "write everything in one transaction; needs --database-url")
	flags.BoolVar(&load.allowEmpty, "allow-empty", false, "accept a file without records, which deletes all there are")
	a.addOutputFlag(cmd)
	addSettingFlags(flags, useClient|usePsql)
	a.addTimeoutFlag(cmd)
	return cmd
}

func (l *directoryLoad) show(result loadResult) error {
	if l.output == outputJSON {
		return l.writeJSON(result)
	}
	t := newTable("TYPE", "INSERTED", "UPDATED", "DELETED", "UNCHANGED")
	t.add(result.Type, fmt.Sprint(result.Inserted), fmt.Sprint(result.Updated), fmt.Sprint(result.Deleted), fmt.Sprint(result.Unchanged))
	return t.write(l.stdout)
}

// progress tells somebody who watches how far it has come.
func (l *directoryLoad) progress(format string, args ...any) {
	if terminalWidth(l.stderr) > 0 && time.Since(l.said) > time.Second {
		l.said = time.Now()
		l.say(format, args...)
	}
}

// A directoryEntry is a user or a group.
type directoryEntry struct {
	id   string
	line int
	data *structpb.Struct
}

// payload is the entry as clients get it. The same entry has always the same bytes.
func (e *directoryEntry) payload() (*anypb.Any, error) { return packed(e.data) }

// readFile returns the content of a file; - is standard input.
func (a *app) readFile(ctx context.Context, path string) ([]byte, error) {
	if path == "-" {
		b, err := readAll(ctx, a.stdin)
		if err != nil {
			return nil, fmt.Errorf("read standard input: %w", err)
		}
		return b, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, &exitError{exitUsage, err}
	}
	return b, nil
}

// read returns the entries of the file, which has been checked as a whole before anything is written.
func (l *directoryLoad) read(ctx context.Context) ([]*directoryEntry, error) {
	l.recordType = directoryTypes[l.kind]
	format := l.format
	if format == "" {
		switch extension := strings.ToLower(filepath.Ext(l.path)); extension {
		case ".csv", ".json", ".jsonl":
			format = extension[1:]
		case ".ndjson":
			format = "jsonl"
		default:
			return nil, usagef("--format: needed, because the name %.80q ends in none of .csv, .json and .jsonl", l.path)
		}
	}
	content, err := l.readFile(ctx, l.path)
	if err != nil {
		return nil, err
	}
	content = bytes.TrimPrefix(content, []byte("\ufeff"))
	var entries []*directoryEntry
	switch format {
	case "csv":
		entries, err = l.readCSV(content)
	case "json":
		entries, err = l.readJSON(content)
	default:
		entries, err = l.readLines(content)
	}
	if err != nil {
		return nil, err
	}
	lines := make(map[string]int, len(entries))
	for _, entry := range entries {
		if err := l.check(entry); err != nil {
			return nil, err
		}
		if line, twice := lines[entry.id]; twice {
			return nil, l.wrong(entry.line, "the id %.80q is that of line %d, too", entry.id, line)
		}
		lines[entry.id] = entry.line
	}
	if len(entries) == 0 && !l.allowEmpty {
		return nil, usagef("%s: holds no %s, so all there are would be deleted: give --allow-empty if that is meant", l.path, l.kind)
	}
	return entries, nil
}

// wrong is an error in the file.
func (l *directoryLoad) wrong(line int, format string, args ...any) error {
	return usagef("%s:%d: %s", l.path, line, fmt.Sprintf(format, args...))
}

// listSeparator stands between the elements of a list in a cell of a CSV file.
const listSeparator = ";"

func (l *directoryLoad) readCSV(content []byte) ([]*directoryEntry, error) {
	reader := csv.NewReader(bytes.NewReader(content))
	header, err := reader.Read()
	if errors.Is(err, io.EOF) {
		return nil, usagef("%s: is empty; the first line has the names of the fields", l.path)
	}
	if err != nil {
		return nil, l.wrongCSV(err)
	}
	for i, name := range header {
		if header[i] = strings.TrimSpace(name); header[i] == "" || slices.Contains(header[:i], header[i]) {
			return nil, l.wrong(1, "column %d has the name %q: want names, each once", i+1, header[i])
		}
	}
	if !slices.Contains(header, "id") {
		return nil, l.wrong(1, "there is no column id, but %s", strings.Join(header, ", "))
	}
	var entries []*directoryEntry
	for {
		row, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return entries, nil
		}
		if err != nil {
			return nil, l.wrongCSV(err)
		}
		line, _ := reader.FieldPos(0)
		entry := &directoryEntry{line: line, data: &structpb.Struct{Fields: make(map[string]*structpb.Value, len(row))}}
		for i, cell := range row {
			switch {
			case cell == "": // unknown
			case header[i] == "group_ids":
				list := new(structpb.ListValue)
				for _, id := range strings.Split(cell, listSeparator) {
					if id = strings.TrimSpace(id); id != "" {
						list.Values = append(list.Values, structpb.NewStringValue(id))
					}
				}
				entry.data.Fields[header[i]] = structpb.NewListValue(list)
			default:
				entry.data.Fields[header[i]] = structpb.NewStringValue(cell)
			}
		}
		entries = append(entries, entry)
	}
}

func (l *directoryLoad) wrongCSV(err error) error {
	var parse *csv.ParseError
	if errors.As(err, &parse) {
		return l.wrong(parse.Line, "%v", parse.Err)
	}
	return usagef("%s: %w", l.path, err)
}

func (l *directoryLoad) readJSON(content []byte) ([]*directoryEntry, error) {
	decoder := json.NewDecoder(bytes.NewReader(content))
	notJSON := func(err error) error {
		offset := decoder.InputOffset()
		var syntax *json.SyntaxError
		if errors.As(err, &syntax) {
			offset = syntax.Offset
		}
		return l.wrong(1+bytes.Count(content[:min(offset, int64(len(content)))], []byte("\n")), "not JSON: %v", err)
	}
	if start, err := decoder.Token(); err != nil || start != json.Delim('[') {
		return nil, l.wrong(1, "not a list of objects in JSON")
	}
	var (
		entries []*directoryEntry
		line    = 1
		from    int64 // where line was counted
	)
	for decoder.More() {
		var raw json.RawMessage
		if err := decoder.Decode(&raw); err != nil {
			return nil, notJSON(err)
		}
		begins := decoder.InputOffset() - int64(len(raw))
		line += bytes.Count(content[from:begins], []byte("\n"))
		from = begins
		entry, err := l.object(line, raw)
		if err != nil {
			return nil, err
		}
		entries = append(entries, entry)
	}
	if _, err := decoder.Token(); err != nil {
		return nil, notJSON(err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, notJSON(errors.New("something follows the list"))
	}
	return entries, nil
}

func (l *directoryLoad) readLines(content []byte) ([]*directoryEntry, error) {
	var entries []*directoryEntry
	line := 0
	for text := range bytes.Lines(content) {
		line++
		if text = bytes.TrimSpace(text); len(text) == 0 {
			continue
		}
		entry, err := l.object(line, text)
		if err != nil {
			return nil, err
		}
		entries = append(entries, entry)
	}
	return entries, nil
}

func (l *directoryLoad) object(line int, text []byte) (*directoryEntry, error) {
	entry := &directoryEntry{line: line, data: new(structpb.Struct)}
	if len(text) == 0 || text[0] != '{' {
		return nil, l.wrong(line, "not an object in JSON")
	}
	if err := entry.data.UnmarshalJSON(text); err != nil {
		return nil, l.wrong(line, "not an object in JSON: %v", plain(err))
	}
	return entry, nil
}

// maxIDBytes is the longest id that a record may have.
const maxIDBytes = 2048

// check refuses what policies could not work with, and sets the entry's id.
func (l *directoryLoad) check(entry *directoryEntry) error {
	id, ok := entry.data.Fields["id"].GetKind().(*structpb.Value_StringValue)
	switch {
	case !ok || id.StringValue == "":
		return l.wrong(entry.line, "id: want a text that is not empty")
	case len(id.StringValue) > maxIDBytes:
		return l.wrong(entry.line, "id: %d bytes, at most %d are allowed", len(id.StringValue), maxIDBytes)
	}
	entry.id = id.StringValue
	for name, value := range entry.data.Fields {
		switch name {
		case "display_name", "email", "name":
			if _, ok := value.GetKind().(*structpb.Value_StringValue); !ok {
				return l.wrong(entry.line, "%s: want a text", name)
			}
		case "group_ids":
			_, ok := value.GetKind().(*structpb.Value_ListValue)
			for _, element := range value.GetListValue().GetValues() {
				_, isText := element.GetKind().(*structpb.Value_StringValue)
				ok = ok && isText
			}
			if !ok {
				return l.wrong(entry.line, "group_ids: want a list of texts")
			}
		}
	}
	if !cleanText(structpb.NewStructValue(entry.data)) {
		return l.wrong(entry.line, "holds text that is not valid UTF-8, or the character U+0000")
	}
	return nil
}

// cleanText reports whether a database can keep every text in a value.
func cleanText(v *structpb.Value) bool {
	sound := func(s string) bool { return utf8.ValidString(s) && !strings.ContainsRune(s, 0) }
	switch kind := v.GetKind().(type) {
	case *structpb.Value_StringValue:
		return sound(kind.StringValue)
	case *structpb.Value_ListValue:
		return !slices.ContainsFunc(kind.ListValue.GetValues(), func(v *structpb.Value) bool { return !cleanText(v) })
	case *structpb.Value_StructValue:
		for name, member := range kind.StructValue.GetFields() {
			if !sound(name) || !cleanText(member) {
				return false
			}
		}
	}
	return true
}

// intoDatabase stages the entries in the database, which compares and writes them.
func (l *directoryLoad) intoDatabase(ctx context.Context, cfg *configuration, entries []*directoryEntry) (loadResult, error) {
	result := loadResult{Type: l.recordType}
	conn, err := cfg.connectDatabase(ctx)
	if err != nil {
		return result, explainDatabase(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	queries := db.New(conn)
	if err := queries.RecordsStage(ctx); err != nil {
		return result, explainDatabase(err)
	}
	// Encoded and projected here, which takes the database much longer.
	projector := projection.New(nil)
	next := 0
	rows := pgx.CopyFromFunc(func() ([]any, error) {
		if next == len(entries) {
			return nil, nil
		}
		entry := entries[next]
		next++
		l.progress("%d of %d sent to the database", next, len(entries))
		payload, err := entry.payload()
		if err != nil {
			return nil, err
		}
		b, err := proto.Marshal(payload)
		if err != nil {
			return nil, err
		}
		projected := projector.Project(b)
		return []any{entry.id, json.RawMessage(projected.Data), b, projected.SearchText}, nil
	})
	if _, err := conn.CopyFrom(ctx, pgx.Identifier{"staged_records"}, []string{"id", "data", "payload", "search_text"}, rows); err != nil {
		return result, explainDatabase(err)
	}
	params := db.RecordsReplaceParams{Type: l.recordType, MaxChanges: loadBatch, AllowEmpty: l.allowEmpty}
	if l.atomic {
		params.MaxChanges = math.MaxInt64
	}
	for {
		written, err := queries.RecordsReplace(ctx, params)
		if err != nil {
			return result, explainDatabase(err)
		}
		result.Inserted += written.Inserted
		result.Updated += written.Updated
		result.Deleted += written.Deleted
		if written.Remaining == 0 {
			break
		}
		l.progress("%d written, %d to go", result.Inserted+result.Updated+result.Deleted, written.Remaining)
	}
	result.Unchanged = int64(len(entries)) - result.Inserted - result.Updated
	return result, nil
}

// intoServer compares the entries with what the server has, and writes what differs.
func (l *directoryLoad) intoServer(ctx context.Context, cfg *configuration, entries []*directoryEntry) (loadResult, error) {
	result := loadResult{Type: l.recordType}
	if l.atomic {
		return result, usagef("--atomic: needs --database-url, because the server takes so much in parts only")
	}
	c, err := l.connect(cfg)
	if err != nil {
		return result, err
	}
	defer c.Close()
	stored, err := l.stored(ctx, c)
	if err != nil {
		return result, c.explain(err)
	}
	var changes []*databroker.Record
	for _, entry := range entries {
		payload, err := entry.payload()
		if err != nil {
			return result, err
		}
		old, exists := stored[entry.id]
		delete(stored, entry.id)
		switch {
		case !exists:
			result.Inserted++
		case sameStruct(old, payload, entry.data):
			result.Unchanged++
			continue
		default:
			result.Updated++
		}
		changes = append(changes, &databroker.Record{Type: l.recordType, Id: entry.id, Data: payload})
	}
	for id := range stored {
		result.Deleted++
		changes = append(changes, &databroker.Record{Type: l.recordType, Id: id, DeletedAt: timestamppb.Now()})
	}
	written := 0
	for batch := range slices.Chunk(changes, loadBatch) {
		if _, err := c.records.Put(ctx, &databroker.PutRequest{Records: batch}); err != nil {
			return result, fmt.Errorf("%d of %d changes were written: %w", written, len(changes), c.explain(err))
		}
		written += len(batch)
		l.progress("%d of %d changes written", written, len(changes))
	}
	return result, nil
}

// stored returns what the server has of the type.
func (l *directoryLoad) stored(ctx context.Context, c *client) (map[string]*anypb.Any, error) {
	stream, err := c.records.SyncLatest(ctx, &databroker.SyncLatestRequest{Type: l.recordType})
	if err != nil {
		return nil, err
	}
	stored := make(map[string]*anypb.Any)
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stored, nil
		}
		if err != nil {
			return nil, err
		}
		if record := response.GetRecord(); record != nil {
			stored[record.GetId()] = record.GetData()
			l.progress("%d records compared", len(stored))
		}
	}
}

// sameStruct reports whether a stored payload says the same, in whatever order.
func sameStruct(old, payload *anypb.Any, data *structpb.Struct) bool {
	if old.GetTypeUrl() != payload.GetTypeUrl() {
		return false
	}
	if bytes.Equal(old.GetValue(), payload.GetValue()) {
		return true
	}
	decoded := new(structpb.Struct)
	return old.UnmarshalTo(decoded) == nil && proto.Equal(decoded, data)
}
