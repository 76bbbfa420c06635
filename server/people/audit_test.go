package people

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server"
	"pgbroker/server/auth"
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

// TestAuditTellsWhatUpdatesDo: whom a session belongs to, and its end, are in the audit when they change, however that is done;
// what updates are about, times that move on, is not.
func TestAuditTellsWhatUpdatesDo(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: quiet})
	d, now := b.Database, time.Now().UTC().Truncate(time.Second)
	d.Exec(t, `ALTER DATABASE `+d.Name+` SET application_name = 'm'`)
	d.Pool.Reset()
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
	set := func(id, userID string, accessed, expires time.Time) {
		put(t, b.Replica, record(t, "", id, aSession(id, userID, "okta", now, accessed, expires)))
	}
	iso := func(at time.Time) string { return at.Format(time.RFC3339) }
	set("s", "jane", now, later)
	set("s", "jane", now.Add(time.Minute), later.Add(time.Hour))
	d.Exec(t, `UPDATE pgbroker.records SET data = jsonb_set(data, '{accessed_at}', '"2030-01-01T00:00:00Z"')`)
	expect("use, and a longer life")

	set("s", "mallory", now, later.Add(time.Hour))
	expect("a request that gives it away", "moved request session.Session s jane mallory pgbroker 1")
	set("s", "mallory", now, later)
	expect("a request that shortens it", "shortened request session.Session s mallory "+iso(later)+" pgbroker 1")
	edit := func(data string) {
		t.Helper()
		d.Exec(t, `UPDATE pgbroker.records SET data = data || `+data)
	}
	edit(`'{"user_id": "eve"}'`)
	expect("a statement that gives it away", "moved sql session.Session s mallory eve m 1")
	edit(`'{"expires_at": "2001-01-01T00:00:00Z"}'`)
	expect("a statement that ends it", "shortened sql session.Session s eve 2001-01-01T00:00:00Z m 1")
	edit(`jsonb_build_object('expires_at', '` + iso(later) + `'::text)`)
	expect("it lives again")
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data) VALUES ($1, 's', '{"id": "s", "user_id": "joe"}')
		ON CONFLICT (type, id) DO UPDATE SET data = records.data || excluded.data`, sessionType)
	expect("an upsert", "moved sql session.Session s eve joe m 1")
	d.Exec(t, `UPDATE pgbroker.records SET data = '{"id": "s"}'`)
	expect("what makes it nobody's", "moved sql session.Session s joe m 1")
	edit(`jsonb_build_object('user_id', 'jane', 'expires_at', '` + iso(later) + `'::text)`)
	expect("what makes it somebody's, for a time", "moved sql session.Session s jane m 1", "shortened sql session.Session s "+iso(later)+" m 1")
	d.Exec(t, `UPDATE pgbroker.records SET expires_at = '2001-01-01T00:00:00Z'`)
	expect("its time alone", "shortened sql session.Session s jane 2001-01-01T00:00:00Z m 1")
	d.Exec(t, `UPDATE pgbroker.records SET payload = NULL, data = NULL`)
	expect("an empty payload", "moved sql session.Session s jane m 1", "emptied sql session.Session s jane m 1")
	put(t, b.Replica, aUser(t, "u", "U"))
	d.Exec(t, `UPDATE pgbroker.records SET payload = NULL, data = NULL WHERE id = 'u'`)
	expect("a type that is not audited")
	d.Exec(t, `SELECT pgbroker.set_audited('t', true)`)
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data) VALUES ('t', '1', '{"user_id": "jane"}')`)
	d.Exec(t, `UPDATE pgbroker.records SET data = '{"user_id": "joe"}' WHERE type = 't'`)
	expect("a type that is not indexed by its users", "moved sql t 1 jane joe m 1")
	d.Exec(t, `SELECT pgbroker.set_user_limit('t', 5)`)
	d.Exec(t, `UPDATE pgbroker.records SET index_fields = '{"user_id": "joe"}' WHERE type = 't'`)
	expect("it is indexed")
	d.Exec(t, `UPDATE pgbroker.records SET index_fields = '{"user_id": "eve"}' WHERE type = 't'`)
	expect("the index alone", "moved sql t 1 joe eve m 1")
	d.Exec(t, `UPDATE pgbroker.records SET data = '{"user_id": "mallory"}' WHERE type = 't'`)
	expect("indexed by its users", "moved sql t 1 joe mallory m 1")
	d.Exec(t, `DELETE FROM pgbroker.records WHERE type = 't'`)
	expect("its end", "sql t 1 mallory m 1")
	d.Exec(t, `TRUNCATE pgbroker.records`)
	expect("TRUNCATE", "clear session.Session m 1")

	// A proxy refuses what has expired, also of types of which nothing here ends that, and what is no message of the type.
	robot := func(data string) {
		t.Helper()
		d.Exec(t, `UPDATE pgbroker.records SET data = $1`, data)
	}
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data) VALUES ('type.googleapis.com/user.ServiceAccount', 'r', '{"user_id": "jane"}')`)
	robot(`{"user_id": "jane", "description": "a robot"}`)
	expect("a service account")
	robot(`{"user_id": "jane", "expires_at": "` + iso(later) + `"}`)
	expect("it does not live for ever any more", "shortened sql user.ServiceAccount r jane "+iso(later)+" m 1")
	robot(`{"user_id": "jane", "expires_at": "` + iso(later.Add(time.Hour)) + `"}`)
	expect("it lives for longer")
	robot(`{"user_id": "jane", "expires_at": "2001-01-01T00:00:00Z"}`)
	expect("it has expired", "shortened sql user.ServiceAccount r jane 2001-01-01T00:00:00Z m 1")
	robot(`{"user_id": "jane"}`)
	robot(`{"@type": "type.googleapis.com/google.protobuf.Struct", "user_id": "jane"}`)
	expect("another message", "emptied sql user.ServiceAccount r jane m 1")
	robot(`{"@type": "type.googleapis.com/google.protobuf.Struct", "user_id": "jane", "a": "b"}`)
	robot(`{"@type": "type.googleapis.com/user.ServiceAccount", "user_id": "jane"}`)
	expect("it is one again")
	d.Exec(t, `UPDATE pgbroker.records SET payload = '\x', data = data`)
	expect("a payload without a byte", "emptied sql user.ServiceAccount r jane m 1")
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data) VALUES ($1, 's', '{"id": "s", "user_id": "jane"}')`, sessionType)
	d.Exec(t, `UPDATE pgbroker.records SET data = data || $2 WHERE type = $1`, sessionType, `{"expires_at": "`+iso(later)+`"}`)
	expect("a session that does not live for ever any more", "shortened sql session.Session s jane "+iso(later)+" m 1")
	put(t, b.Replica, &databroker.Record{Type: sessionType, Id: "s", Data: aUser(t, "s", "S").Data})
	expect("a request with another message", "moved request session.Session s jane pgbroker 1", "emptied request session.Session s jane pgbroker 1")
	d.Exec(t, `TRUNCATE pgbroker.records; TRUNCATE pgbroker.audit`)
	entries = 0

	// Another field of expiry is no change of the records, but for those that it ends.
	set("a", "jane", now.Add(-time.Hour), later)
	set("b", "jane", now.Add(30*time.Minute), later)
	d.Exec(t, `SELECT pgbroker.set_expiry('session.Session', 'accessed_at')`)
	d.Exec(t, `UPDATE pgbroker.records r SET index_fields = r.index_fields, expires_at = pgbroker.parse_time(r.data ->> 'accessed_at')`)
	expect("another field", "shortened sql session.Session a jane "+iso(now.Add(-time.Hour))+" m 1")
}

// TestAuditNamesWhoAsked: each line of a request has the key that signed it and the person that its sender names, also where
// requests of several share a batch.
func TestAuditNamesWhoAsked(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	keys := map[string]auth.Key{"support": auth.NewKey(), "robot": auth.NewKey()}
	r := servertest.Start(t, d.ConnString, servertest.Options{Configure: func(c *server.Config) {
		quiet(c)
		for name, key := range keys {
			c.Auth.Keys = append(c.Auth.Keys, auth.NamedKey{Name: name, Secret: key.Secret(), Access: auth.AccessAdmin})
		}
	}})
	now := time.Now()
	var want []string
	var calls []func() error
	for i := range 60 {
		id := fmt.Sprintf("s-%02d", i)
		put(t, r, record(t, "", id, aSession(id, "jane", "okta", now, now, now.Add(time.Hour))))
		name, client := "shared-secret", r.DataBrokerServiceClient
		if i%3 > 0 {
			name = []string{"support", "robot"}[i%3-1]
			client = databroker.NewDataBrokerServiceClient(servertest.Dial(t, r.Address, keys[name].Secret()))
		}
		person := ""
		if i%2 == 0 {
			person = fmt.Sprintf("Jürgen %d", i)
		}
		ctx, err := auth.OnBehalfOf(t.Context(), person)
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, strings.TrimSpace(strings.Join([]string{"request", id, name, person}, " ")))
		calls = append(calls, func() error {
			_, err := client.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{deletion(sessionType, id)}})
			return err
		})
	}
	var group errgroup.Group
	for _, call := range calls {
		group.Go(call)
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	got := column[string](t, d, `SELECT concat_ws(' ', cause, id, key, on_behalf_of) FROM pgbroker.revocations ORDER BY id`)
	if !slices.Equal(got, want) {
		t.Errorf("the audit has\n%q, want\n%q", got, want)
	}
	put(t, r, record(t, "", "last", aSession("last", "jane", "okta", now, now, now.Add(time.Hour))))
	ctx, err := auth.OnBehalfOf(t.Context(), "helen")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Clear(ctx, new(emptypb.Empty)); err != nil {
		t.Fatal(err)
	}
	if got := value[string](t, d, `SELECT concat_ws(' ', cause, key, on_behalf_of) FROM pgbroker.revocations WHERE cause = 'clear'`); got != "clear shared-secret helen" {
		t.Errorf("Clear: the audit has %q", got)
	}
	if waits := value[int](t, d, `SELECT count(*) FROM pgbroker.audit WHERE key IS NULL`); waits != 0 {
		t.Errorf("%d lines name no key", waits)
	}
}

// TestAuditCausesAreTheOwnersToGive: neither names, nor settings, nor functions that may be called have a line say anything but
// sql, and the role of the replicas can change no line and remove none that is not old.
func TestAuditCausesAreTheOwnersToGive(t *testing.T) {
	t.Parallel()
	g := newGuarded(t)
	g.Exec(t, `DELETE FROM pgbroker.records; TRUNCATE pgbroker.audit`)
	g.Exec(t, "CREATE SCHEMA evil; GRANT ALL ON SCHEMA evil TO PUBLIC")
	const denied = pgerrcode.InsufficientPrivilege
	r := servertest.Start(t, g.ConnString, servertest.Options{Configure: quiet})
	now := time.Now()
	n := 0
	newSession := func() string {
		n++
		id := fmt.Sprint("s", n)
		put(t, r, record(t, "", id, aSession(id, "jane", "okta", now, now, now.Add(time.Hour))))
		return id
	}
	forge := func(v *visitor, table string) {
		v.try(`SET application_name = 'write_records('`)
		for _, name := range []string{"expire_records", "end_records", "write_records", "end_idle_records", "evict_records"} {
			sql := `DELETE FROM pgbroker.` + table + ` WHERE id = '` + newSession() + `'`
			v.expect(t, "", `DO $$ BEGIN /* `+name+`( PL/pgSQL function pgbroker.`+name+`( */ `+sql+`; END $$`)
			sql = `DELETE FROM pgbroker.` + table + ` WHERE id = '` + newSession() + `'`
			v.expect(t, "", `CREATE FUNCTION pg_temp.`+name+`() RETURNS void LANGUAGE plpgsql AS $f$ BEGIN `+sql+`; END $f$`,
				`SELECT pg_temp.`+name+`()`, `DROP FUNCTION pg_temp.`+name+`()`)
		}
		v.expect(t, "", `SELECT pgbroker.revoke_session('`+newSession()+`')`)
	}
	forge(g.visit(t, g.revoker), "sessions")
	forge(g.visit(t, g.writer), "records")
	server := g.visit(t, g.server)
	forge(server, "records")
	if got := column[string](t, g.Database, `SELECT DISTINCT cause FROM pgbroker.audit`); !slices.Equal(got, []string{"sql"}) {
		t.Errorf("causes %q, want sql alone", got)
	}
	if got := value[int](t, g.Database, `SELECT count(*) FROM pgbroker.audit`); got != n {
		t.Errorf("%d lines of %d sessions", got, n)
	}
	if left := value[int](t, g.Database, `SELECT count(*) FROM pgbroker.sessions`); left != 0 {
		t.Errorf("%d sessions are left", left)
	}

	id := newSession()
	version := fmt.Sprintf(`ARRAY(SELECT version FROM pgbroker.records WHERE id = '%s')`, id)
	server.expect(t, "", `SELECT pgbroker.end_idle_records('`+sessionType+`', '{`+id+`}', `+version+`)`,
		`SELECT pgbroker.end_excess_records('`+sessionType+`', '{`+id+`}', `+version+`)`, `SELECT pgbroker.expire_records(100)`,
		`SELECT pgbroker.expire_by_ttl('`+sessionType+`', 100)`)
	if !value[bool](t, g.Database, `SELECT EXISTS (SELECT FROM pgbroker.sessions WHERE id = $1)`, id) {
		t.Error("a session that was not due has ended")
	}
	for _, v := range []*visitor{server, g.visit(t, g.writer), g.visit(t, g.revoker), g.visit(t, g.reader)} {
		v.expect(t, denied,
			`SELECT pgbroker.end_records('idle', '{t}', '{i}', '{1}')`, `SELECT pgbroker.evict_records('{t}')`,
			`SELECT pgbroker.name_requests(0, '{t}', '{i}', '{0}', '{k}', '{p}')`,
			`INSERT INTO pgbroker.audit (cause, type) VALUES ('request', 't')`, `UPDATE pgbroker.audit SET cause = 'expiry'`,
			`DELETE FROM pgbroker.audit`, `DELETE FROM pgbroker.revocations`, `TRUNCATE pgbroker.audit`,
			`UPDATE pgbroker.record_types SET audited = false`, `SELECT pgbroker.set_audited('session.Session', false)`,
			`INSERT INTO pgbroker.record_types (type, audited) VALUES ('t', false) ON CONFLICT (type) DO UPDATE SET audited = false`,
			`UPDATE pgbroker.record_types SET type = 'hidden' WHERE type = '`+sessionType+`'`,
			`UPDATE pgbroker.record_types SET purged_version = 1e15`,
			`INSERT INTO pgbroker.record_types (type, purged_version) VALUES ('t', 1)`,
			`DELETE FROM pgbroker.record_types`, `DELETE FROM pgbroker.changes`, `SELECT setval('pgbroker.audit_number_seq', 1)`,
			`CREATE TRIGGER t AFTER DELETE ON pgbroker.records FOR EACH ROW EXECUTE FUNCTION pgbroker.audit_update()`)
	}
	// Nor can it move the versions.
	server.expect(t, denied, `SELECT setval('pgbroker.record_version', 1)`, `UPDATE pgbroker.state SET options_version = 9223372036854775807`,
		`UPDATE pgbroker.record_types SET index_version = 9223372036854775807`,
		`INSERT INTO pgbroker.record_types (type, index_version) VALUES ('t', 9223372036854775807)`, `SELECT pgbroker.begin_epoch()`, `UPDATE pgbroker.state SET base_version = 1`,
		`UPDATE pgbroker.state SET timeline = 1`, `INSERT INTO pgbroker.epochs (first_version, last_version, system_identifier, timeline) VALUES (1, 1, 1, 1)`)
	server.expect(t, pgerrcode.InvalidParameterValue, `SELECT pgbroker.purge_audit(1000, '23 hours')`, `SELECT pgbroker.purge_audit(1000, '-1 day')`,
		`SELECT pgbroker.purge_audit(1000, NULL)`)
	server.expect(t, "", `SELECT pgbroker.purge_audit(1000, '1 day')`)
	if got := value[int](t, g.Database, `SELECT count(*) FROM pgbroker.audit`); got != n-1 {
		t.Errorf("%d lines are left of %d", got, n-1)
	}
}
