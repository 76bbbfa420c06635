package server

import (
	"sync"
	"time"
)

// outbox hands out what is to be sent to a client one by one. When the client does not take it for a while, the rest is let
// go, so that a client that has stopped reading holds no more than what it is being sent: it is read again when the client
// goes on.
type outbox[T any] struct {
	patience time.Duration
	onDrop   func()

	mu      sync.Mutex // protects what follows
	rest    []T
	taken   int
	stalled *time.Timer // since the first item was taken
	dropped bool
}

// newOutbox returns an outbox that drops its rest some time after its first item has been taken, and then calls another
// function. It must be stopped.
func newOutbox[T any](items []T, patience time.Duration, onDrop func()) *outbox[T] {
	return &outbox[T]{rest: items, patience: patience, onDrop: onDrop}
}

func (o *outbox[T]) drop() {
	o.mu.Lock()
	o.dropped = len(o.rest) > 0
	o.rest = nil
	o.mu.Unlock()
	o.onDrop()
}

// next takes an item, if there is one left. The first call finds one, if there ever was.
func (o *outbox[T]) next() (item T, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.rest) == 0 {
		return item, false
	}
	if o.stalled == nil {
		o.stalled = time.AfterFunc(o.patience, o.drop)
	}
	item = o.rest[0]
	o.rest = o.rest[1:]
	o.taken++
	return item, true
}

// stop ends the outbox. It returns how many items were taken, and whether the rest was dropped.
func (o *outbox[T]) stop() (taken int, dropped bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.stalled != nil {
		o.stalled.Stop()
	}
	return o.taken, o.dropped
}
