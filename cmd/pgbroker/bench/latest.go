package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"pgbroker/proto/databroker"
)

// bareRecords is the metadata by which the bare server is told how many records to send.
const bareRecords = "bench-records"

// syncLatestMethod describes the stream of SyncLatest, and syncMethod that of Sync, for reading them into frames.
var (
	syncLatestMethod = grpc.StreamDesc{StreamName: "SyncLatest", ServerStreams: true}
	syncMethod       = grpc.StreamDesc{StreamName: "Sync", ServerStreams: true}
)

// openStream calls a method that streams, to be read into frames.
func openStream(ctx context.Context, conn *grpc.ClientConn, desc *grpc.StreamDesc, method string, request any) (grpc.ClientStream, error) {
	stream, err := conn.NewStream(ctx, desc, method, grpc.ForceCodecV2(newCodec()))
	if err != nil {
		return nil, err
	}
	if err := stream.SendMsg(request); err != nil && !errors.Is(err, io.EOF) { // then receiving says why
		return nil, err
	}
	return stream, stream.CloseSend()
}

// syncLatest measures listings of the whole store, one after the other on each client.
func (r *runner) syncLatest(ctx context.Context, o readOptions) (*Result, error) {
	conns, err := r.spread(o.clients, r.connections)
	if err != nil {
		return nil, err
	}
	stored, err := r.ensureStored(ctx, o.stored)
	if err != nil {
		return nil, err
	}
	work := fmt.Sprintf("sync-latest of %s, %s", showCount(o.stored), o.at())
	ctx = metadata.AppendToOutgoingContext(ctx, bareRecords, fmt.Sprint(o.stored))
	var records, bytes atomic.Int64
	r.progress.step(work)
	memory := r.processes.watchMemory()
	outcome, err := o.run(ctx, r.processes, r.progress, func(ctx context.Context, client int, _, _ int64) error {
		n, size, err := r.list(ctx, conns[client], stored, o.stored)
		if err == nil {
			records.Store(n)
			bytes.Store(size)
		}
		return err
	})
	peak := memory()
	if err != nil {
		return nil, err
	}
	result := r.result("sync-latest", work, o.load, map[string]any{"stored": o.stored}).take(outcome)
	result.Records, result.RecordUnit = records.Load()*result.Operations, "records"
	result.RecordsRate = result.Rate * float64(records.Load())
	result.Memory = peak
	if n := records.Load(); n > 0 {
		result.Figures = append(result.Figures, Figure{"message size", float64(bytes.Load()) / float64(n), "bytes"})
	}
	return result, nil
}

// list reads one listing and checks it. It returns the number of its records and their size.
func (r *runner) list(ctx context.Context, conn *grpc.ClientConn, stored *collection, want int) (records, size int64, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := openStream(ctx, conn, &syncLatestMethod, databroker.DataBrokerService_SyncLatest_FullMethodName,
		&databroker.SyncLatestRequest{Type: sessionType})
	if err != nil {
		return 0, 0, err
	}
	found := newCensus(want)
	f := &frame{ids: stored.ids, latest: true}
	versions := false
	for {
		switch err := stream.RecvMsg(f); {
		case errors.Is(err, io.EOF):
			lost := found.lost(want)
			switch {
			case r.bare:
			case !versions:
				return 0, 0, errors.New("sync-latest: the listing ended without versions")
			case lost > 0 || found.duplicated > 0:
				return 0, 0, fmt.Errorf("sync-latest: %d of %d records are missing, %d came twice", lost, want, found.duplicated)
			}
			return records, size, nil
		case err != nil:
			return 0, 0, err
		}
		switch f.kind {
		case frameRecord:
			records++
			size += int64(f.size)
			if f.ours {
				found.note(f.index)
			}
		case frameVersions:
			versions = f.server != 0
		}
	}
}
