package main

import (
	"context"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"pgbroker/server"
)

// reloadable are the settings whose new values take effect without a restart.
var reloadable = []string{"shared_secret", "shared_secret_file", "keys", "log_level"}

// catchHangup keeps SIGHUP from ending the process, and returns where it arrives. One that comes while another is worked on is kept.
func catchHangup() (hangup <-chan os.Signal, stop func()) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP)
	return signals, func() { signal.Stop(signals) }
}

// A reloader reads the configuration again while serve runs.
type reloader struct {
	terminal io.Reader                      // where somebody has started serve by hand; nil if nobody has
	stop     func()                         // ends serve, as SIGTERM does
	load     func() (*configuration, error) // from the same flags and environment as at the start
	cfg      *configuration                 // in force
	server   *server.Server
	log      *slog.Logger
}

// follow reloads with each hangup until ctx ends. That of a terminal that was closed ends what was started there, as it ends
// any other program.
func (r *reloader) follow(ctx context.Context, hangup <-chan os.Signal) {
	for {
		select {
		case <-hangup:
			if r.terminal != nil && !isTerminal(r.terminal) {
				r.log.Info("the terminal was closed")
				r.stop()
				return
			}
			r.reload()
		case <-ctx.Done():
			return
		}
	}
}

// reload takes over what can change while serve runs, and says which settings changed and which of them need a restart. If
// anything is wrong, nothing changes.
func (r *reloader) reload() {
	next, err := r.load()
	if err == nil {
		err = next.validate()
	}
	if err == nil {
		if next.Embedded() && !next.hasSecret() {
			next.SharedSecretFile = r.cfg.SharedSecretFile // the one that is kept with the data
		}
		if !r.cfg.AllowUnauthenticated {
			err = r.server.ReplaceKeys(next.authConfig())
		}
	}
	if err != nil {
		r.log.Error("SIGHUP: the configuration cannot be used; what was in force stays", "error", err)
		return
	}
	if err := r.cfg.level.UnmarshalText([]byte(next.LogLevel)); err != nil { // the table allows good ones only
		r.log.Error("SIGHUP: log_level", "error", err)
	}
	if r.cfg.tls != nil {
		r.cfg.tls.Reload()
	}
	var applied, restart []string
	for i := range settings {
		name := settings[i].name
		if slices.Equal(r.cfg.values[name].items, next.values[name].items) {
			continue
		}
		if !slices.Contains(reloadable, name) {
			restart = append(restart, name)
			continue
		}
		applied = append(applied, name)
		r.cfg.values[name] = next.values[name]
	}
	attrs := []any{"changed", applied}
	if len(restart) > 0 {
		r.log.Warn("SIGHUP: configuration, secrets and certificates are read again; some of what changed needs a restart", append(attrs, "needs_restart", restart)...)
		return
	}
	r.log.Info("SIGHUP: configuration, secrets and certificates are read again", attrs...)
}
