package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"pgbroker/db"
	"pgbroker/server/schema"
)

func (a *app) schemaCommand() *cobra.Command {
	cmd := group("schema", "Add message types, and say which fields are secret",
		a.schemaAddCommand(), a.schemaListCommand(), a.schemaShowCommand(), a.schemaRemoveCommand(), a.schemaRedactCommand(), a.schemaViewCommand())
	cmd.Long = `Add message types of your own, and say which fields are secret. Records of known types have a readable projection, which
filters, SQL and views work on, can be patched, and can be written in SQL. Types and rules are kept in the database; replicas
hear of changes at once, and bring existing records up to them in the background.`
	return cmd
}

func addDatabaseFlags(cmd *cobra.Command) *cobra.Command {
	addSettingFlags(cmd.Flags(), usePsql)
	return cmd
}

// notInName is what a file's name may have and the name of a schema may not.
var notInName = regexp.MustCompile(`[^a-z0-9._-]+`)

func (a *app) schemaAddCommand() *cobra.Command {
	var name, file string
	cmd := addDatabaseFlags(&cobra.Command{
		Use: "add FILE", Short: "Add the message types of a descriptor set",
		Long: `Add the message types of FILE (- is standard input), a serialized google.protobuf.FileDescriptorSet, or replace those added
under the same name before. The file is made with one of

  protoc --include_imports --descriptor_set_out=FILE acme/badge.proto
  buf build -o FILE.binpb

A set that lacks an import, declares what is declared already, or gives a field number another type is refused.`,
		Example: `  pgbroker schema add badge.binpb
  pgbroker schema add --name acme - < badge.binpb`,
		Args: oneArg(&file),
		RunE: a.withDatabase(func(ctx context.Context, _ *cobra.Command, conn *pgx.Conn) error {
			set := schema.Set{Name: name}
			if set.Name == "" {
				if file == "-" {
					return usagef("--name: needed for what comes from standard input")
				}
				base := filepath.Base(file)
				set.Name = notInName.ReplaceAllString(strings.ToLower(strings.TrimSuffix(base, filepath.Ext(base))), "_")
			}
			if err := schema.CheckName(set.Name); err != nil {
				return usagef("--name: %w", err)
			}
			var err error
			if set.Descriptors, err = a.readFile(ctx, file); err != nil {
				return err
			}
			added, err := schema.Add(ctx, conn, set)
			if err != nil {
				return refusedSet(err)
			}
			return a.showMessages(set.Name, added)
		}),
	})
	cmd.Flags().StringVar(&name, "name", "", "name to add them under (default: that of the file)")
	a.addOutputFlag(cmd)
	return cmd
}

// refusedSet is an error of package schema with the exit code of wrong input, unless it is the database's.
func refusedSet(err error) error {
	if explained := explainDatabase(err); explained != err { //nolint:errorlint // whether it is the very same error
		return explained
	}
	return &exitError{exitUsage, err}
}

// oneArg accepts one argument.
func oneArg(value *string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := cobra.ExactArgs(1)(cmd, args); err != nil {
			return err
		}
		*value = args[0]
		return nil
	}
}

// A schemaMessage is one line of `schema add|list|show -o json`.
type schemaMessage struct {
	Schema  string `json:"schema"`
	Message string `json:"message"`
	Fields  int    `json:"fields"`
}

func (a *app) showMessages(name string, definitions schema.Definitions) error {
	fields := make(map[string]int)
	for _, f := range definitions.Fields {
		fields[f.Message]++
	}
	t := newTable("SCHEMA", "MESSAGE", "FIELDS").cut(1)
	for _, m := range definitions.Messages {
		if a.output == outputJSON {
			if err := a.writeJSON(schemaMessage{name, m.Name, fields[m.Name]}); err != nil {
				return err
			}
			continue
		}
		t.add(name, m.Name, strconv.Itoa(fields[m.Name]))
	}
	if a.output == outputJSON {
		return nil
	}
	return t.write(a.stdout)
}

// A storedSchema is one line of `schema list -o json`.
type storedSchema struct {
	Name       string `json:"name"`
	Messages   int    `json:"messages"`
	ModifiedAt string `json:"modified_at"`
	Problem    string `json:"problem,omitempty"`
}

func (a *app) schemaListCommand() *cobra.Command {
	cmd := addDatabaseFlags(&cobra.Command{
		Use: "list", Short: "List what has been added", Args: noArgs,
		RunE: a.withDatabase(func(ctx context.Context, _ *cobra.Command, conn *pgx.Conn) error {
			rows, err := db.New(conn).SchemasList(ctx)
			if err != nil {
				return err
			}
			var sets []schema.Set
			for _, row := range rows {
				sets = append(sets, schema.Set{Name: row.Name, Descriptors: row.DescriptorSet})
			}
			types, problems := schema.New(sets)
			definitions := types.Definitions()
			t := newTable("NAME", "MESSAGES", "MODIFIED")
			for _, row := range rows {
				stored := storedSchema{
					Name: row.Name, Messages: len(definitions[row.Name].Messages), ModifiedAt: row.ModifiedAt.UTC().Format("2006-01-02T15:04:05Z"),
				}
				if a.output == outputJSON {
					if err := a.writeJSON(stored); err != nil {
						return err
					}
					continue
				}
				t.add(stored.Name, strconv.Itoa(stored.Messages), showTime(row.ModifiedAt))
			}
			if problems != nil {
				a.say("not in use: %v", problems)
			}
			if a.output == outputJSON {
				return nil
			}
			return t.write(a.stdout)
		}),
	})
	a.addOutputFlag(cmd)
	return cmd
}

// A schemaField is one line of `schema show MESSAGE -o json`.
type schemaField struct {
	Number   int32  `json:"number"`
	Name     string `json:"name"`
	Type     string `json:"type"`
	Redacted bool   `json:"redacted"`
}

func (a *app) schemaShowCommand() *cobra.Command {
	var name string
	cmd := addDatabaseFlags(&cobra.Command{
		Use: "show NAME|MESSAGE", Short: "Show the messages of a schema, or the fields of a message",
		Long:    "Show the messages of a schema that has been added, or the fields of any known message, and which of them are secret.",
		Example: "  pgbroker schema show acme\n  pgbroker schema show session.Session",
		Args:    oneArg(&name),
		RunE: a.withDatabase(func(ctx context.Context, _ *cobra.Command, conn *pgx.Conn) error {
			queries := db.New(conn)
			fields, err := queries.MessageFieldsList(ctx, strings.TrimPrefix(name, typeURLPrefix))
			if err != nil {
				return err
			}
			if len(fields) > 0 {
				return a.showFields(fields)
			}
			rows, err := queries.SchemasList(ctx)
			if err != nil {
				return err
			}
			var sets []schema.Set
			for _, row := range rows {
				sets = append(sets, schema.Set{Name: row.Name, Descriptors: row.DescriptorSet})
			}
			types, _ := schema.New(sets) // what is wrong with others is of no interest here
			definitions, ok := types.Definitions()[name]
			if !ok {
				return &exitError{exitNotFound, fmt.Errorf("there is no schema and no message with fields of the name %.80q", name)}
			}
			return a.showMessages(name, definitions)
		}),
	})
	a.addOutputFlag(cmd)
	return cmd
}

func (a *app) showFields(fields []db.MessageFieldsListRow) error {
	t := newTable("NUMBER", "FIELD", "TYPE", "SHOWN").cut(2)
	for _, f := range fields {
		kind := f.Kind
		if f.TypeName != "" {
			kind = f.TypeName
		}
		switch f.Label {
		case "map":
			kind = "map<" + f.MapKey + ", " + kind + ">"
		case "repeated", "packed":
			kind = "repeated " + kind
		}
		if a.output == outputJSON {
			if err := a.writeJSON(schemaField{f.Number, f.Name, kind, f.Redacted}); err != nil {
				return err
			}
			continue
		}
		shown := "yes"
		if f.Redacted {
			shown = "no"
		}
		t.add(strconv.Itoa(int(f.Number)), f.Name, kind, shown)
	}
	if a.output == outputJSON {
		return nil
	}
	return t.write(a.stdout)
}

func (a *app) schemaRemoveCommand() *cobra.Command {
	var name string
	return addDatabaseFlags(&cobra.Command{
		Use: "remove NAME", Short: "Remove what was added under a name; records stay, without a projection",
		Args: oneArg(&name),
		RunE: a.withDatabase(func(ctx context.Context, _ *cobra.Command, conn *pgx.Conn) error {
			err := schema.Remove(ctx, conn, name)
			if errors.Is(err, schema.ErrNotFound) {
				return &exitError{exitNotFound, err}
			}
			return err
		}),
	})
}

// A redaction is one line of `schema redact -o json`.
type redaction struct {
	Message  string `json:"message"`
	Field    string `json:"field"`
	Declared bool   `json:"declared"`
}

func (a *app) schemaRedactCommand() *cobra.Command {
	var (
		fields []string
		undo   bool
	)
	cmd := addDatabaseFlags(&cobra.Command{
		Use: "redact [MESSAGE.FIELD...]", Short: "Leave fields out of everything that can be read, or list those that are left out",
		Long: `Leave fields out of projections, so that neither SQL nor filters nor text queries see them; payloads keep them. Without
arguments, list the fields that are left out: those that descriptors mark (debug_redact), which cannot be changed, and those
named here. Existing records follow in the background.`,
		Example: "  pgbroker schema redact session.Session.claims\n  pgbroker schema redact --undo session.Session.claims",
		Args:    func(_ *cobra.Command, args []string) error { fields = args; return nil },
		RunE: a.withDatabase(func(ctx context.Context, _ *cobra.Command, conn *pgx.Conn) error {
			if len(fields) == 0 {
				return a.listRedactions(ctx, conn)
			}
			return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
				queries := db.New(tx)
				for _, name := range fields {
					dot := strings.LastIndexByte(name, '.')
					if dot < 0 {
						return usagef("%.80q: want a message and its field, as in session.Session.claims", name)
					}
					message, field := name[:dot], name[dot+1:]
					if !undo {
						if err := queries.RedactedFieldAdd(ctx, db.RedactedFieldAddParams{Message: message, Field: field}); err != nil {
							return err
						}
						continue
					}
					removed, err := queries.RedactedFieldDelete(ctx, db.RedactedFieldDeleteParams{Message: message, Field: field})
					if err != nil {
						return err
					}
					if removed == 0 {
						return &exitError{exitNotFound, fmt.Errorf("there is no rule about %q (descriptors cannot be overruled)", name)}
					}
				}
				return nil
			})
		}),
	})
	cmd.Flags().BoolVar(&undo, "undo", false, "show the fields again")
	a.addOutputFlag(cmd)
	return cmd
}

func (a *app) listRedactions(ctx context.Context, conn *pgx.Conn) error {
	rows, err := db.New(conn).SecretFieldsList(ctx)
	if err != nil {
		return err
	}
	t := newTable("MESSAGE", "FIELD", "BY")
	for _, row := range rows {
		if a.output == outputJSON {
			if err := a.writeJSON(redaction{row.Message, row.Field, row.Declared}); err != nil {
				return err
			}
			continue
		}
		by := "rule"
		if row.Declared {
			by = "descriptor"
		}
		t.add(row.Message, row.Field, by)
	}
	if a.output == outputJSON {
		return nil
	}
	return t.write(a.stdout)
}

func (a *app) schemaViewCommand() *cobra.Command {
	var params db.SchemaViewParams
	cmd := addDatabaseFlags(&cobra.Command{
		Use: "view TYPE", Short: "Print SQL that makes a view of the records of a type",
		Long: `Print SQL that makes a view of the records of a type, with a typed column for each field that is not secret. TYPE is a
record type, or the message of one; for records that are not of a message type, the columns are the fields found in them.`,
		Example: `  pgbroker schema view acme.Badge
  pgbroker schema view --name badges acme.Badge | pgbroker psql
  pgbroker schema view pomerium.io/GeoIP`,
		Args: oneArg(&params.RecordType),
		RunE: a.withDatabase(func(ctx context.Context, _ *cobra.Command, conn *pgx.Conn) error {
			definition, err := db.New(conn).SchemaView(ctx, params)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(a.stdout, clean(definition))
			return err
		}),
	})
	cmd.Flags().StringVar(&params.ViewName, "name", "", "name of the view as in SQL, such as pgbroker.badges (default: that of the message, in snake case)")
	cmd.Flags().StringVar(&params.Message, "message", "", "message of the payloads, where the record type is not named after it")
	return cmd
}
