package bench

import (
	"math/bits"
	"sync/atomic"
)

// An events is the sequence of events of a run, shared by the publishers, which say what they have published, and the
// streams, which must each receive all of it once and in order.
type events struct {
	due     []int64         // when each should have been sent, in monotonic nanoseconds
	client  []int32         // which publisher sent it
	state   []atomic.Uint32 // eventState
	version []atomic.Uint64 // record version, as the first stream to receive it has it
	waiting []atomic.Int32  // streams that have not received it
	streams int32
}

type eventState = uint32

const (
	eventUnused  eventState = iota
	eventSent               // and not acknowledged: whether it has happened nobody knows
	eventCertain            // acknowledged
)

func newEvents(most, streams int) *events {
	return &events{
		due: make([]int64, most), client: make([]int32, most), state: make([]atomic.Uint32, most),
		version: make([]atomic.Uint64, most), waiting: make([]atomic.Int32, most), streams: int32(streams),
	}
}

// send notes that a publisher is about to publish an event that was due at a time.
func (e *events) send(index uint32, client int, due int64) {
	e.due[index], e.client[index] = due, int32(client)
	e.waiting[index].Store(e.streams)
	e.state[index].Store(eventSent)
}

// acknowledge notes that an event has been acknowledged.
func (e *events) acknowledge(index uint32) { e.state[index].Store(eventCertain) }

// certain returns how many events have been acknowledged.
func (e *events) certain() int64 {
	var n int64
	for i := range e.state {
		if e.state[i].Load() == eventCertain {
			n++
		}
	}
	return n
}

// A ledger checks what one stream receives. It is not safe for concurrent use.
type ledger struct {
	events  *events
	seen    []uint64 // a bit for each event
	version uint64   // of the record received last
	latest  []int64  // by publisher: its event received last, plus 1

	received, duplicated, outOfOrder, unknown, disagreed int64
}

// newLedger returns the ledger of a stream that starts after a record version.
func (e *events) newLedger(publishers int, start uint64) *ledger {
	return &ledger{events: e, seen: make([]uint64, (len(e.due)+63)/64), version: start, latest: make([]int64, publishers)}
}

// note takes the receipt of an event. It reports whether this is the first one, and whether it is the first one on every
// stream: then the event has arrived everywhere.
func (l *ledger) note(index uint32, version uint64) (first, everywhere bool) {
	e := l.events
	if int(index) >= len(e.due) || e.state[index].Load() == eventUnused {
		l.unknown++ // nobody has published it
		return false, false
	}
	word, bit := index/64, uint64(1)<<(index%64)
	if l.seen[word]&bit != 0 {
		l.duplicated++
		return false, false
	}
	l.seen[word] |= bit
	l.received++
	// A publisher waits for the answer before it publishes its next event, so its events are in the order of their indices,
	// whatever the versions say.
	before := &l.latest[e.client[index]]
	if version <= l.version || int64(index) < *before {
		l.outOfOrder++
	}
	l.version, *before = max(l.version, version), max(*before, int64(index)+1)
	if !e.version[index].CompareAndSwap(0, version) && e.version[index].Load() != version {
		l.disagreed++
	}
	return true, e.waiting[index].Add(-1) == 0
}

// pass takes the receipt of something that is no event of the run: its version must be in order all the same.
func (l *ledger) pass(version uint64) {
	if version <= l.version {
		l.outOfOrder++
	}
	l.version = max(l.version, version)
}

// lost counts the acknowledged events that have not been received.
func (l *ledger) lost() int64 {
	var n int64
	for i := range l.events.state {
		if l.events.state[i].Load() == eventCertain && l.seen[i/64]&(1<<(i%64)) == 0 {
			n++
		}
	}
	return n
}

// Checks is what the streams of a run have received, against what they should have.
type Checks struct {
	Streams  int   `json:"streams"`
	Events   int64 `json:"events"`   // published and acknowledged
	Expected int64 `json:"expected"` // deliveries: events times streams
	Received int64 `json:"received"`

	Lost       int64 `json:"lost"`
	Duplicated int64 `json:"duplicated"`
	OutOfOrder int64 `json:"out_of_order"`
	// Unknown are receipts of what nobody has published.
	Unknown int64 `json:"unknown"`
	// Disagreed are receipts with another record version than on another stream.
	Disagreed int64 `json:"disagreed"`

	// Reconnects is how often a stream ended and was resumed, Resets how often it was told to start over.
	Reconnects int64 `json:"reconnects"`
	Resets     int64 `json:"resets"`
}

// add takes the ledger of one stream.
func (c *Checks) add(l *ledger) {
	c.Received += l.received
	c.Lost += l.lost()
	c.Duplicated += l.duplicated
	c.OutOfOrder += l.outOfOrder
	c.Unknown += l.unknown
	c.Disagreed += l.disagreed
}

// Failed reports whether anything was not as it must be.
func (c *Checks) Failed() bool {
	return c != nil && c.Lost+c.Duplicated+c.OutOfOrder+c.Unknown+c.Disagreed+c.Resets > 0
}

// A census checks a listing: every record of a collection once, in the order of ids.
type census struct {
	seen                 []uint64
	received, duplicated int64
}

func newCensus(most int) *census { return &census{seen: make([]uint64, (most+63)/64)} }

func (c *census) note(index uint32) {
	word, bit := index/64, uint64(1)<<(index%64)
	switch {
	case int(word) >= len(c.seen): // put by somebody else
	case c.seen[word]&bit != 0:
		c.duplicated++
	default:
		c.seen[word] |= bit
		c.received++
	}
}

// lost counts the records below a number that were not listed.
func (c *census) lost(stored int) int64 {
	var n int64
	for i, word := range c.seen {
		want := ^uint64(0)
		if rest := stored - 64*i; rest < 64 {
			want = 1<<max(rest, 0) - 1
		}
		n += int64(bits.OnesCount64(want &^ word))
	}
	return n
}
