// Package changefeed delivers the change log of the database to any number of streams at the cost of one.
//
// A replica has one [Feed]. Its listener keeps one connection on which Postgres says that something has
// changed; its tailer then reads what follows its head, once for all streams, and publishes it in a
// bounded ring of recent changes. A stream is a [Cursor] that pulls: inside the ring it reads memory,
// behind the ring it reads the table in pages. Nothing is queued per stream and nothing is dropped.
//
// A notification is only a wake-up and the table is the truth: lost, merged, early or spurious wake-ups
// cost latency, never a change, because the tailer also looks on a slow tick and after each reconnect.
package changefeed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"pgbroker/db"
)

// Channels on which the database notifies.
const (
	channelChanges  = "pgbroker_changes"
	channelServices = "pgbroker_services"
)

// Reasons for which a stream must start over. They arise in [Feed.Open] and in [Cursor.Next].
var (
	// ErrDataSetChanged: the server version is another one than the stream's; all it knows is void.
	ErrDataSetChanged = errors.New("the data set has been replaced")
	// ErrPurged: tombstones that the stream has not seen have passed their retention.
	ErrPurged = errors.New("changes after the record version have been purged")
	// ErrLost: the stream has seen changes that a failover or restore has undone.
	ErrLost = errors.New("the record version has been lost in a failover")
)

// ErrStopped is what cursors get when the feed has stopped.
var ErrStopped = errors.New("the change feed has stopped")

// DefaultPollInterval is how often changes are looked for unasked, if nothing else is configured.
const DefaultPollInterval = 2 * time.Second

// Config of a Feed. All fields without a stated default are required.
type Config struct {
	// Queries reads the database for all streams together.
	Queries *db.Queries
	// Streams reads it for single ones, of which there may be many; nil means Queries.
	Streams *db.Queries
	// Listen opens the connection that listens for notifications.
	Listen func(context.Context) (*pgx.Conn, error)
	// Settle makes sure that the server is one that this replica may use, and begins its epoch. It is called
	// when the database can be read again.
	Settle func(context.Context) error
	// Doubt is told that a connection to the database does not answer what takes no time, so that others like it are not
	// waited for. It must not block. Nil is allowed.
	Doubt func(error)
	// Encode turns a change into the bytes that every stream sends. It is called once for each change
	// in the ring, and once for each change that a stream behind the ring reads. Nil leaves the change out: of data that
	// cannot be delivered.
	Encode func(*db.ChangesAfterRow) []byte
	// Guard runs a task until ctx ends or the task returns, and runs it again when it panics. Nil lets a panic pass.
	Guard func(ctx context.Context, task string, run func(context.Context))
	// OnServices is called when the set of registered services may have changed, from the listener's
	// goroutine; it must not block. Nil is allowed.
	OnServices func()
	// RingBytes bounds the recent changes kept in memory; 0 means 64 MiB.
	RingBytes int
	// PollInterval is how often the tailer looks unasked; 0 means 2 s.
	PollInterval time.Duration
	// Logger takes what operators should know; nil means slog.Default.
	Logger *slog.Logger
}

// Change is one change, ready to send. It is shared by all streams and must not be modified.
type Change struct {
	Version int64
	Type    string
	// Message is the change as Config.Encode has made it.
	Message []byte
}

// changeOverhead is what a change costs in memory beside its message.
const changeOverhead = 96

// Options are the options of all record types at one time. They must not be modified.
type Options struct {
	version int64
	// Types has a row for every record type, by type.
	Types map[string]db.OptionsListRow
}

// Feed is a replica's ordered source of changes.
type Feed struct {
	config   Config
	logger   *slog.Logger
	listener *listener
	wake     chan struct{}
	catchUp  chan struct{} // bounds the streams that read the table at the same time
	view     atomic.Pointer[view]
	stats    stats

	followers followers
}

// view is what cursors see: an immutable snapshot, replaced as a whole by the tailer.
type view struct {
	// generation changes when the tailer begins anew after a panic.
	generation    int64
	serverVersion int64 // 0 until the database has been read for the first time
	options       *Options
	start, head   int64 // the feed has read every change in (start, head]
	all           *ring
	types         map[string]*ring // of the types that have changed since start; that of "" is not the one of all types
	bytes         int              // of all
	err           error            // why the latest read of the database failed; nil if it succeeded
	stopped       bool
	replaced      chan struct{} // closed when a newer view is there
	turned        chan struct{} // closed when one is there that differs in more than changes of known types
}

// ring is the recent changes of a type, or of all types; immutable, too. Streams of one type, and most are, neither look at
// nor wake up for what happens to others.
type ring struct {
	base    int64         // the ring holds every change in (base, view.head]
	changes []*Change     // ascending by version; may begin with some up to base
	grown   chan struct{} // closed when there is one with further changes; nil if there was no change yet
}

// ring returns the ring that is read by whoever follows a type, or all types ("").
func (v *view) ring(recordType string) *ring {
	if recordType == "" {
		return v.all
	}
	return v.ringOfType(recordType)
}

// ringOfType returns the ring of the records of a type.
func (v *view) ringOfType(recordType string) *ring {
	if r, ok := v.types[recordType]; ok {
		return r
	}
	return &ring{base: v.start}
}

// New returns a feed that does nothing until Run.
func New(config Config) *Feed {
	config.RingBytes = cmp.Or(config.RingBytes, 64<<20)
	config.PollInterval = cmp.Or(config.PollInterval, DefaultPollInterval)
	config.Logger = cmp.Or(config.Logger, slog.Default())
	config.Streams = cmp.Or(config.Streams, config.Queries)
	if config.Guard == nil {
		config.Guard = func(ctx context.Context, _ string, run func(context.Context)) { run(ctx) }
	}
	f := &Feed{
		config:  config,
		logger:  config.Logger,
		wake:    make(chan struct{}, 1),
		catchUp: make(chan struct{}, 2),

		followers: newFollowers(),
	}
	if config.Doubt == nil {
		config.Doubt = func(error) {}
		f.config.Doubt = config.Doubt
	}
	f.listener = &listener{
		connect: config.Listen,
		doubt:   config.Doubt,
		logger:  config.Logger,
		stats:   &f.stats,
		retry:   config.PollInterval,
		wake: map[string]func(){
			channelChanges:  f.Wake,
			channelServices: config.OnServices,
		},
	}
	f.view.Store(&view{
		all: &ring{grown: make(chan struct{})}, err: errors.New("the database has not been read yet"),
		replaced: make(chan struct{}), turned: make(chan struct{}),
	})
	return f
}

// Run feeds the cursors until ctx ends. It never fails: while the database is away it keeps trying, and
// cursors wait.
func (f *Feed) Run(ctx context.Context) error {
	var group errgroup.Group
	group.Go(func() error { f.config.Guard(ctx, "listener", f.listener.run); return nil })
	group.Go(func() error {
		fresh := true
		f.config.Guard(ctx, "change feed", func(ctx context.Context) {
			if !fresh {
				f.beginAnew()
			}
			fresh = false
			f.tail(ctx)
		})
		return nil
	})
	err := group.Wait()
	f.publish(func(v *view) { v.stopped = true })
	return err
}

// Wake makes the tailer look for changes now.
func (f *Feed) Wake() {
	select {
	case f.wake <- struct{}{}:
	default: // a look is due already
	}
}

// Err says why the latest read of the database failed; nil if it succeeded.
func (f *Feed) Err() error { return f.view.Load().err }

// Options returns the options of all record types as last read. Nil before the first read.
func (f *Feed) Options() *Options { return f.view.Load().options }

// Watch returns a channel that is closed at the next event of any kind: changes, options, failure,
// recovery.
func (f *Feed) Watch() <-chan struct{} { return f.view.Load().replaced }

// publish replaces the view by a changed copy and wakes those who wait for what has changed. Only the tailer's goroutine, and
// Run after it, may call it.
func (f *Feed) publish(change func(*view)) {
	old := f.view.Load()
	next := *old
	next.replaced = make(chan struct{})
	change(&next)
	turned := next.generation != old.generation || next.serverVersion != old.serverVersion || next.options != old.options || next.stopped != old.stopped ||
		(next.err == nil) != (old.err == nil) || len(next.types) != len(old.types)
	if turned {
		next.turned = make(chan struct{})
	}
	f.view.Store(&next)
	close(old.replaced)
	if turned {
		close(old.turned)
	}
	if next.all.grown != old.all.grown {
		close(old.all.grown)
	}
	for recordType, r := range old.types {
		if now := next.types[recordType]; now == nil || now.grown != r.grown {
			close(r.grown)
		}
	}
}

// beginAnew replaces what is in memory, of which nothing can be relied on after a panic: streams read the table from where they
// are, and the next read fills new rings. Whoever waits is woken, whether he has been already or not.
func (f *Feed) beginAnew() {
	old := f.view.Load()
	next := &view{
		generation: old.generation + 1, serverVersion: old.serverVersion, start: old.head, head: old.head, err: old.err, stopped: old.stopped,
		all: &ring{base: old.head, grown: make(chan struct{})}, replaced: make(chan struct{}), turned: make(chan struct{}),
	}
	if old.options != nil {
		next.options = &Options{version: unreadOptions, Types: old.options.Types}
	}
	f.view.Store(next)
	closeOnce(old.replaced)
	closeOnce(old.turned)
	closeOnce(old.all.grown)
	for _, r := range old.types {
		closeOnce(r.grown)
	}
	f.Wake()
}

// closeOnce closes a channel unless that has been done, by the goroutine that calls or one that has ended.
func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// unreadOptions is the version of options that are to be read again; those of the database are not negative.
const unreadOptions = -1

// Cursor is a reader's place in the feed. It is not safe for concurrent use.
type Cursor struct {
	feed          *Feed
	recordType    string
	serverVersion int64
	version       int64 // everything up to here has been delivered, or is of another type
	// ahead says that version was above the head when last seen: the client comes from a faster replica, or
	// has seen what a failover then undid. The table tells which.
	ahead   bool
	options *Options
	page    int // most changes to read from the table at once
}

// Open returns a cursor for the changes of a type, or of all types if it is "", after a version. It fails
// with one of the reasons to start over if not all of those changes are there. Close the cursor when it is
// no longer needed.
func (f *Feed) Open(ctx context.Context, serverVersion, version int64, recordType string) (*Cursor, error) {
	// First, so that what the tailer reads from now on is in the ring.
	f.followers.add(recordType)
	cursor := &Cursor{feed: f, recordType: recordType, serverVersion: serverVersion, version: version, page: maxNextChanges}
	if err := cursor.open(ctx); err != nil {
		cursor.Close()
		return nil, err
	}
	return cursor, nil
}

// Close says that the cursor is no longer needed.
func (c *Cursor) Close() { c.feed.followers.remove(c.recordType) }

// open checks that a cursor can begin where it is.
func (c *Cursor) open(ctx context.Context) error {
	f := c.feed
	if err := f.awaitDataSet(ctx, c.serverVersion); err != nil {
		return err
	}
	check, err := f.config.Streams.StreamCheck(ctx, db.StreamCheckParams{Type: c.recordType, Version: c.version})
	switch {
	case err != nil:
		return fmt.Errorf("check the stream's versions: %w", err)
	case check.ServerVersion != c.serverVersion:
		return ErrDataSetChanged
	case check.Lost:
		return ErrLost
	case check.PurgedVersion > c.version:
		return ErrPurged
	}
	if c.version > f.view.Load().head {
		f.Wake() // the client comes from a faster replica
	}
	// A stream starts with the options of the moment, also those that another replica has just set.
	return f.await(ctx, func(v *view) bool { return v.options.version >= check.OptionsVersion })
}

// awaitDataSet waits until the feed follows the data set of a server version, and fails with
// ErrDataSetChanged if the database has another one: this replica or the client may be the one that has
// not heard of a change yet.
func (f *Feed) awaitDataSet(ctx context.Context, serverVersion int64) error {
	for {
		v := f.view.Load()
		if v.serverVersion == serverVersion && serverVersion != 0 {
			return nil
		}
		// Each time anew: the data set that this replica is to catch up with may be replaced before it does.
		state, err := f.config.Streams.StateGet(ctx)
		if err != nil {
			return fmt.Errorf("read the server version: %w", err)
		}
		if state.ServerVersion != serverVersion {
			return ErrDataSetChanged
		}
		if err := f.await(ctx, func(newer *view) bool { return newer != v }); err != nil {
			return err
		}
	}
}

// await waits for a view.
func (f *Feed) await(ctx context.Context, condition func(*view) bool) error {
	for {
		v := f.view.Load()
		switch {
		case v.stopped:
			return ErrStopped
		case condition(v):
			return nil
		}
		f.Wake()
		select {
		case <-v.replaced:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Bounds of what one call of Next returns, so that a stream that stops reading holds little.
const (
	maxNextChanges = 256
	maxNextBytes   = 256 << 10
)

// Event is what Next returns: changes, options, or both.
type Event struct {
	// Changes in ascending order of version; each after the ones before.
	Changes []*Change
	// Options are set when they may have changed since the cursor's last event, and on its first.
	Options *Options
}

// retryTime is how long a waiting cursor leaves the table alone after a failed read.
const retryTime = time.Second

// Next returns what follows. With wait it blocks until there is something, whatever the state of the
// database; without, it returns an empty event when the cursor has reached the end of the change log. It
// fails with ctx's error, with a reason to start over, with ErrStopped or, without wait, with an error of
// the database.
func (c *Cursor) Next(ctx context.Context, wait bool) (Event, error) {
	for {
		v := c.feed.view.Load()
		switch {
		case v.stopped:
			return Event{}, ErrStopped
		case v.serverVersion != c.serverVersion:
			return Event{}, ErrDataSetChanged
		}
		var event Event
		if v.options != c.options {
			c.options = v.options
			event.Options = v.options
		}
		var retry <-chan time.Time
		end := false
		ring := v.ring(c.recordType)
		switch {
		case c.version >= ring.base && c.version < v.head && !c.ahead:
			event.Changes = c.readRing(ring, v.head)
		case c.version < v.head || !wait: // the table also knows what the ring has not heard of yet
			var err error
			event.Changes, end, err = c.readTable(ctx)
			if err != nil {
				if isReset(err) || ctx.Err() != nil || !wait {
					return Event{}, err
				}
				retry, end = time.After(retryTime), true
			}
			if end && wait && c.version < v.head {
				retry = time.After(retryTime) // another standby, which is behind the one that the tailer has read
			}
		default:
			c.ahead = c.version > v.head
			end = true
		}
		switch {
		case len(event.Changes) > 0 || event.Options != nil || end && !wait:
			return event, nil
		case !end:
			continue // passed changes of other types; there is more
		}
		select {
		case <-ring.grown:
		case <-v.turned:
		case <-retry:
		case <-ctx.Done():
			return Event{}, ctx.Err()
		}
	}
}

// Rewind takes back what Next has returned beyond a version: Next returns it again. The reader has taken some of the
// changes, and was too slow for all; as few will be read for it from the table the next time.
func (c *Cursor) Rewind(version int64, taken int) {
	c.version = version
	c.page = max(taken, 1)
}

// readRing returns the next changes from a ring that covers the cursor and reaches up to head.
func (c *Cursor) readRing(r *ring, head int64) []*Change {
	first, _ := slices.BinarySearchFunc(r.changes, c.version, func(change *Change, version int64) int {
		if change.Version <= version {
			return -1
		}
		return 1
	})
	following := r.changes[first:]
	bytes := 0
	for i, change := range following {
		if i == maxNextChanges || bytes > maxNextBytes {
			following, head = following[:i], following[i-1].Version
			break
		}
		bytes += len(change.Message)
	}
	c.version = head
	return slices.Clone(following) // or a stream that stops would keep all of the ring, as it is now, in memory
}

// readTable returns the next changes from the table, and whether those were the last ones.
func (c *Cursor) readTable(ctx context.Context) (changes []*Change, end bool, err error) {
	select {
	case c.feed.catchUp <- struct{}{}:
		defer func() { <-c.feed.catchUp }()
	case <-ctx.Done():
		return nil, false, ctx.Err()
	}
	rows, err := c.feed.config.Streams.ChangesAfter(ctx, db.ChangesAfterParams{
		Type: c.recordType, After: c.version, AllPayloads: true, PayloadTypes: []string{}, MaxRows: int32(c.page), MaxBytes: maxNextBytes,
	})
	if err != nil {
		return nil, false, fmt.Errorf("read changes: %w", err)
	}
	c.feed.stats.tableReads.Add(1)
	c.ahead = false
	first := &rows[0]
	switch {
	case first.ServerVersion != c.serverVersion:
		return nil, false, ErrDataSetChanged
	case first.Lost > 0:
		return nil, false, ErrLost
	case first.PurgedVersion > c.version:
		return nil, false, ErrPurged
	case first.Version == 0:
		// Nothing follows. A version above the latest is a client's that comes from a faster replica.
		c.version = max(c.version, first.LatestVersion)
		return nil, true, nil
	}
	changes = make([]*Change, 0, len(rows))
	for i := range rows {
		if change := c.feed.newChange(&rows[i]); change != nil {
			changes = append(changes, change)
		}
	}
	c.version = rows[len(rows)-1].Version
	c.page = min(2*c.page, maxNextChanges)
	return changes, false, nil
}

// newChange returns a change ready to send; nil if it cannot be delivered.
func (f *Feed) newChange(row *db.ChangesAfterRow) *Change {
	message := f.config.Encode(row)
	if message == nil {
		return nil
	}
	return &Change{Version: row.Version, Type: row.Type, Message: message}
}

func isReset(err error) bool {
	return errors.Is(err, ErrDataSetChanged) || errors.Is(err, ErrPurged) || errors.Is(err, ErrLost)
}

// afterAll is above every version.
const afterAll = math.MaxInt64
