// Package pressure holds the tests of what happens when clients or operators ask too much: memory stays bounded, others
// are served, and whoever exceeds a limit is told which one.
//
// The numbers are small enough for every day. For more:
//
//	go run ./db/dbtest/withpostgres -- go test ./server/pressure -streams 5000 -come-and-go 10000 -soak 10m -timeout 30m
package pressure

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/auth"
	"pgbroker/server/servertest"
)

var (
	streamCount = flag.Int("streams", 1000, "idle streams to open")
	comeAndGo   = flag.Int("come-and-go", 500, "streams to open and close")
	soakTime    = flag.Duration("soak", 2*time.Second, "how long to soak")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// streamsPerConnection is how many streams share a connection, as in a proxy.
const streamsPerConnection = 100

// window is what HTTP/2 lets a server send on a stream that is not read.
const window = 64 << 10

// patience is how long a test waits for what a sound server does soon.
const patience = 60 * time.Second

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func thing(id string, size int) *databroker.Record {
	data, err := anypb.New(wrapperspb.Bytes(make([]byte, size)))
	if err != nil {
		panic(err)
	}
	return &databroker.Record{Type: "t", Id: id, Data: data}
}

func put(t *testing.T, client databroker.DataBrokerServiceClient, records ...*databroker.Record) {
	t.Helper()
	if _, err := client.Put(testContext(t), &databroker.PutRequest{Records: records}); err != nil {
		t.Fatalf("put: %v", err)
	}
}

// fill writes n records of a size.
func fill(t *testing.T, client databroker.DataBrokerServiceClient, n, size int) {
	t.Helper()
	const batch = 500
	for i := 0; i < n; i += batch {
		var records []*databroker.Record
		for j := i; j < min(i+batch, n); j++ {
			records = append(records, thing(fmt.Sprintf("%06d", j), size))
		}
		put(t, client, records...)
	}
}

func get(t *testing.T, client databroker.DataBrokerServiceClient, id string) {
	t.Helper()
	if _, err := client.Get(testContext(t), &databroker.GetRequest{Type: "t", Id: id}); err != nil {
		t.Fatalf("get: %v", err)
	}
}

// present is where a stream starts that wants to hear only of what happens from now on.
func present(t *testing.T, client databroker.DataBrokerServiceClient) *databroker.SyncRequest {
	t.Helper()
	info, err := client.ServerInfo(testContext(t), new(emptypb.Empty))
	if err != nil {
		t.Fatalf("server info: %v", err)
	}
	return &databroker.SyncRequest{ServerVersion: info.ServerVersion, RecordVersion: info.LatestRecordVersion, Type: "t"}
}

type syncStream = grpc.ServerStreamingClient[databroker.SyncResponse]

// follow opens a stream that ends with the context.
func follow(ctx context.Context, t *testing.T, conn *grpc.ClientConn, request *databroker.SyncRequest) syncStream {
	t.Helper()
	stream, err := databroker.NewDataBrokerServiceClient(conn).Sync(ctx, request)
	if err != nil {
		t.Fatalf("sync: %v", err)
	}
	return stream
}

// nextRecord returns the next change of a stream, and passes over options.
func nextRecord(stream syncStream) (*databroker.Record, error) {
	for {
		response, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if record := response.GetRecord(); record != nil {
			return record, nil
		}
	}
}

// wantNext fails unless the next change of each stream is of a record.
func wantNext(t *testing.T, streams []syncStream, id string) {
	t.Helper()
	var group errgroup.Group
	for _, stream := range streams {
		group.Go(func() error {
			record, err := nextRecord(stream)
			if err == nil && record.Id != id {
				err = fmt.Errorf("a change of %s, want %s", record.Id, id)
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
}

// await waits for a condition that nothing announces.
func await(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !condition(); {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// memory returns what the process holds: live heap and stacks, of clients and servers together.
func memory() int64 {
	var stats runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&stats)
	return int64(stats.HeapAlloc + stats.StackInuse)
}

// leastMemory returns what the process holds when nothing happens: the least of several looks, because what is under way
// at one moment is no growth.
func leastMemory() int64 {
	least := memory()
	for range 5 {
		time.Sleep(20 * time.Millisecond)
		least = min(least, memory())
	}
	return least
}

// awaitMemory waits until the process holds no more than some bytes.
func awaitMemory(t *testing.T, most int64) {
	t.Helper()
	for end := time.Now().Add(patience / 4); memory() > most; {
		if time.Now().After(end) {
			t.Fatalf("%d kB are held, more than %d kB:\n%s", memory()>>10, most>>10, profile("heap"))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// awaitGoroutines waits until there are no more than n goroutines, give or take those of pools.
func awaitGoroutines(t *testing.T, n int) {
	t.Helper()
	for end := time.Now().Add(patience / 4); runtime.NumGoroutine() > n+5; {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines, want no more than %d:\n%s", runtime.NumGoroutine(), n, profile("goroutine"))
		}
		time.Sleep(time.Millisecond)
	}
}

// profile says what is held, and by whom.
func profile(name string) string {
	var text strings.Builder
	if err := pprof.Lookup(name).WriteTo(&text, 1); err != nil {
		return err.Error()
	}
	return text.String()[:min(text.Len(), 20_000)]
}

func wantStatus(t *testing.T, err error, code codes.Code, message string) {
	t.Helper()
	if status.Code(err) != code || message != "" && status.Convert(err).Message() != message {
		t.Errorf("got %v, want %v %q", err, code, message)
	}
}

// withMetrics gives a replica a registry.
func withMetrics(registry *prometheus.Registry, configure func(*server.Config)) func(*server.Config) {
	return func(c *server.Config) {
		c.Registerer = registry
		if configure != nil {
			configure(c)
		}
	}
}

// metric returns the value of a metric whose labels are those given, as name=value, and whether it is there.
func metric(t *testing.T, registry *prometheus.Registry, name string, labels ...string) (float64, bool) {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != name {
			continue
		}
	series:
		for _, m := range family.Metric {
			has := make(map[string]bool)
			for _, pair := range m.Label {
				has[pair.GetName()+"="+pair.GetValue()] = true
			}
			for _, label := range labels {
				if !has[label] {
					continue series
				}
			}
			switch {
			case m.Counter != nil:
				return m.Counter.GetValue(), true
			case m.Gauge != nil:
				return m.Gauge.GetValue(), true
			}
		}
	}
	return 0, false
}

// logBook keeps what is logged.
type logBook struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write implements io.Writer.
func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

// lines returns the lines that contain all of the given texts.
func (b *logBook) lines(texts ...string) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var found []string
lines:
	for line := range strings.Lines(b.text.String()) {
		for _, text := range texts {
			if !strings.Contains(line, text) {
				continue lines
			}
		}
		found = append(found, line)
	}
	return found
}

// spread opens connections for n streams.
func spread(t *testing.T, address string, n int) []*grpc.ClientConn {
	t.Helper()
	conns := make([]*grpc.ClientConn, (n+streamsPerConnection-1)/streamsPerConnection)
	for i := range conns {
		conns[i] = dial(t, address)
	}
	return conns
}

// dial connects to a replica as a client whose windows do not grow: what it holds for streams that it does not read is its
// own, and no part of what is measured here.
func dial(t *testing.T, address string) *grpc.ClientConn {
	t.Helper()
	key, err := auth.ParseKey(servertest.Secret)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithPerRPCCredentials(auth.NewCredentials(key)), grpc.WithStaticStreamWindowSize(window), grpc.WithStaticConnWindowSize(1<<20))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func isCanceled(err error) bool {
	return errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled
}

// newRole makes a role that may do what `pgbroker migrate grants` lets a server do, and returns its name.
func newRole(t *testing.T, d *dbtest.Database) string {
	t.Helper()
	role := "app_" + d.Name[len(d.Name)-12:]
	d.Role(t, role)
	rows, err := d.Pool.Query(t.Context(), "SELECT pgbroker.grants(NULL, NULL, $1)", role)
	if err != nil {
		t.Fatal(err)
	}
	statements, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	d.Exec(t, strings.Join(statements, "\n"))
	return role
}
