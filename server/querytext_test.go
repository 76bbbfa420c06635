package server

import (
	"strings"
	"testing"
	"unicode/utf8"
)

func TestRedactQuery(t *testing.T) {
	t.Parallel()
	for query, want := range map[string]string{
		"":                              "",
		"BEGIN":                         "BEGIN",
		"  select 1 ;\n\n select 2.5e1": "select ? ; select ?",
		"DELETE FROM pgbroker.records WHERE id = 'x' AND version > 7": "DELETE FROM pgbroker.records WHERE id = ? AND version > ?",
		"SELECT 'it''s', E'x', b'1', X'ff', U&'x', N'x', 'a' 'b'":     "SELECT ?, ?, ?, ?, ?, ?, ? ?",
		`SELECT "x", U&"y", "a""b"`:                                   "SELECT ?, ?, ?",
		"SELECT $$x$$, $tag$ $$ x $tag$, $1, $2::text":                "SELECT ?, ?, ?, ?::text",
		"SELECT $tag$ x": "SELECT ?",
		"SELECT $tag x":  "SELECT ? x",
		"SELECT 1 -- x\n, 2 /* x /* x */ x */ + 3": "SELECT ? , ? + ?",
		"SELECT 1 /* x":                          "SELECT ?",
		"SELECT 'x":                              "SELECT ?",
		`SELECT 'x\', 'y', z`:                    "SELECT ?", // what a backslash means is not known
		"SET app.token = x":                      "SET app.token = ?",
		"SET LOCAL app.token TO x, y; SELECT z":  "SET LOCAL app.token TO ? ?; SELECT z",
		"ALTER ROLE jane SET app.token = x":      "ALTER ROLE jane SET app.token = ?",
		"UPDATE a SET b = c WHERE d":             "UPDATE a SET b = c WHERE d",
		"WITH x AS (SELECT) UPDATE a SET b = c":  "WITH x AS (SELECT) UPDATE a SET b = c",
		"SELECT 0xDEADBEEF, 1_000, .5":           "SELECT ?, ?, .?",
		"\\set x\x00\xff":                        "?set x?",
		"SELECT " + strings.Repeat("long ", 100): "SELECT " + strings.Repeat("long ", 38) + "lon…",
		"SELECT é, naïve":                        "SELECT ?, naïve",
	} {
		if got := redactQuery(query); got != want {
			t.Errorf("%q: got %q, want %q", query, got, want)
		}
	}
}

// FuzzRedactQuery: whatever a secret is and however it is written into a query, it does not show.
func FuzzRedactQuery(f *testing.F) {
	for _, secret := range []string{"hunter2", "it's", `a\`, `\'`, "a\nb", "--x", "/*x", "x*/", "$$", "$a$", `"`, "é\x00\xff", ";SET x=y", ""} {
		for kind := range uint8(6) {
			f.Add("DELETE FROM t WHERE a = ", secret, " AND b", kind)
			f.Add("SET x TO ", secret, "", kind)
		}
	}
	f.Fuzz(func(t *testing.T, before, secret, after string, kind uint8) {
		// What stands around it are words, and the secret is marked, so that it can be told from them.
		before, after = words(before), words(after)
		const mark = "HUNTER2"
		secret = mark + secret + mark
		var literal string
		switch kind % 6 {
		case 0:
			literal = "'" + strings.ReplaceAll(secret, "'", "''") + "'"
		case 1:
			literal = "E'" + strings.NewReplacer("'", "''", `\`, `\\`).Replace(secret) + "'"
		case 2:
			literal = `"` + strings.ReplaceAll(secret, `"`, `""`) + `"`
		case 3:
			literal = "$q$" + strings.ReplaceAll(secret, "$", "") + "$q$"
		case 4:
			literal = "/*" + strings.NewReplacer("*", "", "/", "").Replace(secret) + "*/"
		case 5:
			literal = "--" + strings.ReplaceAll(secret, "\n", " ") + "\n"
		}
		for _, query := range []string{
			before + literal + " " + after,
			before + literal[:len(literal)/2], // as the server cuts long queries off
			before + strings.ReplaceAll(literal, "''", `\'`) + " " + after,
		} {
			got := redactQuery(query)
			if strings.Contains(got, mark) || !utf8.ValidString(got) || len(got) > maxQueryText+len("…") {
				t.Fatalf("%q is shown as %q", query, got)
			}
		}
	})
}

// words keeps of a text what cannot begin a literal.
func words(text string) string {
	return strings.Map(func(c rune) rune {
		if c == ' ' || 'a' <= c && c <= 'z' || strings.ContainsRune("()=,;<>", c) {
			return c
		}
		return ' '
	}, text) + " "
}
