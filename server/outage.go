package server

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"pgbroker/db"
)

const (
	// outageInterval is how often an outage of the database is mentioned while it lasts.
	outageInterval = time.Minute
	// outageQuiet is how long nothing may fail until an outage is over that the feed has noticed, and outageQuietElse that of
	// another one: a single connection that breaks, say.
	outageQuiet     = time.Second
	outageQuietElse = time.Minute
)

// outage is what the log says about the database while it cannot be used: a line when that begins, one a minute, and one when
// it is over. All that fails meanwhile because of it says nothing, whichever part of the server it is in, because every part
// would say it for every request and every attempt.
type outage struct {
	logger *slog.Logger // that says it

	mu      sync.Mutex // protects what follows
	begun   time.Time  // zero while all is well
	latest  time.Time  // when something failed, or the feed could not read
	said    time.Time  // latest line
	unsaid  int        // lines that were left out since
	all     int        // since it began
	noticed bool       // by the feed
}

// note takes an error that something has failed with because the database is unavailable.
func (o *outage) note(ctx context.Context, err error) {
	now := time.Now()
	o.mu.Lock()
	begins, again, since, unsaid := o.begun.IsZero(), false, now.Sub(o.begun), o.unsaid
	if begins {
		o.begun, o.said, o.all, o.unsaid, o.noticed = now, now, 0, 0, false
	} else if again = now.Sub(o.said) >= outageInterval; again {
		o.said, o.unsaid = now, 0
	} else {
		o.unsaid++
	}
	o.latest = now
	o.all++
	o.mu.Unlock()
	switch {
	case begins:
		o.logger.WarnContext(ctx, "the database is unavailable: requests fail and streams wait; this is said once a minute", "error", err)
	case again:
		o.logger.WarnContext(ctx, "the database is still unavailable", "since", since.Round(time.Second), "error", err, "lines_left_out", unsaid)
	}
}

// look says that an outage is over, if it is. feed is the feed's error.
func (o *outage) look(ctx context.Context, feed error) {
	now := time.Now()
	o.mu.Lock()
	if o.begun.IsZero() {
		o.mu.Unlock()
		return
	}
	if feed != nil {
		o.noticed, o.latest = true, now
	}
	quiet := outageQuietElse
	if o.noticed {
		quiet = outageQuiet
	}
	if feed != nil || now.Sub(o.latest) < quiet {
		o.mu.Unlock()
		return
	}
	lasted, failures := o.latest.Sub(o.begun), o.all
	o.begun = time.Time{}
	o.mu.Unlock()
	o.logger.InfoContext(ctx, "the database is available again", "after", lasted.Round(time.Millisecond), "failures", failures)
}

// watch calls look now and then until ctx ends.
func (o *outage) watch(feed func() error) func(context.Context) {
	return func(ctx context.Context) {
		tick := time.NewTicker(outageQuiet / 2)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				o.look(ctx, feed())
			case <-ctx.Done():
				return
			}
		}
	}
}

// outageHandler passes a log on, but for lines about an error that says that the database is unavailable.
type outageHandler struct {
	slog.Handler
	outage *outage
}

func newOutage(logger *slog.Logger) (*outage, *slog.Logger) {
	o := &outage{logger: logger}
	return o, slog.New(&outageHandler{logger.Handler(), o})
}

// Handle implements slog.Handler.
func (h *outageHandler) Handle(ctx context.Context, record slog.Record) error {
	var reason error
	record.Attrs(func(a slog.Attr) bool {
		if err, ok := a.Value.Any().(error); ok && (db.IsUnavailable(err) || errors.Is(err, errSilent)) {
			reason = err
		}
		return reason == nil
	})
	if reason == nil {
		return h.Handler.Handle(ctx, record)
	}
	if db.IsReadOnly(reason) || db.IsDiskFull(reason) { // no outage: reads and streams go on, as writingWatch says
		return nil
	}
	h.outage.note(ctx, reason)
	return nil
}

// WithAttrs implements slog.Handler.
func (h *outageHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &outageHandler{h.Handler.WithAttrs(attrs), h.outage}
}

// WithGroup implements slog.Handler.
func (h *outageHandler) WithGroup(name string) slog.Handler {
	return &outageHandler{h.Handler.WithGroup(name), h.outage}
}
