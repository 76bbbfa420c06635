package main

import (
	"encoding/json"
	"strings"
	"testing"

	"pgbroker/server/servertest"
)

// TestBenchCommand is about settings and connections; what is measured is tested in package bench.
func TestBenchCommand(t *testing.T) {
	b := servertest.New(t, servertest.Options{})
	env := append(environment(b.Replica), "PGBROKER_DATABASE_URL="+b.Database.ConnString)
	short := []string{"--duration", "100ms", "--warmup", "0s", "--streams", "2", "--rate", "20"}
	for _, args := range []string{"bench fanout", "bench revoke", "bench revoke --via sql"} {
		var result struct {
			Rate   float64 `json:"per_second"`
			Checks struct{ Expected, Received int }
		}
		out := mustTry(t, env, append(append(strings.Fields(args), short...), "-o", "json")...)
		if err := json.Unmarshal([]byte(out), &result); err != nil {
			t.Fatalf("%s: %v in %s", args, err, out)
		}
		if result.Rate <= 0 || result.Checks.Received == 0 || result.Checks.Received != result.Checks.Expected {
			t.Errorf("%s: got %s", args, out)
		}
	}
	if out := mustTry(t, env, append([]string{"bench", "fanout"}, short...)...); !strings.Contains(out, "once and in order") {
		t.Errorf("got %s", out)
	}

	for _, test := range []struct {
		name string
		env  []string
		args string
		code int
		want string
	}{
		{"wrong usage", env, "bench put --clients 0", exitUsage, "--clients: got 0"},
		{"unknown scenario", env, "bench everything", exitUsage, "unknown command"},
		{"another machine that nobody has named", []string{"PGBROKER_ADDRESS=192.0.2.1:5443"}, "bench put", exitUsage, "give it with --address"},
		{"no secret", environment(b.Replica)[:1], "bench put --clients 1 --duration 50ms", exitUnauthenticated, noSecretHint},
		{"nobody there", nil, "bench put --clients 1 --duration 50ms --address 127.0.0.1:1", exitUnreachable, "cannot reach a server at 127.0.0.1:1"},
		{"no database", append(environment(b.Replica), "PGBROKER_DATA_DIR="+t.TempDir()), "bench soak", exitFailure, "--database-url"},
	} {
		if r := try(t, test.env, strings.Fields(test.args)...); r.code != test.code || !strings.Contains(r.stderr, test.want) {
			t.Errorf("%s: got exit code %d and %q, want %d and %q", test.name, r.code, r.stderr, test.code, test.want)
		}
	}
}
