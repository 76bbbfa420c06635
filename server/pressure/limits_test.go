package pressure

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// limited starts a broker with limits.
func limited(t *testing.T, limits server.Limits) (*servertest.Broker, *prometheus.Registry) {
	t.Helper()
	registry := prometheus.NewRegistry()
	return servertest.New(t, servertest.Options{
		Configure:   withMetrics(registry, func(c *server.Config) { c.Limits = limits }),
		ConfigureDB: func(c *db.Config) { c.LockTimeout = time.Minute }, // what waits for a test is not to end before it
	}), registry
}

// wantRefused fails unless a limit has refused as many as the metric is to say.
func wantRefused(t *testing.T, registry *prometheus.Registry, limit string, count float64) {
	t.Helper()
	if got, ok := metric(t, registry, "pgbroker_limit_reached_total", "limit="+limit); !ok || got != count {
		t.Errorf("pgbroker_limit_reached_total of %s is %v, want %v", limit, got, count)
	}
}

// TestLimitOfStreams: of a connection and of all; the next one is told which limit it is, and may come when another has
// gone.
func TestLimitOfStreams(t *testing.T) {
	t.Parallel()
	b, registry := limited(t, server.Limits{Streams: 3, StreamsPerConnection: 2})
	from := present(t, b)
	other := servertest.Dial(t, b.Address, servertest.Secret)
	open := func(conn *grpc.ClientConn) (syncStream, context.CancelFunc) {
		ctx, cancel := context.WithCancel(testContext(t))
		return follow(ctx, t, conn, from), cancel
	}
	first, end := open(b.Conn)
	second, _ := open(b.Conn)
	streams := []syncStream{first, second}
	wantOpen := func() {
		t.Helper()
		await(t, "the streams to be open", func() bool {
			n, _ := metric(t, registry, "pgbroker_sync_streams")
			return int(n) == len(streams)
		})
	}
	wantOpen()
	refused, _ := open(b.Conn)
	_, err := refused.Recv()
	wantStatus(t, err, codes.ResourceExhausted, "too many open streams on this connection: at most 2 (max_streams_per_connection)")
	wantRefused(t, registry, "max_streams_per_connection", 1)

	third, _ := open(other)
	streams = append(streams, third)
	wantOpen()
	refused, _ = open(other)
	_, err = refused.Recv()
	wantStatus(t, err, codes.ResourceExhausted, "too many open streams: at most 3 (max_streams)")
	latest, err := b.SyncLatest(testContext(t), new(databroker.SyncLatestRequest))
	if err == nil {
		_, err = latest.Recv()
	}
	wantStatus(t, err, codes.ResourceExhausted, "")
	wantRefused(t, registry, "max_streams", 2)
	// Those that are open and all that is no stream go on.
	put(t, b, thing("a", 0))
	wantNext(t, streams, "a")

	end()
	streams = streams[1:]
	wantOpen()
	from = present(t, b)
	fourth, _ := open(other)
	streams = append(streams, fourth)
	wantOpen()
	put(t, b, thing("b", 0))
	wantNext(t, streams, "b")
}

// held keeps everybody from the table until it is released.
func held(t *testing.T, b *servertest.Broker) (release func()) {
	t.Helper()
	tx, err := b.Database.Connect(t).Begin(t.Context())
	if err == nil {
		_, err = tx.Exec(t.Context(), "LOCK TABLE pgbroker.records IN ACCESS EXCLUSIVE MODE")
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := tx.Rollback(t.Context()); err != nil && !errors.Is(err, pgx.ErrTxClosed) {
			t.Error(err)
		}
	}
}

// TestLimitOfRequests: when requests pile up, the next ones are refused at once; health is not among them.
func TestLimitOfRequests(t *testing.T) {
	t.Parallel()
	b, registry := limited(t, server.Limits{Requests: 3})
	get := func() error {
		_, err := b.Get(testContext(t), &databroker.GetRequest{Type: "t", Id: "a"})
		return err
	}
	put(t, b, thing("a", 0))
	release, admin := held(t, b), b.Database.Admin(t)
	defer release()
	var group errgroup.Group
	for range 3 {
		group.Go(get)
	}
	await(t, "three requests that wait", func() bool {
		var n int
		if err := admin.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '-- name: Record%'`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n == 3
	})
	wantStatus(t, get(), codes.ResourceExhausted, "too many requests at the same time: at most 3 (max_requests)")
	wantRefused(t, registry, "max_requests", 1)
	if _, err := b.Health.Check(testContext(t), new(grpc_health_v1.HealthCheckRequest)); err != nil {
		t.Errorf("health: %v", err)
	}
	release()
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	if err := get(); err != nil {
		t.Error(err)
	}
}

// TestLimitOfRequestBytes: the same by size. One request alone is always taken.
func TestLimitOfRequestBytes(t *testing.T) {
	t.Parallel()
	b, registry := limited(t, server.Limits{RequestBytes: 1 << 20})
	large := func() error {
		_, err := b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{thing("a", 2<<20)}})
		return err
	}
	if err := large(); err != nil {
		t.Fatal(err)
	}
	release, admin := held(t, b), b.Database.Admin(t)
	defer release()
	waiting := make(chan error, 1)
	go func() { waiting <- large() }()
	await(t, "a request that waits", func() bool {
		var n int
		if err := admin.QueryRow(t.Context(), `SELECT count(*) FROM pg_stat_activity
			WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '-- name: Record%'`).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n == 1
	})
	wantStatus(t, large(), codes.ResourceExhausted, "too many bytes of requests at the same time: at most 1048576 bytes (max_request_bytes)")
	wantRefused(t, registry, "max_request_bytes", 1)
	release()
	if err := <-waiting; err != nil {
		t.Error(err)
	}
	if err := large(); err != nil {
		t.Error(err)
	}
}

// TestLimitOfAnswers: a query that asks for more than a replica should hold is refused, and costs no memory.
func TestLimitOfAnswers(t *testing.T) {
	t.Parallel()
	b, registry := limited(t, server.Limits{ResponseSize: 1 << 20})
	fill(t, b, 3000, 1000)
	query := func(request *databroker.QueryRequest) error {
		request.Type = "t"
		_, err := b.Query(testContext(t), request)
		return err
	}
	const message = "the answer is too large, ask for fewer records: at most 1048576 bytes (max_response_size)"
	wantStatus(t, query(&databroker.QueryRequest{Limit: 1 << 40}), codes.ResourceExhausted, message)
	wantStatus(t, query(&databroker.QueryRequest{Offset: 1000, Limit: 2000}), codes.ResourceExhausted, message)
	all := new(databroker.PatchRequest)
	for i := range 3000 {
		all.Records = append(all.Records, &databroker.Record{Type: "t", Id: fmt.Sprintf("%06d", i), Data: thing("", 0).Data})
	}
	_, err := b.Patch(testContext(t), all)
	wantStatus(t, err, codes.ResourceExhausted, message)
	wantRefused(t, registry, "max_response_size", 3)
	if err := query(&databroker.QueryRequest{Limit: 500}); err != nil {
		t.Error(err)
	}
	if used, _ := metric(t, registry, "pgbroker_pool_connections_in_use"); used > 1 {
		t.Errorf("%v connections are still in use", used)
	}
}

// TestLimitOfConnections: for one too many the oldest goes on which nobody has shown a token, and never one on which somebody
// has; if there are only such, the new one goes.
func TestLimitOfConnections(t *testing.T) {
	t.Parallel()
	b, registry := limited(t, server.Limits{Connections: 2}) // one is the broker's own client
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", b.Address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	closed := func(conn net.Conn) bool {
		// A server speaks first: settings, or nothing at all.
		_, err := conn.Read(make([]byte, 1))
		return err != nil
	}
	put(t, b, thing("a", 0)) // shows the token
	idle := dial()
	if closed(idle) {
		t.Fatal("a connection within the limit is closed")
	}
	newer := servertest.Dial(t, b.Address, servertest.Secret)
	if _, err := databroker.NewDataBrokerServiceClient(newer).ServerInfo(testContext(t), new(emptypb.Empty)); err != nil {
		t.Errorf("a client beside an idle stranger: %v", err)
	}
	await(t, "the end of the idle stranger", func() bool {
		_ = idle.SetReadDeadline(time.Now().Add(time.Second))
		return errors.Is(func() error { _, err := io.Copy(io.Discard, idle); return cmp.Or(err, io.EOF) }(), io.EOF)
	})
	wantRefused(t, registry, "max_connections", 1)
	if !closed(dial()) {
		t.Error("a connection above the limit is served, though all others belong to clients")
	}
	wantRefused(t, registry, "max_connections", 2)
	put(t, b, thing("b", 0))
	if err := newer.Close(); err != nil {
		t.Fatal(err)
	}
	await(t, "a free place", func() bool { return !closed(dial()) })
}

// TestFloodOfHealthChecks: what needs no token has a limit of its own, so that it takes no place from what needs one.
func TestFloodOfHealthChecks(t *testing.T) {
	t.Parallel()
	b, registry := limited(t, server.Limits{})
	stranger := grpc_health_v1.NewHealthClient(servertest.Dial(t, b.Address, ""))
	ctx := testContext(t)
	watch := func() error {
		stream, err := stranger.Watch(ctx, new(grpc_health_v1.HealthCheckRequest))
		if err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	for range 300 { // of which the first ones make room for the others
		if err := watch(); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "watches that are ended", func() bool {
		refused, _ := metric(t, registry, "pgbroker_limit_reached_total", "limit=public_requests")
		return refused == 300-256
	})
	// Neither they nor calls that never send their request keep a probe from its answer, with a token or without.
	idle := servertest.Dial(t, b.Address, "")
	for range 300 {
		if _, err := idle.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, grpc_health_v1.Health_Check_FullMethodName); err != nil {
			t.Fatal(err)
		}
	}
	for _, probe := range []grpc_health_v1.HealthClient{stranger, b.Health} {
		for range 10 {
			if _, err := probe.Check(ctx, new(grpc_health_v1.HealthCheckRequest)); err != nil {
				t.Errorf("a probe beside a flood: %v", err)
			}
		}
	}
	put(t, b, thing("a", 0))
}

// TestStrangersAreLetGo: what begins without a token ends by itself, as what a client repeats.
func TestStrangersAreLetGo(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	stranger := servertest.Dial(t, b.Address, "")
	ctx := testContext(t)
	begin := time.Now()
	var group errgroup.Group
	for name, desc := range map[string]*grpc.StreamDesc{
		grpc_health_v1.Health_Check_FullMethodName:                              {ClientStreams: true}, // without a request
		grpc_health_v1.Health_Watch_FullMethodName:                              {ServerStreams: true},
		grpc_reflection_v1.ServerReflection_ServerReflectionInfo_FullMethodName: {ServerStreams: true, ClientStreams: true},
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo":        {ServerStreams: true, ClientStreams: true},
	} {
		group.Go(func() error {
			stream, err := stranger.NewStream(ctx, desc, name)
			if err != nil {
				return err
			}
			if name == grpc_health_v1.Health_Watch_FullMethodName {
				if err := errors.Join(stream.SendMsg(new(grpc_health_v1.HealthCheckRequest)), stream.CloseSend()); err != nil {
					return err
				}
			}
			for err == nil {
				err = stream.RecvMsg(new(emptypb.Empty))
			}
			if code := status.Code(err); code != codes.Unavailable && code != codes.DeadlineExceeded && code != codes.Canceled || name == grpc_health_v1.Health_Watch_FullMethodName && code != codes.Unavailable {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	// Whoever has a token may watch for as long as they like.
	watch, err := b.Health.Watch(ctx, new(grpc_health_v1.HealthCheckRequest))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := watch.Recv()
		ended <- err
	}()
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took < 10*time.Second {
		t.Errorf("a stream without a token ended after %v, which is too soon for one that is meant", took)
	}
	select {
	case err := <-ended:
		t.Errorf("a watch with a token ended: %v", err)
	default:
	}
}

// TestRapidReset: a stranger who begins streams and takes them back, as fast as a connection can, is cut off and counted; others
// are served.
func TestRapidReset(t *testing.T) {
	t.Parallel()
	b, registry := limited(t, server.Limits{})
	for _, c := range []struct {
		name, method, httpMethod string
	}{
		{"a method that needs a token", databroker.DataBrokerService_Put_FullMethodName, "POST"},
		{"health", grpc_health_v1.Health_Watch_FullMethodName, "POST"},
		{"no method", "/no.Such/Method", "POST"},
		{"no request of gRPC", "/", "GET"},
	} {
		before, _ := metric(t, registry, "pgbroker_limit_reached_total", "limit=strangers")
		conn, err := net.Dial("tcp", b.Address)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = io.Copy(io.Discard, conn) }() // a server that cannot write would not read either
		framer := http2.NewFramer(conn, nil)
		var block bytes.Buffer
		encoder := hpack.NewEncoder(&block)
		err = framer.WriteSettings()
		sent := 0
		begin := time.Now()
		for id := uint32(1); err == nil && id < 1<<22; id += 2 {
			block.Reset()
			for _, field := range [][2]string{{":method", c.httpMethod}, {":scheme", "http"}, {":path", c.method}, {":authority", "x"}, {"content-type", "application/grpc"}, {"te", "trailers"}} {
				if err := encoder.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]}); err != nil {
					t.Fatal(err)
				}
			}
			err = errors.Join(
				framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndHeaders: true}),
				framer.WriteRSTStream(id, http2.ErrCodeCancel))
			sent++
		}
		t.Logf("%s: cut off after %d streams and %v: %v", c.name, sent, time.Since(begin), err)
		if err == nil {
			t.Errorf("%s: the connection is not cut off", c.name)
		}
		_ = conn.Close()
		after, _ := metric(t, registry, "pgbroker_limit_reached_total", "limit=strangers")
		if after <= before {
			t.Errorf("%s: it is not counted", c.name)
		}
		put(t, b, thing("a", 0))
	}
	if missing, _ := metric(t, registry, "pgbroker_auth_rejected_total", "reason=missing"); missing > 5000 { // what had been read when it was closed is looked at, too
		t.Errorf("%v requests were looked at on a connection, want 500 and few more", missing)
	}
	// One who has a token may do as much as it can.
	stranger := servertest.Dial(t, b.Address, "")
	for range 400 {
		if _, err := databroker.NewDataBrokerServiceClient(stranger).ServerInfo(testContext(t), new(emptypb.Empty)); status.Code(err) != codes.Unauthenticated {
			t.Fatalf("who has no token is told so: %v", err)
		}
	}
	var group errgroup.Group
	for range 20 {
		group.Go(func() error {
			for range 100 {
				if _, err := b.ServerInfo(testContext(t), new(emptypb.Empty)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
}

// TestABadTokenIsRefusedBeforeTheRequestIsRead: whoever has no token is told so when the header has come, and cannot make
// the server hold a request.
func TestABadTokenIsRefusedBeforeTheRequestIsRead(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	stranger := servertest.Dial(t, b.Address, "")
	for token, want := range map[string]string{"": "unauthenticated", "a.b.c": "invalid JWT"} {
		ctx := testContext(t)
		if token != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "jwt", token)
		}
		// The request never comes.
		stream, err := stranger.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, databroker.DataBrokerService_Put_FullMethodName)
		if err != nil {
			t.Fatal(err)
		}
		wantStatus(t, stream.RecvMsg(new(databroker.PutResponse)), codes.Unauthenticated, want)
	}
	// Nor may the header be of any size.
	large := metadata.AppendToOutgoingContext(testContext(t), "jwt", "a.b."+randomText(128<<10))
	_, err := databroker.NewDataBrokerServiceClient(stranger).Get(large, new(databroker.GetRequest))
	if code := status.Code(err); code == codes.OK || code == codes.Unauthenticated {
		t.Errorf("a header of 128 kB is read: %v", err)
	}
}

// randomText does not compress.
func randomText(n int) string {
	text := make([]byte, n)
	state := uint32(1)
	for i := range text {
		state = state*1664525 + 1013904223
		text[i] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"[state>>26]
	}
	return string(text)
}

// TestFloodOfBadTokens: while strangers send large requests as fast as they can, those who have a token are served, and the
// server holds nothing of it.
func TestFloodOfBadTokens(t *testing.T) {
	registry := prometheus.NewRegistry()
	b := servertest.New(t, servertest.Options{Configure: withMetrics(registry, nil)})
	put(t, b, thing("a", 0))
	live := follow(testContext(t), t, b.Conn, present(t, b))
	goroutines := runtime.NumGoroutine()
	before := leastMemory()
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(testContext(t), "jwt", "a.b.c"))
	defer cancel()
	var flood errgroup.Group
	var sent atomic.Int64
	conns := make([]*grpc.ClientConn, 4)
	for i := range conns {
		conns[i] = servertest.Dial(t, b.Address, "")
		client := databroker.NewDataBrokerServiceClient(conns[i])
		request := &databroker.PutRequest{Records: []*databroker.Record{thing("evil", 1<<20)}}
		flood.Go(func() error {
			for ctx.Err() == nil {
				if _, err := client.Put(ctx, request); err == nil {
					return errors.New("a request with a bad token is taken")
				}
				sent.Add(1)
			}
			return nil
		})
	}
	for i := range 20 {
		id := fmt.Sprint("good", i)
		put(t, b, thing(id, 100))
		wantNext(t, []syncStream{live}, id)
	}
	await(t, "a flood", func() bool { return sent.Load() >= 50 })
	cancel()
	if err := flood.Wait(); err != nil {
		t.Error(err)
	}
	for _, conn := range conns {
		conn.Close()
	}
	if rejected, _ := metric(t, registry, "pgbroker_auth_rejected_total", "reason=malformed"); rejected < 50 {
		t.Errorf("%v rejections are counted of %d", rejected, sent.Load())
	}
	awaitGoroutines(t, goroutines)
	if grown := leastMemory() - before; grown > 16<<20 { // clients' buffers among it
		t.Errorf("%d kB are left of it", grown>>10)
	}
}

// TestGiantAndTinyRequests: requests of the largest size and of the smallest one pass side by side.
func TestGiantAndTinyRequests(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{
		Configure:   func(c *server.Config) { c.RequestTimeout = patience }, // this is not about speed
		ConfigureDB: func(c *db.Config) { c.StatementTimeout = patience },
	})
	size := 4<<20 - 8<<10
	giant := func(i int) error {
		_, err := b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{thing(fmt.Sprint("giant", i%4), size)}})
		return err
	}
	if err := giant(0); err != nil {
		t.Fatal(err)
	}
	var giants, tiny errgroup.Group
	for i := range 4 {
		giants.Go(func() error { return giant(i) })
	}
	for w := range 8 {
		tiny.Go(func() error {
			for i := range 20 {
				record := thing(fmt.Sprint("tiny", w, i), 0)
				if _, err := b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{record}}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := errors.Join(giants.Wait(), tiny.Wait()); err != nil {
		t.Fatal(err)
	}
	// A stream gets all of them, of either size.
	stream, err := b.SyncLatest(testContext(t), &databroker.SyncLatestRequest{Type: "t"})
	n := 0
	for err == nil {
		var response *databroker.SyncLatestResponse
		if response, err = stream.Recv(); response.GetRecord() != nil {
			n++
		}
	}
	if !errors.Is(err, io.EOF) || n != 8*20+4 {
		t.Errorf("%d records, %v", n, err)
	}
}

// TestSlowDatabase: clients whose requests wait for a database that does not answer are told in time.
func TestSlowDatabase(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{
		Configure:   func(c *server.Config) { c.RequestTimeout = 300 * time.Millisecond },
		ConfigureDB: func(c *db.Config) { c.MaxConns = 4 },
	})
	put(t, b, thing("a", 0))
	release := held(t, b)
	defer release()
	var group errgroup.Group
	for range 20 { // many more than there are connections
		group.Go(func() error {
			_, err := b.Get(testContext(t), &databroker.GetRequest{Type: "t", Id: "a"})
			wantStatus(t, err, codes.DeadlineExceeded, "the request took too long")
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	release()
	get(t, b, "a")
}
