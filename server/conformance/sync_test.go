package conformance_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/proto/user"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// TestS5_SyncOfAnotherServerVersionIsAborted, whatever the record version is.
func TestS5_SyncOfAnotherServerVersionIsAborted(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	put(t, b, thing("a", ""), thing("b", ""))
	from := position(t, b)
	for _, serverVersion := range []uint64{0, 1, from.ServerVersion - 1, from.ServerVersion + 1, math.MaxInt64, math.MaxUint64} {
		for _, recordVersion := range []uint64{0, from.LatestRecordVersion, from.LatestRecordVersion + 100, math.MaxUint64} {
			for _, wait := range []*bool{nil, proto.Bool(false)} {
				wantSyncRefused(t, b.Replicas[1], &databroker.SyncRequest{
					ServerVersion: serverVersion, RecordVersion: recordVersion, Type: thingType, Wait: wait,
				}, "invalid server version")
			}
		}
	}
}

// TestS5_SyncOfAFutureVersionWaits: a client may come from a replica, or from reading a table, that is ahead.
func TestS5_SyncOfAFutureVersionWaits(t *testing.T) {
	t.Parallel()
	b := start(t)
	put(t, b, thing("a", "old"))
	now := position(t, b)
	ahead := func(n uint64) *databroker.Versions {
		return &databroker.Versions{ServerVersion: now.ServerVersion, LatestRecordVersion: n}
	}
	for _, n := range []uint64{now.LatestRecordVersion, now.LatestRecordVersion + 1, math.MaxInt64, math.MaxInt64 + 1, math.MaxUint64} {
		if records, _ := syncNow(t, b, ahead(n), thingType); len(records) > 0 {
			t.Errorf("from %d: %v", n, records)
		}
	}
	// A stream from a version that is written a little later gets what comes after it, and only that.
	reached := ahead(now.LatestRecordVersion + 3)
	waiting := follow(t, b, reached, thingType)
	var want *databroker.Record
	for i := 0; want == nil; i++ {
		if written := putOne(t, b, thing("a", fmt.Sprint(i))); written.Version > reached.LatestRecordVersion {
			want = written
		}
	}
	same(t, "first change", waiting.change(), want)
}

// TestS6_SyncWithoutWaiting ends well after the last change, or at once if there is none; after options.
func TestS6_SyncWithoutWaiting(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	from := position(t, b)
	for _, r := range b.Replicas {
		records, options := syncNow(t, r, from, thingType)
		if len(records)+len(options) > 0 {
			t.Errorf("from an empty store: %v, %v", records, options)
		}
		if _, options = syncNow(t, r, from, bindingType); len(options) != 1 {
			t.Errorf("options %v", options)
		}
	}
	// All that has been committed is in it, on every replica, the moment the write is answered.
	for i := range 20 {
		written := putOne(t, b.Replicas[i%2], thing("a", fmt.Sprint(i)))
		for _, r := range b.Replicas {
			records, _ := syncNow(t, r, from, thingType)
			same(t, "changes", records, []*databroker.Record{written})
			if records, _ = syncNow(t, r, from, userType); len(records) > 0 {
				t.Errorf("of another type: %v", records)
			}
		}
		from.LatestRecordVersion = written.Version
	}
	// More than one page of them.
	const n = 1500
	var records []*databroker.Record
	for i := range n {
		records = append(records, thing(fmt.Sprintf("%04d", i), ""))
	}
	put(t, b, records...)
	for _, r := range append(b.Replicas, startMore(t, b)) {
		if records, _ = syncNow(t, r, from, ""); len(records) != n {
			t.Errorf("%d changes, want %d", len(records), n)
		}
	}
}

// TestS2_SyncDeliversInOrder: to a stream that keeps up each change of its type comes, once, in the order of
// versions, with the whole record.
func TestS2_SyncDeliversInOrder(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	all, things := followNow(t, b.Replicas[0], ""), followNow(t, b.Replicas[1], thingType)
	for i := range 60 {
		r := b.Replicas[i%2]
		var written *databroker.Record
		switch i % 5 {
		case 0, 1, 2:
			written = putOne(t, r, thing("a", fmt.Sprint(i)))
		case 3:
			written = putOne(t, r, newRecord(userType, "u", &user.User{Name: fmt.Sprint(i)}))
		case 4:
			written = putOne(t, r, deletion(thingType, "a"))
		}
		streams := []*syncStream{all}
		if written.Type == thingType {
			streams = append(streams, things)
		}
		for _, stream := range streams {
			got := stream.change()
			got.Data, written.Data = comparableData(got), comparableData(written)
			same(t, "change", got, written)
		}
	}
}

// comparableData is a live record's payload; the payload of a tombstone is of no importance.
func comparableData(record *databroker.Record) (data *anypb.Any) {
	if record.DeletedAt == nil {
		data = record.Data
	}
	return data
}

// TestS2_ResumeAtAnyVersion: whatever version a stream resumes at, it gets what has changed since, in order,
// and with what it knew already it has what the store has. Of a record that has changed several times it
// may get only the latest change.
func TestS2_ResumeAtAnyVersion(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	live := followNow(t, b, "")
	start := position(t, b)
	// What a client knows that has followed the stream up to a version.
	known := map[uint64]map[string]*databroker.Record{start.LatestRecordVersion: {}}
	state := make(map[string]*databroker.Record)
	history := make(map[uint64]*databroker.Record)
	for i := range 40 {
		id := fmt.Sprint(i % 7)
		if _, there := state[thingType+"\x00"+id]; there && i%4 == 3 {
			put(t, b, deletion(thingType, id))
		} else {
			put(t, b, thing(id, fmt.Sprint(i)))
		}
		change := live.change()
		history[change.Version] = change
		fold(state, change)
		known[change.Version] = maps.Clone(state)
	}
	want := recordsByKey(syncLatest(t, b, "").records)
	same(t, "the stream that was always there", state, want)
	// A replica that has seen nothing of it reads it all from the table.
	replicas := append(b.Replicas, startMore(t, b))
	for version, state := range known {
		for i, r := range replicas {
			from := &databroker.Versions{ServerVersion: start.ServerVersion, LatestRecordVersion: version}
			records, _ := syncNow(t, r, from, "")
			resumed := make(map[string]*databroker.Record)
			fold(resumed, valuesOf(state)...)
			fold(resumed, records...)
			for _, record := range records {
				same(t, fmt.Sprintf("change %d of a stream resumed at %d", record.Version, version), record, history[record.Version])
			}
			same(t, fmt.Sprintf("resumed at %d on replica %d", version, i), resumed, want)
		}
	}
}

func valuesOf(state map[string]*databroker.Record) []*databroker.Record {
	var records []*databroker.Record
	for _, record := range state {
		records = append(records, record)
	}
	return records
}

// TestS3_SyncLatestAndSyncAreTheWholeHistory: clients that join at any moment, while others write through all
// replicas and in SQL, end up with exactly what the store has.
func TestS3_SyncLatestAndSyncAreTheWholeHistory(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	const writers, rounds, joiners = 6, 40, 8
	ctx := testContext(t)
	var writing, joining sync.WaitGroup
	finished := make(chan struct{})
	for w := range writers {
		writing.Go(func() {
			for i := range rounds {
				id := fmt.Sprint((w*7 + i) % 23)
				var err error
				switch {
				case w == 0:
					_, err = b.Database.Pool.Exec(t.Context(), `INSERT INTO pgbroker.records (type, id, payload) VALUES ($1, $2, '')
						ON CONFLICT (type, id) DO UPDATE SET payload = excluded.payload`, thingType, id)
				case i%5 == 4:
					_, err = b.Replicas[w%2].Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{deletion(thingType, id)}})
				default:
					_, err = b.Replicas[w%2].Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{
						thing(id, fmt.Sprint(w, i)), newRecord(userType, id, &user.User{Id: fmt.Sprint(w, i)}),
					}})
				}
				if err != nil {
					t.Errorf("write: %v", err)
				}
			}
		})
	}
	states := make([]map[string]*databroker.Record, joiners)
	for j := range joiners {
		recordType := []string{"", thingType}[j/2%2]
		joining.Go(func() {
			state, err := join(ctx, b.Replicas[j%2], recordType, "the end")
			if err != nil {
				t.Errorf("client %d: %v", j, err)
			}
			states[j] = state
		})
	}
	go func() {
		writing.Wait()
		_, err := b.Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{thing("the end", "")}})
		if err != nil {
			t.Errorf("write: %v", err)
		}
		close(finished)
	}()
	joining.Wait()
	<-finished
	for j, state := range states {
		recordType := []string{"", thingType}[j/2%2]
		same(t, fmt.Sprintf("client %d", j), state, recordsByKey(syncLatest(t, b, recordType).records))
	}
}

// join follows a broker as a client that starts with nothing, until a record with the given id comes, and
// returns all that it then knows.
func join(ctx context.Context, c client, recordType, last string) (map[string]*databroker.Record, error) {
	latest, err := readLatest(ctx, c, recordType)
	if err != nil {
		return nil, err
	}
	state := recordsByKey(latest.records)
	if contains(latest.records, func(r *databroker.Record) bool { return r.Id == last }) {
		return state, nil
	}
	stream, err := c.Sync(ctx, &databroker.SyncRequest{
		ServerVersion: latest.versions.ServerVersion, RecordVersion: latest.versions.LatestRecordVersion, Type: recordType,
	})
	if err != nil {
		return nil, err
	}
	s := &syncStream{stream: stream, version: latest.versions.LatestRecordVersion}
	for {
		response, err := s.recv()
		if err != nil {
			return nil, err
		}
		if record := response.GetRecord(); record != nil {
			fold(state, record)
			if record.Id == last {
				return state, nil
			}
		}
	}
}

// TestD39_SyncLatestClaimsNoMoreThanItHasSent: nothing committed at or below the version that it ends with is
// missing, nor are records newer than that.
func TestD39_SyncLatestClaimsNoMoreThanItHasSent(t *testing.T) {
	t.Parallel()
	b := start(t)
	load := inBackground(t)
	for w := range 4 {
		load.repeat("put", func(ctx context.Context, i int) error {
			_, err := b.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{thing(fmt.Sprintf("%d-%d", w, i), "")}})
			return err
		})
	}
	for range 15 {
		latest := syncLatest(t, b, thingType)
		got := recordsByKey(latest.records)
		for _, record := range latest.records {
			if record.Version > latest.versions.LatestRecordVersion {
				t.Errorf("a record of version %d before the claim of version %d", record.Version, latest.versions.LatestRecordVersion)
			}
		}
		// Nothing is ever deleted or overwritten here: every change up to the claim is a record of now.
		changes, _ := syncNow(t, b, &databroker.Versions{ServerVersion: latest.versions.ServerVersion}, thingType)
		for _, change := range changes {
			if change.Version <= latest.versions.LatestRecordVersion && got[change.Type+"\x00"+change.Id] == nil {
				t.Errorf("record %s of version %d is missing below the claim of version %d", change.Id, change.Version, latest.versions.LatestRecordVersion)
			}
		}
	}
}

// TestD29_SyncLatestIsOneSnapshot: a client that reads slowly gets the records as they were at one moment,
// not page by page as they are when it gets there.
func TestD29_SyncLatestIsOneSnapshot(t *testing.T) {
	t.Parallel()
	b := start(t)
	fill(t, b.Database, 3000)
	put(t, b, thing("a", "before"), thing("z", "before"))
	stream, err := b.SyncLatest(testContext(t), &databroker.SyncLatestRequest{Type: thingType})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil || textOf(t, first.GetRecord()) != "before" {
		t.Fatalf("the first message is %v, %v", first, err)
	}
	// The rest is several megabytes away from being sent.
	put(t, b, thing("a", "after"), thing("z", "after"))
	put(t, b, deletion(thingType, "m3000"))
	n := 1
	for {
		response, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if versions := response.GetVersions(); versions != nil {
			// From here on a stream has what has changed.
			changes, _ := syncNow(t, b, versions, thingType)
			same(t, "changes since the snapshot", idsOf(changes), []string{"a", "z", "m3000"})
			break
		}
		n++
		if record := response.GetRecord(); record.Id == "z" && textOf(t, record) != "before" {
			t.Error("the last record is newer than the first")
		}
	}
	if n != 3002 {
		t.Errorf("%d records, want 3002", n)
	}
}

// fill stores n things of 3 kB each, m0001 and so on, quickly: much more than what fits on the way to a
// client that does not read.
func fill(t *testing.T, database *dbtest.Database, n int) {
	t.Helper()
	data, err := proto.Marshal(&anypb.Any{Value: make([]byte, 3000)})
	if err != nil {
		t.Fatal(err)
	}
	database.Exec(t, `INSERT INTO pgbroker.records (type, id, payload)
		SELECT $1, 'm' || to_char(n, 'FM0000'), $2 FROM generate_series(1, $3::integer) AS n`, thingType, data, n)
}

// TestSyncLatestOfASlowClient: nothing in the database waits for a client that reads slowly, and the client
// gets everything in the end.
func TestSyncLatestOfASlowClient(t *testing.T) {
	t.Parallel()
	b := start(t)
	fill(t, b.Database, 4000)
	var streams []grpc.ServerStreamingClient[databroker.SyncLatestResponse]
	for range 12 { // more than there are connections to the database
		stream, err := b.SyncLatest(testContext(t), &databroker.SyncLatestRequest{Type: thingType})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
		streams = append(streams, stream)
	}
	// Others are served, and Clear, which waits for whoever reads the table, gets through.
	if got := get(t, b, thingType, "m0001"); got.Version == 0 {
		t.Error("no record")
	}
	begin := time.Now()
	clearAll(t, b)
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("Clear took %v", took)
	}
	for _, stream := range streams {
		for {
			response, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				t.Error("the end without versions")
				break
			}
			if err != nil {
				wantStatus(t, err, codes.Aborted, "") // starts over: the data set has been replaced
				break
			}
			if response.GetVersions() != nil {
				break
			}
		}
	}
}

// TestSyncLatest: records, then options, then versions.
func TestSyncLatest(t *testing.T) {
	t.Parallel()
	b := start(t)
	empty := syncLatest(t, b, "")
	if empty.versions.ServerVersion == 0 || empty.versions.LatestRecordVersion != 0 || len(empty.records) > 0 {
		t.Errorf("of an empty store: %v, %v", empty.records, empty.versions)
	}
	if typed := syncLatest(t, b, thingType); !proto.Equal(typed.versions, empty.versions) || len(typed.options) > 0 {
		t.Errorf("of a type without records: %v, %v", typed.options, typed.versions)
	}
	put(t, b, thing("b", ""), thing("a", ""), newRecord(sessionType, "s", &session.Session{Id: "s"}))
	deleted := put(t, b, thing("c", ""), deletion(thingType, "c"))[1]
	setOptions(t, b, thingType, &databroker.Options{Capacity: proto.Uint64(10)})

	all := syncLatest(t, b, "")
	same(t, "records", idsOf(all.records), []string{"a", "b", "s"})
	same(t, "types with options", typesOf(all.options), []string{thingType, // its first: byte order
		"type.googleapis.com/oauth21.PendingUpstreamAuth", "type.googleapis.com/oauth21.UpstreamMCPToken",
		identityBindingType, bindingType, bindingRequestType})
	if all.versions.LatestRecordVersion != deleted.Version {
		t.Errorf("latest version %d, want that of the tombstone, %d", all.versions.LatestRecordVersion, deleted.Version)
	}
	typed := syncLatest(t, b, sessionType)
	same(t, "records of a type", idsOf(typed.records), []string{"s"})
	same(t, "versions, which are global", typed.versions, all.versions)
	if len(typed.options) > 0 {
		t.Errorf("options of another type: %v", typed.options)
	}
	// Options of a type without records are sent to those who ask for the type.
	if typed := syncLatest(t, b, bindingType); len(typed.options) != 1 || typed.options[0].TypeURL != bindingType {
		t.Errorf("options %v", typed.options)
	}
}

// TestS4_WhatAStreamDeliversCanBeRead: a change that a stream has delivered is there for Get and Query, on
// every replica.
func TestS4_WhatAStreamDeliversCanBeRead(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 3)
	stream := followNow(t, b, thingType)
	const n = 150
	var writing sync.WaitGroup
	writing.Go(func() {
		for i := range n {
			records := []*databroker.Record{thing(fmt.Sprint("kept ", i), ""), thing(fmt.Sprint("short-lived ", i), "")}
			for _, r := range records {
				if _, err := b.Replicas[1].Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{r}}); err != nil {
					t.Errorf("put: %v", err)
				}
			}
			if _, err := b.Replicas[1].Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{deletion(thingType, records[1].Id)}}); err != nil {
				t.Errorf("put: %v", err)
			}
		}
	})
	tombstones := 0
	for i := 0; tombstones < n; i++ {
		change := stream.change()
		r := b.Replicas[i%3]
		found := query(t, r, thingType, `{"id": "`+change.Id+`"}`)
		if found.RecordVersion < change.Version {
			t.Fatalf("Query knows versions up to %d, the stream has delivered %d", found.RecordVersion, change.Version)
		}
		if change.DeletedAt != nil {
			tombstones++
			wantAbsent(t, r, thingType, change.Id)
			if len(found.Records) > 0 {
				t.Errorf("Query finds %s, which the stream says is deleted", change.Id)
			}
			continue
		}
		if len(found.Records) == 0 || found.Records[0].Version < change.Version {
			// Unless it has been deleted since.
			if records, _ := syncNow(t, r, &databroker.Versions{ServerVersion: found.ServerVersion, LatestRecordVersion: change.Version}, thingType); !contains(records, func(r *databroker.Record) bool { return r.Id == change.Id && r.DeletedAt != nil }) {
				t.Errorf("Query does not find %s of version %d", change.Id, change.Version)
			}
		}
	}
	writing.Wait()
}

// TestD27_TooOldIsJudgedPerType: after tombstones of one type have passed their retention, streams of that
// type and of all types start over if they might have missed one; streams of other types go on, however
// long they have been idle.
func TestD27_TooOldIsJudgedPerType(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	beginning := position(t, b)
	session := putOne(t, b, newRecord(sessionType, "s", &session.Session{Id: "s"}))
	put(t, b, thing("a", ""), thing("b", ""))
	beforeTombstone := position(t, b)
	tombstone := putOne(t, b, deletion(thingType, "a"))
	open := follow(t, b.Replicas[1], beforeTombstone, thingType)
	same(t, "tombstone", open.change().Version, tombstone.Version)
	putOne(t, b, thing("c", ""))
	purgeTombstones(t, b.Database)

	for _, r := range b.Replicas {
		for _, recordType := range []string{thingType, ""} {
			wantSyncRefused(t, r, &databroker.SyncRequest{
				ServerVersion: beginning.ServerVersion, RecordVersion: beforeTombstone.LatestRecordVersion, Type: recordType,
			}, "invalid record version")
			wantSyncRefused(t, r, &databroker.SyncRequest{ServerVersion: beginning.ServerVersion, Type: recordType, Wait: proto.Bool(false)}, "invalid record version")
			// Whoever has seen the tombstone goes on.
			records, _ := syncNow(t, r, &databroker.Versions{ServerVersion: beginning.ServerVersion, LatestRecordVersion: tombstone.Version}, recordType)
			same(t, "changes after the tombstone", idsOf(records), []string{"c"})
		}
		records, _ := syncNow(t, r, beginning, sessionType)
		same(t, "changes of another type", records, []*databroker.Record{session})
		if records, _ := syncNow(t, r, beginning, userType); len(records) > 0 {
			t.Errorf("changes of a type without records: %v", records)
		}
	}
	// A stream that is open is not disturbed.
	if next := open.change(); next.Id != "c" {
		t.Errorf("got %v", next)
	}
	put(t, b, thing("d", ""))
	if next := open.change(); next.Id != "d" {
		t.Errorf("got %v", next)
	}
}

// purgeTombstones does what the periodic work does when the retention of all tombstones so far has passed.
func purgeTombstones(t *testing.T, database *dbtest.Database) {
	t.Helper()
	n := must[int64](t)(queriesOf(database).ChangesPurgeTombstones(t.Context(), db.ChangesPurgeTombstonesParams{MaxRows: 1000}))
	if n == 0 {
		t.Fatal("no tombstones were purged")
	}
}

// TestLatestVersionSurvivesRetention: the newest change is never purged, so that versions do not go back.
func TestLatestVersionSurvivesRetention(t *testing.T) {
	t.Parallel()
	b := start(t)
	put(t, b, thing("a", ""), thing("b", ""))
	put(t, b, deletion(thingType, "a"))
	last := putOne(t, b, deletion(thingType, "b"))
	purgeTombstones(t, b.Database)
	if latest := position(t, b).LatestRecordVersion; latest != last.Version {
		t.Errorf("latest version %d, want %d", latest, last.Version)
	}
	if latest := syncLatest(t, b, "").versions.LatestRecordVersion; latest != last.Version {
		t.Errorf("SyncLatest ends with version %d, want %d", latest, last.Version)
	}
	if next := putOne(t, b, thing("c", "")); next.Version <= last.Version {
		t.Errorf("version %d after %d", next.Version, last.Version)
	}
}

// TestSyncStartsWithOptions: of the type, or of all types that have any, before the first record.
func TestSyncStartsWithOptions(t *testing.T) {
	t.Parallel()
	b := start(t)
	beginning := position(t, b)
	put(t, b, thing("a", ""), newRecord(bindingType, "k", new(session.SessionBinding)))
	setOptions(t, b, thingType, &databroker.Options{Capacity: proto.Uint64(10)})

	typed := follow(t, b, beginning, bindingType)
	same(t, "options of the type", typed.nextOptions(), &databroker.TypedOptions{
		TypeURL: bindingType, Options: &databroker.Options{IndexableFields: []string{"session_id", "user_id"}},
	})
	if next := typed.next().GetRecord(); next.GetId() != "k" {
		t.Errorf("got %v", next)
	}
	all := follow(t, b, beginning, "")
	same(t, "next", all.change().Id, "a")
	same(t, "options before the first record", typesOf(all.options), typesOf(syncLatest(t, b, "").options))
	none := follow(t, b, beginning, "example.com/NoOptions")
	put(t, b, newRecord("example.com/NoOptions", "n", new(user.User)))
	if next := none.next().GetRecord(); next.GetId() != "n" {
		t.Errorf("got %v", next)
	}
}

// TestTimestampsOfStreams: SyncLatest, Sync and Get show one and the same record.
func TestTimestampsOfStreams(t *testing.T) {
	t.Parallel()
	b := start(t)
	from := position(t, b)
	put(t, b, newRecord(sessionType, "s", &session.Session{Id: "s", ExpiresAt: timestamppb.New(time.Now().Add(time.Hour))}))
	stored := get(t, b, sessionType, "s")
	same(t, "SyncLatest", syncLatest(t, b, "").records, []*databroker.Record{stored})
	changes, _ := syncNow(t, b, from, sessionType)
	same(t, "Sync", changes, []*databroker.Record{stored})
	if stored.ModifiedAt.Nanos%1000 != 0 {
		t.Errorf("modified at %v: Postgres keeps microseconds", stored.ModifiedAt)
	}
}

// TestMuchAtOnce: one notification is enough for a change of any size, and for any number of them.
func TestMuchAtOnce(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) { c.PollInterval = time.Hour }})
	stream := followNow(t, b, thingType)
	const n = 16
	data, err := proto.Marshal(&anypb.Any{Value: make([]byte, 1<<20)})
	if err != nil {
		t.Fatal(err)
	}
	b.Database.Exec(t, "INSERT INTO pgbroker.records (type, id, payload) SELECT $1, n, $2 FROM generate_series(1, $3::integer) AS n", thingType, data, n)
	stream.changes(n)
	b.Database.Exec(t, "INSERT INTO pgbroker.records (type, id) SELECT $1, 'm' || n FROM generate_series(1, 5000) AS n", thingType)
	stream.changes(5000)
}
