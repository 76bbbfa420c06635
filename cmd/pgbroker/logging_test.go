package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

// TestDurationsInLogs: a duration is text with its unit, in every format and at any depth.
func TestDurationsInLogs(t *testing.T) {
	for _, format := range []string{"json", "text"} {
		var log bytes.Buffer
		cfg := &configuration{Config: Config{LogLevel: "info", LogFormat: format}}
		logger, err := newLogger(cfg, &log)
		if err != nil {
			t.Fatal(err)
		}
		logger.WithGroup("g").With("before", 2*time.Minute).Info("x", "after", 68*time.Millisecond)
		for _, want := range []string{"68ms", "2m0s"} {
			if !strings.Contains(log.String(), want) || strings.Contains(log.String(), "000000") {
				t.Errorf("%s: %s lacks %s", format, log.String(), want)
			}
		}
	}
}
