package filter_test

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server/filter"
	"pgbroker/server/projection"
	"pgbroker/server/servertest"
)

// stored is a record as the model sees it.
type stored struct {
	filter.Record
	text   string // that text queries search
	prefix netip.Prefix
}

// store is the model of a database: a list in the order of types and ids.
type store struct {
	projector *projection.Projector
	records   []stored
}

func (s *store) put(tb testing.TB, record *databroker.Record) {
	tb.Helper()
	var payload []byte
	if record.Data != nil {
		var err error
		if payload, err = proto.Marshal(record.Data); err != nil {
			tb.Fatal(err)
		}
	}
	p := s.projector.Project(payload)
	r := stored{Record: filter.Record{ID: record.Id, Type: record.Type, CIDR: p.IndexCIDR}, text: p.SearchText}
	if p.Data != nil {
		d := json.NewDecoder(strings.NewReader(string(p.Data)))
		d.UseNumber()
		if err := d.Decode(&r.Data); err != nil {
			tb.Fatalf("the projection %s: %v", p.Data, err)
		}
	}
	if r.CIDR != "" {
		r.prefix = netip.MustParsePrefix(r.CIDR)
	}
	i, found := slices.BinarySearchFunc(s.records, r, func(a, b stored) int {
		return cmp.Or(strings.Compare(a.Type, b.Type), strings.Compare(a.ID, b.ID))
	})
	if found {
		s.records[i] = r
	} else {
		s.records = slices.Insert(s.records, i, r)
	}
}

// query does what Query is to do, by looking at every record.
func (s *store) query(request *databroker.QueryRequest, parsed *filter.Filter) (page []string, count int64) {
	search := strings.ToLower(request.Query)
	resolve := func(wanted netip.Prefix) (string, bool) {
		var longest *stored
		for i := range s.records {
			r := &s.records[i]
			if (request.Type == "" || r.Type == request.Type) && r.CIDR != "" && r.prefix.Bits() <= wanted.Bits() && r.prefix.Contains(wanted.Addr()) &&
				(longest == nil || r.prefix.Bits() > longest.prefix.Bits()) {
				longest = r
			}
		}
		if longest == nil {
			return "", false
		}
		return longest.CIDR, true
	}
	for i := range s.records {
		r := &s.records[i]
		if request.Type != "" && r.Type != request.Type || !parsed.Match(r.Record, resolve) ||
			!strings.Contains(r.text, search) || strings.ContainsRune(search, projection.Separator) {
			continue
		}
		if count >= request.Offset && count-request.Offset < request.Limit {
			page = append(page, r.Type+" "+r.ID)
		}
		count++
	}
	return page, count
}

// Awkward pieces of records and filters, which meet often because they are few.
var (
	keys = []string{"a", "b", "a.b", "value", "aB", "a_b", "user_id", "0", "1", "", "é", `"\`, "$x", "id", "type", "A"}
	text = []string{"", "a", "A", "é", "É", "1", "1.5", "-0", "1e3", "1000", "true", "null", "NaN", `"`, `\`, "😀", "\n", "9007199254740993", "10.1.2.3"}
)

// randomValue makes a value of any shape.
func randomValue(r *rand.Rand, depth int) *structpb.Value {
	switch n := r.IntN(10); {
	case n < 4 || depth == 0 && n < 7:
		return structpb.NewStringValue(text[r.IntN(len(text))])
	case n == 4:
		return structpb.NewNumberValue([]float64{0, 1, -1, 1.5, 1000, 1e21, 1e-7, 9007199254740992, 0.1}[r.IntN(9)])
	case n == 5:
		return structpb.NewBoolValue(r.IntN(2) == 0)
	case n == 6 || depth == 0:
		return structpb.NewNullValue()
	case n == 7:
		list := new(structpb.ListValue)
		for range r.IntN(3) {
			list.Values = append(list.Values, randomValue(r, depth-1))
		}
		return structpb.NewListValue(list)
	}
	return structpb.NewStructValue(randomStruct(r, depth-1))
}

func randomStruct(r *rand.Rand, depth int) *structpb.Struct {
	s := &structpb.Struct{Fields: make(map[string]*structpb.Value)}
	for range 1 + r.IntN(5) {
		s.Fields[keys[r.IntN(len(keys))]] = randomValue(r, depth)
	}
	return s
}

// randomStore has records of several types: of structs of any shape, with and without an index prefix, of messages, and
// without any payload.
func randomStore(tb testing.TB, r *rand.Rand) []*databroker.Record {
	tb.Helper()
	var records []*databroker.Record
	add := func(recordType, id string, message proto.Message) {
		record := &databroker.Record{Type: recordType, Id: id}
		if message != nil {
			var err error
			if record.Data, err = anypb.New(message); err != nil {
				tb.Fatal(err)
			}
		}
		records = append(records, record)
	}
	for i := range 150 {
		s := randomStruct(r, 3)
		if r.IntN(3) == 0 {
			prefix := []string{"10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "::/0", "2001:db8::/32", "0.0.0.0/0"}[r.IntN(6)]
			index, err := structpb.NewStruct(map[string]any{"cidr": prefix})
			if err != nil {
				tb.Fatal(err)
			}
			s.Fields["$index"] = structpb.NewStructValue(index)
		}
		add([]string{"plain", "indexed", "type"}[i%3], text[r.IntN(len(text))]+fmt.Sprint(r.IntN(20)), s)
	}
	for i := range 20 {
		add("session", fmt.Sprint(i), &session.Session{Id: fmt.Sprint(i), UserId: text[r.IntN(len(text))], IdpId: text[r.IntN(len(text))]})
	}
	for i := range 5 {
		add("plain", fmt.Sprint("none", i), nil)
	}
	return records
}

// FuzzQuery holds Query, with real gRPC and a real Postgres, against a model in memory: whatever the records, the filter,
// the text and the page, ids, order and count are the same.
func FuzzQuery(f *testing.F) {
	for _, seed := range []struct{ filter, data, id, search string }{
		{`{"user_id":"a"}`, `{"user_id":"a"}`, "x", ""},
		{`{"a":{"b":["a",1,true,null]}}`, `{"a.b":1,"a":{"b":true}}`, "x", ""},
		{`{"$or":[{"id":"x"},{"user_id":"a"},{"$index":"10.1.2.3"}]}`, `{"$index":{"cidr":"10.1.2.3/32"}}`, "x", ""},
		{`{"$and":[{"type":"plain"},{"$not":{"a":"a"}}]}`, `{"a":null}`, "", "a"},
		{`{"$index":"2001:db8::1"}`, `{"a":["é"]}`, "é", "É"},
		{`{"$index":["10.0.0.0/8","10.1.2.3","nonsense"]}`, `[1,2]`, "😀", ""},
		{`{"a":"1000"}`, `{"a":1e3}`, `"\`, "1e3"},
		{`{"0":"a","a_b":{"$eq":"a"},"aB":"a"}`, `{"0":"a","a_b":"a"}`, "1", "😀"},
		{`{"value":{"a":"a"},"value.a":"a"}`, `{"a":"a","value":{"a":"a"}}`, "value", "a a"},
		{`{"id":[]}`, ``, "", ""},
		{`{"id":["","x","1"]}`, `{}`, "", "\x1f"},
		{`{}`, `{"":""}`, "\x01", "%_"},
	} {
		for _, recordType := range []string{"", "plain", "indexed", "session", "none"} {
			f.Add(seed.filter, seed.data, seed.id, recordType, seed.search, uint8(0), uint8(200))
		}
		f.Add(seed.filter, seed.data, seed.id, "indexed", "", uint8(3), uint8(2))
		f.Add(seed.filter, seed.data, seed.id, "plain", "", uint8(0), uint8(0))
	}
	b := servertest.New(f, servertest.Options{})
	model := &store{projector: projection.New(nil)}
	if _, err := b.SetOptions(f.Context(), &databroker.SetOptionsRequest{
		Type: "indexed", Options: &databroker.Options{IndexableFields: []string{"a", "user_id", "a.b", "0"}},
	}); err != nil {
		f.Fatal(err)
	}
	put := func(tb testing.TB, records ...*databroker.Record) {
		tb.Helper()
		// One by one in the model, all at once in the database.
		for _, record := range records {
			model.put(tb, record)
		}
		if _, err := b.Put(tb.Context(), &databroker.PutRequest{Records: records}); err != nil {
			tb.Fatal(err)
		}
	}
	put(f, randomStore(f, rand.New(rand.NewPCG(1, 2)))...)
	f.Fuzz(func(t *testing.T, filterJSON, dataJSON, id, recordType, search string, offset, limit uint8) {
		if !utf8.ValidString(id) || strings.Contains(id, "\x00") || len(id) > 2000 || !utf8.ValidString(search) ||
			strings.Contains(search, "\x00") || !utf8.ValidString(recordType) || strings.Contains(recordType, "\x00") || len(recordType) > 500 {
			return
		}
		// One more record, as the fuzzer likes it: always the same key, so that the store does not grow.
		record := &databroker.Record{Type: []string{"plain", "indexed"}[len(id)%2], Id: "probe"}
		if len(id) > 0 && len(id) < 5 {
			record.Id = id[:1]
			if !utf8.ValidString(record.Id) {
				record.Id = "probe"
			}
		}
		value := new(structpb.Value)
		if protojson.Unmarshal([]byte(dataJSON), value) == nil && value.Kind != nil {
			if object := value.GetStructValue(); object != nil {
				record.Data, _ = anypb.New(object)
			} else {
				record.Data, _ = anypb.New(value)
			}
		}
		put(t, record)

		request := &databroker.QueryRequest{Type: recordType, Query: search, Offset: int64(offset), Limit: int64(limit)}
		s := new(structpb.Struct)
		if protojson.Unmarshal([]byte(filterJSON), s) == nil {
			request.Filter = s
		}
		parsed, err := filter.Parse(request.Filter)
		if err != nil {
			if !errors.Is(err, filter.ErrInvalid) && !errors.Is(err, filter.ErrUnsupported) {
				t.Fatalf("untyped error: %v", err)
			}
			if _, err := b.Query(t.Context(), request); err == nil {
				t.Fatalf("a filter is accepted that is none: %s", filterJSON)
			}
			return
		}
		response, err := b.Query(t.Context(), request)
		if err != nil {
			t.Fatalf("%s: %v", filterJSON, err)
		}
		var got []string
		for _, record := range response.Records {
			got = append(got, record.Type+" "+record.Id)
		}
		want, count := model.query(request, parsed)
		if !slices.Equal(got, want) || response.TotalCount != count {
			t.Fatalf("filter %s of type %q with text %q from %d: %d records %q, the model has %d %q\nprobe %s",
				filterJSON, recordType, search, offset, response.TotalCount, got, count, want, dataJSON)
		}
	})
}
