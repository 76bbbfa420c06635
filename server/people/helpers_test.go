// Package people holds the tests of what people do in SQL: the views, revoking, the audit, the lifetime of
// records, the roles, and every statement of docs/sql.md.
package people

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/device"
	"pgbroker/proto/session"
	"pgbroker/proto/user"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

const (
	sessionType = "type.googleapis.com/session.Session"
	userType    = "type.googleapis.com/user.User"

	// secretText is in every secret field of every record that these tests write.
	secretText = "s3cr3t-t0ken"

	// patience is how long a test waits for what a sound server does at once.
	patience = 40 * time.Second
)

// record returns a record whose payload is a message.
func record(t testing.TB, recordType, id string, payload proto.Message) *databroker.Record {
	t.Helper()
	data, err := anypb.New(payload)
	if err != nil {
		t.Fatal(err)
	}
	if recordType == "" {
		recordType = data.GetTypeUrl()
	}
	return &databroker.Record{Type: recordType, Id: id, Data: data}
}

// aSession returns a session with secrets.
func aSession(id, userID, idpID string, issued, accessed, expires time.Time) *session.Session {
	email := structpb.NewStringValue(userID + "@example.com")
	name := structpb.NewStringValue(strings.ToUpper(userID[:1]) + userID[1:])
	return &session.Session{
		Id: id, UserId: userID, IdpId: idpID,
		IssuedAt: timestamppb.New(issued), AccessedAt: timestamppb.New(accessed), ExpiresAt: timestamppb.New(expires),
		OauthToken: &session.OAuthToken{AccessToken: secretText, RefreshToken: secretText, ExpiresAt: timestamppb.New(expires)},
		IdToken:    &session.IDToken{Issuer: "https://" + idpID + ".example.com", Subject: userID, Raw: secretText},
		Claims: map[string]*structpb.ListValue{
			"email": {Values: []*structpb.Value{email}}, "name": {Values: []*structpb.Value{name}},
		},
		Audience: []string{"app.example.com"},
		DeviceCredentials: []*session.Session_DeviceCredential{
			{TypeId: "any", Credential: &session.Session_DeviceCredential_Id{Id: "credential-" + userID}},
		},
	}
}

func object(t testing.TB, fields map[string]any) *structpb.Struct {
	t.Helper()
	s, err := structpb.NewStruct(fields)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t testing.TB, r *servertest.Replica, records ...*databroker.Record) []*databroker.Record {
	t.Helper()
	response, err := r.Put(context.Background(), &databroker.PutRequest{Records: records})
	if err != nil {
		t.Fatal(err)
	}
	return response.GetRecords()
}

func deletion(recordType, id string) *databroker.Record {
	return &databroker.Record{Type: recordType, Id: id, DeletedAt: timestamppb.Now()}
}

// quiet starts a broker whose periodic work the test does not meet.
func quiet(c *server.Config) { c.MaintenanceInterval = time.Hour }

// busy starts a broker whose periodic work is always due.
func busy(c *server.Config) { c.MaintenanceInterval = 10 * time.Millisecond }

// column returns the first column of a query.
func column[T any](t testing.TB, d *dbtest.Database, sql string, args ...any) []T {
	t.Helper()
	rows, err := d.Pool.Query(context.Background(), sql, args...)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	values, err := pgx.CollectRows(rows, pgx.RowTo[T])
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return values
}

func value[T any](t testing.TB, d *dbtest.Database, sql string, args ...any) T {
	t.Helper()
	values := column[T](t, d, sql, args...)
	if len(values) != 1 {
		t.Fatalf("%s: %d rows, want one", sql, len(values))
	}
	return values[0]
}

// awaitDeletions waits until a stream has delivered the deletion of each of the given ids, and fails if it
// delivers the deletion of another one.
func awaitDeletions(t testing.TB, r *servertest.Replica, recordType string, after *databroker.ServerInfoResponse, ids ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stream, err := r.Sync(ctx, &databroker.SyncRequest{
		ServerVersion: after.GetServerVersion(), RecordVersion: after.GetLatestRecordVersion(), Type: recordType,
	})
	if err != nil {
		t.Fatal(err)
	}
	missing := make(map[string]bool)
	for _, id := range ids {
		missing[id] = true
	}
	for len(missing) > 0 {
		response, err := stream.Recv()
		if err != nil {
			t.Fatalf("waiting for the deletion of %v: %v", missing, err)
		}
		if got := response.GetRecord(); got.GetDeletedAt() != nil {
			if !missing[got.GetId()] {
				t.Errorf("%s was deleted", got.GetId())
			}
			delete(missing, got.GetId())
		}
	}
}

func position(t testing.TB, r *servertest.Replica) *databroker.ServerInfoResponse {
	t.Helper()
	info, err := r.ServerInfo(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// roles makes a reader, a writer, a server and perhaps a revoker with what the grants give them, and drops them when the test
// ends. Roles belong to the whole server, so their names have to be the test's own.
func roles(t testing.TB, d *dbtest.Database, reader, writer, server string, revoker ...string) {
	t.Helper()
	for _, name := range append([]string{reader, writer, server}, revoker...) {
		d.Role(t, name)
	}
	grant := func() {
		d.Exec(t, strings.Join(column[string](t, d, `SELECT pgbroker.grants($1, $2, $3, $4)`, reader, writer, server, strings.Join(revoker, "")), "\n"))
	}
	grant()
	grant() // may be repeated
}

// logged keeps what a replica logs.
type logged struct {
	mu   sync.Mutex // protects text
	text strings.Builder
}

func (l *logged) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// Write implements io.Writer.
func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// deviceOf returns what a user's device leaves.
func deviceOf(t testing.TB, userID, approvedBy string, enrolled time.Time) []*databroker.Record {
	t.Helper()
	return []*databroker.Record{
		record(t, "", "enrollment-"+userID, &device.Enrollment{
			Id: "enrollment-" + userID, UserId: userID, ApprovedBy: approvedBy, EnrolledAt: timestamppb.New(enrolled),
			UserAgent: "Firefox on Linux", IpAddress: "192.0.2.7", TypeId: "any", CredentialId: "credential-" + userID,
		}),
		record(t, "", "credential-"+userID, &device.Credential{
			Id: "credential-" + userID, UserId: userID, TypeId: "any", EnrollmentId: "enrollment-" + userID,
			Specifier: &device.Credential_Webauthn{Webauthn: &device.Credential_WebAuthn{RegisterResponse: []byte(secretText)}},
		}),
	}
}

func aUser(t testing.TB, id, name string) *databroker.Record {
	t.Helper()
	return record(t, "", id, &user.User{Id: id, Name: name, Email: id + "@example.com"})
}
