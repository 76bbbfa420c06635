package pressure

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"

	"pgbroker/db/dbtest"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// queue makes a database believe that the queue of notifications is so full: to fill 4 GB takes a while.
func queue(t *testing.T, database *dbtest.Database, usage string) {
	t.Helper()
	database.AdminExec(t, `DO $$ BEGIN
			ALTER FUNCTION pg_catalog.pg_notification_queue_usage() RENAME TO real_queue_usage;
		EXCEPTION WHEN OTHERS THEN NULL; END $$;
		CREATE OR REPLACE FUNCTION pg_catalog.pg_notification_queue_usage() RETURNS double precision LANGUAGE sql VOLATILE AS 'SELECT `+usage+`::double precision'`)
}

// TestTheQueueOfNotificationsIsFull: when others have filled half of the queue that all databases share, nothing that writes adds to
// it, so no commit fails when it is full. Changes are found all the same, and log and metric say why they come late, and who may hold it.
func TestTheQueueOfNotificationsIsFull(t *testing.T) {
	t.Parallel()
	metrics, log := prometheus.NewRegistry(), new(logBook)
	b := servertest.New(t, servertest.Options{Configure: withMetrics(metrics, func(c *server.Config) {
		c.MaintenanceInterval = 20 * time.Millisecond
		c.PollInterval = 50 * time.Millisecond
		c.Logger = slog.New(slog.NewTextHandler(log, nil))
	})})
	ctx := testContext(t)
	holder, err := pgx.Connect(ctx, b.Database.ServerConnString) // as the replicas, which see nothing of others
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { holder.Close(context.Background()) })
	if _, err := holder.Exec(ctx, "SET application_name = 'holder'; LISTEN something; BEGIN; SELECT 1"); err != nil {
		t.Fatal(err)
	}
	queue(t, b.Database, "0.51")
	b.DB.Pool.Reset()
	await(t, "a warning", func() bool {
		return len(log.lines("more than half full", "(holder), idle in transaction since")) == 1
	})
	await(t, "the metric", func() bool {
		usage, ok := metric(t, metrics, "pgbroker_notification_queue_usage")
		return ok && usage == 0.51
	})
	if _, err := holder.Exec(ctx, "ROLLBACK"); err != nil {
		t.Fatal(err)
	}

	// Everything that writes, on connections that know of the queue.
	listening := b.Database.Connect(t)
	if _, err := listening.Exec(ctx, "LISTEN pgbroker_changes; LISTEN pgbroker_services"); err != nil {
		t.Fatal(err)
	}
	stream := follow(ctx, t, b.Conn, present(t, b))
	put(t, b, thing("a", 1))
	put(t, b, thing("a", 2))
	writer := b.Database.Connect(t)
	for _, sql := range []string{
		"UPDATE pgbroker.records SET payload = NULL", "DELETE FROM pgbroker.records WHERE id = 'a'", "SELECT pgbroker.set_user_limit('t', 7)",
		"INSERT INTO pgbroker.services (kind, endpoint, expires_at) VALUES (7, 'http://x', clock_timestamp() + interval '1 minute')",
		"INSERT INTO pgbroker.redacted_fields (message, field) VALUES ('session.Session', 'claims')",
		"SELECT pgbroker.begin_epoch()",
	} {
		if _, err := writer.Exec(ctx, sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	for { // of a record that changes between two looks a stream may get the last change only
		record, err := nextRecord(stream)
		if err != nil {
			t.Fatal(err)
		}
		if record.DeletedAt != nil {
			break
		}
	}
	if _, err := writer.Exec(ctx, "TRUNCATE pgbroker.records"); err != nil {
		t.Fatal(err)
	}
	if n := waitingNotifications(t, listening); n != 0 {
		t.Errorf("%d notifications were added to a queue that is half full", n)
	}

	// When it is emptied they are announced again.
	queue(t, b.Database, "0.49")
	b.DB.Pool.Reset()
	await(t, "the end of it", func() bool { return len(log.lines("less than half full again")) == 1 })
	put(t, b, thing("b", 1))
	if n := waitingNotifications(t, listening); n == 0 {
		t.Error("a change was not announced")
	}
}

// waitingNotifications counts what has been notified by transactions that have ended: it comes before the answer to a query.
func waitingNotifications(t *testing.T, conn *pgx.Conn) int {
	t.Helper()
	ctx := testContext(t)
	if _, err := conn.Exec(ctx, "NOTIFY pgbroker_services, 'last'"); err != nil {
		t.Fatal(err)
	}
	for n := 0; ; n++ {
		notification, err := conn.WaitForNotification(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if notification.Payload == "last" {
			return n
		}
	}
}
