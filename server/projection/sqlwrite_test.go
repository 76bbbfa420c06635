package projection

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"pgregory.net/rapid"

	"pgbroker/db/dbtest"
	"pgbroker/server/schema"
)

// What SQL makes of data (migration sql_writes) against what Project makes of payloads: each is the other's inverse.

// rapidChecks sets how hard rapid looks in one test; these ask a database each time.
func rapidChecks(t *testing.T, n string) {
	t.Helper()
	checks := flag.Lookup("rapid.checks").Value
	before := checks.String()
	t.Cleanup(func() {
		if err := checks.Set(before); err != nil {
			t.Error(err)
		}
	})
	if err := checks.Set(n); err != nil {
		t.Fatal(err)
	}
}

// sqlWriter is a database that knows types.
type sqlWriter struct {
	*dbtest.Database
	p *Projector
}

func newSQLWriter(t *testing.T, types Resolver) sqlWriter {
	t.Helper()
	w := sqlWriter{dbtest.New(t), New(types)}
	if types != nil {
		set := new(descriptorpb.FileDescriptorSet)
		for _, name := range []protoreflect.FullName{"pb3.All", "pb2.Old"} {
			mt, err := types.FindMessageByName(name)
			if err != nil {
				t.Fatal(err)
			}
			set.File = append(set.File, protodesc.ToFileDescriptorProto(mt.Descriptor().ParentFile()))
		}
		b, err := proto.Marshal(set)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := schema.Add(t.Context(), w.Pool, schema.Set{Name: "test", Descriptors: b}); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// encode has the database make a payload of data.
func (w sqlWriter) encode(t rapid.TB, name protoreflect.FullName, old []byte, before, value []byte) (payload []byte, data []byte, search, cidr string, err error) {
	t.Helper()
	var shown, beforeText *string
	if before != nil {
		s := string(before)
		beforeText = &s
	}
	err = w.Pool.QueryRow(context.Background(), `
		SELECT payload, data::text, coalesce(search_text, ''), coalesce(index_cidr::text, '')
		FROM pgbroker.encode_payload($1, $2, $3::text::jsonb, $4::text::jsonb)`,
		"type.googleapis.com/"+string(name), old, beforeText, string(value)).Scan(&payload, &shown, &search, &cidr)
	if shown != nil {
		data = []byte(*shown)
	}
	return payload, data, search, cidr, err
}

// negativeZero is a number that jsonb does not keep.
var negativeZero = regexp.MustCompile(`[:\[,]-0(\.0)?[,}\]]`)

var linkedNames = func() []protoreflect.FullName {
	names := []protoreflect.FullName{"google.protobuf.Struct", "google.protobuf.StringValue", "google.protobuf.Timestamp"}
	for _, mt := range payloadTypes() {
		names = append(names, mt.Descriptor().FullName())
	}
	return names
}()

var loadedNames = []protoreflect.FullName{
	"pb3.All", "pb3.All", "pb3.All", "pb2.Old", "google.protobuf.Struct", "google.protobuf.Value",
	"google.protobuf.ListValue", "google.protobuf.DoubleValue", "google.protobuf.UInt64Value", "google.protobuf.BytesValue",
	"google.protobuf.Duration", "google.protobuf.FieldMask", "google.protobuf.Empty",
}

func forEachSQLWriter(t *testing.T, checks string, property func(*rapid.T, sqlWriter, generator, protoreflect.MessageType)) {
	for name, run := range map[string]struct {
		types Resolver
		names []protoreflect.FullName
	}{
		"linked": {nil, linkedNames},
		"loaded": {testTypes(t), loadedNames},
	} {
		t.Run(name, func(t *testing.T) {
			w := newSQLWriter(t, run.types)
			rapidChecks(t, checks)
			rapid.Check(t, func(t *rapid.T) {
				mt, err := w.p.types.FindMessageByName(rapid.SampledFrom(run.names).Draw(t, "type"))
				if err != nil {
					t.Fatal(err)
				}
				property(t, w, generator{t, w.p.types, run.names}, mt)
			})
		})
	}
}

// A projection that is written in SQL becomes a payload with that projection.
func TestSQLWriteOfAProjectionIsItsInverse(t *testing.T) {
	forEachSQLWriter(t, "250", func(t *rapid.T, w sqlWriter, g generator, mt protoreflect.MessageType) {
		name := mt.Descriptor().FullName()
		want := w.p.Project(wrap(name, g.wire(g.message(mt, 3))))
		if want.Data == nil || negativeZero.Match(want.Data) {
			t.Skip()
		}
		payload, shown, search, cidr, err := w.encode(t, name, nil, nil, want.Data)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, want.Data)
		}
		got := w.p.Project(payload)
		if diff := cmp.Diff(withoutEmpty(normalize(decodeJSON(want.Data))), withoutEmpty(normalize(decodeJSON(got.Data)))); diff != "" {
			t.Fatalf("%s (-given +became):\n%s", name, diff)
		}
		if diff := cmp.Diff(normalize(decodeJSON(got.Data)), normalize(decodeJSON(shown))); diff != "" {
			t.Fatalf("%s: the payload's projection is not what SQL set data to (-projection +data):\n%s", name, diff)
		}
		if got.IndexCIDR != cidr {
			t.Fatalf("index %q, want %q", cidr, got.IndexCIDR)
		}
		if got, want := searchWords(search), searchWords(got.SearchText); isASCII(shown) && !cmp.Equal(got, want) {
			t.Fatalf("%s: search text %q, want %q", name, got, want)
		}
	})
}

// An edit changes what it changes and leaves the rest as it was, byte for byte: secrets, unknown fields, fields that it
// does not mention, however odd their encoding.
func TestSQLEditKeepsTheRest(t *testing.T) {
	forEachSQLWriter(t, "250", func(t *rapid.T, w sqlWriter, g generator, mt protoreflect.MessageType) {
		md := mt.Descriptor()
		if wellKnown[md.FullName()] != formObject {
			t.Skip("has no fields to keep")
		}
		var old []byte
		if rapid.Bool().Draw(t, "raw") {
			old = append(g.raw(md, 3), unknownField...)
		} else {
			old = g.messy(mt)
		}
		before := w.p.Project(wrap(md.FullName(), old)).Data
		other := w.p.Project(wrap(md.FullName(), g.wire(g.message(mt, 3)))).Data
		if before == nil || negativeZero.Match(before) || other == nil || negativeZero.Match(other) {
			t.Skip()
		}
		value := mix(t, md, before, other)
		valueJSON, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		payload, shown, _, _, err := w.encode(t, md.FullName(), wrap(md.FullName(), old), before, valueJSON)
		if err != nil {
			t.Fatalf("%s: %v\nbefore %s\nvalue %s", md.FullName(), err, before, valueJSON)
		}
		got := w.p.Project(payload).Data
		want := withoutEmpty(normalize(decodeJSON(valueJSON)))
		if diff := cmp.Diff(want, withoutEmpty(normalize(decodeJSON(got)))); diff != "" {
			t.Fatalf("%s (-wanted +became):\n%s\nbefore %s", md.FullName(), diff, before)
		}
		if diff := cmp.Diff(want, withoutEmpty(normalize(decodeJSON(shown)))); diff != "" {
			t.Fatalf("%s: data (-wanted +data):\n%s", md.FullName(), diff)
		}
		_, newValue, ok := splitAny(payload)
		if !ok {
			t.Fatal("not an Any")
		}
		wasShown, _ := normalize(decodeJSON(before)).(map[string]any)
		isShown, _ := normalize(decodeJSON(valueJSON)).(map[string]any)
		changed := func(fd protoreflect.FieldDescriptor) bool {
			was, hadIt := wasShown[fd.TextName()]
			is, hasIt := isShown[fd.TextName()]
			return hadIt != hasIt || !cmp.Equal(was, is)
		}
		// A oneof of which a visible member has changed has no other members any more.
		settled := map[protoreflect.Name]bool{}
		for i := range md.Fields().Len() {
			fd := md.Fields().Get(i)
			if od := fd.ContainingOneof(); od != nil && changed(fd) {
				settled[od.Name()] = true
			}
		}
		oldFields, newFields := occurrences(old), occurrences(newValue)
		for number, was := range oldFields {
			fd := md.Fields().ByNumber(number)
			if fd != nil && (changed(fd) || fd.ContainingOneof() != nil && settled[fd.ContainingOneof().Name()]) {
				continue
			}
			if !bytes.Equal(was, newFields[number]) {
				t.Fatalf("%s: field %d was % x and is % x\nbefore %s\nvalue %s", md.FullName(), number, was, newFields[number], before, valueJSON)
			}
		}
	})
}

// mix draws an object that has each member of either object, or none of it.
func mix(t *rapid.T, md protoreflect.MessageDescriptor, before, other []byte) map[string]any {
	a, b := decodeJSON(before).(map[string]any), decodeJSON(other).(map[string]any)
	mixed := map[string]any{}
	taken := map[protoreflect.Name]bool{}
	for i := range md.Fields().Len() {
		fd := md.Fields().Get(i)
		from := rapid.SampledFrom([]map[string]any{a, a, b, nil}).Draw(t, "from")
		value, ok := from[fd.TextName()]
		if !ok {
			continue
		}
		if od := fd.ContainingOneof(); od != nil {
			if taken[od.Name()] {
				continue
			}
			taken[od.Name()] = true
		}
		mixed[fd.TextName()] = value
	}
	return mixed
}

// occurrences returns the encodings of the fields of a message, by number.
func occurrences(b []byte) map[protowire.Number][]byte {
	found := map[protowire.Number][]byte{}
	for len(b) > 0 {
		num, _, n := protowire.ConsumeField(b)
		if n < 0 {
			break
		}
		found[num] = append(found[num], b[:n]...)
		b = b[n:]
	}
	return found
}

// withoutEmpty returns JSON without members that are empty text or null: U+0000 alone is not shown, neither are numbers of
// google.protobuf.NullValue that it does not have, and what is not shown can
// not be written.
func withoutEmpty(v any) any {
	switch v := v.(type) {
	case []any:
		for i := range v {
			v[i] = withoutEmpty(v[i])
		}
	case map[string]any:
		for key, member := range v {
			if v[key] = withoutEmpty(member); member == "" || member == nil {
				delete(v, key)
			}
		}
	}
	return v
}

// searchWords returns the strings of a search text, sorted, without those that others contain: a Projector leaves some out.
func searchWords(text string) []string {
	words := strings.Split(text, string(Separator))
	slices.Sort(words)
	words = slices.Compact(words)
	all := slices.Clone(words)
	return slices.DeleteFunc(words, func(word string) bool {
		return slices.ContainsFunc(all, func(other string) bool { return other != word && strings.Contains(other, word) })
	})
}

// isASCII reports whether a text is folded in the same way by everybody.
func isASCII(text []byte) bool {
	return bytes.IndexFunc(text, func(r rune) bool { return r >= utf8.RuneSelf }) < 0
}
