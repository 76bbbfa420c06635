package db

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

const (
	// surveyPatience is how long a process waits, once, for what the other hosts of its connection string
	// say about who is the newest.
	surveyPatience = 2 * time.Second

	// refusalInterval is the least time between two log lines about the same refused server.
	refusalInterval = time.Minute
)

// PastError says that a server was refused because it is behind what this process has seen: an old primary
// that came back, the other half of a split brain, the original of a database that was moved.
type PastError struct {
	Address string
	reason  string
}

func (e *PastError) Error() string {
	return fmt.Sprintf("the server %s is in the past: %s (if it is the one to use from now on, restart this program)", e.Address, e.reason)
}

// fence keeps this process from going back to a server that it has left for a newer one. It remembers the
// newest timeline of each system and the newest epoch that it has seen, and compares each new connection
// with that, before anything else happens on it. What is open to another server when a newer one is found
// is closed.
//
// A server may be newer than all that is known in two ways: as a later timeline of the system in use (a
// promotion, a restore to a point in time), or as a system that was not seen before (a dump restored
// elsewhere, an upgrade). All others must know the newest epoch.
type fence struct {
	log      *slog.Logger
	left     func()       // called when a newer server was found; must not wait for connections to close
	refused  atomic.Int64 // connections
	timeline atomic.Int64 // of the server in use; 0: hidden

	mu        sync.Mutex // protects what follows
	surveyed  bool
	timelines map[int64]int64 // the newest by system; a hidden one is 0
	epoch     epoch           // the newest
	current   place           // the server in use
	hidden    bool            // it was said that the timeline is
	open      map[*fencedConn]place
	warned    map[string]time.Time // when a refusal was last logged, by its text
}

// place is one server at one time: after a promotion it is another place.
type place struct{ system, timeline int64 }

// epoch identifies an epoch; the zero value is the one before the first.
type epoch struct{ firstVersion, system, timeline int64 }

func newFence(log *slog.Logger, left func()) *fence {
	return &fence{
		log: log, left: left, timelines: make(map[int64]int64),
		open: make(map[*fencedConn]place), warned: make(map[string]time.Time),
	}
}

// guard makes every connection of a configuration pass the fence.
func (f *fence) guard(cfg *pgx.ConnConfig) {
	others := cfg.Copy()
	dial, validate := cfg.DialFunc, cfg.ValidateConnect
	cfg.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &fencedConn{Conn: conn, fence: f}, nil
	}
	cfg.ValidateConnect = func(ctx context.Context, conn *pgconn.PgConn) error {
		// A server that is of no use is not even asked.
		if validate != nil {
			if err := validate(ctx, conn); err != nil {
				return err
			}
		}
		f.survey(ctx, others)
		return f.check(ctx, conn)
	}
}

// check lets a connection pass or says why not. The first one to a server that has just become what it is
// begins its epoch, so that from then on everybody can tell it from its predecessor. It does not wait for
// that: if somebody else holds the order lock, they have begun it.
func (f *fence) check(ctx context.Context, conn *pgconn.PgConn) error {
	network := fencedConnOf(conn)
	settling := false
	for {
		known := f.known()
		server, err := New(bareConn{conn}).LineageGet(ctx, LineageGetParams{
			Epoch: known.firstVersion, EpochSystem: known.system, EpochTimeline: known.timeline,
		})
		if isUndefined(err) {
			return f.admitStranger(network)
		}
		if err != nil {
			return fmt.Errorf("ask the server for its epoch: %w", err)
		}
		admitted, err := f.admit(network, known, server)
		switch {
		case err != nil:
			return err
		case !admitted:
			continue // what is known has changed meanwhile
		case server.Settled || server.ReadOnly || settling:
			return nil
		}
		if err := New(bareConn{conn}).EpochSettle(ctx); err != nil {
			return fmt.Errorf("begin the server's epoch: %w", err)
		}
		settling = true
	}
}

func (f *fence) known() epoch {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.epoch
}

// admit compares a server with what is known. It reports false if that is not any more what the server was
// asked about.
func (f *fence) admit(conn *fencedConn, asked epoch, server LineageGetRow) (admitted bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if asked != f.epoch {
		return false, nil
	}
	at := place{server.SystemIdentifier, server.Timeline}
	seen, known := f.timelines[at.system]
	newer := !known || at.system == f.current.system && at.timeline > seen
	switch {
	case known && at.timeline != 0 && at.timeline < seen:
		return false, f.refuse(conn, fmt.Sprintf("it is on timeline %d of system %s, and timeline %d has been seen",
			at.timeline, systemName(at.system), seen))
	case !server.KnowsEpoch && !newer:
		return false, f.refuse(conn, fmt.Sprintf("it does not know the epoch from version %d on, of system %s, timeline %d",
			f.epoch.firstVersion, systemName(f.epoch.system), f.epoch.timeline))
	}
	if at.timeline == 0 && !server.ReadOnly && !f.hidden {
		f.hidden = true
		f.log.Warn("the server hides its timeline: a failover is noticed only by changes that are missing, " +
			"and an old primary that comes back only by epochs; see docs/recovery.md")
	}
	f.learn(server)
	if !conn.closed {
		f.open[conn] = at
	}
	if server.ReadOnly { // a standby: others may be in use beside it
		return true, nil
	}
	before := f.current
	f.current = at
	f.timeline.Store(at.timeline)
	if before != at && before != (place{}) {
		f.log.Warn("postgres is another server now", "system", systemName(at.system), "timeline", at.timeline,
			"system_before", systemName(before.system), "timeline_before", before.timeline)
		for c, where := range f.open {
			if where != at && where.timeline != 0 { // standbys and hidden ones may be the same server
				_ = c.Conn.Close() // nobody reads or writes on it again, which is all that is wanted
				delete(f.open, c)
			}
		}
		f.left()
	}
	return true, nil
}

// learn remembers the timeline and the epoch of a server that may be used. f.mu is held.
func (f *fence) learn(server LineageGetRow) {
	f.timelines[server.SystemIdentifier] = max(f.timelines[server.SystemIdentifier], server.Timeline)
	f.epoch = epoch{server.Epoch, server.EpochSystem, server.EpochTimeline}
}

// admitStranger decides about a server without the schema, or with one from before epochs could be compared.
// At first nothing is known, and it may be about to be migrated; later it is being restored, or is the wrong one.
func (f *fence) admitStranger(conn *fencedConn) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.timelines) == 0 {
		return nil
	}
	return f.refuse(conn, "its schema pgbroker is missing or too old to know epochs")
}

// refuse counts and logs a refusal. f.mu is held.
func (f *fence) refuse(conn *fencedConn, reason string) error {
	err := &PastError{Address: conn.RemoteAddr().String(), reason: reason}
	f.refused.Add(1)
	if text := err.Error(); time.Since(f.warned[text]) >= refusalInterval {
		f.warned[text] = time.Now()
		f.log.Error("refused a connection to postgres", "error", err)
	}
	return err
}

// survey asks all hosts of a connection string once, before the first connection, which of them is the
// newest: a process that has just started has seen nothing yet. Hosts that do not answer in time are none
// that it could go to now.
func (f *fence) survey(ctx context.Context, cfg *pgx.ConnConfig) {
	f.mu.Lock()
	defer f.mu.Unlock() // others wait for the result
	if f.surveyed {
		return
	}
	f.surveyed = true
	if len(hosts(cfg)) < 2 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, surveyPatience)
	defer cancel()
	all := oneEach(cfg)
	answers := make(chan *LineageGetRow)
	for _, one := range all {
		go func() { answers <- ask(ctx, one) }()
	}
	for range all {
		if server := <-answers; server != nil {
			if server.Epoch > f.epoch.firstVersion {
				f.epoch = epoch{server.Epoch, server.EpochSystem, server.EpochTimeline}
			}
			if seen, ok := f.timelines[server.SystemIdentifier]; !ok || server.Timeline > seen {
				f.timelines[server.SystemIdentifier] = server.Timeline
			}
		}
	}
}

// oneEach splits a configuration into one for each way to each host, which takes any server.
func oneEach(cfg *pgx.ConnConfig) []*pgx.ConnConfig {
	ways := append([]*pgconn.FallbackConfig{{Host: cfg.Host, Port: cfg.Port, TLSConfig: cfg.TLSConfig}}, cfg.Fallbacks...)
	var all []*pgx.ConnConfig
	byHost := make(map[string]*pgx.ConnConfig)
	for _, way := range ways {
		a := address(way.Host, way.Port)
		if one := byHost[a]; one != nil {
			one.Fallbacks = append(one.Fallbacks, way)
			continue
		}
		one := cfg.Copy()
		one.Host, one.Port, one.TLSConfig, one.Fallbacks, one.ValidateConnect = way.Host, way.Port, way.TLSConfig, nil, nil
		byHost[a] = one
		all = append(all, one)
	}
	return all
}

// ask returns where one host stands, nil if it does not say.
func ask(ctx context.Context, cfg *pgx.ConnConfig) *LineageGetRow {
	conn, err := pgconn.ConnectConfig(ctx, &cfg.Config)
	if err != nil {
		return nil
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }() // it was only asked
	server, err := New(bareConn{conn}).LineageGet(ctx, LineageGetParams{})
	if err != nil {
		return nil
	}
	return &server
}

// fencedConn is the network connection of one to a server. It leaves the fence when it is closed.
type fencedConn struct {
	net.Conn
	fence  *fence
	closed bool // protected by fence.mu
}

// Close implements net.Conn.
func (c *fencedConn) Close() error {
	c.fence.mu.Lock()
	c.closed = true
	delete(c.fence.open, c)
	c.fence.mu.Unlock()
	return c.Conn.Close()
}

// fencedConnOf returns the network connection under a guarded connection.
func fencedConnOf(conn *pgconn.PgConn) *fencedConn {
	c := conn.Conn()
	if secured, ok := c.(*tls.Conn); ok {
		c = secured.NetConn()
	}
	return c.(*fencedConn)
}

// systemName writes a system identifier as Postgres does, without a sign; a hidden one is "?".
func systemName(system int64) string {
	if system == 0 {
		return "?"
	}
	return strconv.FormatUint(uint64(system), 10)
}

// isUndefined reports whether err says that the schema is not there, or not this one.
func isUndefined(err error) bool {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return false
	}
	switch pgErr.Code {
	case pgerrcode.InvalidSchemaName, pgerrcode.UndefinedTable, pgerrcode.UndefinedFunction, pgerrcode.UndefinedColumn:
		return true
	}
	return false
}

// bareConn runs generated queries on a connection that is still being opened.
type bareConn struct{ *pgconn.PgConn }

var _ DBTX = bareConn{}

// Exec implements DBTX.
func (c bareConn) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	rows, err := c.Query(ctx, sql, args...)
	if err != nil {
		return pgconn.CommandTag{}, err
	}
	rows.Close()
	return rows.CommandTag(), rows.Err()
}

// Query implements DBTX. Its arguments must be written by fmt.Sprint as Postgres reads them.
func (c bareConn) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	values := make([][]byte, len(args))
	for i, arg := range args {
		values[i] = []byte(fmt.Sprint(arg))
	}
	return pgx.RowsFromResultReader(pgtype.NewMap(), c.ExecParams(ctx, sql, values, nil, nil, nil)), nil //nolint:rowserrcheck // for the caller to check
}

// QueryRow implements DBTX.
func (c bareConn) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	rows, err := c.Query(ctx, sql, args...) //nolint:rowserrcheck // Scan does
	return bareRow{rows, err}
}

type bareRow struct {
	rows pgx.Rows
	err  error
}

// Scan implements pgx.Row.
func (r bareRow) Scan(dest ...any) error {
	if r.err != nil {
		return r.err
	}
	defer r.rows.Close()
	if !r.rows.Next() {
		return errors.Join(r.rows.Err(), pgx.ErrNoRows)
	}
	if err := r.rows.Scan(dest...); err != nil {
		return err
	}
	r.rows.Close()
	return r.rows.Err()
}
