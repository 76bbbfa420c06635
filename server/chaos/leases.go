package chaos

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"pgbroker/proto/databroker"
)

// leaseAge is how long clients contend for the same leases.
const leaseAge = 20 * time.Second

// lease acquires a lease, keeps it for a while by renewing it, and gives it back or lets it lapse.
func (c *client) lease(ctx context.Context) {
	name := Key{ID: fmt.Sprintf("lease-%d-%d", c.random.IntN(2), c.recorder.now()/leaseAge)}
	ttl := time.Duration(500+c.random.IntN(1500)) * time.Millisecond
	op := c.acquire(ctx, name, ttl)
	if op.Outcome != ok {
		pause(ctx, ttl/10)
		return
	}
	for range c.random.IntN(5) {
		// Sometimes too late.
		pause(ctx, time.Duration(c.random.Int64N(int64(ttl+ttl/4))))
		if c.holding(ctx, opRenew, name, op.Write, ttl).Outcome == taken {
			return
		}
	}
	if c.random.IntN(3) > 0 {
		c.holding(ctx, opRelease, name, op.Write, 0)
	}
}

func (c *client) acquire(ctx context.Context, name Key, ttl time.Duration) Op {
	ctx, cancel := c.context(ctx)
	defer cancel()
	replica, broker := c.pick()
	op := c.begin(opAcquire, replica, name)
	op.TTL = ttl
	response, err := broker.AcquireLease(ctx, &databroker.AcquireLeaseRequest{Name: name.ID, Duration: durationpb.New(ttl)})
	c.finishLease(&op, err)
	op.Write = response.GetId()
	c.recorder.add(op)
	return op
}

// holding renews or releases.
func (c *client) holding(ctx context.Context, kind string, name Key, id string, ttl time.Duration) Op {
	ctx, cancel := c.context(ctx)
	defer cancel()
	replica, broker := c.pick()
	op := c.begin(kind, replica, name)
	op.Write, op.TTL = id, ttl
	var err error
	if kind == opRenew {
		_, err = broker.RenewLease(ctx, &databroker.RenewLeaseRequest{Name: name.ID, Id: id, Duration: durationpb.New(ttl)})
	} else {
		_, err = broker.ReleaseLease(ctx, &databroker.ReleaseLeaseRequest{Name: name.ID, Id: id})
	}
	c.finishLease(&op, err)
	c.recorder.add(op)
	return op
}

func (c *client) finishLease(op *Op, err error) {
	c.finish(op, err)
	if status.Code(err) == codes.AlreadyExists {
		op.Outcome, op.Code = taken, ""
	}
}
