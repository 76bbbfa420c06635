package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server/servertest"
)

// environment is what a client needs to reach a replica.
func environment(r *servertest.Replica) []string {
	return []string{"PGBROKER_ADDRESS=" + r.Address, "PGBROKER_SHARED_SECRET=" + servertest.Secret}
}

// must runs a command that has to succeed and returns its output.
func mustTry(t testing.TB, env []string, args ...string) string {
	t.Helper()
	r := try(t, env, args...)
	if r.code != exitOK {
		t.Fatalf("%q: exit code %d: %s", args, r.code, r.stderr)
	}
	// All JSON has keys of one style, whoever wrote it.
	if key := camelCaseKey.FindString(r.stdout); key != "" && slices.Contains(args, "json") {
		t.Errorf("%q: got the key %s, want the style of user_id", args, key)
	}
	return r.stdout
}

var camelCaseKey = regexp.MustCompile(`"[a-z]\w*[A-Z]\w*":`)

var (
	anyTime    = regexp.MustCompile(`\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d(:\d\d)?)?`)
	anyVersion = regexp.MustCompile(`"version":\d+|(?m)^(version: +)?\d+`)
)

// golden replaces what differs from run to run.
func golden(output string) string {
	output = anyTime.ReplaceAllString(output, "TIME")
	return anyVersion.ReplaceAllStringFunc(output, func(found string) string {
		return strings.TrimRight(found, `0123456789"`) + "N"
	})
}

// aligned takes the padding out of a table, whose width follows from numbers that differ from run to run.
func aligned(output string) string {
	return regexp.MustCompile(` {2,}`).ReplaceAllString(golden(output), "  ")
}

const sampleSession = `{"id": "s1", "user_id": "jane", "oauth_token": {"accessToken": "` + canary + `", "token_type": "Bearer"}, "id_token": {"raw": "` + canary + `"}}`

func TestRecordCommands(t *testing.T) {
	broker := servertest.New(t, servertest.Options{})
	env := environment(broker.Replica)
	expect := func(name, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s:\n--- got\n%s--- want\n%s", name, got, want)
		}
	}

	out := mustTry(t, env, "record", "put", "-t", "session.Session", "-i", "s1", "--data", sampleSession)
	expect("put", aligned(out), "VERSION  TYPE  ID\nN  session.Session  s1\n")
	out = mustTry(t, env, "record", "put", "-t", "pomerium.io/DirectoryUser", "-i", "jane", "-d", `{"id": "jane", "email": "jane@example.com", "n": [1, null]}`, "-o", "json")
	expect("put json", golden(out), `{"version":N,"type":"pomerium.io/DirectoryUser","id":"jane","modified_at":"TIME"}`+"\n")

	for kind, want := range map[string]string{
		"pomerium.io/DirectoryUsers": "did you mean pomerium.io/DirectoryUser?", "example.com/new": "is new: the server has no record of it",
		"pomerium.io/DirectoryGroup": "", "user.User": "",
	} {
		r := try(t, env, "record", "put", "-t", kind, "-i", "x", "-d", "{}")
		if !strings.Contains(r.stderr, want) || want == "" && r.stderr != "" {
			t.Errorf("first put of type %s: said is %q, want %q", kind, r.stderr, want)
		}
		if r := try(t, env, "record", "put", "-t", kind, "-i", "x", "-d", "{}"); r.stderr != "" {
			t.Errorf("second put of type %s: said is %q", kind, r.stderr)
		}
		mustTry(t, env, "record", "delete", "-t", kind, "-i", "x")
	}
	out = mustTry(t, env, "record", "get", "-t", "session.Session", "-i", "s1")
	expect("get", golden(out), `type:     type.googleapis.com/session.Session
id:       s1
version:  N
modified: TIME
data:     {
  "@type": "type.googleapis.com/session.Session",
  "id": "s1",
  "user_id": "jane",
  "id_token": {},
  "oauth_token": {
    "token_type": "Bearer"
  }
}
`)
	out = mustTry(t, env, "record", "get", "-t", "type.googleapis.com/session.Session", "-i", "s1", "-o", "json")
	expect("get json", golden(out), `{"version":N,"type":"type.googleapis.com/session.Session","id":"s1","modified_at":"TIME",`+
		`"data":{"@type":"type.googleapis.com/session.Session","id":"s1","user_id":"jane","id_token":{},"oauth_token":{"token_type":"Bearer"}}}`+"\n")
	out = mustTry(t, env, "record", "get", "-t", "session.Session", "-i", "s1", "-o", "json", "--show-secrets")
	if strings.Count(out, canary) != 2 {
		t.Errorf("get --show-secrets: got %s, want both tokens", out)
	}

	out = mustTry(t, env, "record", "patch", "-t", "session.Session", "-i", "s1", "-d", `{"userId": "john"}`, "-m", "user_id")
	expect("patch", aligned(out), "VERSION  TYPE  ID\nN  session.Session  s1\n")
	out = mustTry(t, env, "record", "query", "-t", "session.Session")
	expect("query", aligned(out), "VERSION  MODIFIED  ID  DATA\n"+
		`N  TIME  s1  {"id":"s1","user_id":"john","id_token":{},"oauth_token":{"token_type":"Bearer"}}`+"\n")
	out = mustTry(t, env, "record", "query", "--filter", `{"email": "jane@example.com"}`)
	expect("query filter", aligned(out), "VERSION  MODIFIED  TYPE  ID  DATA\n"+
		`N  TIME  pomerium.io/DirectoryUser  jane  {"email":"jane@example.com","id":"jane","n":[1,null]}`+"\n")
	out = mustTry(t, env, "record", "query", "--text", "EXAMPLE.com", "-o", "json")
	expect("query text", golden(out), `{"version":N,"type":"pomerium.io/DirectoryUser","id":"jane","modified_at":"TIME","data":`+
		`{"@type":"type.googleapis.com/google.protobuf.Struct","value":{"email":"jane@example.com","id":"jane","n":[1,null]}}}`+"\n")
	r := try(t, env, "record", "query", "--limit", "1")
	if want := "pgbroker: 1 of 2 records; see --limit and --offset\n"; r.stderr != want {
		t.Errorf("query --limit: got %q, want %q", r.stderr, want)
	}

	expect("types", mustTry(t, env, "types"), "TYPE                       RECORDS\npomerium.io/DirectoryUser  1\nsession.Session            1\n")
	expect("types json", mustTry(t, env, "types", "-o", "json"), `{"type":"pomerium.io/DirectoryUser","records":1}`+"\n"+
		`{"type":"type.googleapis.com/session.Session","records":1}`+"\n")

	r = try(t, env, "record", "delete", "-t", "session.Session", "-i", "s1", "-i", "nobody")
	expect("delete", aligned(r.stdout), "VERSION  TYPE  ID\nN  session.Session  s1\n")
	if r.code != exitNotFound || r.stderr != "pgbroker: record not found: nobody\n" {
		t.Errorf("delete: got exit code %d and %q", r.code, r.stderr)
	}
	for _, args := range [][]string{
		{"record", "get", "-t", "session.Session", "-i", "s1"},
		{"record", "delete", "-t", "session.Session", "-i", "s1"},
		{"record", "patch", "-t", "session.Session", "-i", "s1", "-d", "{}", "-m", "user_id"},
		{"options", "get", "-t", "nothing"},
	} {
		if r := try(t, env, args...); r.code != exitNotFound || r.stdout != "" {
			t.Errorf("%q: got exit code %d and %q, want %d", args, r.code, r.stdout, exitNotFound)
		}
	}
}

// TestPayloads: whatever can be got can be put again, byte for byte.
func TestPayloads(t *testing.T) {
	broker := servertest.New(t, servertest.Options{})
	env := environment(broker.Replica)
	file := writeFile(t, "payload.json", `{"id": "from a file"}`)
	for name, c := range map[string]struct {
		kind, data, stdin string
		flags             []string
		want              proto.Message
		raw               *anypb.Any
	}{
		"message":              {kind: "session.Session", data: `{"id": "a"}`, want: &session.Session{Id: "a"}},
		"file":                 {kind: "session.Session", data: "@" + file, want: &session.Session{Id: "from a file"}},
		"standard input":       {kind: "session.Session", data: "-", stdin: `{"id": "from stdin"}`, want: &session.Session{Id: "from stdin"}},
		"proto names":          {kind: "session.Session", data: `{"user_id": "a"}`, want: &session.Session{UserId: "a"}},
		"named by flag":        {kind: "example.com/x", data: `{"id": "a"}`, flags: []string{"--payload-type", "session.Session"}, want: &session.Session{Id: "a"}},
		"named by URL":         {kind: "example.com/x", data: `{"id": "a"}`, flags: []string{"--payload-type", "type.googleapis.com/session.Session"}, want: &session.Session{Id: "a"}},
		"named in the payload": {kind: "example.com/x", data: `{"@type": "type.googleapis.com/session.Session", "id": "a"}`, want: &session.Session{Id: "a"}},
		"not known": {
			kind: "type.googleapis.com/nobody.Knows", data: `{"@type": "type.googleapis.com/nobody.Knows", "value": "AAEC/w=="}`,
			raw: &anypb.Any{TypeUrl: "type.googleapis.com/nobody.Knows", Value: []byte{0, 1, 2, 255}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := tryInput(t, c.stdin, env, append([]string{"record", "put", "-t", c.kind, "-i", name, "-d", c.data}, c.flags...)...)
			if r.code != exitOK {
				t.Fatalf("exit code %d: %s", r.code, r.stderr)
			}
			want := c.raw
			if want == nil {
				var err error
				if want, err = anypb.New(c.want); err != nil {
					t.Fatal(err)
				}
			}
			stored := func() *anypb.Any {
				t.Helper()
				response, err := broker.Get(t.Context(), &databroker.GetRequest{Type: recordType(c.kind), Id: name})
				if err != nil {
					t.Fatal(err)
				}
				return response.GetRecord().GetData()
			}
			if got := stored(); !proto.Equal(got, want) {
				t.Errorf("stored %v, want %v", got, want)
			}
			var record struct{ Data json.RawMessage }
			if err := json.Unmarshal([]byte(mustTry(t, env, "record", "get", "-t", c.kind, "-i", name, "-o", "json")), &record); err != nil {
				t.Fatal(err)
			}
			if r := tryInput(t, string(record.Data), env, "record", "put", "-t", c.kind, "-i", name, "-d", "-"); r.code != exitOK {
				t.Fatalf("put what was got: exit code %d: %s", r.code, r.stderr)
			}
			if got := stored(); !proto.Equal(got, want) {
				t.Errorf("put what was got: stored %v, want %v", got, want)
			}
			mustTry(t, env, "record", "get", "-t", c.kind, "-i", name) // for people
		})
	}
	// No payload at all.
	if _, err := broker.Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{{Type: "bare", Id: "1"}}}); err != nil {
		t.Fatal(err)
	}
	if out := mustTry(t, env, "record", "get", "-t", "bare", "-i", "1"); !strings.Contains(out, "data:     ") {
		t.Errorf("get without payload: got %q", out)
	}
}

func TestOptionsCommands(t *testing.T) {
	env := environment(servertest.New(t, servertest.Options{}).Replica)
	want := "OPTION           VALUE\ncapacity         7\nttl              15m\nindexable field  a\nindexable field  b\n"
	set := []string{"options", "set", "-t", "example.com/x", "--capacity", "7", "--ttl", "15m", "--indexable-field", "a", "--indexable-field", "b"}
	for _, args := range [][]string{set, {"options", "get", "-t", "example.com/x"}} {
		if got := mustTry(t, env, args...); got != want {
			t.Errorf("%q: got\n%s", args, got)
		}
	}
	wantJSON := `{"capacity":7,"indexable_fields":["a","b"],"ttl":"900s"}` + "\n"
	if got := mustTry(t, env, "options", "get", "-t", "example.com/x", "-o", "json"); got != wantJSON {
		t.Errorf("get json: got %s", got)
	}
	// What is left out is taken back.
	if got := mustTry(t, env, "options", "set", "-t", "example.com/x", "--capacity=0", "-o", "json"); got != `{"capacity":0}`+"\n" {
		t.Errorf("set --capacity=0: got %s", got)
	}
	mustTry(t, env, "options", "set", "-t", "example.com/x")
}

func TestLeaseCommands(t *testing.T) {
	env := environment(servertest.New(t, servertest.Options{}).Replica)
	id := strings.TrimSpace(mustTry(t, env, "lease", "acquire", "--name", "job"))
	if r := try(t, env, "lease", "acquire", "--name", "job"); r.code != exitTaken || !strings.Contains(r.stderr, "lease is already taken") {
		t.Errorf("acquire a taken lease: got exit code %d and %q, want %d", r.code, r.stderr, exitTaken)
	}
	mustTry(t, env, "lease", "renew", "--name", "job", "--id", id, "--duration", "1m")
	if r := try(t, env, "lease", "renew", "--name", "job", "--id", "other"); r.code != exitTaken {
		t.Errorf("renew another's lease: got exit code %d and %q, want %d", r.code, r.stderr, exitTaken)
	}
	mustTry(t, env, "lease", "release", "--name", "job", "--id", id)
	out := mustTry(t, env, "lease", "acquire", "--name", "job", "-o", "json")
	if !regexp.MustCompile(`^\{"id":"[^"]+"\}\n$`).MatchString(out) {
		t.Errorf("acquire -o json: got %q", out)
	}
}

func TestServiceCommands(t *testing.T) {
	env := environment(servertest.New(t, servertest.Options{}).Replica)
	out := mustTry(t, env, "service", "report", "--kind", "prometheus-metrics", "--endpoint", "https://user:"+canary+"@host:9090/metrics")
	if !strings.HasPrefix(out, "report again within ") {
		t.Errorf("report: got %q", out)
	}
	mustTry(t, env, "service", "report", "--kind", "PROXY", "--endpoint", "https://proxy")
	want := "KIND                ENDPOINT\nprometheus-metrics  https://user:xxxxx@host:9090/metrics\n"
	if got := mustTry(t, env, "service", "list", "--kind", "prometheus-metrics"); got != want {
		t.Errorf("list: got\n%swant\n%s", got, want)
	}
	out = mustTry(t, env, "service", "list", "-o", "json")
	for _, want := range []string{`{"kind":"PROXY","endpoint":"https://proxy"}`, "xxxxx"} {
		if !strings.Contains(out, want) || strings.Contains(out, canary) {
			t.Errorf("list -o json: got %s, want %s in it, without the password", out, want)
		}
	}
	if out := mustTry(t, env, "service", "list", "--show-secrets"); !strings.Contains(out, canary) {
		t.Errorf("list --show-secrets: got %s", out)
	}
}

func TestServerCommands(t *testing.T) {
	env := environment(servertest.New(t, servertest.Options{}).Replica)
	mustTry(t, env, "health", "--for", "writing", "--wait", "30s") // until the database was asked, info says that it was not
	mustTry(t, env, "checkpoint", "set", "--server-version", "18446744073709551615", "--record-version", "7")
	if got, want := mustTry(t, env, "checkpoint", "get"), "server version: 18446744073709551615\nrecord version: 7\n"; !strings.HasPrefix(got, want) {
		t.Errorf("checkpoint get: got %q", got)
	}
	if got, want := mustTry(t, env, "checkpoint", "get", "-o", "json"), `{"checkpoint":{"server_version":18446744073709551615,"record_version":7}`; !strings.HasPrefix(got, want) {
		t.Errorf("checkpoint get -o json: got %q", got)
	}
	if got := mustTry(t, env, "info"); !regexp.MustCompile(`^server version: +[1-9]\d*\nearliest record version: +\d+\nlatest record version: +\d+\nwriting: +yes\n$`).MatchString(got) {
		t.Errorf("info: got %q", got)
	}
	if got := mustTry(t, env, "info", "-o", "json"); !strings.HasPrefix(got, `{"server_version":`) || strings.Contains(got, `:"`) || !strings.Contains(got, `"writable":true`) {
		t.Errorf("info -o json: got %q", got)
	}
	// Health needs no secret.
	for _, env := range [][]string{env, env[:1]} {
		for _, args := range [][]string{{"health"}, {"health", "--for", "reading"}, {"health", "--for", "writing", "--wait", "10s"}} {
			if got := mustTry(t, env, args...); got != "SERVING\n" {
				t.Errorf("%q: got %q", args, got)
			}
		}
	}
	for _, args := range [][]string{{"health", "--for", "everything"}, {"health", "--for", "writing", "--service", "x"}} {
		if r := try(t, env, args...); r.code != exitUsage || !strings.Contains(r.stderr, "--for") {
			t.Errorf("%q: got exit code %d and %q", args, r.code, r.stderr)
		}
	}
	if got := mustTry(t, env, "health", "-o", "json"); got != `{"status":"SERVING"}`+"\n" {
		t.Errorf("health -o json: got %q", got)
	}
}

// TestEveryExitCode: each code of the table in docs/configuration.md comes out of a program that does what the table says.
func TestEveryExitCode(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	env := environment(b.Replica)
	mustTry(t, env, "lease", "acquire", "--name", "job")
	mustTry(t, env, "record", "put", "-t", "session.Session", "-i", "a", "-d", `{"user_id": "jane"}`)
	mustTry(t, env, "record", "put", "-t", "session.Session", "-i", "b", "-d", `{"user_id": "jane"}`)
	damaged := dbtest.New(t)
	damaged.Exec(t, `ALTER TABLE pgbroker.records DISABLE TRIGGER records_log_delete`)
	seen := make(map[int]bool)
	for _, c := range []struct {
		code int
		r    result
	}{
		{exitOK, try(t, env, "health")},
		{exitFailure, try(t, env, "record", "query", "--filter", `{"a": {"$contains": "x"}}`)},
		{exitUsage, try(t, env, "sessions", "revoke")},
		{exitNotFound, try(t, env, "sessions", "show", "nobody")},
		{exitTaken, try(t, env, "lease", "acquire", "--name", "job")},
		{exitUnreachable, try(t, []string{"PGBROKER_ADDRESS=127.0.0.1:1"}, "health")},
		{exitUnauthenticated, try(t, []string{env[0], "SHARED_SECRET=" + canary}, "types")},
		{exitNoneMatched, try(t, env, "sessions", "revoke", "--user", "nobody", "--yes")},
		{exitProblems, try(t, append(os.Environ(), "PGBROKER_DATABASE_URL="+damaged.ConnString), "check", "--quick")},
		{exitInterrupted, tryAtTerminal(t, "no\n", 80, env, "sessions", "revoke", "--user", "jane")},
	} {
		if c.r.code != c.code {
			t.Errorf("exit code %d, want %d: %s", c.r.code, c.code, c.r.stderr)
		}
		seen[c.code] = true
	}
	help := try(t, nil, "--help").stdout
	for _, c := range exitCodes {
		if !seen[c.code] {
			t.Errorf("no program is run that ends with %d: %s", c.code, c.meaning)
		}
		if !strings.Contains(help, fmt.Sprintf("\n  %-4d %.20s", c.code, c.meaning)) {
			t.Errorf("the help does not explain %d", c.code)
		}
	}
}

// TestExitCodes: what goes wrong between client and server, with what a person is told.
func TestExitCodes(t *testing.T) {
	broker := servertest.New(t, servertest.Options{})
	address := "PGBROKER_ADDRESS=" + broker.Address
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	noState := "PGBROKER_DATA_DIR=" + t.TempDir()
	for name, c := range map[string]struct {
		env  []string
		args []string
		code int
		want []string
	}{
		"no secret":      {[]string{address, noState}, nil, exitUnauthenticated, []string{"does not accept this client", "no shared secret is configured"}},
		"another secret": {[]string{address, "SHARED_SECRET=" + canary}, nil, exitUnauthenticated, []string{"invalid JWT", "signed with key "}},
		"nobody there": {
			[]string{"GRPC_ADDRESS=" + dead.Addr().String(), "SHARED_SECRET=" + canary}, nil, exitUnreachable,
			[]string{"cannot reach a server at " + dead.Addr().String(), "connection refused", "pgbroker serve"},
		},
		"no TLS there": {
			[]string{address, "SHARED_SECRET=" + canary}, []string{"--tls-server-name", "x"}, exitUnreachable,
			[]string{"the server speaks plaintext", "--grpc-insecure"},
		},
		"bad secret":        {[]string{address, "SHARED_SECRET=short"}, nil, exitUsage, []string{"shared_secret (env SHARED_SECRET)"}},
		"secret file gone":  {[]string{address}, []string{"--shared-secret-file=/nowhere"}, exitUsage, []string{"shared_secret_file (flag --shared-secret-file)", "/nowhere"}},
		"CA gone":           {[]string{address}, []string{"--tls-ca-file=/nowhere"}, exitUsage, []string{"tls_ca_file (flag --tls-ca-file)", "/nowhere"}},
		"key without cert":  {[]string{address}, []string{"--tls-key-file=/nowhere"}, exitUsage, []string{"tls_key_file (flag --tls-key-file)", "without its certificate"}},
		"bad certificate":   {[]string{address}, []string{"--tls-cert=" + canary, "--tls-key=" + canary}, exitUsage, []string{"tls_cert (flag --tls-cert)", "tls_key (flag --tls-key)"}},
		"interrupted setup": {[]string{address, "PGBROKER_CONFIG=/nowhere"}, nil, exitUsage, []string{"config (env PGBROKER_CONFIG): /nowhere"}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, command := range [][]string{{"types"}, {"watch", "--no-wait"}} {
				r := try(t, c.env, append(command, c.args...)...)
				if r.code != c.code {
					t.Errorf("%v: got exit code %d, want %d: %s", command, r.code, c.code, r.stderr)
				}
				for _, want := range c.want {
					if !strings.Contains(r.stderr, want) {
						t.Errorf("%v: got %q, want it to contain %q", command, r.stderr, want)
					}
				}
				if strings.Contains(r.stderr, canary) {
					t.Errorf("%v: the secret is in %q", command, r.stderr)
				}
			}
		})
	}
	t.Run("interrupted", func(t *testing.T) {
		silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and never answers
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		var stderr strings.Builder
		code := run(ctx, []string{"types"}, strings.NewReader(""), io.Discard, &stderr, []string{"GRPC_ADDRESS=" + silent.Addr().String(), noState})
		if code != exitInterrupted || stderr.String() != "" {
			t.Errorf("got exit code %d and %q, want %d", code, stderr.String(), exitInterrupted)
		}
		r := try(t, []string{"GRPC_ADDRESS=" + silent.Addr().String(), noState}, "types", "--timeout", "100ms")
		if r.code != exitUnreachable {
			t.Errorf("--timeout: got exit code %d and %q, want %d", r.code, r.stderr, exitUnreachable)
		}
	})
}

// TestBadInput: what a person types wrong is said before a server is asked, naming the flag.
func TestBadInput(t *testing.T) {
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"recrd"}, `unknown command "recrd" for "pgbroker"`},
		{[]string{"record", "gett"}, `unknown command "gett" for "pgbroker record" (did you mean get?)`},
		{[]string{"types", "extra"}, `unknown command "extra"`},
		{[]string{"types", "--colour"}, "unknown flag --colour"},
		{[]string{"types", "-o", "yaml"}, "want one of table, json"},
		{[]string{"types", "--timeout", "soon"}, `"soon" for "--timeout" flag: want a duration with its unit`},
		{[]string{"types", "--timeout", "0s"}, "must be more than 0"},
		{[]string{"types", "--address", "nowhere"}, "address (flag --address)"},
		{[]string{"record", "get", "-t", "x"}, `required flag(s) "id" not set`},
		{[]string{"record", "get", "-t", "x", "-i", "\xff"}, "--id: "},
		{[]string{"record", "get", "-t", "a\x00b", "-i", "x"}, "--type: must not contain a NUL"},
		{[]string{"record", "put", "-t", "x", "-i", "y"}, `required flag(s) "data" not set`},
		{[]string{"record", "put", "-t", "x", "-i", "y", "-d", "{"}, "--data: not valid JSON at byte 1"},
		{[]string{"record", "put", "-t", "x", "-i", "y", "-d", ""}, "--data: not valid JSON"},
		{[]string{"record", "put", "-t", "x", "-i", "y", "-d", "[]"}, "--data: not a google.protobuf.Struct"},
		{[]string{"record", "put", "-t", "session.Session", "-i", "y", "-d", `{"userid": "x"}`}, `--data: not a session.Session: (line 1:2): unknown field "userid"`},
		{[]string{"record", "put", "-t", "type.googleapis.com/no.Such", "-i", "y", "-d", "{}"}, `the message "no.Such" is not known`},
		{[]string{"record", "put", "-t", "x", "-i", "y", "-d", "{}", "--payload-type", "no.Such"}, `the message "no.Such" is not known`},
		{[]string{"record", "put", "-t", "x", "-i", "y", "-d", `{"@type": "no.Such", "value": "!"}`}, `the message "no.Such" is not known`},
		{[]string{"record", "put", "-t", "x", "-i", "y", "-d", "@/nowhere"}, "--data: open /nowhere"},
		{[]string{"record", "patch", "-t", "x", "-i", "y", "-d", "{}"}, `required flag(s) "mask" not set`},
		{[]string{"record", "delete", "-t", "x"}, `required flag(s) "id" not set`},
		{[]string{"record", "delete", "-t", "x", "-i", "\xff"}, "--id: "},
		{[]string{"record", "query", "--limit", "-1"}, "--limit: -1: must not be negative"},
		{[]string{"record", "query", "--offset", "-1"}, "--offset: -1: must not be negative"},
		{[]string{"record", "query", "--filter", "[1]"}, "--filter: want a JSON object"},
		{[]string{"record", "query", "--text", "\xff"}, "--text: "},
		{[]string{"options", "get"}, `required flag(s) "type" not set`},
		{[]string{"options", "set", "-t", "x", "--capacity", "-1"}, "--capacity"},
		{[]string{"options", "set", "-t", "x", "--ttl", "0s"}, "--ttl: 0s: must be more than 0"},
		{[]string{"watch", "--since", "-1"}, "--since"},
		{[]string{"watch", "--since", "1", "--initial"}, "since initial"},
		{[]string{"lease", "acquire"}, `required flag(s) "name" not set`},
		{[]string{"lease", "acquire", "--name", "x", "--duration", "0s"}, "--duration: 0s: must be more than 0"},
		{[]string{"lease", "renew", "--name", "x"}, `required flag(s) "id" not set`},
		{[]string{"service", "report", "--kind", "cook", "--endpoint", "http://x"}, `--kind: "cook": want one of databroker, authorize`},
		{[]string{"service", "report", "--kind", "proxy", "--endpoint", "x"}, "--endpoint: want a URL"},
		{[]string{"service", "list", "--kind", "undefined-do-not-use"}, "--kind: "},
		{[]string{"checkpoint", "set", "--server-version", "x", "--record-version", "1"}, "--server-version"},
		{[]string{"secret", "fingerprint", "--shared-secret", "x"}, "shared_secret (flag --shared-secret)"},
		{[]string{"migrate", "up"}, "database_url is not set"},
		{[]string{"migrate", "up", "--database-url", "mysql://h/d"}, "database_url (flag --database-url)"},
		{[]string{"migrate", "down"}, "accepts 1 arg(s), received 0"},
		{[]string{"migrate", "down", "0"}, `"0": want a number from 1`},
		{[]string{"migrate", "force", "x"}, `"x": want a number from 0`},
		{[]string{"serve", "extra"}, `pgbroker serve takes no argument, but there is "extra"`},
		{[]string{"record", "get", "-t", "x", "y"}, `pgbroker record get takes no argument, but there is "y" (an id is given as --id)`},
		{[]string{"record", "list", "-t", "x"}, `unknown command "list" for "pgbroker record"`},
		{[]string{"lease", "list", "--output", "json"}, `unknown command "list" for "pgbroker lease"`},
		{[]string{"sessions", "list", "--limit", "x"}, `invalid argument "x" for "--limit" flag: want a whole number` + "\n"},
		{[]string{"sessions", "list", "--expired=maybe"}, `invalid argument "maybe" for "--expired" flag: want true or false` + "\n"},
		{[]string{"types", "set", "-t", "x", "--user-limit", "3000000000"}, `"3000000000" for "--user-limit" flag: the number is too large or too small`},
		{[]string{"watch", "--since", "-2"}, `"-2" for "--since" flag: want a whole number, not below 0`},
		{[]string{"serve", "--database-url", "postgres://h/d"}, "no shared secret: set shared_secret_file"},
		{[]string{"types", "--adress", "x:1"}, "unknown flag --adress (did you mean --address?)"},
		{[]string{"serve", "--shared_secret_fil", "x"}, "unknown flag --shared_secret_fil (did you mean --shared-secret-file?)"},
		{[]string{"types", "-x"}, "unknown shorthand flag: 'x'"},
		{[]string{"sesions"}, `unknown command "sesions" for "pgbroker" (did you mean sessions?)`},
		{[]string{"types", "shwo"}, `unknown command "shwo" for "pgbroker types" (did you mean show?)`},
		{[]string{"sessions", "lst"}, `unknown command "lst" for "pgbroker sessions" (did you mean list?)`},
		{[]string{"lease", "acquire", "--name", "x", "--duration", "1w"}, "--duration"},
		{[]string{"completion", "tcsh"}, `unknown command "tcsh"`},
	} {
		r := try(t, []string{"PGBROKER_ADDRESS=127.0.0.1:1"}, c.args...)
		if r.code != exitUsage || !strings.Contains(r.stderr, c.want) || !strings.HasPrefix(r.stderr, "pgbroker: ") || r.stdout != "" {
			t.Errorf("%q: got exit code %d, %q and output %q; want %d and %q", c.args, r.code, r.stderr, r.stdout, exitUsage, c.want)
		}
	}
}

// TestNoDatabase: whatever works on a database says in one line that there is none, with the same exit code.
func TestNoDatabase(t *testing.T) {
	t.Parallel()
	users := write(t, "u.csv", "id,email\nx,y\n")
	for _, args := range [][]string{
		{"types", "show"},
		{"types", "set", "-t", "x", "--idle-timeout", "8h"},
		{"check"},
		{"schema", "list"},
		{"migrate", "plan"},
		{"migrate", "version"},
		{"directory", "load", users, "--kind", "users"},
	} {
		r := try(t, nil, append(args, "--database-url", "host=127.0.0.1 port=1 user=u dbname=d")...)
		if r.code != exitUnreachable || !strings.Contains(r.stderr, "connection refused") || strings.Count(r.stderr, "\n") != 1 || strings.Contains(r.stderr, `\x09`) {
			t.Errorf("%q: got exit code %d and %q", args, r.code, r.stderr)
		}
	}
	for _, args := range [][]string{{"types", "show"}, {"check"}, {"psql"}} {
		r := try(t, nil, append(args, "--data-dir", t.TempDir())...)
		if r.code != exitUnreachable || !strings.Contains(r.stderr, "no embedded postgres is running") || !strings.Contains(r.stderr, "--ephemeral") {
			t.Errorf("%q: got exit code %d and %q", args, r.code, r.stderr)
		}
	}
}

// TestAnInterruptedStatementIsCancelled: a command that is interrupted leaves nothing behind that the database works on.
func TestAnInterruptedStatementIsCancelled(t *testing.T) {
	t.Parallel()
	conn := dbtest.New(t).Connect(t)
	ctx, interrupt := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer interrupt()
	if _, err := conn.Exec(ctx, "SELECT pg_sleep(600)"); err == nil {
		t.Fatal("the statement has ended")
	}
	endConn(ctx, conn)
	select {
	case <-conn.PgConn().CleanupDone():
	default:
		t.Error("the statement is still being cancelled")
	}
}

// A running is a command that goes on in the background.
type running struct {
	lines  chan string // of standard output
	cancel context.CancelFunc
	done   chan result
	mu     sync.Mutex
	stderr strings.Builder
}

func (r *running) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stderr.Write(b)
}

func (r *running) said() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stderr.String()
}

// start runs a command in the background until the test ends.
func start(t *testing.T, env []string, args ...string) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	out, in := io.Pipe()
	r := &running{lines: make(chan string, 1000), cancel: cancel, done: make(chan result, 1)}
	go func() {
		code := run(ctx, args, strings.NewReader(""), in, r, env)
		in.Close()
		r.done <- result{code: code, stderr: r.said()}
	}()
	go func() {
		defer close(r.lines)
		for scanner := bufio.NewScanner(out); scanner.Scan(); {
			r.lines <- scanner.Text()
		}
	}()
	t.Cleanup(func() { r.stop(t) })
	return r
}

// stop interrupts the command and returns how it ended.
func (r *running) stop(t *testing.T) result {
	t.Helper()
	r.cancel()
	select {
	case end := <-r.done:
		r.done <- end
		return end
	case <-time.After(30 * time.Second):
		t.Fatal("the command does not end")
		return result{}
	}
}

// line waits for a line of output that contains a text.
func (r *running) line(t *testing.T, want string) string {
	t.Helper()
	timeout := time.After(30 * time.Second)
	var seen []string
	for {
		select {
		case line, more := <-r.lines:
			if !more {
				t.Fatalf("ended without a line with %q, after %q; standard error: %s", want, seen, r.said())
			}
			if strings.Contains(line, want) {
				return line
			}
			seen = append(seen, line)
		case <-timeout:
			t.Fatalf("no line with %q, only %q; standard error: %s", want, seen, r.said())
		}
	}
}

func TestWatch(t *testing.T) {
	broker := servertest.New(t, servertest.Options{})
	env := environment(broker.Replica)
	put := func(id string) {
		t.Helper()
		mustTry(t, env, "record", "put", "-t", "session.Session", "-i", id, "-d", `{"id": "`+id+`"}`)
	}
	put("before")

	table := start(t, env, "watch", "--type", "session.Session")
	jsonLines := start(t, env, "watch", "--initial", "-o", "json")
	// --initial shows what is there; the other one begins with what comes, so it is asked until it has begun.
	jsonLines.line(t, `"id":"before"`)
	begun := make(chan struct{})
	go func() {
		table.line(t, "first")
		close(begun)
	}()
	for n := 0; ; n++ {
		put("first" + strconv.Itoa(n))
		select {
		case <-begun:
		case <-time.After(50 * time.Millisecond):
			continue
		}
		break
	}
	options := start(t, env, "watch", "--options", "-o", "json")
	options.line(t, `{"type":"type.googleapis.com/session.SessionBindingRequest","options":{"capacity":50000,`)
	if r := options.stop(t); r.code != exitOK {
		t.Errorf("watch --options: %+v", r)
	}
	mustTry(t, env, "record", "put", "-t", "other", "-i", "1", "-d", "{}")
	mustTry(t, env, "record", "delete", "-t", "session.Session", "-i", "before")
	put("last")

	if line := table.line(t, "delete"); !regexp.MustCompile(`^\d+ +TIME +delete +session\.Session +before$`).MatchString(anyTime.ReplaceAllString(line, "TIME")) {
		t.Errorf("table: got %q", line)
	}
	if line := table.line(t, "last"); !strings.HasSuffix(line, `  put      session.Session   last          {"id":"last"}`) {
		t.Errorf("table: got %q", line)
	}
	jsonLines.line(t, `"id":"1"`)
	if line := jsonLines.line(t, `"deleted_at"`); !strings.Contains(line, `"id":"before"`) {
		t.Errorf("json: got %q", line)
	}
	for _, w := range []*running{table, jsonLines} {
		if r := w.stop(t); r.code != exitOK || r.stderr != "" {
			t.Errorf("interrupted: got exit code %d and %q", r.code, r.stderr)
		}
	}

	// From a version on, to the end.
	var all []uint64
	for line := range strings.Lines(mustTry(t, env, "watch", "--since", "0", "--no-wait", "-o", "json")) {
		var record struct {
			Version uint64
		}
		if err := json.Unmarshal([]byte(line), &record); err != nil {
			t.Fatal(err)
		}
		all = append(all, record.Version)
	}
	if len(all) < 4 || !slices.IsSorted(all) {
		t.Errorf("--since 0: got versions %v", all)
	}
	rest := mustTry(t, env, "watch", "--since", fmt.Sprint(all[len(all)-2]), "--no-wait", "-o", "json")
	if strings.Count(rest, "\n") != 1 || !strings.Contains(rest, `"id":"last"`) {
		t.Errorf("--since the last but one: got %q", rest)
	}
}

// proxy forwards connections to an address and can cut them.
type proxy struct {
	net.Listener
	mu     sync.Mutex
	target string // empty: refuse
	conns  []net.Conn
}

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Listener: listener, target: target}
	t.Cleanup(func() { listener.Close(); p.lead("") })
	go func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			p.mu.Lock()
			out, err := net.Dial("tcp", p.target)
			if err != nil {
				in.Close()
				p.mu.Unlock()
				continue
			}
			p.conns = append(p.conns, in, out)
			p.mu.Unlock()
			forward(in, out)
		}
	}()
	return p
}

// forward carries what each of two connections says to the other, until one of them ends.
func forward(a, b net.Conn) {
	carry := func(to, from net.Conn) {
		_, _ = io.Copy(to, from) // however it ends, it has ended
		to.Close()
	}
	go carry(a, b)
	go carry(b, a)
}

// lead cuts all connections and sends new ones elsewhere.
func (p *proxy) lead(target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = target
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}

// TestWatchResumes: a watch whose connection is cut goes on where it was, at whatever replica.
func TestWatchResumes(t *testing.T) {
	broker := servertest.New(t, servertest.Options{Replicas: 2})
	env := environment(broker.Replica)
	put := func(id string) { mustTry(t, env, "record", "put", "-t", "x", "-i", id, "-d", "{}") }
	put("0")
	p := newProxy(t, broker.Replicas[0].Address)
	w := start(t, []string{"PGBROKER_ADDRESS=" + p.Addr().String(), env[1]}, "watch", "--since", "0", "-o", "json")
	w.line(t, `"id":"0"`)

	p.lead("")
	put("1")
	put("2")
	p.lead(broker.Replicas[1].Address)
	put("3")
	for _, id := range []string{"1", "2", "3"} {
		if line := <-w.lines; !strings.Contains(line, `"id":"`+id+`"`) {
			t.Errorf("got %q, want the change of %s", line, id)
		}
	}
	if said := w.said(); !strings.Contains(said, "resuming after version") {
		t.Errorf("standard error: got %q", said)
	}

	// When the data are replaced there is nothing to resume.
	if _, err := broker.Clear(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for n := 4; ; n++ { // it begins with what comes next, so it is asked until it has begun
		put(strconv.Itoa(n))
		select {
		case <-w.lines:
		case <-time.After(50 * time.Millisecond):
			continue
		}
		break
	}
	if said := w.said(); !strings.Contains(said, "not known any more") {
		t.Errorf("standard error: got %q", said)
	}
	if r := try(t, env, "watch", "--since", "1", "--no-wait"); r.code != exitOK && !strings.Contains(r.stderr, "leave out --since") {
		t.Errorf("a version that is too old: got exit code %d and %q", r.code, r.stderr)
	}
}

func TestSecretCommands(t *testing.T) {
	secret := strings.TrimSpace(mustTry(t, nil, "secret", "generate"))
	if b, err := base64.StdEncoding.DecodeString(secret); err != nil || len(b) != 32 {
		t.Fatalf("generate: got %q", secret)
	}
	if again := strings.TrimSpace(mustTry(t, nil, "secret", "generate")); again == secret {
		t.Errorf("generate: got %q twice", secret)
	}
	file := writeFile(t, "secret", canary+"\n")
	byFlag := mustTry(t, nil, "secret", "fingerprint", "--shared-secret-file", file, "-o", "json")
	if !regexp.MustCompile(`^\{"fingerprint":"[0-9a-f]{8}","source":"` + file + `"\}\n$`).MatchString(byFlag) {
		t.Errorf("fingerprint of a file: got %q", byFlag)
	}
	fingerprint := byFlag[len(`{"fingerprint":"`):][:8]
	byStdin := tryInput(t, canary+"\n", nil, "secret", "fingerprint", "--stdin")
	both := mustTry(t, []string{"SHARED_SECRET=" + secret + "," + canary}, "secret", "fingerprint")
	for _, out := range []string{byStdin.stdout, both} {
		if !strings.Contains(out, fingerprint) || strings.Contains(out, canary) {
			t.Errorf("got %q, want fingerprint %s", out, fingerprint)
		}
	}
	if strings.Count(both, "env SHARED_SECRET") != 2 {
		t.Errorf("two secrets: got %q", both)
	}
	r := try(t, nil, "secret", "fingerprint", "--config", writeFile(t, "c.yaml", "data_dir: "+t.TempDir()+"\n"))
	if r.code != exitNotFound {
		t.Errorf("no secret: got exit code %d and %q", r.code, r.stderr)
	}
	if r := tryInput(t, "x"+canary, nil, "secret", "fingerprint", "--stdin"); r.code != exitUsage || strings.Contains(r.stderr, canary) {
		t.Errorf("a bad secret: got exit code %d and %q", r.code, r.stderr)
	}
}

func TestVersionAndCompletion(t *testing.T) {
	if out := mustTry(t, nil, "version"); !strings.HasPrefix(out, "pgbroker ") {
		t.Errorf("version: got %q", out)
	}
	if out := mustTry(t, nil, "version", "-o", "json"); !strings.HasPrefix(out, `{"version":"`) {
		t.Errorf("version -o json: got %q", out)
	}
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if out := mustTry(t, nil, "completion", shell); !strings.Contains(out, "pgbroker") {
			t.Errorf("completion %s: got %q", shell, out)
		}
	}
	if out := mustTry(t, nil, "__complete", "record", "get", "--type", "session"); !strings.Contains(out, "session.Session\n") {
		t.Errorf("completion of --type: got %q", out)
	}
}

// TestInterruptedInput: who is asked for input may leave.
func TestInterruptedInput(t *testing.T) {
	keyboard, _ := io.Pipe() // nobody types
	for _, args := range [][]string{{"record", "put", "-t", "x", "-i", "y", "-d", "-"}, {"secret", "fingerprint", "--stdin"}} {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan int)
		go func() { done <- run(ctx, args, keyboard, io.Discard, io.Discard, nil) }()
		cancel()
		if code := <-done; code != exitInterrupted {
			t.Errorf("%q: got exit code %d, want %d", args, code, exitInterrupted)
		}
	}
}
