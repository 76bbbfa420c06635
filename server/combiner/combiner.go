// Package combiner gathers concurrent requests into batches, so that many callers share the cost of one
// round trip, one statement and one commit ("group commit").
//
// A few batches run at a time, or only one. While they run, new requests gather; the next batch takes them
// all, within bounds. A request that comes alone runs at once: nobody waits for company. The caller whose request opens a
// batch has it run, for everyone in it, and waits no longer than its own context: one that has waited for the batch before
// does not wait as long again for its own.
package combiner

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
)

// ErrFull is returned by Submit when too much is waiting already.
var ErrFull = errors.New("too many requests waiting")

// errPanicked is what the other callers of a batch see when running it panicked.
var errPanicked = errors.New("the batch was not completed")

// Config says how requests are combined.
type Config[Req, Res any] struct {
	// Run performs a batch and returns one result per request, in order. Its context is never cancelled
	// by a caller that has lost patience, because others may be waiting for the same batch; it carries
	// the values of the caller that runs it.
	//
	// An error fails the batch as a whole, which must then have had no effect.
	Run func(context.Context, []Req) ([]Result[Res], error)

	// RetryAlone says whether a batch that failed with this error should be tried again request by
	// request, so that one bad request fails only its own caller. Nil never.
	RetryAlone func(error) bool

	// Weight is what a request adds to a batch, in a unit of the caller's (say bytes). Nil weighs
	// nothing.
	Weight func(Req) int

	// Concurrency is how many batches run at a time; 0 means 1. A second one makes sense where batches that
	// must run one after the other do so elsewhere: it is there already when the first one ends.
	Concurrency int

	// MaxRequests bounds the requests of a batch; 0 means 1,000.
	MaxRequests int

	// MaxWeight bounds the weight of a batch, which always takes at least one request; 0 means no bound.
	MaxWeight int

	// HeavyWeight is the weight from which requests are heavy: they run in batches of their own, in turns
	// with those of the others, so that bulk work delays small requests by one batch at most, and is not
	// kept waiting by them either. 0 means that none is heavy.
	HeavyWeight int

	// MaxWaiting bounds the requests that wait for a batch to come; beyond it Submit returns ErrFull.
	// 0 means 100,000.
	MaxWaiting int
}

// Result is the outcome of one request.
type Result[Res any] struct {
	Value Res
	Err   error
}

// Combiner combines requests. Make one with New.
type Combiner[Req, Res any] struct {
	config Config[Req, Res]

	mu      sync.Mutex
	running int  // batches that run, or that a waiter has been told to run
	heavy   bool // whether the latest of them is one of heavy requests
	waiting []*call[Req, Res]
}

// call is a request on its way.
type call[Req, Res any] struct {
	request Req
	weight  int
	heavy   bool
	result  Result[Res]
	lead    bool          // woken to run the next batch, rather than with a result
	wake    chan struct{} // closed when result or lead is set
}

// New returns a combiner of the given configuration.
func New[Req, Res any](config Config[Req, Res]) *Combiner[Req, Res] {
	if config.MaxRequests <= 0 {
		config.MaxRequests = 1000
	}
	config.Concurrency = max(config.Concurrency, 1)
	if config.MaxWaiting <= 0 {
		config.MaxWaiting = 100_000
	}
	return &Combiner[Req, Res]{config: config}
}

// Submit runs a request, together with others, and returns its result. When ctx ends first, Submit
// returns its error and the request, if it has joined a batch, may still take effect.
func (c *Combiner[Req, Res]) Submit(ctx context.Context, request Req) (Res, error) {
	var none Res
	own := &call[Req, Res]{request: request, wake: make(chan struct{})}
	if c.config.Weight != nil {
		own.weight = c.config.Weight(request)
		own.heavy = c.config.HeavyWeight > 0 && own.weight >= c.config.HeavyWeight
	}

	c.mu.Lock()
	if len(c.waiting) >= c.config.MaxWaiting {
		c.mu.Unlock()
		return none, ErrFull
	}
	c.waiting = append(c.waiting, own)
	own.lead = c.running < c.config.Concurrency
	if own.lead {
		c.running++
		c.heavy = own.heavy
	}
	lead := own.lead
	c.mu.Unlock()

	if !lead {
		select {
		case <-own.wake:
		case <-ctx.Done():
			if !c.mustLead(own) {
				return none, ctx.Err()
			}
		}
		lead = own.lead
	}
	if lead {
		ran := make(chan string, 1)
		go func() { ran <- c.runBatch(ctx, own) }()
		select {
		case panicked := <-ran:
			if panicked != "" {
				panic(panicked)
			}
		case <-ctx.Done():
			return none, ctx.Err()
		}
	}
	return own.result.Value, own.result.Err
}

// Waiting returns how many requests wait for a batch to come.
func (c *Combiner[Req, Res]) Waiting() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.waiting)
}

// mustLead takes a call back whose caller has lost patience, unless it has joined a batch. It reports
// whether the call has been told to run the next batch: then its caller must, for the sake of the others.
func (c *Combiner[Req, Res]) mustLead(own *call[Req, Res]) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if own.lead {
		return true
	}
	c.waiting = slices.DeleteFunc(c.waiting, func(waiting *call[Req, Res]) bool { return waiting == own })
	return false
}

// runBatch takes a batch, which starts with the call of the caller who has it run, delivers its results
// and hands on to the first of those who came meanwhile. It returns the value and the stack of a panic.
func (c *Combiner[Req, Res]) runBatch(ctx context.Context, own *call[Req, Res]) (panicked string) {
	batch := c.take(own)
	defer c.handOn()
	defer func() {
		if value := recover(); value != nil {
			panicked = fmt.Sprintf("%v\n\n%s", value, debug.Stack())
		}
	}()

	requests := make([]Req, len(batch))
	for i, call := range batch {
		requests[i] = call.request
		call.result.Err = errPanicked
	}
	// Deferred, so that a panic in Run leaves nobody waiting.
	defer func() {
		for _, call := range batch[1:] {
			close(call.wake)
		}
	}()
	for i, result := range c.run(context.WithoutCancel(ctx), requests) {
		batch[i].result = result
	}
	return ""
}

// take removes a batch from the queue: the call of the caller who has it run and, in their order, those that are as heavy.
func (c *Combiner[Req, Res]) take(own *call[Req, Res]) []*call[Req, Res] {
	c.mu.Lock()
	defer c.mu.Unlock()
	batch := []*call[Req, Res]{own}
	var rest []*call[Req, Res]
	weight, full := own.weight, false
	for _, call := range c.waiting {
		switch {
		case call == own:
			continue
		case call.heavy == own.heavy && !call.lead && !full:
			weight += call.weight
			full = len(batch) == c.config.MaxRequests || c.config.MaxWeight > 0 && weight > c.config.MaxWeight
			if !full {
				batch = append(batch, call)
				continue
			}
		}
		rest = append(rest, call)
	}
	c.waiting = rest
	return batch
}

// handOn wakes a waiting call to run the next batch, if there is one: the first, or the first that is not as heavy as the
// batch before.
func (c *Combiner[Req, Res]) handOn() {
	c.mu.Lock()
	defer c.mu.Unlock()
	var next *call[Req, Res]
	for _, call := range c.waiting {
		switch {
		case call.lead: // has been told to run another batch
		case next == nil, next.heavy == c.heavy && call.heavy != c.heavy:
			next = call
		}
	}
	if next == nil {
		c.running--
		return
	}
	c.heavy = next.heavy
	next.lead = true
	close(next.wake)
}

// run performs the requests as a batch and, if that fails for a reason that may lie in one of them, one
// by one.
func (c *Combiner[Req, Res]) run(ctx context.Context, requests []Req) []Result[Res] {
	results, err := c.config.Run(ctx, requests)
	if err == nil {
		return results
	}
	results = make([]Result[Res], len(requests))
	if len(requests) == 1 || c.config.RetryAlone == nil || !c.config.RetryAlone(err) {
		for i := range results {
			results[i].Err = err
		}
		return results
	}
	for i := range requests {
		alone, err := c.config.Run(ctx, requests[i:i+1])
		if err != nil {
			results[i].Err = err
			continue
		}
		results[i] = alone[0]
	}
	return results
}
