package schema_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server/servertest"
)

// read returns the payload that clients get.
func read(t *testing.T, r *servertest.Replica, recordType, id string) *anypb.Any {
	t.Helper()
	response, err := r.Get(t.Context(), &databroker.GetRequest{Type: recordType, Id: id})
	if err != nil {
		t.Fatal(err)
	}
	return response.Record.Data
}

func same(t *testing.T, what string, got *anypb.Any, want proto.Message) {
	t.Helper()
	m, err := got.UnmarshalNew()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if diff := cmp.Diff(want, m, protocmp.Transform()); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// Data that are inserted in SQL become payloads, of the type that the record type or the data name, and reach streams.
func TestInsertOfData(t *testing.T) {
	t.Parallel()
	b := broker(t, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	info, err := b.ServerInfo(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := b.Sync(ctx, &databroker.SyncRequest{ServerVersion: info.ServerVersion})
	if err != nil {
		t.Fatal(err)
	}
	jane, err := structpb.NewStruct(map[string]any{"email": "jane@example.com", "group_ids": []any{"a", "b"}, "n": 1.5, "on": true, "no": nil})
	if err != nil {
		t.Fatal(err)
	}
	expires := timestamppb.New(time.Date(2030, 1, 2, 3, 4, 5, 600_000_000, time.UTC))
	for i, test := range []struct {
		recordType, data string
		want             proto.Message
	}{
		{directoryType, `{"email": "jane@example.com", "group_ids": ["a", "b"], "n": 1.5, "on": true, "no": null}`, jane},
		{sessionType, `{"id": "s", "userId": "u", "expires_at": "2030-01-02T05:04:05.6+02:00", "oauthToken": {"access_token": "` + secret + `"}}`,
			&session.Session{Id: "s", UserId: "u", ExpiresAt: expires, OauthToken: &session.OAuthToken{AccessToken: secret}}},
		{"example.com/Thing", `{"@type": "` + sessionType + `", "id": "s"}`, &session.Session{Id: "s"}},
		{"example.com/Time", `{"@type": "type.googleapis.com/google.protobuf.Timestamp", "value": "2030-01-02T03:04:05.600Z"}`, expires},
	} {
		id := string(rune('a' + i))
		b.Database.Exec(t, "INSERT INTO pgbroker.records (type, id, data) VALUES ($1, $2, $3::text::jsonb)", test.recordType, id, test.data)
		same(t, test.recordType, read(t, b.Replica, test.recordType, id), test.want)
		for {
			response, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if record := response.GetRecord(); record != nil {
				same(t, "stream of "+test.recordType, record.Data, test.want)
				break
			}
		}
	}
	// What is shown of it is what a replica would show.
	if got, want := get[string](t, b.Database, "SELECT data::text FROM pgbroker.records WHERE type = $1", sessionType),
		`{"id": "s", "user_id": "u", "expires_at": "2030-01-02T03:04:05.600Z", "oauth_token": {}}`; got != want {
		t.Errorf("data %s, want %s", got, want)
	}
	if got := get[string](t, b.Database, "SELECT search_text FROM pgbroker.search_texts WHERE type = $1", directoryType); got != "jane@example.com\x1fa\x1fb" {
		t.Errorf("search text %q", got)
	}
	if got := get[int64](t, b.Database, "SELECT count(*) FROM pgbroker.records WHERE expires_at = '2030-01-02T03:04:05.6Z' AND index_fields ->> 'user_id' = 'u'"); got != 1 {
		t.Error("the session is not indexed, or does not expire")
	}
	b.Database.Exec(t, `INSERT INTO pgbroker.records (type, id, data) VALUES ('pomerium.io/GeoIP', 'net', '{"$index": {"cidr": "10.1.2.3/8"}, "country": "NZ"}')`)
	if got := get[string](t, b.Database, "SELECT index_cidr::text FROM pgbroker.records WHERE id = 'net'"); got != "10.0.0.0/8" {
		t.Errorf("index %s", got)
	}
}

// Text queries find what was written in SQL as it is now: not what it was before, nor what a statement has left alone.
func TestWhatIsWrittenInSQLIsFoundByText(t *testing.T) {
	t.Parallel()
	b := broker(t, 1)
	found := func(text string, want int64) {
		t.Helper()
		response, err := b.Query(t.Context(), &databroker.QueryRequest{Type: directoryType, Query: text, Limit: 10})
		if err != nil {
			t.Fatal(err)
		}
		if response.TotalCount != want {
			t.Errorf("%q is found in %d records, want %d", text, response.TotalCount, want)
		}
	}
	insert := "INSERT INTO pgbroker.records (type, id, data) SELECT '" + directoryType + "', i, jsonb_build_object('name', 'Before') FROM unnest('{a,b}'::text[]) AS i"
	b.Database.Exec(t, insert)
	found("before", 2)
	b.Database.Exec(t, `UPDATE pgbroker.records SET data = data || '{"name": "After"}' WHERE id = 'a'`)
	found("before", 1)
	found("after", 1)
	b.Database.Exec(t, strings.Replace(insert, "Before", "Never", 1)+" ON CONFLICT DO NOTHING")
	found("never", 0)
	b.Database.Exec(t, strings.Replace(insert, "Before", "Again", 1)+" ON CONFLICT (type, id) DO UPDATE SET data = excluded.data WHERE records.id = 'b'")
	found("again", 1)
	b.Database.Exec(t, "UPDATE pgbroker.records SET data = NULL, payload = NULL WHERE id = 'a'")
	found("after", 0)
	b.Database.Exec(t, "DELETE FROM pgbroker.records")
	found("again", 0)
}

// An UPDATE of data keeps what data do not show: secrets at any depth, unknown fields, and the rest of the Any.
func TestUpdateOfDataKeepsWhatItDoesNotShow(t *testing.T) {
	t.Parallel()
	b := broker(t, 1)
	d := b.Database
	s := &session.Session{
		Id: "s", UserId: "u",
		IdToken:    &session.IDToken{Issuer: "i", Raw: secret},
		OauthToken: &session.OAuthToken{AccessToken: secret, RefreshToken: "refresh " + secret, ExpiresAt: timestamppb.New(time.Unix(1, 0))},
	}
	unknown := protowire.AppendString(protowire.AppendTag(nil, 4711, protowire.BytesType), "unknown")
	s.ProtoReflect().SetUnknown(unknown)
	s.OauthToken.ProtoReflect().SetUnknown(unknown)
	put(t, b.Replica, sessionType, "s", pack(t, s))

	edit := func(sql string, want func()) {
		t.Helper()
		d.Exec(t, "UPDATE pgbroker.records SET data = "+sql+" WHERE id = 's'")
		want()
		same(t, sql, read(t, b.Replica, sessionType, "s"), s)
	}
	edit(`data || '{"user_id": "other"}'`, func() { s.UserId = "other" })
	edit(`jsonb_set(data, '{oauth_token,expires_at}', '"2030-01-01T00:00:00Z"')`, func() {
		s.OauthToken.ExpiresAt = timestamppb.New(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC))
	})
	edit(`data #- '{id_token,issuer}'`, func() { s.IdToken.Issuer = "" })
	edit(`jsonb_set(data, '{oauth_token,refresh_token}', 'null')`, func() { s.OauthToken.RefreshToken = "" })
	edit(`jsonb_set(data, '{oauth_token,access_token}', '"new"')`, func() { s.OauthToken.AccessToken = "new" })
	edit(`data - 'id_token'`, func() { s.IdToken = nil })
	edit(`data || '{"claims": {"groups": ["a", 1], "none": []}}'`, func() {
		s.Claims = map[string]*structpb.ListValue{"groups": {Values: []*structpb.Value{structpb.NewStringValue("a"), structpb.NewNumberValue(1)}}, "none": {}}
	})

	// A write without a change of data is a write all the same, and touches no byte.
	payload := get[[]byte](t, d, "SELECT payload FROM pgbroker.records")
	version := get[int64](t, d, "SELECT version FROM pgbroker.records")
	d.Exec(t, "UPDATE pgbroker.records SET data = data")
	if got := get[[]byte](t, d, "SELECT payload FROM pgbroker.records"); !bytes.Equal(got, payload) {
		t.Error("another payload after SET data = data")
	}
	if got := get[int64](t, d, "SELECT version FROM pgbroker.records"); got <= version {
		t.Errorf("version %d after %d", got, version)
	}
	// An upsert is an edit, too.
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data) VALUES ($1, 's', '{"id": "s", "oauth_token": {"token_type": "Bearer"}}')
		ON CONFLICT (type, id) DO UPDATE SET data = excluded.data`, sessionType)
	want := &session.Session{Id: "s", OauthToken: &session.OAuthToken{AccessToken: "new", TokenType: "Bearer"}}
	want.ProtoReflect().SetUnknown(unknown)
	want.OauthToken.ProtoReflect().SetUnknown(unknown)
	same(t, "upsert", read(t, b.Replica, sessionType, "s"), want)
	// With payload set to NULL it begins from nothing.
	d.Exec(t, `UPDATE pgbroker.records SET payload = NULL, data = '{"id": "s"}'`)
	same(t, "replaced", read(t, b.Replica, sessionType, "s"), &session.Session{Id: "s"})
}

// A replica's write is the payload that it says, also where the same payload was shown in another way before: it is no
// edit of the data, which would remove from the payload what data have lost.
func TestAReplicasWriteIsNoEdit(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	// Somebody else has the lease of the periodic work: nothing is projected again but by what is written.
	d.Exec(t, "INSERT INTO pgbroker.leases (name, id, expires_at) VALUES ('pgbroker-maintenance', 'another', now() + interval '1 hour')")
	replica := servertest.Start(t, d.ServerConnString, servertest.Options{})
	payload := pack(t, &session.Session{Id: "s", Claims: map[string]*structpb.ListValue{"a": {}}})
	put(t, replica, sessionType, "s", payload)
	d.Exec(t, "INSERT INTO pgbroker.redacted_fields (message, field) VALUES ('session.Session', 'claims')")
	for shown := true; shown; {
		put(t, replica, sessionType, "probe", payload)
		shown = get[bool](t, d, "SELECT data ? 'claims' FROM pgbroker.records WHERE id = 'probe'")
	}
	if !get[bool](t, d, "SELECT data ? 'claims' FROM pgbroker.records WHERE id = 's'") {
		t.Fatal("projected again already")
	}
	put(t, replica, sessionType, "s", payload)
	if got := read(t, replica, sessionType, "s"); !bytes.Equal(got.Value, payload.Value) {
		t.Errorf("the payload is % x, want % x", got.Value, payload.Value)
	}
	if get[bool](t, d, "SELECT data ? 'claims' FROM pgbroker.records WHERE id = 's'") {
		t.Error("the claims are still shown")
	}
}

// What cannot become the type is refused by the statement, naming the field and not showing the value.
func TestDataThatCannotBecomeTheTypeAreRefused(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	add(t, d, set(t, "acme", badgeFile))
	insert := "INSERT INTO pgbroker.records (type, id, data) VALUES ($1, 'x', $2::text::jsonb)"
	for _, test := range []struct{ recordType, data, want string }{
		{sessionType, `{"nope": 1}`, "data.nope: there is no such field in message session.Session"},
		{sessionType, `{"user_id": "a", "userId": "a"}`, "data.userId: is given twice, as user_id, too"},
		{sessionType, `{"user_id": 1}`, "data.user_id: must be text, not number"},
		{sessionType, `{"oauth_token": {"access_token": ["` + secret + `"]}}`, "data.oauth_token.access_token: must be text, not array"},
		{sessionType, `{"oauth_token": "x"}`, "data.oauth_token: must be an object"},
		{sessionType, `{"refresh_disabled": "yes"}`, "data.refresh_disabled: must be true or false, not string"},
		{sessionType, `{"expires_at": "tomorrow"}`, "data.expires_at: must be a time as in 2030-01-31T23:59:59Z"},
		{sessionType, `{"expires_at": "2030-02-30T00:00:00Z"}`, "data.expires_at: is not a day of the calendar"},
		{sessionType, `{"audience": "x"}`, "data.audience: must be a list"},
		{sessionType, `{"audience": ["x", null]}`, "data.audience[1]: must not be null"},
		{sessionType, `{"claims": {"a": "x"}}`, "data.claims.a: must be a list"},
		{sessionType, `[]`, "data: must be an object"},
		{directoryType, `[]`, "data: must be an object"},
		{badgeType, `{"color": "BLUE"}`, "data.color: must be a value of acme.Badge.Color: GREY, RED"},
		{badgeType, `{"doors": [1, 2147483648]}`, "data.doors[1]: must be a whole number from -2147483648 to 2147483647 (int32)"},
		{badgeType, `{"doors": [1.5]}`, "data.doors[0]: must be a whole number"},
		{badgeType, `{"uses": "-1"}`, "data.uses: must be a whole number from 0 to 18446744073709551615 (uint64)"},
		{badgeType, `{"pin": {"a": "` + secret + `"}}`, "data.pin: must be text, not object"},
		{"type.googleapis.com/acme.Nope", `{}`, "data: the message 'acme.Nope' is not known: add it with `pgbroker schema add`"},
		{"x", `{"@type": "type.googleapis.com/acme.Nope"}`, "data: the message 'acme.Nope' is not known"},
		{"session.Session", `{"user_id": "jane"}`, "type: must be type.googleapis.com/session.Session in full"},
	} {
		got := refused(t, d, insert, test.recordType, test.data)
		if !strings.HasPrefix(got, test.want) || strings.Contains(got, secret) {
			t.Errorf("%s %s: got %q, want %q", test.recordType, test.data, got, test.want)
		}
	}
	if n := get[int64](t, d, "SELECT count(*) FROM pgbroker.records"); n != 0 {
		t.Errorf("%d records were written", n)
	}
	// The error says which of many records it is about, and psql shows no more of the way there than fits a screen.
	var pgErr *pgconn.PgError
	_, err := d.Pool.Exec(t.Context(), `INSERT INTO pgbroker.records (type, id, data)
		SELECT $1, 'r' || i, CASE i WHEN 2 THEN '{"oauth_token": {"expires_at": "x"}}' ELSE '{}' END::jsonb FROM generate_series(1, 3) AS i`, sessionType)
	if !errors.As(err, &pgErr) || pgErr.Detail != "In the record 'r2' of type 'type.googleapis.com/session.Session'." || strings.Count(pgErr.Where, "\n") > 3 {
		t.Errorf("got %+v", pgErr)
	}
	conn := d.Connect(t)
	stage(t, conn, `{"a": {}, "b": {"user_id": 7}}`)
	_, err = conn.Exec(t.Context(), "SELECT pgbroker.replace_records($1)", sessionType)
	if !errors.As(err, &pgErr) || pgErr.Detail != "In the record 'b' of type 'type.googleapis.com/session.Session'." {
		t.Errorf("got %+v", pgErr)
	}
	d.Exec(t, "INSERT INTO pgbroker.records (type, id, payload) VALUES ('x', 'unread', '\\x0a0178')")
	d.Exec(t, "INSERT INTO pgbroker.records (type, id, data) VALUES ('x', 'read', '{}')")
	for sql, want := range map[string]string{
		"UPDATE pgbroker.records SET data = '{}' WHERE id = 'unread'": "data: the payload of this record cannot be read",
		"UPDATE pgbroker.records SET data = NULL WHERE id = 'read'":   "data: cannot be NULL while there is a payload",
	} {
		if got := refused(t, d, sql); !strings.HasPrefix(got, want) {
			t.Errorf("%s: got %q, want %q", sql, got, want)
		}
	}
}

// schema view makes a view whose columns have the types of the fields, without secrets.
func TestViewDefinition(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	add(t, d, set(t, "acme", badgeFile))
	d.Exec(t, "INSERT INTO pgbroker.records (type, id, data) VALUES ($1, '1', $2::text::jsonb)", badgeType,
		`{"owner_name": "Jane", "issued_at": "2030-01-01T00:00:00Z", "doors": [1, 2], "pin": "1234", "color": "RED", "uses": 18446744073709551615}`)
	d.Exec(t, get[string](t, d, "SELECT pgbroker.view_definition('acme.Badge')"))
	want := "id text, owner_name text, issued_at timestamp with time zone, doors jsonb, color text, uses numeric, version bigint, modified_at timestamp with time zone"
	if got := get[string](t, d, `SELECT string_agg(attname || ' ' || format_type(atttypid, -1), ', ' ORDER BY attnum)
		FROM pg_attribute WHERE attrelid = 'badge'::regclass`); got != want {
		t.Errorf("columns %s\nwant    %s", got, want)
	}
	if got := get[string](t, d, "SELECT concat_ws(' ', id, owner_name, issued_at = '2030-01-01T00:00:00Z', doors, color, uses) FROM badge"); got != "1 Jane t [1, 2] RED 18446744073709551615" {
		t.Error(got)
	}
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data) VALUES ('example.com/MyThing', '1', '{"size": 1.5, "ok": true, "name": "n", "list": []}')`)
	d.Exec(t, get[string](t, d, "SELECT pgbroker.view_definition('example.com/MyThing')"))
	d.Exec(t, get[string](t, d, `SELECT pgbroker.view_definition('example.com/MyThing', view_name => 'pgbroker."My things"')`))
	if got := get[int64](t, d, `SELECT count(*) FROM pgbroker."My things"`); got != 1 {
		t.Errorf("%d things", got)
	}
	if got := get[string](t, d, "SELECT concat_ws(' ', id, size + 1, NOT ok, name, jsonb_typeof(list)) FROM my_thing"); got != "1 2.5 f n array" {
		t.Error(got)
	}
	for sql, want := range map[string]string{
		"SELECT pgbroker.view_definition('type.googleapis.com/nope')": "the message 'nope' is not known",
		"SELECT pgbroker.view_definition('none')":                     "there is no record of type 'none' to learn the fields from",
	} {
		if got := refused(t, d, sql); !strings.HasPrefix(got, want) {
			t.Errorf("%s: got %q, want %q", sql, got, want)
		}
	}
}
