package schema_test

import (
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"google.golang.org/protobuf/reflect/protodesc"

	"pgbroker/db/dbtest"
	"pgbroker/proto/session"
	"pgbroker/server/schema"
)

// A set that cannot be used is refused, with what is wrong with it.
func TestABrokenSetIsRefused(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	add(t, d, set(t, "acme", badgeFile))
	add(t, d, set(t, "other", `name: "other.proto" package: "other" syntax: "proto3" message_type { name: "Thing" }`))
	for name, test := range map[string]struct {
		set  schema.Set
		want string
	}{
		"not a set":      {schema.Set{Name: "x", Descriptors: []byte(`syntax = "proto3";`)}, "not a serialized google.protobuf.FileDescriptorSet"},
		"empty":          {schema.Set{Name: "x"}, "holds no file"},
		"nameless file":  {set(t, "x", `package: "x"`), "a file without a name"},
		"name":           {set(t, "Käse", badgeFile), "want up to 63 lower-case letters"},
		"no message":     {set(t, "x", `name: "x.proto" enum_type { name: "X" value { name: "A" number: 0 } }`), "holds no message"},
		"missing import": {set(t, "x", `name: "x.proto" dependency: "acme/badge.proto" message_type { name: "X" }`), "x.proto imports acme/badge.proto, which is neither in the set nor part of pgbroker"},
		"cycle": {set(t, "x", `name: "a.proto" dependency: "b.proto" message_type { name: "A" }`,
			`name: "b.proto" dependency: "a.proto" message_type { name: "B" }`), "import each other"},
		"unknown type": {set(t, "x", `name: "x.proto" syntax: "proto3" message_type { name: "X"
			field { name: "y" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".x.Y" } }`), "x.Y"},
		"twice":       {set(t, "x", `name: "x.proto"`, `name: "x.proto"`), "holds x.proto twice"},
		"builtin":     {set(t, "x", `name: "x.proto" package: "session" syntax: "proto3" message_type { name: "Session" }`), "x.proto declares session.Session, which pgbroker itself has already, in session/session.proto"},
		"other set":   {set(t, "x", `name: "x.proto" package: "acme" syntax: "proto3" message_type { name: "Badge" }`), "declares acme.Badge, which schema acme has already"},
		"other file":  {set(t, "x", `name: "other.proto" package: "x" syntax: "proto3" message_type { name: "X" }`), "other.proto is another file of that name than that of schema other"},
		"number":      {set(t, "acme", strings.Replace(badgeFile, "number: 4 label: LABEL_REPEATED type: TYPE_INT32", "number: 4 label: LABEL_REPEATED type: TYPE_STRING", 1)), "field number 4 of message acme.Badge was repeated int32 (doors) and would be repeated string (doors)"},
		"cardinality": {set(t, "acme", strings.Replace(badgeFile, "number: 4 label: LABEL_REPEATED", "number: 4 label: LABEL_OPTIONAL", 1)), "field number 4 of message acme.Badge was repeated int32"},
	} {
		_, err := schema.Add(t.Context(), d.Pool, test.set)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want an error with %q", name, err, test.want)
		}
	}
	if got := columns(t, d, "SELECT name FROM pgbroker.schemas ORDER BY name"); len(got) != 2 {
		t.Errorf("stored: %v", got)
	}
	if err := schema.Remove(t.Context(), d.Pool, "nope"); !errors.Is(err, schema.ErrNotFound) {
		t.Errorf("remove: got %v", err)
	}
}

// What readers of stored payloads can live with is accepted; what two sets share belongs to both.
func TestASetMayGrowAndShare(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	add(t, d, set(t, "acme", badgeFile))
	grown := strings.Replace(badgeFile, `enum_type {`, `field { name: "more" number: 9 label: LABEL_OPTIONAL type: TYPE_STRING } enum_type {`, 1)
	grown = strings.Replace(grown, "TYPE_UINT64", "TYPE_INT64", 1)
	add(t, d, set(t, "acme", grown))
	if got := get[string](t, d, "SELECT kind FROM pgbroker.message_fields WHERE message = 'acme.Badge' AND number = 9"); got != "string" {
		t.Error(got)
	}
	// With what protoc --include_imports adds, and a file that another set has, too.
	ofProduct := new(descriptorpb.FileDescriptorSet)
	for _, m := range []proto.Message{new(timestamppb.Timestamp), new(session.Session)} {
		ofProduct.File = append(ofProduct.File, protodesc.ToFileDescriptorProto(m.ProtoReflect().Descriptor().ParentFile()))
	}
	user := set(t, "user", grown, `name: "user.proto" package: "u" syntax: "proto3" dependency: "acme/badge.proto" dependency: "session/session.proto"
		message_type { name: "U" field { name: "badge" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".acme.Badge" }
			field { name: "session" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".session.Session" } }`)
	more, err := proto.Marshal(ofProduct)
	if err != nil {
		t.Fatal(err)
	}
	user.Descriptors = append(user.Descriptors, more...) // sets join like this
	add(t, d, user)
	if err := schema.Remove(t.Context(), d.Pool, "acme"); err != nil {
		t.Fatal(err)
	}
	if got := get[string](t, d, "SELECT schema FROM pgbroker.messages WHERE message = 'acme.Badge'"); got != "user" {
		t.Errorf("the shared message belongs to %q", got)
	}
	if err := schema.Remove(t.Context(), d.Pool, "user"); err != nil {
		t.Fatal(err)
	}
	if got := storedDefinitions(t, d); len(got.Messages) != len(schema.Builtin().Messages) {
		t.Errorf("%d messages are left, want %d", len(got.Messages), len(schema.Builtin().Messages))
	}
}
