// Package migrations builds the schema pgbroker from the numbered SQL files
// beside it, which are part of the binary. It is the only user of
// golang-migrate.
//
// Each file runs in one transaction, together with the row that says it ran: a
// migration is there with its version, or neither is, whatever is killed at
// whatever moment. So files hold no BEGIN and no COMMIT. A statement that
// Postgres refuses inside a transaction (CREATE INDEX CONCURRENTLY) goes alone
// into a file whose first line is
//
//	-- migrate: no transaction
//
// Only such a migration, when interrupted, leaves the schema dirty: it is then
// unknown how much of it was done, and a human must look.
//
// Any number of processes may call these functions at the same time; they take
// turns. They need a direct connection to Postgres, not one through a pooler
// in transaction mode, for they use session locks.
package migrations

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/golang-migrate/migrate/v4"
	"github.com/golang-migrate/migrate/v4/database"
	pgxmigrate "github.com/golang-migrate/migrate/v4/database/pgx/v5"
	"github.com/golang-migrate/migrate/v4/source"
	"github.com/golang-migrate/migrate/v4/source/iofs"
	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"

	brokerdb "pgbroker/db"
)

//go:embed *.sql
var embedded embed.FS

const (
	// schema is built by the migrations and holds the table of their version.
	schema       = "pgbroker"
	versionTable = "schema_migrations"

	// lockTimeout bounds how long a migration waits for a lock on a table:
	// while it waits, everybody who comes after it waits as well. A migration
	// that does not get its locks is rolled back and tried again, lockTries
	// times in all.
	lockTimeout = 3 * time.Second
	lockTries   = 10
)

// noTransaction marks a file that must not run in a transaction.
const noTransaction = "-- migrate: no transaction\n"

// Migration is one step of the schema.
type Migration struct {
	Version uint   // 3
	Name    string // "coordination"
	SQL     string // the text of its .up.sql file
}

// migrator runs the migrations of one file system; tests have their own.
type migrator struct{ fsys fs.FS }

// Latest returns the version of the newest migration.
func Latest() uint { return migrator{embedded}.latest() }

// Fingerprint returns a hash of all migrations, which changes with any of
// them.
func Fingerprint() string { return migrator{embedded}.fingerprint() }

// Up runs all migrations that have not run yet. A schema that is up to date, or
// newer, is no error. When ctx ends, the migration that is running is finished and no
// further one started; what has been done stays done.
func Up(ctx context.Context, cfg *pgx.ConnConfig) error { return migrator{embedded}.up(ctx, cfg) }

// Down reverts the newest migrations, as many as steps says and there are.
// After the last one nothing of the schema is left. All data in it is lost. A
// schema that a newer program made is left alone: a *TooNewError.
func Down(ctx context.Context, cfg *pgx.ConnConfig, steps int) error {
	return migrator{embedded}.down(ctx, cfg, steps)
}

// Version returns the version of the schema, 0 when there is none, and whether
// it is dirty. It changes nothing and waits for nobody.
func Version(ctx context.Context, cfg *pgx.ConnConfig) (version uint, dirty bool, err error) {
	return migrator{embedded}.version(ctx, cfg)
}

// Force records that the schema is at a version, 0 for none, and clean,
// without running anything: the way out of a dirty schema, for whoever has
// looked at it. A schema that a newer program made is left alone, as in Down.
func Force(ctx context.Context, cfg *pgx.ConnConfig, version int) error {
	return migrator{embedded}.force(ctx, cfg, version)
}

// Plan returns what Up would run, in order. It changes nothing.
func Plan(ctx context.Context, cfg *pgx.ConnConfig) ([]Migration, error) {
	return migrator{embedded}.plan(ctx, cfg)
}

// Check returns the version of a schema that this program works with, else a
// *TooOldError or a *DirtyError, or why it cannot tell. A version above Latest
// is one of a newer program, which leaves in place what this one needs: so
// replicas can be replaced one by one. Check changes nothing.
func Check(ctx context.Context, cfg *pgx.ConnConfig) (version uint, err error) {
	return migrator{embedded}.check(ctx, cfg)
}

func (m migrator) source() (source.Driver, error) {
	src, err := iofs.New(m.fsys, ".")
	if err != nil {
		return nil, fmt.Errorf("migrations: read files: %w", err)
	}
	return src, nil
}

// after returns the migrations above a version, in order.
func (m migrator) after(version uint) ([]Migration, error) {
	src, err := m.source()
	if err != nil {
		return nil, err
	}
	defer src.Close()
	var found []Migration
	v, err := src.First()
	for ; err == nil; v, err = src.Next(v) {
		if v <= version {
			continue
		}
		body, name, err := src.ReadUp(v)
		if err != nil {
			return nil, fmt.Errorf("migrations: read files: %w", err)
		}
		text, err := io.ReadAll(body)
		body.Close()
		if err != nil {
			return nil, fmt.Errorf("migrations: read files: %w", err)
		}
		found = append(found, Migration{Version: v, Name: name, SQL: string(text)})
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("migrations: read files: %w", err)
	}
	return found, nil
}

func (m migrator) latest() uint {
	all, err := m.after(0)
	if err != nil || len(all) == 0 {
		// The files are part of the binary, and a test reads them.
		panic(fmt.Sprint("migrations: no readable migrations: ", err))
	}
	return all[len(all)-1].Version
}

func (m migrator) fingerprint() string {
	hash := sha256.New()
	err := fs.WalkDir(m.fsys, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := fs.ReadFile(m.fsys, path)
		fmt.Fprintf(hash, "%s %d\n%s", path, len(text), text)
		return err
	})
	if err != nil {
		panic(fmt.Sprint("migrations: no readable migrations: ", err)) // as in latest
	}
	return hex.EncodeToString(hash.Sum(nil))
}

func (m migrator) up(ctx context.Context, cfg *pgx.ConnConfig) error {
	return m.run(ctx, cfg, func(r *runner) error {
		for {
			current, err := r.clean()
			if err != nil {
				return err
			}
			todo, err := m.after(current)
			if err != nil || len(todo) == 0 {
				return err
			}
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("migrations: stopped at version %d of %d: %w", current, m.latest(), err)
			}
			if err := r.migrate.Steps(1); err != nil {
				return r.explain(err, todo[0].Version, "up")
			}
		}
	})
}

func (m migrator) down(ctx context.Context, cfg *pgx.ConnConfig, steps int) error {
	if steps < 1 {
		return fmt.Errorf("migrations: steps: got %d, allowed 1 and more", steps)
	}
	return m.run(ctx, cfg, func(r *runner) error {
		for ; steps > 0; steps-- {
			current, err := r.clean()
			if err != nil {
				return err
			}
			if current == 0 {
				break
			}
			if err := m.known(current); err != nil {
				return err
			}
			if err := ctx.Err(); err != nil {
				return fmt.Errorf("migrations: stopped at version %d: %w", current, err)
			}
			if err := r.migrate.Steps(-1); err != nil {
				return r.explain(err, current, "down")
			}
		}
		if current, err := r.clean(); err != nil || current > 0 {
			return err
		}
		return r.removeVersionTable(ctx)
	})
}

func (m migrator) force(ctx context.Context, cfg *pgx.ConnConfig, version int) error {
	exists := version == 0
	all, err := m.after(0)
	if err != nil {
		return err
	}
	for _, one := range all {
		exists = exists || version > 0 && one.Version == uint(version)
	}
	if !exists {
		return fmt.Errorf("migrations: version: got %d, allowed 0 (nothing applied) to %d", version, m.latest())
	}
	return m.run(ctx, cfg, func(r *runner) error {
		current, _, err := r.version()
		if err != nil {
			return err
		}
		if err := m.known(current); err != nil {
			return err
		}
		if version == 0 {
			version = database.NilVersion
		}
		if err := r.migrate.Force(version); err != nil {
			return fmt.Errorf("migrations: force: %w", err)
		}
		return nil
	})
}

func (m migrator) plan(ctx context.Context, cfg *pgx.ConnConfig) ([]Migration, error) {
	version, dirty, err := m.version(ctx, cfg)
	if err != nil {
		return nil, err
	}
	if err := m.usable(version, dirty); err != nil {
		return nil, err
	}
	return m.after(version)
}

func (m migrator) check(ctx context.Context, cfg *pgx.ConnConfig) (uint, error) {
	version, dirty, err := m.version(ctx, cfg)
	if err != nil {
		return 0, err
	}
	if err := m.usable(version, dirty); err != nil {
		return 0, err
	}
	if version < m.latest() {
		return 0, &TooOldError{Version: version, Latest: m.latest()}
	}
	return version, nil
}

// usable returns an error if nobody knows what there is of such a schema.
func (m migrator) usable(version uint, dirty bool) error {
	if !dirty {
		return nil
	}
	e := &DirtyError{Version: version, Unknown: version > m.latest()}
	all, err := m.after(0)
	if err != nil {
		return err
	}
	for _, one := range all {
		if one.Version < version {
			e.Previous = one.Version
		}
	}
	return e
}

// known returns an error if the files do not reach up to a version.
func (m migrator) known(version uint) error {
	if version > m.latest() {
		return &TooNewError{Version: version, Latest: m.latest()}
	}
	return nil
}

// version reads the version table directly, because opening a golang-migrate
// driver creates the table and waits for locks.
func (m migrator) version(ctx context.Context, cfg *pgx.ConnConfig) (uint, bool, error) {
	conn, err := pgx.ConnectConfig(ctx, readConfig(cfg))
	if err != nil {
		return 0, false, fmt.Errorf("migrations: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var (
		version int64
		dirty   bool
	)
	err = conn.QueryRow(ctx, "SELECT version, dirty FROM "+versionIdentifier).Scan(&version, &dirty)
	var pgErr *pgconn.PgError
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return 0, false, nil
	case errors.As(err, &pgErr) && (pgErr.Code == pgerrcode.UndefinedTable || pgErr.Code == pgerrcode.InvalidSchemaName):
		return 0, false, nil
	case err != nil:
		return 0, false, fmt.Errorf("migrations: read version: %w", err)
	}
	// A down migration of the first version that was interrupted leaves -1.
	return uint(max(version, 0)), dirty, nil
}

var versionIdentifier = pgx.Identifier{schema, versionTable}.Sanitize()

// readConfig makes several hosts mean the one that can be written to, unless
// the configuration says otherwise: a standby may be behind.
func readConfig(cfg *pgx.ConnConfig) *pgx.ConnConfig {
	cfg = cfg.Copy()
	if cfg.ValidateConnect == nil && len(cfg.Fallbacks) > 0 {
		cfg.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	return cfg
}

// writeConfig makes the connection go to the server that can be written to,
// whatever the configuration prefers for other work, and free of the timeouts
// that are right for other work.
func writeConfig(cfg *pgx.ConnConfig) *pgx.ConnConfig {
	cfg = cfg.Copy()
	cfg.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	for _, name := range []string{"statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"} {
		delete(cfg.RuntimeParams, name)
	}
	return cfg
}

// runner is one run of migrations: a session that holds the migration lock.
type runner struct {
	migrator
	driver  *driver
	migrate *migrate.Migrate
}

// run calls work while no other process migrates this database.
func (m migrator) run(ctx context.Context, cfg *pgx.ConnConfig, work func(*runner) error) error {
	src, err := m.source()
	if err != nil {
		return err
	}
	defer src.Close()

	// One connection: the lock, and what golang-migrate does, belong to one
	// session. The lock ends with the session.
	cfg = writeConfig(cfg)
	db := stdlib.OpenDB(*cfg, stdlib.OptionAfterConnect(func(ctx context.Context, conn *pgx.Conn) error {
		return prepareSession(ctx, conn, cfg)
	}))
	defer db.Close()
	db.SetMaxOpenConns(1)
	if err := db.PingContext(ctx); err != nil {
		return fmt.Errorf("migrations: %w", err)
	}

	drv, err := pgxmigrate.WithInstance(db, &pgxmigrate.Config{SchemaName: schema, MigrationsTable: versionTable})
	if err != nil {
		return fmt.Errorf("migrations: %w", err)
	}
	r := &runner{migrator: m, driver: &driver{Driver: drv, ctx: ctx}}
	if r.migrate, err = migrate.NewWithInstance("iofs", src, "pgx5", r.driver); err != nil {
		drv.Close()
		return fmt.Errorf("migrations: %w", err)
	}
	defer r.migrate.Close()
	return work(r)
}

// prepareSession takes the migration lock and creates the schema, for
// golang-migrate puts its version table there before the first migration.
func prepareSession(ctx context.Context, conn *pgx.Conn, cfg *pgx.ConnConfig) (err error) {
	defer func() {
		if err != nil {
			conn.Close(context.WithoutCancel(ctx))
		}
	}()
	if err := brokerdb.RequireSession(ctx, conn, cfg); err != nil {
		return err
	}
	// Tried again and again rather than waited for: a session that waits holds
	// a snapshot, and CREATE INDEX CONCURRENTLY of the session that has the
	// lock would wait for that snapshot to go.
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = 20*time.Millisecond, time.Second
	_, err = backoff.Retry(ctx, func() (struct{}, error) {
		var locked bool
		err := conn.QueryRow(ctx, "SELECT pg_try_advisory_lock(hashtextextended('pgbroker migrations', 0))").Scan(&locked)
		if err != nil {
			return struct{}{}, backoff.Permanent(err)
		}
		if !locked {
			return struct{}{}, errors.New("another process is migrating this database")
		}
		return struct{}{}, nil
	}, backoff.WithBackOff(wait), backoff.WithMaxElapsedTime(0))
	if err != nil {
		return fmt.Errorf("take the migration lock: %w", err)
	}

	_, err = conn.Exec(ctx, fmt.Sprintf(`
		SET statement_timeout = 0;
		SET idle_session_timeout = 0;
		SET idle_in_transaction_session_timeout = 0;
		SET lock_timeout = %d`, lockTimeout.Milliseconds()))
	if err != nil {
		return err
	}
	// Not CREATE SCHEMA IF NOT EXISTS, which needs the right to create even
	// when there is nothing to do.
	var exists bool
	err = conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)", schema).Scan(&exists)
	if err != nil || exists {
		return err
	}
	_, err = conn.Exec(ctx, "CREATE SCHEMA "+schema)
	return err
}

// clean returns the current version, 0 for none, of a schema on which
// migrations may run.
func (r *runner) clean() (uint, error) {
	version, dirty, err := r.version()
	if err != nil {
		return 0, err
	}
	return version, r.usable(version, dirty)
}

// version returns the current version, 0 for none, and whether it is dirty.
func (r *runner) version() (uint, bool, error) {
	version, dirty, err := r.migrate.Version()
	if err != nil && !errors.Is(err, migrate.ErrNilVersion) {
		return 0, false, fmt.Errorf("migrations: read version: %w", err)
	}
	return version, dirty, nil
}

// removeVersionTable removes what is left when every migration is reverted.
// The schema stays if somebody has put something of theirs into it, and where
// it could not be created again: somebody has made it for this role.
func (r *runner) removeVersionTable(ctx context.Context) error {
	// The driver keeps the only connection, so the statements go through it.
	if err := r.driver.exec("DROP TABLE " + versionIdentifier); err != nil {
		return fmt.Errorf("migrations: remove the version table: %w", err)
	}
	err := r.driver.exec(fmt.Sprintf(`DO $$
		BEGIN
			IF has_database_privilege(current_database(), 'CREATE') THEN
				DROP SCHEMA %s;
			END IF;
		END $$`, schema))
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == pgerrcode.DependentObjectsStillExist {
		return nil
	}
	if err != nil {
		return fmt.Errorf("migrations: remove the schema: %w", err)
	}
	return nil
}

// explain turns an error of golang-migrate into one for people.
func (r *runner) explain(err error, version uint, direction string) error {
	e := &MigrationError{Version: version, Direction: direction, Err: err}
	var detail *statementError
	if errors.As(err, &detail) {
		e.Line = detail.line
	}
	var pgErr *pgconn.PgError
	e.RolledBack = r.driver.transaction && errors.As(err, &pgErr)
	return e
}

// statementError is golang-migrate's error for a failed file without the text
// of the whole file, and with the error of Postgres within reach of errors.As.
type statementError struct {
	line uint
	err  error
}

func (e *statementError) Error() string { return e.err.Error() }
func (e *statementError) Unwrap() error { return e.err }

// driver is golang-migrate's driver for Postgres, except that the version
// changes in the transaction of the migration. golang-migrate marks the schema
// dirty before a migration and clean after it; here the mark is held back
// until it is known to be needed.
type driver struct {
	database.Driver
	ctx         context.Context
	target      int  // the version that the current migration leads to
	transaction bool // the current migration runs in a transaction
}

// SetVersion implements database.Driver. A dirty mark is only remembered.
func (d *driver) SetVersion(version int, dirty bool) error {
	if dirty {
		d.target = version
		return nil
	}
	return d.Driver.SetVersion(version, false)
}

// Run implements database.Driver.
func (d *driver) Run(migration io.Reader) error {
	content, err := io.ReadAll(migration)
	if err != nil {
		return err
	}
	text := string(content)
	d.transaction = !strings.HasPrefix(text, noTransaction)
	if !d.transaction {
		if err := d.Driver.SetVersion(d.target, true); err != nil {
			return err
		}
		return d.exec(text)
	}
	// A text of several statements is one transaction.
	text += "\n;DELETE FROM " + versionIdentifier + ";\n"
	if d.target != database.NilVersion {
		text += fmt.Sprintf("INSERT INTO %s (version, dirty) VALUES (%d, false);\n", versionIdentifier, d.target)
	}
	_, err = backoff.Retry(d.ctx, func() (struct{}, error) {
		err := d.exec(text)
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) && (pgErr.Code == pgerrcode.LockNotAvailable || pgErr.Code == pgerrcode.DeadlockDetected) {
			return struct{}{}, err
		}
		if err != nil {
			err = backoff.Permanent(err)
		}
		return struct{}{}, err
	}, backoff.WithMaxTries(lockTries), backoff.WithMaxElapsedTime(0))
	return err
}

// exec runs statements on the session of the driver.
func (d *driver) exec(text string) error {
	err := d.Driver.Run(strings.NewReader(text))
	var detail database.Error
	if errors.As(err, &detail) {
		return &statementError{line: detail.Line, err: detail.OrigErr}
	}
	return err
}
