package bench

import (
	"context"
	"encoding/json"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"pgbroker/proto/databroker"
)

// faulty starts a bare server whose streams do not get what they should, and returns a runner on it.
func faulty(t *testing.T, fault func(stream int64, message encoded) []encoded) *runner {
	t.Helper()
	c := testCorpus()
	server := newBareServer(c)
	server.fault = fault
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var served sync.WaitGroup
	served.Go(func() { _ = server.serve(ctx, listener) })
	b := newBare(listener.Addr().String(), &processes{})
	t.Cleanup(func() { b.close(); stop(); served.Wait() })
	return newRunner(b, c, 0, nil)
}

// eventOf returns the index of the event that a message carries, of the first run of a runner.
func eventOf(m encoded) uint32 {
	f := frame{ids: testCorpus().collection("events 1").ids}
	if err := f.parse(m); err != nil || !f.ours {
		return 1 << 31
	}
	return f.index
}

// rewrite changes the record of a message.
func rewrite(m encoded, change func(*databroker.Record)) encoded {
	response := new(databroker.SyncResponse)
	if err := proto.Unmarshal(m, response); err != nil {
		panic(err)
	}
	change(response.GetRecord())
	return must(proto.Marshal(response))
}

// TestFanoutFindsPlantedErrors runs the scenario against servers that each do one thing wrong, on one of four streams, once the
// load has begun.
func TestFanoutFindsPlantedErrors(t *testing.T) {
	var mu sync.Mutex
	held := make(map[int64]encoded)
	deliver := func(m encoded) []encoded { return []encoded{m} }
	for _, test := range []struct {
		name  string
		fault func(stream int64, m encoded) []encoded
		check func(*Checks) bool
	}{
		{"nothing is wrong", func(_ int64, m encoded) []encoded { return deliver(m) }, func(c *Checks) bool {
			return !c.Failed() && c.Received == c.Expected && c.Events > 10
		}},
		{"lost", func(stream int64, m encoded) []encoded {
			if stream == 2 && eventOf(m) == 5 {
				return nil
			}
			return deliver(m)
		}, func(c *Checks) bool { return c.Failed() && c.Lost == 1 && c.Received == c.Expected-1 }},
		{"lost on every stream", func(_ int64, m encoded) []encoded {
			if eventOf(m) == 5 {
				return nil
			}
			return deliver(m)
		}, func(c *Checks) bool { return c.Failed() && c.Lost == 4 }},
		{"duplicated", func(stream int64, m encoded) []encoded {
			if stream == 1 && eventOf(m) == 5 {
				return []encoded{m, m}
			}
			return deliver(m)
		}, func(c *Checks) bool { return c.Failed() && c.Duplicated == 1 && c.Lost == 0 }},
		{"out of order", func(stream int64, m encoded) []encoded {
			mu.Lock()
			defer mu.Unlock()
			before := held[stream]
			delete(held, stream)
			switch {
			case before != nil:
				return []encoded{m, before}
			case stream == 3 && eventOf(m) == 5:
				held[stream] = m
				return nil
			}
			return deliver(m)
		}, func(c *Checks) bool { return c.Failed() && c.OutOfOrder == 1 && c.Lost == 0 }},
		{"another version", func(stream int64, m encoded) []encoded {
			if stream == 0 && eventOf(m) == 5 {
				m = rewrite(m, func(r *databroker.Record) { r.Version += 1 << 30 })
			}
			return deliver(m)
		}, func(c *Checks) bool { return c.Failed() && (c.Disagreed == 1 || c.Disagreed == 3) }}, // by which stream was first
		{"never published", func(stream int64, m encoded) []encoded {
			if stream == 0 && eventOf(m) == 5 {
				return []encoded{m, rewrite(m, func(r *databroker.Record) {
					r.Id = testCorpus().collection("events 1").ids.id(1 << 25)
				})}
			}
			return deliver(m)
		}, func(c *Checks) bool { return c.Failed() && c.Unknown == 1 }},
		{"a deletion arrives as a record", func(stream int64, m encoded) []encoded {
			if stream == 0 && eventOf(m) == 5 {
				m = rewrite(m, func(r *databroker.Record) { r.DeletedAt = r.ModifiedAt })
			}
			return deliver(m)
		}, func(c *Checks) bool { return c.Failed() && c.Lost == 1 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := faulty(t, test.fault)
			o := fanoutOptions{load: load{clients: 2, rate: 200, duration: 300 * time.Millisecond}, streams: 4}
			result, err := r.fanout(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			if !test.check(result.Checks) {
				t.Errorf("got %+v", *result.Checks)
			}
			if (result.failed() != nil) != result.Checks.Failed() {
				t.Errorf("the verdict is %v", result.failed())
			}
			if failed := strings.Contains(strings.Join(result.remarks(), "\n"), "FAILED"); failed != result.Checks.Failed() {
				t.Errorf("a person is told %q", result.remarks())
			}
		})
	}
}

// TestFanoutMeasuresDelay: without a rate, the next event waits for the slowest stream.
func TestFanoutMeasuresDelay(t *testing.T) {
	const delay = 60 * time.Millisecond
	r := faulty(t, func(stream int64, m encoded) []encoded {
		if stream == 1 {
			time.Sleep(delay)
		}
		return []encoded{m}
	})
	result, err := r.fanout(t.Context(), fanoutOptions{load: load{clients: 1, duration: 500 * time.Millisecond}, streams: 2})
	if err != nil {
		t.Fatal(err)
	}
	if result.Checks.Failed() || result.Operations < 3 || result.Operations > 9 {
		t.Errorf("got %d events, %+v; want one every %v", result.Operations, *result.Checks, delay)
	}
	last := result.Latencies["until the last stream had it"]
	if result.Latency.P50 > 50 || last.P50 < 60 {
		t.Errorf("got p50 %g ms on all streams, %g ms on the last; want one of them to be late", result.Latency.P50, last.P50)
	}
	if !about(result.RecordsRate, 2*result.Rate, 30) {
		t.Errorf("got %g deliveries/s of %g events/s to two streams", result.RecordsRate, result.Rate)
	}
}

// TestFanoutResumes: streams that are cut go on where they were, as those of a proxy do. One stays, for the bare server forgets
// what nobody listens to.
func TestFanoutResumes(t *testing.T) {
	var mu sync.Mutex
	cut := make(map[int64]bool)
	r := faulty(t, func(stream int64, m encoded) []encoded {
		mu.Lock()
		defer mu.Unlock()
		if stream < 2 && eventOf(m) == 10 && !cut[stream] {
			cut[stream] = true
			return []encoded{nil} // see Sync
		}
		return []encoded{m}
	})
	result, err := r.fanout(t.Context(), fanoutOptions{load: load{clients: 2, rate: 100, duration: 500 * time.Millisecond}, streams: 3})
	if err != nil {
		t.Fatal(err)
	}
	if c := result.Checks; c.Reconnects != 2 || c.Failed() || c.Received != c.Expected {
		t.Errorf("got %+v", *c)
	}
}

func TestFanoutNeedsStreams(t *testing.T) {
	r := faulty(t, nil)
	r.connect = newBare("127.0.0.1:1", nil).connect // nobody listens there
	_, err := r.fanout(t.Context(), fanoutOptions{load: load{clients: 1, duration: time.Second}, streams: 1})
	if status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, want that the server is unavailable", err)
	}
}

func TestFrames(t *testing.T) {
	c := testCorpus().collection("x")
	record := c.record(77, 0)
	record.Version = 1 << 40
	var f frame
	f.ids = c.ids
	for _, test := range []struct {
		name    string
		latest  bool
		message proto.Message
		want    frame
	}{
		{"a record", false, &databroker.SyncResponse{Response: &databroker.SyncResponse_Record{Record: record}},
			frame{kind: frameRecord, version: 1 << 40, index: 77, ours: true}},
		{"a deletion", false, &databroker.SyncResponse{Response: &databroker.SyncResponse_Record{Record: c.deletion(78)}},
			frame{kind: frameRecord, index: 78, ours: true, deleted: true}},
		{"somebody else's", false, &databroker.SyncResponse{Response: &databroker.SyncResponse_Record{Record: &databroker.Record{Id: "x", Version: 3}}},
			frame{kind: frameRecord, version: 3}},
		{"options", false, &databroker.SyncResponse{Response: &databroker.SyncResponse_Options{Options: &databroker.TypedOptions{TypeURL: "t"}}}, frame{}},
		{"a listed record", true, &databroker.SyncLatestResponse{Response: &databroker.SyncLatestResponse_Record{Record: record}},
			frame{kind: frameRecord, version: 1 << 40, index: 77, ours: true}},
		{"versions", true, &databroker.SyncLatestResponse{Response: &databroker.SyncLatestResponse_Versions{
			Versions: &databroker.Versions{ServerVersion: 8, LatestRecordVersion: 9}}}, frame{kind: frameVersions, server: 8, version: 9}},
		{"options of a listing", true, &databroker.SyncLatestResponse{Response: &databroker.SyncLatestResponse_Options{
			Options: &databroker.TypedOptions{TypeURL: "t"}}}, frame{}},
	} {
		b := must(proto.Marshal(test.message))
		f.latest = test.latest
		if err := f.parse(b); err != nil {
			t.Errorf("%s: %v", test.name, err)
		}
		test.want.ids, test.want.latest, test.want.size = f.ids, f.latest, len(b)
		if f != test.want {
			t.Errorf("%s: got %+v, want %+v", test.name, f, test.want)
		}
		for cut := 1; cut < len(b); cut += 7 {
			_ = f.parse(b[:cut]) // it may fail and must not panic
		}
	}
	if err := f.parse([]byte{0xff}); err == nil {
		t.Error("garbage is read")
	}
}

// TestBareServerAsAChild starts the bare server as the command does.
func TestBareServerAsAChild(t *testing.T) {
	b, stop, err := startBare(t.Context(), must(testProgram()), testCorpus())
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	r := newRunner(b, testCorpus(), 0, nil)
	result, err := r.put(t.Context(), putOptions{load: load{clients: 2, duration: 100 * time.Millisecond}, records: 2})
	if err != nil {
		t.Fatal(err)
	}
	if result.Target != bareName || result.Operations == 0 {
		t.Errorf("got %+v", result)
	}
	if result.CPU.Server == nil && cpuSeconds(b.processes.server, false) >= 0 {
		t.Error("the CPU time of the child is not known")
	}
	if _, err := json.Marshal(result); err != nil {
		t.Error(err)
	}
}

func TestBareServerSaysWhyItDoesNotStart(t *testing.T) {
	if _, _, err := startBare(t.Context(), "/nonexistent", testCorpus()); err == nil {
		t.Error("a program that is not there was started")
	}
	if _, _, err := startBare(t.Context(), "/bin/false", testCorpus()); err == nil || !strings.Contains(err.Error(), "start the bare server") {
		t.Errorf("got %v", err)
	}
}

func TestSpread(t *testing.T) {
	b := newBare("127.0.0.1:1", nil)
	defer b.close()
	for _, test := range []struct{ n, connections, want int }{{1, 0, 1}, {100, 0, 1}, {101, 0, 2}, {1000, 0, 10}, {10, 4, 4}, {2, 8, 2}} {
		conns, err := b.spread(test.n, test.connections)
		if err != nil {
			t.Fatal(err)
		}
		var different []any
		for _, conn := range conns {
			if !slices.Contains(different, any(conn)) {
				different = append(different, conn)
			}
		}
		if len(conns) != test.n || len(different) != test.want {
			t.Errorf("%d clients on %d connections: got %d clients on %d", test.n, test.connections, len(conns), len(different))
		}
	}
}
