package projection

import (
	"bytes"
	"encoding/json"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"pgbroker/proto/device"
	"pgbroker/proto/events"
	"pgbroker/proto/session"
	"pgbroker/proto/user"
)

func list(values ...any) *structpb.ListValue {
	l, err := structpb.NewList(values)
	if err != nil {
		panic(err)
	}
	return l
}

func serialize(t testing.TB, m proto.Message) []byte {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// testSession is a session as sign-in writes it, about 1.4 kB with its ten claims.
func testSession() *session.Session {
	at := timestamppb.New(time.Date(2026, 8, 1, 12, 30, 15, 123456789, time.UTC))
	return &session.Session{
		Id:         "0e1f3b4c-9f2e-4b51-8a36-4b1d0c9f5c11",
		UserId:     "auth0|5f7c8ec7c33c6c004bbafe82",
		ExpiresAt:  at,
		IssuedAt:   at,
		AccessedAt: at,
		IdToken: &session.IDToken{
			Issuer: "https://idp.example.com", Subject: "5f7c8ec7c33c6c004bbafe82", ExpiresAt: at, IssuedAt: at,
			Raw: string(bytes.Repeat([]byte("eyJh"), 150)),
		},
		OauthToken: &session.OAuthToken{
			AccessToken: string(bytes.Repeat([]byte("at"), 40)), TokenType: "Bearer", ExpiresAt: at,
			RefreshToken: string(bytes.Repeat([]byte("rt"), 30)),
		},
		Claims: map[string]*structpb.ListValue{
			"aud": list("https://app.example.com"), "email": list("Ann.Example@example.com"), "email_verified": list(true),
			"exp": list(1.7e9), "groups": list("admins", "engineering"), "iat": list(1.7e9), "name": list("Ann Example"),
			"nonce": list("abcdef"), "picture": list("https://idp.example.com/p/ann.png"), "sub": list("5f7c8ec7c33c6c004bbafe82"),
		},
		Audience: []string{"app.example.com"},
		IdpId:    "9kzsR2f5",
		DeviceCredentials: []*session.Session_DeviceCredential{
			{TypeId: "any", Credential: &session.Session_DeviceCredential_Id{Id: "abc"}},
		},
	}
}

func TestSession(t *testing.T) {
	got := New(nil).Project(serialize(t, testSession()))
	const data = `{
		"id": "0e1f3b4c-9f2e-4b51-8a36-4b1d0c9f5c11",
		"user_id": "auth0|5f7c8ec7c33c6c004bbafe82",
		"expires_at": "2026-08-01T12:30:15.123456789Z",
		"id_token": {
			"issuer": "https://idp.example.com",
			"subject": "5f7c8ec7c33c6c004bbafe82",
			"expires_at": "2026-08-01T12:30:15.123456789Z",
			"issued_at": "2026-08-01T12:30:15.123456789Z"
		},
		"oauth_token": {"token_type": "Bearer", "expires_at": "2026-08-01T12:30:15.123456789Z"},
		"claims": {
			"aud": ["https://app.example.com"],
			"email": ["Ann.Example@example.com"],
			"email_verified": [true],
			"exp": [1700000000],
			"groups": ["admins", "engineering"],
			"iat": [1700000000],
			"name": ["Ann Example"],
			"nonce": ["abcdef"],
			"picture": ["https://idp.example.com/p/ann.png"],
			"sub": ["5f7c8ec7c33c6c004bbafe82"]
		},
		"audience": ["app.example.com"],
		"issued_at": "2026-08-01T12:30:15.123456789Z",
		"device_credentials": [{"type_id": "any", "id": "abc"}],
		"accessed_at": "2026-08-01T12:30:15.123456789Z",
		"idp_id": "9kzsR2f5"
	}`
	var want bytes.Buffer
	if err := json.Compact(&want, []byte(data)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want.String(), string(got.Data)); diff != "" {
		t.Errorf("Data (-want +got):\n%s", diff)
	}
	search := []string{
		"0e1f3b4c-9f2e-4b51-8a36-4b1d0c9f5c11", "auth0|5f7c8ec7c33c6c004bbafe82", "https://idp.example.com",
		"bearer", "https://app.example.com", "ann.example@example.com", "admins", "engineering",
		"ann example", "abcdef", "https://idp.example.com/p/ann.png", "any", "9kzsr2f5",
	}
	if diff := cmp.Diff(search, strings.Split(got.SearchText, "\x1f")); diff != "" {
		t.Errorf("SearchText (-want +got):\n%s", diff)
	}
	if got.IndexCIDR != "" {
		t.Errorf("IndexCIDR = %q, want none", got.IndexCIDR)
	}
}

func parseStruct(t testing.TB, js string) *structpb.Struct {
	t.Helper()
	s := new(structpb.Struct)
	if err := protojson.Unmarshal([]byte(js), s); err != nil {
		t.Fatal(err)
	}
	return s
}

func nestedAny(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestProject(t *testing.T) {
	text := "Text"
	number := func(f float64) *structpb.Value { return structpb.NewNumberValue(f) }
	for _, c := range []struct {
		name   string
		m      proto.Message
		data   string
		search string
	}{
		{"empty message", &session.Session{}, `{}`, ""},
		{"default values are absent", &session.Session{Id: "", RefreshDisabled: false}, `{}`, ""},
		{"optional values are not", &session.Session{ImpersonateSessionId: new(string)}, `{"impersonate_session_id":""}`, ""},
		{"enum by name", &session.SessionBindingRequest{State: session.SessionBindingRequestState_Revoked}, `{"state":"Revoked"}`, ""},
		{"enum without name", &session.SessionBindingRequest{State: 77}, `{"state":77}`, ""},
		{"string map", &session.SessionBinding{Details: map[string]string{"Key": "Value"}}, `{"details":{"Key":"Value"}}`, "value"},
		{"64-bit integer", &session.Handle{DatabrokerServerVersion: proto.Uint64(1 << 63)}, `{"databroker_server_version":"9223372036854775808"}`, ""},
		{"bytes", &device.OwnerCredentialRecord{Id: []byte{0xff, 0}}, `{"id":"/wA="}`, ""},
		{"oneof with zero value", &session.Session_DeviceCredential{Credential: &session.Session_DeviceCredential_Id{}}, `{"id":""}`, ""},
		{"empty message in oneof", &session.Session_DeviceCredential{Credential: &session.Session_DeviceCredential_Unavailable{Unavailable: &emptypb.Empty{}}}, `{"unavailable":{}}`, ""},

		{"many messages", &session.Session{DeviceCredentials: slices.Repeat([]*session.Session_DeviceCredential{{}}, 300)},
			`{"device_credentials":[` + strings.Repeat("{},", 299) + `{}]}`, ""},

		{"Struct", parseStruct(t, `{"email":"Ann@x","group_ids":["g1","g2"],"userId":null,"n":{"a":1000000}}`),
			`{"email":"Ann@x","group_ids":["g1","g2"],"n":{"a":1000000},"userId":null}`, "ann@x\x1fg1\x1fg2"},
		{"empty Struct", &structpb.Struct{}, `{}`, ""},
		{"Struct with U+0000", parseStruct(t, `{"a\u0000b":"c\u0000D\u001fe"}`), "{\"a\U0010FFFF0b\":\"c\U0010FFFF0D\\u001fe\"}", "c\U0010FFFF0de"},
		{"numbers beyond JSON", &structpb.Struct{Fields: map[string]*structpb.Value{
			"a": number(math.NaN()), "b": number(math.Inf(1)), "c": number(math.Inf(-1)), "d": number(math.Copysign(0, -1)),
			"e": number(1e300), "e2": number(1e21), "e3": number(1e20), "f": number(5e-324), "g": {}, "h": nil,
		}}, `{"a":"NaN","b":"Infinity","c":"-Infinity","d":-0,"e":1e+300,"e2":1e+21,"e3":100000000000000000000,"f":5e-324,"g":null,"h":null}`, ""},
		{"Value", structpb.NewStringValue("X"), `"X"`, "x"},
		{"empty Value", &structpb.Value{}, `null`, ""},
		{"Value with object", structpb.NewStructValue(parseStruct(t, `{"id":"X"}`)), `{"id":"X"}`, "x"},
		{"ListValue", list("A", 1, nil), `["A",1,null]`, "a"},
		{"empty ListValue", &structpb.ListValue{}, `[]`, ""},
		{"wrapper", wrapperspb.String("X"), `"X"`, "x"},
		{"empty wrapper", wrapperspb.Int64(0), `"0"`, ""},
		{"Timestamp", &timestamppb.Timestamp{Seconds: -62135596800}, `"0001-01-01T00:00:00Z"`, ""},
		{"Timestamp with nanoseconds", &timestamppb.Timestamp{Nanos: 1000}, `"1970-01-01T00:00:00.000001Z"`, ""},
		{"Timestamp too early", &timestamppb.Timestamp{Seconds: -62135596801}, `null`, ""},
		{"field out of range", &events.LastError{Time: &timestamppb.Timestamp{Seconds: 253402300800}, Message: "X"}, `{"time":null,"message":"X"}`, "x"},
		{"negative nanoseconds", &timestamppb.Timestamp{Nanos: -1}, `null`, ""},
		{"too many nanoseconds", &timestamppb.Timestamp{Nanos: 1e9}, `null`, ""},
		{"Duration", &durationpb.Duration{Seconds: -1, Nanos: -500_000_000}, `"-1.500s"`, ""},
		{"Duration out of range", &durationpb.Duration{Seconds: 1, Nanos: -1}, `null`, ""},
		{"FieldMask", &fieldmaskpb.FieldMask{Paths: []string{"user_id", "a.b"}}, `"userId,a.b"`, "user_id\x1fa.b"},
		{"FieldMask without form", &fieldmaskpb.FieldMask{Paths: []string{"userId"}}, `null`, "userid"},
		{"Empty", &emptypb.Empty{}, `{}`, ""},

		{"Any", nestedAny(t, &user.User{Id: "X"}), `{"@type":"type.googleapis.com/user.User","id":"X"}`, "type.googleapis.com/user.user"},
		{"Any with Struct", nestedAny(t, parseStruct(t, `{"a":"X"}`)), `{"@type":"type.googleapis.com/google.protobuf.Struct","value":{"a":"X"}}`, "type.googleapis.com/google.protobuf.struct"},
		{"empty Any", &anypb.Any{}, `{}`, ""},
		{"Any of unknown type", &anypb.Any{TypeUrl: "x/Y", Value: []byte("z")}, `{"@type":"x/Y"}`, "x/y"},
		{"Any of bad bytes", &anypb.Any{TypeUrl: "x/user.User", Value: []byte{0x12, 1, 'a', 0x22, 2}}, `{"@type":"x/user.User"}`, "x/user.user"},
		{"Any with secret", nestedAny(t, &session.OAuthToken{AccessToken: "s", TokenType: "t"}),
			`{"@type":"type.googleapis.com/session.OAuthToken","token_type":"t"}`, "type.googleapis.com/session.oauthtoken"},
		{"lower case", &user.User{Name: "ÀÉ ΣΑΣ İ" + text}, `{"name":"ÀÉ ΣΑΣ İText"}`, strings.ToLower("ÀÉ ΣΑΣ İ") + "text"},
		{"escapes", &user.User{Name: "\"\\/<\u2028\n\x7f\x01"}, `{"name":"\"\\/<` + "\u2028" + `\u000a` + "\x7f" + `\u0001"}`, "\"\\/<\u2028\n\x7f\x01"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := New(nil).Project(serialize(t, c.m))
			if string(got.Data) != c.data {
				t.Errorf("Data = %s, want %s", got.Data, c.data)
			}
			if got.SearchText != c.search {
				t.Errorf("SearchText = %q, want %q", got.SearchText, c.search)
			}
		})
	}
}

func BenchmarkProject(b *testing.B) {
	loaded := New(testTypes(b))
	for name, c := range map[string]struct {
		p *Projector
		m proto.Message
	}{
		"session":        {New(nil), testSession()},
		"struct":         {New(nil), parseStruct(b, benchmarkStruct)},
		"loaded-struct":  {loaded, parseStruct(b, benchmarkStruct)}, // of a type known by its descriptor only
		"indexed-struct": {New(nil), parseStruct(b, `{"$index":{"cidr":"203.0.113.0/24"},"country":"NL","city":"Utrecht"}`)},
	} {
		payload := serialize(b, c.m)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(len(payload)))
			for b.Loop() {
				if c.p.Project(payload).Data == nil {
					b.Fatal("no projection")
				}
			}
		})
	}
}

const benchmarkStruct = `{"id":"u1","email":"ann@example.com","display_name":"Ann Example","group_ids":["g1","g2","g3"]}`

// BenchmarkLibrary is the road not taken (see walker): the same by means of protojson.
func BenchmarkLibrary(b *testing.B) {
	for name, m := range map[string]proto.Message{"session": testSession(), "struct": parseStruct(b, benchmarkStruct)} {
		o := oracle{New(nil).types}
		value := nestedAny(b, m).Value
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				m := m.ProtoReflect().New()
				if err := proto.Unmarshal(value, m.Interface()); err != nil {
					b.Fatal(err)
				}
				o.redact(m)
				strings.ToLower(strings.Join(o.search(m, nil), "\x1f"))
				js, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m.Interface())
				if err != nil {
					b.Fatal(err)
				}
				var compacted bytes.Buffer
				if err := json.Compact(&compacted, js); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkPatch(b *testing.B) {
	p := New(nil)
	dst, src := serialize(b, testSession()), serialize(b, &session.Session{AccessedAt: timestamppb.Now()})
	m := mask("accessed_at")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := p.Patch(dst, src, m); err != nil {
			b.Fatal(err)
		}
	}
}
