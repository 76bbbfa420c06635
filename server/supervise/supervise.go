// Package supervise keeps work in the background alive: a panic there would end the process, and with it every stream and
// request that has nothing to do with it.
package supervise

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"
)

// Bounds of the time between a panic and the next try.
const (
	minDelay = 100 * time.Millisecond
	maxDelay = 10 * time.Second
	// soundTime is how long a task must have run for the next panic to count as the first.
	soundTime = time.Minute
)

// Supervisor runs tasks. The zero value logs to slog.Default; its methods may be called by any goroutine.
type Supervisor struct {
	// Logger takes each panic, with its stack; nil means slog.Default.
	Logger *slog.Logger
	// OnPanic is told the name of each task that panics. Nil is allowed.
	OnPanic func(task string)

	mu     sync.Mutex // protects what follows
	logged map[string]*burst
}

// burst is how often a task was logged since a time.
type burst struct {
	began time.Time
	lines int
}

// Bounds of what is logged: what panics for each of a million records must not fill a disk.
const (
	burstTime  = time.Minute
	burstLines = 5
)

// Run runs a task until it returns or ctx ends. After a panic it runs it again, from the start and after a moment: what the task
// knew is gone, so it must not keep anything half done outside of itself.
func (s *Supervisor) Run(ctx context.Context, task string, run func(context.Context)) {
	delay := minDelay
	for {
		began := time.Now()
		err := s.Catch(ctx, task, func() error { run(ctx); return nil })
		if err == nil || ctx.Err() != nil {
			return
		}
		if time.Since(began) > soundTime {
			delay = minDelay
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return
		}
		delay = min(2*delay, maxDelay)
	}
}

// Catch returns what a function returns, or, if it panics, a [PanicError], after that has been logged and counted.
func (s *Supervisor) Catch(ctx context.Context, task string, f func() error) (err error) {
	defer func() {
		if value := recover(); value != nil {
			s.note(ctx, task, value)
			err = &PanicError{Task: task}
		}
	}()
	return f()
}

// Recover is to be deferred at the start of a goroutine that can end at any time without harm.
func (s *Supervisor) Recover(ctx context.Context, task string) {
	if value := recover(); value != nil {
		s.note(ctx, task, value)
	}
}

func (s *Supervisor) note(ctx context.Context, task string, value any) {
	if s.OnPanic != nil {
		s.OnPanic(task)
	}
	if !s.mayLog(task) {
		return
	}
	logger := s.Logger
	if logger == nil {
		logger = slog.Default()
	}
	logger.ErrorContext(ctx, "work in the background panicked, which is a bug", "task", task, "panic", fmt.Sprint(value), "stack", string(debug.Stack()))
}

func (s *Supervisor) mayLog(task string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.logged == nil {
		s.logged = make(map[string]*burst)
	}
	b := s.logged[task]
	if b == nil || time.Since(b.began) > burstTime {
		b = &burst{began: time.Now()}
		s.logged[task] = b
	}
	b.lines++
	return b.lines <= burstLines
}

// PanicError is the error of work that has panicked. What it panicked with is in the log only: it may quote data.
type PanicError struct{ Task string }

func (e *PanicError) Error() string { return e.Task + " panicked" }
