package chaos

import (
	"fmt"
	"slices"
	"time"
)

// journal is the committed changes, prepared for questions.
type journal struct {
	changes  []Change          // ascending by version
	position map[uint64]int    // by version
	byKey    map[Key][]*Change // ascending by version
}

func newJournal(changes []Change) *journal {
	j := &journal{changes: changes, position: make(map[uint64]int, len(changes)), byKey: make(map[Key][]*Change)}
	for i := range changes {
		change := &changes[i]
		j.position[change.Version] = i
		j.byKey[change.Key] = append(j.byKey[change.Key], change)
	}
	return j
}

// at returns the latest change of a key that is not above a version; nil if there is none.
func (j *journal) at(key Key, version uint64) *Change {
	changes := j.byKey[key]
	i, _ := slices.BinarySearchFunc(changes, version+1, func(c *Change, v uint64) int {
		if c.Version < v {
			return -1
		}
		return 1
	})
	if i == 0 {
		return nil
	}
	return changes[i-1]
}

// superseded reports whether a newer change of the same record may have been committed at a time.
func (j *journal) superseded(change *Change, at time.Duration) bool {
	changes := j.byKey[change.Key]
	for i := len(changes) - 1; i >= 0 && changes[i].Version > change.Version; i-- {
		if changes[i].At <= at+clockSlack {
			return true
		}
	}
	return false
}

// after returns the position of the first change above a version.
func (j *journal) after(version uint64) int {
	i, _ := slices.BinarySearchFunc(j.changes, version+1, func(c Change, v uint64) int {
		if c.Version < v {
			return -1
		}
		return 1
	})
	return i
}

// mostViolations bounds what one stream tells: one mistake has many consequences.
const mostViolations = 10

// reader checks one stream, event by event.
type reader struct {
	journal *journal
	stream  *Stream
	fixed   bool // the data set was never replaced

	begun      time.Duration // of the SyncLatest under way
	page       map[Key]Row   // what it has delivered so far
	copy       map[Key]Row   // what a client knows
	version    uint64        // everything up to here it knows
	wait       bool
	violations []string
}

// checkStreams checks that each stream delivers every change once, in the order of versions, but for those
// that a newer change of the same record had superseded; that it resumes without a gap, and starts over only
// when it must; and that what it knows in the end is what is in the table.
func checkStreams(h *History) (violations []string) {
	j := newJournal(h.Journal)
	for i, stream := range h.Streams {
		r := &reader{journal: j, stream: stream, fixed: h.ServerVersions[0] == h.ServerVersions[1], copy: make(map[Key]Row)}
		for k := range stream.Events {
			if len(r.violations) >= mostViolations {
				break
			}
			r.read(&stream.Events[k])
		}
		if len(r.violations) < mostViolations {
			r.compare(h)
		}
		for _, violation := range r.violations {
			violations = append(violations, fmt.Sprintf("stream %d (%s): %s", i, typeName(stream.Type), violation))
		}
	}
	return violations
}

func typeName(recordType string) string {
	if recordType == "" {
		return "all types"
	}
	return recordType
}

func (r *reader) follows(key Key) bool { return r.stream.Type == "" || r.stream.Type == key.Type }

func (r *reader) wrong(at time.Duration, format string, args ...any) {
	r.violations = append(r.violations, fmt.Sprintf("at %v: ", at.Round(time.Millisecond))+fmt.Sprintf(format, args...))
}

func (r *reader) read(event *Event) {
	switch event.Kind {
	case evLatest:
		r.begun, r.page = event.At, make(map[Key]Row)
	case evRecord:
		r.readRecord(event)
	case evVersions:
		r.readVersions(event)
	case evSync:
		r.wait = event.Wait
		if event.Version != r.version {
			r.wrong(event.At, "the client resumed after version %d, and knew %d", event.Version, r.version)
		}
	case evChange:
		r.readChange(event)
	case evEnd:
		r.readEnd(event)
	}
}

// matches checks that something delivered was committed.
func (r *reader) matches(event *Event) bool {
	position, found := r.journal.position[event.Version]
	if !found {
		r.wrong(event.At, "version %d (%v) was delivered, and never committed", event.Version, event.Key)
		return false
	}
	change := &r.journal.changes[position]
	if change.Key != event.Key || change.Deleted != event.Deleted || change.Content != event.Content {
		r.wrong(event.At, "version %d was delivered as %v %v deleted %v, and committed as %v %v deleted %v", event.Version,
			event.Key, event.Content, event.Deleted, change.Key, change.Content, change.Deleted)
		return false
	}
	if !r.follows(event.Key) {
		r.wrong(event.At, "version %d (%v) is of another type", event.Version, event.Key)
	}
	return true
}

func (r *reader) readRecord(event *Event) {
	if !r.matches(event) {
		return
	}
	if _, twice := r.page[event.Key]; twice {
		r.wrong(event.At, "SyncLatest delivered %v twice", event.Key)
	}
	r.page[event.Key] = Row{event.Key, event.Version, event.Content}
}

// readVersions checks that what SyncLatest has delivered is the state at its version, or newer where that
// was superseded before it was read; what is newer the stream delivers again.
func (r *reader) readVersions(event *Event) {
	for key := range r.journal.byKey {
		if !r.follows(key) {
			continue
		}
		state := r.journal.at(key, event.Version)
		row, found := r.page[key]
		switch {
		case state == nil:
		case found && row.Version < state.Version:
			r.wrong(event.At, "SyncLatest as of version %d delivered version %d of %v, which was superseded by %d",
				event.Version, row.Version, key, state.Version)
		case !found && !state.Deleted && !r.journal.superseded(state, event.At):
			r.wrong(event.At, "SyncLatest as of version %d left out version %d of %v", event.Version, state.Version, key)
		}
	}
	r.copy, r.page, r.version = r.page, nil, event.Version
}

func (r *reader) readChange(event *Event) {
	if event.Version <= r.version {
		r.wrong(event.At, "version %d was delivered after version %d", event.Version, r.version)
		return
	}
	if !r.matches(event) {
		return
	}
	for i := r.journal.after(r.version); i < len(r.journal.changes) && r.journal.changes[i].Version < event.Version; i++ {
		if missed := &r.journal.changes[i]; r.follows(missed.Key) && !r.journal.superseded(missed, event.At) {
			r.wrong(event.At, "version %d (%v) was left out: %d follows on %d", missed.Version, missed.Key, event.Version, r.version)
		}
	}
	r.version = event.Version
	if event.Deleted {
		delete(r.copy, event.Key)
	} else {
		r.copy[event.Key] = Row{event.Key, event.Version, event.Content}
	}
}

func (r *reader) readEnd(event *Event) {
	switch event.Code {
	case "Aborted":
		if r.fixed {
			r.wrong(event.At, "the client was told to start over after version %d, and need not", r.version)
		}
		r.copy, r.version = make(map[Key]Row), 0
	case codeEOF:
		if r.wait {
			r.wrong(event.At, "the stream ended as if there was nothing more to come")
		}
	}
}

// compare compares the copy with the table.
func (r *reader) compare(h *History) {
	known := 0
	for _, row := range h.Table {
		if !r.follows(row.Key) {
			continue
		}
		switch copied, found := r.copy[row.Key]; {
		case !found:
			r.wrong(h.End, "the copy lacks version %d of %v", row.Version, row.Key)
		case copied != row:
			r.wrong(h.End, "the copy has %v, the table %v", copied, row)
		default:
			known++
		}
		if len(r.violations) >= mostViolations {
			return
		}
	}
	if known < len(r.copy) && len(r.violations) == 0 {
		table := make(map[Key]bool, len(h.Table))
		for _, row := range h.Table {
			table[row.Key] = true
		}
		for key, row := range r.copy {
			if !table[key] {
				r.wrong(h.End, "the copy still has version %d of %v, which is gone", row.Version, key)
			}
		}
	}
}
