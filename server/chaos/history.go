package chaos

import (
	"bufio"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Kinds of operations. Those on records:
const (
	opPut    = "put"
	opPatch  = "patch"
	opDelete = "delete"
	opGet    = "get"
	opQuery  = "query"
	// In SQL:
	opSQLInsert = "sql insert"
	opSQLUpdate = "sql update"
	opSQLDelete = "sql delete"
	opSQLSelect = "sql select"
	// Those on leases; a lapse is none of a client's, but added when a history is checked.
	opAcquire = "acquire"
	opRenew   = "renew"
	opRelease = "release"
	opLapse   = "lapse"
)

// Outcomes of operations.
const (
	ok     = "ok"
	absent = "absent" // there is no such record
	exists = "exists" // there is one already
	taken  = "taken"  // the lease is somebody else's
	failed = "failed" // certainly without effect
	// unknown: it failed in a way that leaves open whether it has taken effect, or still will.
	unknown = "unknown"
)

// Key names a record.
type Key struct{ Type, ID string }

// Content is what a record says. A put writes its own name into both fields, a patch into the second only.
// So the second names the write that made this version of the record.
type Content struct{ First, Second string }

// Op is one operation of one client on one record or lease. A request for several records is several.
type Op struct {
	Client  int
	Request int // the same for operations of one request, which takes effect whole or not at all; 0 if alone
	Kind    string
	Key     Key    // of a lease: the name as ID
	Write   string // the name of a write, and the id of a lease
	Replica int    // -1: straight to the database

	Call, Return time.Duration // since the start of the run
	Outcome      string
	Code         string // why it failed
	Version      uint64 // of the record written or read; 0 if unknown
	Content      Content
	TTL          time.Duration
	// AtLeast is, for a read, a version of the record that a stream has delivered before.
	AtLeast uint64
}

// Kinds of events of a stream.
const (
	evLatest   = "latest"   // SyncLatest begins
	evRecord   = "record"   // it delivers a record
	evVersions = "versions" // it ends, with the versions to go on from
	evSync     = "sync"     // Sync begins after a version
	evChange   = "change"   // it delivers a change
	evEnd      = "end"      // either has ended, with a code
)

// Codes of ends that are no status of gRPC.
const (
	codeEOF  = "EOF"  // the stream was complete
	codeLeft = "left" // the client itself went away
)

// Event is something that a stream has seen.
type Event struct {
	At            time.Duration
	Kind          string
	Replica       int    `json:",omitempty"`
	ServerVersion uint64 `json:",omitempty"`
	Version       uint64 `json:",omitempty"`
	Key           Key
	Content       Content
	Deleted       bool   `json:",omitempty"`
	Wait          bool   `json:",omitempty"`
	Code          string `json:",omitempty"`
}

// Stream is the history of a client that keeps a copy of the records of a type, or of all types if it is "".
type Stream struct {
	Type   string
	Events []Event
}

// Change is a committed change, as the database's own journal has it.
type Change struct {
	Version uint64
	Key     Key
	Deleted bool
	Content Content
	At      time.Duration // a little before it was committed
}

// Row is a record in the table at the end.
type Row struct {
	Key     Key
	Version uint64
	Content Content
}

// Health is what a replica says of itself from some time on.
type Health struct {
	Replica int
	At      time.Duration
	Status  string
}

// Outage is a time during which a replica could not use the database, for a reason that it can notice only
// by itself.
type Outage struct {
	Replica     int
	Kind        string
	Since, Till time.Duration
}

// Program is what a replica runs from some time on.
type Program struct {
	Replica  int
	At       time.Duration
	Previous bool // an earlier version, whose faults are known
}

// Stall is a time during which the machine did not let this process run, and so perhaps no other.
type Stall struct{ Since, Till time.Duration }

// History is all that is known of a run. The validators need nothing else.
type History struct {
	Ops      []Op
	Streams  []*Stream
	Journal  []Change // ascending by version
	Table    []Row
	Health   []Health
	Outages  []Outage
	Programs []Program
	Stalls   []Stall
	End      time.Duration
	// ServerVersions are those of the data set at the start and at the end: the same, unless it was replaced.
	ServerVersions [2]uint64
	// Books are faults that SQL has found in the database's own accounts.
	Books []string
	// Late tells what had not happened in time after all faults were over.
	Late []string
}

// recorder collects what concurrent clients report.
type recorder struct {
	start time.Time

	mu       sync.Mutex
	ops      []Op
	health   []Health
	outages  []Outage
	programs []Program
	stalls   []Stall
	late     []string
}

func (r *recorder) now() time.Duration { return time.Since(r.start) }

func (r *recorder) add(ops ...Op) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = append(r.ops, ops...)
}

func (r *recorder) addHealth(h Health) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.health = append(r.health, h)
}

func (r *recorder) addOutage(o Outage) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.outages = append(r.outages, o)
}

func (r *recorder) addProgram(p Program) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.programs = append(r.programs, p)
}

// watch notes when this process is not let run, until ctx ends.
func (r *recorder) watch(ctx context.Context) {
	for last := r.now(); ctx.Err() == nil; last = r.now() {
		pause(ctx, tick)
		if now := r.now(); now-last > stalled {
			r.mu.Lock()
			r.stalls = append(r.stalls, Stall{last, now})
			r.mu.Unlock()
		}
	}
}

// A pause of a tick that takes longer than stalled is a stall.
const (
	tick    = 50 * time.Millisecond
	stalled = time.Second
)

// within returns a context that ends after a time during which this process could run: a machine that
// stands still is no reason to call anything late.
func within(ctx context.Context, patience time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer cancel()
		for left := patience; left > 0 && ctx.Err() == nil; left -= tick {
			pause(ctx, tick)
		}
	}()
	return ctx, cancel
}

func (r *recorder) addLate(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.late = append(r.late, what)
}

// count returns how many operations there are.
func (r *recorder) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.ops)
}

// Save writes the history as files of JSON lines.
func (h *History) Save(dir string) error {
	files := map[string][]any{
		"operations": anys(h.Ops), "journal": anys(h.Journal), "table": anys(h.Table),
		"health": anys(h.Health), "outages": anys(h.Outages), "programs": anys(h.Programs), "stalls": anys(h.Stalls),
	}
	for _, stream := range h.Streams {
		files["streams"] = append(files["streams"], stream)
	}
	for name, lines := range files {
		if err := saveLines(filepath.Join(dir, name+".jsonl"), lines); err != nil {
			return err
		}
	}
	return nil
}

func anys[T any](items []T) []any {
	list := make([]any, len(items))
	for i := range items {
		list[i] = items[i]
	}
	return list
}

func saveLines(path string, lines []any) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	defer file.Close()
	buffered := bufio.NewWriter(file)
	encoder := json.NewEncoder(buffered)
	for _, line := range lines {
		if err := encoder.Encode(line); err != nil {
			return err
		}
	}
	if err := buffered.Flush(); err != nil {
		return err
	}
	return file.Close()
}
