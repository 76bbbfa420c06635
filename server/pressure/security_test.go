package pressure

import (
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/registry"
	"pgbroker/proto/session"
	"pgbroker/server"
	"pgbroker/server/auth"
	"pgbroker/server/servertest"
)

// TestSecurityClaimsHaveTests keeps docs/security.md true: every claim in its tables names a test, and every test that it
// names exists.
func TestSecurityClaimsHaveTests(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	written := make(map[string]bool)
	err = filepath.WalkDir("../..", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, decl := range file.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil {
				written[f.Name.Name] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile("`((?:Test|Fuzz)[A-Za-z0-9_]+)`")
	for _, match := range names.FindAllSubmatch(text, -1) {
		if !written[string(match[1])] {
			t.Errorf("docs/security.md names %s, which does not exist", match[1])
		}
	}
	claims := 0
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|---") || strings.HasPrefix(line, "| claim") {
			continue
		}
		claims++
		if !names.MatchString(line) {
			t.Errorf("a claim without a test: %s", line)
		}
	}
	if claims < 20 {
		t.Errorf("only %d claims were found", claims)
	}
}

func secretSession(t *testing.T, id, secret string) *databroker.Record {
	t.Helper()
	data, err := anypb.New(&session.Session{
		Id: id, UserId: "u", IdToken: &session.IDToken{Raw: secret}, OauthToken: &session.OAuthToken{AccessToken: secret, RefreshToken: secret},
	})
	if err != nil {
		t.Fatal(err)
	}
	return &databroker.Record{Type: "type.googleapis.com/session.Session", Id: id, Data: data}
}

// TestATokenCanBeReplayedUntilItExpires: a token says nothing of the request that it comes with, so whoever overhears one
// may use it. This is the wire contract's; TLS is what keeps it from being overheard.
func TestATokenCanBeReplayedUntilItExpires(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	key, err := auth.ParseKey(servertest.Secret)
	if err != nil {
		t.Fatal(err)
	}
	overheard, err := auth.NewCredentials(key).GetRequestMetadata(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stranger := databroker.NewDataBrokerServiceClient(servertest.Dial(t, b.Address, ""))
	ctx := metadata.NewOutgoingContext(testContext(t), metadata.New(overheard))
	for range 2 {
		if _, err := stranger.ServerInfo(ctx, new(emptypb.Empty)); err != nil {
			t.Errorf("a token that was overheard: %v", err)
		}
	}
	if auth.TokenLifetime > time.Hour {
		t.Errorf("our own tokens are valid for %v", auth.TokenLifetime)
	}
}

// TestAStreamEndsWithItsSecret: a secret that is taken away opens nothing any more, and what it has opened ends.
func TestAStreamEndsWithItsSecret(t *testing.T) {
	t.Parallel()
	const newer = "bmV3ZXIgc2hhcmVkIHNlY3JldCBvZiAzMiBieXRlcyE="
	path := filepath.Join(t.TempDir(), "secret")
	write := func(secret string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(secret), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	write(servertest.Secret)
	const other = "b3RoZXIgc2hhcmVkIHNlY3JldCBvZiAzMiBieXRlcyE="
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) {
		c.Auth = auth.Config{Files: []string{path}, Keys: []auth.NamedKey{{Name: "other", Secret: other, Access: auth.AccessRead}}}
	}})
	stream := follow(testContext(t), t, b.Conn, present(t, b))
	stays := follow(testContext(t), t, servertest.Dial(t, b.Address, other), present(t, b))
	put(t, b, thing("a", 0))
	wantNext(t, []syncStream{stream, stays}, "a")
	write(newer)
	if _, err := nextRecord(stream); status.Code(err) != codes.Unauthenticated {
		t.Errorf("the stream of the old secret: %v", err)
	}
	if _, err := b.ServerInfo(testContext(t), new(emptypb.Empty)); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a request with the old secret: %v", err)
	}
	renewed := databroker.NewDataBrokerServiceClient(servertest.Dial(t, b.Address, newer))
	put(t, renewed, thing("b", 0))
	wantNext(t, []syncStream{stays}, "b")

	// Taken away without another one.
	stream = follow(testContext(t), t, servertest.Dial(t, b.Address, newer), present(t, renewed))
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := nextRecord(stream); status.Code(err) != codes.Unauthenticated {
		t.Errorf("the stream of the secret whose file was deleted: %v", err)
	}
	if _, err := renewed.ServerInfo(testContext(t), new(emptypb.Empty)); status.Code(err) != codes.Unauthenticated {
		t.Errorf("a request with the secret whose file was deleted: %v", err)
	}
}

// role opens a connection of another role to a broker's database.
func role(t *testing.T, b *servertest.Broker, name string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), b.Database.As(t, name))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// TestAReaderSeesNoTokens: who may read the views of people sees them and nothing else, and changes nothing.
func TestAReaderSeesNoTokens(t *testing.T) {
	t.Parallel()
	const secret = "s3cr3t-t0k3n"
	b := servertest.New(t, servertest.Options{})
	put(t, b, secretSession(t, "s", secret))
	reader := role(t, b, dbtest.ReaderRole)
	var text string
	if err := reader.QueryRow(t.Context(), "SELECT to_jsonb(s)::text FROM pgbroker.sessions s").Scan(&text); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(text, secret) || !strings.Contains(text, `"s"`) {
		t.Errorf("the view shows %s", text)
	}
	for _, statement := range []string{
		"SELECT payload FROM pgbroker.records", "SELECT * FROM pgbroker.changes", "SELECT * FROM pgbroker.leases",
		"DELETE FROM pgbroker.sessions", "SELECT pgbroker.revoke_session('s')", "TRUNCATE pgbroker.records", "SELECT nextval('pgbroker.record_version')",
		"UPDATE pgbroker.state SET server_version = 1", "SELECT * FROM pgbroker.write_records('{t}', '{a}', '{f}', '{x}', '{}', '{}', '{}', '{1}', '{0}', '{}', '{}')",
		"CREATE TABLE pgbroker.mine (x int)", "CREATE FUNCTION pgbroker.mine() RETURNS int LANGUAGE sql RETURN 1", "DROP SCHEMA pgbroker CASCADE",
	} {
		if _, err := reader.Exec(t.Context(), statement); err == nil || !strings.Contains(err.Error(), "42501") {
			t.Errorf("%s: %v, want it to be denied", statement, err)
		}
	}
	get := func() error {
		_, err := b.Get(testContext(t), &databroker.GetRequest{Type: "type.googleapis.com/session.Session", Id: "s"})
		return err
	}
	if err := get(); err != nil {
		t.Error(err)
	}
}

// TestTheServerNeedsNoMoreThanItsGrants: a replica whose role has what `migrate grants` gives it can do all of its work, and its
// role cannot change the schema.
func TestTheServerNeedsNoMoreThanItsGrants(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	ctx := testContext(t)
	stream := follow(ctx, t, b.Conn, present(t, b))
	put(t, b, thing("a", 10))
	wantNext(t, []syncStream{stream}, "a")
	get(t, b, "a")
	lease, err := b.AcquireLease(ctx, &databroker.AcquireLeaseRequest{Name: "l", Duration: durationpb.New(time.Minute)})
	for what, err := range map[string]error{
		"acquire a lease": err,
		"release a lease": second(b.ReleaseLease(ctx, &databroker.ReleaseLeaseRequest{Name: "l", Id: lease.GetId()})),
		"patch":           second(b.Patch(ctx, &databroker.PatchRequest{Records: []*databroker.Record{thing("a", 20)}})),
		"query":           second(b.Query(ctx, &databroker.QueryRequest{Type: "t", Limit: 1})),
		"set options":     second(b.SetOptions(ctx, &databroker.SetOptionsRequest{Type: "t", Options: &databroker.Options{IndexableFields: []string{"a"}}})),
		"report":          second(b.Registry.Report(ctx, new(registry.RegisterRequest))),
		"checkpoint":      second(b.Checkpoints.SetCheckpoint(ctx, &databroker.SetCheckpointRequest{Checkpoint: new(databroker.Checkpoint)})),
		"clear":           second(b.Clear(ctx, new(emptypb.Empty))),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	app := role(t, b, dbtest.ServerRole)
	for _, statement := range []string{
		"DROP TABLE pgbroker.records", "ALTER TABLE pgbroker.records DISABLE TRIGGER ALL", "CREATE TABLE pgbroker.mine (x int)",
		"DROP TRIGGER records_order ON pgbroker.records", "CREATE OR REPLACE FUNCTION pgbroker.lock_order() RETURNS void LANGUAGE sql AS ''",
	} {
		if _, err := app.Exec(t.Context(), statement); err == nil || !strings.Contains(err.Error(), "42501") {
			t.Errorf("%s: %v, want it to be denied", statement, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestAStrangerInTheDatabaseIsNamed: locks of the database are for all who may connect to it, so a role without any rights
// in the schema can hold up writes; it is named like any other.
func TestAStrangerInTheDatabaseIsNamed(t *testing.T) {
	t.Parallel()
	b, _, log := watched(t, servertest.Options{})
	name := newRole(t, b.Database)
	b.Database.Exec(t, "REVOKE ALL ON ALL TABLES IN SCHEMA pgbroker FROM "+name+"; REVOKE ALL ON SCHEMA pgbroker FROM "+name)
	stranger := role(t, b, name)
	if _, err := stranger.Exec(t.Context(), "SELECT pg_advisory_lock(7236837420591218)"); err != nil {
		t.Fatal(err)
	}
	await(t, "a log line that names the stranger", func() bool {
		wantStatus(t, tryPut(t, b, "a"), codes.Unavailable, blocked)
		return len(log.lines(reported, "user="+name)) > 0
	})
	stranger.Close(t.Context())
	put(t, b, thing("a", 0))
}

// TestNotificationsCarryNothing: who listens in the database hears that something has changed, and not what.
func TestNotificationsCarryNothing(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	conn := b.Database.Connect(t)
	if _, err := conn.Exec(t.Context(), "LISTEN pgbroker_changes"); err != nil {
		t.Fatal(err)
	}
	put(t, b, secretSession(t, "s", "s3cr3t-t0k3n"))
	notification, err := conn.WaitForNotification(testContext(t))
	if err != nil || notification.Payload != "" {
		t.Errorf("heard %v, %v", notification, err)
	}
}

// TestQueriesOfReplicasHoldNoValues: what other roles see of a replica's queries, in pg_stat_activity or in logs of
// statements, has parameters in place of values.
func TestQueriesOfReplicasHoldNoValues(t *testing.T) {
	t.Parallel()
	const secret = "s3cr3t-t0k3n"
	b := servertest.New(t, servertest.Options{})
	put(t, b, secretSession(t, secret, secret))
	if _, err := b.Query(testContext(t), &databroker.QueryRequest{Query: secret, Limit: 1}); err != nil {
		t.Fatal(err)
	}
	rows, err := b.Database.Admin(t).Query(t.Context(),
		"SELECT query FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'pgbroker%'")
	if err != nil {
		t.Fatal(err)
	}
	queries, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(queries) == 0 {
		t.Fatalf("%d queries, %v", len(queries), err)
	}
	for _, query := range queries {
		if strings.Contains(query, secret) {
			t.Errorf("it shows: %s", query)
		}
	}
}

// TestReflectionShowsNoData: the other thing that needs no token, beside health, describes methods and messages, which are
// public anyway.
func TestReflectionShowsNoData(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	stranger := servertest.Dial(t, b.Address, "")
	open := make(map[string]bool)
	for service, info := range b.Server.Services() {
		for _, method := range info.Methods {
			stream, err := stranger.NewStream(testContext(t), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/"+service+"/"+method.Name)
			if err == nil {
				if err = stream.CloseSend(); err == nil {
					err = stream.RecvMsg(new(emptypb.Empty))
				}
			}
			if status.Code(err) != codes.Unauthenticated {
				open[service] = true
			}
		}
	}
	for service := range open {
		switch service {
		case "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection":
		default:
			t.Errorf("%s answers without a token", service)
		}
	}
	if len(open) < 2 {
		t.Errorf("only %v answer without a token: this test proves nothing", open)
	}
}

// TestTheServersLogHoldsNoTokens: of statements that fail, the log of an embedded PostgreSQL has neither text, nor parameters, nor rows.
func TestTheServersLogHoldsNoTokens(t *testing.T) {
	t.Parallel()
	const secret = "hunter2-t0ken"
	postgres := dbtest.Server(t, nil)
	migrate(t, postgres.ConnString())
	conn, err := pgx.Connect(t.Context(), postgres.ConnString())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for _, statement := range []struct {
		sql       string
		arguments []any
	}{
		{"INSERT INTO pgbroker.records (type, id, payload) VALUES ('t', NULL, '" + secret + "')", nil}, // in the text, and in the row
		{"INSERT INTO pgbroker.records (type, id) VALUES (NULL, $1)", []any{secret}},                   // in a parameter, and in the row
		{"INSERT INTO pgbroker.records (type, id, data) VALUES ('type.googleapis.com/session.Session', 'a', $1)", []any{`{"id": "` + secret + `", "id_token": {"raw": 7}}`}},
	} {
		if _, err := conn.Exec(t.Context(), statement.sql, statement.arguments...); err == nil {
			t.Fatalf("%s succeeds", statement.sql)
		}
	}
	if _, err := conn.Exec(t.Context(), "DO $$ BEGIN RAISE LOG 'the end of the log'; END $$"); err != nil {
		t.Fatal(err)
	}
	var log string
	await(t, "the end of the log", func() bool {
		b, err := os.ReadFile(postgres.LogFile())
		if err != nil {
			t.Fatal(err)
		}
		log = string(b)
		return strings.Contains(log, "the end of the log")
	})
	for line := range strings.Lines(log) {
		if strings.Contains(line, secret) {
			t.Errorf("in the log: %s", line)
		}
	}
}
