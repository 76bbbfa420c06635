package filter

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"
	"pgregory.net/rapid"
)

// TestMain has rapid look harder than its 100 examples, unless told how hard on the command line.
func TestMain(m *testing.M) {
	flag.Parse()
	if checks := flag.Lookup("rapid.checks"); checks.Value.String() == checks.DefValue {
		if err := checks.Value.Set("3000"); err != nil {
			panic(err)
		}
	}
	m.Run()
}

// connect opens the test server. Nothing is created there: predicates are evaluated on values, not on tables.
func connect(t testing.TB) *pgx.Conn {
	t.Helper()
	url := os.Getenv("TEST_DATABASE_URL")
	if url == "" {
		if os.Getenv("CI") == "true" {
			t.Fatal("TEST_DATABASE_URL is not set: CI must compare filters with a real PostgreSQL")
		}
		t.Skip("TEST_DATABASE_URL is not set: not comparing filters with a real PostgreSQL")
	}
	conn, err := pgx.Connect(context.Background(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// evaluate lets Postgres decide whether the record matches; nil is NULL, which must never come.
func evaluate(conn *pgx.Conn, jsonpath string, r Record, data string) (*bool, error) {
	null := func(s string) *string {
		if s == "" {
			return nil
		}
		return &s
	}
	var got *bool
	err := conn.QueryRow(context.Background(), `
		SELECT jsonb_path_match(coalesce($1::jsonb, '{}'), $2::text::jsonpath,
		                        jsonb_build_object('id', $3::text, 'type', $4::text, 'cidr', $5::text), true)`,
		null(data), jsonpath, r.ID, r.Type, null(r.CIDR)).Scan(&got)
	return got, err
}

func TestPostgresMatches(t *testing.T) {
	conn := connect(t)
	for _, c := range matchCases {
		jsonpath := mustParse(t, c.filter).JSONPath(testNetwork)
		got, err := evaluate(conn, jsonpath, testRecord, c.data)
		if err != nil || got == nil || *got != c.want {
			t.Errorf("%s matches %s: %v, %v, want %v\n%s", c.filter, c.data, deref(got), err, c.want, jsonpath)
		}
	}
}

func deref(b *bool) any {
	if b == nil {
		return nil
	}
	return *b
}

// The largest filters that Parse lets through must not overwhelm Postgres (stack depth, above all).
func TestPostgresTakesTheLargestFilters(t *testing.T) {
	conn := connect(t)
	repeat := func(n int, s string) string { return strings.TrimSuffix(strings.Repeat(s+",", n), ",") }
	nest := func(n int, open, inner, end string) string {
		return strings.Repeat(open, n) + inner + strings.Repeat(end, n)
	}
	var fields, nots strings.Builder
	for i := range 4000 { // an object and a value each
		fields.WriteString(`"f` + strconv.Itoa(i) + `":"x",`)
		if i < 3000 {
			nots.WriteString(`{"$not":{"f` + strconv.Itoa(i) + `":"x"}},`)
		}
	}
	deep := nest(MaxDepth-1, `a.`, `a`, ``)
	for name, c := range map[string]struct {
		filter, data string
		want         bool
	}{
		"many ids":      {`{"id":[` + repeat(9000, `"x"`) + `,"rec"]}`, ``, true},
		"many values":   {`{"a":[` + repeat(9000, `7`) + `,"x"]}`, `{"a":"x"}`, true},
		"many fields":   {`{` + fields.String() + `"a":"x"}`, `{"a":"x"}`, false},
		"many nots":     {`{"$and":[` + nots.String() + `{"a":"x"}]}`, `{"a":"x"}`, true},
		"many readings": {`{"0.1.2.3.4.5.6.7.8.9.0.1":"x"}`, `[[0,[0,1,[0,1,2,{"3":[]}]]]]`, false},
		"long number":   {`{"a":"` + strings.Repeat("9", 400) + `"}`, `{"a":` + strings.Repeat("9", 400) + `}`, true},
		"longer number": {`{"a":"` + strings.Repeat("9", 1_000_000) + `"}`, `{"a":"` + strings.Repeat("9", 1_000_000) + `"}`, true},
		"long path":     {`{"` + deep[:2*MaxDepth-3] + `":"x"}`, nest(MaxDepth-1, `{"a":`, `"x"`, `}`), true},
		"deep nots":     {nest(MaxDepth/3, `{"$not":{"$or":[{"a":"y"},`, `{"a":"x"}`, `]}}`), `{"a":"x"}`, false},
	} {
		t.Run(name, func(t *testing.T) {
			f, err := Parse(parseStruct(t, c.filter))
			if err != nil {
				t.Fatal(err)
			}
			jsonpath := f.JSONPath(nil)
			got, err := evaluate(conn, jsonpath, testRecord, c.data)
			if err != nil || got == nil || *got != c.want {
				t.Errorf("got %v, %v, want %v (jsonpath of %d bytes)", deref(got), err, c.want, len(jsonpath))
			}
		})
	}
}

// Generators that meet often: few keys, few values, the awkward ones among them.
var (
	genKey = rapid.SampledFrom([]string{
		"a", "b", "a.b", "b.a.a", "value", "value.a", "aB", "a_b", "aB.bA", "0", "1", "a.0", "0.1", "", ".", "a.",
		"A", "_a", `"\`, "é", "\x01", "$index", "$x", "id", "type", "a,b", "-1", "00",
	})
	genText = rapid.SampledFrom([]string{
		"", "a", "A", "ab", "1", "-1", "0", "-0", "1.5", "1.50", "01", "1e3", "1000", "1000000", "1e+06", "true",
		"false", "null", "NaN", "0.1", `"`, `\`, "\n", "\x7f", "é", "😀", "10.1.2.3", "10.0.0.0/8", "x/y", "9007199254740993",
	})
	genNumber = rapid.SampledFrom([]string{
		"0", "-0", "1", "-1", "1.5", "1.50", "1e3", "1000", "1000000", "1e+06", "0.1", "1e21", "9007199254740993", "1e-7",
	})
	genQuoted = rapid.Map(genText, quoteJSON)
	genScalar = rapid.OneOf(genQuoted, genQuoted, genNumber, rapid.SampledFrom([]string{"true", "false", "null"}))
)

func quoteJSON(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func genList(elem *rapid.Generator[string]) *rapid.Generator[string] {
	return rapid.Map(rapid.SliceOfN(elem, 0, 3), func(elems []string) string {
		return "[" + strings.Join(elems, ",") + "]"
	})
}

func genObject(key, elem *rapid.Generator[string]) *rapid.Generator[string] {
	return rapid.Map(rapid.MapOfN(key, elem, 0, 4), func(m map[string]string) string {
		var fields []string
		for k, v := range m {
			fields = append(fields, quoteJSON(k)+":"+v)
		}
		return "{" + strings.Join(fields, ",") + "}"
	})
}

// genData makes projections: JSON of any shape, mostly objects.
func genData(depth int) *rapid.Generator[string] {
	if depth == 0 {
		return genScalar
	}
	inner := genData(depth - 1)
	return rapid.OneOf(genScalar, genList(inner), genObject(genKey, inner), genObject(genKey, inner))
}

// genFilter makes filters as JSON objects.
func genFilter(depth int) *rapid.Generator[string] {
	value := genScalar
	if depth > 0 {
		inner := genFilter(depth - 1)
		value = rapid.OneOf(genScalar, genScalar, inner, genList(rapid.OneOf(genScalar, inner)))
	}
	field := rapid.Custom(func(t *rapid.T) string {
		switch key := rapid.OneOf(genKey, rapid.SampledFrom([]string{"$and", "$or", "$not", "$eq", "$index", "id", "type"})).Draw(t, "key"); key {
		case "$and", "$or":
			return quoteJSON(key) + ":" + genList(value).Draw(t, "list")
		default:
			return quoteJSON(key) + ":" + value.Draw(t, "value")
		}
	})
	return rapid.Map(rapid.SliceOfNDistinct(field, 0, 3, func(f string) string { return f[:strings.Index(f, ":")] }),
		func(fields []string) string { return "{" + strings.Join(fields, ",") + "}" })
}

type example struct {
	filterJSON, data string
	filter           *Filter
	record           Record
}

func genExample(t *rapid.T) example {
	e := example{filterJSON: genFilter(3).Draw(t, "filter"), data: rapid.OneOf(rapid.Just(""), genObject(genKey, genData(2)), genData(3)).Draw(t, "data")}
	s := new(structpb.Struct)
	if err := protojson.Unmarshal([]byte(e.filterJSON), s); err != nil {
		t.Fatal(err)
	}
	var err error
	if e.filter, err = Parse(s); err != nil {
		t.Fatal(err)
	}
	e.record = Record{
		ID:   rapid.OneOf(genText, genKey).Draw(t, "id"),
		Type: genText.Draw(t, "type"),
		CIDR: rapid.SampledFrom([]string{"", "10.0.0.0/8", "10.1.0.0/16"}).Draw(t, "cidr"),
	}
	if e.data != "" {
		d := json.NewDecoder(strings.NewReader(e.data))
		d.UseNumber()
		if err := d.Decode(&e.record.Data); err != nil {
			t.Fatal(err)
		}
	}
	return e
}

// TestPostgresAgreesWithModel is the proof of JSONPath: whatever the filter and the record, Postgres and Match decide
// the same.
func TestPostgresAgreesWithModel(t *testing.T) {
	conn := connect(t)
	rapid.Check(t, func(t *rapid.T) {
		e := genExample(t)
		want := e.filter.Match(e.record, testNetwork)
		jsonpath := e.filter.JSONPath(testNetwork)
		if uses := strings.Contains(jsonpath, "$id ==") || strings.Contains(jsonpath, "$type ==") ||
			strings.Contains(jsonpath, "$cidr =="); uses && !e.filter.UsesVars() {
			t.Fatalf("UsesVars is false for %s", jsonpath)
		}
		got, err := evaluate(conn, jsonpath, e.record, e.data)
		if err != nil || got == nil || *got != want {
			t.Fatalf("Postgres says %v, %v, Match says %v\nfilter   %s\ndata     %s\nrecord   %+v\njsonpath %s",
				deref(got), err, want, e.filterJSON, e.data, e.record, jsonpath)
		}
	})
}

// TestAccessIsImplied is the proof of Access: it leads to every match, and if exact to nothing else.
func TestAccessIsImplied(t *testing.T) {
	var kinds [3][2]int
	rapid.Check(t, func(t *rapid.T) {
		e := genExample(t)
		match := e.filter.Match(e.record, testNetwork)
		access := e.filter.Access()
		reached := reaches(access, e.record)
		if match && !reached || access.Exact && match != reached {
			t.Fatalf("match %v, reached %v by %+v\nfilter %s\ndata   %s\nrecord %+v", match, reached, access, e.filterJSON, e.data, e.record)
		}
		if access.Exact {
			kinds[access.Kind][1]++
		} else {
			kinds[access.Kind][0]++
		}
	})
	t.Logf("none, keys, field × inexact, exact: %v", kinds)
}

// reaches evaluates an access path as its documentation has it, without the filter's own machinery.
func reaches(a Access, r Record) bool {
	switch a.Kind {
	case AccessKeys:
		for _, id := range a.IDs {
			if r.ID == id {
				return true
			}
		}
		for _, p := range a.Index {
			if cidr, ok := testNetwork(p); ok && cidr == r.CIDR {
				return true
			}
		}
		return false
	case AccessField:
		if len(a.Fields) == 0 || a.Exact && len(a.Fields) != 1 {
			return false
		}
		for _, f := range a.Fields {
			object, _ := r.Data.(map[string]any)
			v, ok := object[f.Path]
			if !ok {
				v = r.Data
				for _, part := range strings.Split(f.Path, ".") {
					object, _ := v.(map[string]any)
					v = object[part]
				}
			}
			found := false
			for _, text := range f.Values {
				found = found || hasText(v, text)
			}
			if !found {
				return false
			}
		}
	}
	return true
}

var fuzzSeeds = []string{
	hotFilter,
	`{"id":"x"}`, `{"key":{"$eq":"x"}}`, `{"session_id":{"$eq":"x"}}`, `{"user_id":{"$eq":"x"}}`, `{"state_id":"x"}`,
	`{"$or":[{"id":"10.0.0.1"},{"$index":"10.0.0.1"}]}`, `{"$index":"2001:db8::/32"}`, `{"$index":"10.0.0.0/-1"}`,
	`{"$and":{}}`, `{"$or":1}`, `{"$not":[]}`, `{"a":{"$contains":"x"}}`, `{"value.a_b.0.cD":["x",1,true,null,{}]}`,
	`{"a\"\\\u0000\n😀":"\u0001\"\\😀"}`, `{"1.3.6.1.4.1.311.21.8":1e308}`, `{"a":{"b":{"$and":[{"c":[]},{"$not":"x"}]}}}`,
}

// FuzzParse throws arbitrary filters at the parser, and what it accepts at Postgres, if there is one.
func FuzzParse(f *testing.F) {
	for _, s := range fuzzSeeds {
		f.Add(s, `{"a":{"b":["x",1,true]},"user_id":"x"}`)
	}
	for _, c := range matchCases {
		f.Add(c.filter, c.data)
	}
	var conn *pgx.Conn
	if url := os.Getenv("TEST_DATABASE_URL"); url != "" {
		var err error
		if conn, err = pgx.Connect(context.Background(), url); err != nil {
			f.Fatal(err)
		}
		f.Cleanup(func() { conn.Close(context.Background()) })
	}
	f.Fuzz(func(t *testing.T, filterJSON, data string) {
		s := new(structpb.Struct)
		if protojson.Unmarshal([]byte(filterJSON), s) != nil {
			return
		}
		flt, err := Parse(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrUnsupported) {
				t.Fatalf("untyped error: %v", err)
			}
			return
		}
		r := testRecord
		d := json.NewDecoder(strings.NewReader(data))
		d.UseNumber()
		if d.Decode(&r.Data) != nil || d.More() || !utf8.ValidString(data) {
			r.Data, data = nil, ""
		}
		want := flt.Match(r, testNetwork)
		if reached := reaches(flt.Access(), r); want && !reached || flt.Access().Exact && want != reached {
			t.Fatalf("match %v, reached %v by %+v", want, reached, flt.Access())
		}
		jsonpath := flt.JSONPath(testNetwork)
		if conn == nil {
			return
		}
		got, err := evaluate(conn, jsonpath, r, data)
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) && refusesData(pgErr) && dataRefused(conn, data) {
			return
		}
		if err != nil || got == nil || *got != want {
			t.Fatalf("Postgres says %v, %v, Match says %v: %s", deref(got), err, want, jsonpath)
		}
	})
}

func refusesData(err *pgconn.PgError) bool { return strings.HasPrefix(err.Code, "22") }

// dataRefused reports whether it is the data that Postgres does not take as jsonb (U+0000, numbers out of range, half
// a surrogate pair), which is not the filter's fault.
func dataRefused(conn *pgx.Conn, data string) bool {
	var text string
	return conn.QueryRow(context.Background(), `SELECT $1::jsonb::text`, data).Scan(&text) != nil
}
