package pressure

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// TestRowLevelSecurityIsNoticed: policies that are turned on while a replica runs make it say that it cannot serve, and why. No record
// looks as if it were not there.
func TestRowLevelSecurityIsNoticed(t *testing.T) {
	t.Parallel()
	log := new(logBook)
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) {
		c.Logger, c.PollInterval = slog.New(slog.NewTextHandler(log, nil)), 100*time.Millisecond
	}})
	if _, err := b.Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{{Type: "t", Id: "a"}}}); err != nil {
		t.Fatal(err)
	}
	b.Database.Exec(t, "ALTER TABLE pgbroker.records ENABLE ROW LEVEL SECURITY")
	if _, err := b.Get(t.Context(), &databroker.GetRequest{Type: "t", Id: "a"}); status.Code(err) != codes.Unavailable {
		t.Errorf("get: got %v, want Unavailable", err)
	}
	if got, err := b.Query(t.Context(), &databroker.QueryRequest{Type: "t", Limit: 1}); status.Code(err) != codes.Unavailable {
		t.Errorf("query: got %v (%v), want Unavailable", got, err)
	}
	b.AwaitHealth(t, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	b.AwaitHealthFor(t, server.HealthWriting, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	for len(log.lines("level=ERROR", "hides rows of pgbroker.records", "DISABLE ROW LEVEL SECURITY")) == 0 {
		time.Sleep(10 * time.Millisecond) // the feed may have noticed before
	}
	b.Database.Exec(t, "ALTER TABLE pgbroker.records DISABLE ROW LEVEL SECURITY")
	b.AwaitHealth(t, grpc_health_v1.HealthCheckResponse_SERVING)
	b.AwaitHealthFor(t, server.HealthWriting, grpc_health_v1.HealthCheckResponse_SERVING)
	if _, err := b.Get(t.Context(), &databroker.GetRequest{Type: "t", Id: "a"}); err != nil {
		t.Errorf("get: %v", err)
	}
}

// TestRevokingUnderRowLevelSecurity: what revokes in SQL fails where policies hide sessions from the owner, too, and does not say
// that there are none.
func TestRevokingUnderRowLevelSecurity(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data)
		VALUES ('type.googleapis.com/session.Session', 's', '{"user_id": "jane", "idp_id": "okta"}')`)
	d.Exec(t, "ALTER TABLE pgbroker.records ENABLE ROW LEVEL SECURITY; ALTER TABLE pgbroker.records FORCE ROW LEVEL SECURITY")
	conn := d.Connect(t)
	if _, err := conn.Exec(t.Context(), "SET row_security = on"); err != nil {
		t.Fatal(err)
	}
	for _, call := range []string{"revoke_session('s')", "revoke_user_sessions('jane')", "revoke_idp_sessions('okta')"} {
		if _, err := conn.Exec(t.Context(), "SELECT pgbroker."+call); err == nil || !strings.Contains(err.Error(), "row-level security") {
			t.Errorf("%s: got %v, want an error that names row-level security", call, err)
		}
	}
	d.Exec(t, "ALTER TABLE pgbroker.records NO FORCE ROW LEVEL SECURITY") // the owner sees all again, and so do its functions
	var revoked bool
	if err := conn.QueryRow(t.Context(), "SELECT pgbroker.revoke_session('s')").Scan(&revoked); err != nil || !revoked {
		t.Errorf("revoked %v, %v", revoked, err)
	}
}

// TestMissingRightsAreNamed: each right that a replica needs is missed by name, and what `migrate grants` gives is enough.
func TestMissingRightsAreNamed(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	check := func() string {
		t.Helper()
		d, err := db.Open(t.Context(), db.Config{ConnString: b.Database.ServerConnString})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if err = d.CheckRights(t.Context()); err == nil {
			return ""
		}
		return err.Error()
	}
	if got := check(); got != "" {
		t.Fatalf("with what grants gives: %s", got)
	}
	for revoke, want := range map[string]string{
		"DELETE ON pgbroker.leases":                   "DELETE on pgbroker.leases",
		"SELECT, INSERT ON pgbroker.services":         "SELECT, INSERT on pgbroker.services",
		"SELECT ON pgbroker.records":                  "SELECT on pgbroker.records",
		"SELECT ON pgbroker.versions":                 "SELECT on pgbroker.versions",
		"EXECUTE ON ALL FUNCTIONS IN SCHEMA pgbroker": "EXECUTE on function pgbroker.write_records",
		"USAGE ON SCHEMA pgbroker":                    "permission denied for schema pgbroker",
	} {
		b.Database.Exec(t, "REVOKE "+revoke+" FROM "+dbtest.ServerRole)
		got := check()
		if !strings.Contains(got, want) || !strings.Contains(got, "pgbroker migrate grants --server ") {
			t.Errorf("without %s: got %q, want %q", revoke, got, want)
		}
		b.Database.Exec(t, "GRANT "+revoke+" TO "+dbtest.ServerRole)
	}
}
