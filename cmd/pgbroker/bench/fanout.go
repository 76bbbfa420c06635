package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"pgbroker/proto/databroker"
)

// fanoutOptions say what many streams are sent.
type fanoutOptions struct {
	load    // of the publishers; in a closed loop each publishes when all streams have its event before
	streams int
	// revoke publishes deletions instead of new records: with Put, or viaSQL with DELETE.
	revoke, viaSQL bool
	// directory is how many records of a directory are loaded meanwhile, again and again.
	directory int
}

// publishers is how many publish in a closed loop: enough that streams have something to send while a commit is waited for.
const publishers = 16

// mostEvents bounds the events of a closed loop, whose number is not known before.
const mostEvents = 100_000

// events returns how many events there can be. The first one is for finding out whether the streams are there.
func (o *fanoutOptions) events() int {
	if o.rate > 0 {
		return int(o.rate*(o.warmup+o.duration).Seconds()) + 2*o.clients + 2 // so that they do not run out before the time
	}
	if o.revoke {
		return mostEvents / 5 // they have to be put before
	}
	return mostEvents
}

// fanout measures how changes reach streams, and checks that each of them reaches each stream once and in order.
func (r *runner) fanout(ctx context.Context, o fanoutOptions) (*Result, error) {
	r.runs++
	f := &fanout{
		runner: r, o: o, most: o.events(), records: r.corpus.collection(fmt.Sprintf("events %d", r.runs)),
		published: newRecorder(o.clients), receipts: newRecorder(o.streams), everywhere: newRecorder(o.streams),
		arrived: make([]chan uint32, o.clients),
	}
	for i := range f.arrived {
		f.arrived[i] = make(chan uint32, 1)
	}
	return f.run(ctx)
}

// A fanout is one run.
type fanout struct {
	*runner
	o       fanoutOptions
	most    int // events
	records *collection
	events  *events
	publish func(ctx context.Context, client int, index uint32) error

	// Times from when an event was due,
	published  *recorder // until it was acknowledged
	receipts   *recorder // until a stream received it
	everywhere *recorder // until the last stream received it

	window  atomic.Pointer[window]
	used    atomic.Int64  // events that may have been published
	last    atomic.Int64  // when the last event that counts was received
	arrived []chan uint32 // by publisher: its event has arrived on all streams

	open               atomic.Int64 // streams that were opened
	reconnects, resets atomic.Int64
	failure            atomic.Pointer[error] // why a stream could not go on
}

// A window is the time in which events count.
type window struct{ begin, end int64 }

func (f *fanout) run(ctx context.Context) (*Result, error) {
	conns, err := f.spread(f.o.streams, f.connections)
	if err != nil {
		return nil, err
	}
	stop, err := f.preparePublishing(ctx)
	if err != nil {
		return nil, err
	}
	defer stop()
	server, version, err := f.versions(ctx)
	if err != nil {
		return nil, err
	}

	f.events = newEvents(f.most, f.o.streams)
	streaming, endStreams := context.WithCancel(ctx)
	defer endStreams()
	ledgers := make([]*ledger, f.o.streams)
	var streams sync.WaitGroup
	for i := range ledgers {
		ledgers[i] = f.events.newLedger(f.o.clients, version)
		streams.Go(func() { f.follow(streaming, i, conns[i], ledgers[i], server) })
	}
	work := f.work()
	f.progress.step(work)
	if err := f.awaitStreams(ctx); err != nil {
		return nil, err
	}
	background, err := f.startDirectory(ctx)
	if err != nil {
		return nil, err
	}
	outcome, err := f.runLoad(ctx)
	loaded := background()
	if err == nil {
		err = f.awaitRest(ctx)
	}
	endStreams()
	streams.Wait()
	if err != nil {
		return nil, err
	}

	result := f.result(f.scenario(), work, f.o.load, map[string]any{"streams": f.o.streams})
	result.take(outcome)
	result.Latencies = map[string]*Latency{
		"until it was acknowledged":    fullLatency(f.published.histogram()),
		"until the last stream had it": fullLatency(f.everywhere.histogram()),
	}
	receipts := f.receipts.histogram()
	result.Latency = fullLatency(receipts)
	f.deliveries(result, receipts, outcome)
	result.Checks = &Checks{
		Streams: f.o.streams, Events: f.events.certain(), Expected: f.events.certain() * int64(f.o.streams),
		Reconnects: f.reconnects.Load(), Resets: f.resets.Load(),
	}
	for _, l := range ledgers {
		result.Checks.add(l)
	}
	if f.o.directory > 0 {
		result.Figures = append(result.Figures, Figure{"directory records loaded meanwhile", loaded, "records/s"})
	}
	return result, nil
}

func (f *fanout) scenario() string {
	if f.o.revoke {
		return "revoke"
	}
	return "fanout"
}

func (f *fanout) work() string {
	what := "fan-out"
	switch {
	case f.o.viaSQL:
		what = "revocation by SQL DELETE"
	case f.o.revoke:
		what = "revocation by Put"
	}
	work := fmt.Sprintf("%s, %s, ", what, counted(f.o.streams, "stream"))
	if f.o.rate > 0 {
		work += fmt.Sprintf("%s events/s", showNumber(f.o.rate))
	} else {
		work += "as fast as all streams get it"
	}
	if f.o.directory > 0 {
		work += fmt.Sprintf(", while %s directory records are loaded", showCount(f.o.directory))
	}
	return work
}

// preparePublishing makes the way in which events are published, and loads the records that are to be revoked.
func (f *fanout) preparePublishing(ctx context.Context) (stop func(), err error) {
	clients, err := f.clients(f.o.clients, f.connections)
	if err != nil {
		return nil, err
	}
	stop = func() {}
	put := func(ctx context.Context, client int, record *databroker.Record) error {
		_, err := clients[client].Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{record}})
		return err
	}
	f.remove("records of events", func() int { return int(f.used.Load()) }, func(i int) *databroker.Record { return f.records.deletion(uint32(i)) })
	if !f.o.revoke {
		f.publish = func(ctx context.Context, client int, index uint32) error {
			return put(ctx, client, f.records.record(index, 0))
		}
		return stop, nil
	}
	f.publish = func(ctx context.Context, client int, index uint32) error {
		return put(ctx, client, f.records.deletion(index))
	}
	if f.o.viaSQL {
		pool, err := f.openPool(ctx, f.o.clients)
		if err != nil {
			return nil, err
		}
		stop = pool.Close
		f.publish = func(ctx context.Context, _ int, index uint32) error {
			tag, err := pool.Exec(ctx, sqlDeleteRecord, sessionType, f.records.ids.id(index))
			if err == nil && tag.RowsAffected() != 1 {
				err = fmt.Errorf("DELETE: %d rows, want 1", tag.RowsAffected())
			}
			return err
		}
	}
	if !f.bare {
		f.used.Store(int64(f.most))
		err = f.putAll(ctx, fmt.Sprintf("loading %s to revoke", counted(f.most, "session")), f.most, func(i int) *databroker.Record {
			return f.records.record(uint32(i), 0)
		})
	}
	if err != nil {
		stop()
	}
	return stop, err
}

// openPool connects to the database of the broker.
func (r *runner) openPool(ctx context.Context, size int) (*pgxpool.Pool, error) {
	url, err := r.databaseURL()
	if err != nil {
		return nil, err
	}
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, errors.New("the connection string is not valid") // pgx's own error repeats parts of it
	}
	config.MaxConns, config.MinConns = int32(size), int32(size)
	config.ConnConfig.RuntimeParams["application_name"] = "pgbroker-bench"
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	if err := pool.Ping(ctx); err != nil {
		pool.Close()
		return nil, fmt.Errorf("open the database: %w", err)
	}
	return pool, nil
}

// follow reads one stream to the end of the run. A stream that is cut is resumed as a client would resume it.
func (f *fanout) follow(ctx context.Context, stream int, conn *grpc.ClientConn, l *ledger, server uint64) {
	for {
		err := f.read(ctx, stream, conn, l, server)
		switch code := status.Code(err); {
		case ctx.Err() != nil:
			return
		case code == codes.Aborted:
			f.resets.Add(1) // a real client would load everything again, and here something may be lost
			return
		case errors.Is(err, io.EOF), code == codes.Unavailable, code == codes.Internal, code == codes.Unknown, code == codes.Canceled:
			f.reconnects.Add(1)
		default:
			f.failure.CompareAndSwap(nil, &err)
			return
		}
		if !sleepUntil(ctx, now()+int64(50*time.Millisecond)) {
			return
		}
	}
}

// read is one call of Sync.
func (f *fanout) read(ctx context.Context, number int, conn *grpc.ClientConn, l *ledger, server uint64) error {
	stream, err := openStream(ctx, conn, &syncMethod, databroker.DataBrokerService_Sync_FullMethodName,
		&databroker.SyncRequest{ServerVersion: server, RecordVersion: l.version, Type: sessionType})
	if err != nil {
		return err
	}
	if f.bare { // it forgets what nobody listens to
		if _, err := stream.Header(); err != nil {
			return err
		}
	}
	f.open.Add(1)
	message := &frame{ids: f.records.ids}
	for {
		if err := stream.RecvMsg(message); err != nil {
			return err
		}
		if message.kind != frameRecord {
			continue
		}
		if !message.ours || message.deleted != f.o.revoke {
			l.pass(message.version)
			continue
		}
		at := now()
		first, everywhere := l.note(message.index, message.version)
		if !first {
			continue
		}
		due := f.events.due[message.index]
		if f.counts(due) {
			f.receipts.record(number, time.Duration(at-due))
			atMost(&f.last, at)
			if everywhere {
				f.everywhere.record(number, time.Duration(at-due))
			}
		}
		if everywhere {
			select {
			case f.arrived[f.events.client[message.index]] <- message.index:
			default: // nobody waits for it any more
			}
		}
	}
}

// counts reports whether an event that was due at a time is measured.
func (f *fanout) counts(due int64) bool {
	w := f.window.Load()
	return w != nil && due >= w.begin && due < w.end
}

// awaitStreams waits until all streams are open, publishes the first event and waits until each of them has it.
func (f *fanout) awaitStreams(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 3*patience, errors.New("not every stream has received the first event"))
	defer cancel()
	published := false
	for {
		if failure := f.failure.Load(); failure != nil {
			return *failure
		}
		if !published && f.open.Load() >= int64(f.o.streams) {
			published = true
			f.events.send(0, 0, now())
			atMost(&f.used, 1)
			if err := f.publish(ctx, 0, 0); err != nil {
				return err
			}
			f.events.acknowledge(0)
		}
		select {
		case <-f.arrived[0]:
			return nil
		case <-time.After(5 * time.Millisecond): // to look at the streams again
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// runLoad publishes the events.
func (f *fanout) runLoad(ctx context.Context) (*outcome, error) {
	begin := now() + int64(f.o.warmup)
	f.window.Store(&window{begin, begin + int64(f.o.duration)})
	l := f.o.load
	l.most = int64(f.most - 1)
	return l.run(ctx, f.processes, f.progress, func(ctx context.Context, client int, n, due int64) error {
		index := uint32(n + 1)
		f.events.send(index, client, due)
		atMost(&f.used, n+2)
		if err := f.publish(ctx, client, index); err != nil {
			return err
		}
		f.events.acknowledge(index)
		if f.counts(due) {
			f.published.record(client, time.Duration(now()-due))
		}
		if f.o.rate > 0 {
			return nil
		}
		return f.awaitArrival(ctx, client, index)
	})
}

// awaitArrival waits until an event has arrived on every stream.
func (f *fanout) awaitArrival(ctx context.Context, client int, index uint32) error {
	late := time.NewTimer(patience)
	defer late.Stop()
	for {
		select {
		case arrived := <-f.arrived[client]:
			if arrived == index {
				return nil
			}
		case <-late.C:
			return fmt.Errorf("an event has not reached %d of %d streams within %v", f.events.waiting[index].Load(), f.o.streams, patience)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// quiet is how long nothing must have come for what is missing to be lost. A variable for tests.
var quiet = 5 * time.Second

// awaitRest waits for what is still on its way, as long as anything comes.
func (f *fanout) awaitRest(ctx context.Context) error {
	missing := func() (n int64) {
		for i := range f.events.state {
			if f.events.state[i].Load() == eventCertain {
				n += int64(f.events.waiting[i].Load())
			}
		}
		return n
	}
	f.progress.show("waiting for the rest")
	before, since := missing(), now()
	for before > 0 && time.Duration(now()-since) < quiet {
		if !sleepUntil(ctx, now()+int64(20*time.Millisecond)) {
			return ctx.Err()
		}
		if failure := f.failure.Load(); failure != nil {
			return *failure
		}
		if left := missing(); left != before {
			before, since = left, now()
		}
	}
	// And a moment more for what should not come at all.
	if !sleepUntil(ctx, now()+int64(50*time.Millisecond)) {
		return ctx.Err()
	}
	return nil
}

// deliveries fills in how many events have reached streams in how long.
func (f *fanout) deliveries(result *Result, receipts *hdrhistogram.Histogram, o *outcome) {
	result.Records, result.RecordUnit = receipts.TotalCount(), "deliveries"
	// The last ones may have come after the last Put was answered.
	elapsed := max(o.elapsed, time.Duration(f.last.Load()-f.window.Load().begin))
	if elapsed > 0 {
		result.RecordsRate = float64(result.Records) / elapsed.Seconds()
	}
}

// startDirectory loads a directory again and again until the returned function is called, which returns records per second.
func (f *fanout) startDirectory(ctx context.Context) (stop func() float64, err error) {
	if f.o.directory == 0 || f.bare {
		return func() float64 { return 0 }, nil
	}
	d := newDirectory(f.seed, f.o.directory-f.o.directory/20, f.o.directory/20)
	f.remove("directory records", d.size, func(i int) *databroker.Record { return deletion(d.record(i, 0)) })
	puts := batches(d.records(0), directoryBatch)
	clients, err := f.clients(directoryClients, f.connections)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var next, done atomic.Int64
	var workers sync.WaitGroup
	begun := now()
	for _, client := range clients {
		workers.Go(func() {
			for ctx.Err() == nil {
				batch := puts[int(next.Add(1)-1)%len(puts)]
				if _, err := client.Put(ctx, &databroker.PutRequest{Records: batch}); err != nil {
					sleepUntil(ctx, now()+int64(pauseAfterError))
					continue
				}
				done.Add(int64(len(batch)))
			}
		})
	}
	return func() float64 {
		cancel()
		workers.Wait()
		return float64(done.Load()) / time.Duration(now()-begun).Seconds()
	}, nil
}
