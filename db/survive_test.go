package db

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// TestALookoutSurvivesAPanic: whatever a host or a connection string makes the look-out panic, the process goes on, nobody waits for the
// first round for ever, and it is logged with its stack.
func TestALookoutSurvivesAPanic(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	l := newLookout(nil, slog.New(slog.NewTextHandler(&log, nil)), nil) // without a source it can only panic
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := l.ready(ctx); err != nil {
		t.Fatalf("the first round does not end: %v", err)
	}
	l.close()
	if got := log.String(); !strings.Contains(got, "look-out for the newest server") || !strings.Contains(got, "lookout.go") {
		t.Errorf("log: %s", got)
	}
}
