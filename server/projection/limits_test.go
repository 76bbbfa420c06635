package projection

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"pgbroker/proto/user"
)

func bytesField(num protowire.Number, b []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, num, protowire.BytesType), b)
}

func TestUnreadablePayloads(t *testing.T) {
	name := bytesField(3, []byte("ann"))
	for what, payload := range map[string][]byte{
		"absent":                 nil,
		"empty Any":              {},
		"not an Any":             {0xff},
		"Any cut short":          serialize(t, &user.User{Id: "x"})[:10],
		"group in Any cut short": {0x1b},
		"unknown type":           wrap("no.Such", name),
		"message cut short":      wrap("user.User", name[:3]),
		"bad tag":                wrap("user.User", append(name[:len(name):len(name)], 0x00)),
		"bad varint":             wrap("session.Session", []byte{0x98, 0x01, 0xff}),
		"bad fixed32":            wrap("user.User", []byte{0xfd, 0x01, 0}),
		"bad fixed64":            wrap("google.protobuf.DoubleValue", []byte{0x09, 0}),
		"group without end":      wrap("user.User", []byte{0xfb, 0x01}),
		"end without group":      wrap("user.User", []byte{0xfc, 0x01}),
		"string not UTF-8":       wrap("user.User", bytesField(3, []byte{0xff})),
		"map key not UTF-8":      wrap("user.User", bytesField(9, bytesField(1, []byte{0xff}))),
		"bad map entry":          wrap("user.User", bytesField(9, []byte{0x0a, 5})),
		"bad map value":          wrap("user.User", bytesField(9, bytesField(2, []byte{0x0a, 5}))),
		"bad list element":       wrap("session.Session", bytesField(17, []byte{0x0a, 5})),
		"bad Timestamp":          wrap("session.Session", bytesField(4, []byte{0x08})),
		"bad Duration":           wrap("google.protobuf.Duration", []byte{0x08}),
		"bad FieldMask":          wrap("google.protobuf.FieldMask", bytesField(1, []byte{0xff})),
		"bad nested Any":         wrap("google.protobuf.Any", []byte{0x0a, 5}),
		"bad type URL":           wrap("google.protobuf.Any", bytesField(1, []byte{0xff})),
	} {
		if got := New(nil).Project(payload); got.Data != nil || got.SearchText != "" || got.IndexCIDR != "" {
			t.Errorf("%s: %s, %q, want no projection", what, got.Data, got.SearchText)
		}
	}
	packed := New(testTypes(t)).Project(wrap("pb2.Old", bytesField(3, []byte{0xff})))
	if packed.Data != nil {
		t.Errorf("bad packed list: %s, want no projection", packed.Data)
	}
}

// The last of several map entries with the same key counts, however many there are.
func TestRepeatedMapKeys(t *testing.T) {
	var b []byte
	for i := range 100 {
		key, value := string(rune('a'+i%2)), strings.Repeat("x", i)
		b = append(b, bytesField(6, append(bytesField(1, []byte(key)), bytesField(2, []byte(value))...))...)
	}
	want := `{"details":{"a":"` + strings.Repeat("x", 98) + `","b":"` + strings.Repeat("x", 99) + `"}}`
	if got := string(New(nil).Project(wrap("session.SessionBinding", b)).Data); got != want {
		t.Errorf("Data = %s, want %s", got, want)
	}
}

// Numbers may have more bits than their kind, in map keys too.
func TestOverlongMapKeys(t *testing.T) {
	p := New(testTypes(t))
	mt, err := p.types.FindMessageByName("pb3.All")
	if err != nil {
		t.Fatal(err)
	}
	want := map[protoreflect.Kind]string{
		protoreflect.BoolKind: "true", protoreflect.Int32Kind: "2", protoreflect.Uint32Kind: "2", protoreflect.Sint32Kind: "1",
		protoreflect.Int64Kind: "4294967298", protoreflect.Uint64Kind: "4294967298", protoreflect.Sint64Kind: "2147483649",
	}
	fields := mt.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		if !fd.IsMap() || want[fd.MapKey().Kind()] == "" {
			continue
		}
		key := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 1<<32+2)
		got := string(p.Project(wrap("pb3.All", bytesField(fd.Number(), key))).Data)
		if want := `{"` + string(fd.Name()) + `":{"` + want[fd.MapKey().Kind()] + `":""}}`; got != want {
			t.Errorf("Data = %s, want %s", got, want)
		}
	}
}

// What a newer client adds to a message does not keep the rest from being seen. A wrong wire type counts as unknown.
func TestUnknownFieldsAreSkipped(t *testing.T) {
	b := bytesField(3, []byte("ann"))
	b = append(b, unknownField...)
	b = protowire.AppendVarint(protowire.AppendTag(b, 3, protowire.VarintType), 7)
	if got, want := string(New(nil).Project(wrap("user.User", b)).Data), `{"name":"ann"}`; got != want {
		t.Errorf("Data = %s, want %s", got, want)
	}
	payload := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 7)
	payload = append(append(payload, unknownField...), serialize(t, &user.User{Name: "ann"})...)
	if got, want := string(New(nil).Project(payload).Data), `{"name":"ann"}`; got != want {
		t.Errorf("unknown fields in the Any: Data = %s, want %s", got, want)
	}
}

// Descriptors that are loaded at run time may call anything google.protobuf.Struct. What comes of it is of no use, but it
// is JSON.
func TestStrangeWellKnownTypes(t *testing.T) {
	file := new(descriptorpb.FileDescriptorProto)
	var text strings.Builder
	text.WriteString(`name: "strange.proto" package: "google.protobuf" syntax: "proto3" `)
	for name := range wellKnown {
		text.WriteString(`message_type { name: "` + string(name.Name()) + `" }
			message_type { name: "S` + string(name.Name()) + `"
				field { name: "x" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".` + string(name) + `" } } `)
	}
	if err := prototext.Unmarshal([]byte(text.String()), file); err != nil {
		t.Fatal(err)
	}
	files, err := protodesc.NewFiles(&descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{file}})
	if err != nil {
		t.Fatal(err)
	}
	p := New(dynamicpb.NewTypes(files))
	for name := range wellKnown {
		for _, payload := range [][]byte{wrap(name, nil), wrap(name.Parent().Append("S"+name.Name()), bytesField(1, nil))} {
			if got := p.Project(payload); !json.Valid(got.Data) {
				t.Errorf("%s: Data = %q, want JSON", name, got.Data)
			}
		}
	}
}

// nest returns the wire form of a google.protobuf.Value with n lists around null.
func nest(n int) []byte {
	const listValue = 6
	b := []byte{0x08, 0x00}
	for range n {
		b = bytesField(listValue, bytesField(1, b))
	}
	return b
}

// nestAny returns the wire form of an Any with n more Anys around a message.
func nestAny(n int, name protoreflect.FullName, b []byte) []byte {
	b = wrap(name, b)
	for range n {
		b = wrap("google.protobuf.Any", b)
	}
	return b
}

func TestDeepPayloads(t *testing.T) {
	p := New(nil)
	deepest := (maxDepth - 1) / 2 // a list is a Value and a ListValue
	if got, want := string(p.Project(wrap("google.protobuf.Value", nest(deepest))).Data), strings.Repeat("[", deepest)+"null"+strings.Repeat("]", deepest); got != want {
		t.Errorf("Data = %s, want %s", got, want)
	}
	for what, payload := range map[string][]byte{
		"one list too many":   wrap("google.protobuf.Value", nest(deepest+1)),
		"many lists too many": wrap("google.protobuf.Value", nest(5_000)),
		"Any in Any":          nestAny(2_000, "user.User", nil),
	} {
		if got := p.Project(payload); got.Data != nil || got.SearchText != "" {
			t.Errorf("%s: Data of %d bytes, SearchText of %d bytes, want none", what, len(got.Data), len(got.SearchText))
		}
	}
}

// The index prefix does not depend on whether the rest makes a projection.
func TestDeepPayloadKeepsIndex(t *testing.T) {
	s := parseStruct(t, `{"$index":{"cidr":"10.0.0.0/8"}}`)
	deep := new(structpb.Value)
	for v, i := deep, 0; i < maxDepth; i++ {
		inner := new(structpb.Value)
		v.Kind = &structpb.Value_ListValue{ListValue: &structpb.ListValue{Values: []*structpb.Value{inner}}}
		v = inner
	}
	s.Fields["deep"] = deep
	got := New(nil).Project(serialize(t, s))
	if got.Data != nil || got.IndexCIDR != "10.0.0.0/8" {
		t.Errorf("%+v, want the index prefix only", got)
	}
}

func TestLargePayloads(t *testing.T) {
	p := New(nil)
	large := strings.Repeat("x", maxData-2)
	if got := p.Project(serialize(t, wrapperspb.String(large))); len(got.Data) != maxData || got.SearchText != large {
		t.Errorf("Data of %d bytes, SearchText of %d bytes, want all of it", len(got.Data), len(got.SearchText))
	}
	types := New(testTypes(t))
	bools := fieldNamed(t, types, "pb3.All", protoreflect.BoolKind)
	if got := types.Project(wrap("pb3.All", bytesField(bools, make([]byte, maxValues)))); len(got.Data) < 6*maxValues {
		t.Errorf("Data of %d bytes, want all of it", len(got.Data))
	}
	enums := fieldNamed(t, types, "pb3.All", protoreflect.EnumKind)
	for what, projection := range map[string]Projection{
		"string": p.Project(serialize(t, wrapperspb.String(large+"x"))),
		// A byte each on the wire, eight in JSON: "GREEN",
		"names":         types.Project(wrap("pb3.All", bytesField(enums, bytes.Repeat([]byte{1}, maxValues)))),
		"packed values": types.Project(wrap("pb3.All", bytesField(bools, make([]byte, maxValues+1)))),
		"values":        p.Project(wrap("google.protobuf.ListValue", bytes.Repeat(bytesField(1, nil), maxValues+1))),
	} {
		if projection.Data != nil || projection.SearchText != "" {
			t.Errorf("%s: Data of %d bytes, want none", what, len(projection.Data))
		}
	}
}

// fieldNamed returns the number of the repeated field many_… of a kind.
func fieldNamed(t testing.TB, p *Projector, name protoreflect.FullName, kind protoreflect.Kind) protowire.Number {
	t.Helper()
	mt, err := p.types.FindMessageByName(name)
	if err != nil {
		t.Fatal(err)
	}
	fields := mt.Descriptor().Fields()
	for i := range fields.Len() {
		if fd := fields.Get(i); strings.HasPrefix(string(fd.Name()), "many_") && fd.Kind() == kind {
			return fd.Number()
		}
	}
	t.Fatalf("no field of kind %s in %s", kind, name)
	return 0
}

// TestPostgresTakesProjections feeds the extremes of what Project returns to PostgreSQL: a projection must never be the
// reason why a write fails.
func TestPostgresTakesProjections(t *testing.T) {
	url := os.Getenv("TEST_DATABASE_URL")
	if url == "" {
		if os.Getenv("CI") == "true" {
			t.Fatal("TEST_DATABASE_URL is not set: CI must try projections on a real PostgreSQL")
		}
		t.Skip("TEST_DATABASE_URL is not set: not trying projections on a real PostgreSQL")
	}
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)

	linked, loaded := New(nil), New(testTypes(t))
	bools := fieldNamed(t, loaded, "pb3.All", protoreflect.BoolKind)
	ints := fieldNamed(t, loaded, "pb3.All", protoreflect.Int32Kind)
	for what, pr := range map[string]Projection{
		"session":    linked.Project(serialize(t, testSession())),
		"U+0000":     linked.Project(serialize(t, parseStruct(t, `{"a\u0000b":"c\u0000d","\u0000":"\u0000"}`))),
		"control":    linked.Project(serialize(t, parseStruct(t, `{"a\u0001":"\u001f\u007f\ufffe\uffff"}`))),
		"double":     linked.Project(serialize(t, parseStruct(t, `{"a":1.7976931348623157e308,"b":5e-324,"c":-0.0}`))),
		"scalar":     linked.Project(serialize(t, wrapperspb.Bool(true))),
		"deepest":    linked.Project(wrap("google.protobuf.Value", nest((maxDepth-1)/2))),
		"large text": linked.Project(serialize(t, wrapperspb.String(strings.Repeat("Éx", 2<<20)))),
		"large list": loaded.Project(wrap("pb3.All", bytesField(bools, make([]byte, maxValues)))),
		"most":       loaded.Project(wrap("pb3.All", bytesField(ints, make([]byte, maxValues)))),
	} {
		if pr.Data == nil {
			t.Errorf("%s: no projection", what)
			continue
		}
		var text string
		var length int
		err := conn.QueryRow(ctx, `
			SELECT CASE WHEN length($1::text) < 500 THEN $1::jsonb::text ELSE pg_column_size($1::jsonb)::text END, length($2::text)`,
			string(pr.Data), pr.SearchText).Scan(&text, &length)
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if len(pr.Data) < 500 && !json.Valid([]byte(text)) {
			t.Errorf("%s: PostgreSQL made %s of %s", what, text, pr.Data)
		}
	}
}

func TestProjectIsConcurrent(t *testing.T) {
	p := New(testTypes(t))
	linked := New(nil)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 200 {
				want := strings.Repeat("x", i)
				if got := linked.Project(serialize(t, &user.User{Id: want})); got.SearchText != want {
					t.Errorf("SearchText = %q, want %q", got.SearchText, want)
				}
				p.Project(wrap("pb2.Old", bytes.Repeat(bytesField(1, []byte("x")), i)))
			}
		})
	}
	wg.Wait()
}

// A projection must not share memory with the walker that the next one reuses, nor with the payload.
func TestProjectionsAreIndependent(t *testing.T) {
	p := New(nil)
	payload := serialize(t, &user.User{Id: "first", Name: "Ann"})
	first := p.Project(payload)
	clear(payload)
	p.Project(serialize(t, &user.User{Id: "second", Name: "Bob"}))
	if got, want := string(first.Data), `{"id":"first","name":"Ann"}`; got != want {
		t.Errorf("Data became %s, want %s", got, want)
	}
}
