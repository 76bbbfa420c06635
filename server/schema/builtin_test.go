package schema_test

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"pgbroker/db/dbtest"
	"pgbroker/server/schema"
)

// A released migration never changes: when this test says that the database and proto/ differ, write one that makes
// them equal. This prints the whole of it, to start from:
//
//	go test ./server/schema -run TestBuiltinDefinitions -write-definitions /tmp/definitions.sql
var writeDefinitions = flag.String("write-definitions", "", "write SQL that inserts the definitions of proto/ into this file")

// What the migrations say of the product's messages is what proto/ says.
func TestBuiltinDefinitions(t *testing.T) {
	t.Parallel()
	want := schema.Builtin()
	if *writeDefinitions != "" {
		if err := os.WriteFile(*writeDefinitions, []byte(insertStatements(want)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if len(want.Messages) < 50 || len(want.Fields) < 200 || len(want.EnumValues) < 10 {
		t.Fatalf("only %d messages with %d fields and %d enum values", len(want.Messages), len(want.Fields), len(want.EnumValues))
	}
	if diff := cmp.Diff(want, storedDefinitions(t, dbtest.New(t))); diff != "" {
		t.Errorf("the database differs from proto/ (-proto +database):\n%s", diff)
	}
}

// storedDefinitions reads back what is stored.
func storedDefinitions(t testing.TB, d *dbtest.Database) (found schema.Definitions) {
	t.Helper()
	collect := func(sql string, scan func(pgx.CollectableRow) error) {
		t.Helper()
		rows, err := d.Pool.Query(t.Context(), sql)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (struct{}, error) { return struct{}{}, scan(row) }); err != nil {
			t.Fatal(err)
		}
	}
	collect("SELECT message, form FROM pgbroker.messages ORDER BY message", func(row pgx.CollectableRow) error {
		var m schema.Message
		err := row.Scan(&m.Name, &m.Form)
		found.Messages = append(found.Messages, m)
		return err
	})
	collect(`SELECT message, number, name, json_name, kind, label, coalesce(type_name, ''), coalesce(map_key, ''), coalesce(oneof, ''), secret
		FROM pgbroker.message_fields ORDER BY message, number`, func(row pgx.CollectableRow) error {
		var f schema.Field
		err := row.Scan(&f.Message, &f.Number, &f.Name, &f.JSONName, &f.Kind, &f.Label, &f.TypeName, &f.MapKey, &f.Oneof, &f.Secret)
		found.Fields = append(found.Fields, f)
		return err
	})
	collect("SELECT enum, position, name, number FROM pgbroker.enum_values ORDER BY enum, position", func(row pgx.CollectableRow) error {
		var v schema.EnumValue
		err := row.Scan(&v.Enum, &v.Position, &v.Name, &v.Number)
		found.EnumValues = append(found.EnumValues, v)
		return err
	})
	return found
}

// insertStatements returns the definitions as SQL.
func insertStatements(d schema.Definitions) string {
	var b strings.Builder
	text := func(s string) string {
		if s == "" {
			return "NULL"
		}
		return "'" + s + "'"
	}
	b.WriteString("INSERT INTO pgbroker.messages (message, form) VALUES\n")
	for i, m := range d.Messages {
		fmt.Fprintf(&b, "  (%s, %s)%s\n", text(m.Name), text(m.Form), separator(i, len(d.Messages)))
	}
	b.WriteString("\nINSERT INTO pgbroker.message_fields\n" +
		"  (message, number, name, json_name, kind, label, type_name, map_key, oneof, secret) VALUES\n")
	for i, f := range d.Fields {
		fmt.Fprintf(&b, "  (%s, %d, %s, %s, %s, %s, %s, %s, %s, %t)%s\n", text(f.Message), f.Number, text(f.Name), text(f.JSONName),
			text(f.Kind), text(f.Label), text(f.TypeName), text(f.MapKey), text(f.Oneof), f.Secret, separator(i, len(d.Fields)))
	}
	b.WriteString("\nINSERT INTO pgbroker.enum_values (enum, position, name, number) VALUES\n")
	for i, v := range d.EnumValues {
		fmt.Fprintf(&b, "  (%s, %d, %s, %d)%s\n", text(v.Enum), v.Position, text(v.Name), v.Number, separator(i, len(d.EnumValues)))
	}
	return b.String()
}

func separator(i, n int) string {
	if i == n-1 {
		return ";"
	}
	return ","
}
