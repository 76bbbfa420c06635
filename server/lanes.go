package server

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"pgbroker/db"
)

// lanes share out the connections of the pool, so that nothing that clients ask for can take all of them.
//
// What the replica itself does (the batch of writes, of which there is one at a time, the feed, the periodic work) uses the
// pool as it is: it is bounded by how it is built. Requests of clients go through lanes, which leave those connections
// alone; and what may hold a connection for long has few of the rest, so that what is short always finds one.
type lanes struct {
	// short is for reads by key, single pages, and what streams read.
	short *lane
	// changes is for writes that do not go through the writer: leases, options, services, the checkpoint, Clear. They wait
	// for locks.
	changes *lane
	// snapshots is for SyncLatest, which holds a connection while its client reads.
	snapshots *lane
	// scans is for queries that read all records of a type.
	scans *lane
}

const (
	// ownConnections is how many connections of the pool are left to the replica itself, if there are so many.
	ownConnections = 3
	// wantedConnections is the size of a pool in which each lane has room beside the others.
	wantedConnections = ownConnections + 3*2 + 1
	// queuePerScan is how many scans may wait for each one that runs.
	queuePerScan = 8
)

func newLanes(pool *db.DB, limiter *limiter) *lanes {
	size, maxScans := int(pool.Config().MaxConns), limiter.limits.Scans
	shared := make(chan struct{}, max(1, size-min(ownConnections, size/2)))
	few := max(1, cap(shared)/3)
	l := &lanes{
		short:     newLane(pool, shared, cap(shared)),
		changes:   newLane(pool, shared, few),
		snapshots: newLane(pool, shared, few),
		scans:     newLane(pool, shared, min(few, maxScans)),
	}
	l.scans.queue = queuePerScan * maxScans
	l.scans.full = func(ctx context.Context) error {
		return limiter.refuse(ctx, limitScans, &limitError{
			"too many queries that read all records (a text, or a filter without an index) wait", l.scans.queue, "", limitScans,
		})
	}
	return l
}

// warn tells operators of a pool that is too small to keep the lanes apart.
func (l *lanes) warn(logger *slog.Logger) {
	if size := l.short.pool.Config().MaxConns; size < wantedConnections {
		logger.Warn("the pool is too small to keep writes, reads, scans and the feed apart: they wait for each other",
			"pool_max_conns", size, "wanted", wantedConnections)
	}
}

// lane is a database that takes a bounded number of connections from the pool.
type lane struct {
	pool   *db.DB
	own    chan struct{} // one per connection in use
	shared chan struct{} // the same, of all lanes

	queue   int                         // how many may wait; 0 for any number
	full    func(context.Context) error // what those get that would be one too many
	waiting atomic.Int64
}

func newLane(pool *db.DB, shared chan struct{}, size int) *lane {
	return &lane{pool: pool, own: make(chan struct{}, size), shared: shared}
}

// enter waits for a place. leave must be called once when it is no longer needed; further calls do nothing.
func (l *lane) enter(ctx context.Context) (leave func(), err error) {
	select {
	case l.own <- struct{}{}:
	default:
		if l.waiting.Add(1) > int64(l.queue) && l.queue > 0 {
			l.waiting.Add(-1)
			return nil, l.full(ctx)
		}
		select {
		case l.own <- struct{}{}:
			l.waiting.Add(-1)
		case <-ctx.Done():
			l.waiting.Add(-1)
			return nil, ctx.Err()
		}
	}
	select {
	case l.shared <- struct{}{}:
	case <-ctx.Done():
		<-l.own
		return nil, ctx.Err()
	}
	return sync.OnceFunc(func() {
		<-l.shared
		<-l.own
	}), nil
}

// alone reports whether a lane is used by one and nobody waits. It is meant for who is in it.
func (l *lane) alone() bool { return len(l.own) <= 1 && l.waiting.Load() == 0 }

// Exec implements db.DBTX.
func (l *lane) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	leave, err := l.enter(ctx)
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	defer leave()
	return l.pool.Exec(ctx, sql, args...)
}

// Query implements db.DBTX.
func (l *lane) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	leave, err := l.enter(ctx)
	if err != nil {
		return nil, err
	}
	rows, err := l.pool.Query(ctx, sql, args...) //nolint:rowserrcheck // whoever reads them checks
	if err != nil {
		leave()
		return rows, err
	}
	return &laneRows{rows, leave}, nil
}

// QueryRow implements db.DBTX.
func (l *lane) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	leave, err := l.enter(ctx)
	if err != nil {
		return failedRow{err}
	}
	return laneRow{l.pool.QueryRow(ctx, sql, args...), leave}
}

// Begin begins a transaction, for [pgx.BeginFunc].
func (l *lane) Begin(ctx context.Context) (pgx.Tx, error) { return l.BeginTx(ctx, pgx.TxOptions{}) }

// BeginTx begins a transaction, for [pgx.BeginTxFunc].
func (l *lane) BeginTx(ctx context.Context, options pgx.TxOptions) (pgx.Tx, error) {
	leave, err := l.enter(ctx)
	if err != nil {
		return nil, err
	}
	tx, err := l.pool.BeginTx(ctx, options)
	if err != nil {
		leave()
		return nil, err
	}
	return &laneTx{tx, leave}, nil
}

type laneRows struct {
	pgx.Rows
	leave func()
}

// Next implements pgx.Rows. After the last row the connection is free.
func (r *laneRows) Next() bool {
	if r.Rows.Next() {
		return true
	}
	r.leave()
	return false
}

// Close implements pgx.Rows.
func (r *laneRows) Close() {
	r.Rows.Close()
	r.leave()
}

type laneRow struct {
	pgx.Row
	leave func()
}

// Scan implements pgx.Row.
func (r laneRow) Scan(dest ...any) error {
	defer r.leave()
	return r.Row.Scan(dest...)
}

type failedRow struct{ err error }

// Scan implements pgx.Row.
func (r failedRow) Scan(...any) error { return r.err }

type laneTx struct {
	pgx.Tx
	leave func()
}

// Commit implements pgx.Tx.
func (t *laneTx) Commit(ctx context.Context) error {
	defer t.leave()
	return t.Tx.Commit(ctx)
}

// Rollback implements pgx.Tx.
func (t *laneTx) Rollback(ctx context.Context) error {
	defer t.leave()
	return t.Tx.Rollback(ctx)
}
