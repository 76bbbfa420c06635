package main

import (
	"fmt"
	"io"
	"log/slog"
)

// newLogger returns the log of serve.
func newLogger(cfg *configuration, w io.Writer) (*slog.Logger, error) {
	level := &cfg.level
	if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil { // the table allows good ones only
		return nil, fmt.Errorf("%s: %w", cfg.describe("log_level"), err)
	}
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration { // which JSON would have in nanoseconds
			a.Value = slog.StringValue(a.Value.Duration().String())
		}
		return a
	}}
	if cfg.LogFormat == "json" || cfg.LogFormat == "auto" && terminalWidth(w) == 0 {
		return slog.New(slog.NewJSONHandler(w, options)), nil
	}
	return slog.New(slog.NewTextHandler(w, options)), nil
}
