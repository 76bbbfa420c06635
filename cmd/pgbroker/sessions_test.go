package main

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
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
	want := `{"id":"joe","user_id":"joe","email":"joe@example.com","idp_id":"google","issued_at":"TIME","last_used":"TIME","expires_at":"TIME","expired":false,"version":N}` + "\n"
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
		{sessionFilter{user: "a", expired: true}, &session.Session{UserId: "b", ExpiresAt: at(-time.Second)}, false},
		{sessionFilter{}, &session.Session{}, true},
	} {
		if got := c.filter.holds(c.session, now); got != c.want {
			t.Errorf("%+v of %v: %v", c.filter, c.session, got)
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
		r := tryInput(t, answer, env, "sessions", "revoke", "--user", "jane")
		if r.code != exitInterrupted || !strings.Contains(r.stderr, "Revoke 2 sessions of jane?") || !strings.Contains(r.stderr, "nothing was revoked") {
			t.Errorf("answer %q: %d %s", answer, r.code, r.stderr)
		}
	}
	left("jane-new", "jane-old", "joe")

	r := try(t, env, "sessions", "revoke", "nobody", "joe") // one of them is there: nothing to ask
	if r.code != exitNotFound || !slices.Equal(idsOf(r.stdout), []string{"joe"}) || !strings.Contains(r.stderr, "1 session revoked") || !strings.Contains(r.stderr, "nobody") {
		t.Errorf("by id: %+v", r)
	}
	left("jane-new", "jane-old")
	r = tryInput(t, "yes\n", env, "sessions", "revoke", "--user", "jane")
	if r.code != exitOK || !slices.Equal(idsOf(r.stdout), []string{"jane-new", "jane-old"}) || !strings.Contains(r.stderr, "2 sessions revoked") {
		t.Errorf("with yes: %+v", r)
	}
	left()
	if r := try(t, env, "sessions", "revoke", "--user", "jane", "--yes"); r.code != exitOK || !strings.Contains(r.stderr, "no session was revoked") {
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
	out := mustTry(t, env, "types", "set", "-t", "session.Session", "--idle-timeout", "8h", "--user-limit", "5", "--expiry-field", "expires_at", "--audit=false")
	want := "TYPE  RECORDS  CAPACITY  TTL  EXPIRES BY  IDLE TIMEOUT  USER LIMIT  AUDITED\nsession.Session  0  expires_at  8h0m0s  5  false\n"
	if squeezed := regexp.MustCompile(` {2,}`).ReplaceAllString(out, "  "); squeezed != want {
		t.Errorf("got\n%s, want\n%s", squeezed, want)
	}
	out = mustTry(t, env, "types", "set", "-t", "session.Session", "--idle-timeout", "0", "--user-limit", "0", "--expiry-field", "", "-o", "json")
	want = `{"type":"type.googleapis.com/session.Session","records":"0","audited":false,"looked_up_by":["idp_id","user_id"],"up_to_date":true}` + "\n"
	if out != want {
		t.Errorf("got %s, want %s", out, want)
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

func TestMigrateGrants(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	reader := `it's "quoted"; ` + d.Name
	out := mustTry(t, []string{"PGBROKER_DATABASE_URL=" + d.ConnString}, "migrate", "grants", "--reader", reader)
	for range 2 {
		d.Exec(t, out)
		out = mustTry(t, []string{"PGBROKER_DATABASE_URL=" + d.ConnString}, "migrate", "grants", "--reader", reader)
		if strings.Contains(out, "CREATE ROLE") {
			t.Errorf("the role is there already:\n%s", out)
		}
	}
	t.Cleanup(func() {
		role := pgx.Identifier{reader}.Sanitize()
		if _, err := d.Connect(t).Exec(context.Background(), "DROP OWNED BY "+role+"; DROP ROLE "+role); err != nil {
			t.Error(err)
		}
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
