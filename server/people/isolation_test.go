package people

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"pgbroker/server/servertest"
)

// TestWritersUnderAnyIsolation: whoever writes in SQL under another isolation level than usual succeeds, or is told to repeat the
// transaction and how to do without; and the books agree whatever happens at the same time.
func TestWritersUnderAnyIsolation(t *testing.T) {
	t.Parallel()
	for _, level := range []pgx.TxIsoLevel{pgx.RepeatableRead, pgx.Serializable} {
		t.Run(string(level), func(t *testing.T) {
			t.Parallel()
			b := servertest.New(t, servertest.Options{Configure: quiet})
			write := func(ctx context.Context, conn *pgx.Conn, level pgx.TxIsoLevel, between func(), sql string, args ...any) error {
				tx, err := conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: level})
				if err != nil {
					return err
				}
				defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }()
				if between != nil { // what the transaction sees is from before it
					if _, err := tx.Exec(ctx, "SELECT count(*) FROM pgbroker.records"); err != nil {
						return err
					}
					between()
				}
				if _, err := tx.Exec(ctx, sql, args...); err != nil {
					return err
				}
				return tx.Commit(ctx)
			}
			wantRepeat := func(what string, err error) {
				t.Helper()
				var pgErr *pgconn.PgError
				if !errors.As(err, &pgErr) || pgErr.Code != pgerrcode.SerializationFailure || !strings.Contains(pgErr.Hint, "READ COMMITTED") {
					t.Errorf("%s: %v, want 40001 with a hint", what, err)
				}
			}
			conn := b.Database.Connect(t)
			const insert = "INSERT INTO pgbroker.records (type, id) VALUES ('t', $1)"
			if err := write(t.Context(), conn, level, nil, insert, "alone"); err != nil {
				t.Errorf("alone: %v", err)
			}
			wantRepeat("after a write of others", write(t.Context(), conn, level, func() { b.Database.Exec(t, insert, "theirs") }, insert, "late"))
			wantRepeat("after a change of options", write(t.Context(), conn, level, func() {
				b.Database.Exec(t, "SELECT pgbroker.set_expiry('t', 'ends')")
			}, `INSERT INTO pgbroker.records (type, id, data) VALUES ('t', 'late', NULL)`))

			var group sync.WaitGroup
			for writer := range 6 {
				mine := level
				if writer%2 == 0 {
					mine = pgx.ReadCommitted
				}
				conn := b.Database.Connect(t)
				group.Go(func() {
					for i := range 15 {
						var between func()
						if i%3 == 0 {
							between = func() {}
						}
						sql, args := insert, []any{fmt.Sprintf("%d-%d", writer, i)}
						switch i % 4 {
						case 1:
							sql, args = "UPDATE pgbroker.records SET data = NULL WHERE id LIKE $1", []any{fmt.Sprintf("%%-%d", i-1)}
						case 3:
							sql, args = "DELETE FROM pgbroker.records WHERE id = $1", []any{fmt.Sprintf("%d-%d", (writer+1)%6, i-1)}
						}
						err := write(t.Context(), conn, mine, between, sql, args...)
						var pgErr *pgconn.PgError
						if err != nil && (mine == pgx.ReadCommitted || !errors.As(err, &pgErr) || pgErr.Code != pgerrcode.SerializationFailure) {
							t.Errorf("%s at %s: %v", sql, mine, err)
						}
					}
				})
			}
			group.Wait()
			if found := problems(t, b); len(found) > 0 {
				t.Errorf("the books disagree: %q", found)
			}
		})
	}
}
