package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// A Result is what one measurement has found.
type Result struct {
	// Scenario is the command that measures it, such as "put", and Work says in words what was done.
	Scenario string `json:"scenario"`
	Work     string `json:"work"`
	// Target is what was measured: the broker, or what no broker can beat.
	Target   string         `json:"target"`
	Settings map[string]any `json:"settings,omitempty"`

	Seconds float64 `json:"seconds"`
	// Operations that were answered, errors left out, and how many that were in each second.
	Operations int64   `json:"operations"`
	Rate       float64 `json:"per_second"`
	// Records moved by the operations, in a unit of its own: records or deliveries.
	Records     int64   `json:"records,omitempty"`
	RecordUnit  string  `json:"record_unit,omitempty"`
	RecordsRate float64 `json:"records_per_second,omitempty"`

	Errors    map[string]int64 `json:"errors,omitempty"`
	FirstFail string           `json:"first_error,omitempty"`

	// Latency of what the scenario is about: of a request, or from Put to receipt.
	Latency *Latency `json:"latency,omitempty"`
	// Further distributions, by name.
	Latencies map[string]*Latency `json:"latencies,omitempty"`
	Checks    *Checks             `json:"checks,omitempty"`

	CPU CPU `json:"cpu"`
	// Memory that the server had resident, at most; 0 if it is not known.
	Memory int64 `json:"server_memory_bytes,omitempty"`

	Figures []Figure `json:"figures,omitempty"`
	Notes   []string `json:"notes,omitempty"`
	Limits  []Limit  `json:"limits,omitempty"`

	// samples are the sizes over time of a soak, for the plot.
	samples []point
}

// A CPU is the seconds of CPU that a measurement took; absent where that is not known.
type CPU struct {
	Server   *float64 `json:"server_seconds,omitempty"`
	Postgres *float64 `json:"postgres_seconds,omitempty"`
	Client   *float64 `json:"client_seconds,omitempty"`
}

func newCPU(u usage) CPU {
	known := func(seconds float64) *float64 {
		if seconds < 0 {
			return nil
		}
		return &seconds
	}
	return CPU{known(u.server), known(u.postgres), known(u.client)}
}

// PerOperation returns the microseconds of CPU that server and Postgres together took for an operation; not ok if one of them
// is unknown.
func (r *Result) PerOperation() (microseconds float64, ok bool) {
	if r.CPU.Server == nil || r.CPU.Postgres == nil || r.Operations == 0 {
		return 0, false
	}
	return (*r.CPU.Server + *r.CPU.Postgres) * 1e6 / float64(r.Operations), true
}

// A Figure is something else that was measured.
type Figure struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit,omitempty"`
}

func (f Figure) String() string {
	switch f.Unit {
	case "bytes":
		return f.Name + " " + showBytes(f.Value)
	case "ms":
		return f.Name + " " + showMilliseconds(f.Value)
	case "%":
		return fmt.Sprintf("%s %.1f%%", f.Name, f.Value)
	case "":
		return f.Name + " " + showNumber(f.Value)
	default:
		return f.Name + " " + showNumber(f.Value) + " " + f.Unit
	}
}

// A Limit is how a result compares with what no broker can beat.
type Limit struct {
	Name  string  `json:"name"`
	What  string  `json:"what"` // which figure: rate, records, p50 or p99
	Value float64 `json:"value"`
	// Ratio is the result's figure divided by the limit's.
	Ratio float64 `json:"ratio"`
}

// compare notes how the result compares with a limit. what names the figures that can be compared.
func (r *Result) compare(limit *Result, what ...string) {
	if limit == nil {
		return
	}
	for _, figure := range what {
		mine, theirs := r.figure(figure), limit.figure(figure)
		if mine > 0 && theirs > 0 {
			r.Limits = append(r.Limits, Limit{Name: limit.Target, What: figure, Value: theirs, Ratio: mine / theirs})
		}
	}
}

// figure returns a figure by name; 0 if there is none.
func (r *Result) figure(name string) float64 {
	switch {
	case name == "rate":
		return r.Rate
	case name == "records":
		return r.RecordsRate
	case r.Latency == nil:
		return 0
	case name == "p50":
		return r.Latency.P50
	case name == "p99":
		return r.Latency.P99
	}
	return 0
}

// take fills in what an outcome says.
func (r *Result) take(o *outcome) *Result {
	r.Seconds = o.elapsed.Seconds()
	r.Operations, r.Rate = o.done, o.rate()
	r.Latency = fullLatency(o.latency)
	if len(o.errors) > 0 {
		r.Errors, r.FirstFail = o.errors, o.first.Error()
	}
	if late := newLatency(o.late); late != nil && late.P99 > 1 {
		r.Notes = append(r.Notes, fmt.Sprintf("no client was free when requests were due, for %s (p99): the load is more than there can be, "+
			"or needs more clients", showMilliseconds(late.P99)))
	}
	r.CPU = newCPU(o.used)
	return r
}

// failed says what makes the result a failure of the server; nil if nothing does.
func (r *Result) failed() error {
	if !r.Checks.Failed() {
		return nil
	}
	c := r.Checks
	return fmt.Errorf("%s: of %d deliveries %d lost, %d duplicated, %d out of order, %d of unknown events, %d of another version; %d resets",
		r.Scenario, c.Expected, c.Lost, c.Duplicated, c.OutOfOrder, c.Unknown, c.Disagreed, c.Resets)
}

// writeJSON prints results as one line of JSON each.
func writeJSON(out io.Writer, results []*Result) error {
	encoder := json.NewEncoder(out)
	encoder.SetEscapeHTML(false)
	for _, r := range results {
		if err := encoder.Encode(r); err != nil {
			return err
		}
	}
	return nil
}

// columns of tables of results.
var columns = []string{"WORK", "TARGET", "RATE", "RECORDS", "P50", "P99", "P99.9", "MAX", "CPU SERVER", "CPU POSTGRES", "CPU CLIENT", "OF LIMIT"}

// row is a result as a row of a table.
func (r *Result) row() []string {
	row := []string{r.Work, r.Target, "", "", "", "", "", "", seconds(r.CPU.Server), seconds(r.CPU.Postgres),
		seconds(r.CPU.Client), r.ratios()}
	if r.Operations > 0 {
		row[2] = showNumber(r.Rate) + "/s"
	}
	if r.RecordsRate > 0 {
		row[3] = showNumber(r.RecordsRate) + " " + r.RecordUnit + "/s"
	}
	if l := r.Latency; l != nil {
		for i, ms := range []float64{l.P50, l.P99, l.P999, l.Max} {
			row[4+i] = showMilliseconds(ms)
		}
	}
	return row
}

func seconds(s *float64) string {
	if s == nil {
		return "unknown"
	}
	return fmt.Sprintf("%.2f s", *s)
}

// ratios are the ratios to the limits in short, limit by limit.
func (r *Result) ratios() string {
	var names []string
	parts := make(map[string][]string)
	for _, l := range r.Limits {
		if parts[l.Name] == nil {
			names = append(names, l.Name)
		}
		parts[l.Name] = append(parts[l.Name], fmt.Sprintf("%s %.2f", l.What, l.Ratio))
	}
	for i, name := range names {
		names[i] = name + ": " + strings.Join(parts[name], ", ")
	}
	return strings.Join(names, "; ")
}

// remarks are what a table has no room for.
func (r *Result) remarks() []string {
	var lines []string
	if c := r.Checks; c != nil {
		verdict := "every event on every stream, once and in order"
		if c.Failed() {
			verdict = fmt.Sprintf("FAILED: %d lost, %d duplicated, %d out of order, %d unknown, %d of another version, %d resets",
				c.Lost, c.Duplicated, c.OutOfOrder, c.Unknown, c.Disagreed, c.Resets)
		}
		lines = append(lines, fmt.Sprintf("%s to %s: %s of %s received; %s", counted(int(c.Events), "event"), counted(c.Streams, "stream"),
			showCount(int(c.Received)), showCount(int(c.Expected)), verdict))
		if c.Reconnects > 0 {
			lines = append(lines, fmt.Sprintf("%d streams were cut and resumed", c.Reconnects))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Latencies)) {
		if l := r.Latencies[name]; l != nil {
			lines = append(lines, fmt.Sprintf("%s: p50 %s, p99 %s, max %s", name, showMilliseconds(l.P50), showMilliseconds(l.P99), showMilliseconds(l.Max)))
		}
	}
	for _, f := range r.Figures {
		lines = append(lines, f.String())
	}
	if r.Memory > 0 {
		lines = append(lines, "memory of the server at most "+showBytes(float64(r.Memory)))
	}
	for _, code := range slices.Sorted(maps.Keys(r.Errors)) {
		lines = append(lines, fmt.Sprintf("%d × %s, first: %q", r.Errors[code], code, r.FirstFail))
	}
	return append(lines, r.Notes...)
}

// writeTable prints results for people, with the remarks below.
func writeTable(out io.Writer, results []*Result) error {
	rows := [][]string{columns}
	for _, r := range results {
		rows = append(rows, r.row())
	}
	widths := make([]int, len(columns))
	used := make([]bool, len(columns)) // a column without content is left out
	for i, row := range rows {
		for j, cell := range row {
			widths[j] = max(widths[j], utf8.RuneCountInString(cell))
			used[j] = used[j] || i > 0 && cell != ""
		}
	}
	var b strings.Builder
	for _, row := range rows {
		var line strings.Builder
		for j, cell := range row {
			if !used[j] {
				continue
			}
			padding := strings.Repeat(" ", widths[j]-utf8.RuneCountInString(cell))
			if numeric := j >= 2 && j < len(columns)-1; numeric {
				line.WriteString(padding + cell + "  ")
			} else {
				line.WriteString(cell + padding + "  ")
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	for _, r := range results {
		for i, remark := range r.remarks() {
			if i == 0 {
				fmt.Fprintf(&b, "\n%s, %s:\n", r.Work, r.Target)
			}
			b.WriteString("  " + strings.ReplaceAll(remark, "\n", "\n  ") + "\n")
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}

// counted returns the words for a number of things: 1 record, 2 records.
func counted(n int, thing string) string {
	if n != 1 {
		thing += "s"
	}
	return showCount(n) + " " + thing
}

// showCount writes a whole number with separators.
func showCount(n int) string {
	if n < 100 {
		return strconv.Itoa(n)
	}
	return showNumber(float64(n))
}

// short is a result in a few words.
func (r *Result) short() string {
	var parts []string
	if r.Operations > 0 {
		parts = append(parts, showNumber(r.Rate)+"/s")
	}
	if r.RecordsRate > 0 {
		parts = append(parts, showNumber(r.RecordsRate)+" "+r.RecordUnit+"/s")
	}
	if r.Latency != nil {
		parts = append(parts, "p50 "+showMilliseconds(r.Latency.P50), "p99 "+showMilliseconds(r.Latency.P99))
	}
	return strings.Join(parts, ", ")
}
