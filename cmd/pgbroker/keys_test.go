package main

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"pgbroker/db/dbtest"
)

// TestServeNamedKeys: keys of a configuration file open what their access says, for a client that knows nothing but its
// secret, and are named wherever somebody looks for who it was.
func TestServeNamedKeys(t *testing.T) {
	database := dbtest.New(t)
	address, metrics := freeAddress(t), freeAddress(t)
	secrets := make(map[string]string)
	for _, name := range []string{"plain", "dashboard", "proxy", "ci", "stranger"} {
		secrets[name] = writeFile(t, name, mustTry(t, nil, "secret", "generate"))
	}
	inline := strings.TrimSpace(mustTry(t, nil, "secret", "generate"))
	config := writeFile(t, "pgbroker.yaml", fmt.Sprintf(`
address: %s
metrics_address: %s
database_url: %q
shared_secret_file: %s
keys:
  - {name: dashboard, access: read, secret_file: %s}
  - {name: proxy, access: write, secret_file: %s}
  - name: ci
    access: admin
    secret_file: %s
  - {name: dashboard, access: read, secret: %s}
`, address, metrics, database.ConnString, secrets["plain"], secrets["dashboard"], secrets["proxy"], secrets["ci"], inline))
	server := start(t, nil, "serve", "--config", config)
	env := []string{"PGBROKER_ADDRESS=" + address}
	mustTry(t, env, "health", "--wait", "30s")

	as := func(key string) []string { return append(env, "PGBROKER_SHARED_SECRET_FILE="+secrets[key]) }
	put := []string{"record", "put", "-t", "x", "-i", "y", "-d", "{}"}
	read := []string{"record", "get", "-t", "x", "-i", "y"}
	options := []string{"options", "set", "-t", "x", "--capacity", "10"}
	for _, c := range []struct {
		key     string
		command []string
		denied  string // the access that it needs, if it has not got it
	}{
		{"plain", put, ""},
		{"plain", options, ""},
		{"dashboard", read, ""},
		{"dashboard", put, "write"},
		{"dashboard", options, "admin"},
		{"proxy", put, ""},
		{"proxy", read, ""},
		{"proxy", options, "admin"},
		{"ci", options, ""},
		{"ci", put, ""},
	} {
		r := try(t, as(c.key), c.command...)
		if c.denied == "" {
			if r.code != exitOK {
				t.Errorf("%s: %v: exit code %d: %s", c.key, c.command, r.code, r.stderr)
			}
			continue
		}
		want := fmt.Sprintf("the key %s has access %s", c.key, map[string]string{"dashboard": "read", "proxy": "write"}[c.key])
		if r.code != exitUnauthenticated || !strings.Contains(r.stderr, want) || !strings.Contains(r.stderr, "needs "+c.denied) {
			t.Errorf("%s: %v: exit code %d: %q, want %q", c.key, c.command, r.code, r.stderr, want)
		}
	}
	mustTry(t, append(env, "PGBROKER_SHARED_SECRET="+inline), read...)
	if r := try(t, as("stranger"), read...); r.code != exitUnauthenticated {
		t.Errorf("a secret of nobody: exit code %d: %s", r.code, r.stderr)
	}

	if code, body := get(t, metrics, "/metrics"); code != http.StatusOK {
		t.Errorf("metrics: %d", code)
	} else {
		for _, want := range []string{
			`pgbroker_auth_accepted_total\{key="ci"\} [1-9]`, `pgbroker_auth_accepted_total\{key="dashboard"\} [1-9]`,
			`pgbroker_auth_rejected_total\{reason="access"\} 3\b`,
		} {
			if !regexp.MustCompile(want).MatchString(body) {
				t.Errorf("metrics lack %s", want)
			}
		}
	}
	shown := mustTry(t, nil, "secret", "fingerprint", "--config", config, "-o", "json")
	for _, want := range []string{`"key dashboard (` + secrets["dashboard"] + `)"`, `"key dashboard (file ` + config + `)"`, `"key ci (`} {
		if !strings.Contains(shown, want) {
			t.Errorf("fingerprints: %s lacks %s", shown, want)
		}
	}
	if r := server.stop(t); r.code != exitOK {
		t.Errorf("stop: exit code %d: %s", r.code, r.stderr)
	}
	for _, want := range []string{`"key":"dashboard"`, `"needed":"write"`} {
		if !strings.Contains(server.said(), want) {
			t.Errorf("the log lacks %s: %s", want, server.said())
		}
	}
	if strings.Contains(server.said(), inline) {
		t.Error("the secret is in the log")
	}
}

// TestKeysFromEverySource: in every source there is a way to give more than one.
func TestKeysFromEverySource(t *testing.T) {
	const a, b = "name=a,access=read,secret_file=/a", "name=b,access=admin,secret_file=/b"
	file := writeFile(t, "pgbroker.yaml", "keys: [{name: a, access: read, secret_file: /a}, '"+b+"']\n")
	for name, got := range map[string]settingValue{
		"flag": printed(t, nil, "--keys="+a, "--keys="+b)["keys"],
		"env":  printed(t, []string{"PGBROKER_KEYS=" + a + ";" + b})["keys"],
		"file": printed(t, nil, "--config", file)["keys"],
	} {
		if got.Value != a+";"+b {
			t.Errorf("%s: got %q", name, got.Value)
		}
	}
}
