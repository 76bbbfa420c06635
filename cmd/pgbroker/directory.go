package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

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
var directoryTypes = map[string]string{"users": directoryUserType, "groups": directoryGroupType}

// loadBatch is how many records are written at a time: revocations get their turn in between.
const loadBatch = 500

// A directoryLoad is one run of `directory load`.
type directoryLoad struct {
	*app
	path, kind, format string
	idField            string
	atomic, dryRun     bool
	allowDeletes       percent

	recordType string
	said       time.Time         // of progress, the last time
	names      map[string]string // of fields of the file that are known: what they are; "" is left out
	plainNames map[string]string
	morePages  string // what says that the file is not all
}

// A percent is a flag from 0 to 100.
type percent int

// String implements pflag.Value.
func (p *percent) String() string { return fmt.Sprintf("%d%%", int(*p)) }

// Set implements pflag.Value.
func (p *percent) Set(text string) error {
	n, err := strconv.ParseUint(strings.TrimSuffix(text, "%"), 10, 8)
	if err != nil || n > 100 {
		return errors.New("want a share from 0% to 100%")
	}
	*p = percent(n)
	return nil
}

// Type implements pflag.Value.
func (p *percent) Type() string { return "N%" }

// A loadResult is the output of `directory load -o json`.
type loadResult struct {
	Type      string `json:"type"`
	Inserted  int64  `json:"inserted"`
	Updated   int64  `json:"updated"`
	Deleted   int64  `json:"deleted"`
	Unchanged int64  `json:"unchanged"`
}

// stored is how many records there were.
func (r *loadResult) stored() int64 { return r.Deleted + r.Updated + r.Unchanged }

// refuse refuses to delete more than is allowed: a file that is not what it should be, or has ids of another kind, would
// otherwise be taken for a directory that everybody has left.
func (l *directoryLoad) refuse(planned *loadResult) error {
	deleted, stored := planned.Deleted, planned.stored()
	if deleted == 0 || l.allowDeletes == 100 || deleted*100 <= stored*int64(l.allowDeletes) {
		return nil
	}
	needed := (deleted*100 + stored - 1) / stored
	if l.dryRun {
		l.say("%s: this would be refused: it deletes %d of %d %s (%d %%), and no more than %d %% are allowed. If that is meant, give --allow-deletes %d%%",
			l.path, deleted, stored, l.kind, needed, int(l.allowDeletes), needed)
		return nil
	}
	return usagef("%s: would delete %d of %d %s (%d %%), and no more than %d %% are allowed: nothing was written. If that is meant, give --allow-deletes %d%%",
		l.path, deleted, stored, l.kind, needed, int(l.allowDeletes), needed)
}

func (a *app) directoryLoadCommand() *cobra.Command {
	load := &directoryLoad{app: a, allowDeletes: 20}
	cmd := &cobra.Command{
		Use: "load FILE --kind users|groups", Short: "Make the directory what a file says",
		Long: `Make the users or the groups of the directory those of FILE (- is standard input). Only what differs is written, and what the
file does not have is deleted: up to a fifth of what there is, and never all, unless --allow-deletes says more. --dry-run shows
what would be done.

The file is CSV, with the names of the fields in the first line and lists separated by semicolons; JSON, a list of objects or the
pages of an API; or JSON Lines, an object a line. Cells may be separated by commas, semicolons or tabs, and the text may be UTF-8 or
UTF-16.

Each has an id; users have display_name, email and group_ids, groups have name and email, as far as they are known. The names that
exports of Microsoft Entra and Graph, Okta, Google Workspace, LDAP servers and Active Directory have for them are understood, and
--id-field names the field with the ids if that is another one. Other fields are kept, too, but for passwords.

With --database-url the records go to the database, which compares them; otherwise they go to the server, after they have been
compared here. Either way they are written in batches, so that revocations need not wait, and --atomic makes one of it all, for
which others have to wait: some 4 s for 200,000 new users.`,
		Example: `  pgbroker directory load users.csv --kind users --dry-run
  pgbroker directory load groups.json --kind groups
  pgbroker directory load people.csv --kind users --id-field uid
  export-directory | pgbroker directory load - --kind users \
    --format jsonl --database-url postgres://...`,
		Args: oneArg(&load.path),
		RunE: a.action(func(cmd *cobra.Command, cfg *configuration) error {
			entries, err := load.read(cmd.Context())
			if err != nil {
				return untouched(cmd.Context(), err, "nothing was written")
			}
			var result loadResult
			if cfg.Embedded() {
				result, err = load.intoServer(cmd.Context(), cfg, entries)
			} else {
				result, err = load.intoDatabase(cmd.Context(), cfg, entries)
			}
			if err != nil {
				return untouched(cmd.Context(), err, "nothing was written")
			}
			if load.dryRun {
				load.say("nothing was written: this is what would be done")
			}
			return load.show(result)
		}),
	}
	flags := cmd.Flags()
	flags.Var(&choice{&load.kind, []string{"users", "groups"}}, "kind", "what the file has: users or groups")
	must(cmd.MarkFlagRequired("kind"))
	flags.Var(&choice{&load.format, []string{"csv", "json", "jsonl"}}, "format", "form of the file (default: by the ending of its name)")
	flags.BoolVar(&load.atomic, "atomic", false, "write everything in one transaction; needs --database-url")
	flags.StringVar(&load.idField, "id-field", "", "field of the file that has the ids (default: id, or what an export calls it)")
	flags.BoolVar(&load.dryRun, "dry-run", false, "write nothing, and show what would be written")
	flags.Var(&load.allowDeletes, "allow-deletes", "most that may be deleted of what there is; 100% may be everything")
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

// intoDatabase stages the entries in the database, which compares and writes them.
func (l *directoryLoad) intoDatabase(ctx context.Context, cfg *configuration, entries []*directoryEntry) (loadResult, error) {
	result := loadResult{Type: l.recordType}
	conn, err := cfg.connectDatabase(ctx)
	if err != nil {
		return result, explainDatabase(err)
	}
	defer endConn(ctx, conn)
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
	planned, err := queries.RecordsCompare(ctx, l.recordType)
	if err != nil {
		return result, explainDatabase(err)
	}
	plan := loadResult{l.recordType, planned.Inserted, planned.Updated, planned.Deleted, planned.Unchanged}
	if err := l.refuse(&plan); err != nil || l.dryRun {
		return plan, err
	}
	params := db.RecordsReplaceParams{Type: l.recordType, MaxChanges: loadBatch, AllowEmpty: l.allowDeletes == 100}
	if l.atomic {
		params.MaxChanges = math.MaxInt64
	}
	for {
		written, err := queries.RecordsReplace(ctx, params)
		if err != nil {
			done := result.Inserted + result.Updated + result.Deleted
			return result, unfinished(ctx, explainDatabase(err), fmt.Sprintf("%d of %d changes written", done, plan.Inserted+plan.Updated+plan.Deleted))
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
	if err := l.refuse(&result); err != nil || l.dryRun {
		return result, err
	}
	written := 0
	for batch := range slices.Chunk(changes, loadBatch) {
		err := ctx.Err()
		if err == nil { // a request that is under way is waited for, so that it is known what it has done
			_, err = c.records.Put(context.WithoutCancel(ctx), &databroker.PutRequest{Records: batch})
		}
		if err != nil {
			return result, unfinished(ctx, c.explain(err), fmt.Sprintf("%d of %d changes written", written, len(changes)))
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
