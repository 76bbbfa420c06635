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
