package db

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
)

// TestFence goes through histories of servers, as connections to them find them one after the other.
func TestFence(t *testing.T) {
	const a, b = 1001, 1002 // systems
	// Epochs, as a database has them: that of each promotion or move.
	promoted := epoch{1 << 40, a, 2}
	other := epoch{1<<40 + 1, a, 2} // another standby that was promoted at about the same time
	again := epoch{1 << 41, a, 3}
	moved := epoch{1 << 41, b, 1}
	type server struct {
		system, timeline int64
		epochs           []epoch
		readOnly         bool
	}
	for _, tt := range []struct {
		name    string
		before  []server
		next    server
		refused bool
	}{
		{"the same", []server{{system: a, timeline: 1}}, server{system: a, timeline: 1}, false},
		{"promoted", []server{{system: a, timeline: 1}}, server{system: a, timeline: 2}, false},
		{"promoted, again", []server{{system: a, timeline: 2, epochs: []epoch{promoted}}}, server{system: a, timeline: 3, epochs: []epoch{promoted, again}}, false},
		{"the old primary", []server{{system: a, timeline: 1}, {system: a, timeline: 2}}, server{system: a, timeline: 1}, true},
		{"the old primary of long ago", []server{{system: a, timeline: 1}, {system: a, timeline: 2, epochs: []epoch{promoted}}, {system: b, timeline: 1, epochs: []epoch{promoted, moved}}}, server{system: a, timeline: 1}, true},
		{"a standby that was promoted as well", []server{{system: a, timeline: 2, epochs: []epoch{promoted}}}, server{system: a, timeline: 2, epochs: []epoch{other}}, true},
		{"a standby that was promoted as well, before its first write", []server{{system: a, timeline: 2, epochs: []epoch{promoted}}}, server{system: a, timeline: 2}, true},
		{"a standby that lags", []server{{system: a, timeline: 2, epochs: []epoch{promoted}}}, server{system: a, readOnly: true}, true},
		{"a standby that follows", []server{{system: a, timeline: 2, epochs: []epoch{promoted}}}, server{system: a, readOnly: true, epochs: []epoch{promoted}}, false},
		{"restored to before the epoch", []server{{system: a, timeline: 2, epochs: []epoch{promoted}}}, server{system: a, timeline: 3}, false},
		{"what it was restored from", []server{{system: a, timeline: 2, epochs: []epoch{promoted}}, {system: a, timeline: 3, epochs: []epoch{again}}}, server{system: a, timeline: 2, epochs: []epoch{promoted}}, true},
		{"moved", []server{{system: a, timeline: 2, epochs: []epoch{promoted}}}, server{system: b, timeline: 1, epochs: []epoch{promoted, moved}}, false},
		{"restored elsewhere from an old dump", []server{{system: a, timeline: 2, epochs: []epoch{promoted}}}, server{system: b, timeline: 1}, false},
		{"where it was moved from", []server{{system: a, timeline: 2, epochs: []epoch{promoted}}, {system: b, timeline: 1, epochs: []epoch{promoted, moved}}}, server{system: a, timeline: 2, epochs: []epoch{promoted}}, true},
		{"where it was moved from, promoted since", []server{{system: a, timeline: 1}, {system: b, timeline: 1, epochs: []epoch{moved}}}, server{system: a, timeline: 2}, true},
		{"moved back", []server{{system: a, timeline: 1}, {system: b, timeline: 1, epochs: []epoch{moved}}}, server{system: a, timeline: 1, epochs: []epoch{moved, {1 << 42, a, 1}}}, false},
		{"hidden", []server{{system: a, epochs: []epoch{promoted}}}, server{system: a, epochs: []epoch{promoted, again}}, false},
		{"hidden, and old", []server{{system: a}, {system: a, epochs: []epoch{promoted}}}, server{system: a}, true},
		{"all hidden, and old", []server{{}, {epochs: []epoch{promoted}}}, server{}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFence(slog.New(slog.DiscardHandler), func() {})
			visit := func(s server) error {
				near, far := net.Pipe()
				defer near.Close()
				defer far.Close()
				row := LineageGetRow{SystemIdentifier: s.system, Timeline: s.timeline, ReadOnly: s.readOnly, Settled: true}
				row.KnowsEpoch = f.epoch == epoch{} || slices.Contains(s.epochs, f.epoch)
				if n := len(s.epochs); n > 0 {
					row.Epoch, row.EpochSystem, row.EpochTimeline = s.epochs[n-1].firstVersion, s.epochs[n-1].system, s.epochs[n-1].timeline
				}
				_, err := f.admit(&fencedConn{Conn: near, fence: f}, f.epoch, row)
				return err
			}
			for _, s := range tt.before {
				if err := visit(s); err != nil {
					t.Fatalf("before: %v", err)
				}
			}
			err := visit(tt.next)
			var past *PastError
			if errors.As(err, &past) != tt.refused || (err != nil) != tt.refused {
				t.Errorf("got %v, want a refusal: %v", err, tt.refused)
			}
			if got := f.refused.Load(); got != 0 != tt.refused {
				t.Errorf("%d refusals are counted", got)
			}
			if tt.refused {
				// It stays as it is.
				if err := visit(tt.before[len(tt.before)-1]); err != nil {
					t.Errorf("back to where it was: %v", err)
				}
			}
		})
	}
}

// A connection that breaks while its server is checked has not found that there is no row: a handler would take that for a
// record that does not exist.
func TestCheckThatBreaks(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			backend := pgproto3.NewBackend(conn, conn)
			if _, err := backend.ReceiveStartupMessage(); err == nil {
				backend.Send(&pgproto3.AuthenticationOk{})
				backend.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
				_ = backend.Flush() // the other side sees to it
				_, _ = backend.Receive()
			}
			conn.Close()
		}
	}()
	d, err := Open(t.Context(), Config{ConnString: "postgres://u@" + l.Addr().String() + "/d?sslmode=disable"})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var n int
	if err := d.QueryRow(t.Context(), "SELECT 1").Scan(&n); !IsUnavailable(err) || errors.Is(err, pgx.ErrNoRows) {
		t.Errorf("got %v, want an error that is unavailable and not that of no row", err)
	}
	rows := bareRow{rows: brokenRows{}}
	if err := rows.Scan(&n); !errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, pgx.ErrNoRows) {
		t.Errorf("got %v", err)
	}
}

// brokenRows are those of a connection that has gone.
type brokenRows struct{ pgx.Rows }

func (brokenRows) Close()     {}
func (brokenRows) Next() bool { return false }
func (brokenRows) Err() error { return io.ErrUnexpectedEOF }
