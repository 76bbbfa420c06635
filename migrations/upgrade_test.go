package migrations_test

import (
	"context"
	"fmt"
	"testing"
	"testing/fstest"

	"github.com/jackc/pgx/v5"

	"pgbroker/db/dbtest"
	"pgbroker/migrations"
)

const (
	// later is what a migration of a later release does: things are added, and functions and views get other bodies.
	later = `
		DO $$
		DECLARE
			name text;
			body text;
		BEGIN
			FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'pgbroker' LOOP
				-- A column of changes comes with another write_records, which returns such rows.
				IF name NOT IN ('changes', 'schema_migrations') THEN
					EXECUTE format('ALTER TABLE pgbroker.%I ADD COLUMN later text NOT NULL DEFAULT ''x''', name);
				END IF;
			END LOOP;
			FOR body IN
				SELECT regexp_replace(pg_get_functiondef(oid), '\mBEGIN\M', 'BEGIN /* later */') FROM pg_proc
				WHERE pronamespace = 'pgbroker'::regnamespace AND prolang = (SELECT oid FROM pg_language WHERE lanname = 'plpgsql')
			LOOP
				EXECUTE body;
			END LOOP;
		END $$;
		CREATE INDEX records_later ON pgbroker.records (later);
		CREATE OR REPLACE VIEW pgbroker.versions AS
			SELECT s.server_version, greatest((SELECT max(c.version) FROM pgbroker.changes c), s.base_version) AS latest_version,
				0::bigint AS earliest_version, s.options_version, s.later
			FROM pgbroker.state s;
		CREATE TABLE pgbroker.later (x int);
		CREATE FUNCTION pgbroker.later() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
		BEGIN
			INSERT INTO pgbroker.later VALUES (1);
			RETURN NULL;
		END $$;
		CREATE TRIGGER records_later AFTER INSERT ON pgbroker.records FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.later();`
)

// While the schema is being migrated and until they are replaced, replicas of the release before go on: over the
// connections that they have, and with the rights that they had.
func TestUpBeneathReplicas(t *testing.T) {
	t.Parallel()
	d := dbtest.NewEmpty(t)
	ctx := t.Context()
	if err := migrations.Up(ctx, d.Config(t)); err != nil {
		t.Fatal(err)
	}
	d.Exec(t, get[string](t, d, "SELECT string_agg(s, ' ') FROM pgbroker.grants(NULL, NULL, $1) AS s", dbtest.ServerRole))
	conn, err := pgx.Connect(ctx, d.ServerConnString)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())

	// Statements are prepared by their first use, and so is what functions run.
	ask := func(sql string, args ...any) (got string) {
		t.Helper()
		if err := conn.QueryRow(ctx, sql, args...).Scan(&got); err != nil {
			t.Errorf("%v\n%s", err, sql)
		}
		return got
	}
	expect := func(want, got string) {
		t.Helper()
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	write := func(id string, remove bool, payload string) string {
		t.Helper()
		return ask(`SELECT c.version::text FROM pgbroker.state s LEFT JOIN pgbroker.write_records(
				ARRAY['t'], ARRAY[$1::text], ARRAY[$2::boolean], ARRAY[convert_to($3, 'UTF8')], ARRAY[to_jsonb($3::text)::text],
				ARRAY[$3::text], ARRAY[''], ARRAY[1], ARRAY[0], '{}', '{}') c ON s.server_version <> 0`, id, remove, payload)
	}
	// query is Query by text, and feed is what streams are sent after a version.
	query := func() string {
		t.Helper()
		return ask(`SELECT coalesce(string_agg(convert_from(r.payload, 'UTF8') || ' ' || (r.data #>> '{}'), ' ' ORDER BY r.id), '')
			FROM pgbroker.records r JOIN pgbroker.search_texts s USING (type, id)
			WHERE r.type = 't' AND strpos(s.search_text, $1::text) > 0`, "")
	}
	feed := func(after string) string {
		t.Helper()
		return ask(`SELECT string_agg(c.id || CASE WHEN c.deleted THEN ' deleted' ELSE ' ' || convert_from(r.payload, 'UTF8') END, ', ' ORDER BY c.version)
			FROM pgbroker.versions v JOIN pgbroker.changes c ON c.version <= v.latest_version
			LEFT JOIN pgbroker.records r ON r.type = c.type AND r.id = c.id AND r.version = c.version
			WHERE c.version > $1::text::bigint AND NOT EXISTS (SELECT FROM pgbroker.epochs)`, after)
	}
	work := func() {
		t.Helper()
		before := write("a", false, "one")
		write("b", false, "two")
		expect("one one two two", query())
		write("a", false, "three")
		write("b", true, "")
		expect("a three, b deleted", feed(before))
		expect("three three", query())
		ask(`DELETE FROM pgbroker.records RETURNING id`)
		expect("b deleted, a deleted", feed(before))
		expect("0", ask(`SELECT coalesce(sum(record_count), 0)::text FROM pgbroker.record_types`))
	}
	work()
	newer := upTo(t, migrations.Latest())
	newer[fmt.Sprintf("%04d_later.up.sql", migrations.Latest()+1)] = &fstest.MapFile{Data: []byte(later)}
	if err := (migrations.Of{FS: newer}).Up(ctx, d.Config(t)); err != nil {
		t.Fatal(err)
	}
	work()
	expect("2", get[string](t, d, "SELECT count(*)::text FROM pgbroker.later"))
}
