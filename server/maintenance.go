package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"pgbroker/db"
	"pgbroker/server/supervise"
)

const (
	maintenanceLease = "pgbroker-maintenance"
	// maintenanceLeaseTTL outlasts a few missed renewals.
	maintenanceLeaseTTL = 45 * time.Second
	// maintenanceBatch bounds how long one statement holds the order lock.
	maintenanceBatch = 200
	// maintenancePage bounds how long one statement looks for what is due, without any lock.
	maintenancePage = 1000
	// idleSweeps is how often in the time of an idle timeout all records are looked at: so much later, at
	// most, a record goes.
	idleSweeps = 20
)

// maintenance does the periodic work for all replicas, one of them at a time: expiry, TTL, idle timeouts,
// limits for users, retention of tombstones and of the audit, indexing, projection.
type maintenance struct {
	db             *db.DB
	queries        *db.Queries
	logger         *slog.Logger
	metrics        *metrics
	interval       time.Duration
	retention      time.Duration
	auditRetention time.Duration
	projector      *projector
	// projectionGrace is how long replicas may go on by types and rules that have been changed.
	projectionGrace time.Duration

	supervisor *supervise.Supervisor
	misfits    *misfits
	completed  atomic.Pointer[time.Time] // when the latest round without an error ended; at first when the replica was made

	leaseID string // "" while another replica holds the lease

	// By type. Whoever takes over begins anew, which costs one look at every record.
	swept   map[string]time.Time     // when the latest sweep for idle records began
	limited map[string]limitProgress // how far limits for users are enforced
	gone    map[userSweep]int64      // the tombstone of a user up to which records have ended with it
}

// A userSweep is the search for records of one type whose user of another one is gone.
type userSweep struct{ recordType, userType string }

// userTypes say who is known: whoever has signed in, and the company directory.
var userTypes = []string{"type.googleapis.com/user.User", "pomerium.io/DirectoryUser"}

// limitProgress is a place in the change log up to which a limit holds.
type limitProgress struct {
	limit   int32
	version int64
}

func (s *Server) newMaintenance() *maintenance {
	m := &maintenance{
		db: s.db, queries: s.queries, logger: s.logger, metrics: s.metrics,
		interval: s.config.MaintenanceInterval, retention: s.config.TombstoneRetention, auditRetention: s.config.AuditRetention,
		projector: s.projector, projectionGrace: s.config.ProjectionGrace,
		supervisor: s.supervisor, misfits: s.misfits,
		swept: make(map[string]time.Time), limited: make(map[string]limitProgress), gone: make(map[userSweep]int64),
	}
	m.noteCompleted()
	return m
}

func (m *maintenance) noteCompleted() {
	now := time.Now()
	m.completed.Store(&now)
}

// age is for how long no round has been completed by this replica.
func (m *maintenance) age() time.Duration { return time.Since(*m.completed.Load()) }

// run works until ctx ends, and then gives the lease back.
func (m *maintenance) run(ctx context.Context) {
	tick := time.NewTicker(m.interval)
	defer tick.Stop()
	defer m.release(context.WithoutCancel(ctx))
	for {
		// Where nothing can be written there is nothing to be done; that this is so is logged elsewhere.
		if err := m.round(ctx); err != nil && !db.IsReadOnly(err) && ctx.Err() == nil {
			m.logger.WarnContext(ctx, "periodic work failed; it is tried again", "error", err, "retry_in", m.interval)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// round does all that is due, if this replica holds the lease or can get it. What one job meets, an error or a panic, keeps no
// other from being done.
func (m *maintenance) round(ctx context.Context) error {
	mine, err := m.hold(ctx)
	if err != nil || !mine {
		return err
	}
	var errs []error
	job := func(name string, do func(context.Context) error) {
		if err := m.supervisor.Catch(ctx, "periodic work", func() error { return do(ctx) }); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	drain := func(name string, batch func(context.Context) (int64, error)) {
		job(name, func(ctx context.Context) error {
			done, err := m.drain(ctx, batch)
			m.report(ctx, name, done)
			return err
		})
	}
	drain("expired records deleted", func(ctx context.Context) (int64, error) {
		return m.queries.RecordsExpire(ctx, maintenanceBatch)
	})
	types, err := m.queries.TypesWithTTL(ctx)
	if err != nil {
		errs = append(errs, fmt.Errorf("list types with a TTL: %w", err))
	}
	for _, recordType := range types {
		drain("outdated records deleted", func(ctx context.Context) (int64, error) {
			return m.queries.RecordsExpireByTTL(ctx, db.RecordsExpireByTTLParams{Type: recordType, MaxRows: maintenanceBatch})
		})
	}
	job("idle timeouts", m.endIdle)
	job("limits for users", m.endExcess)
	job("users that are gone", m.endOfMissingUsers)
	drain("tombstones purged", m.purgeTombstones)
	unindexed, err := m.queries.TypesToReindex(ctx)
	if err != nil {
		errs = append(errs, fmt.Errorf("list types to index: %w", err))
	}
	for _, row := range unindexed {
		job("index "+row.Type, func(ctx context.Context) error { return m.reindex(ctx, row) })
	}
	job("project again", m.reproject)
	drain("audit entries purged", func(ctx context.Context) (int64, error) {
		return m.queries.AuditPurge(ctx, db.AuditPurgeParams{MaxRows: maintenanceBatch, Retention: m.auditRetention})
	})
	drain("services purged", m.queries.ServicesPurge)
	drain("leases purged", m.queries.LeasesPurge)
	if len(errs) == 0 {
		m.noteCompleted()
	}
	return errors.Join(errs...)
}

// report tells what a job has done, if anything.
func (m *maintenance) report(ctx context.Context, job string, rows int64) {
	if rows > 0 {
		m.logger.InfoContext(ctx, job, "count", rows)
		m.metrics.maintained.WithLabelValues(job).Add(float64(rows))
	}
}

// endIdle deletes records that have not been used for longer than their type allows. An index that finds them
// would make every use of a session an update of that index; so all records are looked at now and then.
func (m *maintenance) endIdle(ctx context.Context) error {
	types, err := m.queries.TypesWithIdleTimeout(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, t := range types {
		began := time.Now()
		if last, ok := m.swept[t.Type]; ok && began.Sub(last) < t.IdleTimeout/idleSweeps {
			continue
		}
		if err := m.sweepIdle(ctx, t.Type); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", t.Type, err))
			continue
		}
		m.swept[t.Type] = began
	}
	return errors.Join(errs...)
}

// sweepIdle looks at every record of a type once.
func (m *maintenance) sweepIdle(ctx context.Context, recordType string) error {
	var ended int64
	defer func() { m.report(ctx, "idle records deleted", ended) }()
	for after := ""; ; {
		page, err := m.queries.RecordsIdle(ctx, db.RecordsIdleParams{Type: recordType, AfterID: after, MaxRows: maintenancePage})
		if err != nil {
			return err
		}
		n, err := inBatches(page.IDs, page.Versions, func(ids []string, versions []int64) (int64, error) {
			return m.queries.RecordsEndIdle(ctx, db.RecordsEndIdleParams{Type: recordType, IDs: ids, Versions: versions})
		})
		ended += n
		if err != nil || page.Seen < maintenancePage {
			return err
		}
		after = page.LastID
		if mine, err := m.hold(ctx); err != nil || !mine {
			return err
		}
	}
}

// endExcess deletes records of users who have more of a type than it allows. Only users with a new or changed
// record are looked at: the change log is followed.
func (m *maintenance) endExcess(ctx context.Context) error {
	types, err := m.queries.TypesWithUserLimit(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, t := range types {
		if m.limited[t.Type].limit != t.UserLimit { // another limit is for everybody
			m.limited[t.Type] = limitProgress{limit: t.UserLimit}
		}
		if err := m.enforceLimit(ctx, t.Type); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", t.Type, err))
		}
	}
	return errors.Join(errs...)
}

// enforceLimit follows the change log of a type to its end.
func (m *maintenance) enforceLimit(ctx context.Context, recordType string) error {
	var ended int64
	defer func() { m.report(ctx, "records above the limit of their user deleted", ended) }()
	for {
		progress := m.limited[recordType]
		page, err := m.queries.RecordsExcess(ctx, db.RecordsExcessParams{
			Type: recordType, AfterVersion: progress.version, MaxRows: maintenancePage,
		})
		if err != nil {
			return err
		}
		n, err := inBatches(page.IDs, page.Versions, func(ids []string, versions []int64) (int64, error) {
			return m.queries.RecordsEndExcess(ctx, db.RecordsEndExcessParams{Type: recordType, IDs: ids, Versions: versions})
		})
		ended += n
		if err != nil {
			return err
		}
		// A record that was written meanwhile was spared, and is in the log again.
		progress.version = page.LastVersion
		m.limited[recordType] = progress
		if page.Seen < maintenancePage {
			return nil
		}
		if mine, err := m.hold(ctx); err != nil || !mine {
			return err
		}
	}
}

// endOfMissingUsers deletes records whose user has been deleted, or has gone from the directory, of types that want that. The
// tombstones of users are followed, however they came about.
func (m *maintenance) endOfMissingUsers(ctx context.Context) error {
	types, err := m.queries.TypesEndingWithUsers(ctx)
	if err != nil {
		return err
	}
	maps.DeleteFunc(m.gone, func(sweep userSweep, _ int64) bool { return !slices.Contains(types, sweep.recordType) })
	var errs []error
	for _, recordType := range types {
		for _, userType := range userTypes {
			if err := m.sweepUsers(ctx, userSweep{recordType, userType}); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", recordType, err))
			}
		}
	}
	return errors.Join(errs...)
}

// sweepUsers follows the tombstones of a type of users to the end.
func (m *maintenance) sweepUsers(ctx context.Context, sweep userSweep) error {
	var ended int64
	defer func() { m.report(ctx, "records of missing users deleted", ended) }()
	for {
		page, err := m.queries.UsersGone(ctx, db.UsersGoneParams{
			UserType: sweep.userType, AfterVersion: m.gone[sweep], MaxRows: maintenancePage,
		})
		if err != nil {
			return err
		}
		for tombstones := range slices.Chunk(page.Versions, maintenanceBatch) {
			n, err := m.drain(ctx, func(ctx context.Context) (int64, error) {
				return m.queries.RecordsEndOfMissingUsers(ctx, db.RecordsEndOfMissingUsersParams{
					Type: sweep.recordType, Tombstones: tombstones, MaxRows: maintenanceBatch,
				})
			})
			ended += n
			if err != nil {
				return err
			}
		}
		m.gone[sweep] = page.LastVersion
		if page.Seen < maintenancePage {
			return nil
		}
		if mine, err := m.hold(ctx); err != nil || !mine {
			return err
		}
	}
}

// inBatches passes keys on in batches that hold the order lock briefly, and adds up what is returned.
func inBatches(ids []string, versions []int64, do func(ids []string, versions []int64) (int64, error)) (int64, error) {
	var done int64
	for len(ids) > 0 {
		n := min(len(ids), maintenanceBatch)
		rows, err := do(ids[:n], versions[:n])
		done += rows
		if err != nil {
			return done, err
		}
		ids, versions = ids[n:], versions[n:]
	}
	return done, nil
}

// purgeTombstones removes a batch of tombstones.
func (m *maintenance) purgeTombstones(ctx context.Context) (int64, error) {
	return m.queries.ChangesPurgeTombstones(ctx, db.ChangesPurgeTombstonesParams{Retention: m.retention, MaxRows: maintenanceBatch})
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

// reindex brings the index and the expiry of a type's records up to what writes do now, and then lets
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
	return m.queries.TypeIndexed(ctx, db.TypeIndexedParams{Type: row.Type, IndexVersion: row.IndexVersion})
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
