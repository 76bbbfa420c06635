package auth

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// incoming returns the context of a request from addr with metadata.
func incoming(md metadata.MD, addr string) context.Context {
	tcp, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		panic(err)
	}
	return peer.NewContext(metadata.NewIncomingContext(context.Background(), md), &peer.Peer{Addr: tcp})
}

// callerOf returns who a handler takes for its caller, by each of the three ways that a request can take.
func callerOf(t *testing.T, a *Authenticator, method string, md metadata.MD) (Caller, error) {
	t.Helper()
	ctx := incoming(md, "192.0.2.1:50000")
	tapped, tapErr := a.Tap(ctx, method)
	var unary, stream Caller
	_, unaryErr := a.Unary(ctx, nil, &grpc.UnaryServerInfo{FullMethod: method}, func(ctx context.Context, _ any) (any, error) {
		unary = CallerFrom(ctx)
		return nil, nil
	})
	streamErr := a.Stream(nil, &callerStream{ctx: ctx}, &grpc.StreamServerInfo{FullMethod: method}, func(_ any, ss grpc.ServerStream) error {
		stream = CallerFrom(ss.Context())
		return nil
	})
	if fmt.Sprint(tapErr) != fmt.Sprint(unaryErr) || fmt.Sprint(tapErr) != fmt.Sprint(streamErr) {
		t.Errorf("%s: the tap says %v, the interceptors %v and %v", method, tapErr, unaryErr, streamErr)
	}
	if tapErr != nil {
		return Caller{}, tapErr
	}
	if caller := CallerFrom(tapped); caller != unary || caller != stream {
		t.Errorf("%s: the tap says %+v, the interceptors %+v and %+v", method, caller, unary, stream)
	}
	return unary, nil
}

func TestNamedKeysAndTheirRights(t *testing.T) {
	plain, file := NewKey(), NewKey()
	path := filepath.Join(t.TempDir(), "ci")
	if err := os.WriteFile(path, []byte(file.Secret()), 0o600); err != nil {
		t.Fatal(err)
	}
	reader, writer, newWriter := NewKey(), NewKey(), NewKey()
	var r recorder
	a := newAuthenticator(t, r.config(Config{
		Secrets: []string{plain.Secret()},
		Keys: []NamedKey{
			{Name: "dashboard", Secret: reader.Secret(), Access: AccessRead},
			{Name: "proxy", Secret: writer.Secret(), Access: AccessWrite},
			{Name: "proxy", Secret: newWriter.Secret(), Access: AccessWrite},
			{Name: "ci", File: path, Access: AccessAdmin},
		},
	}))
	for _, test := range []struct {
		key  Key
		want Caller
	}{
		{plain, Caller{Key: SharedSecret, Access: AccessAdmin}},
		{file, Caller{Key: "ci", Access: AccessAdmin}},
		{writer, Caller{Key: "proxy", Access: AccessWrite}},
		{newWriter, Caller{Key: "proxy", Access: AccessWrite}},
		{reader, Caller{Key: "dashboard", Access: AccessRead}},
	} {
		for _, method := range append(Methods(), "/databroker.DataBrokerService/AddedLater") {
			caller, err := callerOf(t, a, method, metadata.MD{MetadataKey: {fresh(t, test.key)}})
			if test.want.Access >= Needed(method) {
				if err != nil || caller != test.want {
					t.Errorf("%s with %s: %+v, %v", method, test.want.Key, caller, err)
				}
				continue
			}
			wantStatus(t, err, codes.PermissionDenied, fmt.Sprintf("the key %s has access %v, and %s needs %v",
				test.want.Key, test.want.Access, method[1:], Needed(method)))
		}
	}
	// Once for each key, since it is the same client.
	lines := r.lines(t)
	var keys []string
	for _, line := range lines {
		if line["reason"] == string(ReasonAccess) {
			keys = append(keys, fmt.Sprint(line["key"], line["access"], line["needed"]))
		}
	}
	if want := []string{"proxywriteadmin", "dashboardreadwrite"}; len(keys) != 2 || keys[0] != want[0] || !strings.HasPrefix(keys[1], "dashboardread") {
		t.Errorf("logged %v for keys %v, want one line for each key with too little access", lines, keys)
	}
	if !slices.Contains(r.rejected, ReasonAccess) {
		t.Errorf("counted %v", r.rejected)
	}
	if Needed("/databroker.DataBrokerService/AddedLater") != AccessAdmin {
		t.Error("a method that nobody has decided on is open")
	}
}

// A file that changes to the secret of another key must not give that key's rights to whoever has it.
func TestTheLeastAccessCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key, other := NewKey(), NewKey()
		path := filepath.Join(t.TempDir(), "admin")
		if err := os.WriteFile(path, []byte(other.Secret()), 0o600); err != nil {
			t.Fatal(err)
		}
		a := newAuthenticator(t, Config{Keys: []NamedKey{
			{Name: "admin", File: path, Access: AccessAdmin}, {Name: "reader", Secret: key.Secret(), Access: AccessRead},
		}})
		if err := os.WriteFile(path, []byte(key.Secret()), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		const clear = "/databroker.DataBrokerService/Clear"
		if _, err := callerOf(t, a, clear, metadata.MD{MetadataKey: {fresh(t, key)}}); status.Code(err) != codes.PermissionDenied {
			t.Errorf("got %v", err)
		}
	})
}

func TestPerson(t *testing.T) {
	key := NewKey()
	a := newAuthenticator(t, Config{Secrets: []string{key.Secret()}})
	const method = "/databroker.DataBrokerService/Put"
	for _, test := range []struct {
		sent []string
		want string // the person, or what the error says after a ! in front
	}{
		{nil, ""},
		{[]string{"jane@example.com"}, "jane@example.com"},
		{[]string{"J%C3%BCrgen M%C3%BCller (100%25)"}, "Jürgen Müller (100%)"},
		{[]string{strings.Repeat("x", MaxPersonSize)}, strings.Repeat("x", MaxPersonSize)},
		{[]string{strings.Repeat("x", MaxPersonSize+1)}, "!201 bytes, want at most 200"},
		{[]string{""}, "!empty"},
		{[]string{"%"}, "!want a percent sign only before two hexadecimal digits"},
		{[]string{"a", "b"}, "!is given more than once"},
		{[]string{"jane%0Aroot"}, "!has a character that cannot be printed (U+000A)"},
		{[]string{"jane%E2%80%AEtoor"}, "!has a character that cannot be printed (U+202E)"},
		{[]string{"%00"}, "!has a character that cannot be printed (U+0000)"},
		{[]string{"%FF"}, "!not UTF-8"},
		{[]string{"%20jane"}, "!white space before or after"},
	} {
		md := metadata.MD{MetadataKey: {fresh(t, key)}}
		if test.sent != nil {
			md[PersonKey] = test.sent
		}
		for _, authenticator := range []*Authenticator{a, Disabled()} {
			caller, err := callerOf(t, authenticator, method, md)
			if problem, bad := strings.CutPrefix(test.want, "!"); bad {
				if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "metadata "+PersonKey+": ") || !strings.Contains(err.Error(), problem) {
					t.Errorf("%q: got %v, want %q", test.sent, err, problem)
				}
				continue
			}
			if err != nil || caller.Person != test.want || caller.Access != AccessAdmin {
				t.Errorf("%q: got %+v, %v", test.sent, caller, err)
			}
			// What a client sends arrives.
			ctx, err := OnBehalfOf(t.Context(), test.want)
			if err != nil {
				t.Fatal(err)
			}
			sent, _ := metadata.FromOutgoingContext(ctx)
			if !slices.Equal(sent[PersonKey], test.sent) {
				t.Errorf("%q is sent as %q, want %q", test.want, sent[PersonKey], test.sent)
			}
		}
	}
	if _, err := OnBehalfOf(t.Context(), "jane\n"); err == nil {
		t.Error("a client sends what no server takes")
	}
	// Who says nothing true about the key is not asked for whom.
	_, err := callerOf(t, a, method, metadata.MD{PersonKey: {"%"}})
	wantStatus(t, err, codes.Unauthenticated, "unauthenticated")
	if got := CallerFrom(context.Background()); got != (Caller{}) {
		t.Errorf("without a request: %+v", got)
	}
}

func TestReplace(t *testing.T) {
	first, second := NewKey(), NewKey()
	a := newAuthenticator(t, Config{Secrets: []string{first.Secret()}})
	accepts := func(want ...Key) {
		t.Helper()
		for _, key := range []Key{first, second} {
			if got := request(a, "192.0.2.1:1", fresh(t, key)) == nil; got != slices.Contains(want, key) {
				t.Errorf("accepts %v: %v", key, got)
			}
		}
	}
	if err := a.Replace(Config{}); err == nil {
		t.Error("a configuration without a secret is accepted")
	}
	if err := a.Replace(Config{Secrets: []string{second.Secret(), "short"}}); err == nil {
		t.Error("a configuration with a bad secret is accepted")
	}
	accepts(first)
	if err := a.Replace(Config{Keys: []NamedKey{{Name: "second", Secret: second.Secret(), Access: AccessWrite}}}); err != nil {
		t.Fatal(err)
	}
	accepts(second)
}

// A stream ends when its key is withdrawn, or keeps too little access; others go on.
func TestStreamsEndWithTheirKeys(t *testing.T) {
	keys := []Key{NewKey(), NewKey(), NewKey()}
	config := func(access Access, used ...int) (c Config) {
		for _, i := range used {
			c.Keys = append(c.Keys, NamedKey{Name: fmt.Sprint("k", i), Secret: keys[i].Secret(), Access: access})
		}
		return c
	}
	a := newAuthenticator(t, config(AccessAdmin, 0, 1, 2))
	start := func(key Key, method string) (ended chan error, stop context.CancelFunc) {
		ended = make(chan error, 1)
		started := make(chan struct{})
		ctx, stop := context.WithCancel(incoming(metadata.MD{MetadataKey: {fresh(t, key)}}, "192.0.2.1:1"))
		go func() {
			ended <- a.Stream(nil, &callerStream{ctx: ctx}, &grpc.StreamServerInfo{FullMethod: method}, func(_ any, ss grpc.ServerStream) error {
				close(started)
				<-ss.Context().Done()
				return status.FromContextError(ss.Context().Err()).Err()
			})
		}()
		<-started
		return ended, stop
	}
	const sync = "/databroker.DataBrokerService/Sync"
	first, stopFirst := start(keys[0], sync)
	defer stopFirst()
	second, stopSecond := start(keys[1], sync)
	admin, stopAdmin := start(keys[1], "/databroker.DataBrokerService/AddedLater")
	defer stopAdmin()
	if n := a.EndStreams(); n != 0 {
		t.Errorf("%d streams end while all keys are good", n)
	}
	if err := a.Replace(config(AccessRead, 1)); err != nil {
		t.Fatal(err)
	}
	if n := a.EndStreams(); n != 2 {
		t.Errorf("%d streams end, want that of the key that is gone, and that which needs more access", n)
	}
	for _, ended := range []chan error{first, admin} {
		wantStatus(t, <-ended, codes.Unauthenticated, "the key of this stream is no longer accepted")
	}
	stopSecond()
	wantStatus(t, <-second, codes.Canceled, "context canceled")
	if n := len(a.streams.open); n != 0 {
		t.Errorf("%d streams are remembered", n)
	}
}
