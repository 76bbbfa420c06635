package pressure

import (
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

const (
	reported = "blocks writes; nothing is written or revoked until it ends"
	over     = "does not block writes any more"
	blocked  = "another transaction in the database blocks writes; the server's log says which"
)

// watched starts a broker that soon tells about sessions that block writes.
func watched(t *testing.T, options servertest.Options) (*servertest.Broker, *prometheus.Registry, *logBook) {
	t.Helper()
	registry, log := prometheus.NewRegistry(), new(logBook)
	var once sync.Once
	options.Configure = func(c *server.Config) {
		once.Do(func() { c.Registerer = registry })
		c.Logger = slog.New(slog.NewTextHandler(log, nil))
		c.LockWarning = 100 * time.Millisecond
	}
	if options.ConfigureDB == nil {
		options.ConfigureDB = func(c *db.Config) { c.LockTimeout = 500 * time.Millisecond }
	}
	return servertest.New(t, options), registry, log
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
	b, registry, log := watched(t, servertest.Options{})
	put(t, b, thing("a", 10))
	stream := follow(testContext(t), t, b.Conn, present(t, b))
	o := newOperator(t, b, "DELETE FROM pgbroker.records WHERE id = 'none'",
		`UPDATE pgbroker.records SET data = '"hunter2"' /* the secret is hunter2 */ WHERE id = $$hunter2$$`)
	pid := fmt.Sprint("pid=", o.pid)

	wantStatus(t, tryPut(t, b, "b"), codes.Unavailable, blocked)
	await(t, "a log line that names the session", func() bool {
		_ = tryPut(t, b, "b")
		return len(log.lines(reported, pid)) > 0
	})
	line := log.lines(reported, pid)[0]
	for _, want := range []string{
		"level=WARN", "application_name=psql", `state="idle in transaction"`, "user=", "blocks_for=", "waiting_sessions=",
		`query="UPDATE pgbroker.records SET data = ? WHERE id = ?"`, fmt.Sprintf("pg_terminate_backend(%d)", o.pid),
	} {
		if !strings.Contains(line, want) {
			t.Errorf("%q is not in the log line: %s", want, line)
		}
	}
	// Those who wait give up and others come: still the same session, and the same time.
	await(t, "a metric that says for how long", func() bool {
		_ = tryPut(t, b, "b")
		seconds, ok := metric(t, registry, "pgbroker_blocking_session_seconds", pid, "application_name=psql", "state=idle in transaction",
			"query=UPDATE pgbroker.records SET data = ? WHERE id = ?")
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
	another := servertest.Start(t, b.Database.ConnString, servertest.Options{})
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
				_, err := waiting.Exec(testContext(t), "UPDATE pgbroker.records SET index_cidr = NULL WHERE id = 'a'")
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
	b, _, log := watched(t, servertest.Options{ConfigureDB: func(c *db.Config) {
		c.LockTimeout = 500 * time.Millisecond
		u, err := url.Parse(c.ConnString)
		if err != nil {
			t.Fatal(err)
		}
		query := u.Query()
		query.Set("user", newRole(t, c.ConnString)) // wherever the one of the tests is named
		u.User, u.RawQuery = nil, query.Encode()
		c.ConnString = u.String()
	}})
	o := newOperator(t, b, "SELECT pgbroker.lock_order(), 'hunter2'")
	await(t, "a log line that names the session", func() bool {
		wantStatus(t, tryPut(t, b, "b"), codes.Unavailable, blocked)
		return len(log.lines(reported, fmt.Sprint("pid=", o.pid), "application_name=psql", `state="hidden from this role"`)) == 1
	})
}
