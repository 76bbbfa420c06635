package db_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"pgbroker/db"
	"pgbroker/db/dbtest"
)

func ping(d *db.DB) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := d.Exec(ctx, "SELECT 1")
		return err
	}
}

// The file with the connection string is read for each new connection: a
// password that has changed is used, and a file that is missing or malformed
// for a moment does no harm.
func TestConnStringFile(t *testing.T) {
	t.Parallel()
	p := dbtest.Server(t, nil)
	path := filepath.Join(t.TempDir(), "conn")
	write := func(content string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	write(p.ConnString() + "\n")
	d, log := open(t, db.Config{ConnStringFile: path})
	get[int](t, d, "SELECT 1")

	p.Exec("ALTER USER " + dbtest.OwnerRole + " PASSWORD 'rotated'")
	write(strings.Replace(p.ConnString(), dbtest.Password, "rotated", 1))
	get[int](t, d, "SELECT 1") // the open connection goes on
	d.Reset()
	get[int](t, d, "SELECT 1")
	conn, err := d.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close(t.Context())

	for _, bad := range []string{"postgres://u:rotated@h:x/d", ""} {
		write(bad)
		d.Reset()
		get[int](t, d, "SELECT 1")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	d.Reset()
	get[int](t, d, "SELECT 1")
	if n := strings.Count(log.String(), "using the last connection string"); n != 1 || strings.Contains(log.String(), "rotated") {
		t.Errorf("%d warnings, want 1, and no password:\n%s", n, log)
	}

	// Before it has ever been right there is nothing to go back to.
	p.Exec("ALTER USER " + dbtest.OwnerRole + " PASSWORD 'again'")
	write(p.ConnString())
	d.Reset()
	if err := ping(d)(t.Context()); !db.IsUnavailable(err) {
		t.Errorf("with a wrong password: got %v, want an error that is unavailable", err)
	}
	write(strings.Replace(p.ConnString(), dbtest.Password, "again", 1))
	await(t, ping(d))
}

// The files that a connection string names are read again as well.
func TestPassfile(t *testing.T) {
	t.Parallel()
	p := dbtest.Server(t, nil)
	path := filepath.Join(t.TempDir(), "pgpass")
	write := func(password string) {
		t.Helper()
		if err := os.WriteFile(path, []byte("*:*:*:*:"+password+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(dbtest.Password)
	d, _ := open(t, db.Config{ConnString: strings.Replace(p.ConnString(), ":"+dbtest.Password, "", 1) + "&passfile=" + path})
	get[int](t, d, "SELECT 1")
	p.Exec("ALTER USER " + dbtest.OwnerRole + " PASSWORD 'rotated'")
	write("rotated")
	d.Reset()
	get[int](t, d, "SELECT 1")
}

// A server that comes up late is waited for by nobody: calls fail quickly, and
// work as soon as it is there.
func TestLateServer(t *testing.T) {
	t.Parallel()
	p := dbtest.Server(t, nil)
	p.Stop()
	d, log := open(t, db.Config{ConnString: p.ConnString(), MinConns: 1})
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for range 10 {
		start := time.Now()
		err := ping(d)(ctx)
		if !db.IsUnavailable(err) || !db.IsRetryable(err) {
			t.Errorf("got %v, want an error that is unavailable and retryable", err)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("took %v to fail", took)
		}
		if _, err := d.Listen(ctx); !db.IsUnavailable(err) {
			t.Errorf("Listen: got %v, want an error that is unavailable", err)
		}
	}
	p.Restart()
	await(t, ping(d))
	await(t, func(ctx context.Context) error {
		conn, err := d.Listen(ctx)
		if err == nil {
			conn.Close(ctx)
		}
		return err
	})
	for _, want := range []string{"cannot connect to postgres", "postgres is reachable again"} {
		if n := strings.Count(log.String(), want); n != 1 {
			t.Errorf("%d log lines %q, want 1:\n%s", n, want, log)
		}
	}
}

// When backends are terminated, the pool is given up once, however many
// connections it had, and reads and writes go on.
func TestTerminatedBackends(t *testing.T) {
	t.Parallel()
	p := dbtest.NewEmpty(t)
	p.Exec(t, "CREATE TABLE t (x int)")
	d, _ := open(t, db.Config{ConnString: p.ConnString, MaxConns: 8, ApplicationName: "victim"})
	hold := func() { // opens all connections
		var conns []interface{ Release() }
		for range 8 {
			conn, err := d.Acquire(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, conn)
		}
		for _, conn := range conns {
			conn.Release()
		}
	}
	hold()
	if n := p.TerminateBackends(t, "victim"); n != 8 {
		t.Fatalf("terminated %d backends, want 8", n)
	}
	var group errgroup.Group
	for range 32 {
		group.Go(func() error {
			return db.RetryRead(t.Context(), ping(d))
		})
	}
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	if n := d.Resets(); n != 1 {
		t.Errorf("the pool was reset %d times, want once", n)
	}
}

// A statement whose session is terminated may have been applied, so Retry does
// not repeat it, and RetryRead does.
func TestTerminatedStatement(t *testing.T) {
	t.Parallel()
	p := dbtest.NewEmpty(t)
	d, _ := open(t, db.Config{ConnString: p.ConnString, ApplicationName: "victim"})
	for _, tt := range []struct {
		name  string
		retry func(context.Context, func(context.Context) error) error
		calls int
	}{
		{"Retry", db.Retry, 1},
		{"RetryRead", db.RetryRead, 2},
	} {
		calls := 0
		err := tt.retry(t.Context(), func(ctx context.Context) error {
			if calls++; calls > 1 {
				return ping(d)(ctx)
			}
			var group errgroup.Group
			group.Go(func() error { _, err := d.Exec(ctx, "SELECT pg_sleep(600)"); return err })
			await(t, func(ctx context.Context) error {
				var n int
				err := p.Pool.QueryRow(ctx, `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
					WHERE datname = current_database() AND application_name = 'victim' AND wait_event = 'PgSleep'`).Scan(&n)
				if err == nil && n == 0 {
					err = errors.New("the statement does not run")
				}
				return err
			})
			return group.Wait()
		})
		if calls != tt.calls || (err == nil) != (calls == 2) || err != nil && !db.IsUnavailable(err) {
			t.Errorf("%s: got %v after %d calls, want %d calls", tt.name, err, calls, tt.calls)
		}
	}
}

// What one caller's context breaks is not held against the server.
func TestCancelledQueryKeepsPool(t *testing.T) {
	t.Parallel()
	p := dbtest.NewEmpty(t)
	d, _ := open(t, db.Config{ConnString: p.ConnString})
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan struct{})
	go func() {
		<-started
		cancel()
	}()
	err := pgx.BeginFunc(ctx, d, func(tx pgx.Tx) error {
		close(started)
		_, err := tx.Exec(ctx, "SELECT pg_sleep(30)")
		_, _ = tx.Exec(context.Background(), "SELECT 1") // the connection is closed
		return err
	})
	if !errors.Is(err, context.Canceled) || db.IsUnavailable(err) {
		t.Errorf("got %v, want the cancelled context and nothing else", err)
	}
	if n := d.Resets(); n != 0 {
		t.Errorf("the pool was reset %d times", n)
	}
}

// A primary that becomes read-only is left for the one that takes writes.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	old := dbtest.Server(t, nil)
	next := dbtest.Server(t, nil)
	for _, p := range []*dbtest.Postgres{old, next} {
		p.Exec("SET ROLE " + dbtest.OwnerRole + "; CREATE TABLE t (x int)")
	}
	readOnly := func(t *testing.T, d *db.DB, state string) {
		t.Helper()
		old.Exec("ALTER SYSTEM SET default_transaction_read_only = " + state)
		old.Exec("SELECT pg_reload_conf()")
		await(t, func(ctx context.Context) error { // sessions learn of it one by one
			if got := get[string](t, d, "SHOW default_transaction_read_only"); got != state {
				return errors.New("not yet " + state)
			}
			return nil
		})
	}
	direct, _ := open(t, db.Config{ConnString: old.ConnString()})
	for name, write := range map[string]func(context.Context, *db.DB) error{
		"statement": func(ctx context.Context, d *db.DB) error {
			_, err := d.Exec(ctx, "INSERT INTO public.t VALUES (1)")
			return err
		},
		"transaction": func(ctx context.Context, d *db.DB) error {
			return pgx.BeginFunc(ctx, d, func(tx pgx.Tx) error {
				_, err := tx.Exec(ctx, "INSERT INTO public.t VALUES (1)")
				return err
			})
		},
		"batch": func(ctx context.Context, d *db.DB) error {
			b := new(pgx.Batch)
			b.Queue("INSERT INTO public.t VALUES (1)")
			return d.SendBatch(ctx, b).Close()
		},
		"copy": func(ctx context.Context, d *db.DB) error {
			_, err := d.CopyFrom(ctx, pgx.Identifier{"public", "t"}, []string{"x"}, pgx.CopyFromRows([][]any{{1}}))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := open(t, db.Config{ConnString: dbtest.ConnString(old.Addr(), next.Addr())})
			port := func() string { return "127.0.0.1:" + get[string](t, d, "SHOW port") }
			if err := write(t.Context(), d); err != nil || port() != old.Addr() {
				t.Fatalf("before: %v", err)
			}
			readOnly(t, d, "on")
			calls := 0
			err := db.Retry(t.Context(), func(ctx context.Context) error { calls++; return write(ctx, d) })
			if err != nil || calls != 2 || port() != next.Addr() {
				t.Errorf("got %v after %d calls on %s, want success after 2 on %s", err, calls, port(), next.Addr())
			}
			if n := d.Resets(); n != 1 {
				t.Errorf("the pool was reset %d times, want once", n)
			}
			readOnly(t, direct, "off")
		})
	}
}

// The primary dies and its standby takes over.
func TestFailover(t *testing.T) {
	t.Parallel()
	primary := dbtest.Server(t, nil)
	primary.Exec("SET ROLE " + dbtest.OwnerRole + "; CREATE TABLE t (x int)")
	standby := primary.Standby(nil)
	standby.CatchUp(primary)
	d, log := open(t, db.Config{ConnString: dbtest.ConnString(primary.Addr(), standby.Addr())})
	insert := func(ctx context.Context) error {
		_, err := d.Exec(ctx, "INSERT INTO public.t VALUES (1)")
		return err
	}
	if err := insert(t.Context()); err != nil {
		t.Fatal(err)
	}
	primary.Kill()
	await(t, func(ctx context.Context) error {
		switch err := insert(ctx); {
		case err == nil:
			return errors.New("the session still lives")
		case !db.IsUnavailable(err):
			t.Fatalf("without a primary: got %v, want an error that is unavailable", err)
		}
		if !strings.Contains(log.String(), "cannot connect to postgres") {
			return errors.New("no connection was dialled yet")
		}
		return nil
	})
	standby.Promote()
	await(t, func(ctx context.Context) error {
		err := insert(ctx)
		if err != nil && !db.IsUnavailable(err) {
			t.Fatalf("got %v, want success or an error that is unavailable", err)
		}
		return err
	})
}

// Too many connections, a server that starts, stops, or is not there: all of
// it is unavailable, whereas what a statement does wrong is not.
func TestErrors(t *testing.T) {
	t.Parallel()
	p := dbtest.Server(t, map[string]string{"max_connections": "5", "superuser_reserved_connections": "0"})
	d, _ := open(t, db.Config{ConnString: p.ConnString(), MaxConns: 20})
	full := func() (err error) {
		for range 10 {
			conn, err := d.Acquire(t.Context())
			if err != nil {
				return err
			}
			defer conn.Release()
		}
		return nil
	}
	if err := full(); !db.IsUnavailable(err) || !strings.Contains(err.Error(), "53300") {
		t.Errorf("too many connections: got %v, want an error that is unavailable", err)
	}
	var group errgroup.Group
	group.Go(func() error { _, err := d.Exec(t.Context(), "SELECT pg_sleep(600)"); return err })
	await(t, func(context.Context) error {
		if d.Stat().AcquiredConns() == 0 {
			return errors.New("not started")
		}
		return nil
	})
	p.Stop()
	if err := group.Wait(); !db.IsUnavailable(err) {
		t.Errorf("server stopped: got %v, want an error that is unavailable", err)
	}
	d.Close()
	if err := ping(d)(t.Context()); !db.IsUnavailable(err) {
		t.Errorf("pool closed: got %v, want an error that is unavailable", err)
	}

	for _, tt := range []struct {
		err                    error
		unavailable, retryable bool
	}{
		{nil, false, false},
		{pgx.ErrNoRows, false, false},
		{context.Canceled, false, false},
		{context.DeadlineExceeded, false, false},
		{&pgconn.PgError{Code: "23505"}, false, false},
		{&pgconn.PgError{Code: "57014"}, false, false},
		{&pgconn.PgError{Code: "25006"}, true, true},
		{&pgconn.PgError{Code: "25006", SeverityUnlocalized: "FATAL"}, true, false},
		{&pgconn.PgError{Code: "40001"}, true, true},
		{&pgconn.PgError{Code: "40001", SeverityUnlocalized: "FATAL"}, true, false}, // a standby's, for the sake of its recovery
		{&pgconn.PgError{Code: "40P01"}, true, true},
		{&pgconn.PgError{Code: "40003"}, false, false}, // statement completion unknown
		{&pgconn.PgError{Code: "0A000", Routine: "RevalidateCachedQuery"}, false, true},
		{&pgconn.PgError{Code: "0A000"}, false, false},
		{&pgconn.PgError{Code: "53000"}, true, false},
		{&pgconn.PgError{Code: "53200"}, true, true},
		{&pgconn.PgError{Code: "53400"}, false, false}, // the statement's own fault
		{&pgconn.PgError{Code: "58P01"}, true, false},
		{&pgconn.PgError{Code: "72000"}, true, false},
		{&pgconn.PgError{Code: "53100"}, true, false},
		{&pgconn.PgError{Code: "53300"}, true, false},
		{&pgconn.PgError{Code: "58030"}, true, false},
		{&pgconn.PgError{Code: "XX000", SeverityUnlocalized: "ERROR"}, false, false},
		{&pgconn.PgError{Code: "XX000", SeverityUnlocalized: "FATAL"}, true, false},
		{&pgconn.PgError{Code: "XX000", SeverityUnlocalized: "PANIC"}, true, false},
		{&pgconn.PgError{Code: "57P01"}, true, false},
		{&pgconn.PgError{Code: "57P02"}, true, false},
		{&pgconn.PgError{Code: "57P03"}, true, false},
		{&pgconn.PgError{Code: "08P01"}, true, false},
	} {
		if got := db.IsUnavailable(tt.err); got != tt.unavailable {
			t.Errorf("IsUnavailable(%v): got %v", tt.err, got)
		}
		if got := db.IsRetryable(tt.err); got != tt.retryable {
			t.Errorf("IsRetryable(%v): got %v", tt.err, got)
		}
	}
}

func TestRetry(t *testing.T) {
	conflict, violation, lost := &pgconn.PgError{Code: "40001"}, &pgconn.PgError{Code: "23505"}, &pgconn.PgError{Code: "57P01"}
	memory := &pgconn.PgError{Code: "53200"}
	for _, tt := range []struct {
		name  string
		retry func(context.Context, func(context.Context) error) error
		errs  []error // of the calls
		want  error
		calls int
	}{
		{"success", db.Retry, []error{nil}, nil, 1},
		{"once", db.Retry, []error{conflict, nil}, nil, 2},
		{"some times", db.Retry, []error{conflict, conflict, conflict, conflict, nil}, nil, 5},
		{"not more", db.Retry, []error{conflict, conflict, conflict, conflict, conflict, nil}, conflict, 5},
		{"once for another reason", db.Retry, []error{memory, memory, nil}, memory, 2},
		{"not applicable", db.Retry, []error{violation}, violation, 1},
		{"lost write", db.Retry, []error{lost}, lost, 1},
		{"lost read", db.RetryRead, []error{lost, nil}, nil, 2},
		{"failed read", db.RetryRead, []error{violation}, violation, 1},
	} {
		calls := 0
		err := tt.retry(t.Context(), func(context.Context) error { calls++; return tt.errs[calls-1] })
		if !errors.Is(err, tt.want) || calls != tt.calls {
			t.Errorf("%s: got %v after %d calls, want %v after %d", tt.name, err, calls, tt.want, tt.calls)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	calls := 0
	err := db.Retry(ctx, func(context.Context) error { calls++; cancel(); return conflict })
	if calls != 1 || !errors.Is(err, conflict) {
		t.Errorf("after the end of the context: got %v after %d calls, want the first error", err, calls)
	}
}

// The listener has its own connection string and is not one of the pool.
func TestListen(t *testing.T) {
	t.Parallel()
	p := dbtest.NewEmpty(t)
	other := dbtest.NewEmpty(t)
	d, _ := open(t, db.Config{ConnString: p.ConnString, ListenerConnString: other.ConnString, MaxConns: 1})
	held, err := d.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer held.Release()
	conn, err := d.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var got string
	err = conn.QueryRow(t.Context(), "SELECT current_database() || ' ' || current_setting('application_name')").Scan(&got)
	if want := other.Name + " pgbroker-listener"; err != nil || got != want {
		t.Errorf("got %q (%v), want %q", got, err, want)
	}
	if got := d.ConnConfig().Database; got != other.Name {
		t.Errorf("ConnConfig: got database %s, want %s", got, other.Name)
	}
}

// A server that has gone without a word, so that connections to it stay open and silent: a statement is
// given up, also one without a deadline, and with it the pool.
func TestNoAnswer(t *testing.T) {
	t.Parallel()
	p := dbtest.Server(t, nil)
	d, log := open(t, db.Config{ConnString: p.ConnString(), StatementTimeout: 200 * time.Millisecond})
	held, err := d.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var frozen int
	if err := held.QueryRow(t.Context(), "SELECT pg_backend_pid()").Scan(&frozen); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(frozen, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := syscall.Kill(frozen, syscall.SIGCONT); err != nil {
			t.Error(err)
		}
	}()
	ctx, cancel := context.WithCancel(t.Context()) // no deadline, which would be heeded
	defer time.AfterFunc(patience, cancel).Stop()
	_, err = held.Exec(ctx, "SELECT 1")
	held.Release()
	if !errors.Is(err, context.DeadlineExceeded) || d.Resets() != 1 || !strings.Contains(log.String(), "does not answer") {
		t.Errorf("got %v and %d resets, want a deadline and one reset:\n%s", err, d.Resets(), log)
	}
	if pid := get[int](t, d, "SELECT pg_backend_pid()"); pid == frozen {
		t.Error("the connection that does not answer is used again")
	}
}
