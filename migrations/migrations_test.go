package migrations_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"pgbroker/db/dbtest"
	"pgbroker/migrations"
)

func files(pairs ...string) migrations.Of {
	m := fstest.MapFS{}
	for i := 0; i < len(pairs); i += 2 {
		m[pairs[i]] = &fstest.MapFile{Data: []byte(pairs[i+1])}
	}
	return migrations.Of{FS: m}
}

// two are migrations that count how often they run.
var two = files(
	"0001_one.up.sql", "CREATE TABLE pgbroker.one (x int); INSERT INTO pgbroker.one VALUES (1);",
	"0001_one.down.sql", "DROP TABLE pgbroker.one;",
	"0002_two.up.sql", "INSERT INTO pgbroker.one VALUES (2)", // no newline, no semicolon
	"0002_two.down.sql", "DELETE FROM pgbroker.one WHERE x = 2 -- a comment at the end",
)

func version(t *testing.T, d *dbtest.Database) string {
	t.Helper()
	v, dirty, err := migrations.Version(t.Context(), d.Config(t))
	if err != nil {
		t.Fatal(err)
	}
	if dirty {
		return fmt.Sprint(v, " dirty")
	}
	return fmt.Sprint(v)
}

func get[T any](t *testing.T, d *dbtest.Database, sql string, args ...any) (v T) {
	t.Helper()
	if err := d.Pool.QueryRow(t.Context(), sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// objects lists what a database holds, the schema of Postgres itself left out.
func objects(t *testing.T, d *dbtest.Database) []string {
	t.Helper()
	rows, err := d.Pool.Query(t.Context(), `
		SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname !~ '^(pg_|information_schema|public$)'
		UNION ALL
		SELECT 'relation ' || c.oid::regclass FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname !~ '^(pg_|information_schema)'
		UNION ALL
		SELECT 'function ' || p.oid::regprocedure FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace WHERE nspname !~ '^(pg_|information_schema)'
		UNION ALL
		SELECT 'type ' || t.oid::regtype FROM pg_type t JOIN pg_namespace n ON n.oid = typnamespace WHERE nspname !~ '^(pg_|information_schema)'
		UNION ALL
		SELECT 'extension ' || extname FROM pg_extension WHERE extname <> 'plpgsql'
		ORDER BY 1`)
	if err != nil {
		t.Fatal(err)
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// The real files: consecutive numbers, a pair for each, and nothing that would
// end the transaction in which they run.
func TestFiles(t *testing.T) {
	names, err := fs.Glob(migrations.Embedded, "*")
	if err != nil {
		t.Fatal(err)
	}
	pattern := regexp.MustCompile(`^(\d{4})_([a-z0-9_]+)\.(up|down)\.sql$`)
	control := regexp.MustCompile(`(?im)^\s*(BEGIN|COMMIT|ROLLBACK|END|START TRANSACTION)\s*;`)
	var want []string
	for _, name := range names {
		m := pattern.FindStringSubmatch(name)
		if m == nil {
			t.Errorf("%s: want a name like 0001_records.up.sql", name)
			continue
		}
		if m[3] == "up" {
			want = append(want, m[1]+"_"+m[2]+".down.sql", name)
		}
		text, err := fs.ReadFile(migrations.Embedded, name)
		if err != nil {
			t.Fatal(err)
		}
		// END; closes the body of a function as well.
		for _, found := range control.FindAllString(withoutBodies(string(text)), -1) {
			t.Errorf("%s: holds %q; each file runs in one transaction already", name, strings.TrimSpace(found))
		}
	}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("not a pair for each migration (-want +got):\n%s", diff)
	}
	if got := migrations.Latest(); got != uint(len(names)/2) {
		t.Errorf("the latest version is %d of %d migrations: numbers must be consecutive from 1", got, len(names)/2)
	}
}

// withoutBodies removes the bodies of functions: dollar-quoted text, BEGIN ATOMIC, and what RETURN returns.
func withoutBodies(sql string) string {
	sql = regexp.MustCompile(`(?s)\$(\w*)\$.*?\$\w*\$`).ReplaceAllString(sql, "")
	sql = regexp.MustCompile(`(?s)BEGIN ATOMIC.*?END;`).ReplaceAllString(sql, "")
	return regexp.MustCompile(`(?s)\n *RETURN .*?;`).ReplaceAllString(sql, "")
}

// Up, all the way down, and up again; down leaves nothing.
func TestUpDownUp(t *testing.T) {
	t.Parallel()
	d := dbtest.NewEmpty(t)
	ctx, cfg := t.Context(), d.Config(t)
	before := objects(t, d)
	if err := migrations.Up(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	up := objects(t, d)
	if v, err := migrations.Check(ctx, cfg); err != nil || v != migrations.Latest() {
		t.Errorf("got version %d, %v", v, err)
	}
	if err := migrations.Up(ctx, cfg); err != nil {
		t.Errorf("up when there is nothing to do: %v", err)
	}
	if err := migrations.Down(ctx, cfg, int(migrations.Latest())+5); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, objects(t, d)); diff != "" {
		t.Errorf("left behind by down (-before +after):\n%s", diff)
	}
	if err := migrations.Up(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(up, objects(t, d)); diff != "" {
		t.Errorf("up after down differs from up (-first +second):\n%s", diff)
	}
}

// TestWhoMigrates: an ordinary owner of the database, one of the schema who may create none, and a superuser end with the same,
// also where functions are for nobody unless it is said.
func TestWhoMigrates(t *testing.T) {
	t.Parallel()
	made := make(map[string][]string)
	for name, c := range map[string]struct {
		prepare   string // as the superuser
		superuser bool
	}{
		"owner of the database": {},
		"superuser":             {superuser: true},
		"owner of the schema": {prepare: `
			ALTER DATABASE %s OWNER TO CURRENT_USER; REVOKE ALL ON DATABASE %[1]s FROM PUBLIC; GRANT CONNECT ON DATABASE %[1]s TO %[2]s;
			REVOKE CREATE ON SCHEMA public FROM PUBLIC; CREATE SCHEMA pgbroker AUTHORIZATION %[2]s`},
		"default privileges": {prepare: `ALTER DEFAULT PRIVILEGES FOR ROLE %[2]s REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC`},
	} {
		d := dbtest.NewEmpty(t)
		ctx, cfg := t.Context(), d.Config(t)
		if c.prepare != "" {
			d.AdminExec(t, fmt.Sprintf(c.prepare, d.Name, dbtest.OwnerRole))
		}
		if c.superuser {
			var err error
			if cfg, err = pgx.ParseConfig(d.AdminConnString); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 { // down and up again
			if err := migrations.Up(ctx, cfg); err != nil {
				t.Fatalf("%s: up: %v", name, err)
			}
			made[name] = objects(t, d)
			if err := migrations.Down(ctx, cfg, int(migrations.Latest())); err != nil {
				t.Fatalf("%s: down: %v", name, err)
			}
		}
	}
	for name, got := range made {
		if diff := cmp.Diff(made["superuser"], got); diff != "" {
			t.Errorf("%s: not what a superuser has made (-superuser +this):\n%s", name, diff)
		}
	}
}

// One step down and up again, for each migration: each down undoes its up.
func TestEachStep(t *testing.T) {
	t.Parallel()
	d := dbtest.NewEmpty(t)
	ctx, cfg := t.Context(), d.Config(t)
	all, err := migrations.Plan(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	var states [][]string
	if err := migrations.Up(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	for range all {
		states = append(states, objects(t, d))
		if err := migrations.Down(ctx, cfg, 1); err != nil {
			t.Fatal(err)
		}
	}
	// Up by one needs a file system that ends there.
	for i, m := range all {
		part := migrations.Of{FS: upTo(t, m.Version)}
		if err := part.Up(ctx, cfg); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(states[len(all)-1-i], objects(t, d)); diff != "" {
			t.Errorf("down to version %d is not what up made (-down +up):\n%s", m.Version, diff)
		}
	}
}

// From every older version, data in place survives the way to the latest.
func TestUpWithData(t *testing.T) {
	t.Parallel()
	// By table, as far as it is there: rows to insert, and whether they are
	// still there.
	rows := []struct{ table, insert, check string }{
		{
			"records", `INSERT INTO pgbroker.records (type, id, payload) VALUES ('t', 'kept', '\x01ff')`,
			`SELECT payload = '\x01ff' FROM pgbroker.records WHERE type = 't' AND id = 'kept'`,
		},
		{
			"leases", `INSERT INTO pgbroker.leases (name, id, expires_at) VALUES ('kept', 'holder', 'infinity')`,
			`SELECT id = 'holder' FROM pgbroker.leases WHERE name = 'kept'`,
		},
		{
			"services", `INSERT INTO pgbroker.services (kind, endpoint, expires_at) VALUES (1, 'http://kept', 'infinity')`,
			`SELECT true FROM pgbroker.services WHERE kind = 1 AND endpoint = 'http://kept'`,
		},
		{
			"checkpoint", `INSERT INTO pgbroker.checkpoint (record_version) VALUES (42) ON CONFLICT (singleton) DO UPDATE SET record_version = 42`,
			`SELECT record_version = 42 FROM pgbroker.checkpoint`,
		},
		{
			"state", `UPDATE pgbroker.state SET server_version = 42`,
			`SELECT server_version = 42 FROM pgbroker.state`,
		},
	}
	for v := uint(1); v < migrations.Latest(); v++ {
		t.Run(fmt.Sprint(v), func(t *testing.T) {
			t.Parallel()
			d := dbtest.NewEmpty(t)
			old := migrations.Of{FS: upTo(t, v)}
			if err := old.Up(t.Context(), d.Config(t)); err != nil {
				t.Fatal(err)
			}
			var checks []string
			for _, r := range rows {
				if get[bool](t, d, "SELECT to_regclass('pgbroker.' || $1) IS NOT NULL", r.table) {
					d.Exec(t, r.insert)
					checks = append(checks, r.check)
				}
			}
			if err := migrations.Up(t.Context(), d.Config(t)); err != nil {
				t.Fatal(err)
			}
			for _, check := range checks {
				if !get[bool](t, d, check) {
					t.Errorf("%s: false", check)
				}
			}
			if err := migrations.Down(t.Context(), d.Config(t), int(migrations.Latest())); err != nil {
				t.Errorf("down with data: %v", err)
			}
		})
	}
}

// upTo returns the real files up to a version.
func upTo(t *testing.T, version uint) fstest.MapFS {
	t.Helper()
	part := fstest.MapFS{}
	names, err := fs.Glob(migrations.Embedded, "*.sql")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		text, err := fs.ReadFile(migrations.Embedded, name)
		if err != nil {
			t.Fatal(err)
		}
		if name[:4] <= fmt.Sprintf("%04d", version) {
			part[name] = &fstest.MapFile{Data: text}
		}
	}
	return part
}

// Processes that start together take turns.
func TestConcurrentUp(t *testing.T) {
	t.Parallel()
	d := dbtest.NewEmpty(t)
	var group errgroup.Group
	for range 8 {
		group.Go(func() error { return migrations.Up(t.Context(), d.Config(t)) })
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, err := migrations.Check(t.Context(), d.Config(t)); err != nil {
		t.Error(err)
	}
}

func TestPlan(t *testing.T) {
	t.Parallel()
	d := dbtest.NewEmpty(t)
	plan := func() []migrations.Migration {
		t.Helper()
		p, err := two.Plan(t.Context(), d.Config(t))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	one := migrations.Migration{Version: 1, Name: "one", SQL: "CREATE TABLE pgbroker.one (x int); INSERT INTO pgbroker.one VALUES (1);"}
	second := migrations.Migration{Version: 2, Name: "two", SQL: "INSERT INTO pgbroker.one VALUES (2)"}
	if diff := cmp.Diff([]migrations.Migration{one, second}, plan()); diff != "" {
		t.Error(diff)
	}
	if got := objects(t, d); len(got) > 0 {
		t.Errorf("plan made %v", got)
	}
	if err := two.Up(t.Context(), d.Config(t)); err != nil {
		t.Fatal(err)
	}
	if got := plan(); got != nil {
		t.Errorf("after up: got %v", got)
	}
	if err := two.Down(t.Context(), d.Config(t), 1); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]migrations.Migration{second}, plan()); diff != "" {
		t.Error(diff)
	}
	if n := get[int](t, d, "SELECT count(*) FROM pgbroker.one"); n != 1 {
		t.Errorf("after down by one: %d rows, want 1", n)
	}
}

// A schema that this program cannot work with is refused, with what to do.
func TestCheck(t *testing.T) {
	t.Parallel()
	d := dbtest.NewEmpty(t)
	ctx, cfg := t.Context(), d.Config(t)
	var (
		tooOld *migrations.TooOldError
		dirty  *migrations.DirtyError
	)
	if _, err := two.Check(ctx, cfg); !errors.As(err, &tooOld) || tooOld.Version != 0 || !strings.Contains(err.Error(), "run: pgbroker migrate up") {
		t.Errorf("empty: got %v", err)
	}
	if err := two.Up(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	if v, err := two.Check(ctx, cfg); err != nil || v != 2 {
		t.Errorf("up to date: got version %d, %v", v, err)
	}
	newer := files("0001_one.up.sql", "", "0003_three.up.sql", "")
	if _, err := newer.Check(ctx, cfg); !errors.As(err, &tooOld) || tooOld.Version != 2 || tooOld.Latest != 3 {
		t.Errorf("too old: got %v", err)
	}
	d.Exec(t, "UPDATE pgbroker.schema_migrations SET dirty = true")
	_, checkErr := two.Check(ctx, cfg)
	_, planErr := two.Plan(ctx, cfg)
	for name, err := range map[string]error{
		"check": checkErr, "up": two.Up(ctx, cfg), "down": two.Down(ctx, cfg, 1), "plan": planErr,
	} {
		if !errors.As(err, &dirty) || dirty.Version != 2 || dirty.Previous != 1 || !strings.Contains(err.Error(), "migrate force 1") {
			t.Errorf("dirty, %s: got %v", name, err)
		}
	}
	for _, v := range []int{-1, 3} {
		if err := two.Force(ctx, cfg, v); err == nil || !strings.Contains(err.Error(), "allowed 0 (nothing applied) to 2") {
			t.Errorf("force %d: got %v", v, err)
		}
	}
	for _, v := range []int{1, 0, 2} {
		if err := two.Force(ctx, cfg, v); err != nil {
			t.Errorf("force %d: %v", v, err)
		}
		if got := version(t, d); got != fmt.Sprint(v) {
			t.Errorf("after force %d: version %s", v, got)
		}
	}
	if err := two.Down(ctx, cfg, 0); err == nil || !strings.Contains(err.Error(), "got 0, allowed 1") {
		t.Errorf("down 0: got %v", err)
	}
}

// A schema that a newer program made is good enough, and nothing that this one
// does changes it.
func TestNewerSchema(t *testing.T) {
	t.Parallel()
	d := dbtest.NewEmpty(t)
	ctx, cfg := t.Context(), d.Config(t)
	if err := two.Up(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	older := files("0001_one.up.sql", "", "0001_one.down.sql", "DROP TABLE pgbroker.one;")
	if v, err := older.Check(ctx, cfg); err != nil || v != 2 {
		t.Errorf("check: got version %d, %v", v, err)
	}
	if todo, err := older.Plan(ctx, cfg); err != nil || len(todo) > 0 {
		t.Errorf("plan: got %v, %v", todo, err)
	}
	if err := older.Up(ctx, cfg); err != nil {
		t.Errorf("up: got %v", err)
	}
	unchanged := func(want string) {
		t.Helper()
		if got := version(t, d); got != want {
			t.Errorf("got version %s, want %s", got, want)
		}
		if n := get[int](t, d, "SELECT count(*) FROM pgbroker.one"); n != 2 {
			t.Errorf("%d rows, want 2", n)
		}
	}
	refused := func(work string, err error) {
		t.Helper()
		var tooNew *migrations.TooNewError
		if !errors.As(err, &tooNew) || tooNew.Version != 2 || tooNew.Latest != 1 || !strings.Contains(err.Error(), "use the newer pgbroker") {
			t.Errorf("%s: got %v", work, err)
		}
	}
	refused("down", older.Down(ctx, cfg, 1))
	refused("force", older.Force(ctx, cfg, 1))
	unchanged("2")

	d.Exec(t, "UPDATE pgbroker.schema_migrations SET dirty = true")
	_, checkErr := older.Check(ctx, cfg)
	_, planErr := older.Plan(ctx, cfg)
	for work, err := range map[string]error{
		"check": checkErr, "up": older.Up(ctx, cfg), "down": older.Down(ctx, cfg, 1), "plan": planErr,
	} {
		var dirty *migrations.DirtyError
		if !errors.As(err, &dirty) || dirty.Version != 2 || strings.Contains(err.Error(), "migrate force") ||
			!strings.Contains(err.Error(), "run the newer one, which says what to do: pgbroker migrate up") {
			t.Errorf("dirty, %s: got %v", work, err)
		}
	}
	refused("force of a dirty one", older.Force(ctx, cfg, 0))
	unchanged("2 dirty")
}

// A migration that fails leaves nothing behind, and the next try starts there.
func TestFailure(t *testing.T) {
	t.Parallel()
	d := dbtest.NewEmpty(t)
	ctx, cfg := t.Context(), d.Config(t)
	broken := files(
		"0001_one.up.sql", "CREATE TABLE pgbroker.one (x int);",
		"0001_one.down.sql", "DROP TABLE pgbroker.one; SELECT 1/0;",
		"0002_two.up.sql", "CREATE TABLE pgbroker.two (x int);\nSELECT nonsense;",
	)
	err := broken.Up(ctx, cfg)
	var (
		failed *migrations.MigrationError
		pgErr  *pgconn.PgError
	)
	if !errors.As(err, &failed) || failed.Version != 2 || failed.Direction != "up" || failed.Line != 2 || !failed.RolledBack || !errors.As(err, &pgErr) {
		t.Errorf("got %#v", err)
	}
	if want := `migration 2 (up, line 2) failed and was rolled back: ERROR: column "nonsense" does not exist (SQLSTATE 42703)`; err.Error() != want {
		t.Errorf("got %s, want %s", err, want)
	}
	if got := version(t, d); got != "1" {
		t.Errorf("got version %s, want 1", got)
	}
	if get[bool](t, d, "SELECT to_regclass('pgbroker.two') IS NOT NULL") {
		t.Error("half of a migration is there")
	}
	if err := broken.Down(ctx, cfg, 1); !errors.As(err, &failed) || failed.Version != 1 || failed.Direction != "down" {
		t.Errorf("down: got %v", err)
	}
	if got := version(t, d); got != "1" || !get[bool](t, d, "SELECT to_regclass('pgbroker.one') IS NOT NULL") {
		t.Errorf("down: got version %s, want 1 and its table", got)
	}
}

// A migration whose session is killed leaves nothing behind either, and the
// schema clean.
func TestKilledMigration(t *testing.T) {
	t.Parallel()
	d := dbtest.NewEmpty(t)
	slow := files(
		"0001_one.up.sql", "CREATE TABLE pgbroker.one (x int); SELECT pg_sleep(600);",
	)
	var group errgroup.Group
	group.Go(func() error { return slow.Up(t.Context(), d.Config(t)) })
	awaitTrue(t, d, "SELECT count(pg_terminate_backend(pid)) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'")
	if err := group.Wait(); err == nil {
		t.Error("no error")
	}
	if err := two.Up(t.Context(), d.Config(t)); err != nil {
		t.Error(err)
	}
}

// Without a transaction, an interrupted migration is dirty.
func TestNoTransaction(t *testing.T) {
	t.Parallel()
	d := dbtest.NewEmpty(t)
	ctx, cfg := t.Context(), d.Config(t)
	m := fstest.MapFS{
		"0001_one.up.sql":   {Data: []byte("CREATE TABLE pgbroker.one (x int); INSERT INTO pgbroker.one VALUES (1), (1);")},
		"0001_one.down.sql": {Data: []byte("DROP TABLE pgbroker.one;")},
		"0002_two.up.sql":   {Data: []byte("-- migrate: no transaction\nCREATE UNIQUE INDEX CONCURRENTLY i ON pgbroker.one (x);")},
	}
	all := migrations.Of{FS: m}
	err := all.Up(ctx, cfg)
	var failed *migrations.MigrationError
	if !errors.As(err, &failed) || failed.RolledBack {
		t.Errorf("got %v, want an error that does not say that it was rolled back", err)
	}
	if got := version(t, d); got != "2 dirty" {
		t.Errorf("got version %s, want 2 dirty", got)
	}
	d.Exec(t, "DROP INDEX pgbroker.i; TRUNCATE pgbroker.one")
	if err := all.Force(ctx, cfg, 1); err != nil {
		t.Fatal(err)
	}
	// Others wait for their turn meanwhile, which must not hold up the index.
	var group errgroup.Group
	for range 3 {
		group.Go(func() error { return all.Up(ctx, d.Config(t)) })
	}
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	if got := version(t, d); got != "2" {
		t.Errorf("got version %s, want 2", got)
	}
}

// A migration waits for a busy table only so long at a time, and tries again.
func TestLockIsRetried(t *testing.T) {
	t.Parallel()
	d := dbtest.NewEmpty(t)
	ctx, cfg := t.Context(), d.Config(t)
	if err := two.Up(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	tx, err := d.Pool.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.Background()) }()
	if _, err := tx.Exec(ctx, "SELECT FROM pgbroker.one"); err != nil {
		t.Fatal(err)
	}
	three := files(
		"0001_one.up.sql", "", "0002_two.up.sql", "",
		"0003_three.up.sql", "SET LOCAL lock_timeout = '50ms'; ALTER TABLE pgbroker.one ADD y int;",
	)
	var group errgroup.Group
	group.Go(func() error { return three.Up(ctx, cfg) })
	awaitTrue(t, d, "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
	awaitTrue(t, d, "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
	if err := tx.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
}

func awaitTrue(t *testing.T, d *dbtest.Database, sql string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for ok := false; !ok; {
		if err := d.Pool.QueryRow(ctx, sql).Scan(&ok); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
}

// The end of the context ends waiting for the lock at once, and a run between
// two migrations.
func TestContext(t *testing.T) {
	t.Parallel()
	d := dbtest.NewEmpty(t)
	slow := files(
		"0001_one.up.sql", "CREATE TABLE pgbroker.one (); SELECT pg_sleep(2);",
		"0002_two.up.sql", "CREATE TABLE pgbroker.two ();",
	)
	ctx, cancel := context.WithCancel(t.Context())
	var group errgroup.Group
	group.Go(func() error { return slow.Up(ctx, d.Config(t)) })
	awaitTrue(t, d, "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'")

	waiting, stop := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer stop()
	if err := slow.Up(waiting, d.Config(t)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting for the lock: got %v, want the end of the context", err)
	}
	cancel()
	if err := group.Wait(); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "stopped at version 1 of 2") {
		t.Errorf("got %v, want that it stopped at version 1", err)
	}
	if got := version(t, d); got != "1" {
		t.Errorf("got version %s, want 1", got)
	}
}

// Several hosts lead to the one that takes writes, whatever the string prefers.
func TestSeveralHosts(t *testing.T) {
	t.Parallel()
	primary := dbtest.Server(t, nil)
	readOnly := dbtest.Server(t, map[string]string{"default_transaction_read_only": "on"})
	for _, options := range []string{"", "&target_session_attrs=any", "&target_session_attrs=prefer-standby"} {
		cfg, err := pgx.ParseConfig(dbtest.ConnString(readOnly.Addr(), primary.Addr()) + options)
		if err != nil {
			t.Fatal(err)
		}
		if err := two.Up(t.Context(), cfg); err != nil {
			t.Errorf("%s: %v", options, err)
		}
		if err := two.Down(t.Context(), cfg, 2); err != nil {
			t.Errorf("%s: %v", options, err)
		}
	}
}

// A role that may read the version can check it, and nothing more is needed.
func TestCheckNeedsLittle(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	d.Exec(t, "GRANT SELECT ON pgbroker.schema_migrations TO "+dbtest.ReaderRole)
	cfg, err := pgx.ParseConfig(d.As(t, dbtest.ReaderRole))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := migrations.Check(t.Context(), cfg); err != nil {
		t.Error(err)
	}
	// One without any right is told so.
	d.Exec(t, "REVOKE ALL ON pgbroker.schema_migrations FROM "+dbtest.ReaderRole)
	if _, err := migrations.Check(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("got %v, want that permission is denied", err)
	}
}

func TestFingerprint(t *testing.T) {
	if a, b := migrations.Fingerprint(), migrations.Fingerprint(); a != b || len(a) != 64 {
		t.Errorf("got %s and %s", a, b)
	}
}
