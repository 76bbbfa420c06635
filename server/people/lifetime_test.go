package people

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server/servertest"
)

// awaitIDs waits until a type has exactly the given records.
func awaitIDs(t testing.TB, b *servertest.Broker, recordType string, want ...string) {
	t.Helper()
	var got []string
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		got = column[string](t, b.Database, `SELECT id FROM pgbroker.records WHERE type = $1 ORDER BY id`, recordType)
		if slices.Equal(got, want) {
			return
		}
	}
	t.Fatalf("there are %v, want %v", got, want)
}

// TestExpiryOfAnyType: records of a type end at the time that a field of their payload names, also those that
// were there before; what is no time ends nothing, and fails nobody's write.
func TestExpiryOfAnyType(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: busy})
	const thing = "example.com/Thing"
	aThing := func(id string, end any) *databroker.Record {
		return record(t, thing, id, object(t, map[string]any{"life": map[string]any{"end": end}}))
	}
	past, future := time.Now().Add(-time.Hour).Format(time.RFC3339), time.Now().Add(time.Hour).Format(time.RFC3339)
	before := position(t, b.Replica)
	put(t, b.Replica, aThing("old-past", past), aThing("old-future", future), aThing("old-odd", "soon"))
	b.Database.Exec(t, `SELECT pgbroker.set_expiry($1, 'life.end')`, thing)
	put(t, b.Replica, aThing("new-past", past), aThing("new-future", future), aThing("new-odd", "2030-02-30T00:00:00Z"), aThing("new-number", 7.0))
	awaitDeletions(t, b.Replica, thing, before, "old-past", "new-past")
	awaitIDs(t, b, thing, "new-future", "new-number", "new-odd", "old-future", "old-odd")

	// Taken back, it is taken back for all.
	b.Database.Exec(t, `SELECT pgbroker.set_expiry($1, NULL)`, thing)
	for deadline := time.Now().Add(patience); !value[bool](t, b.Database, `SELECT up_to_date FROM pgbroker.type_summary WHERE type = $1`, thing); {
		if time.Now().After(deadline) {
			t.Fatal("the type does not become up to date")
		}
	}
	if got := value[int](t, b.Database, `SELECT count(expires_at) FROM pgbroker.records WHERE type = $1`, thing); got != 0 {
		t.Errorf("%d records still expire", got)
	}
}

// TestIdleTimeout: sessions that are not used end, whatever else is written to them; used ones stay.
func TestIdleTimeout(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: busy})
	now := time.Now()
	expires := now.Add(24 * time.Hour)
	before := position(t, b.Replica)
	put(t, b.Replica,
		record(t, "", "used", aSession("used", "jane", "okta", now.Add(-9*time.Hour), now, expires)),
		record(t, "", "idle", aSession("idle", "jane", "okta", now.Add(-9*time.Hour), now.Add(-2*time.Hour), expires)),
		record(t, "", "never-used-new", &session.Session{Id: "never-used-new", IssuedAt: timestamppb.New(now), ExpiresAt: timestamppb.New(expires)}),
		record(t, "", "never-used-old", &session.Session{Id: "never-used-old", IssuedAt: timestamppb.New(now.Add(-2 * time.Hour)), ExpiresAt: timestamppb.New(expires)}),
		record(t, "", "bare", &session.Session{Id: "bare", ExpiresAt: timestamppb.New(expires)}),
	)
	b.Database.Exec(t, `SELECT pgbroker.set_idle_timeout('session.Session', '1 hour')`)
	awaitDeletions(t, b.Replica, sessionType, before, "idle", "never-used-old")
	awaitIDs(t, b, sessionType, "bare", "never-used-new", "used")
	got := column[string](t, b.Database, `SELECT cause || ' ' || id FROM pgbroker.revocations ORDER BY id`)
	if want := []string{"idle idle", "idle never-used-old"}; !slices.Equal(got, want) {
		t.Errorf("the audit has %q, want %q", got, want)
	}
}

// TestIdleSparesWhatWasUsedMeanwhile: between the look for idle records and their deletion one is used.
func TestIdleSparesWhatWasUsedMeanwhile(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: quiet})
	now := time.Now()
	s := aSession("s", "jane", "okta", now.Add(-9*time.Hour), now.Add(-2*time.Hour), now.Add(time.Hour))
	found := put(t, b.Replica, record(t, "", "s", s))[0].GetVersion()
	s.AccessedAt = timestamppb.New(now.Add(-time.Hour))
	latest := put(t, b.Replica, record(t, "", "s", s))[0].GetVersion()
	put(t, b.Replica, record(t, "", "newer", aSession("newer", "jane", "okta", now, now, now.Add(time.Hour))))
	b.Database.Exec(t, `SELECT pgbroker.set_idle_timeout('session.Session', '1 minute'), pgbroker.set_user_limit('session.Session', 1)`)
	for _, function := range []string{"end_idle_records", "end_excess_records"} {
		if n := value[int](t, b.Database, fmt.Sprintf(`SELECT pgbroker.%s($1, '{s}', $2)`, function), sessionType, []int64{int64(found)}); n != 0 {
			t.Errorf("%s has ended a session that was used meanwhile", function)
		}
	}
	if n := value[int](t, b.Database, `SELECT pgbroker.end_excess_records($1, '{s}', $2)`, sessionType, []int64{int64(latest)}); n != 1 {
		t.Errorf("end_excess_records has ended %d sessions of the latest version, want 1", n)
	}
}

// TestUserLimit: of a user's sessions those issued last stay, when the limit is set, when it is lowered, and
// when another session comes.
func TestUserLimit(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: busy})
	now := time.Now()
	add := func(id, userID string, hoursAgo int) {
		put(t, b.Replica, record(t, "", id, aSession(id, userID, "okta", now.Add(-time.Duration(hoursAgo)*time.Hour), now, now.Add(time.Hour))))
	}
	// Not in the order in which they were issued.
	add("jane-2", "jane", 2)
	add("jane-4", "jane", 4)
	add("jane-1", "jane", 1)
	add("jane-3", "jane", 3)
	add("joe-1", "joe", 1)
	put(t, b.Replica, record(t, "", "nobody-1", &session.Session{Id: "nobody-1"}), record(t, "", "nobody-2", &session.Session{Id: "nobody-2"}),
		record(t, "", "nobody-3", &session.Session{Id: "nobody-3"}))
	b.Database.Exec(t, `SELECT pgbroker.set_user_limit('session.Session', 3)`)
	awaitIDs(t, b, sessionType, "jane-1", "jane-2", "jane-3", "joe-1", "nobody-1", "nobody-2", "nobody-3")
	b.Database.Exec(t, `SELECT pgbroker.set_user_limit('session.Session', 2)`)
	awaitIDs(t, b, sessionType, "jane-1", "jane-2", "joe-1", "nobody-1", "nobody-2", "nobody-3")
	add("jane-0", "jane", 0)
	awaitIDs(t, b, sessionType, "jane-0", "jane-1", "joe-1", "nobody-1", "nobody-2", "nobody-3")
	got := column[string](t, b.Database, `SELECT cause || ' ' || id FROM pgbroker.revocations ORDER BY number`)
	if want := []string{"limit jane-4", "limit jane-3", "limit jane-2"}; !slices.Equal(got, want) {
		t.Errorf("the audit has %q, want %q", got, want)
	}
}

// TestLimitsInPages: more records than one look takes in, and more to delete than one statement does.
func TestLimitsInPages(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: busy})
	const count = 2500
	b.Database.Exec(t, `INSERT INTO pgbroker.records (type, id, data)
		SELECT $1, 's' || i, jsonb_build_object('user_id', 'u' || i % 2, 'accessed_at', now(), 'issued_at', now() + make_interval(secs => i))
		FROM generate_series(1, $2) AS i`, sessionType, count)
	b.Database.Exec(t, `SELECT pgbroker.set_user_limit('session.Session', 2)`)
	awaitIDs(t, b, sessionType, "s2497", "s2498", "s2499", "s2500")
	b.Database.Exec(t, `INSERT INTO pgbroker.records (type, id, data)
		SELECT $1, 'old' || i, jsonb_build_object('user_id', 'u' || i, 'accessed_at', now() - interval '1 day')
		FROM generate_series(1, $2) AS i`, sessionType, count)
	b.Database.Exec(t, `SELECT pgbroker.set_idle_timeout('session.Session', '1 hour')`)
	awaitIDs(t, b, sessionType, "s2497", "s2498", "s2499", "s2500")
}

// TestWhatAvoidsScansIsNotCompiled: with sequential scans off, a look at any small table, which the triggers take, seems to be so
// much work that PostgreSQL compiles it, for 60 ms each time. Replicas have that off for themselves, other writers have not.
func TestWhatAvoidsScansIsNotCompiled(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	if compiled := column[string](t, d, `SELECT oid::regprocedure::text FROM pg_proc
		WHERE pronamespace = 'pgbroker'::regnamespace AND proconfig @> '{enable_seqscan=off}' AND NOT proconfig @> '{jit=off}'`); len(compiled) > 0 {
		t.Errorf("these may be compiled: %v", compiled)
	}
	if n := value[int](t, d, `SELECT count(*) FROM pg_proc WHERE pronamespace = 'pgbroker'::regnamespace AND proconfig @> '{jit=off}'`); n < 7 {
		t.Errorf("%d functions were looked at", n)
	}
}

// A user that goes ends its sessions, however it goes, if the type says so; one that comes back in time, and those of whom
// nobody has ever known, do not.
func TestSessionsOfMissingUsers(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: busy})
	now := time.Now()
	inDirectory := func(id string) *databroker.Record {
		return record(t, "pomerium.io/DirectoryUser", id, object(t, map[string]any{"id": id}))
	}
	for _, id := range []string{"by-grpc", "by-sql", "from-directory", "back", "late", "stays", "of-old"} {
		put(t, b.Replica, aUser(t, id, id), inDirectory(id),
			record(t, "", "s-"+id, aSession("s-"+id, id, "okta", now.Add(-time.Hour), now, now.Add(time.Hour))))
	}
	put(t, b.Replica, record(t, "", "s-never-known", aSession("s-never-known", "never-known", "okta", now.Add(-time.Hour), now, now.Add(time.Hour))))
	all := []string{"s-back", "s-by-grpc", "s-by-sql", "s-from-directory", "s-late", "s-never-known", "s-of-old", "s-stays"}

	// Tombstones of long ago count as well, once the option is set. Their time cannot be set, so that of all is moved back.
	age := func() {
		t.Helper()
		b.Database.Exec(t, `ALTER TABLE pgbroker.changes DISABLE TRIGGER USER;
			UPDATE pgbroker.changes SET changed_at = changed_at - interval '2 minutes' WHERE deleted;
			ALTER TABLE pgbroker.changes ENABLE TRIGGER USER`)
	}
	b.Database.Exec(t, `DELETE FROM pgbroker.users WHERE id = 'of-old'`)
	age()
	put(t, b.Replica, deletion(userType, "by-grpc"), deletion("pomerium.io/DirectoryUser", "back"))
	b.Database.Exec(t, `DELETE FROM pgbroker.users WHERE id = 'by-sql'; DELETE FROM pgbroker.directory_users WHERE id = 'from-directory'`)
	put(t, b.Replica, inDirectory("back"))
	if n := value[int](t, b.Database, `SELECT pgbroker.would_end('session.Session', missing_users => true)`); n != 4 {
		t.Errorf("would_end says %d, want 4", n)
	}
	awaitIDs(t, b, sessionType, all...)
	b.Database.Exec(t, `SELECT pgbroker.set_end_sessions_of_missing_users('session.Session', true)`)
	awaitIDs(t, b, sessionType, "s-back", "s-by-grpc", "s-by-sql", "s-from-directory", "s-late", "s-never-known", "s-stays")
	// A minute is for what comes back.
	if n := value[int](t, b.Database, `SELECT count(*) FROM pgbroker.sessions WHERE id IN ('s-by-grpc', 's-by-sql', 's-from-directory')`); n != 3 {
		t.Errorf("%d of 3 sessions are left before a minute has passed", n)
	}
	age()
	awaitIDs(t, b, sessionType, "s-back", "s-late", "s-never-known", "s-stays")
	got := column[string](t, b.Database, `SELECT DISTINCT cause FROM pgbroker.revocations WHERE what = 'session.Session'`)
	if !slices.Equal(got, []string{"user"}) {
		t.Errorf("the audit has %q, want user", got)
	}

	// Who signs in after he has gone from the directory stays.
	b.Database.Exec(t, `DELETE FROM pgbroker.directory_users WHERE id = 'late'`)
	put(t, b.Replica, record(t, "", "s-later", aSession("s-later", "late", "okta", now.Add(time.Hour), now, now.Add(2*time.Hour))))
	age()
	awaitIDs(t, b, sessionType, "s-back", "s-later", "s-never-known", "s-stays")

	// A directory without any user is lost, not left. What has gone from it counts once it is there again.
	b.Database.Exec(t, `DELETE FROM pgbroker.directory_users`)
	age()
	b.Database.Exec(t, `DELETE FROM pgbroker.users WHERE id = 'back'`)
	age()
	awaitIDs(t, b, sessionType, "s-later", "s-never-known", "s-stays") // the periodic work has seen what was there before
	put(t, b.Replica, inDirectory("somebody"))
	awaitIDs(t, b, sessionType, "s-later", "s-never-known")

	// Nobody else can end what is not due.
	if n := value[int](t, b.Database, `SELECT pgbroker.end_records_of_missing_users($1, ARRAY(SELECT version FROM pgbroker.changes), 10)`, sessionType); n != 0 {
		t.Errorf("%d sessions were ended that were not due", n)
	}
}

// More sessions of a user than go at a time, and more tombstones than are looked at.
func TestManySessionsOfMissingUsers(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: busy})
	b.Database.Exec(t, `
		INSERT INTO pgbroker.records (type, id, data) SELECT 'pomerium.io/DirectoryUser', 'u' || i, '{}' FROM generate_series(1, 2500) AS i;
		INSERT INTO pgbroker.records (type, id, data) SELECT 'type.googleapis.com/session.Session', 's' || i,
			jsonb_build_object('user_id', CASE WHEN i <= 500 THEN 'u1' ELSE 'u' || i END) FROM generate_series(1, 2500) AS i;
		SELECT pgbroker.set_end_sessions_of_missing_users('session.Session', true);
		DELETE FROM pgbroker.directory_users WHERE id <> 'u2500';
		ALTER TABLE pgbroker.changes DISABLE TRIGGER USER;
		UPDATE pgbroker.changes SET changed_at = changed_at - interval '2 minutes' WHERE deleted;
		ALTER TABLE pgbroker.changes ENABLE TRIGGER USER;
		ALTER TABLE pgbroker.records DISABLE TRIGGER USER;
		UPDATE pgbroker.records SET modified_at = modified_at - interval '4 minutes';
		ALTER TABLE pgbroker.records ENABLE TRIGGER USER`)
	awaitIDs(t, b, sessionType, "s2500")
}
