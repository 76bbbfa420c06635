package conformance_test

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/registry"
	"pgbroker/proto/session"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// TestKeysOutOfBounds: Postgres cannot hold U+0000, nor an index entry of any length.
func TestKeysOutOfBounds(t *testing.T) {
	t.Parallel()
	b := start(t)
	megabyte := strings.Repeat("x", 1<<20)
	good := thing("good", "")
	for _, test := range []struct {
		recordType, id string
		message        string
	}{
		{"a\x00b", "x", "records[1].type: must not contain the character U+0000"},
		{"x", "a\x00b", "records[1].id: must not contain the character U+0000"},
		{"\x00", "x", "records[1].type: must not contain the character U+0000"},
		{"\x00", "\x00", "records[1].type: must not contain the character U+0000\nrecords[1].id: must not contain the character U+0000"},
		{megabyte, "x", "records[1].type: 1048576 bytes, at most 512 are allowed"},
		{"x", megabyte, "records[1].id: 1048576 bytes, at most 2048 are allowed"},
		{strings.Repeat("x", 513), "x", "records[1].type: 513 bytes, at most 512 are allowed"},
		{"x", strings.Repeat("é", 1024) + "x", "records[1].id: 2049 bytes, at most 2048 are allowed"},
	} {
		for _, bad := range []*databroker.Record{
			newRecord(test.recordType, test.id, new(wrapperspb.StringValue)), deletion(test.recordType, test.id),
		} {
			_, err := b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{good, bad}})
			wantStatus(t, err, codes.InvalidArgument, test.message)
			_, err = b.Patch(testContext(t), &databroker.PatchRequest{Records: []*databroker.Record{good, bad}})
			wantStatus(t, err, codes.InvalidArgument, test.message)
		}
		wantAbsent(t, b, test.recordType, test.id) // what cannot be stored cannot be found
	}
	wantAbsent(t, b, thingType, "good")

	// The longest keys there may be, of characters that do not compress.
	long := func(n int) string {
		var s strings.Builder
		for i := uint32(1); s.Len() < n; i++ {
			fmt.Fprintf(&s, "%08x", i*2654435761)
		}
		return s.String()[:n]
	}
	record := newRecord(long(512), long(2048), wrapperspb.String("x"))
	written := putOne(t, b, record)
	same(t, "record with the longest key", get(t, b, record.Type, record.Id), written)
	put(t, b, deletion(record.Type, record.Id))
	wantAbsent(t, b, record.Type, record.Id)
}

// TestTypesOutOfBounds: the same for every other request that names a type.
func TestTypesOutOfBounds(t *testing.T) {
	t.Parallel()
	b := start(t)
	ctx := testContext(t)
	from := position(t, b)
	for recordType, message := range map[string]string{
		"a\x00b":                   "type: must not contain the character U+0000",
		strings.Repeat("x", 1<<20): "type: 1048576 bytes, at most 512 are allowed",
	} {
		_, err := b.Query(ctx, &databroker.QueryRequest{Type: recordType, Limit: 1})
		wantStatus(t, err, codes.InvalidArgument, message)
		_, err = b.GetOptions(ctx, &databroker.GetOptionsRequest{Type: recordType})
		wantStatus(t, err, codes.InvalidArgument, message)
		_, err = b.SetOptions(ctx, &databroker.SetOptionsRequest{Type: recordType})
		wantStatus(t, err, codes.InvalidArgument, message)
		latest, err := b.SyncLatest(ctx, &databroker.SyncLatestRequest{Type: recordType})
		if err == nil {
			_, err = latest.Recv()
		}
		wantStatus(t, err, codes.InvalidArgument, message)
		stream, err := b.Sync(ctx, &databroker.SyncRequest{Type: recordType, ServerVersion: from.ServerVersion})
		if err == nil {
			_, err = stream.Recv()
		}
		wantStatus(t, err, codes.InvalidArgument, message)
	}
}

// TestFiltersOutOfBounds: filters that break the grammar or the limits, and such as only find nothing.
func TestFiltersOutOfBounds(t *testing.T) {
	t.Parallel()
	b := start(t)
	put(t, b, object(thingType, "a", map[string]any{"k": "v"}))
	deep := structpb.NewStringValue("v")
	for range 70 {
		deep = structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{deep}})
	}
	many := make([]any, 20000)
	for i := range many {
		many[i] = "v"
	}
	manyKeys, err := structpb.NewValue(many)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		filter  *structpb.Struct
		message string
	}{
		"$and of text":   {parseFilter(t, `{"$and": "x"}`), "invalid query filter: $and must be an array"},
		"$and of object": {parseFilter(t, `{"$and": {"k": "v"}}`), "invalid query filter: $and must be an array"},
		"$and of null":   {parseFilter(t, `{"$and": null}`), "invalid query filter: $and must be an array"},
		"$or of text":    {parseFilter(t, `{"$or": "x"}`), "invalid query filter: $or must be an array"},
		"$or of object":  {parseFilter(t, `{"k": {"$or": {"k": "v"}}}`), "invalid query filter: $or must be an array"},
		"$or of number":  {parseFilter(t, `{"$not": {"$or": 1}}`), "invalid query filter: $or must be an array"},
		"deep":           {&structpb.Struct{Fields: map[string]*structpb.Value{"k": deep}}, "invalid query filter: nested deeper than 64 levels"},
		"long path":      {newStruct(map[string]any{"a" + strings.Repeat(".a", 64): "v"}), "invalid query filter: path longer than 64 steps"},
		"many values":    {&structpb.Struct{Fields: map[string]*structpb.Value{"k": manyKeys}}, "invalid query filter: more than 10000 conditions"},
		"large values":   {newStruct(map[string]any{"a.B.c.D.e": strings.Repeat("x", 1<<20)}), "invalid query filter: larger than 4 MiB when compiled"},
	} {
		_, err := b.Query(testContext(t), &databroker.QueryRequest{Type: thingType, Limit: 1, Filter: test.filter})
		if !isCode(err, codes.InvalidArgument) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		wantStatus(t, err, codes.InvalidArgument, test.message)
	}
	for name, filter := range map[string]*structpb.Struct{
		"U+0000 in a value":    newStruct(map[string]any{"k": "v\x00"}),
		"U+0000 in a key":      newStruct(map[string]any{"k\x00": "v"}),
		"U+0000 in an id":      newStruct(map[string]any{"id": "a\x00"}),
		"U+0000 in a type":     newStruct(map[string]any{"type": thingType + "\x00"}),
		"U+0000 in an address": newStruct(map[string]any{"$index": "10.0.0.1\x00"}),
		"quotes":               newStruct(map[string]any{`k" || 1 == 1 || "`: `v" || "" == "`}),
		"backslashes":          newStruct(map[string]any{`k\`: `v\`}),
		"long value":           newStruct(map[string]any{"k": strings.Repeat("x", 1<<20)}),
		"long id":              newStruct(map[string]any{"id": strings.Repeat("x", 1<<20)}),
		"infinity":             newStruct(map[string]any{"k": math.Inf(1)}),
		"not a number":         newStruct(map[string]any{"k": math.NaN()}),
		"huge number":          newStruct(map[string]any{"k": math.MaxFloat64}),
		"tiny number":          newStruct(map[string]any{"k": math.SmallestNonzeroFloat64}),
		"number of a thousand": newStruct(map[string]any{"k": strings.Repeat("9", 1000)}),
		"value without kind":   {Fields: map[string]*structpb.Value{"k": {}}},
		"empty key":            newStruct(map[string]any{"": "v"}),
		"dots":                 newStruct(map[string]any{"...": "v"}),
		"control characters":   newStruct(map[string]any{"k\n\t\x01": "v\r\x7f"}),
	} {
		response, err := b.Query(testContext(t), &databroker.QueryRequest{Type: thingType, Limit: 10, Filter: filter})
		if err != nil || response.TotalCount != 0 {
			t.Errorf("%s: %v, %v", name, response, err)
		}
	}
	same(t, "the record is still found", queryIDs(t, b, thingType, `{"k": "v"}`), []string{"a"})

	_, err = b.Query(testContext(t), &databroker.QueryRequest{Query: "a\x00"})
	wantStatus(t, err, codes.InvalidArgument, "query: must not contain the character U+0000")
	_, err = b.Query(testContext(t), &databroker.QueryRequest{Query: strings.Repeat("x", 1<<20)})
	wantStatus(t, err, codes.InvalidArgument, "query: 1048576 bytes, at most 1024 are allowed")
}

// TestMasksOutOfBounds: masks that no message of any kind has; more are in TestPatchErrors.
func TestMasksOutOfBounds(t *testing.T) {
	t.Parallel()
	b := start(t)
	put(t, b, newRecord(sessionType, "s", &session.Session{Id: "s"}))
	for name, path := range map[string]string{
		"U+0000": "user_id\x00", "long": strings.Repeat("x", 1<<20), "deep": "a" + strings.Repeat(".a", 1000), "dots": "...", "white space": " user_id",
	} {
		_, err := b.Patch(testContext(t), &databroker.PatchRequest{
			Records: []*databroker.Record{newRecord(sessionType, "s", new(session.Session))}, FieldMask: &fieldmaskpb.FieldMask{Paths: []string{path}},
		})
		if !isCode(err, codes.InvalidArgument) || !strings.Contains(err.Error(), "records[0]: invalid patch: ") {
			t.Errorf("%s: %.200v", name, err)
		}
		if len(err.Error()) > 10000 {
			t.Errorf("%s: a message of %d bytes", name, len(err.Error()))
		}
	}
}

// TestSizeLimits: a record of the largest size that Put takes reaches clients with standard limits by every
// way, and larger ones are refused.
func TestSizeLimits(t *testing.T) {
	t.Parallel()
	b := start(t)
	stream := followNow(t, b, "")
	const largest = 4<<20 - 4<<10
	// An Any of a value of n bytes has 5 bytes more: a tag and a length of four.
	large := func(n int) *databroker.Record {
		record := &databroker.Record{
			Type: strings.Repeat("t", 512), Id: strings.Repeat("i", 2048), Data: &anypb.Any{Value: make([]byte, n-5)},
			Version: math.MaxUint64, ModifiedAt: &timestamppb.Timestamp{Seconds: math.MaxInt64, Nanos: math.MaxInt32},
		}
		if got := proto.Size(record.Data); got != n {
			t.Fatalf("payload of %d bytes, want %d", got, n)
		}
		return record
	}
	record := putOne(t, b, large(largest))
	for how, got := range map[string]*databroker.Record{
		"Sync":       stream.change(),
		"Get":        get(t, b, record.Type, record.Id),
		"Query":      query(t, b, record.Type, "").Records[0],
		"SyncLatest": syncLatest(t, b, record.Type).records[0],
	} {
		if !proto.Equal(got, record) {
			t.Errorf("%s returns another record", how)
		}
	}

	small := large(largest + 1)
	small.Type, small.Id, small.Version, small.ModifiedAt = "t", "i", 0, nil
	_, err := b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{small}})
	wantStatus(t, err, codes.InvalidArgument, fmt.Sprintf("records[0].data: %d bytes, at most %d are allowed", largest+1, largest))
	// Above 4 MiB the request does not get that far.
	_, err = b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{large(4 << 20)}})
	wantStatus(t, err, codes.ResourceExhausted, "")
	_, err = b.Query(testContext(t), &databroker.QueryRequest{Query: strings.Repeat("x", 4<<20)})
	wantStatus(t, err, codes.ResourceExhausted, "")
}

// TestSizeLimitOfAPatch: the record that a patch makes is held to the same limit.
func TestSizeLimitOfAPatch(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) { c.MaxMessageSize = limit }})
	half := strings.Repeat("x", limit/2)
	put(t, b, newRecord(sessionType, "s", &session.Session{Id: half}))
	_, err := tryPatch(t, b, []string{"user_id"}, newRecord(sessionType, "s", &session.Session{UserId: half}))
	wantStatus(t, err, codes.InvalidArgument, fmt.Sprintf("records[0].data: %d bytes, at most %d are allowed",
		proto.Size(newAny(&session.Session{Id: half, UserId: half})), limit-4<<10))
	if got := payload[*session.Session](t, get(t, b, sessionType, "s")).UserId; got != "" {
		t.Errorf("user id of %d bytes", len(got))
	}
	_, err = b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{thing("a", strings.Repeat("x", limit))}})
	wantStatus(t, err, codes.ResourceExhausted, "")
}

// TestDurationsOutOfBounds: of leases and of TTLs.
func TestDurationsOutOfBounds(t *testing.T) {
	t.Parallel()
	b := start(t)
	ctx := testContext(t)
	for _, test := range []struct {
		d       *durationpb.Duration
		message string
	}{
		{durationpb.New(-time.Second), "-1s, must not be negative"},
		{durationpb.New(-1), "-1ns, must not be negative"},
		{&durationpb.Duration{Seconds: 3153600001}, "3153600001 s, at most 3153600000 s are allowed"},
		{&durationpb.Duration{Seconds: 315576000000}, "315576000000 s, at most 3153600000 s are allowed"},
		{&durationpb.Duration{Seconds: math.MaxInt64}, ""}, // the text is that of the protobuf library
		{&durationpb.Duration{Seconds: math.MinInt64}, ""},
		{&durationpb.Duration{Nanos: math.MaxInt32}, ""},
		{&durationpb.Duration{Seconds: 1, Nanos: -1}, ""},
	} {
		message := func(field string) string {
			if test.message == "" {
				return ""
			}
			return field + ": " + test.message
		}
		_, err := b.AcquireLease(ctx, &databroker.AcquireLeaseRequest{Name: "l", Duration: test.d})
		wantStatus(t, err, codes.InvalidArgument, message("duration"))
		_, err = b.RenewLease(ctx, &databroker.RenewLeaseRequest{Name: "l", Id: "x", Duration: test.d})
		wantStatus(t, err, codes.InvalidArgument, message("duration"))
		_, err = b.SetOptions(ctx, &databroker.SetOptionsRequest{Type: thingType, Options: &databroker.Options{Ttl: test.d}})
		wantStatus(t, err, codes.InvalidArgument, message("options.ttl"))
	}
	acquire(t, b, "l", time.Hour) // nobody has got it
	_, err := b.GetOptions(ctx, &databroker.GetOptionsRequest{Type: thingType})
	wantStatus(t, err, codes.NotFound, "")
}

// TestLeasesOutOfBounds: names and ids.
func TestLeasesOutOfBounds(t *testing.T) {
	t.Parallel()
	b := start(t)
	ctx := testContext(t)
	long := strings.Repeat("x", 1<<20)
	for _, test := range []struct{ name, id, message string }{
		{"a\x00", "i", "name: must not contain the character U+0000"},
		{long, "i", "name: 1048576 bytes, at most 512 are allowed"},
		{"n", "a\x00", "id: must not contain the character U+0000"},
		{"n", long, "id: 1048576 bytes, at most 256 are allowed"},
	} {
		if test.name != "n" {
			_, err := b.AcquireLease(ctx, &databroker.AcquireLeaseRequest{Name: test.name, Duration: durationpb.New(time.Hour)})
			wantStatus(t, err, codes.InvalidArgument, test.message)
		}
		_, err := b.RenewLease(ctx, &databroker.RenewLeaseRequest{Name: test.name, Id: test.id, Duration: durationpb.New(time.Hour)})
		wantStatus(t, err, codes.InvalidArgument, test.message)
		_, err = b.ReleaseLease(ctx, &databroker.ReleaseLeaseRequest{Name: test.name, Id: test.id})
		wantStatus(t, err, codes.InvalidArgument, test.message)
	}
}

// TestOptionsOutOfBounds: capacities and fields.
func TestOptionsOutOfBounds(t *testing.T) {
	t.Parallel()
	b := start(t)
	for message, options := range map[string]*databroker.Options{
		"options.capacity: 9223372036854775808, at most 9223372036854775807 is allowed":  {Capacity: proto.Uint64(1 << 63)},
		"options.capacity: 18446744073709551615, at most 9223372036854775807 is allowed": {Capacity: proto.Uint64(math.MaxUint64)},
		"options.indexable_fields: 65 fields, at most 64 are allowed":                    {IndexableFields: make([]string, 65)},
		"options.indexable_fields[1]: must not contain the character U+0000":             {IndexableFields: []string{"a", "b\x00"}},
		"options.indexable_fields[0]: 257 bytes, at most 256 are allowed":                {IndexableFields: []string{strings.Repeat("x", 257)}},
	} {
		_, err := b.SetOptions(testContext(t), &databroker.SetOptionsRequest{Type: thingType, Options: options})
		wantStatus(t, err, codes.InvalidArgument, message)
	}
	// Fields that nothing has, or that are lists, are no trouble to writers.
	odd := []string{"", ".", "a..b", "list", "deep.er", "$index", `"`, "é"}
	setOptions(t, b, thingType, &databroker.Options{IndexableFields: odd, Capacity: proto.Uint64(math.MaxInt64)})
	put(t, b, object(thingType, "a", map[string]any{"": "x", ".": 1, "list": []any{"x"}, "deep": map[string]any{"er": "x"}, `"`: true, "é": nil}))
	for filter, want := range map[string]int{`{"": "x"}`: 1, `{"deep.er": "x"}`: 1, `{"list": "x"}`: 0, `{"list.0": "x"}`: 1, `{"\"": true}`: 1, `{"é": ""}`: 0} {
		if got := queryIDs(t, b, thingType, filter); len(got) != want {
			t.Errorf("%s finds %v", filter, got)
		}
	}
}

// TestServicesOutOfBounds: how many and how long. More is in TestD34_BadServicesAreRefused.
func TestServicesOutOfBounds(t *testing.T) {
	t.Parallel()
	b := start(t)
	many := make([]*registry.Service, 1001)
	for i := range many {
		many[i] = service(registry.ServiceKind_PROXY, fmt.Sprintf("https://%d.example.com", i))
	}
	_, err := b.Registry.Report(testContext(t), &registry.RegisterRequest{Services: many})
	wantStatus(t, err, codes.InvalidArgument, "services: 1001 services, at most 1000 are allowed")
	report(t, b.Replica, many[:1000]...)
	_, err = b.Registry.Report(testContext(t), &registry.RegisterRequest{Services: []*registry.Service{
		service(registry.ServiceKind_PROXY, "https://secret@"+strings.Repeat("x", 1<<20)),
	}})
	wantStatus(t, err, codes.InvalidArgument, "services[0].endpoint: 1048591 bytes, at most 2048 are allowed")
	for _, endpoint := range []string{"://user:secret@host", "https://user:secret@[::1"} {
		_, err = b.Registry.Report(testContext(t), &registry.RegisterRequest{Services: []*registry.Service{service(registry.ServiceKind_PROXY, endpoint)}})
		if !isCode(err, codes.InvalidArgument) || strings.Contains(err.Error(), "secret") {
			t.Errorf("endpoint %s: %v", endpoint, err)
		}
	}
}

// rawCodec sends and receives bytes as they are.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(message any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(message.([]byte))}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, message any) error {
	*message.(*[]byte) = data.Materialize()
	return nil
}

var _ encoding.CodecV2 = rawCodec{}

// TestMalformedMessages: bytes that are no message of the request's type, invalid UTF-8 in a text included.
// grpc answers those itself, as Internal, before the server sees them.
func TestMalformedMessages(t *testing.T) {
	t.Parallel()
	b := start(t)
	field := func(number protowire.Number, value []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, number, protowire.BytesType), value)
	}
	notUTF8 := []byte{'a', 0xff, 0xc3, 0x28}
	const service = "/databroker.DataBrokerService/"
	for _, test := range []struct {
		name, method string
		request      []byte
	}{
		{"not UTF-8 in the type of Get", "Get", field(1, notUTF8)},
		{"not UTF-8 in the id of Get", "Get", field(2, notUTF8)},
		{"not UTF-8 in a type of Put", "Put", field(1, field(2, notUTF8))},
		{"not UTF-8 in an id of Put", "Put", field(1, field(3, notUTF8))},
		{"not UTF-8 in a type URL of Put", "Put", field(1, field(4, field(1, notUTF8)))},
		{"not UTF-8 in an id of Patch", "Patch", field(1, field(3, notUTF8))},
		{"not UTF-8 in a mask", "Patch", field(2, field(1, notUTF8))},
		{"not UTF-8 in a text query", "Query", field(2, notUTF8)},
		{"not UTF-8 in a lease", "AcquireLease", field(1, notUTF8)},
		{"a surrogate in an id", "Put", field(1, field(3, []byte{0xed, 0xa0, 0x80}))},
		{"cut off", "Put", field(1, field(3, []byte("abc")))[:4]},
		{"length beyond the end", "Put", []byte{0x0a, 0xff, 0xff, 0xff, 0x0f}},
		{"no tag", "Put", []byte{0xff}},
		{"field number 0", "Get", []byte{0x02, 0x00}},
		{"end of a group", "Get", []byte{0x0c}},
	} {
		var response []byte
		err := b.Conn.Invoke(testContext(t), service+test.method, test.request, &response, grpc.ForceCodecV2(rawCodec{}))
		if !isCode(err, codes.Internal) || !strings.Contains(err.Error(), "unmarshal") {
			t.Errorf("%s: got %v", test.name, err)
		}
	}
	// Fields that a newer client knows are no trouble.
	var response []byte
	newer := append(field(1, []byte(thingType)), field(1000, []byte("news"))...)
	if err := b.Conn.Invoke(testContext(t), service+"Query", newer, &response, grpc.ForceCodecV2(rawCodec{})); err != nil {
		t.Errorf("an unknown field: %v", err)
	}
	if types, err := readLatest(testContext(t), b, ""); err != nil || len(types.records) > 0 {
		t.Errorf("afterwards: %v, %v", types, err)
	}
}

// TestRequestsOfNothing: an empty message is a request of every method, and none of them takes the server
// down or answers with an internal error.
func TestRequestsOfNothing(t *testing.T) {
	t.Parallel()
	b := start(t)
	want := map[string]codes.Code{
		"/databroker.DataBrokerService/Get":        codes.NotFound,
		"/databroker.DataBrokerService/GetOptions": codes.InvalidArgument,
		"/databroker.DataBrokerService/Sync":       codes.Aborted,
	}
	callEverything(testContext(t), b.Conn, func(method string, err error) {
		wantStatus(t, err, want[method], "")
	})
}
