package changefeed

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"pgbroker/db"
)

// Bounds of one read of the tailer.
const (
	tailRows  = 2000
	tailBytes = 4 << 20
)

// unreadTime is how long after a failed read the tailer tries again: streams and health wait for that.
const unreadTime = 250 * time.Millisecond

// A read that has not been answered for readTime was sent on a connection that leads nowhere, or to a server that is overloaded: it is
// made again on another one, and has longer, up to maxReadTime. Without that it would be waited for as long as for a statement of
// which nothing is known.
const (
	readTime    = time.Second
	maxReadTime = 8 * time.Second
)

// settleTime is how long it may take to settle with a server.
const settleTime = 5 * time.Second

// errReadUnanswered is why connections are doubted.
var errReadUnanswered = errors.New("a read of the change log is not answered")

// restTime is the time between reads while nobody follows: long enough that single writes, each of which wakes all
// replicas, are not each read by replicas without streams, and short enough for options.
const restTime = 50 * time.Millisecond

// standbyInterval is how often the tailer looks on a standby, where LISTEN is not allowed: so much later than the standby itself
// streams have a change.
const standbyInterval = 250 * time.Millisecond

// tail publishes what is new at each wake-up and on a slow tick, until ctx ends.
func (f *Feed) tail(ctx context.Context) {
	tick := time.NewTimer(f.config.PollInterval)
	defer tick.Stop()
	asked := true
	limit := readTime
	for {
		began := time.Now()
		reading, cancel := context.WithTimeout(ctx, limit)
		found, more, err := f.readNew(reading)
		late := reading.Err() != nil
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			limit = min(max(readTime, 4*time.Since(began)), maxReadTime)
		case late:
			limit = min(2*limit, maxReadTime)
			f.config.Doubt(errReadUnanswered)
		}
		f.noteRead(ctx, err)
		if found > 0 && !asked && f.stats.listening.Load() {
			f.stats.unannounced.Add(1)
		}
		if more {
			continue
		}
		tick.Reset(f.pollInterval())
		var retry <-chan time.Time
		if err != nil {
			retry = time.After(unreadTime)
		}
		select {
		case <-f.wake:
			asked = true
		case <-tick.C:
			asked = false
		case <-retry:
			asked = false
		case <-ctx.Done():
			return
		}
		f.rest(ctx)
	}
}

// pollInterval is how long the tailer waits at most. A standby announces nothing.
func (f *Feed) pollInterval() time.Duration {
	if f.stats.standby.Load() {
		return min(f.config.PollInterval, standbyInterval)
	}
	return f.config.PollInterval
}

// rest waits a moment if nobody follows, or until somebody does.
func (f *Feed) rest(ctx context.Context) {
	if !f.followers.none() || f.view.Load().err != nil {
		return
	}
	rest := time.NewTimer(restTime)
	defer rest.Stop()
	select {
	case <-f.followers.came:
	case <-rest.C:
	case <-ctx.Done():
	}
}

// noteRead publishes the transition between reading and failing.
func (f *Feed) noteRead(ctx context.Context, err error) {
	before := f.view.Load().err
	switch {
	case err != nil && before == nil:
		f.logger.WarnContext(ctx, "cannot read changes; streams wait", "error", err)
	case err == nil && before != nil:
		// The server may be another one than before: its epoch begins now, not at the next write, so that
		// streams which have seen what it lacks are told.
		settling, cancel := context.WithTimeout(ctx, settleTime)
		err = f.config.Settle(settling)
		cancel()
		if err != nil {
			f.logger.WarnContext(ctx, "cannot settle with the database", "error", err)
			return
		}
		f.logger.InfoContext(ctx, "reading changes", "version", f.view.Load().head)
	default:
		return
	}
	f.publish(func(v *view) { v.err = err })
}

// readNew reads what follows the head and publishes it. It returns how many changes that were, and whether
// there are more.
func (f *Feed) readNew(ctx context.Context) (found int, more bool, err error) {
	v := f.view.Load()
	after := v.head
	if v.serverVersion == 0 {
		after = afterAll // the first time only the end is of interest
	}
	followed := f.followers.followed()
	rows, err := f.config.Queries.ChangesAfter(ctx, db.ChangesAfterParams{
		After: after, AllPayloads: followed.all, PayloadTypes: followed.types, MaxRows: tailRows, MaxBytes: tailBytes,
	})
	if err != nil {
		return 0, false, err
	}
	f.stats.tailReads.Add(1)
	first := &rows[0]
	f.stats.standby.Store(first.Standby)
	options := v.options
	if options == nil || options.version != first.OptionsVersion {
		if options, err = f.readOptions(ctx, first.OptionsVersion); err != nil {
			return 0, false, err
		}
	}
	switch {
	case v.serverVersion != first.ServerVersion:
		f.restart(ctx, options, first)
		return 0, false, nil
	case first.Standby && first.Lost == 0 && first.LatestVersion < v.head:
		return 0, false, nil // it is behind the one that was read before, and will follow
	case versionsLost(v, first) > 0:
		err := f.forgetLost(ctx, v)
		if db.IsReadOnly(err) {
			// Nobody can be told by the data set. Streams that have seen what is lost are told when they come to it in the table.
			f.restart(ctx, options, first)
			return 0, false, nil
		}
		return 0, false, err
	case first.Version == 0:
		if options != v.options {
			f.publish(func(v *view) { v.options = options })
		}
		return 0, false, nil
	}
	f.append(options, rows, followed)
	return len(rows), rows[len(rows)-1].Version < first.LatestVersion, nil
}

// versionsLost returns how many of the versions that this replica has read are gone.
func versionsLost(v *view, found *db.ChangesAfterRow) int64 {
	return max(found.Lost, v.head-found.LatestVersion, 0)
}

// restart publishes empty rings at the end of the log, and tells what was lost with the data set before.
func (f *Feed) restart(ctx context.Context, options *Options, at *db.ChangesAfterRow) {
	before := f.view.Load()
	if lost := versionsLost(before, at); lost > 0 {
		f.stats.versionsLost.Add(lost)
		f.logger.ErrorContext(ctx, "the database has lost changes that clients have seen; they start over",
			"versions_lost", lost, "seen_version", before.head, "survived_version", before.head-lost)
	}
	f.publish(func(v *view) {
		v.serverVersion = at.ServerVersion
		v.options = options
		v.start, v.head = at.LatestVersion, at.LatestVersion
		v.all = &ring{base: at.LatestVersion, grown: make(chan struct{})}
		v.types, v.bytes = nil, 0
	})
}

// forgetLost gives the data set a new server version, because clients of this replica have seen changes
// that the database no longer has, and may have cached what they saw. The next read finds it.
func (f *Feed) forgetLost(ctx context.Context, v *view) error {
	if _, err := f.config.Queries.StateReplaceServerVersion(ctx, v.serverVersion); err != nil {
		return fmt.Errorf("replace the server version: %w", err)
	}
	f.Wake()
	return nil
}

// append publishes new changes, of those types that were followed when they were read, and lets go of the oldest ones.
func (f *Feed) append(options *Options, rows []db.ChangesAfterRow, followed followed) {
	f.publish(func(v *view) {
		// Older views share the arrays and read on undisturbed: appending writes behind their end, and what is let go at
		// the front is left behind when append next moves to a new array.
		v.all = &ring{base: v.all.base, changes: v.all.changes, grown: make(chan struct{})}
		known := v.types
		v.types = maps.Clone(known)
		if v.types == nil {
			v.types = make(map[string]*ring)
		}
		// own returns the new view's ring of a type.
		own := func(recordType string) *ring {
			r := v.types[recordType]
			if r == nil || r == known[recordType] {
				copied := *v.ringOfType(recordType)
				r = &copied
				v.types[recordType] = r
			}
			return r
		}
		for i := range rows {
			row := &rows[i]
			r := own(row.Type)
			if before := known[row.Type]; before == nil && r.grown == nil || before != nil && r.grown == before.grown {
				r.grown = make(chan struct{})
			}
			if !followed.contains(row.Type) {
				r.base, v.all.base = row.Version, row.Version // whoever follows it since then finds it in the table
				continue
			}
			change := f.newChange(row)
			if change == nil {
				continue
			}
			r.changes = append(r.changes, change)
			v.all.changes = append(v.all.changes, change)
			v.bytes += len(change.Message) + changeOverhead
		}
		for len(v.all.changes) > 1 && v.bytes > f.config.RingBytes {
			oldest := v.all.changes[0]
			v.bytes -= len(oldest.Message) + changeOverhead
			v.all.base, v.all.changes = max(v.all.base, oldest.Version), v.all.changes[1:]
			r := own(oldest.Type)
			r.base, r.changes = max(r.base, oldest.Version), r.changes[1:]
		}
		v.options = options
		v.head = rows[len(rows)-1].Version
	})
}

func (f *Feed) readOptions(ctx context.Context, version int64) (*Options, error) {
	rows, err := f.config.Queries.OptionsList(ctx)
	if err != nil {
		return nil, err
	}
	options := &Options{version: version, Types: make(map[string]db.OptionsListRow, len(rows))}
	for _, row := range rows {
		options.Types[row.Type] = row
	}
	return options, nil
}
