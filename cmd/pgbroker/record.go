package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/proto/databroker"
)

const typeHelp = `A record is named by its type and its id. The type of a known message may be written short: session.Session stands for
type.googleapis.com/session.Session.`

func (a *app) recordCommand() *cobra.Command {
	cmd := group("record", "Read and write records",
		a.recordGetCommand(), a.recordPutCommand(), a.recordPatchCommand(), a.recordDeleteCommand(), a.recordQueryCommand())
	cmd.Long = "Read and write records.\n\n" + typeHelp
	return cmd
}

// A recordName is the flags that name a record.
type recordName struct {
	kind string
	id   string
}

func (n *recordName) addTypeFlag(cmd *cobra.Command, help string) {
	cmd.Flags().StringVarP(&n.kind, "type", "t", "", help)
	must(cmd.RegisterFlagCompletionFunc("type", cobra.FixedCompletions(knownTypes, cobra.ShellCompDirectiveNoFileComp)))
}

func (n *recordName) addFlags(cmd *cobra.Command) {
	n.addTypeFlag(cmd, "type of the record")
	cmd.Flags().StringVarP(&n.id, "id", "i", "", "id of the record")
	must(cmd.MarkFlagRequired("type"))
	must(cmd.MarkFlagRequired("id"))
}

// knownTypes are the record types that completion offers.
var knownTypes = []string{
	"session.Session", "session.SessionBinding", "session.SessionBindingRequest", "session.IdentityBinding",
	"user.User", "user.ServiceAccount", "pomerium.io/DirectoryUser", "pomerium.io/DirectoryGroup",
}

// checkText refuses what cannot travel in a protobuf string or be kept in a database, naming the flag.
func checkText(flag, text string) error {
	switch {
	case !utf8.ValidString(text):
		return usagef("--%s: %.60q is not valid UTF-8", flag, text)
	case strings.ContainsRune(text, 0):
		return usagef("--%s: must not contain a NUL character", flag)
	}
	return nil
}

func (n *recordName) check() error {
	if err := checkText("type", n.kind); err != nil {
		return err
	}
	return checkText("id", n.id)
}

func (a *app) addSecretsFlag(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&a.secrets, "show-secrets", false, "show tokens and other secrets inside payloads")
}

func (a *app) recordGetCommand() *cobra.Command {
	var name recordName
	cmd := &cobra.Command{
		Use: "get --type TYPE --id ID", Short: "Show one record", Args: noArgs,
		Long: "Show one record. Tokens and other secrets in its payload are left out unless asked for.\n\n" + typeHelp,
		Example: `  pgbroker record get --type session.Session --id 4fb2
  pgbroker record get -t pomerium.io/DirectoryUser -i jane -o json`,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			if err := name.check(); err != nil {
				return err
			}
			response, err := c.records.Get(ctx, &databroker.GetRequest{Type: recordType(name.kind), Id: name.id})
			if err != nil {
				return err
			}
			return a.showRecord(response.GetRecord())
		}),
	}
	name.addFlags(cmd)
	a.addSecretsFlag(cmd)
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

// showRecord prints all of one record.
func (a *app) showRecord(record *databroker.Record) error {
	if a.output == outputJSON {
		b, err := recordJSON(record, a.secrets)
		if err != nil {
			return err
		}
		return a.writeLine(b)
	}
	data := "(none)"
	if record.GetData() != nil {
		b, err := payloadJSON(record.GetData(), a.secrets)
		if err != nil {
			return err
		}
		pretty, err := json.MarshalIndent(b, "", "  ")
		if err != nil {
			return err
		}
		data = string(pretty)
	}
	_, err := fmt.Fprintf(a.stdout, "type:     %s\nid:       %s\nversion:  %d\nmodified: %s\ndata:     %s\n",
		clean(record.GetType()), clean(record.GetId()), record.GetVersion(), showTime(record.GetModifiedAt().AsTime()), clean(data))
	return err
}

// showVersions prints what a write has done: one line per record.
func (a *app) showVersions(records []*databroker.Record) error {
	if a.output == outputJSON {
		for _, record := range records {
			if err := a.writeProto(&databroker.Record{
				Version: record.GetVersion(), Type: record.GetType(), Id: record.GetId(),
				ModifiedAt: record.GetModifiedAt(), DeletedAt: record.GetDeletedAt(),
			}); err != nil {
				return err
			}
		}
		return nil
	}
	if len(records) == 0 {
		return nil
	}
	t := newTable("VERSION", "TYPE", "ID").cut(2, 1)
	for _, record := range records {
		t.add(strconv.FormatUint(record.GetVersion(), 10), shortType(record.GetType()), record.GetId())
	}
	return t.write(a.stdout)
}

// isKnownType reports whether a record type is one of those that this program knows.
func isKnownType(name string) bool {
	message, isURL := strings.CutPrefix(recordType(name), typeURLPrefix)
	return isURL && knownMessage(message) != nil || slices.Contains(knownTypes, name)
}

// unknownType is a warning about a type: records under a name that nobody looks for are as good as not there.
func unknownType(name, why string) string {
	best, distance := "", 4
	for _, known := range knownTypes {
		if d := editDistance(strings.ToLower(name), strings.ToLower(known)); d < distance {
			best, distance = known, d
		}
	}
	if best != "" {
		why += " (did you mean " + best + "?)"
	}
	return fmt.Sprintf("the type %.80q %s", name, why)
}

// warnOfType warns when a write is about to make a type that neither this program nor the server knows.
func (a *app) warnOfType(ctx context.Context, c *client, name string) {
	if isKnownType(name) {
		return
	}
	response, err := c.records.ListTypes(ctx, new(emptypb.Empty))
	if err != nil || slices.Contains(response.GetTypes(), recordType(name)) {
		return // what is wrong with the server, the write itself will say
	}
	a.say("warning: %s", unknownType(name, "is new: the server has no record of it"))
}

// shortType is a record type as people may also write it.
func shortType(name string) string {
	if short, ok := strings.CutPrefix(name, typeURLPrefix); ok && knownMessage(short) != nil {
		return short
	}
	return name
}

func (a *app) recordPutCommand() *cobra.Command {
	var (
		name              recordName
		data, payloadType string
	)
	cmd := &cobra.Command{
		Use: "put --type TYPE --id ID --data JSON", Short: "Write one record", Args: noArgs,
		Long: `Write one record, replacing it if it exists, and print its version.

The payload is given as JSON in the form that protobuf prescribes. Its message is that of the record type when the type is a
type URL, and google.protobuf.Struct (any JSON object) otherwise; --payload-type or a member "@type" name another one.

` + typeHelp,
		Example: `  pgbroker record put -t session.Session -i 4fb2 \
    --data '{"id": "4fb2", "user_id": "jane", "refresh_disabled": true}'
  pgbroker record put -t pomerium.io/DirectoryUser -i jane \
    --data '{"id": "jane", "email": "jane@example.com"}'
  pgbroker record put -t example.com/Thing -i 1 --data @thing.json`,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			if err := name.check(); err != nil {
				return err
			}
			payload, err := a.payload(ctx, data, recordType(name.kind), payloadType)
			if err != nil {
				return err
			}
			a.warnOfType(ctx, c, name.kind)
			response, err := c.records.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{{
				Type: recordType(name.kind), Id: name.id, Data: payload,
			}}})
			if err != nil {
				return err
			}
			return a.showVersions(response.GetRecords())
		}),
	}
	name.addFlags(cmd)
	addPayloadFlags(cmd, &data, &payloadType)
	a.addOutputFlag(cmd)
	a.addPersonFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

func addPayloadFlags(cmd *cobra.Command, data, payloadType *string) {
	cmd.Flags().StringVarP(data, "data", "d", "", "payload as JSON; @FILE reads a file, - reads standard input")
	cmd.Flags().StringVar(payloadType, "payload-type", "", "message that the payload is, such as google.protobuf.Struct")
	must(cmd.MarkFlagRequired("data"))
}

func (a *app) recordPatchCommand() *cobra.Command {
	var (
		name              recordName
		data, payloadType string
		mask              []string
	)
	cmd := &cobra.Command{
		Use: "patch --type TYPE --id ID --data JSON --mask FIELD,...", Short: "Overwrite some fields of a record", Args: noArgs,
		Long: `Overwrite some fields of a record with those of the given payload, and print the new version. A named field that the
payload does not have is cleared. Fields are named as in the proto file (user_id), nested ones with dots (id_token.issuer).

` + typeHelp,
		Example: `  pgbroker record patch -t session.Session -i 4fb2 \
    --data '{"accessedAt": "2030-01-01T00:00:00Z"}' --mask accessed_at`,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			if err := name.check(); err != nil {
				return err
			}
			for _, path := range mask {
				if err := checkText("mask", path); err != nil {
					return err
				}
			}
			payload, err := a.payload(ctx, data, recordType(name.kind), payloadType)
			if err != nil {
				return err
			}
			response, err := c.records.Patch(ctx, &databroker.PatchRequest{
				Records:   []*databroker.Record{{Type: recordType(name.kind), Id: name.id, Data: payload}},
				FieldMask: &fieldmaskpb.FieldMask{Paths: mask},
			})
			if err != nil {
				return err
			}
			if len(response.GetRecords()) == 0 { // the server skips what does not exist
				return errRecordNotFound
			}
			return a.showVersions(response.GetRecords())
		}),
	}
	name.addFlags(cmd)
	addPayloadFlags(cmd, &data, &payloadType)
	cmd.Flags().StringSliceVarP(&mask, "mask", "m", nil, "fields to overwrite, separated by commas")
	must(cmd.MarkFlagRequired("mask"))
	a.addOutputFlag(cmd)
	a.addPersonFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

var errRecordNotFound = status.Error(codes.NotFound, "record not found")

func (a *app) payload(ctx context.Context, data, recordType, payloadType string) (*anypb.Any, error) {
	b, err := a.readInput(ctx, "data", data)
	if err != nil {
		return nil, err
	}
	return encodePayload(b, recordType, payloadType)
}

func (a *app) recordDeleteCommand() *cobra.Command {
	var (
		name recordName
		ids  []string
	)
	cmd := &cobra.Command{
		Use: "delete --type TYPE --id ID", Short: "Delete records", Args: noArgs,
		Long: `Delete records of one type and print the versions of their tombstones; every stream learns of it. When some of them do
not exist, the others are deleted and the exit code is that for "not found".

` + typeHelp,
		Example: `  pgbroker record delete -t session.Session -i 4fb2
  pgbroker record delete -t session.Session -i 4fb2 -i 9c01`,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			if err := checkText("type", name.kind); err != nil {
				return err
			}
			var records []*databroker.Record
			for _, id := range ids {
				if err := checkText("id", id); err != nil {
					return err
				}
				records = append(records, &databroker.Record{Type: recordType(name.kind), Id: id, DeletedAt: timestamppb.Now()})
			}
			// A Patch leaves absent records out of its answer, where a Put would take their deletion for done; a person has
			// probably mistyped the id.
			response, err := c.records.Patch(ctx, &databroker.PatchRequest{Records: records})
			if err != nil {
				return err
			}
			if err := a.showVersions(response.GetRecords()); err != nil {
				return err
			}
			return missing(ids, response.GetRecords())
		}),
	}
	name.addTypeFlag(cmd, "type of the records")
	cmd.Flags().StringArrayVarP(&ids, "id", "i", nil, "id of a record; may be repeated")
	must(cmd.MarkFlagRequired("type"))
	must(cmd.MarkFlagRequired("id"))
	a.addOutputFlag(cmd)
	a.addPersonFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

// missing is the error of ids that were asked for and did not exist.
func missing(ids []string, found []*databroker.Record) error {
	absent := slices.DeleteFunc(slices.Clone(ids), func(id string) bool {
		return slices.ContainsFunc(found, func(record *databroker.Record) bool { return record.GetId() == id })
	})
	if len(absent) == 0 {
		return nil
	}
	return status.Errorf(codes.NotFound, "record not found: %s", strings.Join(absent, ", "))
}

func (a *app) recordQueryCommand() *cobra.Command {
	var (
		name          recordName
		text, filter  string
		offset, limit int64
	)
	cmd := &cobra.Command{
		Use: "query [--type TYPE]", Short: "Find records", Args: noArgs,
		Long: `Find records by type, filter and text, ordered by type and id.

A filter is a JSON object of fields and values: {"user_id": "jane"}; {"$or": [{"id": "4fb2"}, {"email": "jane@example.com"}]}.
A text is searched in all text fields of the payloads.

` + typeHelp,
		Example: `  pgbroker record query -t session.Session --filter '{"user_id": "jane"}'
  pgbroker record query --text example.com --limit 10 -o json`,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			request := &databroker.QueryRequest{Type: recordType(name.kind), Query: text, Offset: offset, Limit: limit}
			for flag, value := range map[string]string{"type": name.kind, "text": text} {
				if err := checkText(flag, value); err != nil {
					return err
				}
			}
			if offset < 0 {
				return usagef("--offset: %d: must not be negative", offset)
			}
			if limit < 0 {
				return usagef("--limit: %d: must not be negative", limit)
			}
			if filter != "" {
				request.Filter = new(structpb.Struct)
				if err := protojson.Unmarshal([]byte(filter), request.Filter); err != nil {
					return usagef("--filter: want a JSON object: %w", plain(err))
				}
			}
			response, err := c.records.Query(ctx, request)
			if err != nil {
				return err
			}
			return a.showRecords(response, name.kind == "")
		}),
	}
	name.addTypeFlag(cmd, "type of the records; all types when left out")
	cmd.Flags().StringVar(&text, "text", "", "text that occurs in the payload")
	cmd.Flags().StringVar(&filter, "filter", "", "filter as JSON")
	cmd.Flags().Int64Var(&offset, "offset", 0, "number of records to skip")
	cmd.Flags().Int64Var(&limit, "limit", 100, "most records to show")
	a.addSecretsFlag(cmd)
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

// showRecords prints the outcome of a query. What remains is told apart from the output, which may go into a pipe.
func (a *app) showRecords(response *databroker.QueryResponse, withType bool) error {
	if a.output == outputJSON {
		for _, record := range response.GetRecords() {
			b, err := recordJSON(record, a.secrets)
			if err != nil {
				return err
			}
			if err := a.writeLine(b); err != nil {
				return err
			}
		}
	} else {
		t := newTable("VERSION", "MODIFIED", "ID", "DATA").cut(3, 2)
		if withType {
			t = newTable("VERSION", "MODIFIED", "TYPE", "ID", "DATA").cut(4, 3, 2)
		}
		for _, record := range response.GetRecords() {
			cells := []string{strconv.FormatUint(record.GetVersion(), 10), showTime(record.GetModifiedAt().AsTime())}
			if withType {
				cells = append(cells, shortType(record.GetType()))
			}
			t.add(append(cells, record.GetId(), payloadSummary(record.GetData(), a.secrets))...)
		}
		if err := t.write(a.stdout); err != nil {
			return err
		}
	}
	if shown := int64(len(response.GetRecords())); shown < response.GetTotalCount() {
		a.say("%d of %d records; see --limit and --offset", shown, response.GetTotalCount())
	}
	return nil
}
