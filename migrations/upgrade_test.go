package migrations_test

import (
	"context"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"pgbroker/db/dbtest"
	"pgbroker/migrations"
)

// While the schema is being migrated and until they are replaced, replicas of the release before go on: over the
// connections that they have, and with the rights that they had.
func TestUpBeneathReplicas(t *testing.T) {
	t.Parallel()
	const released = 6
	d := dbtest.NewEmpty(t)
	ctx := t.Context()
	if err := (migrations.Of{FS: upTo(t, released)}).Up(ctx, d.Config(t)); err != nil {
		t.Fatal(err)
	}
	role := "replica_" + strings.ToLower(d.Name)
	d.Exec(t, `CREATE ROLE `+role+`;
		GRANT USAGE ON SCHEMA pgbroker TO `+role+`;
		GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA pgbroker TO `+role+`;
		GRANT SELECT, UPDATE ON ALL SEQUENCES IN SCHEMA pgbroker TO `+role)
	t.Cleanup(func() { d.Exec(t, "DROP OWNED BY "+role+"; DROP ROLE "+role) })
	cfg := d.Config(t)
	cfg.RuntimeParams["role"] = role
	conn, err := pgx.ConnectConfig(ctx, cfg)
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
				ARRAY[$3::text], ARRAY[''], ARRAY[1], ARRAY[0]) c ON s.server_version <> 0`, id, remove, payload)
	}
	// query is Query, which names the column of texts in any case, and feed is what streams are sent after a version.
	query := func() string {
		t.Helper()
		return ask(`SELECT coalesce(string_agg(convert_from(r.payload, 'UTF8') || ' ' || (r.data #>> '{}'), ' ' ORDER BY r.id), '')
			FROM pgbroker.records r WHERE r.type = 't' AND ($1::text = '' OR strpos(r.search_text, $1::text) > 0)`, "")
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
	if err := migrations.Up(ctx, d.Config(t)); err != nil {
		t.Fatal(err)
	}
	work()
}
