package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"

	"pgbroker/db"
)

const (
	maintenanceLease = "pgbroker-maintenance"
	// maintenanceLeaseTTL outlasts a few missed renewals.
	maintenanceLeaseTTL = 45 * time.Second
	// maintenanceBatch bounds how long one statement holds the order lock.
	maintenanceBatch = 200
)

// maintenance does the periodic work for all replicas, one of them at a time: expiry, TTL, retention of
// tombstones, indexing, projection.
type maintenance struct {
	db        *db.DB
	queries   *db.Queries
	logger    *slog.Logger
	metrics   *metrics
	interval  time.Duration
	retention time.Duration
	projector *projector
	// projectionGrace is how long replicas may go on by types and rules that have been changed.
	projectionGrace time.Duration

	leaseID string // "" while another replica holds the lease
}

// run works until ctx ends, and then gives the lease back.
func (m *maintenance) run(ctx context.Context) {
	tick := time.NewTicker(m.interval)
	defer tick.Stop()
	defer m.release(context.WithoutCancel(ctx))
	for {
		if err := m.round(ctx); err != nil && ctx.Err() == nil {
			m.logger.WarnContext(ctx, "periodic work failed; it is tried again", "error", err, "retry_in", m.interval)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// round does all that is due, if this replica holds the lease or can get it.
func (m *maintenance) round(ctx context.Context) error {
	mine, err := m.hold(ctx)
	if err != nil || !mine {
		return err
	}
	var errs []error
	job := func(name string, batch func(context.Context) (int64, error)) {
		done, err := m.drain(ctx, batch)
		if done > 0 {
			m.logger.InfoContext(ctx, name, "count", done)
			m.metrics.maintained.WithLabelValues(name).Add(float64(done))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	job("expired records deleted", func(ctx context.Context) (int64, error) {
		return m.queries.RecordsExpire(ctx, maintenanceBatch)
	})
	types, err := m.queries.TypesWithTTL(ctx)
	if err != nil {
		errs = append(errs, fmt.Errorf("list types with a TTL: %w", err))
	}
	for _, recordType := range types {
		job("outdated records deleted", func(ctx context.Context) (int64, error) {
			return m.queries.RecordsExpireByTTL(ctx, db.RecordsExpireByTTLParams{Type: recordType, MaxRows: maintenanceBatch})
		})
	}
	job("tombstones purged", func(ctx context.Context) (int64, error) {
		return m.purgeTombstones(ctx)
	})
	unindexed, err := m.queries.TypesToReindex(ctx)
	if err != nil {
		errs = append(errs, fmt.Errorf("list types to index: %w", err))
	}
	for _, row := range unindexed {
		if err := m.reindex(ctx, row); err != nil {
			errs = append(errs, fmt.Errorf("index %s: %w", row.Type, err))
		}
	}
	if err := m.reproject(ctx); err != nil {
		errs = append(errs, fmt.Errorf("project again: %w", err))
	}
	job("services purged", m.queries.ServicesPurge)
	job("leases purged", m.queries.LeasesPurge)
	return errors.Join(errs...)
}

// purgeTombstones removes a batch of tombstones, under the order lock from the start: taking it after rows
// could deadlock with Clear.
func (m *maintenance) purgeTombstones(ctx context.Context) (purged int64, err error) {
	err = pgx.BeginFunc(ctx, m.db, func(tx pgx.Tx) error {
		queries := db.New(tx)
		if err := queries.OrderLock(ctx); err != nil {
			return err
		}
		purged, err = queries.ChangesPurgeTombstones(ctx, db.ChangesPurgeTombstonesParams{Retention: m.retention, MaxRows: maintenanceBatch})
		return err
	})
	return purged, err
}

// drain runs a job batch by batch until a batch is not full, and returns how many rows that were.
func (m *maintenance) drain(ctx context.Context, batch func(context.Context) (int64, error)) (int64, error) {
	var done int64
	for {
		n, err := batch(ctx)
		done += n
		if err != nil || n < maintenanceBatch {
			return done, err
		}
		if mine, err := m.hold(ctx); err != nil || !mine {
			return done, err
		}
	}
}

// reindex brings the index of a type's records up to the fields that writes index now, and then lets
// queries rely on it.
func (m *maintenance) reindex(ctx context.Context, row db.TypesToReindexRow) error {
	for from := ""; ; {
		ids, err := m.queries.RecordsReindex(ctx, db.RecordsReindexParams{Type: row.Type, FromID: from, MaxRows: maintenanceBatch})
		if err != nil {
			return err
		}
		if len(ids) == 0 {
			break
		}
		for _, id := range ids {
			from = max(from, id+"\x01") // just behind it; bytewise, as the table's keys are ordered
		}
		if mine, err := m.hold(ctx); err != nil || !mine {
			return err
		}
	}
	m.logger.InfoContext(ctx, "records indexed", "type", row.Type, "fields", row.ProjectedFields)
	return m.queries.TypeIndexed(ctx, db.TypeIndexedParams{Type: row.Type, Fields: row.ProjectedFields})
}

// hold takes or prolongs the lease, and reports whether this replica has it.
func (m *maintenance) hold(ctx context.Context) (bool, error) {
	if m.leaseID != "" {
		renewed, err := m.queries.LeaseRenew(ctx, db.LeaseRenewParams{Name: maintenanceLease, ID: m.leaseID, Duration: maintenanceLeaseTTL})
		if err != nil || renewed > 0 {
			return err == nil, err
		}
		m.leaseID = ""
	}
	id, err := m.queries.LeaseAcquire(ctx, db.LeaseAcquireParams{Name: maintenanceLease, Duration: maintenanceLeaseTTL})
	if errors.Is(err, pgx.ErrNoRows) {
		return false, nil
	}
	m.leaseID = id
	return err == nil, err
}

func (m *maintenance) release(ctx context.Context) {
	if m.leaseID == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, err := m.queries.LeaseRelease(ctx, db.LeaseReleaseParams{Name: maintenanceLease, ID: m.leaseID}); err != nil {
		m.logger.WarnContext(ctx, "cannot release the lease of the periodic work; it ends by itself", "error", err, "in", maintenanceLeaseTTL)
	}
}
