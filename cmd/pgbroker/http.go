package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"pgbroker/server"
)

// newHTTPServer returns the server for metrics and probes. It answers nothing else, so its timeouts are short.
func newHTTPServer(metrics prometheus.Gatherer, ready, writable func() error, log *slog.Logger) *http.Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(metrics, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelError), Timeout: 10 * time.Second, MaxRequestsInFlight: 4,
	}))
	// Alive is whoever answers. If this asked the database, an outage of the database would restart every replica.
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { probe(w, nil) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		switch purpose := r.URL.Query().Get("for"); purpose {
		case "", server.HealthReading:
			probe(w, ready())
		case server.HealthWriting:
			probe(w, writable())
		default:
			http.Error(w, fmt.Sprintf("for: got %q, allowed %s and %s", purpose, server.HealthReading, server.HealthWriting), http.StatusBadRequest)
		}
	})
	return &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}

func probe(w http.ResponseWriter, problem error) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	if problem != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintf(w, "not ready: %v\n", problem)
		return
	}
	fmt.Fprintln(w, "ok")
}

// serveHTTP serves on a listener until ctx ends.
func serveHTTP(ctx context.Context, probes *http.Server, listener net.Listener) error {
	stopped := context.AfterFunc(ctx, func() { _ = probes.Close() }) // a probe or a scrape can be asked again
	defer stopped()
	if err := probes.Serve(listener); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}
