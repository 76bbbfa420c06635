// Package dbtest gives each test a PostgreSQL database of its own, or a whole
// server of its own.
//
// The server for databases is named by the environment variable
// TEST_DATABASE_URL, whose user must be allowed to create databases. This
// starts one for the time of a command:
//
//	go run ./db/dbtest/withpostgres -- go test ./...
//
// Databases rather than schemas or transactions: NOTIFY channels, advisory
// locks and pg_stat_activity are per database, and the order of commits is
// what many of the tests are about.
package dbtest

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"pgbroker/migrations"
)

// URLEnv is the environment variable that names the server.
const URLEnv = "TEST_DATABASE_URL"

const (
	// Names tell the age of a database: prefix, Unix time, random text.
	databasePrefix = "pgbroker_test_"
	templatePrefix = "pgbroker_template_"

	// keep is how long databases stay that no test has dropped: those of
	// failed tests, for a look at them, and those of killed runs.
	keep = 12 * time.Hour

	// patience bounds each step of preparing and dropping a database, which
	// takes a long time only when something is wrong.
	patience = 2 * time.Minute
)

// Database is a private database of one test.
type Database struct {
	Name       string
	ConnString string        // as the tests' user, who may do anything
	Pool       *pgxpool.Pool // a small pool, closed when the test ends
}

// New returns a new database with the current schema, cloned from a template.
// It is dropped when the test ends, with all its sessions, unless the test
// failed; then it is kept and the log says how to reach it.
//
// Without TEST_DATABASE_URL the test is skipped, or failed if CI=true.
func New(t testing.TB) *Database {
	t.Helper()
	return create(t, func(ctx context.Context, admin *pgx.Conn) (string, error) { return template(ctx, admin) })
}

// NewEmpty is New without the schema, for tests of migrations.
func NewEmpty(t testing.TB) *Database {
	t.Helper()
	return create(t, func(context.Context, *pgx.Conn) (string, error) { return "template0", nil })
}

func create(t testing.TB, template func(context.Context, *pgx.Conn) (string, error)) *Database {
	t.Helper()
	server := serverURL(t)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	admin, err := pgx.Connect(ctx, server)
	if err != nil {
		t.Fatalf("dbtest: connect to the server of %s: %v", URLEnv, err)
	}
	defer admin.Close(ctx)
	dropLeftoversOnce.Do(func() { dropLeftovers(ctx, admin) })
	from, err := template(ctx, admin)
	if err != nil {
		t.Fatalf("dbtest: prepare the template: %v", err)
	}

	d := &Database{Name: databasePrefix + strconv.FormatInt(time.Now().Unix(), 10) + "_" + strings.ToLower(rand.Text()[:12])}
	_, err = admin.Exec(ctx, fmt.Sprintf("CREATE DATABASE %s TEMPLATE %s", quote(d.Name), quote(from)))
	if err != nil {
		t.Fatalf("dbtest: create a database: %v", err)
	}
	d.ConnString, err = withDatabase(server, d.Name)
	if err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	cfg, err := pgxpool.ParseConfig(d.ConnString)
	if err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	cfg.MaxConns = 4
	if d.Pool, err = pgxpool.NewWithConfig(ctx, cfg); err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	t.Cleanup(func() {
		closed := make(chan struct{})
		go func() { d.Pool.Close(); close(closed) }()
		select {
		case <-closed:
		case <-time.After(10 * time.Second):
			t.Errorf("dbtest: the test has not released all connections of its pool")
		}
		if t.Failed() {
			t.Logf("dbtest: kept the database %s of this failed test, on the server of %s", d.Name, URLEnv)
			return
		}
		if err := drop(server, d.Name); err != nil {
			t.Errorf("dbtest: drop database %s: %v", d.Name, err)
		}
	})
	return d
}

// Config returns the configuration of a connection to the database, for
// package migrations and the like.
func (d *Database) Config(t testing.TB) *pgx.ConnConfig {
	t.Helper()
	cfg, err := pgx.ParseConfig(d.ConnString)
	if err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	return cfg
}

// Connect opens a connection to the database, outside of the pool, that is
// closed when the test ends.
func (d *Database) Connect(t testing.TB) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), d.ConnString)
	if err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// Exec runs statements and fails the test if they fail.
func (d *Database) Exec(t testing.TB, sql string, args ...any) {
	t.Helper()
	if _, err := d.Pool.Exec(context.Background(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// TerminateBackends ends all other sessions of the database, as a failing
// server or an operator would, and returns how many there were. Sessions with
// another application_name than the given one are spared, unless it is empty.
func (d *Database) TerminateBackends(t testing.TB, applicationName string) int {
	t.Helper()
	var n int
	err := d.Pool.QueryRow(context.Background(), `
		SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity
		WHERE datname = current_database() AND pid <> pg_backend_pid() AND ($1 = '' OR application_name = $1)`,
		applicationName).Scan(&n)
	if err != nil {
		t.Fatalf("dbtest: terminate backends: %v", err)
	}
	return n
}

// serverURL returns the server to use, or ends the test.
func serverURL(t testing.TB) string {
	t.Helper()
	server := os.Getenv(URLEnv)
	switch {
	case server != "":
	case os.Getenv("CI") == "true":
		t.Fatalf("dbtest: %s is not set; in CI every test must run: go run ./db/dbtest/withpostgres -- go test ./...", URLEnv)
	default:
		t.Skipf("dbtest: %s is not set; to run this test: go run ./db/dbtest/withpostgres -- go test ./...", URLEnv)
	}
	return server
}

// templateOnce spares the tests of one process the look at the template.
var templateOnce struct {
	sync.Mutex
	name string
}

// template returns the name of the database with the current schema, which it
// builds if there is none yet. Tests of other packages are other processes, so
// it works under a lock of the server.
func template(ctx context.Context, admin *pgx.Conn) (_ string, err error) {
	templateOnce.Lock()
	defer templateOnce.Unlock()
	if templateOnce.name != "" {
		return templateOnce.name, nil
	}
	name := templatePrefix + migrations.Fingerprint()[:16]
	if _, err := admin.Exec(ctx, "SELECT pg_advisory_lock(hashtextextended($1, 0))", name); err != nil {
		return "", err
	}
	defer func() {
		if _, unlockErr := admin.Exec(ctx, "SELECT pg_advisory_unlock(hashtextextended($1, 0))", name); err == nil {
			err = unlockErr
		}
	}()
	// The comment, set last, says that it is complete.
	var ready bool
	err = admin.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_database
		WHERE datname = $1 AND shobj_description(oid, 'pg_database') LIKE 'ready %')`, name).Scan(&ready)
	if err != nil {
		return "", err
	}
	if !ready {
		if err := buildTemplate(ctx, admin, name); err != nil {
			return "", err
		}
	}
	templateOnce.name = name
	return name, nil
}

func buildTemplate(ctx context.Context, admin *pgx.Conn, name string) error {
	if _, err := admin.Exec(ctx, fmt.Sprintf("DROP DATABASE IF EXISTS %s WITH (FORCE)", quote(name))); err != nil {
		return err
	}
	if _, err := admin.Exec(ctx, fmt.Sprintf("CREATE DATABASE %s TEMPLATE template0", quote(name))); err != nil {
		return err
	}
	cfg := admin.Config()
	cfg.Database = name
	if err := migrations.Up(ctx, cfg); err != nil {
		return err
	}
	// A database with a session in it cannot be cloned; so nobody gets in.
	for _, sql := range []string{
		"ALTER DATABASE %s ALLOW_CONNECTIONS false",
		"COMMENT ON DATABASE %s IS 'ready " + strconv.FormatInt(time.Now().Unix(), 10) + "'",
	} {
		if _, err := admin.Exec(ctx, fmt.Sprintf(sql, quote(name))); err != nil {
			return err
		}
	}
	return nil
}

var dropLeftoversOnce sync.Once

// dropLeftovers drops the databases of earlier runs, by their age. What it
// cannot drop it leaves to others: this is housekeeping, not the test.
func dropLeftovers(ctx context.Context, admin *pgx.Conn) {
	rows, err := admin.Query(ctx, `SELECT datname FROM (
			SELECT datname, CASE
				WHEN starts_with(datname, $1) THEN substring(datname FROM length($1) + 1 FOR 10)
				WHEN starts_with(datname, $2) THEN substring(shobj_description(oid, 'pg_database') FROM 'ready (\d+)')
				END AS created
			FROM pg_database) AS d
		WHERE created ~ '^\d+$' AND to_timestamp(created::bigint) < now() - make_interval(secs => $3)`,
		databasePrefix, templatePrefix, keep.Seconds())
	if err != nil {
		return
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return
	}
	for _, name := range names {
		_, _ = admin.Exec(ctx, fmt.Sprintf("DROP DATABASE IF EXISTS %s WITH (FORCE)", quote(name)))
	}
}

func drop(server, name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	admin, err := pgx.Connect(ctx, server)
	if err != nil {
		return err
	}
	defer admin.Close(ctx)
	_, err = admin.Exec(ctx, fmt.Sprintf("DROP DATABASE IF EXISTS %s WITH (FORCE)", quote(name)))
	return err
}

func quote(name string) string { return pgx.Identifier{name}.Sanitize() }

// withDatabase returns a connection string for another database of the same
// server.
func withDatabase(connString, database string) (string, error) {
	if !strings.HasPrefix(connString, "postgres://") && !strings.HasPrefix(connString, "postgresql://") {
		return connString + " dbname=" + database, nil // the last one counts
	}
	u, err := url.Parse(connString)
	if err != nil {
		return "", fmt.Errorf("%s: not a valid URL", URLEnv) // the error of url.Parse shows the password
	}
	u.Path = "/" + database
	query := u.Query()
	query.Del("dbname")
	u.RawQuery = query.Encode()
	return u.String(), nil
}
