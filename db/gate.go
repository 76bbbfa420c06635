package db

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
)

const (
	// dialLimit is how many connections are dialled at the same time.
	// Authentication is expensive for a server, and all replicas want many
	// connections when one has just come back.
	dialLimit = 2

	// dialPatience is how long a dial waits for its time after failures. If it
	// would take longer, it fails at once with the error of the last attempt:
	// a short interruption is bridged, a long one reported.
	dialPatience = time.Second

	dialBackoffMin = 50 * time.Millisecond
	dialBackoffMax = time.Second // the most that a server which is back may wait for us
)

// gate lets few dials through at a time, and after failures fewer and fewer.
type gate struct {
	slots chan struct{}
	log   *slog.Logger

	mu        sync.Mutex // protects what follows
	backoff   *backoff.ExponentialBackOff
	notBefore time.Time     // no dial before this time
	opened    chan struct{} // closed by open
	failed    error         // of the last attempt; nil: it succeeded
}

func newGate(log *slog.Logger) *gate {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = dialBackoffMin, dialBackoffMax
	b.Reset()
	return &gate{slots: make(chan struct{}, dialLimit), log: log, backoff: b, opened: make(chan struct{})}
}

// open lets dials through without delay: a server is there.
func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.backoff.Reset()
	g.notBefore = time.Time{}
	close(g.opened)
	g.opened = make(chan struct{})
}

// enter waits until a connection may be dialled. If it returns nil, leave must
// follow.
func (g *gate) enter(ctx context.Context) error {
	select {
	case g.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	g.mu.Lock()
	wait, failed, opened := time.Until(g.notBefore), g.failed, g.opened
	g.mu.Unlock()
	switch {
	case wait <= 0:
		return nil
	case wait > dialPatience:
		<-g.slots
		return &waitError{failed}
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-opened:
		return nil
	case <-ctx.Done():
		<-g.slots
		return ctx.Err()
	}
}

// leave ends a dial with its error.
func (g *gate) leave(err error) {
	defer func() { <-g.slots }()
	if errors.Is(err, context.Canceled) {
		return // whoever wanted the connection does not any more
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case err == nil && g.failed != nil:
		g.log.Info("postgres is reachable again")
	case err != nil && g.failed == nil:
		attributes := []any{"error", err}
		if hint := PoolerHint(err); hint != "" {
			attributes = append(attributes, "hint", hint)
		}
		g.log.Warn("cannot connect to postgres; trying again and again", attributes...)
	}
	g.failed = err
	if err == nil {
		g.backoff.Reset()
		g.notBefore = time.Time{}
		return
	}
	g.notBefore = time.Now().Add(g.backoff.NextBackOff())
}

// waitError says that no connection was dialled, because the last attempt was
// a moment ago and failed.
type waitError struct{ last error }

func (e *waitError) Error() string { return fmt.Sprintf("not connected to postgres: %v", e.last) }

func (e *waitError) Unwrap() error { return e.last }

// SafeToRetry tells pgconn.SafeToRetry that nothing was sent.
func (e *waitError) SafeToRetry() bool { return true }
