package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/proto/databroker"
)

// A broker is what is measured: a databroker, or the bare server that stands for what none can beat.
type broker struct {
	name        string
	bare        bool
	connect     func() (*grpc.ClientConn, error)
	explain     func(error) error
	databaseURL func() (string, error)
	processes   *processes

	mu    sync.Mutex // protects what follows
	conns []*grpc.ClientConn
}

// clientsPerConnection is how many clients or streams share a connection unless told otherwise: servers of other makes allow
// no more, and so few is enough to keep one busy.
const clientsPerConnection = 100

// spread returns one connection for each of n clients or streams, of which several share one.
func (b *broker) spread(n, connections int) ([]*grpc.ClientConn, error) {
	if connections <= 0 {
		connections = (n + clientsPerConnection - 1) / clientsPerConnection
	}
	connections = max(1, min(connections, n))
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.conns) < connections {
		conn, err := b.connect()
		if err != nil {
			return nil, err
		}
		b.conns = append(b.conns, conn)
	}
	spread := make([]*grpc.ClientConn, n)
	for i := range spread {
		spread[i] = b.conns[i%connections]
	}
	return spread, nil
}

// close ends all connections.
func (b *broker) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, conn := range b.conns {
		_ = conn.Close()
	}
	b.conns = nil
}

// clients returns a client of the records for each of n.
func (b *broker) clients(n, connections int) ([]databroker.DataBrokerServiceClient, error) {
	conns, err := b.spread(n, connections)
	if err != nil {
		return nil, err
	}
	clients := make([]databroker.DataBrokerServiceClient, n)
	for i := range clients {
		clients[i] = databroker.NewDataBrokerServiceClient(conns[i])
	}
	return clients, nil
}

// A runner performs scenarios on a broker, one after the other, and removes what they have written.
type runner struct {
	*broker
	corpus      *corpus
	seed        uint64
	connections int
	progress    *progress

	stored  int // of the collection "stored", the records that are there
	unique  int // of the collection "unique", the records that may be there
	runs    int // of scenarios with events
	written []func(context.Context) error
}

func newRunner(b *broker, c *corpus, connections int, p *progress) *runner {
	return &runner{broker: b, corpus: c, seed: c.seed, connections: connections, progress: p}
}

// randoms returns a source of random numbers for each client.
func (r *runner) randoms(clients int) []*rand.Rand {
	randoms := make([]*rand.Rand, clients)
	for i := range randoms {
		randoms[i] = rand.New(rand.NewPCG(r.seed, uint64(i)))
	}
	return randoms
}

// The Puts with which records are loaded and removed outside of what is measured.
const (
	loadClients = 4
	loadBatch   = 250
)

// putAll puts records 0 to n-1 of a kind, in batches, from several clients.
func (r *runner) putAll(ctx context.Context, what string, n int, record func(i int) *databroker.Record) error {
	if n <= 0 {
		return nil
	}
	clients, err := r.clients(loadClients, r.connections)
	if err != nil {
		return err
	}
	r.progress.step(what)
	var next, done atomic.Int64
	stop := r.progress.every(func() string { return fmt.Sprintf("%s of %s", showCount(int(done.Load())), showCount(n)) })
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var workers sync.WaitGroup
	for _, client := range clients {
		workers.Go(func() {
			for {
				from := int(next.Add(loadBatch)) - loadBatch
				if from >= n || ctx.Err() != nil {
					return
				}
				records := make([]*databroker.Record, 0, loadBatch)
				for i := from; i < min(from+loadBatch, n); i++ {
					records = append(records, record(i))
				}
				if _, err := client.Put(ctx, &databroker.PutRequest{Records: records}); err != nil {
					cancel(fmt.Errorf("%s: %w", what, err))
					return
				}
				done.Add(int64(len(records)))
			}
		})
	}
	workers.Wait()
	return context.Cause(ctx)
}

// ensureStored loads the collection "stored" up to n records.
func (r *runner) ensureStored(ctx context.Context, n int) (*collection, error) {
	stored := r.corpus.collection("stored")
	if r.bare || n <= r.stored {
		r.stored = max(r.stored, n)
		return stored, nil
	}
	first := r.stored
	if first == 0 {
		r.remove("stored records", func() int { return r.stored }, func(i int) *databroker.Record { return stored.deletion(uint32(i)) })
	}
	r.stored = n // also if it fails halfway
	what := fmt.Sprintf("loading %s", counted(n-first, "record"))
	return stored, r.putAll(ctx, what, n-first, func(i int) *databroker.Record { return stored.record(uint32(first+i), 0) })
}

// remove makes cleanUp delete the first records of a kind.
func (r *runner) remove(what string, count func() int, deletion func(i int) *databroker.Record) {
	if r.bare {
		return
	}
	r.written = append(r.written, func(ctx context.Context) error {
		return r.putAll(ctx, "removing "+what, count(), deletion)
	})
}

// cleanUp deletes what the scenarios have written.
func (r *runner) cleanUp(ctx context.Context) error {
	var errs []error
	for _, remove := range r.written {
		errs = append(errs, remove(ctx))
	}
	r.forget()
	return errors.Join(errs...)
}

// clear makes the broker forget everything. Only for one that is ours alone.
func (r *runner) clear(ctx context.Context) error {
	if r.bare {
		return nil
	}
	clients, err := r.clients(1, r.connections)
	if err != nil {
		return err
	}
	if _, err := clients[0].Clear(ctx, new(emptypb.Empty)); err != nil {
		return fmt.Errorf("clear: %w", err)
	}
	r.forget()
	return nil
}

func (r *runner) forget() { r.written, r.stored, r.unique = nil, 0, 0 }

// versions returns what a stream of changes from now on must name.
func (r *runner) versions(ctx context.Context) (server, record uint64, err error) {
	clients, err := r.clients(1, r.connections)
	if err != nil {
		return 0, 0, err
	}
	info, err := clients[0].ServerInfo(ctx, new(emptypb.Empty))
	if err != nil {
		return 0, 0, fmt.Errorf("ask for the versions: %w", err)
	}
	return info.GetServerVersion(), info.GetLatestRecordVersion(), nil
}

// result returns a result that says what was done.
func (r *runner) result(scenario, work string, l load, settings map[string]any) *Result {
	all := map[string]any{"clients": l.clients, "seed": r.seed}
	if l.rate > 0 {
		all["rate"] = l.rate
	}
	if l.warmup > 0 {
		all["warmup_seconds"] = l.warmup.Seconds()
	}
	for name, value := range settings {
		all[name] = value
	}
	return &Result{Scenario: scenario, Work: work, Target: r.name, Settings: all}
}

// at says how often, for the name of some work.
func (l load) at() string {
	if l.rate > 0 {
		return fmt.Sprintf("%s/s offered", showNumber(l.rate))
	}
	return counted(l.clients, "client")
}

// patience bounds the waiting for a single thing that a sound server does at once.
const patience = 20 * time.Second
