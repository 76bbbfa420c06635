package invariants

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/server/servertest"
)

// noticeTime is within what docs/recovery.md promises that a newer server is noticed, and that again for a machine that is busy.
const noticeTime = 2 * 2 * time.Second

// within waits for a condition that nobody announces, and fails if it takes longer.
func within(t testing.TB, limit time.Duration, what string, condition func() bool) {
	t.Helper()
	for start := time.Now(); !condition(); yield() {
		if time.Since(start) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// TestI6_ASplitBrainIsNoticed promotes a standby while the old primary runs on and takes the writes of all replicas, as when the
// failover manager beside it stands still. Nothing is wrong with any connection; all replicas leave all the same,
// what is in flight fails as unavailable, nothing acknowledged from then on is on the old primary, and a replica that starts
// later agrees.
func TestI6_ASplitBrainIsNoticed(t *testing.T) {
	t.Parallel()
	older := newPrimary(t)
	newer := newStandby(older)
	connString := dbtest.ConnString(older.Addr(), newer.Addr())
	w := newWorld(t, 2, connString)
	w.more(100)
	w.observed()
	inFlight := make(chan error, 1)
	go func() {
		_, err := w.replicas[0].DB.Exec(w.ctx, `SELECT pg_sleep(7)`)
		inFlight <- err
	}()
	newer.CatchUp(older)
	newer.Detach()
	w.more(20) // these are lost
	newer.Promote()
	within(t, noticeTime, "all replicas on the newer server", func() bool {
		return w.replicas[0].DB.Timeline() == 2 && w.replicas[1].DB.Timeline() == 2
	})
	last := latestVersionOf(t, older)
	if err := <-inFlight; !db.IsUnavailable(err) {
		t.Errorf("the statement in flight: got %v, want an error that is unavailable", err)
	}
	w.more(100)
	if now := latestVersionOf(t, older); now != last {
		t.Errorf("the old primary has new changes, up to %d instead of %d", now, last)
	}
	for i, r := range w.replicas {
		if r.DB.NewerFound() == 0 {
			t.Errorf("replica %d does not count that it has found a newer server", i)
		}
		within(t, noticeTime, "the old primary is told apart", func() bool { return r.DB.Hosts() == db.Hosts{Named: 2, Answering: 2, Past: 1} })
	}
	for _, line := range []string{"another host of the connection string is newer", "was left for a newer one and is still there"} {
		if !strings.Contains(w.log.String(), line) {
			t.Errorf("the log does not say: %s", line)
		}
	}
	fresh := w.start(db.Config{ConnString: connString}, "")
	if got := fresh.DB.Timeline(); got != 2 {
		t.Errorf("the fresh replica is on timeline %d, want 2", got)
	}
	w.expectRefusal(older)
	w.end(newer)
	w.expectLoss()
}

// TestI6_TwoPromotedStandbys: two standbys were promoted to the same timeline. The one whose epoch began later wins, for a
// replica that uses the other one, too, as it would for one that starts now.
func TestI6_TwoPromotedStandbys(t *testing.T) {
	t.Parallel()
	primary := newPrimary(t)
	one, other := newStandby(primary), newStandby(primary)
	primary.Kill()
	one.Promote()
	connString := dbtest.ConnString(one.Addr(), other.Addr())
	w := newQuietWorld(t, 1, connString)
	r := w.replicas[0]
	w.put(r, newValue("x", "on one"))
	other.Promote()
	apart := w.start(db.Config{ConnString: other.ConnString()}, "")
	version := w.put(apart, newValue("x", "on the other"))
	within(t, noticeTime, "the replica on the other server", func() bool {
		got, err := r.Get(w.ctx, &databroker.GetRequest{Type: worldType, Id: "x"})
		return err == nil && got.Record.Version == version
	})
	fresh := w.start(db.Config{ConnString: connString}, "")
	if got, err := fresh.Get(w.ctx, &databroker.GetRequest{Type: worldType, Id: "x"}); err != nil || got.Record.Version != version {
		t.Errorf("the fresh replica got %v (%v), want version %d", got, err, version)
	}
}

// writeUntil puts records, one after the other, until ctx ends, and counts those that were acknowledged. What fails must fail as
// unavailable.
func writeUntil(ctx context.Context, r *servertest.Replica, acknowledged *atomic.Int64) error {
	for ctx.Err() == nil {
		_, err := r.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{newValue("x", "y")}})
		switch {
		case err == nil:
			acknowledged.Add(1)
		case status.Code(err) != codes.Unavailable && ctx.Err() == nil:
			return errors.Join(errors.New("a write failed, not as unavailable"), err)
		}
	}
	return nil
}
