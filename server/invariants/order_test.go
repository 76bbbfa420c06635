package invariants

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/proto/databroker"
	"pgbroker/server/servertest"
)

// storm is a load of random writers and readers.
type storm struct {
	replicas, writers, sqlWriters, streams int
	changes                                int64 // at least so many in all
	keys                                   int   // of each of three types
	// tolerant writers go on when a write fails, as it may when the order is broken on purpose.
	tolerant bool
}

// logged is a committed change, as noted by a trigger on the change log.
type logged struct {
	version         int64
	recordType, id  string
	deleted         bool
	supersededBelow int64
}

// TestI1_NoChangeIsLostUnderFire: three replicas, writers through gRPC and in SQL, streams on all
// replicas that are cut and resumed elsewhere at random, and a listener whose backend is terminated at
// random. Every stream gets every change, in order, unless a newer one of the same record follows.
func TestI1_NoChangeIsLostUnderFire(t *testing.T) {
	violations := storm{
		replicas: 3, writers: 64, sqlWriters: 4, streams: 8, changes: 100_000, keys: 2000,
	}.run(t)
	for _, violation := range violations {
		t.Error(violation)
	}
}

// TestI1_TheOrderLockIsNeeded takes the order lock out of the triggers and checks that the test above
// would notice.
func TestI1_TheOrderLockIsNeeded(t *testing.T) {
	violations := storm{
		replicas: 3, writers: 32, sqlWriters: 4, streams: 2, changes: 5_000, keys: 100_000, tolerant: true,
	}.runWith(t, `CREATE OR REPLACE FUNCTION pgbroker.lock_order() RETURNS void LANGUAGE sql AS ''`)
	if len(violations) == 0 {
		t.Error("without the order lock, no stream has missed a change: the validator would not notice")
	}
	t.Logf("%d violations, for example: %v", len(violations), violations[:min(3, len(violations))])
}

func (s storm) run(t *testing.T) []string { return s.runWith(t, "") }

func (s storm) runWith(t *testing.T, breakage string) []string {
	t.Parallel()
	broker := servertest.New(t, servertest.Options{Replicas: s.replicas})
	broker.Database.Exec(t, `
		CREATE TABLE public.committed (version bigint, type text, id text, deleted boolean);
		CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO public.committed SELECT version, type, id, deleted FROM added;
			RETURN NULL;
		END $$;
		CREATE TRIGGER note AFTER INSERT ON pgbroker.changes
			REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION note();`)
	if breakage != "" {
		broker.Database.Exec(t, breakage)
	}
	// Without the order lock writers deadlock: the sooner they notice, the sooner they go on.
	broker.Database.AdminExec(t, `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET deadlock_timeout = ''20ms''', current_database()); END $$`)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	info, err := broker.ServerInfo(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}

	var readers errgroup.Group
	observers := make([]*observer, s.streams)
	for i := range observers {
		observers[i] = &observer{
			serverVersion: info.ServerVersion, seed: uint64(i), replicas: broker.Replicas, longest: int(s.changes / 25),
		}
		readers.Go(func() error { return observers[i].follow(ctx) })
	}

	var written atomic.Int64
	var writers errgroup.Group
	for i := range s.writers {
		writers.Go(func() error { return s.write(ctx, broker.Replicas[i%s.replicas], uint64(i), &written) })
	}
	for i := range s.sqlWriters {
		writers.Go(func() error { return s.writeSQL(ctx, broker.Database.Connect(t), uint64(i), &written) })
	}
	// Faults go on as long as the writers.
	faults := make(chan struct{})
	var saboteur sync.WaitGroup
	saboteur.Go(func() {
		random := rand.New(rand.NewPCG(99, 99))
		for next := int64(0); ; {
			select {
			case <-faults:
				return
			default:
			}
			if written.Load() >= next {
				broker.Database.TerminateBackends(t, "pgbroker-listener")
				next = written.Load() + 2000 + random.Int64N(5000)
			} else {
				_, _ = broker.ServerInfo(ctx, nil) // a breath, tied to an event
			}
		}
	})
	if err := writers.Wait(); err != nil {
		t.Fatalf("write: %v", err)
	}
	close(faults)
	saboteur.Wait()
	marker, err := broker.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{{Type: "marker", Id: "end"}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, observer := range observers {
		observer.until.Store(marker.Records[0].Version)
	}
	// The marker may have been delivered before its version was known: one more change wakes everybody.
	if _, err := broker.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{{Type: "marker", Id: "wake"}}}); err != nil {
		t.Fatal(err)
	}
	if err := readers.Wait(); err != nil {
		t.Fatalf("read: %v", err)
	}

	rows, err := broker.Database.Pool.Query(ctx, `
		SELECT version, type, id, deleted,
		       coalesce(lead(version) OVER (PARTITION BY type, id ORDER BY version), 0)
		FROM public.committed WHERE version <= $1 ORDER BY version`, int64(marker.Records[0].Version))
	if err != nil {
		t.Fatal(err)
	}
	log, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (l logged, err error) {
		return l, row.Scan(&l.version, &l.recordType, &l.id, &l.deleted, &l.supersededBelow)
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(log) < int(s.changes) && breakage == "" {
		t.Errorf("only %d changes were made, want at least %d", len(log), s.changes)
	}
	var violations []string
	resumes, delivered := 0, 0
	for i, observer := range observers {
		for _, violation := range observer.check(log) {
			violations = append(violations, fmt.Sprintf("stream %d: %s", i, violation))
		}
		resumes += observer.resumes
		delivered += len(observer.seen)
	}
	t.Logf("%d changes, %d deliveries on %d streams, %d resumes", len(log), delivered, len(observers), resumes)
	if resumes == 0 {
		t.Error("no stream was cut")
	}
	return violations
}

// write puts and deletes records of its own choosing, several at once.
func (s storm) write(ctx context.Context, replica *servertest.Replica, seed uint64, written *atomic.Int64) error {
	random := rand.New(rand.NewPCG(seed, 1))
	for written.Load() < s.changes {
		request := new(databroker.PutRequest)
		for range 1 + random.IntN(8) {
			record := &databroker.Record{Type: fmt.Sprintf("type-%d", random.IntN(3)), Id: fmt.Sprintf("id-%d", random.IntN(s.keys))}
			if random.IntN(5) == 0 {
				record.DeletedAt = timestamppb.Now()
			}
			request.Records = append(request.Records, record)
		}
		response, err := replica.Put(ctx, request)
		switch {
		case err == nil:
			for _, record := range response.Records {
				if record.Version != 0 {
					written.Add(1)
				}
			}
		case !s.tolerant:
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		}
	}
	return nil
}

// writeSQL does the same in transactions of several statements.
func (s storm) writeSQL(ctx context.Context, conn *pgx.Conn, seed uint64, written *atomic.Int64) error {
	random := rand.New(rand.NewPCG(seed, 2))
	for written.Load() < s.changes {
		count := int64(0)
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			for range 1 + random.IntN(3) {
				statement := []string{
					`INSERT INTO pgbroker.records (type, id) VALUES ($1, $2) ON CONFLICT (type, id) DO UPDATE SET payload = NULL`,
					`UPDATE pgbroker.records SET payload = '' WHERE type = $1 AND id >= $2 AND id < $2 || '1'`,
					`DELETE FROM pgbroker.records WHERE type = $1 AND id = $2`,
				}[random.IntN(3)]
				tag, err := tx.Exec(ctx, statement, fmt.Sprintf("type-%d", random.IntN(3)), fmt.Sprintf("id-%d", random.IntN(s.keys)))
				if err != nil {
					return err
				}
				count += tag.RowsAffected()
			}
			if random.IntN(10) == 0 {
				return errRollback // its versions are never seen
			}
			return nil
		})
		switch {
		case err == nil:
			written.Add(count)
		case errors.Is(err, errRollback):
		case !s.tolerant:
			return err
		case ctx.Err() != nil:
			return ctx.Err()
		}
	}
	return nil
}

var errRollback = errors.New("roll back")

// observer is a client that follows all changes, over streams that it cuts at random.
type observer struct {
	serverVersion uint64
	seed          uint64
	replicas      []*servertest.Replica
	longest       int // most changes before it cuts a stream

	until      atomic.Uint64 // stop there; 0 until it is known
	version    uint64        // resume point
	resumes    int
	seen       map[uint64]seen
	violations []string
}

type seen struct {
	recordType, id string
	deleted        bool
}

func (o *observer) follow(ctx context.Context) error {
	o.seen = make(map[uint64]seen)
	random := rand.New(rand.NewPCG(o.seed, 3))
	for {
		replica := o.replicas[random.IntN(len(o.replicas))]
		cut := 1 + random.IntN(o.longest)
		end, err := o.stream(ctx, replica, cut)
		if end || err != nil {
			return err
		}
		o.resumes++
	}
}

// stream follows one stream for a number of changes, or to the end.
func (o *observer) stream(ctx context.Context, replica *servertest.Replica, changes int) (end bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := replica.Sync(ctx, &databroker.SyncRequest{ServerVersion: o.serverVersion, RecordVersion: o.version})
	if err != nil {
		return false, err
	}
	for changes > 0 {
		response, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF), status.Code(err) == codes.Unavailable:
			return false, nil // go on elsewhere
		case err != nil:
			return false, err
		}
		record := response.GetRecord()
		if record == nil {
			continue // options
		}
		changes--
		if record.Version <= o.version {
			o.violations = append(o.violations, fmt.Sprintf("version %d after %d", record.Version, o.version))
		}
		o.version = record.Version
		o.seen[record.Version] = seen{record.Type, record.Id, record.DeletedAt != nil}
		if until := o.until.Load(); until != 0 && o.version >= until {
			return true, nil
		}
	}
	return false, nil
}

// check compares what was delivered with what was committed.
func (o *observer) check(log []logged) []string {
	violations := o.violations
	committed := make(map[uint64]seen, len(log))
	for _, change := range log {
		want := seen{change.recordType, change.id, change.deleted}
		committed[uint64(change.version)] = want
		got, ok := o.seen[uint64(change.version)]
		switch {
		case ok && got != want:
			violations = append(violations, fmt.Sprintf("version %d is %+v, want %+v", change.version, got, want))
		case !ok && change.supersededBelow == 0:
			violations = append(violations, fmt.Sprintf("version %d (%+v) was never delivered", change.version, want))
		}
	}
	last := uint64(log[len(log)-1].version)
	for version, got := range o.seen {
		if _, ok := committed[version]; !ok && version <= last {
			violations = append(violations, fmt.Sprintf("version %d (%+v) was never committed", version, got))
		}
	}
	return violations
}
