package chaos

import (
	"flag"
	"regexp"
	"testing"
	"time"
)

// `make chaos` sets these.
var (
	seed     = flag.Uint64("chaos.seed", 1, "what is drawn at random is drawn from this")
	duration = flag.Duration("chaos.duration", 0, "how long faults are injected; 0 is the short run of `make test`")
	previous = flag.String("chaos.previous", "", "revision of which replicas run beside those of today")
	only     = flag.String("chaos.only", "", "regular expression of the kinds of faults to inject; empty for all")
	keep     = flag.Bool("chaos.keep", false, "keep history and logs also when all is well")
	skew     = flag.Bool("chaos.skew", false, "let replicas run with wrong clocks")
)

// TestChaos lets everything go wrong for a while: a short one, unless told otherwise.
func TestChaos(t *testing.T) {
	config := Config{Seed: *seed, Duration: *duration, Previous: *previous, Skew: *skew, Keep: *keep, Output: t.Output()}
	if *only != "" {
		config.Only = regexp.MustCompile(*only)
	}
	if config.Duration == 0 {
		config.Duration, config.Hurry = 12*time.Second, true
	}
	Run(t, config)
}
