package db

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestGateLimitsDials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(slog.New(slog.DiscardHandler))
		var now, most atomic.Int32
		var wg sync.WaitGroup
		start := time.Now()
		for range 10 {
			wg.Go(func() {
				if err := g.enter(t.Context()); err != nil {
					t.Error(err)
					return
				}
				most.Store(max(most.Load(), now.Add(1)))
				time.Sleep(time.Second) // the dial
				now.Add(-1)
				g.leave(nil)
			})
		}
		wg.Wait()
		if most.Load() != dialLimit {
			t.Errorf("%d dials at the same time, want %d", most.Load(), dialLimit)
		}
		if took := time.Since(start); took != 5*time.Second {
			t.Errorf("10 dials of a second took %v, want 5 s", took)
		}
	})
}

// While a server is away, however many connections are wanted, few are
// dialled, and nobody waits long.
func TestGateBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(slog.New(slog.DiscardHandler))
		const outage = time.Minute
		var dials, refusals atomic.Int32
		var wg sync.WaitGroup
		back := time.Now().Add(outage)
		for range 20 {
			wg.Go(func() {
				for {
					asked := time.Now()
					err := g.enter(t.Context())
					if waited := time.Since(asked); waited > dialPatience*20/dialLimit {
						t.Errorf("waited %v", waited)
					}
					switch {
					case err != nil:
						if !errors.Is(err, io.EOF) {
							t.Errorf("got %v, want the error of the last attempt", err)
						}
						refusals.Add(1)
					case time.Now().Before(back):
						dials.Add(1)
						g.leave(io.EOF)
					default:
						g.leave(nil)
						return
					}
					time.Sleep(100 * time.Millisecond) // until the next request
				}
			})
		}
		wg.Wait()
		// A second between attempts, dialLimit of them at a time.
		if n := dials.Load(); n < 40 || n > 180 {
			t.Errorf("%d dials in an outage of %v", n, outage)
		}
		if refusals.Load() == 0 {
			t.Error("nobody was refused")
		}
		if late := time.Since(back); late > 2*dialBackoffMax {
			t.Errorf("the server was noticed %v after it was back", late)
		}
	})
}

func TestGateEndsWithContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(slog.New(slog.DiscardHandler))
		for range dialLimit {
			if err := g.enter(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := g.enter(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the end of the context", err)
		}
		g.leave(context.Canceled) // says nothing about the server
		if err := g.enter(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
