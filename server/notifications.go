package server

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync/atomic"
	"time"

	"pgbroker/db"
)

const (
	// queueHalfFull is how full the queue of notifications is when nothing in the schema notifies any more.
	queueHalfFull = 0.5
	// queueLogInterval is how often it is logged that it is.
	queueLogInterval = time.Minute
	// maxQueueHolders bounds the sessions that are named.
	maxQueueHolders = 3
	// queueLookTime bounds one look at the database.
	queueLookTime = 3 * time.Second
)

// queueWatch looks at the queue of notifications, which all databases of the server share. A session of any of them that listens and
// leaves a transaction open keeps it from being emptied, and when it is full no transaction that notifies can commit: so from a half
// on writers stop to notify, and changes are found by polling.
type queueWatch struct {
	queries  *db.Queries
	logger   *slog.Logger
	interval time.Duration

	usage atomic.Uint64 // bits of the latest reading
}

// run watches until ctx ends.
func (w *queueWatch) run(ctx context.Context) {
	tick := time.NewTicker(w.interval)
	defer tick.Stop()
	var logged time.Time // zero while the queue is less than half full
	for {
		logged = w.look(ctx, logged)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// look reads how full the queue is, and logs when it is too full or no longer so. It takes and returns when that was last logged.
func (w *queueWatch) look(ctx context.Context, logged time.Time) time.Time {
	ctx, cancel := context.WithTimeout(ctx, queueLookTime)
	defer cancel()
	usage, err := w.queries.NotificationQueueUsage(ctx)
	if err != nil {
		w.logger.DebugContext(ctx, "cannot read how full the queue of notifications is", "error", err) // whether the database can be reached is reported elsewhere
		return logged
	}
	w.usage.Store(math.Float64bits(usage))
	switch {
	case usage < queueHalfFull && logged.IsZero():
	case usage < queueHalfFull:
		w.logger.InfoContext(ctx, "the queue of notifications is less than half full again; changes are announced", "usage", usage)
		return time.Time{}
	case time.Since(logged) >= queueLogInterval:
		w.logger.WarnContext(ctx, "the queue of notifications, which all databases of the server share, is more than half full; "+
			"changes are found by polling, until the session that holds it ends its transaction", "usage", usage, "oldest_transactions", w.holders(ctx))
		return time.Now()
	}
	return logged
}

// holders describes the sessions that may be to blame.
func (w *queueWatch) holders(ctx context.Context) string {
	rows, err := w.queries.NotificationHolders(ctx, maxQueueHolders)
	switch {
	case err != nil:
		return "cannot be read: " + err.Error()
	case len(rows) == 0:
		return "hidden from this role; members of pg_read_all_stats see them, and PostgreSQL's log names one"
	}
	sessions := make([]string, len(rows))
	for i, row := range rows {
		sessions[i] = fmt.Sprintf("pid %d of %s in %s (%s), %s since %s", row.Pid, row.UserName, row.DatabaseName, row.ApplicationName,
			row.State, row.TransactionStartedAt.UTC().Format(time.RFC3339))
	}
	return strings.Join(sessions, "; ")
}
