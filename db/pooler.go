package db

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// A pooler hands each transaction to any of its servers' sessions, and each session to anybody. So behind one
//
//   - nothing is kept in a session: neither prepared statements nor settings. Each statement travels in one
//     round trip as a transaction that begins with the settings;
//   - nothing is believed of a connection: the same statement compares the server with those that have passed
//     the fence, before anything else is done there;
//   - nothing is sent when a connection opens that a pooler may refuse.
const (
	// poolerBegin fixes what a role or database may have set otherwise, before the first snapshot.
	poolerBegin = "BEGIN ISOLATION LEVEL READ COMMITTED"

	// poolerSettings applies the settings ($1, $2) until the end of the transaction. Where the server is none
	// of those that have passed ($3), it fails, and so does all that comes after it. The text of the error
	// is for the log of PostgreSQL; it is computed, because a constant would be converted when planning.
	//
	// Settings that are as they should be are left alone, and newer ones where nobody knows them.
	poolerSettings = `SELECT CASE WHEN ` + serverStart + ` OPERATOR(pg_catalog.=) ANY ($3::bigint[]) THEN true
		ELSE pg_catalog.concat('not yet: pgbroker first checks the server that started at ', pg_catalog.pg_postmaster_start_time())::boolean END,
	(SELECT pg_catalog.count(pg_catalog.set_config(name, value, true)) FROM ROWS FROM (pg_catalog.unnest($1::text[]), pg_catalog.unnest($2::text[])) AS setting (name, value)
	 WHERE pg_catalog.current_setting(name, true) IS NULL
	   AND name OPERATOR(pg_catalog.<>) ALL ('{transaction_timeout,restrict_nonsystem_relation_kind}'::text[])
	   OR pg_catalog.current_setting(name, true) OPERATOR(pg_catalog.<>) value)`

	// serverStart tells servers apart that a pooler may lead to. Whoever may connect may ask for it.
	serverStart = `(extract(epoch FROM pg_catalog.pg_postmaster_start_time()) OPERATOR(pg_catalog.*) 1000000)::bigint`

	// poolerCheckTries bounds how often a statement is tried again because the pooler has led it to a server
	// that had not passed the fence.
	poolerCheckTries = 5

	// passedServers bounds how many servers behind a pooler are remembered.
	passedServers = 32

	// rollbackTime bounds the end of a transaction that has failed.
	rollbackTime = time.Second
)

// pooler is what is known behind a pooler.
type pooler struct {
	mu     sync.Mutex
	passed []int64 // start times of servers that have passed the fence as it is now
}

// servers returns the servers that have passed. The result is not changed later.
func (p *pooler) servers() []int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.passed
}

func (p *pooler) pass(server int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if slices.Contains(p.passed, server) {
		return
	}
	p.passed = append(slices.Clone(p.passed[max(0, len(p.passed)-passedServers+1):]), server)
}

// forget makes all servers pass again: more is known now of which is the newest.
func (p *pooler) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.passed = nil
}

// errUnchecked says that a transaction came to a server that had not passed the fence, and did nothing there.
var errUnchecked = errors.New("the pooler has changed servers again and again")

// sessionSetting is a setting of Postgres that a transaction begins with.
type sessionSetting struct{ name, value string }

func settingArrays(settings []sessionSetting) (names, values []string) {
	for _, s := range settings {
		names, values = append(names, s.name), append(values, s.value)
	}
	return names, values
}

// queuePrologue queues what each transaction behind a pooler has after its BEGIN.
func (d *DB) queuePrologue(b *pgx.Batch, passed []int64) {
	names, values := settingArrays(d.main.localSettings())
	b.Queue(poolerSettings, names, values, passed)
}

// readPrologue reads its result.
func readPrologue(results pgx.BatchResults) error {
	_, err := results.Exec()
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == pgerrcode.InvalidTextRepresentation && strings.Contains(pgErr.Message, "pgbroker") {
		return errUnchecked
	}
	return err
}

// throughPooler calls try with servers that have passed the fence, again when the pooler led to another one.
func (d *DB) throughPooler(ctx context.Context, try func(passed []int64) error) error {
	for range poolerCheckTries {
		passed := d.pooler.servers()
		if len(passed) > 0 {
			if err := try(passed); !errors.Is(err, errUnchecked) {
				return err
			}
		}
		if err := d.checkPooled(ctx); err != nil {
			return err
		}
	}
	return errUnchecked
}

// checkPooled makes the server that the pooler leads to now pass the fence.
func (d *DB) checkPooled(ctx context.Context) (err error) {
	conn, err := d.Pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer d.releasePooled(conn)
	if _, err := conn.Exec(ctx, poolerBegin); err != nil { // from here on it is the same server
		return err
	}
	var server int64
	if err := conn.QueryRow(ctx, "SELECT "+serverStart).Scan(&server); err != nil {
		return err
	}
	if err := d.fence.check(ctx, conn.Conn().PgConn()); err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, "COMMIT"); err != nil {
		return err
	}
	d.pooler.pass(server)
	return nil
}

// releasePooled gives a connection back, outside of any transaction: one that is closed in a transaction costs the
// pooler its connection, too.
func (d *DB) releasePooled(conn *pgxpool.Conn) {
	if raw := conn.Conn(); !raw.IsClosed() && raw.PgConn().TxStatus() != 'I' && !raw.PgConn().IsBusy() {
		ctx, cancel := context.WithTimeout(context.Background(), rollbackTime)
		_, _ = conn.Exec(ctx, "ROLLBACK") // a connection that cannot even do this is not used again
		cancel()
	}
	conn.Release()
}

// Query runs a statement. It hides that of the pool, as the others below do, for the sake of poolers.
func (d *DB) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if d.pooler == nil {
		return d.Pool.Query(ctx, sql, args...) //nolint:rowserrcheck // the caller reads them
	}
	rows, err := d.queryPooled(ctx, sql, args) //nolint:rowserrcheck // the caller reads them
	if err != nil {
		return failedRows{err: err}, err
	}
	return rows, nil
}

// QueryRow runs a statement of at most one row. Errors come with Scan, which must be called.
func (d *DB) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	if d.pooler == nil {
		return d.Pool.QueryRow(ctx, sql, args...)
	}
	rows, err := d.queryPooled(ctx, sql, args) //nolint:rowserrcheck // Scan reads them
	return pooledRow{rows, err}
}

// Exec runs a statement without a result.
func (d *DB) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	if d.pooler == nil {
		return d.Pool.Exec(ctx, sql, args...)
	}
	rows, err := d.queryPooled(ctx, sql, args)
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	rows.Close()
	return rows.CommandTag(), rows.Err()
}

// Begin begins a transaction.
func (d *DB) Begin(ctx context.Context) (pgx.Tx, error) { return d.BeginTx(ctx, pgx.TxOptions{}) }

// BeginTx begins a transaction. Behind a pooler it is read committed unless the options say otherwise.
func (d *DB) BeginTx(ctx context.Context, options pgx.TxOptions) (tx pgx.Tx, err error) {
	if d.pooler == nil {
		return d.Pool.BeginTx(ctx, options)
	}
	if options.IsoLevel == "" {
		options.IsoLevel = pgx.ReadCommitted
	}
	err = d.throughPooler(ctx, func(passed []int64) error {
		batch := new(pgx.Batch)
		batch.BeginTx(options)
		d.queuePrologue(batch, passed)
		results := d.Pool.SendBatch(ctx, batch)
		_, err := results.Exec()
		if err == nil {
			err = readPrologue(results)
		}
		if closing := results.Close(); err == nil {
			err = closing
		}
		tx = results.Tx()
		if err != nil && tx != nil {
			ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTime)
			defer cancel()
			_ = tx.Rollback(ending) // nothing was done in it
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return tx, nil
}

// queryPooled runs a statement as a transaction, in one round trip.
func (d *DB) queryPooled(ctx context.Context, sql string, args []any) (rows *pooledRows, err error) {
	err = d.throughPooler(ctx, func(passed []int64) error {
		conn, err := d.Pool.Acquire(ctx)
		if err != nil {
			return err
		}
		batch := new(pgx.Batch)
		batch.Queue(poolerBegin)
		d.queuePrologue(batch, passed)
		batch.Queue(sql, args...)
		batch.Queue("COMMIT")
		results := conn.Conn().SendBatch(ctx, batch)
		_, err = results.Exec()
		if err == nil {
			err = readPrologue(results)
		}
		if err != nil {
			_ = results.Close() // says the same again
			d.releasePooled(conn)
			return err
		}
		inner, err := results.Query() //nolint:rowserrcheck // pooledRows does
		rows = &pooledRows{Rows: inner, db: d, conn: conn, results: results}
		if err != nil {
			rows.Close()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return rows, nil
}

// pooledRows are the rows of a statement that is a transaction of its own. They end with the commit.
type pooledRows struct {
	pgx.Rows
	db      *DB
	conn    *pgxpool.Conn
	results pgx.BatchResults
	closed  bool
	err     error
}

// Close implements pgx.Rows.
func (r *pooledRows) Close() {
	if r.closed {
		return
	}
	r.closed = true
	r.Rows.Close()
	if r.err = r.Rows.Err(); r.err == nil {
		_, r.err = r.results.Exec() // the commit
	}
	if err := r.results.Close(); r.err == nil {
		r.err = err
	}
	r.db.releasePooled(r.conn)
}

// Next implements pgx.Rows.
func (r *pooledRows) Next() bool {
	if r.closed {
		return false
	}
	if r.Rows.Next() {
		return true
	}
	r.Close()
	return false
}

// Scan implements pgx.Rows.
func (r *pooledRows) Scan(dest ...any) error {
	err := r.Rows.Scan(dest...)
	if err != nil {
		r.Close()
	}
	return err
}

// Values implements pgx.Rows.
func (r *pooledRows) Values() ([]any, error) {
	values, err := r.Rows.Values()
	if err != nil {
		r.Close()
	}
	return values, err
}

// Err implements pgx.Rows.
func (r *pooledRows) Err() error {
	if r.closed {
		return r.err
	}
	return r.Rows.Err()
}

// pooledRow is at most one row.
type pooledRow struct {
	rows *pooledRows
	err  error
}

// Scan implements pgx.Row.
func (r pooledRow) Scan(dest ...any) error {
	if r.err != nil {
		return r.err
	}
	defer r.rows.Close()
	found := r.rows.Next()
	if found {
		if err := r.rows.Scan(dest...); err != nil {
			return err
		}
	}
	r.rows.Close()
	switch {
	case r.rows.Err() != nil:
		return r.rows.Err()
	case !found:
		return pgx.ErrNoRows
	}
	return nil
}

// failedRows are those of a statement that was not run.
type failedRows struct {
	pgx.Rows
	err error
}

// Close implements pgx.Rows.
func (failedRows) Close() {}

// Next implements pgx.Rows.
func (failedRows) Next() bool { return false }

// Err implements pgx.Rows.
func (r failedRows) Err() error { return r.err }

// Scan implements pgx.Rows.
func (r failedRows) Scan(...any) error { return r.err }

// parseOptions reads the keyword options: -c NAME=VALUE and --NAME=VALUE, as often as wanted, where a backslash
// takes the meaning from what follows it.
func parseOptions(text string) ([]sessionSetting, error) {
	var words []string
	var word strings.Builder
	inWord, escaped := false, false
	for _, r := range text {
		switch {
		case escaped:
			word.WriteRune(r)
			escaped = false
		case r == '\\':
			inWord, escaped = true, true
		case strings.ContainsRune(" \t\n\r\v\f", r):
			if inWord {
				words = append(words, word.String())
				word.Reset()
			}
			inWord = false
		default:
			word.WriteRune(r)
			inWord = true
		}
	}
	if inWord {
		words = append(words, word.String())
	}
	var settings []sessionSetting
	for i := 0; i < len(words); i++ {
		assignment, found := strings.CutPrefix(words[i], "--")
		if !found {
			if assignment, found = strings.CutPrefix(words[i], "-c"); found && assignment == "" && i+1 < len(words) {
				i++
				assignment = words[i]
			}
		}
		name, value, assigned := strings.Cut(assignment, "=")
		if !found || !assigned || name == "" {
			return nil, fmt.Errorf("options: with database_pooler allowed are -c NAME=VALUE and --NAME=VALUE")
		}
		settings = append(settings, sessionSetting{strings.ReplaceAll(name, "-", "_"), value})
	}
	return settings, nil
}
