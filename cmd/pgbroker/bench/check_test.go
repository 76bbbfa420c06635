package bench

import (
	"testing"
)

// published returns n events that have been published by one publisher each in turn, and acknowledged.
func published(n, streams, publishers int) *events {
	e := newEvents(n+10, streams)
	for i := range n {
		e.send(uint32(i), i%publishers, 0)
		e.acknowledge(uint32(i))
	}
	return e
}

func TestLedgerFindsPlantedErrors(t *testing.T) {
	type receipt struct {
		index   uint32
		version uint64
	}
	// Events 0 to 3 of two publishers, versions 101 to 104.
	good := []receipt{{0, 101}, {1, 102}, {2, 103}, {3, 104}}
	for _, test := range []struct {
		name     string
		receipts []receipt
		want     Checks
	}{
		{"all is well", good, Checks{Received: 4}},
		{"nothing came", nil, Checks{Lost: 4}},
		{"one is lost", []receipt{{0, 101}, {1, 102}, {3, 104}}, Checks{Received: 3, Lost: 1}},
		{"the last one is lost", good[:3], Checks{Received: 3, Lost: 1}},
		{"one comes twice", []receipt{{0, 101}, {1, 102}, {1, 102}, {2, 103}, {3, 104}}, Checks{Received: 4, Duplicated: 1}},
		{"one comes again later", append(good[:4:4], receipt{0, 101}), Checks{Received: 4, Duplicated: 1}},
		{"one comes again as another change", append(good[:4:4], receipt{0, 105}), Checks{Received: 4, Duplicated: 1}},
		{"two are swapped", []receipt{{0, 101}, {2, 103}, {1, 102}, {3, 104}}, Checks{Received: 4, OutOfOrder: 1}},
		{"all are backwards", []receipt{{3, 104}, {2, 103}, {1, 102}, {0, 101}}, Checks{Received: 4, OutOfOrder: 3}},
		{"versions ascend, but the events of a publisher do not", []receipt{{2, 101}, {1, 102}, {0, 103}, {3, 104}}, Checks{Received: 4, OutOfOrder: 1}},
		{"a version is given twice", []receipt{{0, 101}, {1, 101}, {2, 103}, {3, 104}}, Checks{Received: 4, OutOfOrder: 1}},
		{"a version is that from which the stream began", []receipt{{0, 100}, {1, 102}, {2, 103}, {3, 104}}, Checks{Received: 4, OutOfOrder: 1}},
		{"nobody has published it", append(good[:4:4], receipt{9, 109}), Checks{Received: 4, Unknown: 1}},
		{"it is beyond all events", append(good[:4:4], receipt{1 << 30, 109}), Checks{Received: 4, Unknown: 1}},
		{"one is lost and another comes twice", []receipt{{0, 101}, {1, 102}, {1, 102}, {3, 104}}, Checks{Received: 3, Lost: 1, Duplicated: 1}},
	} {
		t.Run(test.name, func(t *testing.T) {
			l := published(4, 1, 2).newLedger(2, 100)
			for _, r := range test.receipts {
				l.note(r.index, r.version)
			}
			var got Checks
			got.add(l)
			if got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
			wrong := got.Lost+got.Duplicated+got.OutOfOrder+got.Unknown > 0
			if got.Failed() != wrong {
				t.Errorf("failed: got %t, want %t", got.Failed(), wrong)
			}
		})
	}
}

func TestLedgersAgree(t *testing.T) {
	e := published(2, 2, 1)
	one, other := e.newLedger(1, 0), e.newLedger(1, 0)
	if first, everywhere := one.note(0, 5); !first || everywhere {
		t.Errorf("on the first of two streams: got %t, %t", first, everywhere)
	}
	if first, everywhere := other.note(0, 6); !first || !everywhere {
		t.Errorf("on the second of two streams: got %t, %t", first, everywhere)
	}
	var c Checks
	c.add(one)
	c.add(other)
	if c.Disagreed != 1 || !c.Failed() {
		t.Errorf("two streams have seen different versions of one change: got %+v", c)
	}
}

func TestLedgerOfUncertainEvents(t *testing.T) {
	e := newEvents(3, 1)
	e.send(0, 0, 0) // and no answer
	e.send(1, 0, 0)
	l := e.newLedger(1, 0)
	l.note(0, 1)
	if lost := l.lost(); lost != 0 || l.unknown != 0 {
		t.Errorf("what was not acknowledged may come or not: got %d lost, %d unknown", lost, l.unknown)
	}
	if n := e.certain(); n != 0 {
		t.Errorf("got %d acknowledged events, want 0", n)
	}
}

func TestLedgerOfOtherRecords(t *testing.T) {
	l := published(2, 1, 1).newLedger(1, 10)
	l.note(0, 11)
	l.pass(12)
	l.note(1, 13)
	l.pass(13)
	l.pass(5)
	if l.outOfOrder != 2 {
		t.Errorf("got %d out of order, want the two versions that did not ascend", l.outOfOrder)
	}
}

func TestResetsFail(t *testing.T) {
	if c := (&Checks{Resets: 1}); !c.Failed() {
		t.Error("a stream that must start over has missed something")
	}
	var none *Checks
	if none.Failed() {
		t.Error("without streams there is nothing to check")
	}
}

func TestCensus(t *testing.T) {
	c := newCensus(130)
	for i := range uint32(130) {
		if i != 64 && i != 129 {
			c.note(i)
		}
	}
	c.note(5)
	c.note(100000) // somebody else's
	if c.lost(130) != 2 || c.received != 128 || c.duplicated != 1 {
		t.Errorf("got %d lost, %d received, %d twice; want 2, 128, 1", c.lost(130), c.received, c.duplicated)
	}
	if lost := c.lost(60); lost != 0 {
		t.Errorf("of the first 60: got %d lost, want 0", lost)
	}
}
