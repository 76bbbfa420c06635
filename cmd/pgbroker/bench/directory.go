package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"pgbroker/proto/databroker"
)

// The Puts of a directory source.
const (
	directoryClients = 4
	directoryBatch   = 500
)

// directoryOptions say how large a directory is.
type directoryOptions struct {
	clients, batch int
	users, groups  int
}

// directory measures what a source of directory data does: its first load, the same again as a source does that does not look
// at what is there, and then as one does that compares and writes what has changed: nothing, and one user in a hundred.
func (r *runner) directory(ctx context.Context, o directoryOptions) ([]*Result, error) {
	d := newDirectory(r.seed, o.users, o.groups)
	r.remove("directory records", d.size, func(i int) *databroker.Record { return deletion(d.record(i, 0)) })
	all := d.records(0)
	changed := make([]*databroker.Record, len(all))
	for i := range changed {
		changed[i] = all[i]
		if i >= d.groups && (i-d.groups)%100 == 0 {
			changed[i] = d.record(i, 1)
		}
	}
	size := fmt.Sprintf("%s and %s", counted(o.users, "user"), counted(o.groups, "group"))
	var results []*Result
	for _, step := range []struct {
		work    string
		wanted  []*databroker.Record
		compare bool
	}{
		{"directory of " + size + ": first load", all, false},
		{"the same again, without looking", all, false},
		{"compared, nothing changed", all, true},
		{"compared, 1% of users changed", changed, true},
	} {
		result, err := r.syncDirectory(ctx, o, step.work, step.wanted, step.compare)
		if err != nil {
			return results, err
		}
		results = append(results, result)
	}
	return results, nil
}

// syncDirectory brings the broker to the wanted records.
func (r *runner) syncDirectory(ctx context.Context, o directoryOptions, work string, wanted []*databroker.Record, compare bool) (*Result, error) {
	clients, err := r.clients(o.clients, r.connections)
	if err != nil {
		return nil, err
	}
	r.progress.step(work)
	begun, before := now(), r.processes.usage()
	read := 0
	if compare && !r.bare {
		present := make(map[string]*databroker.Record, len(wanted))
		for _, recordType := range []string{directoryGroupType, directoryUserType} {
			if err := readAll(ctx, clients[0], recordType, present); err != nil {
				return nil, err
			}
		}
		read = len(present)
		if wanted, err = differences(present, wanted); err != nil {
			return nil, err
		}
	}
	comparing := now()
	result := r.result("directory", fmt.Sprintf("%s, %s × %d", work, counted(o.clients, "client"), o.batch), load{clients: o.clients},
		map[string]any{"users": o.users, "groups": o.groups, "batch": o.batch})
	if puts := batches(wanted, o.batch); len(puts) > 0 {
		// As many operations as there are Puts: it ends when all are done.
		l := load{clients: o.clients, duration: longest, most: int64(len(puts))}
		outcome, err := l.run(ctx, r.processes, r.progress, func(ctx context.Context, client int, n, _ int64) error {
			_, err := clients[client].Put(ctx, &databroker.PutRequest{Records: puts[n]})
			return err
		})
		if err != nil {
			return nil, err
		}
		if outcome.failed > 0 {
			return nil, fmt.Errorf("load the directory: %d of %d requests failed: %w", outcome.failed, len(puts), outcome.first)
		}
		result.take(outcome)
	}
	result.Seconds = float64(now()-begun) / 1e9
	result.CPU = newCPU(r.processes.usage().minus(before))
	result.Records, result.RecordUnit = int64(len(wanted)), "records"
	if compare {
		result.Records = int64(max(read, len(wanted)))
		result.Figures = append(result.Figures,
			Figure{"read and compared in", float64(comparing-begun) / 1e6, "ms"}, Figure{"written", float64(len(wanted)), "records"})
	}
	if result.Seconds > 0 {
		result.RecordsRate = float64(result.Records) / result.Seconds
	}
	return result, nil
}

// readAll lists the records of a type by id.
func readAll(ctx context.Context, client databroker.DataBrokerServiceClient, recordType string, into map[string]*databroker.Record) error {
	stream, err := client.SyncLatest(ctx, &databroker.SyncLatestRequest{Type: recordType})
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		if record := response.GetRecord(); record != nil {
			into[record.GetId()] = record
		}
	}
}

// differences returns the wanted records that are not there as they should be.
func differences(present map[string]*databroker.Record, wanted []*databroker.Record) ([]*databroker.Record, error) {
	var missing []*databroker.Record
	for _, record := range wanted {
		same, err := sameData(present[record.GetId()], record)
		if err != nil {
			return nil, err
		}
		if !same {
			missing = append(missing, record)
		}
	}
	return missing, nil
}

// sameData compares payloads, which some servers encode anew.
func sameData(a, b *databroker.Record) (bool, error) {
	switch {
	case a == nil:
		return false, nil
	case bytes.Equal(a.GetData().GetValue(), b.GetData().GetValue()):
		return true, nil
	}
	var one, other structpb.Struct
	if err := errors.Join(proto.Unmarshal(a.GetData().GetValue(), &one), proto.Unmarshal(b.GetData().GetValue(), &other)); err != nil {
		return false, fmt.Errorf("compare directory records: %w", err)
	}
	return proto.Equal(&one, &other), nil
}
