package server

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Why a record is not delivered as it is stored. The names are labels of metrics.
const (
	// misfitTooLarge: the message that would carry it is larger than max_message_size. It is left out.
	misfitTooLarge = "too_large"
	// misfitMalformed: its payload is no google.protobuf.Any, and would make the whole message undecodable, for every client and
	// for ever. It is delivered without the payload.
	misfitMalformed = "malformed"
	// misfitPanicked: encoding or reading it panicked. It is left out.
	misfitPanicked = "panicked"
)

const (
	// maxMisfits bounds the records that are remembered, and shown by the metric.
	maxMisfits = 20
	// misfitTime is how long a record is remembered after it was last met.
	misfitTime = time.Hour
	// misfitLogInterval is how often one record is logged.
	misfitLogInterval = time.Minute
	// maxMisfitLines bounds the lines of one interval for all records.
	maxMisfitLines = 10
)

// misfits notes the records that cannot be delivered as they are stored, so that somebody can mend them: streams go on without
// them, which nobody would notice. They are of a time when the limit was higher, or were written past the triggers.
type misfits struct {
	logger *slog.Logger
	met    *prometheus.CounterVec

	mu      sync.Mutex // protects what follows
	records map[key]*misfit
	lines   int       // logged since began
	began   time.Time // of the interval
}

type misfit struct {
	reason string
	bytes  int
	seen   time.Time
	logged time.Time
}

func newMisfits(logger *slog.Logger) *misfits {
	m := &misfits{
		logger: logger, records: make(map[key]*misfit),
		met: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pgbroker_misfits_total", Help: "Deliveries of records that could not be delivered as they are stored, by reason.",
		}, []string{"reason"}),
	}
	for _, reason := range []string{misfitTooLarge, misfitMalformed, misfitPanicked} {
		m.met.WithLabelValues(reason) // a metric that is there before it is needed
	}
	return m
}

// note counts a record that is not delivered as it is stored, and logs it now and then.
func (m *misfits) note(ctx context.Context, k key, version int64, bytes int, reason string) {
	m.met.WithLabelValues(reason).Inc()
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	found := m.records[k]
	if found == nil || found.reason != reason {
		m.forget(now)
		found = &misfit{reason: reason}
		m.records[k] = found
	}
	found.bytes, found.seen = bytes, now
	if now.Sub(m.began) >= misfitLogInterval {
		m.began, m.lines = now, 0
	}
	if now.Sub(found.logged) < misfitLogInterval || m.lines >= maxMisfitLines {
		return
	}
	found.logged = now
	m.lines++
	m.logger.WarnContext(ctx, map[string]string{
		misfitTooLarge:  "a record is larger than max_message_size; clients do not get it",
		misfitMalformed: "the payload of a record is not a serialized google.protobuf.Any; clients get the record without it",
		misfitPanicked:  "a record cannot be handled; clients do not get it",
	}[reason], "type", k.recordType, "id", k.id, "version", version, "bytes", bytes)
}

// forget makes room for one more record.
func (m *misfits) forget(now time.Time) {
	var oldest key
	for k, found := range m.records {
		if now.Sub(found.seen) > misfitTime {
			delete(m.records, k)
		} else if first := m.records[oldest]; first == nil || found.seen.Before(first.seen) {
			oldest = k
		}
	}
	if len(m.records) >= maxMisfits {
		delete(m.records, oldest)
	}
}

// misfitBytes describes the series that misfits collects: one for each of the records that were met of late.
var misfitBytes = prometheus.NewDesc("pgbroker_misfit_bytes",
	"Size of a record that could not be delivered as it is stored, for an hour after it was last met; of the latest 20.",
	[]string{"type", "id", "reason"}, nil)

// Describe implements prometheus.Collector.
func (m *misfits) Describe(descs chan<- *prometheus.Desc) {
	m.met.Describe(descs)
	descs <- misfitBytes
}

// Collect implements prometheus.Collector.
func (m *misfits) Collect(metrics chan<- prometheus.Metric) {
	m.met.Collect(metrics)
	m.mu.Lock()
	defer m.mu.Unlock()
	for k, found := range m.records {
		if time.Since(found.seen) <= misfitTime {
			metrics <- prometheus.MustNewConstMetric(misfitBytes, prometheus.GaugeValue, float64(found.bytes),
				toValidText(k.recordType), toValidText(k.id), found.reason)
		}
	}
}

// toValidText makes a text from the database fit for the label of a metric.
func toValidText(text string) string { return strings.ToValidUTF8(text, "?") }
