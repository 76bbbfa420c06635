package db

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	// lookInterval is the time between two rounds of questions, give or take a tenth, so that replicas do not ask in step.
	// With it a newer server is found well within the 2 s that docs/recovery.md promises.
	lookInterval = time.Second

	// lookPatience is how long a host may take to answer; then it is silent.
	lookPatience = time.Second

	// lookRest is the least time between two rounds, however often something is odd.
	lookRest = 200 * time.Millisecond

	// lookLifetime is how long a connection to a host is kept: a name or an address may come to lead elsewhere.
	lookLifetime = 15 * time.Second

	// firstPatience is how long a process that has just started waits, once, for what the hosts say about who is the
	// newest: it has seen nothing yet.
	firstPatience = 2 * time.Second
)

// lookout asks all hosts of the connection strings where they stand, again and again, each on a connection of its own.
// What they say goes to the fence, which leaves a server for a newer one, also when nothing is wrong with the connections to
// it: an old primary that nobody has stopped takes writes that will be lost. And it tells dials which hosts to try first, so
// that one which is frozen does not hide the others.
type lookout struct {
	fence   *fence
	sources []*source
	log     *slog.Logger

	start  sync.Once
	stop   context.CancelFunc
	done   chan struct{}
	asked  chan struct{} // closed after the first round
	nudged chan struct{}

	mu    sync.Mutex // protects what follows
	hosts map[string]*host
}

// host is one host of the connection strings, by its address.
type host struct {
	address string
	source  *source
	cfg     *pgx.ConnConfig // leads to this host only, and takes any server
	suits   pgconn.ValidateConnectFunc

	// Only the goroutine that asks this host uses these.
	conn   *pgconn.PgConn
	since  time.Time
	row    LineageGetRow
	suited bool
	bare   bool // it had no schema when last asked

	// Protected by lookout.mu.
	standing standing
	reason   error // why it does not answer
}

// standing is what is known of a host, in the order in which hosts are tried.
type standing int

const (
	good    standing = iota // it answers, and is one to use
	unknown                 // it was not asked yet
	unfit                   // it answers, but is not of the kind that is wanted
	past                    // it answers, and was left for a newer one
	closed                  // it refuses connections
	silent                  // it does not answer in time
)

func newLookout(f *fence, log *slog.Logger, sources ...*source) *lookout {
	return &lookout{
		fence: f, sources: slices.Compact(sources), log: log, hosts: make(map[string]*host),
		done: make(chan struct{}), asked: make(chan struct{}), nudged: make(chan struct{}, 1),
	}
}

// ready begins the rounds, if there is a choice of hosts, and waits for the end of the first one.
func (l *lookout) ready(ctx context.Context) error {
	l.start.Do(func() {
		running, stop := context.WithCancel(context.Background())
		l.stop = stop
		go l.run(running)
	})
	select {
	case <-l.asked:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// close ends the rounds.
func (l *lookout) close() {
	l.start.Do(func() { close(l.done) }) // never begun
	if l.stop != nil {
		l.stop()
	}
	<-l.done
}

// nudge asks for a round at once: something is odd.
func (l *lookout) nudge() {
	select {
	case l.nudged <- struct{}{}:
	default:
	}
}

func (l *lookout) run(ctx context.Context) {
	defer close(l.done)
	defer func() {
		for _, h := range l.hosts {
			h.hangUp()
		}
	}()
	for first := true; ; first = false {
		began := time.Now()
		needed := true
		func() {
			defer survive(l.log, "look-out for the newest server")
			needed = l.round(ctx, first)
		}()
		if first {
			close(l.asked)
		}
		if !needed && l.fixed() {
			return
		}
		pause := time.NewTimer(time.Until(began.Add(time.Duration(float64(lookInterval) * (0.9 + 0.2*rand.Float64())))))
		select {
		case <-pause.C:
		case <-l.nudged:
			select {
			case <-time.After(time.Until(began.Add(lookRest))):
			case <-ctx.Done():
			}
		case <-ctx.Done():
		}
		pause.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// fixed reports whether the hosts stay the same.
func (l *lookout) fixed() bool {
	return !slices.ContainsFunc(l.sources, func(s *source) bool { return s.file != "" })
}

// round asks all hosts once, side by side. It reports whether there is anything to find out: another host than the one in
// use, or another server behind a pooler.
func (l *lookout) round(ctx context.Context, first bool) (needed bool) {
	hosts := l.refresh()
	if len(hosts) == 1 && !hosts[0].source.pooled {
		return false
	}
	patience := lookPatience
	if first {
		patience = firstPatience
	}
	answers := make(chan *LineageGetRow, len(hosts))
	for _, h := range hosts {
		go func() {
			var answer *LineageGetRow
			defer func() { answers <- answer }()
			defer survive(l.log, "question to a host")
			asking, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			answer = l.ask(asking, h, first)
		}()
	}
	var said []LineageGetRow
	for range hosts {
		if row := <-answers; row != nil {
			said = append(said, *row)
		}
	}
	if first {
		l.fence.survey(said)
	}
	return true
}

// refresh reads the connection strings again, and returns the hosts that they name now.
func (l *lookout) refresh() []*host {
	var named []*host
	for _, s := range l.sources {
		cfg := s.current()
		for _, one := range oneEach(cfg) {
			named = append(named, &host{address: address(one.Host, one.Port), source: s, cfg: one, suits: cfg.ValidateConnect, standing: unknown})
		}
	}
	hosts := make(map[string]*host, len(named))
	l.mu.Lock()
	defer l.mu.Unlock()
	var list []*host
	for _, h := range named {
		if hosts[h.address] != nil {
			continue // the listener's string names it, too
		}
		if known := l.hosts[h.address]; known != nil {
			known.source, known.cfg, known.suits = h.source, h.cfg, h.suits
			h = known
		}
		hosts[h.address] = h
		list = append(list, h)
	}
	for address, h := range l.hosts {
		if hosts[address] == nil {
			defer h.hangUp() // it is not named any more
		}
	}
	l.hosts = hosts
	return list
}

// hasSchema asks a server for the schema, without failing if it is not there.
const hasSchema = `SELECT pg_catalog.to_regprocedure('pgbroker.server_timeline()') IS NOT NULL`

// ask asks one host, and says what follows from its answer.
func (l *lookout) ask(ctx context.Context, h *host, first bool) *LineageGetRow {
	now, row, err := l.lineage(ctx, h, first)
	if err != nil && ctx.Err() == nil && !first && now != silent {
		// A kept connection ends when its server does; the next one may be there already.
		now, row, err = l.lineage(ctx, h, first)
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return nil
	}
	l.note(h, now, err)
	return row
}

// lineage returns how a host stands, and what it says of itself, if it does.
func (l *lookout) lineage(ctx context.Context, h *host, first bool) (_ standing, _ *LineageGetRow, err error) {
	defer func() {
		// A pooler may have given it a session of its own, and somebody who pauses the pooler would wait for that to end.
		if err != nil || h.source.pooled {
			h.hangUp()
		}
	}()
	failed := func(err error) (standing, *LineageGetRow, error) {
		if ctx.Err() != nil {
			return silent, nil, err
		}
		return closed, nil, err
	}
	fresh := h.conn == nil || time.Since(h.since) > lookLifetime
	if fresh {
		h.hangUp()
		if h.conn, err = pgconn.ConnectConfig(ctx, &h.cfg.Config); err != nil {
			h.conn = nil
			return failed(err)
		}
		h.since = time.Now()
	}
	if h.bare && !fresh { // an error every second would fill its log
		var there bool
		if err := (bareConn{h.conn}).QueryRow(ctx, hasSchema).Scan(&there); err != nil {
			return failed(err)
		}
		if !there {
			return unfit, nil, nil
		}
	}
	known := l.fence.known()
	row, err := New(bareConn{h.conn}).LineageGet(ctx, LineageGetParams{
		Epoch: known.firstVersion, EpochSystem: known.system, EpochTimeline: known.timeline,
	})
	h.bare = isUndefined(err)
	switch {
	case h.bare:
		return unfit, nil, nil
	case err != nil:
		return failed(err)
	}
	behind := !first && l.fence.hear(h, known, row)
	if fresh || !h.suited || row.ReadOnly != h.row.ReadOnly || row.Timeline != h.row.Timeline {
		h.suited = h.suits == nil || h.suits(ctx, h.conn) == nil
		if ctx.Err() != nil || h.conn.IsClosed() {
			return failed(cmp.Or(ctx.Err(), net.ErrClosed))
		}
	}
	h.row = row
	switch {
	case behind:
		return past, &row, nil
	case !h.suited:
		return unfit, &row, nil
	}
	return good, &row, nil
}

// note remembers how a host stands. When there is one to use, attempts to connect to hosts that do not answer are given up.
func (l *lookout) note(h *host, now standing, err error) {
	l.mu.Lock()
	before := h.standing
	h.standing, h.reason = now, err
	var hopeless []string
	better := false
	for _, other := range l.hosts {
		switch other.standing {
		case silent:
			hopeless = append(hopeless, other.address)
		case good:
			better = true
		}
	}
	l.mu.Unlock()
	switch {
	case now == past && before != past:
		l.log.Error("a host of the connection string was left for a newer one and is still there: stop it, for others may write to it",
			"host", h.address, "read_only", h.row.ReadOnly)
	case answers(before) && !answers(now):
		l.log.Warn("a host of the connection string does not answer", "host", h.address, "error", err)
	case before == unknown && !answers(now):
		l.log.Info("a host of the connection string does not answer", "host", h.address, "error", err)
	case before != unknown && !answers(before) && answers(now):
		l.log.Info("a host of the connection string answers again", "host", h.address)
	}
	if better {
		l.fence.abandon(hopeless)
	}
	if now == good && before != good {
		for _, s := range l.sources {
			s.gate.open()
		}
	}
}

// answers reports whether a host has answered when last asked.
func answers(s standing) bool { return s == good || s == unfit || s == past }

// Hosts is how many hosts the connection strings name, how many of them have
// answered when last asked, and how many of those were left for a newer one.
type Hosts struct{ Named, Answering, Past int }

func (l *lookout) count() (n Hosts) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, h := range l.hosts {
		if len(l.hosts) == 1 && h.standing == unknown {
			return n // it is not asked
		}
		n.Named++
		if answers(h.standing) {
			n.Answering++
		}
		if h.standing == past {
			n.Past++
		}
	}
	return n
}

// arrange puts the hosts of a configuration into the order in which they are worth a try; the order of the string decides
// between equals. A host that does not answer is left out as long as another one does: it will be asked again, here.
func (l *lookout) arrange(cfg *pgx.ConnConfig) {
	ways := waysOf(cfg)
	l.mu.Lock()
	of := func(way *pgconn.FallbackConfig) standing {
		if h := l.hosts[address(way.Host, way.Port)]; h != nil {
			return h.standing
		}
		return unknown
	}
	slices.SortStableFunc(ways, func(a, b *pgconn.FallbackConfig) int { return cmp.Compare(of(a), of(b)) })
	if of(ways[0]) < closed {
		ways = slices.DeleteFunc(ways, func(way *pgconn.FallbackConfig) bool { return of(way) == silent })
	}
	l.mu.Unlock()
	cfg.Host, cfg.Port, cfg.TLSConfig, cfg.Fallbacks = ways[0].Host, ways[0].Port, ways[0].TLSConfig, ways[1:]
}

// waysOf returns the ways to the hosts of a configuration, in order; with sslmode prefer each host has two.
func waysOf(cfg *pgx.ConnConfig) []*pgconn.FallbackConfig {
	return append([]*pgconn.FallbackConfig{{Host: cfg.Host, Port: cfg.Port, TLSConfig: cfg.TLSConfig}}, cfg.Fallbacks...)
}

// oneEach splits a configuration into one for each host, which takes any server.
func oneEach(cfg *pgx.ConnConfig) []*pgx.ConnConfig {
	var all []*pgx.ConnConfig
	byHost := make(map[string]*pgx.ConnConfig)
	for _, way := range waysOf(cfg) {
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

// hangUp closes the connection, if there is one.
func (h *host) hangUp() {
	if h.conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_ = h.conn.Close(ctx) // it was only asked
	h.conn = nil
}
