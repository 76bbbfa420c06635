package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/user"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	userproto "pgbroker/proto/user"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// putSession writes a session with secrets that was used some hours ago and ends in some.
func putSession(t testing.TB, r *servertest.Replica, id, user, idp string, usedHoursAgo, endsInHours int) {
	t.Helper()
	now := time.Now()
	at := func(hours int) *timestamppb.Timestamp {
		return timestamppb.New(now.Add(time.Duration(hours) * time.Hour))
	}
	data, err := anypb.New(&session.Session{
		Id: id, UserId: user, IdpId: idp, IssuedAt: at(-usedHoursAgo - 1), AccessedAt: at(-usedHoursAgo), ExpiresAt: at(endsInHours),
		OauthToken: &session.OAuthToken{AccessToken: canary, RefreshToken: canary}, IdToken: &session.IDToken{Raw: canary},
		Claims: map[string]*structpb.ListValue{"email": {Values: []*structpb.Value{structpb.NewStringValue(user + "@example.com")}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{{Type: sessionType, Id: id, Data: data}}}); err != nil {
		t.Fatal(err)
	}
}

// idsOf returns the first column of a table.
func idsOf(output string) (ids []string) {
	for i, line := range strings.Split(strings.TrimSuffix(output, "\n"), "\n") {
		if i > 0 {
			ids = append(ids, strings.Fields(line)[0])
		}
	}
	return ids
}

func startWithSessions(t *testing.T) (*servertest.Broker, []string) {
	t.Helper()
	// The expired session has to be seen before the periodic work does its own.
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) { c.MaintenanceInterval = time.Hour }})
	for deadline := time.Now().Add(time.Minute); ; {
		var done bool
		if err := b.Database.Pool.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pgbroker.live_leases)`).Scan(&done); err != nil {
			t.Fatal(err)
		}
		if done {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the periodic work does not begin")
		}
	}
	putSession(t, b.Replica, "jane-new", "jane", "okta", 1, 5)
	putSession(t, b.Replica, "jane-old", "jane", "google", 30, 5)
	putSession(t, b.Replica, "joe", "joe", "google", 10, 5)
	return b, environment(b.Replica)
}

func TestSessionsListAndShow(t *testing.T) {
	t.Parallel()
	_, env := startWithSessions(t)
	for args, want := range map[string][]string{
		"":                         {"jane-new", "joe", "jane-old"},
		"--limit 2":                {"jane-new", "joe"},
		"--user jane":              {"jane-new", "jane-old"},
		"--user jane --idp google": {"jane-old"},
		"--idp google":             {"joe", "jane-old"},
		"--email JOE@example.com":  {"joe"},
		"--idle-for 9h":            {"joe", "jane-old"},
		"--user nobody":            nil,
		"--expired":                nil,
	} {
		out := mustTry(t, env, append([]string{"sessions", "list"}, strings.Fields(args)...)...)
		if got := idsOf(out); !slices.Equal(got, want) {
			t.Errorf("sessions list %s: %q, want %q", args, got, want)
		}
		if strings.Contains(out, canary) {
			t.Errorf("sessions list %s shows secrets", args)
		}
	}
	out := mustTry(t, env, "sessions", "list", "--user", "joe", "-o", "json")
	want := `{"id":"joe","user_id":"joe","email":"joe@example.com","idp_id":"google","issued_at":"TIME","accessed_at":"TIME","expires_at":"TIME","expired":false,"version":N,"modified_at":"TIME"}` + "\n"
	if golden(out) != want {
		t.Errorf("got %s, want %s", golden(out), want)
	}
	if out := mustTry(t, env, "sessions", "show", "joe"); !strings.Contains(out, `"user_id": "joe"`) || strings.Contains(out, canary) {
		t.Errorf("sessions show: %s", out)
	}
	if r := try(t, env, "sessions", "show", "nobody"); r.code != exitNotFound {
		t.Errorf("sessions show nobody: %d %s", r.code, r.stderr)
	}
}

// TestSessionFilter: an expired session is seldom there for long, so the filter is tested by itself.
func TestSessionFilter(t *testing.T) {
	t.Parallel()
	now := time.Now()
	at := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(d)) }
	claims := func(name string, values ...any) map[string]*structpb.ListValue {
		list, err := structpb.NewList(values)
		if err != nil {
			t.Fatal(err)
		}
		return map[string]*structpb.ListValue{name: list}
	}
	for _, c := range []struct {
		filter  sessionFilter
		session *session.Session
		want    bool
	}{
		{sessionFilter{expired: true}, &session.Session{ExpiresAt: at(-time.Second)}, true},
		{sessionFilter{expired: true}, &session.Session{ExpiresAt: at(0)}, true},
		{sessionFilter{expired: true}, &session.Session{ExpiresAt: at(time.Second)}, false},
		{sessionFilter{expired: true}, &session.Session{}, false},
		{sessionFilter{idle: time.Hour}, &session.Session{IssuedAt: at(-2 * time.Hour)}, true},
		{sessionFilter{idle: time.Hour}, &session.Session{IssuedAt: at(-2 * time.Hour), AccessedAt: at(-time.Minute)}, false},
		// Neither used nor issued, as far as it says: it was written 90 minutes ago.
		{sessionFilter{idle: time.Hour}, &session.Session{}, true},
		{sessionFilter{idle: 2 * time.Hour}, &session.Session{}, false},
		{sessionFilter{idle: 2 * time.Hour}, &session.Session{AccessedAt: &timestamppb.Timestamp{Seconds: -1 << 60}}, false}, // no time at all
		{sessionFilter{user: "a", expired: true}, &session.Session{UserId: "b", ExpiresAt: at(-time.Second)}, false},
		{sessionFilter{}, &session.Session{}, true},
		{sessionFilter{email: "JOS\u00c9@x"}, &session.Session{Claims: claims("email", "a@x", " jose\u0301@X ")}, true},
		{sessionFilter{email: "jose@x"}, &session.Session{Claims: claims("email", "jos\u00e9@x")}, false},
		{sessionFilter{email: "of-the-record@x"}, &session.Session{UserId: "jane"}, true},
		{sessionFilter{claims: []string{"amr=pwd"}}, &session.Session{Claims: claims("amr", "otp", "pwd")}, true},
		{sessionFilter{claims: []string{"amr=pwd", "acr=1"}}, &session.Session{Claims: claims("amr", "pwd")}, false},
		{sessionFilter{claims: []string{"a=b=c"}}, &session.Session{Claims: claims("a", "b=c")}, true},
		{sessionFilter{claims: []string{"level=3"}}, &session.Session{Claims: claims("level", 3)}, true},
		{sessionFilter{claims: []string{"ok=true"}}, &session.Session{Claims: claims("ok", true)}, true},
		{sessionFilter{claims: []string{"ok="}}, &session.Session{Claims: claims("ok", nil)}, false},
		{sessionFilter{group: "admins"}, &session.Session{Claims: claims("groups", "users", "admins")}, true},
		{sessionFilter{group: "admins"}, &session.Session{UserId: "jane"}, true},
		{sessionFilter{group: "admins"}, &session.Session{UserId: "joe"}, false},
		{sessionFilter{except: []string{"x", "the-session"}}, &session.Session{}, false},
	} {
		found := &foundSession{id: "the-session", modified: at(-90 * time.Minute), session: c.session}
		known := &people{emailed: map[string]bool{"jane": true}, members: map[string]bool{"jane": true}}
		if got := c.filter.holds(found, known, now); got != c.want {
			t.Errorf("%+v of %v: %v", c.filter, c.session, got)
		}
	}
}

// A session is found by every e-mail address that anybody could know of it, and shown with that which session_details shows.
func TestSessionsByPerson(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	env := environment(b.Replica)
	put := func(recordType, id, data string) {
		t.Helper()
		mustTry(t, env, "record", "put", "-t", recordType, "-i", id, "-d", data)
	}
	put("session.Session", "s-user", `{"user_id": "u1", "claims": {"email": ["claimed@example.com", "second@example.com"]}}`)
	put("session.Session", "s-directory", `{"user_id": "u2", "claims": {"groups": ["claimed-group"]}}`)
	put("session.Session", "s-claim", `{"user_id": "u3", "claims": {"email": ["Zoe@Example.com"]}}`)
	put("session.Session", "s-accent", `{"user_id": "u4", "claims": {"email": ["jose\u0301@example.com"]}}`)
	put("session.Session", "-dash", `{"user_id": "u5"}`)
	put("session.Session", "s-longer", `{"user_id": "u6", "claims": {"email": ["not-claimed@example.com.au"]}}`)
	put("user.User", "u1", `{"id": "u1", "name": "Una", "email": "Una@example.com", "claims": {"email": ["third@example.com"]}}`)
	put("pomerium.io/DirectoryUser", "u1", `{"id": "u1", "email": "una.directory@example.com", "group_ids": ["g1"]}`)
	put("pomerium.io/DirectoryUser", "u2", `{"id": "u2", "email": "duo@example.com", "display_name": "Duo", "group_ids": ["g1", "g2"]}`)
	put("pomerium.io/DirectoryGroup", "g2", `{"id": "g2", "name": "Engineering"}`)
	for args, want := range map[string][]string{
		"--email una@EXAMPLE.com":           {"s-user"},
		"--email claimed@example.com":       {"s-user"},
		"--email second@example.com":        {"s-user"},
		"--email third@example.com":         {"s-user"},
		"--email una.directory@example.com": {"s-user"},
		"--email una@example.com --user u2": nil,
		"--email duo@example.com":           {"s-directory"},
		"--email zoe@example.com":           {"s-claim"},
		"--email jos\u00e9@example.com":     {"s-accent"},
		"--email jose\u0301@example.com":    {"s-accent"},
		"--email example.com":               nil,
		"--group Engineering":               {"s-directory"},
		"--group g1":                        {"s-directory", "s-user"},
		"--group g1 --except s-user":        {"s-directory"},
		"--group claimed-group":             {"s-directory"},
		"--claim email=second@example.com":  {"s-user"},
		"--idle-for 1h":                     nil, // all are new, though they do not say when they were issued
		"--user u5 --except nobody":         {"-dash"},
	} {
		got := idsOf(mustTry(t, env, append([]string{"sessions", "list"}, strings.Fields(args)...)...))
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("sessions list %s: %q, want %q", args, got, want)
		}
	}
	// What is shown is what the view shows, with its names.
	for line := range strings.Lines(mustTry(t, env, "sessions", "list", "-o", "json")) {
		var shown map[string]any
		if err := json.Unmarshal([]byte(line), &shown); err != nil {
			t.Fatal(err)
		}
		var text []byte
		if err := b.Database.Pool.QueryRow(t.Context(),
			`SELECT jsonb_strip_nulls(to_jsonb(d)) FROM pgbroker.session_details d WHERE id = $1`, shown["id"]).Scan(&text); err != nil {
			t.Fatal(err)
		}
		var view map[string]any
		if err := json.Unmarshal(text, &view); err != nil {
			t.Fatal(err)
		}
		delete(shown, "modified_at") // the same time, spelled in another way
		for key, value := range shown {
			if fmt.Sprint(view[key]) != fmt.Sprint(value) {
				t.Errorf("%s: %s is %v, and %v in the view", shown["id"], key, value, view[key])
			}
		}
	}
	for _, args := range [][]string{
		{"--user", ""}, {"--email", " "}, {"--idp", "", "--user", "u1"}, {"--group", ""}, {"--claim", ""}, {"--claim", "x"}, {"--claim", "=x"},
		{"--idle-for", "0"}, {"--except", "s-user"}, {""}, {"s-user", "--except", "s-user"},
	} {
		if r := try(t, env, append([]string{"sessions", "revoke", "--yes"}, args...)...); r.code != exitUsage {
			t.Errorf("sessions revoke %q: %d %s", args, r.code, r.stderr)
		}
	}
	if r := try(t, env, "sessions", "revoke", "-dash"); r.code != exitUsage || !strings.Contains(r.stderr, "-- -dash") {
		t.Errorf("an id that looks like a flag: %d %s", r.code, r.stderr)
	}
	if out := mustTry(t, env, "sessions", "show", "--", "-dash"); !strings.Contains(out, "id:       -dash") {
		t.Errorf("show: %s", out)
	}
	if out := mustTry(t, env, "sessions", "revoke", "--", "-dash"); !slices.Equal(idsOf(out), []string{"-dash"}) {
		t.Errorf("revoke: %s", out)
	}
	if out := mustTry(t, env, "sessions", "revoke", "--email", "DUO@example.com"); !slices.Equal(idsOf(out), []string{"s-directory"}) {
		t.Errorf("revoke by an address of the directory: %s", out)
	}
}

func TestSessionsOrphans(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	env := environment(b.Replica)
	put := func(recordType, id, data string) {
		t.Helper()
		mustTry(t, env, "record", "put", "-t", recordType, "-i", id, "-d", data)
	}
	for _, id := range []string{"both", "user-only", "directory-only", "nobody"} {
		put("session.Session", "s-"+id, `{"user_id": "`+id+`"}`)
	}
	put("user.User", "both", `{"id": "both"}`)
	put("user.User", "user-only", `{"id": "user-only"}`)
	orphans := func(want ...string) {
		t.Helper()
		var got []string
		for line := range strings.Lines(mustTry(t, env, "sessions", "orphans", "-o", "json")) {
			var shown struct {
				ID          string   `json:"id"`
				MissingFrom []string `json:"missing_from"`
			}
			if err := json.Unmarshal([]byte(line), &shown); err != nil {
				t.Fatal(err)
			}
			got = append(got, shown.ID+" "+strings.Join(shown.MissingFrom, "+"))
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	orphans("s-directory-only users", "s-nobody users") // a directory that is empty is not in use
	put("pomerium.io/DirectoryUser", "both", `{"id": "both"}`)
	put("pomerium.io/DirectoryUser", "directory-only", `{"id": "directory-only"}`)
	orphans("s-directory-only users", "s-nobody users+directory", "s-user-only directory")
	if out := mustTry(t, env, "sessions", "orphans"); !strings.Contains(out, "MISSING FROM\n") || !strings.Contains(out, "users, directory\n") {
		t.Errorf("got %s", out)
	}
}

// Whoever interrupts a revocation is told how far it has come, and what was asked for by then is done.
func TestInterruptedRevocation(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	const all = 3 * revokeBatch
	request := new(databroker.PutRequest)
	for i := range all {
		data, err := anypb.New(&session.Session{UserId: "jane"})
		if err != nil {
			t.Fatal(err)
		}
		request.Records = append(request.Records, &databroker.Record{Type: sessionType, Id: fmt.Sprintf("s%04d", i), Data: data})
	}
	if _, err := b.Put(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	tx, err := b.Database.Connect(t).Begin(t.Context())
	if err == nil {
		_, err = tx.Exec(t.Context(), `SELECT pgbroker.lock_order()`)
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	done := make(chan result)
	go func() {
		var stdout, stderr bytes.Buffer
		code := run(ctx, []string{"sessions", "revoke", "--user", "jane", "--yes"}, strings.NewReader(""), &stdout, &stderr, environment(b.Replica))
		done <- result{code, stdout.String(), stderr.String()}
	}()
	for waiting := false; !waiting; { // the first request does
		if err := b.Database.Pool.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = 'advisory'
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) FROM pg_sleep(0.01)`).Scan(&waiting); err != nil {
			t.Fatal(err)
		}
	}
	interrupt()
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := <-done
	var left int
	if err := b.Database.Pool.QueryRow(t.Context(), `SELECT count(*) FROM pgbroker.sessions`).Scan(&left); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("interrupted: %d of %d sessions revoked", revokeBatch, all)
	if r.code != exitInterrupted || left != all-revokeBatch || !strings.Contains(r.stderr, want) || len(idsOf(r.stdout)) != revokeBatch {
		t.Errorf("%d left, exit code %d, %d shown, %q; want %q", left, r.code, len(idsOf(r.stdout)), r.stderr, want)
	}
}

// TestInterruptedBefore: whoever interrupts a command before it has changed anything is told that nothing was changed.
func TestInterruptedBefore(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	putSession(t, b.Replica, "s1", "jane", "okta", 1, 5)
	putSession(t, b.Replica, "s2", "jane", "okta", 1, 5)
	users := write(t, "u.csv", "id\nx\n")
	_, terminal := openTerminal(t, 80) // at which nobody answers
	for _, c := range []struct {
		args []string
		env  []string
		want string
		wait time.Duration // until a question is shown
	}{
		{[]string{"sessions", "revoke", "--user", "jane", "--yes"}, environment(b.Replica), "interrupted: nothing was revoked", 0},
		{[]string{"sessions", "revoke", "--user", "jane"}, environment(b.Replica), "\npgbroker: interrupted: nothing was revoked", time.Second},
		{[]string{"directory", "load", users, "--kind", "users"}, environment(b.Replica), "interrupted: nothing was written", 0},
		{[]string{"directory", "load", users, "--kind", "users"}, []string{"PGBROKER_DATABASE_URL=" + b.Database.ConnString}, "interrupted: nothing was written", 0},
	} {
		ctx, interrupt := context.WithCancel(t.Context())
		if c.wait == 0 {
			interrupt()
		} else {
			time.AfterFunc(c.wait, interrupt)
		}
		var stderr bytes.Buffer
		code := run(ctx, c.args, terminal, io.Discard, &stderr, c.env)
		interrupt()
		if code != exitInterrupted || !strings.Contains(stderr.String(), c.want) {
			t.Errorf("%q: exit code %d and %q, want %q", c.args, code, stderr.String(), c.want)
		}
	}
}

func TestSessionsRevoke(t *testing.T) {
	t.Parallel()
	b, env := startWithSessions(t)
	left := func(want ...string) {
		t.Helper()
		rows, err := b.Database.Pool.Query(t.Context(), `SELECT id FROM pgbroker.sessions ORDER BY id`)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := pgx.CollectRows(rows, pgx.RowTo[string]); err != nil || !slices.Equal(got, want) {
			t.Errorf("left are %q, want %q", got, want)
		}
	}
	for _, args := range [][]string{{}, {"joe", "--user", "joe"}, {"--idle-for", "-1h"}} {
		if r := try(t, env, append([]string{"sessions", "revoke"}, args...)...); r.code != exitUsage {
			t.Errorf("sessions revoke %q: %d %s", args, r.code, r.stderr)
		}
	}
	for _, answer := range []string{"", "no\n", "y\n"} {
		r := tryAtTerminal(t, answer, 80, env, "sessions", "revoke", "--user", "jane")
		if r.code != exitInterrupted || !strings.Contains(r.stderr, "Revoke 2 sessions of jane?") || !strings.Contains(r.stderr, "nothing was revoked") {
			t.Errorf("answer %q: %d %s", answer, r.code, r.stderr)
		}
	}
	// Where nobody can be asked, what comes in is not an answer, and stays unread.
	lines := strings.NewReader("yes\n")
	var stderr bytes.Buffer
	if code := run(t.Context(), []string{"sessions", "revoke", "--user", "jane"}, lines, io.Discard, &stderr, env); code != exitUsage || lines.Len() != 4 ||
		!strings.Contains(stderr.String(), "Revoke 2 sessions of jane?") || !strings.Contains(stderr.String(), "--yes") {
		t.Errorf("without a terminal: %d %s", code, stderr.String())
	}
	left("jane-new", "jane-old", "joe")

	r := try(t, env, "sessions", "revoke", "nobody", "joe") // one of them is there: nothing to ask
	if r.code != exitNotFound || !slices.Equal(idsOf(r.stdout), []string{"joe"}) || !strings.Contains(r.stderr, "1 session revoked") || !strings.Contains(r.stderr, "nobody") {
		t.Errorf("by id: %+v", r)
	}
	left("jane-new", "jane-old")
	r = tryAtTerminal(t, "yes\n", 80, env, "sessions", "revoke", "--user", "jane")
	if r.code != exitOK || !slices.Equal(idsOf(r.stdout), []string{"jane-new", "jane-old"}) || !strings.Contains(r.stderr, "2 sessions revoked") {
		t.Errorf("with yes: %+v", r)
	}
	left()
	if r := try(t, env, "sessions", "revoke", "--user", "jane", "--yes"); r.code != exitNoneMatched || !strings.Contains(r.stderr, "no session was revoked") {
		t.Errorf("none: %+v", r)
	}

	// More than one request can take.
	var want []string
	for i := range revokeBatch + 50 {
		id := fmt.Sprintf("s%03d", i)
		putSession(t, b.Replica, id, fmt.Sprintf("u%d", i%5), "okta", 1, 5)
		want = append(want, id)
	}
	r = try(t, env, "sessions", "revoke", "--idp", "okta", "--yes", "-o", "json")
	if got := strings.Count(r.stdout, "\n"); r.code != exitOK || got != len(want) {
		t.Errorf("%d of %d were revoked: %s", got, len(want), r.stderr)
	}
	left()
	var causes []string
	rows, err := b.Database.Pool.Query(t.Context(), `SELECT DISTINCT cause || ' ' || application FROM pgbroker.revocations`)
	if err == nil {
		causes, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	if err != nil || !slices.Equal(causes, []string{"request pgbroker"}) {
		t.Errorf("the audit has %q, %v", causes, err)
	}
}

func TestTypesSetAndShow(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	env := []string{"PGBROKER_DATABASE_URL=" + d.ConnString}
	out := mustTry(t, env, "types", "set", "-t", "session.Session", "--idle-timeout", "8h", "--user-limit", "5", "--expiry-field", "expires_at", "--audit=false", "--end-sessions-of-missing-users")
	want := "TYPE  RECORDS  CAPACITY  TTL  EXPIRES BY  IDLE TIMEOUT  USER LIMIT  MISSING USERS  AUDITED\nsession.Session  0  expires_at  8h  5  true  false\n"
	if squeezed := regexp.MustCompile(` {2,}`).ReplaceAllString(out, "  "); squeezed != want {
		t.Errorf("got\n%s, want\n%s", squeezed, want)
	}
	out = mustTry(t, env, "types", "set", "-t", "session.Session", "--idle-timeout", "0", "--user-limit", "0", "--expiry-field", "", "--end-sessions-of-missing-users=false", "-o", "json")
	want = `{"type":"type.googleapis.com/session.Session","records":0,"end_sessions_of_missing_users":false,"audited":false,"looked_up_by":["idp_id","user_id"],"up_to_date":true}` + "\n"
	if out != want {
		t.Errorf("got %s, want %s", out, want)
	}
	if r := try(t, env, "types", "set", "-t", "sesion.Session", "--audit"); r.code != exitOK || !strings.Contains(r.stderr, "did you mean session.Session?") {
		t.Errorf("types set of a type that is not there: %+v", r)
	}
	if r := try(t, env, "types", "show", "--type", "example.com/Thing"); r.code != exitNotFound {
		t.Errorf("types show of an unknown type: %+v", r)
	}
	for _, args := range [][]string{{"--idle-timeout", "-1s"}, {"--user-limit", "-1"}, {}} {
		if r := try(t, env, append([]string{"types", "set", "-t", "x"}, args...)...); r.code != exitUsage {
			t.Errorf("types set %q: %d %s", args, r.code, r.stderr)
		}
	}
}

// Options that end records that are there are set only after a look.
func TestOptionsThatEndRecordsAsk(t *testing.T) {
	t.Parallel()
	b, env := startWithSessions(t) // jane has two, used 1 and 30 hours ago, joe one of 10 hours ago
	database := []string{"PGBROKER_DATABASE_URL=" + b.Database.ConnString}
	for args, want := range map[string]int{
		"idle_timeout => '9 hours'": 2, "idle_timeout => '9 hours', user_limit => 1": 2, "user_limit => 1": 1, "user_limit => 2": 0,
		"ttl => '30 minutes'": 0, "ttl => '1 microsecond'": 3, "capacity => 1": 2, "capacity => 0": 3, "capacity => 3": 0, "expiry_field => 'issued_at'": 3,
		"expiry_field => 'expires_at'": 0, "user_limit => 1, idle_timeout => '20 hours'": 1, "idle_timeout => NULL": 0,
	} {
		var n int
		if err := b.Database.Pool.QueryRow(t.Context(), `SELECT pgbroker.would_end('session.Session', `+args+`)`).Scan(&n); err != nil || n != want {
			t.Errorf("would_end with %s: %d, %v, want %d", args, n, err, want)
		}
	}
	// Idle is what was not used for so long, and what never was since it was issued, or else written.
	b.Database.Exec(t, `INSERT INTO pgbroker.records (type, id, data) VALUES ('t', 'bare', '{}'),
		('t', 'issued', jsonb_build_object('issued_at', now() - interval '2 hours')),
		('t', 'used', jsonb_build_object('issued_at', now() - interval '2 hours', 'accessed_at', now()))`)
	var n int
	if err := b.Database.Pool.QueryRow(t.Context(), `SELECT pgbroker.would_end('t', idle_timeout => '1 hour')`).Scan(&n); err != nil || n != 1 {
		t.Errorf("would_end by an idle timeout: %d, %v, want 1", n, err)
	}
	options := func() (text string) {
		t.Helper()
		if err := b.Database.Pool.QueryRow(t.Context(), `SELECT concat_ws(' ', idle_timeout, user_limit, capacity, ttl) FROM pgbroker.type_summary
			WHERE name = 'session.Session'`).Scan(&text); err != nil {
			t.Fatal(err)
		}
		return text
	}
	for _, c := range []struct {
		env  []string
		args []string
		want string
		then string
	}{
		{database, []string{"types", "set", "--idle-timeout", "9h"}, "This ends 2 of 3 records of session.Session.", "09:00:00"},
		{database, []string{"types", "set", "--user-limit", "1"}, "This ends 1 of 3 records of session.Session.", "09:00:00 1"},
		{database, []string{"types", "set", "--user-limit", "0", "--idle-timeout", "0"}, "", ""},
		{env, []string{"options", "set", "--capacity", "1"}, "This ends 2 of 3 records of session.Session.", "1"},
		{env, []string{"options", "set", "--capacity", "7", "--ttl", "1ms"}, "This ends 3 of 3 records of session.Session.", "7 00:00:00.001"},
		{env, []string{"options", "set", "--capacity", "3", "--ttl", "1d"}, "", "3 24:00:00"},
	} {
		args := append(c.args, "-t", "session.Session")
		before := options()
		if c.want != "" {
			for _, r := range []result{try(t, c.env, args...), tryAtTerminal(t, "no\n", 80, c.env, args...)} {
				if r.code == exitOK || !strings.Contains(r.stderr, c.want) || !strings.Contains(r.stderr, "nothing was set") {
					t.Errorf("%q: exit code %d and %q, want %q", args, r.code, r.stderr, c.want)
				}
			}
			if got := options(); got != before {
				t.Errorf("%q: set is %q though nobody has said yes", args, got)
			}
			args = append(args, "--yes")
		}
		mustTry(t, c.env, args...)
		if got := options(); got != c.then {
			t.Errorf("%q: set is %q, want %q", args, got, c.then)
		}
	}
}

// TestExpiryField: a field that a message does not have is refused, because its records would never end.
func TestExpiryField(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	env := []string{"PGBROKER_DATABASE_URL=" + b.Database.ConnString}
	for _, field := range []string{"expires", "expires_at.second", "oauth_token.expiresat"} {
		r := try(t, env, "types", "set", "-t", "session.Session", "--expiry-field", field)
		if r.code != exitUsage || !strings.Contains(r.stderr, "records would never end") {
			t.Errorf("%s: %+v", field, r)
		}
	}
	for kind, field := range map[string]string{"session.Session": "oauth_token.expires_at", "example.com/Thing": "valid_until"} {
		mustTry(t, env, "types", "set", "-t", kind, "--expiry-field", field)
		mustTry(t, env, "types", "set", "-t", kind, "--expiry-field", "")
	}
}

func TestMigrateGrants(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	reader := `it's "quoted"; ` + d.Name
	create := `CREATE ROLE "it's ""quoted""; ` + d.Name + `" LOGIN;`
	// Who may create no roles is told what to have created.
	if r := try(t, []string{"PGBROKER_DATABASE_URL=" + d.ConnString}, "migrate", "grants", "--reader", reader); r.code != exitFailure ||
		!strings.Contains(r.stderr, create) {
		t.Errorf("without the role: %d %s", r.code, r.stderr)
	}
	out := mustTry(t, []string{"PGBROKER_DATABASE_URL=" + d.AdminConnString}, "migrate", "grants", "--reader", reader)
	if !strings.Contains(out, create) {
		t.Errorf("the role is not created:\n%s", out)
	}
	for range 2 {
		d.AdminExec(t, out)
		out = mustTry(t, []string{"PGBROKER_DATABASE_URL=" + d.ConnString}, "migrate", "grants", "--reader", reader)
		if strings.Contains(out, "CREATE ROLE") {
			t.Errorf("the role is there already:\n%s", out)
		}
	}
	t.Cleanup(func() {
		role := pgx.Identifier{reader}.Sanitize()
		d.AdminExec(t, "DROP OWNED BY "+role+"; DROP ROLE "+role)
	})
	var may, mayNot bool
	if err := d.Pool.QueryRow(t.Context(), `SELECT has_table_privilege($1, 'pgbroker.sessions', 'SELECT'), has_any_column_privilege($1, 'pgbroker.records', 'SELECT')`,
		reader).Scan(&may, &mayNot); err != nil || !may || mayNot {
		t.Errorf("may read sessions: %v, records: %v, %v", may, mayNot, err)
	}
	if r := try(t, []string{"PGBROKER_DATABASE_URL=" + d.ConnString}, "migrate", "grants"); r.code != exitUsage {
		t.Errorf("without roles: %+v", r)
	}
}

// The audit has who runs the program: --as, else whoever is logged in; and the key that its requests are signed with.
func TestSessionsRevokeSaysWho(t *testing.T) {
	t.Parallel()
	b, env := startWithSessions(t)
	mustTry(t, env, "sessions", "revoke", "jane-new", "--as", "Jürgen (on call)")
	mustTry(t, env, "sessions", "revoke", "jane-old")
	mustTry(t, append(env, "SUDO_USER=helen"), "sessions", "revoke", "joe")
	for _, name := range []string{" ", "a\nb", strings.Repeat("x", 201)} {
		if r := try(t, env, "sessions", "revoke", "joe", "--as", name); r.code != exitUsage || !strings.Contains(r.stderr, "--as") {
			t.Errorf("--as %q: exit code %d, %s", name, r.code, r.stderr)
		}
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	rows, err := b.Database.Pool.Query(t.Context(), `SELECT concat_ws(' ', id, cause, key, on_behalf_of) FROM pgbroker.revocations ORDER BY number`)
	if err != nil {
		t.Fatal(err)
	}
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"jane-new request shared-secret Jürgen (on call)", "jane-old request shared-secret " + me.Username, "joe request shared-secret helen"}
	if !slices.Equal(got, want) {
		t.Errorf("the audit has\n%q, want\n%q", got, want)
	}
}

// sessionsEnv says for how many sessions TestFindingSessionsAtScale measures, 100000 for instance.
const sessionsEnv = "TEST_SESSIONS"

// TestFindingSessionsAtScale shows how long it takes to find the few sessions of an address or a user among many.
func TestFindingSessionsAtScale(t *testing.T) {
	count, err := strconv.Atoi(cmp.Or(os.Getenv(sessionsEnv), "0"))
	if err != nil || count == 0 {
		t.Skip("set " + sessionsEnv + " to a number of sessions")
	}
	b := servertest.New(t, servertest.Options{})
	env := environment(b.Replica)
	users := count/3 + 1
	put := func(n int, record func(i int) *databroker.Record) {
		t.Helper()
		request := new(databroker.PutRequest)
		for i := range n {
			request.Records = append(request.Records, record(i))
			if len(request.Records) == 500 || i == n-1 {
				if _, err := b.Put(t.Context(), request); err != nil {
					t.Fatal(err)
				}
				request = new(databroker.PutRequest)
			}
		}
	}
	packedRecord := func(id string, message proto.Message) *databroker.Record {
		data, err := anypb.New(message)
		if err != nil {
			t.Fatal(err)
		}
		return &databroker.Record{Type: data.GetTypeUrl(), Id: id, Data: data}
	}
	texts := func(values ...string) *structpb.ListValue {
		list := new(structpb.ListValue)
		for _, value := range values {
			list.Values = append(list.Values, structpb.NewStringValue(value))
		}
		return list
	}
	now := timestamppb.Now()
	put(count, func(i int) *databroker.Record {
		owner := fmt.Sprintf("user-%d", i%users)
		return packedRecord(fmt.Sprintf("s%d", i), &session.Session{
			UserId: owner, IdpId: "okta", IssuedAt: now, AccessedAt: now, ExpiresAt: timestamppb.New(now.AsTime().Add(time.Hour)),
			OauthToken: &session.OAuthToken{AccessToken: strings.Repeat("x", 800)},
			Claims: map[string]*structpb.ListValue{
				"email": texts(owner + "@example.com"), "name": texts("User " + owner), "sub": texts(owner), "groups": texts("g1", "g2", "g3"),
			},
		})
	})
	put(users, func(i int) *databroker.Record {
		id := fmt.Sprintf("user-%d", i)
		return packedRecord(id, &userproto.User{Id: id, Name: "User", Email: id + "@example.com"})
	})
	b.Database.Exec(t, "ANALYZE pgbroker.records, pgbroker.search_texts")
	for _, filter := range [][]string{
		{"--email", "USER-77@example.com"}, {"--user", "user-77"}, {"--claim", "sub=user-77"}, {"--email", "us\u00e9r-77@example.com"},
	} {
		best := time.Hour
		var found int
		for range 3 {
			began := time.Now()
			out := mustTry(t, env, append([]string{"sessions", "list", "--timeout", "60s"}, filter...)...)
			best = min(best, time.Since(began))
			found = len(idsOf(out))
		}
		t.Logf("%d sessions, %q: %d found in %v", count, filter, found, best.Round(time.Millisecond))
	}
}
