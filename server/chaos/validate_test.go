package chaos

import (
	"slices"
	"testing"
	"time"
)

const ms = time.Millisecond

var (
	a1 = Key{typeA, "1"}
	a2 = Key{typeA, "2"}
	b1 = Key{typeB, "1"}
)

func is(write string) Content { return Content{write, write} }

// sound returns a history in which everything is as it should be:
//
//	version  at     change
//	1        11 ms  put w1 to A 1
//	2        21 ms  put w2 to A 2 and to
//	3               B 1
//	4        31 ms  patch w4 of A 1
//	5        41 ms  delete A 2
//	6        51 ms  put w6 to A 2, of which the client hears nothing
//
// Two streams follow it, one of all types from the start, one of type A that is away while 4 and 5 happen.
func sound() *History {
	patched := Content{"w1", "w4"}
	h := &History{
		Ops: []Op{
			{Kind: opPut, Key: a1, Write: "w1", Call: 10 * ms, Return: 15 * ms, Outcome: ok, Version: 1},
			{Kind: opPut, Key: a2, Write: "w2", Request: 1, Call: 20 * ms, Return: 25 * ms, Outcome: ok, Version: 2},
			{Kind: opPut, Key: b1, Write: "w2", Request: 1, Call: 20 * ms, Return: 25 * ms, Outcome: ok, Version: 3},
			{Kind: opGet, Key: a1, Call: 26 * ms, Return: 27 * ms, Outcome: ok, Version: 1, Content: is("w1")},
			{Kind: opPatch, Key: a1, Write: "w4", Call: 30 * ms, Return: 35 * ms, Outcome: ok, Version: 4, Content: patched},
			{Kind: opGet, Key: a1, Call: 36 * ms, Return: 37 * ms, Outcome: ok, Version: 4, Content: patched, AtLeast: 4},
			{Kind: opDelete, Key: a2, Call: 40 * ms, Return: 45 * ms, Outcome: ok, Version: 5},
			{Kind: opQuery, Key: a2, Call: 46 * ms, Return: 47 * ms, Outcome: absent},
			{Kind: opPut, Key: a2, Write: "w6", Call: 50 * ms, Return: 55 * ms, Outcome: unknown, Code: "Unavailable"},
			{Kind: opPut, Key: a2, Write: "w7", Call: 56 * ms, Return: 57 * ms, Outcome: unknown, Code: "DeadlineExceeded"},
			{Kind: opGet, Key: a2, Call: 60 * ms, Return: 61 * ms, Outcome: ok, Version: 6, Content: is("w6")},
			{Kind: opAcquire, Key: Key{ID: "l"}, Write: "x", TTL: time.Second, Call: 10 * ms, Return: 20 * ms, Outcome: ok},
			{Kind: opAcquire, Key: Key{ID: "l"}, TTL: time.Second, Call: 30 * ms, Return: 40 * ms, Outcome: taken},
			{Kind: opRenew, Key: Key{ID: "l"}, Write: "x", TTL: time.Second, Call: 500 * ms, Return: 510 * ms, Outcome: ok},
			{Kind: opAcquire, Key: Key{ID: "l"}, Write: "y", TTL: time.Second, Call: 1600 * ms, Return: 1610 * ms, Outcome: ok},
			{Kind: opRenew, Key: Key{ID: "l"}, Write: "x", TTL: time.Second, Call: 1700 * ms, Return: 1710 * ms, Outcome: taken},
			{Kind: opRelease, Key: Key{ID: "l"}, Write: "y", Call: 1800 * ms, Return: 1810 * ms, Outcome: ok},
			{Kind: opAcquire, Key: Key{ID: "l"}, Write: "z", TTL: time.Second, Call: 1820 * ms, Return: 1830 * ms, Outcome: ok},
		},
		Journal: []Change{
			{Version: 1, Key: a1, Content: is("w1"), At: 11 * ms},
			{Version: 2, Key: a2, Content: is("w2"), At: 21 * ms},
			{Version: 3, Key: b1, Content: is("w2"), At: 21 * ms},
			{Version: 4, Key: a1, Content: patched, At: 31 * ms},
			{Version: 5, Key: a2, Deleted: true, At: 41 * ms},
			{Version: 6, Key: a2, Content: is("w6"), At: 51 * ms},
		},
		Table: []Row{{a1, 4, patched}, {a2, 6, is("w6")}, {b1, 3, is("w2")}},
		Streams: []*Stream{
			{Events: []Event{
				{Kind: evLatest, At: 5 * ms}, {Kind: evVersions, At: 6 * ms},
				{Kind: evSync, At: 7 * ms, Wait: true},
				{Kind: evChange, At: 16 * ms, Version: 1, Key: a1, Content: is("w1")},
				{Kind: evChange, At: 26 * ms, Version: 2, Key: a2, Content: is("w2")},
				{Kind: evChange, At: 26 * ms, Version: 3, Key: b1, Content: is("w2")},
				{Kind: evChange, At: 36 * ms, Version: 4, Key: a1, Content: patched},
				{Kind: evEnd, At: 38 * ms, Code: "Unavailable"},
				{Kind: evSync, At: 39 * ms, Version: 4, Wait: true},
				{Kind: evChange, At: 46 * ms, Version: 5, Key: a2, Deleted: true},
				{Kind: evChange, At: 56 * ms, Version: 6, Key: a2, Content: is("w6")},
				{Kind: evEnd, At: 70 * ms, Code: codeLeft},
			}},
			{Type: typeA, Events: []Event{
				{Kind: evLatest, At: 22 * ms},
				{Kind: evRecord, At: 23 * ms, Version: 1, Key: a1, Content: is("w1")},
				{Kind: evRecord, At: 23 * ms, Version: 2, Key: a2, Content: is("w2")},
				{Kind: evVersions, At: 24 * ms, Version: 3},
				{Kind: evSync, At: 52 * ms, Version: 3},
				{Kind: evChange, At: 53 * ms, Version: 4, Key: a1, Content: patched},
				{Kind: evChange, At: 53 * ms, Version: 6, Key: a2, Content: is("w6")},
				{Kind: evEnd, At: 54 * ms, Code: codeEOF},
			}},
		},
		Health: []Health{
			{At: 0, Status: "SERVING"}, {At: 15 * time.Second, Status: "NOT_SERVING"}, {At: 41 * time.Second, Status: "SERVING"},
		},
		Outages:        []Outage{{Kind: "back half open", Since: 5 * time.Second, Till: 40 * time.Second}},
		Programs:       []Program{{Replica: 0}, {Replica: 1, Previous: true}},
		ServerVersions: [2]uint64{7, 7},
		End:            time.Minute,
	}
	// What took effect between 21 and 51 ms of a test with milliseconds is within the slack of the clocks.
	for i := range h.Journal {
		h.Journal[i].At *= 100
	}
	for i := range h.Ops {
		if h.Ops[i].TTL == 0 && h.Ops[i].Kind != opRelease && h.Ops[i].Kind != opAcquire && h.Ops[i].Kind != opRenew {
			h.Ops[i].Call *= 100
			h.Ops[i].Return *= 100
		}
	}
	for _, stream := range h.Streams {
		for i := range stream.Events {
			stream.Events[i].At *= 100
		}
	}
	return h
}

// TestValidators plants one error after the other into a sound history: each is found, by the validators
// that are there to find it and by no others.
func TestValidators(t *testing.T) {
	// op returns the n-th operation of a kind.
	op := func(h *History, kind string, n int) *Op {
		for i := range h.Ops {
			if h.Ops[i].Kind == kind {
				if n == 0 {
					return &h.Ops[i]
				}
				n--
			}
		}
		panic("no such operation")
	}
	drop := func(h *History, stream int, kind string, version uint64) {
		events := &h.Streams[stream].Events
		*events = slices.DeleteFunc(*events, func(e Event) bool { return e.Kind == kind && e.Version == version })
	}
	insert := func(h *History, stream, at int, event Event) {
		events := &h.Streams[stream].Events
		*events = slices.Insert(*events, at, event)
	}
	for _, tt := range []struct {
		name  string
		plant func(*History)
		want  []string // validators
	}{
		{"nothing", func(*History) {}, nil},

		{"a stale read", func(h *History) {
			read := op(h, opGet, 1)
			read.Version, read.Content, read.AtLeast = 1, is("w1"), 0
		}, []string{"records"}},
		{"a read of what was never written", func(h *History) { op(h, opGet, 0).Content = is("w9") }, []string{"records"}},
		{"a read that mixes two writes", func(h *History) { op(h, opGet, 1).Content = Content{"w4", "w4"} }, []string{"records"}},
		{"a resurrection after a delete", func(h *History) {
			*op(h, opQuery, 0) = Op{Kind: opQuery, Key: a2, Call: 4600 * ms, Return: 4700 * ms, Outcome: ok, Version: 2, Content: is("w2")}
		}, []string{"records"}},
		{"a delete that found a record where there was none", func(h *History) {
			h.Ops = append(h.Ops, Op{Kind: opSQLDelete, Key: a2, Call: 4750 * ms, Return: 4760 * ms, Outcome: ok})
		}, []string{"records"}},
		{"an insert that found none where there was one", func(h *History) {
			h.Ops = append(h.Ops, Op{Kind: opSQLInsert, Key: b1, Write: "w8", Call: 9000 * ms, Return: 9100 * ms, Outcome: ok})
		}, []string{"records"}},
		{"a patch of a record that was not there", func(h *History) {
			h.Ops = append(h.Ops, Op{Kind: opPatch, Key: a2, Write: "w8", Call: 4750 * ms, Return: 4760 * ms, Outcome: ok})
		}, []string{"records"}},
		{"a patch that lost what another had written", func(h *History) { op(h, opPatch, 0).Content = Content{"w0", "w4"} }, []string{"records"}},
		{"versions that descend", func(h *History) {
			op(h, opPut, 0).Version, op(h, opPatch, 0).Version = 4, 1
		}, []string{"records", "durable"}},
		{"a refused write that took effect", func(h *History) {
			op(h, opPut, 3).Outcome = failed
		}, []string{"records"}},
		{"an unknown write that took effect after it had been overwritten", func(h *History) {
			h.Ops = append(h.Ops,
				Op{Kind: opPut, Key: a1, Write: "w8", Call: 100 * ms, Return: 200 * ms, Outcome: unknown},
				Op{Kind: opGet, Key: a1, Call: 3800 * ms, Return: 3900 * ms, Outcome: ok, Version: 1, Content: is("w8")})
		}, []string{"records"}},

		{"an acknowledged write that is lost", func(h *History) {
			h.Ops = append(h.Ops, Op{Kind: opPut, Key: b1, Write: "w8", Call: 9000 * ms, Return: 9100 * ms, Outcome: ok, Version: 8})
		}, []string{"durable"}},
		{"an acknowledged write under another's version", func(h *History) {
			h.Journal[0].Content, op(h, opGet, 0).Content = is("w8"), is("w8")
		}, []string{"records", "durable", "streams"}},
		{"a table without a record", func(h *History) { h.Table = h.Table[1:] }, []string{"durable", "streams"}},
		{"a table with an old record", func(h *History) { h.Table[0].Version = 1 }, []string{"durable", "streams"}},
		{"half a request", func(h *History) {
			op(h, opPut, 1).Outcome, op(h, opPut, 2).Outcome = unknown, unknown
			h.Journal = slices.Delete(h.Journal, 2, 3)
			h.Table = h.Table[:2]
			drop(h, 0, evChange, 3)
		}, []string{"whole"}},

		{"a write that was repeated", func(h *History) {
			h.Journal = append(h.Journal, Change{Version: 7, Key: b1, Content: is("w2"), At: 5700 * ms})
			h.Table[2].Version = 7
			insert(h, 0, 11, Event{Kind: evChange, At: 5800 * ms, Version: 7, Key: b1, Content: is("w2")})
		}, []string{"once"}},

		{"a lost change", func(h *History) { drop(h, 0, evChange, 3) }, []string{"streams"}},
		{"a lost tombstone", func(h *History) {
			drop(h, 0, evChange, 5)
			drop(h, 0, evChange, 6)
			h.Journal, h.Table = h.Journal[:5], []Row{h.Table[0], h.Table[2]}
			drop(h, 1, evChange, 6)
			h.Ops = slices.DeleteFunc(h.Ops, func(op Op) bool { return op.Version == 6 })
			insert(h, 1, 6, Event{Kind: evChange, At: 5300 * ms, Version: 5, Key: a2, Deleted: true})
		}, []string{"streams"}},
		{"a change left out although nothing newer was there", func(h *History) {
			h.Journal[5].At = 9000 * ms // the stream has 6 and not 5, and 6 was not there yet
			drop(h, 0, evChange, 5)
		}, []string{"streams"}},
		{"a duplicate", func(h *History) {
			insert(h, 0, 5, Event{Kind: evChange, At: 2600 * ms, Version: 2, Key: a2, Content: is("w2")})
		}, []string{"streams"}},
		{"a reordering", func(h *History) {
			events := h.Streams[0].Events
			events[4], events[5] = events[5], events[4]
		}, []string{"streams"}},
		{"a change that was never made", func(h *History) {
			insert(h, 0, 11, Event{Kind: evChange, At: 5600 * ms, Version: 7, Key: b1, Content: is("w7")})
		}, []string{"streams"}},
		{"a change with another's content", func(h *History) { h.Streams[0].Events[4].Content = is("w1") }, []string{"streams"}},
		{"a tombstone instead of a change", func(h *History) {
			h.Streams[0].Events[10].Deleted, h.Streams[0].Events[10].Content = true, Content{}
		}, []string{"streams"}},
		{"a change of a type that was not asked for", func(h *History) {
			insert(h, 1, 3, Event{Kind: evRecord, At: 2300 * ms, Version: 3, Key: b1, Content: is("w2")})
		}, []string{"streams"}},
		{"an unfinished copy", func(h *History) { h.Streams[0].Events = h.Streams[0].Events[:8] }, []string{"streams"}},
		{"a copy with a record that is gone", func(h *History) {
			h.Streams[0].Events = h.Streams[0].Events[:9]
			h.Journal, h.Table = h.Journal[:5], []Row{h.Table[0], h.Table[2]}
			drop(h, 1, evChange, 6)
			h.Ops = slices.DeleteFunc(h.Ops, func(op Op) bool { return op.Version == 6 })
			insert(h, 1, 6, Event{Kind: evChange, At: 5300 * ms, Version: 5, Key: a2, Deleted: true})
		}, []string{"streams"}},
		{"a needless start over", func(h *History) {
			insert(h, 0, 12, Event{Kind: evEnd, At: 8000 * ms, Code: "Aborted"})
		}, []string{"streams"}},
		{"an end as if nothing more was to come", func(h *History) { h.Streams[0].Events[11].Code = codeEOF }, []string{"streams"}},
		{"a SyncLatest that leaves out a record", func(h *History) { drop(h, 1, evRecord, 1) }, []string{"streams"}},
		{"a SyncLatest with an old record", func(h *History) {
			h.Streams[1].Events[3].Version, h.Streams[1].Events[4].Version = 4, 4
		}, []string{"streams"}},
		{"a SyncLatest with a record twice", func(h *History) {
			insert(h, 1, 2, h.Streams[1].Events[1])
		}, []string{"streams"}},

		{"a read behind a stream", func(h *History) {
			h.Ops = append(h.Ops, Op{Kind: opGet, Key: b1, Call: 9000 * ms, Return: 9100 * ms, Outcome: ok, Version: 3, Content: is("w2"), AtLeast: 4})
		}, []string{"read after sync"}},
		{"a read that finds nothing of what a stream has delivered", func(h *History) {
			h.Ops = append(h.Ops, Op{Kind: opGet, Key: b1, Call: 2200 * ms, Return: 2300 * ms, Outcome: absent, AtLeast: 3})
		}, []string{"read after sync"}},

		{"two holders of a lease", func(h *History) { op(h, opAcquire, 1).Outcome, op(h, opAcquire, 1).Write = ok, "w" }, []string{"leases"}},
		{"a lease taken before it had lapsed", func(h *History) {
			op(h, opAcquire, 2).Call, op(h, opAcquire, 2).Return = 1400*ms, 1410*ms
		}, []string{"leases"}},
		{"a lease renewed that is another's", func(h *History) { op(h, opRenew, 1).Outcome = ok }, []string{"leases"}},
		{"a lease refused that is free", func(h *History) { op(h, opAcquire, 3).Outcome = taken }, []string{"leases"}},
		{"a lease lost that was held", func(h *History) { op(h, opRenew, 0).Outcome = taken }, []string{"leases"}},

		{"a code that clients do not repeat", func(h *History) { op(h, opPut, 3).Code = "Internal" }, []string{"codes"}},
		{"a stream that is canceled", func(h *History) { h.Streams[0].Events[7].Code = "Canceled" }, []string{"codes"}},
		{"a replica that serves without a database", func(h *History) { h.Health[1].At = 39 * time.Second }, []string{"health"}},
		{"a replica that serves again too early", func(h *History) { h.Health[2].At = 30 * time.Second }, []string{"health"}},
		{"accounts that do not agree", func(h *History) { h.Books = []string{"they do not agree"} }, []string{"books"}},
		{"something that does not recover", func(h *History) { h.Late = []string{"it does not recover"} }, []string{"recovery"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h := sound()
			tt.plant(h)
			var got []string
			for _, v := range Validate(h) {
				if len(v.Violations) > 0 {
					got = append(got, v.Name)
					t.Log(v.Name, v.Violations)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got violations of %q, want %q", got, tt.want)
			}
		})
	}
}

// TestUnknown: what a client does not know is no reason to object.
func TestUnknown(t *testing.T) {
	for _, tt := range []struct {
		name string
		ops  []Op
	}{
		{"a delete that may have been", []Op{
			{Kind: opDelete, Key: a1, Call: 4000 * ms, Return: 4100 * ms, Outcome: unknown},
			{Kind: opGet, Key: a1, Call: 4200 * ms, Return: 4300 * ms, Outcome: ok, Version: 4, Content: Content{"w1", "w4"}},
		}},
		{"a write that never was", []Op{{Kind: opPut, Key: a1, Write: "w8", Call: 4000 * ms, Return: 4100 * ms, Outcome: unknown}}},
		{"a lease that may have been taken", []Op{
			{Kind: opAcquire, Key: Key{ID: "m"}, TTL: time.Second, Call: 0, Return: 100 * ms, Outcome: unknown},
			{Kind: opAcquire, Key: Key{ID: "m"}, Call: 200 * ms, Return: 300 * ms, Outcome: taken},
		}},
		{"what an earlier version does not do well", []Op{
			{Kind: opGet, Key: a1, Replica: 1, Call: 4000 * ms, Return: 4100 * ms, Outcome: unknown, Code: "Internal"},
		}},
		{"a lease that may not have been taken", []Op{
			{Kind: opAcquire, Key: Key{ID: "m"}, TTL: time.Second, Call: 0, Return: 100 * ms, Outcome: unknown},
			{Kind: opAcquire, Key: Key{ID: "m"}, Write: "v", TTL: time.Second, Call: 200 * ms, Return: 300 * ms, Outcome: ok},
		}},
	} {
		h := sound()
		h.Ops = append(h.Ops, tt.ops...)
		for _, v := range Validate(h) {
			for _, violation := range v.Violations {
				t.Errorf("%s: %s: %s", tt.name, v.Name, violation)
			}
		}
	}
}
