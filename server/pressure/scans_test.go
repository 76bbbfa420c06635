package pressure

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

const sessionType = "type.googleapis.com/session.Session"

// fillSessions writes n sessions.
func fillSessions(t *testing.T, client databroker.DataBrokerServiceClient, n int) {
	t.Helper()
	const batch = 500
	for i := 0; i < n; i += batch {
		var records []*databroker.Record
		for j := i; j < min(i+batch, n); j++ {
			id := fmt.Sprintf("session-%06d", j)
			data, err := anypb.New(&session.Session{Id: id, UserId: fmt.Sprintf("user-%d", j%1000)})
			if err != nil {
				t.Fatal(err)
			}
			records = append(records, &databroker.Record{Type: sessionType, Id: id, Data: data})
		}
		put(t, client, records...)
	}
}

// disjunction is a filter that compares n payload fields and finds nothing.
func disjunction(n int) *structpb.Struct {
	list := make([]any, n)
	for i := range list {
		list[i] = map[string]any{fmt.Sprintf("field%d.name", i): "x"}
	}
	filter, err := structpb.NewStruct(map[string]any{"$or": list})
	if err != nil {
		panic(err)
	}
	return filter
}

// TestScansLeaveOthersAlone: while many clients ask for all that they may in queries that read every record, writes, reads by key
// and streams go on, and whoever is one too many is told so.
func TestScansLeaveOthersAlone(t *testing.T) {
	sessions := 3000
	if n, err := strconv.Atoi(os.Getenv("SCAN_SESSIONS")); err == nil {
		sessions = n
	}
	b, registry := limited(t, server.Limits{})
	fillSessions(t, b, sessions)
	live := follow(testContext(t), t, b.Conn, present(t, b))
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	var hostile errgroup.Group
	var done, refused atomic.Int64
	for i := range 40 {
		client := databroker.NewDataBrokerServiceClient(servertest.Dial(t, b.Address, servertest.Secret))
		hostile.Go(func() error {
			request := &databroker.QueryRequest{Type: sessionType, Filter: disjunction(50), Limit: 10}
			if i%4 == 0 {
				request = &databroker.QueryRequest{Type: sessionType, Query: "no such text", Filter: disjunction(20), Limit: 10}
			}
			for ctx.Err() == nil {
				_, err := client.Query(ctx, request)
				switch status.Code(err) {
				case codes.OK, codes.DeadlineExceeded:
					done.Add(1)
				case codes.ResourceExhausted:
					if !strings.Contains(err.Error(), "at most 16 (max_scans)") {
						return err
					}
					refused.Add(1)
					time.Sleep(time.Millisecond) // a client that does not wait at all is not what this is about
				case codes.Canceled:
				default:
					return err
				}
			}
			return nil
		})
	}
	await(t, "scans that are refused", func() bool { return refused.Load() > 10 })
	var latencies []time.Duration
	for i := range 30 {
		id := fmt.Sprint("good", i)
		begin := time.Now()
		put(t, b, thing(id, 100))
		latencies = append(latencies, time.Since(begin))
		wantNext(t, []syncStream{live}, id)
		get(t, b, id)
	}
	cancel()
	if err := hostile.Wait(); err != nil {
		t.Error(err)
	}
	slices.Sort(latencies)
	t.Logf("a Put took %v, at most %v, beside %d scans (%d refused) of %d sessions",
		latencies[len(latencies)/2], latencies[len(latencies)-1], done.Load(), refused.Load(), sessions)
	if worst := latencies[len(latencies)-1]; worst > 4*time.Second {
		t.Errorf("a Put took %v", worst)
	}
	if counted, _ := metric(t, registry, "pgbroker_limit_reached_total", "limit=max_scans"); counted < 10 {
		t.Errorf("%v refusals are counted", counted)
	}
}

// TestFiltersTooLarge: what a filter may cost is bounded, and the error names the bound.
func TestFiltersTooLarge(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	fillSessions(t, b, 10)
	query := func(filter map[string]any, text string) error {
		s, err := structpb.NewStruct(filter)
		if err != nil {
			t.Fatal(err)
		}
		_, err = b.Query(testContext(t), &databroker.QueryRequest{Type: sessionType, Filter: s, Query: text, Limit: 10})
		return err
	}
	values := func(n int, format string) []any {
		list := make([]any, n)
		for i := range list {
			list[i] = fmt.Sprintf(format, i/256, i%256)
		}
		return list
	}
	for _, c := range []struct {
		name   string
		filter map[string]any
		text   string
		want   string // what the error says; empty: it is fine
	}{
		{"paths", disjunction(500).AsMap(), "", ""}, // each with a dot, so with two readings
		{"too many paths", disjunction(501).AsMap(), "", "filter: 1002 comparisons with each record, at most 1000 are allowed"},
		{"3,000 paths", disjunction(3000).AsMap(), "", "filter: 6000 comparisons with each record, at most 1000 are allowed"},
		{"values", map[string]any{"user_id": values(1000, "%d-%d")}, "", ""},
		{"too many values", map[string]any{"name": values(1001, "%d-%d")}, "", "filter: 1001 comparisons with each record"},
		{"ids and too many values", map[string]any{"id": "x", "name": values(1001, "%d-%d")}, "", "filter: 1001 comparisons with each record"},
		{"ids", map[string]any{"id": values(9900, "%d-%d")}, "", ""},
		{"prefixes", map[string]any{"$index": values(9900, "10.0.%d.%d")}, "", ""},
		{"ids and a field", map[string]any{"id": values(9900, "%d-%d"), "name": "x"}, "", ""},
		{"prefixes and a field", map[string]any{"$index": values(9900, "10.0.%d.%d"), "name": "x"}, "", ""},
		{"not these prefixes", map[string]any{"$not": map[string]any{"$index": values(1001, "10.0.%d.%d")}}, "", "filter: 1001 comparisons with each record"},
		{"conditions", map[string]any{"id": values(10_001, "%d-%d")}, "", "more than 10000 conditions"},
		{"text", nil, strings.Repeat("x", 1<<10), ""},
		{"long text", nil, strings.Repeat("x", 1<<10+1), "query: 1025 bytes, at most 1024 are allowed"},
	} {
		err := query(c.filter, c.text)
		if c.want == "" && err != nil || c.want != "" && (status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// TestPrefixesAreOneQuery: however many addresses a filter asks for, they are looked up in one statement.
func TestPrefixesAreOneQuery(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{ConfigureDB: func(c *db.Config) { c.MaxConns = 10 }})
	const n = 9900
	list := make([]any, n)
	for i := range list {
		list[i] = fmt.Sprintf("10.%d.%d.1", i/256, i%256)
	}
	for _, filter := range []map[string]any{{"$index": list}, {"$index": list, "name": "x"}, {"$not": map[string]any{"$index": list[:900]}}} {
		s, err := structpb.NewStruct(filter)
		if err != nil {
			t.Fatal(err)
		}
		before := b.DB.Stat().AcquireCount()
		begin := time.Now()
		if _, err := b.Query(testContext(t), &databroker.QueryRequest{Type: "t", Filter: s, Limit: 10}); err != nil {
			t.Fatal(err)
		}
		// The feed and the periodic work use the pool, too.
		if used := b.DB.Stat().AcquireCount() - before; used > 50 {
			t.Errorf("%d uses of the pool", used)
		}
		t.Logf("%v", time.Since(begin))
	}
}
