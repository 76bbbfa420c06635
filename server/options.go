package server

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/durationpb"

	"pgbroker/db"
	"pgbroker/proto/databroker"
)

// Limits of a type's options.
const (
	maxIndexableFields = 64
	maxFieldBytes      = 256
)

// GetOptions returns the options of a record type.
func (s *brokerServer) GetOptions(ctx context.Context, request *databroker.GetOptionsRequest) (*databroker.GetOptionsResponse, error) {
	if request.Type == "" {
		return nil, invalidError{"options req type is empty"}
	}
	if err := checkText("type", request.Type, maxTypeBytes); err != nil {
		return nil, err
	}
	var row db.OptionsGetRow
	err := db.RetryRead(ctx, func(ctx context.Context) (err error) {
		row, err = s.reads.OptionsGet(ctx, request.Type)
		return err
	})
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return nil, err
	}
	options := newOptions(row.Capacity, row.TTL, row.IndexableFields)
	if isEmpty(options) {
		return nil, errOptionsNotFound
	}
	return &databroker.GetOptionsResponse{Options: options}, nil
}

// SetOptions replaces the options of a record type. Empty ones remove them. Capacity takes effect at the
// type's next write, TTL within a minute, indexes once the existing records have been indexed.
func (s *brokerServer) SetOptions(ctx context.Context, request *databroker.SetOptionsRequest) (*databroker.SetOptionsResponse, error) {
	if err := checkText("type", request.Type, maxTypeBytes); err != nil {
		return nil, err
	}
	params := db.OptionsSetParams{Type: request.Type, IndexableFields: []string{}}
	if options := request.Options; options != nil {
		if options.Capacity != nil {
			if *options.Capacity > math.MaxInt64 {
				return nil, invalid("options.capacity", "%d, at most %d is allowed", *options.Capacity, int64(math.MaxInt64))
			}
			capacity := int64(*options.Capacity)
			params.Capacity = &capacity
		}
		if options.Ttl != nil {
			ttl, err := duration("options.ttl", options.Ttl)
			if err != nil {
				return nil, err
			}
			params.TTL = &ttl
		}
		if len(options.IndexableFields) > maxIndexableFields {
			return nil, invalid("options.indexable_fields", "%d fields, at most %d are allowed", len(options.IndexableFields), maxIndexableFields)
		}
		for i, field := range options.IndexableFields {
			if err := checkText(fmt.Sprintf("options.indexable_fields[%d]", i), field, maxFieldBytes); err != nil {
				return nil, err
			}
		}
		params.IndexableFields = append(params.IndexableFields, options.IndexableFields...)
	}
	var row db.OptionsSetRow
	err := db.Retry(ctx, func(ctx context.Context) (err error) {
		row, err = s.changes.OptionsSet(ctx, params)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("set options: %w", err)
	}
	return &databroker.SetOptionsResponse{Options: newOptions(row.Capacity, row.TTL, row.IndexableFields)}, nil
}

func newOptions(capacity *int64, ttl *time.Duration, fields []string) *databroker.Options {
	options := new(databroker.Options)
	if capacity != nil {
		unsigned := uint64(*capacity)
		options.Capacity = &unsigned
	}
	if ttl != nil {
		options.Ttl = durationpb.New(*ttl)
	}
	if len(fields) > 0 {
		options.IndexableFields = fields
	}
	return options
}

func isEmpty(options *databroker.Options) bool {
	return options.Capacity == nil && options.Ttl == nil && len(options.IndexableFields) == 0
}

// maxDuration bounds what callers may ask to last: more is a mistake, and would overflow the database's
// time stamps.
const maxDuration = 100 * 365 * 24 * time.Hour

// duration returns a duration of the wire, to the microsecond, which is what the database keeps.
func duration(field string, d *durationpb.Duration) (time.Duration, error) {
	if d == nil {
		return 0, nil
	}
	if err := d.CheckValid(); err != nil {
		return 0, invalid(field, "%v", err)
	}
	if d.Seconds < 0 || d.Nanos < 0 {
		return 0, invalid(field, "%v, must not be negative", d.AsDuration())
	}
	if d.Seconds > int64(maxDuration/time.Second) {
		return 0, invalid(field, "%d s, at most %d s are allowed", d.Seconds, int64(maxDuration/time.Second))
	}
	return d.AsDuration().Truncate(time.Microsecond), nil
}
