package invariants

import (
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/server/servertest"
)

// BenchmarkRecovery measures what a client sees while something restarts or fails: how long a revocation
// takes from the first try until every stream has it, and how long writes fail. Clients know all replicas
// and repeat what failed. It is the table in docs/recovery.md.
func BenchmarkRecovery(b *testing.B) {
	for _, event := range []struct {
		name   string
		happen func(*recovery)
	}{
		{"nothing", func(*recovery) {}},
		{"replica-restart", func(r *recovery) {
			old := r.world.replicas[0]
			if err := old.Stop(); err != nil {
				r.world.t.Fatal(err)
			}
			r.world.replicas[0] = r.world.start(db.Config{ConnString: r.connString}, old.Address)
		}},
		{"primary-restart", func(r *recovery) {
			r.primary.Stop()
			r.primary.Restart()
		}},
		{"primary-killed", func(r *recovery) {
			r.primary.Kill()
			r.primary.Restart()
		}},
		{"switchover", func(r *recovery) {
			r.primary.Stop()
			r.standby.Promote()
		}},
		{"failover", func(r *recovery) {
			r.primary.Kill()
			r.standby.Promote()
		}},
		{"failover-with-loss", func(r *recovery) {
			r.standby.Detach()
			r.await(50)
			r.primary.Kill()
			r.standby.Promote()
		}},
	} {
		b.Run(event.name, func(b *testing.B) {
			var m measures
			for range b.N {
				r := newRecovery(b)
				r.await(100)
				event.happen(r)
				r.await(100)
				r.stop(&m)
			}
			m.report(b)
		})
	}
}

// recovery is a cluster with a client that revokes one thing after the other.
type recovery struct {
	world            *world
	connString       string
	primary, standby *dbtest.Postgres
	probes           atomic.Int64
	stopping         atomic.Bool
	measured         chan measures // of the probe
	unavailable      chan time.Duration
}

// measures are times of revocations.
type measures struct {
	received []time.Duration // from the first try to the receipt by every stream
	written  []time.Duration // from the first try to the acknowledgement, the longest of each run, by another client
}

func newRecovery(b *testing.B) *recovery {
	r := &recovery{primary: newPrimary(b), measured: make(chan measures, 1), unavailable: make(chan time.Duration, 1)}
	r.standby = newStandby(r.primary)
	r.connString = dbtest.ConnString(r.primary.Addr(), r.standby.Addr())
	r.world = newQuietWorld(b, 2, r.connString)
	conn := dialAll(b, r.world.replicas)
	anywhere := &servertest.Replica{
		DataBrokerServiceClient: databroker.NewDataBrokerServiceClient(conn), Health: grpc_health_v1.NewHealthClient(conn),
	}
	for range 20 {
		r.world.addFollower(anywhere)
	}
	go r.probe(anywhere)
	go r.write(anywhere)
	return r
}

// put writes a record, however often it takes. It returns 0 if a repeated delete finds nothing.
func (r *recovery) put(client *servertest.Replica, record *databroker.Record) (version uint64) {
	for {
		response, err := client.Put(r.world.ctx, &databroker.PutRequest{Records: []*databroker.Record{record}}, grpc.WaitForReady(true))
		if err == nil {
			return response.Records[0].Version
		}
		time.Sleep(5 * time.Millisecond) // as a patient client
	}
}

// write writes all the time, and measures the longest time that it took.
func (r *recovery) write(client *servertest.Replica) {
	var longest time.Duration
	for !r.stopping.Load() {
		start := time.Now()
		r.put(client, &databroker.Record{Type: "written", Id: "all the time"})
		longest = max(longest, time.Since(start))
	}
	r.unavailable <- longest
}

func (r *recovery) probe(client *servertest.Replica) {
	w := r.world
	var m measures
	defer func() { r.measured <- m }()
	// received waits until every follower has a version, or knows by a new copy that it was lost.
	received := func(version uint64, copies []int64) {
		w.await(func() bool {
			for i, f := range w.followers {
				if f.seen.Load() < version && f.copies.Load() == copies[i] {
					return false
				}
			}
			return true
		})
	}
	revoke := func(record *databroker.Record) {
		start := time.Now()
		copies := make([]int64, len(w.followers))
		for i, f := range w.followers {
			copies[i] = f.copies.Load()
		}
		if version := r.put(client, record); version != 0 {
			received(version, copies)
			m.received = append(m.received, time.Since(start))
		}
	}
	for n := 0; !r.stopping.Load(); n++ {
		id := fmt.Sprint(n)
		r.put(client, newValue(id, "session"))
		revoke(&databroker.Record{Type: worldType, Id: id, DeletedAt: timestamppb.Now()})
		r.probes.Add(1)
	}
}

// await waits for so many revocations.
func (r *recovery) await(n int64) {
	for until := r.probes.Load() + n; r.probes.Load() < until && !r.world.t.Failed(); {
		time.Sleep(time.Millisecond)
	}
}

// stop ends the client and adds what it has measured.
func (r *recovery) stop(all *measures) {
	r.stopping.Store(true)
	m := <-r.measured
	all.received = append(all.received, m.received...)
	all.written = append(all.written, <-r.unavailable)
}

func (m *measures) report(b *testing.B) {
	slices.Sort(m.received)
	slices.Sort(m.written)
	milliseconds := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	b.ReportMetric(milliseconds(m.received[len(m.received)/2]), "p50-ms")
	b.ReportMetric(milliseconds(m.received[len(m.received)*99/100]), "p99-ms")
	b.ReportMetric(milliseconds(m.received[len(m.received)-1]), "max-ms")
	b.ReportMetric(milliseconds(m.written[len(m.written)/2]), "unavailable-ms")
	b.ReportMetric(0, "ns/op")
}
