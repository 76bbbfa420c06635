package changefeed

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"

	"pgbroker/db"
	"pgbroker/server/supervise"
)

// TestTypeWithoutAName: records of type "" are records of a type like another. They are in the streams of all types, also from
// the table, and in no other.
func TestTypeWithoutAName(t *testing.T) {
	t.Parallel()
	f := newFixture(t, nil)
	f.follow()
	start := f.state.LatestVersion
	all, typed := f.open(""), f.open("t")
	for _, id := range ids("a", 3) { // each is published by itself
		f.writeType("", id)
		f.writeType("t", id)
	}
	f.wantDrained(all, start, "")
	f.wantDrained(typed, start, "t")
	f.database.Exec(t, "TRUNCATE pgbroker.records")
	f.load()
	f.await("the new data set", func() bool { return f.view.Load().serverVersion == f.state.ServerVersion })
	start = f.state.LatestVersion
	all = f.open("")
	f.writeType("", "b")
	f.writeType("", "c", "d")
	f.wantDrained(all, start, "")
	f.wantDrained(f.openAt(start, ""), start, "")
}

// TestUndeliverable: a change that cannot be encoded is left out, of the ring and of what is read from the table, and those around
// it are not.
func TestUndeliverable(t *testing.T) {
	t.Parallel()
	f := newFixture(t, func(c *Config) {
		encode := c.Encode
		c.Encode = func(row *db.ChangesAfterRow) []byte {
			if strings.HasPrefix(row.ID, "bad") {
				return nil
			}
			return encode(row)
		}
	})
	f.follow()
	start := f.state.LatestVersion
	live := f.open("t")
	f.write("a", "bad", "b")
	f.write(ids("bad", 10)...)
	f.write("c")
	for name, c := range map[string]*Cursor{"ring": live, "table": f.openAt(0, "t")} {
		if got := f.drain(c); len(got) != 3 || got[0] <= start {
			t.Errorf("%s: %v", name, got)
		}
	}
	if event, err := f.openAt(0, "").Next(f.ctx, false); err != nil || event.Options == nil {
		t.Errorf("%v, %v", event, err)
	}
}

// faulty is a database of which a query can be made to panic.
type faulty struct {
	db.DBTX
	panics atomic.Int32 // how many queries from now on
}

func (f *faulty) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if strings.Contains(sql, "ChangesAfter") && f.panics.Add(-1) >= 0 {
		panic("faulty")
	}
	return f.DBTX.Query(ctx, sql, args...) //nolint:rowserrcheck // whoever reads them checks
}

// TestAPanicBeginsAnew: when the tailer panics, it begins anew. Nothing that it knew is used again, no stream is lost, and each
// gets every change.
func TestAPanicBeginsAnew(t *testing.T) {
	t.Parallel()
	var panics atomic.Int64
	f := newFixture(t, func(c *Config) {
		supervisor := &supervise.Supervisor{Logger: c.Logger, OnPanic: func(string) { panics.Add(1) }}
		c.Guard = supervisor.Run
	})
	f.follow()
	start := f.state.LatestVersion
	all, typed, waiting := f.open(""), f.open("t"), f.open("t")
	f.write("a")
	f.wantDrained(typed, start, "t")
	f.drain(waiting)
	event := make(chan Event, 1)
	go func() {
		for {
			next, err := waiting.Next(f.ctx, true)
			if err != nil || len(next.Changes) > 0 {
				event <- next
				return
			}
		}
	}()
	before := f.view.Load()
	// Half of what publishing closes may be closed already.
	close(before.turned)
	f.faults.panics.Store(2)
	f.Wake()
	f.await("two panics", func() bool { return panics.Load() == 2 })
	f.await("a fresh view", func() bool { return f.view.Load().generation == 2 && f.view.Load().options.version >= 0 })
	if v := f.view.Load(); len(v.all.changes) > 0 || v.bytes > 0 || v.types != nil {
		t.Errorf("changes from before the panic are still there: %+v", v)
	}
	middle := f.state.LatestVersion
	f.write("b")
	f.writeType("", "c")
	if got := <-event; len(got.Changes) != 1 || got.Changes[0].Version <= middle {
		t.Errorf("a stream that waited got %v", got.Changes)
	}
	f.wantDrained(all, start, "")
	f.wantDrained(typed, middle, "t")
	f.wantDrained(f.openAt(middle, ""), middle, "")
}
