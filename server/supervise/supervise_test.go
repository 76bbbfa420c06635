package supervise_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"pgbroker/server/supervise"
)

// TestRun: a task that panics is run again until it returns, and each panic is logged with its stack and counted.
func TestRun(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	var panicked []string
	s := &supervise.Supervisor{
		Logger: slog.New(slog.NewTextHandler(&log, nil)), OnPanic: func(task string) { panicked = append(panicked, task) },
	}
	runs := 0
	s.Run(t.Context(), "sums", func(context.Context) {
		if runs++; runs < 3 {
			sums := map[string]map[string]int{}
			sums["all"]["one"]++ // there is no such map
		}
	})
	if runs != 3 || strings.Join(panicked, " ") != "sums sums" {
		t.Errorf("%d runs, panics %v", runs, panicked)
	}
	if got := log.String(); strings.Count(got, "task=sums") != 2 || !strings.Contains(got, "nil map") || !strings.Contains(got, "supervise_test.go") {
		t.Errorf("log: %s", got)
	}
}

// TestRunEnds: a task that panics at its end is not begun again.
func TestRunEnds(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	runs := 0
	new(supervise.Supervisor).Run(ctx, "end", func(context.Context) {
		runs++
		cancel()
		panic("late")
	})
	if runs != 1 {
		t.Errorf("%d runs", runs)
	}
}

// TestCatch: errors pass, panics become errors that do not quote them; of many of the same only some are logged.
func TestCatch(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	s := &supervise.Supervisor{Logger: slog.New(slog.NewTextHandler(&log, nil))}
	failed := errors.New("failed")
	if err := s.Catch(t.Context(), "x", func() error { return failed }); !errors.Is(err, failed) {
		t.Errorf("%v", err)
	}
	var panicked *supervise.PanicError
	err := s.Catch(t.Context(), "x", func() error { panic("token") })
	if !errors.As(err, &panicked) || panicked.Task != "x" || strings.Contains(err.Error(), "token") {
		t.Errorf("%v", err)
	}
	for range 20 {
		_ = s.Catch(t.Context(), "x", func() error { panic("again") })
	}
	func() {
		defer s.Recover(t.Context(), "y")
		panic("z")
	}()
	if n, z := strings.Count(log.String(), "task=x"), strings.Count(log.String(), "task=y"); n != 5 || z != 1 {
		t.Errorf("%d and %d lines", n, z)
	}
}
