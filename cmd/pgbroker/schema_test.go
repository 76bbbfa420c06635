package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"pgbroker/db/dbtest"
)

// descriptorSet writes a set with one file, given as text.
func descriptorSet(t *testing.T, name, file string) string {
	t.Helper()
	set := &descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{new(descriptorpb.FileDescriptorProto)}}
	if err := prototext.Unmarshal([]byte(file), set.File[0]); err != nil {
		t.Fatal(err)
	}
	b, err := proto.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const badgeProto = `name: "acme.proto" package: "acme" syntax: "proto3" message_type { name: "Badge"
	field { name: "owner" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
	field { name: "doors" number: 2 label: LABEL_REPEATED type: TYPE_INT32 }
	field { name: "pin" number: 3 label: LABEL_OPTIONAL type: TYPE_STRING options { debug_redact: true } } }`

func TestSchemaCommands(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	env := append(os.Environ(), "PGBROKER_DATABASE_URL="+d.ConnString)
	expect := func(got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("\n--- got\n%s--- want\n%s", got, want)
		}
	}
	path := descriptorSet(t, "Acme Badges.binpb", badgeProto)
	expect(mustTry(t, env, "schema", "add", path), "SCHEMA       MESSAGE     FIELDS\nacme_badges  acme.Badge  3\n")
	expect(mustTry(t, env, "schema", "add", path, "-o", "json"), `{"schema":"acme_badges","message":"acme.Badge","fields":3}`+"\n")
	if out := mustTry(t, env, "schema", "list"); !strings.Contains(out, "acme_badges  1 ") {
		t.Errorf("list: %s", out)
	}
	expect(mustTry(t, env, "schema", "show", "acme_badges"), "SCHEMA       MESSAGE     FIELDS\nacme_badges  acme.Badge  3\n")
	mustTry(t, env, "schema", "redact", "acme.Badge.doors")
	expect(mustTry(t, env, "schema", "show", "acme.Badge"), "NUMBER  FIELD  TYPE            SHOWN\n"+
		"1       owner  string          yes\n2       doors  repeated int32  no\n3       pin    string          no\n")
	if out := mustTry(t, env, "schema", "redact", "-o", "json"); !strings.HasPrefix(out, `{"message":"acme.Badge","field":"doors","declared":false}`+"\n"+
		`{"message":"acme.Badge","field":"pin","declared":true}`+"\n") || !strings.Contains(out, `{"message":"session.OAuthToken","field":"access_token","declared":true}`) {
		t.Errorf("redact: %s", out)
	}
	mustTry(t, env, "schema", "redact", "--undo", "acme.Badge.doors")
	view := mustTry(t, env, "schema", "view", "--name", "badges", "acme.Badge")
	d.Exec(t, view)
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data) VALUES ('type.googleapis.com/acme.Badge', '1', '{"owner": "Jane", "pin": "1"}')`)
	var owner string
	if err := d.Pool.QueryRow(t.Context(), "SELECT owner FROM badges WHERE id = '1' AND doors IS NULL").Scan(&owner); err != nil || owner != "Jane" {
		t.Errorf("view: %q, %v\n%s", owner, err, view)
	}
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"schema", "add", filepath.Join(t.TempDir(), "none")}, exitUsage, "no such file"},
		{[]string{"schema", "add", "--name", "X", path}, exitUsage, "--name: schema name \"X\": want up to 63"},
		{[]string{"schema", "add", "schema_test.go"}, exitUsage, "not a serialized google.protobuf.FileDescriptorSet"},
		{[]string{"schema", "add", "--name", "other", descriptorSet(t, "x", strings.Replace(badgeProto, "acme.proto", "x.proto", 1))}, exitUsage,
			"x.proto declares acme.Badge, which schema acme_badges has already, in acme.proto"},
		{[]string{"schema", "show", "nope"}, exitNotFound, "there is no schema"},
		{[]string{"schema", "remove", "nope"}, exitNotFound, "there is no schema"},
		{[]string{"schema", "redact", "nope"}, exitUsage, "want a message and its field"},
		{[]string{"schema", "redact", "acme.Badge.nope"}, exitFailure, "there is no field 'nope' in message 'acme.Badge' (Fields are named"},
		{[]string{"schema", "redact", "--undo", "acme.Badge.pin"}, exitNotFound, "there is no rule about"},
		{[]string{"schema", "view", "acme.Nope"}, exitFailure, "there is no record of type 'acme.Nope'"},
		{[]string{"schema", "list", "--database-url", "postgres:///x?host=/nowhere"}, exitUnreachable, "nowhere"},
	} {
		if r := try(t, env, test.args...); r.code != test.code || !strings.Contains(r.stderr, test.want) {
			t.Errorf("%q: got exit code %d and %q, want %d and %q", test.args, r.code, r.stderr, test.code, test.want)
		}
	}
	mustTry(t, env, "schema", "remove", "acme_badges")
	expect(mustTry(t, env, "schema", "list"), "NAME  MESSAGES  MODIFIED\n")
}
