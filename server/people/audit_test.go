package people

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// audited returns the audit in short, oldest first.
func audited(t testing.TB, b *servertest.Broker) []string {
	t.Helper()
	return column[string](t, b.Database, `
		SELECT concat_ws(' ', nullif(change, 'ended'), cause, what, id, user_id, became, application, records) FROM pgbroker.revocations ORDER BY number`)
}

// TestAuditTellsEveryWayOut: each deletion of what lets somebody in is in the audit once, with its cause.
func TestAuditTellsEveryWayOut(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: quiet})
	d, now := b.Database, time.Now()
	later := now.Add(time.Hour)
	entries := 0
	expect := func(what string, want ...string) {
		t.Helper()
		got := audited(t, b)
		if !slices.Equal(got[entries:], want) {
			t.Errorf("%s: the audit has\n%q, want\n%q", what, got[entries:], want)
		}
		entries = len(got)
	}
	sessionOf := func(id string) *databroker.Record {
		return record(t, "", id, aSession(id, "jane", "okta", now, now, later))
	}
	put(t, b.Replica, sessionOf("a"), sessionOf("b"), sessionOf("c"), sessionOf("d"), sessionOf("e"),
		record(t, "", "key", &session.SessionBinding{UserId: "jane", SessionId: "a"}), aUser(t, "jane", "Jane"))
	expect("puts")

	put(t, b.Replica, deletion(sessionType, "a"), deletion(userType, "jane"), deletion(sessionType, "absent"))
	expect("a request", "request session.Session a jane pgbroker 1")
	d.Exec(t, `SET application_name = 'a person'; DELETE FROM pgbroker.sessions WHERE id IN ('b'); RESET application_name`)
	expect("a statement", "sql session.Session b jane a person 1")
	d.Exec(t, `SET application_name = 'f'; SELECT pgbroker.revoke_session('c'); RESET application_name`)
	expect("a function", "sql session.Session c jane f 1")
	d.Exec(t, `SET application_name = 'm'; DELETE FROM pgbroker.session_bindings; RESET application_name`)
	expect("a binding", "sql session.SessionBinding key jane m 1")

	expired := aSession("x", "jane", "okta", now, now, now.Add(-time.Minute))
	put(t, b.Replica, record(t, "", "x", expired))
	d.Exec(t, `SET application_name = 'm'; SELECT pgbroker.expire_records(10)`)
	expect("expiry", "expiry session.Session x jane m 1")
	const endIdle = `SELECT pgbroker.end_idle_records($1, '{d,e}', ARRAY(SELECT version FROM pgbroker.sessions WHERE id IN ('d', 'e') ORDER BY id))`
	const endExcess = `SELECT pgbroker.end_excess_records($1, '{e,f}', ARRAY(SELECT version FROM pgbroker.sessions WHERE id IN ('e', 'f') ORDER BY id))`
	d.Exec(t, endIdle, sessionType)
	d.Exec(t, endExcess, sessionType)
	expect("without a timeout and a limit")
	put(t, b.Replica, record(t, "", "d", aSession("d", "jane", "okta", now, now.Add(-2*time.Hour), later)),
		record(t, "", "f", aSession("f", "jane", "okta", now.Add(time.Second), now, later)))
	d.Exec(t, `SELECT pgbroker.set_idle_timeout('session.Session', '1 hour')`)
	d.Exec(t, endIdle, sessionType)
	expect("idle", "idle session.Session d jane m 1")
	d.Exec(t, `SELECT pgbroker.set_idle_timeout('session.Session', NULL), pgbroker.set_user_limit('session.Session', 1)`)
	d.Exec(t, endExcess, sessionType)
	expect("limit", "limit session.Session e jane m 1")
	d.Exec(t, `SELECT pgbroker.set_user_limit('session.Session', NULL)`)
	d.Exec(t, `SET application_name = 'f'; SELECT pgbroker.revoke_session('f'); SET application_name = 'm'`)
	expect("another function", "sql session.Session f jane f 1")

	capacity := uint64(1)
	if _, err := b.SetOptions(t.Context(), &databroker.SetOptionsRequest{Type: sessionType, Options: &databroker.Options{Capacity: &capacity}}); err != nil {
		t.Fatal(err)
	}
	put(t, b.Replica, sessionOf("g"))
	put(t, b.Replica, sessionOf("h"))
	expect("capacity", "capacity session.Session g jane pgbroker 1")
	d.Exec(t, `UPDATE pgbroker.record_types SET capacity = NULL, ttl = '1 microsecond' WHERE type = $1`, sessionType)
	d.Exec(t, `SELECT pgbroker.expire_by_ttl($1, 10)`, sessionType)
	expect("ttl", "ttl session.Session h jane m 1")

	put(t, b.Replica, sessionOf("i"), sessionOf("j"))
	if _, err := b.Clear(t.Context(), new(emptypb.Empty)); err != nil {
		t.Fatal(err)
	}
	expect("clear", "clear session.Session pgbroker 2")

	// What is audited is an option.
	d.Exec(t, `SELECT pgbroker.set_audited('example.com/Thing', true), pgbroker.set_audited('session.Session', false)`)
	put(t, b.Replica, sessionOf("k"), &databroker.Record{Type: "example.com/Thing", Id: "1"})
	put(t, b.Replica, deletion(sessionType, "k"), deletion("example.com/Thing", "1"))
	expect("an option", "request example.com/Thing 1 pgbroker 1")
}

// TestAuditIsKeptFor its retention, and is then purged by the periodic work.
func TestAuditIsKeptForItsRetention(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) { busy(c); c.AuditRetention = 24 * time.Hour }})
	b.Database.Exec(t, `INSERT INTO pgbroker.audit (at, cause, type, id)
		SELECT now() - make_interval(hours => h), 'sql', 't', h::text FROM generate_series(500, 1, -1) AS h`)
	for deadline := time.Now().Add(patience); ; {
		left := column[string](t, b.Database, `SELECT id FROM pgbroker.audit ORDER BY number`)
		if len(left) <= 23 {
			if left[0] != "23" || len(left) != 23 {
				t.Errorf("left are %v, want 23 to 1", left)
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d entries are left", len(left))
		}
	}
}

// TestAuditCannotBeDisguised: neither a setting nor a text in the statement changes what the audit says.
func TestAuditCannotBeDisguised(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: quiet})
	now := time.Now()
	for i := range 2 {
		id := fmt.Sprint(i)
		put(t, b.Replica, record(t, "", id, aSession(id, "jane", "okta", now, now, now.Add(time.Hour))))
	}
	conn := b.Database.Connect(t)
	for _, statement := range []string{
		`SET application_name = 'x'`,
		`SET search_path = pg_temp, pgbroker, pg_catalog`,
		`DELETE FROM pgbroker.sessions WHERE id = '0' /* write_records( expire_records( */`,
		`CREATE TEMPORARY TABLE audit (cause text, type text, id text, user_id text)`,
		`CREATE TEMPORARY TABLE record_types (type text, audited boolean)`,
		`DELETE FROM pgbroker.sessions WHERE id = '1'`,
	} {
		if _, err := conn.Exec(t.Context(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	want := []string{"sql session.Session 0 jane x 1", "sql session.Session 1 jane x 1"}
	if got := audited(t, b); !slices.Equal(got, want) {
		t.Errorf("the audit has %q, want %q", got, want)
	}
}
