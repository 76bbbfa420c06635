package conformance_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/proto/user"
)

func patch(t *testing.T, c client, mask []string, records ...*databroker.Record) []*databroker.Record {
	t.Helper()
	response, err := tryPatch(t, c, mask, records...)
	if err != nil {
		t.Fatalf("patch: %v", err)
	}
	return response.Records
}

func tryPatch(t *testing.T, c client, mask []string, records ...*databroker.Record) (*databroker.PatchResponse, error) {
	t.Helper()
	return c.Patch(testContext(t), &databroker.PatchRequest{Records: records, FieldMask: &fieldmaskpb.FieldMask{Paths: mask}})
}

// TestS10_PatchOfAMissingRecordIsSkipped: it is no error, and the answer does not have it.
func TestS10_PatchOfAMissingRecordIsSkipped(t *testing.T) {
	t.Parallel()
	b := start(t)
	from := position(t, b)
	put(t, b, newRecord(sessionType, "gone", new(session.Session)), deletion(sessionType, "gone"))
	missing := newRecord(sessionType, "missing", &session.Session{UserId: "u"})
	gone := newRecord(sessionType, "gone", &session.Session{UserId: "u"})

	response, err := tryPatch(t, b, []string{"user_id"}, missing, gone)
	if err != nil || len(response.Records) != 0 || response.ServerVersion != from.ServerVersion {
		t.Errorf("got %v, %v", response, err)
	}
	// Nor is anything else about it an error: the mask is looked at for records that exist.
	if records := patch(t, b, []string{"no_such_field"}, missing); len(records) != 0 {
		t.Errorf("got %v", records)
	}
	put(t, b, newRecord(sessionType, "a", &session.Session{Id: "a"}), newRecord(sessionType, "b", &session.Session{Id: "b"}))
	patched := patch(t, b, []string{"user_id"},
		newRecord(sessionType, "b", &session.Session{UserId: "bb"}), missing, newRecord(sessionType, "a", &session.Session{UserId: "aa"}))
	same(t, "patched, in the order of the request", idsOf(patched), []string{"b", "a"})
	wantAbsent(t, b, sessionType, "missing")

	response, err = tryPatch(t, b, nil)
	if err != nil || len(response.Records) != 0 || response.ServerVersion != from.ServerVersion {
		t.Errorf("patch of nothing: %v, %v", response, err)
	}
}

// TestS10_PatchWithDeletedAtDeletes: the record is gone and streams get a tombstone; and without a mask no
// payload is needed. This is how SSH sessions are revoked.
func TestS10_PatchWithDeletedAtDeletes(t *testing.T) {
	t.Parallel()
	b := start(t)
	unknown := &databroker.Record{Type: "example.com/New", Id: "n", Data: &anypb.Any{TypeUrl: "example.com/new.Message", Value: []byte{0xff}}}
	for _, test := range []struct {
		name   string
		stored *databroker.Record
		patch  *databroker.Record
		mask   []string
	}{
		{"no payload, no mask", newRecord(bindingType, "k", &session.SessionBinding{SessionId: "s"}), deletion(bindingType, "k"), nil},
		{"empty payload, no mask", newRecord(bindingType, "k", &session.SessionBinding{SessionId: "s"}),
			&databroker.Record{Type: bindingType, Id: "k", Data: newAny(new(session.SessionBinding)), DeletedAt: timestamppb.Now()}, nil},
		{"with a mask", newRecord(bindingType, "k", &session.SessionBinding{SessionId: "s"}),
			&databroker.Record{Type: bindingType, Id: "k", Data: newAny(new(session.SessionBinding)), DeletedAt: timestamppb.Now()}, []string{"user_id"}},
		{"unknown type", unknown, deletion(unknown.Type, unknown.Id), nil},
		{"record without payload", &databroker.Record{Type: thingType, Id: "p"}, deletion(thingType, "p"), nil},
	} {
		stored := putOne(t, b, test.stored)
		stream := followNow(t, b, "")
		patched := patch(t, b, test.mask, test.patch)
		if len(patched) != 1 || patched[0].Version <= stored.Version || patched[0].DeletedAt == nil {
			t.Errorf("%s: answer %v", test.name, patched)
		}
		wantAbsent(t, b, test.stored.Type, test.stored.Id)
		tombstone := stream.change()
		if tombstone.Id != test.stored.Id || tombstone.DeletedAt == nil || tombstone.Version <= stored.Version {
			t.Errorf("%s: the stream got %v", test.name, tombstone)
		}
		stream.close()
		if again := patch(t, b, test.mask, test.patch); len(again) != 0 {
			t.Errorf("%s: deleted a second time: %v", test.name, again)
		}
	}
}

// TestPatchFieldMasks: what a mask does to a field, whoever has it.
func TestPatchFieldMasks(t *testing.T) {
	t.Parallel()
	b := start(t)
	at := func(seconds int64) *timestamppb.Timestamp { return &timestamppb.Timestamp{Seconds: seconds} }
	claims := func(values ...string) map[string]*structpb.ListValue {
		m := make(map[string]*structpb.ListValue)
		for _, v := range values {
			m[v] = &structpb.ListValue{Values: []*structpb.Value{structpb.NewStringValue(v)}}
		}
		return m
	}
	for _, test := range []struct {
		name             string
		mask             []string
		stored, got, end *session.Session
	}{
		{"scalar", []string{"user_id"},
			&session.Session{UserId: "a", IdpId: "i"}, &session.Session{UserId: "b", IdpId: "j"}, &session.Session{UserId: "b", IdpId: "i"}},
		{"scalar that the patch does not have is cleared", []string{"user_id"},
			&session.Session{UserId: "a", IdpId: "i"}, new(session.Session), &session.Session{IdpId: "i"}},
		{"optional scalar", []string{"impersonate_session_id"},
			new(session.Session), &session.Session{ImpersonateSessionId: proto.String("")}, &session.Session{ImpersonateSessionId: proto.String("")}},
		{"bool", []string{"refresh_disabled"},
			&session.Session{RefreshDisabled: true, Id: "s"}, new(session.Session), &session.Session{Id: "s"}},
		{"message is replaced, not merged", []string{"oauth_token"},
			&session.Session{OauthToken: &session.OAuthToken{AccessToken: "a", TokenType: "t"}},
			&session.Session{OauthToken: &session.OAuthToken{AccessToken: "b"}},
			&session.Session{OauthToken: &session.OAuthToken{AccessToken: "b"}}},
		{"message is cleared", []string{"oauth_token"},
			&session.Session{Id: "s", OauthToken: &session.OAuthToken{AccessToken: "a"}}, new(session.Session), &session.Session{Id: "s"}},
		{"list is replaced, not appended to", []string{"audience"},
			&session.Session{Audience: []string{"a", "b"}}, &session.Session{Audience: []string{"c"}}, &session.Session{Audience: []string{"c"}}},
		{"list is cleared", []string{"audience"},
			&session.Session{Audience: []string{"a", "b"}, Id: "s"}, new(session.Session), &session.Session{Id: "s"}},
		{"map is replaced, not merged", []string{"claims"},
			&session.Session{Claims: claims("a", "b")}, &session.Session{Claims: claims("c")}, &session.Session{Claims: claims("c")}},
		{"sub-field", []string{"oauth_token.access_token"},
			&session.Session{OauthToken: &session.OAuthToken{AccessToken: "a", TokenType: "t"}},
			&session.Session{OauthToken: &session.OAuthToken{AccessToken: "b", TokenType: "u"}},
			&session.Session{OauthToken: &session.OAuthToken{AccessToken: "b", TokenType: "t"}}},
		{"sub-field without a parent in the record", []string{"oauth_token.access_token"},
			&session.Session{Id: "s"},
			&session.Session{OauthToken: &session.OAuthToken{AccessToken: "b", TokenType: "u"}},
			&session.Session{Id: "s", OauthToken: &session.OAuthToken{AccessToken: "b"}}},
		{"sub-field without a parent in the patch", []string{"oauth_token.access_token"},
			&session.Session{OauthToken: &session.OAuthToken{AccessToken: "a", TokenType: "t"}}, new(session.Session),
			&session.Session{OauthToken: &session.OAuthToken{TokenType: "t"}}},
		{"sub-field without a parent anywhere", []string{"oauth_token.access_token"},
			&session.Session{Id: "s"}, new(session.Session), &session.Session{Id: "s"}},
		{"time inside a message", []string{"id_token.expires_at"},
			&session.Session{IdToken: &session.IDToken{Subject: "x", ExpiresAt: at(1)}}, &session.Session{IdToken: &session.IDToken{ExpiresAt: at(2)}},
			&session.Session{IdToken: &session.IDToken{Subject: "x", ExpiresAt: at(2)}}},
		{"the shorter of two paths wins", []string{"oauth_token.access_token", "oauth_token"},
			&session.Session{OauthToken: &session.OAuthToken{AccessToken: "a", TokenType: "t"}},
			&session.Session{OauthToken: &session.OAuthToken{AccessToken: "b"}},
			&session.Session{OauthToken: &session.OAuthToken{AccessToken: "b"}}},
		{"the same path twice", []string{"user_id", "user_id"},
			new(session.Session), &session.Session{UserId: "b"}, &session.Session{UserId: "b"}},
		{"after a refresh at the identity provider", []string{"oauth_token", "id_token", "claims"},
			&session.Session{Id: "s", UserId: "u", AccessedAt: at(9), OauthToken: &session.OAuthToken{AccessToken: "a"}, IdToken: &session.IDToken{Raw: "a"}, Claims: claims("a")},
			&session.Session{Id: "other", OauthToken: &session.OAuthToken{AccessToken: "b"}, IdToken: &session.IDToken{Raw: "b"}, Claims: claims("b")},
			&session.Session{Id: "s", UserId: "u", AccessedAt: at(9), OauthToken: &session.OAuthToken{AccessToken: "b"}, IdToken: &session.IDToken{Raw: "b"}, Claims: claims("b")}},
		{"access tracking", []string{"accessed_at"},
			&session.Session{Id: "s", AccessedAt: at(1)}, &session.Session{AccessedAt: at(2)}, &session.Session{Id: "s", AccessedAt: at(2)}},
		{"device credentials", []string{"device_credentials"},
			&session.Session{Id: "s", DeviceCredentials: []*session.Session_DeviceCredential{{TypeId: "t", Credential: &session.Session_DeviceCredential_Unavailable{Unavailable: new(emptypb.Empty)}}}},
			&session.Session{DeviceCredentials: []*session.Session_DeviceCredential{{TypeId: "t", Credential: &session.Session_DeviceCredential_Id{Id: "c"}}}},
			&session.Session{Id: "s", DeviceCredentials: []*session.Session_DeviceCredential{{TypeId: "t", Credential: &session.Session_DeviceCredential_Id{Id: "c"}}}}},
		{"no mask", nil,
			&session.Session{Id: "s", UserId: "a"}, &session.Session{UserId: "b"}, &session.Session{Id: "s", UserId: "a"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			put(t, b, newRecord(sessionType, "s", test.stored))
			patched := patch(t, b, test.mask, newRecord(sessionType, "s", test.got))
			if len(patched) != 1 {
				t.Fatalf("%d records in the answer", len(patched))
			}
			same(t, "answer", payload[*session.Session](t, patched[0]), test.end)
			same(t, "stored", get(t, b, sessionType, "s"), patched[0])
		})
	}
}

// TestPatchWithoutMaskIsAWrite: nothing changes in the payload, yet the record is as if written again.
func TestPatchWithoutMaskIsAWrite(t *testing.T) {
	t.Parallel()
	b := start(t)
	stored := putOne(t, b, newRecord(sessionType, "s", &session.Session{Id: "s"}))
	stream := followNow(t, b, sessionType)
	for _, mask := range []*fieldmaskpb.FieldMask{nil, {}} {
		response, err := b.Patch(testContext(t), &databroker.PatchRequest{
			Records: []*databroker.Record{newRecord(sessionType, "s", &session.Session{Id: "x"})}, FieldMask: mask,
		})
		if err != nil || len(response.Records) != 1 {
			t.Fatalf("got %v, %v", response, err)
		}
		patched := response.Records[0]
		if patched.Version <= stored.Version || patched.ModifiedAt.AsTime().Before(stored.ModifiedAt.AsTime()) {
			t.Errorf("version %d and time %v, before %d and %v", patched.Version, patched.ModifiedAt, stored.Version, stored.ModifiedAt)
		}
		same(t, "payload", patched.Data, stored.Data)
		same(t, "change", stream.change(), patched)
		stored = patched
	}
}

// TestPatchOfOneKeySeveralTimes: each sees what the one before has left.
func TestPatchOfOneKeySeveralTimes(t *testing.T) {
	t.Parallel()
	b := start(t)
	stored := putOne(t, b, newRecord(sessionType, "s", &session.Session{Id: "s", UserId: "a", IdpId: "i"}))
	patched := patch(t, b, []string{"user_id"},
		newRecord(sessionType, "s", &session.Session{UserId: "b"}), newRecord(sessionType, "s", &session.Session{UserId: "c"}))
	if len(patched) != 2 {
		t.Fatalf("%d records in the answer", len(patched))
	}
	for i, want := range []string{"b", "c"} {
		if got := payload[*session.Session](t, patched[i]).UserId; got != want || patched[i].Version <= stored.Version {
			t.Errorf("answer %d: user %q, want %q; version %d, before %d", i, got, want, patched[i].Version, stored.Version)
		}
	}
	same(t, "stored", get(t, b, sessionType, "s"), patched[1])

	again := newRecord(sessionType, "s", &session.Session{UserId: "d"})
	if patched := patch(t, b, nil, deletion(sessionType, "s"), again); len(patched) != 1 || patched[0].DeletedAt == nil {
		t.Errorf("deleted and then patched: %v", patched)
	}
	wantAbsent(t, b, sessionType, "s")
}

// TestPatchErrors: what cannot be patched says why, and nothing is written.
func TestPatchErrors(t *testing.T) {
	t.Parallel()
	b := start(t)
	const prefix = "records[0]: invalid patch: "
	from := put(t, b,
		newRecord(sessionType, "s", &session.Session{Id: "s", UserId: "u"}),
		&databroker.Record{Type: sessionType, Id: "none"},
		&databroker.Record{Type: sessionType, Id: "unknown", Data: &anypb.Any{TypeUrl: "type.googleapis.com/example.New"}},
		&databroker.Record{Type: sessionType, Id: "broken", Data: &anypb.Any{TypeUrl: sessionType, Value: []byte{0xff}}})
	good := new(session.Session)
	for _, test := range []struct {
		name    string
		record  *databroker.Record
		mask    string
		message string
	}{
		{"unknown field", newRecord(sessionType, "s", good), "x", `cannot overwrite unknown field "x" in message session.Session`},
		{"camel case", newRecord(sessionType, "s", good), "userId", `cannot overwrite unknown field "userId" in message session.Session`},
		{"star", newRecord(sessionType, "s", good), "*", `cannot overwrite unknown field "*" in message session.Session`},
		{"empty path", newRecord(sessionType, "s", good), "", `cannot overwrite unknown field "" in message session.Session`},
		{"empty element", newRecord(sessionType, "s", good), "oauth_token..x", `cannot overwrite unknown field "" in message session.OAuthToken`},
		{"unknown sub-field", newRecord(sessionType, "s", &session.Session{OauthToken: new(session.OAuthToken)}), "oauth_token.x", `cannot overwrite unknown field "x" in message session.OAuthToken`},
		{"below a map", newRecord(sessionType, "s", good), "claims.x", `cannot overwrite sub-fields of field "claims" in message session.Session`},
		{"below a list", newRecord(sessionType, "s", good), "device_credentials.type_id", `cannot overwrite sub-fields of field "device_credentials" in message session.Session`},
		{"below a scalar", newRecord(sessionType, "s", good), "user_id.x", `cannot overwrite sub-fields of field "user_id" in message session.Session`},
		{"other type", newRecord(sessionType, "s", new(user.User)), "id", "descriptor mismatch: session.Session, user.User"},
		{"no payload", &databroker.Record{Type: sessionType, Id: "s"}, "id", "could not unmarshal new record data: there is none"},
		{"payload of unknown type", &databroker.Record{Type: sessionType, Id: "s", Data: &anypb.Any{TypeUrl: "x/example.New"}}, "id", `could not unmarshal new record data: unknown type "x/example.New"`},
		{"undecodable payload", &databroker.Record{Type: sessionType, Id: "s", Data: &anypb.Any{TypeUrl: sessionType, Value: []byte{0xff}}}, "id", "could not unmarshal new record data: not a valid message of its type (session.Session)"},
		{"record without payload", newRecord(sessionType, "none", good), "id", "could not unmarshal existing record data: there is none"},
		{"record of unknown type", newRecord(sessionType, "unknown", good), "id", `could not unmarshal existing record data: unknown type "type.googleapis.com/example.New"`},
		{"undecodable record", newRecord(sessionType, "broken", good), "id", "could not unmarshal existing record data: not a valid message of its type (session.Session)"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := tryPatch(t, b, []string{test.mask}, test.record)
			wantStatus(t, err, codes.InvalidArgument, prefix+test.message)
		})
	}
	for _, stored := range from {
		same(t, "record after patches that failed", get(t, b, stored.Type, stored.Id), stored)
	}
}

// TestD4_PatchIsAllOrNothing: when one record cannot be patched, whether it is the server that refuses or the
// database, none is.
func TestD4_PatchIsAllOrNothing(t *testing.T) {
	t.Parallel()
	b := start(t)
	stored := put(t, b,
		newRecord(sessionType, "a", &session.Session{Id: "a"}),
		newRecord(sessionType, "poison", &session.Session{Id: "poison"}),
		newRecord(userType, "u", &user.User{Id: "u"}),
		newRecord(sessionType, "b", &session.Session{Id: "b"}))
	poison(t, b)
	before := position(t, b)
	change := &session.Session{UserId: "changed"}

	_, err := tryPatch(t, b, []string{"user_id"}, newRecord(sessionType, "a", change), newRecord(userType, "u", new(user.User)), newRecord(sessionType, "b", change))
	wantStatus(t, err, codes.InvalidArgument, `records[1]: invalid patch: cannot overwrite unknown field "user_id" in message user.User`)
	_, err = tryPatch(t, b, []string{"user_id"}, newRecord(sessionType, "a", change), newRecord(sessionType, "poison", change), newRecord(sessionType, "b", change))
	wantStatus(t, err, codes.Internal, "internal error")

	for _, record := range stored {
		same(t, "record after patches that failed", get(t, b, record.Type, record.Id), record)
	}
	if changes, _ := syncNow(t, b, before, ""); len(changes) > 0 {
		t.Errorf("changes of patches that failed: %v", idsOf(changes))
	}
}

// TestS9_ConcurrentPatchesLoseNothing: writers patch different fields of one record through different
// replicas, and none ever undoes another's.
func TestS9_ConcurrentPatchesLoseNothing(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	put(t, b, newRecord(sessionType, "s", &session.Session{Id: "s"}))

	const rounds = 25
	// Each writer owns a field, some of them in one sub-message.
	writers := []struct {
		path string
		set  func(*session.Session, string)
		get  func(*session.Session) string
	}{
		{"user_id", func(s *session.Session, v string) { s.UserId = v }, (*session.Session).GetUserId},
		{"idp_id", func(s *session.Session, v string) { s.IdpId = v }, (*session.Session).GetIdpId},
		{"audience", func(s *session.Session, v string) { s.Audience = []string{v} },
			func(s *session.Session) string { return fmt.Sprint(s.Audience) }},
		{"oauth_token.access_token", func(s *session.Session, v string) { s.OauthToken = &session.OAuthToken{AccessToken: v} },
			func(s *session.Session) string { return s.GetOauthToken().GetAccessToken() }},
		{"oauth_token.refresh_token", func(s *session.Session, v string) { s.OauthToken = &session.OAuthToken{RefreshToken: v} },
			func(s *session.Session) string { return s.GetOauthToken().GetRefreshToken() }},
		{"id_token.raw", func(s *session.Session, v string) { s.IdToken = &session.IDToken{Raw: v} },
			func(s *session.Session) string { return s.GetIdToken().GetRaw() }},
	}
	var group sync.WaitGroup
	for i, w := range writers {
		group.Go(func() {
			for round := range rounds {
				change := new(session.Session)
				w.set(change, fmt.Sprint(round))
				response, err := b.Replicas[(i+round)%2].Patch(t.Context(), &databroker.PatchRequest{
					Records:   []*databroker.Record{newRecord(sessionType, "s", change)},
					FieldMask: &fieldmaskpb.FieldMask{Paths: []string{w.path}},
				})
				if err != nil || len(response.Records) != 1 {
					t.Errorf("patch of %s: %v, %v", w.path, response, err)
					return
				}
				// Nobody else writes this field: whatever is read now has our value.
				got := new(session.Session)
				if err := response.Records[0].Data.UnmarshalTo(got); err != nil || w.get(got) != w.get(change) {
					t.Errorf("the answer to the patch of %s has %q, want %q (%v)", w.path, w.get(got), w.get(change), err)
				}
				stored, err := b.Replicas[round%2].Get(t.Context(), &databroker.GetRequest{Type: sessionType, Id: "s"})
				if err != nil {
					t.Errorf("get: %v", err)
					return
				}
				if err := stored.Record.Data.UnmarshalTo(got); err != nil || w.get(got) != w.get(change) {
					t.Errorf("%s is %q, want %q: somebody has undone the patch (%v)", w.path, w.get(got), w.get(change), err)
				}
			}
		})
	}
	group.Wait()
	final := payload[*session.Session](t, get(t, b, sessionType, "s"))
	want := &session.Session{Id: "s"}
	last := fmt.Sprint(rounds - 1)
	want.UserId, want.IdpId, want.Audience = last, last, []string{last}
	want.OauthToken = &session.OAuthToken{AccessToken: last, RefreshToken: last}
	want.IdToken = &session.IDToken{Raw: last}
	same(t, "the record in the end", final, want)
}

// TestPatchEnforcesCapacity: a patch makes its record the most recently written one.
func TestPatchEnforcesCapacity(t *testing.T) {
	t.Parallel()
	b := start(t)
	records := make([]*databroker.Record, 4)
	for i := range records {
		records[i] = newRecord(sessionType, fmt.Sprint(i), &session.Session{Id: fmt.Sprint(i), ExpiresAt: timestamppb.New(time.Now().Add(time.Hour))})
		put(t, b, records[i])
	}
	setOptions(t, b, sessionType, &databroker.Options{Capacity: proto.Uint64(2)})
	stream := followNow(t, b, sessionType)
	patch(t, b, nil, records[0])
	same(t, "records", idsOf(query(t, b, sessionType, "").Records), []string{"0", "3"})
	state := recordsByKey(records)
	fold(state, stream.changes(3)...)
	if len(state) != 2 {
		t.Errorf("a copy kept by the stream has %d records, want 2", len(state))
	}
}
