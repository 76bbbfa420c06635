package people

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/device"
	"pgbroker/proto/events"
	"pgbroker/proto/oauth21"
	"pgbroker/proto/rfc7591"
	"pgbroker/proto/session"
	"pgbroker/proto/user"
	"pgbroker/server/servertest"
)

// typedViews are the views of one type, each with a record of it, and a column with what it has to show.
func typedViews(t testing.TB) []struct {
	view   string
	record *databroker.Record
	column string
	want   string
} {
	t.Helper()
	now := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	stamp := timestamppb.New(now)
	description := "a robot"
	known := func(payload proto.Message) *databroker.Record { return record(t, "", "an id", payload) }
	return []struct {
		view   string
		record *databroker.Record
		column string
		want   string
	}{
		{"sessions", known(aSession("an id", "jane", "okta", now, now, now)), "user_id", "jane"},
		{"session_data", known(aSession("an id", "jane", "okta", now, now, now)), "user_id", "jane"},
		{"users", known(&user.User{Id: "an id", Name: "Jane"}), "name", "Jane"},
		{"service_accounts", known(&user.ServiceAccount{Description: &description}), "description", "a robot"},
		{"session_bindings", known(&session.SessionBinding{SessionId: "s", ExpiresAt: stamp}), "expires_at", "2030-01-02 03:04:05+00"},
		{"session_binding_requests", known(&session.SessionBindingRequest{State: session.SessionBindingRequestState_Accepted}), "state", "Accepted"},
		{"identity_bindings", known(&session.IdentityBinding{IdpId: "okta"}), "idp_id", "okta"},
		{"device_types", known(&device.Type{Name: "any"}), "name", "any"},
		{"device_enrollments", known(&device.Enrollment{EnrolledAt: stamp}), "enrolled_at", "2030-01-02 03:04:05+00"},
		{"device_credentials", known(&device.Credential{EnrollmentId: "e"}), "enrollment_id", "e"},
		{"device_owner_credentials", known(&device.OwnerCredentialRecord{OwnerId: []byte("o")}), "owner_id", "bw=="},
		{"oauth_authorization_requests", known(&oauth21.AuthorizationRequest{ClientId: "c"}), "client_id", "c"},
		{"oauth_clients", known(&rfc7591.ClientRegistration{ClientSecret: &rfc7591.ClientSecret{Value: secretText, ExpiresAt: stamp}}), "secret_expires_at", "2030-01-02 03:04:05+00"},
		{"mcp_refresh_tokens", known(&oauth21.MCPRefreshToken{UpstreamRefreshToken: secretText, Revoked: true}), "revoked", "true"},
		{"upstream_mcp_tokens", known(&oauth21.UpstreamMCPToken{AccessToken: secretText, RouteId: "r"}), "route_id", "r"},
		{"pending_upstream_auths", known(&oauth21.PendingUpstreamAuth{PkceVerifier: secretText, DownstreamHost: "h"}), "downstream_host", "h"},
		{"upstream_oauth_clients", known(&oauth21.UpstreamOAuthClient{ClientSecret: secretText, Issuer: "i"}), "issuer", "i"},
		{"last_errors", known(&events.LastError{Message: "m"}), "message", "m"},
		{"directory_users", record(t, "pomerium.io/DirectoryUser", "an id", object(t, map[string]any{"email": "e", "group_ids": []any{"g"}})), "email", "e"},
		{"directory_groups", record(t, "pomerium.io/DirectoryGroup", "an id", object(t, map[string]any{"name": "n"})), "name", "n"},
	}
}

// TestViewsShowAndDelete: each known type has a view, which shows its records, finds them by id, and from
// which a DELETE is a deletion that streams hear of.
func TestViewsShowAndDelete(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: quiet})
	views := typedViews(t)
	// Any index would do for the few.
	b.Database.Exec(t, `INSERT INTO pgbroker.records (type, id) SELECT $1, 'filler' || i FROM generate_series(1, 1000) AS i`, sessionType)
	b.Database.Exec(t, `ANALYZE pgbroker.records`)
	var tested []string
	for _, v := range views {
		tested = append(tested, v.view)
		put(t, b.Replica, v.record)
		before := position(t, b.Replica)
		got := value[string](t, b.Database, fmt.Sprintf(`SELECT (%s)::text FROM pgbroker.%s WHERE id = 'an id'`, v.column, v.view))
		if strings.TrimSuffix(got, "+00") != strings.TrimSuffix(v.want, "+00") {
			t.Errorf("%s.%s is %q, want %q", v.view, v.column, got, v.want)
		}
		plan := explain(t, b.Database, "SET LOCAL enable_seqscan = off", fmt.Sprintf(`EXPLAIN SELECT * FROM pgbroker.%s WHERE id = 'an id'`, v.view))
		if !strings.Contains(plan, "records_pkey") || !strings.Contains(plan, "(id = 'an id'::text)") {
			t.Errorf("%s looks a record up so:\n%s", v.view, plan)
		}
		b.Database.Exec(t, fmt.Sprintf(`DELETE FROM pgbroker.%s WHERE id = 'an id'`, v.view))
		awaitDeletions(t, b.Replica, v.record.GetType(), before, "an id")
	}
	// Those that can be deleted from are those that were tested, and no others.
	var deletable []string
	for _, statement := range column[string](t, b.Database, `SELECT pgbroker.grants(NULL, $1, NULL)`, dbtest.WriterRole) {
		if names, ok := strings.CutPrefix(statement, "GRANT DELETE ON "); ok {
			deletable = strings.Split(strings.ReplaceAll(strings.TrimSuffix(names, " TO "+dbtest.WriterRole+";"), "pgbroker.", ""), ", ")
		}
	}
	slices.Sort(tested)
	if !slices.Equal(tested, deletable) {
		t.Errorf("a writer may delete from\n%q, tested are\n%q", deletable, tested)
	}
}

// TestViewsNameNoPayload: no view depends on a column that holds secrets, directly or through another view,
// so no function of a reader can ever be called with one.
func TestViewsNameNoPayload(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	const secret = `
		SELECT c.relname || '.' || a.attname FROM pg_depend d
		JOIN pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND w.oid = d.objid
		JOIN pg_class c ON c.oid = w.ev_class
		JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
		WHERE (d.refobjid, a.attname) IN (('pgbroker.records'::regclass, 'payload'), ('pgbroker.search_texts'::regclass, 'search_text'),
		                                  ('pgbroker.leases'::regclass, 'id'))`
	if got := column[string](t, d, secret); len(got) > 0 {
		t.Errorf("views name %v", got)
	}
	d.Exec(t, `CREATE VIEW pgbroker.careless AS SELECT octet_length(payload) FROM pgbroker.records`)
	if got := column[string](t, d, secret); !slices.Equal(got, []string{"careless.payload"}) {
		t.Errorf("this test finds %v", got)
	}
	// Such a view of a user's is not for readers, nor is what is made of it; others are.
	d.Exec(t, `CREATE VIEW pgbroker.careless_too AS SELECT * FROM pgbroker.careless`)
	d.Exec(t, `CREATE VIEW pgbroker.harmless AS SELECT id FROM pgbroker.users`)
	grants := strings.Join(column[string](t, d, `SELECT pgbroker.grants($1, $2, NULL)`, dbtest.ReaderRole, dbtest.WriterRole), "\n")
	if strings.Contains(grants, "careless") || !strings.Contains(grants, "pgbroker.harmless") {
		t.Errorf("the grants are\n%s", grants)
	}
}

// TestViewsWithMalformedRecords: what is malformed in one record is NULL in its row, and the other rows are
// there; writing it fails nobody.
func TestViewsWithMalformedRecords(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: quiet})
	for _, v := range typedViews(t) {
		recordType := v.record.GetType()
		// With a payload, or what is malformed would be refused.
		b.Database.Exec(t, `INSERT INTO pgbroker.records (type, id, payload, data) SELECT v.type, v.id, '', v.data FROM (VALUES
			($1, 'good', '{}'::jsonb), ($1, 'none', NULL), ($1, 'scalar', '"text"'), ($1, 'list', '[1]'),
			($1, 'text', '{"issued_at": "yesterday", "accessed_at": "2030-02-30T00:00:00Z", "expires_at": "", "created_at": "x",
			  "enrolled_at": "9", "refresh_expires_at": "?", "time": "-", "refresh_disabled": "maybe", "revoked": "perhaps", "group_ids": "g",
			  "oauth_token": {"expires_at": "never"}, "client_secret": {"expires_at": "?", "created_at": []}, "claims": "none"}'),
			($1, 'odd', '{"issued_at": 7, "accessed_at": {}, "expires_at": [], "created_at": true, "enrolled_at": 1e300,
			  "time": "99999999-01-01T00:00:00Z", "oauth_token": 7, "client_secret": [], "claims": {"email": "x", "name": 7}, "group_ids": {"a": 1}}')
			, ($1, 'endless', '{"issued_at": "infinity", "accessed_at": "-infinity", "expires_at": "infinity", "time": "infinity",
			  "oauth_token": {"expires_at": "infinity"}, "created_at": "now"}')) AS v (type, id, data)
			ON CONFLICT DO NOTHING`, recordType)
		if got := value[int](t, b.Database, fmt.Sprintf(`SELECT count(v) FROM (SELECT v::text FROM pgbroker.%s v OFFSET 0) v`, v.view)); got != 7 {
			t.Errorf("%s shows %d rows of 7", v.view, got)
		}
	}
	for _, view := range []string{"session_details", "directory_members", "type_summary", "change_log", "revocations"} {
		value[int](t, b.Database, fmt.Sprintf(`SELECT count(v) FROM (SELECT v::text FROM pgbroker.%s v OFFSET 0) v`, view))
	}
	if expires := column[*time.Time](t, b.Database, `SELECT expires_at FROM pgbroker.sessions WHERE expires_at IS NOT NULL`); len(expires) > 0 {
		t.Errorf("malformed sessions expire at %v", expires)
	}
}

// TestSessionDetails joins a session with what is known of its user.
func TestSessionDetails(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: quiet})
	now := time.Now()
	put(t, b.Replica,
		record(t, "", "s", aSession("s", "jane", "okta", now, now, now.Add(time.Hour))),
		record(t, "", "t", aSession("t", "stranger", "okta", now, now, now.Add(time.Hour))),
		aUser(t, "jane", "Jane D."),
		record(t, "pomerium.io/DirectoryUser", "jane", object(t, map[string]any{"display_name": "J.", "group_ids": []any{"g1", "gone"}})),
		record(t, "pomerium.io/DirectoryGroup", "g1", object(t, map[string]any{"name": "Staff"})),
	)
	rows, err := b.Database.Pool.Query(t.Context(),
		`SELECT id || ': ' || concat_ws(' ', name, email, group_ids, groups) FROM pgbroker.session_details ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"s: Jane D. jane@example.com {g1,gone} {Staff,gone}", "t: Stranger stranger@example.com"}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
}

// TestSessionsByUserStayHOT: neither the index for look-ups by user nor any other makes the use of a session
// an update of an index.
func TestSessionsByUserStayHOT(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: quiet})
	now := time.Now()
	s := aSession("s", "jane", "okta", now, now, now.Add(time.Hour))
	put(t, b.Replica, record(t, "", "s", s))
	const updates = 20
	for i := range updates {
		s.AccessedAt = timestamppb.New(now.Add(time.Duration(i) * time.Second))
		put(t, b.Replica, record(t, "", "s", s))
	}
	// Told by the replica's connections when they end.
	if err := b.Replica.Stop(); err != nil {
		t.Fatal(err)
	}
	hot := func() (n, all int) {
		if err := b.Database.Pool.QueryRow(t.Context(), `SELECT n_tup_hot_upd, n_tup_upd FROM pg_stat_user_tables
			WHERE relid = 'pgbroker.records'::regclass`).Scan(&n, &all); err != nil {
			t.Fatal(err)
		}
		return n, all
	}
	for deadline := time.Now().Add(patience); ; {
		n, all := hot()
		if all >= updates {
			if n < all*3/4 { // now and then a page is full
				t.Errorf("%d of %d updates were HOT", n, all)
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d updates were counted, want %d", all, updates)
		}
	}
}

// TestLookUpsReadWhatTheyShow: reading and revoking by user, and joining sessions with what is known of their users,
// looks at those rows only, however many others there are.
func TestLookUpsReadWhatTheyShow(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, payload, data)
		SELECT $1, 's' || i, '', jsonb_build_object('user_id', 'u' || i / 3) FROM generate_series(1, 6000) AS i`, sessionType)
	for _, recordType := range []string{userType, "pomerium.io/DirectoryUser"} {
		d.Exec(t, `INSERT INTO pgbroker.records (type, id, payload, data)
			SELECT $1, 'u' || i, '', jsonb_build_object('group_ids', jsonb_build_array('g' || i / 2)) FROM generate_series(1, 2000) AS i`, recordType)
	}
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, payload, data)
		SELECT 'pomerium.io/DirectoryGroup', 'g' || i, '', jsonb_build_object('name', 'G' || i) FROM generate_series(1, 1000) AS i`)
	d.Exec(t, `ANALYZE pgbroker.records`)
	byUser := `'hex'::text)) END)::text = ` // the user, or what stands for one that is too long for an index
	// What reads all records of a type.
	everything := regexp.MustCompile(`Seq Scan on records|Index Cond: \(type = '[^']*'::text\)\n`)
	for _, test := range []struct{ statement, has string }{
		{`SELECT * FROM pgbroker.sessions WHERE user_id = 'u7'`, byUser + `'u7'`},
		{`DELETE FROM pgbroker.sessions WHERE user_id = 'u7'`, byUser + `'u7'`},
		{`SELECT * FROM pgbroker.session_details WHERE user_id = 'u7'`, byUser + `'u7'`},
		{`SELECT * FROM pgbroker.session_details WHERE id = 's7'`, `(id = 's7'::text)`},
		{`SELECT s.id, u.email FROM pgbroker.sessions s JOIN pgbroker.users u ON u.id = s.user_id WHERE s.id = 's7'`, `(id = 's7'::text)`},
		{`SELECT s.id, m.group_name FROM pgbroker.sessions s JOIN pgbroker.directory_members m USING (user_id) WHERE s.id = 's7'`, `(id = 's7'::text)`},
		{`SELECT s.id FROM pgbroker.users u JOIN pgbroker.sessions s ON s.user_id = u.id WHERE u.id IN ('u7', 'u8')`, byUser},
		{`DELETE FROM pgbroker.sessions s USING pgbroker.directory_users u WHERE s.user_id = u.id AND u.id IN ('u7', 'u8')`, byUser},
	} {
		plan := explain(t, d, "SET LOCAL jit = off", "EXPLAIN "+test.statement)
		if !strings.Contains(plan, test.has) || everything.MatchString(plan+"\n") {
			t.Errorf("%s\nis planned as\n%s", test.statement, plan)
		}
	}
	// The planner knows that users have few sessions: each has three here; it would take them for a 200th of all, which is 30.
	if plan := explain(t, d, "SET LOCAL jit = off", `EXPLAIN SELECT * FROM pgbroker.sessions WHERE user_id = 'u7'`); !regexp.MustCompile(`rows=[1-4] `).MatchString(plan) {
		t.Errorf("the sessions of a user are planned as\n%s", plan)
	}
	// Of the directory nothing says who is in a group, so that is read; of the sessions those of the members only.
	members := `SELECT s.id FROM pgbroker.directory_members m JOIN pgbroker.sessions s USING (user_id) WHERE m.group_name = 'G7'`
	if plan := explain(t, d, "SET LOCAL jit = off", "EXPLAIN "+members); !strings.Contains(plan, "records_session_user") {
		t.Errorf("%s\nis planned as\n%s", members, plan)
	}
}
