package server

import (
	"cmp"
	"context"
	"log/slog"
	"strings"
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

// blockerWatch looks for what keeps writers waiting, such as a transaction that somebody has left open in psql, one that
// was prepared and forgotten, or a commit that waits for a synchronous standby: meanwhile nothing is revoked. It logs each
// one once when it has blocked for a while and once when it is over, and shows those of the moment as a metric.
type blockerWatch struct {
	queries *db.Queries
	logger  *slog.Logger
	after   time.Duration // how long a session may block until it is reported

	reported atomic.Pointer[[]blocker] // those of the latest look; nil before the first
}

// blocker is a session, or a prepared transaction, that keeps writers waiting.
type blocker struct {
	db.BlockersListRow
	since    time.Time
	seen     time.Time // at the latest look that has found it
	reported bool
}

// blockerID tells transactions apart: a session that blocks a second time is news.
type blockerID struct {
	pid         int32  // 0: a prepared transaction
	gid         string // "": a session
	transaction time.Time
}

func (b *blocker) id() blockerID { return blockerID{b.Pid, b.Gid, b.TransactionStartedAt} }

// blocked reports whether a session has blocked writes for a while.
func (w *blockerWatch) blocked() bool {
	reported := w.reported.Load()
	return reported != nil && len(*reported) > 0
}

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
		b := &blocker{BlockersListRow: rows[i], seen: now}
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
			w.logger.InfoContext(ctx, "writes are not blocked any more",
				append(before.name(), "blocked_for", before.seen.Sub(before.since).Round(time.Millisecond))...)
		}
	}
	var reported []blocker
	for _, b := range current {
		if b.seen.Sub(b.since) < w.after {
			continue
		}
		if !b.reported {
			b.reported = true
			w.logger.WarnContext(ctx, blockerMessage(b.Reason), b.attrs()...)
		}
		reported = append(reported, *b)
	}
	w.reported.Store(&reported)
	return current
}

// The reasons that the view pgbroker.blockers knows beside the usual ones.
const (
	reasonPrepared    = "prepared transaction"
	reasonSyncStandby = "synchronous standby"
)

// blockerMessage says what has happened, by the reason that the view pgbroker.blockers gives.
func blockerMessage(reason string) string {
	switch reason {
	case reasonPrepared:
		return "a prepared transaction blocks writes; nothing is written or revoked until it is rolled back or committed"
	case reasonSyncStandby:
		return "a commit waits for a synchronous standby; nothing is written or revoked until that answers"
	}
	return "a transaction of another session blocks writes; nothing is written or revoked until it ends"
}

// name is what tells it from others. What it runs is not said: a query may quote secrets. The view shows it to those who may see it.
func (b *blocker) name() []any {
	if b.Gid != "" {
		return []any{"gid", b.Gid, "user", b.UserName}
	}
	return []any{"pid", b.Pid, "user", b.UserName, "application_name", b.ApplicationName, "client", b.Client}
}

func (b *blocker) attrs() []any {
	attrs := append(b.name(), "reason", b.Reason, "waiting_sessions", b.Waiting, "blocks_for", b.seen.Sub(b.since).Round(time.Millisecond))
	if b.Gid == "" {
		attrs = append(attrs, "state", cmp.Or(b.State, "hidden from this role"))
	}
	if b.TransactionStartedAt.Unix() > 0 {
		attrs = append(attrs, "transaction_started_at", b.TransactionStartedAt)
	}
	return append(attrs, "to_end_it", b.Remedy)
}

// cause returns why writes fail at the moment; nil if nothing blocks them.
func (w *blockerWatch) cause() error {
	reported := w.reported.Load()
	if reported == nil || len(*reported) == 0 {
		return nil
	}
	for _, b := range *reported {
		if b.Reason == reasonSyncStandby {
			return errUnconfirmed
		}
	}
	return errBlocked
}

// blockingSeconds describes the metric that blockerWatch collects: a series for each reason for which writes are blocked, as
// long as they are. Who it is, the log and the view say: sessions have no bound.
var blockingSeconds = prometheus.NewDesc("pgbroker_blocking_session_seconds",
	"How long a session, a prepared transaction or a lost synchronous standby has kept writers waiting; there is none while nothing does.",
	[]string{"reason"}, nil)

// Describe implements prometheus.Collector.
func (w *blockerWatch) Describe(descs chan<- *prometheus.Desc) { descs <- blockingSeconds }

// Collect implements prometheus.Collector.
func (w *blockerWatch) Collect(metrics chan<- prometheus.Metric) {
	reported := w.reported.Load()
	if reported == nil {
		return
	}
	longest := make(map[string]time.Duration)
	for _, b := range *reported {
		longest[b.Reason] = max(longest[b.Reason], b.seen.Sub(b.since))
	}
	for reason, since := range longest {
		metrics <- prometheus.MustNewConstMetric(blockingSeconds, prometheus.GaugeValue, since.Seconds(), strings.ReplaceAll(reason, " ", "_"))
	}
}
