package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"pgbroker/server/servertest"
)

func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// The directory becomes what a file says, whatever its form, through the database and through the server.
func TestDirectoryLoad(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	records := func() (found []string) {
		t.Helper()
		rows, err := b.Database.Pool.Query(t.Context(), "SELECT id || ' ' || data FROM pgbroker.records ORDER BY type, id")
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		for rows.Next() {
			var one string
			if err := rows.Scan(&one); err != nil {
				t.Fatal(err)
			}
			found = append(found, one)
		}
		if rows.Err() != nil {
			t.Fatal(rows.Err())
		}
		return found
	}
	for name, env := range map[string][]string{
		"database": append(os.Environ(), "PGBROKER_DATABASE_URL="+b.Database.ConnString),
		"server":   environment(b.Replica),
	} {
		b.Database.Exec(t, "DELETE FROM pgbroker.records")
		load := func(want string, args ...string) {
			t.Helper()
			if out := mustTry(t, env, append([]string{"directory", "load", "-o", "json"}, args...)...); out != want+"\n" {
				t.Errorf("%s: %q: got %s, want %s", name, args, out, want)
			}
		}
		result := func(inserted, updated, deleted, unchanged int) string {
			return fmt.Sprintf(`{"type":"pomerium.io/DirectoryUser","inserted":%d,"updated":%d,"deleted":%d,"unchanged":%d}`, inserted, updated, deleted, unchanged)
		}
		users := write(t, "users.csv", "\ufeffid,display_name,email,group_ids\njane,\"Doe, Jane\",jane@x,a;b\njoe,,joe@x,\n")
		load(result(2, 0, 0, 0), users, "--kind", "users")
		want := []string{
			`jane {"id": "jane", "email": "jane@x", "group_ids": ["a", "b"], "display_name": "Doe, Jane"}`,
			`joe {"id": "joe", "email": "joe@x"}`,
		}
		if diff := cmp.Diff(want, records()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		load(result(0, 0, 0, 2), users, "--kind", "users")
		load(result(0, 0, 0, 2), write(t, "users.json", `[{"group_ids": ["a", "b"], "id": "jane", "email": "jane@x", "display_name": "Doe, Jane"},
			{"id": "joe", "email": "joe@x"}]`), "--kind", "users")
		load(result(1, 1, 1, 0), write(t, "users", `{"id": "jane", "level": 7}`+"\n\n"+`{"id": "new"}`), "--kind", "users", "--format", "jsonl")
		load(`{"type":"pomerium.io/DirectoryGroup","inserted":1,"updated":0,"deleted":0,"unchanged":0}`, write(t, "groups.csv", "id,name\na,Admins\n"), "--kind", "groups")
		want = []string{`a {"id": "a", "name": "Admins"}`, `jane {"id": "jane", "level": 7}`, `new {"id": "new"}`}
		if diff := cmp.Diff(want, records()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		load(result(0, 0, 2, 0), write(t, "none.jsonl", ""), "--kind", "users", "--allow-empty")
	}
	many := "id\n" + strings.Repeat("x", 10)
	for i := range 3 * loadBatch {
		many += fmt.Sprintf("\n%d", i)
	}
	out := mustTry(t, append(os.Environ(), "PGBROKER_DATABASE_URL="+b.Database.ConnString), "directory", "load", "--atomic", "--kind", "users", write(t, "many.csv", many))
	if !strings.Contains(out, fmt.Sprint("pomerium.io/DirectoryUser  ", 3*loadBatch+1)) {
		t.Errorf("many: %s", out)
	}
}

// An error in a file names the file and the line, and nothing is written.
func TestDirectoryLoadOfABadFile(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	for _, test := range []struct{ name, content, want string }{
		{"u.csv", "", "u.csv: is empty"},
		{"u.csv", "name\nx\n", "u.csv:1: there is no column id, but name"},
		{"u.csv", "id,id\nx,y\n", `u.csv:1: column 2 has the name "id": want names, each once`},
		{"u.csv", "id,name\nx,y\nz\n", "u.csv:3: wrong number of fields"},
		{"u.csv", "id\nx\n\"y\n", "u.csv:3: extraneous or missing \" in quoted-field"},
		{"u.csv", "id,email\nx,\n,y\n", "u.csv:3: id: want a text that is not empty"},
		{"u.csv", "id\nx\ny\nx\n", `u.csv:4: the id "x" is that of line 2, too`},
		{"u.csv", "id\n", "u.csv: holds no users, so all there are would be deleted"},
		{"u.csv", "id,email\nx,\xff\n", "u.csv:2: holds text that is not valid UTF-8"},
		{"u.json", "{}", "u.json:1: not a list of objects"},
		{"u.json", "[\n{\"id\": \"x\"},\n{\"id\": 1}]", "u.json:3: id: want a text that is not empty"},
		{"u.json", "[\n{\"id\": \"x\"},\n\n7]", "u.json:4: not an object in JSON"},
		{"u.json", "[{\"id\": \"x\"},\n{\"id\"]", "u.json:2: not JSON"},
		{"u.json", "[{\"id\": \"x\"}]\n[]", "u.json:2: not JSON: something follows the list"},
		{"u.jsonl", "{\"id\": \"x\"}\n{\"id\": \"y\", \"group_ids\": \"a\"}\n", "u.jsonl:2: group_ids: want a list of texts"},
		{"u.jsonl", "{\"id\": \"x\", \"email\": null}\n", "u.jsonl:1: email: want a text"},
		{"u.jsonl", "{\"id\": \"x\", \"email\": \"a\\u0000\"}\n", "u.jsonl:1: holds text"},
		{"u.jsonl", "{\"id\": \"x\"}\nnope\n", "u.jsonl:2: not an object in JSON"},
		{"u.txt", "", "--format: needed"},
	} {
		path := write(t, test.name, test.content)
		r := try(t, environment(b.Replica), "directory", "load", path, "--kind", "users")
		if want := strings.Replace(test.want, test.name, path, 1); r.code != exitUsage || !strings.Contains(r.stderr, want) {
			t.Errorf("%s with %q: got exit code %d and %q, want %q", test.name, test.content, r.code, r.stderr, want)
		}
	}
	if r := try(t, environment(b.Replica), "directory", "load", write(t, "u.csv", "id\nx\n"), "--kind", "users", "--atomic"); r.code != exitUsage {
		t.Errorf("--atomic without a database: got exit code %d and %q", r.code, r.stderr)
	}
}
