package server

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"pgbroker/db"
	"pgbroker/server/auth"
	"pgbroker/server/combiner"
	"pgbroker/server/projection"
)

// writer writes records for all requests of this replica: concurrent requests share statements.
type writer struct {
	db       *db.DB
	queries  *db.Queries
	timeout  time.Duration
	combiner *combiner.Combiner[*writeRequest, writeResult]
	done     func(context.Context, error) // is told how each batch has ended; nil is allowed
}

// writeRequest is what one Put or Patch wants written, all or nothing.
type writeRequest struct {
	rows []writeRow
	// caller is whose request it is, for the audit.
	caller auth.Caller
}

// writeRow is a record to write or to delete.
type writeRow struct {
	key
	delete     bool
	payload    []byte // serialized Any; nil if the record has no data
	projection projection.Projection
	// expected is the version that the record must have, or the request has no effect; 0 does not mind.
	expected int64
}

// key identifies a record.
type key struct{ recordType, id string }

// writeResult tells what has become of a request.
type writeResult struct {
	serverVersion int64
	// written has the new version and time of each row; a version of 0 where a delete found no record.
	written []written
	// conflict says that a record did not have the expected version; nothing was written.
	conflict bool
}

type written struct {
	version    int64
	modifiedAt time.Time
}

// Bounds of a batch, which holds the order lock while it is written: some 250 sessions, which take a tenth of what may
// delay a revocation. While one is written, the requests of the next gather.
const (
	maxBatchRequests = 1000
	maxBatchWeight   = 1 << 20
	// heavyWeight is that of a request of some 30 sessions, such as a directory's.
	heavyWeight = 128 << 10
	// rowWeight is what a row weighs besides its bytes: about what it takes longer to write.
	rowWeight = 1 << 10
)

func newWriter(database *db.DB, timeout time.Duration) *writer {
	w := &writer{db: database, queries: db.New(database), timeout: timeout}
	w.combiner = combiner.New(combiner.Config[*writeRequest, writeResult]{
		Run: w.run,

		RetryAlone:  blamesRequest,
		Weight:      (*writeRequest).weight,
		MaxRequests: maxBatchRequests,
		MaxWeight:   maxBatchWeight,
		HeavyWeight: heavyWeight,
	})
	return w
}

// write performs a request, together with those of others.
func (w *writer) write(ctx context.Context, rows []writeRow) (writeResult, error) {
	return w.combiner.Submit(ctx, &writeRequest{rows: rows, caller: auth.CallerFrom(ctx)})
}

func (r *writeRequest) weight() int {
	weight := 0
	for i := range r.rows {
		row := &r.rows[i]
		weight += rowWeight + len(row.recordType) + len(row.id) + len(row.payload) + len(row.projection.Data) + len(row.projection.SearchText)
	}
	return weight
}

func (r *writeRequest) conditional() bool {
	for i := range r.rows {
		if r.rows[i].expected != 0 {
			return true
		}
	}
	return false
}

// blamesRequest tells an error that one request of a batch may have caused from one that would meet each
// of them. After a lost connection nothing is repeated: the batch may have been committed. After a timeout each request
// would take as long again, one after the other; unless what has been waited for was the lock of a single row.
func blamesRequest(err error) bool {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || db.IsUnavailable(err) || misconfigured(pgErr) || pgErr.Code == pgerrcode.QueryCanceled {
		return false
	}
	return pgErr.Code != pgerrcode.LockNotAvailable || rowPosition.MatchString(pgErr.Where)
}

// rowPosition finds the position of a row in what Postgres says of where an error has happened, in any language.
var rowPosition = regexp.MustCompile(`\(\d+,\d+\)`)

// wave is the rows of a batch that one statement writes: it cannot write a key twice. It knows the callers of all requests
// of the batch.
type wave struct {
	db.RecordsWriteParams
	rows map[key]*written
}

// run writes a batch: one statement for all requests, unless a key repeats; then one statement for each
// repetition, in one transaction.
func (w *writer) run(ctx context.Context, requests []*writeRequest) ([]combiner.Result[writeResult], error) {
	ctx, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()

	results := make([]combiner.Result[writeResult], len(requests))
	waves := plan(requests, results)
	var serverVersion int64
	var err error
	switch len(waves) {
	case 0:
	case 1:
		err = db.Retry(ctx, func(ctx context.Context) (err error) {
			serverVersion, err = waves[0].write(ctx, w.queries)
			return err
		})
	default:
		err = db.Retry(ctx, func(ctx context.Context) error {
			return pgx.BeginFunc(ctx, w.db, func(tx pgx.Tx) error {
				for _, wave := range waves {
					if serverVersion, err = wave.write(ctx, db.New(tx)); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
	if w.done != nil {
		w.done(ctx, err)
	}
	if err != nil {
		return nil, fmt.Errorf("write records: %w", err)
	}
	for i, request := range requests {
		result := &results[i].Value
		result.serverVersion = serverVersion
		for j := range request.rows {
			if request.rows[j].expected != 0 && !result.conflict && result.written[j].version == 0 {
				result.conflict = true
			}
		}
	}
	return results, nil
}

// plan lays the rows of all requests out in waves, and points each to its place in the results. A
// conditional request for a key that is written before it in the same batch is a conflict at once.
func plan(requests []*writeRequest, results []combiner.Result[writeResult]) []*wave {
	var waves []*wave
	keys, persons := make([]string, len(requests)), make([]string, len(requests))
	for i, request := range requests {
		keys[i], persons[i] = request.caller.Key, request.caller.Person
	}
	repeats := make(map[key]int)
	for i, request := range requests {
		result := &results[i].Value
		result.written = make([]written, len(request.rows))
		if request.conditional() {
			for j := range request.rows {
				if repeats[request.rows[j].key] > 0 {
					result.conflict = true
				}
			}
			if result.conflict {
				continue
			}
		}
		for j := range request.rows {
			row := &request.rows[j]
			n := repeats[row.key]
			repeats[row.key] = n + 1
			if n == len(waves) {
				waves = append(waves, &wave{rows: make(map[key]*written), RecordsWriteParams: db.RecordsWriteParams{Keys: keys, Persons: persons}})
			}
			waves[n].add(i, row, &result.written[j])
		}
	}
	return waves
}

func (w *wave) add(request int, row *writeRow, place *written) {
	w.rows[row.key] = place
	w.Types = append(w.Types, row.recordType)
	w.IDs = append(w.IDs, row.id)
	w.Deletes = append(w.Deletes, row.delete)
	w.Payloads = append(w.Payloads, row.payload)
	w.Projections = append(w.Projections, string(row.projection.Data))
	w.SearchTexts = append(w.SearchTexts, row.projection.SearchText)
	w.IndexCIDRs = append(w.IndexCIDRs, row.projection.IndexCIDR)
	w.Requests = append(w.Requests, int32(request))
	w.Expected = append(w.Expected, row.expected)
}

// write runs the statement, notes what it has written and returns the server version.
func (w *wave) write(ctx context.Context, queries *db.Queries) (int64, error) {
	for _, place := range w.rows {
		*place = written{} // of a try that failed
	}
	changes, err := queries.RecordsWrite(ctx, w.RecordsWriteParams)
	if err != nil {
		return 0, err
	}
	for i := range changes {
		change := &changes[i]
		// Beside the tombstones asked for there may be those of evicted records: a put that is evicted
		// by its own statement keeps the version of the put.
		place := w.rows[key{change.Type, change.ID}]
		if place != nil && (place.version == 0 || !change.Deleted) {
			*place = written{version: change.Version, modifiedAt: change.ChangedAt}
		}
	}
	return changes[0].ServerVersion, nil
}
