package auth

import (
	"bytes"
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A recorder is what an authenticator logs and counts.
type recorder struct {
	mu       sync.Mutex
	log      bytes.Buffer
	accepted []string
	rejected []Reason
}

func (r *recorder) Write(line []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.Write(line)
}

// lines returns what was logged since the last time.
func (r *recorder) lines(t *testing.T) (lines []map[string]any) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for d := json.NewDecoder(&r.log); ; {
		var line map[string]any
		if err := d.Decode(&line); err == io.EOF {
			r.log.Reset()
			return lines
		} else if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, line)
	}
}

func (r *recorder) config(c Config) Config {
	c.Log = slog.New(slog.NewJSONHandler(r, nil))
	c.OnAccept = func(_ Caller, fingerprint string) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.accepted = append(r.accepted, fingerprint)
	}
	c.OnReject = func(reason Reason) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.rejected = append(r.rejected, reason)
	}
	return c
}

func newAuthenticator(t *testing.T, c Config) *Authenticator {
	t.Helper()
	a, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// request calls a's unary interceptor as a server would for a client at addr.
func request(a *Authenticator, addr string, tokens ...string) error {
	md := metadata.MD{}
	if len(tokens) > 0 {
		md[MetadataKey] = tokens
	}
	ctx := metadata.NewIncomingContext(context.Background(), md)
	tcp, err := net.ResolveTCPAddr("tcp", addr)
	if err != nil {
		panic(err)
	}
	ctx = peer.NewContext(ctx, &peer.Peer{Addr: tcp})
	reached := false
	_, err = a.Unary(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/databroker.DataBrokerService/Put"}, func(context.Context, any) (any, error) {
		reached = true
		return nil, nil
	})
	if reached != (err == nil) {
		panic(fmt.Sprintf("handler reached: %v, error: %v", reached, err))
	}
	return err
}

func fresh(t testing.TB, key Key) string {
	t.Helper()
	token, err := mint(key, time.Now().Add(TokenLifetime))
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func wantStatus(t *testing.T, err error, code codes.Code, message string) {
	t.Helper()
	if s := status.Convert(err); s.Code() != code || s.Message() != message {
		t.Errorf("got %v %q, want %v %q", s.Code(), s.Message(), code, message)
	}
}

func TestNewRefuses(t *testing.T) {
	absent := filepath.Join(t.TempDir(), "absent")
	for _, test := range []struct {
		name   string
		config Config
		want   string
	}{
		{"nothing", Config{}, "no shared secret: give at least one, or turn authentication off explicitly"},
		{"empty lists", Config{Secrets: []string{}, Files: []string{}}, "no shared secret"},
		{"empty secret", Config{Secrets: []string{""}}, "shared secret: empty"},
		{"empty second secret", Config{Secrets: []string{fixedSecret, ""}}, "shared secret 2 of 2: empty"},
		{"empty file name", Config{Secrets: []string{fixedSecret}, Files: []string{""}}, "the file name is empty"},
		{"absent file", Config{Secrets: []string{fixedSecret}, Files: []string{absent}}, absent + ": no such file"},
		{"no name", Config{Keys: []NamedKey{{Secret: fixedSecret, Access: AccessRead}}}, "key 1: name: want 1 to 64 letters"},
		{"bad name", Config{Keys: []NamedKey{{Name: "a b", Secret: fixedSecret, Access: AccessRead}}}, "key 1: name: want 1 to 64 letters"},
		{"long name", Config{Keys: []NamedKey{{Name: strings.Repeat("a", 65), Secret: fixedSecret, Access: AccessRead}}}, "key 1: name: want"},
		{"taken name", Config{Keys: []NamedKey{{Name: SharedSecret, Secret: fixedSecret, Access: AccessRead}}}, "is the name of keys without one"},
		{"no access", Config{Keys: []NamedKey{{Name: "a", Secret: fixedSecret}}}, "key a: access: want read, write or admin"},
		{"no secret", Config{Keys: []NamedKey{{Name: "a", Access: AccessRead}}}, "key a: want either a secret or the file"},
		{"two secrets", Config{Keys: []NamedKey{{Name: "a", Secret: fixedSecret, File: absent, Access: AccessRead}}}, "key a: want either a secret or the file"},
		{"bad secret of a key", Config{Keys: []NamedKey{{Name: "a", Secret: "short", Access: AccessRead}}}, "key a: secret: not padded"},
		{"absent file of a key", Config{Keys: []NamedKey{{Name: "a", File: absent, Access: AccessRead}}}, "key a: shared secret file " + absent},
		{"one name, two rights", Config{Keys: []NamedKey{
			{Name: "a", Secret: fixedSecret, Access: AccessRead}, {Name: "a", Secret: NewKey().Secret(), Access: AccessWrite},
		}}, "key a: has access read in one place and write in another"},
		{"one secret, two names", Config{Secrets: []string{fixedSecret}, Keys: []NamedKey{{Name: "a", Secret: fixedSecret, Access: AccessRead}}},
			"key a has the same secret as key shared-secret"},
		{"too many", Config{Secrets: slices.Repeat([]string{fixedSecret}, MaxKeys+1)}, "65 shared secrets, at most 64"},
		{"secret for a file name", Config{Files: []string{fixedSecret}}, "got a shared secret where the name of a file is wanted"},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, err := New(test.config)
			if a != nil || err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, %v, want an error with %q", a, err, test.want)
			}
		})
	}
}

func TestAdmit(t *testing.T) {
	key, second, other := NewKey(), NewKey(), NewKey()
	var r recorder
	a := newAuthenticator(t, r.config(Config{Secrets: []string{key.Secret(), second.Secret(), key.Secret()}}))
	if got, want := a.Fingerprints(), []string{key.Fingerprint(), second.Fingerprint()}; !slices.Equal(got, want) {
		t.Errorf("fingerprints %v, want %v", got, want)
	}
	good, bad := fresh(t, key), fresh(t, other)

	const addr = "192.0.2.1:50000"
	for _, test := range []struct {
		name    string
		tokens  []string
		message string
	}{
		{"good", []string{good}, ""},
		{"second key", []string{fresh(t, second)}, ""},
		{"good then bad", []string{good, bad}, ""},
		{"bad then good", []string{bad, good}, "invalid JWT"},
		{"empty then good", []string{"", good}, "invalid JWT"},
		{"empty", []string{""}, "invalid JWT"},
		{"other key", []string{bad}, "invalid JWT"},
		{"missing", nil, "unauthenticated"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := request(a, addr, test.tokens...)
			if test.message == "" {
				if err != nil {
					t.Errorf("got %v", err)
				}
				return
			}
			wantStatus(t, err, codes.Unauthenticated, test.message)
		})
	}
	if want := []string{key.Fingerprint(), second.Fingerprint(), key.Fingerprint()}; !slices.Equal(r.accepted, want) {
		t.Errorf("accepted %v, want %v", r.accepted, want)
	}
	if want := []Reason{ReasonBadSignature, ReasonMalformed, ReasonMalformed, ReasonBadSignature, ReasonMissing}; !slices.Equal(r.rejected, want) {
		t.Errorf("rejected %v, want %v", r.rejected, want)
	}
}

// Nothing but New with a secret and Disabled makes an authenticator that admits anything.
func TestNoKey(t *testing.T) {
	token := fresh(t, makeKey(make([]byte, KeySize)))
	for name, a := range map[string]*Authenticator{"zero": {}, "nil": nil} {
		wantStatus(t, request(a, "192.0.2.1:1", token), codes.Unavailable, "no shared key defined")
		wantStatus(t, request(a, "192.0.2.1:1"), codes.Unavailable, "no shared key defined")
		if got := a.Fingerprints(); len(got) != 0 {
			t.Errorf("%s: fingerprints %v", name, got)
		}
	}
}

func TestDisabled(t *testing.T) {
	a := Disabled()
	for _, tokens := range [][]string{nil, {""}, {"garbage"}} {
		if err := request(a, "192.0.2.1:1", tokens...); err != nil {
			t.Errorf("%q: %v", tokens, err)
		}
	}
	if got := a.Fingerprints(); len(got) != 0 {
		t.Errorf("fingerprints %v", got)
	}
}

func TestPublic(t *testing.T) {
	for method, want := range map[string]bool{
		"/grpc.health.v1.Health/Check":                                   true,
		"/grpc.health.v1.Health/Watch":                                   true,
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      true,
		"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": true,
		"/databroker.DataBrokerService/Get":                              false,
		"/registry.Registry/List":                                        false,
		"/grpc.channelz.v1.Channelz/GetServers":                          false,
		"/grpc.health.v1.HealthX/Check":                                  false,
		"/x.grpc.health.v1.Health/Check":                                 false,
		"/grpc.health.v1.Health/../databroker.DataBrokerService/Get":     false,
		"/databroker.DataBrokerService/Get?/grpc.health.v1.Health/Check": false,
		"//grpc.health.v1.Health/Check":                                  false,
		"/grpc.health.v1.health/Check":                                   false,
		"/grpc.health.v1.Health":                                         false,
		"/":                                                              false,
		"":                                                               false,
	} {
		if got := Public(method); got != want {
			t.Errorf("%q: got %v", method, got)
		}
	}
}

// A client that is refused over and over is logged once, with what is needed to find out why, and counted each time.
func TestRejectionLog(t *testing.T) {
	key, weak, other := NewKey(), NewKey(), NewKey()
	var r recorder
	a := newAuthenticator(t, r.config(Config{
		Secrets: []string{key.Secret()}, Keys: []NamedKey{{Name: "weak", Secret: weak.Secret(), Access: AccessRead}},
	}))
	present := time.Now()
	tokens := map[Reason]string{
		ReasonMalformed:    "garbage",
		ReasonAlgorithm:    sign(key, crypto.SHA256, `{"alg":"none"}`, claims(present.Unix()+60)),
		ReasonBadSignature: fresh(t, other),
		ReasonExtraClaim:   sign(key, crypto.SHA256, hs256Header, `{"exp":4102444800,"iss":"x"}`),
		ReasonExpired:      sign(key, crypto.SHA256, hs256Header, claims(present.Add(-time.Hour).Unix())),
		ReasonClock:        sign(key, crypto.SHA256, hs256Header, claims(present.Add(-time.Minute).Unix())),
		ReasonAccess:       fresh(t, weak),
	}
	names := map[Reason]any{
		ReasonExtraClaim: SharedSecret, ReasonExpired: SharedSecret, ReasonClock: SharedSecret, ReasonAccess: "weak",
	} // where the key is known
	for _, reason := range Reasons() {
		t.Run(string(reason), func(t *testing.T) {
			var token []string
			if reason != ReasonMissing {
				token = []string{tokens[reason]}
			}
			r.rejected = nil
			for _, addr := range []string{"192.0.2.1:1", "192.0.2.1:2", "[2001:db8::1]:1", "192.0.2.1:3", "[2001:db8::1]:2"} {
				if request(a, addr, token...) == nil {
					t.Fatal("accepted")
				}
			}
			if want := slices.Repeat([]Reason{reason}, 5); !slices.Equal(r.rejected, want) {
				t.Errorf("counted %v", r.rejected)
			}
			lines := r.lines(t)
			if len(lines) != 2 {
				t.Fatalf("got %d lines, want one per client: %v", len(lines), lines)
			}
			for i, host := range []string{"192.0.2.1", "2001:db8::1"} {
				line := lines[i]
				if line["level"] != "WARN" || line["peer"] != host || line["reason"] != string(reason) ||
					line["method"] != "/databroker.DataBrokerService/Put" || line["key"] != names[reason] ||
					fmt.Sprint(line["accepted_keys"]) != fmt.Sprint([]string{key.Fingerprint(), weak.Fingerprint()}) {
					t.Errorf("got %v", line)
				}
				if _, ok := line["expired"]; ok != (reason == ReasonExpired || reason == ReasonClock) {
					t.Errorf("expired is there: %v in %v", ok, line)
				}
				if text := fmt.Sprint(line); sharesText(text, key.Secret()) || strings.Contains(text, "eyJ") {
					t.Errorf("shows a secret or a token: %v", line)
				}
			}
		})
	}
	if len(explanations) != len(Reasons())+1 {
		t.Errorf("%d explanations for %d reasons and one hint", len(explanations), len(Reasons()))
	}
}

// A token from the future is accepted, as the contract has it, but says something about clocks.
func TestLongLivedToken(t *testing.T) {
	key := NewKey()
	var r recorder
	a := newAuthenticator(t, r.config(Config{Secrets: []string{key.Secret()}}))
	present := time.Now()
	for _, test := range []struct {
		exp  string
		logs int
	}{
		{fmt.Sprint(present.Add(time.Hour).Unix()), 0},
		{fmt.Sprint(present.Add(time.Hour + 4*time.Minute).Unix()), 0},
		{fmt.Sprint(present.Add(time.Hour + 6*time.Minute).Unix()), 1},
		{fmt.Sprint(present.Add(2 * time.Hour).Unix()), 0}, // already said
	} {
		if err := request(a, "192.0.2.1:1", sign(key, crypto.SHA256, hs256Header, `{"exp":`+test.exp+`}`)); err != nil {
			t.Errorf("exp %s: %v", test.exp, err)
		}
		lines := r.lines(t)
		if len(lines) != test.logs {
			t.Errorf("exp %s: logged %v", test.exp, lines)
		}
		for _, line := range lines {
			if line["level"] != "WARN" || line["reason"] != "clock" || line["peer"] != "192.0.2.1" {
				t.Errorf("logged %v", line)
			}
		}
	}
	if err := request(a, "192.0.2.2:1", sign(key, crypto.SHA256, hs256Header, `{"exp":9e18}`)); err != nil || len(r.lines(t)) != 1 {
		t.Errorf("as far away as can be: %v", err)
	}
	if len(r.rejected) > 0 || len(r.accepted) != 5 {
		t.Errorf("rejected %v, accepted %v", r.rejected, r.accepted)
	}
}

// The memory of who was logged is bounded, and whoever keeps coming stays in it.
func TestRejectionLogIsBounded(t *testing.T) {
	var l peerLog
	logged := 0
	for i := range 10 * maxRemembered {
		l.first(peerReason{host: fmt.Sprint("stranger ", i), reason: ReasonMissing}, nil)
		if n := len(l.recent) + len(l.older); n > maxRemembered {
			t.Fatalf("remembers %d", n)
		}
		if l.first(peerReason{host: "regular", reason: ReasonMissing}, nil) {
			logged++
		}
	}
	if logged != 1 {
		t.Errorf("a client that kept coming was logged %d times", logged)
	}
}

// A changed file changes which tokens are accepted within a second, a spoiled one changes nothing and is logged once.
func TestFileChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first, second, literal := NewKey(), NewKey(), NewKey()
		file := filepath.Join(t.TempDir(), "secret")
		write := func(content string) {
			t.Helper()
			if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		write(first.Secret() + "\n")
		var r recorder
		a := newAuthenticator(t, r.config(Config{Secrets: []string{literal.Secret()}, Files: []string{file}}))
		accepts := func(what string, keys ...Key) {
			t.Helper()
			for _, key := range []Key{first, second, literal} {
				if got, want := request(a, "192.0.2.1:1", fresh(t, key)) == nil, slices.Contains(keys, key); got != want {
					t.Errorf("%s: accepts %v: %v, want %v", what, key, got, want)
				}
			}
		}
		accepts("at first", first, literal)
		r.lines(t)

		write(second.Secret())
		accepts("changed", second, literal)
		lines := r.lines(t)
		if len(lines) != 2 || lines[0]["msg"] != "file reloaded" || lines[0]["in_force"] != second.String() {
			t.Errorf("logged %v, want the change", lines)
		} else if got := fmt.Sprint(lines[1]["accepted_keys"]); lines[1]["reason"] != "bad_signature" || !strings.Contains(got, second.Fingerprint()) {
			t.Errorf("logged %v, want the client again that was refused before, because the keys are others", lines[1])
		}

		for _, spoiled := range []string{first.Secret()[:40], "rubbish\n", second.Secret() + " "} {
			for range 3 {
				write(spoiled)
				accepts(fmt.Sprintf("spoiled as %q", spoiled), second, literal)
			}
			lines := r.lines(t)
			if len(lines) != 1 || lines[0]["level"] != "ERROR" || lines[0]["in_force"] != second.String() {
				t.Errorf("%q: logged %v, want the error once", spoiled, lines)
			}
			if sharesText(fmt.Sprint(lines), first.Secret()) {
				t.Errorf("%q: shows the secret: %v", spoiled, lines)
			}
		}

		// What cannot be read is a mistake, too.
		aside := file + ".aside"
		if err := errors.Join(os.Rename(file, aside), os.Mkdir(file, 0o700)); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			time.Sleep(time.Second)
			accepts("unreadable", second, literal)
		}
		if lines := r.lines(t); len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0]["error"]), "directory") {
			t.Errorf("logged %v, want the file that cannot be read once", lines)
		}
		if err := errors.Join(os.Remove(file), os.Rename(aside, file)); err != nil {
			t.Fatal(err)
		}

		// What is taken away is meant.
		remove := func() {
			t.Helper()
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		for _, gone := range []struct {
			name string
			do   func()
		}{
			{"emptied", func() { write("") }}, {"a line without anything", func() { write("\n") }}, {"blank", func() { write(" \n\t\n") }}, {"removed", remove},
		} {
			write(second.Secret())
			accepts("before it is "+gone.name, second, literal)
			r.lines(t)
			gone.do()
			for range 3 {
				accepts(gone.name, literal)
				time.Sleep(time.Second)
			}
			if got, want := a.Fingerprints(), []string{literal.Fingerprint()}; !slices.Equal(got, want) {
				t.Errorf("%s: fingerprints %v, want %v", gone.name, got, want)
			}
			lines := r.lines(t)
			if len(lines) == 0 || lines[0]["level"] != "ERROR" || !strings.Contains(fmt.Sprint(lines[0]["msg"]), "no longer in force") {
				t.Errorf("%s: logged %v, want that first", gone.name, lines)
			}
			if n := strings.Count(fmt.Sprint(lines), "no longer in force"); n != 1 {
				t.Errorf("%s: logged %d times, want once", gone.name, n)
			}
			// Garbage does not bring back what was taken away.
			write("rubbish")
			accepts(gone.name+", then rubbish", literal)
		}
		write(first.Secret())
		accepts("back", first, literal)
	})
}

// A test service with a call and a stream, as the real ones have.
var service = grpc.ServiceDesc{
	ServiceName: "test.Service",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{
		MethodName: "Call",
		Handler: func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
			var in emptypb.Empty
			if err := decode(&in); err != nil {
				return nil, err
			}
			handler := func(context.Context, any) (any, error) {
				srv.(func())()
				return &emptypb.Empty{}, nil
			}
			return interceptor(ctx, &in, &grpc.UnaryServerInfo{Server: srv, FullMethod: "/test.Service/Call"}, handler)
		},
	}},
	Streams: []grpc.StreamDesc{{
		StreamName: "Stream",
		Handler: func(srv any, ss grpc.ServerStream) error {
			srv.(func())()
			return ss.SendMsg(&emptypb.Empty{})
		},
		ServerStreams: true,
	}},
}

// Over a real connection: no handler is reached without a token except health and reflection, all are with our credentials.
func TestServer(t *testing.T) {
	key := NewKey()
	var r recorder
	a := newAuthenticator(t, r.config(Config{Secrets: []string{key.Secret()}}))

	server := grpc.NewServer(grpc.UnaryInterceptor(a.Unary), grpc.StreamInterceptor(a.Stream))
	reached := 0
	server.RegisterService(&service, func() { reached++ })
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	reflection.Register(server)
	listener := bufconn.Listen(1 << 20)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
	dial := func(opts ...grpc.DialOption) *grpc.ClientConn {
		conn, err := grpc.NewClient("passthrough:test", append(opts,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }))...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	call := func(conn *grpc.ClientConn) error {
		return conn.Invoke(t.Context(), "/test.Service/Call", &emptypb.Empty{}, &emptypb.Empty{})
	}
	stream := func(conn *grpc.ClientConn) error {
		s, err := conn.NewStream(t.Context(), &service.Streams[0], "/test.Service/Stream")
		if err != nil {
			return err
		}
		if err := s.SendMsg(&emptypb.Empty{}); err != nil {
			return err
		}
		if err := s.CloseSend(); err != nil {
			return err
		}
		return s.RecvMsg(&emptypb.Empty{})
	}

	nobody := dial()
	wantStatus(t, call(nobody), codes.Unauthenticated, "unauthenticated")
	wantStatus(t, stream(nobody), codes.Unauthenticated, "unauthenticated")
	stranger := dial(grpc.WithPerRPCCredentials(NewCredentials(NewKey())))
	wantStatus(t, call(stranger), codes.Unauthenticated, "invalid JWT")
	wantStatus(t, stream(stranger), codes.Unauthenticated, "invalid JWT")
	if reached > 0 {
		t.Fatalf("%d requests reached a handler", reached)
	}

	if _, err := grpc_health_v1.NewHealthClient(nobody).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Errorf("health without a token: %v", err)
	}
	ri, err := grpc_reflection_v1.NewServerReflectionClient(nobody).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := ri.Send(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	if _, err := ri.Recv(); err != nil {
		t.Errorf("reflection without a token: %v", err)
	}
	if err := ri.CloseSend(); err != nil {
		t.Error(err)
	}

	friend := dial(grpc.WithPerRPCCredentials(NewCredentials(key)))
	if err := errors.Join(call(friend), stream(friend)); err != nil || reached != 2 {
		t.Errorf("with credentials: %v, handlers reached: %d", err, reached)
	}
	// A Pomerium node that forwards sends the caller's token and then its own; the first counts.
	good, bad := fresh(t, key), fresh(t, NewKey())
	for _, tokens := range [][2]string{{good, bad}, {bad, good}} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), MetadataKey, tokens[0], MetadataKey, tokens[1])
		err := nobody.Invoke(ctx, "/test.Service/Call", &emptypb.Empty{}, &emptypb.Empty{})
		if tokens[0] == bad {
			wantStatus(t, err, codes.Unauthenticated, "invalid JWT")
		} else if err != nil {
			t.Errorf("good token first: %v", err)
		}
	}
	wantStatus(t, nobody.Invoke(t.Context(), "/test.Service/Absent", &emptypb.Empty{}, &emptypb.Empty{}), codes.Unimplemented, "unknown method Absent for service test.Service")
}

// Each call gets its own token, which expires an hour later.
func TestCredentials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		key := NewKey()
		credentials := NewCredentials(key)
		if credentials.RequireTransportSecurity() {
			t.Error("requires TLS")
		}
		for range 3 {
			md, err := credentials.GetRequestMetadata(t.Context(), "https://uri")
			if err != nil || len(md) != 1 {
				t.Fatalf("got %v, %v", md, err)
			}
			v := verify(md[MetadataKey], []*signer{newSigner(key, Caller{})}, time.Now())
			if v.reason != "" || v.expires != time.Now().Add(time.Hour).Unix() {
				t.Errorf("got %q, expires %d at %d", v.reason, v.expires, time.Now().Unix())
			}
			time.Sleep(10 * time.Second)
		}
	})
}

func BenchmarkUnary(b *testing.B) {
	key := NewKey()
	file := filepath.Join(b.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(key.Secret()), 0o600); err != nil {
		b.Fatal(err)
	}
	a, err := New(Config{Files: []string{file}})
	if err != nil {
		b.Fatal(err)
	}
	ctx := metadata.NewIncomingContext(context.Background(), metadata.Pairs(MetadataKey, fresh(b, key), "user-agent", "benchmark"))
	info := &grpc.UnaryServerInfo{FullMethod: "/databroker.DataBrokerService/Put"}
	handler := func(context.Context, any) (any, error) { return nil, nil }
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := a.Unary(ctx, nil, info, handler); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
