package combiner_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"pgbroker/server/combiner"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type (
	comb   = combiner.Combiner[int, int]
	config = combiner.Config[int, int]
	result = combiner.Result[int]
)

var errBad = errors.New("bad request")

// double answers each request with its double.
func double(_ context.Context, requests []int) ([]result, error) {
	results := make([]result, len(requests))
	for i, request := range requests {
		results[i].Value = 2 * request
	}
	return results, nil
}

// gate is a Run function that tells of each batch and waits until it may go on.
type gate struct {
	batches chan []int
	proceed chan struct{}
}

func newGate() gate { return gate{make(chan []int), make(chan struct{})} }

func (g gate) run(ctx context.Context, requests []int) ([]result, error) {
	g.batches <- slices.Clone(requests)
	<-g.proceed
	return double(ctx, requests)
}

// submit calls Submit in the background.
func submit(ctx context.Context, c *comb, request int) <-chan result {
	done := make(chan result, 1)
	go func() {
		value, err := c.Submit(ctx, request)
		done <- result{Value: value, Err: err}
	}()
	return done
}

// awaitWaiting waits until n requests wait for a batch.
func awaitWaiting(c *comb, n int) {
	for c.Waiting() != n {
		runtime.Gosched()
	}
}

func TestAloneRunsAtOnce(t *testing.T) {
	c := combiner.New(config{Run: double})
	for i := range 10 {
		if got, err := c.Submit(t.Context(), i); got != 2*i || err != nil {
			t.Fatalf("Submit(%d) = %d, %v", i, got, err)
		}
	}
}

func TestGathersWhileABatchRuns(t *testing.T) {
	g := newGate()
	c := combiner.New(config{Run: g.run})
	first := submit(t.Context(), c, 1)
	if got := <-g.batches; !slices.Equal(got, []int{1}) {
		t.Fatalf("first batch %v, want the first request alone", got)
	}
	var rest []<-chan result
	for i := 2; i <= 5; i++ {
		rest = append(rest, submit(t.Context(), c, i))
		awaitWaiting(c, i-1)
	}
	g.proceed <- struct{}{}
	if got := <-first; got != (result{Value: 2}) {
		t.Fatalf("first result %+v", got)
	}
	if got := <-g.batches; !slices.Equal(got, []int{2, 3, 4, 5}) {
		t.Fatalf("second batch %v, want all that came meanwhile, in order", got)
	}
	g.proceed <- struct{}{}
	for i, done := range rest {
		if got := <-done; got != (result{Value: 2 * (i + 2)}) {
			t.Fatalf("result of %d: %+v", i+2, got)
		}
	}
}

func TestBounds(t *testing.T) {
	g := newGate()
	c := combiner.New(config{Run: g.run, MaxRequests: 3, MaxWeight: 10, MaxWaiting: 6, Weight: func(request int) int { return request }})
	all := []<-chan result{submit(t.Context(), c, 1)}
	<-g.batches
	for i, request := range []int{4, 6, 1, 20, 1, 1} {
		all = append(all, submit(t.Context(), c, request))
		awaitWaiting(c, i+1)
	}
	if _, err := c.Submit(t.Context(), 1); !errors.Is(err, combiner.ErrFull) {
		t.Fatalf("Submit beyond MaxWaiting: %v, want ErrFull", err)
	}
	for _, want := range [][]int{{4, 6}, {1}, {20}, {1, 1}} {
		g.proceed <- struct{}{}
		if got := <-g.batches; !slices.Equal(got, want) {
			t.Fatalf("batch %v, want %v", got, want)
		}
	}
	g.proceed <- struct{}{}
	for _, done := range all {
		<-done
	}
}

func TestHeavyRequestsTakeTurnsWithTheOthers(t *testing.T) {
	g := newGate()
	c := combiner.New(config{Run: g.run, MaxWeight: 100, HeavyWeight: 50, Weight: func(request int) int { return request }})
	all := []<-chan result{submit(t.Context(), c, 60)}
	<-g.batches
	for i, request := range []int{70, 1, 80, 2, 90, 3} {
		all = append(all, submit(t.Context(), c, request))
		awaitWaiting(c, i+1)
	}
	for i, want := range [][]int{{1, 2, 3}, {70}, {4}, {80}, {90}} {
		g.proceed <- struct{}{}
		if got := <-g.batches; !slices.Equal(got, want) {
			t.Fatalf("batch %v, want %v", got, want)
		}
		if i == 1 { // a small one that comes late overtakes
			all = append(all, submit(t.Context(), c, 4))
			awaitWaiting(c, 3)
		}
	}
	g.proceed <- struct{}{}
	for _, done := range all {
		<-done
	}
}

func TestOneBadRequestFailsAlone(t *testing.T) {
	g := newGate()
	c := combiner.New(config{
		RetryAlone: func(err error) bool { return errors.Is(err, errBad) },
		Run: func(ctx context.Context, requests []int) ([]result, error) {
			results, _ := g.run(ctx, requests)
			if slices.Contains(requests, 13) {
				return nil, errBad
			}
			return results, nil
		},
	})
	first := submit(t.Context(), c, 1)
	<-g.batches
	var rest []<-chan result
	for i, request := range []int{12, 13, 14} {
		rest = append(rest, submit(t.Context(), c, request))
		awaitWaiting(c, i+1)
	}
	g.proceed <- struct{}{}
	<-first
	for _, want := range [][]int{{12, 13, 14}, {12}, {13}, {14}} {
		if got := <-g.batches; !slices.Equal(got, want) {
			t.Fatalf("batch %v, want %v", got, want)
		}
		g.proceed <- struct{}{}
	}
	for i, want := range []result{{Value: 24}, {Err: errBad}, {Value: 28}} {
		if got := <-rest[i]; got != want {
			t.Errorf("result %+v, want %+v", got, want)
		}
	}
}

func TestAnotherFailureIsNotRetried(t *testing.T) {
	var runs atomic.Int32
	c := combiner.New(config{
		RetryAlone: func(err error) bool { return false },
		Run:        func(context.Context, []int) ([]result, error) { runs.Add(1); return nil, errBad },
	})
	if _, err := c.Submit(t.Context(), 1); !errors.Is(err, errBad) || runs.Load() != 1 {
		t.Fatalf("Submit: %v after %d runs, want the error after one", err, runs.Load())
	}
}

func TestImpatientCallerLeavesTheQueue(t *testing.T) {
	g := newGate()
	c := combiner.New(config{Run: g.run})
	first := submit(t.Context(), c, 1)
	<-g.batches
	ctx, cancel := context.WithCancel(t.Context())
	impatient := submit(ctx, c, 2)
	awaitWaiting(c, 1)
	third := submit(t.Context(), c, 3)
	awaitWaiting(c, 2)
	cancel()
	if got := <-impatient; !errors.Is(got.Err, context.Canceled) {
		t.Fatalf("the impatient got %+v", got)
	}
	g.proceed <- struct{}{}
	<-first
	if got := <-g.batches; !slices.Equal(got, []int{3}) {
		t.Fatalf("batch %v, want only who still waits", got)
	}
	g.proceed <- struct{}{}
	<-third
}

func TestABatchOutlivesItsCallers(t *testing.T) {
	g := newGate()
	ran := make(chan error, 1)
	c := combiner.New(config{Run: func(ctx context.Context, requests []int) ([]result, error) {
		results, err := g.run(ctx, requests)
		ran <- ctx.Err()
		return results, err
	}})
	ctx, cancel := context.WithCancel(t.Context())
	done := submit(ctx, c, 1)
	<-g.batches
	second := submit(t.Context(), c, 2)
	awaitWaiting(c, 1)
	cancel()
	if got := <-done; !errors.Is(got.Err, context.Canceled) {
		t.Fatalf("who had the batch run and lost patience got %+v", got)
	}
	g.proceed <- struct{}{}
	if err := <-ran; err != nil {
		t.Fatalf("the batch's context ended with its caller's: %v", err)
	}
	if got := <-g.batches; !slices.Equal(got, []int{2}) {
		t.Fatalf("batch %v, want who came meanwhile", got)
	}
	g.proceed <- struct{}{}
	if err := <-ran; err != nil {
		t.Fatalf("the batch after it: %v", err)
	}
	if got := <-second; got != (result{Value: 4}) {
		t.Fatalf("result %+v", got)
	}
}

func TestAPanicLeavesNobodyWaiting(t *testing.T) {
	g := newGate()
	c := combiner.New(config{Run: func(ctx context.Context, requests []int) ([]result, error) {
		results, err := g.run(ctx, requests)
		if slices.Contains(requests, 13) {
			panic("unlucky")
		}
		return results, err
	}})
	first := submit(t.Context(), c, 1)
	<-g.batches
	panicked := make(chan any, 1)
	go func() {
		defer func() { panicked <- recover() }()
		_, _ = c.Submit(t.Context(), 13)
	}()
	awaitWaiting(c, 1)
	companion := submit(t.Context(), c, 3)
	awaitWaiting(c, 2)
	g.proceed <- struct{}{}
	<-first
	<-g.batches
	g.proceed <- struct{}{}
	if got := fmt.Sprint(<-panicked); !strings.HasPrefix(got, "unlucky\n") || !strings.Contains(got, "combiner_test.go") {
		t.Fatalf("the caller that had the batch run saw %v, want the panic and where it was", got)
	}
	if got := <-companion; got.Err == nil {
		t.Fatalf("its companion got %+v, want an error", got)
	}
	last := submit(t.Context(), c, 5)
	<-g.batches
	g.proceed <- struct{}{}
	if got := <-last; got != (result{Value: 10}) {
		t.Fatalf("afterwards: %+v", got)
	}
}

// TestEveryRequestRunsOnce drives random callers, some of them impatient: each request that is answered
// has run exactly once, in no more batches at a time than allowed.
func TestEveryRequestRunsOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var mu sync.Mutex
		var running atomic.Int32
		concurrency := rapid.Int32Range(1, 3).Draw(t, "concurrency")
		runs := make(map[int]int)
		c := combiner.New(config{
			Concurrency: int(concurrency),
			MaxRequests: rapid.IntRange(1, 5).Draw(t, "max requests"),
			HeavyWeight: rapid.IntRange(0, 3).Draw(t, "heavy weight"),
			Weight:      func(request int) int { return request % 3 },
			Run: func(ctx context.Context, requests []int) ([]result, error) {
				if running.Add(1) > concurrency {
					panic("too many batches at a time")
				}
				defer running.Add(-1)
				mu.Lock()
				defer mu.Unlock()
				for _, request := range requests {
					runs[request]++
				}
				return double(ctx, requests)
			},
		})
		impatient := rapid.SliceOfN(rapid.Bool(), 1, 60).Draw(t, "impatient")
		answers := make([]result, len(impatient))
		var callers sync.WaitGroup
		for i := range impatient {
			callers.Go(func() {
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				if impatient[i] {
					go cancel()
				}
				value, err := c.Submit(ctx, i)
				answers[i] = result{Value: value, Err: err}
			})
		}
		callers.Wait()
		awaitWaiting(c, 0) // batches whose callers have gone
		mu.Lock()
		defer mu.Unlock()
		for i, answer := range answers {
			switch {
			case runs[i] > 1, answer.Err == nil && (runs[i] != 1 || answer.Value != 2*i), answer.Err != nil && !impatient[i]:
				t.Fatalf("request %d: %+v after %d runs", i, answer, runs[i])
			}
		}
	})
}
