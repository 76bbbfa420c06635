package people

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server/servertest"
)

// settings that a session can change for itself, and that somebody might take for switches.
var settings = []string{
	`SET pgbroker.writer = 'projector'`, `SET pgbroker.writer = 'replica'`, `SET pgbroker.projected = '2'`,
	`SET row_security = off`, `SET transform_null_equals = on`, `SET check_function_bodies = off`, `SET plpgsql.extra_errors = 'none'`,
	`SET search_path = evil, pg_catalog`, `SET search_path = pg_temp, evil, pgbroker, pg_catalog`, `SET enable_indexscan = off`,
	`SET role = NONE`, `SET application_name = 'expire_records('`,
}

// TestNothingThatASessionSetsTurnsACheckOff: whatever a writer, or the owner, sets, data that it changes get a version, a place in
// the change log, an expiry and a payload.
func TestNothingThatASessionSetsTurnsACheckOff(t *testing.T) {
	t.Parallel()
	g := newGuarded(t)
	writer := g.visit(t, g.writer)
	owner := &visitor{Conn: g.Connect(t)}
	const row = `type OPERATOR(pg_catalog.=) 'type.googleapis.com/session.Session' AND id OPERATOR(pg_catalog.=) 'an id'`
	owner.expect(t, "", `CREATE SCHEMA evil`)
	type state struct {
		version, logged int64
		expires         time.Time
		payload         []byte
	}
	look := func() (s state) {
		t.Helper()
		err := g.Pool.QueryRow(t.Context(), `SELECT r.version, c.version, r.expires_at, r.payload FROM pgbroker.records r
			JOIN pgbroker.changes c USING (type, id) WHERE `+row).Scan(&s.version, &s.logged, &s.expires, &s.payload)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	n := 0
	for _, v := range []*visitor{writer, owner} {
		for _, setting := range settings {
			n++
			before := look()
			expires := time.Date(2040, 1, 1, 0, 0, n, 0, time.UTC)
			edit := fmt.Sprintf(`UPDATE pgbroker.records SET data = data OPERATOR(pg_catalog.||) '{"user_id": "user-%d", "expires_at": %q}' WHERE %s`,
				n, expires.Format(time.RFC3339), row)
			v.expect(t, "", setting, edit, `RESET ALL`)
			after := look()
			if after.version <= before.version || after.logged != after.version || !after.expires.Equal(expires) {
				t.Errorf("%s: from version %d to %d, %d in the change log, expires %v", setting, before.version, after.version, after.logged, after.expires)
			}
			var packed anypb.Any
			var s session.Session
			if err := proto.Unmarshal(after.payload, &packed); err != nil {
				t.Fatal(err)
			}
			if err := packed.UnmarshalTo(&s); err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("user-%d", n); s.UserId != want || s.GetOauthToken().GetAccessToken() != secretText {
				t.Errorf("%s: the payload has user %q and token %q, want %q and the token", setting, s.UserId, s.GetOauthToken().GetAccessToken(), want)
			}
		}
	}
	// Nor is there a statement that says it, for whoever has no right to.
	writer.expect(t, pgerrcode.InsufficientPrivilege,
		`UPDATE pgbroker.records SET projected = 2, data = '{}'`, `UPDATE pgbroker.records SET projected = 1, data = '{}'`,
		`INSERT INTO pgbroker.records (type, id, data, projected) VALUES ('t', 'i', '{}', 1)`,
		`INSERT INTO pgbroker.records (type, id) VALUES ('t', 'i') ON CONFLICT (type, id) DO UPDATE SET projected = 2`,
		`UPDATE pgbroker.records SET payload = 'x'`, `INSERT INTO pgbroker.records (type, id, payload) VALUES ('t', 'i', 'x')`,
		`UPDATE pgbroker.records SET index_cidr = '10.0.0.0/8'`, `UPDATE pgbroker.records SET expires_at = now()`,
		`SET session_replication_role = replica`, `ALTER TABLE pgbroker.records DISABLE TRIGGER USER`,
		`SELECT pgbroker.project_records('{t}', '{i}', '{1}', '{}', '{}', '{}')`, `SELECT pgbroker.put_search_texts('{t}', '{i}', '{x}')`,
		`SELECT pgbroker.write_records('{t}', '{i}', '{f}', '{x}', '{""}', '{""}', '{""}', '{0}', '{0}', '{}', '{}')`)
	// What was said counts for its statement: the next one is an edit again.
	owner.expect(t, "", `UPDATE pgbroker.records SET projected = 1, payload = payload, data = data WHERE `+row,
		`UPDATE pgbroker.records SET data = data || '{"user_id": "last"}' WHERE `+row)
	if after := look(); !bytes.Contains(after.payload, []byte("last")) {
		t.Error("an edit after a write that said it was none did not reach the payload")
	}
	if left := column[string](t, g.Database, `SELECT id FROM pgbroker.records WHERE projected <> 0`); len(left) > 0 {
		t.Errorf("marked for good: %v", left)
	}
}

// TestRelabellingGivesNothingBack: a message whose type is changed in data, at any depth, begins from nothing, so that no secret
// of it is shown as a field of another message.
func TestRelabellingGivesNothingBack(t *testing.T) {
	t.Parallel()
	g := newGuarded(t)
	inner, err := anypb.New(aSession("s", "jane", "okta", time.Now(), time.Now(), time.Now().Add(time.Hour)))
	if err != nil {
		t.Fatal(err)
	}
	r := servertest.Start(t, g.ConnString, servertest.Options{Configure: quiet})
	v := g.visit(t, g.writer)
	edits := []string{
		// In oauth_token, a message, begins what is a string in the others.
		`'{"@type": "type.googleapis.com/google.protobuf.Any", "value": {"@type": "type.googleapis.com/user.User", "id": "s"}}'`,
		`data || '{"@type": "type.googleapis.com/user.User"}' - 'oauth_token' - 'id_token' - 'claims' - 'audience' - 'device_credentials'`,
		`'{"@type": "type.googleapis.com/user.User", "id": "s"}'`, `'{"@type": "evil.example.com/session.Session", "id": "s"}'`,
		`'{"@type": "type.googleapis.com/google.protobuf.Struct", "value": {}}'`, `'{"@type": "type.googleapis.com/session.OAuthToken"}'`,
	}
	for i, edit := range edits {
		for depth, setting := range settings[:4] {
			id := fmt.Sprintf("%d-%d", i, depth)
			wrapped, wrapErr := anypb.New(inner)
			if wrapErr != nil {
				t.Fatal(wrapErr)
			}
			put(t, r, &databroker.Record{Type: "example.com/Wrapped", Id: id, Data: wrapped}, &databroker.Record{Type: "example.com/Plain", Id: id, Data: inner})
			// Twice: under a setting, and then without, with another change. Some of these are refused, which is as good.
			v.try(setting)
			v.try(`UPDATE pgbroker.records SET data = ` + edit + ` WHERE type IN ('example.com/Wrapped', 'example.com/Plain') AND id = '` + id + `'`)
			v.try(`RESET ALL`)
			v.try(`UPDATE pgbroker.records SET data = data || '{"name": "x"}' WHERE type IN ('example.com/Wrapped', 'example.com/Plain') AND id = '` + id + `'`)
		}
	}
	shown := column[string](t, g.Database, `SELECT id || ' ' || type || ' ' || data::text FROM pgbroker.records
		WHERE type LIKE 'example.com/%' AND position($1::bytea IN payload) > 0
		  AND coalesce(data #>> '{value,@type}', data ->> '@type', 'type.googleapis.com/session.Session') <> 'type.googleapis.com/session.Session'`, []byte(secretText))
	if len(shown) > 0 {
		t.Errorf("tokens under another type:\n%s", strings.Join(shown, "\n"))
	}
	relabelled := value[int](t, g.Database, `SELECT count(*) FROM pgbroker.records WHERE type LIKE 'example.com/%' AND position($1::bytea IN payload) = 0`, []byte(secretText))
	if relabelled < len(edits) {
		t.Errorf("%d records were relabelled, want %d at least", relabelled, len(edits))
	}
	v.expect(t, "", `SELECT data::text FROM pgbroker.records`)
	v.checkHeard(t, secretText)
}

// inFull are functions that name everything in full, and every operator, because setting a search path would take as long as
// they do: TestNobodysSchemaIsInThePath holds them to it.
var inFull = []string{"server_timeline", "current_timeline", "lock_order", "parse_time", "index_terms", "stamp_record"}

// TestFunctionsHaveAFixedSearchPath: nobody chooses what our functions call. Those in SQL are bound when they are created.
func TestFunctionsHaveAFixedSearchPath(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	free := column[string](t, d, `
		SELECT p.oid::regprocedure::text FROM pg_proc p
		WHERE p.pronamespace = 'pgbroker'::regnamespace AND p.prosqlbody IS NULL
		  AND NOT EXISTS (SELECT FROM unnest(p.proconfig) AS c WHERE c ~ '^search_path=pg_catalog, pg_temp$')
		  AND (p.prosecdef OR p.proname <> ALL ($1))
		  -- The encoder, some steps of which run for each element of a list. It reads and computes, as whoever calls it, and is
		  -- called by functions whose path is fixed.
		  AND NOT (p.provolatile <> 'v' AND NOT p.prosecdef AND p.proname ~ '^(wire|encode|json|show|map|as|varint|list)_'
		    OR p.proname = 'refuse_value')
		ORDER BY 1`, inFull)
	if len(free) > 0 {
		t.Errorf("these look names up wherever their caller says; let them SET search_path = pg_catalog, pg_temp: %v", free)
	}
	open := column[string](t, d, `SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'pgbroker'::regnamespace
		AND prosecdef AND has_function_privilege('public', oid, 'EXECUTE')`)
	if len(open) > 0 {
		t.Errorf("these run as the owner, for everybody: %v", open)
	}
}

// hijack fills a schema with functions, operators and types that are called like those of PostgreSQL and fail when they are used.
const hijack = `
	CREATE SCHEMA hijacked;
	GRANT USAGE ON SCHEMA hijacked TO PUBLIC;
	DO $do$
	DECLARE
		one record;
		n   integer := 0;
	BEGIN
		FOR one IN
			SELECT o.oprname, o.oprleft::regtype AS l, o.oprright::regtype AS r, o.oprresult::regtype AS result
			FROM pg_operator o
			WHERE o.oprnamespace = 'pg_catalog'::regnamespace AND o.oprleft <> 0
			  AND (o.oprleft::regtype::text || ' ' || o.oprright::regtype::text) ~
			    '^(text|text\[\]|jsonb|bigint|integer|smallint|numeric|boolean|bytea|timestamp with time zone|timestamp without time zone|interval|inet|name|oid|anyarray|anycompatiblearray|anyelement|anynonarray|anycompatible|double precision|bit) '
		LOOP
			n := n + 1;
			BEGIN
				EXECUTE format('CREATE FUNCTION hijacked.o%s(%s, %s) RETURNS %s LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION ''hijacked: %s''; END $$', n, one.l, one.r, one.result, replace(one.oprname, '%', '%%'));
				EXECUTE format('CREATE OPERATOR hijacked.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = hijacked.o%s)', one.oprname, one.l, one.r, n);
			EXCEPTION WHEN OTHERS THEN
				NULL; -- one that cannot be made cannot be used either
			END;
		END LOOP;
		FOR one IN
			SELECT DISTINCT p.proname, pg_get_function_identity_arguments(p.oid) AS arguments, pg_get_function_result(p.oid) AS result
			FROM pg_proc p
			WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind IN ('f') AND p.provariadic = 0
			  AND EXISTS (SELECT FROM pg_proc o WHERE o.pronamespace = 'pgbroker'::regnamespace AND o.prosrc ~ ('\m' || p.proname || '\s*\('))
		LOOP
			BEGIN
				EXECUTE format('CREATE FUNCTION hijacked.%I(%s) RETURNS %s LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION ''hijacked: %s''; END $$', one.proname, one.arguments, one.result, one.proname);
			EXCEPTION WHEN OTHERS THEN
				NULL;
			END;
		END LOOP;
		CREATE FUNCTION hijacked.refuse(text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'hijacked: a type'; END $$;
		FOR one IN SELECT unnest('{text,jsonb,timestamptz,bytea,inet,regclass,name}'::text[]) AS type LOOP
			EXECUTE format('CREATE DOMAIN hijacked.%I AS pg_catalog.%I CHECK (hijacked.refuse(''''))', one.type, one.type);
		END LOOP;
	END
	$do$`

// TestNobodysSchemaIsInThePath: with a schema before pg_catalog that has an operator, a function and a type for all that ours
// use, whatever anybody does calls none of them: a superuser neither.
func TestNobodysSchemaIsInThePath(t *testing.T) {
	t.Parallel()
	g := newGuarded(t)
	g.Exec(t, hijack)
	if n := value[int](t, g.Database, `SELECT count(*) FROM pg_operator WHERE oprnamespace = 'hijacked'::regnamespace`); n < 300 {
		t.Fatalf("%d operators were made", n)
	}
	g.Exec(t, `SELECT pgbroker.set_expiry('t', 'ends')`)
	g.Exec(t, `UPDATE pgbroker.record_types SET indexable_fields = '{a,n}' WHERE type = 't'`)
	const data = `{"a": "x", "n": 1.50, "ends": "2040-01-01T00:00:00Z", "$index": {"cidr": "10.0.0.0/8"}}`
	const is = ` WHERE type OPERATOR(pg_catalog.=) 't'`
	write := []string{
		`INSERT INTO pgbroker.records (type, id, data) VALUES ('t', 'i', '` + data + `')`, `UPDATE pgbroker.records SET data = '{"a": "y"}'` + is,
		`INSERT INTO pgbroker.records (type, id, data) VALUES ('t', 'i', '` + data + `') ON CONFLICT (type, id) DO UPDATE SET data = excluded.data`,
		`DELETE FROM pgbroker.records` + is,
		`UPDATE pgbroker.records SET data = data WHERE id OPERATOR(pg_catalog.=) 'an id'`,
		`DELETE FROM pgbroker.session_bindings`,
	}
	revoke := []string{`SELECT pgbroker.revoke_session('x')`, `SELECT pgbroker.revoke_user_sessions('x')`, `SELECT pgbroker.revoke_idp_sessions('x')`}
	var read []string
	for _, view := range g.views {
		read = append(read, "SELECT * FROM pgbroker."+view)
	}
	replica := []string{
		`SELECT pgbroker.write_records('{t,t}', '{i,k}', '{f,f}', '{x,y}', '{"{}","{}"}', '{a,b}', '{"",""}', '{0,1}', '{0,0}', '{}', '{}')`,
		`SELECT pgbroker.write_records('{t,t}', '{i,k}', '{f,t}', '{x,y}', '{"{}","{}"}', '{a,b}', '{"",""}', '{0,1}', '{0,0}', '{}', '{}')`,
		`SELECT pgbroker.write_records('{type.googleapis.com/session.Session}', '{an id}', '{t}', '{x}', '{""}', '{""}', '{""}', '{0}', '{0}', '{k}', '{p}')`,
		`SELECT pgbroker.project_records('{t}', '{i}', ARRAY(SELECT version FROM pgbroker.records` + is + `), '{"{}"}', '{x}', '{""}')`,
		`SELECT pgbroker.stage_records('{"x": {"a": 1}}')`, `SELECT pgbroker.replace_records('t')`,
		`SELECT pgbroker.expire_records(10)`, `SELECT pgbroker.expire_by_ttl('t', 10)`, `SELECT pgbroker.end_idle_records('t', '{i}', '{1}')`,
		`SELECT pgbroker.end_excess_records('t', '{i}', '{1}')`, `SELECT pgbroker.purge_audit(10, '30 days')`,
		`SELECT pgbroker.settle_epoch()`, `SELECT pgbroker.set_user_limit('t', 1)`, `SELECT pgbroker.set_idle_timeout('t', '1 hour')`,
		`INSERT INTO pgbroker.services (kind, endpoint, expires_at) VALUES (1, 'x', '2040-01-01')`,
		`SELECT pgbroker.view_definition('t')`, `SELECT pgbroker.clear_records('', '')`,
	}
	owner := []string{
		`SELECT pgbroker.grants('r', 'w', 's', 'v')`, `SELECT pgbroker.set_audited('t', true)`,
		`INSERT INTO pgbroker.redacted_fields (message, field) VALUES ('session.Session', 'audience')`, `SELECT pgbroker.begin_epoch()`,
		`TRUNCATE pgbroker.records`,
	}
	for _, test := range []struct {
		v     *visitor
		calls [][]string
	}{
		{g.visit(t, g.reader), [][]string{read}},
		{g.visit(t, g.revoker), [][]string{read, revoke, {`DELETE FROM pgbroker.identity_bindings`}}},
		{g.visit(t, g.writer), [][]string{read, write, revoke}},
		{g.visit(t, g.server), [][]string{read, replica[:len(replica)-1], write[:len(write)-1]}},
		{&visitor{Conn: g.Admin(t)}, [][]string{read, write, revoke, replica, owner}},
	} {
		for _, path := range []string{"hijacked, pg_catalog", "pg_temp, hijacked, pgbroker, pg_catalog"} {
			test.v.expect(t, "", `SET search_path = `+path)
			for _, sql := range slices.Concat(test.calls...) {
				before := test.v.heard.Len()
				code := test.v.try(sql)
				if heard := test.v.heard.String()[before:]; code != "" && code != pgerrcode.UniqueViolation && code != pgerrcode.NoDataFound || strings.Contains(heard, "hijacked") {
					t.Errorf("%s\nended with %q: %s", sql, code, heard)
				}
			}
			test.v.expect(t, "", `RESET search_path`)
		}
	}
}

// TestTimesAreFinite: no feed has to compute with infinity, whoever writes.
func TestTimesAreFinite(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	v := &visitor{Conn: d.Connect(t)}
	v.expect(t, "", `INSERT INTO pgbroker.records (type, id, modified_at) VALUES ('t', 'i', 'infinity')`,
		`UPDATE pgbroker.records SET modified_at = 'infinity'`)
	if !value[bool](t, d, `SELECT isfinite(modified_at) FROM pgbroker.records`) {
		t.Error("modified_at is infinite")
	}
	v.expect(t, pgerrcode.CheckViolation, `INSERT INTO pgbroker.changes VALUES (7, 't', 'i', 'infinity', false)`,
		`UPDATE pgbroker.records SET expires_at = 'infinity'`)
}

// TestGrantsPassNoWholeRow: a view that names a whole row of what has a secret is for no reader, even where its dependencies do
// not say so.
func TestGrantsPassNoWholeRow(t *testing.T) {
	t.Parallel()
	g := newGuarded(t)
	secret := map[string]string{
		"whole":         `SELECT to_jsonb(r) AS j FROM pgbroker.records r`,
		"whole_and_id":  `SELECT r.id, to_jsonb(r) AS j FROM pgbroker.records r WHERE r.type <> ''`,
		"whole_text":    `SELECT r::text AS j FROM pgbroker.records r`,
		"whole_join":    `SELECT to_jsonb(j) AS j FROM (pgbroker.records r JOIN pgbroker.record_types t USING (type)) AS j`,
		"whole_sub":     `SELECT (SELECT to_jsonb(r) FROM pgbroker.records r LIMIT 1) AS j`,
		"whole_in":      `SELECT to_jsonb(s) AS j FROM (SELECT * FROM pgbroker.records) s`,
		"whole_lateral": `SELECT x.j FROM pgbroker.records r, LATERAL (SELECT to_jsonb(r) AS j) x`,
		"whole_order":   `SELECT r.id FROM pgbroker.records r ORDER BY r`,
		"over_whole":    `SELECT w.j ->> 'payload' AS p FROM pgbroker.whole w`,
		"lease":         `SELECT l::text AS j FROM pgbroker.leases l`,
		"payload":       `SELECT r.id, length(r.payload) FROM pgbroker.records r`,
	}
	names := slices.Sorted(func(yield func(string) bool) {
		for name := range secret {
			if !yield(name) {
				return
			}
		}
	})
	slices.SortStableFunc(names, func(a, b string) int { return strings.Compare(a[:1], b[:1]) })
	for _, name := range append([]string{"whole"}, names...) {
		g.Exec(t, `CREATE OR REPLACE VIEW pgbroker.`+name+` AS `+secret[name])
	}
	g.Exec(t, `CREATE VIEW pgbroker.harmless AS SELECT count(*) AS n, max(r.version) AS latest FROM pgbroker.records r`)
	g.Exec(t, strings.Join(column[string](t, g.Database, `SELECT pgbroker.grants($1, $2, NULL, $3)`, g.reader, g.writer, g.revoker), "\n"))
	for _, role := range []string{g.reader, g.writer, g.revoker} {
		for _, name := range names {
			if value[bool](t, g.Database, `SELECT has_table_privilege($1, 'pgbroker.' || $2::text, 'SELECT')`, role, name) {
				t.Errorf("%s may read %s: %s", role, name, secret[name])
			}
		}
		if !value[bool](t, g.Database, `SELECT has_table_privilege($1, 'pgbroker.harmless', 'SELECT')`, role) {
			t.Errorf("%s may not read a view without secrets", role)
		}
	}
}

// TestRevoker: the role of the help desk looks and ends sessions, and does nothing else.
func TestRevoker(t *testing.T) {
	t.Parallel()
	whateverPublicMay(t, revokerEndsSessions)
}

func revokerEndsSessions(t *testing.T, g guarded) {
	g.AdminExec(t, "CREATE SCHEMA evil AUTHORIZATION "+pgx.Identifier{g.revoker}.Sanitize())
	v := g.visit(t, g.revoker)
	const denied = pgerrcode.InsufficientPrivilege
	for _, view := range g.views {
		v.expect(t, "", "SELECT * FROM pgbroker."+view)
	}
	for _, table := range column[string](t, g.Database, `SELECT relname FROM pg_class WHERE relnamespace = 'pgbroker'::regnamespace AND relkind = 'r'`) {
		v.expect(t, denied, "SELECT FROM pgbroker."+table, "DELETE FROM pgbroker."+table, "TRUNCATE pgbroker."+table,
			"INSERT INTO pgbroker."+table+" DEFAULT VALUES")
	}
	may := []string{"session_data", "sessions", "session_bindings", "identity_bindings", "device_enrollments", "device_credentials", "mcp_refresh_tokens", "service_accounts"}
	for _, view := range g.views {
		if !slices.Contains(may, view) {
			if code := v.try("DELETE FROM pgbroker." + view); code != denied && code != pgerrcode.ObjectNotInPrerequisiteState {
				t.Errorf("DELETE FROM pgbroker.%s ended with %q", view, code)
			}
		}
		for _, sql := range []string{"INSERT INTO pgbroker.%s DEFAULT VALUES", "TRUNCATE pgbroker.%s"} {
			if code := v.try(fmt.Sprintf(sql, view)); code == "" {
				t.Errorf(sql+" was done", view)
			}
		}
	}
	v.expect(t, denied, `UPDATE pgbroker.sessions SET id = 'x'`, `UPDATE pgbroker.directory_groups SET id = 'x'`,
		`SELECT pgbroker.write_records('{t}', '{i}', '{t}', '{x}', '{""}', '{""}', '{""}', '{0}', '{0}', '{}', '{}')`,
		`SELECT pgbroker.end_records('idle', '{t}', '{i}', '{1}')`, `SELECT pgbroker.expire_records(1)`, `SELECT pgbroker.clear_records('', '')`,
		`SELECT pgbroker.purge_audit(1, '2 days')`, `SELECT pgbroker.set_audited('session.Session', false)`, `SELECT nextval('pgbroker.record_version')`,
		`SELECT pgbroker.stage_records(); SELECT pgbroker.replace_records('user.User', NULL, true)`)
	// A leaky function in the condition of a DELETE sees what the view shows.
	v.expect(t, "", `CREATE FUNCTION evil.tell(anyelement) RETURNS boolean COST 0.0000001 LANGUAGE plpgsql AS $$ BEGIN RAISE NOTICE '%', $1; RETURN false; END $$`)
	for _, view := range may {
		v.expect(t, "", `DELETE FROM pgbroker.`+view+` v WHERE evil.tell(v)`, `DELETE FROM pgbroker.`+view+` v WHERE evil.tell(v.id) RETURNING *`)
	}
	// A view of its own, with the rights of whoever reads it, a prepared statement and a cursor give it nothing more.
	v.expect(t, "", `CREATE VIEW evil.mine WITH (security_invoker) AS SELECT payload FROM pgbroker.records`)
	v.expect(t, denied, `SELECT * FROM evil.mine`, `PREPARE p AS SELECT payload FROM pgbroker.records; EXECUTE p`,
		`BEGIN; DECLARE c CURSOR FOR SELECT payload FROM pgbroker.records; FETCH c; COMMIT`)
	v.try(`ROLLBACK`)
	v.expect(t, "", `ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO PUBLIC`)

	users := value[int](t, g.Database, `SELECT count(*) FROM pgbroker.users`)
	v.expect(t, "", `SELECT pgbroker.revoke_session('an id')`, `SELECT pgbroker.revoke_user_sessions('jane')`, `SELECT pgbroker.revoke_idp_sessions('okta')`)
	for _, view := range may {
		v.expect(t, "", "DELETE FROM pgbroker."+view)
		if n := value[int](t, g.Database, "SELECT count(*) FROM pgbroker."+view); n != 0 {
			t.Errorf("%d rows of %s are left", n, view)
		}
	}
	if value[int](t, g.Database, `SELECT count(*) FROM pgbroker.users`) != users || value[int](t, g.Database, `SELECT count(*) FROM pgbroker.records WHERE type = 'example.com/Foreign'`) != 50 {
		t.Error("records of other types are gone")
	}
	who := column[string](t, g.Database, `SELECT DISTINCT by_role || ' ' || cause FROM pgbroker.revocations WHERE cause <> 'request'`)
	if want := []string{g.revoker + " sql"}; !slices.Equal(who, want) {
		t.Errorf("the audit names %q, want %q", who, want)
	}
	v.checkHeard(t, secretText, foreignText)
}

// TestWhoMayLockTables holds what docs/security.md says of it: PostgreSQL lets whoever may delete from a view lock the table behind
// it, so that this remains; whoever may only read, or revoke by function, cannot.
func TestWhoMayLockTables(t *testing.T) {
	t.Parallel()
	g := newGuarded(t)
	may := func(role, table string) bool {
		v := g.visit(t, role)
		v.expect(t, "", `BEGIN`)
		code := v.try(`LOCK TABLE pgbroker.` + table + ` IN ACCESS EXCLUSIVE MODE NOWAIT`)
		_, err := v.Exec(context.Background(), `ROLLBACK`)
		if err != nil {
			t.Fatal(err)
		}
		return code == ""
	}
	for _, test := range []struct {
		role, table string
		want        bool
	}{
		{g.reader, "records", false}, {g.reader, "sessions", false}, {g.reader, "changes", false},
		{g.revoker, "records", false}, {g.revoker, "changes", false}, {g.revoker, "sessions", true}, {g.revoker, "users", false},
		{g.writer, "records", true}, {g.writer, "changes", false}, {g.writer, "record_types", false},
		{g.server, "records", true}, {g.server, "changes", false}, {g.server, "record_types", false}, {g.server, "audit", false},
	} {
		if got := may(test.role, test.table); got != test.want {
			t.Errorf("%s may lock %s: %v, want %v", test.role, test.table, got, test.want)
		}
	}
	// What an operator can do about it.
	g.Exec(t, `REVOKE DELETE ON ALL TABLES IN SCHEMA pgbroker FROM `+pgx.Identifier{g.revoker}.Sanitize())
	if may(g.revoker, "sessions") {
		t.Error("without DELETE the revoker may lock sessions")
	}
	g.visit(t, g.revoker).expect(t, "", `SELECT pgbroker.revoke_session('an id')`)
}
