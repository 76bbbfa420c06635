package server

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"pgbroker/db"
)

const (
	// problemInterval is how often it is looked whether the installation is sound, which reads the catalog and no records.
	problemInterval = time.Minute
	// problemLookTime bounds one look.
	problemLookTime = 5 * time.Second
)

// problemWatch looks, at the start and now and then, whether triggers, sequence and indexes are what they have to be. A
// disabled trigger, say, is a revocation that nobody hears of. `pgbroker check` looks at the records, too.
type problemWatch struct {
	queries *db.Queries
	logger  *slog.Logger
	found   *prometheus.GaugeVec // by kind of problem

	known map[string]bool // those of the latest look
}

func newProblemWatch(queries *db.Queries, logger *slog.Logger) *problemWatch {
	w := &problemWatch{queries: queries, logger: logger, found: prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "pgbroker_setup_problems", Help: "Problems of the installation, such as a disabled trigger, by kind; the log has each of them. There is none while all is well.",
	}, []string{"problem"})}
	return w
}

// run watches until ctx ends.
func (w *problemWatch) run(ctx context.Context) {
	tick := time.NewTicker(problemInterval)
	defer tick.Stop()
	for {
		w.look(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// look says what is new, and what is over.
func (w *problemWatch) look(ctx context.Context) {
	looking, cancel := context.WithTimeout(ctx, problemLookTime)
	defer cancel()
	rows, err := w.queries.SetupProblemsList(looking)
	if err != nil {
		// Whether the database can be reached is reported elsewhere.
		w.logger.DebugContext(ctx, "cannot look for problems of the installation", "error", err)
		return
	}
	current, count := make(map[string]bool, len(rows)), make(map[string]float64)
	for _, row := range rows {
		name := row.Problem + ": " + row.Subject
		current[name] = true
		count[strings.ReplaceAll(row.Problem, " ", "_")]++
		if w.known[name] {
			continue
		}
		remedy := row.Detail
		if row.Repairable {
			remedy += "; run 'pgbroker check --repair' as the owner of the schema"
		}
		w.logger.ErrorContext(ctx, "the installation has a problem", "problem", row.Problem, "subject", row.Subject, "detail", remedy)
	}
	for name := range w.known {
		if !current[name] {
			w.logger.InfoContext(ctx, "a problem of the installation is over", "problem", name)
		}
	}
	w.known = current
	w.found.Reset()
	for problem, n := range count {
		w.found.WithLabelValues(problem).Set(n)
	}
}
