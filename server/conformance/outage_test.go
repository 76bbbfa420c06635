package conformance_test

import (
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// logLines is a log that can be read while it is written.
type logLines struct {
	mu    sync.Mutex
	lines []string
}

func (l *logLines) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, string(line))
	return len(line), nil
}

func (l *logLines) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	taken := l.lines
	l.lines = nil
	return taken
}

// TestAnOutageIsOneLine: whatever fails while the database is away, requests and work in the background, the log has one line when
// it begins and one when it ends.
func TestAnOutageIsOneLine(t *testing.T) {
	t.Parallel()
	log := new(logLines)
	logger := slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelInfo}))
	b := servertest.New(t, servertest.Options{
		Configure: func(c *server.Config) {
			c.PollInterval, c.MaintenanceInterval, c.Logger = 50*time.Millisecond, 50*time.Millisecond, logger
		},
		ConfigureDB: func(c *db.Config) { c.Logger = logger },
	})
	put(t, b, thing("a", ""))
	log.take()
	end := outage(t, b.Database)
	b.AwaitHealth(t, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	for range 100 {
		_, err := b.ListTypes(testContext(t), new(emptypb.Empty))
		wantStatus(t, err, codes.Unavailable, "the database is unavailable")
		_, err = b.Put(testContext(t), &databroker.PutRequest{Records: []*databroker.Record{thing("b", "")}})
		wantStatus(t, err, codes.Unavailable, "the database is unavailable")
	}
	begun := log.take()
	end()
	b.AwaitHealth(t, grpc_health_v1.HealthCheckResponse_SERVING)
	var ended []string
	for begin := time.Now(); !strings.Contains(strings.Join(ended, ""), "the database is available again"); time.Sleep(10 * time.Millisecond) {
		if ended = append(ended, log.take()...); time.Since(begin) > time.Minute {
			t.Fatalf("the end of the outage is not logged: %q", ended)
		}
	}
	count := func(lines []string, what string) (n int) {
		for _, line := range lines {
			if strings.Contains(line, what) {
				n++
			}
		}
		return n
	}
	if n := count(begun, "the database is unavailable: requests fail"); n != 1 || count(ended, "the database is available again") != 1 {
		t.Errorf("%d lines about the beginning", n)
	}
	// Beside it what package db has noticed, once each, and nothing else.
	if len(begun) > 5 || len(ended) > 8 || count(begun, "polling") > 0 || count(begun, "method=") > 0 {
		t.Errorf("logged when it began:\n%s\nwhen it ended:\n%s", strings.Join(begun, ""), strings.Join(ended, ""))
	}
}
