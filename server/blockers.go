package server

import (
	"cmp"
	"context"
	"log/slog"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"pgbroker/db"
)

const (
	// maxBlockers bounds what is reported at a time.
	maxBlockers = 10
	// blockerLookTime bounds one look at the database.
	blockerLookTime = 3 * time.Second
	// blockerGrace is for how many times the warning time a session counts as blocking after it was last seen to: those who
	// wait for it give up, and a moment later others come.
	blockerGrace = 5
)

// blockerWatch looks for sessions of the database that keep writers waiting, such as a transaction that somebody has
// left open in psql: while it holds the order lock, nothing is revoked. It logs each one once when it has blocked for a
// while and once when it is over, and shows those of the moment as a metric.
type blockerWatch struct {
	queries *db.Queries
	logger  *slog.Logger
	after   time.Duration // how long a session may block until it is reported

	reported atomic.Pointer[[]blocker] // those of the latest look; nil before the first
}

// blocker is a session that keeps writers waiting.
type blocker struct {
	db.BlockersListRow
	query    string // what it runs, without anything that could be a secret
	since    time.Time
	seen     time.Time // at the latest look that has found it
	reported bool
}

// blockerID tells transactions apart: a session that blocks a second time is news.
type blockerID struct {
	pid         int32
	transaction time.Time
}

func (b *blocker) id() blockerID { return blockerID{b.Pid, b.TransactionStartedAt} }

// run watches until ctx ends.
func (w *blockerWatch) run(ctx context.Context) {
	tick := time.NewTicker(max(w.after/2, 10*time.Millisecond))
	defer tick.Stop()
	known := make(map[blockerID]*blocker)
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		looking, cancel := context.WithTimeout(ctx, blockerLookTime)
		rows, err := w.queries.BlockersList(looking, maxBlockers)
		cancel()
		if err != nil {
			// Whether the database can be reached is reported elsewhere.
			w.logger.DebugContext(ctx, "cannot look for sessions that block writes", "error", err)
			continue
		}
		known = w.note(ctx, known, rows, time.Now())
	}
}

// note compares a look with what is known from those before it.
func (w *blockerWatch) note(ctx context.Context, known map[blockerID]*blocker, rows []db.BlockersListRow, now time.Time) map[blockerID]*blocker {
	current := make(map[blockerID]*blocker, len(rows))
	for i := range rows {
		b := &blocker{BlockersListRow: rows[i], query: redactQuery(rows[i].Query), seen: now}
		b.since = now.Add(-time.Duration(b.WaitingSeconds * float64(time.Second)))
		if before := known[b.id()]; before != nil {
			b.reported = before.reported
			if before.since.Before(b.since) {
				b.since = before.since
			}
		}
		current[b.id()] = b
	}
	for id, before := range known {
		switch {
		case current[id] != nil:
		case now.Sub(before.seen) < blockerGrace*w.after:
			current[id] = before
		case before.reported:
			w.logger.InfoContext(ctx, "the transaction does not block writes any more", "pid", before.Pid,
				"blocked_for", before.seen.Sub(before.since).Round(time.Millisecond))
		}
	}
	var reported []blocker
	for _, b := range current {
		if b.seen.Sub(b.since) < w.after {
			continue
		}
		if !b.reported {
			b.reported = true
			w.logger.WarnContext(ctx, "a transaction of another session blocks writes; nothing is written or revoked until it ends",
				b.attrs()...)
		}
		reported = append(reported, *b)
	}
	w.reported.Store(&reported)
	return current
}

func (b *blocker) attrs() []any {
	attrs := []any{
		"pid", b.Pid, "user", b.UserName, "application_name", b.ApplicationName, "client", b.Client,
		"state", cmp.Or(b.State, "hidden from this role"), "waiting_sessions", b.Waiting,
		"blocks_for", b.seen.Sub(b.since).Round(time.Millisecond), "query", b.query,
	}
	if b.TransactionStartedAt.Unix() > 0 {
		attrs = append(attrs, "transaction_started_at", b.TransactionStartedAt)
	}
	return append(attrs, "to_end_it", "SELECT pg_terminate_backend("+strconv.Itoa(int(b.Pid))+")")
}

// active reports whether a session blocks writes at the moment.
func (w *blockerWatch) active() bool {
	reported := w.reported.Load()
	return reported != nil && len(*reported) > 0
}

// blockingSeconds describes the metric that blockerWatch collects: a series for each session that blocks, as long as it
// does.
var blockingSeconds = prometheus.NewDesc("pgbroker_blocking_session_seconds",
	"How long a session of the database has kept writers waiting with an open transaction; there is none while nobody does.",
	[]string{"pid", "user", "application_name", "state", "query"}, nil)

// Describe implements prometheus.Collector.
func (w *blockerWatch) Describe(descs chan<- *prometheus.Desc) { descs <- blockingSeconds }

// Collect implements prometheus.Collector.
func (w *blockerWatch) Collect(metrics chan<- prometheus.Metric) {
	reported := w.reported.Load()
	if reported == nil {
		return
	}
	seen := make(map[int32]bool, len(*reported))
	for i := range *reported {
		b := &(*reported)[i]
		if seen[b.Pid] {
			continue // prepared transactions are all of process 0, and a series must not come twice
		}
		seen[b.Pid] = true
		metrics <- prometheus.MustNewConstMetric(blockingSeconds, prometheus.GaugeValue, b.seen.Sub(b.since).Seconds(),
			strconv.Itoa(int(b.Pid)), toValidText(b.UserName), toValidText(b.ApplicationName), toValidText(b.State), toValidText(b.query))
	}
}
