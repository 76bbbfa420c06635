package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// allOptions say how much of everything is measured.
type allOptions struct {
	budget            time.Duration // for everything, from the start of the server to its stop
	clients           int
	streams           []int // the last one is what latencies are measured with
	sizes             []int // of the store; the second one is what reads are measured with
	users, background int   // of the directory that is measured, and records of the one that is loaded meanwhile
	sessions          int   // of the soak
}

func defaultAll() allOptions {
	return allOptions{
		budget: 15 * time.Minute, clients: 64, streams: []int{1, 10, 100, 1000}, sizes: []int{10_000, 100_000, 1_000_000},
		users: 50_000, background: 200_000, sessions: 20_000,
	}
}

// nominal is what everything takes with the times below, loading and cleaning up included. A variable for tests.
var nominal = 14 * time.Minute

// reserve is kept for stopping.
const reserve = 15 * time.Second

// An all is one run of everything.
type all struct {
	allOptions
	ours     bool // the broker was started for this and may be cleared
	broker   *runner
	bare     *runner
	postgres *postgres // nil without a database
	deadline time.Time
	scale    float64 // of the times
	report   *report

	loadRate float64 // records per second, as seen so far
}

// section begins a part of the report.
func (a *all) section(title, text string) { a.report.section(title, text) }

// load returns a load of some clients for some seconds, as the budget allows.
func (a *all) load(clients int, rate, seconds float64) load {
	duration := max(shortestLoad, time.Duration(seconds*a.scale*float64(time.Second)))
	return load{clients: clients, rate: rate, warmup: max(shortestLoad/3, duration/5), duration: duration}
}

// shortestLoad is the least time in which anything can be measured. A variable for tests.
var shortestLoad = 300 * time.Millisecond

// takes returns what a load takes, after putting some records.
func (a *all) takes(l load, records int) time.Duration {
	return l.warmup + l.duration + time.Duration(float64(records)/a.loadRate*float64(time.Second)) + time.Second
}

// measure does one measurement if there is time left for it. It returns nil if there is not, or if it fails, which the report
// says; the error is only that of a run that has been stopped.
func (a *all) measure(ctx context.Context, what string, takes time.Duration, do func(context.Context) (*Result, error)) (*Result, error) {
	if time.Until(a.deadline) < takes+reserve {
		a.report.skip("%s: not measured, there was not enough time left", what)
		a.broker.progress.say("%s: skipped, there is not enough time left", what)
		return nil, nil
	}
	begun := time.Now()
	result, err := do(ctx)
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		a.report.skip("%s: failed: %v", what, a.broker.explain(err))
		a.broker.progress.say("%s: %v", what, a.broker.explain(err))
		return nil, nil
	}
	a.broker.progress.say("%-70s %s (%.0f s)", result.Work, result.short(), time.Since(begun).Seconds())
	return result, nil
}

// pair measures the same on the bare server and on the broker, and compares the given figures.
func (a *all) pair(ctx context.Context, what string, takes time.Duration, do func(context.Context, *runner) (*Result, error), figures ...string) (*Result, error) {
	limit, err := a.measure(ctx, what+" ("+bareName+")", takes, func(ctx context.Context) (*Result, error) { return do(ctx, a.bare) })
	if err != nil {
		return nil, err
	}
	result, err := a.measure(ctx, what, takes, func(ctx context.Context) (*Result, error) { return do(ctx, a.broker) })
	if err != nil || result == nil {
		return nil, err
	}
	result.compare(limit, figures...)
	a.report.add(result)
	if limit != nil {
		a.report.add(limit)
	}
	return result, nil
}

// alone measures something on the broker that has no counterpart.
func (a *all) alone(ctx context.Context, what string, takes time.Duration, do func(context.Context) (*Result, error)) (*Result, error) {
	result, err := a.measure(ctx, what, takes, do)
	if result != nil {
		a.report.add(result)
	}
	return result, err
}

// reset removes the records of a part, so that the next one starts with none.
func (a *all) reset(ctx context.Context) error {
	if a.ours {
		return a.broker.clear(ctx)
	}
	return a.broker.cleanUp(ctx)
}

// run measures everything, part by part.
func (a *all) run(ctx context.Context) error {
	limits := new(limitResults)
	for _, part := range []func(context.Context, *limitResults) error{
		a.limits, a.writes, a.reads, a.streaming, a.revocation, a.directories, a.soaking, a.growth,
	} {
		if err := part(ctx, limits); err != nil {
			return err
		}
	}
	return nil
}

// limitResults are what results are compared with besides the bare server; nil where it was not measured.
type limitResults struct {
	commit, batch, large, notify, notified, copied *Result
}

func (a *all) limits(ctx context.Context, l *limitResults) error {
	if a.postgres == nil {
		a.report.skip("limits of Postgres: not measured, the database is not known (--database-url)")
		return nil
	}
	a.section("What Postgres can do alone", "Written and read by pgx without a server, in a plain table with the same columns, the same "+
		"rows, no triggers and no index but the primary key. Keys are new at first and then updated in turns.")
	p := a.postgres
	short := a.load(1, 0, 4)
	for _, m := range []struct {
		what  string
		into  **Result
		load  load
		extra time.Duration
		do    func(context.Context, load) (*Result, error)
	}{
		{"commit of one row", &l.commit, short, 0, func(ctx context.Context, l load) (*Result, error) { return p.write(ctx, l, 1, false) }},
		{"batches of rows", &l.batch, short, time.Second, func(ctx context.Context, l load) (*Result, error) { return p.write(ctx, l, a.clients, false) }},
		{"large batches of rows", &l.large, short, 3 * time.Second, func(ctx context.Context, l load) (*Result, error) { return p.write(ctx, l, 800, false) }},
		{"round trip of a notification", &l.notify, a.load(1, 0, 2), 0, p.notify},
		// At the rate of the events that are compared with it: a machine with pauses takes several times as long for each.
		{"commit and notification", &l.notified, a.load(1, eventRate, 4), 0, func(ctx context.Context, l load) (*Result, error) { return p.write(ctx, l, 1, true) }},
		{"COPY", &l.copied, short, 3 * time.Second, func(ctx context.Context, l load) (*Result, error) { return p.copyOut(ctx, l, a.sizes[1]) }},
	} {
		result, err := a.alone(ctx, m.what, a.takes(m.load, 0)+m.extra, func(ctx context.Context) (*Result, error) { return m.do(ctx, m.load) })
		if err != nil {
			return err
		}
		*m.into = result
	}
	return nil
}

func (a *all) writes(ctx context.Context, limits *limitResults) error {
	a.section("Put", "New sessions, each Put acknowledged when it is on disk.")
	var most float64
	for _, m := range []struct {
		clients, records int
		seconds          float64
		limit            *Result
		figure           string // that is compared with it
	}{
		{1, 1, 6, limits.commit, "p50"},
		{a.clients, 1, 10, limits.batch, ""},
		{8, 100, 8, limits.large, "records"},
		{4, 500, 6, limits.large, "records"},
	} {
		o := putOptions{load: a.load(m.clients, 0, m.seconds), records: m.records}
		result, err := a.pair(ctx, fmt.Sprintf("put %s, %s", counted(m.records, "record"), counted(m.clients, "client")), a.takes(o.load, 0),
			func(ctx context.Context, r *runner) (*Result, error) { return r.put(ctx, o) }, "rate", "p50", "p99")
		if err != nil {
			return err
		}
		if result == nil {
			continue
		}
		if m.figure != "" {
			result.compare(m.limit, m.figure)
		} else if m.limit != nil { // each operation is one row of a statement
			result.Limits = append(result.Limits, Limit{postgresName, "rows", m.limit.RecordsRate, result.Rate / m.limit.RecordsRate})
		}
		if m.clients == a.clients && m.records == 1 {
			most = result.Rate
		}
		a.loadRate = max(a.loadRate, result.RecordsRate)
	}
	if most > 0 {
		if err := a.curve(ctx, "put-load.svg", "Put of one record: latency against load", most, func(ctx context.Context, l load) (*Result, error) {
			return a.broker.put(ctx, putOptions{load: l, records: 1})
		}); err != nil {
			return err
		}
	}
	return a.reset(ctx)
}

// curve measures latency against load: open loops at parts of what a closed loop has reached.
func (a *all) curve(ctx context.Context, file, title string, most float64, do func(context.Context, load) (*Result, error)) error {
	median, tail := series{name: "p50"}, series{name: "p99"}
	for _, part := range []float64{0.1, 0.25, 0.5, 0.7, 0.8, 0.9} {
		l := a.load(2*a.clients, part*most, 4)
		result, err := a.alone(ctx, title, a.takes(l, 0), func(ctx context.Context) (*Result, error) { return do(ctx, l) })
		if err != nil {
			return err
		}
		if result == nil || result.Latency == nil {
			continue
		}
		median.points = append(median.points, point{l.rate, result.Latency.P50})
		tail.points = append(tail.points, point{l.rate, result.Latency.P99})
	}
	a.report.plot(file, &chart{title: title, x: "requests per second offered", y: "milliseconds", logY: true, series: []series{median, tail}})
	return nil
}

func (a *all) reads(ctx context.Context, limits *limitResults) error {
	stored := a.sizes[1]
	a.section("Get, Query and SyncLatest", fmt.Sprintf("Of %s stored sessions.", showCount(stored)))
	if err := a.fillStore(ctx, stored); err != nil {
		return err
	}
	var most float64
	for _, m := range []struct {
		by      string
		clients int
		seconds float64
	}{{"", a.clients, 8}, {"id", a.clients, 8}, {"field", 8, 6}, {"text", 1, 5}} {
		o := readOptions{load: a.load(m.clients, 0, m.seconds), stored: stored, by: m.by, declareIndex: !a.ours && m.by == "field"}
		what, do := "query by "+m.by, (*runner).query
		if m.by == "" {
			what, do = "get", (*runner).get
		}
		figures := []string{"rate", "p50", "p99"}
		result, err := a.pair(ctx, what, a.takes(o.load, stored-a.broker.stored), func(ctx context.Context, r *runner) (*Result, error) {
			o := o
			o.declareIndex = o.declareIndex && !r.bare
			return do(r, ctx, o)
		}, figures...)
		if err != nil {
			return err
		}
		if m.by == "id" && result != nil {
			most = result.Rate
		}
	}
	o := readOptions{load: a.load(1, 0, 6), stored: stored}
	result, err := a.pair(ctx, "sync-latest", a.takes(o.load, stored-a.broker.stored)+10*time.Second,
		func(ctx context.Context, r *runner) (*Result, error) { return r.syncLatest(ctx, o) }, "records")
	if err != nil {
		return err
	}
	if result != nil {
		result.compare(limits.copied, "records")
	}
	if most > 0 {
		err = a.curve(ctx, "query-load.svg", "Query by id: latency against load", most, func(ctx context.Context, l load) (*Result, error) {
			return a.broker.query(ctx, readOptions{load: l, stored: stored, by: "id"})
		})
	}
	return err
}

// fillStore loads the store up to a size, and lets Postgres do at once what it would do within minutes.
func (a *all) fillStore(ctx context.Context, size int) error {
	missing := size - a.broker.stored
	_, err := a.measure(ctx, fmt.Sprintf("loading %s", counted(size, "record")), a.takes(load{}, missing), func(ctx context.Context) (*Result, error) {
		begun := time.Now()
		if _, err := a.broker.ensureStored(ctx, size); err != nil {
			return nil, err
		}
		if missing >= 10*loadBatch {
			a.loadRate = float64(missing) / time.Since(begun).Seconds()
		}
		if a.ours && a.postgres != nil {
			if _, err := a.postgres.conn.Exec(ctx, sqlSettle); err != nil {
				return nil, fmt.Errorf("vacuum: %w", err)
			}
		}
		return &Result{Work: fmt.Sprintf("loaded %s", counted(size, "record")), Records: int64(missing), RecordUnit: "records",
			RecordsRate: float64(missing) / time.Since(begun).Seconds()}, nil
	})
	return err
}

func (a *all) streaming(ctx context.Context, limits *limitResults) error {
	a.section("Fan-out", "Each Put of one record is an event that every stream must receive once and in order. Latency is from the time "+
		"when the Put was due until a stream had the record. In the rows without a rate each of 16 publishers puts its next record when "+
		"all streams have the one before; deliveries are counted over all streams.")
	served, possible := series{name: brokerName}, series{name: bareName, dashed: true}
	for _, streams := range a.streams {
		o := fanoutOptions{load: a.load(publishers, 0, 6), streams: streams}
		result, err := a.pair(ctx, fmt.Sprintf("fan-out to %s", counted(streams, "stream")), a.takes(o.load, 0)+3*time.Second,
			func(ctx context.Context, r *runner) (*Result, error) { return r.fanout(ctx, o) }, "records", "p50", "p99")
		if err != nil {
			return err
		}
		if result == nil {
			continue
		}
		served.points = append(served.points, point{float64(streams), result.RecordsRate})
		for _, l := range result.Limits {
			if l.What == "records" {
				possible.points = append(possible.points, point{float64(streams), l.Value})
			}
		}
	}
	a.report.plot("fanout.svg", &chart{
		title: "Fan-out: deliveries against streams", x: "streams", y: "deliveries per second in all", logX: true, logY: true,
		series: []series{served, possible},
	})
	few, many := min(10, a.streams[len(a.streams)-1]), a.streams[len(a.streams)-1]
	for _, streams := range slices.Compact([]int{few, many}) {
		o := fanoutOptions{load: a.load(8, eventRate, 8), streams: streams}
		result, err := a.pair(ctx, fmt.Sprintf("fan-out to %s at a rate", counted(streams, "stream")), a.takes(o.load, 0)+3*time.Second,
			func(ctx context.Context, r *runner) (*Result, error) { return r.fanout(ctx, o) }, "p50", "p99")
		if err != nil {
			return err
		}
		if result != nil {
			result.compare(limits.notified, "p50")
		}
	}
	return a.reset(ctx)
}

// eventRate is the rate at which latencies of events are measured.
const eventRate = 50

func (a *all) revocation(ctx context.Context, limits *limitResults) error {
	a.section("Revocation", "As fan-out, with deletions: by Put, by DELETE in Postgres, and by Put while a directory is being loaded.")
	streams := a.streams[len(a.streams)-1]
	for _, m := range []struct {
		viaSQL    bool
		directory int
	}{{}, {viaSQL: true}, {directory: a.background}} {
		o := fanoutOptions{load: a.load(8, eventRate, 8), streams: streams, revoke: true, viaSQL: m.viaSQL, directory: m.directory}
		if m.viaSQL && a.postgres == nil {
			a.report.skip("revocation by SQL: not measured, the database is not known (--database-url)")
			continue
		}
		if m.directory > 0 {
			o.load = a.load(8, eventRate, 10)
		}
		what, takes := "revocation", a.takes(o.load, o.events())+3*time.Second
		var err error
		var result *Result
		if m.viaSQL || m.directory > 0 {
			result, err = a.alone(ctx, what, takes, func(ctx context.Context) (*Result, error) { return a.broker.fanout(ctx, o) })
		} else {
			result, err = a.pair(ctx, what, takes, func(ctx context.Context, r *runner) (*Result, error) { return r.fanout(ctx, o) }, "p50", "p99")
		}
		if err != nil {
			return err
		}
		if result != nil {
			result.compare(limits.notified, "p50")
		}
	}
	return a.reset(ctx)
}

func (a *all) directories(ctx context.Context, limits *limitResults) error {
	a.section("Directory", "What a source of directory data does: it loads everything; loads it again without looking; reads what is "+
		"there and writes what differs, which is nothing, or one user in a hundred.")
	o := directoryOptions{clients: directoryClients, batch: directoryBatch, users: a.users, groups: max(1, a.users/20)}
	takes := time.Duration(2.5*float64(a.users)/a.loadRate*float64(time.Second)) + 5*time.Second
	var results []*Result
	if _, err := a.measure(ctx, "directory", takes, func(ctx context.Context) (*Result, error) {
		var err error
		if results, err = a.broker.directory(ctx, o); err != nil {
			return nil, err
		}
		return results[0], nil
	}); err != nil {
		return err
	}
	for _, result := range results {
		if result.Operations > 0 {
			result.compare(limits.large, "records")
		}
		a.report.add(result)
	}
	return a.reset(ctx)
}

func (a *all) soaking(ctx context.Context, _ *limitResults) error {
	if a.postgres == nil {
		a.report.skip("soak: not measured, the database is not known (--database-url)")
		return nil
	}
	// As many patches as 100,000 sessions make that are each used once a minute.
	const patches = 100_000.0 / 60
	interval := time.Duration(float64(a.sessions) / patches * float64(time.Second)).Round(100 * time.Millisecond)
	a.section("Soak", fmt.Sprintf("Sessions that are in use: %s of them, each patched (accessed_at) every %v, as many patches as 100,000 sessions "+
		"make in a minute each.", showCount(a.sessions), interval))
	o := soakOptions{load: a.load(16, 0, 60), sessions: a.sessions, interval: max(interval, 100*time.Millisecond), schema: defaultSchema}
	result, err := a.alone(ctx, "soak", a.takes(o.load, a.sessions)+2*settle, func(ctx context.Context) (*Result, error) {
		return a.broker.soak(ctx, o)
	})
	if err != nil {
		return err
	}
	if result != nil {
		a.report.plot("soak.svg", &chart{
			title: "Soak: size of all tables and indexes", x: "seconds", y: "size", bytes: true, series: []series{{name: "size", points: result.samples}},
		})
	}
	return a.reset(ctx)
}

func (a *all) growth(ctx context.Context, _ *limitResults) error {
	a.section("Growth", "The same work on stores of different sizes.")
	work := []struct {
		name    string
		clients int
		do      func(ctx context.Context, l load, stored int) (*Result, error)
	}{
		{"get", a.clients, func(ctx context.Context, l load, n int) (*Result, error) {
			return a.broker.get(ctx, readOptions{load: l, stored: n})
		}},
		{"query by id", a.clients, func(ctx context.Context, l load, n int) (*Result, error) {
			return a.broker.query(ctx, readOptions{load: l, stored: n, by: "id"})
		}},
		{"query by field", 8, func(ctx context.Context, l load, n int) (*Result, error) {
			return a.broker.query(ctx, readOptions{load: l, stored: n, by: "field", declareIndex: !a.ours})
		}},
		{"put", a.clients, func(ctx context.Context, l load, n int) (*Result, error) {
			return a.broker.put(ctx, putOptions{load: l, records: 1, update: n})
		}},
	}
	cost, median := make([]series, len(work)), make([]series, len(work))
	for _, size := range a.sizes {
		if err := a.fillStore(ctx, size); err != nil {
			return err
		}
		if a.broker.stored < size {
			break // and larger ones take longer still
		}
		for i, w := range work {
			l := a.load(w.clients, 0, 4)
			result, err := a.alone(ctx, w.name+" of "+showCount(size), a.takes(l, 0), func(ctx context.Context) (*Result, error) {
				return w.do(ctx, l, size)
			})
			if err != nil {
				return err
			}
			if result == nil || result.Latency == nil {
				continue
			}
			cost[i].name, median[i].name = w.name, w.name
			median[i].points = append(median[i].points, point{float64(size), result.Latency.P50})
			if microseconds, ok := result.PerOperation(); ok {
				cost[i].points = append(cost[i].points, point{float64(size), microseconds})
			}
		}
	}
	a.report.plot("cost.svg", &chart{
		title: "Cost of a request against the size of the store", x: "records stored", y: "µs of CPU, server and Postgres", logX: true, series: cost,
	})
	a.report.plot("growth.svg", &chart{
		title: "Latency (p50) against the size of the store", x: "records stored", y: "milliseconds", logX: true, series: median,
	})
	return a.reset(ctx)
}

// errChecks says that a broker has not delivered what it must.
var errChecks = errors.New("events were lost, duplicated or out of order: see the report")
