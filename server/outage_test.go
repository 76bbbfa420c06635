package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"
)

// TestOutageIsSaidOnce: however many lines there would be, an outage is said when it begins, once a minute, and when it is over.
func TestOutageIsSaidOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		outage, logger := newOutage(slog.New(slog.NewJSONHandler(&log, nil)))
		lines := func() (said []string) {
			t.Helper()
			for d := json.NewDecoder(&log); ; {
				var line map[string]any
				if err := d.Decode(&line); err == io.EOF {
					log.Reset()
					return said
				} else if err != nil {
					t.Fatal(err)
				}
				said = append(said, fmt.Sprint(line["msg"]))
			}
		}
		const begin, still, over = "the database is unavailable: requests fail and streams wait; this is said once a minute", "the database is still unavailable", "the database is available again"
		want := func(what string, lines []string, want ...string) {
			t.Helper()
			if !slices.Equal(lines, want) {
				t.Errorf("%s: logged %q, want %q", what, lines, want)
			}
		}
		down := fmt.Errorf("read: %w", &pgconn.PgError{Code: "57P01", Severity: "FATAL"})
		failing := func(seconds int) {
			for range 10 * seconds {
				logger.Warn("a request failed", "error", down)
				logger.With("method", "x").WithGroup("g").Error("another part", "error", down)
				outage.look(context.Background(), down)
				time.Sleep(100 * time.Millisecond)
			}
		}
		failing(30)
		want("at first", lines(), begin)
		failing(100)
		want("later", lines(), still, still)
		logger.Warn("something else", "error", errors.New("disk"), "other", 1)
		want("something else", lines(), "something else")
		outage.look(context.Background(), nil)
		time.Sleep(outageQuiet)
		outage.look(context.Background(), nil)
		outage.look(context.Background(), nil)
		want("at last", lines(), over)

		// A request says so when it begins, and then nobody asks for anything.
		logger.Warn("a request failed", "error", down)
		for range 100 {
			outage.look(context.Background(), down)
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(outageQuiet)
		outage.look(context.Background(), nil)
		if said := log.String(); !strings.Contains(said, `"after":9900000000`) {
			t.Errorf("an outage of 10 s: logged %s", said)
		}
		log.Reset()

		// A server that takes no writes is no outage, and somebody else says it.
		for _, code := range []string{pgerrcode.ReadOnlySQLTransaction, pgerrcode.DiskFull} {
			logger.Warn("a write failed", "error", &pgconn.PgError{Code: code, Severity: "ERROR"})
			time.Sleep(2 * outageQuietElse)
			outage.look(context.Background(), nil)
			want(code, lines())
		}

		// One connection that breaks, which the feed does not notice.
		logger.Warn("a request failed", "error", down)
		for range 200 {
			outage.look(context.Background(), nil)
			time.Sleep(time.Second)
		}
		want("a single failure", lines(), begin, over)
	})
}
