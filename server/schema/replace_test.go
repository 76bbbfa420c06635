package schema_test

import (
	"flag"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"pgbroker/db/dbtest"
)

// replaced is what replace_records returns.
type replaced struct{ inserted, updated, deleted, remaining int64 }

func replace(t testing.TB, conn *pgx.Conn, arguments string) (r replaced) {
	t.Helper()
	if err := conn.QueryRow(t.Context(), "SELECT * FROM pgbroker.replace_records("+arguments+")").
		Scan(&r.inserted, &r.updated, &r.deleted, &r.remaining); err != nil {
		t.Fatal(err)
	}
	return r
}

func stage(t testing.TB, conn *pgx.Conn, records string) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), "SELECT pgbroker.stage_records($1::text::jsonb)", records); err != nil {
		t.Fatal(err)
	}
}

func (r replaced) want(t testing.TB, what string, inserted, updated, deleted, remaining int64) {
	t.Helper()
	if want := (replaced{inserted, updated, deleted, remaining}); r != want {
		t.Errorf("%s: %+v, want %+v", what, r, want)
	}
}

// An initial load in batches deletes and updates nothing, not even no rows: the plans for that would be made while there is no
// record, for as long as the session lives, and read all records of the type for each batch.
func TestAnInitialLoadInsertsOnly(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	d.AdminExec(t, "ALTER DATABASE "+d.Name+" SET track_functions = 'all'")
	conn := d.Connect(t)
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	stage(t, conn, "{}")
	exec("INSERT INTO staged_records (id, data) SELECT 'u' || i, '{}' FROM generate_series(1, 30) AS i")
	for remaining := int64(20); remaining >= 0; remaining -= 10 {
		replace(t, conn, "'t', 10").want(t, "initial load", 10, 0, 0, remaining)
	}
	calls := func() string {
		t.Helper()
		exec("SELECT pg_stat_force_next_flush()")
		return get[string](t, d, `SELECT string_agg(funcname || ' ' || calls, ', ' ORDER BY funcname) FROM pg_stat_user_functions
			WHERE funcname IN ('log_inserts', 'log_updates', 'log_deletes')`)
	}
	if got := calls(); got != "log_inserts 3" {
		t.Errorf("statements: %s", got)
	}
	stage(t, conn, `{"u1": {"changed": true}, "new": {}}`)
	replace(t, conn, "'t'").want(t, "all kinds", 1, 1, 29, 0)
	if got := calls(); got != "log_deletes 1, log_inserts 4, log_updates 1" {
		t.Errorf("statements: %s", got)
	}
}

// Only what differs is written: each record once, and of what is the same nothing.
func TestReplaceWritesDifferencesOnly(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	conn := d.Connect(t)
	d.Exec(t, "INSERT INTO pgbroker.records (type, id, data) VALUES ('other', 'a', '{}')")
	stage(t, conn, `{"a": {"email": "a@x"}, "b": {"email": "b@x", "n": 12345678901234567890}, "c": {}}`)
	replace(t, conn, "'t'").want(t, "first load", 3, 0, 0, 0)
	versions := columns(t, d, "SELECT id || version FROM pgbroker.records ORDER BY type, id")

	stage(t, conn, `{"a": {"email": "a@x"}, "b": {"email": "b@x", "n": 12345678901234567890}, "c": {}}`)
	replace(t, conn, "'t'").want(t, "reload", 0, 0, 0, 0)
	if diff := cmp.Diff(versions, columns(t, d, "SELECT id || version FROM pgbroker.records ORDER BY type, id")); diff != "" {
		t.Errorf("an unchanged reload writes (-before +after):\n%s", diff)
	}
	latest := get[int64](t, d, "SELECT latest_version FROM pgbroker.versions")
	stage(t, conn, `{"a": {"email": "new@x"}, "c": {}, "d": {}}`)
	replace(t, conn, "'t'").want(t, "changes", 1, 1, 1, 0)
	if got := get[int64](t, d, "SELECT latest_version FROM pgbroker.versions"); got != latest+3 {
		t.Errorf("%d changes, want 3", got-latest)
	}
	if got := get[int64](t, d, "SELECT count(*) FROM pgbroker.records WHERE type = 'other'"); got != 1 {
		t.Error("records of another type are gone")
	}

	// What data do not show stays.
	sessions := "'" + sessionType + "'"
	stage(t, conn, `{"s": {"id": "s", "oauth_token": {"access_token": "`+secret+`"}}}`)
	replace(t, conn, sessions).want(t, "session", 1, 0, 0, 0)
	stage(t, conn, `{"s": {"id": "s", "oauthToken": {}}}`)
	replace(t, conn, sessions).want(t, "the same session in another spelling", 0, 0, 0, 0)
	stage(t, conn, `{"s": {"id": "s", "user_id": "u", "oauth_token": {}}}`)
	replace(t, conn, sessions).want(t, "session", 0, 1, 0, 0)
	if got := get[[]byte](t, d, "SELECT payload FROM pgbroker.records WHERE id = 's'"); !strings.Contains(string(got), secret) {
		t.Error("the token is gone")
	}

	for sql, want := range map[string]string{
		"SELECT pgbroker.replace_records('t')":                                                                   "nothing is staged in this session",
		"SELECT pgbroker.stage_records(); SELECT pgbroker.replace_records('t')":                                  "staged_records is empty: every record of type 't' would be deleted",
		`SELECT pgbroker.stage_records('{"x": 1}'); SELECT pgbroker.replace_records('t')`:                        "data: must be an object",
		`SELECT pgbroker.stage_records('{"x": {"nope": 1}}'); SELECT pgbroker.replace_records(` + sessions + `)`: "data.nope: there is no such field",
	} {
		fresh := d.Connect(t)
		_, err := fresh.Exec(t.Context(), sql)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", sql, err, want)
		}
	}
	stage(t, conn, `{}`)
	replace(t, conn, "'t', allow_empty => true").want(t, "empty", 0, 0, 3, 0)
}

// compare_records says what replace_records would do, and does nothing; what is staged after it counts.
func TestCompareRecords(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	conn := d.Connect(t)
	compared := func(what string, inserted, updated, deleted, unchanged int64) {
		t.Helper()
		var got replaced // its last member is what is unchanged
		if err := conn.QueryRow(t.Context(), "SELECT * FROM pgbroker.compare_records('t')").Scan(&got.inserted, &got.updated, &got.deleted, &got.remaining); err != nil {
			t.Fatal(err)
		}
		got.want(t, what, inserted, updated, deleted, unchanged)
	}
	stage(t, conn, `{"a": {}, "b": {"n": 1}, "c": {}}`)
	compared("of nothing", 3, 0, 0, 0)
	if n := get[int64](t, d, "SELECT count(*) FROM pgbroker.records"); n != 0 {
		t.Errorf("%d records were written", n)
	}
	replace(t, conn, "'t'").want(t, "first load", 3, 0, 0, 0)
	stage(t, conn, `{"a": {}, "b": {"n": 2}, "d": {}, "e": {}}`)
	compared("of a set", 2, 1, 1, 1)
	if _, err := conn.Exec(t.Context(), `DELETE FROM staged_records WHERE id = 'e'; INSERT INTO staged_records (id, data) VALUES ('c', '{}')`); err != nil {
		t.Fatal(err)
	}
	compared("of what was staged later", 1, 1, 0, 2)
	if _, err := conn.Exec(t.Context(), `INSERT INTO staged_records (id, data) VALUES ('f', '{}')`); err != nil {
		t.Fatal(err)
	}
	replace(t, conn, "'t', 1").want(t, "a part", 0, 1, 0, 2) // b, d and f
	if _, err := conn.Exec(t.Context(), `DELETE FROM staged_records WHERE id = 'a'`); err != nil {
		t.Fatal(err)
	}
	replace(t, conn, "'t'").want(t, "the rest", 2, 0, 1, 0)
}

// What others write while the set is written is in the end what the set says, too: also between two batches, and also
// when everything is cleared in between.
func TestReplaceAmongOtherWriters(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	conn := d.Connect(t)
	stage(t, conn, `{"a": {"n": 1}, "b": {"n": 1}, "c": {"n": 1}, "d": {"n": 1}}`)
	replace(t, conn, "'t', 2").want(t, "first batch", 2, 0, 0, 2)
	d.Exec(t, `UPDATE pgbroker.records SET data = '{"n": 2}' WHERE id = 'a'`)
	d.Exec(t, `DELETE FROM pgbroker.records WHERE id = 'b'`)
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data) VALUES ('t', 'x', '{}'), ('t', 'd', '{"n": 1}')`)
	replace(t, conn, "'t', 100").want(t, "rest", 2, 1, 1, 0)
	want := []string{"a1", "b1", "c1", "d1"}
	if diff := cmp.Diff(want, columns(t, d, "SELECT id || (data ->> 'n') FROM pgbroker.records ORDER BY id")); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
	stage(t, conn, `{"a": {"n": 1}, "b": {"n": 2}, "c": {"n": 2}}`)
	replace(t, conn, "'t', 1").want(t, "before Clear", 0, 1, 0, 2)
	d.Exec(t, "TRUNCATE pgbroker.records")
	replace(t, conn, "'t'").want(t, "after Clear", 3, 0, 0, 0)
}

// Whatever there is and whatever is wanted, in any batches: in the end it is what is wanted, at the least cost.
func TestReplaceReachesAnySet(t *testing.T) {
	d := dbtest.New(t)
	conn := d.Connect(t)
	sets := rapid.MapOf(rapid.SampledFrom([]string{"a", "b", "c", "d", "e"}), rapid.SampledFrom([]string{`{}`, `{"n": 1}`, `{"n": 2, "s": "x"}`}))
	asJSON := func(set map[string]string) string {
		var members []string
		for id, data := range set {
			members = append(members, fmt.Sprintf("%q: %s", id, data))
		}
		return "{" + strings.Join(members, ", ") + "}"
	}
	have := map[string]string{}
	// Each time the staging tables are emptied, and everything is planned anew: that takes its time.
	checks := flag.Lookup("rapid.checks").Value
	before := checks.String()
	if err := checks.Set("30"); err != nil {
		t.Fatal(err)
	}
	defer checks.Set(before) //nolint:errcheck // it was that before
	rapid.Check(t, func(rt *rapid.T) {
		want := sets.Draw(rt, "want")
		var expected, got replaced
		for id, data := range want {
			if old, ok := have[id]; !ok {
				expected.inserted++
			} else if old != data {
				expected.updated++
			}
		}
		for id := range have {
			if _, ok := want[id]; !ok {
				expected.deleted++
			}
		}
		stage(t, conn, asJSON(want))
		for size := rapid.SampledFrom([]string{"1", "2", "NULL"}).Draw(rt, "batch"); ; {
			r := replace(t, conn, "'t', "+size+", true")
			got.inserted, got.updated, got.deleted = got.inserted+r.inserted, got.updated+r.updated, got.deleted+r.deleted
			if r.remaining == 0 {
				break
			}
		}
		have = want
		if got != expected {
			rt.Fatalf("%+v, want %+v", got, expected)
		}
		if !get[bool](t, d, "SELECT coalesce(jsonb_object_agg(id, data), '{}') = $1::text::jsonb FROM pgbroker.records", asJSON(want)) {
			rt.Fatal("the records are not those wanted")
		}
	})
}
