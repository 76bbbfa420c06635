package chaos

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"
)

// never is a time after everything: an operation that returns there may have taken effect at any moment
// since it was called, or not at all, because nobody can tell what came after the end.
const never = time.Duration(math.MaxInt64)

// clockSlack is how far the clocks of this process and of the database are trusted to agree.
const clockSlack = 50 * time.Millisecond

// ---------------------------------------------------------------------------------------------
// Records
// ---------------------------------------------------------------------------------------------

// record is the state of one key.
type record struct {
	live    bool
	content Content
	version uint64 // of the latest change; 0 if nobody has been told it
	floor   uint64 // the version is above this
}

// checkRecords checks that what clients were told of each record could have happened one after the other,
// each operation at some moment between its call and its return.
func checkRecords(h *History) (violations []string) {
	byKey := make(map[Key][]Op)
	settled, violations := settle(h)
	for i := range settled {
		byKey[settled[i].Key] = append(byKey[settled[i].Key], settled[i])
	}
	return append(violations, checkKeys(byKey, recordModel)...)
}

var recordModel = porcupine.Model{
	Init: func() any { return record{} },
	Step: func(state, input, _ any) (bool, any) {
		op := input.(*Op)
		return state.(record).step(op)
	},
	DescribeOperation: func(input, _ any) string { return input.(*Op).String() },
	DescribeState:     func(state any) string { return fmt.Sprintf("%+v", state) },
}

// step returns whether an operation may have had its outcome in this state, and the next state.
func (r record) step(op *Op) (legal bool, next record) {
	certain := op.Outcome != unknown
	above := max(r.version, r.floor)
	if certain && op.Outcome == ok && op.Version != 0 && !isRead(op.Kind) && op.Version <= above {
		return false, r
	}
	written := record{live: true, content: Content{op.Write, op.Write}, version: op.Version, floor: max(above, op.Version)}
	switch op.Kind {
	case opPut:
		return true, written
	case opSQLInsert:
		if certain && r.live != (op.Outcome == exists) {
			return false, r
		}
		if r.live {
			return true, r
		}
		return true, written
	case opPatch, opSQLUpdate:
		if certain && r.live != (op.Outcome == ok) {
			return false, r
		}
		if !r.live {
			return true, r
		}
		if op.Kind == opPatch {
			written.content.First = r.content.First
			if certain && op.Content != (Content{}) && op.Content != written.content {
				return false, r // the answer shows another record
			}
		}
		return true, written
	case opDelete, opSQLDelete:
		if certain && r.live != (op.Outcome == ok) {
			return false, r
		}
		if !r.live {
			return true, r
		}
		return true, record{version: op.Version, floor: max(above, op.Version)}
	case opGet, opQuery, opSQLSelect:
		if op.Outcome == absent {
			return !r.live, r
		}
		if !r.live || op.Content != r.content || op.Version <= r.floor && op.Version != r.version || r.version != 0 && op.Version != r.version {
			return false, r
		}
		r.version, r.floor = op.Version, op.Version
		return true, r
	}
	panic("unknown kind of operation " + op.Kind)
}

func isRead(kind string) bool { return kind == opGet || kind == opQuery || kind == opSQLSelect }

// settle prepares the operations on records for the model. What failed for certain, or only tried to read,
// is left out. What may have taken effect the journal knows: a write that it has took effect before
// anybody heard of a later version; one that it does not have did not.
func settle(h *History) (settled []Op, violations []string) {
	type effect struct {
		key   Key
		write string
	}
	effects := make(map[effect]uint64)
	tombstones := make(map[Key]int)
	for i := range h.Journal {
		change := &h.Journal[i]
		if change.Deleted {
			tombstones[change.Key]++
		} else {
			effects[effect{change.Key, change.Content.Second}] = change.Version
		}
	}
	for i := range h.Ops {
		if op := &h.Ops[i]; (op.Kind == opDelete || op.Kind == opSQLDelete) && op.Outcome == ok {
			tombstones[op.Key]-- // those that are left are of unknown deletions
		}
	}
	known := newLatest(h)
	for _, op := range h.Ops {
		switch op.Kind {
		case opAcquire, opRenew, opRelease:
			continue
		case opPut, opPatch, opSQLInsert, opSQLUpdate:
			version, applied := effects[effect{op.Key, op.Write}]
			switch {
			case op.Outcome == failed && applied:
				violations = append(violations, fmt.Sprintf("%s failed, and is version %d", &op, version))
				continue
			case op.Outcome == unknown && applied:
				op.Outcome, op.Version = ok, version
				op.Return = max(op.Call, known.before(version))
			case op.Outcome == unknown, op.Outcome == failed:
				continue
			}
		case opDelete, opSQLDelete:
			if op.Outcome == failed || op.Outcome == unknown && tombstones[op.Key] <= 0 {
				continue
			}
			if op.Outcome == unknown {
				op.Return = never
			}
		default:
			if op.Outcome != ok && op.Outcome != absent {
				continue
			}
		}
		settled = append(settled, op)
	}
	return settled, violations
}

// latest tells when a version had certainly been committed: when somebody was told of it or of a later one.
type latest struct {
	versions []uint64
	at       []time.Duration // the earliest for this version and all later ones
}

func newLatest(h *History) *latest {
	type told struct {
		version uint64
		at      time.Duration
	}
	var all []told
	for i := range h.Ops {
		if op := &h.Ops[i]; op.Version != 0 {
			all = append(all, told{op.Version, op.Return})
		}
	}
	for _, stream := range h.Streams {
		for i := range stream.Events {
			if event := &stream.Events[i]; event.Kind == evChange || event.Kind == evRecord || event.Kind == evVersions {
				all = append(all, told{event.Version, event.At})
			}
		}
	}
	slices.SortFunc(all, func(a, b told) int { return cmp.Compare(a.version, b.version) })
	l := &latest{versions: make([]uint64, len(all)), at: make([]time.Duration, len(all))}
	earliest := never
	for i := len(all) - 1; i >= 0; i-- {
		earliest = min(earliest, all[i].at)
		l.versions[i], l.at[i] = all[i].version, earliest
	}
	return l
}

func (l *latest) before(version uint64) time.Duration {
	i, _ := slices.BinarySearch(l.versions, version)
	if i == len(l.at) {
		return never
	}
	return l.at[i]
}

// ---------------------------------------------------------------------------------------------
// Leases
// ---------------------------------------------------------------------------------------------

// lease is the state of one lease: who holds it, by which grant.
type lease struct {
	holder string
	grant  time.Duration // call of the operation that granted it, which is its name
}

// longestDelay is how long after its client has given up an operation may still take effect: statements
// are bounded, and so are the faults.
const longestDelay = time.Minute

// checkLeases checks the same for leases. That a lease lapses is an operation of nobody's, at some moment
// a TTL after its grant: not earlier than a TTL after the grant was asked for, and not later than a TTL
// after it was given.
func checkLeases(h *History) []string {
	byName := make(map[Key][]Op)
	for _, op := range h.Ops {
		switch op.Kind {
		case opAcquire, opRenew, opRelease:
		default:
			continue
		}
		if op.Outcome == failed {
			continue
		}
		if op.Outcome == unknown {
			op.Return += longestDelay
		}
		byName[op.Key] = append(byName[op.Key], op)
		if op.Kind != opRelease && (op.Outcome == ok || op.Outcome == unknown) {
			byName[op.Key] = append(byName[op.Key], Op{
				Kind: opLapse, Key: op.Key, AtLeast: uint64(op.Call), Outcome: ok,
				Call: op.Call + op.TTL - clockSlack, Return: op.Return + op.TTL + clockSlack,
			})
		}
	}
	return checkKeys(byName, leaseModel)
}

var leaseModel = porcupine.Model{
	Init: func() any { return lease{} },
	Step: func(state, input, _ any) (bool, any) {
		return state.(lease).step(input.(*Op))
	},
	DescribeOperation: func(input, _ any) string { return input.(*Op).String() },
	DescribeState:     func(state any) string { return fmt.Sprintf("%+v", state) },
}

func (l lease) step(op *Op) (legal bool, next lease) {
	free, mine := l.holder == "", l.holder == op.Write && l.holder != ""
	switch {
	case op.Kind == opLapse:
		if l.grant == time.Duration(op.AtLeast) {
			return true, lease{}
		}
		return true, l
	case op.Kind == opRelease:
		if mine {
			return true, lease{}
		}
		return true, l
	case op.Kind == opAcquire && op.Outcome == ok:
		return free, lease{op.Write, op.Call}
	case op.Kind == opAcquire && op.Outcome == taken:
		return !free, l
	case op.Kind == opAcquire: // unknown; nobody has been told the id
		if free {
			return true, lease{fmt.Sprintf("unknown since %v", op.Call), op.Call}
		}
		return true, l
	case op.Kind == opRenew && op.Outcome == taken:
		return !free && !mine, l
	case op.Kind == opRenew:
		if free || mine {
			return true, lease{op.Write, op.Call}
		}
		return op.Outcome == unknown, l
	}
	panic("unknown kind of operation " + op.Kind)
}

// ---------------------------------------------------------------------------------------------
// Both
// ---------------------------------------------------------------------------------------------

// checkTime bounds the search for an order of one key's operations, which is exponential at worst.
const checkTime = 30 * time.Second

// checkKeys checks the history of each key by itself. (Not with porcupine's partitions: one that takes too
// long would leave nothing said about the others.)
func checkKeys(byKey map[Key][]Op, model porcupine.Model) (violations []string) {
	keys := make([]Key, 0, len(byKey))
	for key := range byKey {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b Key) int {
		return cmp.Or(strings.Compare(a.Type, b.Type), strings.Compare(a.ID, b.ID))
	})
	for _, key := range keys {
		ops := byKey[key]
		operations := make([]porcupine.Operation, len(ops))
		for i := range ops {
			operations[i] = porcupine.Operation{
				ClientId: ops[i].Client, Input: &ops[i], Call: int64(ops[i].Call), Return: int64(ops[i].Return),
			}
		}
		result, info := porcupine.CheckOperationsVerbose(model, operations, checkTime)
		switch result {
		case porcupine.Ok:
		case porcupine.Unknown:
			violations = append(violations, fmt.Sprintf("%s %s: no order of its %d operations was found in %v, nor that there is none",
				key.Type, key.ID, len(ops), checkTime))
		default:
			violations = append(violations, fmt.Sprintf("%s %s: no order explains its %d operations:%s",
				key.Type, key.ID, len(ops), evidence(ops, info)))
		}
	}
	return violations
}

// evidence shows the operations around the point which no order passes.
func evidence(ops []Op, info porcupine.LinearizationInfo) string {
	longest := 0
	for _, partition := range info.PartialLinearizations() {
		for _, order := range partition {
			longest = max(longest, len(order))
		}
	}
	byReturn := slices.SortedFunc(slices.Values(ops), func(a, b Op) int { return cmp.Compare(a.Return, b.Return) })
	from, to := max(0, longest-6), min(len(byReturn), longest+4)
	var text strings.Builder
	for i := from; i < to; i++ {
		fmt.Fprintf(&text, "\n      %s", &byReturn[i])
	}
	return text.String()
}

// String returns an operation for people.
func (op *Op) String() string {
	till := "?"
	if op.Return != never {
		till = op.Return.Round(time.Microsecond).String()
	}
	text := fmt.Sprintf("[%v, %s] client %d: %s %s %s", op.Call.Round(time.Microsecond), till, op.Client, op.Kind, op.Key.Type, op.Key.ID)
	if op.Write != "" {
		text += " " + op.Write
	}
	text += " -> " + op.Outcome
	if op.Version != 0 {
		text += fmt.Sprintf(" version %d", op.Version)
	}
	if op.Content != (Content{}) {
		text += fmt.Sprintf(" %v", op.Content)
	}
	if op.Code != "" {
		text += " (" + op.Code + ")"
	}
	return text
}
