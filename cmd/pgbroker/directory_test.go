package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"

	cmpdiff "github.com/google/go-cmp/cmp"

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
		if diff := cmpdiff.Diff(want, records()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		load(result(0, 0, 0, 2), users, "--kind", "users")
		load(result(0, 0, 0, 2), write(t, "users.json", `[{"group_ids": ["a", "b"], "id": "jane", "email": "jane@x", "display_name": "Doe, Jane"},
			{"id": "joe", "email": "joe@x"}]`), "--kind", "users")
		load(result(1, 1, 1, 0), write(t, "users", `{"id": "jane", "level": 7}`+"\n\n"+`{"id": "new"}`), "--kind", "users", "--format", "jsonl", "--allow-deletes", "50%")
		load(`{"type":"pomerium.io/DirectoryGroup","inserted":1,"updated":0,"deleted":0,"unchanged":0}`, write(t, "groups.csv", "id,name\na,Admins\n"), "--kind", "groups")
		want = []string{`a {"id": "a", "name": "Admins"}`, `jane {"id": "jane", "level": 7}`, `new {"id": "new"}`}
		if diff := cmpdiff.Diff(want, records()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		load(result(0, 0, 2, 0), write(t, "none.jsonl", ""), "--kind", "users", "--allow-deletes", "100%")
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
		{"u.csv", "\n,,\n", "u.csv:2: is empty; the first line has the names of the fields"},
		{"u.csv", "id,name\nx,\"y\nz,w\n", "u.csv:2: the row that begins here is wrong in line 3"},
		{"u.csv", "PK\x03\x04\x14\x00", "u.csv: is no text, but a workbook of a spreadsheet or an archive"},
		{"u.csv", "name\nx\n", "u.csv:1: there is no column id, but name: name the one that has ids with --id-field"},
		{"u.csv", "id,id\nx,y\n", `u.csv:1: column 2 has the name "id": want names, each once`},
		{"u.csv", "id,name\nx,y\nz\n", "u.csv:3: wrong number of fields: 1, and the first line has 2"},
		{"u.csv", "sep=;\nid;name\nx;y\nz\n", "u.csv:4: wrong number of fields"},
		{"u.csv", "id,,name\nx,,y\n", `u.csv:1: column 2 has the name "": want names, each once`},
		{"u.csv", "id,email\n1.15E+20,x\n", "u.csv:2: id: 1.15E+20 is a number that a spreadsheet has rounded"},
		{"u.csv", "id,email\n\"x\ny\",a\n1,,2\n", "u.csv:4: wrong number of fields: 3"},
		{"u.csv", "\xff\xfei\x00d\x00", "u.csv: holds no users"},
		{"u.csv", "\xff\xfei\x00d\x00\n\x00\x00\xd8", "u.csv:2: holds half of a character of UTF-16"},
		{"u.csv", "\xff\xfei\x00d\x00\n", "u.csv: is UTF-16 that ends in the midst of a character"},
		{"u.csv", "id\nx\n\"y\n", "u.csv:3: extraneous or missing \" in quoted-field"},
		{"u.csv", "id,email\nx,\n,y\n", "u.csv:3: id: want a text that is not empty"},
		{"u.csv", "id,email\nx,a\ny,b\nx,c\n", `u.csv:4: the id "x" is that of line 2, too`},
		{"u.csv", "id\n", "u.csv: holds no users, so all there are would be deleted"},
		{"u.csv", "id,email\nx,\xff\n", "u.csv:2: holds text that is not valid UTF-8"},
		{"u.json", "{}", "u.json:1: there is no column id"},
		{"u.json", `{"value": [{"id": "x"}], "@odata.nextLink": "https://graph"}`, "u.json: is not all: @odata.nextLink says that another page follows"},
		{"u.json", `{"users": [{"id": "x"}], "nextPageToken": "t"}`, "u.json: is not all: nextPageToken says"},
		{"u.json", "{\"value\": [\n{\"id\": \"x\"},\n7]}", "u.json:3: not an object in JSON"},
		{"u.json", "[{\"id\": \"x\", \"group_ids\": [7]}]", "u.json:1: group_ids: want a list of texts"},
		{"u.json", "[\n{\"id\": \"x\"},\n{\"id\": 1}]", "u.json:3: id: want a text that is not empty"},
		{"u.json", "[\n{\"id\": \"x\"},\n\n7]", "u.json:4: not an object in JSON"},
		{"u.json", "[{\"id\": \"x\"},\n{\"id\"]", "u.json:2: not JSON"},
		{"u.json", "[{\"id\": \"x\"}]\n[]", "u.json:2: not JSON: something follows the list"},
		{"u.jsonl", "{\"id\": \"x\"}\n{\"id\": \"y\", \"group_ids\": \"a\"}\n", "u.jsonl:2: group_ids: want a list of texts"},
		{"u.jsonl", "{\"id\": \"x\", \"email\": 7}\n", "u.jsonl:1: email: want a text"},
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

// inUTF16 is what Windows saves as Unicode.
func inUTF16(text string, order binary.AppendByteOrder, mark bool) string {
	var b []byte
	if mark {
		b = order.AppendUint16(b, 0xfeff)
	}
	for _, unit := range utf16.Encode([]rune(text)) {
		b = order.AppendUint16(b, unit)
	}
	return string(b)
}

// Files as people have them say the same in many ways.
func TestDirectoryFilesOfManyKinds(t *testing.T) {
	t.Parallel()
	const plain = "id,display_name,email,group_ids\njane,\"Doe, Jané 🙂\",jane@x,g1;g2\njoe,,joe@x,\n"
	withSemicolons := "id;display_name;email;group_ids\njane;Doe, Jané 🙂;jane@x;\"g1;g2\"\njoe;;joe@x;\n"
	users := []string{
		`jane {"display_name":"Doe, Jané 🙂","email":"jane@x","group_ids":["g1","g2"],"id":"jane"}`,
		`joe {"email":"joe@x","id":"joe"}`,
	}
	for name, test := range map[string]struct {
		kind, file, content string
		flags               []string
		want                []string
		said                string
	}{
		"plain":              {content: plain, want: users},
		"CRLF":               {content: strings.ReplaceAll(plain, "\n", "\r\n"), want: users},
		"CR":                 {content: strings.ReplaceAll(plain, "\n", "\r"), want: users},
		"UTF-8 mark":         {content: "\ufeff" + plain, want: users},
		"UTF-16 LE":          {content: inUTF16(plain, binary.LittleEndian, true), want: users},
		"UTF-16 BE":          {content: inUTF16(plain, binary.BigEndian, true), want: users},
		"UTF-16, no mark":    {content: inUTF16(plain, binary.LittleEndian, false), want: users},
		"UTF-16 BE, no mark": {content: inUTF16(plain, binary.BigEndian, false), want: users},
		"UTF-16 with tabs":   {file: "u.tsv", content: inUTF16(strings.NewReplacer(",", "\t", "Doe, ", "Doe, ").Replace("id,email\njoe,joe@x\n"), binary.LittleEndian, true), want: users[1:]},
		"semicolons":         {content: withSemicolons, want: users},
		"sep line":           {content: "sep=;\r\n" + strings.ReplaceAll(withSemicolons, "\n", "\r\n"), want: users},
		"quoted sep line":    {content: "\"sep=|\"\n" + "id|email\njoe|joe@x\n", want: users[1:]},
		"empty lines at end": {content: plain + "\n\n,,,\n   \n", want: users},
		"spare columns":      {content: "id,email,,\njoe,joe@x,,\n", want: users[1:]},
		"white space":        {content: " id\t, email\u00a0\n joe ,\u00a0joe@x \u200b\n", want: users[1:]},
		"a group twice":      {content: "id,group_ids\na,x; y ;x;;y\n", want: []string{`a {"group_ids":["x","y"],"id":"a"}`}},
		"an entry twice":     {content: "id,email\njoe,joe@x\njoe, joe@x\n", want: users[1:], said: "1 entry is there twice"},
		"a line in a cell":   {content: "id,note\na,\"one\r\ntwo\"\nb,c\n", want: []string{`a {"id":"a","note":"one\ntwo"}`, `b {"id":"b","note":"c"}`}, said: "nothing but ids that policies know"},
		"list of JSON":       {file: "u.json", content: `[{"id": "joe", "email": "joe@x"}]`, want: users[1:]},
		"objects in a .json": {file: "u.json", content: "{\"id\": \"joe\", \"email\": \"joe@x\"}\n{\"id\": \"jane\",\n \"email\": null}", want: []string{`jane {"id":"jane"}`, users[1]}},
		"a list in a .jsonl": {file: "u.jsonl", content: "\ufeff[{\"id\": \"joe\", \"email\": \"joe@x\"}]", want: users[1:]},
		"UTF-16 JSON":        {file: "u.json", content: inUTF16(`[{"id": "joe", "email": "joe@x"}]`, binary.LittleEndian, true), want: users[1:]},
		"pages of Graph": {
			file: "u.json",
			content: `{"@odata.context": "c", "@odata.nextLink": "n", "value": [{"id": "1", "displayName": "Jane", "mail": null,
				"userPrincipalName": "jane@x", "memberOf": [{"@odata.type": "#microsoft.graph.group", "id": "g1"}, {"id": "g1"}]}]}
				{"@odata.context": "c", "value": [{"id": "2", "displayName": "Joe", "mail": "joe@x", "userPrincipalName": "joe_x#EXT#@y", "memberOf": "g2"}]}`,
			want: []string{
				`1 {"display_name":"Jane","email":"jane@x","group_ids":["g1"],"id":"1"}`,
				`2 {"display_name":"Joe","email":"joe@x","group_ids":["g2"],"id":"2","userPrincipalName":"joe_x#EXT#@y"}`,
			},
			said: "displayName as display_name",
		},
		"Entra CSV": {
			content: "userPrincipalName,displayName,surname,mail,givenName,objectId,userType\njane@x,Jane Doe,Doe,,Jane,o1,Member\n",
			want:    []string{`o1 {"display_name":"Jane Doe","email":"jane@x","givenName":"Jane","id":"o1","surname":"Doe","userType":"Member"}`},
		},
		"Entra groups": {
			kind: "groups", content: "id,displayName,groupType,mail\ng1,Admins,Security,\n", want: []string{`g1 {"groupType":"Security","id":"g1","name":"Admins"}`},
		},
		"Okta API": {
			file:    "u.json",
			content: `[{"id": "00u1", "status": "ACTIVE", "profile": {"login": "jane", "email": "jane@x", "firstName": "Jane", "lastName": "Doe"}}]`,
			want:    []string{`00u1 {"display_name":"Jane Doe","email":"jane@x","firstName":"Jane","id":"00u1","lastName":"Doe","login":"jane","status":"ACTIVE"}`},
		},
		"Okta CSV": {
			content: "User Id,Username,First name,Last name,Primary email\n00u1,jane,Jane,Doe,jane@x\n",
			want:    []string{`00u1 {"First name":"Jane","Last name":"Doe","Username":"jane","display_name":"Jane Doe","email":"jane@x","id":"00u1"}`},
		},
		"Okta groups": {
			kind: "groups", file: "g.json", content: `[{"id": "g1", "profile": {"name": "Admins", "description": null}}]`, want: []string{`g1 {"description":null,"id":"g1","name":"Admins"}`},
		},
		"Google CSV": {
			content: "First Name [Required],Last Name [Required],Email Address [Required],Password [Required],Status [READ ONLY]\nJane,Doe,jane@x,****,Active\n",
			want: []string{`jane@x {"First Name [Required]":"Jane","Last Name [Required]":"Doe","Status [READ ONLY]":"Active",` +
				`"display_name":"Jane Doe","email":"jane@x","id":"jane@x"}`},
			said: "the ids are taken from Email Address [Required]",
		},
		"Google API": {
			file:    "u.json",
			content: `{"kind": "admin#directory#users", "users": [{"id": "1", "primaryEmail": "jane@x", "name": {"fullName": "Jane Doe", "givenName": "Jane"}}]}`,
			want:    []string{`1 {"display_name":"Jane Doe","email":"jane@x","givenName":"Jane","id":"1"}`},
		},
		"LDAP": {
			content: "dn,uid,cn,sn,mail,memberOf,userPassword\n\"uid=jane,dc=x\",jane,Jane Doe,Doe,jane@x,\"cn=a\\;b,dc=x;cn=c,dc=x\",{SSHA}x\n",
			want:    []string{`jane {"display_name":"Jane Doe","dn":"uid=jane,dc=x","email":"jane@x","group_ids":["cn=a\\;b,dc=x","cn=c,dc=x"],"id":"jane","sn":"Doe","uid":"jane"}`},
			said:    "left out, as passwords are: userPassword",
		},
		"LDAP groups": {
			kind: "groups", content: "dn,cn,entryUUID\n\"cn=c,dc=x\",C,u1\n", want: []string{`cn=c,dc=x {"entryUUID":"u1","id":"cn=c,dc=x","name":"C"}`},
		},
		"Active Directory": {
			content: "#TYPE Microsoft.ActiveDirectory.Management.ADUser\r\n\"DistinguishedName\",\"Enabled\",\"Name\",\"ObjectGUID\",\"SamAccountName\",\"UserPrincipalName\"\r\n" +
				"\"CN=Jane,DC=x\",\"True\",\"Jane Doe\",\"u1\",\"jane\",\"jane@x\"\r\n",
			want: []string{`u1 {"DistinguishedName":"CN=Jane,DC=x","Enabled":"True","SamAccountName":"jane","display_name":"Jane Doe","email":"jane@x","id":"u1"}`},
		},
		"ids of another field": {
			content: "id,uid,mail\n7,jane,jane@x\n", flags: []string{"--id-field", "uid"}, want: []string{`jane {"email":"jane@x","id":"jane","uid":"jane"}`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stderr bytes.Buffer
			load := &directoryLoad{app: &app{stderr: &stderr}, kind: cmp.Or(test.kind, "users"), path: write(t, cmp.Or(test.file, "u.csv"), test.content)}
			if len(test.flags) > 0 {
				load.idField = test.flags[1]
			}
			entries, err := load.read(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, entry := range entries {
				b, err := json.Marshal(entry.data.AsMap())
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, entry.id+" "+string(b))
			}
			slices.Sort(got)
			if diff := cmpdiff.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if !strings.Contains(stderr.String(), test.said) || test.said == "" && strings.Contains(stderr.String(), "warning") {
				t.Errorf("said is %q, want %q", stderr.String(), test.said)
			}
		})
	}
}

// What would delete more than is allowed is refused, whichever way it goes, and a dry run says what would be done.
func TestDirectoryLoadRefusesToDeleteMuch(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	usersUpTo := func(from, n int) string {
		text := "id,email\n"
		for i := from; i < n; i++ {
			text += fmt.Sprintf("u%d,u%d@x\n", i, i)
		}
		return write(t, "u.csv", text)
	}
	for name, env := range map[string][]string{
		"database": append(os.Environ(), "PGBROKER_DATABASE_URL="+b.Database.ConnString),
		"server":   environment(b.Replica),
	} {
		b.Database.Exec(t, "DELETE FROM pgbroker.records")
		mustTry(t, env, "directory", "load", "--kind", "users", usersUpTo(0, 10))
		stored := func(want int) {
			t.Helper()
			var n int
			if err := b.Database.Pool.QueryRow(t.Context(), "SELECT count(*) FROM pgbroker.records").Scan(&n); err != nil || n != want {
				t.Errorf("%s: %d are stored, %v, want %d", name, n, err, want)
			}
		}
		for _, c := range []struct {
			file string
			args []string
			want string
		}{
			{usersUpTo(0, 7), nil, "would delete 3 of 10 users (30 %), and no more than 20 % are allowed: nothing was written. If that is meant, give --allow-deletes 30%"},
			{usersUpTo(0, 7), []string{"--allow-deletes", "29%"}, "no more than 29 %"},
			{usersUpTo(10, 30), nil, "would delete 10 of 10 users (100 %)"},
			{usersUpTo(10, 30), []string{"--allow-deletes", "99"}, "would delete 10 of 10 users"},
			{usersUpTo(0, 0), []string{"--allow-deletes", "99%"}, "holds no users"},
			{usersUpTo(0, 7), []string{"--allow-deletes", "101%"}, "want a share from 0% to 100%"},
		} {
			r := try(t, env, append([]string{"directory", "load", "--kind", "users", c.file}, c.args...)...)
			if r.code != exitUsage || !strings.Contains(r.stderr, c.want) {
				t.Errorf("%s: %q: exit code %d and %q, want %q", name, c.args, r.code, r.stderr, c.want)
			}
			stored(10)
		}
		for args, want := range map[string]string{
			usersUpTo(0, 7):   `"inserted":0,"updated":0,"deleted":3,"unchanged":7}`,
			usersUpTo(10, 12): `"inserted":2,"updated":0,"deleted":10,"unchanged":0}`,
		} {
			r := try(t, env, "directory", "load", "--kind", "users", args, "--dry-run", "-o", "json")
			if r.code != exitOK || !strings.Contains(r.stdout, want) || !strings.Contains(r.stderr, "nothing was written") ||
				!strings.Contains(r.stderr, "this would be refused: it deletes") {
				t.Errorf("%s: dry run: %+v, want %s", name, r, want)
			}
			stored(10)
		}
		if r := try(t, env, "directory", "load", "--kind", "users", usersUpTo(0, 7), "--dry-run", "--allow-deletes", "30%"); strings.Contains(r.stderr, "refused") {
			t.Errorf("%s: dry run of what is allowed: %+v", name, r)
		}
		mustTry(t, env, "directory", "load", "--kind", "users", usersUpTo(0, 8))
		stored(8)
		mustTry(t, env, "directory", "load", "--kind", "users", usersUpTo(0, 2), "--allow-deletes", "75%")
		stored(2)
		mustTry(t, env, "directory", "load", "--kind", "users", usersUpTo(0, 0), "--allow-deletes", "100%")
		stored(0)
	}
}
