package invariants

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// world is a load on replicas whose database changes under them, and what everybody was told meanwhile.
type world struct {
	t        testing.TB
	replicas []*servertest.Replica
	log      *syncWriter
	strict   bool // nothing may fail but as Unavailable

	ctx       context.Context
	stopWrite context.CancelFunc
	writers   *errgroup.Group
	readers   *errgroup.Group
	followers []*follower

	mu         sync.Mutex // protects what follows
	changed    *sync.Cond
	failed     bool
	told       map[uint64]string // what a version says, to whomever it was told
	acked      map[string]uint64 // the latest acknowledged version, by id
	writes     int               // acknowledged
	violations []string
}

const worldType = "t"

// newWorld starts replicas on a connection string, with followers and writers on each.
func newWorld(t testing.TB, replicas int, connString string) *world {
	t.Helper()
	w := newQuietWorld(t, replicas, connString)
	for i := range 2 * replicas {
		w.addFollower(w.replicas[i%replicas])
	}
	w.write()
	return w
}

// newQuietWorld starts replicas on a connection string.
func newQuietWorld(t testing.TB, replicas int, connString string) *world {
	t.Helper()
	return newQuietWorldWith(t, replicas, db.Config{ConnString: connString})
}

// newQuietWorldWith starts replicas on a database.
func newQuietWorldWith(t testing.TB, replicas int, config db.Config) *world {
	t.Helper()
	w := &world{t: t, log: &syncWriter{buffer: new(bytes.Buffer)}, told: make(map[uint64]string), acked: make(map[string]uint64)}
	w.changed = sync.NewCond(&w.mu)
	w.ctx = t.Context()
	w.readers = new(errgroup.Group)
	for range replicas {
		w.replicas = append(w.replicas, w.start(config, ""))
	}
	return w
}

func (w *world) addFollower(replica *servertest.Replica) {
	f := &follower{world: w, replica: replica}
	w.followers = append(w.followers, f)
	w.readers.Go(func() error { return w.noteFailure(f.follow(w.ctx)) })
}

// start starts a replica whose log the world keeps, on any address if none is given.
func (w *world) start(config db.Config, address string) *servertest.Replica {
	w.t.Helper()
	logger := slog.New(slog.NewTextHandler(w.log, nil))
	return servertest.Start(w.t, "", servertest.Options{
		Address:     address,
		Configure:   func(c *server.Config) { c.Logger = logger },
		ConfigureDB: func(c *db.Config) { config.MaxConns, config.Logger = 8, logger; *c = config },
	})
}

// write starts two writers on each replica.
func (w *world) write() {
	var ctx context.Context
	ctx, w.stopWrite = context.WithCancel(w.ctx)
	w.writers = new(errgroup.Group)
	for i := range 2 * len(w.replicas) {
		replica := w.replicas[i%len(w.replicas)]
		w.writers.Go(func() error { return w.noteFailure(w.writeTo(ctx, replica, i)) })
	}
}

// writeTo puts and deletes records of its own until ctx ends. What fails may have happened.
func (w *world) writeTo(ctx context.Context, replica *servertest.Replica, writer int) error {
	random := rand.New(rand.NewPCG(uint64(writer), 5))
	for n := 0; ctx.Err() == nil; n++ {
		record := newValue(fmt.Sprintf("%d/%d", writer, random.IntN(40)), fmt.Sprintf("%d by %d", n, writer))
		if random.IntN(4) == 0 {
			record.Data, record.DeletedAt = nil, timestamppb.Now()
		}
		response, err := replica.Put(w.ctx, &databroker.PutRequest{Records: []*databroker.Record{record}})
		switch {
		case err == nil:
			if version := response.Records[0].Version; version != 0 {
				w.tell(record, version)
				w.acknowledge(record.Id, version)
			}
		case status.Code(err) == codes.Unavailable, status.Code(err) == codes.DeadlineExceeded && !w.strict:
			if err := awaitServingIn(w.ctx, replica); err != nil {
				return err
			}
		default:
			return fmt.Errorf("put: %w", err)
		}
	}
	return nil
}

// newValue returns a record that says something.
func newValue(id, value string) *databroker.Record {
	data, err := anypb.New(wrapperspb.String(value))
	if err != nil {
		panic(err) // it is a string
	}
	return &databroker.Record{Type: worldType, Id: id, Data: data}
}

// tell notes what somebody was told that a version says: everybody is told the same, for ever.
func (w *world) tell(record *databroker.Record, version uint64) {
	says := fmt.Sprintf("%s %x", record.Id, record.Data.GetValue())
	if record.DeletedAt != nil {
		says = record.Id + " is deleted"
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if before, ok := w.told[version]; ok && before != says {
		w.violations = append(w.violations, fmt.Sprintf("version %d was issued twice: first %q, then %q", version, before, says))
	}
	w.told[version] = says
	w.changed.Broadcast()
}

func (w *world) acknowledge(id string, version uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.acked[id] = max(w.acked[id], version)
	w.writes++
	w.changed.Broadcast()
}

func (w *world) noteFailure(err error) error {
	if err != nil && w.ctx.Err() == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.violations = append(w.violations, err.Error())
		w.failed = true
		w.changed.Broadcast()
	}
	return nil
}

// await waits for a condition about what has been told.
func (w *world) await(condition func() bool) {
	w.t.Helper()
	late := time.AfterFunc(time.Minute, func() {
		_ = w.noteFailure(errors.New("nothing has happened for a minute"))
	})
	defer late.Stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	for !condition() && !w.failed {
		w.changed.Wait()
	}
	if w.failed {
		w.t.Fatalf("%s\n%s", strings.Join(w.violations, "\n"), w.log.String())
	}
}

// more waits for so many further acknowledged writes.
func (w *world) more(n int) {
	w.t.Helper()
	w.mu.Lock()
	until := w.writes + n
	w.mu.Unlock()
	w.await(func() bool { return w.writes >= until })
}

// observed waits until every follower has seen a change that is not older than all that is acknowledged now.
func (w *world) observed() {
	w.t.Helper()
	var latest uint64
	w.mu.Lock()
	for _, version := range w.acked {
		latest = max(latest, version)
	}
	w.mu.Unlock()
	w.awaitVersion(latest)
}

// awaitVersion waits until every follower has seen a version or a later one.
func (w *world) awaitVersion(version uint64) {
	w.t.Helper()
	w.await(func() bool {
		for _, f := range w.followers {
			if f.seen.Load() < version {
				return false
			}
		}
		return true
	})
}

// pause stops the writers, if there are any.
func (w *world) pause() {
	if w.writers == nil {
		return
	}
	w.stopWrite()
	_ = w.writers.Wait() // failures are noted
}

// put writes a record, again if the database is away for a moment, and returns its version.
func (w *world) put(replica *servertest.Replica, record *databroker.Record) uint64 {
	w.t.Helper()
	for {
		response, err := replica.Put(w.ctx, &databroker.PutRequest{Records: []*databroker.Record{record}})
		switch status.Code(err) {
		case codes.OK:
			return response.Records[0].Version
		case codes.Unavailable, codes.DeadlineExceeded:
			err = awaitServingIn(w.ctx, replica)
		}
		if err != nil {
			w.t.Fatalf("put: %v", err)
		}
	}
}

// end stops the writers and compares every follower's copy with the table of a server.
func (w *world) end(at *dbtest.Postgres) {
	w.t.Helper()
	w.pause()
	w.await(func() bool { return true })
	marker := w.put(w.replicas[0], newValue("marker", "end"))
	for _, f := range w.followers {
		f.until.Store(marker)
	}
	// The marker may have been delivered before its version was known: one more change wakes everybody.
	w.put(w.replicas[0], &databroker.Record{Type: "wake", Id: "up"})
	done := make(chan struct{})
	go func() {
		_ = w.readers.Wait() // failures are noted
		w.mu.Lock()
		defer w.mu.Unlock()
		close(done)
		w.changed.Broadcast()
	}()
	w.await(func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	})
	table := recordsOf(w.t, at)
	for i, f := range w.followers {
		for id, version := range table {
			if f.copied[id] != version {
				w.t.Errorf("follower %d has version %d of %s, the table %d", i, f.copied[id], id, version)
			}
		}
		for id, version := range f.copied {
			if _, ok := table[id]; !ok {
				w.t.Errorf("follower %d has version %d of %s, which does not exist", i, version, id)
			}
		}
	}
	for _, violation := range w.violations {
		w.t.Error(violation)
	}
	if w.t.Failed() {
		w.t.Logf("the replicas' log:\n%s", w.log.String())
	}
}

// resyncs returns how often each follower was told to start over.
func (w *world) resyncs() []int64 {
	var all []int64
	for _, f := range w.followers {
		all = append(all, f.resyncs.Load())
	}
	return all
}

// lost returns how many versions the replicas have reported as lost, in all.
func (w *world) lost() (n int64) {
	for _, r := range w.replicas {
		n += r.Server.FeedStats().VersionsLost
	}
	return n
}

// expectLoss checks that a loss was reported and that every follower has started over.
func (w *world) expectLoss() {
	w.t.Helper()
	if w.lost() == 0 || !strings.Contains(w.log.String(), "versions_lost=") {
		w.t.Errorf("%d versions are reported as lost, and the log says so: %v", w.lost(), strings.Contains(w.log.String(), "versions_lost="))
	}
	for i, n := range w.resyncs() {
		if n == 0 {
			w.t.Errorf("follower %d was not told to start over", i)
		}
	}
}

// expectNoLoss checks that nothing was reported and that nobody has started over.
func (w *world) expectNoLoss() {
	w.t.Helper()
	if n := w.lost(); n != 0 {
		w.t.Errorf("%d versions are reported as lost", n)
	}
	for i, n := range w.resyncs() {
		if n != 0 {
			w.t.Errorf("follower %d was told to start over %d times", i, n)
		}
	}
}

// expectRefusal lets all replicas dial anew, and checks that none of them goes to a server that they have
// left, although it is there and takes writes.
func (w *world) expectRefusal(left *dbtest.Postgres) {
	w.t.Helper()
	before := latestVersionOf(w.t, left)
	for i, r := range w.replicas {
		// It is told apart before anybody needs a connection.
		within(w.t, noticeTime, "the old server is known for what it is", func() bool { return r.DB.Hosts().Past > 0 })
		r.DB.Reset()
		value := newValue("after the old server came back", fmt.Sprint(i))
		value.Id = fmt.Sprint(value.Id, i)
		version := w.put(r, value)
		w.tell(value, version)
		got, err := r.Get(w.ctx, &databroker.GetRequest{Type: value.Type, Id: value.Id})
		if err != nil || got.Record.Version != version {
			w.t.Errorf("replica %d: got %v (%v), want version %d", i, got, err, version)
		}
	}
	if after := latestVersionOf(w.t, left); after != before {
		w.t.Errorf("the old server has new changes, up to %d instead of %d", after, before)
	}
	if !strings.Contains(w.log.String(), "was left for a newer one and is still there") {
		w.t.Error("the log does not say that the old server is there")
	}
}

// follower keeps a copy of all records of the world.
type follower struct {
	world   *world
	replica *servertest.Replica

	seen    atomic.Uint64 // latest version
	resyncs atomic.Int64  // how often it was told to start over
	copies  atomic.Int64  // how often it has made a copy
	until   atomic.Uint64 // stop there; 0 until it is known

	serverVersion, version uint64
	copied                 map[string]uint64
}

// follow syncs until it has seen what it is to see.
func (f *follower) follow(ctx context.Context) error {
	for {
		err := f.latest(ctx)
		if err == nil {
			err = f.changes(ctx)
		}
		switch status.Code(err) {
		case codes.OK:
			if f.done() {
				return nil
			}
		case codes.Aborted:
			f.serverVersion = 0
			f.resyncs.Add(1)
		case codes.Unavailable, codes.DeadlineExceeded:
			if f.world.strict {
				return fmt.Errorf("a stream has ended: %w", err)
			}
			if err := awaitServingIn(ctx, f.replica); err != nil {
				return err
			}
		default:
			return fmt.Errorf("follow: %w", err)
		}
	}
}

func (f *follower) done() bool {
	until := f.until.Load()
	return until != 0 && f.version >= until
}

// latest makes a new copy if there is none.
func (f *follower) latest(ctx context.Context) error {
	if f.serverVersion != 0 {
		return nil
	}
	stream, err := f.replica.SyncLatest(ctx, &databroker.SyncLatestRequest{Type: worldType})
	if err != nil {
		return err
	}
	copied := make(map[string]uint64)
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if record := response.GetRecord(); record != nil {
			f.world.tell(record, record.Version)
			copied[record.Id] = record.Version
		}
		if versions := response.GetVersions(); versions != nil {
			f.copied, f.serverVersion, f.version = copied, versions.ServerVersion, versions.LatestRecordVersion
			f.copies.Add(1)
			f.advance()
		}
	}
}

// changes follows one stream until it ends, or until all is seen.
func (f *follower) changes(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := f.replica.Sync(ctx, &databroker.SyncRequest{ServerVersion: f.serverVersion, RecordVersion: f.version})
	if err != nil {
		return err
	}
	for !f.done() {
		response, err := stream.Recv()
		if err != nil {
			return err
		}
		record := response.GetRecord()
		switch {
		case record == nil: // options
			continue
		case record.Version <= f.version:
			return fmt.Errorf("version %d after %d", record.Version, f.version)
		case record.Type != worldType:
		case record.DeletedAt != nil:
			delete(f.copied, record.Id)
		default:
			f.copied[record.Id] = record.Version
		}
		if record.Type == worldType {
			f.world.tell(record, record.Version)
		}
		f.version = record.Version
		f.advance()
	}
	return nil
}

func (f *follower) advance() {
	f.seen.Store(f.version)
	f.world.mu.Lock()
	defer f.world.mu.Unlock()
	f.world.changed.Broadcast()
}

// awaitServingIn waits until a replica can be asked again.
func awaitServingIn(ctx context.Context, r *servertest.Replica) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := r.Health.Watch(ctx, new(grpc_health_v1.HealthCheckRequest), grpc.WaitForReady(true))
	for err == nil {
		var response *grpc_health_v1.HealthCheckResponse
		if response, err = stream.Recv(); err == nil && response.Status == grpc_health_v1.HealthCheckResponse_SERVING {
			return nil
		}
	}
	return fmt.Errorf("await health: %w", err)
}

// ask runs a query on a server, past all replicas.
func ask[T any](t testing.TB, p *dbtest.Postgres, sql string) (v T) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), p.ConnString())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if err := conn.QueryRow(t.Context(), sql).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

func latestVersionOf(t testing.TB, p *dbtest.Postgres) int64 {
	t.Helper()
	return ask[int64](t, p, `SELECT latest_version FROM pgbroker.versions`)
}

// recordsOf returns the records of the world on a server.
func recordsOf(t testing.TB, p *dbtest.Postgres) map[string]uint64 {
	t.Helper()
	return ask[map[string]uint64](t, p, `SELECT coalesce(jsonb_object_agg(id, version), '{}') FROM pgbroker.records WHERE type = '`+worldType+`'`)
}
