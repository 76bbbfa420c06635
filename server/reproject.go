package server

import (
	"context"
	"fmt"

	"pgbroker/db"
	"pgbroker/server/projection"
)

// projectionBatchBytes bounds the payloads of one batch.
const projectionBatchBytes = 4 << 20

// reproject brings the projections of existing records up to the types and rules that are in force. It goes on where it,
// or another replica, has stopped.
func (m *maintenance) reproject(ctx context.Context) error {
	due, err := m.queries.ReprojectionsList(ctx)
	if err != nil {
		return err
	}
	for _, work := range due {
		if err := m.reprojectType(ctx, work); err != nil {
			return fmt.Errorf("records of type %s: %w", work.Type, err)
		}
	}
	return m.sweep(ctx)
}

func (m *maintenance) reprojectType(ctx context.Context, work db.PgbrokerReprojection) error {
	known, err := m.projector.load(ctx)
	if err != nil || known.version < work.SchemaVersion {
		return err
	}
	var changed int64
	for from := work.NextID; ; {
		rows, err := m.queries.RecordsToProject(ctx, db.RecordsToProjectParams{
			Type: work.Type, FromID: from, MaxRows: maintenanceBatch, MaxBytes: projectionBatchBytes,
		})
		if err != nil {
			return err
		}
		if len(rows) == 0 {
			break
		}
		n, err := m.projectBatch(ctx, known, rows)
		if err != nil {
			return err
		}
		changed += n
		from = rows[len(rows)-1].ID + "\x01" // just behind it; bytewise, as the table's keys are ordered
		err = m.queries.ReprojectionAdvance(ctx, db.ReprojectionAdvanceParams{Type: work.Type, SchemaVersion: work.SchemaVersion, NextID: from})
		if err != nil {
			return err
		}
		if mine, err := m.hold(ctx); err != nil || !mine {
			return err
		}
	}
	m.noteProjected(ctx, work.Type, changed)
	return m.queries.ReprojectionDone(ctx, db.ReprojectionDoneParams{Type: work.Type, SchemaVersion: work.SchemaVersion})
}

// sweep looks once more at what was written after the latest change of types and rules, when every replica must have
// heard of that, which takes a poll, and must have written what it had begun before, which takes the time of a request.
func (m *maintenance) sweep(ctx context.Context) error {
	due, err := m.queries.SweepDue(ctx, m.projectionGrace)
	if err != nil || len(due) == 0 {
		return err
	}
	known, err := m.projector.load(ctx)
	if err != nil || known.version < due[0].Version {
		return err
	}
	var changed int64
	for after := due[0].RecordVersion; ; {
		page, err := m.queries.RecordsToSweep(ctx, db.RecordsToSweepParams{After: after, MaxRows: maintenanceBatch, MaxBytes: projectionBatchBytes})
		if err != nil {
			return err
		}
		if len(page) == 0 {
			break
		}
		after = page[len(page)-1].Version
		n, err := m.projectBatch(ctx, known, convertRows(page, func(r db.RecordsToSweepRow) db.RecordsToProjectRow { return db.RecordsToProjectRow(r) }))
		if err != nil {
			return err
		}
		changed += n
		if mine, err := m.hold(ctx); err != nil || !mine {
			return err
		}
	}
	m.noteProjected(ctx, "", changed)
	return m.queries.SweepDone(ctx, due[0].Version)
}

// projectBatch sets the projections that are not what they should be. The others are not locked, and nobody waits for
// them.
func (m *maintenance) projectBatch(ctx context.Context, known *knownTypes, rows []db.RecordsToProjectRow) (int64, error) {
	var all db.RecordsMisprojectedParams
	for i := range rows {
		if rows[i].Payload == nil {
			continue
		}
		var projected projection.Projection
		err := m.supervisor.Catch(ctx, "periodic work", func() error {
			projected = known.Project(rows[i].Payload)
			return nil
		})
		if err != nil { // it stays as it is, and the others are projected
			m.misfits.note(ctx, key{rows[i].Type, rows[i].ID}, rows[i].Version, len(rows[i].Payload), misfitPanicked)
			continue
		}
		all.Types = append(all.Types, rows[i].Type)
		all.IDs = append(all.IDs, rows[i].ID)
		all.Versions = append(all.Versions, rows[i].Version)
		all.Projections = append(all.Projections, string(projected.Data))
		all.SearchTexts = append(all.SearchTexts, projected.SearchText)
		all.IndexCIDRs = append(all.IndexCIDRs, projected.IndexCIDR)
	}
	positions, err := m.queries.RecordsMisprojected(ctx, all)
	if err != nil || len(positions) == 0 {
		return 0, err
	}
	var wrong db.RecordsProjectParams
	for _, position := range positions {
		i := position - 1
		wrong.Types = append(wrong.Types, all.Types[i])
		wrong.IDs = append(wrong.IDs, all.IDs[i])
		wrong.Versions = append(wrong.Versions, all.Versions[i])
		wrong.Projections = append(wrong.Projections, all.Projections[i])
		wrong.SearchTexts = append(wrong.SearchTexts, all.SearchTexts[i])
		wrong.IndexCIDRs = append(wrong.IndexCIDRs, all.IndexCIDRs[i])
	}
	return m.queries.RecordsProject(ctx, wrong)
}

func (m *maintenance) noteProjected(ctx context.Context, recordType string, n int64) {
	if n > 0 {
		m.logger.InfoContext(ctx, "records projected again", "type", recordType, "count", n)
		m.metrics.maintained.WithLabelValues("records projected again").Add(float64(n))
	}
}
