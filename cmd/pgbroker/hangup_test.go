package main

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"pgbroker/db/dbtest"
)

// TestHangup: SIGHUP does not end serve; secrets and what else can change are read again, the log says what changed and what needs a
// restart, and a configuration that cannot be used changes nothing.
func TestHangup(t *testing.T) {
	database := dbtest.New(t)
	address := freeAddress(t)
	const first, second = canary, "b3RoZXIgc2hhcmVkIHNlY3JldCBvZiAzMiBieXRlcyE="
	config := writeFile(t, "pgbroker.yaml", "")
	write := func(lines string) {
		t.Helper()
		if err := os.WriteFile(config, []byte(fmt.Sprintf("address: %s\ndatabase_url: %q\n%s", address, database.ConnString, lines)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("shared_secret: " + first + "\nrequest_timeout: 8s\n")
	server := start(t, nil, "serve", "--config", config, "--log-format", "json")
	env := []string{"PGBROKER_ADDRESS=" + address}
	mustTry(t, env, "health", "--wait", "30s")
	hangUp := func(want string) string {
		t.Helper()
		before := len(server.said())
		if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		for range 3000 {
			if said := server.said()[before:]; strings.Contains(said, want) {
				return said
			}
			if try(t, env, "health").code != exitOK {
				t.Fatalf("the server is not healthy: %s", server.said())
			}
		}
		t.Fatalf("the log lacks %q: %s", want, server.said()[before:])
		return ""
	}
	accepts := func(secret string, want bool) {
		t.Helper()
		if r := try(t, append(env, "PGBROKER_SHARED_SECRET="+secret), "types"); (r.code == exitOK) != want {
			t.Errorf("accepted: %v, want %v: %s", r.code == exitOK, want, r.stderr)
		}
	}
	accepts(first, true)
	accepts(second, false)

	hangUp(`"changed":null`)
	write("keys: [{name: ci, access: read, secret: " + second + "}]\nrequest_timeout: 7s\nmax_streams: 5\n")
	said := hangUp("are read again")
	for _, want := range []string{`"changed":["shared_secret","keys"]`, `"needs_restart":["request_timeout","max_streams"]`, `"level":"WARN"`} {
		if !strings.Contains(said, want) {
			t.Errorf("the log lacks %s: %s", want, said)
		}
	}
	accepts(first, false)
	accepts(second, true)

	write("keys: nonsense\n")
	hangUp("cannot be used; what was in force stays")
	write("")
	hangUp("cannot be used; what was in force stays") // without any secret
	accepts(first, false)
	accepts(second, true)

	write("shared_secret: " + first + "\nlog_level: error\nrequest_timeout: 8s\n")
	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	for range 3000 {
		if try(t, append(env, "PGBROKER_SHARED_SECRET="+first), "types").code == exitOK {
			break
		}
	}
	accepts(first, true)
	accepts(second, false)
	if r := server.stop(t); r.code != exitOK {
		t.Errorf("stop: exit code %d: %s", r.code, r.stderr)
	}
	if strings.Contains(server.said(), `"msg":"stopping"`) {
		t.Error("log_level is not taken over")
	}
	if strings.Contains(server.said(), first) || strings.Contains(server.said(), second) {
		t.Error("a secret is in the log")
	}
}
