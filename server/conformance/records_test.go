package conformance_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/proto/user"
	"pgbroker/server/servertest"
)

// TestS1_AWriteIsVisibleAtOnceEverywhere: as soon as a write has been answered, every replica knows it, and
// says so in every version that it reports.
func TestS1_AWriteIsVisibleAtOnceEverywhere(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	check := func(t *testing.T, r *servertest.Replica, version uint64) {
		t.Helper()
		found := query(t, r, thingType, `{"id": "a"}`)
		if found.RecordVersion < version {
			t.Errorf("Query reports record version %d after %d was written", found.RecordVersion, version)
		}
		if other := query(t, r, userType, "").RecordVersion; other < version {
			t.Errorf("Query of another type reports record version %d after %d was written", other, version)
		}
		if latest := position(t, r).LatestRecordVersion; latest < version {
			t.Errorf("ServerInfo reports record version %d after %d was written", latest, version)
		}
		if latest := syncLatest(t, r, "").versions.LatestRecordVersion; latest < version {
			t.Errorf("SyncLatest reports record version %d after %d was written", latest, version)
		}
	}
	for i := range 10 {
		writer := b.Replicas[i%2]
		written := putOne(t, writer, thing("a", fmt.Sprint(i)))
		for _, r := range b.Replicas {
			same(t, "Get", get(t, r, thingType, "a"), written)
			same(t, "Query", query(t, r, thingType, `{"id": "a"}`).Records, []*databroker.Record{written})
			check(t, r, written.Version)
		}
		deleted := putOne(t, writer, deletion(thingType, "a"))
		for _, r := range b.Replicas {
			wantAbsent(t, r, thingType, "a")
			if found := queryIDs(t, r, thingType, `{"id": "a"}`); len(found) > 0 {
				t.Error("Query finds a record that has been deleted")
			}
			check(t, r, deleted.Version)
		}
	}
}

// TestPutAnswersWithWhatIsStored: versions and times in the answer are those that every later read shows,
// whatever the client has put there.
func TestPutAnswersWithWhatIsStored(t *testing.T) {
	t.Parallel()
	b := start(t)
	from := position(t, b)
	session := newRecord(sessionType, "s", &session.Session{Id: "s", UserId: "u"})
	a, z := thing("a", "first"), thing("z", "last")
	for _, record := range []*databroker.Record{a, session, z} {
		record.Version = 1 << 40
		record.ModifiedAt = timestamppb.New(time.Unix(1, 0))
	}
	response, err := b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{z, session, a}})
	if err != nil {
		t.Fatal(err)
	}
	if response.ServerVersion != from.ServerVersion {
		t.Errorf("server version %d, want %d", response.ServerVersion, from.ServerVersion)
	}
	if len(response.Records) != 3 {
		t.Fatalf("%d records in the answer, want 3", len(response.Records))
	}
	versions := make(map[uint64]bool)
	stored := syncLatest(t, b, "").records
	changes, _ := syncNow(t, b, from, "")
	for i, sent := range []*databroker.Record{z, session, a} {
		answered := response.Records[i]
		if answered.Type != sent.Type || answered.Id != sent.Id || !proto.Equal(answered.Data, sent.Data) {
			t.Errorf("record %d of the answer is %v, want %v", i, answered, sent)
		}
		if answered.Version <= from.LatestRecordVersion || answered.Version == sent.Version {
			t.Errorf("version %d, the latest before was %d", answered.Version, from.LatestRecordVersion)
		}
		if versions[answered.Version] {
			t.Errorf("version %d twice", answered.Version)
		}
		versions[answered.Version] = true
		if age := time.Since(answered.ModifiedAt.AsTime()); age < -time.Minute || age > time.Minute {
			t.Errorf("modified %v ago", age)
		}
		same(t, "Get", get(t, b, sent.Type, sent.Id), answered)
		for name, records := range map[string][]*databroker.Record{"SyncLatest": stored, "Sync": changes} {
			if !contains(records, func(r *databroker.Record) bool { return proto.Equal(r, answered) }) {
				t.Errorf("%s does not have %v as the answer shows it", name, answered.Id)
			}
		}
	}
}

// TestD26_TimesAreExact: the modification time in the answer of a write is the one stored, to the last digit.
func TestD26_TimesAreExact(t *testing.T) {
	t.Parallel()
	b := start(t)
	for range 5 {
		answered := putOne(t, b, newRecord(sessionType, "s", &session.Session{Id: "s"}))
		if got := get(t, b, sessionType, "s"); !proto.Equal(got.ModifiedAt, answered.ModifiedAt) {
			t.Errorf("modified at %v, the answer to the write said %v", got.ModifiedAt.AsTime(), answered.ModifiedAt.AsTime())
		}
		patched, err := b.Patch(testContext(t), &databroker.PatchRequest{Records: []*databroker.Record{{Type: sessionType, Id: "s"}}})
		if err != nil || len(patched.Records) != 1 {
			t.Fatalf("patch: %v, %v", patched, err)
		}
		if got := get(t, b, sessionType, "s"); !proto.Equal(got.ModifiedAt, patched.Records[0].ModifiedAt) {
			t.Errorf("modified at %v, the answer to the patch said %v", got.ModifiedAt.AsTime(), patched.Records[0].ModifiedAt.AsTime())
		}
	}
}

// TestPutOfNothing: no records are no error.
func TestPutOfNothing(t *testing.T) {
	t.Parallel()
	b := start(t)
	response, err := b.Put(testContext(t), new(databroker.PutRequest))
	if err != nil || len(response.Records) != 0 || response.ServerVersion != position(t, b).ServerVersion {
		t.Errorf("got %v, %v", response, err)
	}
}

// TestPutReplacesTheWholePayload: nothing of the old payload remains.
func TestPutReplacesTheWholePayload(t *testing.T) {
	t.Parallel()
	b := start(t)
	put(t, b, newRecord(sessionType, "s", &session.Session{Id: "s", UserId: "u", Audience: []string{"a"}}))
	put(t, b, newRecord(sessionType, "s", &session.Session{Id: "s", IdpId: "i"}))
	same(t, "payload", payload[*session.Session](t, get(t, b, sessionType, "s")), &session.Session{Id: "s", IdpId: "i"})
}

// TestPutOfOneKeySeveralTimes: repetitions in one request are applied in order.
func TestPutOfOneKeySeveralTimes(t *testing.T) {
	t.Parallel()
	b := start(t)
	stream := followNow(t, b, thingType)
	for _, test := range []struct {
		name    string
		records []*databroker.Record
		want    string // "" if it is gone in the end
	}{
		{"puts", []*databroker.Record{thing("a", "1"), thing("a", "2"), thing("a", "3")}, "3"},
		{"put and delete", []*databroker.Record{thing("a", "4"), deletion(thingType, "a")}, ""},
		{"put, delete and put", []*databroker.Record{thing("a", "5"), deletion(thingType, "a"), thing("a", "6")}, "6"},
		{"delete and put", []*databroker.Record{deletion(thingType, "a"), thing("a", "7")}, "7"},
	} {
		answered := put(t, b, test.records...)
		for i := 1; i < len(answered); i++ {
			if answered[i].Version <= answered[i-1].Version {
				t.Errorf("%s: versions %d and %d do not ascend", test.name, answered[i-1].Version, answered[i].Version)
			}
		}
		last := stream.change()
		for last.Version < answered[len(answered)-1].Version {
			last = stream.change()
		}
		if test.want == "" {
			wantAbsent(t, b, thingType, "a")
			if last.DeletedAt == nil {
				t.Errorf("%s: the last change on the stream is %v", test.name, last)
			}
			continue
		}
		if got := textOf(t, get(t, b, thingType, "a")); got != test.want {
			t.Errorf("%s: stored %q, want %q", test.name, got, test.want)
		}
		if got := textOf(t, last); got != test.want {
			t.Errorf("%s: the last change on the stream is %q, want %q", test.name, got, test.want)
		}
	}
}

// poison makes the database refuse writes of records with the id "poison", and only of those.
func poison(t *testing.T, b *servertest.Broker) {
	t.Helper()
	b.Database.Exec(t, "ALTER TABLE pgbroker.records ADD CONSTRAINT poison CHECK (id <> 'poison') NOT VALID")
}

// TestD3_PutIsAllOrNothing: when the database refuses one record of a Put, none is stored, nothing reaches
// streams, and requests that shared the transaction succeed.
func TestD3_PutIsAllOrNothing(t *testing.T) {
	t.Parallel()
	b := start(t)
	poison(t, b)
	stream := followNow(t, b, thingType)
	before := position(t, b)

	const others = 20
	done := make(chan error, others)
	for i := range others {
		go func() {
			_, err := b.Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{thing(fmt.Sprintf("other %02d", i), "")}})
			done <- err
		}()
		_, err := b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{
			thing("a", ""), thing("poison", ""), thing("b", ""),
		}})
		wantStatus(t, err, codes.Internal, "internal error")
	}
	for range others {
		if err := <-done; err != nil {
			t.Errorf("a request that has nothing to do with the bad one: %v", err)
		}
	}
	if got := queryIDs(t, b, thingType, `{"id": ["a", "poison", "b"]}`); len(got) > 0 {
		t.Errorf("stored of a Put that failed: %v", got)
	}
	if records, _ := syncNow(t, b, before, ""); len(records) != others {
		t.Errorf("%d changes, want the %d of the Puts that succeeded", len(records), others)
	}
	for _, record := range stream.changes(others) {
		if record.Id == "a" || record.Id == "b" {
			t.Errorf("the stream got %s, which is not stored", record.Id)
		}
	}
}

// TestD30_AFailedWriteMovesNothing: versions that a failed write has drawn are never reported as latest.
func TestD30_AFailedWriteMovesNothing(t *testing.T) {
	t.Parallel()
	b := start(t)
	poison(t, b)
	stored := putOne(t, b, thing("a", ""))
	for range 3 {
		_, err := b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{thing("a", ""), thing("poison", "")}})
		wantStatus(t, err, codes.Internal, "")
	}
	if latest := position(t, b).LatestRecordVersion; latest != stored.Version {
		t.Errorf("ServerInfo reports %d, the latest change is %d", latest, stored.Version)
	}
	if latest := query(t, b, thingType, "").RecordVersion; latest != stored.Version {
		t.Errorf("Query reports %d, the latest change is %d", latest, stored.Version)
	}
	same(t, "stored", get(t, b, thingType, "a"), stored)
}

// TestDeletionLeavesATombstone: whatever time the client sends, the tombstone has the server's, and streams
// get it.
func TestDeletionLeavesATombstone(t *testing.T) {
	t.Parallel()
	b := start(t)
	for name, deletedAt := range map[string]*timestamppb.Timestamp{
		"now": timestamppb.Now(), "past": timestamppb.New(time.Unix(1, 0)), "future": timestamppb.New(time.Now().AddDate(100, 0, 0)),
		"zero": {}, "not a time": {Seconds: -1 << 62, Nanos: -1},
	} {
		written := putOne(t, b, thing("a", name))
		stream := follow(t, b, &databroker.Versions{ServerVersion: position(t, b).ServerVersion, LatestRecordVersion: written.Version}, thingType)
		putOne(t, b, &databroker.Record{Type: thingType, Id: "a", DeletedAt: deletedAt, Data: newAny(new(wrapperspb.StringValue))})
		wantAbsent(t, b, thingType, "a")
		tombstone := stream.change()
		if tombstone.Type != thingType || tombstone.Id != "a" || tombstone.Version <= written.Version {
			t.Errorf("%s: got %v", name, tombstone)
		}
		if !proto.Equal(tombstone.DeletedAt, tombstone.ModifiedAt) {
			t.Errorf("%s: deleted at %v, modified at %v", name, tombstone.DeletedAt, tombstone.ModifiedAt)
		}
		if age := time.Since(tombstone.DeletedAt.AsTime()); age < -time.Minute || age > time.Minute {
			t.Errorf("%s: deleted %v ago", name, age)
		}
		// Some clients decode the payload before they look at deleted_at: none is fine, the last one is too.
		if tombstone.Data != nil && !proto.Equal(tombstone.Data, written.Data) {
			t.Errorf("%s: the tombstone's payload is %v", name, tombstone.Data)
		}
		stream.close()
	}
}

// TestD25_TheAnswerToADeletionHasTheTombstonesVersion, so that callers can ask for data at least that new.
func TestD25_TheAnswerToADeletionHasTheTombstonesVersion(t *testing.T) {
	t.Parallel()
	b := start(t)
	stream := followNow(t, b, "")
	put(t, b, newRecord(sessionType, "a", new(session.Session)), newRecord(sessionType, "b", new(session.Session)))
	stream.changes(2)

	answered := putOne(t, b, deletion(sessionType, "a"))
	tombstone := stream.change()
	if answered.Version != tombstone.Version || !proto.Equal(answered.ModifiedAt, tombstone.ModifiedAt) || answered.DeletedAt == nil {
		t.Errorf("Put answers %v, the tombstone is %v", answered, tombstone)
	}
	patched, err := b.Patch(testContext(t), &databroker.PatchRequest{Records: []*databroker.Record{deletion(sessionType, "b")}})
	if err != nil || len(patched.Records) != 1 {
		t.Fatalf("patch: %v, %v", patched, err)
	}
	answered, tombstone = patched.Records[0], stream.change()
	if answered.Version != tombstone.Version || !proto.Equal(answered.ModifiedAt, tombstone.ModifiedAt) || answered.DeletedAt == nil {
		t.Errorf("Patch answers %v, the tombstone is %v", answered, tombstone)
	}
}

// TestS12_DeletingAnAbsentRecordIsFine, and is no change: streams hear nothing of it.
func TestS12_DeletingAnAbsentRecordIsFine(t *testing.T) {
	t.Parallel()
	b := start(t)
	stream := followNow(t, b, thingType)
	for range 2 {
		answered := put(t, b, deletion(thingType, "absent"))
		if len(answered) != 1 || answered[0].Id != "absent" || answered[0].DeletedAt == nil {
			t.Errorf("answer %v", answered)
		}
	}
	answered := put(t, b, deletion(thingType, "absent"), thing("a", ""), deletion("example.com/Unknown", "absent"))
	if len(answered) != 3 || answered[1].Version == 0 {
		t.Errorf("answer %v", answered)
	}
	if next := stream.change(); next.Id != "a" {
		t.Errorf("the stream got %v", next)
	}
}

// payloads are one of each kind that a server might change or refuse.
func payloads() map[string]*anypb.Any {
	canonical := newAny(&session.Session{Id: "s", UserId: "u", Audience: []string{"x", "y"}})
	unknownField := newAny(&session.Session{Id: "s"})
	unknownField.Value = append(unknownField.Value, 0xfa, 0x3f, 3, 'n', 'e', 'w') // field 1023
	inAny := newAny(wrapperspb.String("x"))
	inAny.ProtoReflect().SetUnknown([]byte{0x1a, 2, 'h', 'i'}) // field 3 of the Any itself
	everyByte := make([]byte, 256)
	for i := range everyByte {
		everyByte[i] = byte(i)
	}
	nested := structpb.NewStringValue("bottom")
	for range 400 {
		nested = structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{nested}})
	}
	const sessionURL = "type.googleapis.com/session.Session"
	return map[string]*anypb.Any{
		"none":                        nil,
		"empty":                       {},
		"type without value":          {TypeUrl: sessionURL},
		"value without type":          {Value: everyByte},
		"canonical":                   canonical,
		"unknown type":                {TypeUrl: "type.googleapis.com/example.Unknown", Value: everyByte},
		"no type URL":                 {TypeUrl: "no slash", Value: []byte{1}},
		"unknown field":               unknownField,
		"unknown field of the Any":    inAny,
		"undecodable":                 {TypeUrl: sessionURL, Value: []byte{0x0a, 0xff}},
		"not UTF-8":                   {TypeUrl: sessionURL, Value: []byte{0x12, 2, 0xc3, 0x28}},
		"fields out of order":         {TypeUrl: sessionURL, Value: []byte{0x1a, 1, 'u', 0x12, 1, 's'}},
		"field twice":                 {TypeUrl: sessionURL, Value: []byte{0x12, 1, 'x', 0x12, 1, 's'}},
		"varint longer than needed":   {TypeUrl: "type.googleapis.com/google.protobuf.BoolValue", Value: []byte{0x08, 0x81, 0x00}},
		"default value spelled out":   {TypeUrl: sessionURL, Value: []byte{0x12, 0}},
		"U+0000":                      newAny(&session.Session{Id: "a\x00b", Audience: []string{"\x00"}}),
		"U+0000 in a Struct":          newAny(newStruct(map[string]any{"k\x00": "v\x00"})),
		"time out of range":           newAny(&session.Session{ExpiresAt: &timestamppb.Timestamp{Seconds: 1 << 60}}),
		"time before the year 1":      newAny(&session.Session{ExpiresAt: &timestamppb.Timestamp{Seconds: -1 << 60, Nanos: -5}}),
		"last time there is":          newAny(&session.Session{ExpiresAt: &timestamppb.Timestamp{Seconds: 253402300799, Nanos: 999999999}}),
		"numbers that JSON lacks":     newAny(structpb.NewListValue(&structpb.ListValue{Values: []*structpb.Value{{}, {Kind: &structpb.Value_NumberValue{NumberValue: inf()}}, {Kind: &structpb.Value_NumberValue{NumberValue: inf() - inf()}}, {Kind: &structpb.Value_NumberValue{NumberValue: 1.7976931348623157e308}}}})),
		"value without kind":          newAny(new(structpb.Value)),
		"deeply nested":               newAny(nested),
		"bad index prefix":            newAny(newStruct(map[string]any{"$index": map[string]any{"cidr": "10.0.0.0/99"}})),
		"index that is no prefix":     newAny(newStruct(map[string]any{"$index": "10.0.0.0/8"})),
		"Any in Any":                  newAny(newAny(canonical)),
		"a megabyte":                  newAny(wrapperspb.Bytes(make([]byte, 1<<20))),
		"every byte":                  newAny(wrapperspb.Bytes(everyByte)),
		"text of a megabyte, escapes": newAny(wrapperspb.String(string(make([]byte, 1<<20)))),
	}
}

func inf() float64 {
	zero := 0.0
	return 1 / zero
}

// TestS8_PayloadsComeBackByteForByte: whatever a payload is, every way of reading returns it unchanged.
func TestS8_PayloadsComeBackByteForByte(t *testing.T) {
	t.Parallel()
	b := start(t)
	stream := followNow(t, b, "")
	for name, data := range payloads() {
		t.Run(name, func(t *testing.T) {
			wantData := func(t *testing.T, how string, record *databroker.Record) {
				t.Helper()
				got := record.GetData()
				if (got == nil) != (data == nil) || got.GetTypeUrl() != data.GetTypeUrl() || string(got.GetValue()) != string(data.GetValue()) ||
					string(got.ProtoReflect().GetUnknown()) != string(data.ProtoReflect().GetUnknown()) {
					t.Errorf("%s returns %.200v, stored was %.200v", how, got, data)
				}
			}
			recordType := "example.com/" + name
			// A session's type as well, for which the server reads more of the payload.
			for _, recordType := range []string{recordType, sessionType} {
				wantData(t, "Put", putOne(t, b, &databroker.Record{Type: recordType, Id: name, Data: data}))
				wantData(t, "Sync", stream.changeOf(name))
				wantData(t, "Get", get(t, b, recordType, name))
				found := query(t, b, recordType, `{"id": "`+name+`"}`).Records
				if len(found) != 1 {
					t.Fatalf("Query finds %d records", len(found))
				}
				wantData(t, "Query", found[0])
				if recordType != sessionType {
					wantData(t, "SyncLatest", syncLatest(t, b, recordType).records[0])
				}
				put(t, b, deletion(recordType, name)) // a session that has expired would go by itself
				stream.changeOf(name)
			}
		})
	}
}

// TestD23_UnknownTypesAndFieldsSurvive: a record that this server cannot read is as good as any other, and
// a patch keeps the fields that it does not know.
func TestD23_UnknownTypesAndFieldsSurvive(t *testing.T) {
	t.Parallel()
	b := start(t)
	unknown := &databroker.Record{Type: "example.com/New", Id: "n", Data: &anypb.Any{TypeUrl: "example.com/new.Message", Value: []byte{0xff, 0}}}
	put(t, b, unknown)
	same(t, "unknown type", get(t, b, unknown.Type, unknown.Id).Data, unknown.Data)

	data := newAny(&session.Session{Id: "s", UserId: "u"})
	extra := []byte{0xfa, 0x3f, 3, 'n', 'e', 'w'} // field 1023
	data.Value = append(data.Value, extra...)
	put(t, b, &databroker.Record{Type: sessionType, Id: "s", Data: data})
	patch(t, b, []string{"user_id"}, newRecord(sessionType, "s", &session.Session{UserId: "v"}))
	want := &session.Session{Id: "s", UserId: "v"}
	want.ProtoReflect().SetUnknown(extra)
	same(t, "patched", payload[*session.Session](t, get(t, b, sessionType, "s")), want)
}

// TestD24_ARecordNeedsNoPayload.
func TestD24_ARecordNeedsNoPayload(t *testing.T) {
	t.Parallel()
	b := start(t)
	put(t, b, &databroker.Record{Type: thingType, Id: "a"}, &databroker.Record{Type: thingType, Id: "b", Data: new(anypb.Any)})
	if data := get(t, b, thingType, "a").Data; data != nil {
		t.Errorf("the payload is %v, want none", data)
	}
	if data := get(t, b, thingType, "b").Data; data == nil || data.TypeUrl != "" || len(data.Value) > 0 {
		t.Errorf("the payload is %v, want an empty one", data)
	}
}

// TestGet: what it returns and when it finds nothing.
func TestGet(t *testing.T) {
	t.Parallel()
	b := start(t)
	written := putOne(t, b, thing("a", "x"))
	got := get(t, b, thingType, "a")
	same(t, "record", got, written)
	if got.DeletedAt != nil {
		t.Error("a live record has deleted_at")
	}
	for _, key := range [][2]string{
		{thingType, "b"}, {"example.com/Other", "a"}, {thingType, ""}, {"", "a"}, {"", ""}, {thingType, "A"}, {thingType, "a "},
	} {
		wantAbsent(t, b, key[0], key[1])
	}
	put(t, b, deletion(thingType, "a"))
	wantAbsent(t, b, thingType, "a")
	put(t, b, thing("a", "again"))
	if text := textOf(t, get(t, b, thingType, "a")); text != "again" {
		t.Errorf("got %q", text)
	}
}

// TestKeysAreArbitrary: types and ids are any text, and the type need not be that of the payload.
func TestKeysAreArbitrary(t *testing.T) {
	t.Parallel()
	b := start(t)
	keys := []string{"", " ", "a b", "A", "a", "%", "_", "'", `"`, `\`, "\x01", "\x7f", "/", ".", "$index", "é", "e\u0301", "\U0001f642", "\uffff", "null", "0"}
	var records []*databroker.Record
	for _, k := range keys {
		records = append(records, newRecord("t"+k, k, wrapperspb.String(k)), newRecord(k, "i"+k, new(user.User)))
	}
	put(t, b, records...)
	for _, record := range records {
		same(t, "payload", get(t, b, record.Type, record.Id).Data, record.Data)
	}
	if n := len(syncLatest(t, b, "").records); n != len(records) {
		t.Errorf("SyncLatest has %d records, want %d", n, len(records))
	}
}

// TestD13_RecordsOfTheEmptyType do no harm to queries over all types.
func TestD13_RecordsOfTheEmptyType(t *testing.T) {
	t.Parallel()
	b := start(t)
	put(t, b, newRecord("", "a", wrapperspb.String("nameless")), newRecord("", "", wrapperspb.String("without id")), thing("a", "named"))
	if got := query(t, b, "", `{"id": "a"}`).Records; len(got) != 2 || got[0].Type != "" || got[1].Type != thingType {
		t.Errorf("by id without type: %v", got)
	}
	if got := queryIDs(t, b, "", `{"$or": [{"id": "a"}, {"$index": "a"}]}`); len(got) != 2 {
		t.Errorf("by id or index without type: %v", got)
	}
	if got := queryIDs(t, b, "", `{"id": ""}`); len(got) != 1 {
		t.Errorf("by empty id: %v", got)
	}
	if types := must[*databroker.ListTypesResponse](t)(b.ListTypes(testContext(t), new(emptypb.Empty))).Types; len(types) != 2 || types[0] != "" {
		t.Errorf("types %q", types)
	}
}

// TestListTypes: types with live records, in byte order.
func TestListTypes(t *testing.T) {
	t.Parallel()
	b := start(t)
	list := func() []string {
		return must[*databroker.ListTypesResponse](t)(b.ListTypes(testContext(t), new(emptypb.Empty))).Types
	}
	if types := list(); len(types) != 0 {
		t.Errorf("types with options but no records are listed: %q", types)
	}
	put(t, b, object("b", "1", nil), object("B", "1", nil), object("é", "1", nil), object("a", "1", nil), object("_", "1", nil), object("a", "2", nil), object("a/b", "1", nil))
	same(t, "types", list(), []string{"B", "_", "a", "a/b", "b", "é"})
	put(t, b, deletion("a", "1"), deletion("b", "1"))
	same(t, "types", list(), []string{"B", "_", "a", "a/b", "é"})
	put(t, b, deletion("a", "2"), object("b", "3", nil))
	same(t, "types", list(), []string{"B", "_", "a/b", "b", "é"})
}

// TestD20_ListTypesReadsNoRecords: nor does a stream of all types when it opens. Both go on while nobody can
// read the table of records.
func TestD20_ListTypesReadsNoRecords(t *testing.T) {
	t.Parallel()
	b := start(t)
	put(t, b, thing("a", ""), newRecord(userType, "u", new(user.User)))
	from := position(t, b)

	tx := must[pgx.Tx](t)(b.Database.Connect(t).Begin(t.Context()))
	if _, err := tx.Exec(t.Context(), "LOCK TABLE pgbroker.records IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	same(t, "types", must[*databroker.ListTypesResponse](t)(b.ListTypes(testContext(t), new(emptypb.Empty))).Types, []string{thingType, userType})
	stream := follow(t, b, from, "")
	stream.nextOptions()
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	put(t, b, thing("b", ""))
	if next := stream.change(); next.Id != "b" {
		t.Errorf("got %v", next)
	}
}

// TestServerInfo: the range of the change log.
func TestServerInfo(t *testing.T) {
	t.Parallel()
	b := start(t)
	info := func() *databroker.ServerInfoResponse {
		return must[*databroker.ServerInfoResponse](t)(b.ServerInfo(testContext(t), new(emptypb.Empty)))
	}
	empty := info()
	if empty.ServerVersion == 0 || empty.EarliestRecordVersion != 0 || empty.LatestRecordVersion != 0 {
		t.Errorf("of an empty log: %v", empty)
	}
	first := putOne(t, b, thing("a", ""))
	second := putOne(t, b, thing("b", ""))
	if first.Version == 0 || second.Version <= first.Version {
		t.Errorf("versions %d and %d", first.Version, second.Version)
	}
	same(t, "info", info(), &databroker.ServerInfoResponse{
		ServerVersion: empty.ServerVersion, EarliestRecordVersion: first.Version, LatestRecordVersion: second.Version,
	})
	tombstone := putOne(t, b, deletion(thingType, "b"))
	if got := info().LatestRecordVersion; got != tombstone.Version {
		t.Errorf("latest %d, want %d", got, tombstone.Version)
	}
}
