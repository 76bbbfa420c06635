package bench

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"pgbroker/proto/databroker"
)

// putOptions say what a Put writes.
type putOptions struct {
	load
	records int // in each Put
	// update rewrites records of a store of so many; 0 writes new ones.
	update int
}

// put measures Puts.
func (r *runner) put(ctx context.Context, o putOptions) (*Result, error) {
	clients, err := r.clients(o.clients, r.connections)
	if err != nil {
		return nil, err
	}
	kind := "new"
	var record func(random uint32, n int64, j int) *databroker.Record
	if o.update > 0 {
		kind = fmt.Sprintf("of %s", showCount(o.update))
		stored, err := r.ensureStored(ctx, o.update)
		if err != nil {
			return nil, err
		}
		// Neighbours are as good as any others, because ids are scattered, and no key may be twice in a Put.
		record = func(random uint32, n int64, j int) *databroker.Record {
			return stored.record(uint32((uint64(random)+uint64(j))%uint64(o.update)), uint32(n)+1)
		}
	} else {
		unique, from := r.corpus.collection("unique"), r.unique
		if from == 0 {
			r.remove("new records", func() int { return r.unique }, func(i int) *databroker.Record { return unique.deletion(uint32(i)) })
		}
		record = func(_ uint32, n int64, j int) *databroker.Record {
			return unique.record(uint32(int64(from)+n*int64(o.records)+int64(j)), 0)
		}
	}
	work := fmt.Sprintf("put %s, %s", counted(o.records, kind+" record"), o.at())
	if o.update > 0 {
		work = fmt.Sprintf("put %s %s, %s", counted(o.records, "record"), kind, o.at())
	}
	randoms := r.randoms(o.clients)
	var last atomic.Int64
	r.progress.step(work)
	outcome, err := o.run(ctx, r.processes, r.progress, func(ctx context.Context, client int, n, _ int64) error {
		atMost(&last, n+1)
		records := make([]*databroker.Record, o.records)
		random := randoms[client].Uint32()
		for j := range records {
			records[j] = record(random, n, j)
		}
		response, err := clients[client].Put(ctx, &databroker.PutRequest{Records: records})
		if err != nil {
			return err
		}
		if got := len(response.GetRecords()); got != len(records) {
			return fmt.Errorf("put: got %d records in the answer, want %d", got, len(records))
		}
		return nil
	})
	if o.update == 0 {
		r.unique += int(last.Load()) * o.records
	}
	if err != nil {
		return nil, err
	}
	result := r.result("put", work, o.load, map[string]any{"records": o.records, "update": o.update}).take(outcome)
	if o.records > 1 {
		result.Records, result.RecordUnit = result.Operations*int64(o.records), "records"
		result.RecordsRate = result.Rate * float64(o.records)
	}
	return result, nil
}

// readOptions say what is read of how large a store.
type readOptions struct {
	load
	stored int
	// queries only
	by           string // id, field or text
	declareIndex bool   // make user_id an indexable field of sessions, for servers that have to be told
}

// get measures Gets by id.
func (r *runner) get(ctx context.Context, o readOptions) (*Result, error) {
	clients, err := r.clients(o.clients, r.connections)
	if err != nil {
		return nil, err
	}
	stored, err := r.ensureStored(ctx, o.stored)
	if err != nil {
		return nil, err
	}
	work := fmt.Sprintf("get of %s, %s", showCount(o.stored), o.at())
	randoms := r.randoms(o.clients)
	r.progress.step(work)
	outcome, err := o.run(ctx, r.processes, r.progress, func(ctx context.Context, client int, _, _ int64) error {
		id := stored.ids.id(uint32(randoms[client].IntN(o.stored)))
		response, err := clients[client].Get(ctx, &databroker.GetRequest{Type: sessionType, Id: id})
		if err != nil {
			return err
		}
		return checkRecord(response.GetRecord(), id)
	})
	if err != nil {
		return nil, err
	}
	return r.result("get", work, o.load, map[string]any{"stored": o.stored}).take(outcome), nil
}

// checkRecord checks that a record is the one that was asked for.
func checkRecord(record *databroker.Record, id string) error {
	if record.GetId() != id || len(record.GetData().GetValue()) == 0 {
		return fmt.Errorf("got record %q with %d bytes, want %q with its data", record.GetId(), len(record.GetData().GetValue()), id)
	}
	return nil
}

// The limits of queries, as their users have them: a proxy wants one record, a person a page.
const (
	fieldLimit = 100
	textLimit  = 20
)

// userField is the indexed field that queries by field ask about.
const userField = "user_id"

// query measures Queries.
func (r *runner) query(ctx context.Context, o readOptions) (*Result, error) {
	clients, err := r.clients(o.clients, r.connections)
	if err != nil {
		return nil, err
	}
	if o.declareIndex {
		restore, err := declareIndex(ctx, clients[0])
		if err != nil {
			return nil, err
		}
		defer restore()
	}
	stored, err := r.ensureStored(ctx, o.stored)
	if err != nil {
		return nil, err
	}
	// ask returns a query about a random record, and the least number of records that answer it.
	var ask func(index uint32) (*databroker.QueryRequest, int)
	name := map[string]string{"id": "query by id, limit 1", "field": "query by " + userField, "text": "query by text, limit 20"}[o.by]
	switch o.by {
	case "id":
		ask = func(index uint32) (*databroker.QueryRequest, int) {
			return &databroker.QueryRequest{Type: sessionType, Limit: 1, Filter: newFilter("id", stored.ids.id(index))}, 1
		}
	case "field":
		ask = func(index uint32) (*databroker.QueryRequest, int) {
			first := index - index%sessionsPerUser
			return &databroker.QueryRequest{Type: sessionType, Limit: fieldLimit, Filter: newFilter(userField, stored.userID(index))},
				min(sessionsPerUser, o.stored-int(first))
		}
	case "text":
		ask = func(index uint32) (*databroker.QueryRequest, int) {
			return &databroker.QueryRequest{Type: sessionType, Limit: textLimit, Query: strings.ToLower(stored.template(index).name)}, 1
		}
	default:
		return nil, fmt.Errorf("query by %q is not known", o.by)
	}
	work := fmt.Sprintf("%s of %s, %s", name, showCount(o.stored), o.at())
	randoms := r.randoms(o.clients)
	r.progress.step(work)
	outcome, err := o.run(ctx, r.processes, r.progress, func(ctx context.Context, client int, _, _ int64) error {
		request, least := ask(uint32(randoms[client].IntN(o.stored)))
		response, err := clients[client].Query(ctx, request)
		if err != nil {
			return err
		}
		if got := len(response.GetRecords()); got < least && !r.bare {
			return fmt.Errorf("query: got %d records, want at least %d (does the server index the field? see --declare-index)", got, least)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return r.result("query", work, o.load, map[string]any{"stored": o.stored, "by": o.by}).take(outcome), nil
}

func newFilter(field, value string) *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{field: structpb.NewStringValue(value)}}
}

// declareIndex adds user_id to the indexable fields of sessions. restore sets the options back.
func declareIndex(ctx context.Context, client databroker.DataBrokerServiceClient) (restore func(), err error) {
	before, err := client.GetOptions(ctx, &databroker.GetOptionsRequest{Type: sessionType})
	if err != nil && status.Code(err) != codes.NotFound { // which says that there are none
		return nil, fmt.Errorf("get the options of sessions: %w", err)
	}
	options := before.GetOptions()
	if options == nil {
		options = new(databroker.Options)
	}
	if slices.Contains(options.GetIndexableFields(), userField) {
		return func() {}, nil
	}
	wanted := &databroker.Options{
		Capacity: options.Capacity, Ttl: options.Ttl, IndexableFields: append([]string{userField}, options.GetIndexableFields()...),
	}
	if _, err := client.SetOptions(ctx, &databroker.SetOptionsRequest{Type: sessionType, Options: wanted}); err != nil {
		return nil, fmt.Errorf("set the options of sessions: %w", err)
	}
	return func() {
		_, _ = client.SetOptions(context.WithoutCancel(ctx), &databroker.SetOptionsRequest{Type: sessionType, Options: options})
	}, nil
}
