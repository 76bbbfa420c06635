package pressure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/http2"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/auth"
	"pgbroker/server/servertest"
)

// TestIdleStreams: many streams, a hundred on each connection, cost little, hear of a change at once, and leave nothing
// behind.
func TestIdleStreams(t *testing.T) {
	// Not parallel, like all that measure: it looks at the whole process.
	b := servertest.New(t, servertest.Options{})
	conns := spread(t, b.Address, *streamCount)
	from := present(t, b)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	open := func(n int) (streams []syncStream) {
		for i := range n {
			streams = append(streams, follow(ctx, t, conns[i%len(conns)], from))
		}
		put(t, b, thing("a", 0))
		wantNext(t, streams, "a")
		return streams
	}
	warm := open(len(conns)) // opens the connections
	from = present(t, b)
	before, goroutines := leastMemory(), runtime.NumGoroutine()
	streams := open(*streamCount)
	wantNext(t, warm, "a")
	each := (leastMemory() - before) / int64(*streamCount)
	// Client and server together, and the race detector has its share.
	if each > 100<<10 {
		t.Errorf("an idle stream takes %d kB", each>>10)
	}
	t.Logf("%d idle streams: %.1f kB each for client and server, %.1f goroutines each", *streamCount,
		float64(each)/1024, float64(runtime.NumGoroutine()-goroutines)/float64(*streamCount))

	begin := time.Now()
	put(t, b, thing("b", 0))
	put(t, b, thing("c", 0))
	wantNext(t, streams, "b")
	wantNext(t, streams, "c")
	t.Logf("two changes reached all streams in %v", time.Since(begin))

	cancel()
	awaitGoroutines(t, goroutines)
}

// TestStreamsThatAreNeverRead: clients that do not read hold little more than what HTTP/2 lets the server send, wherever
// they stand, while others are served; and when they read at last they miss nothing.
func TestStreamsThatAreNeverRead(t *testing.T) {
	const records, size, stopped = 600, 2000, 40
	registry := prometheus.NewRegistry()
	b := servertest.New(t, servertest.Options{Configure: withMetrics(registry, func(c *server.Config) { c.RingBytes = 1 << 20 })})
	from := present(t, b)
	fill(t, b, records, size)
	live := follow(t.Context(), t, b.Conn, present(t, b))
	put(t, b, thing("a", 0))
	wantNext(t, []syncStream{live}, "a")
	conns := spread(t, b.Address, stopped)

	before := leastMemory()
	var streams []syncStream
	for i := range stopped {
		streams = append(streams, follow(t.Context(), t, conns[i%len(conns)], from))
	}
	// A window at the client, a window on its way, and what clients and server need in any case: less than what one read of
	// the log returns (256 kB) on top.
	const most = 2*window + 144<<10
	await(t, "the streams to stop", func() bool {
		sent, _ := metric(t, registry, "pgbroker_sync_changes_sent_total")
		return sent >= stopped*60 // what fits into both windows
	})
	awaitMemory(t, before+stopped*most)
	t.Logf("%.0f kB for each stream that is not read", float64(leastMemory()-before)/stopped/1024)
	for i := range 20 {
		id := fmt.Sprint("live", i)
		put(t, b, thing(id, size))
		wantNext(t, []syncStream{live}, id)
		get(t, b, id)
	}
	var group errgroup.Group
	for _, stream := range streams {
		group.Go(func() error {
			seen := make(map[string]bool)
			version := uint64(0)
			for len(seen) < records+21 {
				record, err := nextRecord(stream)
				if err != nil {
					return err
				}
				if record.Version <= version || seen[record.Id] {
					return fmt.Errorf("%s at version %d after %d", record.Id, record.Version, version)
				}
				version = record.Version
				seen[record.Id] = true
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
}

// TestSyncLatestThatIsNeverRead: the same of SyncLatest, which reads pages of megabytes; it also keeps no connection to the
// database from others.
func TestSyncLatestThatIsNeverRead(t *testing.T) {
	const records, size, stopped = 1000, 2000, 8
	registry := prometheus.NewRegistry()
	b := servertest.New(t, servertest.Options{Configure: withMetrics(registry, nil)})
	fill(t, b, records, size)
	readAll := func(stream grpc.ServerStreamingClient[databroker.SyncLatestResponse]) error {
		last, n := "", 0
		for {
			response, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
			if record := response.GetRecord(); record != nil {
				if record.Id <= last {
					return fmt.Errorf("%s after %s", record.Id, last)
				}
				last = record.Id
				n++
			}
		}
		if n != records {
			return fmt.Errorf("%d records, want %d", n, records)
		}
		return nil
	}
	open := func(conn *grpc.ClientConn) grpc.ServerStreamingClient[databroker.SyncLatestResponse] {
		stream, err := databroker.NewDataBrokerServiceClient(conn).SyncLatest(t.Context(), &databroker.SyncLatestRequest{Type: "t"})
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	if err := readAll(open(b.Conn)); err != nil {
		t.Fatal(err)
	}
	conns := spread(t, b.Address, stopped)
	before := leastMemory()
	var streams []grpc.ServerStreamingClient[databroker.SyncLatestResponse]
	for i := range stopped {
		streams = append(streams, open(conns[i%len(conns)]))
	}
	if err := readAll(open(b.Conn)); err != nil {
		t.Errorf("another client: %v", err)
	}
	await(t, "the streams to stop", func() bool {
		sent, _ := metric(t, registry, "grpc_server_msg_sent_total", "grpc_method=SyncLatest")
		return sent >= 2*(records+1)+stopped*60
	})
	awaitMemory(t, before+stopped*(512<<10)) // a page has 2 MB
	t.Logf("%.0f kB for each stream that is not read", float64(leastMemory()-before)/stopped/1024)
	var group errgroup.Group
	for _, stream := range streams {
		group.Go(func() error { return readAll(stream) })
	}
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
}

// TestSilentPeersAreLetGo: a peer that does not even answer pings, because it is gone without a word or does not read its
// socket, is let go after minutes, with all that it holds. The minutes pass on a clock of the test's own.
func TestSilentPeersAreLetGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		database, err := db.Open(t.Context(), db.Config{ConnString: "host=/nonexistent user=nobody dbname=none"})
		if err != nil {
			t.Fatal(err)
		}
		s, err := server.New(server.Config{
			DB: database, Auth: auth.Config{Secrets: []string{servertest.Secret}}, Logger: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			t.Fatal(err)
		}
		listener := bufconn.Listen(1 << 20)
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- s.Run(ctx, listener) }()
		conn, err := listener.DialContext(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
			t.Fatal(err)
		}
		if err := http2.NewFramer(conn, conn).WriteSettings(); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took > 5*time.Minute {
			t.Errorf("let go after %v", took)
		}
		// One that does not even begin has to go sooner.
		conn, err = listener.DialContext(ctx)
		if err != nil {
			t.Fatal(err)
		}
		begin = time.Now()
		if _, err := io.Copy(io.Discard, conn); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took > 30*time.Second {
			t.Errorf("one that does not speak was let go after %v", took)
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		database.Close()
	})
}

// TestStreamsComeAndGo: thousands of streams that come and go, ended by their clients in every way there is, leave no
// goroutine, no connection and no memory behind.
func TestStreamsComeAndGo(t *testing.T) {
	registry := prometheus.NewRegistry()
	b := servertest.New(t, servertest.Options{Configure: withMetrics(registry, nil)})
	fill(t, b, 100, 100)
	from := present(t, b)
	past := &databroker.SyncRequest{ServerVersion: from.ServerVersion, Type: "t"}
	cycle := func(n int) {
		conns := make([]*grpc.ClientConn, 4)
		for i := range conns {
			conns[i] = dial(t, b.Address)
		}
		var group errgroup.Group
		group.SetLimit(64)
		for i := range n {
			group.Go(func() error {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				client := databroker.NewDataBrokerServiceClient(conns[i%len(conns)])
				request := []*databroker.SyncRequest{from, past}[i%2]
				if i%6 == 4 {
					request = &databroker.SyncRequest{ServerVersion: past.ServerVersion, Type: "t", Wait: proto.Bool(false)}
				}
				stream, err := client.Sync(ctx, request)
				if err != nil {
					return err
				}
				switch i % 6 {
				case 0, 2: // at once
				case 4: // by the server
					for err == nil {
						_, err = stream.Recv()
					}
					if errors.Is(err, io.EOF) {
						err = nil
					}
				case 1: // in the middle
					_, err = nextRecord(stream)
				case 3, 5: // when there is no more
					for range 100 {
						if _, err = nextRecord(stream); err != nil {
							break
						}
					}
				}
				if err != nil && !isCanceled(err) {
					return err
				}
				return nil
			})
		}
		if err := group.Wait(); err != nil {
			t.Fatal(err)
		}
		for _, conn := range conns {
			conn.Close() // some streams end with it
		}
		await(t, "the end of all streams", func() bool {
			open, _ := metric(t, registry, "pgbroker_sync_streams")
			return open == 0
		})
	}
	const rounds = 10
	each := *comeAndGo / rounds
	cycle(each)
	cycle(each)
	before, goroutines := leastMemory(), runtime.NumGoroutine()
	for range rounds - 2 {
		cycle(each)
	}
	awaitGoroutines(t, goroutines)
	grown := leastMemory() - before
	if grown > 1<<20 {
		t.Errorf("%d streams have left %d kB behind", (rounds-2)*each, grown>>10)
	}
	if used, _ := metric(t, registry, "pgbroker_pool_connections_in_use"); used > 1 { // the periodic work may use one
		t.Errorf("%v connections to the database are still in use", used)
	}
	t.Logf("%d streams came and went; memory has grown by %d kB", rounds*each, grown>>10)
}

// TestSoak: under a mix of everything, what the process holds stays as it is.
func TestSoak(t *testing.T) {
	registry := prometheus.NewRegistry()
	b := servertest.New(t, servertest.Options{
		// The ring is full before it is first looked at.
		Configure: withMetrics(registry, func(c *server.Config) { c.RingBytes = 256 << 10; c.MaintenanceInterval = 100 * time.Millisecond }),
	})
	from := present(t, b)
	mix := func(d time.Duration) {
		// No deadline, of which the server would know before we do.
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		defer time.AfterFunc(d, cancel).Stop()
		var group errgroup.Group
		repeat := func(what string, f func(ctx context.Context, i int) error) {
			group.Go(func() error {
				for i := 0; ctx.Err() == nil; i++ {
					if err := f(ctx, i); err != nil && ctx.Err() == nil {
						return fmt.Errorf("%s: %w", what, err)
					}
				}
				return nil
			})
		}
		for w := range 3 {
			repeat("put", func(ctx context.Context, i int) error {
				record := thing(fmt.Sprint(w, "-", i%50), 1000)
				_, err := b.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{record}})
				return err
			})
		}
		repeat("query", func(ctx context.Context, _ int) error {
			_, err := b.Query(ctx, &databroker.QueryRequest{Type: "t", Limit: 10})
			return err
		})
		repeat("sync", func(ctx context.Context, i int) error {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			stream, err := b.Sync(ctx, from)
			for n := 0; err == nil && n < i%100; n++ {
				_, err = stream.Recv()
			}
			return err
		})
		repeat("sync latest", func(ctx context.Context, _ int) error {
			stream, err := b.SyncLatest(ctx, &databroker.SyncLatestRequest{Type: "t"})
			for err == nil {
				_, err = stream.Recv()
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		})
		if err := group.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	settled := func() (int64, int) {
		await(t, "the end of all streams", func() bool {
			open, _ := metric(t, registry, "pgbroker_sync_streams")
			return open == 0
		})
		return leastMemory(), runtime.NumGoroutine()
	}
	mix(time.Second)
	before, goroutines := settled()
	mix(*soakTime)
	after, _ := settled()
	if grown := after - before; grown > 1<<20 {
		t.Errorf("memory has grown by %d kB in %v", grown>>10, *soakTime)
	}
	awaitGoroutines(t, goroutines)
	if total, _ := metric(t, registry, "pgbroker_pool_connections"); total > 8 {
		t.Errorf("%v connections to the database", total)
	}
	t.Logf("memory before %d kB, after %v %d kB", before>>10, *soakTime, after>>10)
}
