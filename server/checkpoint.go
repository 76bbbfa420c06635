package server

import (
	"context"
	"strconv"

	"pgbroker/db"
	"pgbroker/proto/databroker"
)

// checkpointServer serves databroker.CheckpointService: a note of how far somebody who copies another
// databroker into this one has come.
type checkpointServer struct {
	databroker.UnimplementedCheckpointServiceServer
	*Server
}

// GetCheckpoint returns the checkpoint. Every replica is a leader: all write to the same database.
func (s *checkpointServer) GetCheckpoint(ctx context.Context, _ *databroker.GetCheckpointRequest) (*databroker.GetCheckpointResponse, error) {
	var row db.CheckpointGetRow
	err := db.RetryRead(ctx, func(ctx context.Context) (err error) {
		row, err = s.reads.CheckpointGet(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	checkpoint := new(databroker.Checkpoint)
	if checkpoint.ServerVersion, err = strconv.ParseUint(row.ServerVersion, 10, 64); err != nil {
		return nil, err
	}
	if checkpoint.RecordVersion, err = strconv.ParseUint(row.RecordVersion, 10, 64); err != nil {
		return nil, err
	}
	return &databroker.GetCheckpointResponse{Checkpoint: checkpoint, IsLeader: true}, nil
}

// SetCheckpoint overwrites the checkpoint; without one, with zeros.
func (s *checkpointServer) SetCheckpoint(ctx context.Context, request *databroker.SetCheckpointRequest) (*databroker.SetCheckpointResponse, error) {
	err := db.Retry(ctx, func(ctx context.Context) error {
		return s.changes.CheckpointSet(ctx, db.CheckpointSetParams{
			ServerVersion: strconv.FormatUint(request.Checkpoint.GetServerVersion(), 10),
			RecordVersion: strconv.FormatUint(request.Checkpoint.GetRecordVersion(), 10),
		})
	})
	return new(databroker.SetCheckpointResponse), err
}
