package invariants

import (
	"context"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// TestI7_WatchingCostsTheSameForAnyNumberOfStreams: what the database is asked does not grow with the
// streams.
func TestI7_WatchingCostsTheSameForAnyNumberOfStreams(t *testing.T) {
	t.Parallel()
	const streams, writes = 300, 200
	b := servertest.New(t, servertest.Options{})
	versions := latest(t, b.Replica)
	var group errgroup.Group
	var open atomic.Int32
	opened := make(chan struct{})
	for range streams {
		group.Go(func() error {
			stream, err := b.Sync(t.Context(), versions)
			if err != nil {
				return err
			}
			count := 0
			for count < writes {
				response, err := stream.Recv()
				if err != nil {
					return err
				}
				if response.GetOptions() != nil && response.GetOptions().TypeURL == lastBuiltin && open.Add(1) == streams {
					close(opened)
				}
				if response.GetRecord() != nil {
					count++
				}
			}
			return nil
		})
	}
	<-opened
	before := b.Server.FeedStats()
	statements := statementsRun(t, b)
	for i := range writes {
		put(t, b.Replica, &databroker.Record{Type: "t", Id: fmt.Sprint(i)})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	after := b.Server.FeedStats()
	if n := after.TableReads - before.TableReads; n != 0 {
		t.Errorf("%d streams have read the table %d times, want never", streams, n)
	}
	// One read per write, and a few on the tick.
	if n := after.TailReads - before.TailReads; n > 2*writes {
		t.Errorf("the change log was read %d times for %d writes", n, writes)
	}
	// The database reports with some delay, so this can only tell a few from one per stream and write.
	if n := statementsRun(t, b) - statements; n > streams*writes/10 {
		t.Errorf("the database has run %d transactions for %d writes and %d streams", n, writes, streams)
	}
	var listeners int
	if err := b.Database.Pool.QueryRow(t.Context(),
		`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'pgbroker-listener'`).Scan(&listeners); err != nil {
		t.Fatal(err)
	}
	if listeners != 1 {
		t.Errorf("%d connections listen, want 1", listeners)
	}
}

// lastBuiltin is the last type whose options a stream of all types starts with.
const lastBuiltin = "type.googleapis.com/session.SessionBindingRequest"

// statementsRun returns how many transactions the database has run, which for single statements is how
// many of those.
func statementsRun(t *testing.T, b *servertest.Broker) (n int64) {
	t.Helper()
	err := b.Database.Pool.QueryRow(t.Context(), `SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()`).Scan(&n)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestI8_AStoppedStreamCostsNoMemory: a stream that stops reading for 50,000 changes holds no buffer, and
// then gets them all.
func TestI8_AStoppedStreamCostsNoMemory(t *testing.T) {
	// Not parallel: it measures the memory of the process.
	const changes, size, batch = 50_000, 1000, 500
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) { c.RingBytes = 1 << 20 }})
	stream, err := b.Sync(t.Context(), latest(t, b.Replica))
	if err != nil {
		t.Fatal(err)
	}
	data, err := anypb.New(wrapperspb.Bytes(make([]byte, size)))
	if err != nil {
		t.Fatal(err)
	}
	fill := func(n int) {
		for i := 0; i < n; i += batch {
			request := new(databroker.PutRequest)
			for j := range batch {
				request.Records = append(request.Records, &databroker.Record{Type: "t", Id: fmt.Sprint(i + j), Data: data})
			}
			if _, err := b.Put(t.Context(), request); err != nil {
				t.Fatal(err)
			}
		}
		// What the feed is reading this very moment is no growth.
		for newest := int64(latest(t, b.Replica).RecordVersion); b.Server.FeedStats().Head < newest; {
			yield()
		}
	}
	fill(2000) // fills the ring and every buffer on the way
	before := heap()
	fill(changes)
	after := heap()
	if grown := after - before; grown > changes*size/5 {
		t.Errorf("the heap has grown by %d kB while a stream missed %d kB", grown>>10, changes*size>>10)
	}
	got := make(map[string]uint64)
	for version := uint64(0); len(got) < changes; {
		response, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if record := response.GetRecord(); record != nil {
			if record.Version <= version {
				t.Fatalf("version %d after %d", record.Version, version)
			}
			version = record.Version
			got[record.Id] = version
		}
	}
}

func heap() int64 {
	var stats runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc)
}

// TestI13_LostWakeUpsCostLatencyOnly: a replica that never hears a notification delivers all the same.
func TestI13_LostWakeUpsCostLatencyOnly(t *testing.T) {
	t.Parallel()
	// Its listener listens, happily, to another database.
	elsewhere := servertest.New(t, servertest.Options{})
	b := servertest.New(t, servertest.Options{
		ConfigureDB: func(c *db.Config) { c.ListenerConnString = elsewhere.Database.ConnString },
		Configure:   func(c *server.Config) { c.PollInterval = 100 * time.Millisecond },
	})
	expectDelivery(t, b)
	if b.Server.FeedStats().Unannounced == 0 {
		t.Error("the changes were announced: this test proves nothing")
	}
}

// TestI13_WithoutAListener: a replica whose listener cannot even connect delivers all the same.
func TestI13_WithoutAListener(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{
		ConfigureDB: func(c *db.Config) { c.ListenerConnString = "host=127.0.0.1 port=1 dbname=none" },
		Configure:   func(c *server.Config) { c.PollInterval = 100 * time.Millisecond },
	})
	expectDelivery(t, b)
	if b.Server.FeedStats().Listening {
		t.Error("the replica listens: this test proves nothing")
	}
}

// TestQueriesDoNotTrustOldOptions: a replica that has not heard of a Clear believes that a field is indexed, when records
// are written again for which nobody has asked that. It finds them all the same.
func TestQueriesDoNotTrustOldOptions(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{
		ConfigureDB: func(c *db.Config) { c.ListenerConnString = "host=127.0.0.1 port=1 dbname=none" },
		Configure:   func(c *server.Config) { c.PollInterval = time.Hour },
	})
	if _, err := b.SetOptions(t.Context(), &databroker.SetOptionsRequest{
		Type: "t", Options: &databroker.Options{IndexableFields: []string{"color"}},
	}); err != nil {
		t.Fatal(err)
	}
	// A stream makes the replica read the options.
	if _, err := b.Sync(t.Context(), latest(t, b.Replica)); err != nil {
		t.Fatal(err)
	}
	b.Database.Exec(t, "TRUNCATE pgbroker.records")
	b.Database.Exec(t, `INSERT INTO pgbroker.records (type, id, data) VALUES ('t', 'a', '{"color": "red"}')`)
	filter, err := structpb.NewStruct(map[string]any{"color": "red"})
	if err != nil {
		t.Fatal(err)
	}
	response, err := b.Query(t.Context(), &databroker.QueryRequest{Type: "t", Filter: filter, Limit: 1})
	if err != nil {
		t.Fatal(err)
	}
	if response.TotalCount != 1 {
		t.Errorf("%d records found, want 1", response.TotalCount)
	}
}

// TestI13_SpuriousWakeUps: notifications about nothing do no harm.
func TestI13_SpuriousWakeUps(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	conn := b.Database.Connect(t)
	ctx, cancel := context.WithCancel(t.Context())
	var noise errgroup.Group
	noise.Go(func() error {
		for ctx.Err() == nil {
			if _, err := conn.Exec(ctx, `SELECT pg_notify('pgbroker_changes', 'nothing'), pg_notify('pgbroker_services', 'x')`); err != nil && ctx.Err() == nil {
				return err
			}
		}
		return nil
	})
	expectDelivery(t, b)
	cancel()
	if err := noise.Wait(); err != nil {
		t.Fatal(err)
	}
}

// expectDelivery writes in several ways and expects each change on a stream, once and in order.
func expectDelivery(t *testing.T, b *servertest.Broker) {
	t.Helper()
	stream, err := b.Sync(t.Context(), latest(t, b.Replica))
	if err != nil {
		t.Fatal(err)
	}
	version := uint64(0)
	for i := range 5 {
		id := fmt.Sprint(i)
		put(t, b.Replica, &databroker.Record{Type: "t", Id: id})
		version = expect(t, stream, id, version, false)
		b.Database.Exec(t, `DELETE FROM pgbroker.records WHERE id = $1`, id)
		version = expect(t, stream, id, version, true)
	}
}

// expect receives the next record of a stream.
func expect(t *testing.T, stream grpc.ServerStreamingClient[databroker.SyncResponse], id string, after uint64, deleted bool) uint64 {
	t.Helper()
	record := next(t, stream)
	if record.Id != id || record.Version <= after || (record.DeletedAt != nil) != deleted {
		t.Fatalf("got %v, want id %q after version %d, deleted %v", record, id, after, deleted)
	}
	return record.Version
}

// next receives the next record of a stream, and passes over options.
func next(t *testing.T, stream grpc.ServerStreamingClient[databroker.SyncResponse]) *databroker.Record {
	t.Helper()
	for {
		response, err := stream.Recv()
		if err != nil {
			t.Fatalf("receive: %v", err)
		}
		if record := response.GetRecord(); record != nil {
			return record
		}
	}
}

// latest returns a request to follow everything from now on.
func latest(t testing.TB, r *servertest.Replica) *databroker.SyncRequest {
	t.Helper()
	info, err := r.ServerInfo(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return &databroker.SyncRequest{ServerVersion: info.ServerVersion, RecordVersion: info.LatestRecordVersion}
}

// put writes records.
func put(t testing.TB, r *servertest.Replica, records ...*databroker.Record) *databroker.PutResponse {
	t.Helper()
	response, err := r.Put(t.Context(), &databroker.PutRequest{Records: records})
	if err != nil {
		t.Fatalf("put: %v", err)
	}
	return response
}
