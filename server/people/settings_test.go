package people

import (
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
