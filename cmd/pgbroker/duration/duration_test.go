package duration

import (
	"errors"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]time.Duration{
		"0": 0, "90m": 90 * time.Minute, "30d": 720 * time.Hour, "1d12h": 36 * time.Hour, "0d1s": time.Second, "-5s": -5 * time.Second,
		"106751d": 106751 * 24 * time.Hour, "1d0.5h": 24*time.Hour + 30*time.Minute,
	} {
		if d, err := Parse(text); err != nil || d != want {
			t.Errorf("%q: %v, %v, want %v", text, d, err, want)
		}
	}
	for _, text := range []string{"", "d", "1", "1.5d", "-1d", "1d-1h", "1d+1h", "1h1d", "200000d", "106751d24h", "1w", "1d1d", " 1d", "1 d"} {
		if d, err := Parse(text); !errors.Is(err, ErrFormat) {
			t.Errorf("%q is taken for %v, %v", text, d, err)
		}
	}
}

func TestFormat(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		0: "0s", time.Second: "1s", 90 * time.Second: "1m30s", time.Minute: "1m", 168 * time.Hour: "168h", 90 * time.Minute: "1h30m",
		time.Hour + time.Second: "1h0m1s",
	} {
		if got := Format(d); got != want {
			t.Errorf("Format(%v) = %q, want %q", d, got, want)
		}
	}
}

func TestVar(t *testing.T) {
	t.Parallel()
	var d time.Duration
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	Var(flags, &d, "wait", 90*time.Minute, func(d time.Duration) error {
		if d < 0 {
			return errors.New("too little")
		}
		return nil
	}, "")
	if got := flags.Lookup("wait").DefValue; d != 90*time.Minute || got != "1h30m" {
		t.Errorf("default %v, shown as %q", d, got)
	}
	for text, want := range map[string]time.Duration{"2d": 48 * time.Hour, "-1s": 90 * time.Minute, "x": 90 * time.Minute} {
		d = 90 * time.Minute
		if err := flags.Parse([]string{"--wait=" + text}); d != want || (err == nil) != (text == "2d") {
			t.Errorf("--wait=%s: %v, %v", text, d, err)
		}
	}
}
