package main

import (
	"testing"
	"time"
)

func TestLongDuration(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]time.Duration{
		"0": 0, "90m": 90 * time.Minute, "30d": 720 * time.Hour, "1d12h": 36 * time.Hour, "0d1s": time.Second, "-5s": -5 * time.Second,
	} {
		var d time.Duration
		if err := (longDuration{&d}).Set(text); err != nil || d != want {
			t.Errorf("%q: %v, %v, want %v", text, d, err, want)
		}
	}
	for _, text := range []string{"", "d", "1", "1.5d", "-1d", "1d-1h", "1h1d", "200000d", "106751d24h", "1w", "1d1d"} {
		d := time.Duration(7)
		if err := (longDuration{&d}).Set(text); err == nil || d != 7 {
			t.Errorf("%q is taken for %v", text, d)
		}
	}
}
