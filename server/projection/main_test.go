package projection

import (
	"flag"
	"testing"
)

// TestMain has rapid look harder than its 100 examples, unless told how hard on the command line.
func TestMain(m *testing.M) {
	flag.Parse()
	if checks := flag.Lookup("rapid.checks"); checks.Value.String() == checks.DefValue {
		if err := checks.Value.Set("2000"); err != nil {
			panic(err)
		}
	}
	m.Run()
}
