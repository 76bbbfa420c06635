package bench

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// A report is the outcome of a run of everything, as Markdown with plots beside it.
type report struct {
	version  string
	begun    time.Time
	machine  []Fact
	settings []Fact
	parts    []*reportPart
	skipped  []string
}

// A Fact is something about the machine or its settings.
type Fact struct{ Name, Value string }

type reportPart struct {
	title, text string
	results     []*Result
	plots       []reportPlot
}

type reportPlot struct {
	file  string
	chart *chart
}

// section begins a part.
func (r *report) section(title, text string) {
	r.parts = append(r.parts, &reportPart{title: title, text: text})
}

// add adds a result to the part.
func (r *report) add(result *Result) {
	part := r.parts[len(r.parts)-1]
	part.results = append(part.results, result)
}

// plot adds a chart to the part, without the lines that have no points; not at all without lines.
func (r *report) plot(file string, c *chart) {
	var lines []series
	for _, s := range c.series {
		if len(s.points) > 0 {
			lines = append(lines, s)
		}
	}
	if len(lines) == 0 {
		return
	}
	c.series = lines
	part := r.parts[len(r.parts)-1]
	part.plots = append(part.plots, reportPlot{file, c})
}

// skip says what is missing.
func (r *report) skip(format string, args ...any) {
	r.skipped = append(r.skipped, fmt.Sprintf(format, args...))
}

// results returns all results in order.
func (r *report) results() []*Result {
	var all []*Result
	for _, part := range r.parts {
		all = append(all, part.results...)
	}
	return all
}

// describeMachine notes what it ran on. dir is where the data of an own Postgres are; empty if it is not ours.
func (r *report) describeMachine(dir string) {
	processor, kernel, memory := machineFacts()
	r.machine = append(r.machine, Fact{"Processors", strings.TrimSpace(fmt.Sprintf("%d %s", runtime.NumCPU(), processor))})
	if memory > 0 {
		r.machine = append(r.machine, Fact{"Memory", showBytes(float64(memory))})
	}
	if kernel == "" {
		kernel = runtime.GOOS
	}
	r.machine = append(r.machine, Fact{"System", kernel + ", " + runtime.GOARCH}, Fact{"Go", runtime.Version()})
	if load := loadAverage(); load != "" {
		r.machine = append(r.machine, Fact{"Load before (1, 5, 15 minutes)", load})
	}
	if kind := fileSystemOf(dir); dir != "" && kind != "" {
		r.machine = append(r.machine, Fact{"File system", kind})
	}
	if dir != "" {
		r.machine = append(r.machine, Fact{"Database", "new, but for its write-ahead log, whose files were made before, as they are where a database has run for a while"})
	}
}

// describePostgres notes the settings that matter.
func (r *report) describePostgres(ctx context.Context, conn *pgx.Conn) error {
	rows, err := conn.Query(ctx, sqlSettings)
	if err != nil {
		return fmt.Errorf("read the settings of Postgres: %w", err)
	}
	settings, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Fact])
	if err != nil {
		return fmt.Errorf("read the settings of Postgres: %w", err)
	}
	r.settings = append(r.settings, settings...)
	return nil
}

// markdown returns the page.
func (r *report) markdown(plotDir string) []byte {
	var b bytes.Buffer
	b.WriteString("<!-- Written by `pgbroker bench all`. Do not edit. -->\n\n# Benchmarks\n\n")
	b.WriteString("Server, Postgres and the generator of the load shared one machine. \"" + bareName + "\" is a grpc-go server of the same\n" +
		"interface with nothing behind it, in a process of its own as the broker is, under the same load from the same generator;\n" +
		"\"" + postgresName + "\" is the database without a server. What is given as \"of limit\" is a figure divided by theirs: for rates\n" +
		"1 is all that is possible, for latencies it is the least. Latencies count from the time when a request was due, be there\n" +
		"a client free to make it or not. Sessions are about 1.4 kB. CPU is that of server and Postgres together, per request.\n\n")
	fmt.Fprintf(&b, "Measured on %s with pgbroker %s, in %.1f minutes. Figures from another machine, or from this one while it does\n"+
		"something else, are not comparable: run `make bench` on yours.\n\n", r.begun.UTC().Format("2006-01-02"), r.version, time.Since(r.begun).Minutes())
	b.WriteString("| machine | |\n|---|---|\n")
	for _, f := range r.machine {
		fmt.Fprintf(&b, "| %s | %s |\n", f.Name, cellText(f.Value))
	}
	if len(r.settings) > 0 {
		b.WriteString("\n| PostgreSQL | |\n|---|---|\n")
		for _, f := range r.settings {
			fmt.Fprintf(&b, "| `%s` | %s |\n", f.Name, cellText(f.Value))
		}
	}
	for _, part := range r.parts {
		if len(part.results) > 0 {
			part.markdown(&b, plotDir)
		}
	}
	if len(r.skipped) > 0 {
		b.WriteString("\n## Not measured\n\n")
		for _, text := range r.skipped {
			fmt.Fprintf(&b, "- %s\n", cellText(text))
		}
	}
	return b.Bytes()
}

func (p *reportPart) markdown(b *bytes.Buffer, plotDir string) {
	fmt.Fprintf(b, "\n## %s\n\n%s\n\n", p.title, p.text)
	b.WriteString("| work | | requests/s | records or deliveries/s | p50 | p99 | p99.9 | CPU | of limit |\n|---|---|--:|--:|--:|--:|--:|--:|---|\n")
	for _, r := range p.results {
		cells := []string{cellText(r.Work), r.Target, "", "", "", "", "", "", r.ratios()}
		if r.Operations > 0 {
			cells[2] = showNumber(r.Rate)
		}
		if r.RecordsRate > 0 {
			cells[3] = showNumber(r.RecordsRate)
		}
		if l := r.Latency; l != nil {
			cells[4], cells[5], cells[6] = showMilliseconds(l.P50), showMilliseconds(l.P99), showMilliseconds(l.P999)
		}
		if microseconds, ok := r.PerOperation(); ok {
			cells[7] = showNumber(microseconds) + " µs"
		}
		fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | "))
	}
	remarks := false
	for _, r := range p.results {
		if r.Target != brokerName {
			continue
		}
		for i, remark := range r.remarks() {
			if !remarks {
				b.WriteByte('\n')
				remarks = true
			}
			if i == 0 {
				fmt.Fprintf(b, "- %s:\n", cellText(r.Work))
			}
			fmt.Fprintf(b, "  - %s\n", cellText(remark))
		}
	}
	for _, plot := range p.plots {
		fmt.Fprintf(b, "\n![%s](%s)\n", plot.chart.title, filepath.ToSlash(filepath.Join(plotDir, plot.file)))
	}
}

// cellText makes a text safe for a table: messages of servers may hold anything.
func cellText(text string) string {
	return strings.NewReplacer("|", "\\|", "\n", " ", "\r", " ", "<", "&lt;").Replace(text)
}

// write writes the page, and the plots into a directory of the same name beside it.
func (r *report) write(path string) error {
	plotDir := strings.TrimSuffix(filepath.Base(path), filepath.Ext(path))
	dir := filepath.Join(filepath.Dir(path), plotDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	for _, part := range r.parts {
		for _, plot := range part.plots {
			if err := os.WriteFile(filepath.Join(dir, plot.file), plot.chart.svg(), 0o644); err != nil {
				return fmt.Errorf("write the report: %w", err)
			}
		}
	}
	if err := os.WriteFile(path, r.markdown(plotDir), 0o644); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return nil
}
