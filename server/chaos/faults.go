package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// fault is something that goes wrong and is put right again.
type fault struct {
	kind string
	// where: two faults at one place would hide each other, or wait for each other.
	place place
	// hold is how long it lasts; 0 is over at once.
	least, most time.Duration
	// blinds says that meanwhile the replica cannot use the database, and is not told.
	blinds bool
	// inject makes it happen and returns how to put it right, which may be nil.
	inject func(*injector, *replica) (heal func() error, err error)
}

// place is what a fault strikes.
type place string

const (
	atReplica  place = "replica"
	atPostgres place = "postgres" // its processes and its disk
	atSession  place = "session"  // what sessions do to each other
)

// faults is every kind of fault there is.
var faults = []fault{
	{kind: "replica killed", place: atReplica, least: 100 * time.Millisecond, most: 3 * time.Second, inject: (*injector).killReplica},
	{kind: "replica stopped gracefully", place: atReplica, most: time.Second, inject: (*injector).restartReplica},
	{kind: "replica frozen", place: atReplica, least: 300 * time.Millisecond, most: 6 * time.Second, inject: (*injector).freezeReplica},
	{kind: "replica with a wrong clock", place: atReplica, inject: (*injector).skewReplica},
	{kind: "replica of the previous version", place: atReplica, inject: (*injector).downgradeReplica},
	{kind: "front cut", place: atReplica, least: 100 * time.Millisecond, most: 3 * time.Second, inject: (*injector).cutFront},
	{kind: "front slow", place: atReplica, least: time.Second, most: 5 * time.Second, inject: (*injector).slowFront},
	{kind: "front half open", place: atReplica, least: time.Second, most: 8 * time.Second, inject: (*injector).swallowFront},
	{kind: "back cut", place: atReplica, least: 100 * time.Millisecond, most: 3 * time.Second, inject: (*injector).cutBack},
	{kind: "back slow", place: atReplica, least: time.Second, most: 5 * time.Second, inject: (*injector).slowBack},
	{kind: "back half open", place: atReplica, least: time.Second, most: 45 * time.Second, blinds: true, inject: (*injector).swallowBack},
	{kind: "listener terminated", place: atSession, inject: (*injector).terminateListener},
	{kind: "backend terminated", place: atSession, inject: (*injector).terminateBackend},
	{kind: "order lock held", place: atSession, least: 300 * time.Millisecond, most: 8 * time.Second, inject: (*injector).holdOrderLock},
	{kind: "connection limit", place: atSession, least: 500 * time.Millisecond, most: 4 * time.Second, inject: (*injector).limitConnections},
	{kind: "backend killed", place: atPostgres, least: time.Second, most: time.Second, inject: (*injector).killBackend},
	{kind: "backend frozen", place: atPostgres, least: 300 * time.Millisecond, most: 7 * time.Second, inject: (*injector).freezeBackend},
	{kind: "postmaster frozen", place: atPostgres, least: 300 * time.Millisecond, most: 5 * time.Second, inject: (*injector).freezePostmaster},
	{kind: "postgres frozen", place: atPostgres, least: 300 * time.Millisecond, most: 7 * time.Second, inject: (*injector).freezePostgres},
	{kind: "postgres killed", place: atPostgres, least: 100 * time.Millisecond, most: 3 * time.Second, inject: (*injector).killPostgres},
	{kind: "postgres restarted", place: atPostgres, most: time.Second, inject: (*injector).restartPostgres},
	{kind: "disk full", place: atPostgres, least: time.Second, most: 4 * time.Second, inject: (*injector).fillDisk},
}

// active is a fault that has not been put right yet.
type active struct {
	fault   *fault
	replica *replica
	since   time.Duration
	until   time.Duration
	heal    func() error
}

// injector makes things go wrong, in an order drawn from the seed.
type injector struct {
	cluster  *Cluster
	recorder *recorder
	random   *rand.Rand
	only     *regexp.Regexp // kinds; nil for all
	hurry    bool           // holds are short
	log      func(format string, args ...any)

	deck    []*fault
	active  []*active
	counts  map[string]int    // injected
	skipped map[string]string // impossible here: why
}

// atOnce is how many faults may last at the same time.
const atOnce = 2

func newInjector(c *Cluster, r *recorder, config Config, log func(string, ...any)) *injector {
	in := &injector{
		cluster: c, recorder: r, random: rand.New(rand.NewPCG(config.Seed, 1<<32)),
		only: config.Only, hurry: config.Hurry, log: log,
		counts: make(map[string]int), skipped: make(map[string]string),
	}
	if c.noDisk != nil {
		in.skipped["disk full"] = c.noDisk.Error()
	}
	if c.previous == "" {
		in.skipped["replica of the previous version"] = c.noPrevious.Error()
	}
	if c.skewed == "" {
		in.skipped["replica with a wrong clock"] = "no program with a wrong clock was built"
	}
	return in
}

// run injects faults for a time, and puts all right in the end. Every kind has had its turn before one has
// another; after each round there is a time without faults, in which calm is called.
func (in *injector) run(ctx context.Context, duration time.Duration, calm func()) {
	end := in.recorder.now() + duration
	for in.recorder.now() < end && ctx.Err() == nil {
		in.healDue(false)
		if len(in.deck) == 0 {
			if in.total() > 0 {
				in.healDue(true)
				calm()
			}
			in.shuffle()
		}
		if len(in.active) < atOnce {
			in.next(end)
		}
		longest := 2 * time.Second
		if in.hurry {
			longest /= 4
		}
		pause(ctx, time.Duration(in.random.Int64N(int64(longest))))
	}
	in.healDue(true)
}

func (in *injector) total() (n int) {
	for _, count := range in.counts {
		n += count
	}
	return n
}

// smallDeck is the least number of faults between two times without.
const smallDeck = 15

func (in *injector) shuffle() {
	var kinds []*fault
	for i := range faults {
		if in.skipped[faults[i].kind] == "" && (in.only == nil || in.only.MatchString(faults[i].kind)) {
			kinds = append(kinds, &faults[i])
		}
	}
	for len(kinds) > 0 && len(in.deck) < smallDeck {
		in.deck = append(in.deck, kinds...)
	}
	in.random.Shuffle(len(in.deck), func(i, j int) { in.deck[i], in.deck[j] = in.deck[j], in.deck[i] })
}

// next injects the next fault of the deck whose place is free.
func (in *injector) next(end time.Duration) {
	victim := in.cluster.replicas[in.random.IntN(len(in.cluster.replicas))]
	hold := in.random.Float64()
	for i, f := range in.deck {
		a := &active{fault: f}
		if f.place == atReplica {
			a.replica = victim
		}
		if in.occupied(a) {
			continue
		}
		in.deck = append(in.deck[:i:i], in.deck[i+1:]...)
		longest := f.most
		if in.hurry {
			longest = min(longest, max(f.least, 1500*time.Millisecond))
		}
		lasts := f.least + time.Duration(hold*hold*float64(longest-f.least)) // short ones hit other moments
		a.since = in.recorder.now()
		var err error
		if a.heal, err = f.inject(in, victim); err != nil {
			// The database may be away just now, or have no such session.
			in.log("%v: %s: not possible now: %v", a.since.Round(time.Millisecond), in.name(a), err)
			if a.heal != nil {
				a.until = a.since // it may have happened by half
				in.active = append(in.active, a)
			}
			return
		}
		in.counts[f.kind]++
		in.log("%v: %s for %v", a.since.Round(time.Millisecond), in.name(a), lasts.Round(time.Millisecond))
		a.until = min(a.since+lasts, end)
		if a.heal != nil {
			in.active = append(in.active, a)
		}
		return
	}
}

func (in *injector) name(a *active) string {
	if a.replica != nil {
		return fmt.Sprintf("%s (%d)", a.fault.kind, a.replica.number)
	}
	return a.fault.kind
}

func (in *injector) occupied(a *active) bool {
	for _, other := range in.active {
		if other.fault.place == a.fault.place && other.replica == a.replica {
			return true
		}
	}
	return false
}

// healTime is for how long it is tried to put a fault right: others may stand in the way, which are put right meanwhile.
const healTime = 30 * time.Second

// healDue puts right what has lasted long enough, or everything; what came last comes first.
func (in *injector) healDue(all bool) {
	for {
		var left []*active
		for _, a := range slices.Backward(in.active) {
			if !all && in.recorder.now() < a.until {
				left = append(left, a)
				continue
			}
			if err := a.heal(); err != nil {
				if in.recorder.now() < a.until+healTime {
					left = append(left, a)
					continue
				}
				in.recorder.addLate(fmt.Sprintf("%s could not be put right: %v", in.name(a), err))
			}
			if a.fault.blinds {
				in.recorder.addOutage(Outage{a.replica.number, a.fault.kind, a.since, in.recorder.now()})
			}
		}
		slices.Reverse(left)
		in.active = left
		if !all || len(left) == 0 {
			return
		}
		pause(context.Background(), 500*time.Millisecond)
	}
}

// ---------------------------------------------------------------------------------------------
// Replicas
// ---------------------------------------------------------------------------------------------

func (in *injector) startAgain(r *replica) func() error {
	return func() error { return in.cluster.start(r, in.cluster.current, "") }
}

func (in *injector) killReplica(r *replica) (func() error, error) {
	return in.startAgain(r), r.stop(syscall.SIGKILL)
}

func (in *injector) restartReplica(r *replica) (func() error, error) {
	return in.startAgain(r), r.stop(syscall.SIGTERM)
}

func (in *injector) freezeReplica(r *replica) (func() error, error) {
	return func() error { return r.process.signal(syscall.SIGCONT) }, r.process.signal(syscall.SIGSTOP)
}

// skewReplica replaces a replica by one whose clock is wrong, until it is replaced again. Tokens are valid
// for an hour from the clients' clock on, so it may be half an hour off.
func (in *injector) skewReplica(r *replica) (func() error, error) {
	if err := r.stop(syscall.SIGTERM); err != nil {
		return nil, err
	}
	seconds := in.random.IntN(1800) - 900
	in.log("the clock of replica %d is wrong by %d s from now on", r.number, seconds)
	return nil, in.cluster.start(r, in.cluster.skewed, strconv.Itoa(seconds))
}

// downgradeReplica replaces a replica by one of the previous version, until it is replaced again.
func (in *injector) downgradeReplica(r *replica) (func() error, error) {
	if err := r.stop(syscall.SIGTERM); err != nil {
		return nil, err
	}
	return nil, in.cluster.start(r, in.cluster.previous, "")
}

// ---------------------------------------------------------------------------------------------
// Links
// ---------------------------------------------------------------------------------------------

func (in *injector) cutFront(r *replica) (func() error, error) { return r.front.join, r.front.cut() }
func (in *injector) cutBack(r *replica) (func() error, error)  { return r.back.join, r.back.cut() }

func (in *injector) slowFront(r *replica) (func() error, error) { return in.slow(r.front) }
func (in *injector) slowBack(r *replica) (func() error, error)  { return in.slow(r.back) }

func (in *injector) slow(l *link) (func() error, error) {
	delay := time.Duration(20+in.random.IntN(300)) * time.Millisecond
	return l.clear, l.slow(delay, delay/2)
}

func (in *injector) swallowFront(r *replica) (func() error, error) { return in.swallow(r.front) }
func (in *injector) swallowBack(r *replica) (func() error, error)  { return in.swallow(r.back) }

// swallow makes one direction disappear, or both.
func (in *injector) swallow(l *link) (func() error, error) {
	var err error
	direction := in.random.IntN(3)
	if direction != 0 {
		err = errors.Join(err, l.swallow("upstream"))
	}
	if direction != 1 {
		err = errors.Join(err, l.swallow("downstream"))
	}
	return l.clear, err
}

// ---------------------------------------------------------------------------------------------
// Sessions
// ---------------------------------------------------------------------------------------------

// notThis leaves out the session that asks.
const notThis = ` AND pid <> pg_backend_pid() AND datname = current_database()`

func (in *injector) terminateListener(*replica) (func() error, error) {
	return nil, in.cluster.admin(context.Background(),
		`SELECT pg_terminate_backend(pid)::text FROM pg_stat_activity WHERE application_name LIKE '%listener'`+notThis+` ORDER BY random() LIMIT 1`)
}

func (in *injector) terminateBackend(*replica) (func() error, error) {
	return nil, in.cluster.admin(context.Background(),
		`SELECT pg_terminate_backend(pid)::text FROM pg_stat_activity WHERE backend_type = 'client backend'`+notThis+` ORDER BY random() LIMIT 1`)
}

// holdOrderLock is somebody who has left a transaction open in psql.
func (in *injector) holdOrderLock(*replica) (func() error, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, in.cluster.postgres.SocketConnString())
	if err != nil {
		return nil, err
	}
	// The simple protocol: one message, BEGIN and all.
	if _, err := conn.Exec(ctx, `BEGIN; SELECT pgbroker.lock_order()`, pgx.QueryExecModeSimpleProtocol); err != nil {
		conn.Close(ctx)
		return nil, err
	}
	return func() error {
		closing, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = conn.Close(closing) // the session may have been ended already
		return nil
	}, nil
}

// limitConnections lets the replicas have fewer connections than they have, and ends those that they have.
func (in *injector) limitConnections(*replica) (func() error, error) {
	ctx := context.Background()
	limit := strconv.Itoa(1 + in.random.IntN(4))
	if err := in.cluster.admin(ctx, `ALTER ROLE `+role+` CONNECTION LIMIT `+limit); err != nil {
		return nil, err
	}
	heal := func() error { return in.cluster.admin(ctx, `ALTER ROLE `+role+` CONNECTION LIMIT -1`) }
	return heal, in.cluster.admin(ctx, `SELECT count(pg_terminate_backend(pid))::text FROM pg_stat_activity WHERE usename = '`+role+`'`+notThis)
}

// ---------------------------------------------------------------------------------------------
// PostgreSQL
// ---------------------------------------------------------------------------------------------

// backend returns the process of a session of a replica.
func (in *injector) backend() (int, error) {
	text, err := in.cluster.adminText(context.Background(),
		`SELECT pid::text FROM pg_stat_activity WHERE usename = '`+role+`'`+notThis+` ORDER BY state <> 'active', random() LIMIT 1`)
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(text)
	if err != nil {
		return 0, errors.New("no replica is connected")
	}
	return pid, nil
}

// killBackend makes the postmaster believe that memory is damaged: it ends all sessions and recovers.
func (in *injector) killBackend(*replica) (func() error, error) {
	pid, err := in.backend()
	if err != nil {
		return nil, err
	}
	return in.awaitPostgres, syscall.Kill(pid, syscall.SIGKILL)
}

func (in *injector) freezeBackend(*replica) (func() error, error) {
	pid, err := in.backend()
	if err != nil {
		return nil, err
	}
	return func() error { return proceed(pid) }, syscall.Kill(pid, syscall.SIGSTOP)
}

// proceed ends a freeze, unless the process has ended meanwhile.
func proceed(pids ...int) (err error) {
	for _, pid := range pids {
		if e := syscall.Kill(pid, syscall.SIGCONT); e != nil && !errors.Is(e, syscall.ESRCH) {
			err = errors.Join(err, e)
		}
	}
	return err
}

func (in *injector) freezePostmaster(*replica) (func() error, error) {
	pid := in.cluster.postgres.PID()
	return func() error { return proceed(pid) }, syscall.Kill(pid, syscall.SIGSTOP)
}

// freezePostgres is a machine that stands still.
func (in *injector) freezePostgres(*replica) (func() error, error) {
	pids := []int{in.cluster.postgres.PID()}
	if err := syscall.Kill(pids[0], syscall.SIGSTOP); err != nil { // first: it starts no others
		return nil, err
	}
	for _, pid := range children(pids[0]) {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err == nil {
			pids = append(pids, pid)
		}
	}
	return func() error { return proceed(pids...) }, nil
}

func (in *injector) killPostgres(*replica) (func() error, error) {
	if !in.cluster.postgresRuns() {
		return nil, errors.New("it does not run")
	}
	in.cluster.postgres.Kill()
	return in.awaitPostgres, nil
}

func (in *injector) restartPostgres(*replica) (func() error, error) {
	if !in.cluster.postgresRuns() {
		return nil, errors.New("it does not run")
	}
	in.cluster.postgres.Stop()
	return in.awaitPostgres, nil
}

// fillDisk takes all room from the database: tables cannot grow. Half of the time its log has no file left
// to go on in either, and the server stops.
func (in *injector) fillDisk(*replica) (func() error, error) {
	ballast := filepath.Join(in.cluster.disk, "ballast")
	heal := func() error {
		if err := os.Remove(ballast); err != nil {
			return err
		}
		return in.awaitPostgres()
	}
	if err := fillDisk(ballast); err != nil {
		return heal, err
	}
	if in.random.IntN(2) == 0 {
		for range 6 { // more than there are files in stock
			_ = in.cluster.admin(context.Background(), // which fails when it succeeds
				`SELECT pg_switch_wal()::text FROM pg_logical_emit_message(false, 'chaos', repeat('x', 1000))`)
		}
	}
	return heal, nil
}

// awaitPostgres returns when the database answers, and starts it if it has ended.
func (in *injector) awaitPostgres() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for {
		if !in.cluster.postgresRuns() {
			in.cluster.postgres.Restart()
		}
		err := in.cluster.admin(ctx, `SELECT 'here'`)
		if err == nil || ctx.Err() != nil {
			return err
		}
		pause(ctx, 50*time.Millisecond)
	}
}
