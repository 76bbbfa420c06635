package invariants

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

const (
	serving    = grpc_health_v1.HealthCheckResponse_SERVING
	notServing = grpc_health_v1.HealthCheckResponse_NOT_SERVING
)

// expectNoWrites checks that a replica says of itself that nothing can be written, and why, and goes on reading.
func (w *world) expectNoWrites(r *servertest.Replica, reason string) {
	w.t.Helper()
	within(w.t, time.Minute, "the replica knows that nothing can be written", func() bool {
		err := r.Server.Writable()
		return err != nil && strings.Contains(err.Error(), reason)
	})
	for purpose, want := range map[string]grpc_health_v1.HealthCheckResponse_ServingStatus{
		"": serving, "reading": serving, "databroker.DataBrokerService": serving, "writing": notServing,
	} {
		got, err := r.Health.Check(w.ctx, &grpc_health_v1.HealthCheckRequest{Service: purpose})
		if err != nil || got.Status != want {
			w.t.Errorf("health for %q: got %v (%v), want %v", purpose, got, err, want)
		}
	}
	if err := r.Server.Ready(); err != nil {
		w.t.Errorf("not ready: %v", err)
	}
	_, err := r.Put(w.ctx, &databroker.PutRequest{Records: []*databroker.Record{newValue("refused", "refused")}})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "takes no writes at present") || !strings.Contains(err.Error(), reason) {
		w.t.Errorf("put: got %v, want Unavailable, because of %q", err, reason)
	}
	if _, err := r.Query(w.ctx, &databroker.QueryRequest{Type: worldType, Limit: 1}); err != nil {
		w.t.Errorf("query: %v", err)
	}
	var header metadata.MD
	if _, err := r.ServerInfo(w.ctx, new(emptypb.Empty), grpc.Header(&header)); err != nil || !strings.Contains(fmt.Sprint(header.Get(server.InfoWriting)), "no: ") {
		w.t.Errorf("info says %v (%v)", header, err)
	}
	if !strings.Contains(w.log.String(), "nothing can be revoked; reads and streams go on") {
		w.t.Error("the log does not say that nothing can be revoked")
	}
}

// TestAReadOnlyPrimaryIsNoOutage: a primary that takes no writes serves reads and streams, also where the connection string has
// several hosts and wants one that takes writes; and when it takes writes again, that is noticed without a restart.
func TestAReadOnlyPrimaryIsNoOutage(t *testing.T) {
	t.Parallel()
	for name, way := range map[string]struct{ on, off string }{
		"server": {
			"ALTER SYSTEM SET default_transaction_read_only = on; SELECT pg_reload_conf()",
			"ALTER SYSTEM RESET default_transaction_read_only; SELECT pg_reload_conf()",
		},
		// Sessions that are open already do not hear of these.
		"database": {
			"ALTER DATABASE pgbroker SET default_transaction_read_only = on",
			"SET default_transaction_read_only = off; ALTER DATABASE pgbroker RESET default_transaction_read_only",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			primary := newPrimary(t)
			standby := primary.Standby(nil)
			run := func(statements string) {
				for _, statement := range strings.Split(statements, "; ") {
					primary.Exec(statement)
				}
			}
			w := newQuietWorld(t, 1, dbtest.ConnString(primary.Addr(), standby.Addr()))
			r := w.replicas[0]
			w.addFollower(r)
			w.awaitVersion(w.put(r, newValue("a", "before")))

			run(way.on)
			r.DB.Reset()
			r.AwaitHealthFor(t, server.HealthWriting, notServing)
			w.expectNoWrites(r, "read-only")
			resets := r.DB.Resets()
			for range 50 {
				_, _ = r.Put(w.ctx, &databroker.PutRequest{Records: []*databroker.Record{newValue("refused", "refused")}})
			}
			if n := r.DB.Resets() - resets; n > 1 {
				t.Errorf("refused writes have made the replica give up its connections %d times", n)
			}
			// A replica that starts now serves, too.
			late := w.start(db.Config{ConnString: dbtest.ConnString(standby.Addr(), primary.Addr())}, "")
			late.AwaitHealth(t, serving)
			w.addFollower(late)
			within(t, time.Minute, "the new replica's follower has a copy", func() bool { return w.followers[1].copies.Load() == 1 })
			w.expectNoWrites(late, "read-only")

			run(way.off)
			for _, r := range []*servertest.Replica{r, late} {
				r.AwaitHealthFor(t, server.HealthWriting, serving)
				w.awaitVersion(w.put(r, newValue("b", "after")))
			}
			w.expectNoLoss()
			w.end(primary)
		})
	}
}

// TestServingFromAStandby: a replica on a standby serves reads and streams, says that nothing can be written there and how far it is
// behind, and becomes like any other when the standby is promoted.
func TestServingFromAStandby(t *testing.T) {
	t.Parallel()
	for _, attrs := range []string{"standby", "any", "read-only"} {
		t.Run(attrs, func(t *testing.T) {
			t.Parallel()
			primary := newPrimary(t)
			standby := primary.Standby(nil)
			w := newQuietWorld(t, 1, primary.ConnString())
			source := w.replicas[0]
			w.put(source, newValue("a", "before"))
			standby.CatchUp(primary)

			r := w.start(db.Config{ConnString: standby.ConnString() + "&target_session_attrs=" + attrs}, "")
			w.replicas = append(w.replicas, r)
			r.AwaitHealth(t, serving)
			r.AwaitHealthFor(t, server.HealthWriting, notServing)
			w.addFollower(r)
			for i := range 10 {
				w.awaitVersion(w.put(source, newValue("a", fmt.Sprint("on the primary ", i))))
			}
			w.expectNoWrites(r, "standby")
			var header metadata.MD
			_, err := r.ServerInfo(w.ctx, new(emptypb.Empty), grpc.Header(&header))
			if lag, bad := time.ParseDuration(strings.Join(header.Get(server.InfoStandbyLag), "")); err != nil || bad != nil || lag > time.Minute {
				t.Errorf("info says that the standby is %v behind (%v, %v)", lag, err, bad)
			}
			if n := strings.Count(w.log.String(), "not listening for notifications"); n > 0 {
				t.Errorf("%d warnings about LISTEN, which a standby does not allow", n)
			}

			if err := source.Stop(); err != nil {
				t.Fatal(err)
			}
			w.replicas = w.replicas[1:]
			primary.Stop()
			standby.Promote()
			r.AwaitHealthFor(t, server.HealthWriting, serving)
			w.awaitVersion(w.put(r, newValue("b", "on the promoted standby")))
			if got := ask[int](t, standby, `SELECT count(*)::int FROM pgbroker.epochs`); got != 1 {
				t.Errorf("%d epochs, want one, which the promotion began", got)
			}
			within(t, time.Minute, "the replica listens", func() bool { return r.Server.FeedStats().Listening })
			r.DB.Reset() // new connections are let in as well
			w.awaitVersion(w.put(r, newValue("c", "over a new connection")))
			w.expectNoLoss()
			w.end(standby)
		})
	}
}

// TestAStandbyThatIsBehindHasLostNothing: a replica that goes from one standby to another which has not replayed as much waits for
// it, and tells nobody that changes were lost.
func TestAStandbyThatIsBehindHasLostNothing(t *testing.T) {
	t.Parallel()
	primary := newPrimary(t)
	first, second := primary.Standby(nil), primary.Standby(nil)
	w := newQuietWorld(t, 1, primary.ConnString())
	source := w.replicas[0]
	w.put(source, newValue("a", "before"))
	first.CatchUp(primary)
	second.CatchUp(primary)
	r := w.start(db.Config{ConnString: dbtest.ConnString(first.Addr(), second.Addr()) + "&target_session_attrs=prefer-standby"}, "")
	w.replicas = append(w.replicas, r)
	w.addFollower(r)
	within(t, time.Minute, "the follower has a copy", func() bool { return w.followers[0].copies.Load() == 1 })

	second.Exec("SELECT pg_wal_replay_pause()")
	w.awaitVersion(w.put(source, newValue("a", "replayed by the first")))
	first.Stop()
	within(t, time.Minute, "the replica uses the second standby", func() bool {
		got, err := r.Get(w.ctx, &databroker.GetRequest{Type: worldType, Id: "a"})
		return err == nil && got.Record.Version < w.followers[0].seen.Load()
	})
	last := w.put(source, newValue("a", "replayed by neither"))
	reads := r.Server.FeedStats().TailReads
	within(t, time.Minute, "the feed has read the second standby", func() bool { return r.Server.FeedStats().TailReads > reads+2 })
	r.AwaitHealth(t, serving)
	second.Exec("SELECT pg_wal_replay_resume()")
	w.awaitVersion(last)
	w.expectNoLoss()
	w.end(primary)
}
