package auth

import (
	"context"
	"sync"
)

// openStreams are the streams that were admitted and have not ended.
type openStreams struct {
	mu   sync.Mutex // protects open
	open map[*openStream]struct{}
}

type openStream struct {
	key    Key
	method string
	end    context.CancelCauseFunc
}

// add notes a stream whose context was admitted. The function that it returns forgets it.
func (o *openStreams) add(ctx context.Context, end context.CancelCauseFunc, method string) (remove func()) {
	known, _ := ctx.Value(admissionKey{}).(*admission)
	s := &openStream{key: known.key, method: method, end: end}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.open == nil {
		o.open = make(map[*openStream]struct{})
	}
	o.open[s] = struct{}{}
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		delete(o.open, s)
	}
}

// EndStreams ends the streams whose key is no longer accepted or has lost the access that they need, as Unauthenticated, and
// returns how many there were. It reads files that are due, as a request does, so that a server that calls it now and then
// notices what becomes of its keys while no request comes.
func (a *Authenticator) EndStreams() (ended int) {
	if a == nil || a.disabled {
		return 0
	}
	access := make(map[Key]Access)
	for _, s := range a.signers(nil) {
		if _, ok := access[s.key]; !ok { // of several the first counts, as it does when a token is verified
			access[s.key] = s.caller.Access
		}
	}
	a.streams.mu.Lock()
	defer a.streams.mu.Unlock()
	for s := range a.streams.open {
		if access[s.key] < Needed(s.method) {
			s.end(errWithdrawn)
			delete(a.streams.open, s)
			ended++
		}
	}
	return ended
}
