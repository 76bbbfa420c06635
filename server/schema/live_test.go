package schema_test

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/structpb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server"
	"pgbroker/server/schema"
	"pgbroker/server/servertest"
)

const secret = "s3cr3t"

// Records of a type that is added while replicas run gain everything that those of the product have, on all of them,
// and lose it when it is removed. None of that is a change of the records.
func TestATypeIsAddedLive(t *testing.T) {
	t.Parallel()
	b := broker(t, 2)
	d := b.Database
	for i, r := range b.Replicas { // both know by now what there is, and not this
		put(t, r, "other", string(rune('x'+i)), badge(t, ""))
	}
	written := put(t, b.Replicas[0], badgeType, "1", badge(t, `id: "1" owner_name: "Jane" pin: "`+secret+`" color: RED`))
	if got := get[*string](t, d, "SELECT data::text FROM pgbroker.records WHERE id = '1'"); got != nil {
		t.Fatalf("data of an unknown type: %s", *got)
	}
	latest := get[int64](t, d, "SELECT latest_version FROM pgbroker.versions")

	add(t, d, set(t, "acme", badgeFile))
	await(t, d, "SELECT count(data) = 1 FROM pgbroker.records WHERE id = '1'")
	if got, want := get[string](t, d, "SELECT data::text FROM pgbroker.records WHERE id = '1'"),
		`{"id": "1", "color": "RED", "owner_name": "Jane"}`; got != want {
		t.Errorf("data %s, want %s", got, want)
	}
	if got := get[int64](t, d, "SELECT latest_version FROM pgbroker.versions"); got != latest {
		t.Errorf("the latest version went from %d to %d", latest, got)
	}
	if got := get[int64](t, d, "SELECT version FROM pgbroker.records WHERE id = '1'"); uint64(got) != written.Version {
		t.Errorf("version %d, want %d", got, written.Version)
	}
	for i, r := range b.Replicas {
		filtered := query(t, r, map[string]any{"owner_name": "Jane"}, "")
		searched := query(t, r, nil, "jAne")
		if filtered != 1 || searched != 1 {
			t.Errorf("replica %d: %d by filter, %d by text", i, filtered, searched)
		}
		if n := query(t, r, nil, secret); n != 0 {
			t.Errorf("replica %d finds the secret", i)
		}
		awaitKnown(t, r)
		id := string(rune('a' + i))
		put(t, r, badgeType, id, badge(t, `owner_name: "Joe"`))
		if got := get[string](t, d, "SELECT data ->> 'owner_name' FROM pgbroker.records WHERE id = $1", id); got != "Joe" {
			t.Errorf("replica %d projects %q", i, got)
		}
	}

	if err := schema.Remove(t.Context(), d.Pool, "acme"); err != nil {
		t.Fatal(err)
	}
	await(t, d, "SELECT count(*) = 5 AND count(data) = 0 AND count(nullif(t.search_text, '')) = 0 FROM pgbroker.records r LEFT JOIN pgbroker.search_texts t USING (type, id)")
	await(t, d, "SELECT count(*) = 0 FROM pgbroker.reprojections")
	await(t, d, "SELECT swept FROM pgbroker.schema_state")
}

// awaitKnown waits until a replica knows acme.Badge: then it patches records of it.
func awaitKnown(t *testing.T, r *servertest.Replica) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; {
		_, err := r.Patch(t.Context(), &databroker.PatchRequest{
			Records:   []*databroker.Record{{Type: badgeType, Id: "1", Data: badge(t, `owner_name: "Jane"`)}},
			FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"owner_name"}},
		})
		if err == nil {
			return
		}
		if !strings.Contains(err.Error(), "unknown type") || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func query(t *testing.T, r *servertest.Replica, filter map[string]any, text string) int64 {
	t.Helper()
	request := &databroker.QueryRequest{Type: badgeType, Query: text, Limit: 10}
	if filter != nil {
		var err error
		if request.Filter, err = structpb.NewStruct(filter); err != nil {
			t.Fatal(err)
		}
	}
	response, err := r.Query(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	return response.TotalCount
}

// A rule of redaction takes a field out of everything that can be read, of records that are there and of those that
// come; taking it back shows the field again. The payload is not touched.
func TestARedactionRuleTakesEffectEverywhere(t *testing.T) {
	t.Parallel()
	b := broker(t, 2)
	d := b.Database
	payload := pack(t, &session.Session{
		Id: "s", UserId: "u", Claims: map[string]*structpb.ListValue{"ssn": {Values: []*structpb.Value{structpb.NewStringValue(secret)}}},
	})
	put(t, b.Replica, sessionType, "s", payload)
	before := get[[]byte](t, d, "SELECT payload FROM pgbroker.records")
	latest := get[int64](t, d, "SELECT latest_version FROM pgbroker.versions")
	hidden := "SELECT (to_jsonb(r) - 'payload')::text NOT LIKE '%" + secret + "%' FROM pgbroker.records r"
	if get[bool](t, d, hidden) {
		t.Fatal("the claim is not shown at first")
	}

	d.Exec(t, "INSERT INTO pgbroker.redacted_fields (message, field) VALUES ('session.Session', 'claims')")
	await(t, d, hidden)
	if got := get[int64](t, d, "SELECT latest_version FROM pgbroker.versions"); got != latest {
		t.Errorf("the latest version went from %d to %d", latest, got)
	}
	if got := get[[]byte](t, d, "SELECT payload FROM pgbroker.records"); string(got) != string(before) {
		t.Errorf("the payload is % x and was % x", got, before)
	}
	// In SQL, what a rule hides can be written, and is not shown.
	d.Exec(t, `UPDATE pgbroker.records SET data = data || '{"claims": {"ssn": ["new `+secret+`"]}}'`)
	if !get[bool](t, d, hidden) {
		t.Error("shown after an UPDATE")
	}
	if got := get[[]byte](t, d, "SELECT payload FROM pgbroker.records"); !strings.Contains(string(got), "new "+secret) {
		t.Error("what a rule hides was not written")
	}

	d.Exec(t, "DELETE FROM pgbroker.redacted_fields")
	await(t, d, "SELECT NOT hidden FROM ("+hidden+") AS h (hidden)")

	for sql, want := range map[string]string{
		"INSERT INTO pgbroker.redacted_fields (message, field) VALUES ('session.Session', 'nope')":       "there is no field 'nope' in message 'session.Session'",
		"INSERT INTO pgbroker.redacted_fields (message, field) VALUES ('nope', 'x')":                     "there is no field 'x' in message 'nope'",
		"INSERT INTO pgbroker.redacted_fields (message, field) VALUES ('session.Session', 'user_id')":    "records of type '" + sessionType + "' are indexed or expire by it",
		"INSERT INTO pgbroker.redacted_fields (message, field) VALUES ('session.Session', 'expires_at')": "records of type '" + sessionType + "' are indexed or expire by it",
	} {
		if got := refused(t, d, sql); !strings.Contains(got, want) {
			t.Errorf("%s: got %q, want %q", sql, got, want)
		}
	}
}

// A replica that was late has written by the rules of before, after the records were gone through: that is corrected, too.
func TestALateReplicaIsCorrected(t *testing.T) {
	t.Parallel()
	b := broker(t, 1)
	d := b.Database
	put(t, b.Replica, sessionType, "s", pack(t, &session.Session{Id: "s", IdpId: "idp"}))
	if err := b.Replica.Stop(); err != nil {
		t.Fatal(err)
	}
	d.Exec(t, "INSERT INTO pgbroker.redacted_fields (message, field) VALUES ('session.Session', 'claims')")
	d.Exec(t, "DELETE FROM pgbroker.reprojections")
	// What is read of the payload does not matter here, as long as it is not what is stored.
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, payload, data)
		SELECT type, 'late', payload, data || '{"claims": {"ssn": ["`+secret+`"]}}' FROM pgbroker.records`)
	d.Exec(t, "UPDATE pgbroker.search_texts SET search_text = '"+secret+"' WHERE id = 'late'")
	again := servertest.Start(t, d.ServerConnString, servertest.Options{Configure: func(c *server.Config) { c.ProjectionGrace = time.Millisecond }})
	await(t, d, "SELECT swept FROM pgbroker.schema_state")
	if got := get[string](t, d, "SELECT (to_jsonb(r) - 'payload')::text || (SELECT t.search_text FROM pgbroker.search_texts t WHERE id = 'late') FROM pgbroker.records r WHERE id = 'late'"); strings.Contains(got, secret) {
		t.Errorf("still there: %s", got)
	}
	if err := again.Stop(); err != nil {
		t.Fatal(err)
	}
}

// Projecting again goes on where it has stopped, and begins anew when there is another change.
func TestReprojectionGoesOn(t *testing.T) {
	t.Parallel()
	b := broker(t, 1)
	d := b.Database
	for _, id := range []string{"a", "b", "c"} {
		put(t, b.Replica, badgeType, id, badge(t, `owner_name: "Jane"`))
	}
	if err := b.Replica.Stop(); err != nil {
		t.Fatal(err)
	}
	add(t, d, set(t, "acme", badgeFile))
	if got := columns(t, d, "SELECT type FROM pgbroker.reprojections"); len(got) != 1 || got[0] != badgeType {
		t.Fatalf("to be projected: %q", got)
	}
	d.Exec(t, "UPDATE pgbroker.reprojections SET next_id = 'b'")
	again := servertest.Start(t, d.ServerConnString, servertest.Options{})
	await(t, d, "SELECT count(*) = 0 FROM pgbroker.reprojections")
	if got := columns(t, d, "SELECT id FROM pgbroker.records WHERE data IS NOT NULL ORDER BY id"); strings.Join(got, "") != "bc" {
		t.Errorf("projected: %q, want b and c", got)
	}
	if err := again.Stop(); err != nil {
		t.Fatal(err)
	}
	d.Exec(t, "INSERT INTO pgbroker.redacted_fields (message, field) VALUES ('acme.Badge', 'doors')")
	if got := get[string](t, d, "SELECT next_id FROM pgbroker.reprojections"); got != "" {
		t.Errorf("begins at %q, want the beginning", got)
	}
}

// A set that the program can no longer use does not keep a replica from working with the others.
func TestAStoredSetThatNoLongerFitsIsLeftOut(t *testing.T) {
	t.Parallel()
	b := broker(t, 1)
	broken := set(t, "broken", `name: "x.proto" package: "session" syntax: "proto3" message_type { name: "Session" }`)
	b.Database.Exec(t, "INSERT INTO pgbroker.schemas (name, descriptor_set) VALUES ('broken', $1)", broken.Descriptors)
	add(t, b.Database, set(t, "acme", badgeFile))
	put(t, b.Replica, badgeType, "1", badge(t, `owner_name: "Jane"`))
	await(t, b.Database, "SELECT count(data) = 1 FROM pgbroker.records")
	if err := schema.Remove(t.Context(), b.Database.Pool, "broken"); err != nil {
		t.Error(err)
	}
}
