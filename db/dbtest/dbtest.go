// Package dbtest gives each test a PostgreSQL database of its own, or a whole
// server of its own.
//
// The server for databases is named by the environment variable
// TEST_DATABASE_URL, whose user must be a superuser. This starts one for the
// time of a command:
//
//	go run ./db/dbtest/withpostgres -- go test ./...
//
// Tests are no superuser, because nobody who installs pgbroker has to be one:
// each database belongs to OwnerRole, which can do nothing beyond it and runs
// the migrations, and ServerRole, ReaderRole and WriterRole have what `pgbroker
// migrate grants` gives. What really takes an administrator goes through the
// methods named after one.
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

	_ "pgbroker/db/dbtest/testenv" // tests see no settings and no state of others
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

// The roles of all databases of the server that tests use. None of them may
// create roles or databases. They have the password Password, where one is asked
// for.
const (
	OwnerRole  = "pgbroker_test_owner"
	ServerRole = "pgbroker_test_server"
	ReaderRole = "pgbroker_test_reader"
	WriterRole = "pgbroker_test_writer"
)

// Database is a private database of one test.
type Database struct {
	Name             string
	ConnString       string        // as OwnerRole
	ServerConnString string        // as ServerRole, as which replicas connect; it has no rights in a database of NewEmpty
	AdminConnString  string        // as the superuser of the server
	Pool             *pgxpool.Pool // a small pool of ConnString, closed when the test ends
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
	if err := createRoles(ctx, admin); err != nil {
		t.Fatalf("dbtest: create the roles: %v", err)
	}
	from, err := template(ctx, admin)
	if err != nil {
		t.Fatalf("dbtest: prepare the template: %v", err)
	}

	d := &Database{Name: databasePrefix + strconv.FormatInt(time.Now().Unix(), 10) + "_" + strings.ToLower(rand.Text()[:12])}
	_, err = admin.Exec(ctx, fmt.Sprintf("CREATE DATABASE %s TEMPLATE %s OWNER %s", quote(d.Name), quote(from), OwnerRole))
	if err != nil {
		t.Fatalf("dbtest: create a database: %v", err)
	}
	for connString, role := range map[*string]string{&d.ConnString: OwnerRole, &d.ServerConnString: ServerRole, &d.AdminConnString: ""} {
		if *connString, err = with(server, d.Name, role); err != nil {
			t.Fatalf("dbtest: %v", err)
		}
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

// As returns a connection string of the database for another role, one of the
// roles above or of Role.
func (d *Database) As(t testing.TB, role string) string {
	t.Helper()
	connString, err := with(d.AdminConnString, d.Name, role)
	if err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	return connString
}

// Role creates a role that may log in and nothing else, with the password
// Password. It is dropped when the test ends, with all that it owns here. Roles
// belong to the whole server, so that names have to be the test's own.
func (d *Database) Role(t testing.TB, name string) {
	t.Helper()
	name = quote(name)
	d.AdminExec(t, "DROP ROLE IF EXISTS "+name) // left by a test that was killed
	d.AdminExec(t, "CREATE ROLE "+name+" LOGIN PASSWORD '"+Password+"'")
	t.Cleanup(func() { d.AdminExec(t, "DROP OWNED BY "+name+" CASCADE; DROP ROLE "+name) })
}

// AdminExec runs statements as the superuser of the server, in the database,
// and fails the test if they fail.
func (d *Database) AdminExec(t testing.TB, sql string, args ...any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	admin, err := pgx.Connect(ctx, d.AdminConnString)
	if err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	defer admin.Close(ctx)
	if _, err := admin.Exec(ctx, sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// Admin opens a connection to the database as the superuser of the server,
// which is closed when the test ends.
func (d *Database) Admin(t testing.TB) *pgx.Conn {
	t.Helper()
	return connect(t, d.AdminConnString)
}

// Config returns the configuration of a connection to the database as its
// owner, for package migrations and the like.
func (d *Database) Config(t testing.TB) *pgx.ConnConfig {
	t.Helper()
	cfg, err := pgx.ParseConfig(d.ConnString)
	if err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	return cfg
}

// Connect opens a connection to the database as its owner, outside of the pool,
// that is closed when the test ends.
func (d *Database) Connect(t testing.TB) *pgx.Conn {
	t.Helper()
	return connect(t, d.ConnString)
}

func connect(t testing.TB, connString string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), connString)
	if err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// Grant gives the roles what they need in a database that the test has migrated
// itself, as `pgbroker migrate grants` does.
func (d *Database) Grant(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := grant(ctx, d.Config(t)); err != nil {
		t.Fatalf("dbtest: grant: %v", err)
	}
}

// Exec runs statements as the owner and fails the test if they fail.
func (d *Database) Exec(t testing.TB, sql string, args ...any) {
	t.Helper()
	if _, err := d.Pool.Exec(context.Background(), sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// TerminateBackends ends all sessions of the database, as a failing server or
// an operator would, and returns how many there were, those of the pool left
// out. Sessions with another application_name than the given one are spared,
// unless it is empty.
func (d *Database) TerminateBackends(t testing.TB, applicationName string) int {
	t.Helper()
	admin := d.Admin(t)
	defer admin.Close(context.Background())
	d.Pool.Reset() // what is not in use comes back as a new session
	var n int
	err := admin.QueryRow(context.Background(), `
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
	if _, err := admin.Exec(ctx, fmt.Sprintf("CREATE DATABASE %s TEMPLATE template0 OWNER %s", quote(name), OwnerRole)); err != nil {
		return err
	}
	cfg := admin.Config()
	cfg.Database, cfg.User, cfg.Password = name, OwnerRole, Password
	if err := migrations.Up(ctx, cfg); err != nil {
		return err
	}
	if err := grant(ctx, cfg); err != nil {
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

// grant gives the roles what they need, as `pgbroker migrate grants` does.
func grant(ctx context.Context, owner *pgx.ConnConfig) error {
	conn, err := pgx.ConnectConfig(ctx, owner)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	rows, err := conn.Query(ctx, "SELECT pgbroker.grants($1, $2, $3)", ReaderRole, WriterRole, ServerRole)
	if err != nil {
		return err
	}
	statements, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	_, err = conn.Exec(ctx, strings.Join(statements, "\n"))
	return err
}

// rolesOnce spares the tests of one process the look at the roles.
var rolesOnce struct {
	sync.Mutex
	done bool
}

// createRoles creates the roles that are missing, under a lock of the server.
func createRoles(ctx context.Context, admin *pgx.Conn) error {
	rolesOnce.Lock()
	defer rolesOnce.Unlock()
	if rolesOnce.done {
		return nil
	}
	tx, err := admin.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }()
	if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock(hashtextextended('pgbroker test roles', 0))"); err != nil {
		return err
	}
	for _, role := range []string{OwnerRole, ServerRole, ReaderRole, WriterRole} {
		var exists bool
		if err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", role).Scan(&exists); err != nil {
			return err
		}
		if exists {
			continue
		}
		if _, err := tx.Exec(ctx, "CREATE ROLE "+role+" LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD '"+Password+"'"); err != nil {
			return err
		}
	}
	if err := tx.Commit(ctx); err != nil {
		return err
	}
	rolesOnce.done = true
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

// with returns a connection string for another database of the same server,
// and for another role; "" is the same role.
func with(connString, database, role string) (string, error) {
	if !strings.HasPrefix(connString, "postgres://") && !strings.HasPrefix(connString, "postgresql://") {
		connString += " dbname=" + database // the last one counts
		if role != "" {
			connString += fmt.Sprintf(" user='%s' password='%s'", strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(role), Password)
		}
		return connString, nil
	}
	u, err := url.Parse(connString)
	if err != nil {
		return "", fmt.Errorf("%s: not a valid URL", URLEnv) // the error of url.Parse shows the password
	}
	u.Path = "/" + database
	query := u.Query()
	query.Del("dbname")
	if role != "" {
		u.User = nil
		query.Set("user", role)
		query.Set("password", Password)
	}
	u.RawQuery = strings.ReplaceAll(query.Encode(), "+", "%20") // libpq leaves a plus as it is
	return u.String(), nil
}
