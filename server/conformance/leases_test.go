package conformance_test

import (
	"math"
	"regexp"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"pgbroker/proto/databroker"
)

func acquire(t *testing.T, c client, name string, d time.Duration) string {
	t.Helper()
	response, err := c.AcquireLease(testContext(t), &databroker.AcquireLeaseRequest{Name: name, Duration: durationpb.New(d)})
	if err != nil {
		t.Fatalf("acquire %s: %v", name, err)
	}
	return response.Id
}

func wantTaken(t *testing.T, c client, name string) {
	t.Helper()
	_, err := c.AcquireLease(testContext(t), &databroker.AcquireLeaseRequest{Name: name, Duration: durationpb.New(time.Hour)})
	wantStatus(t, err, codes.AlreadyExists, "lease is already taken")
}

func renew(t *testing.T, c client, name, id string, d time.Duration) error {
	t.Helper()
	_, err := c.RenewLease(testContext(t), &databroker.RenewLeaseRequest{Name: name, Id: id, Duration: durationpb.New(d)})
	return err
}

func release(t *testing.T, c client, name, id string) {
	t.Helper()
	if _, err := c.ReleaseLease(testContext(t), &databroker.ReleaseLeaseRequest{Name: name, Id: id}); err != nil {
		t.Errorf("release %s: %v", name, err)
	}
}

// TestLeases: one holder at a time, by whatever replica.
func TestLeases(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	c, d := b.Replicas[0], b.Replicas[1]

	id := acquire(t, c, "l", time.Hour)
	if !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(id) {
		t.Errorf("id %q is no random UUID", id)
	}
	wantTaken(t, c, "l") // not even for its holder
	wantTaken(t, d, "l")
	acquire(t, d, "other", time.Hour)
	acquire(t, d, "", time.Hour)

	if err := renew(t, d, "l", id, time.Hour); err != nil {
		t.Errorf("renew by another replica: %v", err)
	}
	wantStatus(t, renew(t, d, "l", "somebody else", time.Hour), codes.AlreadyExists, "lease no longer held")
	wantStatus(t, renew(t, d, "l", "", time.Hour), codes.AlreadyExists, "lease no longer held")

	release(t, d, "l", "somebody else") // has no effect
	wantTaken(t, d, "l")
	release(t, d, "l", id)
	release(t, d, "l", id)
	release(t, d, "never taken", id)
	next := acquire(t, d, "l", time.Hour)
	if next == id {
		t.Error("the same id twice")
	}
	release(t, c, "l", id) // the former holder's
	wantTaken(t, c, "l")
}

// TestD21_LeasesGoByTheDatabasesClock, to which all replicas listen, and not by anybody's own.
func TestD21_LeasesGoByTheDatabasesClock(t *testing.T) {
	t.Parallel()
	b := startWithClock(t, 2)
	c, d := b.Replicas[0], b.Replicas[1]
	id := acquire(t, c, "l", 30*time.Second)
	b.clock.advance(29 * time.Second)
	wantTaken(t, d, "l")
	if err := renew(t, c, "l", id, 30*time.Second); err != nil {
		t.Errorf("renew: %v", err)
	}
	b.clock.advance(29 * time.Second)
	wantTaken(t, d, "l")
	b.clock.advance(2 * time.Second)
	next := acquire(t, d, "l", 30*time.Second)
	wantStatus(t, renew(t, c, "l", id, 30*time.Second), codes.AlreadyExists, "lease no longer held")
	b.clock.advance(31 * time.Second)
	if err := renew(t, c, "l", id, 30*time.Second); err != nil {
		t.Errorf("renewing a lease that the next holder has let lapse: %v", err)
	}
	wantStatus(t, renew(t, d, "l", next, 30*time.Second), codes.AlreadyExists, "lease no longer held")
}

// TestD22_RenewingALeaseThatNobodyHoldsTakesIt: after it has lapsed, after its release, and for the first time.
func TestD22_RenewingALeaseThatNobodyHoldsTakesIt(t *testing.T) {
	t.Parallel()
	b := startWithClock(t, 1)
	lapsed := acquire(t, b, "lapsed", time.Second)
	b.clock.advance(time.Minute)
	released := acquire(t, b, "released", time.Hour)
	release(t, b, "released", released)
	for name, id := range map[string]string{"lapsed": lapsed, "released": released, "never taken": "an id of my own"} {
		if err := renew(t, b, name, id, time.Hour); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		wantTaken(t, b, name)
		wantStatus(t, renew(t, b, name, "other", time.Hour), codes.AlreadyExists, "lease no longer held")
	}
}

// TestLeaseDurations: none and zero end at once, fractions count.
func TestLeaseDurations(t *testing.T) {
	t.Parallel()
	b := startWithClock(t, 1)
	ctx := testContext(t)
	for range 3 {
		must[*databroker.AcquireLeaseResponse](t)(b.AcquireLease(ctx, &databroker.AcquireLeaseRequest{Name: "l"}))
		b.clock.advance(time.Microsecond)
		acquire(t, b, "l", 0)
		b.clock.advance(time.Microsecond)
	}
	id := acquire(t, b, "l", time.Hour+500*time.Millisecond)
	b.clock.advance(time.Hour)
	wantTaken(t, b, "l")
	if err := renew(t, b, "l", id, 0); err != nil {
		t.Errorf("renew for no time: %v", err)
	}
	b.clock.advance(time.Microsecond)
	acquire(t, b, "l", 100*365*24*time.Hour)
	b.clock.advance(99 * 365 * 24 * time.Hour)
	wantTaken(t, b, "l")
}

// TestOneLeaseHolder: of many who try at the same time, through all replicas, one gets it.
func TestOneLeaseHolder(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	for range 5 {
		var holders atomic.Int32
		var id atomic.Value
		var group sync.WaitGroup
		for i := range 16 {
			group.Go(func() {
				response, err := b.Replicas[i%2].AcquireLease(t.Context(), &databroker.AcquireLeaseRequest{Name: "l", Duration: durationpb.New(time.Hour)})
				switch {
				case err == nil:
					holders.Add(1)
					id.Store(response.Id)
				case !isCode(err, codes.AlreadyExists):
					t.Errorf("acquire: %v", err)
				}
			})
		}
		group.Wait()
		if n := holders.Load(); n != 1 {
			t.Fatalf("%d holders", n)
		}
		release(t, b, "l", id.Load().(string))
	}
}

// TestCheckpoint: what is set is what is returned, over the whole range.
func TestCheckpoint(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	ctx := testContext(t)
	get := func() *databroker.GetCheckpointResponse {
		t.Helper()
		return must[*databroker.GetCheckpointResponse](t)(b.Replicas[1].Checkpoints.GetCheckpoint(ctx, new(databroker.GetCheckpointRequest)))
	}
	// Every replica writes to the same database, so each is a leader.
	same(t, "first", get(), &databroker.GetCheckpointResponse{Checkpoint: new(databroker.Checkpoint), IsLeader: true})
	before := position(t, b)
	for _, checkpoint := range []*databroker.Checkpoint{
		{ServerVersion: 1, RecordVersion: 2},
		{ServerVersion: math.MaxUint64, RecordVersion: math.MaxUint64},
		{ServerVersion: 1 << 63, RecordVersion: math.MaxInt64},
		{ServerVersion: 1<<53 + 1},
		{RecordVersion: 3},
	} {
		must[*databroker.SetCheckpointResponse](t)(b.Checkpoints.SetCheckpoint(ctx, &databroker.SetCheckpointRequest{Checkpoint: checkpoint}))
		same(t, "checkpoint", get().Checkpoint, checkpoint)
	}
	must[*databroker.SetCheckpointResponse](t)(b.Checkpoints.SetCheckpoint(ctx, new(databroker.SetCheckpointRequest)))
	same(t, "set to nothing", get().Checkpoint, new(databroker.Checkpoint))
	same(t, "versions, which have nothing to do with it", position(t, b), before)
}
