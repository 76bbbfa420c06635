package invariants

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
)

// relay passes connections on to a server, until they are swallowed: then they stay open and nothing arrives any more, in either
// direction, as behind a firewall that has forgotten them. Later connections work.
type relay struct {
	net.Listener
	upstream string

	mu      sync.Mutex
	passing []*passing
}

type passing struct {
	swallowed atomic.Bool
	ends      [2]net.Conn
}

func newRelay(t *testing.T, upstream string) *relay {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{Listener: listener, upstream: upstream}
	go r.serve()
	t.Cleanup(func() {
		listener.Close()
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, p := range r.passing {
			p.ends[0].Close()
			p.ends[1].Close()
		}
	})
	return r
}

func (r *relay) serve() {
	for {
		near, err := r.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", r.upstream)
		if err != nil {
			near.Close()
			continue
		}
		p := &passing{ends: [2]net.Conn{near, far}}
		r.mu.Lock()
		r.passing = append(r.passing, p)
		r.mu.Unlock()
		go p.copy(near, far)
		go p.copy(far, near)
	}
}

func (p *passing) copy(to, from net.Conn) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if p.swallowed.Load() {
			if err != nil {
				return // the other end hears nothing of it
			}
			continue
		}
		if err == nil {
			_, err = to.Write(buffer[:n])
		}
		if err != nil {
			to.Close()
			from.Close()
			return
		}
	}
}

// swallow begins with all that are open.
func (r *relay) swallow() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range r.passing {
		p.swallowed.Store(true)
	}
}

// TestHalfOpenConnectionsAreNoticed: all connections of a replica to the database lead nowhere from one moment to the next, and
// new ones work. A revocation in SQL is delivered, and writes are taken, as soon as recovery.md promises.
func TestHalfOpenConnectionsAreNoticed(t *testing.T) {
	t.Parallel()
	for _, load := range []bool{false, true} {
		name := map[bool]string{false: "idle", true: "under load"}[load]
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			primary := newPrimary(t)
			way := newRelay(t, primary.Addr())
			w := newQuietWorld(t, 1, dbtest.ConnString(way.Addr().String()))
			r := w.replicas[0]
			now := latest(t, r)
			stream, err := r.Sync(t.Context(), &databroker.SyncRequest{ServerVersion: now.ServerVersion, RecordVersion: now.RecordVersion, Type: "t"})
			if err != nil {
				t.Fatal(err)
			}
			w.put(r, newValue("first", "x"))
			if response, err := stream.Recv(); err != nil || response.GetRecord().GetId() != "first" { // then it is open
				t.Fatalf("got %v (%v), want the first record", response, err)
			}
			delivered := make(chan string, 10)
			go func() {
				for {
					response, err := stream.Recv()
					if err != nil {
						return
					}
					if record := response.GetRecord(); record != nil && record.Id == "revoked" {
						delivered <- record.Id
					}
				}
			}()
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var acknowledged atomic.Int64
			written := make(chan error, 1)
			if load {
				go func() { written <- writeUntil(ctx, r, &acknowledged) }()
				within(t, time.Minute, "a write", func() bool { return acknowledged.Load() > 0 })
			}
			within(t, time.Minute, "it listens", func() bool { return r.Server.FeedStats().Listening })
			way.swallow()
			before, start := acknowledged.Load(), time.Now()
			primary.Exec(`INSERT INTO pgbroker.records (type, id, data) VALUES ('t', 'revoked', '{}')`)
			select {
			case <-delivered:
				t.Logf("delivered after %v", time.Since(start))
			case <-time.After(noticeTime):
				t.Fatalf("not delivered within %v\n%s", noticeTime, w.log.String())
			}
			if !load {
				return
			}
			within(t, 2*noticeTime, "a write after that", func() bool { return acknowledged.Load() > before })
			t.Logf("written after %v", time.Since(start))
			stop()
			if err := <-written; err != nil {
				t.Error(err)
			}
		})
	}
}

// TestAFrozenHostHidesNobody stops every process of the primary, which is the first host of the string, in the middle of writes, and
// promotes its standby: writes go there at once, and meanwhile they fail as unavailable, not as late.
func TestAFrozenHostHidesNobody(t *testing.T) {
	t.Parallel()
	primary := newPrimary(t)
	standby := newStandby(primary)
	w := newQuietWorld(t, 2, dbtest.ConnString(primary.Addr(), standby.Addr()))
	var acknowledged [2]atomic.Int64
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	written := make(chan error, 2)
	for i, r := range w.replicas {
		go func() { written <- writeUntil(ctx, r, &acknowledged[i]) }()
		within(t, time.Minute, "a write", func() bool { return acknowledged[i].Load() > 0 })
	}
	standby.CatchUp(primary)
	primary.Freeze()
	defer primary.Thaw()
	// Long enough that every connection to it is known to be silent.
	within(t, time.Minute, "replicas notice", func() bool {
		return w.replicas[0].DB.Hosts().Answering == 1 && w.replicas[1].DB.Hosts().Answering == 1
	})
	standby.Promote()
	before, start := [2]int64{acknowledged[0].Load(), acknowledged[1].Load()}, time.Now()
	within(t, noticeTime, "writes on the new primary", func() bool {
		return acknowledged[0].Load() > before[0] && acknowledged[1].Load() > before[1]
	})
	t.Logf("first writes %v after the promotion", time.Since(start))

	// One that starts now waits for the frozen host once, and no longer.
	start = time.Now()
	fresh := w.start(db.Config{ConnString: dbtest.ConnString(primary.Addr(), standby.Addr())}, "")
	t.Logf("a fresh replica serves after %v", time.Since(start))
	if got := fresh.DB.Timeline(); got != 2 {
		t.Errorf("the fresh replica is on timeline %d, want 2", got)
	}
	// So do commands and migrations, whose connections are their own.
	start = time.Now()
	command := open(t, dbtest.ConnString(primary.Addr(), standby.Addr()))
	if err := command.Look(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.ConnectConfig(t.Context(), command.ConnConfig())
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close(t.Context())
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("a command connects after %v", took)
	}
	if got, want := net.JoinHostPort(command.ConnConfig().Host, fmt.Sprint(command.ConnConfig().Port)), standby.Addr(); got != want {
		t.Errorf("a command goes to %s first, want %s, the newer one", got, want)
	}
	stop()
	for range w.replicas {
		if err := <-written; err != nil {
			t.Error(err)
		}
	}
}

// TestAFrozenServerIsUnavailable: it is the only one, and does not answer.
func TestAFrozenServerIsUnavailable(t *testing.T) {
	t.Parallel()
	primary := newPrimary(t)
	w := newQuietWorld(t, 1, primary.ConnString())
	w.put(w.replicas[0], newValue("x", "before"))
	primary.Freeze()
	defer primary.Thaw()
	_, err := w.replicas[0].Get(t.Context(), &databroker.GetRequest{Type: worldType, Id: "x"})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, want Unavailable", err)
	}
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = w.replicas[0].Get(short, &databroker.GetRequest{Type: worldType, Id: "x"})
	if code := status.Code(err); code != codes.DeadlineExceeded && code != codes.Unavailable {
		t.Errorf("with a short deadline of the client: got %v", err)
	}
	primary.Thaw()
	awaitServing(t, w.replicas[0])
	w.put(w.replicas[0], newValue("x", "after"))
}
