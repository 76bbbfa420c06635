package db

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// refusalInterval is the least time between two log lines about the same refused server.
const refusalInterval = time.Minute

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
	found    atomic.Int64 // newer servers, at hosts that were only asked
	timeline atomic.Int64 // of the server in use; 0: hidden

	mu        sync.Mutex      // protects what follows
	timelines map[int64]int64 // the newest by system; a hidden one is 0
	epoch     epoch           // the newest
	current   place           // the server in use
	hidden    bool            // it was said that the timeline is
	open      map[*fencedConn]whereabouts
	attempts  map[*attempt]bool
	warned    map[string]time.Time // when a refusal was last logged, by its text
}

// place is one server at one time: after a promotion it is another place.
type place struct{ system, timeline int64 }

// whereabouts is where a connection leads, and the first version of the epoch that its server knew when it was opened.
type whereabouts struct {
	place
	epoch int64
}

// epoch identifies an epoch; the zero value is the one before the first.
type epoch struct{ firstVersion, system, timeline int64 }

func newFence(log *slog.Logger, left func()) *fence {
	return &fence{
		log: log, left: left, timelines: make(map[int64]int64),
		open: make(map[*fencedConn]whereabouts), attempts: make(map[*attempt]bool), warned: make(map[string]time.Time),
	}
}

// guard makes every connection of a configuration pass the fence.
func (f *fence) guard(cfg *pgx.ConnConfig) {
	dial, lookUp, validate := cfg.DialFunc, cfg.LookupFunc, cfg.ValidateConnect
	names := make(map[string]string) // of hosts, by the address that is dialled
	for _, way := range waysOf(cfg) {
		names[address(way.Host, way.Port)] = address(way.Host, way.Port)
	}
	cfg.LookupFunc = func(ctx context.Context, name string) ([]string, error) {
		found, err := lookUp(ctx, name)
		for _, ip := range found {
			for _, way := range waysOf(cfg) {
				if way.Host == name {
					names[address(ip, way.Port)] = address(name, way.Port)
				}
			}
		}
		return found, err
	}
	cfg.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		return f.dial(ctx, network, address, names[address], dial)
	}
	cfg.ValidateConnect = func(ctx context.Context, conn *pgconn.PgConn) error {
		// A server that is of no use is not even asked. One that is used for want of a better one must pass as well.
		var notPreferred error
		if validate != nil {
			notPreferred = validate(ctx, conn)
			if err := new(pgconn.NotPreferredError); notPreferred != nil && !errors.As(notPreferred, &err) {
				return notPreferred
			}
		}
		if err := f.check(ctx, conn); err != nil {
			return err
		}
		return notPreferred
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
		if pgErr := new(pgconn.PgError); errors.As(err, &pgErr) && pgErr.Code == pgerrcode.InsufficientPrivilege {
			return &UnfitError{Problem: "the role may not use the schema pgbroker: " + pgErr.Message, Remedy: grantsRemedy("ROLE")}
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
	delete(f.attempts, conn.attempt)
	if !conn.closed {
		f.open[conn] = whereabouts{at, server.Epoch}
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
			if where.place != at && where.timeline != 0 { // standbys and hidden ones may be the same server
				f.cut(c)
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

// survey hears what all hosts have said at the start, when nothing has been seen yet, and takes the newest of them for seen:
// of each system the latest timeline, and among those the newest epoch. Hosts that have said nothing are none that this process
// could go to now.
func (f *fence) survey(said []LineageGetRow) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, server := range said {
		seen, known := f.timelines[server.SystemIdentifier]
		if !known || server.Timeline > seen {
			f.timelines[server.SystemIdentifier] = server.Timeline
		}
	}
	for _, server := range said {
		behind := server.Timeline != 0 && server.Timeline < f.timelines[server.SystemIdentifier]
		if !behind && server.Epoch > f.epoch.firstVersion {
			f.epoch = epoch{server.Epoch, server.EpochSystem, server.EpochTimeline}
		}
	}
}

// hear compares what a host has said that was only asked with what is known. If it is newer than the server in use, that is
// left: connections to it are closed, in use or not, and new ones find the newer one. A system never seen before is not newer for that:
// it may be a dump that is being restored, and begins an epoch when it is used. hear reports whether the host is in the past.
func (f *fence) hear(h *host, asked epoch, server LineageGetRow) (past bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	at := place{server.SystemIdentifier, server.Timeline}
	remote := h.conn.Conn().RemoteAddr().String()
	seen, known := f.timelines[at.system]
	if known && at.timeline != 0 && at.timeline < seen {
		f.leavePast(h, at, remote)
		return true
	}
	promoted := known && at.system == f.current.system && at.timeline > seen
	if !promoted && server.Epoch <= f.epoch.firstVersion {
		past = known && asked == f.epoch && !server.KnowsEpoch
		if past {
			f.leavePast(h, at, remote)
		}
		return past
	}
	f.learn(server)
	left := 0
	for c, where := range f.open {
		if where.leftFor(at, server.Epoch, c.remote == remote) {
			f.cut(c)
			left++
		}
	}
	if left == 0 {
		return false // its epoch has begun a moment ago, by a connection of this process or another one
	}
	f.found.Add(1)
	f.log.Warn("another host of the connection string is newer: leaving the server in use", "host", h.address,
		"system", systemName(at.system), "timeline", at.timeline, "epoch", server.Epoch, "connections_closed", left)
	f.left()
	return false
}

// leavePast closes the connections to a host that is in the past: those that lead to the same server, and for a pooler, which changes
// the server behind them without an error, all. f.mu is held.
func (f *fence) leavePast(h *host, at place, remote string) {
	pooler := h.source.pooled
	left := 0
	for c, where := range f.open {
		if c.remote == remote && (pooler || where.place == at && where.epoch < f.epoch.firstVersion) {
			f.cut(c)
			left++
		}
	}
	if left > 0 {
		f.log.Warn("a host leads to a server that was left for a newer one", "host", h.address, "connections_closed", left)
		f.left()
	}
}

// cut closes a connection, whoever uses it. f.mu is held.
func (f *fence) cut(c *fencedConn) {
	_ = c.Conn.Close() // nobody reads or writes on it again, which is all that is wanted
	delete(f.open, c)
}

// leftFor reports whether a connection leads to a server that is to be left for one at another place, or with a later epoch.
// What was hidden when the connection opened, and two servers that were promoted to the same timeline, only the epoch tells apart.
func (w whereabouts) leftFor(at place, epoch int64, sameAddress bool) bool {
	switch {
	case w.system != at.system:
		return true
	case w.timeline != at.timeline && w.timeline != 0 && at.timeline != 0:
		return w.timeline < at.timeline
	default:
		return w.epoch < epoch && !sameAddress
	}
}

// abandon gives up the attempts to connect to hosts, which do not answer.
func (f *fence) abandon(hosts []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for a := range f.attempts {
		if slices.Contains(hosts, a.host) {
			a.abandoned = true
			a.cancel()
			if a.conn != nil {
				_ = a.conn.Conn.Close() // whoever waits for its answer goes on to the next host
			}
		}
	}
}

// cutUnanswered closes the connections that were opened before a time and have been waiting for an answer since before it,
// because those that are opened now work. It returns how many there were.
func (f *fence) cutUnanswered(since time.Time) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.open {
		if asked := c.asked.Load(); asked != 0 && asked < since.UnixNano() {
			f.cut(c)
			n++
		}
	}
	return n
}

// attempt is a connection that is being opened.
type attempt struct {
	host   string
	cancel context.CancelFunc

	abandoned bool // these are protected by fence.mu
	conn      *fencedConn
}

// errAbandoned is why an attempt to connect to a host ends early.
var errAbandoned = errors.New("the host does not answer, and another one does")

// dial opens the network connection of an attempt, which can be given up until the server has been admitted.
func (f *fence) dial(ctx context.Context, network, address, host string, dial pgconn.DialFunc) (net.Conn, error) {
	a := &attempt{host: host}
	dialling, cancel := context.WithCancel(ctx)
	defer cancel()
	a.cancel = cancel
	f.mu.Lock()
	f.attempts[a] = true
	f.mu.Unlock()
	conn, err := dial(dialling, network, address)
	f.mu.Lock()
	defer f.mu.Unlock()
	if a.abandoned && err == nil {
		_ = conn.Close() // nothing was sent
	}
	switch {
	case a.abandoned:
		err = errAbandoned
		fallthrough
	case err != nil:
		delete(f.attempts, a)
		return nil, err
	}
	a.conn = &fencedConn{Conn: conn, fence: f, attempt: a, remote: conn.RemoteAddr().String()}
	return a.conn, nil
}

// fencedConn is the network connection of one to a server. It leaves the fence when it is closed.
type fencedConn struct {
	net.Conn
	fence   *fence
	remote  string
	attempt *attempt
	asked   atomic.Int64 // since when an answer is waited for, in nanoseconds since 1970; 0: for none
	heard   atomic.Int64 // when something was read last, in the same unit
	closed  bool         // protected by fence.mu
}

// Write implements net.Conn.
func (c *fencedConn) Write(b []byte) (int, error) {
	c.asked.Store(time.Now().UnixNano())
	return c.Conn.Write(b)
}

// Read implements net.Conn.
func (c *fencedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.asked.Store(0)
		c.heard.Store(time.Now().UnixNano())
	}
	return n, err
}

// idle returns for how long nothing was heard on the connection.
func (c *fencedConn) idle() time.Duration {
	return time.Duration(time.Now().UnixNano() - c.heard.Load())
}

// Close implements net.Conn.
func (c *fencedConn) Close() error {
	c.fence.mu.Lock()
	c.closed = true
	delete(c.fence.open, c)
	delete(c.fence.attempts, c.attempt)
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
		if err := r.rows.Err(); err != nil {
			return err // and not that there is no row, which a handler may take for "no such record"
		}
		return pgx.ErrNoRows
	}
	if err := r.rows.Scan(dest...); err != nil {
		return err
	}
	r.rows.Close()
	return r.rows.Err()
}
