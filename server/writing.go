package server

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"pgbroker/db"
)

// The services that health tells apart, beside "": that is for load balancers, and means the same as reading.
const (
	// HealthReading is whether records can be read and streams go on.
	HealthReading = "reading"
	// HealthWriting is whether records can be written too, and so revoked.
	HealthWriting = "writing"
)

// conditionTime bounds one look at the condition of the database.
const conditionTime = 3 * time.Second

// Why nothing can be written, beside what package db says.
var (
	errNotAsked    = errors.New("the database has not been asked yet")
	errUnreachable = errors.New("the database is unavailable")
	errDiskFull    = errors.New("the database's disk is full")
)

// noWritesError is a write that failed because no write can succeed at present.
type noWritesError struct{ reason, err error }

func (e *noWritesError) Error() string {
	return "the database takes no writes at present: " + e.reason.Error()
}

func (e *noWritesError) Unwrap() error { return e.err }

// writingWatch knows whether anything can be written, which is another question than whether anything can be read: of a standby, or
// of a primary whose disk is full, streams go on, and nothing is revoked. It looks every while, and at once when a write has failed
// for such a reason.
type writingWatch struct {
	db       *db.DB
	logger   *slog.Logger
	interval time.Duration
	blocked  func() bool // whether a session blocks writes
	wake     chan struct{}

	mu      sync.Mutex // protects what follows
	problem error      // why nothing can be written; nil if it can
	latest  db.ServerCondition
	changed chan struct{} // closed when problem or what is hidden changes
}

func newWritingWatch(database *db.DB, interval time.Duration, blocked func() bool, logger *slog.Logger) *writingWatch {
	return &writingWatch{
		db: database, logger: logger, interval: interval, blocked: blocked,
		wake: make(chan struct{}, 1), problem: errNotAsked, changed: make(chan struct{}),
	}
}

// run looks until ctx ends.
func (w *writingWatch) run(ctx context.Context) {
	tick := time.NewTicker(w.interval)
	defer tick.Stop()
	for {
		w.look(ctx)
		select {
		case <-tick.C:
		case <-w.wake:
		case <-ctx.Done():
			return
		}
	}
}

// look asks the database once.
func (w *writingWatch) look(ctx context.Context) {
	looking, cancel := context.WithTimeout(ctx, conditionTime)
	defer cancel()
	condition, err := w.db.Condition(looking)
	problem := condition.NoWrites
	switch {
	case ctx.Err() != nil:
		return
	case err != nil:
		w.logger.DebugContext(ctx, "cannot ask the database for its condition", "error", err) // the feed reports that, too
		problem = errUnreachable
	case problem != nil:
	case errors.Is(w.err(), errDiskFull):
		problem = w.findRoom(looking)
	case w.blocked():
		problem = errBlocked
	}
	w.set(ctx, problem, &condition)
}

// findRoom reports whether the disk is still full.
func (w *writingWatch) findRoom(ctx context.Context) error {
	tx, err := w.db.Begin(ctx)
	if err == nil {
		err = db.New(tx).ProbeRoom(ctx)
		_ = tx.Rollback(ctx) // nothing of it is to stay
	}
	if db.IsDiskFull(err) {
		return errDiskFull
	}
	return nil // whatever else is wrong is found by asking
}

// note is told how a write, or any request, has ended.
func (w *writingWatch) note(ctx context.Context, err error) {
	switch {
	case err == nil:
		if errors.Is(w.err(), errDiskFull) {
			w.set(ctx, nil, nil)
		}
	case db.IsDiskFull(err):
		w.set(ctx, errDiskFull, nil)
	case db.IsReadOnly(err):
		select {
		case w.wake <- struct{}{}:
		default: // a look is due already
		}
	}
}

// set publishes and logs why nothing can be written.
func (w *writingWatch) set(ctx context.Context, problem error, condition *db.ServerCondition) {
	w.mu.Lock()
	defer w.mu.Unlock()
	before, hidden := w.problem, w.latest.Hidden
	w.problem = problem
	if condition != nil {
		w.latest = *condition
	}
	if errors.Is(problem, before) && w.latest.Hidden == hidden {
		return
	}
	close(w.changed)
	w.changed = make(chan struct{})
	if w.latest.Hidden != "" && w.latest.Hidden != hidden {
		w.logger.ErrorContext(ctx, "row level security hides records from this server: it cannot serve", "error", w.latest.Unfit())
	}
	if errors.Is(problem, before) {
		return
	}
	// What is unreachable and who blocks is logged elsewhere.
	silent := func(err error) bool {
		return err == nil || errors.Is(err, errNotAsked) || errors.Is(err, errUnreachable) || errors.Is(err, errBlocked)
	}
	switch {
	case !silent(problem):
		w.logger.ErrorContext(ctx, "the database takes no writes: nothing can be stored and nothing can be revoked; reads and streams go on",
			"reason", problem)
	case problem == nil && !silent(before):
		w.logger.InfoContext(ctx, "the database takes writes again")
	}
}

// err says why nothing can be written; nil if it can.
func (w *writingWatch) err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.problem
}

// unfit says why nothing that is read can be relied on; nil if it can.
func (w *writingWatch) unfit() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.latest.Unfit()
}

// condition returns the condition of the database as last seen.
func (w *writingWatch) condition() db.ServerCondition {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.latest
}

// watch returns a channel that is closed at the next change.
func (w *writingWatch) watch() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.changed
}

// explain tells whose write has failed why, if that is known.
func (w *writingWatch) explain(err error) error {
	if !db.IsReadOnly(err) {
		return err
	}
	if reason := w.condition().NoWrites; reason != nil {
		return &noWritesError{reason, err}
	}
	return err
}
