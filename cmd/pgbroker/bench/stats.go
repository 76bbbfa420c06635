package bench

import (
	"fmt"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Latencies are kept with three digits, from a microsecond to ten minutes.
const (
	shortest = time.Microsecond
	longest  = 10 * time.Minute
	digits   = 3
)

func newHistogram() *hdrhistogram.Histogram {
	return hdrhistogram.New(int64(shortest), int64(longest), digits)
}

// A recorder takes latencies from many goroutines.
type recorder struct {
	shards []recorderShard
}

type recorderShard struct {
	mu        sync.Mutex // protects histogram
	histogram *hdrhistogram.Histogram
	_         [64]byte // its own cache line
}

// maxShards bounds the memory of a recorder: a histogram takes about 200 kB.
const maxShards = 16

// newRecorder returns a recorder for a number of goroutines.
func newRecorder(goroutines int) *recorder {
	r := &recorder{shards: make([]recorderShard, max(1, min(goroutines, maxShards)))}
	for i := range r.shards {
		r.shards[i].histogram = newHistogram()
	}
	return r
}

// record notes a latency, from the given goroutine.
func (r *recorder) record(goroutine int, latency time.Duration) {
	shard := &r.shards[goroutine%len(r.shards)]
	value := int64(min(max(latency, 0), longest))
	shard.mu.Lock()
	defer shard.mu.Unlock()
	if err := shard.histogram.RecordValue(value); err != nil {
		panic(err) // it is in the range
	}
}

// histogram returns all that has been recorded so far.
func (r *recorder) histogram() *hdrhistogram.Histogram {
	all := newHistogram()
	for i := range r.shards {
		shard := &r.shards[i]
		shard.mu.Lock()
		all.Merge(shard.histogram)
		shard.mu.Unlock()
	}
	return all
}

// A Latency is a distribution in milliseconds.
type Latency struct {
	Count int64   `json:"count"`
	Mean  float64 `json:"mean_ms"`
	P50   float64 `json:"p50_ms"`
	P90   float64 `json:"p90_ms"`
	P99   float64 `json:"p99_ms"`
	P999  float64 `json:"p999_ms"`
	Max   float64 `json:"max_ms"`
	// HDR is the whole distribution in nanoseconds, as HdrHistogram's tools read it (V2, compressed, base64).
	HDR string `json:"hdr,omitempty"`
}

// newLatency summarizes a histogram; nil for an empty one.
func newLatency(h *hdrhistogram.Histogram) *Latency {
	if h.TotalCount() == 0 {
		return nil
	}
	at := func(quantile float64) float64 { return milliseconds(time.Duration(h.ValueAtQuantile(quantile))) }
	return &Latency{
		Count: h.TotalCount(), Mean: milliseconds(time.Duration(h.Mean())),
		P50: at(50), P90: at(90), P99: at(99), P999: at(99.9), Max: milliseconds(time.Duration(h.Max())),
	}
}

// fullLatency is newLatency with the distribution.
func fullLatency(h *hdrhistogram.Histogram) *Latency {
	l := newLatency(h)
	if l == nil {
		return nil
	}
	if hdr, err := h.Encode(hdrhistogram.V2CompressedEncodingCookieBase); err == nil {
		l.HDR = string(hdr)
	}
	return l
}

// milliseconds is how latencies are printed: to the microsecond, which is what is kept of them.
func milliseconds(d time.Duration) float64 {
	return float64(d.Round(time.Microsecond)) / float64(time.Millisecond)
}

// showMilliseconds writes a latency with as many digits as say something.
func showMilliseconds(ms float64) string {
	switch {
	case ms < 10:
		return fmt.Sprintf("%.2f ms", ms)
	case ms < 100:
		return fmt.Sprintf("%.1f ms", ms)
	case ms < 10_000:
		return fmt.Sprintf("%.0f ms", ms)
	default:
		return fmt.Sprintf("%.1f s", ms/1000)
	}
}

// showNumber writes a number with as many digits as say something, and separators.
func showNumber(n float64) string {
	switch {
	case n < 10:
		return fmt.Sprintf("%.2f", n)
	case n < 100:
		return fmt.Sprintf("%.1f", n)
	}
	text := fmt.Sprintf("%.0f", n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// showBytes writes a size.
func showBytes(n float64) string {
	for _, unit := range []struct {
		size float64
		name string
	}{{1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if n >= unit.size {
			return fmt.Sprintf("%.1f %s", n/unit.size, unit.name)
		}
	}
	return fmt.Sprintf("%.0f B", n)
}
