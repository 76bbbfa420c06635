package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/proto/databroker"
	"pgbroker/server/auth"
	"pgbroker/server/servertest"
)

// A program is the command line without cmd/pgbroker.
type program struct {
	target Target
	deps   Deps
	stdout bytes.Buffer
	stderr bytes.Buffer
}

// newProgram returns a command line whose target is a broker of a test.
func newProgram(t *testing.T, b *servertest.Broker) *program {
	t.Helper()
	key := must(auth.ParseKey(servertest.Secret))
	p := &program{target: Target{
		Address: b.Address,
		Named:   true,
		Connect: func() (*grpc.ClientConn, error) { return dial(b.Address, key) },
		Explain: func(err error) error {
			if err == nil {
				return nil
			}
			return fmt.Errorf("explained: %w", err)
		},
		DatabaseURL: func() (string, error) { return b.Database.ConnString, nil },
	}}
	p.deps = Deps{
		Stdin: strings.NewReader(""), Stdout: &p.stdout, Stderr: &p.stderr, Version: "test", Program: must(testProgram()),
		TerminalWidth: func(io.Writer) int { return 0 },
		Flags:         func(*cobra.Command) {},
		Action: func(do func(*cobra.Command, Target) error) func(*cobra.Command, []string) error {
			return func(cmd *cobra.Command, _ []string) error { return do(cmd, p.target) }
		},
		Usage: func(format string, args ...any) error { return fmt.Errorf("usage: "+format, args...) },
	}
	return p
}

// run runs a command.
func (p *program) run(ctx context.Context, args ...string) error {
	p.stdout.Reset()
	p.stderr.Reset()
	cmd := NewCommand(p.deps)
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs(args)
	return cmd.ExecuteContext(ctx)
}

// measure runs a command that must succeed, and returns its results.
func (p *program) measure(t *testing.T, args ...string) []Result {
	t.Helper()
	if err := p.run(t.Context(), append(args, "-o", "json")...); err != nil {
		t.Fatalf("%v: %v\n%s", args, err, p.stderr.String())
	}
	var results []Result
	d := json.NewDecoder(&p.stdout)
	for {
		var r Result
		err := d.Decode(&r)
		if errors.Is(err, io.EOF) {
			return results
		}
		if err != nil {
			t.Fatalf("%v: %v in %s", args, err, p.stdout.String())
		}
		results = append(results, r)
	}
}

// empty fails the test unless the scenarios have removed what they wrote.
func empty(t *testing.T, b *servertest.Broker) {
	t.Helper()
	if types := must(b.ListTypes(t.Context(), new(emptypb.Empty))).GetTypes(); len(types) != 0 {
		t.Errorf("records are left of %v", types)
	}
}

// TestScenarios runs each of them for a moment on a real server.
func TestScenarios(t *testing.T) {
	b := servertest.New(t, servertest.Options{})
	p := newProgram(t, b)
	short := []string{"--duration", "300ms", "--warmup", "50ms"}
	for _, test := range []struct {
		args  string
		check func(Result) bool
	}{
		{"put --clients 4", func(r Result) bool { return r.Scenario == "put" && r.Latency.P50 > 0 && r.Records == 0 }},
		{"put --clients 2 --records 10", func(r Result) bool { return r.Records == 10*r.Operations && r.RecordsRate > r.Rate }},
		{"put --clients 2 --records 10 --keys update --key-space 50", func(r Result) bool { return r.Settings["update"] == 50.0 }},
		{"put --clients 4 --rate 100", func(r Result) bool { return r.Rate < 105 }},
		{"get --clients 4 --stored 300", func(r Result) bool { return r.Operations > 10 }},
		{"query --by id --clients 4 --stored 300", func(r Result) bool { return r.Operations > 10 }},
		{"query --by field --clients 2 --stored 301", func(r Result) bool { return r.Operations > 2 }},
		{"query --by field --declare-index --clients 2 --stored 30", func(r Result) bool { return r.Operations > 2 }},
		{"query --by text --clients 1 --stored 300", func(r Result) bool { return r.Operations > 2 }},
		{"sync-latest --stored 400 --clients 2", func(r Result) bool { return r.Records == 400*r.Operations && r.RecordUnit == "records" }},
		{"fanout --streams 5 --clients 2", func(r Result) bool {
			return r.Checks.Streams == 5 && r.Checks.Received == r.Checks.Expected && r.Checks.Events > 2 && r.Latency.P50 > 0
		}},
		{"fanout --streams 5 --rate 50", func(r Result) bool { return r.Checks.Events > 5 && r.Checks.Received == r.Checks.Expected }},
		{"revoke --streams 5 --rate 50", func(r Result) bool { return r.Checks.Events > 5 && r.Checks.Received == r.Checks.Expected }},
		{"revoke --streams 5 --rate 50 --via sql", func(r Result) bool { return r.Checks.Events > 5 && r.Checks.Received == r.Checks.Expected }},
		{"revoke --streams 3 --rate 20 --while-loading 2000", func(r Result) bool {
			return r.Checks.Received == r.Checks.Expected && len(r.Figures) == 1 && r.Figures[0].Value > 0
		}},
		{"soak --sessions 200 --interval 1s", func(r Result) bool {
			hot := figureOf(r, "HOT updates of records")
			return r.Operations > 20 && hot > 0 && hot <= 100 && figureOf(r, "write-ahead log per patch") > 100
		}},
	} {
		t.Run(test.args, func(t *testing.T) {
			results := p.measure(t, append(strings.Fields(test.args), short...)...)
			if len(results) != 1 {
				t.Fatalf("got %d results, want one", len(results))
			}
			r := results[0]
			if r.Target != brokerName || r.Operations == 0 || r.Rate <= 0 || r.Seconds <= 0 || r.Latency == nil || len(r.Errors) > 0 || !test.check(r) {
				t.Errorf("got %+v, latency %+v, checks %+v", r, r.Latency, r.Checks)
			}
			empty(t, b)
		})
	}
}

func figureOf(r Result, name string) float64 {
	for _, f := range r.Figures {
		if f.Name == name {
			return f.Value
		}
	}
	return -1
}

func TestDirectoryScenario(t *testing.T) {
	b := servertest.New(t, servertest.Options{})
	p := newProgram(t, b)
	results := p.measure(t, "directory", "--users", "300", "--groups", "10", "--records", "50", "--clients", "2")
	if len(results) != 4 {
		t.Fatalf("got %d results, want one for each step", len(results))
	}
	for i, want := range []struct{ records, written float64 }{{310, -1}, {310, -1}, {310, 0}, {310, 3}} {
		if r := results[i]; float64(r.Records) != want.records || figureOf(r, "written") != want.written || r.RecordsRate <= 0 {
			t.Errorf("step %d: got %+v, want %v", i, r, want)
		}
	}
	empty(t, b)
}

func TestKeepLeavesTheRecords(t *testing.T) {
	b := servertest.New(t, servertest.Options{})
	p := newProgram(t, b)
	p.measure(t, "get", "--stored", "20", "--keep", "--duration", "50ms", "--warmup", "0s", "--clients", "1")
	if _, err := b.Get(t.Context(), &databroker.GetRequest{Type: sessionType, Id: newCorpus(1, time.Now()).collection("stored").ids.id(19)}); err != nil {
		t.Errorf("the record of the same seed: %v", err)
	}
}

func TestInterruptedScenarioCleansUp(t *testing.T) {
	b := servertest.New(t, servertest.Options{})
	p := newProgram(t, b)
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(500*time.Millisecond, cancel)
	err := p.run(ctx, "put", "--clients", "2", "--duration", "1h", "--warmup", "0s")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that it was interrupted", err)
	}
	empty(t, b)
}

func TestUsage(t *testing.T) {
	p := newProgram(t, &servertest.Broker{Replica: &servertest.Replica{Address: "127.0.0.1:1"}})
	for _, args := range []string{
		"put --clients 0", "put --clients 1000000", "put --records 0", "put --keys some", "put --rate -1", "put --rate NaN", "put --duration 0s",
		"put --duration 48h", "put --warmup -1s", "put --connections -1", "put -o xml", "put --keys update --key-space 1 --records 2",
		"get --stored 0", "query --by guess", "fanout --streams 0", "fanout --streams 1000000", "fanout --rate 1000000 --duration 1h",
		"revoke --via mail", "revoke --while-loading -1", "directory --users 0", "directory --groups 0", "directory --records 0", "soak --interval 0s", "soak --sessions 0",
		"limits --streams 0", "limits --stored 0", "all --budget 1s", "all --stored 0", "all --streams 0",
	} {
		if err := p.run(t.Context(), strings.Fields(args)...); err == nil || !strings.HasPrefix(err.Error(), "usage: ") {
			t.Errorf("%s: got %v, want to be told how to use it", args, err)
		}
	}
	if err := p.run(t.Context(), "put", "records"); err == nil {
		t.Error("an argument that means nothing is accepted")
	}
}

// TestLoadStaysOnThisMachine: an address that was picked up somewhere is not enough to put load on another machine.
func TestLoadStaysOnThisMachine(t *testing.T) {
	p := newProgram(t, &servertest.Broker{Replica: &servertest.Replica{Address: "127.0.0.1:1"}})
	p.target.Connect = func() (*grpc.ClientConn, error) { return nil, errors.New("it connects") }
	for _, test := range []struct {
		address string
		named   bool
		refused bool
	}{
		{"192.0.2.1:5443", false, true}, {"broker.example:5443", false, true}, {"broker.example:5443", true, false},
		{"127.0.0.1:5443", false, false}, {"localhost:5443", false, false}, {"[::1]:5443", false, false},
	} {
		p.target.Address, p.target.Named = test.address, test.named
		p.target.DatabaseURL = func() (string, error) { return "", errors.New("unknown") }
		err := p.run(t.Context(), "put")
		if refused := err != nil && strings.HasPrefix(err.Error(), "usage: "); refused != test.refused {
			t.Errorf("%s (named %t): got %v", test.address, test.named, err)
		}
	}
}

func TestUnreachableBroker(t *testing.T) {
	p := newProgram(t, &servertest.Broker{Replica: &servertest.Replica{Address: "127.0.0.1:1"}})
	p.target.DatabaseURL = func() (string, error) { return "", errors.New("the database is not known") }
	begun := time.Now()
	if err := p.run(t.Context(), "put", "--clients", "4"); err == nil || !strings.HasPrefix(err.Error(), "explained: every operation failed") {
		t.Errorf("got %v", err)
	}
	if time.Since(begun) > 20*time.Second {
		t.Errorf("it took %v to find out", time.Since(begun))
	}
	if err := p.run(t.Context(), "soak"); err == nil || !strings.Contains(err.Error(), "the database is not known") {
		t.Errorf("soak without a database: got %v", err)
	}
}

func TestLimitsCommand(t *testing.T) {
	b := servertest.New(t, servertest.Options{})
	p := newProgram(t, b)
	results := p.measure(t, "limits", "--clients", "4", "--streams", "5", "--stored", "200", "--duration", "100ms", "--warmup", "20ms")
	byTarget := make(map[string]int)
	for _, r := range results {
		byTarget[r.Target]++
		if r.Operations == 0 || r.Latency == nil {
			t.Errorf("%s: got %+v", r.Work, r)
		}
	}
	if byTarget[bareName] != 10 || byTarget[postgresName] != 7 {
		t.Errorf("got %v", byTarget)
	}
	var left int
	if err := b.Database.Pool.QueryRow(t.Context(), "SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'pgbroker_bench%'").Scan(&left); err != nil || left != 0 {
		t.Errorf("got %d schemas that were left behind, %v", left, err)
	}

	p.target.DatabaseURL = func() (string, error) { return "", errors.New("the database is not known") }
	results = p.measure(t, "limits", "--clients", "2", "--streams", "2", "--stored", "10", "--duration", "20ms", "--warmup", "0s")
	if len(results) != 10 || !strings.Contains(p.stderr.String(), "the database is not known") {
		t.Errorf("without a database: got %d results and %q", len(results), p.stderr.String())
	}
}

// small is `bench all` in little time.
var small = strings.Fields("--clients 4 --streams 12 --stored 600 --largest 900 --users 100 --while-loading 200 --sessions 100")

func TestAllOnABrokerThatRuns(t *testing.T) {
	b := servertest.New(t, servertest.Options{})
	p := newProgram(t, b)
	path := filepath.Join(t.TempDir(), "out.md")
	const budget = 2 * time.Minute
	begun := time.Now()
	results := p.measure(t, append([]string{"all", "--budget", budget.String(), "--report", path}, small...)...)
	if took := time.Since(begun); took > budget+10*time.Second {
		t.Errorf("it took %v of %v", took, budget)
	}
	checkAll(t, p, path, results)
	empty(t, b)
}

// TestAllStartsAServer starts Postgres and the server as `make bench` does.
func TestAllStartsAServer(t *testing.T) {
	if testing.Short() {
		t.Skip("starts Postgres")
	}
	p := newProgram(t, &servertest.Broker{Replica: &servertest.Replica{}})
	p.target = Target{Address: "127.0.0.1:5443", DatabaseURL: func() (string, error) { return "", errors.New("not asked for") }, Explain: func(err error) error { return err }}
	path, dir := filepath.Join(t.TempDir(), "out.md"), publicDir(t)
	results := p.measure(t, append([]string{"all", "--budget", "2m", "--report", path, "--dir", dir}, small...)...)
	checkAll(t, p, path, results)
	page := string(must(os.ReadFile(path)))
	if !strings.Contains(page, "| `fsync` | on |") || !strings.Contains(page, "| `synchronous_commit` | on |") {
		t.Errorf("writes are not durable:\n%s", page)
	}
	known := 0
	for _, r := range results {
		if _, ok := r.PerOperation(); ok {
			known++
		}
	}
	if known == 0 && cpuSeconds(os.Getpid(), false) >= 0 {
		t.Error("no CPU time is known of processes that were started here")
	}
	if left := must(os.ReadDir(dir)); len(left) != 0 {
		t.Errorf("left behind in %s: %v", dir, left)
	}
}

// publicDir is a directory that another user may enter, which t.TempDir is not: run by root, Postgres runs as somebody else.
func publicDir(t *testing.T) string {
	t.Helper()
	dir := must(os.MkdirTemp("/tmp", "pgbroker-bench-test-"))
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func checkAll(t *testing.T, p *program, path string, results []Result) {
	t.Helper()
	scenarios := make(map[string]int)
	compared := 0
	for _, r := range results {
		scenarios[r.Scenario]++
		if r.Checks != nil && r.Checks.Failed() {
			t.Errorf("%s: %+v", r.Work, *r.Checks)
		}
		if len(r.Limits) > 0 {
			compared++
		}
	}
	for scenario, least := range map[string]int{
		"limits": 6, "put": 14, "get": 5, "query": 14, "sync-latest": 2, "fanout": 10, "revoke": 4, "directory": 4, "soak": 1,
	} {
		if scenarios[scenario] < least {
			t.Errorf("%s: got %d results, want at least %d\n%s", scenario, scenarios[scenario], least, p.stderr.String())
		}
	}
	if compared < 15 {
		t.Errorf("got %d results with a limit", compared)
	}
	page := string(must(os.ReadFile(path)))
	if strings.Contains(page, "Not measured") {
		t.Errorf("something is missing:\n%s", page[strings.Index(page, "## Not measured"):])
	}
	plots := must(filepath.Glob(filepath.Join(strings.TrimSuffix(path, ".md"), "*.svg")))
	if len(plots) < 5 {
		t.Errorf("got plots %v", plots)
	}
	for _, plot := range plots {
		if !strings.Contains(page, "](out/"+filepath.Base(plot)+")") {
			t.Errorf("%s is not shown", plot)
		}
		wellFormed(t, must(os.ReadFile(plot)))
	}
}

// TestBudgetIsKept: what does not fit is left out, and said so.
func TestBudgetIsKept(t *testing.T) {
	b := servertest.New(t, servertest.Options{})
	p := newProgram(t, b)
	path := filepath.Join(t.TempDir(), "out.md")
	begun := time.Now()
	if err := p.run(t.Context(), append([]string{"all", "--budget", "22s", "--report", path}, small...)...); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > time.Minute { // it also removes its records
		t.Errorf("it took %v of 22s", took)
	}
	if page := string(must(os.ReadFile(path))); !strings.Contains(page, "## Not measured") || !strings.Contains(page, "time") {
		t.Errorf("nothing is said to be missing:\n%s", page)
	}
	if !strings.Contains(p.stdout.String(), "WORK") {
		t.Errorf("got no table: %q", p.stdout.String())
	}
}

func TestProgress(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b, 40)
	p.step("loading a lot of records, and then some more")
	p.show("1 of 2")
	p.say("done")
	for line := range strings.SplitSeq(strings.ReplaceAll(b.String(), "\r\x1b[K", "\n"), "\n") {
		if len([]rune(line)) >= 40 {
			t.Errorf("%q is too long for the terminal", line)
		}
	}
	if !strings.HasSuffix(b.String(), "\r\x1b[Kdone\n") {
		t.Errorf("got %q", b.String())
	}
	b.Reset()
	silent := newProgress(&b, 0)
	silent.step("x")
	silent.show("y")
	silent.every(func() string { return "z" })()
	silent.clear()
	if b.Len() > 0 {
		t.Errorf("where there is no terminal: got %q", b.String())
	}
	var none *progress
	none.step("x")
	none.say("y")
	none.every(nil)()
}
