package projection

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/structpb"
	"pgregory.net/rapid"

	"pgbroker/proto/device"
	"pgbroker/proto/session"
	"pgbroker/proto/user"
)

func mask(paths ...string) *fieldmaskpb.FieldMask { return &fieldmaskpb.FieldMask{Paths: paths} }

func parseSession(t testing.TB, js string) *session.Session {
	t.Helper()
	s := new(session.Session)
	if err := protojson.Unmarshal([]byte(js), s); err != nil {
		t.Fatal(err)
	}
	return s
}

func unwrap(t testing.TB, payload []byte, m proto.Message) {
	t.Helper()
	a := new(anypb.Any)
	if err := proto.Unmarshal(payload, a); err != nil {
		t.Fatal(err)
	}
	if err := a.UnmarshalTo(m); err != nil {
		t.Fatal(err)
	}
}

func TestPatch(t *testing.T) {
	for _, c := range []struct {
		name           string
		dst, src, want string
		mask           []string
	}{
		{"scalar", `{"id":"d","userId":"d"}`, `{"id":"s","userId":"s"}`, `{"id":"s","userId":"d"}`, []string{"id"}},
		{"scalar absent in src", `{"id":"d","refreshDisabled":true}`, `{}`, `{"id":"d"}`, []string{"refresh_disabled"}},
		{"optional, zero in src", `{"impersonateSessionId":"d"}`, `{"impersonateSessionId":""}`, `{"impersonateSessionId":""}`, []string{"impersonate_session_id"}},
		{"optional, absent in src", `{"impersonateSessionId":"d"}`, `{}`, `{}`, []string{"impersonate_session_id"}},
		{"message is replaced", `{"idToken":{"issuer":"d","raw":"d"}}`, `{"idToken":{"subject":"s"}}`, `{"idToken":{"subject":"s"}}`, []string{"id_token"}},
		{"empty message in src", `{"idToken":{"issuer":"d"}}`, `{"idToken":{}}`, `{"idToken":{}}`, []string{"id_token"}},
		{"message absent in src", `{"idToken":{"issuer":"d"}}`, `{}`, `{}`, []string{"id_token"}},
		{"list is replaced", `{"audience":["d","e"]}`, `{"audience":["s"]}`, `{"audience":["s"]}`, []string{"audience"}},
		{"list absent in src", `{"audience":["d","e"]}`, `{}`, `{}`, []string{"audience"}},
		{"map is replaced", `{"claims":{"a":["d"],"b":["d"]}}`, `{"claims":{"b":["s"]}}`, `{"claims":{"b":["s"]}}`, []string{"claims"}},
		{"map absent in src", `{"claims":{"a":["d"]}}`, `{}`, `{}`, []string{"claims"}},
		{"several", `{"id":"d","accessedAt":"2026-01-01T00:00:00Z","claims":{"a":["d"]}}`,
			`{"id":"s","accessedAt":"2026-01-02T00:00:00Z"}`, `{"id":"d","accessedAt":"2026-01-02T00:00:00Z"}`, []string{"claims", "accessed_at"}},

		{"nested", `{"oauthToken":{"accessToken":"d","tokenType":"d"}}`, `{"oauthToken":{"accessToken":"s","tokenType":"s"}}`,
			`{"oauthToken":{"accessToken":"s","tokenType":"d"}}`, []string{"oauth_token.access_token"}},
		{"nested, parent only in src", `{"id":"d"}`, `{"oauthToken":{"accessToken":"s","tokenType":"s"}}`,
			`{"id":"d","oauthToken":{"accessToken":"s"}}`, []string{"oauth_token.access_token"}},
		{"nested, parent only in src and empty", `{"id":"d"}`, `{"oauthToken":{}}`, `{"id":"d","oauthToken":{}}`, []string{"oauth_token.access_token"}},
		{"nested, parent only in dst", `{"oauthToken":{"accessToken":"d","tokenType":"d"}}`, `{}`, `{"oauthToken":{"tokenType":"d"}}`, []string{"oauth_token.access_token"}},
		{"nested, no parent", `{"id":"d"}`, `{"id":"s"}`, `{"id":"d"}`, []string{"oauth_token.access_token"}},
		{"nested twice", `{"idToken":{"expiresAt":"1970-01-01T00:00:01.5Z"}}`, `{"idToken":{"expiresAt":"1970-01-01T00:00:07.7Z"}}`,
			`{"idToken":{"expiresAt":"1970-01-01T00:00:07.5Z"}}`, []string{"id_token.expires_at.seconds"}},

		{"shorter path first", `{"idToken":{"issuer":"d","raw":"d"}}`, `{"idToken":{"issuer":"s"}}`, `{"idToken":{"issuer":"s"}}`, []string{"id_token", "id_token.issuer"}},
		{"shorter path last", `{"idToken":{"issuer":"d","raw":"d"}}`, `{"idToken":{"issuer":"s"}}`, `{"idToken":{"issuer":"s"}}`, []string{"id_token.issuer", "id_token"}},
		{"shorter path hides nonsense", `{"claims":{"a":["d"]}}`, `{}`, `{}`, []string{"claims", "claims.a"}},
		{"path twice", `{"id":"d"}`, `{"id":"s"}`, `{"id":"s"}`, []string{"id", "id"}},
		{"paths with a common beginning", `{"idToken":{"issuer":"d","raw":"d","subject":"d"}}`, `{"idToken":{"issuer":"s","raw":"s","subject":"s"}}`,
			`{"idToken":{"issuer":"s","raw":"s","subject":"d"}}`, []string{"id_token.issuer", "id_token.raw"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dst, src, want := parseSession(t, c.dst), parseSession(t, c.src), parseSession(t, c.want)
			b, err := New(nil).Patch(serialize(t, dst), serialize(t, src), mask(c.mask...))
			if err != nil {
				t.Fatal(err)
			}
			got := new(session.Session)
			unwrap(t, b, got)
			if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestPatchOneof(t *testing.T) {
	p := New(nil)
	id := &session.Session_DeviceCredential{TypeId: "d", Credential: &session.Session_DeviceCredential_Id{Id: "x"}}
	unavailable := &session.Session_DeviceCredential{Credential: &session.Session_DeviceCredential_Unavailable{Unavailable: &emptypb.Empty{}}}
	for _, c := range []struct {
		name           string
		dst, src, want *session.Session_DeviceCredential
		mask           []string
	}{
		{"other member", id, unavailable, &session.Session_DeviceCredential{TypeId: "d", Credential: unavailable.Credential}, []string{"unavailable"}},
		{"both members", id, unavailable, &session.Session_DeviceCredential{TypeId: "d", Credential: unavailable.Credential}, []string{"unavailable", "id"}},
		{"member that neither has", id, id, id, []string{"unavailable"}},
		{"clear", id, unavailable, &session.Session_DeviceCredential{TypeId: "d"}, []string{"id"}},
	} {
		b, err := p.Patch(serialize(t, c.dst), serialize(t, c.src), mask(c.mask...))
		if err != nil {
			t.Fatal(err)
		}
		got := new(session.Session_DeviceCredential)
		unwrap(t, b, got)
		if diff := cmp.Diff(c.want, got, protocmp.Transform()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
}

func TestPatchErrors(t *testing.T) {
	sess := serialize(t, &session.Session{Id: "x"})
	deep := strings.TrimSuffix(strings.Repeat("a.", maxMaskDepth+1), ".")
	const existing, updated = "invalid patch: could not unmarshal existing record data: ", "invalid patch: could not unmarshal new record data: "
	for _, c := range []struct {
		name     string
		dst, src []byte
		mask     []string
		want     string
	}{
		{"unknown field", sess, sess, []string{"x"}, `invalid patch: cannot overwrite unknown field "x" in message session.Session`},
		{"camel case", sess, sess, []string{"userId"}, `invalid patch: cannot overwrite unknown field "userId" in message session.Session`},
		{"star", sess, sess, []string{"*"}, `invalid patch: cannot overwrite unknown field "*" in message session.Session`},
		{"empty path", sess, sess, []string{""}, `invalid patch: cannot overwrite unknown field "" in message session.Session`},
		{"trailing dot", sess, sess, []string{"id_token."}, `invalid patch: cannot overwrite unknown field "" in message session.IDToken`},
		{"nested unknown field", sess, sess, []string{"id_token.x"}, `invalid patch: cannot overwrite unknown field "x" in message session.IDToken`},
		{"into scalar", sess, sess, []string{"id.x"}, `invalid patch: cannot overwrite sub-fields of field "id" in message session.Session`},
		{"into list", sess, sess, []string{"audience.0"}, `invalid patch: cannot overwrite sub-fields of field "audience" in message session.Session`},
		{"into list of messages", sess, sess, []string{"device_credentials.id"}, `invalid patch: cannot overwrite sub-fields of field "device_credentials" in message session.Session`},
		{"into map", sess, sess, []string{"claims.a"}, `invalid patch: cannot overwrite sub-fields of field "claims" in message session.Session`},
		{"one of many", sess, sess, []string{"id", "zz", "z8", "z7", "z6", "z5", "z4", "z3", "z2", "z1", "yy"}, `invalid patch: cannot overwrite unknown field "yy" in message session.Session`},
		{"deep", sess, sess, []string{deep}, `invalid patch: field mask path with more than 100 elements`},
		{"Struct key", serialize(t, &structpb.Struct{}), serialize(t, &structpb.Struct{}), []string{"email"}, `invalid patch: cannot overwrite unknown field "email" in message google.protobuf.Struct`},
		{"types differ", sess, serialize(t, &user.User{}), []string{"id"}, `invalid patch: descriptor mismatch: session.Session, user.User`},
		{"no dst", nil, sess, []string{"id"}, existing + `there is none`},
		{"no src", sess, nil, []string{"id"}, updated + `there is none`},
		{"empty dst", []byte{}, sess, []string{"id"}, existing + `its type URL is empty`},
		{"empty src", sess, []byte{}, []string{"id"}, updated + `its type URL is empty`},
		{"unknown dst", wrap("x.Y", nil), sess, []string{"id"}, existing + `unknown type "type.googleapis.com/x.Y"`},
		{"unknown src", sess, wrap("x.Y", nil), []string{"id"}, updated + `unknown type "type.googleapis.com/x.Y"`},
		{"bad dst", wrap("session.Session", []byte{0xff}), sess, []string{"id"}, existing + `not a valid message of its type (session.Session)`},
		{"bad src", sess, wrap("session.Session", bytesField(2, []byte("\xffs3cret"))), []string{"id"}, updated + `not a valid message of its type (session.Session)`},
		{"bad Any", sess, []byte{0xff}, []string{"id"}, updated + `not a google.protobuf.Any`},
	} {
		got, err := New(nil).Patch(c.dst, c.src, mask(c.mask...))
		if err == nil || err.Error() != c.want || !errors.Is(err, ErrInvalidPatch) || got != nil {
			t.Errorf("%s: %q, %v, want error %q", c.name, got, err, c.want)
		}
	}
}

// Decoding must not panic, whatever a client makes up; see unmarshal.
func TestPatchSurvivesHostileMaps(t *testing.T) {
	entry := protowire.AppendVarint(protowire.AppendTag(bytesField(1, []byte("k")), 1, protowire.VarintType), 7)
	hostile := wrap("google.protobuf.Struct", bytesField(1, entry))
	for name, p := range map[string]*Projector{"linked": New(nil), "loaded": New(testTypes(t))} {
		_, err := p.Patch(serialize(t, &structpb.Struct{}), hostile, mask("fields"))
		if name == "loaded" && !errors.Is(err, ErrInvalidPatch) || name == "linked" && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got, want := string(p.Project(hostile).Data), `{"k":null}`; got != want {
			t.Errorf("%s: Data = %s, want %s", name, got, want)
		}
	}
}

// Without a mask nothing changes, and nothing needs to be readable: that is how a client deletes only what exists.
func TestPatchWithoutMask(t *testing.T) {
	for _, dst := range [][]byte{nil, {}, {0xff}, wrap("x.Y", []byte{0xff}), serialize(t, testSession())} {
		for _, m := range []*fieldmaskpb.FieldMask{nil, {}, mask()} {
			got, err := New(nil).Patch(dst, []byte{0xff}, m)
			if err != nil || !bytes.Equal(got, dst) || (got == nil) != (dst == nil) {
				t.Errorf("%x became %x, %v", dst, got, err)
			}
		}
	}
}

func TestPatchKeepsUnknownFields(t *testing.T) {
	inner := append(bytesField(1, []byte("issuer")), unknownField...)
	dst := append(bytesField(2, []byte("id")), unknownField...)
	dst = append(dst, bytesField(6, inner)...)
	// A value of the wrong wire type is unknown too.
	unknown := append(protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), 7), unknownField...)
	payload := append(wrap("session.Session", dst), unknown...)
	got, err := New(nil).Patch(payload, serialize(t, &session.Session{UserId: "u"}), mask("user_id", "id_token.subject"))
	if err != nil {
		t.Fatal(err)
	}
	a := new(anypb.Any)
	if err := proto.Unmarshal(got, a); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a.ProtoReflect().GetUnknown(), unknown) {
		t.Errorf("unknown fields of the Any: %x", a.ProtoReflect().GetUnknown())
	}
	s := new(session.Session)
	unwrap(t, got, s)
	if !bytes.Equal(s.ProtoReflect().GetUnknown(), unknownField) || !bytes.Equal(s.IdToken.ProtoReflect().GetUnknown(), unknownField) {
		t.Errorf("unknown fields are gone: %x, %x", s.ProtoReflect().GetUnknown(), s.IdToken.ProtoReflect().GetUnknown())
	}
	if s.Id != "id" || s.UserId != "u" || s.IdToken.Issuer != "issuer" {
		t.Errorf("got %v", s)
	}
}

// The type URL is the stored one, to the letter.
func TestPatchKeepsTypeURL(t *testing.T) {
	dst := append(bytesField(1, []byte("example.com/user.User")), bytesField(2, bytesField(2, []byte("d")))...)
	for paths, want := range map[string][]byte{
		"id":   append(bytesField(1, []byte("example.com/user.User")), bytesField(2, bytesField(2, []byte("s")))...),
		"name": dst,
	} {
		got, err := New(nil).Patch(dst, serialize(t, &user.User{Id: "s"}), mask(paths))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %q, %v, want %q", paths, got, err, want)
		}
	}
	got, err := New(nil).Patch(dst, serialize(t, &user.User{}), mask("id"))
	if want := bytesField(1, []byte("example.com/user.User")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%q, %v, want %q", got, err, want)
	}
}

// A patched payload is encoded in one way only, so that equal payloads are equal bytes.
func TestPatchIsDeterministic(t *testing.T) {
	dst, src := serialize(t, testSession()), serialize(t, &session.Session{Id: "s"})
	first, err := New(nil).Patch(dst, src, mask("id"))
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if again, err := New(nil).Patch(dst, src, mask("id")); err != nil || !bytes.Equal(first, again) {
			t.Fatalf("%v: %x, then %x", err, first, again)
		}
	}
}

func TestPatchDoesNotTouchItsArguments(t *testing.T) {
	dst, src := serialize(t, testSession()), serialize(t, &session.Session{Id: "s"})
	dstBefore, srcBefore := bytes.Clone(dst), bytes.Clone(src)
	m := mask("id", "claims")
	if _, err := New(nil).Patch(dst, src, m); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(dst, dstBefore) || !bytes.Equal(src, srcBefore) || !slices.Equal(m.Paths, []string{"id", "claims"}) {
		t.Error("arguments changed")
	}
}

// drawPath draws a path of fields through message types; the last may be any field.
func drawPath(t *rapid.T, md protoreflect.MessageDescriptor) string {
	var path []string
	for {
		if md.Fields().Len() == 0 {
			break
		}
		fd := md.Fields().Get(rapid.IntRange(0, md.Fields().Len()-1).Draw(t, "field"))
		path = append(path, string(fd.Name()))
		if fd.Message() == nil || fd.Cardinality() == protoreflect.Repeated || rapid.Bool().Draw(t, "end") {
			break
		}
		md = fd.Message()
	}
	return strings.Join(path, ".")
}

// TestPatchProperty holds Patch against what it says of itself: a field under the mask equals that of src, any other
// that of dst.
func TestPatchProperty(t *testing.T) {
	loaded := testTypes(t)
	for name, types := range map[string]Resolver{"linked": New(nil).types, "loaded": loaded} {
		t.Run(name, func(t *testing.T) {
			p := New(types)
			names := []protoreflect.FullName{"session.Session", "user.User", "pomerium.device.Credential", "ietf.rfc7591.v1.ClientRegistration"}
			if name == "loaded" {
				names = []protoreflect.FullName{"pb3.All", "pb2.Old"}
			}
			rapid.Check(t, func(t *rapid.T) {
				g := generator{t, types, append(names, "google.protobuf.Struct")}
				mt, err := types.FindMessageByName(rapid.SampledFrom(names).Draw(t, "type"))
				if err != nil {
					t.Fatal(err)
				}
				dst, src := g.message(mt, 3), g.message(mt, 3)
				var paths []string
				for range rapid.IntRange(1, 4).Draw(t, "paths") {
					paths = append(paths, drawPath(t, mt.Descriptor()))
				}
				full := mt.Descriptor().FullName()
				b, err := p.Patch(wrap(full, g.wire(dst)), wrap(full, g.wire(src)), mask(paths...))
				if err != nil {
					t.Fatal(err)
				}
				_, value, _ := splitAny(b)
				got := mt.New()
				if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(value, got.Interface()); err != nil {
					t.Fatal(err)
				}
				checkPatched(t, "", paths, got, dst, src)
			})
		})
	}
}

// checkPatched compares the fields of one message, given the paths below it.
func checkPatched(t *rapid.T, at string, paths []string, got, dst, src protoreflect.Message) {
	fields := got.Descriptor().Fields()
	// Setting one member of a oneof clears the others, so these are no longer what they were in dst.
	taken := map[protoreflect.FullName]bool{}
	masked := func(name string) (whole bool, below []string) {
		for _, p := range paths {
			first, rest, more := strings.Cut(p, ".")
			if first == name && more {
				below = append(below, rest)
			}
			whole = whole || p == name
		}
		return whole, below
	}
	for i := range fields.Len() {
		fd := fields.Get(i)
		if whole, below := masked(string(fd.Name())); (whole || len(below) > 0) && src.Has(fd) && fd.ContainingOneof() != nil {
			taken[fd.ContainingOneof().FullName()] = true
		}
	}
	for i := range fields.Len() {
		fd := fields.Get(i)
		where := at + string(fd.Name())
		whole, below := masked(string(fd.Name()))
		od := fd.ContainingOneof()
		switch {
		case whole:
			requireField(t, where, fd, got, src)
		case len(below) > 0 && (dst.Has(fd) || src.Has(fd)):
			if od != nil && taken[od.FullName()] && !src.Has(fd) {
				if got.Has(fd) {
					t.Fatalf("%s: two members of a oneof", where)
				}
				continue
			}
			if !got.Has(fd) {
				t.Fatalf("%s: is missing", where)
			}
			checkPatched(t, where+".", below, got.Get(fd).Message(), dst.Get(fd).Message(), src.Get(fd).Message())
		case od != nil && taken[od.FullName()]:
			if got.Has(fd) {
				t.Fatalf("%s: was not replaced by the other member", where)
			}
		default:
			requireField(t, where, fd, got, dst)
		}
	}
}

func requireField(t *rapid.T, where string, fd protoreflect.FieldDescriptor, got, want protoreflect.Message) {
	if got.Has(fd) != want.Has(fd) || got.Has(fd) && !got.Get(fd).Equal(want.Get(fd)) {
		t.Fatalf("%s = %v, want %v", where, got.Get(fd), want.Get(fd))
	}
}

func FuzzPatch(f *testing.F) {
	dst := serialize(f, testSession())
	for _, paths := range []string{"", "id", "oauth_token,id_token,claims", "accessed_at", "device_credentials", "id_token.expires_at.nanos", "userId", "*", "claims.a", "a..b", ".", "id,,id"} {
		f.Add(dst, serialize(f, &session.Session{Id: "s"}), paths)
	}
	f.Add(dst, []byte{0xff}, "id")
	f.Add(serialize(f, &device.Credential{Specifier: &device.Credential_Webauthn{}}), serialize(f, &device.Credential{}), "webauthn.id,user_id")
	p := New(nil)
	f.Fuzz(func(t *testing.T, dst, src []byte, paths string) {
		m := mask(strings.Split(paths, ",")...)
		got, err := p.Patch(dst, src, m)
		if err != nil {
			if !errors.Is(err, ErrInvalidPatch) || got != nil {
				t.Fatalf("%x, %v", got, err)
			}
			return
		}
		// What comes out is a payload of the same type, and patching it again changes nothing.
		before, _, _ := splitAny(dst)
		after, _, ok := splitAny(got)
		if !ok || !bytes.Equal(before, after) {
			t.Fatalf("type URL %q became %q", before, after)
		}
		again, err := p.Patch(got, src, m)
		if err != nil || !bytes.Equal(got, again) {
			t.Fatalf("%x patched again is %x, %v", got, again, err)
		}
	})
}

// FuzzProject throws bytes at the walker. Whatever the library can read, it has to read alike.
func FuzzProject(f *testing.F) {
	linked, loaded := New(nil), New(testTypes(f))
	f.Add("session.Session", valueOf(serialize(f, testSession())))
	f.Add("google.protobuf.Struct", valueOf(serialize(f, parseStruct(f, `{"$index":{"cidr":"10.0.0.0/8"},"a":[1,null,true,{"b":"C"}]}`))))
	f.Add("google.protobuf.Any", serialize(f, &user.User{Id: "x"}))
	f.Add("pb2.Old", []byte("\x0a\x01a\x2b\x0a\x01b\x2c\x33\x0a\x01c\x34\x1a\x02\x01\x02"))
	f.Add("pb3.All", bytesField(3, make([]byte, 16)))
	f.Add("pb3.All", protowire.AppendVarint(protowire.AppendTag(nil, 13, protowire.VarintType), 1))
	f.Fuzz(func(t *testing.T, name string, wire []byte) {
		for _, p := range []*Projector{linked, loaded} {
			mt, err := p.types.FindMessageByName(protoreflect.FullName(name))
			if err != nil {
				continue
			}
			o := oracle{p.types}
			if _, _, err := o.project(mt.Descriptor(), wire); err != nil || len(wire) > 2*maxDepth {
				if got := p.Project(wrap(mt.Descriptor().FullName(), wire)); got.Data != nil {
					decodeJSON(got.Data)
				}
				continue
			}
			o.compare(t, p, mt.Descriptor(), wire)
		}
	})
}

func valueOf(payload []byte) []byte {
	_, value, _ := splitAny(payload)
	return value
}
