package filter

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"
)

func parseStruct(t testing.TB, js string) *structpb.Struct {
	t.Helper()
	s := new(structpb.Struct)
	if err := protojson.Unmarshal([]byte(js), s); err != nil {
		t.Fatalf("test filter %s: %v", js, err)
	}
	return s
}

func mustParse(t testing.TB, js string) *Filter {
	t.Helper()
	f, err := Parse(parseStruct(t, js))
	if err != nil {
		t.Fatalf("Parse(%s): %v", js, err)
	}
	return f
}

func decode(t testing.TB, js string) any {
	t.Helper()
	if js == "" {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader([]byte(js)))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		t.Fatalf("test data %s: %v", js, err)
	}
	return v
}

// network resolves like a table that holds these prefixes.
func network(stored ...string) Resolver {
	return func(want netip.Prefix) (string, bool) {
		best := netip.Prefix{}
		for _, s := range stored {
			p := netip.MustParsePrefix(s)
			if p.Bits() <= want.Bits() && p.Contains(want.Addr()) && (!best.IsValid() || p.Bits() > best.Bits()) {
				best = p
			}
		}
		return best.String(), best.IsValid()
	}
}

// matchCase is one statement about what a filter means. The same cases are evaluated in memory and by Postgres.
type matchCase struct {
	filter string
	data   string // projection; empty for none
	want   bool
}

var testNetwork = network("10.0.0.0/8", "10.1.0.0/16", "192.0.2.7/32", "2001:db8::/32")

// All cases are about this record; its payload is the case's.
var testRecord = Record{ID: "rec", Type: "typ", CIDR: "10.1.0.0/16"}

var matchCases = []matchCase{
	// Record id and type.
	{`{"id":"rec"}`, ``, true},
	{`{"id":"other"}`, ``, false},
	{`{"id":"REC"}`, ``, false},
	{`{"id":["other","rec"]}`, ``, true},
	{`{"id":{"$eq":"rec"}}`, ``, true},
	{`{"id":{"$eq":["rec"]}}`, ``, false},
	{`{"id":"x"}`, `{"id":"x"}`, false}, // shadowed by the record id
	{`{"id":{"id":"x"}}`, `{"id":{"id":"x"}}`, true},
	{`{"type":"typ"}`, ``, true},
	{`{"type":"x"}`, `{"type":"x"}`, false},
	{`{"id":"rec","type":"typ"}`, ``, true},
	{`{"id":"rec","type":"other"}`, ``, false},

	// Index: the longest prefix only.
	{`{"$index":"10.1.2.3"}`, ``, true},
	{`{"$index":"10.1.0.0/16"}`, ``, true},
	{`{"$index":"10.1.7.0/24"}`, ``, true},
	{`{"$index":"10.2.0.1"}`, ``, false},   // 10.0.0.0/8 is the longest there
	{`{"$index":"10.0.0.0/8"}`, ``, false}, // not contained in 10.1.0.0/16
	{`{"$index":"11.0.0.1"}`, ``, false},
	{`{"$index":"::ffff:10.1.2.3"}`, ``, true},
	{`{"$index":"not an address"}`, ``, false},
	{`{"$index":["not an address","10.1.2.3"]}`, ``, true},
	{`{"$not":{"$index":"not an address"}}`, ``, true},
	{`{"$index":{"cidr":"x"}}`, `{"$index":{"cidr":"x"}}`, true}, // longer paths are fields
	{`{"$or":[{"id":"10.1.2.3"},{"$index":"10.1.2.3"}]}`, ``, true},
	{`{"$or":[{"id":"rec"},{"$index":"rec"}]}`, ``, true},

	// Logic.
	{`{}`, ``, true},
	{`{"$and":[]}`, ``, true},
	{`{"$or":[]}`, ``, false},
	{`{"$not":{}}`, ``, false},
	{`{"$not":{"$or":[]}}`, ``, true},
	{`{"a":[]}`, `{"a":"x"}`, false},
	{`{"a":{}}`, ``, true},
	{`{"a":"1","b":"2"}`, `{"a":"1","b":"2"}`, true},
	{`{"a":"1","b":"2"}`, `{"a":"1","b":"3"}`, false},
	{`{"$or":[{"a":"1"},{"b":"2"}]}`, `{"a":"0","b":"2"}`, true},
	{`{"$and":[{"a":"1"},{"b":"2"}]}`, `{"a":"0","b":"2"}`, false},
	{`{"a":{"$or":["1","2"]}}`, `{"a":"2"}`, true},
	{`{"a":{"$and":["1","2"]}}`, `{"a":"2"}`, false},
	{`{"a":{"$not":"1"}}`, `{"a":"2"}`, true},
	{`{"a":{"$not":["1","2"]}}`, `{"a":"2"}`, false},
	{`{"$not":{"a":"1"}}`, ``, true}, // negation of a condition on what is not there
	{`{"$not":{"a":"1"}}`, `[]`, true},
	{`{"$not":{"a":{"b":"1"}}}`, `{"a":"x"}`, true},
	{`{"$not":{"$not":{"a":"1"}}}`, `{"a":"1"}`, true},
	{`{"$not":{"$not":{"a":"1"}}}`, ``, false},

	// Operators.
	{`{"a":{"=":"1"}}`, `{"a":"1"}`, true},
	{`{"a":{"==":"1"}}`, `{"a":"1"}`, true},
	{`{"a":{"$equals":"1"}}`, `{"a":"1"}`, true},
	{`{"a":{"$is":"1"}}`, `{"a":"1"}`, true},
	{`{"a":{"$eq":"1","$is":"2"}}`, `{"a":"1"}`, false},
	{`{"a":{"$eq":{"b":"1"}}}`, `{"a":{"b":"1"}}`, false},
	{`{"$unknown":"1"}`, `{"$unknown":"1"}`, true},
	{`{"$eq":"x"}`, `"x"`, true}, // the payload itself
	{`{"$eq":"x"}`, `{"x":"x"}`, false},

	// Values.
	{`{"a":"x"}`, `{"a":"X"}`, false},
	{`{"a":"x"}`, `{"a":"xx"}`, false},
	{`{"a":""}`, `{"a":""}`, true}, // only Structs and maps hold empty strings
	{`{"a":""}`, `{}`, false},
	{`{"a":null}`, `{"a":null}`, false},
	{`{"a":null}`, `{}`, false},
	{`{"a":"null"}`, `{"a":null}`, false},
	{`{"a":true}`, `{"a":true}`, true},
	{`{"a":"true"}`, `{"a":true}`, true},
	{`{"a":true}`, `{"a":"true"}`, true},
	{`{"a":false}`, `{"a":true}`, false},
	{`{"a":false}`, `{}`, false},
	{`{"a":1000000}`, `{"a":1e+06}`, true},
	{`{"a":1000000}`, `{"a":"1000000"}`, true}, // a 64-bit integer
	{`{"a":"1000000"}`, `{"a":1000000}`, true},
	{`{"a":"1e+06"}`, `{"a":1000000}`, false},
	{`{"a":"007"}`, `{"a":7}`, false},
	{`{"a":"7.0"}`, `{"a":7}`, false},
	{`{"a":7}`, `{"a":7.00}`, true},
	{`{"a":0.1}`, `{"a":0.1}`, true},
	{`{"a":-1.5}`, `{"a":-1.5}`, true},
	{`{"a":-0.0}`, `{"a":0}`, true},
	{`{"a":0}`, `{"a":-0}`, true},
	{`{"a":"-0"}`, `{"a":0}`, false},
	{`{"a":1e300}`, `{"a":1e+300}`, true},
	{`{"a":5e-324}`, `{"a":5e-324}`, true},
	{`{"a":"9007199254740993"}`, `{"a":9007199254740993}`, true},
	{`{"a":"9007199254740993"}`, `{"a":9007199254740992}`, false},
	{`{"a":"x"}`, `{"a":["x"]}`, false},
	{`{"a":"x"}`, `{"a":{"x":"x"}}`, false},
	{`{"a":"\u0000"}`, `{"a":""}`, false},
	{`{"$not":{"a":"\u0000"}}`, `{"a":""}`, true},
	{`{"a":"\"\\\b\t\u0001\u007f\u2028😀'$"}`, `{"a":"\"\\\b\t\u0001\u007f\u2028😀'$"}`, true},
	{`{"a":"\\u0041"}`, `{"a":"A"}`, false},

	// Paths.
	{`{"a":{"b":"x"}}`, `{"a":{"b":"x"}}`, true},
	{`{"a.b":"x"}`, `{"a":{"b":"x"}}`, true},
	{`{"a.b":"x"}`, `{"a.b":"x"}`, true},
	{`{"a.b":"x"}`, `{"a.b":"y","a":{"b":"x"}}`, false}, // as written goes first
	{`{"a":{"b":"x"}}`, `{"a.b":"x"}`, false},
	{`{"a.b":{"c.d":"x"}}`, `{"a.b":{"c":{"d":"x"}}}`, true},
	{`{"a.b":{"c.d":"x"}}`, `{"a":{"b":{"c.d":"x"}}}`, true},
	{`{"a.b.c":"x"}`, `{"a":{"b":{"c":"x"}}}`, true},
	{`{"a,b":"x"}`, `{"a":{"b":"x"}}`, false},
	{`{"a,b":"x"}`, `{"a,b":"x"}`, true},
	{`{"":"x"}`, `{"":"x"}`, true},
	{`{"a.":"x"}`, `{"a":{"":"x"}}`, true},
	{`{".":"x"}`, `{"":{"":"x"}}`, true},
	{`{"a\"b\\\n":"x"}`, `{"a\"b\\\n":"x"}`, true},
	{`{"a\u0000":"x"}`, `{"a":"x"}`, false},
	{`{"userId":"x"}`, `{"user_id":"x"}`, true},
	{`{"user_id":"x"}`, `{"user_id":"x"}`, true},
	{`{"user_id":"x"}`, `{"userId":"x"}`, false},
	{`{"userId":"x"}`, `{"userId":"x"}`, true},
	{`{"userId":"x"}`, `{"userId":"y","user_id":"x"}`, false},
	{`{"idToken.issuedAt":"x"}`, `{"id_token":{"issued_at":"x"}}`, true},
	{`{"idToken":{"issuedAt":"x"}}`, `{"id_token":{"issued_at":"x"}}`, true},
	{`{"theMap.theKey":"x"}`, `{"the_map":{"theKey":"x"}}`, true},
	{`{"ÄB":"x"}`, `{"Ä_b":"x"}`, true},
	{`{"value.email":"x"}`, `{"email":"x"}`, true},
	{`{"value":{"email":"x"}}`, `{"email":"x"}`, true},
	{`{"value.email":"x"}`, `{"value":{"email":"x"}}`, true},
	{`{"value.email":"x"}`, `{"value":{},"email":"x"}`, false},
	{`{"value":"x"}`, `"x"`, true},
	{`{"value":"x"}`, `{"value":"x"}`, true},
	{`{"value.0":"x"}`, `["x"]`, true},
	{`{"a.value":"x"}`, `{"a":"x"}`, false},
	{`{"a.value.b":"x"}`, `{"a":{"b":"x"}}`, false},

	// Arrays.
	{`{"a.0":"x"}`, `{"a":["x","y"]}`, true},
	{`{"a.1":"x"}`, `{"a":["x","y"]}`, false},
	{`{"a.2":"x"}`, `{"a":["x","y"]}`, false},
	{`{"a.0":"x"}`, `{"a":{"0":"x"}}`, true},
	{`{"a.0":"x"}`, `{"a":"x"}`, false}, // a scalar is no array of one
	{`{"a.00":"x"}`, `{"a":["x","y"]}`, false},
	{`{"a.-1":"y"}`, `{"a":["x","y"]}`, false},
	{`{"a.99999999999":"y"}`, `{"a":["x","y"]}`, false},
	{`{"a.b":"x"}`, `{"a":[{"b":"x"}]}`, false},
	{`{"a.0.b":"x"}`, `{"a":[{"b":"x"}]}`, true},
	{`{"a.0.0":"x"}`, `{"a":[["x"]]}`, true},
	{`{"1.3.6.1":"x"}`, `{"1.3.6.1":"x"}`, true},
}

func TestMatch(t *testing.T) {
	for _, c := range matchCases {
		r := testRecord
		r.Data = decode(t, c.data)
		if got := mustParse(t, c.filter).Match(r, testNetwork); got != c.want {
			t.Errorf("%s matches %s: %v, want %v", c.filter, c.data, got, c.want)
		}
	}
}

func TestNilFilterMatchesEverything(t *testing.T) {
	f, err := Parse(nil)
	if f != nil || err != nil {
		t.Fatalf("Parse(nil) = %v, %v, want nil, nil", f, err)
	}
	if !f.Match(Record{}, nil) {
		t.Error("nil filter does not match")
	}
	if got, want := f.JSONPath(nil), "strict 1 == 1"; got != want {
		t.Errorf("JSONPath = %s, want %s", got, want)
	}
	if got := f.Access(); got.Kind != AccessNone || !got.Exact {
		t.Errorf("Access = %+v, want no access path, exact", got)
	}
	if got := f.IndexValues(); got != nil {
		t.Errorf("IndexValues = %v, want none", got)
	}
}

// A Value without a kind is what a careless client sends; it means null.
func TestEmptyValues(t *testing.T) {
	for _, v := range []*structpb.Value{nil, {}, structpb.NewNullValue(), {Kind: &structpb.Value_StringValue{}}} {
		f, err := Parse(&structpb.Struct{Fields: map[string]*structpb.Value{"id": v}})
		if err != nil {
			t.Fatal(err)
		}
		if !f.Match(Record{ID: ""}, nil) || f.Match(Record{ID: "null"}, nil) {
			t.Errorf("%v does not mean the empty text", v)
		}
	}
	for _, v := range []*structpb.Value{{Kind: &structpb.Value_StructValue{}}, structpb.NewListValue(nil)} {
		if _, err := Parse(&structpb.Struct{Fields: map[string]*structpb.Value{"$not": v, "id": v}}); err != nil {
			t.Errorf("%v: %v", v, err)
		}
	}
}

// Numbers that JSON does not have are the strings that proto3 JSON makes of them.
func TestNonFiniteNumbers(t *testing.T) {
	for f, text := range map[float64]string{math.Inf(1): "Infinity", math.Inf(-1): "-Infinity", math.NaN(): "NaN"} {
		flt, err := Parse(&structpb.Struct{Fields: map[string]*structpb.Value{"a": structpb.NewNumberValue(f)}})
		if err != nil {
			t.Fatal(err)
		}
		if !flt.Match(Record{Data: map[string]any{"a": text}}, nil) {
			t.Errorf("%v does not match %q", f, text)
		}
		if want := `strict exists($ ? (@."a" == "` + text + `"))`; flt.JSONPath(nil) != want {
			t.Errorf("JSONPath = %s, want %s", flt.JSONPath(nil), want)
		}
	}
}

func TestInvalidUTF8MatchesNothing(t *testing.T) {
	for _, fields := range []map[string]*structpb.Value{
		{"id": structpb.NewStringValue("\xff")},
		{"a": structpb.NewStringValue("\xff")},
		{"\xff": structpb.NewStringValue("a")},
	} {
		f, err := Parse(&structpb.Struct{Fields: fields})
		if err != nil {
			t.Fatal(err)
		}
		if got, want := f.JSONPath(nil), "strict 1 == 0"; got != want {
			t.Errorf("%q: JSONPath = %s, want %s", fields, got, want)
		}
	}
}

func TestParseErrors(t *testing.T) {
	nested := func(n int, open, inner, end string) string {
		return strings.Repeat(open, n) + inner + strings.Repeat(end, n)
	}
	ids := func(n int) string {
		return `{"id":[` + strings.TrimSuffix(strings.Repeat(`"x",`, n), ",") + `]}`
	}
	long := strings.Repeat("A", 1<<19)
	for _, c := range []struct {
		filter string
		want   string // error text; empty for none
		is     error
	}{
		{`{"$and":{}}`, "invalid query filter: $and must be an array", ErrInvalid},
		{`{"$or":"x"}`, "invalid query filter: $or must be an array", ErrInvalid},
		{`{"$or":null}`, "invalid query filter: $or must be an array", ErrInvalid},
		{`{"a":{"$or":{"b":"x"}}}`, "invalid query filter: $or must be an array", ErrInvalid},
		{`{"$not":[{"$and":1}]}`, "invalid query filter: $and must be an array", ErrInvalid},
		{`{"$or":1,"$and":1}`, "invalid query filter: $and must be an array", ErrInvalid}, // sorted
		{`{"a":{"!=":"x"}}`, "operator not supported: doesNotEqual", ErrUnsupported},
		{`{"a":{"$doesNotEqual":"x"}}`, "operator not supported: doesNotEqual", ErrUnsupported},
		{`{"a":{">":"x"}}`, "operator not supported: >", ErrUnsupported},
		{`{"a":{">=":"x"}}`, "operator not supported: >=", ErrUnsupported},
		{`{"a":{"<":"x"}}`, "operator not supported: <", ErrUnsupported},
		{`{"a":{"<=":"x"}}`, "operator not supported: <=", ErrUnsupported},
		{`{"a":{"$after":"x"}}`, "operator not supported: after", ErrUnsupported},
		{`{"a":{"$before":"x"}}`, "operator not supported: before", ErrUnsupported},
		{`{"a":{"$onOrAfter":"x"}}`, "operator not supported: onOrAfter", ErrUnsupported},
		{`{"a":{"$onOrBefore":"x"}}`, "operator not supported: onOrBefore", ErrUnsupported},
		{`{"a":{"$contains":"x"}}`, "operator not supported: contains", ErrUnsupported},
		{`{"a":{"$doesNotContain":"x"}}`, "operator not supported: doesNotContain", ErrUnsupported},
		{`{"a":{"$startsWith":"x"}}`, "operator not supported: startsWith", ErrUnsupported},
		{`{"a":{"$endsWith":"x"}}`, "operator not supported: endsWith", ErrUnsupported},
		{`{"a":{"$isAnyOf":["x"]}}`, "operator not supported: isAnyOf", ErrUnsupported},
		{`{"a":{"$isEmpty":true}}`, "operator not supported: isEmpty", ErrUnsupported},
		{`{"a":{"$isNotEmpty":true}}`, "operator not supported: isNotEmpty", ErrUnsupported},
		{`{"$or":[{"id":"x"},{"a":{"$contains":"x"}}]}`, "operator not supported: contains", ErrUnsupported},
		{`{"$or":[],"id":{"$contains":"x"}}`, "operator not supported: contains", ErrUnsupported},

		{`{"a":` + nested(MaxDepth-1, `[`, `"x"`, `]`) + `}`, "", nil},
		{`{"a":` + nested(MaxDepth, `[`, `"x"`, `]`) + `}`, "invalid query filter: nested deeper than 64 levels", ErrInvalid},
		{nested(MaxDepth, `{"a":`, `"x"`, `}`), "", nil},
		{nested(MaxDepth+1, `{"a":`, `"x"`, `}`), "invalid query filter: nested deeper than 64 levels", ErrInvalid},
		{nested(MaxDepth, `{"$not":`, `"x"`, `}`), "", nil},
		{nested(MaxDepth+1, `{"$not":`, `"x"`, `}`), "invalid query filter: nested deeper than 64 levels", ErrInvalid},
		{nested(MaxDepth/2, `{"$and":[`, `{}`, `]}`), "invalid query filter: nested deeper than 64 levels", ErrInvalid},
		{`{"` + nested(MaxDepth-2, `a.`, `a`, ``) + `":"x"}`, "", nil},
		{`{"` + nested(MaxDepth, `a.`, `a`, ``) + `":"x"}`, "invalid query filter: path longer than 64 steps", ErrInvalid},
		{ids(MaxNodes - 1), "", nil},
		{ids(MaxNodes), "invalid query filter: more than 10000 conditions", ErrInvalid},
		{`{"0.1.2.3.4.5.6.7.8.9.0.1":"x"}`, "", nil},
		{`{"0.1.2.3.4.5.6.7.8.9.0.1.2.3":"x"}`, "invalid query filter: more than 10000 conditions", ErrInvalid},
		{`{"` + nested(63, `0.`, `0`, ``) + `":"x"}`, "invalid query filter: more than 10000 conditions", ErrInvalid}, // 2^64 readings
		{`{"0.1.2.3.4.5.6.7.8.9.0.1":["x","y","z"]}`, "invalid query filter: more than 10000 conditions", ErrInvalid},
		{`{"` + long + `":"x"}`, "", nil},
		{`{"` + long + `.B.C":"x"}`, "invalid query filter: larger than 4 MiB when compiled", ErrInvalid},
	} {
		name := c.filter[:min(len(c.filter), 40)]
		f, err := Parse(parseStruct(t, c.filter))
		if c.want == "" {
			if err != nil {
				t.Errorf("Parse(%s): %v", name, err)
			} else if n := len(f.JSONPath(nil)); n > 3*maxText {
				t.Errorf("Parse(%s): jsonpath of %d bytes", name, n)
			}
			continue
		}
		if err == nil || err.Error() != c.want || !errors.Is(err, c.is) || f != nil {
			t.Errorf("Parse(%s) = %v, %v, want error %q", name, f, err, c.want)
		}
	}
}

func TestIndexValues(t *testing.T) {
	f := mustParse(t, `{"$or":[
		{"$index":["10.1.2.3","10.1.2.3/8","::ffff:10.1.2.3","::ffff:10.0.0.0/104","2001:DB8::1","x","fe80::1%eth0","10.0.0.0/33","::ffff:0:0/90"]},
		{"$not":{"$index":"10.1.2.3/32"}}]}`)
	var got []string
	for _, p := range f.IndexValues() {
		got = append(got, p.String())
	}
	want := []string{"10.1.2.3/32", "10.0.0.0/8", "2001:db8::1/128", "::ffc0:0:0/90"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("IndexValues (-want +got):\n%s", diff)
	}
}

func TestJSONPath(t *testing.T) {
	for _, c := range []struct{ filter, want string }{
		{`{}`, `strict 1 == 1`},
		{`{"$or":[]}`, `strict 1 == 0`},
		{`{"id":"x"}`, `strict $id == "x"`},
		{`{"id":["x","y","z"]}`, `strict ($id == "x" || ($id == "y" || $id == "z"))`},
		{`{"$or":[{"id":"10.1.2.3"},{"$index":"10.1.2.3"}]}`, `strict ($id == "10.1.2.3" || $cidr == "10.1.0.0/16")`},
		{`{"$or":[{"id":"11.1.2.3"},{"$index":"11.1.2.3"}]}`, `strict ($id == "11.1.2.3" || 1 == 0)`},
		{`{"user_id":{"$eq":"x"}}`, `strict exists($ ? (@."user_id" == "x"))`},
		{`{"a":{"b":1}}`, `strict exists($ ? (exists(@."a"."b" ? ((@ == "1" || @ == 1)))))`},
		{`{"$not":{"a":"x"}}`, `strict !(exists($ ? (@."a" == "x")))`},
		{`{"userId":"x"}`, `strict exists($ ? ((@."userId" == "x" || !exists(@ ? (exists(@."userId"))) && @."user_id" == "x")))`},
	} {
		if got := mustParse(t, c.filter).JSONPath(testNetwork); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", c.filter, got, c.want)
		}
	}
}

func TestAccess(t *testing.T) {
	prefix := netip.MustParsePrefix
	field := func(path string, values ...string) Field { return Field{path, values} }
	for _, c := range []struct {
		filter string
		want   Access
	}{
		{`{}`, Access{Exact: true}},
		{`{"$or":[]}`, Access{Kind: AccessKeys, Exact: true}},
		{`{"$index":"x"}`, Access{Kind: AccessKeys, Exact: true}},
		{`{"id":"x"}`, Access{Kind: AccessKeys, IDs: []string{"x"}, Exact: true}},
		{`{"$or":[{"id":"10.0.0.1"},{"$index":"10.0.0.1"}]}`,
			Access{Kind: AccessKeys, IDs: []string{"10.0.0.1"}, Index: []netip.Prefix{prefix("10.0.0.1/32")}, Exact: true}},
		{`{"$or":[{"id":"x"},{"$index":"x"}]}`, Access{Kind: AccessKeys, IDs: []string{"x"}, Exact: true}},
		{`{"$or":[{"id":"x","a":"y"},{"id":"z"}]}`, Access{Kind: AccessKeys, IDs: []string{"x", "z"}}},
		{`{"$or":[{"id":"z"},{"id":"x","a":"y"}]}`, Access{Kind: AccessKeys, IDs: []string{"z", "x"}}},
		{`{"id":"x","user_id":"y"}`, Access{Kind: AccessKeys, IDs: []string{"x"}}},
		{`{"$and":[{"id":["x","y"]},{"a":"y"},{"id":"z"}]}`, Access{Kind: AccessKeys, IDs: []string{"z"}}},
		{`{"$or":[{"id":"x"},{"a":"x"}]}`, Access{}},
		{`{"$or":[{"a":"x"},{"id":"x"}]}`, Access{}},
		{`{"$not":{"id":"x"}}`, Access{}},
		{`{"$not":{}}`, Access{Kind: AccessKeys, Exact: true}},
		{`{"$not":{"$or":[]}}`, Access{Exact: true}},
		{`{"id_token.issuer":"x","value.a":"y"}`, Access{Kind: AccessField, Fields: []Field{field("id_token.issuer", "x")}}},
		{`{"a.value":"x"}`, Access{Kind: AccessField, Fields: []Field{field("a.value", "x")}, Exact: true}},
		{`{"type":"x"}`, Access{}},
		{`{"type":"x","id":"y"}`, Access{Kind: AccessKeys, IDs: []string{"y"}}},
		{`{"user_id":{"$eq":"x"}}`, Access{Kind: AccessField, Fields: []Field{field("user_id", "x")}, Exact: true}},
		{`{"user_id":["x",7]}`, Access{Kind: AccessField, Fields: []Field{field("user_id", "x", "7")}, Exact: true}},
		{`{"$or":[{"a":"x"},{"a":"y"}]}`, Access{Kind: AccessField, Fields: []Field{field("a", "x", "y")}, Exact: true}},
		{`{"$or":[{"a":"x","b":"z"},{"a":"y"}]}`, Access{Kind: AccessField, Fields: []Field{field("a", "x", "y")}}},
		{`{"$or":[{"a":"x"},{"b":"y"}]}`, Access{}},
		{`{"a":"x","b":"y"}`, Access{Kind: AccessField, Fields: []Field{field("a", "x"), field("b", "y")}}},
		{`{"a":"x","$not":{"b":"y"}}`, Access{Kind: AccessField, Fields: []Field{field("a", "x")}}},
		{`{"id_token.issuer":"x"}`, Access{Kind: AccessField, Fields: []Field{field("id_token.issuer", "x")}, Exact: true}},
		// Paths with other readings than Field documents.
		{`{"id_token":{"issuer":"x"}}`, Access{}},
		{`{"userId":"x"}`, Access{}},
		{`{"value.a":"x"}`, Access{}},
		{`{"a.0":"x"}`, Access{}},
		{`{"":"x"}`, Access{}},
		{`{"$eq":"x"}`, Access{}},
	} {
		got := mustParse(t, c.filter).Access()
		if diff := cmp.Diff(c.want, got, cmpopts.IgnoreUnexported(Access{}), cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.filter, diff)
		}
	}
}

// Access returns slices that the filter keeps, and a filter is immutable: combining them must not write into them,
// not even where nobody sees it (the race detector does).
func TestAccessIsConcurrent(t *testing.T) {
	for _, f := range []*Filter{
		mustParse(t, `{"$or":[{"id":["a","\u0000"]},{"id":"b"}]}`),
		mustParse(t, `{"$or":[{"x":["a","\u0000"]},{"x":"b"}]}`),
		mustParse(t, `{"$or":[{"$index":["10.0.0.1","10.0.0.2","10.0.0.3"]},{"$index":"10.0.0.4"}]}`),
	} {
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() { f.Access() })
		}
		wg.Wait()
	}
}

func TestCandidatesAreBounded(t *testing.T) {
	var fields []string
	for i := range 1000 {
		fields = append(fields, fmt.Sprintf(`"f%d":"x"`, i))
	}
	if n := len(mustParse(t, "{"+strings.Join(fields, ",")+"}").Access().Fields); n != maxFields {
		t.Errorf("%d candidates, want %d", n, maxFields)
	}
}

// A condition that leads to the records is not evaluated for each of them again.
func TestRest(t *testing.T) {
	for filter, want := range map[string]string{
		`{"id":"x","a":"y"}`:                                   `{"a":"y"}`,
		`{"$index":"10.0.0.1","a":"y","b":"z"}`:                `{"a":"y","b":"z"}`,
		`{"id":["x","y"],"$index":"10.0.0.1"}`:                 `{"id":["x","y"]}`, // the shorter list leads
		`{"id":{"$or":["x",{"$not":"y"}]},"a":"y"}`:            `{"id":{"$or":["x",{"$not":"y"}]},"a":"y"}`,
		`{"$or":[{"id":"x","a":"y"},{"id":"z"}]}`:              `{"$or":[{"id":"x","a":"y"},{"id":"z"}]}`,
		`{"$and":[{"$and":[{"id":"x"},{"a":"y"}]},{"b":"z"}]}`: `{"$and":[{"$and":[{"id":"x"},{"a":"y"}]},{"b":"z"}]}`,
		`{"a":"x","b":"y"}`:                                    `{"a":"x","b":"y"}`,
		`{"a":"x"}`:                                            `{"a":"x"}`,
	} {
		f := mustParse(t, filter)
		if got, want := f.Rest(f.Access()).JSONPath(nil), mustParse(t, want).JSONPath(nil); got != want {
			t.Errorf("%s: %s, want %s", filter, got, want)
		}
	}
}

// What stands beside each other in a disjunction and asks for the same is evaluated once.
func TestDisjunctionsAreMerged(t *testing.T) {
	for filter, want := range map[string]string{
		`{"$or":[{"a":"x"},{"a":"y"},{"b":"z"},{"a":"w"}]}`:            `{"$or":[{"a":["x","y","w"]},{"b":"z"}]}`,
		`[{"id":"x"},{"id":"y"}]`:                                      `{"id":["x","y"]}`,
		`{"$or":[{"type":"x"},{"id":"x"},{"type":"y"}]}`:               `{"$or":[{"type":["x","y"]},{"id":"x"}]}`,
		`{"$or":[{"$index":"10.0.0.1"},{"$index":"10.0.0.2"}]}`:        `{"$index":["10.0.0.1","10.0.0.2"]}`,
		`{"$or":[{"a":{"b":"x"}},{"a.b":"x"},{"a":{"b":"y"}}]}`:        `{"$or":[{"a":{"b":["x","y"]}},{"a.b":"x"}]}`,
		`{"$or":[{"$or":[{"a":"x"}]},{"$not":{"a":"x"}},{"a":["y"]}]}`: `{"$or":[{"a":["x","y"]},{"$not":{"a":"x"}}]}`,
		`{"$and":[{"a":"x"},{"a":"y"}]}`:                               `{"$and":[{"a":"x"},{"a":"y"}]}`, // not these
	} {
		if strings.HasPrefix(filter, "[") {
			filter = `{"$or":` + filter + `}`
		}
		got, wanted := mustParse(t, filter), mustParse(t, want)
		if got.JSONPath(nil) != wanted.JSONPath(nil) || got.Comparisons() != wanted.Comparisons() {
			t.Errorf("%s: %s, %d comparisons, want %s, %d", filter, got.JSONPath(nil), got.Comparisons(), wanted.JSONPath(nil), wanted.Comparisons())
		}
	}
}

func TestUsesVars(t *testing.T) {
	for filter, want := range map[string]bool{
		`{"id":"x"}`: true, `{"type":"x"}`: true, `{"$index":"10.0.0.1"}`: true, `{"$not":{"a":"x","id":"x"}}`: true,
		`{}`: false, `{"a":"x"}`: false, `{"a":{"id":"x"}}`: false, `{"$index":"x"}`: false,
	} {
		if got := mustParse(t, filter).UsesVars(); got != want {
			t.Errorf("%s: UsesVars = %v, want %v", filter, got, want)
		}
	}
	if (*Filter)(nil).UsesVars() {
		t.Error("nil filter uses variables")
	}
}

const hotFilter = `{"$or":[{"id":"a1b2c3d4-0000-1111-2222-333344445555"},{"$index":"a1b2c3d4-0000-1111-2222-333344445555"}]}`

func BenchmarkParse(b *testing.B) {
	for name, js := range map[string]string{
		"id-or-index":    hotFilter,
		"id-or-index-ip": `{"$or":[{"id":"203.0.113.77"},{"$index":"203.0.113.77"}]}`,
		"field":          `{"session_id":{"$eq":"a1b2c3d4-0000-1111-2222-333344445555"}}`,
		"camel-path":     `{"idToken.issuer":"https://idp.example.com"}`,
	} {
		s := parseStruct(b, js)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				f, err := Parse(s)
				if err != nil {
					b.Fatal(err)
				}
				f.Access()
				f.JSONPath(nil)
			}
		})
	}
}
