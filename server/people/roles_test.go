package people

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/registry"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// foreignText is in records of a type of nobody's business, under the names of fields that views show.
const foreignText = "f0reign-text"

// A guarded database has records of every known type with secrets, and a role of each kind.
type guarded struct {
	*dbtest.Database
	reader, writer, server, revoker string
	views                           []string
}

// whateverPublicMay runs a test of roles where PUBLIC may what it usually may, and where it may nothing: roles need no more
// than their grants.
func whateverPublicMay(t *testing.T, test func(t *testing.T, g guarded)) {
	t.Helper()
	t.Run("usual", func(t *testing.T) {
		t.Parallel()
		test(t, newGuarded(t))
	})
	t.Run("nothing", func(t *testing.T) {
		t.Parallel()
		d := dbtest.New(t)
		d.Exec(t, "REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA pgbroker FROM PUBLIC; REVOKE ALL ON DATABASE "+d.Name+" FROM PUBLIC")
		test(t, guard(t, d))
	})
}

func newGuarded(t *testing.T) guarded {
	t.Helper()
	return guard(t, dbtest.New(t))
}

func guard(t *testing.T, d *dbtest.Database) guarded {
	t.Helper()
	// Names that have to be quoted.
	g := guarded{Database: d, reader: `Reader "` + d.Name + `"`, writer: `Writer; ` + d.Name, server: `Server'` + d.Name, revoker: "Revoker-" + d.Name}
	roles(t, d, g.reader, g.writer, g.server, g.revoker)
	r := servertest.Start(t, d.As(t, g.server), servertest.Options{Configure: quiet})
	for _, v := range typedViews(t) {
		put(t, r, v.record)
	}
	put(t, r, record(t, "", "gone", aSession("gone", "jane", "okta", time.Now(), time.Now(), time.Now())))
	put(t, r, deletion(sessionType, "gone"))
	if err := r.Stop(); err != nil { // and give its lease back
		t.Fatal(err)
	}
	d.Exec(t, `INSERT INTO pgbroker.leases (name, id, expires_at) VALUES ('job', $1, 'infinity')`, secretText)
	d.Exec(t, `INSERT INTO pgbroker.services (kind, endpoint, expires_at) VALUES (1, 'http://127.0.0.1', now() + interval '1 hour')`)
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data, payload)
		SELECT 'example.com/Foreign', 'foreign' || i, jsonb_object_agg(f, jsonb_build_object('email', jsonb_build_array($1::text), 'x', $1::text)), $1::text::bytea
		FROM unnest('{claims,audience,details,device_credentials,scopes,webauthn,group_ids,email,name,display_name,message,description}'::text[]) AS f,
		     generate_series(1, 50) AS i GROUP BY i`, foreignText)
	d.Exec(t, `ANALYZE`)
	g.views = column[string](t, d, `SELECT relname FROM pg_class WHERE relnamespace = 'pgbroker'::regnamespace AND relkind = 'v' ORDER BY 1`)
	return g
}

// A visitor is a connection of somebody curious: everything that comes back, results, notices and errors,
// is kept.
type visitor struct {
	*pgx.Conn
	heard strings.Builder
}

func (g guarded) visit(t *testing.T, role string) *visitor {
	t.Helper()
	v := new(visitor)
	cfg, err := pgx.ParseConfig(g.As(t, role))
	if err != nil {
		t.Fatal(err)
	}
	cfg.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { fmt.Fprintln(&v.heard, n.Message, n.Detail, n.Hint, n.Where) }
	if v.Conn, err = pgx.ConnectConfig(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = v.Close(context.Background()) })
	return v
}

// try runs a statement and returns its SQLSTATE, "" for success.
func (v *visitor) try(sql string) string {
	rows, err := v.Query(context.Background(), sql, pgx.QueryExecModeSimpleProtocol)
	if err == nil {
		for rows.Next() {
			for _, raw := range rows.RawValues() {
				v.heard.Write(raw)
				v.heard.WriteByte(' ')
			}
		}
		err = rows.Err()
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		fmt.Fprintln(&v.heard, pgErr.Message, pgErr.Detail, pgErr.Hint, pgErr.Where, pgErr.InternalQuery)
		return pgErr.Code
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

func (v *visitor) expect(t *testing.T, code string, statements ...string) {
	t.Helper()
	for _, sql := range statements {
		if got := v.try(sql); got != code {
			t.Errorf("%s\nended with %q, want %q", sql, got, code)
		}
	}
}

// checkHeard fails if a secret came back.
func (v *visitor) checkHeard(t *testing.T, texts ...string) {
	t.Helper()
	heard := v.heard.String()
	for _, text := range texts {
		for _, form := range []string{text, fmt.Sprintf("%x", text)} {
			if i := strings.Index(heard, form); i >= 0 {
				t.Errorf("%s came back: …%.300q", form, heard[max(0, i-200):])
			}
		}
	}
}

// TestReaderSeesNoSecret: the reader reads every view, and reaches no payload, no lease, and nothing of a
// type that no view is about, whatever it tries.
func TestReaderSeesNoSecret(t *testing.T) {
	t.Parallel()
	whateverPublicMay(t, readerSeesNoSecret)
}

func readerSeesNoSecret(t *testing.T, g guarded) {
	g.AdminExec(t, "CREATE SCHEMA evil AUTHORIZATION "+pgx.Identifier{g.reader}.Sanitize())
	v := g.visit(t, g.reader)

	for _, table := range []string{"records", "changes", "leases", "services", "record_types", "audit", "state", "epochs", "checkpoint", "schema_migrations"} {
		v.expect(t, pgerrcode.InsufficientPrivilege,
			"SELECT * FROM pgbroker."+table, "SELECT count(*) FROM pgbroker."+table, "EXPLAIN ANALYZE SELECT * FROM pgbroker."+table,
			"DELETE FROM pgbroker."+table, "COPY pgbroker."+table+" TO STDOUT", "TRUNCATE pgbroker."+table)
	}
	for _, view := range g.views {
		v.expect(t, "", "SELECT * FROM pgbroker."+view, "EXPLAIN (ANALYZE, VERBOSE) SELECT * FROM pgbroker."+view)
		// Of a joined view nobody can delete.
		if code := v.try("DELETE FROM pgbroker." + view); code != pgerrcode.InsufficientPrivilege && code != pgerrcode.ObjectNotInPrerequisiteState {
			t.Errorf("DELETE FROM pgbroker.%s ended with %q", view, code)
		}
	}
	v.expect(t, pgerrcode.InsufficientPrivilege,
		`SELECT pgbroker.revoke_session('an id')`, `SELECT pgbroker.revoke_user_sessions('jane')`, `SELECT pgbroker.revoke_idp_sessions('okta')`,
		`SELECT pgbroker.expire_records(1)`, `SELECT pgbroker.set_audited('session.Session', false)`, `SELECT pgbroker.lock_order()`,
		`SELECT nextval('pgbroker.record_version')`)

	// A function of its own, so cheap that the planner calls it first, on every column and row.
	v.expect(t, "",
		`CREATE FUNCTION evil.tell(anyelement) RETURNS boolean COST 0.0000001 LANGUAGE plpgsql AS $$ BEGIN RAISE NOTICE '%', $1; RETURN true; END $$`,
		`SET enable_indexscan = off`, `SET enable_bitmapscan = off`, `SET enable_indexonlyscan = off`)
	for _, view := range g.views {
		before := v.heard.Len()
		for _, name := range column[string](t, g.Database, `SELECT attname FROM pg_attribute
			WHERE attrelid = ('pgbroker.' || $1::text)::regclass AND attnum > 0`, view) {
			v.expect(t, "", fmt.Sprintf(`SELECT 1 FROM pgbroker.%s WHERE evil.tell(%s)`, view, name))
		}
		// The change log is about all types; of sessions and users, which are joined, an id may be compared before the type.
		if !slices.Contains([]string{"change_log", "sessions", "session_data", "session_details", "users", "directory_users", "directory_members"}, view) &&
			strings.Contains(v.heard.String()[before:], "foreign") {
			t.Errorf("%s calls a function with the id of another type's record", view)
		}
		if view == "blockers" { // it shows nobody: nobody is blocked
			continue
		}
		// Errors that quote what they are about.
		v.expect(t, pgerrcode.InvalidTextRepresentation, fmt.Sprintf(`SELECT (v::text)::integer FROM pgbroker.%s v`, view))
	}
	if !strings.Contains(v.heard.String(), "jane@example.com") {
		t.Error("the function was never told anything")
	}

	// What the planner knows.
	v.expect(t, "", `SELECT s::text FROM pg_stats s WHERE schemaname = 'pgbroker'`, `SELECT s::text FROM pg_stats_ext s`)
	v.expect(t, pgerrcode.InsufficientPrivilege, `SELECT * FROM pg_statistic`)
	v.checkHeard(t, secretText, foreignText)
}

// TestWriterReadsNoPayload: the writer revokes and writes, by view, table and function, and cannot read
// back what others have put into a payload, nor touch what the broker rests on.
func TestWriterReadsNoPayload(t *testing.T) {
	t.Parallel()
	whateverPublicMay(t, writerReadsNoPayload)
}

func writerReadsNoPayload(t *testing.T, g guarded) {
	g.AdminExec(t, "CREATE SCHEMA evil AUTHORIZATION "+pgx.Identifier{g.writer}.Sanitize())
	v := g.visit(t, g.writer)
	const denied = pgerrcode.InsufficientPrivilege

	v.expect(t, denied,
		`SELECT payload FROM pgbroker.records`, `SELECT * FROM pgbroker.records`, `SELECT r FROM pgbroker.records r`,
		`COPY pgbroker.records TO STDOUT`, `DELETE FROM pgbroker.records RETURNING payload`, `DELETE FROM pgbroker.records WHERE payload IS NOT NULL`,
		`UPDATE pgbroker.search_texts SET search_text = 'x'`, `SELECT search_text FROM pgbroker.search_texts`, `UPDATE pgbroker.records SET data = data RETURNING *`,
		`INSERT INTO pgbroker.records (type, id) VALUES ('t', 'i') ON CONFLICT (type, id) DO UPDATE SET data = to_jsonb(records.payload)`,
		`UPDATE pgbroker.records SET version = 7`, `UPDATE pgbroker.records SET id = NULL`, `UPDATE pgbroker.records SET type = 'x'`,
		`TRUNCATE pgbroker.records`, `LOCK TABLE pgbroker.records IN ACCESS EXCLUSIVE MODE; `+`TRUNCATE pgbroker.records`,
		`INSERT INTO pgbroker.changes VALUES (1, 't', 'i', now(), true)`, `DELETE FROM pgbroker.changes`, `UPDATE pgbroker.state SET server_version = 1`,
		`DELETE FROM pgbroker.audit`, `INSERT INTO pgbroker.audit (cause, type) VALUES ('sql', 't')`, `UPDATE pgbroker.record_types SET audited = false`,
		`SELECT setval('pgbroker.record_version', 1)`, `SELECT id FROM pgbroker.leases`, `DELETE FROM pgbroker.live_leases`, `DELETE FROM pgbroker.change_log`,
		`DELETE FROM pgbroker.versions`, `DELETE FROM pgbroker.revocations`,
		`CREATE TRIGGER t BEFORE UPDATE ON pgbroker.records FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()`)
	// What runs as the owner cannot be hung on another table.
	v.expect(t, "", `CREATE TABLE evil.t (version bigint, type text, id text, modified_at timestamptz, data jsonb)`)
	for _, function := range []string{"log_inserts", "log_updates", "log_deletes", "audit_deletes", "audit_clear", "forget_everything", "search_written", "take_order_lock"} {
		v.expect(t, denied, `CREATE TRIGGER t AFTER INSERT ON evil.t REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.`+function+`()`)
	}

	// Bulk loads compare with payloads: they are for the server's role.
	bulk := []string{`SELECT pgbroker.stage_records('{"jane": {"email": "new@example.com"}}')`, `SELECT pgbroker.replace_records('pomerium.io/DirectoryUser')`}
	g.Exec(t, "GRANT TEMPORARY ON DATABASE "+g.Name+" TO "+pgx.Identifier{g.writer}.Sanitize())
	v.expect(t, "", bulk[0])
	v.expect(t, denied, bulk[1])
	g.visit(t, g.server).expect(t, "", bulk...)

	// Versions are those of the sequence, whoever is first on the path.
	v.expect(t, "",
		`CREATE FUNCTION evil.nextval(regclass) RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint << 62'`,
		`CREATE FUNCTION evil.lock_order() RETURNS void LANGUAGE sql AS 'SELECT'`,
		`CREATE FUNCTION evil.pg_notify(text, text) RETURNS void LANGUAGE sql AS 'SELECT'`,
		`CREATE TABLE evil.new_rows (version bigint)`, `CREATE TABLE evil.old_rows (version bigint)`,
		`SET search_path = evil, pg_catalog`,
		`INSERT INTO pgbroker.records (type, id, data) VALUES ('t', 'written', '{}')`)
	if version := value[int64](t, g.Database, `SELECT max(version) FROM pgbroker.changes`); version >= 1<<32 {
		t.Errorf("the writer has made version %d", version)
	}
	v.expect(t, "", `RESET search_path`, `UPDATE pgbroker.records SET data = '{"a": 1}' WHERE id = 'written'`)
	v.expect(t, pgerrcode.UniqueViolation, `INSERT INTO pgbroker.records (type, id) SELECT type, id FROM pgbroker.records`)
	v.expect(t, pgerrcode.NotNullViolation, `INSERT INTO pgbroker.records (type) VALUES ('t')`)

	before := value[int](t, g.Database, `SELECT count(*) FROM pgbroker.audit`)
	for _, view := range g.views {
		v.expect(t, "", "SELECT * FROM pgbroker."+view)
	}
	v.expect(t, "", `SELECT pgbroker.revoke_session('an id')`, `SELECT pgbroker.revoke_user_sessions('jane')`, `SELECT pgbroker.revoke_idp_sessions('okta')`)
	for _, typed := range typedViews(t) {
		v.expect(t, "", "DELETE FROM pgbroker."+typed.view)
	}
	v.expect(t, "", `DELETE FROM pgbroker.records WHERE type = 'example.com/Foreign'`, `DELETE FROM pgbroker.records`)
	if n := value[int](t, g.Database, `SELECT count(*) FROM pgbroker.records`); n != 0 {
		t.Errorf("%d records are left", n)
	}
	// Of the seven types that are audited by default there was one record each.
	who := column[string](t, g.Database, `SELECT DISTINCT by_role FROM pgbroker.revocations WHERE cause = 'sql'`)
	if n := value[int](t, g.Database, `SELECT count(*) FROM pgbroker.audit`); n != before+7 || !slices.Contains(who, g.writer) {
		t.Errorf("%d deletions by %q are in the audit, want 7 by the writer", n-before, who)
	}
	v.checkHeard(t, secretText)
}

// TestServerRoleIsEnough: a replica answers every request and does all of its periodic work with what the
// grants give to its role, and that is not everything.
func TestServerRoleIsEnough(t *testing.T) {
	t.Parallel()
	whateverPublicMay(t, serverRoleIsEnough)
}

func serverRoleIsEnough(t *testing.T, g guarded) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var log logged
	r := startAs(t, g, &log)
	called := make(map[string]bool)
	call := func(method string, err error) {
		t.Helper()
		called[method] = true
		if err != nil {
			t.Errorf("%s: %v", method, err)
		}
	}
	info, err := r.ServerInfo(ctx, new(emptypb.Empty))
	call("databroker.DataBrokerService/ServerInfo", err)
	const thing = "example.com/Thing"
	aThing := record(t, thing, "1", object(t, map[string]any{"owner": "jane", "$index": map[string]any{"cidr": "10.0.0.0/8"}}))
	_, err = r.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{aThing, record(t, thing, "2", object(t, nil))}})
	call("databroker.DataBrokerService/Put", err)
	patch := record(t, "", "an id", aSession("an id", "jane", "okta", time.Now(), time.Now(), time.Now().Add(time.Hour)))
	_, err = r.Patch(ctx, &databroker.PatchRequest{Records: []*databroker.Record{patch}, FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"accessed_at"}}})
	call("databroker.DataBrokerService/Patch", err)
	_, err = r.Get(ctx, &databroker.GetRequest{Type: thing, Id: "1"})
	call("databroker.DataBrokerService/Get", err)
	_, err = r.ListTypes(ctx, new(emptypb.Empty))
	call("databroker.DataBrokerService/ListTypes", err)
	capacity := uint64(1)
	_, err = r.SetOptions(ctx, &databroker.SetOptionsRequest{Type: thing, Options: &databroker.Options{
		Capacity: &capacity, Ttl: durationpb.New(time.Microsecond), IndexableFields: []string{"owner", "user_id"},
	}})
	call("databroker.DataBrokerService/SetOptions", err)
	_, err = r.GetOptions(ctx, &databroker.GetOptionsRequest{Type: thing})
	call("databroker.DataBrokerService/GetOptions", err)
	for _, filter := range []map[string]any{nil, {"id": "1"}, {"owner": "jane"}, {"$index": "10.1.2.3"}, {"other": "x"}} {
		for _, recordType := range []string{thing, ""} {
			_, err = r.Query(ctx, &databroker.QueryRequest{Type: recordType, Filter: object(t, filter), Limit: 5})
			call("databroker.DataBrokerService/Query", err)
		}
	}
	_, err = r.Query(ctx, &databroker.QueryRequest{Type: thing, Query: "jane", Limit: 5})
	call("databroker.DataBrokerService/Query", err)
	latest, err := r.SyncLatest(ctx, new(databroker.SyncLatestRequest))
	for err == nil {
		_, err = latest.Recv()
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	call("databroker.DataBrokerService/SyncLatest", err)
	stream, err := r.Sync(ctx, &databroker.SyncRequest{ServerVersion: info.GetServerVersion(), RecordVersion: position(t, r).GetLatestRecordVersion()})
	if err == nil {
		put(t, r, aThing)
		_, err = stream.Recv()
	}
	call("databroker.DataBrokerService/Sync", err)
	lease, err := r.AcquireLease(ctx, &databroker.AcquireLeaseRequest{Name: "own", Duration: durationpb.New(time.Minute)})
	call("databroker.DataBrokerService/AcquireLease", err)
	_, err = r.RenewLease(ctx, &databroker.RenewLeaseRequest{Name: "own", Id: lease.GetId(), Duration: durationpb.New(time.Minute)})
	call("databroker.DataBrokerService/RenewLease", err)
	_, err = r.ReleaseLease(ctx, &databroker.ReleaseLeaseRequest{Name: "own", Id: lease.GetId()})
	call("databroker.DataBrokerService/ReleaseLease", err)
	_, err = r.Checkpoints.SetCheckpoint(ctx, &databroker.SetCheckpointRequest{Checkpoint: new(databroker.Checkpoint)})
	call("databroker.CheckpointService/SetCheckpoint", err)
	_, err = r.Checkpoints.GetCheckpoint(ctx, new(databroker.GetCheckpointRequest))
	call("databroker.CheckpointService/GetCheckpoint", err)
	_, err = r.Registry.Report(ctx, &registry.RegisterRequest{Services: []*registry.Service{{Kind: registry.ServiceKind_PROXY, Endpoint: "http://127.0.0.1"}}})
	call("registry.Registry/Report", err)
	_, err = r.Registry.List(ctx, new(registry.ListRequest))
	call("registry.Registry/List", err)
	watch, err := r.Registry.Watch(ctx, new(registry.ListRequest))
	if err == nil {
		_, err = watch.Recv()
	}
	call("registry.Registry/Watch", err)
	_, err = r.Health.Check(ctx, new(grpc_health_v1.HealthCheckRequest))
	call("grpc.health.v1.Health/Check", err)
	_, err = r.Health.List(ctx, new(grpc_health_v1.HealthListRequest))
	call("grpc.health.v1.Health/List", err)
	called["grpc.health.v1.Health/Watch"] = true // servertest has waited for it

	// A promotion: the epoch begins with the next write.
	g.Exec(t, `UPDATE pgbroker.state SET timeline = timeline - 1`)
	put(t, r, record(t, thing, "3", object(t, nil)))
	if n := value[int](t, g.Database, `SELECT count(*) FROM pgbroker.epochs`); n != 1 {
		t.Errorf("%d epochs have begun, want 1", n)
	}

	// The periodic work: whatever its jobs are, all of them succeed.
	g.Exec(t, `SELECT pgbroker.set_expiry($1, 'ends'), pgbroker.set_idle_timeout($1, '1 microsecond'), pgbroker.set_user_limit('session.Session', 1)`, thing)
	g.Exec(t, `UPDATE pgbroker.record_types SET ttl = NULL, capacity = NULL WHERE type = $1`, thing)
	g.Exec(t, `INSERT INTO pgbroker.leases (name, id, expires_at) VALUES ('old', 'x', now() - interval '2 days')`)
	g.Exec(t, `INSERT INTO pgbroker.services (kind, endpoint, expires_at) VALUES (1, 'old', now() - interval '2 days')`)
	g.Exec(t, `INSERT INTO pgbroker.audit (cause, type, at) VALUES ('sql', 't', now() - interval '2 days')`)
	put(t, r, record(t, thing, "4", object(t, map[string]any{"owner": "jane"})))
	for deadline := time.Now().Add(patience); ; {
		due := value[string](t, g.Database, `SELECT concat_ws(' ',
			(SELECT count(*) FROM pgbroker.records WHERE type = $1), (SELECT count(*) FROM pgbroker.leases WHERE name = 'old'),
			(SELECT count(*) FROM pgbroker.services WHERE endpoint = 'old'), (SELECT count(*) FROM pgbroker.audit WHERE type = 't'),
			(SELECT count(*) FROM pgbroker.type_summary WHERE NOT up_to_date),
			(SELECT (count(*) > 1)::integer FROM pgbroker.changes WHERE deleted))`, thing)
		if due == "0 0 0 0 0 0" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the periodic work has left %s", due)
		}
	}

	_, err = r.Clear(ctx, new(emptypb.Empty))
	call("databroker.DataBrokerService/Clear", err)
	for _, name := range slices.Sorted(maps.Keys(r.Server.Services())) {
		for _, method := range r.Server.Services()[name].Methods {
			if full := name + "/" + method.Name; !called[full] && !strings.HasPrefix(name, "grpc.reflection.") {
				t.Errorf("%s was not tried", full)
			}
		}
	}
	if text := log.String(); strings.Contains(text, "permission denied") {
		t.Errorf("the replica was denied something:\n%s", text)
	}

	v := g.visit(t, g.server)
	v.expect(t, pgerrcode.InsufficientPrivilege,
		`INSERT INTO pgbroker.changes VALUES (1, 't', 'i', now(), true)`, `UPDATE pgbroker.audit SET role = 'x'`,
		`INSERT INTO pgbroker.audit (cause, type) VALUES ('sql', 't')`, `DELETE FROM pgbroker.epochs`, `TRUNCATE pgbroker.changes`,
		`UPDATE pgbroker.schema_migrations SET version = 1`, `DROP TABLE pgbroker.records`, `ALTER TABLE pgbroker.records DISABLE TRIGGER ALL`,
		`CREATE TABLE pgbroker.x ()`)
}

// TestGrantsTakeBack: what a role had too much is gone after the grants, and they can be left out.
func TestGrantsTakeBack(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	reader, writer, server := "r_"+d.Name, "w_"+d.Name, "s_"+d.Name
	roles(t, d, reader, writer, server)
	d.Exec(t, "GRANT ALL ON ALL TABLES IN SCHEMA pgbroker TO "+reader)
	d.Exec(t, "GRANT SELECT (payload) ON pgbroker.records TO "+reader)
	d.Exec(t, "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA pgbroker TO "+reader)
	d.Exec(t, "GRANT CREATE ON SCHEMA pgbroker TO "+reader)
	d.Exec(t, strings.Join(column[string](t, d, `SELECT pgbroker.grants($1, NULL, '')`, reader), "\n"))
	if value[bool](t, d, `SELECT has_any_column_privilege($1, 'pgbroker.records', 'SELECT, UPDATE') OR has_table_privilege($1, 'pgbroker.sessions', 'DELETE')`, reader) {
		t.Error("the reader may still read payloads or delete")
	}
	if value[bool](t, d, `SELECT has_schema_privilege($1, 'pgbroker', 'CREATE') OR EXISTS (SELECT FROM pg_proc
			WHERE pronamespace = 'pgbroker'::regnamespace AND prosecdef AND has_function_privilege($1, oid, 'EXECUTE'))`, reader) {
		t.Error("the reader may still create something, or execute what runs as the owner")
	}
	if !value[bool](t, d, `SELECT has_table_privilege($1, 'pgbroker.sessions', 'SELECT')`, reader) {
		t.Error("the reader cannot read")
	}
	if !value[bool](t, d, `SELECT has_table_privilege($1, 'pgbroker.sessions', 'DELETE')`, writer) {
		t.Error("the writer has lost something")
	}
}

// TestTriggersRunAsTheirOwner: every trigger of records that is not called for each row needs no privilege of
// the writer, looks nothing up on the writer's path, and is nobody else's to use.
func TestTriggersRunAsTheirOwner(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	got := column[string](t, d, `
		SELECT p.oid::regprocedure::text FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
		WHERE t.tgrelid = 'pgbroker.records'::regclass AND NOT t.tgisinternal AND t.tgtype & 1 = 0
		  AND (NOT p.prosecdef OR NOT coalesce(p.proconfig @> '{"search_path=pg_catalog, pg_temp"}', false)
		       OR has_function_privilege('public', p.oid, 'EXECUTE'))`)
	if len(got) > 0 {
		t.Errorf("a later migration has replaced %v: it has to repeat SECURITY DEFINER, SET search_path and REVOKE", got)
	}
	if got := column[string](t, d, `
		SELECT p.oid::regprocedure::text FROM pg_proc p WHERE p.pronamespace = 'pgbroker'::regnamespace AND p.prosecdef
		  AND (NOT coalesce(p.proconfig @> '{"search_path=pg_catalog, pg_temp"}', false) OR has_function_privilege('public', p.oid, 'EXECUTE'))`); len(got) > 0 {
		t.Errorf("functions that run as their owner, for everybody: %v", got)
	}
}

// startAs starts a replica that does everything in the server's role, with periodic work that is always due.
func startAs(t *testing.T, g guarded, log *logged) *servertest.Replica {
	t.Helper()
	return servertest.Start(t, g.As(t, g.server), servertest.Options{Configure: func(c *server.Config) {
		busy(c)
		c.TombstoneRetention, c.AuditRetention = time.Nanosecond, 24*time.Hour
		c.Logger = log.logger()
	}})
}
