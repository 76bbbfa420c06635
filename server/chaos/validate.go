package chaos

import (
	"fmt"
	"slices"
	"time"
)

// Verdict is what a validator says of a history.
type Verdict struct {
	Name       string
	Proves     string
	Violations []string
}

// validators are pure functions of a history; each returns what contradicts its claim.
var validators = []struct {
	name, proves string
	check        func(*History) []string
}{
	{"records", "reads and writes of each record are linearizable", checkRecords},
	{"leases", "leases are linearizable, by the database's clock", checkLeases},
	{"durable", "what was acknowledged is in the journal, and what is in the table is the journal's last word", checkDurable},
	{"whole", "requests for several records took effect whole or not at all", checkWhole},
	{"once", "each write took effect at most once", checkOnce},
	{"streams", "streams are ordered, unique, gapless and resumable, and end as the table", checkStreams},
	{"read after sync", "what a stream has delivered is read everywhere", checkReadAfterSync},
	{"codes", "failures have codes that clients act upon", checkCodes},
	{"health", "replicas say whether they can use the database", checkHealth},
	{"books", "log, counts and table of the database agree", func(h *History) []string { return h.Books }},
	{"recovery", "everything works again when the faults are over", func(h *History) []string { return h.Late }},
}

// Validate runs every validator.
func Validate(h *History) []Verdict {
	verdicts := make([]Verdict, len(validators))
	for i, v := range validators {
		verdicts[i] = Verdict{v.name, v.proves, v.check(h)}
	}
	return verdicts
}

// checkDurable checks that each acknowledged write is in the journal under the version that its client was
// told, and that the table is where the journal ends.
func checkDurable(h *History) (violations []string) {
	j := newJournal(h.Journal)
	for i := range h.Ops {
		op := &h.Ops[i]
		if op.Outcome != ok || op.Version == 0 {
			continue
		}
		position, found := j.position[op.Version]
		if !found {
			violations = append(violations, fmt.Sprintf("%s: that version was never committed", op))
			continue
		}
		change := &h.Journal[position]
		deleted := op.Kind == opDelete || op.Kind == opSQLDelete
		if change.Key != op.Key || change.Deleted != deleted || !isRead(op.Kind) && !deleted && change.Content.Second != op.Write {
			violations = append(violations, fmt.Sprintf("%s: that version is %+v", op, *change))
		}
	}
	last := make(map[Key]*Change)
	for i := range h.Journal {
		last[h.Journal[i].Key] = &h.Journal[i]
	}
	for _, row := range h.Table {
		if change := last[row.Key]; change == nil || change.Deleted || change.Version != row.Version || change.Content != row.Content {
			violations = append(violations, fmt.Sprintf("the table has %v, the journal ends with %+v", row, change))
		}
		delete(last, row.Key)
	}
	for _, change := range last {
		if !change.Deleted {
			violations = append(violations, fmt.Sprintf("the table lacks %+v", *change))
		}
	}
	return violations
}

// checkWhole checks that of each request with several writes all have taken effect, or none.
func checkWhole(h *History) (violations []string) {
	type write struct {
		key  Key
		name string
	}
	applied := make(map[write]bool)
	for i := range h.Journal {
		applied[write{h.Journal[i].Key, h.Journal[i].Content.Second}] = true
	}
	type request struct{ applied, missing []*Op }
	requests := make(map[int]*request)
	for i := range h.Ops {
		op := &h.Ops[i]
		if op.Request == 0 || op.Kind != opPut && op.Kind != opSQLInsert && op.Kind != opSQLUpdate {
			continue
		}
		r := requests[op.Request]
		if r == nil {
			r = new(request)
			requests[op.Request] = r
		}
		switch {
		case applied[write{op.Key, op.Write}]:
			r.applied = append(r.applied, op)
		case op.Outcome != absent && op.Outcome != exists: // those had nothing to do
			r.missing = append(r.missing, op)
		}
	}
	for _, r := range requests {
		if len(r.applied) > 0 && len(r.missing) > 0 {
			violations = append(violations, fmt.Sprintf("half of a request: %s took effect, %s did not", r.applied[0], r.missing[0]))
		}
	}
	return violations
}

// checkOnce checks that nothing repeated a write on its client's behalf after it had taken effect.
func checkOnce(h *History) (violations []string) {
	type write struct {
		key  Key
		name string
	}
	first := make(map[write]*Change)
	for i := range h.Journal {
		change := &h.Journal[i]
		if change.Deleted {
			continue
		}
		w := write{change.Key, change.Content.Second}
		if before := first[w]; before != nil {
			violations = append(violations, fmt.Sprintf("write %s of %v is version %d, and %d again", w.name, w.key, before.Version, change.Version))
		}
		first[w] = change
	}
	return violations
}

// checkReadAfterSync checks that reads find what a stream had delivered before, or something newer.
func checkReadAfterSync(h *History) (violations []string) {
	j := newJournal(h.Journal)
	for i := range h.Ops {
		op := &h.Ops[i]
		if op.AtLeast == 0 {
			continue
		}
		stale := op.Outcome == ok && op.Version < op.AtLeast
		if op.Outcome == absent {
			gone := j.at(op.Key, never64)
			for gone != nil && !gone.Deleted {
				gone = j.at(op.Key, gone.Version-1)
			}
			stale = gone == nil || gone.Version < op.AtLeast
		}
		if stale {
			violations = append(violations, fmt.Sprintf("%s: a stream had delivered version %d before", op, op.AtLeast))
		}
	}
	return violations
}

const never64 = 1<<63 - 1

// Codes that tell a client to try again, or to try elsewhere.
var (
	goodCodes       = []string{"", "Unavailable", "DeadlineExceeded", "ResourceExhausted", "sql"}
	goodStreamCodes = []string{codeEOF, codeLeft, "Unavailable", "DeadlineExceeded", "ResourceExhausted", "Aborted"}
)

// checkCodes checks that nothing failed in another way than what faults explain.
func checkCodes(h *History) (violations []string) {
	for i := range h.Ops {
		if op := &h.Ops[i]; !slices.Contains(goodCodes, op.Code) && !h.previous(op.Replica, op.Call, op.Return) {
			violations = append(violations, op.String())
		}
	}
	for i, stream := range h.Streams {
		var opened time.Duration
		for k := range stream.Events {
			event := &stream.Events[k]
			if event.Kind == evSync || event.Kind == evLatest {
				opened = event.At
			}
			if event.Kind == evEnd && !slices.Contains(goodStreamCodes, event.Code) && !h.previous(event.Replica, opened, event.At) {
				violations = append(violations, fmt.Sprintf("stream %d on replica %d ended as %s at %v", i, event.Replica, event.Code, event.At))
			}
		}
	}
	return violations
}

// previous tells whether a replica has run an earlier version at some time between two. That is to keep the
// promises too, and its faults of other kinds are the past.
func (h *History) previous(replica int, since, till time.Duration) bool {
	before := false // what ran before since
	for _, p := range h.Programs {
		if p.Replica != replica || p.At > till {
			continue
		}
		if p.At > since && (before || p.Previous) {
			return true
		}
		before = p.Previous
	}
	return before
}

// stalled tells whether the machine has stood still at some time between two.
func (h *History) stalled(since, till time.Duration) bool {
	return slices.ContainsFunc(h.Stalls, func(s Stall) bool { return s.Since < till && s.Till > since })
}

// noticeTime is how long a replica may take to notice that it has lost the database.
const noticeTime = 20 * time.Second

// checkHealth checks that a replica that cannot use the database says so: its streams hear nothing, and
// clients are to go elsewhere.
func checkHealth(h *History) (violations []string) {
	for _, outage := range h.Outages {
		if outage.Till-outage.Since <= noticeTime || h.previous(outage.Replica, outage.Since, outage.Till) || h.stalled(outage.Since, outage.Till) {
			continue
		}
		serving := false
		for _, health := range h.Health {
			if health.Replica == outage.Replica && health.At <= outage.Since+noticeTime {
				serving = health.Status == "SERVING"
			}
			if health.Replica == outage.Replica && health.At > outage.Since+noticeTime && health.At < outage.Till-clockSlack {
				serving = serving || health.Status == "SERVING"
			}
		}
		if serving {
			violations = append(violations, fmt.Sprintf("replica %d was serving, %v after it had lost the database (%s at %v)",
				outage.Replica, noticeTime, outage.Kind, outage.Since.Round(time.Millisecond)))
		}
	}
	return violations
}
