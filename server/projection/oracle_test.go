package projection

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"
)

// The oracle: what the library makes of a message, by the slow road. It decodes, clears what is secret, and lets
// protojson write the JSON.

type oracle struct{ types Resolver }

// project returns the JSON, decoded, and the searched strings. It fails where the library refuses the message.
func (o oracle) project(md protoreflect.MessageDescriptor, wire []byte) (data any, search []string, err error) {
	mt, err := o.types.FindMessageByName(md.FullName())
	if err != nil {
		return nil, nil, err
	}
	m := mt.New()
	if !New(o.types).unmarshal(wire, m) {
		return nil, nil, errBadData
	}
	o.redact(m)
	search = o.search(m, nil)
	for i, s := range search {
		search[i] = notSearched.Replace(strings.ToLower(plain(s)))
	}
	search = slices.DeleteFunc(search, func(s string) bool { return s == "" })
	slices.Sort(search)
	js, err := protojson.MarshalOptions{UseProtoNames: true, Resolver: o.types, AllowPartial: true}.Marshal(m.Interface())
	if err != nil {
		return nil, nil, err
	}
	return normalize(plainJSON(decodeJSON(js))), search, nil
}

func isSecret(fd protoreflect.FieldDescriptor) bool {
	return fd.Options().(*descriptorpb.FieldOptions).GetDebugRedact()
}

func (o oracle) redact(m protoreflect.Message) {
	if m.Descriptor().FullName() == "google.protobuf.Any" {
		fields := m.Descriptor().Fields()
		url, value := fields.ByName("type_url"), fields.ByName("value")
		mt, err := o.types.FindMessageByURL(m.Get(url).String())
		if err != nil {
			return
		}
		inner := mt.New()
		if !New(o.types).unmarshal(m.Get(value).Bytes(), inner) {
			return
		}
		o.redact(inner)
		b, err := proto.MarshalOptions{AllowPartial: true}.Marshal(inner.Interface())
		if err != nil {
			panic(err)
		}
		m.Set(value, protoreflect.ValueOfBytes(b))
		return
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case isSecret(fd):
			m.Clear(fd)
		case fd.IsMap():
			if fd.MapValue().Message() != nil {
				v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { o.redact(v.Message()); return true })
			}
		case fd.Message() == nil:
		case fd.IsList():
			for i := range v.List().Len() {
				o.redact(v.List().Get(i).Message())
			}
		default:
			o.redact(v.Message())
		}
		return true
	})
}

// search is section 2.8 of the wire contract, word by word.
func (o oracle) search(m protoreflect.Message, found []string) []string {
	one := func(fd protoreflect.FieldDescriptor, v protoreflect.Value) {
		switch fd.Kind() {
		case protoreflect.StringKind:
			found = append(found, v.String())
		case protoreflect.MessageKind:
			found = o.search(v.Message(), found)
		}
	}
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case fd.IsMap():
			v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool { one(fd.MapValue(), v); return true })
		case fd.IsList():
			for i := range v.List().Len() {
				one(fd, v.List().Get(i))
			}
		default:
			one(fd, v)
		}
		return true
	})
	return found
}

func decodeJSON(js []byte) any {
	d := json.NewDecoder(bytes.NewReader(js))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		panic(fmt.Sprintf("%v: %s", err, js))
	}
	return v
}

// plain is how projections write a text.
func plain(s string) string {
	var out strings.Builder
	for _, r := range s {
		switch r {
		case 0:
			out.WriteString("\U0010FFFF0")
		case 0x10FFFF:
			out.WriteString("\U0010FFFF\U0010FFFF")
		default:
			out.WriteRune(r)
		}
	}
	return out.String()
}

// plainJSON is plain for all texts in decoded JSON.
func plainJSON(v any) any {
	switch v := v.(type) {
	case string:
		return plain(v)
	case []any:
		for i := range v {
			v[i] = plainJSON(v[i])
		}
	case map[string]any:
		out := make(map[string]any, len(v))
		for k, member := range v {
			out[plain(k)] = plainJSON(member)
		}
		return out
	}
	return v
}

// normalize does to decoded JSON what jsonb can not do without: numbers lose their spelling.
func normalize(v any) any {
	switch v := v.(type) {
	case json.Number:
		f, err := v.Float64()
		if err != nil {
			panic(err)
		}
		return f
	case []any:
		for i := range v {
			v[i] = normalize(v[i])
		}
	case map[string]any:
		for k := range v {
			v[k] = normalize(v[k])
		}
	}
	return v
}

// compare fails the test unless the projection of the message is what the oracle says.
func (o oracle) compare(t rapid.TB, p *Projector, md protoreflect.MessageDescriptor, wire []byte) {
	t.Helper()
	want, wantSearch, err := o.project(md, wire)
	if err != nil {
		t.Skip(err) // raw fields can make what the library refuses, and protojson is stricter than Project
	}
	got := p.Project(wrap(md.FullName(), wire))
	if got.Data == nil {
		t.Fatalf("no projection, want %v", want)
	}
	if !json.Valid(got.Data) {
		t.Fatalf("not JSON: %s", got.Data)
	}
	if diff := cmp.Diff(want, normalize(decodeJSON(got.Data))); diff != "" {
		t.Fatalf("Data of %s (-want +got):\n%s\n%s", md.FullName(), diff, got.Data)
	}
	var search []string
	if got.SearchText != "" {
		search = strings.Split(got.SearchText, string(Separator))
	}
	for _, s := range search {
		if _, ok := slices.BinarySearch(wantSearch, s); !ok {
			t.Fatalf("SearchText of %s has %q, which is no string of it: %q", md.FullName(), s, wantSearch)
		}
	}
	for _, s := range wantSearch {
		if !slices.ContainsFunc(search, func(found string) bool { return strings.Contains(found, s) }) {
			t.Fatalf("SearchText of %s lacks %q: %q", md.FullName(), s, search)
		}
	}
	if strings.Contains(got.SearchText, marker) || strings.Contains(string(got.Data), marker) ||
		strings.Contains(string(got.Data), base64.StdEncoding.EncodeToString([]byte(marker))) {
		t.Fatalf("secret in projection: %s\n%s", got.Data, got.SearchText)
	}
	again := p.Project(wrap(md.FullName(), wire))
	if !bytes.Equal(again.Data, got.Data) || again.SearchText != got.SearchText {
		t.Fatalf("two projections of one payload:\n%s\n%s", got.Data, again.Data)
	}
	var compacted bytes.Buffer
	if err := json.Compact(&compacted, got.Data); err != nil || !bytes.Equal(compacted.Bytes(), got.Data) {
		t.Fatalf("not compact: %s", got.Data)
	}
}

// wrap returns a serialized Any.
func wrap(name protoreflect.FullName, wire []byte) []byte {
	b := protowire.AppendTag(nil, 1, protowire.BytesType)
	b = protowire.AppendString(b, "type.googleapis.com/"+string(name))
	b = protowire.AppendTag(b, 2, protowire.BytesType)
	return protowire.AppendBytes(b, wire)
}

// marker is in every secret that the generator makes, and nowhere else. Its length keeps its base64 recognizable.
const marker = "m4rker"

// generator draws messages of any type.
type generator struct {
	t     *rapid.T
	types Resolver
	any   []protoreflect.FullName // what an Any may hold
}

var genStrings = rapid.OneOf(
	rapid.SampledFrom([]string{"", "a", "Ab", "ÀÉ", "İ\u212a", "\"\\\x00\x01\n\u2028\U0001f600", "\x00", "A\x00É", "A\U0010FFFF", "\U0010FFFF0\x00", "1", "true", "</script>"}),
	rapid.String(),
)

func (g generator) message(mt protoreflect.MessageType, depth int) protoreflect.Message {
	m := mt.New()
	t := g.t
	switch md := mt.Descriptor(); md.FullName() {
	case "google.protobuf.Timestamp":
		ts := &timestamppb.Timestamp{
			Seconds: rapid.Int64Range(-62135596800, 253402300799).Draw(t, "seconds"),
			Nanos:   rapid.SampledFrom([]int32{0, 0, 1, 999_999_999, 120_000_000, 123_000, 1000}).Draw(t, "nanos"),
		}
		return transcode(ts, mt)
	case "google.protobuf.Duration":
		d := &durationpb.Duration{
			Seconds: rapid.Int64Range(0, 315576000000).Draw(t, "seconds"),
			Nanos:   rapid.SampledFrom([]int32{0, 1, 500_000_000, 123_000}).Draw(t, "nanos"),
		}
		return transcode(d, mt)
	case "google.protobuf.FieldMask":
		paths := m.Mutable(md.Fields().ByName("paths")).List()
		for _, p := range rapid.SliceOfN(rapid.SampledFrom([]string{"a", "user_id", "a_b.c_d"}), 0, 3).Draw(t, "paths") {
			paths.Append(protoreflect.ValueOfString(p))
		}
		return m
	case "google.protobuf.Value":
		value := rapid.SampledFrom([]any{nil, true, "", "Text", 0.0, -1.5, 1e6, 1e21, 1e-7, []any{}, map[string]any{}}).Draw(t, "value")
		if depth > 0 && rapid.Bool().Draw(t, "nested") {
			value = []any{value, map[string]any{"K\x00": value, "": []any{value}, "a": "Nested"}}
		}
		v, err := structpb.NewValue(value)
		if err != nil {
			t.Fatal(err)
		}
		return transcode(v, mt)
	case "google.protobuf.Any":
		if depth == 0 || rapid.IntRange(0, 3).Draw(t, "empty") == 0 {
			return m
		}
		name := rapid.SampledFrom(g.any).Draw(t, "type")
		inner, err := g.types.FindMessageByName(name)
		if err != nil {
			t.Fatal(err)
		}
		// Never empty, lest two Anys merged have the type of one and the value of the other.
		value := append(g.wire(g.message(inner, depth-1)), unknownField...)
		a := &anypb.Any{TypeUrl: "example.com/" + string(name), Value: value}
		return transcode(a, mt)
	}
	fields := mt.Descriptor().Fields()
	var some []int
	if n := fields.Len(); n > 0 {
		some = rapid.SliceOfNDistinct(rapid.IntRange(0, n-1), 0, min(n, 6), rapid.ID).Draw(t, "fields")
	}
	for _, i := range some {
		fd := fields.Get(i)
		secret := isSecret(fd)
		switch {
		case fd.IsMap():
			entries := m.Mutable(fd).Map()
			for range rapid.IntRange(0, 3).Draw(t, "entries") {
				v := entries.NewValue()
				if fd.MapValue().Message() != nil {
					if depth == 0 {
						continue
					}
					v = g.nested(v, depth)
				} else {
					v = g.scalar(fd.MapValue(), secret)
				}
				entries.Set(g.scalar(fd.MapKey(), false).MapKey(), v)
			}
		case fd.IsList():
			elems := m.Mutable(fd).List()
			for range rapid.IntRange(0, 3).Draw(t, "elements") {
				if fd.Message() == nil {
					elems.Append(g.scalar(fd, secret))
				} else if depth > 0 {
					elems.Append(g.nested(elems.NewElement(), depth))
				}
			}
		case fd.Message() == nil:
			m.Set(fd, g.scalar(fd, secret))
		case depth > 0:
			m.Set(fd, g.nested(m.NewField(fd), depth))
		}
	}
	return m
}

func (g generator) nested(v protoreflect.Value, depth int) protoreflect.Value {
	return protoreflect.ValueOfMessage(g.message(v.Message().Type(), depth-1))
}

func transcode(m proto.Message, mt protoreflect.MessageType) protoreflect.Message {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err)
	}
	out := mt.New()
	if err := proto.Unmarshal(b, out.Interface()); err != nil {
		panic(err)
	}
	return out
}

func (g generator) scalar(fd protoreflect.FieldDescriptor, secret bool) protoreflect.Value {
	t := g.t
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(rapid.Bool().Draw(t, "bool"))
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(rapid.SampledFrom([]int32{0, 1, -1, 2, 99}).Draw(t, "enum")))
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(rapid.Int32().Draw(t, "int32"))
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(rapid.Uint32().Draw(t, "uint32"))
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(rapid.Int64().Draw(t, "int64"))
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(rapid.Uint64().Draw(t, "uint64"))
	case protoreflect.FloatKind:
		special := rapid.SampledFrom([]float32{0, float32(math.Copysign(0, -1)), float32(math.NaN()), float32(math.Inf(1)), 0.1, 1e-7, 3e30})
		return protoreflect.ValueOfFloat32(rapid.OneOf(special, rapid.Float32()).Draw(t, "float"))
	case protoreflect.DoubleKind:
		special := rapid.SampledFrom([]float64{0, math.Copysign(0, -1), math.NaN(), math.Inf(1), math.Inf(-1), 0.1, 1e-7, 1e6, 1e21})
		return protoreflect.ValueOfFloat64(rapid.OneOf(special, rapid.Float64()).Draw(t, "double"))
	case protoreflect.StringKind:
		s := genStrings.Draw(t, "string")
		if secret {
			s = marker + s
		}
		return protoreflect.ValueOfString(s)
	case protoreflect.BytesKind:
		b := rapid.SliceOfN(rapid.Byte(), 0, 5).Draw(t, "bytes")
		if secret {
			b = append([]byte(marker), b...)
		}
		return protoreflect.ValueOfBytes(b)
	}
	panic(fd.Kind())
}

func (g generator) wire(m protoreflect.Message) []byte {
	b, err := proto.MarshalOptions{AllowPartial: true, Deterministic: true}.Marshal(m.Interface())
	if err != nil {
		g.t.Fatal(err)
	}
	return b
}

// unknownField is field 131071, a string.
var unknownField = []byte{0xfa, 0xff, 0x3f, 0x03, 'x', 'y', 'z'}

// messy returns an encoding that no encoder would write and every decoder must read: fields twice, oneofs with several
// members, lists in pieces, any order, unknown fields.
func (g generator) messy(mt protoreflect.MessageType) []byte {
	t := g.t
	var b []byte
	for range rapid.IntRange(1, 3).Draw(t, "messages") {
		b = append(b, g.wire(g.message(mt, 3))...)
	}
	if mt.Descriptor().FullName() == "google.protobuf.Any" || rapid.Bool().Draw(t, "ordered") {
		return b
	}
	var fields [][]byte
	for len(b) > 0 {
		_, _, n := protowire.ConsumeField(b)
		fields = append(fields, b[:n])
		b = b[n:]
	}
	fields = append(fields, unknownField)
	return bytes.Join(rapid.Permutation(fields).Draw(t, "order"), nil)
}

// raw returns an encoding made of fields that need not be what their type says: other wire types, numbers with more
// bits than fit, zeros that are spelled out, messages in pieces.
func (g generator) raw(md protoreflect.MessageDescriptor, depth int) (b []byte) {
	t := g.t
	fields := md.Fields()
	if fields.Len() == 0 {
		return nil
	}
	varints := rapid.SampledFrom([]uint64{0, 1, 2, 127, 1 << 31, 1 << 32, 1<<32 + 5, 1<<63 + 1, math.MaxUint64})
	for range rapid.IntRange(0, 4).Draw(t, "raw fields") {
		fd := fields.Get(rapid.IntRange(0, fields.Len()-1).Draw(t, "field"))
		typ := wireTypes[fd.Kind()]
		if rapid.IntRange(0, 3).Draw(t, "other wire type") == 0 {
			typ = rapid.SampledFrom([]protowire.Type{
				protowire.VarintType, protowire.Fixed32Type, protowire.Fixed64Type, protowire.BytesType, protowire.StartGroupType,
			}).Draw(t, "wire type")
		}
		b = protowire.AppendTag(b, fd.Number(), typ)
		switch typ {
		case protowire.VarintType:
			b = protowire.AppendVarint(b, varints.Draw(t, "varint"))
		case protowire.Fixed32Type:
			b = protowire.AppendFixed32(b, uint32(varints.Draw(t, "fixed32")))
		case protowire.Fixed64Type:
			b = protowire.AppendFixed64(b, varints.Draw(t, "fixed64"))
		case protowire.BytesType:
			inner := rapid.SampledFrom([][]byte{nil, nil, {'a'}, {8, 1}, make([]byte, 8)}).Draw(t, "bytes")
			if fd.Message() != nil && depth > 0 {
				inner = g.raw(fd.Message(), depth-1)
			} else if isSecret(fd) {
				inner = []byte(marker)
			}
			b = protowire.AppendBytes(b, inner)
		case protowire.StartGroupType:
			if fd.Kind() == protoreflect.GroupKind && depth > 0 {
				b = append(b, g.raw(fd.Message(), depth-1)...)
			}
			b = protowire.AppendTag(b, fd.Number(), protowire.EndGroupType)
		}
	}
	return b
}

// check draws messages of the types and compares.
func check(t *testing.T, p *Projector, names []protoreflect.FullName) {
	o := oracle{p.types}
	draw := func(t *rapid.T) (generator, protoreflect.MessageType) {
		mt, err := p.types.FindMessageByName(rapid.SampledFrom(names).Draw(t, "type"))
		if err != nil {
			t.Fatal(err)
		}
		return generator{t, p.types, names}, mt
	}
	t.Run("messy", func(t *testing.T) {
		rapid.Check(t, func(t *rapid.T) {
			g, mt := draw(t)
			wire := g.messy(mt)
			if _, _, err := o.project(mt.Descriptor(), wire); err != nil {
				t.Fatalf("oracle: %v", err)
			}
			o.compare(t, p, mt.Descriptor(), wire)
		})
	})
	t.Run("raw", func(t *testing.T) {
		rapid.Check(t, func(t *rapid.T) {
			g, mt := draw(t)
			o.compare(t, p, mt.Descriptor(), g.raw(mt.Descriptor(), 3))
		})
	})
}

func TestLinkedTypesAgreeWithProtoJSON(t *testing.T) {
	types := payloadTypes()
	if len(types) < 29 {
		t.Fatalf("only %d payload types are linked in", len(types))
	}
	names := []protoreflect.FullName{
		"google.protobuf.Struct", "google.protobuf.Any", "google.protobuf.StringValue", "google.protobuf.Timestamp",
	}
	for _, mt := range types {
		names = append(names, mt.Descriptor().FullName())
	}
	check(t, New(nil), names)
}

func TestLoadedTypesAgreeWithProtoJSON(t *testing.T) {
	check(t, New(testTypes(t)), []protoreflect.FullName{
		"pb3.All", "pb3.All", "pb3.All", "pb2.Old", "google.protobuf.Struct", "google.protobuf.Any", "google.protobuf.Value",
		"google.protobuf.ListValue", "google.protobuf.DoubleValue", "google.protobuf.UInt64Value", "google.protobuf.BytesValue",
		"google.protobuf.Duration", "google.protobuf.FieldMask", "google.protobuf.Empty",
	})
}
