package bench

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"pgbroker/proto/databroker"
)

// soakOptions say how sessions are used: each is patched once in every interval.
type soakOptions struct {
	load
	sessions int
	interval time.Duration
	schema   string // of the broker's tables
}

// A tableSample is what Postgres says of a table at one time.
type tableSample struct {
	Name                         string
	Updates, HotUpdates, Dead    int64
	TableBytes, IndexBytes, Rows int64
}

// A sample is what Postgres says of a schema at one time.
type sample struct {
	at     time.Duration
	tables []tableSample
	wal    int64
}

func (s *sample) table(name string) tableSample {
	i := slices.IndexFunc(s.tables, func(t tableSample) bool { return t.Name == name })
	if i < 0 {
		return tableSample{}
	}
	return s.tables[i]
}

func (s *sample) bytes() (n int64) {
	for _, t := range s.tables {
		n += t.TableBytes + t.IndexBytes
	}
	return n
}

// soakSamples is how often the tables are looked at.
const soakSamples = 12

// settle is how long busy backends of Postgres take to report their counts, and slowestReport how long idle ones do.
const (
	settle        = 1500 * time.Millisecond
	slowestReport = 11 * time.Second
)

// strideOf returns a number that has no divisor in common with n: its multiples modulo n are all numbers below n, in an order
// that jumps about.
func strideOf(n int) int64 {
	gcd := func(a, b int64) int64 {
		for b != 0 {
			a, b = b, a%b
		}
		return a
	}
	stride := max(1, int64(float64(n)*0.618))
	for gcd(int64(n), stride) != 1 {
		stride++
	}
	return stride
}

// soak measures what a long time of sessions being used does to the database: whether updates stay in their page (HOT), and
// whether tables, indexes and the change log stay as large as they are.
func (r *runner) soak(ctx context.Context, o soakOptions) (*Result, error) {
	o.rate = float64(o.sessions) / o.interval.Seconds()
	clients, err := r.clients(o.clients, r.connections)
	if err != nil {
		return nil, err
	}
	pool, err := r.openPool(ctx, 1)
	if err != nil {
		return nil, fmt.Errorf("soak looks at the tables, and therefore needs the database: %w", err)
	}
	defer pool.Close()
	stored, err := r.ensureStored(ctx, o.sessions)
	if err != nil {
		return nil, err
	}
	work := fmt.Sprintf("soak: %s, each used every %v", counted(o.sessions, "session"), o.interval)
	r.progress.step(work)
	if !sleepUntil(ctx, now()+int64(settle)) {
		return nil, ctx.Err()
	}
	first, err := takeSample(ctx, pool, o.schema)
	if err != nil {
		return nil, err
	}
	samples := []*sample{first}
	sampling, stopSampling := context.WithCancel(ctx)
	defer stopSampling()
	sampled := make(chan error, 1)
	begun := now()
	go func() {
		for i := int64(1); i < soakSamples; i++ {
			if !sleepUntil(sampling, begun+i*int64(o.warmup+o.duration)/soakSamples) {
				break
			}
			s, err := takeSample(sampling, pool, o.schema)
			if sampling.Err() != nil {
				break // cut off by the end
			}
			if err != nil {
				sampled <- err
				return
			}
			s.at = time.Duration(now() - begun)
			samples = append(samples, s)
		}
		sampled <- nil
	}()
	var patched atomic.Int64
	stride := strideOf(o.sessions)
	outcome, err := o.run(ctx, r.processes, r.progress, func(ctx context.Context, client int, n, _ int64) error {
		// In an order that has nothing to do with that of ids, nor with that in which they were stored: neighbours in the
		// table would be patched at the same moment.
		record := stored.touch(uint32(n%int64(o.sessions)*stride%int64(o.sessions)), time.Now())
		response, err := clients[client].Patch(ctx, &databroker.PatchRequest{Records: []*databroker.Record{record}, FieldMask: accessedMask})
		if err != nil {
			return err
		}
		if n := len(response.GetRecords()); n != 1 {
			return fmt.Errorf("patch: %d records in the answer, want 1", n)
		}
		patched.Add(1)
		return nil
	})
	stopSampling()
	if sampleErr := <-sampled; sampleErr != nil && ctx.Err() == nil && err == nil {
		err = sampleErr
	}
	if err != nil {
		return nil, err
	}
	last, err := awaitReports(ctx, pool, o.schema, first, patched.Load())
	if err != nil {
		return nil, err
	}
	last.at = time.Duration(now() - begun)
	result := r.result("soak", work, o.load, map[string]any{"sessions": o.sessions, "interval_seconds": o.interval.Seconds()}).take(outcome)
	result.soaked(append(samples, last))
	return result, nil
}

// awaitReports takes a sample when Postgres has counted all updates that were made since the first one.
func awaitReports(ctx context.Context, pool *pgxpool.Pool, schema string, first *sample, updates int64) (*sample, error) {
	deadline := now() + int64(slowestReport)
	for {
		if !sleepUntil(ctx, now()+int64(settle)/5) {
			return nil, ctx.Err()
		}
		s, err := takeSample(ctx, pool, schema)
		if err != nil {
			return nil, err
		}
		counted := slices.ContainsFunc(s.tables, func(t tableSample) bool { return t.Updates-first.table(t.Name).Updates >= updates })
		if counted || now() > deadline {
			return s, nil
		}
	}
}

// soaked fills in what the samples say.
func (r *Result) soaked(samples []*sample) {
	first, last := samples[0], samples[len(samples)-1]
	var updates, hot int64
	for _, t := range last.tables {
		before := first.table(t.Name)
		if n := t.Updates - before.Updates; n > 0 {
			updates, hot = updates+n, hot+t.HotUpdates-before.HotUpdates
			r.Figures = append(r.Figures, Figure{"HOT updates of " + t.Name, 100 * float64(t.HotUpdates-before.HotUpdates) / float64(n), "%"})
		}
	}
	if updates > 0 {
		r.Figures = append(r.Figures, Figure{"HOT updates in all", 100 * float64(hot) / float64(updates), "%"})
	}
	for _, t := range last.tables {
		before := first.table(t.Name)
		if t.TableBytes+t.IndexBytes < 1<<20 && t.TableBytes+t.IndexBytes == before.TableBytes+before.IndexBytes {
			continue // small and still
		}
		r.Figures = append(r.Figures,
			Figure{t.Name + " at first", float64(before.TableBytes), "bytes"}, Figure{t.Name + " at last", float64(t.TableBytes), "bytes"},
			Figure{"indexes of " + t.Name + " at first", float64(before.IndexBytes), "bytes"},
			Figure{"indexes of " + t.Name + " at last", float64(t.IndexBytes), "bytes"})
	}
	if first.bytes() > 0 {
		half := samples[len(samples)/2]
		r.Figures = append(r.Figures,
			Figure{"growth in the first half", 100 * (float64(half.bytes())/float64(first.bytes()) - 1), "%"},
			Figure{"growth in the second half", 100 * (float64(last.bytes())/float64(half.bytes()) - 1), "%"})
	}
	if r.Operations > 0 {
		r.Figures = append(r.Figures, Figure{"write-ahead log per patch", float64(last.wal-first.wal) / float64(r.Operations), "bytes"})
	}
	for _, s := range samples {
		r.samples = append(r.samples, point{s.at.Seconds(), float64(s.bytes())})
	}
	var b strings.Builder
	b.WriteString("size of tables and indexes over time:")
	for _, s := range samples {
		fmt.Fprintf(&b, " %s", showBytes(float64(s.bytes())))
	}
	r.Notes = append(r.Notes, b.String())
}

// takeSample looks at the tables of a schema.
func takeSample(ctx context.Context, pool *pgxpool.Pool, schema string) (*sample, error) {
	rows, err := pool.Query(ctx, sqlTables, schema)
	if err != nil {
		return nil, fmt.Errorf("look at the tables: %w", err)
	}
	s := new(sample)
	if s.tables, err = pgx.CollectRows(rows, pgx.RowToStructByPos[tableSample]); err != nil {
		return nil, fmt.Errorf("look at the tables: %w", err)
	}
	if len(s.tables) == 0 {
		return nil, fmt.Errorf("look at the tables: schema %q has none (see --schema)", schema)
	}
	if err := pool.QueryRow(ctx, sqlWAL).Scan(&s.wal); err != nil {
		return nil, fmt.Errorf("look at the write-ahead log: %w", err)
	}
	return s, nil
}
