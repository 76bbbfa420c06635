package pressure

import (
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/migrations"
	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

const (
	reported = "blocks writes; nothing is written or revoked until it ends"
	over     = "writes are not blocked any more"
	blocked  = "another transaction in the database blocks writes; the server's log says which"
)

// watched starts a broker that soon tells about sessions that block writes.
func watched(t *testing.T, options servertest.Options) (*servertest.Broker, *prometheus.Registry, *logBook) {
	t.Helper()
	registry, log := prometheus.NewRegistry(), new(logBook)
	watching := watchedOptions(registry, log)
	options.Configure = watching.Configure
	if options.ConfigureDB == nil {
		options.ConfigureDB = watching.ConfigureDB
	}
	return servertest.New(t, options), registry, log
}

// watchedOptions are those of a broker that soon tells about what blocks writes. Only the first replica has its metrics in the registry.
func watchedOptions(registry *prometheus.Registry, log *logBook) servertest.Options {
	var once sync.Once
	return servertest.Options{
		Configure: func(c *server.Config) {
			once.Do(func() { c.Registerer = registry })
			c.Logger = slog.New(slog.NewTextHandler(log, nil))
			c.LockWarning = 100 * time.Millisecond
		},
		ConfigureDB: func(c *db.Config) { c.LockTimeout = 500 * time.Millisecond },
	}
}

// operator is a session as psql has it, with a transaction open.
type operator struct {
	t   *testing.T
	pid uint32
	tx  pgx.Tx
}

func newOperator(t *testing.T, b *servertest.Broker, statements ...string) *operator {
	t.Helper()
	config := b.Database.Config(t)
	config.RuntimeParams["application_name"] = "psql"
	config.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol // as psql does
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(t.Context()) })
	o := &operator{t: t, pid: conn.PgConn().PID()}
	if o.tx, err = conn.Begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, statement := range statements {
		if _, err := o.tx.Exec(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = o.tx.Rollback(t.Context()) })
	return o
}

func (o *operator) commit() {
	o.t.Helper()
	if err := o.tx.Commit(o.t.Context()); err != nil {
		o.t.Fatal(err)
	}
}

func tryPut(t *testing.T, client databroker.DataBrokerServiceClient, id string) error {
	t.Helper()
	_, err := client.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{thing(id, 10)}})
	return err
}

// TestAForgottenTransactionIsReported: a transaction that somebody has left open holds up writes, and nothing but writes.
// They fail in time, saying why; a log line and a metric name the session, and no secret; when it ends, all goes on.
func TestAForgottenTransactionIsReported(t *testing.T) {
	t.Parallel()
	b, registry, log := watched(t, servertest.Options{AsOwner: true})
	put(t, b, thing("a", 10))
	stream := follow(testContext(t), t, b.Conn, present(t, b))
	o := newOperator(t, b, "DELETE FROM pgbroker.records WHERE id = 'none'",
		"UPDATE pgbroker.records SET data = '{}' /* the secret is hunter2 */ WHERE id = $$hunter2$$")
	pid := fmt.Sprint("pid=", o.pid)

	wantStatus(t, tryPut(t, b, "b"), codes.Unavailable, blocked)
	await(t, "a log line that names the session", func() bool {
		_ = tryPut(t, b, "b")
		return len(log.lines(reported, pid)) > 0
	})
	line := log.lines(reported, pid)[0]
	for _, want := range []string{
		"level=WARN", "application_name=psql", `state="idle in transaction"`, "user=", "blocks_for=", "waiting_sessions=",
		`reason="open transaction"`, fmt.Sprintf("pg_terminate_backend(%d)", o.pid),
	} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is not in the log line: %s", want, line)
		}
	}
	// Those who wait give up and others come: still the same session, and the same time.
	await(t, "a metric that says for how long", func() bool {
		_ = tryPut(t, b, "b")
		seconds, ok := metric(t, registry, "pgbroker_blocking_session_seconds", "reason=open_transaction")
		return ok && seconds > 1
	})
	if lines := log.lines(reported); len(lines) != 1 {
		t.Errorf("it is reported %d times", len(lines))
	}

	// Reads, and streams, and replicas that start are as always.
	get(t, b, "a")
	if _, err := b.Query(testContext(t), &databroker.QueryRequest{Type: "t", Limit: 1}); err != nil {
		t.Errorf("query: %v", err)
	}
	another := servertest.Start(t, b.Database.ServerConnString, servertest.Options{})
	late := follow(testContext(t), t, another.Conn, present(t, another))

	o.commit()
	put(t, b, thing("c", 10))
	wantNext(t, []syncStream{stream, late}, "c")
	await(t, "a log line that says that it is over", func() bool { return len(log.lines(over, pid, "level=INFO")) == 1 })
	await(t, "a metric that is gone", func() bool {
		_, ok := metric(t, registry, "pgbroker_blocking_session_seconds")
		return !ok
	})
	if lines := log.lines("hunter2"); len(lines) > 0 {
		t.Errorf("the secret is in the log: %s", lines)
	}
}

// TestEveryKindOfBlocker: whatever a session holds that writers need, it is found; and whoever only waits is not blamed.
func TestEveryKindOfBlocker(t *testing.T) {
	t.Parallel()
	const row = "SELECT id FROM pgbroker.records WHERE id = 'a' FOR UPDATE"
	for name, statement := range map[string]string{
		"order": "SELECT pgbroker.lock_order()",
		"table": "LOCK TABLE pgbroker.records IN SHARE MODE",
		"types": "LOCK TABLE pgbroker.record_types IN EXCLUSIVE MODE",
		"row":   row,
		"alone": row, // with one writer only, which has the order lock and waits for the row
		"many":  "INSERT INTO pgbroker.records (type, id) SELECT 't', g::text FROM generate_series(1, 10) g",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, _, log := watched(t, servertest.Options{})
			put(t, b, thing("a", 10))
			o := newOperator(t, b, statement)
			// Another session that waits, and is no cause.
			waiting := b.Database.Connect(t)
			waited := make(chan error, 1)
			go func() {
				if name == "alone" {
					waited <- nil
					return
				}
				_, err := waiting.Exec(testContext(t), "UPDATE pgbroker.records SET payload = payload WHERE id = 'a'")
				waited <- err
			}()
			n := 0
			await(t, "a log line that names the session", func() bool {
				n++ // some locks are in the way of updates, some of what is new
				request := &databroker.PutRequest{Records: []*databroker.Record{thing("a", 10), thing(fmt.Sprint("new", n), 10)}}
				_, _ = b.Put(testContext(t), request)
				return len(log.lines(reported, fmt.Sprint("pid=", o.pid))) > 0
			})
			o.commit()
			if err := <-waited; err != nil {
				t.Errorf("the session that has waited: %v", err)
			}
			put(t, b, thing("b", 10))
			for _, line := range log.lines(reported) {
				if !strings.Contains(line, fmt.Sprint("pid=", o.pid)) && strings.Contains(line, fmt.Sprint("pid=", waiting.PgConn().PID())) {
					t.Errorf("one that waits is blamed: %s", line)
				}
			}
		})
	}
}

// TestALockedRowFailsOnlyItsOwnWrites: of the requests that share a statement only that fails which wants the row.
func TestALockedRowFailsOnlyItsOwnWrites(t *testing.T) {
	t.Parallel()
	b, _, _ := watched(t, servertest.Options{})
	put(t, b, thing("locked", 10), thing("a", 10))
	newOperator(t, b, "SELECT id FROM pgbroker.records WHERE id = 'locked' FOR UPDATE")
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() { wantStatus(t, tryPut(t, b, "locked"), codes.Unavailable, blocked) })
		group.Go(func() {
			if err := tryPut(t, b, "a"); err != nil {
				t.Errorf("another record: %v", err)
			}
		})
	}
	group.Wait()
}

// TestBlockedRequestsEndInTime: with a lock timeout that is longer than a request may take, clients hear the reason all the
// same.
func TestBlockedRequestsEndInTime(t *testing.T) {
	t.Parallel()
	registry, log := prometheus.NewRegistry(), new(logBook)
	b := servertest.New(t, servertest.Options{
		Configure: func(c *server.Config) {
			c.Registerer = registry
			c.RequestTimeout = time.Second
			c.LockWarning = 100 * time.Millisecond
			c.Logger = slog.New(slog.NewTextHandler(log, nil))
		},
		ConfigureDB: func(c *db.Config) { c.LockTimeout = time.Minute },
	})
	newOperator(t, b, "SELECT pgbroker.lock_order()")
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() { wantStatus(t, tryPut(t, b, "a"), codes.Unavailable, blocked) })
	}
	group.Wait()
}

// TestBlockersAreFoundWithFewRights: a role that may only do what serving needs names the session too, if not what it does.
func TestBlockersAreFoundWithFewRights(t *testing.T) {
	t.Parallel()
	b, _, log := watched(t, servertest.Options{})
	o := newOperator(t, b, "SELECT pgbroker.lock_order(), 'hunter2'")
	await(t, "a log line that names the session", func() bool {
		wantStatus(t, tryPut(t, b, "b"), codes.Unavailable, blocked)
		return len(log.lines(reported, fmt.Sprint("pid=", o.pid), "application_name=psql", `state="hidden from this role"`)) == 1
	})
}

// TestAPreparedTransactionIsReported: a transaction that was prepared for a two-phase commit and then forgotten has no
// session that could be ended. Log and metric name it all the same, with what ends it, and writes go on after that.
func TestAPreparedTransactionIsReported(t *testing.T) {
	t.Parallel()
	const row = "SELECT id FROM pgbroker.records WHERE id = 'a' FOR UPDATE"
	for name, statement := range map[string]string{"order": "SELECT pgbroker.lock_order()", "row": row} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			postgres := dbtest.Server(t, map[string]string{"max_prepared_transactions": "5"})
			migrate(t, postgres.ConnString())
			registry, log := prometheus.NewRegistry(), new(logBook)
			replica := servertest.Start(t, postgres.ConnString(), watchedOptions(registry, log))
			put(t, replica, thing("a", 10))
			for _, gid := range []string{"harmless", "the app's 7"} {
				conn, err := pgx.Connect(t.Context(), postgres.ConnString())
				if err != nil {
					t.Fatal(err)
				}
				work := "CREATE TABLE unrelated ()"
				if gid != "harmless" {
					work = statement
				}
				for _, s := range []string{"BEGIN", work, "PREPARE TRANSACTION '" + strings.ReplaceAll(gid, "'", "''") + "'"} {
					if _, err := conn.Exec(t.Context(), s); err != nil {
						t.Fatal(err)
					}
				}
				conn.Close(t.Context())
			}
			await(t, "a log line that names the transaction", func() bool {
				_ = tryPut(t, replica, "a")
				return len(log.lines("a prepared transaction blocks writes", `gid="the app's 7"`, "ROLLBACK PREPARED 'the app''s 7'")) > 0
			})
			await(t, "a metric", func() bool {
				_ = tryPut(t, replica, "a")
				_, ok := metric(t, registry, "pgbroker_blocking_session_seconds", "reason=prepared_transaction")
				return ok
			})
			if lines := log.lines("harmless"); len(lines) > 0 {
				t.Errorf("one that is in nobody's way is blamed: %s", lines)
			}
			postgres.Exec("ROLLBACK PREPARED 'the app''s 7'")
			put(t, replica, thing("a", 10))
			await(t, "a log line that says that it is over", func() bool { return len(log.lines(over, `gid="the app's 7"`)) == 1 })
		})
	}
}

// TestALostSynchronousStandbyIsNoBlocker: where commits wait for a synchronous standby that is gone, no session is to be
// ended: log, metric and answers say what it is.
func TestALostSynchronousStandbyIsNoBlocker(t *testing.T) {
	t.Parallel()
	postgres := dbtest.Server(t, nil)
	migrate(t, postgres.ConnString())
	registry, log := prometheus.NewRegistry(), new(logBook)
	options := watchedOptions(registry, log)
	configure := options.Configure
	options.Configure = func(c *server.Config) {
		configure(c)
		c.RequestTimeout = 2 * time.Second
	}
	replica := servertest.Start(t, postgres.ConnString(), options)
	put(t, replica, thing("a", 10))

	postgres.Exec("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
	postgres.Exec("SELECT pg_reload_conf()")
	await(t, "a log line that tells what writes wait for", func() bool {
		_ = tryPut(t, replica, "b")
		return len(log.lines("a commit waits for a synchronous standby", "synchronous_standby_names")) > 0
	})
	await(t, "an answer that tells it", func() bool {
		err := tryPut(t, replica, "c")
		return status.Code(err) == codes.Unavailable && strings.Contains(status.Convert(err).Message(), "synchronous standby")
	})
	if _, ok := metric(t, registry, "pgbroker_blocking_session_seconds", "reason=synchronous_standby"); !ok {
		t.Error("there is no metric with that reason")
	}
	if lines := log.lines("pg_terminate_backend"); len(lines) > 0 {
		t.Errorf("it is proposed to end a session: %s", lines)
	}
	get(t, replica, "a") // reads go on

	postgres.Exec("ALTER SYSTEM RESET synchronous_standby_names")
	postgres.Exec("SELECT pg_reload_conf()")
	await(t, "writes", func() bool { return tryPut(t, replica, "d") == nil })
}

// migrate installs the schema on a server of the test's own.
func migrate(t *testing.T, connString string) {
	t.Helper()
	config, err := pgx.ParseConfig(connString)
	if err != nil {
		t.Fatal(err)
	}
	if err := migrations.Up(t.Context(), config); err != nil {
		t.Fatal(err)
	}
}

// TestADisabledTriggerIsReported: a replica says at its start what is wrong with the installation, with a log line and a metric.
func TestADisabledTriggerIsReported(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	b.Database.Exec(t, "ALTER TABLE pgbroker.records DISABLE TRIGGER records_log_delete")
	registry, log := prometheus.NewRegistry(), new(logBook)
	servertest.Start(t, b.Database.ConnString, watchedOptions(registry, log))
	await(t, "a log line that names the trigger", func() bool {
		return len(log.lines("the installation has a problem", "records.records_log_delete", "pgbroker check --repair")) == 1
	})
	await(t, "a metric", func() bool {
		n, ok := metric(t, registry, "pgbroker_setup_problems", "problem=disabled_trigger")
		return ok && n == 1
	})
}
