package conformance_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/registry"
	"pgbroker/proto/session"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// try runs a statement that may fail.
func try(t *testing.T, database *dbtest.Database, sql string) error {
	t.Helper()
	_, err := database.Pool.Exec(testContext(t), sql)
	return err
}

// scan returns the one value of a query.
func scan[T any](t *testing.T, database *dbtest.Database, sql string, args ...any) (value T) {
	t.Helper()
	if err := database.Pool.QueryRow(testContext(t), sql, args...).Scan(&value); err != nil {
		t.Fatal(err)
	}
	return value
}

// TestTheSameBoundAtEveryDoor: a record that clients could not receive is refused however it comes, and nothing else of what comes with
// it is written.
func TestTheSameBoundAtEveryDoor(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) { c.MaxMessageSize = 16 << 20 }}) // more than the database takes
	const bound = 4<<20 - 4<<10
	for name, sql := range map[string]string{
		"payload":   `INSERT INTO pgbroker.records (type, id, payload) SELECT 't', 'a' || g, convert_to(repeat('x', 4190208 + g), 'UTF8') FROM generate_series(0, 1) g`,
		"data":      `INSERT INTO pgbroker.records (type, id, data) VALUES ('t', 'a', jsonb_build_object('k', repeat('x', 4190208)))`,
		"id":        `INSERT INTO pgbroker.records (type, id) VALUES ('t', repeat('x', 2049))`,
		"type":      `INSERT INTO pgbroker.records (type, id) VALUES (repeat('x', 513), 'a')`,
		"staged":    `SELECT pgbroker.stage_records('{"a": {"k": "v"}}'); INSERT INTO staged_records (id, data) VALUES ('b', jsonb_build_object('k', repeat('x', 4190208))); SELECT pgbroker.replace_records('t', 1)`,
		"staged id": `SELECT pgbroker.stage_records('{"a": {"k": "v"}}'); INSERT INTO staged_records (id, data) VALUES (repeat('x', 2049), '{}'); SELECT pgbroker.replace_records('t', 1)`,
	} {
		err := try(t, b.Database, sql)
		var pgErr *pgconn.PgError
		if !errors.As(err, &pgErr) || pgErr.Code != "54000" || !strings.Contains(pgErr.Message, " bytes, at most ") || len(pgErr.Detail) > 400 {
			t.Errorf("%s: %v", name, err)
		}
	}
	put(t, b, thing("grows", ""))
	if err := try(t, b.Database, "UPDATE pgbroker.records SET payload = convert_to(repeat('x', 4190209), 'UTF8') WHERE id = 'grows'"); err == nil {
		t.Error("an update was taken")
	}
	large := &databroker.Record{Type: thingType, Id: "a", Data: &anypb.Any{Value: make([]byte, bound)}}
	_, err := b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{thing("b", ""), large}})
	wantStatus(t, err, codes.InvalidArgument, fmt.Sprintf("payload: %d bytes, at most %d are allowed", bound+5, bound))
	if got := query(t, b, "", "").TotalCount; got != 1 {
		t.Errorf("%d records", got)
	}

	// The largest one is taken by both, and one that is inside when the bound is lowered can still be indexed and projected.
	b.Database.Exec(t, `INSERT INTO pgbroker.records (type, id, payload) VALUES ('t', 'largest', convert_to(repeat('x', 4190208), 'UTF8'))`)
	b.Database.Exec(t, "UPDATE pgbroker.state SET max_record_bytes = 100000")
	b.Database.Exec(t, "UPDATE pgbroker.records SET index_fields = '{}' WHERE id = 'largest'")
	b.Database.Exec(t, `SELECT pgbroker.project_records('{t}', '{largest}', ARRAY[r.version], '{"{}"}', '{""}', '{""}') FROM pgbroker.records r WHERE r.id = 'largest'`)
	large.Data.Value = make([]byte, 100_000)
	_, err = b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{large}})
	wantStatus(t, err, codes.InvalidArgument, "payload: 100004 bytes, at most 100000 are allowed")
}

// TestOptionsInALoop: what writes index is bounded by what the options of the moment ask for, however often they change. Look-ups find
// all the same, in the middle of it too, and what is not wanted any more leaves the records in the background.
func TestOptionsInALoop(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) { c.MaintenanceInterval = 20 * time.Millisecond }})
	var records []*databroker.Record
	for i := range 300 {
		records = append(records, object(thingType, fmt.Sprint("r", i), map[string]any{"a": "x", "b": "y", "last": fmt.Sprint(i)}))
	}
	put(t, b, records...)
	set := func(fields ...string) {
		t.Helper()
		_, err := b.SetOptions(testContext(t), &databroker.SetOptionsRequest{Type: thingType, Options: &databroker.Options{IndexableFields: fields}})
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range 50 {
		set([]string{"a", "b"}[i%2], fmt.Sprint("field", i))
		put(t, b, records[i])
		if got := len(queryIDs(t, b, thingType, `{"a": "x", "b": "y"}`)); got != len(records) {
			t.Fatalf("after %d changes: %d of %d records are found", i, got, len(records))
		}
	}
	set("a", "last")
	const fields = `SELECT projected_fields = '{a,last}' AND indexed_fields <@ projected_fields FROM pgbroker.record_types WHERE type = $1`
	if !scan[bool](t, b.Database, fields, thingType) {
		t.Error("writes index more than is wanted")
	}
	const indexed = "SELECT index_version = indexed_version AND indexed_fields = '{a,last}' FROM pgbroker.record_types WHERE type = $1"
	for ctx := testContext(t); !scan[bool](t, b.Database, indexed, thingType); {
		select {
		case <-time.After(10 * time.Millisecond): // nothing announces it
		case <-ctx.Done():
			t.Fatal("the records are not indexed")
		}
	}
	if n := scan[int](t, b.Database, "SELECT count(*)::int FROM pgbroker.records WHERE type = $1 AND index_fields - '{a,last}'::text[] <> '{}'", thingType); n != 0 {
		t.Errorf("%d records keep terms that nobody wants", n)
	}
	same(t, "found by the last field", queryIDs(t, b, thingType, `{"last": "7"}`), []string{"r7"})
	set()
	if got := scan[int](t, b.Database, "SELECT cardinality(projected_fields) FROM pgbroker.record_types WHERE type = $1", thingType); got != 0 {
		t.Errorf("%d fields without options", got)
	}
	// What the product needs stays.
	_, err := b.SetOptions(testContext(t), &databroker.SetOptionsRequest{Type: sessionType, Options: new(databroker.Options)})
	if err != nil {
		t.Fatal(err)
	}
	if !scan[bool](t, b.Database, "SELECT projected_fields = '{idp_id,user_id}' FROM pgbroker.record_types WHERE type = $1", sessionType) {
		t.Error("sessions are not looked up by user any more")
	}
}

// TestIndexingThatWasOvertaken: work that began before the latest change of options does not say that it has done what they ask for: a
// record may have been written without a field in between.
func TestIndexingThatWasOvertaken(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) { c.MaintenanceInterval = time.Hour }})
	put(t, b, object(thingType, "r", map[string]any{"a": "x"}))
	fields := func(list string) int64 {
		b.Database.Exec(t, "UPDATE pgbroker.record_types SET indexable_fields = $1 WHERE type = $2", list, thingType)
		return scan[int64](t, b.Database, "SELECT index_version FROM pgbroker.record_types WHERE type = $1", thingType)
	}
	began := fields("{a}")
	fields("{}")
	put(t, b, object(thingType, "s", map[string]any{"a": "x"}))
	fields("{a}")
	if err := db.New(b.Database.Pool).TypeIndexed(testContext(t), db.TypeIndexedParams{Type: thingType, IndexVersion: began}); err != nil {
		t.Fatal(err)
	}
	same(t, "found", queryIDs(t, b, thingType, `{"a": "x"}`), []string{"r", "s"})
	if scan[bool](t, b.Database, "SELECT 'a' = ANY (indexed_fields) FROM pgbroker.record_types WHERE type = $1", thingType) {
		t.Error("a field counts as indexed that not every record is indexed by")
	}
}

// TestFieldsOutOfBoundsInSQL: SetOptions is not the only way.
func TestFieldsOutOfBoundsInSQL(t *testing.T) {
	t.Parallel()
	b := start(t)
	for _, fields := range []string{"(SELECT array_agg('f' || g) FROM generate_series(1, 65) g)", "ARRAY[repeat('x', 257)]", "ARRAY[NULL]::text[]"} {
		for _, sql := range []string{
			"INSERT INTO pgbroker.record_types (type, indexable_fields) VALUES ('t', " + fields + ")",
			"UPDATE pgbroker.record_types SET indexable_fields = " + fields,
		} {
			if err := try(t, b.Database, sql); err == nil || !strings.Contains(err.Error(), "at most 64 fields of at most 256 bytes") {
				t.Errorf("%s: %v", sql, err)
			}
		}
	}
}

// TestLeasesAfterTheClockWasAhead: a lease that was taken while the database's clock was ahead does not last until that time comes. One
// that was asked for so long does.
func TestLeasesAfterTheClockWasAhead(t *testing.T) {
	t.Parallel()
	b := startWithClock(t, 1)
	clock := b.clock
	ctx := testContext(t)
	clock.advance(3 * time.Hour)
	acquire(t, b, "short", time.Minute)
	acquire(t, b, "long", 24*time.Hour)
	mine := acquire(t, b, "renewed", time.Minute)
	clock.advance(-3 * time.Hour)
	if _, err := b.RenewLease(ctx, &databroker.RenewLeaseRequest{Name: "renewed", Id: mine, Duration: durationpb.New(time.Minute)}); err != nil {
		t.Errorf("the holder cannot renew: %v", err)
	}
	wantTaken(t, b, "renewed")
	acquire(t, b, "short", time.Minute)
	wantTaken(t, b, "short")
	acquire(t, b, "long", 24*time.Hour) // it would have ended 27 hours from now, and was asked for one day
	clock.advance(23 * time.Hour)
	wantTaken(t, b, "long")
	acquire(t, b, "short", time.Minute)
	// Half a second is how clocks are put right all the time.
	clock.advance(-500 * time.Millisecond)
	wantTaken(t, b, "short")
	// Somebody has taken one in SQL, for ever.
	b.Database.Exec(t, "UPDATE pgbroker.leases SET expires_at = 'infinity' WHERE name = 'short'")
	acquire(t, b, "short", time.Minute)
}

// TestTextsThatLookAlike: two texts that differ stay different for look-ups, views and revocations, also where JSON in PostgreSQL cannot
// hold one of them, and where they are two Unicode forms of the same.
func TestTextsThatLookAlike(t *testing.T) {
	t.Parallel()
	b := start(t)
	users := []string{
		"joe", "jo\x00e", "joe\x00", "\x00joe", "jo\x00\x00e", "jo\U0010FFFF0e", "jo\U0010FFFFe", "jo\U0010FFFF\U0010FFFFe", "",
		"caf\u00e9", "cafe\u0301", "\u212bngstr\u00f6m", "\u00c5ngstr\u00f6m", "Joe", "jo\uFFFDe", "jo\\u0000e", "\uff4aoe",
		strings.Repeat("x", 700) + "a", strings.Repeat("x", 700) + "b",
	}
	var records []*databroker.Record
	for i, user := range users {
		records = append(records, newRecord(sessionType, fmt.Sprint("s", i), &session.Session{Id: fmt.Sprint("s", i), UserId: user}),
			object(thingType, fmt.Sprint("t", i), map[string]any{"user": user, "k" + user: "x"}))
	}
	put(t, b, records...)
	if n := scan[int](t, b.Database, "SELECT count(DISTINCT data ->> 'user_id')::int FROM pgbroker.records WHERE type = $1", sessionType); n != len(users)-1 { // "" is left out
		t.Errorf("%d users of %d can be told apart", n, len(users)-1)
	}
	for i, user := range users {
		filter := func(key string, value string) *structpb.Struct {
			return &structpb.Struct{Fields: map[string]*structpb.Value{key: structpb.NewStringValue(value)}}
		}
		for recordType, key := range map[string]string{sessionType: "user_id", thingType: "user"} {
			found, err := b.Query(testContext(t), &databroker.QueryRequest{Type: recordType, Filter: filter(key, user), Limit: 100})
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			if recordType == sessionType {
				want = []string{fmt.Sprint("s", i)}
				if user == "" { // a field that is not set has no text
					want = []string{}
				}
			} else {
				want = []string{fmt.Sprint("t", i)}
			}
			same(t, fmt.Sprintf("%s %q", key, user), idsOf(found.Records), want)
		}
		found, err := b.Query(testContext(t), &databroker.QueryRequest{Type: thingType, Filter: filter("k"+user, "x"), Limit: 100})
		if err != nil {
			t.Fatal(err)
		}
		same(t, fmt.Sprintf("key %q", user), idsOf(found.Records), []string{fmt.Sprint("t", i)})
	}
	// A revocation, by what SQL shows.
	for i, user := range users {
		if user == "" {
			continue
		}
		shown := scan[string](t, b.Database, "SELECT user_id FROM pgbroker.sessions WHERE id = $1", fmt.Sprint("s", i))
		if i%2 == 0 || len(user) > 600 { // of longer ones the view shows a hash
			b.Database.Exec(t, "DELETE FROM pgbroker.sessions WHERE user_id = $1", shown)
		} else {
			b.Database.Exec(t, "SELECT pgbroker.revoke_user_sessions($1)", shown)
		}
		if left := scan[int](t, b.Database, "SELECT count(*)::int FROM pgbroker.records WHERE type = $1", sessionType); left != len(users)-len(revocable(users[:i+1])) {
			t.Fatalf("revoking the sessions of %q leaves %d", user, left)
		}
	}
	// An edit in SQL leaves them as they are.
	b.Database.Exec(t, `UPDATE pgbroker.records SET data = data || '{"list": ["x"]}' WHERE type = $1`, thingType)
	b.Database.Exec(t, `UPDATE pgbroker.records SET data = jsonb_set(data, '{list}', jsonb_build_array(data -> 'user')) WHERE type = $1`, thingType)
	for i, user := range users {
		got := payload[*structpb.Struct](t, get(t, b, thingType, fmt.Sprint("t", i)))
		want := newStruct(map[string]any{"user": user, "k" + user: "x", "list": []any{user}})
		same(t, fmt.Sprintf("after an edit: %q", user), got, want)
	}
	if err := try(t, b.Database, `INSERT INTO pgbroker.records (type, id, data) VALUES ('t', 'alone', jsonb_build_object('k', chr(1114111) || 'x'))`); err == nil || !strings.Contains(err.Error(), "U+10FFFF") {
		t.Errorf("U+10FFFF alone: %v", err)
	}
}

// revocable are those whose sessions can be revoked by their id.
func revocable(users []string) (ids []string) {
	for _, user := range users {
		if user != "" {
			ids = append(ids, user)
		}
	}
	return ids
}

// TestMoreServicesThanOneMessageLists: however many somebody registers, List and Watch answer, with what fits.
func TestMoreServicesThanOneMessageLists(t *testing.T) {
	t.Parallel()
	b := start(t)
	b.Database.Exec(t, `INSERT INTO pgbroker.services (kind, endpoint, expires_at)
		SELECT 4, 'http://' || lpad(g::text, 2000, 'x'), clock_timestamp() + interval '1 hour' FROM generate_series(1, 3000) g`)
	listed, err := b.Registry.List(testContext(t), new(registry.ListRequest))
	if err != nil || len(listed.Services) != 1000 {
		t.Errorf("%d services, %v", len(listed.GetServices()), err)
	}
	stream, err := b.Registry.Watch(testContext(t), new(registry.ListRequest))
	if err != nil {
		t.Fatal(err)
	}
	if watched, err := stream.Recv(); err != nil || len(watched.Services) != 1000 {
		t.Errorf("%d services, %v", len(watched.GetServices()), err)
	}
	if err := try(t, b.Database, "INSERT INTO pgbroker.services (kind, endpoint, expires_at) VALUES (4, repeat('x', 2049), clock_timestamp())"); err == nil {
		t.Error("an endpoint of any length is taken")
	}
}
