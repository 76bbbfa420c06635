package bench

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// wellFormed fails the test unless b is well-formed XML whose numbers are numbers.
func wellFormed(t *testing.T, b []byte) {
	t.Helper()
	d := xml.NewDecoder(bytes.NewReader(b))
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, b)
		}
		if element, ok := token.(xml.StartElement); ok {
			for _, attribute := range element.Attr {
				if strings.Contains(attribute.Value, "NaN") || strings.Contains(attribute.Value, "Inf") {
					t.Errorf("%s %s=%q", element.Name.Local, attribute.Name.Local, attribute.Value)
				}
			}
		}
	}
}

func TestCharts(t *testing.T) {
	for _, test := range []struct {
		name  string
		chart chart
	}{
		{"plain", chart{title: "a < b & c", x: "x", y: "y", series: []series{{"one", []point{{1, 10}, {2, 20}, {3, 15}}, false}, {"two", []point{{1, 5}}, true}}}},
		{"logarithmic", chart{logX: true, logY: true, series: []series{{"one", []point{{1, 0.3}, {1000, 250}}, false}}}},
		{"logarithmic with nothing above 0", chart{logX: true, logY: true, series: []series{{"one", []point{{0, 0}, {-1, -1}}, false}}}},
		{"empty", chart{}},
		{"one point", chart{series: []series{{"one", []point{{0, 0}}, false}}}},
		{"one power of ten", chart{logX: true, series: []series{{"one", []point{{10, 1}}, false}}}},
		{"bytes", chart{bytes: true, series: []series{{"one", []point{{0, 1 << 30}, {9, 1 << 31}}, false}}}},
		{"many lines", chart{series: []series{{"a line with quite a long name", nil, false}, {"another line with quite a long name", nil, false},
			{"a third line with quite a long name", nil, false}, {"4", nil, false}, {"5", nil, false}, {"6", nil, false}, {"7", nil, false}}}},
	} {
		t.Run(test.name, func(t *testing.T) { wellFormed(t, test.chart.svg()) })
	}
}

// TestChartPutsPointsWhereTheyBelong compares the marks of a line with the axes.
func TestChartPutsPointsWhereTheyBelong(t *testing.T) {
	c := chart{series: []series{{"one", []point{{100, 1000}, {0, 0}, {50, 250}}, false}}}
	circles := regexp.MustCompile(`<circle cx="([\d.]+)" cy="([\d.]+)"`).FindAllStringSubmatch(string(c.svg()), -1)
	want := [][2]float64{{left, top + plotHeight}, {left + plotWidth/2, top + 0.75*plotHeight}, {left + plotWidth, top}} // sorted by x
	if len(circles) != len(want) {
		t.Fatalf("got %d marks, want %d", len(circles), len(want))
	}
	for i, circle := range circles {
		x, y := must(strconv.ParseFloat(circle[1], 64)), must(strconv.ParseFloat(circle[2], 64))
		if math.Abs(x-want[i][0]) > 0.1 || math.Abs(y-want[i][1]) > 0.1 {
			t.Errorf("mark %d: got %g, %g, want %v", i, x, y, want[i])
		}
	}
}

func TestAxes(t *testing.T) {
	for _, test := range []struct {
		values    []float64
		log       bool
		low, high float64
		ticks     int
	}{
		{[]float64{3, 97}, false, 0, 100, 6},
		{[]float64{0.02}, false, 0, 0.02, 5},
		{[]float64{1234}, false, 0, 1500, 4},
		{[]float64{2, 800}, true, 1, 1000, 4},
		{[]float64{10, 1000}, true, 10, 1000, 3},
	} {
		a := newAxis(test.values, test.log, 0, 100)
		if !about(a.low, test.low, 0.01) || !about(a.high, test.high, 0.01) || len(a.ticks()) != test.ticks {
			t.Errorf("axis of %v: got %g to %g with marks %v, want %g to %g with %d", test.values, a.low, a.high, a.ticks(), test.low, test.high, test.ticks)
		}
	}
	a := newAxis([]float64{1, 100}, true, 0, 100)
	if got := a.at(10); !about(got, 50, 0.01) {
		t.Errorf("10 between 1 and 100: got %g, want the middle", got)
	}
}

// sampleResults are a result and its limit.
func sampleResults() (result, limit *Result) {
	server, postgres := 1.5, 0.5
	result = &Result{
		Scenario: "put", Work: "put 1 record | sic", Target: brokerName, Operations: 20_000, Rate: 2000, RecordsRate: 4000, RecordUnit: "records",
		Latency: &Latency{Count: 1, P50: 2, P99: 8}, CPU: CPU{Server: &server, Postgres: &postgres},
		Errors: map[string]int64{"Unavailable": 3}, FirstFail: "away\x1b[31m", Checks: &Checks{Streams: 2, Events: 3, Expected: 6, Received: 5, Lost: 1},
	}
	limit = &Result{Work: "put 1 record", Target: bareName, Operations: 1, Rate: 8000, RecordsRate: 8000, Latency: &Latency{Count: 1, P50: 1, P99: 2}}
	result.compare(limit, "rate", "records", "p50", "p99")
	result.compare(nil, "rate")
	return result, limit
}

func TestComparison(t *testing.T) {
	result, _ := sampleResults()
	for i, want := range []Limit{{bareName, "rate", 8000, 0.25}, {bareName, "records", 8000, 0.5}, {bareName, "p50", 1, 2}, {bareName, "p99", 2, 4}} {
		if result.Limits[i] != want {
			t.Errorf("got %+v, want %+v", result.Limits[i], want)
		}
	}
	if microseconds, ok := result.PerOperation(); !ok || microseconds != 100 {
		t.Errorf("got %g µs of CPU for each, %t; want 100", microseconds, ok)
	}
	result.CPU.Postgres = nil
	if _, ok := result.PerOperation(); ok {
		t.Error("the CPU time of Postgres is unknown")
	}
	result.Limits = nil
	result.compare(&Result{}, "rate", "p50")
	if len(result.Limits) != 0 {
		t.Errorf("nothing can be compared with nothing: got %+v", result.Limits)
	}
}

func TestTable(t *testing.T) {
	result, limit := sampleResults()
	var b bytes.Buffer
	if err := writeTable(&b, []*Result{result, limit}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"put 1 record", "2,000/s", "4,000 records/s", "8.00 ms", "1.50 s", "unknown", "bare gRPC: rate 0.25, records 0.50, p50 2.00, p99 4.00", "FAILED: 1 lost", `3 × Unavailable, first: "away\x1b[31m"`} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is missing in\n%s", want, b.String())
		}
	}
	if strings.Contains(b.String(), "\x1b") {
		t.Error("a server's message can command the terminal")
	}
	lines := strings.Split(b.String(), "\n")
	if strings.Index(lines[0], "RATE")+len("RATE") != strings.Index(lines[1], "2,000/s")+len("2,000/s") {
		t.Errorf("columns are not aligned:\n%s", b.String())
	}
}

func TestJSONLines(t *testing.T) {
	result, limit := sampleResults()
	var b bytes.Buffer
	if err := writeJSON(&b, []*Result{result, limit}); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	if len(lines) != 2 {
		t.Fatalf("got %d lines, want one for each result", len(lines))
	}
	var back Result
	if err := json.Unmarshal([]byte(lines[0]), &back); err != nil {
		t.Fatal(err)
	}
	if back.Rate != 2000 || back.Latency.P99 != 8 || back.Checks.Lost != 1 || len(back.Limits) != 4 {
		t.Errorf("got %s", lines[0])
	}
}

func TestReport(t *testing.T) {
	result, limit := sampleResults()
	r := &report{version: "v1", begun: time.Now(), settings: []Fact{{"fsync", "on"}}}
	r.describeMachine(t.TempDir())
	r.section("Put", "New sessions.")
	r.add(result)
	r.add(limit)
	r.plot("put.svg", &chart{title: "a plot", series: []series{{"nothing", nil, false}, {"one", []point{{1, 1}}, false}}})
	r.plot("none.svg", &chart{title: "no plot", series: []series{{"nothing", nil, false}}})
	r.section("Nothing", "Nothing was measured here.")
	r.skip("this: failed: %s", "because | of\nthat")
	path := filepath.Join(t.TempDir(), "benchmarks.md")
	if err := r.write(path); err != nil {
		t.Fatal(err)
	}
	page := string(must(os.ReadFile(path)))
	for _, want := range []string{
		"# Benchmarks", "| `fsync` | on |", "## Put", `put 1 record \| sic | broker | 2,000 |`, "bare gRPC: rate 0.25, records 0.50, p50 2.00, p99 4.00", "100 µs", "FAILED: 1 lost",
		"![a plot](benchmarks/put.svg)", "## Not measured", `- this: failed: because \| of that`,
	} {
		if !strings.Contains(page, want) {
			t.Errorf("%q is missing in\n%s", want, page)
		}
	}
	if strings.Contains(page, "Nothing was measured here") || strings.Contains(page, "none.svg") {
		t.Errorf("an empty part is there:\n%s", page)
	}
	wellFormed(t, must(os.ReadFile(filepath.Join(filepath.Dir(path), "benchmarks", "put.svg"))))
	if got := len(r.results()); got != 2 {
		t.Errorf("got %d results", got)
	}
}
