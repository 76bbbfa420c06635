package conformance_test

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/proto/oauth21"
	"pgbroker/proto/session"
	"pgbroker/proto/user"
)

// ways are requests that a server may answer in different ways, each of which finds all five users and
// nothing else of the database that putUsers fills.
func ways(t *testing.T) map[string]*databroker.QueryRequest {
	t.Helper()
	filtered := func(recordType, filter string) *databroker.QueryRequest {
		return &databroker.QueryRequest{Type: recordType, Filter: parseFilter(t, filter)}
	}
	return map[string]*databroker.QueryRequest{
		"type":                   {Type: directoryUserType},
		"everything":             {},
		"ids":                    filtered(directoryUserType, `{"id": ["u1", "u2", "u3", "u4", "u5", "u6"]}`),
		"ids of all types":       filtered("", `{"id": ["u1", "u2", "u3", "u4", "u5", "u6"]}`),
		"indexed field":          filtered(directoryUserType, `{"team": "blue"}`),
		"field":                  filtered(directoryUserType, `{"active": true}`),
		"field of all types":     filtered("", `{"active": true}`),
		"address":                filtered(directoryUserType, `{"$index": "10.1.2.3"}`),
		"text":                   {Type: directoryUserType, Query: "EXAMPLE.com"},
		"text of all types":      {Query: "EXAMPLE.com"},
		"everything by filter":   filtered(directoryUserType, `{}`),
		"ids and text":           {Type: directoryUserType, Query: "example.com", Filter: parseFilter(t, `{"id": ["u1", "u2", "u3", "u4", "u5"]}`)},
		"indexed field and text": {Type: directoryUserType, Query: "example.com", Filter: parseFilter(t, `{"team": "blue"}`)},
		"negation":               filtered(directoryUserType, `{"$not": {"id": "nobody"}}`),
	}
}

func putUsers(t *testing.T, c client) []*databroker.Record {
	t.Helper()
	setOptions(t, c, directoryUserType, &databroker.Options{IndexableFields: []string{"team"}})
	var records []*databroker.Record
	for i := 5; i >= 1; i-- { // not in the order of the answer
		id := fmt.Sprintf("u%d", i)
		records = append(records, putOne(t, c, object(directoryUserType, id, map[string]any{
			"email": id + "@Example.com", "team": "blue", "active": true, "$index": map[string]any{"cidr": "10.1.0.0/16"},
		})))
	}
	slices.Reverse(records)
	return records
}

// TestS11_PagesAndCounts: total_count is that of all matches, whatever page is asked for and however the
// matches are found.
func TestS11_PagesAndCounts(t *testing.T) {
	t.Parallel()
	b := start(t)
	users := putUsers(t, b)
	from := position(t, b)
	for name, request := range ways(t) {
		t.Run(name, func(t *testing.T) {
			for _, page := range []struct {
				offset, limit int64
				want          []*databroker.Record
			}{
				{0, 0, nil},
				{0, 1, users[:1]},
				{0, 5, users},
				{0, 6, users},
				{0, math.MaxInt64, users},
				{1, 2, users[1:3]},
				{4, 2, users[4:]},
				{5, 1, nil},
				{5, 0, nil},
				{100, 100, nil},
				{2, math.MaxInt64, users[2:]},
				{math.MaxInt64, math.MaxInt64, nil},
			} {
				request.Offset, request.Limit = page.offset, page.limit
				response, err := b.Query(testContext(t), request)
				if err != nil {
					t.Fatalf("offset %d, limit %d: %v", page.offset, page.limit, err)
				}
				same(t, fmt.Sprintf("offset %d, limit %d", page.offset, page.limit), response.Records, page.want)
				if response.TotalCount != 5 {
					t.Errorf("offset %d, limit %d: total_count %d, want 5", page.offset, page.limit, response.TotalCount)
				}
				if response.ServerVersion != from.ServerVersion || response.RecordVersion != from.LatestRecordVersion {
					t.Errorf("offset %d, limit %d: versions %d and %d, want %v", page.offset, page.limit, response.ServerVersion, response.RecordVersion, from)
				}
			}
		})
	}
}

// TestD11_NegativePages are refused, and the server lives on.
func TestD11_NegativePages(t *testing.T) {
	t.Parallel()
	b := start(t)
	putUsers(t, b)
	for name, request := range ways(t) {
		t.Run(name, func(t *testing.T) {
			for _, n := range []int64{-1, math.MinInt64} {
				request.Offset, request.Limit = 0, n
				_, err := b.Query(testContext(t), request)
				wantStatus(t, err, codes.InvalidArgument, fmt.Sprintf("limit: %d, must not be negative", n))
				request.Offset, request.Limit = n, 1
				_, err = b.Query(testContext(t), request)
				wantStatus(t, err, codes.InvalidArgument, fmt.Sprintf("offset: %d, must not be negative", n))
			}
		})
	}
	if n := len(query(t, b, directoryUserType, "").Records); n != 5 {
		t.Errorf("%d records afterwards", n)
	}
}

// TestQueryOrder: by type, then id, byte by byte.
func TestQueryOrder(t *testing.T) {
	t.Parallel()
	b := start(t)
	ids := []string{"", "\x01", " ", "-", "0", "1", "10", "2", "A", "B", "Z", "_", "a", "a!", "a\x01", "aa", "b", "é", "\uffff", "\U00010000"}
	slices.Sort(ids) // Go compares bytes
	var records []*databroker.Record
	for _, recordType := range []string{"b", "B", "a"} {
		for _, id := range slices.Backward(ids) {
			records = append(records, object(recordType, id, map[string]any{"all": "x"}))
		}
	}
	put(t, b, records...)
	all := slices.Concat(ids, ids, ids)
	same(t, "Query of a type", queryIDs(t, b, "a", ""), ids)
	same(t, "Query of all types", queryIDs(t, b, "", ""), all)
	same(t, "Query by field", queryIDs(t, b, "", `{"all": "x"}`), all)
	same(t, "Query by id", queryIDs(t, b, "", `{"id": ["B", "a", "é"]}`), slices.Repeat([]string{"B", "a", "é"}, 3))
	same(t, "SyncLatest", idsOf(syncLatest(t, b, "").records), all)
}

// TestQueryFilters: the grammar, and each path and value that a filter can compare.
func TestQueryFilters(t *testing.T) {
	t.Parallel()
	b := start(t)
	put(t, b,
		object("t1", "a", map[string]any{"name": "ann", "n": 1, "ok": true, "group_ids": []any{"g1", "g2"}, "dept": map[string]any{"name": "ops"}}),
		object("t1", "b", map[string]any{"name": "bob", "n": 1.5, "ok": false, "group_ids": []any{"g2"}, "user_name": "x", "userName": "y"}),
		object("t1", "c", map[string]any{"name": "Ann", "n": 1000000, "dept.name": "dotted", "a,b": "comma", "nothing": nil, "id": "shadowed", "type": "shadowed"}),
		object("t2", "a", map[string]any{"name": "ann", "value": map[string]any{"name": "inner"}, "empty": ""}),
		newRecord("t3", "d", &session.SessionBindingRequest{Key: "k", State: session.SessionBindingRequestState_Accepted, Details: map[string]string{"Source Address": "10.0.0.1"}, CreatedAt: &timestamppb.Timestamp{Seconds: 1}}),
		newRecord("t3", "e", &session.SessionBindingRequest{Key: ""}),
		&databroker.Record{Type: "t4", Id: "x"},
	)
	for _, test := range []struct {
		filter string
		want   string // ids, of all types
	}{
		// Grammar.
		{`{"name": "ann"}`, "a a"},
		{`{"name": "ann", "n": 1}`, "a"},
		{`{"name": ["ann", "bob"]}`, "a b a"},
		{`{"$and": [{"name": "ann"}, {"n": 1}]}`, "a"},
		{`{"$or": [{"name": "bob"}, {"n": 1}]}`, "a b"},
		{`{"$or": [{"name": "bob"}, {"name": "Ann"}], "n": 1.5}`, "b"},
		{`{"name": {"$or": ["bob", "Ann"]}}`, "b c"},
		{`{"name": {"$and": ["bob", "Ann"]}}`, ""},
		{`{"$and": [{"$or": [{"name": "ann"}, {"name": "bob"}]}, {"$not": {"ok": false}}]}`, "a a"},
		{`{"$not": {"name": ["ann", "bob"]}}`, "c d e x"},
		{`{"name": {"$not": "ann"}}`, "b c d e x"},
		{`{"$not": {"$not": {"name": "bob"}}}`, "b"},
		{`{"name": {"=": "bob"}}`, "b"},
		{`{"name": {"==": "bob"}}`, "b"},
		{`{"name": {"$eq": "bob"}}`, "b"},
		{`{"name": {"$equals": "bob"}}`, "b"},
		{`{"name": {"$is": "bob"}}`, "b"},
		{`{"name": {"$eq": {"x": "y"}}}`, ""},
		{`{"name": {"$eq": ["bob"]}}`, ""},
		{`{"name": {"$unknown": "bob"}}`, ""},
		// Values.
		{`{"name": "Ann"}`, "c"},
		{`{"name": "ANN"}`, ""},
		{`{"name": " ann"}`, ""},
		{`{"n": "1"}`, "a"},
		{`{"n": 1.5}`, "b"},
		{`{"n": 1000000}`, "c"},
		{`{"n": "1000000"}`, "c"},
		{`{"ok": true}`, "a"},
		{`{"ok": "false"}`, "b"},
		{`{"state": "Accepted"}`, "d"},
		{`{"created_at": "1970-01-01T00:00:01Z"}`, "d"},
		{`{"name": null}`, ""},
		{`{"empty": null}`, "a"},
		{`{"empty": ""}`, "a"},
		{`{"key": ""}`, ""}, // a default value is no value
		{`{"nothing": null}`, ""},
		// Paths.
		{`{"id": "a"}`, "a a"},
		{`{"id": ["a", "x"]}`, "a a x"},
		{`{"id": "shadowed"}`, ""},
		{`{"type": "t1"}`, "a b c"},
		{`{"type": ["t2", "t4"]}`, "a x"},
		{`{"type": "shadowed"}`, ""},
		{`{"type": "t1", "id": "a"}`, "a"},
		{`{"dept": {"name": "ops"}}`, "a"},
		{`{"dept.name": "ops"}`, "a"},
		{`{"dept.name": "dotted"}`, "c"},
		{`{"a,b": "comma"}`, "c"},
		{`{"dept,name": "ops"}`, ""},
		{`{"user_name": "x"}`, "b"},
		{`{"userName": "y"}`, "b"},
		{`{"createdAt": "1970-01-01T00:00:01Z"}`, "d"},
		{`{"value.name": "ann"}`, "a"}, // not t2/a, whose own "value" comes first
		{`{"value.name": "inner"}`, "a"},
		{`{"value": {"name": "bob"}}`, "b"},
		{`{"details": {"Source Address": "10.0.0.1"}}`, "d"},
		{`{"details.Source Address": "10.0.0.1"}`, "d"},
		{`{"group_ids": "g1"}`, ""},
		{`{"group_ids.0": "g2"}`, "b"},
		{`{"groupIds": {"1": "g2"}}`, "a"},
		{`{"no": {"such": {"field": "x"}}}`, ""},
		{`{"name": {"deeper": "ann"}}`, ""},
	} {
		if got := fmt.Sprint(queryIDs(t, b, "", test.filter)); got != "["+test.want+"]" {
			t.Errorf("%s finds %s, want [%s]", test.filter, got, test.want)
		}
	}
	same(t, "of one type", queryIDs(t, b, "t1", `{"name": "ann"}`), []string{"a"})
	same(t, "type in type", queryIDs(t, b, "t2", `{"type": "t1"}`), []string{})
}

// TestD14_EmptyConditions: an empty AND matches everything, an empty OR nothing.
func TestD14_EmptyConditions(t *testing.T) {
	t.Parallel()
	b := start(t)
	put(t, b, object("t", "a", nil), object("t", "b", map[string]any{"k": "v"}))
	for filter, want := range map[string]int{
		`{}`: 2, `{"$and": []}`: 2, `{"k": {}}`: 2, `{"$and": [{}]}`: 2, `{"$not": {"$or": []}}`: 2, `{"k": {"$and": []}}`: 2, `{"$or": [{}]}`: 2,
		`{"$or": []}`: 0, `{"k": []}`: 0, `{"id": []}`: 0, `{"$index": []}`: 0, `{"$not": {}}`: 0, `{"k": {"$or": []}}`: 0, `{"$and": [{}, {"$or": []}]}`: 0,
	} {
		for _, recordType := range []string{"t", ""} {
			if got := queryIDs(t, b, recordType, filter); len(got) != want {
				t.Errorf("%s finds %v, want %d", filter, got, want)
			}
		}
	}
}

// TestQueryOperators: equality is the only operator, and others are refused by their canonical names, also
// when there is nothing to compare.
func TestQueryOperators(t *testing.T) {
	t.Parallel()
	b := start(t)
	for key, name := range map[string]string{
		"!=": "doesNotEqual", "$doesNotEqual": "doesNotEqual", ">": ">", ">=": ">=", "<": "<", "<=": "<=",
		"$after": "after", "$before": "before", "$onOrAfter": "onOrAfter", "$onOrBefore": "onOrBefore",
		"$contains": "contains", "$doesNotContain": "doesNotContain", "$startsWith": "startsWith", "$endsWith": "endsWith",
		"$isAnyOf": "isAnyOf", "$isEmpty": "isEmpty", "$isNotEmpty": "isNotEmpty",
	} {
		for _, filter := range []string{`{"k": {"` + key + `": "v"}}`, `{"$or": [{"id": "a"}, {"k": {"` + key + `": "v"}}]}`, `{"` + key + `": 1}`} {
			_, err := b.Query(testContext(t), &databroker.QueryRequest{Type: "t", Filter: parseFilter(t, filter)})
			wantStatus(t, err, codes.Unimplemented, "operator not supported: "+name)
		}
	}
}

// TestD15_EveryKeyCanBeAddressed: underscores, dots, commas and any other character in the keys of Structs
// and maps, with and without "value." in front.
func TestD15_EveryKeyCanBeAddressed(t *testing.T) {
	t.Parallel()
	b := start(t)
	keys := []string{"snake_case", "camelCase", "with.dot", "with,comma", "with space", "$dollar", `quo"te`, `back\slash`, "it's", "é", "0", "", "*", "@type", "a.b.c", "_", "group_ids"}
	for i, key := range keys {
		put(t, b,
			object("t", fmt.Sprintf("%02d top", i), map[string]any{key: "v"}),
			object("t", fmt.Sprintf("%02d sub", i), map[string]any{"sub": map[string]any{key: "v"}}),
			newRecord("t", fmt.Sprintf("%02d map", i), &session.SessionBinding{Details: map[string]string{key: "v"}}))
	}
	ids := func(filter map[string]any) []string {
		t.Helper()
		response, err := b.Query(testContext(t), &databroker.QueryRequest{Type: "t", Limit: 1000, Filter: newStruct(filter)})
		if err != nil {
			t.Errorf("%v: %v", filter, err)
		}
		return idsOf(response.GetRecords())
	}
	for i, key := range keys {
		same(t, "key "+key, ids(map[string]any{key: "v"}), []string{fmt.Sprintf("%02d top", i)})
		same(t, "key value."+key, ids(map[string]any{"value": map[string]any{key: "v"}}), []string{fmt.Sprintf("%02d top", i)})
		same(t, "key below another "+key, ids(map[string]any{"sub": map[string]any{key: "v"}}), []string{fmt.Sprintf("%02d sub", i)})
		same(t, "key of a map "+key, ids(map[string]any{"details": map[string]any{key: "v"}}), []string{fmt.Sprintf("%02d map", i)})
	}
}

// TestD16_FiltersNeedNoIndex: fields that no options name, $not, and the record type are all usable, and
// options make no difference to what is found.
func TestD16_FiltersNeedNoIndex(t *testing.T) {
	t.Parallel()
	b := start(t)
	const recordType = "example.com/Account"
	put(t, b,
		object(recordType, "a", map[string]any{"owner": "x", "kind": "k", "n": 7}),
		object(recordType, "b", map[string]any{"owner": "y", "kind": "k"}),
		object(recordType, "c", map[string]any{"owner": []any{"x"}, "kind": ""}),
		object("example.com/Other", "d", map[string]any{"owner": "x"}))
	filters := map[string][]string{
		`{"owner": "x"}`:                          {"a"},
		`{"owner": {"$eq": "y"}}`:                 {"b"},
		`{"kind": "k", "owner": "y"}`:             {"b"},
		`{"kind": ""}`:                            {"c"},
		`{"n": 7}`:                                {"a"},
		`{"n": "7"}`:                              {"a"},
		`{"$not": {"owner": "x"}}`:                {"b", "c"},
		`{"type": "` + recordType + `"}`:          {"a", "b", "c"},
		`{"$or": [{"owner": "x"}, {"kind": ""}]}`: {"a", "c"},
		`{"owner": ["x", "y"]}`:                   {"a", "b"},
		`{"owner": "z"}`:                          {},
	}
	check := func(when string) {
		t.Helper()
		for filter, want := range filters {
			same(t, when+": "+filter, queryIDs(t, b, recordType, filter), want)
		}
		same(t, when+": all types", queryIDs(t, b, "", `{"owner": "x"}`), []string{"a", "d"})
	}
	check("before options")
	setOptions(t, b, recordType, &databroker.Options{IndexableFields: []string{"owner", "kind", "n"}})
	check("with options")
	queries := queriesOf(b.Database) // the periodic work, which the server would do within seconds
	must[[]string](t)(queries.RecordsReindex(t.Context(), db.RecordsReindexParams{Type: recordType, MaxRows: 100}))
	for _, due := range must[[]db.TypesToReindexRow](t)(queries.TypesToReindex(t.Context())) {
		if err := queries.TypeIndexed(t.Context(), db.TypeIndexedParams{Type: due.Type, IndexVersion: due.IndexVersion}); err != nil {
			t.Fatal(err)
		}
	}
	check("indexed")
	put(t, b, object(recordType, "e", map[string]any{"owner": "x"}), deletion(recordType, "a"))
	same(t, "written since", queryIDs(t, b, recordType, `{"owner": "x"}`), []string{"e"})
	setOptions(t, b, recordType, nil)
	same(t, "options removed", queryIDs(t, b, recordType, `{"owner": "x"}`), []string{"e"})
}

// TestOptionsOfTheEmptyType are about records of that type, and not about queries over all types.
func TestOptionsOfTheEmptyType(t *testing.T) {
	t.Parallel()
	b := start(t)
	setOptions(t, b, "", &databroker.Options{IndexableFields: []string{"owner"}})
	put(t, b, object("", "a", map[string]any{"owner": "x"}), object("t", "b", map[string]any{"owner": "x"}), object("t", "c", map[string]any{"owner": "y"}))
	if _, options := syncNow(t, b, position(t, b), ""); len(options) != 6 { // by now the replica knows of them
		t.Errorf("options %v", typesOf(options))
	}
	same(t, "all types", queryIDs(t, b, "", `{"owner": "x"}`), []string{"a", "b"})
	same(t, "a type", queryIDs(t, b, "t", `{"owner": "x"}`), []string{"b"})
}

// TestNumbersInFilters: a number is found by its value, however it was written, with an index and without.
func TestNumbersInFilters(t *testing.T) {
	t.Parallel()
	b := start(t)
	setOptions(t, b, "indexed", &databroker.Options{IndexableFields: []string{"n"}})
	numbers := []float64{0, 1, -1, 0.1, 1.5, 7, 1e6, 1e15, 1<<53 + 2, 1e21, 1e-7, -2.5e-10, 123456789.25, math.MaxFloat64, math.SmallestNonzeroFloat64}
	for _, recordType := range []string{"indexed", "plain"} {
		var records []*databroker.Record
		for i, n := range numbers {
			records = append(records, object(recordType, fmt.Sprintf("%02d", i), map[string]any{"n": n}))
		}
		put(t, b, records...)
		syncNow(t, b, position(t, b), recordType) // by now the replica knows of the index
		for i, n := range numbers {
			want := []string{fmt.Sprintf("%02d", i)}
			for _, value := range []any{n, strconv.FormatFloat(n, 'f', -1, 64)} {
				response, err := b.Query(testContext(t), &databroker.QueryRequest{Type: recordType, Limit: 100, Filter: newStruct(map[string]any{"n": value})})
				if err != nil {
					t.Fatal(err)
				}
				same(t, fmt.Sprintf("%s: %v", recordType, value), idsOf(response.Records), want)
			}
		}
		same(t, "minus zero", queryIDs(t, b, recordType, `{"n": -0}`), []string{"00"})
	}
}

// TestD31_NoStaleIndexEntries: an indexed field finds a record by its present value only, and never one that
// is gone, however it went.
func TestD31_NoStaleIndexEntries(t *testing.T) {
	t.Parallel()
	b := start(t)
	binding := func(id, sessionID string) *databroker.Record {
		return newRecord(bindingType, id, &session.SessionBinding{SessionId: sessionID})
	}
	find := func(sessionID string) []string {
		return queryIDs(t, b, bindingType, `{"session_id": {"$eq": "`+sessionID+`"}}`)
	}
	put(t, b, binding("a", "old"), binding("b", "old"), binding("c", "old"), binding("d", "old"), binding("e", "old"))
	put(t, b, binding("a", "new"))
	patch(t, b, []string{"session_id"}, binding("b", "new"))
	put(t, b, deletion(bindingType, "c"))
	b.Database.Exec(t, "DELETE FROM pgbroker.records WHERE id = 'd'")
	same(t, "old", find("old"), []string{"e"})
	same(t, "new", find("new"), []string{"a", "b"})
	put(t, b, &databroker.Record{Type: bindingType, Id: "a"}, newRecord(bindingType, "b", new(user.User)))
	same(t, "without the field", find("new"), []string{})

	put(t, b, object(geoIPType, "net", map[string]any{"$index": map[string]any{"cidr": "10.0.0.0/8"}}))
	put(t, b, object(geoIPType, "net", map[string]any{"$index": map[string]any{"cidr": "11.0.0.0/8"}}))
	same(t, "old prefix", queryIDs(t, b, geoIPType, `{"$index": "10.1.1.1"}`), []string{})
	same(t, "new prefix", queryIDs(t, b, geoIPType, `{"$index": "11.1.1.1"}`), []string{"net"})
	put(t, b, object(geoIPType, "net", nil))
	same(t, "no prefix", queryIDs(t, b, geoIPType, `{"$index": "11.1.1.1"}`), []string{})
}

// TestIndexIsLongestPrefixMatch: $index finds the records that carry the longest stored prefix, of the type
// asked for, that contains the address or prefix.
func TestIndexIsLongestPrefixMatch(t *testing.T) {
	t.Parallel()
	b := start(t)
	network := func(recordType, id, cidr string) *databroker.Record {
		return object(recordType, id, map[string]any{"$index": map[string]any{"cidr": cidr}, "name": id})
	}
	value, err := structpb.NewValue(map[string]any{"$index": map[string]any{"cidr": "172.16.0.0/12"}})
	if err != nil {
		t.Fatal(err)
	}
	put(t, b,
		network(geoIPType, "all", "0.0.0.0/0"), network(geoIPType, "ten", "10.0.0.0/8"),
		network(geoIPType, "site", "10.1.0.0/16"), network(geoIPType, "site too", "10.1.99.99/16"),
		network(geoIPType, "host", "10.1.2.3/32"), network(geoIPType, "six", "2001:db8::/32"), network(geoIPType, "six lan", "2001:db8:1::/48"),
		network("example.com/Other", "foreign", "10.1.2.0/24"),
		network(geoIPType, "not a prefix", "10.1.2.3"), network(geoIPType, "nonsense", "x"),
		object(geoIPType, "no cidr", map[string]any{"$index": map[string]any{"other": "10.1.2.0/24"}}),
		object(geoIPType, "number", map[string]any{"$index": map[string]any{"cidr": 7}}),
		newRecord(geoIPType, "in a Value", value),
		newRecord(geoIPType, "in an Any", newAny(newStruct(map[string]any{"$index": map[string]any{"cidr": "192.168.0.0/16"}}))),
		newRecord(geoIPType, "no Struct", &user.User{Id: "10.9.9.9/32"}))
	for address, want := range map[string][]string{
		"8.8.8.8":          {"all"},
		"10.2.0.1":         {"ten"},
		"10.1.200.1":       {"site", "site too"},
		"10.1.2.3":         {"host"},
		"::ffff:10.1.2.3":  {"host"},
		"10.1.2.0/24":      {"site", "site too"},
		"10.1.0.0/16":      {"site", "site too"},
		"10.0.0.0/7":       {"all"},
		"10.0.0.0/8":       {"ten"},
		"2001:db8::1":      {"six"},
		"2001:db8:1::1":    {"six lan"},
		"2001:db8:1::/64":  {"six lan"},
		"2001:db9::1":      {},
		"172.31.0.1":       {"in a Value"},
		"192.168.1.1":      {"in an Any"},
		"10.9.9.9":         {"ten"},
		"":                 {},
		"x":                {},
		"10.1.2":           {},
		"10.1.2.3/33":      {},
		"10.1.2.3:80":      {},
		"fe80::1%eth0":     {},
		"0.0.0.0/0":        {"all"},
		"10.1.2.3/32":      {"host"},
		"010.001.002.003":  {},
		"2001:db8:1::/129": {},
	} {
		same(t, "$index "+address, queryIDs(t, b, geoIPType, `{"$index": "`+address+`"}`), want)
		same(t, "$not $index "+address, len(queryIDs(t, b, geoIPType, `{"$not": {"$index": "`+address+`"}}`)), 14-len(want))
		if address != "" {
			same(t, "$index and id "+address, queryIDs(t, b, geoIPType, `{"$or": [{"id": "`+address+`"}, {"$index": "`+address+`"}]}`), want)
		}
	}
	same(t, "with another condition", queryIDs(t, b, geoIPType, `{"$index": "10.1.2.3", "name": "host"}`), []string{"host"})
	same(t, "with another condition that fails", queryIDs(t, b, geoIPType, `{"$index": "10.1.2.3", "name": "site"}`), []string{})
	same(t, "several addresses", queryIDs(t, b, geoIPType, `{"$index": ["8.8.8.8", "10.1.2.3", "10.3.0.1"]}`), []string{"all", "host", "ten"})
	same(t, "all types", queryIDs(t, b, "", `{"$index": "10.1.2.4"}`), []string{"foreign"})
	if got := query(t, b, geoIPType, `{"$index": 7}`).TotalCount; got != 0 {
		t.Errorf("a number finds %d", got)
	}
	// What a proxy sends: one record by id, or by address.
	request := &databroker.QueryRequest{Type: geoIPType, Limit: 1, Filter: parseFilter(t, `{"$or": [{"id": "10.1.2.3"}, {"$index": "10.1.2.3"}]}`)}
	if response, err := b.Query(testContext(t), request); err != nil || len(response.Records) != 1 || response.Records[0].Id != "host" {
		t.Errorf("got %v, %v", response, err)
	}
}

// TestQueryText: which texts of a payload a text query finds.
func TestQueryText(t *testing.T) {
	t.Parallel()
	b := start(t)
	list := func(values ...any) *structpb.ListValue {
		l, err := structpb.NewList(values)
		if err != nil {
			panic(err)
		}
		return l
	}
	put(t, b,
		newRecord("t", "user", &user.User{Id: "u-1", Name: "Änne Example", Email: "Ann@Example.com", DeviceCredentialIds: []string{"Cred-1", "cred-2"},
			Claims: map[string]*structpb.ListValue{"claimkey": list("ClaimValue", 42, true, map[string]any{"innerkey": "InnerValue"})}}),
		object("t", "struct", map[string]any{"structkey": "StructValue", "list": []any{"ListValue", map[string]any{"k": "Deep"}}, "number": 12345, "yes": true}),
		newRecord("t", "session", &session.Session{Id: "s", ExpiresAt: &timestamppb.Timestamp{Seconds: 4102444800}, RefreshDisabled: true}),
		newRecord("t", "request", &session.SessionBindingRequest{State: session.SessionBindingRequestState_Accepted, Details: map[string]string{"detailkey": "DetailValue"}}),
		newRecord("t", "any", newAny(&user.User{Name: "Hidden"})),
		&databroker.Record{Type: "t", Id: "unknown", Data: &anypb.Any{TypeUrl: "x/y.Unknown", Value: []byte("\x0a\x07hidden2")}},
		&databroker.Record{Type: "t", Id: "broken", Data: &anypb.Any{TypeUrl: userType, Value: []byte("\x1a\xffhidden3")}},
		&databroker.Record{Type: "t", Id: "none"},
		newRecord("other", "other", &user.User{Name: "Änne Other"}))
	for text, want := range map[string][]string{
		"":                 {"any", "broken", "none", "request", "session", "struct", "unknown", "user"},
		"ann@example.com":  {"user"},
		"ANN@EXAMPLE.COM":  {"user"},
		"änne":             {"user"},
		"ÄNNE":             {"user"},
		"nne ex":           {"user"},
		"cred-2":           {"user"},
		"claimvalue":       {"user"},
		"innervalue":       {"user"},
		"u-1":              {"user"},
		"structvalue":      {"struct"},
		"listvalue":        {"struct"},
		"deep":             {"struct"},
		"detailvalue":      {"request"},
		"value":            {"request", "struct", "user"},
		"user.user":        {"any"}, // the type URL of a nested Any
		"claimkey":         {},
		"innerkey":         {},
		"structkey":        {},
		"detailkey":        {},
		"12345":            {},
		"42":               {},
		"true":             {},
		"accepted":         {},
		"2100":             {},
		"hidden":           {},
		"u-1änne":          {}, // two fields
		"u-1 änne":         {},
		"%":                {},
		"_nn@":             {},
		"ann@example.com ": {},
	} {
		response, err := b.Query(testContext(t), &databroker.QueryRequest{Type: "t", Query: text, Limit: 100})
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		same(t, fmt.Sprintf("text %q", text), idsOf(response.Records), want)
		if response.TotalCount != int64(len(want)) {
			t.Errorf("text %q: total_count %d, want %d", text, response.TotalCount, len(want))
		}
	}
	response, err := b.Query(testContext(t), &databroker.QueryRequest{Query: "änne", Limit: 100, Filter: parseFilter(t, `{"type": "other"}`)})
	if err != nil || len(response.Records) != 1 {
		t.Errorf("text and filter over all types: %v, %v", response, err)
	}
}

// TestD12_TextQueryOverMapsOfStrings finds their values, and the server lives on.
func TestD12_TextQueryOverMapsOfStrings(t *testing.T) {
	t.Parallel()
	b := start(t)
	put(t, b, newRecord(bindingType, "k", &session.SessionBinding{Details: map[string]string{"Source Address": "192.0.2.7", "Agent": "OpenSSH"}}))
	for text, want := range map[string]int64{"openssh": 1, "192.0.2.7": 1, "source": 0, "putty": 0} {
		response, err := b.Query(testContext(t), &databroker.QueryRequest{Type: bindingType, Query: text, Limit: 1})
		if err != nil || response.TotalCount != want {
			t.Errorf("%q: %v, %v, want %d", text, response.GetTotalCount(), err, want)
		}
	}
}

// TestFiltersThatClientsSend: the filters of the proxy's own code, over the types that it sends them for.
func TestFiltersThatClientsSend(t *testing.T) {
	t.Parallel()
	b := start(t)
	const pendingType = "type.googleapis.com/oauth21.PendingUpstreamAuth"
	put(t, b,
		newRecord(sessionType, "s1", &session.Session{Id: "s1"}), newRecord(sessionType, "s2", &session.Session{Id: "s2"}),
		newRecord(bindingRequestType, "code1", &session.SessionBindingRequest{Key: "key1"}),
		newRecord(bindingRequestType, "code2", &session.SessionBindingRequest{Key: "key1"}),
		newRecord(bindingRequestType, "code3", &session.SessionBindingRequest{Key: "key3"}),
		newRecord(bindingType, "key1", &session.SessionBinding{SessionId: "s1", UserId: "u1"}),
		newRecord(bindingType, "key2", &session.SessionBinding{SessionId: "s1", UserId: "u1"}),
		newRecord(bindingType, "key3", &session.SessionBinding{SessionId: "s3", UserId: "u1"}),
		newRecord(identityBindingType, "key1", &session.IdentityBinding{UserId: "u1"}),
		newRecord(identityBindingType, "key2", &session.IdentityBinding{UserId: "u2"}),
		newRecord(pendingType, "downstream_host=a&user_id=u", &oauth21.PendingUpstreamAuth{StateId: "state1"}),
		newRecord(pendingType, "downstream_host=b&user_id=u", &oauth21.PendingUpstreamAuth{StateId: "state2"}))
	for _, test := range []struct {
		recordType, filter string
		want               []string
	}{
		{sessionType, `{"id": "s1"}`, []string{"s1"}},
		{sessionType, `{"$or": [{"id": "s1"}, {"$index": "s1"}]}`, []string{"s1"}},
		{sessionType, `{"$or": [{"id": "s9"}, {"$index": "s9"}]}`, []string{}},
		{bindingRequestType, `{"key": {"$eq": "key1"}}`, []string{"code1", "code2"}},
		{bindingType, `{"session_id": {"$eq": "s1"}}`, []string{"key1", "key2"}},
		{bindingType, `{"user_id": {"$eq": "u1"}}`, []string{"key1", "key2", "key3"}},
		{identityBindingType, `{"user_id": {"$eq": "u2"}}`, []string{"key2"}},
		{pendingType, `{"state_id": "state2"}`, []string{"downstream_host=b&user_id=u"}},
	} {
		for _, limit := range []int64{1, 100000} {
			response, err := b.Query(testContext(t), &databroker.QueryRequest{Type: test.recordType, Filter: parseFilter(t, test.filter), Limit: limit})
			if err != nil {
				t.Errorf("%s: %v", test.filter, err)
				continue
			}
			same(t, test.filter, idsOf(response.Records), test.want[:min(int(limit), len(test.want))])
			if response.TotalCount != int64(len(test.want)) {
				t.Errorf("%s: total_count %d, want %d", test.filter, response.TotalCount, len(test.want))
			}
		}
	}
}

// TestMinimumVersionHint: the server ignores the hint, however far ahead it is.
func TestMinimumVersionHint(t *testing.T) {
	t.Parallel()
	b := start(t)
	written := putOne(t, b, thing("a", ""))
	hint := uint64(math.MaxUint64)
	response, err := b.Query(testContext(t), &databroker.QueryRequest{Type: thingType, Limit: 1, MinimumRecordVersionHint: &hint})
	if err != nil || len(response.Records) != 1 || response.RecordVersion != written.Version {
		t.Errorf("got %v, %v", response, err)
	}
}

// TestQueryOfAnEmptyStore has versions all the same.
func TestQueryOfAnEmptyStore(t *testing.T) {
	t.Parallel()
	b := start(t)
	info, err := b.ServerInfo(testContext(t), new(emptypb.Empty))
	if err != nil {
		t.Fatal(err)
	}
	for _, recordType := range []string{"", thingType} {
		got := query(t, b, recordType, "")
		same(t, "answer", got, &databroker.QueryResponse{ServerVersion: info.ServerVersion})
	}
}
