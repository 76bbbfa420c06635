package conformance_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/migrations"
	"pgbroker/proto/databroker"
	"pgbroker/proto/registry"
	"pgbroker/server"
	"pgbroker/server/auth"
	"pgbroker/server/servertest"
)

// TestS16_PingsAreWelcome: a peer that pings every five minutes, with a stream and without, for three hours,
// is answered every time and never told to go away. The hours pass on a clock of the test's own.
func TestS16_PingsAreWelcome(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		// The database is of no importance for this, and cannot be on that clock.
		logger := slog.New(slog.DiscardHandler)
		database, err := db.Open(t.Context(), db.Config{ConnString: "host=/nonexistent user=nobody dbname=none"})
		if err != nil {
			t.Fatal(err)
		}
		s, err := server.New(server.Config{DB: database, Auth: auth.Config{Secrets: []string{servertest.Secret}}, Logger: logger})
		if err != nil {
			t.Fatal(err)
		}
		listener := bufconn.Listen(1 << 20)
		ctx, stop := context.WithCancel(t.Context())
		stopped := make(chan error)
		go func() { stopped <- s.Run(ctx, listener) }()

		const pings = 3 * 12
		for _, withStream := range []bool{false, true} {
			conn, err := listener.DialContext(ctx)
			if err != nil {
				t.Fatal(err)
			}
			peer := newPeer(t, conn)
			if withStream {
				peer.watchHealth()
			}
			for i := range pings {
				time.Sleep(5 * time.Minute)
				peer.ping(uint64(i))
			}
			synctest.Wait()
			if peer.answered.Load() != pings || peer.goneAway.Load() || peer.streamEnded.Load() {
				t.Errorf("with a stream: %v; %d answers to %d pings; told to go away: %v; the stream has ended: %v",
					withStream, peer.answered.Load(), pings, peer.goneAway.Load(), peer.streamEnded.Load())
			}
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
		}
		stop()
		if err := <-stopped; err != nil {
			t.Errorf("the server ended with: %v", err)
		}
		database.Close()
	})
}

// peer is one end of an HTTP/2 connection, down to the frames.
type peer struct {
	t                     *testing.T
	mu                    sync.Mutex // held while writing
	framer                *http2.Framer
	answered              atomic.Int64
	goneAway, streamEnded atomic.Bool
}

func newPeer(t *testing.T, conn net.Conn) *peer {
	t.Helper()
	p := &peer{t: t, framer: http2.NewFramer(conn, conn)}
	_, err := conn.Write([]byte(http2.ClientPreface))
	if err = errors.Join(err, p.framer.WriteSettings()); err != nil {
		t.Fatal(err)
	}
	go p.read()
	return p
}

func (p *peer) write(frame func(*http2.Framer) error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return frame(p.framer)
}

func (p *peer) read() {
	for {
		frame, err := p.framer.ReadFrame()
		if err != nil {
			return
		}
		switch frame := frame.(type) {
		case *http2.PingFrame:
			if frame.IsAck() {
				p.answered.Add(1)
			} else if err := p.write(func(f *http2.Framer) error { return f.WritePing(true, frame.Data) }); err != nil {
				return
			}
		case *http2.GoAwayFrame:
			p.goneAway.Store(true)
		case *http2.RSTStreamFrame:
			p.streamEnded.Store(true)
		case *http2.HeadersFrame:
			if frame.StreamEnded() {
				p.streamEnded.Store(true)
			}
		}
	}
}

func (p *peer) ping(n uint64) {
	p.t.Helper()
	if err := p.write(func(f *http2.Framer) error { return f.WritePing(false, [8]byte{byte(n), byte(n >> 8)}) }); err != nil {
		p.t.Fatalf("ping %d: %v", n, err)
	}
}

// watchHealth opens a stream that needs no database, as one who has a token: those of others end after some seconds.
func (p *peer) watchHealth() {
	p.t.Helper()
	key, err := auth.ParseKey(servertest.Secret)
	if err != nil {
		p.t.Fatal(err)
	}
	token, err := auth.NewCredentials(key).GetRequestMetadata(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	var block bytes.Buffer
	encoder := hpack.NewEncoder(&block)
	for _, field := range []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/grpc.health.v1.Health/Watch"},
		{Name: ":authority", Value: "databroker"}, {Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
		{Name: "jwt", Value: token["jwt"]},
	} {
		if err := encoder.WriteField(field); err != nil {
			p.t.Fatal(err)
		}
	}
	err = p.write(func(f *http2.Framer) error {
		headers := f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true})
		return errors.Join(headers, f.WriteData(1, true, make([]byte, 5)))
	})
	if err != nil {
		p.t.Fatal(err)
	}
}

// TestS17_D37_StreamsSurviveTheDatabase: when every connection to the database breaks, streams stay, and go on
// without a gap or a repetition.
func TestS17_D37_StreamsSurviveTheDatabase(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	var streams []*syncStream
	for _, r := range b.Replicas {
		streams = append(streams, followNow(t, r, ""), followNow(t, r, thingType))
	}
	for round := range 3 {
		written := putAgain(t, b, thing(fmt.Sprint(round), ""))
		b.Database.TerminateBackends(t, "")
		after := putAgain(t, b, thing(fmt.Sprint(round, " after"), ""))
		for _, stream := range streams {
			same(t, "change", stream.change(), written)
			same(t, "change after the connections broke", stream.change(), after)
		}
	}
}

// putAgain puts a record, as often as it takes: a connection may break under it.
func putAgain(t *testing.T, c client, record *databroker.Record) *databroker.Record {
	t.Helper()
	for {
		response, err := c.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{record}})
		if err == nil {
			return response.Records[0]
		}
		wantStatus(t, err, codes.Unavailable, "")
		if t.Failed() {
			t.FailNow()
		}
	}
}

// TestS17_D6_StreamsEndAsUnavailableOnShutdown: never as canceled, nor as if they were complete.
func TestS17_D6_StreamsEndAsUnavailableOnShutdown(t *testing.T) {
	t.Parallel()
	b := start(t)
	fill(t, b.Database, 3000)
	idle := followNow(t, b, "")
	idle.nextOptions()
	behind := follow(t, b, &databroker.Versions{ServerVersion: position(t, b).ServerVersion}, thingType) // not read from
	behind.change()
	latest, err := b.SyncLatest(testContext(t), &databroker.SyncLatestRequest{Type: thingType})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := latest.Recv(); err != nil {
		t.Fatal(err)
	}
	services := watch(t, b.Replica)
	if _, err := services.Recv(); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan error)
	go func() { stopped <- b.Stop() }()
	wantStatus(t, idle.end(), codes.Unavailable, "the server is shutting down")
	wantStatus(t, behind.end(), codes.Unavailable, "the server is shutting down")
	_, err = services.Recv()
	wantStatus(t, err, codes.Unavailable, "the server is shutting down")
	for {
		response, err := latest.Recv()
		if err == nil && response.GetVersions() == nil {
			continue
		}
		// It may have been complete already.
		if err != nil {
			wantStatus(t, err, codes.Unavailable, "the server is shutting down")
		}
		break
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// outage is a time in which nobody can connect to a database.
func outage(t *testing.T, database *dbtest.Database) (end func()) {
	t.Helper()
	admin, err := pgx.Connect(t.Context(), os.Getenv(dbtest.URLEnv))
	if err != nil {
		t.Fatal(err)
	}
	allow := func(connections string) {
		t.Helper()
		if _, err := admin.Exec(context.WithoutCancel(t.Context()), "ALTER DATABASE "+database.Name+" ALLOW_CONNECTIONS "+connections); err != nil {
			t.Fatal(err)
		}
	}
	ended := false
	end = func() {
		if !ended {
			allow("true")
			ended = true
		}
	}
	t.Cleanup(func() { end(); _ = admin.Close(context.Background()) })
	allow("false")
	_, err = admin.Exec(t.Context(), "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = $1", database.Name)
	if err != nil {
		t.Fatal(err)
	}
	return end
}

// TestUnavailable: while the database cannot be reached, requests fail as Unavailable, which clients do not
// take as "there is no such session", health says so, and streams wait.
func TestUnavailable(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) { c.PollInterval = 100 * time.Millisecond }})
	put(t, b, thing("a", ""))
	stream := followNow(t, b, thingType)
	from := position(t, b)
	end := outage(t, b.Database)
	b.AwaitHealth(t, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	response, err := b.Health.Check(testContext(t), &grpc_health_v1.HealthCheckRequest{Service: "pomerium-databroker"})
	if err != nil || response.Status != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health: %v, %v", response, err)
	}
	const message = "the database is unavailable"
	ctx := testContext(t)
	_, err = b.Get(ctx, &databroker.GetRequest{Type: thingType, Id: "a"})
	wantStatus(t, err, codes.Unavailable, message)
	_, err = b.Query(ctx, &databroker.QueryRequest{Type: thingType, Limit: 1})
	wantStatus(t, err, codes.Unavailable, message)
	_, err = b.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{thing("b", "")}})
	wantStatus(t, err, codes.Unavailable, message)
	_, err = b.Patch(ctx, &databroker.PatchRequest{Records: []*databroker.Record{thing("a", "")}})
	wantStatus(t, err, codes.Unavailable, message)
	_, err = b.AcquireLease(ctx, &databroker.AcquireLeaseRequest{Name: "l"})
	wantStatus(t, err, codes.Unavailable, message)
	_, err = b.ListTypes(ctx, new(emptypb.Empty))
	wantStatus(t, err, codes.Unavailable, message)
	_, err = b.Clear(ctx, new(emptypb.Empty))
	wantStatus(t, err, codes.Unavailable, message)
	_, err = b.Checkpoints.GetCheckpoint(ctx, new(databroker.GetCheckpointRequest))
	wantStatus(t, err, codes.Unavailable, message)
	_, err = b.Registry.List(ctx, new(registry.ListRequest))
	wantStatus(t, err, codes.Unavailable, message)
	latest, err := b.SyncLatest(ctx, new(databroker.SyncLatestRequest))
	if err == nil {
		_, err = latest.Recv()
	}
	wantStatus(t, err, codes.Unavailable, message)
	refused, err := b.Sync(ctx, &databroker.SyncRequest{ServerVersion: from.ServerVersion})
	if err == nil {
		_, err = refused.Recv()
	}
	wantStatus(t, err, codes.Unavailable, message)

	end()
	b.AwaitHealth(t, grpc_health_v1.HealthCheckResponse_SERVING)
	written := putAgain(t, b, thing("c", ""))
	same(t, "change after the outage", stream.change(), written)
}

// TestBlockedWrites: another transaction in the database that holds everybody up is said to be the reason.
func TestBlockedWrites(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{ConfigureDB: func(c *db.Config) { c.LockTimeout = 100 * time.Millisecond }})
	put(t, b, thing("a", ""))
	tx := must[pgx.Tx](t)(b.Database.Connect(t).Begin(t.Context()))
	if _, err := tx.Exec(t.Context(), "DELETE FROM pgbroker.records WHERE id = 'a'"); err != nil {
		t.Fatal(err)
	}
	_, err := b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{thing("b", "")}})
	wantStatus(t, err, codes.Unavailable, "another transaction in the database blocks writes; the server's log says which")
	get(t, b, thingType, "a") // readers do not wait
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	put(t, b, thing("b", ""))
}

// TestDeadlines: the server gives up before its clients do, and says so; a client's own deadline counts too.
func TestDeadlines(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) { c.RequestTimeout = 200 * time.Millisecond }})
	tx := must[pgx.Tx](t)(b.Database.Connect(t).Begin(t.Context()))
	if _, err := tx.Exec(t.Context(), "LOCK TABLE pgbroker.records IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	_, err := b.Get(testContext(t), &databroker.GetRequest{Type: thingType, Id: "a"})
	wantStatus(t, err, codes.DeadlineExceeded, "the request took too long")
	_, err = b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{thing("b", "")}})
	wantStatus(t, err, codes.DeadlineExceeded, "the request took too long")
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	_, err = b.Get(ctx, &databroker.GetRequest{Type: thingType, Id: "a"})
	wantStatus(t, err, codes.DeadlineExceeded, "")
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantAbsent(t, b, thingType, "a")
}

// TestD36_TheFirstRequestIsLikeAnyOther: that it is given up on does no harm to the next ones.
func TestD36_TheFirstRequestIsLikeAnyOther(t *testing.T) {
	t.Parallel()
	b := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := b.Get(ctx, &databroker.GetRequest{Type: thingType, Id: "a"})
	wantStatus(t, err, codes.Canceled, "")
	wantAbsent(t, b, thingType, "a")
	r := startMore(t, b)
	response, err := r.GetOptions(testContext(t), &databroker.GetOptionsRequest{Type: bindingRequestType})
	if err != nil || response.Options.GetCapacity() != 50000 {
		t.Errorf("the first request of a replica: %v, %v", response, err)
	}
}

// TestD35_ConcurrentFirstStarts: any number of processes may find an empty database and prepare it.
func TestD35_ConcurrentFirstStarts(t *testing.T) {
	t.Parallel()
	database := dbtest.NewEmpty(t)
	const processes = 6
	errs := make(chan error, processes)
	for range processes {
		go func() { errs <- migrations.Up(t.Context(), database.Config(t)) }()
	}
	for range processes {
		if err := <-errs; err != nil {
			t.Errorf("migrate: %v", err)
		}
	}
	database.Grant(t)
	b := startOn(t, database, 2)
	put(t, b, thing("a", ""))
	get(t, b.Replicas[1], thingType, "a")
}

// TestD8_UpdatesNeedNoNotification: a change that nobody is told about, and one that is made while the
// listening connection is broken, are delivered all the same.
func TestD8_UpdatesNeedNoNotification(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Replicas: 2, Configure: func(c *server.Config) { c.PollInterval = 100 * time.Millisecond }})
	streams := []*syncStream{followNow(t, b.Replicas[0], thingType), followNow(t, b.Replicas[1], "")}
	conn := b.Database.Admin(t)
	version := int64(position(t, b).LatestRecordVersion)
	for i := range 5 {
		version++
		silent := fmt.Sprint("silent ", i)
		// Without triggers, and so without NOTIFY.
		err := pgx.BeginFunc(t.Context(), conn, func(tx pgx.Tx) error {
			for _, sql := range []string{
				"SET LOCAL session_replication_role = replica",
				fmt.Sprintf("SELECT setval('pgbroker.record_version', %d)", version),
				fmt.Sprintf("INSERT INTO pgbroker.records (type, id, version) VALUES ('%s', '%s', %d)", thingType, silent, version),
				fmt.Sprintf("INSERT INTO pgbroker.changes (version, type, id, changed_at, deleted) VALUES (%d, '%s', '%s', clock_timestamp(), false)", version, thingType, silent),
			} {
				if _, err := tx.Exec(t.Context(), sql); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, stream := range streams {
			if change := stream.change(); change.Id != silent {
				t.Errorf("got %v, want %s", change, silent)
			}
		}
		b.Database.TerminateBackends(t, "pgbroker-listener")
		written := putOne(t, b, thing(fmt.Sprint("unheard ", i), ""))
		for _, stream := range streams {
			same(t, "change", stream.change(), written)
		}
		version = int64(written.Version)
	}
}

// counter is a proxy to a database that counts what passes through.
type counter struct {
	asked, answered atomic.Int64 // bytes
}

// startCounted starts a replica that reaches its database through a counter.
func startCounted(t *testing.T, database *dbtest.Database) (*servertest.Replica, *counter) {
	t.Helper()
	config, err := pgconn.ParseConfig(database.ConnString)
	if err != nil {
		t.Fatal(err)
	}
	network, address := pgconn.NetworkAddress(config.Host, config.Port)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	c := new(counter)
	go func() {
		for {
			front, err := listener.Accept()
			if err != nil {
				return
			}
			back, err := net.Dial(network, address)
			if err != nil {
				_ = front.Close()
				continue
			}
			pass := func(to, from net.Conn, count *atomic.Int64) {
				_, _ = io.Copy(io.MultiWriter(to, counting{count}), from)
				_, _ = to.Close(), from.Close()
			}
			go pass(back, front, &c.asked)
			go pass(front, back, &c.answered)
		}
	}()
	port := listener.Addr().(*net.TCPAddr).Port
	connString := fmt.Sprintf("host=127.0.0.1 port=%d user=%s password='%s' dbname=%s sslmode=disable", port, config.User, config.Password, database.Name)
	return servertest.Start(t, connString, servertest.Options{}), c
}

type counting struct{ n *atomic.Int64 }

func (c counting) Write(p []byte) (int, error) {
	c.n.Add(int64(len(p)))
	return len(p), nil
}

// TestD9_StreamsShareOneReader: what is asked of the database when records are written does not depend on how
// many streams are open.
func TestD9_StreamsShareOneReader(t *testing.T) {
	t.Parallel()
	database := dbtest.New(t)
	r, traffic := startCounted(t, database)
	writer := servertest.Start(t, database.ServerConnString, servertest.Options{})
	var streams []*syncStream
	round := func() int64 {
		before := traffic.asked.Load()
		for i := range 60 {
			written := putOne(t, writer, thing("a", fmt.Sprint(i)))
			for _, stream := range streams {
				if got := stream.change(); got.Version != written.Version {
					t.Fatalf("version %d, want %d", got.Version, written.Version)
				}
			}
		}
		return traffic.asked.Load() - before
	}
	streams = append(streams, followNow(t, r, thingType))
	one := round()
	for range 49 {
		streams = append(streams, followNow(t, r, thingType))
	}
	if fifty := round(); fifty > 2*one {
		t.Errorf("with 50 streams the database was asked with %d bytes, with one stream with %d", fifty, one)
	}
}

// TestD10_QueryReadsOnlyThePage: records that are counted, but not on the page, never leave the database.
func TestD10_QueryReadsOnlyThePage(t *testing.T) {
	t.Parallel()
	database := dbtest.New(t)
	r, traffic := startCounted(t, database)
	stream := followNow(t, r, thingType)
	const size = 64 << 10
	for i := range 40 {
		put(t, r, object(thingType, fmt.Sprintf("%02d", i), map[string]any{
			"kind": "x", "note": "needle", "bulk": string(bytes.Repeat([]byte{'a'}, size)), "$index": map[string]any{"cidr": "10.0.0.0/8"},
		}))
	}
	stream.changes(40) // now the replica has read them for its streams
	for name, request := range map[string]*databroker.QueryRequest{
		"type":       {Type: thingType},
		"everything": {},
		"text":       {Type: thingType, Query: "needle"},
		"field":      {Type: thingType, Filter: parseFilter(t, `{"kind": "x"}`)},
		"ids":        {Type: thingType, Filter: parseFilter(t, `{"$or": [{"id": "00"}, {"$index": "10.0.0.1"}]}`)},
	} {
		for _, limit := range []int64{0, 2} {
			before := traffic.answered.Load()
			request.Offset, request.Limit = 3, limit
			response, err := r.Query(testContext(t), request)
			if err != nil || response.TotalCount != 40 || len(response.Records) != int(limit) {
				t.Errorf("%s: %d of %d records, %v", name, len(response.GetRecords()), response.GetTotalCount(), err)
			}
			// Bytes come as hexadecimal digits at worst.
			if got, most := traffic.answered.Load()-before, 2*limit*size+size/2; got > most {
				t.Errorf("%s: %d bytes left the database for %d records of %d bytes", name, got, limit, size)
			}
		}
	}
}

// TestD40_PagesAreNotCutShort: a page has the records asked for, however large they are; whether the client
// can take them is the client's limit.
func TestD40_PagesAreNotCutShort(t *testing.T) {
	t.Parallel()
	b := start(t)
	for i := range 6 {
		put(t, b, newRecord(thingType, fmt.Sprint(i), wrapperspb.Bytes(make([]byte, 1<<20))))
	}
	request := &databroker.QueryRequest{Type: thingType, Limit: 6}
	response, err := b.Query(testContext(t), request, grpc.MaxCallRecvMsgSize(16<<20))
	if err != nil || len(response.Records) != 6 {
		t.Errorf("%d records, %v", len(response.GetRecords()), err)
	}
	_, err = b.Query(testContext(t), request)
	wantStatus(t, err, codes.ResourceExhausted, "")
	request.Limit = 3
	if response, err := b.Query(testContext(t), request); err != nil || len(response.Records) != 3 {
		t.Errorf("%d records, %v", len(response.GetRecords()), err)
	}
}

// TestManyStreamsOnOneConnection: proxies share a connection among a hundred streams.
func TestManyStreamsOnOneConnection(t *testing.T) {
	t.Parallel()
	b := start(t)
	from := position(t, b)
	var streams []*syncStream
	for range 150 {
		streams = append(streams, follow(t, b, from, thingType))
	}
	written := putOne(t, b, thing("a", "")) // on the same connection
	for _, stream := range streams {
		same(t, "change", stream.change(), written)
	}
}

// TestCompression: a client may ask for gzip.
func TestCompression(t *testing.T) {
	t.Parallel()
	b := start(t)
	compressed := grpc.UseCompressor(gzip.Name)
	written, err := b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{thing("a", "x")}}, compressed)
	if err != nil {
		t.Fatal(err)
	}
	response, err := b.Get(testContext(t), &databroker.GetRequest{Type: thingType, Id: "a"}, compressed)
	if err != nil {
		t.Fatal(err)
	}
	same(t, "Get", response.Record, written.Records[0])
	stream, err := b.SyncLatest(testContext(t), new(databroker.SyncLatestRequest), compressed)
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	same(t, "SyncLatest", first.GetRecord(), written.Records[0])
}

// TestNoSecretNoServer: a server that would admit everybody has to be asked for in as many words.
func TestNoSecretNoServer(t *testing.T) {
	t.Parallel()
	database, err := db.Open(t.Context(), db.Config{ConnString: "host=/nonexistent user=nobody dbname=none"})
	if err != nil {
		t.Fatal(err)
	}
	defer database.Close()
	for name, config := range map[string]server.Config{
		"no secret":     {DB: database},
		"empty secret":  {DB: database, Auth: auth.Config{Secrets: []string{""}}},
		"short secret":  {DB: database, Auth: auth.Config{Secrets: []string{"c2hvcnQ="}}},
		"missing file":  {DB: database, Auth: auth.Config{Files: []string{"/nonexistent/secret"}}},
		"empty, opened": {DB: database, Auth: auth.Config{Secrets: []string{""}}, AllowUnauthenticated: true},
	} {
		if _, err := server.New(config); err == nil {
			t.Errorf("%s: a server", name)
		}
	}
}
