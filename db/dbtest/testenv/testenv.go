// Package testenv keeps what a person has set, and what a server has left on this machine, out of tests: they find neither
// settings in the environment nor a state directory.
//
// Test binaries that import it, as all do that import dbtest, begin so. Programs that they start get what they are given.
package testenv

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// StateEnv is the environment variable with the directory that takes the place of the user's state directory.
const StateEnv = "TEST_STATE_HOME"

// keep are variables that say where things are on this machine, and not how they are to be used.
var keep = []string{"PGBROKER_POSTGRES_BIN"}

// prefixes of the variables of pgbroker, of Pomerium's databroker and of libpq.
var prefixes = []string{"PGBROKER_", "DATABROKER_", "SHARED_SECRET", "GRPC_ADDRESS", "GRPC_INSECURE", "METRICS_ADDRESS", "CERTIFICATE", "PG"}

func init() {
	// Not when a test has started this binary as another program.
	if slices.ContainsFunc(os.Args[1:], func(arg string) bool { return strings.HasPrefix(arg, "-test.") }) {
		Clean()
	}
}

// Hides reports whether tests do not see an environment variable.
func Hides(name string) bool {
	return !slices.Contains(keep, name) &&
		slices.ContainsFunc(prefixes, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// Clean removes from the environment of this process what tests must not see.
func Clean() {
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); Hides(name) {
			os.Unsetenv(name)
		}
	}
	state := os.Getenv(StateEnv)
	if state == "" { // nobody has made one; then there is none
		state = filepath.Join(os.TempDir(), fmt.Sprintf("pgbroker-test-state-%d", os.Getpid()))
	}
	os.Setenv("XDG_STATE_HOME", state)
}
