package conformance_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/registry"
	"pgbroker/server"
	"pgbroker/server/auth"
	"pgbroker/server/servertest"
)

// sharedKey is the key that servertest.Secret stands for.
func sharedKey() []byte {
	key, err := base64.StdEncoding.DecodeString(servertest.Secret)
	if err != nil {
		panic(err)
	}
	return key
}

// sign returns a token with the claims.
func sign(t *testing.T, method jwt.SigningMethod, key any, claims jwt.MapClaims) string {
	t.Helper()
	token, err := jwt.NewWithClaims(method, claims).SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// rawToken returns a token made of a header and claims that are taken as they are.
func rawToken(header, claims string) string {
	encode := base64.RawURLEncoding.EncodeToString
	input := encode([]byte(header)) + "." + encode([]byte(claims))
	mac := hmac.New(sha256.New, sharedKey())
	mac.Write([]byte(input))
	return input + "." + encode(mac.Sum(nil))
}

// plainConn is a connection that sends no token of its own.
func plainConn(t *testing.T, r *servertest.Replica) *grpc.ClientConn {
	t.Helper()
	return servertest.Dial(t, r.Address, "")
}

// withTokens adds values of the metadata key jwt.
func withTokens(ctx context.Context, tokens ...string) context.Context {
	var pairs []string
	for _, token := range tokens {
		pairs = append(pairs, "jwt", token)
	}
	return metadata.AppendToOutgoingContext(ctx, pairs...)
}

// callEverything calls each method of each protected service and passes its error on.
func callEverything(ctx context.Context, conn *grpc.ClientConn, report func(method string, err error)) {
	for _, desc := range []grpc.ServiceDesc{databroker.DataBrokerService_ServiceDesc, databroker.CheckpointService_ServiceDesc, registry.Registry_ServiceDesc} {
		for _, method := range desc.Methods {
			name := "/" + desc.ServiceName + "/" + method.MethodName
			// An empty message is a request of each of them.
			report(name, conn.Invoke(ctx, name, new(emptypb.Empty), new(emptypb.Empty)))
		}
		for i := range desc.Streams {
			name := "/" + desc.ServiceName + "/" + desc.Streams[i].StreamName
			stream, err := conn.NewStream(ctx, &desc.Streams[i], name)
			if err == nil {
				if err = stream.SendMsg(new(emptypb.Empty)); err == nil || errors.Is(err, io.EOF) {
					err = stream.RecvMsg(new(emptypb.Empty))
				}
			}
			report(name, err)
		}
	}
}

// TestS15_NothingWithoutAToken: every method of every service wants one, except health and reflection.
func TestS15_NothingWithoutAToken(t *testing.T) {
	t.Parallel()
	b := start(t)
	conn := plainConn(t, b.Replica)
	before := position(t, b)
	calls := 0
	callEverything(testContext(t), conn, func(method string, err error) {
		calls++
		if !isCode(err, codes.Unauthenticated) {
			t.Errorf("%s without a token: %v", method, err)
			return
		}
		wantStatus(t, err, codes.Unauthenticated, "unauthenticated")
	})
	if calls != 14+2+3 {
		t.Errorf("%d methods, the contract has 19", calls)
	}
	callEverything(withTokens(testContext(t), "garbage"), conn, func(method string, err error) {
		if !isCode(err, codes.Unauthenticated) {
			t.Errorf("%s with a bad token: %v", method, err)
			return
		}
		wantStatus(t, err, codes.Unauthenticated, "invalid JWT")
	})
	same(t, "versions: nothing was done, not even Clear", position(t, b), before)
}

// TestS15_BadTokens: every kind, and each is told the same.
func TestS15_BadTokens(t *testing.T) {
	t.Parallel()
	b := start(t)
	now := time.Now()
	hour := jwt.MapClaims{"exp": now.Add(time.Hour).Unix()}
	other := make([]byte, 32)
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := sign(t, jwt.SigningMethodHS256, sharedKey(), hour)
	parts := strings.Split(good, ".")
	const hs256 = `{"alg":"HS256","typ":"JWT"}`
	exp := fmt.Sprint(now.Add(time.Hour).Unix())
	extra := func(name string, value any) string {
		return sign(t, jwt.SigningMethodHS256, sharedKey(), jwt.MapClaims{"exp": hour["exp"], name: value})
	}
	client := databroker.NewDataBrokerServiceClient(plainConn(t, b.Replica))
	for name, tokens := range map[string][]string{
		"empty":                   {""},
		"garbage":                 {"garbage"},
		"two parts":               {parts[0] + "." + parts[1]},
		"four parts":              {good + ".x"},
		"dots":                    {".."},
		"no signature":            {parts[0] + "." + parts[1] + "."},
		"cut off":                 {good[:len(good)-2]},
		"other claims, signature": {parts[0] + "." + base64.RawURLEncoding.EncodeToString([]byte(`{"exp":9999999999}`)) + "." + parts[2]},
		"bearer":                  {"Bearer " + good},
		"white space":             {parts[0] + " ." + parts[1] + "." + parts[2]},
		"other key":               {sign(t, jwt.SigningMethodHS256, other, hour)},
		"the secret, not its key": {sign(t, jwt.SigningMethodHS256, []byte(servertest.Secret), hour)},
		"empty key":               {sign(t, jwt.SigningMethodHS256, []byte{}, hour)},
		"algorithm none":          {sign(t, jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, hour)},
		"algorithm none, signed":  {rawToken(`{"alg":"none"}`, `{"exp":`+exp+`}`)},
		"algorithm NONE":          {rawToken(`{"alg":"NONE"}`, `{"exp":`+exp+`}`)},
		"algorithm ES256":         {sign(t, jwt.SigningMethodES256, ecKey, hour)},
		"algorithm RS256":         {rawToken(`{"alg":"RS256"}`, `{"exp":`+exp+`}`)},
		"no algorithm":            {rawToken(`{}`, `{"exp":`+exp+`}`)},
		"header that is no JSON":  {rawToken(`x`, `{"exp":`+exp+`}`)},
		"critical extension":      {rawToken(`{"alg":"HS256","crit":["b64"],"b64":false}`, `{"exp":`+exp+`}`)},
		"expired":                 {sign(t, jwt.SigningMethodHS256, sharedKey(), jwt.MapClaims{"exp": now.Add(-2 * time.Second).Unix()})},
		"expired long ago":        {sign(t, jwt.SigningMethodHS256, sharedKey(), jwt.MapClaims{"exp": 0})},
		"expired before 1970":     {sign(t, jwt.SigningMethodHS256, sharedKey(), jwt.MapClaims{"exp": -1})},
		"no claims":               {sign(t, jwt.SigningMethodHS256, sharedKey(), jwt.MapClaims{})},
		"no exp":                  {sign(t, jwt.SigningMethodHS256, sharedKey(), jwt.MapClaims{"iat": now.Unix()})},
		"extra claim iat":         {extra("iat", now.Unix())},
		"extra claim nbf":         {extra("nbf", now.Unix())},
		"extra claim iss":         {extra("iss", "somebody")},
		"extra claim of null":     {extra("x", nil)},
		"exp twice":               {rawToken(hs256, `{"exp":`+exp+`,"exp":`+exp+`}`)},
		"exp as text":             {rawToken(hs256, `{"exp":"`+exp+`"}`)},
		"exp of null":             {rawToken(hs256, `{"exp":null}`)},
		"exp in capitals":         {rawToken(hs256, `{"EXP":`+exp+`}`)},
		"claims in a list":        {rawToken(hs256, `[`+exp+`]`)},
		"claims that are no JSON": {rawToken(hs256, `x`)},
		"something after claims":  {rawToken(hs256, `{"exp":`+exp+`}{}`)},
		"very long":               {good + strings.Repeat("A", 1<<15)},
		"bad one before good one": {"garbage", good},
		"empty one before good":   {"", good},
	} {
		_, err := client.ServerInfo(withTokens(testContext(t), tokens...), new(emptypb.Empty))
		if !isCode(err, codes.Unauthenticated) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		wantStatus(t, err, codes.Unauthenticated, "invalid JWT")
		stream, err := client.SyncLatest(withTokens(testContext(t), tokens...), new(databroker.SyncLatestRequest))
		if err == nil {
			_, err = stream.Recv()
		}
		wantStatus(t, err, codes.Unauthenticated, "invalid JWT")
	}
}

// TestS15_GoodTokens: what real clients send, and what the contract admits.
func TestS15_GoodTokens(t *testing.T) {
	t.Parallel()
	b := start(t)
	client := databroker.NewDataBrokerServiceClient(plainConn(t, b.Replica))
	hour := jwt.MapClaims{"exp": time.Now().Add(time.Hour).Unix()}
	good := sign(t, jwt.SigningMethodHS256, sharedKey(), hour)
	for name, tokens := range map[string][]string{
		"HS256":                   {good},
		"HS384":                   {sign(t, jwt.SigningMethodHS384, sharedKey(), hour)},
		"HS512":                   {sign(t, jwt.SigningMethodHS512, sharedKey(), hour)},
		"other header":            {rawToken(`{"typ":"JWT","alg":"HS256","kid":"x"}`, `{"exp": 4102444800}`)},
		"exp with a fraction":     {rawToken(`{"alg":"HS256"}`, `{"exp":4102444800.5}`)},
		"forwarded by a follower": {good, sign(t, jwt.SigningMethodHS256, sharedKey(), hour)},
		"good one before bad one": {good, "garbage"},
	} {
		if _, err := client.ServerInfo(withTokens(testContext(t), tokens...), new(emptypb.Empty)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What else callers and proxies send is of no interest.
	ctx := metadata.AppendToOutgoingContext(withTokens(testContext(t), good),
		"x-request-id", "4fQ", "pomerium-cluster-request-mode", "nonsense", "pomerium-forwarder-id", "f0c2a1d8-0000-4000-8000-000000000000",
		"sessionid", "x", "x-envoy-attempt-count", "1", "x-forwarded-proto", "http", "authorization", "Bearer x")
	if _, err := client.ServerInfo(ctx, new(emptypb.Empty)); err != nil {
		t.Errorf("with the metadata of a follower behind a proxy: %v", err)
	}
}

// TestS15_HealthAndReflectionNeedNoToken: health answers for any service name.
func TestS15_HealthAndReflectionNeedNoToken(t *testing.T) {
	t.Parallel()
	b := start(t)
	conn := plainConn(t, b.Replica)
	for _, token := range []string{"", "garbage"} {
		ctx := testContext(t)
		if token != "" {
			ctx = withTokens(ctx, token)
		}
		health := grpc_health_v1.NewHealthClient(conn)
		for _, service := range []string{"", "pomerium-databroker", "databroker.DataBrokerService", "anything"} {
			response, err := health.Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
			if err != nil || response.Status != grpc_health_v1.HealthCheckResponse_SERVING {
				t.Errorf("health of %q: %v, %v", service, response.GetStatus(), err)
			}
			watch, err := health.Watch(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
			if err != nil {
				t.Fatal(err)
			}
			if response, err := watch.Recv(); err != nil || response.Status != grpc_health_v1.HealthCheckResponse_SERVING {
				t.Errorf("watch of the health of %q: %v, %v", service, response.GetStatus(), err)
			}
		}
		v1, err := grpc_reflection_v1.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := v1.Send(&grpc_reflection_v1.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{}}); err != nil {
			t.Fatal(err)
		}
		response, err := v1.Recv()
		if err != nil {
			t.Fatalf("reflection: %v", err)
		}
		services := response.GetListServicesResponse().GetService()
		for _, want := range []string{"databroker.DataBrokerService", "databroker.CheckpointService", "registry.Registry", "grpc.health.v1.Health"} {
			if !contains(services, func(s *grpc_reflection_v1.ServiceResponse) bool { return s.Name == want }) {
				t.Errorf("reflection does not list %s", want)
			}
		}
		alpha, err := grpc_reflection_v1alpha.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
		if err != nil {
			t.Fatal(err)
		}
		//nolint:staticcheck // deprecated, and still what many clients ask for
		if err := alpha.Send(&grpc_reflection_v1alpha.ServerReflectionRequest{MessageRequest: &grpc_reflection_v1alpha.ServerReflectionRequest_ListServices{}}); err != nil {
			t.Fatal(err)
		}
		if _, err := alpha.Recv(); err != nil {
			t.Errorf("reflection, older form: %v", err)
		}
	}
}

// TestAStreamOutlivesItsToken: tokens are looked at when a stream starts.
func TestAStreamOutlivesItsToken(t *testing.T) {
	t.Parallel()
	b := start(t)
	client := databroker.NewDataBrokerServiceClient(plainConn(t, b.Replica))
	token := sign(t, jwt.SigningMethodHS256, sharedKey(), jwt.MapClaims{"exp": time.Now().Add(2 * time.Second).Unix()})
	from := position(t, b)
	stream, err := client.Sync(withTokens(testContext(t), token), &databroker.SyncRequest{ServerVersion: from.ServerVersion, Type: bindingType})
	if err != nil {
		t.Fatal(err)
	}
	s := &syncStream{t: t, stream: stream}
	s.nextOptions() // it has been admitted
	for expired := false; !expired; {
		_, err := client.ServerInfo(withTokens(testContext(t), token), new(emptypb.Empty))
		expired = isCode(err, codes.Unauthenticated)
		if err != nil && !expired {
			t.Fatal(err)
		}
	}
	put(t, b, newRecord(bindingType, "k", new(emptypb.Empty)))
	s.change()
}

// TestUnknownMethods are unimplemented, whoever asks.
func TestUnknownMethods(t *testing.T) {
	t.Parallel()
	b := start(t)
	conn, err := grpc.NewClient(b.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, method := range []string{"/databroker.DataBrokerService/NoSuchMethod", "/no.such.Service/Method", "/x"} {
		err := conn.Invoke(testContext(t), method, new(emptypb.Empty), new(emptypb.Empty))
		wantStatus(t, err, codes.Unimplemented, "")
	}
}

// TestEveryMethodHasItsAccess: somebody has decided on every method which access it needs, and the server goes by that.
func TestEveryMethodHasItsAccess(t *testing.T) {
	t.Parallel()
	secrets := map[auth.Access]string{
		auth.AccessRead:  "cmVhZCBzaGFyZWQgc2VjcmV0IG9mIDMyIGJ5dGVzISE=",
		auth.AccessWrite: "d3JpdGUgc2hhcmVkIHNlY3JldCBvZiAzMiBieXRlcyE=",
		auth.AccessAdmin: "YWRtaW4gc2hhcmVkIHNlY3JldCBvZiAzMiBieXRlcyE=",
	}
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) {
		for access, secret := range secrets {
			c.Auth.Keys = append(c.Auth.Keys, auth.NamedKey{Name: "key-" + access.String(), Secret: secret, Access: access})
		}
	}})
	var offered []string
	for service, info := range b.Server.Services() {
		for _, method := range info.Methods {
			if name := "/" + service + "/" + method.Name; !auth.Public(name) {
				offered = append(offered, name)
			}
		}
	}
	slices.Sort(offered)
	if decided := auth.Methods(); !slices.Equal(offered, decided) {
		t.Errorf("the server offers\n%v, access is decided on for\n%v", offered, decided)
	}
	for access, secret := range secrets {
		ctx, cancel := context.WithTimeout(testContext(t), 20*time.Second)
		callEverything(ctx, servertest.Dial(t, b.Address, secret), func(method string, err error) {
			if denied := auth.Needed(method) > access; denied != isCode(err, codes.PermissionDenied) {
				t.Errorf("%s with access %v: %v", method, access, err)
			}
		})
		cancel()
	}
}
