package server

import (
	"container/list"
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/peer"
)

// Strangers are those who have not shown a valid token. What they hold ends by itself, or when somebody else wants it: the
// oldest goes, because a probe is done in a moment and a client shows its token at once. So nobody can keep others away by
// holding on to things; and who begins too much is cut off.

const (
	// publicCallTime is how long a call without a token may take, from its header to its end.
	publicCallTime = 5 * time.Second
	// publicStreamTime is the same for a stream (Watch of the health service, reflection).
	publicStreamTime = 15 * time.Second
	// maxStrangeRequests is how many requests without a valid token one connection may begin in a second.
	maxStrangeRequests = 500
	// A connection on which nobody has shown a valid token may send so many bytes at once, and per second.
	maxStrangeBytes       = 1 << 20
	maxStrangeBytesSecond = 128 << 10
)

// publicRequests are the requests of one kind that need no token and are under way.
type publicRequests struct {
	what    string
	time    time.Duration
	limiter *limiter

	mu     sync.Mutex
	oldest list.List // of context.CancelCauseFunc
}

// enter admits a request, and ends the oldest one if there are too many. The context that it returns ends with the request.
func (r *publicRequests) enter(ctx context.Context) context.Context {
	bounded, stop := context.WithTimeoutCause(ctx, r.time, errPublicTime)
	bounded, end := context.WithCancelCause(bounded)
	r.mu.Lock()
	var evict context.CancelCauseFunc
	if r.oldest.Len() >= maxPublicRequests {
		evict = r.oldest.Remove(r.oldest.Front()).(context.CancelCauseFunc)
	}
	place := r.oldest.PushBack(end)
	r.mu.Unlock()
	if evict != nil {
		evict(r.limiter.refuse(ctx, limitPublicRequests, &limitError{what: r.what, limit: maxPublicRequests}))
	}
	context.AfterFunc(bounded, func() {
		r.mu.Lock()
		r.oldest.Remove(place) // which does nothing if it is not there any more
		r.mu.Unlock()
		end(nil)
		stop()
	})
	return bounded
}

// endOfPublic returns why a request without a token was ended, nil if it was not.
func endOfPublic(ctx context.Context) error {
	var limit *limitError
	switch cause := context.Cause(ctx); {
	case errors.As(cause, &limit), errors.Is(cause, errPublicTime):
		return cause
	}
	return nil
}

// publicKind returns the requests that a public method counts among. Calls have a budget of their own, so that no streams keep
// a probe from its answer.
func (l *limiter) publicKind(method string) *publicRequests {
	if strings.HasSuffix(method, "/Check") || strings.HasSuffix(method, "/List") {
		return l.publicCalls
	}
	return l.publicStreams
}

// connections are those of clients, bounded in number.
type connections struct {
	mu        sync.Mutex
	all       map[net.Addr]*limitedConn // by the connection's own address value
	strangers list.List                 // of *limitedConn, the oldest first
}

// add admits a connection, and returns which one has to go for it: the oldest stranger, or nil. It returns false if there is no
// room.
func (c *connections) add(conn *limitedConn, limit int) (evicted *limitedConn, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.all) >= limit {
		front := c.strangers.Front()
		if front == nil {
			return nil, false
		}
		evicted = front.Value.(*limitedConn)
		c.removeLocked(evicted)
	}
	c.all[conn.addr] = conn
	conn.place = c.strangers.PushBack(conn)
	return evicted, true
}

func (c *connections) remove(conn *limitedConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.removeLocked(conn)
}

func (c *connections) removeLocked(conn *limitedConn) {
	if conn.place != nil {
		c.strangers.Remove(conn.place)
		conn.place = nil
	}
	if c.all[conn.addr] == conn {
		delete(c.all, conn.addr)
	}
}

// of returns the connection that a request came over, nil if it is not known.
func (c *connections) of(ctx context.Context) *limitedConn {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all[p.Addr]
}

// know notes that somebody on the connection has shown a valid token.
func (c *connections) know(conn *limitedConn) {
	if conn == nil || conn.known.Load() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	conn.known.Store(true)
	if conn.place != nil {
		c.strangers.Remove(conn.place)
		conn.place = nil
	}
}

// limitedConn is a connection of a client.
type limitedConn struct {
	net.Conn
	addr    net.Addr
	limiter *limiter
	once    sync.Once
	known   atomic.Bool   // a valid token was shown
	place   *list.Element // among the strangers; protected by connections.mu

	// What strangers have begun since a time. Only the goroutine that reads the connection uses them.
	requests budget
	bytes    budget
}

// Read implements net.Conn.
func (c *limitedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if n > 0 && !c.known.Load() && !c.bytes.spend(n, maxStrangeBytes, maxStrangeBytesSecond) {
		return 0, c.cutOff("too much is sent on a connection without a valid token, in bytes per second", maxStrangeBytesSecond)
	}
	return n, err
}

// Close implements net.Conn.
func (c *limitedConn) Close() error {
	c.once.Do(func() { c.limiter.conns.remove(c) })
	return c.Conn.Close()
}

// strange counts a request without a valid token. It cuts the connection off when there are too many of them, and then returns
// an error.
func (c *limitedConn) strange() error {
	if c == nil || c.requests.spend(1, maxStrangeRequests, maxStrangeRequests) {
		return nil
	}
	return c.cutOff("too many requests without a valid token on a connection, per second", maxStrangeRequests)
}

func (c *limitedConn) cutOff(what string, limit int) error {
	ctx := peer.NewContext(context.Background(), &peer.Peer{Addr: c.addr})
	err := c.limiter.refuse(ctx, limitStrangers, &limitError{what: what, limit: limit})
	_ = c.Conn.Close() // its reader finds out, and closes all that belongs to it
	return err
}

// budget is what may be spent: so much at once, and it comes back at a rate.
type budget struct {
	spent int
	last  time.Time
}

// spend reports whether n more is within the budget.
func (b *budget) spend(n, burst, perSecond int) bool {
	now := time.Now()
	back := int(min(now.Sub(b.last).Seconds(), 3600) * float64(perSecond)) // of the zero time, more than was spent
	if back >= b.spent {
		b.spent, b.last = 0, now
	} else {
		b.spent -= back
		b.last = b.last.Add(time.Duration(back) * time.Second / time.Duration(perSecond)) // what is left over counts the next time
	}
	b.spent += n
	return b.spent <= burst
}
