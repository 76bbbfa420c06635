// Package chaos checks what pgbroker promises while everything around it fails.
//
// A run starts PostgreSQL and replicas as processes, with links between them that can be cut; clients write
// and read at random; faults are injected at random; and in the end validators look for anything in the
// recorded history that the promises exclude. docs/robustness.md says more.
package chaos

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/durationpb"

	"pgbroker/proto/databroker"
)

// Config of a run.
type Config struct {
	Seed     uint64
	Duration time.Duration // of the faults
	// Hurry makes faults short, so that a short run has many.
	Hurry bool
	// Only, if set, matches the kinds of faults that are injected.
	Only *regexp.Regexp
	// Previous is the revision of which replicas run beside those of today; "" is none.
	Previous string
	// Skew makes a program whose clock is wrong, which takes minutes the first time.
	Skew bool
	// Keep keeps history and logs also when all is well.
	Keep bool
	// Output is told what happens.
	Output io.Writer
}

// replicas of a run.
const replicas = 3

// Run does a run and fails the test if a validator objects.
func Run(t testing.TB, config Config) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("chaos: processes are frozen and looked up in the ways of Linux")
	}
	interrupted, stop := signal.NotifyContext(t.Context(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "pgbroker-chaos-")
	if err != nil {
		t.Fatal(err)
	}
	cluster := buildPrograms(t, config, dir)
	recorder := &recorder{start: time.Now()}
	cluster.recorder = recorder
	newCluster(t, dir, replicas, cluster)
	admin := cluster.replicas[0].broker(t)
	_, err = admin.SetOptions(t.Context(), &databroker.SetOptionsRequest{
		Type: typeCapped, Options: &databroker.Options{Capacity: ptr(uint64(capacity)), Ttl: durationpb.New(time.Hour)},
	})
	if err != nil {
		t.Fatal(err)
	}
	info, err := admin.ServerInfo(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}

	events, err := os.Create(filepath.Join(dir, "faults.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer events.Close()
	note := func(format string, args ...any) { fmt.Fprintf(events, format+"\n", args...) }

	watching, stopWatch := context.WithCancel(context.Background())
	defer stopWatch()
	go recorder.watch(watching)
	work := &workload{
		recorder: recorder, cluster: cluster, seed: config.Seed, timeout: 4 * time.Second,
		most: int(config.Duration.Seconds() * opsPerSecond),
	}
	followers := startFollowers(t, work, []string{"", "", typeA, typeB, typeCapped})
	work.start(t, 6, 2, 3)
	stopWatching := cluster.watchHealth(recorder)
	injector := newInjector(cluster, recorder, config, note)

	settle := func() {
		note("%v: calm", recorder.now().Round(time.Millisecond))
		cluster.settle(t, recorder, followers)
	}
	injector.run(interrupted, config.Duration, settle)
	work.end()
	if interrupted.Err() != nil {
		followers.end()
		stopWatching()
		t.Fatal("interrupted")
	}
	settle()
	followers.end()
	stopWatching()

	h := cluster.history(t, recorder, followers)
	h.ServerVersions[0] = info.ServerVersion
	verdicts := Validate(h)
	report := newReport(config, recorder, injector, followers, h, verdicts)
	report.write(config.Output)
	holds := !slices.ContainsFunc(verdicts, func(v Verdict) bool { return len(v.Violations) > 0 }) && !t.Failed()
	if holds && !config.Keep {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
		return
	}
	if err := h.Save(dir); err != nil {
		t.Error(err)
	}
	if err := cluster.saveLogs(); err != nil {
		t.Error(err)
	}
	fmt.Fprintf(config.Output, "\nhistory and logs: %s\n", dir)
	if !holds {
		t.Errorf("the history does not hold; again: make chaos SEED=%d DURATION=%v", config.Seed, config.Duration)
	}
}

func ptr[T any](value T) *T { return &value }

func buildPrograms(t testing.TB, config Config, dir string) *Cluster {
	t.Helper()
	ctx := t.Context()
	root, err := module(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c := &Cluster{current: filepath.Join(dir, "pgbroker"), noPrevious: errors.New("none was asked for")}
	if err := build(ctx, root, c.current); err != nil {
		t.Fatal(err)
	}
	if config.Previous != "" {
		c.previous = filepath.Join(dir, "pgbroker-previous")
		if err := buildRevision(ctx, root, config.Previous, dir, c.previous); err != nil {
			c.previous, c.noPrevious = "", err
		}
	}
	if config.Skew {
		c.skewed = filepath.Join(dir, "pgbroker-skewed")
		if err := buildSkewed(ctx, root, dir, c.skewed); err != nil {
			fmt.Fprintf(config.Output, "no wrong clock: %v\n", err)
			c.skewed = ""
		}
	}
	return c
}

// watchHealth asks all replicas again and again how they are, past the links.
func (c *Cluster) watchHealth(r *recorder) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		last := make([]string, len(c.replicas))
		for ctx.Err() == nil {
			for i, replica := range c.replicas {
				if status := replica.status(ctx); status != last[i] && ctx.Err() == nil {
					last[i] = status
					r.addHealth(Health{i, r.now(), status})
				}
			}
			pause(ctx, 200*time.Millisecond)
		}
	}()
	return func() { cancel(); <-done }
}

// recovery is how long everything may take to work again when all faults are over.
const recovery = 30 * time.Second

// settle checks that without faults everything works: all replicas serve and take writes, and all followers
// hear of them.
func (c *Cluster) settle(t testing.TB, r *recorder, followers *followers) {
	t.Helper()
	ctx, cancel := within(context.Background(), recovery)
	defer cancel()
	begun := r.now()
	late := func(format string, args ...any) {
		r.addLate(fmt.Sprintf("%v after the faults ended at %v: ", (r.now()-begun).Round(time.Millisecond), begun.Round(time.Millisecond)) + fmt.Sprintf(format, args...))
	}
	// What clients have given up may still be under way.
	const busy = `SELECT count(*)::text FROM pg_stat_activity WHERE xact_start < now() - interval '1 second'
		AND backend_type = 'client backend' AND usename <> '` + role + `'` + notThis
	for {
		n, err := c.adminText(ctx, busy)
		if err == nil && n == "0" {
			break
		}
		if ctx.Err() != nil {
			late("%s transactions go on (%v)", n, err)
			return
		}
		pause(ctx, 100*time.Millisecond)
	}
	versions := make(map[string]uint64)
	for i, replica := range c.replicas {
		if err := replica.awaitServing(ctx, recovery); err != nil {
			late("%v", err)
			return
		}
		broker := replica.broker(t)
		for _, recordType := range []string{typeA, typeB, typeCapped} {
			version, err := putMarker(ctx, r, i, broker, recordType)
			if err != nil {
				late("a put through replica %d: %v", i, err)
				return
			}
			versions[recordType], versions[""] = version, version
		}
	}
	for !followers.reached(versions) {
		if ctx.Err() != nil {
			for i, f := range followers.all {
				if v := f.version.Load(); v < versions[f.stream.Type] {
					late("stream %d is at version %d, want %d", i, v, versions[f.stream.Type])
				}
			}
			return
		}
		pause(ctx, 20*time.Millisecond)
	}
}

// putMarker writes a record until that works, as client 0.
func putMarker(ctx context.Context, r *recorder, replica int, broker databroker.DataBrokerServiceClient, recordType string) (uint64, error) {
	for {
		op := Op{Kind: opPut, Replica: replica, Call: r.now()}
		op.Write = fmt.Sprintf("marker-%d-%d", replica, op.Call)
		op.Key = Key{recordType, op.Write}
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		response, err := broker.Put(attempt, &databroker.PutRequest{Records: []*databroker.Record{
			{Type: op.Key.Type, Id: op.Key.ID, Data: payload(op.Key.ID, Content{op.Write, op.Write})},
		}})
		cancel()
		op.finish(r.now(), err)
		if err == nil {
			op.Version = response.Records[0].Version
		}
		r.add(op)
		if err == nil || ctx.Err() != nil {
			return op.Version, err
		}
		pause(ctx, 100*time.Millisecond)
	}
}

// history gathers what everybody knows.
func (c *Cluster) history(t testing.TB, r *recorder, followers *followers) *History {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	r.mu.Lock()
	h := &History{
		Ops: r.ops, Health: r.health, Outages: r.outages, Programs: r.programs, Stalls: r.stalls, Late: r.late, End: r.now(),
	}
	r.mu.Unlock()
	for _, f := range followers.all {
		h.Streams = append(h.Streams, f.stream)
	}
	conn, err := pgx.Connect(ctx, c.postgres.SocketConnString())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	err = pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.RepeatableRead}, func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `SELECT version, type, id, deleted, payload, at FROM chaos.journal ORDER BY version`)
		if err != nil {
			return err
		}
		h.Journal, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (c Change, err error) {
			var data []byte
			var at time.Time
			err = row.Scan(&c.Version, &c.Key.Type, &c.Key.ID, &c.Deleted, &data, &at)
			if c.At = at.Sub(r.start); !c.Deleted {
				c.Content = sqlContent(data)
			}
			return c, err
		})
		if err != nil {
			return err
		}
		if rows, err = tx.Query(ctx, `SELECT version, type, id, payload FROM pgbroker.records`); err != nil {
			return err
		}
		h.Table, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (table Row, err error) {
			var data []byte
			err = row.Scan(&table.Version, &table.Key.Type, &table.Key.ID, &data)
			table.Content = sqlContent(data)
			return table, err
		})
		if err != nil {
			return err
		}
		if rows, err = tx.Query(ctx, booksSQL); err != nil {
			return err
		}
		if h.Books, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			return err
		}
		return tx.QueryRow(ctx, `SELECT server_version FROM pgbroker.state`).Scan(&h.ServerVersions[1])
	})
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// report is what is told of a run.
type report struct{ text strings.Builder }

func (r *report) write(w io.Writer) { _, _ = io.WriteString(w, r.text.String()) }

// shown is how many violations of a kind are printed; all are in the history.
const shown = 3

func newReport(config Config, recorder *recorder, in *injector, followers *followers, h *History, verdicts []Verdict) *report {
	r := new(report)
	print := func(format string, args ...any) { fmt.Fprintf(&r.text, format+"\n", args...) }
	print("chaos: seed %d, faults for %v, %v in all, %d replicas", config.Seed, config.Duration, h.End.Round(time.Second), len(in.cluster.replicas))
	print("\nfaults injected: %d", in.total())
	for _, kind := range slices.Sorted(maps.Keys(in.counts)) {
		print("  %5d  %s", in.counts[kind], kind)
	}
	for _, kind := range slices.Sorted(maps.Keys(in.skipped)) {
		print("  SKIPPED  %s: %s", kind, in.skipped[kind])
	}
	print("\noperations: %d", len(h.Ops))
	byKind := make(map[string]map[string]int)
	for i := range h.Ops {
		op := &h.Ops[i]
		if byKind[op.Kind] == nil {
			byKind[op.Kind] = make(map[string]int)
		}
		outcome := op.Outcome
		if op.Code != "" {
			outcome += " (" + op.Code + ")"
		}
		byKind[op.Kind][outcome]++
	}
	for _, kind := range slices.Sorted(maps.Keys(byKind)) {
		var outcomes []string
		for _, outcome := range slices.Sorted(maps.Keys(byKind[kind])) {
			outcomes = append(outcomes, fmt.Sprintf("%s %d", outcome, byKind[kind][outcome]))
		}
		print("  %-10s  %s", kind, strings.Join(outcomes, ", "))
	}
	var still time.Duration
	for _, stall := range h.Stalls {
		still += stall.Till - stall.Since
	}
	if still > 0 {
		print("\nthe machine did not let the run go on %d times, for %v in all", len(h.Stalls), still.Round(time.Second))
	}
	deliveries, resumes := 0, 0
	for _, f := range followers.all {
		deliveries += f.deliveries
		resumes += f.resumes
	}
	print("\nstreams: %d followers, %d times opened, %d deliveries of %d changes", len(followers.all), resumes, deliveries, len(h.Journal))
	print("\nverdicts:")
	for _, v := range verdicts {
		verdict := "ok    "
		if len(v.Violations) > 0 {
			verdict = "BROKEN"
		}
		print("  %s  %-15s  %s", verdict, v.Name, v.Proves)
		for i, violation := range v.Violations {
			if i == shown {
				print("            … and %d more", len(v.Violations)-shown)
				break
			}
			print("          - %s", violation)
		}
	}
	return r
}
