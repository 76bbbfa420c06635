// Package db is the way to Postgres: a pool of connections that survives what
// happens to servers (DB, written by hand), and the queries (Queries, generated
// by sqlc from the directory queries).
package db

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Config says how to reach Postgres. Whatever a connection string itself sets,
// be it about the session or the pool, has precedence over the fields here;
// but not over what statements rely on to mean what they mean (see Settings).
type Config struct {
	// ConnString is a connection string as libpq has it, a URI or keywords and
	// values, with the pool settings of pgxpool (pool_max_conns and others).
	// Several hosts without target_session_attrs mean read-write. Either this
	// or ConnStringFile is needed.
	ConnString string

	// ConnStringFile is the path of a file that holds the connection string.
	// It is read again for every new connection, so that a password can
	// change; so are the files that a connection string names.
	ConnStringFile string

	// ListenerConnString and ListenerConnStringFile are the same for the
	// connections that must not go through a pooler in transaction mode: that
	// of Listen and those of migrations. Both empty: the main one.
	ListenerConnString     string
	ListenerConnStringFile string

	// MaxConns is the size of the pool. Zero: the number of CPUs, but at least
	// 10. The connection of Listen comes on top.
	MaxConns int

	// MinConns is the number of connections that are kept open. Zero: none.
	MinConns int

	// StatementTimeout ends statements that take longer. Zero: 8 s, which is
	// less than clients wait, so that they learn what is wrong. Negative: what
	// the server has set. A server that has not even said that by half as much
	// again is out of reach: then a statement without a deadline of its own
	// fails, and the pool is given up.
	StatementTimeout time.Duration

	// LockTimeout ends statements that wait for a lock longer. Zero: 5 s.
	// Negative: what the server has set.
	LockTimeout time.Duration

	// IdleInTransactionTimeout ends sessions that leave a transaction open and
	// do nothing, for others wait for it. Zero: 10 s. Negative: what the server
	// has set.
	IdleInTransactionTimeout time.Duration

	// ApplicationName is what Postgres shows of the sessions. Empty:
	// "pgbroker". The connection of Listen has "-listener" appended.
	ApplicationName string

	// Pooler says that ConnString leads through a pooler like PgBouncer, in
	// whatever mode. Then nothing is kept in a session nor asked for when one
	// opens: each statement brings the settings above with it, in a transaction
	// of its own that costs no further round trip, and the server behind the
	// pooler is checked each time. The connection of Listen and those of
	// migrations go there, too, if they have no connection string of their own;
	// they need a pooler in session mode.
	Pooler bool

	// Logger is told when the server is lost and when it is back, and about
	// doubtful settings. Nil: nothing is logged.
	Logger *slog.Logger
}

const (
	defaultStatementTimeout         = 8 * time.Second
	defaultLockTimeout              = 5 * time.Second
	defaultIdleInTransactionTimeout = 10 * time.Second
	defaultApplicationName          = "pgbroker"

	// defaultConnectTimeout is for one host of several: without it a host that
	// does not answer would hide the next one.
	defaultConnectTimeout = 5 * time.Second

	// defaultMaxConns is enough for a server to keep what it does apart.
	defaultMaxConns = 10

	// Connections do not live for ever, so that they spread over servers, and
	// passwords and certificates that have expired go out of use.
	defaultMaxConnLifetime = 30 * time.Minute

	// defaultPingTimeout is for the ping of a connection that has been idle:
	// one that leads nowhere is not waited for.
	defaultPingTimeout = time.Second

	// pingAfter is how long a connection is idle before it is pinged.
	pingAfter = time.Second

	// answerPatience is how long a new connection may take that is to tell
	// whether those that do not answer are to blame.
	answerPatience = 2 * time.Second

	// unansweredTime is how long a statement has gone without an answer, at
	// least, when its connection is closed because new ones work.
	unansweredTime = time.Second

	// resetInterval is the least time between two resets of the pool, should
	// even new connections turn out to be of no use.
	resetInterval = time.Second
)

// DB is a pool of connections to Postgres that survives what happens to
// servers: when one fails, restarts or loses its role, connections to it are
// given up, and further use dials anew, slowly while nobody answers. Errors
// then satisfy IsUnavailable; Retry and RetryRead repeat what may be repeated.
type DB struct {
	*pgxpool.Pool

	cfg      Config
	log      *slog.Logger
	main     *source
	listener *source // the same as main, or another
	fence    *fence
	pooler   *pooler // nil: there is none
	pulse    pulse
	looked   atomic.Bool // for a pooler
	lookout  *lookout

	closing context.Context // ends with the DB
	close   context.CancelFunc
	proving atomic.Bool // a doubt is being looked into
	proofs  sync.WaitGroup

	readOnly   atomic.Bool  // a new connection leads to a server that takes no writes, when last tried by Condition
	generation atomic.Int64 // counts resets; a connection knows its own
	mu         sync.Mutex   // protects lastReset
	lastReset  time.Time
}

// Open returns a DB. It does not need the server, which may come up later, but
// refuses a configuration that cannot be right. Its errors do not repeat
// connection strings, which may hold passwords.
func Open(ctx context.Context, cfg Config) (*DB, error) {
	d := &DB{cfg: cfg, log: cfg.Logger}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	d.fence = newFence(d.log, d.leave)
	switch {
	case cfg.MaxConns < 0 || cfg.MaxConns > 1e6:
		return nil, fmt.Errorf("db: maximum of connections: got %d, allowed 0 (default) to 1000000", cfg.MaxConns)
	case cfg.MinConns < 0 || cfg.MinConns > 1e6:
		return nil, fmt.Errorf("db: minimum of connections: got %d, allowed 0 to 1000000", cfg.MinConns)
	}

	var err error
	if cfg.Pooler {
		d.pooler = new(pooler)
	}
	d.main, err = newSource("connection string", cfg.ConnString, cfg.ConnStringFile, cfg.Pooler, cfg, d.log)
	if err != nil {
		return nil, err
	}
	d.listener = d.main
	if cfg.ListenerConnString != "" || cfg.ListenerConnStringFile != "" {
		d.listener, err = newSource("listener connection string", cfg.ListenerConnString, cfg.ListenerConnStringFile, false, cfg, d.log)
		if err != nil {
			return nil, err
		}
	}
	pool := d.main.pool
	if pool.MinConns > pool.MaxConns {
		return nil, fmt.Errorf("db: minimum of connections: got %d, allowed 0 to the maximum of connections, %d", pool.MinConns, pool.MaxConns)
	}
	d.lookout = newLookout(d.fence, d.log, d.main, d.listener)
	d.closing, d.close = context.WithCancel(context.Background())
	pool.BeforeConnect, pool.AfterConnect = d.beforeConnect, d.afterConnect
	pool.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return false } // prepareConn does
	pool.PrepareConn = d.prepareConn(cmp.Or(pool.PingTimeout, defaultPingTimeout))
	if d.Pool, err = pgxpool.NewWithConfig(ctx, pool); err != nil {
		return nil, fmt.Errorf("db: open the pool: %w", err) // pgx parses nothing here
	}
	return d, nil
}

// beforeConnect prepares the dialling of one connection of the pool.
func (d *DB) beforeConnect(ctx context.Context, cfg *pgx.ConnConfig) error {
	if err := d.lookout.ready(ctx); err != nil {
		return err
	}
	if err := d.main.gate.enter(ctx); err != nil {
		return err
	}
	*cfg = *d.main.current()
	d.lookout.arrange(cfg)
	d.fence.guard(cfg)
	cfg.Tracer = &connTracer{db: d, generation: d.generation.Load(), answerTime: d.main.answerTime()}
	return nil
}

// afterConnect looks, once, whether there is a pooler that nobody has told of.
func (d *DB) afterConnect(ctx context.Context, conn *pgx.Conn) error {
	if d.pooler != nil || d.looked.Load() {
		return nil
	}
	session, err := sessionOf(ctx, conn.PgConn())
	if err != nil {
		return err
	}
	if !d.looked.Swap(true) && session != conn.PgConn().PID() {
		d.log.Warn("the connection string leads through a pooler: set database_pooler, or statements fail " +
			"and servers that were left are not recognized")
	}
	return nil
}

// Listen opens a connection for LISTEN, which is not one of the pool. The
// caller closes it. The error is ErrTransactionPooler where it would hear
// nothing.
func (d *DB) Listen(ctx context.Context) (*pgx.Conn, error) {
	if err := d.lookout.ready(ctx); err != nil {
		return nil, err
	}
	if err := d.listener.gate.enter(ctx); err != nil {
		return nil, err
	}
	cfg := d.listener.current()
	if !d.listener.named {
		cfg.RuntimeParams["application_name"] += "-listener"
	}
	d.lookout.arrange(cfg)
	d.fence.guard(cfg)
	conn, err := pgx.ConnectConfig(ctx, cfg)
	d.listener.gate.leave(err)
	if err != nil {
		d.lookout.nudge()
		return nil, err
	}
	if d.listener.pooled {
		if err := RequireSession(ctx, conn, cfg); err != nil {
			_ = conn.Close(context.WithoutCancel(ctx)) // it is of no use
			return nil, err
		}
	}
	return conn, nil
}

// ConnConfig returns the configuration of a direct connection, the one of
// Listen, for package migrations. Hosts that were asked come in the order in
// which they are to be tried.
func (d *DB) ConnConfig() *pgx.ConnConfig {
	cfg := d.listener.current()
	d.lookout.arrange(cfg)
	return cfg
}

// Look asks all hosts of the connection strings where they stand, if that was
// not done yet, so that ConnConfig leads to the newest one and past those that
// do not answer.
func (d *DB) Look(ctx context.Context) error { return d.lookout.ready(ctx) }

// Resets returns how often the pool has given up all of its connections.
func (d *DB) Resets() int64 { return d.generation.Load() }

// Refused returns how many connections were given up because they led to a
// server that is behind one that has been seen. Errors of such attempts wrap a
// *PastError.
func (d *DB) Refused() int64 { return d.fence.refused.Load() }

// Timeline returns the timeline of the server in use, 0 if that is not known.
func (d *DB) Timeline() int64 { return d.fence.timeline.Load() }

// NewerFound returns how often a host of the connection strings that was only
// asked turned out to be newer than the server in use, which was left then.
func (d *DB) NewerFound() int64 { return d.fence.found.Load() }

// Hosts returns how the hosts of the connection strings stand. One that is
// named alone is not asked.
func (d *DB) Hosts() Hosts { return d.lookout.count() }

// Settle makes sure that the server that connections lead to now is not behind
// one that has been seen, and that its epoch has begun. Each new connection is
// checked by itself; behind a pooler the server can change without one.
func (d *DB) Settle(ctx context.Context) error {
	if d.pooler != nil {
		return d.checkPooled(ctx)
	}
	conn, err := d.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	return d.fence.check(ctx, conn.Conn().PgConn())
}

// Close closes all connections of the pool, when those in use are released.
func (d *DB) Close() {
	d.close()
	d.Pool.Close()
	d.proofs.Wait()
	d.lookout.close()
}

// Doubt is told that a connection, of the pool or that of Listen, does not
// answer although nothing is asked of it that takes time: packets get lost, or
// the server stands still. Those of the pool that are idle are given up at
// once. If a new connection works, so are those that have been waiting for an
// answer since before.
func (d *DB) Doubt(reason error) {
	d.stale(d.generation.Load(), reason)
	if d.closing.Err() != nil || d.proving.Swap(true) {
		return
	}
	d.proofs.Go(func() {
		defer d.proving.Store(false)
		defer survive(d.log, "proof of a connection")
		ctx, cancel := context.WithTimeout(d.closing, answerPatience)
		defer cancel()
		since := time.Now()
		cfg := d.main.current()
		d.lookout.arrange(cfg)
		d.fence.guard(cfg)
		conn, err := pgx.ConnectConfig(ctx, cfg)
		if err != nil {
			return // nothing works, so that there is nothing to make room for
		}
		_ = conn.Close(ctx) // it was only tried
		select {
		case <-time.After(time.Until(since.Add(unansweredTime))):
		case <-d.closing.Done():
		}
		if n := d.fence.cutUnanswered(since); n > 0 {
			d.log.Warn("closed connections to postgres that do not answer, while new ones do", "connections", n)
		}
	})
}

// errSilent is why a connection is given up that was idle.
var errSilent = errors.New("an idle connection does not answer")

// prepareConn makes sure that a connection which has been idle still leads
// somewhere.
func (d *DB) prepareConn(timeout time.Duration) func(context.Context, *pgx.Conn) (bool, error) {
	return func(ctx context.Context, conn *pgx.Conn) (bool, error) {
		if fencedConnOf(conn.PgConn()).idle() < pingAfter {
			return true, nil
		}
		// Whoever loses patience meanwhile does not break the connection.
		pinging, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
		defer cancel()
		err := conn.Ping(pinging)
		if err != nil && pinging.Err() != nil && d.pooler == nil { // behind a pooler one may have to wait for a session
			d.Doubt(errSilent)
		}
		return err == nil, nil
	}
}

// stale is told that a connection of a generation has met an error that says
// that it, and probably its contemporaries, are of no use any more. Then all of
// them go, those in use when they are released: target_session_attrs is
// checked when a connection opens, so only new ones are certain to lead to the
// right server.
func (d *DB) stale(generation int64, reason error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	// One event breaks many connections. The first to say so is heard.
	if generation != d.generation.Load() || time.Since(d.lastReset) < resetInterval {
		return
	}
	d.lastReset = time.Now()
	d.generation.Add(1)
	d.Pool.Reset()
	d.log.Warn("gave up all connections to postgres", "reason", reason)
	d.lookout.nudge()
}

// leave is told that a newer server than the one in use was found: whatever
// the pool holds is closed already.
func (d *DB) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lastReset = time.Now()
	d.generation.Add(1)
	if d.pooler != nil {
		d.pooler.forget()
	}
	d.Pool.Reset()
}

// connTracer watches one connection of the pool. It sees every error, those
// inside transactions and batches included.
type connTracer struct {
	db         *DB
	generation int64
	answerTime time.Duration
}

var (
	_ pgx.QueryTracer    = (*connTracer)(nil)
	_ pgx.BatchTracer    = (*connTracer)(nil)
	_ pgx.CopyFromTracer = (*connTracer)(nil)
	_ pgx.ConnectTracer  = (*connTracer)(nil)
)

// errNoAnswer is why a statement without a deadline of its own is given up.
var errNoAnswer = errors.New("the server does not answer")

// askedKey is where a context has the statement that it belongs to.
type askedKey struct{}

// asked is a statement that the server was asked.
type asked struct {
	cancel func() // releases the timer; nil if there is none
	ended  atomic.Bool
}

// ask notes that the server is asked something, and gives it a deadline if it
// has none. Without one it would wait for as long as TCP does for a server that
// has gone without a word.
func (t *connTracer) ask(ctx context.Context) context.Context {
	t.db.pulse.ask()
	a := new(asked)
	if _, bounded := ctx.Deadline(); !bounded && t.answerTime > 0 {
		ctx, a.cancel = context.WithTimeoutCause(ctx, t.answerTime, errNoAnswer)
	}
	return context.WithValue(ctx, askedKey{}, a)
}

// end ends what ask began.
func (t *connTracer) end(ctx context.Context, err error) {
	a, ok := ctx.Value(askedKey{}).(*asked)
	if !ok || a.ended.Swap(true) {
		return
	}
	t.db.pulse.end(err)
	if a.cancel == nil {
		return
	}
	if err != nil && errors.Is(context.Cause(ctx), errNoAnswer) {
		t.db.stale(t.generation, errNoAnswer)
	}
	a.cancel()
}

func (t *connTracer) see(ctx context.Context, err error) {
	// A context that ends breaks its connection, and what uses the connection
	// afterwards (a rollback) finds it closed. That says nothing about others.
	if err == nil || ctx.Err() != nil || errors.Is(err, pgconn.ErrConnClosed) || errors.Is(err, net.ErrClosed) {
		return
	}
	if IsReadOnly(err) && t.db.readOnly.Load() {
		return // a new connection leads nowhere better
	}
	if isStale(err) {
		t.db.stale(t.generation, err)
	}
}

// TraceQueryStart implements pgx.QueryTracer.
func (t *connTracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return t.ask(ctx)
}

// TraceQueryEnd implements pgx.QueryTracer.
func (t *connTracer) TraceQueryEnd(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryEndData) {
	t.see(ctx, data.Err)
	t.end(ctx, data.Err)
}

// TraceBatchStart implements pgx.BatchTracer.
func (t *connTracer) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return t.ask(ctx)
}

// TraceBatchQuery implements pgx.BatchTracer.
func (t *connTracer) TraceBatchQuery(ctx context.Context, _ *pgx.Conn, data pgx.TraceBatchQueryData) {
	t.see(ctx, data.Err)
}

// TraceBatchEnd implements pgx.BatchTracer.
func (t *connTracer) TraceBatchEnd(ctx context.Context, _ *pgx.Conn, data pgx.TraceBatchEndData) {
	t.see(ctx, data.Err)
	t.end(ctx, data.Err)
}

// TraceCopyFromStart implements pgx.CopyFromTracer.
func (t *connTracer) TraceCopyFromStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceCopyFromStartData) context.Context {
	return ctx
}

// TraceCopyFromEnd implements pgx.CopyFromTracer.
func (t *connTracer) TraceCopyFromEnd(ctx context.Context, _ *pgx.Conn, data pgx.TraceCopyFromEndData) {
	t.see(ctx, data.Err)
}

// TraceConnectStart implements pgx.ConnectTracer.
func (t *connTracer) TraceConnectStart(ctx context.Context, _ pgx.TraceConnectStartData) context.Context {
	t.db.pulse.ask()
	return ctx
}

// TraceConnectEnd implements pgx.ConnectTracer. It ends what beforeConnect
// began.
func (t *connTracer) TraceConnectEnd(_ context.Context, data pgx.TraceConnectEndData) {
	t.db.pulse.end(data.Err)
	t.db.main.gate.leave(data.Err)
	if data.Err != nil {
		t.db.lookout.nudge()
	}
}
