package bench

import (
	"context"
	"errors"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// about reports whether a figure is within some percent of another.
func about(got, want, percent float64) bool { return math.Abs(got-want) <= want*percent/100 }

func TestRecorder(t *testing.T) {
	r := newRecorder(100)
	if len(r.shards) != maxShards {
		t.Errorf("got %d shards, want %d", len(r.shards), maxShards)
	}
	var all sync.WaitGroup
	for g := range 100 {
		all.Go(func() {
			for i := range 100 {
				r.record(g, time.Duration(100*g+i+1)*time.Millisecond)
			}
		})
	}
	all.Wait()
	l := newLatency(r.histogram())
	for _, test := range []struct {
		name      string
		got, want float64
	}{{"p50", l.P50, 5000}, {"p90", l.P90, 9000}, {"p99", l.P99, 9900}, {"p99.9", l.P999, 9990}, {"max", l.Max, 10000}, {"mean", l.Mean, 5000.5}} {
		if !about(test.got, test.want, 0.2) { // three digits
			t.Errorf("%s: got %g ms, want %g ms", test.name, test.got, test.want)
		}
	}
	if l.Count != 10000 {
		t.Errorf("got %d latencies, want 10000", l.Count)
	}
}

func TestRecorderTakesEverything(t *testing.T) {
	r := newRecorder(1)
	r.record(0, -time.Second) // a clock that went back
	r.record(0, 0)
	r.record(0, 24*time.Hour)
	l := newLatency(r.histogram())
	if l.Count != 3 || l.P50 > 0.001 || !about(l.Max, 600_000, 0.2) {
		t.Errorf("got %+v", l)
	}
	if newLatency(newHistogram()) != nil {
		t.Error("no latencies have a distribution")
	}
	if full := fullLatency(r.histogram()); len(full.HDR) < 20 {
		t.Errorf("the whole distribution: got %q", full.HDR)
	}
}

// perform runs a load in a world where time passes only while everybody waits.
func perform(t *testing.T, l load, do operation) *outcome {
	t.Helper()
	o, err := l.run(t.Context(), nil, nil, do)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestClosedLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := load{clients: 4, warmup: time.Second, duration: 10 * time.Second}
		var performed atomic.Int64
		o := perform(t, l, func(context.Context, int, int64, int64) error {
			performed.Add(1)
			time.Sleep(10 * time.Millisecond)
			return nil
		})
		if o.done != 4000 || !about(o.rate(), 400, 1) || o.failed != 0 {
			t.Errorf("got %d operations at %.1f/s, %d failed; want 4000 at 400/s", o.done, o.rate(), o.failed)
		}
		if n := performed.Load(); n != 4400 {
			t.Errorf("got %d operations with the warm-up, want 4400", n)
		}
		if latency := newLatency(o.latency); !about(latency.P50, 10, 1) || !about(latency.Max, 10, 1) {
			t.Errorf("got %+v, want 10 ms", latency)
		}
	})
}

// TestOpenLoopChargesForStalls: a server that answers nothing for a second has kept all requests of that second waiting, even
// if the clients, who were waiting, too, did not send them.
func TestOpenLoopChargesForStalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := load{clients: 2, rate: 100, duration: 10 * time.Second}
		begun := time.Now()
		turn := make(chan struct{}, 1)
		o := perform(t, l, func(context.Context, int, int64, int64) error {
			turn <- struct{}{}
			defer func() { <-turn }()
			if at := time.Since(begun); at >= 5*time.Second && at < 6*time.Second {
				time.Sleep(6*time.Second - at)
			}
			time.Sleep(time.Millisecond)
			return nil
		})
		if o.done != 1000 || !about(o.rate(), 100, 1) {
			t.Errorf("got %d operations at %.1f/s, want 1000 at 100/s", o.done, o.rate())
		}
		latency := newLatency(o.latency)
		if !about(latency.P50, 1, 5) {
			t.Errorf("p50: got %g ms, want 1 ms", latency.P50)
		}
		// A tenth of all was due during the stall, and waited for half a second on average.
		if latency.P99 < 800 || latency.P99 > 1000 || latency.Max < 990 {
			t.Errorf("p99 %g ms, max %g ms: the stall of a second does not show", latency.P99, latency.Max)
		}
		if late := newLatency(o.late); late.P99 < 500 {
			t.Errorf("requests were late by %g ms (p99), want most of a second", late.P99)
		}
	})
}

func TestOpenLoopAtMoreThanThereCanBe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := load{clients: 1, rate: 1000, duration: time.Second}
		o := perform(t, l, func(context.Context, int, int64, int64) error {
			time.Sleep(10 * time.Millisecond)
			return nil
		})
		// It goes on after its time, until what was due is done.
		if o.done != 1000 || !about(o.rate(), 100, 1) || !about(o.elapsed.Seconds(), 10, 1) {
			t.Errorf("got %d operations at %.1f/s in %v, want 1000 at 100/s in 10s", o.done, o.rate(), o.elapsed)
		}
	})
}

func TestLoadOfSoManyOperations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := load{clients: 3, duration: time.Hour, most: 10}
		var seen [10]atomic.Int64
		o := perform(t, l, func(_ context.Context, _ int, n, _ int64) error {
			seen[n].Add(1)
			time.Sleep(time.Second)
			return nil
		})
		if o.done != 10 || o.elapsed.Round(time.Second) != 4*time.Second {
			t.Errorf("got %d operations in %v, want 10 in 4s", o.done, o.elapsed)
		}
		for n := range seen {
			if seen[n].Load() != 1 {
				t.Errorf("operation %d was performed %d times", n, seen[n].Load())
			}
		}
	})
}

// TestSlowOperationIsMeasured: a listing of everything can take longer than the time there is.
func TestSlowOperationIsMeasured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := load{clients: 2, warmup: time.Second, duration: 5 * time.Second}
		var performed atomic.Int64
		o := perform(t, l, func(context.Context, int, int64, int64) error {
			performed.Add(1)
			time.Sleep(time.Minute)
			return nil
		})
		if o.done != 1 || o.elapsed.Round(time.Second) != time.Minute || performed.Load() != 3 {
			t.Errorf("got %d operations in %v, %d in all; want one in a minute after two that do not count", o.done, o.elapsed, performed.Load())
		}
	})
}

func TestMissingAnswersAreNotWaitedForForever(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		l := load{clients: 1, duration: time.Second}
		_, err := l.run(t.Context(), nil, nil, func(ctx context.Context, _ int, _, _ int64) error {
			<-ctx.Done()
			return ctx.Err()
		})
		if err == nil || err.Error() != "answers are missing" || time.Since(begun) > 10*time.Minute {
			t.Errorf("got %v after %v", err, time.Since(begun))
		}
	})
}

func TestErrorsAreCountedAndNotMeasured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := load{clients: 1, duration: 10 * time.Second}
		o := perform(t, l, func(_ context.Context, _ int, n, _ int64) error {
			time.Sleep(90 * time.Millisecond)
			if n%2 == 1 {
				return status.Error(codes.Unavailable, "away")
			}
			return nil
		})
		if o.errors["Unavailable"] == 0 || o.failed != o.errors["Unavailable"] || !strings.Contains(o.first.Error(), "away") {
			t.Errorf("got errors %v, first %v", o.errors, o.first)
		}
		if o.done < 50 || o.done > 56 || o.latency.TotalCount() != o.done {
			t.Errorf("got %d operations, %d latencies, want about 53", o.done, o.latency.TotalCount())
		}
	})
}

func TestHopelessLoadEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		_, err := load{clients: 2, duration: time.Hour}.run(t.Context(), nil, nil, func(context.Context, int, int64, int64) error {
			return errors.New("no")
		})
		if err == nil || !strings.Contains(err.Error(), "every operation failed: no") || time.Since(begun) > time.Minute {
			t.Errorf("got %v after %v", err, time.Since(begun))
		}
	})
}

func TestInterruptedLoadEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		begun := time.Now()
		_, err := load{clients: 2, rate: 1, duration: time.Hour}.run(ctx, nil, nil, func(context.Context, int, int64, int64) error { return nil })
		if !errors.Is(err, context.Canceled) || time.Since(begun) > 2*time.Second {
			t.Errorf("got %v after %v, want the end of the context", err, time.Since(begun))
		}
	})
}

func TestShow(t *testing.T) {
	for _, test := range []struct{ got, want string }{
		{showNumber(0.5), "0.50"}, {showNumber(12.34), "12.3"}, {showNumber(1234567), "1,234,567"}, {showNumber(999.6), "1,000"}, {showNumber(123456), "123,456"},
		{showMilliseconds(0.123), "0.12 ms"}, {showMilliseconds(45.67), "45.7 ms"}, {showMilliseconds(1234), "1234 ms"}, {showMilliseconds(64_000), "64.0 s"},
		{showBytes(100), "100 B"}, {showBytes(3 << 20), "3.0 MiB"}, {counted(1, "record"), "1 record"}, {counted(1500, "record"), "1,500 records"},
	} {
		if test.got != test.want {
			t.Errorf("got %q, want %q", test.got, test.want)
		}
	}
}
