package pressure

import (
	"log/slog"
	"runtime"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// TestAFullDiskIsNoOutage: while there is no room for what is written, health says so for writing only, and reads and streams go on.
// That there is room again is noticed without anybody writing.
func TestAFullDiskIsNoOutage(t *testing.T) {
	t.Parallel()
	log := new(logBook)
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) {
		c.Logger, c.PollInterval = slog.New(slog.NewTextHandler(log, nil)), 100*time.Millisecond
	}})
	b.AwaitHealthFor(t, server.HealthWriting, grpc_health_v1.HealthCheckResponse_SERVING)
	put := func() error {
		_, err := b.Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{{Type: "t", Id: "a"}}})
		return err
	}
	if err := put(); err != nil {
		t.Fatal(err)
	}
	b.Database.Exec(t, `CREATE FUNCTION public.no_room() RETURNS trigger LANGUAGE plpgsql AS
		$$ BEGIN RAISE EXCEPTION 'could not extend file "base/1/2": No space left on device' USING ERRCODE = 'disk_full'; END $$`)
	for _, table := range []string{"records", "leases"} {
		b.Database.Exec(t, "CREATE TRIGGER no_room BEFORE INSERT OR UPDATE ON pgbroker."+table+" FOR EACH ROW EXECUTE FUNCTION public.no_room()")
	}
	if err := put(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "disk is full") {
		t.Errorf("put: got %v", err)
	}
	b.AwaitHealthFor(t, server.HealthWriting, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	// Some looks, which find no room: they are as frequent as reads of the feed.
	for reads := b.Server.FeedStats().TailReads; b.Server.FeedStats().TailReads < reads+6; {
		runtime.Gosched()
	}
	if err := b.Server.Writable(); err == nil || !strings.Contains(err.Error(), "disk is full") {
		t.Errorf("writable: got %v", err)
	}
	b.AwaitHealth(t, grpc_health_v1.HealthCheckResponse_SERVING)
	if _, err := b.Get(t.Context(), &databroker.GetRequest{Type: "t", Id: "a"}); err != nil {
		t.Errorf("get: %v", err)
	}
	if !strings.Contains(strings.Join(log.lines("level=ERROR"), ""), "nothing can be revoked") {
		t.Error("the log does not say that nothing can be revoked")
	}
	for _, table := range []string{"records", "leases"} {
		b.Database.Exec(t, "DROP TRIGGER no_room ON pgbroker."+table)
	}
	b.AwaitHealthFor(t, server.HealthWriting, grpc_health_v1.HealthCheckResponse_SERVING)
	if err := put(); err != nil {
		t.Errorf("put: got %v", err)
	}
	if len(log.lines("the database takes writes again")) == 0 {
		t.Error("the log does not say that this is over")
	}
}
