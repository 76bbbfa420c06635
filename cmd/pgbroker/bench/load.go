package bench

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// started is the origin of monotonic times.
var started = time.Now()

// now is the monotonic time in nanoseconds.
func now() int64 { return int64(time.Since(started)) }

// A load says how often an operation is performed, by how many clients and for how long.
type load struct {
	clients int
	// rate is how many operations are due in each second, in all. Each is due at its time, whatever has become of those
	// before, and its latency counts from then, even if no client is free to begin it: a server that stalls is charged for all
	// that should have happened meanwhile. 0 is a closed loop: each client performs its next operation when it has the answer
	// to the one before.
	rate float64
	// Operations that are due during the warm-up are performed and not counted.
	warmup, duration time.Duration
	// most bounds the number of operations; 0 does not.
	most int64
}

// An operation performs the n-th operation of a run, which was due at a monotonic time, on behalf of a client.
type operation func(ctx context.Context, client int, n, due int64) error

// An outcome is what a load has led to, not counting the warm-up.
type outcome struct {
	done, failed int64
	elapsed      time.Duration // from the end of the warm-up until the last answer
	latency      *hdrhistogram.Histogram
	// late is how far behind their time operations were begun because no client was free.
	late   *hdrhistogram.Histogram
	errors map[string]int64 // by status code
	first  error
	used   usage
}

// rate returns operations per second.
func (o *outcome) rate() float64 {
	if o.elapsed <= 0 {
		return 0
	}
	return float64(o.done) / o.elapsed.Seconds()
}

const (
	// afterwards is how long answers are waited for that are missing at the end: there are servers that need a minute to list
	// 100,000 records. Requests that are not streams end sooner by themselves.
	afterwards = 5 * time.Minute
	// hopeless is how many operations may fail before the first one succeeds.
	hopeless = 50
	// pauseAfterError keeps a client from hammering a server that refuses everything.
	pauseAfterError = 10 * time.Millisecond
)

// run performs the load. watch, which may be nil, is told how it goes; the processes are those whose CPU time is taken.
func (l load) run(ctx context.Context, processes *processes, watch *progress, do operation) (*outcome, error) {
	ctx, stop := context.WithTimeoutCause(ctx, l.warmup+l.duration+afterwards, errors.New("answers are missing"))
	defer stop()
	start := now()
	r := &running{
		load: l, do: do, processes: processes, start: start, begin: start + int64(l.warmup), end: start + int64(l.warmup+l.duration),
		recorder: newRecorder(l.clients), late: newRecorder(l.clients), errors: make(map[string]int64),
	}
	r.last.Store(r.begin)
	var clients sync.WaitGroup
	hope, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	r.giveUp = giveUp
	for client := range l.clients {
		clients.Go(func() { r.client(hope, client) })
	}
	finished := make(chan struct{})
	go func() { clients.Wait(); close(finished) }()

	var before, after usage
	watch.during(r, func() {
		r.wait(finished, r.begin)
		before = processes.usage()
		r.wait(finished, r.end)
		after = processes.usage()
		<-finished
	})
	begin := r.begin
	if r.extra.Load() {
		begin, before, after = r.extraBegin, r.extraBefore, processes.usage()
	}
	if err := context.Cause(hope); err != nil {
		return nil, err
	}
	o := &outcome{
		done: r.done.Load(), failed: r.failed.Load(), latency: r.recorder.histogram(), late: r.late.histogram(),
		errors: r.errors, first: r.first, used: after.minus(before),
	}
	last := r.last.Load()
	if l.most == 0 || r.next.Load() < l.most { // it ended with its time
		last = max(last, r.end)
	}
	o.elapsed = time.Duration(last - begin)
	if o.done == 0 && o.failed > 0 {
		return nil, fmt.Errorf("every operation failed: %w", o.first)
	}
	return o, nil
}

// running is a load while it is performed.
type running struct {
	load
	do                operation
	processes         *processes
	start, begin, end int64 // monotonic times
	recorder, late    *recorder
	giveUp            context.CancelCauseFunc

	next, done, failed, all atomic.Int64
	last                    atomic.Int64 // when the last counted answer came

	// An operation can take so long that none of them begins and ends in time. Then one more is performed, and only that one
	// counts.
	extra       atomic.Bool
	extraBegin  int64
	extraBefore usage

	mu     sync.Mutex // protects what follows
	errors map[string]int64
	first  error
}

// client performs operations until the end.
func (r *running) client(ctx context.Context, client int) {
	for ctx.Err() == nil {
		n := r.next.Add(1) - 1
		if r.most > 0 && n >= r.most {
			return
		}
		free := now()
		due := free
		if r.rate > 0 {
			due = r.start + int64(float64(n)*float64(time.Second)/r.rate)
		}
		if due >= r.end && !r.oneMore(due) {
			return
		}
		if due > free {
			if !sleepUntil(ctx, due) {
				return
			}
			due = now() // timers are coarse, which is not the server's fault
		}
		err := r.do(ctx, client, n, due)
		answered := now()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			r.note(err, due)
			if !sleepUntil(ctx, answered+int64(pauseAfterError)) {
				return
			}
			continue
		}
		r.all.Add(1)
		if due < r.begin {
			continue
		}
		r.done.Add(1)
		r.recorder.record(client, time.Duration(answered-due))
		r.late.record(client, time.Duration(max(0, free-due)))
		atMost(&r.last, answered)
	}
}

// oneMore reports whether a client has to perform an operation after the end, because nothing else counts.
func (r *running) oneMore(due int64) bool {
	if r.rate > 0 || r.done.Load()+r.failed.Load() > 0 || !r.extra.CompareAndSwap(false, true) {
		return false
	}
	r.extraBegin, r.extraBefore = due, r.processes.usage()
	return true
}

// note takes an error, and gives up when nothing but errors comes.
func (r *running) note(err error, due int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.first == nil {
		r.first = err
	}
	r.errors[codeOf(err)]++
	if due >= r.begin {
		r.failed.Add(1)
	}
	var total int64
	for _, n := range r.errors {
		total += n
	}
	if r.all.Load() == 0 && total >= hopeless {
		r.giveUp(fmt.Errorf("every operation failed: %w", r.first))
	}
}

func codeOf(err error) string {
	if st, ok := status.FromError(err); ok && st.Code() != codes.OK {
		return st.Code().String()
	}
	return "other"
}

// wait waits until a monotonic time, or until the load has ended.
func (r *running) wait(finished <-chan struct{}, until int64) {
	select {
	case <-time.After(time.Duration(until - now())):
	case <-finished:
	}
}

// sleepUntil sleeps until a monotonic time; false if ctx ends before.
func sleepUntil(ctx context.Context, until int64) bool {
	pause := time.Duration(until - now())
	if pause <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// atMost raises a value to another one.
func atMost(value *atomic.Int64, to int64) {
	for {
		old := value.Load()
		if old >= to || value.CompareAndSwap(old, to) {
			return
		}
	}
}
