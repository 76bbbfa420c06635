package db_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"pgbroker/db"
	"pgbroker/db/dbtest"
)

// poolerModes are the ways a PgBouncer may be set up, as far as they matter here.
func poolerModes(t *testing.T) map[string]map[string]string {
	t.Helper()
	modes := map[string]map[string]string{
		"transaction": {"pool_mode": "transaction"},
		"session":     {"pool_mode": "session"},
	}
	if dbtest.PgBouncerPrepares(t) {
		modes["transaction, prepared"] = map[string]string{"pool_mode": "transaction", "max_prepared_statements": "100"}
		modes["session, prepared"] = map[string]string{"pool_mode": "session", "max_prepared_statements": "100"}
		modes["transaction"]["max_prepared_statements"] = "0"
		modes["session"]["max_prepared_statements"] = "0"
	}
	return modes
}

// forEachPooler runs a test behind each kind of pooler, before a database of its own.
func forEachPooler(t *testing.T, test func(t *testing.T, p *dbtest.Database, b *dbtest.PgBouncer)) {
	t.Parallel()
	for name, settings := range poolerModes(t) {
		t.Run(name, func(t *testing.T) {
			p := dbtest.New(t)
			test(t, p, dbtest.StartPgBouncer(t, p.ConnString, settings))
		})
	}
}

// All kinds of statements, from many goroutines over few sessions, work behind a pooler, with the settings that they
// need, whatever the role has.
func TestPoolerStatements(t *testing.T) {
	forEachPooler(t, func(t *testing.T, p *dbtest.Database, b *dbtest.PgBouncer) {
		p.Exec(t, fmt.Sprintf(`ALTER DATABASE %s SET default_transaction_isolation = serializable`, pgx.Identifier{p.Name}.Sanitize()))
		p.Exec(t, fmt.Sprintf(`ALTER DATABASE %s SET statement_timeout = '1h'`, pgx.Identifier{p.Name}.Sanitize()))
		d, _ := open(t, db.Config{
			ConnString: b.ConnString() + "&work_mem=9MB&options=-c%20geqo_threshold%3D7", Pooler: true, MaxConns: 8,
			StatementTimeout: 20 * time.Second,
		})
		const settings = `SELECT concat_ws(' ', current_setting('application_name'), current_setting('statement_timeout'), current_setting('jit'),
			current_setting('enable_seqscan'), current_setting('plan_cache_mode'), current_setting('transaction_isolation'),
			current_setting('work_mem'), current_setting('geqo_threshold'))`
		const want = "pgbroker 20s off off force_generic_plan read committed 9MB 7"
		group, ctx := errgroup.WithContext(t.Context())
		for range 16 {
			group.Go(func() error {
				for n := range 50 {
					var got string
					if err := d.QueryRow(ctx, settings).Scan(&got); err != nil || got != want {
						return fmt.Errorf("got %q, %w, want %q", got, err, want)
					}
					var bytes [][]byte
					var doc map[string]any
					in := [][]byte{{0, 1, 255}, []byte("'"), {}}
					err := d.QueryRow(ctx, `SELECT $1::bytea[], $2::jsonb`, in, fmt.Sprintf(`{"n": %d}`, n)).Scan(&bytes, &doc)
					if err != nil || fmt.Sprint(bytes) != fmt.Sprint(in) || doc["n"] != float64(n) {
						return fmt.Errorf("got %v %v, %w", bytes, doc, err)
					}
					rows, err := d.Query(ctx, `SELECT generate_series(1, $1::int)`, 1000)
					if err != nil {
						return err
					}
					if list, err := pgx.CollectRows(rows, pgx.RowTo[int]); err != nil || len(list) != 1000 {
						return fmt.Errorf("got %d rows, %w", len(list), err)
					}
					rows, err = d.Query(ctx, `SELECT generate_series(1, 1000)`)
					if err != nil {
						return err
					}
					rows.Next()
					rows.Close() // before the end
					if err := rows.Err(); err != nil {
						return err
					}
					err = pgx.BeginTxFunc(ctx, d, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
						var pid int32
						if err := tx.QueryRow(ctx, `SELECT pg_backend_pid()`).Scan(&pid); err != nil {
							return err
						}
						if err := tx.QueryRow(ctx, settings).Scan(&got); err != nil || got != want {
							return fmt.Errorf("in a transaction: got %q, %w", got, err)
						}
						var readOnly, same bool
						err := tx.QueryRow(ctx, `SELECT current_setting('transaction_read_only')::boolean, $1 = pg_backend_pid()`, pid).Scan(&readOnly, &same)
						if err == nil && !(readOnly && same) {
							err = fmt.Errorf("read-only: %t, in the same session: %t", readOnly, same)
						}
						return err
					})
					if err != nil {
						return err
					}
					var pgErr *pgconn.PgError
					if err := d.QueryRow(ctx, `SELECT 1 / $1::int`, 0).Scan(&n); !errors.As(err, &pgErr) || pgErr.Code != "22012" {
						return fmt.Errorf("division by zero: got %w", err)
					}
					if err := d.QueryRow(ctx, `SELECT 1 WHERE $1::int = 1`, 0).Scan(&n); !errors.Is(err, pgx.ErrNoRows) {
						return fmt.Errorf("no row: got %w", err)
					}
				}
				return nil
			})
		}
		if err := group.Wait(); err != nil {
			t.Fatal(err)
		}
		if tag, err := d.Exec(t.Context(), `UPDATE pgbroker.state SET server_version = server_version`); err != nil || tag.RowsAffected() != 1 {
			t.Errorf("got %v, %v", tag, err)
		}
		if d.Resets() != 0 {
			t.Errorf("the pool was given up %d times", d.Resets())
		}
		// Nothing of it is left in the sessions that others get.
		other, err := pgx.Connect(t.Context(), strings.Replace(b.ConnString(), "?", "?default_query_exec_mode=simple_protocol&", 1))
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close(t.Context())
		var left string
		if err := other.QueryRow(t.Context(), `SELECT current_setting('statement_timeout') || ' ' || current_setting('jit') || ' ' ||
			(SELECT count(*) FROM pg_prepared_statements)`).Scan(&left); err != nil || left != "1h on 0" {
			t.Errorf("left in a session: %q, %v", left, err)
		}
	})
}

// A commit that fails is an error of the statement.
func TestPoolerCommitFails(t *testing.T) {
	forEachPooler(t, func(t *testing.T, p *dbtest.Database, b *dbtest.PgBouncer) {
		p.Exec(t, `CREATE TABLE public.deferred (x int UNIQUE DEFERRABLE INITIALLY DEFERRED)`)
		d, _ := open(t, db.Config{ConnString: b.ConnString(), Pooler: true})
		const twice = `INSERT INTO public.deferred VALUES (1), (1) RETURNING x`
		var pgErr *pgconn.PgError
		if _, err := d.Exec(t.Context(), twice); !errors.As(err, &pgErr) || pgErr.Code != "23505" {
			t.Errorf("Exec: got %v", err)
		}
		var x int
		if err := d.QueryRow(t.Context(), twice).Scan(&x); !errors.As(err, &pgErr) || pgErr.Code != "23505" {
			t.Errorf("QueryRow: got %v", err)
		}
		rows, err := d.Query(t.Context(), twice)
		if err != nil {
			t.Fatal(err)
		}
		for rows.Next() {
		}
		if err := rows.Err(); !errors.As(err, &pgErr) || pgErr.Code != "23505" {
			t.Errorf("Query: got %v", err)
		}
		get[int](t, d, "SELECT 1")
	})
}

// Through pauses, reloads and restarts of the pooler, and restarts of PostgreSQL behind it, statements succeed or are
// unavailable, and go on by themselves.
func TestPoolerFaults(t *testing.T) {
	t.Parallel()
	for name, settings := range poolerModes(t) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := dbtest.Server(t, nil)
			b := dbtest.StartPgBouncer(t, p.ConnString(), settings)
			d, _ := open(t, db.Config{ConnString: b.ConnString(), Pooler: true, MaxConns: 4})
			var done atomic.Int64
			working, stop := context.WithCancel(t.Context())
			group, ctx := errgroup.WithContext(working)
			for range 4 {
				group.Go(func() error {
					for ctx.Err() == nil {
						var n int
						err := d.QueryRow(ctx, `SELECT $1::int`, 1).Scan(&n)
						switch {
						case err == nil:
							done.Add(1)
						case ctx.Err() == nil && !db.IsUnavailable(err):
							return err
						}
					}
					return nil
				})
			}
			goesOn := func(what string) {
				t.Helper()
				from := done.Load()
				await(t, func(ctx context.Context) error {
					if ctx.Err() == nil && done.Load() < from+100 && working.Err() == nil {
						return fmt.Errorf("after %s: %d statements", what, done.Load()-from)
					}
					return nil
				})
			}
			goesOn("the start")
			paused := make(chan struct{})
			go func() { defer close(paused); b.Pause() }()
			if settings["pool_mode"] == "session" {
				d.Reset() // it waits for sessions to end
			}
			select {
			case <-paused:
			case <-ctx.Done():
				t.Fatal(group.Wait())
			}
			before := done.Load() + 4 // answers may be on their way
			waiting, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
			if err := ping(d)(waiting); err == nil || done.Load() > before {
				t.Errorf("statements pass a paused pooler: %v, it is not used", err)
			}
			cancel()
			b.Resume()
			goesOn("a pause")
			b.Reload(settings)
			goesOn("a reload")
			b.Stop()
			b.Start()
			goesOn("a stop of the pooler")
			b.Kill()
			b.Start()
			goesOn("a kill of the pooler")
			p.Stop()
			p.Restart()
			goesOn("a restart of PostgreSQL")
			p.Kill()
			p.Restart()
			goesOn("a crash of PostgreSQL")
			stop()
			if err := group.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// Statements behind a pooler have our settings, whatever role and database say.
func TestPoolerSettings(t *testing.T) {
	forEachPooler(t, func(t *testing.T, p *dbtest.Database, b *dbtest.PgBouncer) {
		database := pgx.Identifier{p.Name}.Sanitize()
		p.AdminExec(t, "CREATE ACCESS METHOD columnar TYPE TABLE HANDLER heap_tableam_handler")
		names, want := []string{"transaction_isolation"}, []string{"read committed"}
		for _, s := range db.Settings(db.Config{}) {
			if s.Name != "exit_on_error" { // a pooler does not survive that
				p.AdminExec(t, fmt.Sprintf("ALTER DATABASE %s SET %s = '%s'", database, s.Name, contrary[s.Name]))
			}
			names, want = append(names, s.Name), append(want, s.Value)
		}
		d, _ := open(t, db.Config{ConnString: b.ConnString(), Pooler: true})
		const sql = `SELECT setting FROM pg_settings JOIN unnest($1::text[]) WITH ORDINALITY AS asked (name, n) USING (name) ORDER BY n`
		check := func(where string, run func() (pgx.Rows, error)) {
			rows, err := run()
			if err != nil {
				t.Fatal(err)
			}
			got, err := pgx.CollectRows(rows, pgx.RowTo[string])
			if err != nil || len(got) != len(want) {
				t.Fatalf("%s: got %v, %v, want %v", where, got, err, want)
			}
			for i := range got {
				if got[i] != want[i] {
					t.Errorf("%s: %s is %s, want %s", where, names[i], got[i], want[i])
				}
			}
		}
		check("statement", func() (pgx.Rows, error) { return d.Query(t.Context(), sql, names) }) //nolint:rowserrcheck // check does
		tx, err := d.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer tx.Rollback(t.Context())                                                              //nolint:errcheck // it only reads
		check("transaction", func() (pgx.Rows, error) { return tx.Query(t.Context(), sql, names) }) //nolint:rowserrcheck // check does
		if got := get[string](t, d, `SELECT 'Ж' || $1`, "ё"); got != "Жё" {
			t.Errorf("got %q", got)
		}
	})
}

// A statement whose caller has lost patience ends in the server as well, and its session serves others.
func TestPoolerCancels(t *testing.T) {
	forEachPooler(t, func(t *testing.T, p *dbtest.Database, b *dbtest.PgBouncer) {
		d, _ := open(t, db.Config{ConnString: b.ConnString(), Pooler: true, ApplicationName: "canceled"})
		for range 3 {
			ctx, cancel := context.WithCancel(t.Context())
			running := make(chan error, 1)
			go func() {
				_, err := d.Exec(ctx, "SELECT pg_sleep(3600)")
				running <- err
			}()
			const count = `SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(3600)' AND state = 'active'`
			sleeping := func(want int) {
				t.Helper()
				await(t, func(ctx context.Context) error {
					var n int
					if err := p.Pool.QueryRow(ctx, count).Scan(&n); err != nil || n != want {
						return fmt.Errorf("%d statements run, want %d, %w", n, want, err)
					}
					return nil
				})
			}
			sleeping(1)
			cancel()
			if err := <-running; !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			sleeping(0)
			get[int](t, d, "SELECT 1")
		}
	})
}

// Who does not say that there is a pooler is told: by the error where it refuses settings, else in the log.
func TestPoolerNotTold(t *testing.T) {
	t.Parallel()
	p := dbtest.New(t)
	strict := dbtest.StartPgBouncer(t, p.ConnString, map[string]string{"pool_mode": "session"})
	d, log := open(t, db.Config{ConnString: strict.ConnString()})
	if err := ping(d)(t.Context()); !db.IsUnavailable(err) || !strings.Contains(db.PoolerHint(err), "set database_pooler") {
		t.Errorf("got %v with the hint %q", err, db.PoolerHint(err))
	}
	if !strings.Contains(log.String(), "set database_pooler") {
		t.Errorf("the log does not say what to do: %s", log)
	}
	var ignored []string
	for _, s := range db.Settings(db.Config{}) {
		ignored = append(ignored, s.Name)
	}
	lax := dbtest.StartPgBouncer(t, p.ConnString, map[string]string{"pool_mode": "session", "ignore_startup_parameters": strings.Join(ignored, ",")})
	d, log = open(t, db.Config{ConnString: lax.ConnString()})
	get[int](t, d, "SELECT 1")
	if n := strings.Count(log.String(), "leads through a pooler: set database_pooler"); n != 1 {
		t.Errorf("%d warnings, want 1: %s", n, log)
	}
	d, log = open(t, db.Config{ConnString: p.ConnString})
	get[int](t, d, "SELECT 1")
	if strings.Contains(log.String(), "pooler") {
		t.Errorf("a pooler that is not there: %s", log)
	}
}

// BenchmarkPooler is what a statement costs on a connection of one's own, with what it takes along behind a pooler, and behind one.
func BenchmarkPooler(b *testing.B) {
	p := dbtest.New(b)
	bouncer := dbtest.StartPgBouncer(b, p.ConnString, map[string]string{"pool_mode": "transaction"})
	for _, bm := range []struct {
		name string
		cfg  db.Config
	}{
		{"direct", db.Config{ConnString: p.ConnString}},
		{"direct, as behind a pooler", db.Config{ConnString: p.ConnString, Pooler: true}},
		{"PgBouncer", db.Config{ConnString: bouncer.ConnString(), Pooler: true}},
	} {
		b.Run(bm.name, func(b *testing.B) {
			d, err := db.Open(b.Context(), bm.cfg)
			if err != nil {
				b.Fatal(err)
			}
			defer d.Close()
			queries := db.New(d)
			for b.Loop() {
				if _, err := queries.StateGet(b.Context()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
