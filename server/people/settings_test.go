package people

import (
	"fmt"
	"testing"

	"pgbroker/db/dbtest"
)

// TestWritesUnderAnySettings: what a person's session has set changes nothing about what becomes of data written there.
func TestWritesUnderAnySettings(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	for name, settings := range map[string]string{
		"ours":    "",
		"strings": "SET standard_conforming_strings = off; SET backslash_quote = on; ",
		"forms":   "SET DateStyle = 'SQL, DMY'; SET IntervalStyle = 'sql_standard'; SET TimeZone = 'Asia/Kathmandu'; SET bytea_output = 'escape'; SET extra_float_digits = -15; ",
		"rest":    "SET array_nulls = off; SET transform_null_equals = on; SET plpgsql.extra_errors = 'all'; SET exit_on_error = off; SET search_path = ''; ",
	} {
		d.Exec(t, settings+`INSERT INTO pgbroker.records (type, id, data) VALUES ('type.googleapis.com/session.Session', '`+name+`',
			$j${"id": "x", "user_id": "jane", "issued_at": "2030-01-31T10:20:30.5Z", "expires_at": "2031-01-31T10:20:30Z", "claims": {"n": [0.1, 1e300, "\\back\"slash"]}}$j$);
			UPDATE pgbroker.records SET data = jsonb_set(data, '{claims,m}', $j$[3.14159265358979, null, "\\d"]$j$) WHERE id = '`+name+`'`)
	}
	var different int
	if err := d.Pool.QueryRow(t.Context(), `SELECT count(DISTINCT (payload, data, expires_at)) FROM pgbroker.records`).Scan(&different); err != nil || different != 1 {
		t.Errorf("%d different results of one write, want 1 (%v)", different, err)
	}
}

// TestMergeSetsWhatAnUpsertDoesNotShow: excluded.data is what an INSERT shows, so that SET data = excluded.data keeps the secrets and
// the message of the record, which MERGE replaces.
func TestMergeSetsWhatAnUpsertDoesNotShow(t *testing.T) {
	t.Parallel()
	g := newGuarded(t)
	v := g.visit(t, g.writer)
	const row = `('type.googleapis.com/session.Session', 's', '{"id": "s", "user_id": "jane", "oauth_token": {"access_token": "%s"}}'::jsonb)`
	upsert := `INSERT INTO pgbroker.records (type, id, data) VALUES ` + row + ` ON CONFLICT (type, id) DO UPDATE SET data = excluded.data`
	merge := `MERGE INTO pgbroker.records r USING (VALUES ` + row + `) v (type, id, data) ON r.type = v.type AND r.id = v.id
		WHEN MATCHED THEN UPDATE SET data = v.data WHEN NOT MATCHED THEN INSERT (type, id, data) VALUES (v.type, v.id, v.data)`
	for _, step := range []struct{ statement, token, want string }{
		{merge, "first", "first"}, {upsert, "second", "first"}, {merge, "third", "third"},
	} {
		v.expect(t, "", fmt.Sprintf(step.statement, step.token))
		for _, token := range []string{"first", "second", "third"} {
			has := value[bool](t, g.Database, `SELECT position($1::bytea IN payload) > 0 FROM pgbroker.records WHERE id = 's'`, []byte(token))
			if has != (token == step.want) {
				t.Errorf("after %s with the token %q: %q is in the payload: %v", step.statement[:6], step.token, token, has)
			}
		}
	}
}
