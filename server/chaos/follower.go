package chaos

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"pgbroker/proto/databroker"
)

// quietTime is how long a follower waits for something to arrive before it goes elsewhere: nobody tells it
// that its connection has been swallowed.
const quietTime = 4 * time.Second

// follower is a client that keeps a copy, as proxies do: SyncLatest once, then Sync, resumed on whatever
// replica, until it is told to start over.
type follower struct {
	*client
	stream *Stream

	serverVersion uint64
	version       atomic.Uint64
	known         bool // there is a copy
	resumes       int
	deliveries    int
}

// followers are all of them.
type followers struct {
	all   []*follower
	group sync.WaitGroup
	stop  context.CancelFunc
}

func startFollowers(t testing.TB, w *workload, types []string) *followers {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	fs := &followers{stop: cancel}
	for _, recordType := range types {
		f := &follower{client: w.newClient(t), stream: &Stream{Type: recordType}}
		fs.all = append(fs.all, f)
		fs.group.Go(func() { f.run(ctx) })
	}
	return fs
}

// reached tells whether all followers know everything up to versions, which are by type, and by "" for
// those of all types.
func (fs *followers) reached(versions map[string]uint64) bool {
	for _, f := range fs.all {
		if f.version.Load() < versions[f.stream.Type] {
			return false
		}
	}
	return true
}

func (fs *followers) end() {
	fs.stop()
	fs.group.Wait()
}

func (f *follower) run(ctx context.Context) {
	for ctx.Err() == nil {
		replica, broker := f.pick()
		var err error
		if !f.known {
			err = f.latest(ctx, replica, broker)
		}
		if err == nil {
			f.sync(ctx, replica, broker)
		}
		if f.random.IntN(20) == 0 {
			f.known = false // as after a restart
		}
		pause(ctx, time.Duration(f.random.IntN(200))*time.Millisecond)
	}
}

func (f *follower) note(event Event) {
	event.At = f.recorder.now()
	f.stream.Events = append(f.stream.Events, event)
}

// ended notes the end of a stream.
func (f *follower) ended(ctx context.Context, replica int, err error) {
	code := status.Code(err).String()
	switch {
	case err == nil, ctx.Err() != nil:
		code = codeLeft
	case errors.Is(err, io.EOF):
		code = codeEOF
	}
	f.note(Event{Kind: evEnd, Replica: replica, Code: code})
}

// patient returns a context that ends when nothing has happened for quietTime; call the function whenever
// something has.
func patient(ctx context.Context) (_ context.Context, happened func(), cancel func()) {
	ctx, end := context.WithCancel(ctx)
	timer := time.AfterFunc(quietTime, end)
	return ctx, func() { timer.Reset(quietTime) }, func() { timer.Stop(); end() }
}

// latest gets everything.
func (f *follower) latest(ctx context.Context, replica int, broker databroker.DataBrokerServiceClient) error {
	ctx, happened, cancel := patient(ctx)
	defer cancel()
	f.note(Event{Kind: evLatest, Replica: replica})
	stream, err := broker.SyncLatest(ctx, &databroker.SyncLatestRequest{Type: f.stream.Type})
	for err == nil {
		var response *databroker.SyncLatestResponse
		if response, err = stream.Recv(); err != nil {
			break
		}
		happened()
		if record := response.GetRecord(); record != nil {
			f.note(Event{
				Kind: evRecord, Replica: replica, Version: record.Version,
				Key: Key{record.Type, record.Id}, Content: contentOf(record.Data),
			})
		}
		if versions := response.GetVersions(); versions != nil {
			f.note(Event{Kind: evVersions, Replica: replica, Version: versions.LatestRecordVersion, ServerVersion: versions.ServerVersion})
			f.serverVersion, f.known = versions.ServerVersion, true
			f.version.Store(versions.LatestRecordVersion)
			return nil
		}
	}
	f.ended(ctx, replica, err)
	return err
}

// sync follows a stream until it breaks, or for a number of changes, or until it is quiet for too long.
func (f *follower) sync(ctx context.Context, replica int, broker databroker.DataBrokerServiceClient) {
	ctx, happened, cancel := patient(ctx)
	defer cancel()
	wait := f.random.IntN(5) > 0
	most := 1 + f.random.IntN(2000)
	f.note(Event{Kind: evSync, Replica: replica, Version: f.version.Load(), ServerVersion: f.serverVersion, Wait: wait})
	f.resumes++
	stream, err := broker.Sync(ctx, &databroker.SyncRequest{
		ServerVersion: f.serverVersion, RecordVersion: f.version.Load(), Type: f.stream.Type, Wait: &wait,
	})
	for err == nil {
		var response *databroker.SyncResponse
		if response, err = stream.Recv(); err != nil {
			break
		}
		happened()
		record := response.GetRecord()
		if record == nil {
			continue // options
		}
		event := Event{
			Kind: evChange, Replica: replica, Version: record.Version, Key: Key{record.Type, record.Id}, Deleted: record.DeletedAt != nil,
		}
		if !event.Deleted {
			event.Content = contentOf(record.Data)
		}
		f.note(event)
		f.version.Store(max(f.version.Load(), record.Version))
		f.deliveries++
		if most--; most == 0 {
			break
		}
		if record.Type != typeCapped && f.random.IntN(50) == 0 {
			f.readBack(ctx, event)
			happened()
		}
	}
	f.ended(ctx, replica, err)
	if status.Code(err) == codes.Aborted {
		f.known = false
	}
}

// readBack reads on any replica what a stream has just delivered.
func (f *follower) readBack(ctx context.Context, event Event) {
	ctx, cancel := f.context(ctx)
	defer cancel()
	replica, broker := f.pick()
	op := f.get(ctx, replica, broker, event.Key, event.Version)
	f.recorder.add(op)
}
