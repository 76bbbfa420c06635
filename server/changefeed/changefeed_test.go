package changefeed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"pgbroker/db"
	"pgbroker/db/dbtest"
)

// patience is how long a test waits for what a sound feed does at once.
const patience = 30 * time.Second

// fixture is a feed that runs on a database of its own.
type fixture struct {
	*Feed
	t        *testing.T
	ctx      context.Context
	database *dbtest.Database
	pool     *db.DB
	faults   faulty
	stop     func()
	encoded  atomic.Int64 // calls of Encode
	services atomic.Int64 // calls of OnServices
	state    db.StateGetRow
}

// size of each encoded change.
const size = 100

// newFixture starts a feed. Without notifications it looks for changes when it is woken or polls.
func newFixture(t *testing.T, configure func(*Config)) *fixture {
	t.Helper()
	f := &fixture{t: t, database: dbtest.New(t)}
	var err error
	if f.pool, err = db.Open(t.Context(), db.Config{ConnString: f.database.ConnString, MaxConns: 4}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.pool.Close)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	f.ctx = ctx
	f.faults.DBTX = f.pool
	config := Config{
		Queries: db.New(&f.faults),
		Listen:  f.pool.Listen,
		Settle:  f.pool.Settle,
		Encode: func(row *db.ChangesAfterRow) []byte {
			f.encoded.Add(1)
			return fmt.Appendf(nil, "%-*s", size, fmt.Sprint(row.Version, row.ID, row.Deleted))
		},
		OnServices:   func() { f.services.Add(1) },
		PollInterval: time.Hour, // what is found is found because it was announced
		Logger:       slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	if configure != nil {
		configure(&config)
	}
	f.Feed = New(config)
	if f.Err() == nil || f.Options() != nil {
		t.Error("a feed that has not run yet claims to know something")
	}
	running, end := context.WithCancel(ctx)
	stopped := make(chan error, 1)
	go func() { stopped <- f.Run(running) }()
	f.stop = sync.OnceFunc(func() {
		end()
		if err := <-stopped; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(func() { f.stop(); cancel() })
	f.await("the first read", func() bool { return f.Err() == nil })
	f.load()
	return f
}

func (f *fixture) load() {
	f.t.Helper()
	var err error
	if f.state, err = f.config.Queries.StateGet(f.ctx); err != nil {
		f.t.Fatal(err)
	}
}

// await waits for a condition on what the feed shows.
func (f *fixture) await(what string, condition func() bool) {
	f.t.Helper()
	for {
		changed := f.Watch()
		if condition() {
			return
		}
		select {
		case <-changed:
		case <-time.After(10 * time.Millisecond): // some of it is told by no event
		case <-f.ctx.Done():
			f.t.Fatalf("waited in vain for %s", what)
		}
	}
}

// write puts records of type "t" by SQL and returns when the feed knows of them.
func (f *fixture) write(ids ...string) {
	f.t.Helper()
	f.writeType("t", ids...)
}

func (f *fixture) writeType(recordType string, ids ...string) {
	f.t.Helper()
	for _, id := range ids {
		f.database.Exec(f.t, `INSERT INTO pgbroker.records (type, id) VALUES ($1, $2)
			ON CONFLICT (type, id) DO UPDATE SET index_cidr = NULL`, recordType, id)
	}
	f.catchUp()
}

func (f *fixture) catchUp() {
	f.t.Helper()
	f.load()
	f.await("what was written", func() bool { return f.Stats().Head >= f.state.LatestVersion })
}

// open opens a cursor at the end of the log.
func (f *fixture) open(recordType string) *Cursor {
	f.t.Helper()
	f.load()
	return f.openAt(f.state.LatestVersion, recordType)
}

// follow has the feed keep the changes of all types in its ring from now on: the read under way may have begun before.
func (f *fixture) follow() {
	f.t.Helper()
	f.open("")
	f.writeType("followed", "x")
}

func (f *fixture) openAt(version int64, recordType string) *Cursor {
	f.t.Helper()
	c, err := f.Open(f.ctx, f.state.ServerVersion, version, recordType)
	if err != nil {
		f.t.Fatalf("open at %d: %v", version, err)
	}
	return c
}

// drain returns the versions of all that a cursor has, without waiting, and checks their order.
func (f *fixture) drain(c *Cursor) (versions []int64) {
	f.t.Helper()
	for {
		event, err := c.Next(f.ctx, false)
		if err != nil {
			f.t.Fatalf("next: %v", err)
		}
		if len(event.Changes) == 0 && event.Options == nil {
			return versions
		}
		for _, change := range event.Changes {
			if n := len(versions); n > 0 && change.Version <= versions[n-1] {
				f.t.Fatalf("version %d after %d", change.Version, versions[n-1])
			}
			versions = append(versions, change.Version)
		}
	}
}

// log returns the versions of the change log after one, of a type or of all.
func (f *fixture) log(after int64, recordType string) []int64 {
	f.t.Helper()
	rows, err := f.database.Pool.Query(f.ctx,
		"SELECT version FROM pgbroker.changes WHERE version > $1 AND ($2 = '' OR type = $2) ORDER BY version", after, recordType)
	if err != nil {
		f.t.Fatal(err)
	}
	versions, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		f.t.Fatal(err)
	}
	return versions
}

func (f *fixture) wantDrained(c *Cursor, after int64, recordType string) {
	f.t.Helper()
	if got, want := f.drain(c), f.log(after, recordType); !slices.Equal(got, want) {
		f.t.Errorf("got %v, want %v", got, want)
	}
}

func ids(prefix string, n int) []string {
	ids := make([]string, n)
	for i := range ids {
		ids[i] = fmt.Sprint(prefix, i)
	}
	return ids
}

// TestRing: cursors inside of the ring read memory, all of them the same bytes; of a type, of all, from the middle.
func TestRing(t *testing.T) {
	t.Parallel()
	f := newFixture(t, nil)
	f.follow()
	start, held := f.state.LatestVersion, f.Stats().RingBytes
	all, typed := f.open(""), f.open("t")
	f.writeType("t", ids("a", 3)...)
	f.writeType("other", "b")
	f.writeType("t", "a0")
	encoded, reads := f.encoded.Load(), f.Stats().TableReads
	var first, second Event
	var err error
	if first, err = all.Next(f.ctx, true); err != nil {
		t.Fatal(err)
	}
	if second, err = typed.Next(f.ctx, true); err != nil {
		t.Fatal(err)
	}
	// The ring is a record of what was announced, so it also has what is superseded.
	if len(first.Changes) < 4 || len(second.Changes) != len(first.Changes)-1 {
		t.Errorf("%d changes of all types and %d of one", len(first.Changes), len(second.Changes))
	}
	if first.Options == nil || second.Options == nil {
		t.Error("the first event has no options")
	}
	if first.Changes[0] != second.Changes[0] {
		t.Error("two streams do not share a change")
	}
	middle := f.openAt(first.Changes[1].Version, "")
	if event, err := middle.Next(f.ctx, true); err != nil || len(event.Changes) != len(first.Changes)-2 {
		t.Errorf("from the middle: %d changes, %v", len(event.Changes), err)
	}
	if f.encoded.Load() != encoded || f.Stats().TableReads != reads {
		t.Error("reading the ring has read the table")
	}
	if got := f.Stats(); got.RingBytes != held+len(first.Changes)*(size+changeOverhead) || !got.Listening || got.Unannounced != 0 {
		t.Errorf("stats: %+v", got)
	}
	if f.Stats().Head <= start {
		t.Error("the head has not moved")
	}
}

// TestOnlyWhatIsFollowedIsRead: of types that no cursor follows no payload is read; who follows one later finds in the table
// what was passed over, and from then on in the ring. Cursors of other types do not wake up.
func TestOnlyWhatIsFollowedIsRead(t *testing.T) {
	t.Parallel()
	f := newFixture(t, nil)
	start := f.state.LatestVersion
	typed := f.open("t")
	f.drain(typed)
	f.writeType("other", "first") // from now on the type is known
	before := f.view.Load()
	f.writeType("other", ids("a", 5)...)
	if got := f.encoded.Load(); got != 0 {
		t.Errorf("%d changes were read that nobody follows", got)
	}
	select {
	case <-before.turned:
		t.Error("cursors of all types were woken")
	default:
	}
	if r := before.ring("t"); r.grown != f.view.Load().ring("t").grown {
		t.Error("cursors of another type were woken")
	}
	reads := f.Stats().TableReads
	f.write("b")
	f.wantDrained(typed, start, "t")
	other, all := f.openAt(start, "other"), f.openAt(start, "")
	f.wantDrained(other, start, "other")
	f.wantDrained(all, start, "")
	if f.Stats().TableReads == reads {
		t.Error("what was passed over did not come from the table")
	}
	f.writeType("other", "again") // the read under way may have begun before they were there
	f.drain(other)
	f.drain(all)
	end := f.state.LatestVersion
	f.writeType("other", "c")
	reads = f.Stats().TableReads
	for _, c := range []*Cursor{other, all} {
		if event, err := c.Next(f.ctx, true); err != nil || len(event.Changes) != 1 || event.Changes[0].Version <= end {
			t.Errorf("%+v, %v", event, err)
		}
	}
	if f.Stats().TableReads != reads {
		t.Error("what is followed did not come from the ring")
	}
	other.Close()
	all.Close()
	f.writeType("other", "last") // as before
	encoded := f.encoded.Load()
	f.writeType("other", "d")
	if f.encoded.Load() != encoded {
		t.Error("a closed cursor still has its changes read")
	}
}

// TestRingIsBounded: it lets go of its oldest changes; a cursor behind it reads the table until it is inside again, and
// views that are older read on undisturbed.
func TestRingIsBounded(t *testing.T) {
	t.Parallel()
	const held = 5
	f := newFixture(t, func(c *Config) { c.RingBytes = held * (size + changeOverhead) })
	f.follow()
	start := f.state.LatestVersion
	behind := f.open("t")
	f.write(ids("a", held)...)
	before := f.view.Load()
	f.write(ids("b", 40)...)
	if got := f.Stats().RingBytes; got > held*(size+changeOverhead) {
		t.Errorf("the ring holds %d bytes", got)
	}
	for i, change := range before.all.changes[1:] {
		if change.Version <= before.all.changes[i].Version || change.Version > before.head {
			t.Error("a view that was replaced has changed")
		}
	}
	v := f.view.Load()
	if ring := v.all; len(ring.changes) != held || ring.changes[held-1].Version != v.head || ring.base >= ring.changes[0].Version {
		t.Errorf("the ring has %d changes in (%d, %d]", len(ring.changes), ring.base, v.head)
	}
	reads := f.Stats().TableReads
	f.wantDrained(behind, start, "t")
	if f.Stats().TableReads == reads {
		t.Error("a cursor behind the ring has not read the table")
	}
	// From wherever a cursor comes, it gets what follows, no more and no less.
	for version := v.all.base - 3; version <= v.head; version++ {
		f.wantDrained(f.openAt(version, ""), version, "")
	}
	// At the very edge: the change right after the base is the first one in the ring.
	if got, want := len(f.drain(f.openAt(v.all.base, ""))), held; got != want {
		t.Errorf("from the base: %d changes, want %d", got, want)
	}
}

// TestOneChangeLargerThanTheRing: the newest change is always in the ring.
func TestOneChangeLargerThanTheRing(t *testing.T) {
	t.Parallel()
	f := newFixture(t, func(c *Config) { c.RingBytes = 1 })
	f.follow()
	c := f.open("t")
	f.write("a")
	f.write("b")
	if v := f.view.Load(); len(v.all.changes) != 1 {
		t.Errorf("the ring has %d changes, want 1", len(v.all.changes))
	}
	if got := f.drain(c); len(got) != 2 {
		t.Errorf("got %v", got)
	}
}

// TestPagesOfTheTable: what is behind the ring is read in pages bounded by rows and bytes, none lost between them.
func TestPagesOfTheTable(t *testing.T) {
	t.Parallel()
	f := newFixture(t, func(c *Config) { c.RingBytes = 1 })
	f.database.Exec(t, `INSERT INTO pgbroker.records (type, id, payload)
		SELECT CASE WHEN g % 3 = 0 THEN 'other' ELSE 't' END, g::text, convert_to(repeat('x', 1500), 'UTF8') FROM generate_series(1, 1000) g`)
	f.database.Exec(t, "DELETE FROM pgbroker.records WHERE id LIKE '%7'")
	f.catchUp()
	for _, recordType := range []string{"", "t", "other", "none"} {
		c := f.openAt(0, recordType)
		f.wantDrained(c, 0, recordType)
		event, err := f.openAt(0, recordType).Next(f.ctx, false)
		if err != nil || len(event.Changes) > maxNextChanges || len(event.Changes) > 200 { // 256 kB
			t.Errorf("%q: a page of %d changes, %v", recordType, len(event.Changes), err)
		}
	}
}

// TestRewind: what a cursor is told to return again it returns again, from the ring and from the table, and in smaller pages.
func TestRewind(t *testing.T) {
	t.Parallel()
	for name, ring := range map[string]int{"ring": 1 << 20, "table": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, func(c *Config) { c.RingBytes = ring })
			c := f.open("t")
			f.write(ids("a", 50)...)
			event, err := c.Next(f.ctx, true)
			for err == nil && len(event.Changes) == 0 {
				event, err = c.Next(f.ctx, true)
			}
			if err != nil || len(event.Changes) < 40 {
				t.Fatalf("%d changes, %v", len(event.Changes), err)
			}
			at := event.Changes[2].Version
			c.Rewind(at, 3)
			next, err := c.Next(f.ctx, true)
			if err != nil || len(next.Changes) == 0 || next.Changes[0].Version != event.Changes[3].Version {
				t.Fatalf("after a rewind: %v, %v", next, err)
			}
			if name == "table" && len(next.Changes) != 3 {
				t.Errorf("%d changes are read for one who took 3", len(next.Changes))
			}
			c.Rewind(at, 0)
			f.wantDrained(c, at, "t")
		})
	}
}

// TestWaiting: a cursor at the end waits, and hears of a change, of options, of a Clear, of the end of its context and of
// the end of the feed.
func TestWaiting(t *testing.T) {
	t.Parallel()
	f := newFixture(t, nil)
	next := func(c *Cursor, ctx context.Context) <-chan error {
		result := make(chan error, 1)
		go func() {
			_, err := c.Next(ctx, true)
			result <- err
		}()
		return result
	}
	open := func() *Cursor {
		c := f.open("t")
		f.drain(c) // the options of the moment
		return c
	}
	want := func(what string, got <-chan error, want error) {
		t.Helper()
		select {
		case err := <-got:
			if !errors.Is(err, want) {
				t.Errorf("%s: got %v, want %v", what, err, want)
			}
		case <-f.ctx.Done():
			t.Errorf("%s: waited in vain", what)
		}
	}
	waiting := next(open(), f.ctx)
	f.write("a")
	want("a change", waiting, nil)

	waiting = next(open(), f.ctx)
	f.database.Exec(t, "INSERT INTO pgbroker.record_types (type, capacity) VALUES ('t', 5) ON CONFLICT (type) DO UPDATE SET capacity = 5")
	want("options", waiting, nil)
	if got := f.Options().Types["t"].Capacity; got == nil || *got != 5 {
		t.Errorf("capacity %v", got)
	}

	ctx, cancel := context.WithCancel(f.ctx)
	waiting = next(open(), ctx)
	cancel()
	want("the end of its context", waiting, context.Canceled)

	waiting = next(open(), f.ctx)
	f.database.Exec(t, "TRUNCATE pgbroker.records")
	want("a clear", waiting, ErrDataSetChanged)

	f.load()
	waiting = next(open(), f.ctx)
	f.stop()
	want("the end of the feed", waiting, ErrStopped)
	if _, err := f.Open(f.ctx, f.state.ServerVersion, 0, ""); !errors.Is(err, ErrStopped) && !errors.Is(err, ErrPurged) {
		t.Errorf("open after the end: %v", err)
	}
}

// TestReasonsToStartOver: when a cursor opens, and when it is open already.
func TestReasonsToStartOver(t *testing.T) {
	t.Parallel()
	f := newFixture(t, func(c *Config) { c.RingBytes = 1 })
	open := func(serverVersion, version int64, recordType string) error {
		_, err := f.Open(f.ctx, serverVersion, version, recordType)
		return err
	}
	f.write(ids("a", 10)...)
	f.database.Exec(t, "DELETE FROM pgbroker.records WHERE id = 'a3'")
	f.write("a4", "a5")
	old := f.openAt(1, "t")
	if err := open(f.state.ServerVersion+1, 1, "t"); !errors.Is(err, ErrDataSetChanged) {
		t.Errorf("another server version: %v", err)
	}
	if err := open(0, 0, "t"); !errors.Is(err, ErrDataSetChanged) {
		t.Errorf("no server version: %v", err)
	}
	// A version of the future is that of a faster replica.
	ahead := f.openAt(f.state.LatestVersion+1000, "t")
	if got := f.drain(ahead); len(got) != 0 {
		t.Errorf("from the future: %v", got)
	}

	f.database.Exec(t, "UPDATE pgbroker.record_types SET purged_version = 5 WHERE type = 't'")
	if err := open(f.state.ServerVersion, 4, "t"); !errors.Is(err, ErrPurged) {
		t.Errorf("before what was purged: %v", err)
	}
	if err := open(f.state.ServerVersion, 4, ""); !errors.Is(err, ErrPurged) {
		t.Errorf("of all types, before what was purged: %v", err)
	}
	if err := open(f.state.ServerVersion, 5, "t"); err != nil {
		t.Errorf("just behind what was purged: %v", err)
	}
	if err := open(f.state.ServerVersion, 4, "other"); err != nil {
		t.Errorf("of another type: %v", err)
	}
	if _, err := old.Next(f.ctx, true); !errors.Is(err, ErrPurged) {
		t.Errorf("a cursor that is open: %v", err)
	}

	lost := f.openAt(f.state.LatestVersion-3, "t") // behind the ring
	f.database.Exec(t, `INSERT INTO pgbroker.epochs (first_version, last_version, system_identifier, timeline)
		VALUES ($1, $2, 1, 1)`, f.state.LatestVersion+1000, f.state.LatestVersion-4)
	if err := open(f.state.ServerVersion, f.state.LatestVersion-1, "t"); !errors.Is(err, ErrLost) {
		t.Errorf("in a hole: %v", err)
	}
	if _, err := lost.Next(f.ctx, false); !errors.Is(err, ErrLost) {
		t.Errorf("a cursor in a hole: %v", err)
	}
}

// TestSlowFeed: a cursor whose client knows of a data set, or of a change, that the feed has not heard of yet, waits for the
// feed to hear of it.
func TestSlowFeed(t *testing.T) {
	t.Parallel()
	// It listens elsewhere, and hears nothing by itself.
	f := newFixture(t, func(c *Config) {
		elsewhere := dbtest.New(t)
		c.Listen = func(ctx context.Context) (*pgx.Conn, error) { return pgx.Connect(ctx, elsewhere.ConnString) }
	})
	// At once, for it may still be at a read that its start has asked for.
	f.database.Exec(t, "DO $$ BEGIN TRUNCATE pgbroker.records; INSERT INTO pgbroker.records (type, id) VALUES ('t', 'a'); END $$")
	f.load()
	c := f.openAt(0, "t") // the feed has to read to let it in
	if got := f.Stats().Head; got != f.state.LatestVersion {
		t.Errorf("the head is %d, want %d", got, f.state.LatestVersion)
	}
	if got := f.drain(c); len(got) != 1 {
		t.Errorf("got %v", got)
	}
	f.database.Exec(t, "INSERT INTO pgbroker.records (type, id) VALUES ('t', 'b')")
	f.load()
	f.openAt(f.state.LatestVersion+1, "t") // from a faster replica: the feed is to look
	f.await("the feed to look", func() bool { return f.Stats().Head == f.state.LatestVersion })
	// Without waiting the table is asked, whatever the feed knows.
	behind := f.openAt(f.state.LatestVersion, "t")
	f.database.Exec(t, "INSERT INTO pgbroker.records (type, id) VALUES ('t', 'c')")
	if got := f.drain(behind); len(got) != 1 {
		t.Errorf("without waiting: %v", got)
	}
}

// TestLargeTransactions: what does not fit into one read of the tailer is read at once all the same.
func TestLargeTransactions(t *testing.T) {
	t.Parallel()
	f := newFixture(t, nil)
	c := f.open("t")
	start := f.state.LatestVersion
	reads := f.Stats().TailReads
	f.database.Exec(t, fmt.Sprintf("INSERT INTO pgbroker.records (type, id) SELECT 't', g::text FROM generate_series(1, %d) g", 2*tailRows+10))
	f.catchUp()
	if got := f.Stats().TailReads - reads; got < 3 {
		t.Errorf("%d reads", got)
	}
	f.wantDrained(c, start, "t")
}

// TestTheDatabaseGoesAway: the feed says so, cursors wait, and both go on when it is back; nobody is told to start over.
func TestTheDatabaseGoesAway(t *testing.T) {
	t.Parallel()
	f := newFixture(t, func(c *Config) { c.PollInterval = 20 * time.Millisecond })
	inside, behind := f.open("t"), f.openAt(0, "t")
	f.write("a")
	f.drain(inside)
	// Not a single statement succeeds, whoever asks, until the schema is back.
	f.database.Exec(t, "ALTER SCHEMA pgbroker RENAME TO gone")
	f.await("an error", func() bool { return f.Err() != nil })
	waiting := make(chan error, 2)
	for _, c := range []*Cursor{inside, behind} {
		go func() {
			event, err := c.Next(f.ctx, true)
			for err == nil && len(event.Changes) == 0 {
				event, err = c.Next(f.ctx, true)
			}
			waiting <- err
		}()
	}
	if _, err := f.Open(f.ctx, f.state.ServerVersion, 0, "t"); err == nil {
		t.Error("a cursor opens without a database")
	}
	f.database.Exec(t, "ALTER SCHEMA gone RENAME TO pgbroker")
	f.await("recovery", func() bool { return f.Err() == nil })
	f.write("b")
	for range 2 {
		if err := <-waiting; err != nil {
			t.Error(err)
		}
	}
}

// TestTheOrderLockDoesNotKeepAFeedFromStarting: whoever holds it for long blocks writers, and nobody else.
func TestTheOrderLockDoesNotKeepAFeedFromStarting(t *testing.T) {
	t.Parallel()
	var holder pgx.Tx
	f := newFixture(t, func(c *Config) {
		f := c.Queries
		state, err := f.StateGet(t.Context())
		if err != nil || state.ServerVersion == 0 {
			t.Fatal(err)
		}
		conn, err := c.Listen(t.Context()) // any connection
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close(context.Background()) })
		if holder, err = conn.Begin(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := holder.Exec(t.Context(), "SET idle_in_transaction_session_timeout = 0; SELECT pgbroker.lock_order()"); err != nil {
			t.Fatal(err)
		}
	})
	f.drain(f.open("t"))
	if err := holder.Rollback(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestAnEpochBegins: a feed that finds another server than that of the latest write begins its epoch without waiting for one.
func TestAnEpochBegins(t *testing.T) {
	t.Parallel()
	f := newFixture(t, func(c *Config) {
		rows, err := c.Queries.StateGet(t.Context())
		if err != nil || rows.ServerVersion == 0 {
			t.Fatal(err)
		}
		conn, err := c.Listen(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		if _, err := conn.Exec(t.Context(), "UPDATE pgbroker.state SET timeline = timeline + 1"); err != nil {
			t.Fatal(err)
		}
	})
	var epochs int
	if err := f.database.Pool.QueryRow(f.ctx, "SELECT count(*) FROM pgbroker.epochs").Scan(&epochs); err != nil || epochs != 1 {
		t.Errorf("%d epochs, %v", epochs, err)
	}
}

// TestLostChanges: a feed that has served what the database does not have any more replaces the server version.
func TestLostChanges(t *testing.T) {
	t.Parallel()
	f := newFixture(t, nil)
	f.write("a", "b")
	before := f.state.ServerVersion
	c := f.open("t")
	f.drain(c)
	// As if a standby had been promoted that lacks the last change.
	f.database.AdminExec(t, "SET session_replication_role = replica; DELETE FROM pgbroker.changes WHERE version = (SELECT max(version) FROM pgbroker.changes)")
	f.Wake()
	f.await("another server version", func() bool { return f.view.Load().serverVersion != before })
	if _, err := c.Next(f.ctx, true); !errors.Is(err, ErrDataSetChanged) {
		t.Errorf("got %v", err)
	}
	f.load()
	if f.view.Load().serverVersion != f.state.ServerVersion {
		t.Error("the feed follows another data set than the database has")
	}
}

// TestServices: the other channel wakes its own listener, at the start too.
func TestServices(t *testing.T) {
	t.Parallel()
	f := newFixture(t, nil)
	f.await("the first wake-up", func() bool { return f.services.Load() > 0 })
	reads := f.Stats().TailReads
	const wakeUps = 10
	for range wakeUps {
		before := f.services.Load()
		f.database.Exec(t, "NOTIFY pgbroker_services")
		f.await("a wake-up", func() bool { return f.services.Load() > before })
	}
	// The start may still have asked for a read.
	if got := f.Stats().TailReads; got-reads >= wakeUps/2 {
		t.Errorf("the change log was read %d times for it", got-reads)
	}
}

// TestListenerReconnects: cut, it comes back, and finds what was announced meanwhile.
func TestListenerReconnects(t *testing.T) {
	t.Parallel()
	f := newFixture(t, nil)
	f.await("the listener", func() bool { return f.Stats().Listening })
	c := f.open("t")
	f.drain(c)
	for round := range 3 {
		connects := f.Stats().Connects
		if n := f.database.TerminateBackends(t, "pgbroker-listener"); n != 1 {
			t.Fatalf("%d listeners", n)
		}
		f.database.Exec(t, "INSERT INTO pgbroker.records (type, id) VALUES ('t', $1)", fmt.Sprint(round))
		f.await("another connection", func() bool { return f.Stats().Connects > connects })
		event, err := c.Next(f.ctx, true)
		if err != nil || len(event.Changes) != 1 {
			t.Fatalf("%v, %v", event, err)
		}
	}
}
