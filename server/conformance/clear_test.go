package conformance_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/registry"
)

// clearAll clears the broker.
func clearAll(t *testing.T, c client) *databroker.ClearResponse {
	t.Helper()
	response, err := c.Clear(testContext(t), new(emptypb.Empty))
	if err != nil {
		t.Fatalf("clear: %v", err)
	}
	return response
}

// TestS7_Clear: what goes and what stays.
func TestS7_Clear(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	ctx := testContext(t)
	builtin := syncLatest(t, b, "").options
	if len(builtin) != 5 {
		t.Errorf("%d types have options from the start, want 5", len(builtin))
	}
	put(t, b, thing("a", ""), thing("b", ""))
	put(t, b, deletion(thingType, "b"))
	setOptions(t, b, thingType, &databroker.Options{Capacity: proto.Uint64(10)})
	lease := must[*databroker.AcquireLeaseResponse](t)(b.AcquireLease(ctx, &databroker.AcquireLeaseRequest{Name: "l", Duration: durationpb.New(time.Hour)}))
	service := &registry.Service{Kind: registry.ServiceKind_PROXY, Endpoint: "https://proxy.example.com"}
	must[*registry.RegisterResponse](t)(b.Registry.Report(ctx, &registry.RegisterRequest{Services: []*registry.Service{service}}))
	must[*databroker.SetCheckpointResponse](t)(b.Checkpoints.SetCheckpoint(ctx, &databroker.SetCheckpointRequest{
		Checkpoint: &databroker.Checkpoint{ServerVersion: 7, RecordVersion: 8},
	}))
	before := position(t, b)
	var streams []*syncStream
	for _, r := range b.Replicas {
		for _, recordType := range []string{"", thingType, bindingType} {
			streams = append(streams, follow(t, r, &databroker.Versions{ServerVersion: before.ServerVersion}, recordType))
		}
	}
	streams[0].change()
	streams[3].change() // now both replicas have streams that wait

	cleared := clearAll(t, b)
	if cleared.OldServerVersion != before.ServerVersion || cleared.NewServerVersion == before.ServerVersion || cleared.NewServerVersion == 0 {
		t.Errorf("answer %v, the server version was %d", cleared, before.ServerVersion)
	}
	for _, stream := range streams {
		wantStatus(t, stream.end(), codes.Aborted, "invalid server version")
	}
	for _, r := range b.Replicas {
		wantAbsent(t, r, thingType, "a")
		latest := syncLatest(t, r, "")
		if len(latest.records) > 0 || latest.versions.ServerVersion != cleared.NewServerVersion {
			t.Errorf("after Clear: %v, %v", latest.records, latest.versions)
		}
		same(t, "options after Clear", latest.options, builtin)
		if types := must[*databroker.ListTypesResponse](t)(r.ListTypes(ctx, new(emptypb.Empty))).Types; len(types) > 0 {
			t.Errorf("types after Clear: %q", types)
		}
		_, err := r.GetOptions(ctx, &databroker.GetOptionsRequest{Type: thingType})
		wantStatus(t, err, codes.NotFound, "")
		wantSyncRefused(t, r, &databroker.SyncRequest{ServerVersion: before.ServerVersion, RecordVersion: before.LatestRecordVersion}, "invalid server version")
		if found := query(t, r, "", ""); found.TotalCount != 0 || found.ServerVersion != cleared.NewServerVersion {
			t.Errorf("query after Clear: %v", found)
		}
		_, err = r.AcquireLease(ctx, &databroker.AcquireLeaseRequest{Name: "l", Duration: durationpb.New(time.Hour)})
		wantStatus(t, err, codes.AlreadyExists, "lease is already taken")
		services := must[*registry.ServiceList](t)(r.Registry.List(ctx, new(registry.ListRequest))).Services
		same(t, "services after Clear", services, []*registry.Service{service})
		checkpoint := must[*databroker.GetCheckpointResponse](t)(r.Checkpoints.GetCheckpoint(ctx, new(databroker.GetCheckpointRequest))).Checkpoint
		if checkpoint.GetServerVersion() != 0 || checkpoint.GetRecordVersion() != 0 {
			t.Errorf("checkpoint after Clear: %v", checkpoint)
		}
	}
	must[*emptypb.Empty](t)(b.RenewLease(ctx, &databroker.RenewLeaseRequest{Name: "l", Id: lease.Id, Duration: durationpb.New(time.Hour)}))

	if again := clearAll(t, b.Replicas[1]); again.OldServerVersion != cleared.NewServerVersion || again.NewServerVersion == again.OldServerVersion {
		t.Errorf("Clear of an empty store: %v after %v", again, cleared)
	}
}

// TestD6_ClearNeverEndsStreamsAsCanceled: those in the middle of many changes included.
func TestD6_ClearNeverEndsStreamsAsCanceled(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	fill(t, b.Database, 1000)
	from := position(t, b)
	var streams []*syncStream
	for i := range 20 {
		stream := follow(t, b.Replicas[i%2], &databroker.Versions{ServerVersion: from.ServerVersion}, []string{"", thingType}[i/2%2])
		if i < 10 {
			stream.change() // the others do not even read
		}
		streams = append(streams, stream)
	}
	clearAll(t, b)
	for _, stream := range streams {
		wantStatus(t, stream.end(), codes.Aborted, "invalid server version")
	}
}

// TestD7_EveryReplicaKnowsOfClearAtOnce: as soon as Clear has been answered, no replica names the old server
// version again, in any kind of answer, or lets anybody resume with it.
func TestD7_EveryReplicaKnowsOfClearAtOnce(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 3)
	for i := range 9 {
		old := clearAll(t, b.Replicas[i%3])
		want := old.NewServerVersion
		r := b.Replicas[(i+1)%3]
		wantSyncRefused(t, b.Replicas[(i+2)%3], &databroker.SyncRequest{ServerVersion: old.OldServerVersion}, "invalid server version")
		switch i % 3 {
		case 0:
			if got := query(t, r, thingType, "").ServerVersion; got != want {
				t.Errorf("Query names server version %d, want %d", got, want)
			}
		case 1:
			response, err := r.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{thing("a", "")}})
			if err != nil || response.ServerVersion != want {
				t.Errorf("Put names server version %d, want %d (%v)", response.GetServerVersion(), want, err)
			}
		case 2:
			if got := syncLatest(t, r, "").versions.ServerVersion; got != want {
				t.Errorf("SyncLatest names server version %d, want %d", got, want)
			}
		}
		if got := position(t, r).ServerVersion; got != want {
			t.Errorf("ServerInfo names server version %d, want %d", got, want)
		}
		// And with the new one everybody is let in.
		for _, r := range b.Replicas {
			stream := follow(t, r, &databroker.Versions{ServerVersion: want}, thingType)
			put(t, b, thing("b", fmt.Sprint(i)))
			stream.changeOf("b")
			stream.close()
		}
	}
}

// TestD18_BuiltInOptions: they are there from the start, a restart or another replica does not overwrite what
// an operator has set, and Clear brings back those that have been removed.
func TestD18_BuiltInOptions(t *testing.T) {
	t.Parallel()
	b := start(t)
	options := func(r client, recordType string) *databroker.Options {
		t.Helper()
		response, err := r.GetOptions(testContext(t), &databroker.GetOptionsRequest{Type: recordType})
		if err != nil {
			t.Fatalf("options of %s: %v", recordType, err)
		}
		return response.Options
	}
	builtin := map[string]*databroker.Options{
		bindingRequestType:  {Capacity: proto.Uint64(50000), IndexableFields: []string{"key"}, Ttl: durationpb.New(15 * time.Minute)},
		bindingType:         {IndexableFields: []string{"session_id", "user_id"}},
		identityBindingType: {IndexableFields: []string{"user_id"}},
		"type.googleapis.com/oauth21.UpstreamMCPToken":    {IndexableFields: []string{"user_id", "route_id"}},
		"type.googleapis.com/oauth21.PendingUpstreamAuth": {IndexableFields: []string{"state_id"}, Ttl: durationpb.New(15 * time.Minute)},
	}
	for recordType, want := range builtin {
		same(t, recordType, options(b, recordType), want)
	}
	own := &databroker.Options{Capacity: proto.Uint64(7)}
	setOptions(t, b, bindingRequestType, own)
	setOptions(t, b, identityBindingType, nil)

	other := startMore(t, b)
	same(t, "an operator's options after a start", options(other, bindingRequestType), own)
	clearAll(t, other)
	same(t, "an operator's options after Clear", options(b, bindingRequestType), own)
	for recordType, want := range builtin {
		if recordType != bindingRequestType {
			same(t, recordType+" after Clear", options(b, recordType), want)
		}
	}
}

// TestD28_VersionsGoOnAfterClear: the latest version reported after Clear is one from which a stream can be
// opened, also once there are new records.
func TestD28_VersionsGoOnAfterClear(t *testing.T) {
	t.Parallel()
	b := start(t)
	old := putOne(t, b, thing("a", ""))
	clearAll(t, b)
	after := syncLatest(t, b, "").versions
	same(t, "ServerInfo", position(t, b), after)
	written := putOne(t, b, thing("b", ""))
	if written.Version <= old.Version || written.Version <= after.LatestRecordVersion {
		t.Errorf("version %d, before Clear it was %d, after it %d", written.Version, old.Version, after.LatestRecordVersion)
	}
	for _, recordVersion := range []uint64{0, after.LatestRecordVersion} {
		for _, recordType := range []string{"", thingType} {
			records, _ := syncNow(t, b, &databroker.Versions{ServerVersion: after.ServerVersion, LatestRecordVersion: recordVersion}, recordType)
			same(t, "changes since Clear", records, []*databroker.Record{written})
		}
	}
}

// TestClearUnderLoad: Clear, readers and writers get through, whoever comes first.
func TestClearUnderLoad(t *testing.T) {
	t.Parallel()
	database := dbtest.New(t)
	setting(t, database, "deadlock_timeout", "'1min'") // a deadlock is to be an error of the test, not to dissolve
	b := startOn(t, database, 2)
	load := inBackground(t)
	for w := range 4 {
		load.repeat("put", func(ctx context.Context, i int) error {
			_, err := b.Replicas[w%2].Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{
				thing(fmt.Sprint(i%10), ""), deletion(thingType, fmt.Sprint((i+w)%10)),
			}})
			return err
		})
	}
	load.repeat("patch", func(ctx context.Context, i int) error {
		_, err := b.Patch(ctx, &databroker.PatchRequest{Records: []*databroker.Record{thing(fmt.Sprint(i%10), "")}})
		return err
	})
	load.repeat("query", func(ctx context.Context, _ int) error {
		_, err := b.Query(ctx, &databroker.QueryRequest{Type: thingType, Limit: 10})
		return err
	})
	load.repeat("sync latest", func(ctx context.Context, i int) error {
		_, err := readLatest(ctx, b.Replicas[i%2], "")
		return err
	})
	load.repeat("set options", func(ctx context.Context, i int) error {
		_, err := b.SetOptions(ctx, &databroker.SetOptionsRequest{Type: thingType, Options: &databroker.Options{Capacity: proto.Uint64(uint64(5 + i%5))}})
		return err
	})
	load.repeat("sync", func(ctx context.Context, i int) error {
		latest, err := readLatest(ctx, b.Replicas[i%2], thingType)
		if err != nil {
			return err
		}
		stream, err := b.Replicas[(i+1)%2].Sync(ctx, &databroker.SyncRequest{ServerVersion: latest.versions.ServerVersion, Type: thingType})
		if err != nil {
			return err
		}
		for {
			if _, err := stream.Recv(); isCode(err, codes.Aborted) {
				return nil
			} else if err != nil {
				return err
			}
		}
	})
	for i := range 30 {
		response := clearAll(t, b.Replicas[i%2])
		if response.NewServerVersion == response.OldServerVersion {
			t.Error("the server version stays")
		}
	}
}

// TestTruncateInSQLIsClear: what an operator types has the same effect.
func TestTruncateInSQLIsClear(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	put(t, b, thing("a", ""))
	before := position(t, b)
	stream := followNow(t, b.Replicas[1], "")
	stream.nextOptions()
	b.Database.Exec(t, "TRUNCATE pgbroker.records")
	wantStatus(t, stream.end(), codes.Aborted, "invalid server version")
	if after := position(t, b); after.ServerVersion == before.ServerVersion {
		t.Error("the server version stays")
	}
}

// TestClientsCanBeMadeToStartOver: an operator can make every client drop what it keeps, and no record is lost by it.
func TestClientsCanBeMadeToStartOver(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	put(t, b, thing("a", ""))
	before := position(t, b)
	stream := followNow(t, b.Replicas[1], "")
	stream.nextOptions()
	b.Database.Exec(t, "SELECT pgbroker.restart_clients()")
	wantStatus(t, stream.end(), codes.Aborted, "invalid server version")
	after := position(t, b)
	if after.ServerVersion == before.ServerVersion || after.LatestRecordVersion != before.LatestRecordVersion {
		t.Errorf("before %v, after %v: want another server version and the same record version", before, after)
	}
	get(t, b, thingType, "a")
}
