// Package bench is `pgbroker bench`: it puts load on a databroker, of any make, and says how it bears it, beside what no broker
// can beat on the same machine.
//
// A scenario is a method of runner: it drives a load (load.go) of operations and returns a Result. The same scenarios run on
// the bare server (bare.go), which stands for the cost of gRPC alone, so that a broker and its limit are measured by the same
// generator. Streams are checked while they are measured (check.go): a broker that is fast because it leaves out events fails.
package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"pgbroker/cmd/pgbroker/duration"
)

// Deps is what the commands need of the program that they are part of.
type Deps struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// Version of the program, for the report.
	Version string
	// Program is the path of the program, which `bench all` runs as `serve` and `bench bare`. Without it the bare server runs
	// in this process, and `bench all` needs an address.
	Program string
	// TerminalWidth returns the number of columns of the terminal that a writer is, or 0 when it is none.
	TerminalWidth func(io.Writer) int
	// Flags gives a command the flags by which a databroker and its database are found.
	Flags func(*cobra.Command)
	// Action makes the body of a command. It is called with the target that flags, environment and files name.
	Action func(do func(cmd *cobra.Command, target Target) error) func(*cobra.Command, []string) error
	// Usage makes the error of a user who has to type something else.
	Usage func(format string, args ...any) error
}

// A Target is the databroker to measure.
type Target struct {
	Address string
	// Named says that the user has named the address on the command line.
	Named bool
	// Connect opens a connection that carries the shared secret.
	Connect func() (*grpc.ClientConn, error)
	// Explain puts an error of a request into words for a person.
	Explain func(error) error
	// DatabaseURL returns the connection string of the broker's database, or an error that says how to name one.
	DatabaseURL func() (string, error)
}

// brokerName is the target of results that were measured on a broker.
const brokerName = "broker"

// defaultSchema holds the tables of pgbroker.
const defaultSchema = "pgbroker"

// The most that a user can ask for: a load ends by itself.
const (
	mostClients  = 10_000
	mostStreams  = 20_000
	mostRecords  = 10_000 // of one Put
	mostStored   = 20_000_000
	mostRate     = 1_000_000
	longestLoad  = 24 * time.Hour
	smallestTime = 10 * time.Millisecond
)

// common are the flags of all scenarios.
type common struct {
	Deps
	load                   load
	connections            int
	seed                   uint64
	keep                   bool
	output                 string
	serverPID, postgresPID int
}

// NewCommand returns the command `bench`.
func NewCommand(deps Deps) *cobra.Command {
	cmd := &cobra.Command{
		Use: "bench", Short: "Measure a databroker",
		Long: `Put load on a databroker of any make and say how it bears it: rates, latencies, CPU time, and for streams whether every event
arrived once and in order. A scenario writes records of its own and removes them at the end; still, do not run it on a
databroker that serves people: proxies see its sessions, and it takes what it can get.

Load goes to this machine only, unless --address names another one. It ends by itself, after --warmup and --duration.

Without --rate a load is a closed loop: each of --clients makes its next request when it has the answer to the one before. With
--rate, so many requests are due each second, whatever has become of those before, and latency counts from the time when
one was due.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		putCommand(deps), getCommand(deps), queryCommand(deps), syncLatestCommand(deps), fanoutCommand(deps), revokeCommand(deps),
		directoryCommand(deps), soakCommand(deps), limitsCommand(deps), allCommand(deps), bareCommand(deps),
	)
	return cmd
}

// scenario makes a command that runs one scenario on the target.
func (c *common) scenario(cmd *cobra.Command, validate func() error, do func(ctx context.Context, r *runner) ([]*Result, error)) *cobra.Command {
	c.Flags(cmd)
	cmd.Args = cobra.NoArgs
	cmd.RunE = c.Action(func(cmd *cobra.Command, target Target) error {
		if err := cmp.Or(c.validate(), validate(), c.allowed(target)); err != nil {
			return err
		}
		ctx := cmd.Context()
		b := c.broker(ctx, target)
		defer b.close()
		progress := newProgress(c.Stderr, c.TerminalWidth(c.Stderr))
		defer progress.clear()
		r := newRunner(b, newCorpus(c.seed, time.Now()), c.connections, progress)
		results, err := do(ctx, r)
		if !c.keep {
			err = errors.Join(err, c.cleanUp(ctx, r))
		}
		progress.clear()
		if err == nil {
			for _, result := range results {
				err = errors.Join(err, result.failed())
			}
		}
		return errors.Join(c.print(results), target.Explain(err))
	})
	return cmd
}

// cleanUp removes what was written, also when ctx has ended.
func (c *common) cleanUp(ctx context.Context, r *runner) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
	defer cancel()
	if err := r.cleanUp(ctx); err != nil {
		return fmt.Errorf("some records could not be removed: %w", err)
	}
	return nil
}

// print prints results as the user wants them.
func (c *common) print(results []*Result) error {
	switch {
	case len(results) == 0:
		return nil
	case c.output == outputJSON:
		return writeJSON(c.Stdout, results)
	default:
		return writeTable(c.Stdout, results)
	}
}

// broker returns the target as what scenarios run on.
func (c *common) broker(ctx context.Context, target Target) *broker {
	url, err := target.DatabaseURL()
	if err != nil {
		url = "" // whatever needs it says so
	}
	return &broker{
		name: brokerName, connect: target.Connect, explain: target.Explain, databaseURL: target.DatabaseURL,
		processes: findProcesses(ctx, target.Address, url, c.serverPID, c.postgresPID),
	}
}

// allowed refuses to put load on a machine that the user may not have in mind.
func (c *common) allowed(target Target) error {
	if isLoopback(target.Address) || target.Named {
		return nil
	}
	return c.Usage("the address %s is that of another machine: give it with --address if the load is meant for it", target.Address)
}

// The values of --output.
const (
	outputTable = "table"
	outputJSON  = "json"
)

// outputFlags adds what every command has that prints results.
func (c *common) outputFlags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&c.output, "output", "o", outputTable, "how to print: table for people, json for programs (one object per line)")
	if err := cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{outputTable, outputJSON}, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // only a mistake in this program can cause it
	}
	cmd.Flags().Uint64Var(&c.seed, "seed", 1, "what the records are made from: the same seed makes the same ones")
	cmd.Flags().IntVar(&c.connections, "connections", 0, "connections over which clients and streams are spread; 0 is one for every 100")
}

// flags adds what every scenario has.
func (c *common) flags(cmd *cobra.Command, clients int) {
	f := cmd.Flags()
	f.IntVar(&c.load.clients, "clients", clients, "clients that make requests at the same time")
	c.outputFlags(cmd)
	f.BoolVar(&c.keep, "keep", false, "leave the records where they are")
	f.IntVar(&c.serverPID, "server-pid", 0, "process of the server, for its CPU time; 0 looks for the one that listens on the address")
	f.IntVar(&c.postgresPID, "postgres-pid", 0, "postmaster of its database, for the CPU time; 0 asks the database")
}

// timeFlags adds how long and how fast.
func (c *common) timeFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.Float64Var(&c.load.rate, "rate", 0, "requests that are due each second, in all; 0 is a closed loop")
	duration.Var(f, &c.load.warmup, "warmup", 2*time.Second, nil, "time before anything is counted")
	duration.Var(f, &c.load.duration, "duration", 10*time.Second, nil, "time that is counted")
}

// validate checks the common flags.
func (c *common) validate() error {
	switch {
	case c.output != "" && c.output != outputTable && c.output != outputJSON:
		return c.Usage("--output: want %s or %s", outputTable, outputJSON)
	case c.load.clients < 0 || c.load.clients > mostClients:
		return c.Usage("--clients: got %d, want 1 to %d", c.load.clients, mostClients)
	case c.connections < 0 || c.connections > mostClients:
		return c.Usage("--connections: got %d, want 0 to %d", c.connections, mostClients)
	case math.IsNaN(c.load.rate) || c.load.rate < 0 || c.load.rate > mostRate:
		return c.Usage("--rate: got %g, want 0 to %d", c.load.rate, mostRate)
	case c.load.warmup < 0 || c.load.warmup > longestLoad:
		return c.Usage("--warmup: got %v, want 0 to %v", c.load.warmup, longestLoad)
	case c.load.duration < 0 || c.load.duration > longestLoad:
		return c.Usage("--duration: got %v, want %v to %v", c.load.duration, smallestTime, longestLoad)
	}
	return nil
}

// timed checks that there is something to do.
func (c *common) timed() error {
	switch {
	case c.load.clients < 1:
		return c.Usage("--clients: got %d, want at least 1", c.load.clients)
	case c.load.duration < smallestTime:
		return c.Usage("--duration: got %v, want at least %v", c.load.duration, smallestTime)
	}
	return nil
}

// between checks that a flag is in a range.
func (c *common) between(flag string, value, low, high int) error {
	if value < low || value > high {
		return c.Usage("--%s: got %d, want %d to %d", flag, value, low, high)
	}
	return nil
}

// one makes a list of a result.
func one(result *Result, err error) ([]*Result, error) {
	if result == nil {
		return nil, err
	}
	return []*Result{result}, err
}

func putCommand(deps Deps) *cobra.Command {
	c := &common{Deps: deps}
	o := putOptions{records: 1}
	keys, keySpace := "unique", 100_000
	cmd := &cobra.Command{
		Use: "put", Short: "Put records",
		Long: `Put sessions: new ones, or with --keys update others of a store of --key-space that is loaded before.`,
		Example: `  pgbroker bench put --clients 64
  pgbroker bench put --clients 8 --records 100
  pgbroker bench put --rate 2000 --duration 30s -o json`,
	}
	cmd.Flags().IntVar(&o.records, "records", o.records, "records in each Put")
	cmd.Flags().StringVar(&keys, "keys", keys, "unique: new records; update: records that are there")
	cmd.Flags().IntVar(&keySpace, "key-space", keySpace, "records that are there, with --keys update")
	c.flags(cmd, 64)
	c.timeFlags(cmd)
	return c.scenario(cmd, func() error {
		if !slices.Contains([]string{"unique", "update"}, keys) {
			return c.Usage("--keys: want unique or update")
		}
		if keys == "update" {
			o.update = keySpace
		}
		return cmp.Or(c.timed(), c.between("records", o.records, 1, mostRecords), c.between("key-space", keySpace, o.records, mostStored))
	}, func(ctx context.Context, r *runner) ([]*Result, error) {
		o.load = c.load
		return one(r.put(ctx, o))
	})
}

// readFlags adds what scenarios have that read a store.
func (c *common) readFlags(cmd *cobra.Command, o *readOptions, clients int) {
	cmd.Flags().IntVar(&o.stored, "stored", 100_000, "records that are loaded before")
	c.flags(cmd, clients)
	c.timeFlags(cmd)
}

func (c *common) reading(o *readOptions) error {
	return cmp.Or(c.timed(), c.between("stored", o.stored, 1, mostStored))
}

func getCommand(deps Deps) *cobra.Command {
	c := &common{Deps: deps}
	var o readOptions
	cmd := &cobra.Command{Use: "get", Short: "Get records by id", Example: `  pgbroker bench get --stored 100000`}
	c.readFlags(cmd, &o, 64)
	return c.scenario(cmd, func() error { return c.reading(&o) }, func(ctx context.Context, r *runner) ([]*Result, error) {
		o.load = c.load
		return one(r.get(ctx, o))
	})
}

func queryCommand(deps Deps) *cobra.Command {
	c := &common{Deps: deps}
	var o readOptions
	cmd := &cobra.Command{
		Use: "query", Short: "Query records",
		Long: `Query sessions: by id with limit 1, which is what a proxy asks for each request; by user_id; or by a text that is somewhere in
them, with limit 20.`,
		Example: `  pgbroker bench query --by id
  pgbroker bench query --by field --clients 8
  pgbroker bench query --by text --clients 1`,
	}
	cmd.Flags().StringVar(&o.by, "by", "id", "id, field or text")
	cmd.Flags().BoolVar(&o.declareIndex, "declare-index", false,
		"make user_id an indexable field of sessions for the time of the run: pgbroker indexes it by itself, other servers do not")
	c.readFlags(cmd, &o, 64)
	return c.scenario(cmd, func() error {
		if !slices.Contains([]string{"id", "field", "text"}, o.by) {
			return c.Usage("--by: want id, field or text")
		}
		return c.reading(&o)
	}, func(ctx context.Context, r *runner) ([]*Result, error) {
		o.load = c.load
		return one(r.query(ctx, o))
	})
}

func syncLatestCommand(deps Deps) *cobra.Command {
	c := &common{Deps: deps}
	var o readOptions
	cmd := &cobra.Command{
		Use: "sync-latest", Short: "List all records, as a proxy does that starts",
		Long: `List all records again and again, as a proxy does once when it starts, and check that each is there once. A listing that has
begun within --duration is finished.`,
		Example: `  pgbroker bench sync-latest --stored 100000`,
	}
	c.readFlags(cmd, &o, 1)
	return c.scenario(cmd, func() error { return c.reading(&o) }, func(ctx context.Context, r *runner) ([]*Result, error) {
		o.load = c.load
		return one(r.syncLatest(ctx, o))
	})
}

// streamFlags adds what scenarios have that send events to streams.
func (c *common) streamFlags(cmd *cobra.Command, o *fanoutOptions) {
	cmd.Flags().IntVar(&o.streams, "streams", 100, "streams that each must receive every event")
	c.flags(cmd, 4)
	c.timeFlags(cmd)
}

func (c *common) streaming(o *fanoutOptions) error {
	if events := c.load.rate * (c.load.warmup + c.load.duration).Seconds(); events > mostStored {
		return c.Usage("--rate for --duration makes %.0f events, want at most %d", events, mostStored)
	}
	return cmp.Or(c.timed(), c.between("streams", o.streams, 1, mostStreams))
}

const fanoutHelp = `Latency is from when the request was due until a stream had received the event. With --rate, so many events are published each
second; without, each of --clients publishes its next event when all streams have the one before, which shows how much the
server can deliver. Streams receive in this process and decode only what is needed to check.`

func fanoutCommand(deps Deps) *cobra.Command {
	c := &common{Deps: deps}
	var o fanoutOptions
	cmd := &cobra.Command{
		Use: "fanout", Short: "Put records that many streams receive",
		Long: `Open many streams, put records, and check that every stream receives every record once and in order: what is lost, duplicated or
out of order is counted, and makes the command fail.

` + fanoutHelp,
		Example: `  pgbroker bench fanout --streams 1000 --rate 50
  pgbroker bench fanout --streams 1000`,
	}
	c.streamFlags(cmd, &o)
	return c.scenario(cmd, func() error { return c.streaming(&o) }, func(ctx context.Context, r *runner) ([]*Result, error) {
		o.load = c.load
		return one(r.fanout(ctx, o))
	})
}

func revokeCommand(deps Deps) *cobra.Command {
	c := &common{Deps: deps}
	o := fanoutOptions{revoke: true}
	via := "put"
	cmd := &cobra.Command{
		Use: "revoke", Short: "Delete records of which many streams are told",
		Long: `Load sessions, open many streams, delete the sessions one by one, and check that every stream receives every deletion once and in
order. With --via sql they are deleted in Postgres, as somebody does who types DELETE.

` + fanoutHelp,
		Example: `  pgbroker bench revoke --streams 1000 --rate 50
  pgbroker bench revoke --streams 1000 --rate 50 --via sql
  pgbroker bench revoke --streams 100 --rate 50 --while-loading 200000`,
	}
	cmd.Flags().StringVar(&via, "via", via, "put: deletions by Put; sql: DELETE in Postgres, which needs the database")
	cmd.Flags().IntVar(&o.directory, "while-loading", 0, "records of a directory that are loaded meanwhile, again and again")
	c.streamFlags(cmd, &o)
	return c.scenario(cmd, func() error {
		if !slices.Contains([]string{"put", "sql"}, via) {
			return c.Usage("--via: want put or sql")
		}
		o.viaSQL = via == "sql"
		return cmp.Or(c.streaming(&o), c.between("while-loading", o.directory, 0, mostStored))
	}, func(ctx context.Context, r *runner) ([]*Result, error) {
		o.load = c.load
		return one(r.fanout(ctx, o))
	})
}

func directoryCommand(deps Deps) *cobra.Command {
	c := &common{Deps: deps}
	var o directoryOptions
	cmd := &cobra.Command{
		Use: "directory", Short: "Load a company's directory, and bring it up to date",
		Long: `Do what a source of directory data does: load users and groups; load them again without looking; then read what is there and
write what differs, which is nothing, and then one user in a hundred.`,
		Example: `  pgbroker bench directory --users 50000 --groups 2500`,
	}
	cmd.Flags().IntVar(&o.users, "users", 50_000, "users of the directory")
	cmd.Flags().IntVar(&o.groups, "groups", 2_500, "groups of the directory")
	cmd.Flags().IntVar(&o.batch, "records", directoryBatch, "records in each Put")
	c.flags(cmd, directoryClients)
	return c.scenario(cmd, func() error {
		return cmp.Or(c.between("clients", c.load.clients, 1, mostClients), c.between("users", o.users, 1, mostStored/10),
			c.between("groups", o.groups, 1, mostStored/10), c.between("records", o.batch, 1, mostRecords))
	}, func(ctx context.Context, r *runner) ([]*Result, error) {
		o.clients = c.load.clients
		return r.directory(ctx, o)
	})
}

func soakCommand(deps Deps) *cobra.Command {
	c := &common{Deps: deps}
	var o soakOptions
	cmd := &cobra.Command{
		Use: "soak", Short: "Use sessions for a long time and watch the tables",
		Long: `Load sessions and patch accessed_at of each once in every --interval, as proxies do while sessions are in use, and watch the
database, which must be known: how many updates stay in their page (HOT), and how large tables, indexes and the change log
become.`,
		Example: `  pgbroker bench soak --sessions 100000 --interval 1m --duration 1h
  pgbroker bench soak --sessions 20000 --interval 12s --duration 2m`,
	}
	cmd.Flags().IntVar(&o.sessions, "sessions", 20_000, "sessions that are in use")
	duration.Var(cmd.Flags(), &o.interval, "interval", 12*time.Second, nil, "time in which each is patched once")
	cmd.Flags().StringVar(&o.schema, "schema", defaultSchema, "schema of the broker's tables")
	c.flags(cmd, 16)
	duration.Var(cmd.Flags(), &c.load.warmup, "warmup", 2*time.Second, nil, "time before anything is counted")
	duration.Var(cmd.Flags(), &c.load.duration, "duration", time.Minute, nil, "time that is counted")
	return c.scenario(cmd, func() error {
		if o.interval < smallestTime || o.interval > longestLoad {
			return c.Usage("--interval: got %v, want %v to %v", o.interval, smallestTime, longestLoad)
		}
		return cmp.Or(c.timed(), c.between("sessions", o.sessions, 1, mostStored))
	}, func(ctx context.Context, r *runner) ([]*Result, error) {
		o.load = c.load
		return one(r.soak(ctx, o))
	})
}

func limitsCommand(deps Deps) *cobra.Command {
	c := &common{Deps: deps}
	streams, stored := 1000, 100_000
	cmd := &cobra.Command{
		Use: "limits", Short: "Measure what no broker can beat on this machine",
		Long: `Measure what no broker can beat on this machine: a grpc-go server of the same interface with nothing behind it, in a process of
its own under the same load as a broker; and, where the database is known, Postgres without a server: the same rows written in
batches to a plain table, the round trip of a notification, and COPY. The table is in a schema of its own, which is removed.`,
		Example: `  pgbroker bench limits
  pgbroker bench limits --database-url postgres://localhost/scratch`,
	}
	cmd.Flags().IntVar(&c.load.clients, "clients", 64, "clients that make requests at the same time")
	cmd.Flags().IntVar(&streams, "streams", streams, "streams that each receive every event")
	cmd.Flags().IntVar(&stored, "stored", stored, "records of listings")
	duration.Var(cmd.Flags(), &c.load.warmup, "warmup", time.Second, nil, "time before anything is counted, each")
	duration.Var(cmd.Flags(), &c.load.duration, "duration", 4*time.Second, nil, "time that is counted, each")
	c.outputFlags(cmd)
	c.Flags(cmd)
	cmd.Args = cobra.NoArgs
	cmd.RunE = c.Action(func(cmd *cobra.Command, target Target) error {
		if err := cmp.Or(c.validate(), c.timed(), c.between("streams", streams, 1, mostStreams), c.between("stored", stored, 1, mostStored)); err != nil {
			return err
		}
		results, err := c.limits(cmd.Context(), target, streams, stored)
		return errors.Join(c.print(results), err)
	})
	return cmd
}

// limits measures the bare server and the database.
func (c *common) limits(ctx context.Context, target Target, streams, stored int) (results []*Result, err error) {
	corpus := newCorpus(c.seed, time.Now())
	progress := newProgress(c.Stderr, c.TerminalWidth(c.Stderr))
	defer progress.clear()
	b, stop, err := startBare(ctx, c.Program, corpus)
	if err != nil {
		return nil, err
	}
	defer stop()
	r := newRunner(b, corpus, c.connections, progress)
	l := c.load
	with := func(clients int, rate float64) load {
		l := l
		l.clients, l.rate = clients, rate
		return l
	}
	work := []func() (*Result, error){
		func() (*Result, error) { return r.put(ctx, putOptions{load: with(1, 0), records: 1}) },
		func() (*Result, error) { return r.put(ctx, putOptions{load: l, records: 1}) },
		func() (*Result, error) { return r.put(ctx, putOptions{load: with(8, 0), records: 100}) },
		func() (*Result, error) { return r.put(ctx, putOptions{load: with(4, 0), records: 500}) },
		func() (*Result, error) { return r.get(ctx, readOptions{load: l, stored: stored}) },
		func() (*Result, error) { return r.query(ctx, readOptions{load: l, stored: stored, by: "id"}) },
		func() (*Result, error) {
			return r.query(ctx, readOptions{load: with(8, 0), stored: stored, by: "field"})
		},
		func() (*Result, error) { return r.syncLatest(ctx, readOptions{load: with(1, 0), stored: stored}) },
		func() (*Result, error) {
			return r.fanout(ctx, fanoutOptions{load: with(publishers, 0), streams: streams})
		},
		func() (*Result, error) {
			return r.fanout(ctx, fanoutOptions{load: with(8, eventRate), streams: streams})
		},
	}
	url, urlErr := target.DatabaseURL()
	if urlErr == nil {
		local := newRunner(&broker{
			name: postgresName, databaseURL: target.DatabaseURL,
			processes: findProcesses(ctx, "", url, 0, 0),
		}, corpus, 0, progress)
		p, err := local.openPostgres(ctx)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, p.close(ctx)) }()
		work = append(work,
			func() (*Result, error) { return p.write(ctx, l, 1, false) },
			func() (*Result, error) { return p.write(ctx, l, min(c.load.clients, mostRecords), false) },
			func() (*Result, error) { return p.write(ctx, l, 800, false) },
			func() (*Result, error) { return p.notify(ctx, l) },
			func() (*Result, error) { return p.write(ctx, l, 1, true) },
			func() (*Result, error) { return p.write(ctx, with(1, eventRate), 1, true) },
			func() (*Result, error) { return p.copyOut(ctx, l, stored) },
		)
	}
	for _, measure := range work {
		result, err := measure()
		if err != nil {
			return results, err
		}
		results = append(results, result)
	}
	progress.clear()
	if urlErr != nil {
		progress.say("Postgres was not measured: %v", urlErr)
	}
	return results, nil
}

func allCommand(deps Deps) *cobra.Command {
	c := &common{Deps: deps}
	o := defaultAll()
	path, dir := "benchmarks.md", ""
	streams, stored, largest := o.streams[len(o.streams)-1], o.sizes[1], o.sizes[2]
	cmd := &cobra.Command{
		Use: "all", Short: "Measure everything and write a report",
		Long: `Measure everything, each beside what no broker can beat, and write a report with plots. Without --address it starts a server of
its own with a Postgres of its own that forces every commit to disk, and stops and removes both at the end. With --address it
measures that one.

It takes no longer than --budget, but for removing its records from a broker that was given: with less time, each measurement
is shorter, and what does not fit is left out and said so.`,
		Example: `  pgbroker bench all
  pgbroker bench all --budget 3m --largest 0 --report /tmp/bench.md`,
	}
	f := cmd.Flags()
	duration.Var(f, &o.budget, "budget", o.budget, nil, "longest that all of it may take")
	f.StringVar(&path, "report", path, "file to write the report to, as Markdown; the plots go into a directory of the same name beside it")
	f.StringVar(&dir, "dir", "", "directory for the data of the own Postgres; it should be on a disk like that of a real one (default: the one for temporary files)")
	f.IntVar(&o.clients, "clients", o.clients, "clients that make requests at the same time")
	f.IntVar(&streams, "streams", streams, "most streams that receive events")
	f.IntVar(&stored, "stored", stored, "records of the store that is read")
	f.IntVar(&largest, "largest", largest, "records of the largest store; 0 leaves it out")
	f.IntVar(&o.users, "users", o.users, "users of the directory")
	f.IntVar(&o.background, "while-loading", o.background, "records of the directory that is loaded while sessions are revoked")
	f.IntVar(&o.sessions, "sessions", o.sessions, "sessions of the soak")
	c.outputFlags(cmd)
	c.Flags(cmd)
	cmd.Args = cobra.NoArgs
	cmd.RunE = c.Action(func(cmd *cobra.Command, target Target) error {
		if o.budget < 10*time.Second || o.budget > longestLoad {
			return c.Usage("--budget: got %v, want 10s to %v", o.budget, longestLoad)
		}
		if err := cmp.Or(c.validate(), c.between("clients", o.clients, 1, mostClients), c.between("streams", streams, 1, mostStreams),
			c.between("stored", stored, 10, mostStored), c.between("largest", largest, 0, mostStored), c.between("users", o.users, 20, mostStored/10),
			c.between("while-loading", o.background, 20, mostStored), c.between("sessions", o.sessions, 10, mostStored)); err != nil {
			return err
		}
		o.streams = slices.DeleteFunc(o.streams, func(n int) bool { return n >= streams })
		o.streams = append(o.streams, streams)
		o.sizes = []int{max(1, stored/10), stored}
		if largest > stored {
			o.sizes = append(o.sizes, largest)
		}
		return c.all(cmd.Context(), target, o, path, dir)
	})
	return cmd
}

// all measures everything and writes the report.
func (c *common) all(ctx context.Context, target Target, o allOptions, path, dir string) (err error) {
	begun := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, o.budget, errors.New("the time is over (--budget)"))
	defer cancel()
	corpus := newCorpus(c.seed, begun)
	progress := newProgress(c.Stderr, c.TerminalWidth(c.Stderr))
	defer progress.clear()
	report := &report{version: c.Version, begun: begun}

	var measured *broker
	if target.Named {
		if err := c.allowed(target); err != nil {
			return err
		}
		measured = c.broker(ctx, target)
		defer measured.close()
	} else {
		if c.Program == "" {
			return c.Usage("give --address")
		}
		progress.step("starting a server")
		own, err := startOwn(ctx, c.Program, dir)
		if err != nil {
			return err
		}
		measured, dir = own.broker, own.dir
		stop := own.stop
		defer func() { err = errors.Join(err, stop()) }()
	}
	bare, stopBare, err := startBare(ctx, c.Program, corpus)
	if err != nil {
		return err
	}
	defer stopBare()
	a := &all{
		allOptions: o, ours: !target.Named, report: report, deadline: begun.Add(o.budget), loadRate: 5000,
		scale:  min(4, float64(o.budget-reserve)/float64(nominal)),
		broker: newRunner(measured, corpus, c.connections, progress), bare: newRunner(bare, corpus, c.connections, progress),
	}
	if !a.ours {
		dir = ""
		defer func() { err = errors.Join(err, c.cleanUp(ctx, a.broker)) }()
	}
	report.describeMachine(dir)
	if _, urlErr := measured.databaseURL(); urlErr == nil {
		if a.postgres, err = a.broker.openPostgres(ctx); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, a.postgres.close(ctx)) }()
		if err := report.describePostgres(ctx, a.postgres.conn); err != nil {
			return err
		}
	}
	err = a.run(ctx)
	progress.clear()
	if err != nil && !errors.Is(err, context.Canceled) && ctx.Err() != nil {
		report.skip("the rest: %v", err)
		err = nil // what there is, is good
	}
	if err != nil {
		return err
	}
	if err := report.write(path); err != nil {
		return err
	}
	progress.say("wrote %s after %.1f minutes", path, time.Since(begun).Minutes())
	results := report.results()
	for _, result := range results {
		if result.failed() != nil {
			err = errChecks
		}
	}
	return errors.Join(c.print(results), err)
}

func bareCommand(deps Deps) *cobra.Command {
	c := &common{Deps: deps}
	cmd := &cobra.Command{
		Use: "bare", Short: "Run the server that has nothing behind it, until the input ends", Hidden: true, Args: cobra.NoArgs,
		RunE: c.Action(func(cmd *cobra.Command, _ Target) error {
			return runBare(cmd.Context(), c.seed, c.Stdin, c.Stdout)
		}),
	}
	cmd.Flags().Uint64Var(&c.seed, "seed", 1, "what the records are made from")
	return cmd
}
