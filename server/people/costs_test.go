package people

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"pgbroker/db/dbtest"
)

const (
	costsEnv  = "PGBROKER_TRIGGER_COSTS"
	costsBody = `
		CREATE TABLE took (what text, batch integer, triggers text, us numeric);
		CREATE FUNCTION cpu_ns() RETURNS numeric LANGUAGE sql AS $$
			SELECT split_part(pg_read_file('/proc/self/schedstat'), ' ', 1)::numeric
		$$;
		CREATE FUNCTION write_sessions(n integer, batch integer, deleted boolean, salt text) RETURNS void LANGUAGE plpgsql AS $$
		BEGIN
			FOR i IN 0..n - 1 BY batch LOOP
				PERFORM pgbroker.write_records(
					array_fill('type.googleapis.com/session.Session'::text, ARRAY[batch]),
					(SELECT array_agg('s' || i + j ORDER BY j) FROM generate_series(1, batch) AS j),
					array_fill(deleted, ARRAY[batch]),
					array_fill(convert_to(repeat(salt, 1400), 'UTF8'), ARRAY[batch]),
					(SELECT array_agg(jsonb_build_object('id', 's' || i + j, 'user_id', 'u' || j, 'claims',
						jsonb_build_object('name', jsonb_build_array(salt), 'picture', jsonb_build_array(repeat('y', 300))))::text ORDER BY j)
					 FROM generate_series(1, batch) AS j),
					array_fill(salt || ' text', ARRAY[batch]), array_fill(''::text, ARRAY[batch]), array_fill(1, ARRAY[batch]), array_fill(0::bigint, ARRAY[batch]));
			END LOOP;
		END
		$$;
		CREATE PROCEDURE measure(n integer, batch integer, triggers text) LANGUAGE plpgsql AS $$
		DECLARE
			what   text;
			before numeric;
		BEGIN
			FOREACH what IN ARRAY ARRAY['insert', 'update', 'delete'] LOOP
				before := cpu_ns();
				PERFORM write_sessions(n, batch, what = 'delete', CASE what WHEN 'insert' THEN 'a' ELSE 'b' END);
				INSERT INTO took VALUES (what, batch, triggers, (cpu_ns() - before) / 1000 / n);
				COMMIT;
			END LOOP;
		END
		$$;`
)

// TestTriggerCosts measures, when asked to, what the triggers that audit and that encode data cost a replica's writes:
//
//	PGBROKER_TRIGGER_COSTS=1 go test ./server/people -run TestTriggerCosts -v
//
// It shows microseconds of CPU in PostgreSQL for each session, the best of some rounds, with all triggers and without some.
func TestTriggerCosts(t *testing.T) {
	if os.Getenv(costsEnv) == "" {
		t.Skipf("to run it, set %s to 1", costsEnv)
	}
	d := dbtest.New(t)
	d.Exec(t, costsBody)
	// Plans are made for a table that is not empty.
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, payload) SELECT $1, 'other' || i, '' FROM generate_series(1, 20000) AS i`, sessionType)
	d.Exec(t, "VACUUM ANALYZE")
	conn := d.Connect(t)
	run := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	// As replicas do.
	run("SET jit = off")
	run("SET plan_cache_mode = force_generic_plan")
	for range 8 {
		for name, triggers := range map[string][]string{
			"all": nil, "without audit": {"records_audit_delete"},
			"without encoding": {"records_encode_insert", "records_encode_update", "records_unstamp"},
		} {
			for _, trigger := range triggers {
				run("ALTER TABLE pgbroker.records DISABLE TRIGGER " + trigger)
			}
			run(fmt.Sprintf("CALL measure(1000, 1, '%s')", name))
			run(fmt.Sprintf("CALL measure(5000, 250, '%s')", name))
			run("ALTER TABLE pgbroker.records ENABLE TRIGGER USER")
			run("VACUUM pgbroker.records, pgbroker.changes, pgbroker.audit")
		}
	}
	t.Logf("\n| write | sessions a batch | triggers | µs a session |\n|---|---|---|---|\n%s", strings.Join(column[string](t, d, `
		SELECT format('| %s | %s | %s | %s |', what, batch, triggers, round(min(us), 1)) FROM took
		GROUP BY what, batch, triggers ORDER BY batch, array_position('{insert,update,delete}', what), triggers`), "\n"))
}
