package server

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/db"
	"pgbroker/proto/databroker"
)

// Limits of a lease's name and id.
const (
	maxLeaseNameBytes = 512
	maxLeaseIDBytes   = 256
)

// AcquireLease takes a lease that nobody holds. It is not repeated after a lost connection: it may have
// been taken, and its id would be lost; it then ends by itself.
func (s *brokerServer) AcquireLease(ctx context.Context, request *databroker.AcquireLeaseRequest) (*databroker.AcquireLeaseResponse, error) {
	if err := checkText("name", request.Name, maxLeaseNameBytes); err != nil {
		return nil, err
	}
	ttl, err := duration("duration", request.Duration)
	if err != nil {
		return nil, err
	}
	response := new(databroker.AcquireLeaseResponse)
	err = db.Retry(ctx, func(ctx context.Context) (err error) {
		response.Id, err = s.changes.LeaseAcquire(ctx, db.LeaseAcquireParams{Name: request.Name, Duration: ttl})
		return err
	})
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, errLeaseTaken
	}
	return response, err
}

// RenewLease prolongs a lease. One that has lapsed, or was never taken, is taken, if nobody else holds it.
func (s *brokerServer) RenewLease(ctx context.Context, request *databroker.RenewLeaseRequest) (*emptypb.Empty, error) {
	if err := errors.Join(checkText("name", request.Name, maxLeaseNameBytes), checkText("id", request.Id, maxLeaseIDBytes)); err != nil {
		return nil, err
	}
	ttl, err := duration("duration", request.Duration)
	if err != nil {
		return nil, err
	}
	var renewed int64
	err = db.Retry(ctx, func(ctx context.Context) (err error) {
		renewed, err = s.changes.LeaseRenew(ctx, db.LeaseRenewParams{Name: request.Name, ID: request.Id, Duration: ttl})
		return err
	})
	switch {
	case err != nil:
		return nil, err
	case renewed == 0:
		return nil, errLeaseLost
	}
	return new(emptypb.Empty), nil
}

// ReleaseLease gives a lease back. With another id than the holder's it has no effect.
func (s *brokerServer) ReleaseLease(ctx context.Context, request *databroker.ReleaseLeaseRequest) (*emptypb.Empty, error) {
	if err := errors.Join(checkText("name", request.Name, maxLeaseNameBytes), checkText("id", request.Id, maxLeaseIDBytes)); err != nil {
		return nil, err
	}
	err := db.Retry(ctx, func(ctx context.Context) error {
		_, err := s.changes.LeaseRelease(ctx, db.LeaseReleaseParams{Name: request.Name, ID: request.Id})
		return err
	})
	return new(emptypb.Empty), err
}
