package conformance_test

import (
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/events"
	"pgbroker/proto/session"
)

func setOptions(t *testing.T, c client, recordType string, options *databroker.Options) *databroker.Options {
	t.Helper()
	response, err := c.SetOptions(testContext(t), &databroker.SetOptionsRequest{Type: recordType, Options: options})
	if err != nil {
		t.Fatalf("set options of %s: %v", recordType, err)
	}
	return response.Options
}

// TestOptions: what is set is what every replica returns; setting replaces, and merges nothing.
func TestOptions(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	for _, options := range []*databroker.Options{
		{Capacity: proto.Uint64(0)},
		{Capacity: proto.Uint64(50)},
		{IndexableFields: []string{"a", "b.c", "a"}},
		{Ttl: durationpb.New(90 * time.Second)},
		{Ttl: durationpb.New(0)},
		{Ttl: durationpb.New(1500 * time.Microsecond)},
		{Capacity: proto.Uint64(1 << 62), IndexableFields: []string{"x"}, Ttl: durationpb.New(365 * 24 * time.Hour)},
	} {
		same(t, "answer", setOptions(t, b, thingType, options), options)
		for _, r := range b.Replicas {
			response, err := r.GetOptions(testContext(t), &databroker.GetOptionsRequest{Type: thingType})
			if err != nil {
				t.Errorf("get options: %v", err)
				continue
			}
			same(t, "options", response.Options, options)
		}
	}
	same(t, "options of the empty type", setOptions(t, b, "", &databroker.Options{Capacity: proto.Uint64(1)}), &databroker.Options{Capacity: proto.Uint64(1)})
}

// TestOptionsErrors: the codes and messages of GetOptions.
func TestOptionsErrors(t *testing.T) {
	t.Parallel()
	b := start(t)
	put(t, b, thing("a", ""))
	_, err := b.GetOptions(testContext(t), new(databroker.GetOptionsRequest))
	wantStatus(t, err, codes.InvalidArgument, "options req type is empty")
	for _, recordType := range []string{thingType, "example.com/Unknown", sessionType} {
		_, err = b.GetOptions(testContext(t), &databroker.GetOptionsRequest{Type: recordType})
		wantStatus(t, err, codes.NotFound, "no options are set for this record type")
	}
}

// TestD17_SettingEmptyOptionsSucceeds: it removes them, and says so with empty options.
func TestD17_SettingEmptyOptionsSucceeds(t *testing.T) {
	t.Parallel()
	b := start(t)
	for _, empty := range []*databroker.Options{nil, {}} {
		for _, before := range []*databroker.Options{{Capacity: proto.Uint64(1), IndexableFields: []string{"a"}, Ttl: durationpb.New(time.Hour)}, nil} {
			setOptions(t, b, thingType, before)
			same(t, "answer", setOptions(t, b, thingType, empty), new(databroker.Options))
			_, err := b.GetOptions(testContext(t), &databroker.GetOptionsRequest{Type: thingType})
			wantStatus(t, err, codes.NotFound, "")
		}
	}
	put(t, b, thing("a", ""), thing("b", ""))
	if n := len(query(t, b, thingType, "").Records); n != 2 {
		t.Errorf("%d records: the capacity is still in force", n)
	}
}

// TestD19_OpenStreamsHearOfOptions: when options are set, changed or removed, on every replica, streams of
// the type and of all types get them; and a stream that opens has those of the moment.
func TestD19_OpenStreamsHearOfOptions(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	typed, other := followNow(t, b.Replicas[0], thingType), followNow(t, b.Replicas[1], sessionType)
	all := followNow(t, b.Replicas[1], "")
	for range 5 { // the built-in ones
		all.nextOptions()
	}
	for i, options := range []*databroker.Options{
		{Capacity: proto.Uint64(5)}, {Capacity: proto.Uint64(6), Ttl: durationpb.New(time.Hour)}, {IndexableFields: []string{"a"}}, {},
	} {
		setOptions(t, b.Replicas[i%2], thingType, options)
		want := &databroker.TypedOptions{TypeURL: thingType, Options: options}
		same(t, "options on a stream of the type", typed.nextOptions(), want)
		same(t, "options on a stream of all types", all.nextOptions(), want)
	}
	put(t, b, newRecord(sessionType, "s", &session.Session{Id: "s"}))
	if next := other.next(); next.GetRecord() == nil {
		t.Errorf("a stream of another type got %v", next)
	}

	for i := range 30 {
		capacity := uint64(100 + i)
		setOptions(t, b.Replicas[i%2], thingType, &databroker.Options{Capacity: &capacity})
		for _, r := range b.Replicas {
			_, options := syncNow(t, r, position(t, r), thingType)
			if len(options) != 1 || options[0].Options.GetCapacity() != capacity {
				t.Errorf("a stream opened after the capacity was set to %d has %v", capacity, options)
			}
		}
	}
}

// TestD5_S13_CapacityKeepsTheMostRecent: the records written last stay, and the others leave by tombstones.
func TestD5_S13_CapacityKeepsTheMostRecent(t *testing.T) {
	t.Parallel()
	b := start(t)
	for i := range 4 {
		put(t, b, thing(fmt.Sprint(i), ""))
	}
	setOptions(t, b, thingType, &databroker.Options{Capacity: proto.Uint64(3)})
	same(t, "setting the capacity evicts nothing", queryIDs(t, b, thingType, ""), []string{"0", "1", "2", "3"})
	put(t, b, object("example.com/Other", "x", nil), object("example.com/Other", "y", nil))
	same(t, "nor does a write of another type", queryIDs(t, b, thingType, ""), []string{"0", "1", "2", "3"})

	copied := recordsByKey(syncLatest(t, b, thingType).records)
	stream := followNow(t, b, thingType)
	check := func(what string, want ...string) {
		t.Helper()
		same(t, what, queryIDs(t, b, thingType, ""), want)
		changes, _ := syncNow(t, b, &databroker.Versions{ServerVersion: position(t, b).ServerVersion, LatestRecordVersion: stream.version}, thingType)
		for range changes {
			fold(copied, stream.change())
		}
		if len(copied) != len(want) {
			t.Errorf("%s: a client that follows the stream keeps %d records, want %d", what, len(copied), len(want))
		}
		for _, id := range want {
			if copied[thingType+"\x00"+id] == nil {
				t.Errorf("%s: a client that follows the stream does not have %s", what, id)
			}
		}
	}
	put(t, b, thing("0", "again"))
	check("an update makes a record recent", "0", "2", "3")
	put(t, b, thing("4", ""))
	check("a new record", "0", "3", "4")
	put(t, b, thing("5", ""), thing("6", ""))
	check("two new records", "4", "5", "6")
	answered := put(t, b, thing("a", ""), thing("b", ""), thing("c", ""), thing("d", ""), thing("e", ""))
	check("more than the capacity at once", "c", "d", "e")
	for _, record := range answered {
		if record.Version == 0 {
			t.Errorf("the answer has no version for %s, which was stored and evicted at once", record.Id)
		}
	}
	put(t, b, deletion(thingType, "d"))
	check("a deletion makes room", "c", "e")
	put(t, b, thing("f", ""))
	check("which is then used", "c", "e", "f")
	put(t, b, deletion(thingType, "f"), thing("g", ""))
	check("a deletion and a new record at once", "c", "e", "g")
	put(t, b, thing("h", ""), deletion(thingType, "g"))
	check("a new record and a deletion at once", "c", "e", "h")
	setOptions(t, b, thingType, &databroker.Options{Capacity: proto.Uint64(0)})
	if answered := putOne(t, b, thing("z", "")); answered.Version == 0 {
		t.Error("a Put that is evicted at once has no version")
	}
	check("no capacity at all")
	setOptions(t, b, thingType, nil)
	put(t, b, thing("1", ""), thing("2", ""), thing("3", ""), thing("4", ""))
	check("no limit", "1", "2", "3", "4")
}

// TestCapacityIsPerType: types touched by one Put are each held to their own.
func TestCapacityIsPerType(t *testing.T) {
	t.Parallel()
	b := start(t)
	setOptions(t, b, "t1", &databroker.Options{Capacity: proto.Uint64(1)})
	setOptions(t, b, "t2", &databroker.Options{Capacity: proto.Uint64(2)})
	var records []*databroker.Record
	for _, recordType := range []string{"t1", "t2", "t3"} {
		for i := range 3 {
			records = append(records, object(recordType, fmt.Sprint(i), nil))
		}
	}
	put(t, b, records...)
	for recordType, want := range map[string][]string{"t1": {"2"}, "t2": {"1", "2"}, "t3": {"0", "1", "2"}} {
		same(t, recordType, queryIDs(t, b, recordType, ""), want)
	}
}

// TestTheEventWriter caps its type before it writes, as the control plane does.
func TestTheEventWriter(t *testing.T) {
	t.Parallel()
	b := start(t)
	setOptions(t, b, lastErrorType, &databroker.Options{Capacity: proto.Uint64(50)})
	for i := range 60 {
		put(t, b, newRecord(lastErrorType, fmt.Sprint(i), &events.LastError{Id: fmt.Sprint(i), Time: timestamppb.Now(), Message: "m"}))
	}
	found := query(t, b, lastErrorType, "")
	if found.TotalCount != 50 || contains(found.Records, func(r *databroker.Record) bool { return r.Id == "9" }) {
		t.Errorf("%d records: %v", found.TotalCount, idsOf(found.Records))
	}
}

// startWithClock starts a broker on a database whose clock the test moves.
func startWithClock(t *testing.T, replicas int) (b brokerWithClock) {
	t.Helper()
	database := dbtest.New(t)
	b.clock = newClock(t, database)
	b.Broker = startOn(t, database, replicas)
	return b
}

// TestS14_TTL: records not written for longer than their type's TTL leave by tombstones, to every replica's
// streams; until then they can be read; any write starts the time anew.
func TestS14_TTL(t *testing.T) {
	t.Parallel()
	b := startWithClock(t, 2)
	const shortLived = "example.com/ShortLived"
	setOptions(t, b, shortLived, &databroker.Options{Ttl: durationpb.New(time.Hour)})
	setOptions(t, b, "example.com/Forever", &databroker.Options{Ttl: durationpb.New(0)})
	payload := &session.Session{Id: "s"}
	for _, id := range []string{"a", "b", "c", "d"} {
		put(t, b, newRecord(shortLived, id, payload))
	}
	put(t, b, newRecord("example.com/Forever", "x", payload), newRecord("example.com/None", "x", payload))
	stream := followNow(t, b.Replicas[1], "")

	b.clock.advance(30 * time.Minute)
	put(t, b, newRecord(shortLived, "b", payload))
	patch(t, b, nil, newRecord(shortLived, "c", payload))
	b.clock.advance(31 * time.Minute)
	if got := get(t, b, shortLived, "a"); got.Id != "a" {
		t.Errorf("before it is tidied up: %v", got)
	}
	b.expire(t)
	stream.changes(2)
	tombstones := map[string]bool{}
	for range 2 {
		change := stream.change()
		if change.DeletedAt == nil || !proto.Equal(change.DeletedAt, change.ModifiedAt) {
			t.Errorf("got %v, want a tombstone", change)
		}
		tombstones[change.Id] = true
	}
	same(t, "tombstones", tombstones, map[string]bool{"a": true, "d": true})
	same(t, "records", queryIDs(t, b, "", ""), []string{"x", "x", "b", "c"})

	b.clock.advance(29*time.Minute + 30*time.Second)
	b.expire(t)
	same(t, "records, their time starting anew", queryIDs(t, b, shortLived, ""), []string{})
	b.clock.advance(1000 * time.Hour)
	b.expire(t)
	same(t, "records without a TTL", queryIDs(t, b, "", ""), []string{"x", "x"})
}

// TestS14_TheServerTidiesUpByItself: whoever starts does at once what is due, and goes on doing it.
func TestS14_TheServerTidiesUpByItself(t *testing.T) {
	t.Parallel()
	b := start(t)
	setOptions(t, b, thingType, &databroker.Options{Ttl: durationpb.New(time.Hour)})
	put(t, b, thing("old", ""), thing("young", ""))
	from := position(t, b)
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	b.Database.AdminExec(t, "SET session_replication_role = replica; UPDATE pgbroker.changes SET changed_at = changed_at - interval '61 minutes' WHERE id = 'old'")
	r := startMore(t, b)
	if tombstone := follow(t, r, from, thingType).change(); tombstone.Id != "old" || tombstone.DeletedAt == nil {
		t.Errorf("got %v, want the tombstone of what is too old", tombstone)
	}
	same(t, "records", queryIDs(t, r, thingType, ""), []string{"young"})
}

// TestS14_TheServerGoesOnTidyingUp: what becomes due while it runs goes well within a minute.
func TestS14_TheServerGoesOnTidyingUp(t *testing.T) {
	t.Parallel()
	b := start(t)
	stream := followNow(t, b, sessionType)
	put(t, b, newRecord(sessionType, "s", &session.Session{Id: "s", ExpiresAt: timestamppb.New(time.Now().Add(-time.Second))}))
	stream.change()
	if tombstone := stream.change(); tombstone.DeletedAt == nil {
		t.Errorf("got %v, want a tombstone", tombstone)
	}
	wantAbsent(t, b, sessionType, "s")
}

// TestSessionsEndByThemselves: there need be nobody who deletes a session whose own expiry has passed.
func TestSessionsEndByThemselves(t *testing.T) {
	t.Parallel()
	b := startWithClock(t, 1)
	until := func(id string, end *timestamppb.Timestamp) *databroker.Record {
		return newRecord(sessionType, id, &session.Session{Id: id, ExpiresAt: end})
	}
	hour := timestamppb.New(time.Now().Add(time.Hour))
	day := timestamppb.New(time.Now().Add(24 * time.Hour))
	put(t, b, until("hour", hour), until("day", day), until("forever", nil), until("prolonged", hour), newRecord(thingType, "no session", &session.Session{ExpiresAt: hour}))
	put(t, b, until("prolonged", day))
	stream := followNow(t, b, "")
	b.clock.advance(2 * time.Hour)
	must[int64](t)(queriesOf(b.Database).RecordsExpire(t.Context(), 100))
	if tombstone := stream.change(); tombstone.Id != "hour" || tombstone.DeletedAt == nil {
		t.Errorf("got %v, want the tombstone of the session that has ended", tombstone)
	}
	same(t, "records", queryIDs(t, b, "", ""), []string{"no session", "day", "forever", "prolonged"})
}

// TestRetentionOfTombstones: they stay for the retention, and no longer.
func TestRetentionOfTombstones(t *testing.T) {
	t.Parallel()
	b := startWithClock(t, 1)
	from := position(t, b)
	put(t, b, thing("a", ""), thing("b", ""))
	put(t, b, deletion(thingType, "a"))
	put(t, b, thing("c", ""))
	purge := func() int64 {
		return must[int64](t)(queriesOf(b.Database).ChangesPurgeTombstones(t.Context(),
			db.ChangesPurgeTombstonesParams{Retention: 7 * 24 * time.Hour, MaxRows: 100}))
	}
	b.clock.advance(7*24*time.Hour - time.Minute)
	if n := purge(); n != 0 {
		t.Errorf("%d tombstones purged before their time", n)
	}
	records, _ := syncNow(t, b, from, thingType)
	if !contains(records, func(r *databroker.Record) bool { return r.Id == "a" && r.DeletedAt != nil }) {
		t.Errorf("changes %v", records)
	}
	b.clock.advance(2 * time.Minute)
	if n := purge(); n != 1 {
		t.Errorf("%d tombstones purged, want 1", n)
	}
	wantSyncRefused(t, b, &databroker.SyncRequest{ServerVersion: from.ServerVersion, Type: thingType}, "invalid record version")
}
