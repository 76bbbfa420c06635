package server

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"pgbroker/db"
	"pgbroker/db/dbtest"
)

// TestLanesLeaveRoom: with all that clients can hold for long held, reads by key and the replica's own work find a
// connection, whatever the size of the pool is, from ten on.
func TestLanesLeaveRoom(t *testing.T) {
	database := dbtest.New(t)
	for _, size := range []int{10, 11, 16} {
		pool, err := db.Open(t.Context(), db.Config{ConnString: database.ConnString, MaxConns: size})
		if err != nil {
			t.Fatal(err)
		}
		lanes := newLanes(pool, newLimiter(Limits{Scans: 100}, slog.New(slog.DiscardHandler)))
		var held []interface{ Rollback(context.Context) error }
		for _, lane := range []*lane{lanes.scans, lanes.snapshots, lanes.changes} {
			for range cap(lane.own) {
				tx, err := lane.Begin(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				held = append(held, tx)
			}
		}
		for _, queries := range []*db.Queries{db.New(lanes.short), db.New(pool)} {
			// One after the other, each time anew: a place that is not given back would be missed.
			for range 2 * size {
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				if _, err := queries.StateGet(ctx); err != nil {
					t.Fatalf("with a pool of %d: %v", size, err)
				}
				if _, err := queries.TypesList(ctx); err != nil {
					t.Fatalf("with a pool of %d: %v", size, err)
				}
				cancel()
			}
		}
		// And with all that clients can hold at all.
		for len(lanes.short.shared) < cap(lanes.short.shared) {
			tx, err := lanes.short.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, tx)
		}
		for range ownConnections {
			conn, err := pool.Acquire(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			held = append(held, heldConn{conn})
		}
		for _, tx := range held {
			if err := tx.Rollback(t.Context()); err != nil {
				t.Error(err)
			}
			if tx, ok := tx.(pgx.Tx); ok {
				_ = tx.Rollback(t.Context()) // again, as BeginFunc does after a commit
			}
		}
		for _, lane := range []*lane{lanes.short, lanes.scans, lanes.snapshots, lanes.changes} {
			if n := len(lane.own) + len(lane.shared) + int(lane.waiting.Load()); n != 0 {
				t.Errorf("%d places are not given back", n)
			}
		}
		pool.Close()
	}
}

// heldConn is a connection that is held like a transaction.
type heldConn struct{ *pgxpool.Conn }

// Rollback gives the connection back.
func (c heldConn) Rollback(context.Context) error { c.Release(); return nil }

// TestLanesGiveBack: a place is given back however its use ends.
func TestLanesGiveBack(t *testing.T) {
	database := dbtest.New(t)
	pool, err := db.Open(t.Context(), db.Config{ConnString: database.ConnString, MaxConns: 10})
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	limiter := newLimiter(Limits{Scans: 1}, slog.New(slog.DiscardHandler))
	lane := newLanes(pool, limiter).scans
	ctx := t.Context()
	ended, cancel := context.WithCancel(ctx)
	cancel()
	var n int
	for name, use := range map[string]func() error{
		"exec":            func() error { _, err := lane.Exec(ctx, "SELECT 1"); return err },
		"exec that fails": func() error { _, err := lane.Exec(ctx, "SELECT 1/0"); return err },
		"row":             func() error { return lane.QueryRow(ctx, "SELECT 1").Scan(&n) },
		"row that fails":  func() error { return lane.QueryRow(ctx, "SELECT 1/0").Scan(&n) },
		"no row":          func() error { return lane.QueryRow(ctx, "SELECT 1 WHERE false").Scan(&n) },
		"canceled":        func() error { return lane.QueryRow(ended, "SELECT 1").Scan(&n) },
		"query to its end": func() error {
			rows, err := lane.Query(ctx, "SELECT 1")
			if err != nil {
				return err
			}
			_, err = pgx.CollectRows(rows, pgx.RowTo[int])
			return err
		},
		"query that fails": func() error {
			rows, err := lane.Query(ctx, "SELECT nonsense")
			if err != nil {
				return err
			}
			rows.Close()
			return rows.Err()
		},
		"query, closed": func() error {
			rows, err := lane.Query(ctx, "SELECT generate_series(1, 100000)")
			if err != nil {
				return err
			}
			rows.Close()
			rows.Close()
			return rows.Err()
		},
		"query, canceled": func() error {
			rows, err := lane.Query(ended, "SELECT 1")
			if err != nil {
				return err
			}
			rows.Close()
			return rows.Err()
		},
		"commit":          func() error { return pgx.BeginFunc(ctx, lane, func(pgx.Tx) error { return nil }) },
		"rollback":        func() error { return pgx.BeginFunc(ctx, lane, func(pgx.Tx) error { return errors.New("no") }) },
		"begin, canceled": func() error { return pgx.BeginFunc(ended, lane, func(pgx.Tx) error { return nil }) },
		"transaction fails": func() error {
			return pgx.BeginFunc(ctx, lane, func(tx pgx.Tx) error { _, err := tx.Exec(ctx, "SELECT 1/0"); return err })
		},
	} {
		err := use()
		t.Logf("%s: %v", name, err)
		if n := len(lane.own) + len(lane.shared) + int(lane.waiting.Load()); n != 0 {
			t.Fatalf("%s: %d places are not given back", name, n)
		}
	}

	// One is in, eight wait, the next one is told so.
	leave, err := lane.enter(ctx)
	if err != nil {
		t.Fatal(err)
	}
	waiting, stop := context.WithCancel(ctx)
	results := make(chan error)
	for range queuePerScan {
		go func() {
			leave, err := lane.enter(waiting)
			if err == nil {
				leave()
			}
			results <- err
		}()
	}
	for lane.waiting.Load() < queuePerScan {
		time.Sleep(time.Millisecond)
	}
	var limit *limitError
	if _, err := lane.enter(ctx); !errors.As(err, &limit) || limit.setting != limitScans || limit.limit != queuePerScan {
		t.Errorf("one too many: %v", err)
	}
	stop()
	for range queuePerScan {
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Errorf("who waits in vain: %v", err)
		}
	}
	leave()
	leave()
	if _, err := lane.Exec(ctx, "SELECT 1"); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}
