package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pgbroker/db/dbtest/testenv"
	"pgbroker/db/embedded"
)

// canary stands for a secret in tests that look for leaks. It is a shared secret that could be used.
const canary = "Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5LTEyMzQ="

// A result is what a run of the program left behind.
type result struct {
	code           int
	stdout, stderr string
}

// try runs the program with an environment of its own.
func try(t testing.TB, env []string, args ...string) result {
	t.Helper()
	return tryInput(t, "", env, args...)
}

func tryInput(t testing.TB, stdin string, env []string, args ...string) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code := run(context.Background(), args, strings.NewReader(stdin), &stdout, &stderr, env)
	return result{code, stdout.String(), stderr.String()}
}

// openTerminal opens a terminal that is so wide, and the keyboard and screen of who sits at it.
func openTerminal(t testing.TB, columns uint16) (person, terminal *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close() })
	fd := int(person.Fd())
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: columns})
	}
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	return person, terminal
}

// tryAtTerminal runs a command for somebody who types answer, and then nothing more, at a terminal that is so wide.
func tryAtTerminal(t testing.TB, answer string, columns uint16, env []string, args ...string) result {
	t.Helper()
	keyboard, terminal := openTerminal(t, columns)
	const endOfInput = "\x04"
	if _, err := keyboard.WriteString(answer + endOfInput); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	code := run(context.Background(), args, terminal, &stdout, &stderr, env)
	return result{code, stdout.String(), stderr.String()}
}

// writeFile makes a file in a directory of the test.
func writeFile(t testing.TB, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// printed returns what `config print` says, by setting.
func printed(t testing.TB, env []string, args ...string) map[string]settingValue {
	t.Helper()
	r := try(t, env, append([]string{"config", "print", "-o", "json"}, args...)...)
	if r.code != exitOK {
		t.Fatalf("config print %q: exit code %d: %s", args, r.code, r.stderr)
	}
	values := make(map[string]settingValue)
	for line := range strings.Lines(r.stdout) {
		var v settingValue
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatalf("config print: %q: %v", line, err)
		}
		values[v.Setting] = v
	}
	return values
}

// sample returns the n-th of several good values of a setting that differ from each other and from the default, as a user
// writes it, and as `config print` shows it.
func sample(s *setting, n int) (written, shown string) {
	switch s.field(new(Config)).(type) {
	case *bool:
		written = fmt.Sprint(n%2 == 0)
		return written, written
	case *int:
		written = fmt.Sprint(10 + n)
		return written, written
	case *byteSize:
		written = fmt.Sprintf("%dMiB", 10+n)
		return written, written
	case *time.Duration:
		written = fmt.Sprintf("%dh", 30+n) // long enough for every setting
		return written, written
	case *[]namedKey:
		return fmt.Sprintf("name=k%d,secret=%s,access=read", n, canary), fmt.Sprintf("name=k%d,access=read,secret=%s", n, mask)
	}
	switch {
	case len(s.oneOf) > 0:
		written = s.oneOf[n%len(s.oneOf)]
	case strings.HasSuffix(s.name, "address"):
		written = fmt.Sprintf("127.0.0.1:%d", 7000+n)
	case s.conn:
		return fmt.Sprintf("postgres://u:hunter2@host%d/db", n), fmt.Sprintf("postgres://u:%s@host%d/db", mask, n)
	case s.secret:
		return fmt.Sprintf("secret%d", n), mask
	default:
		written = fmt.Sprintf("/some/where%d", n)
	}
	return written, written
}

// TestPrecedence sets every setting in every source that there is for it, from the lowest up, and looks which one counts.
func TestPrecedence(t *testing.T) {
	for i := range settings {
		s := &settings[i]
		t.Run(s.name, func(t *testing.T) {
			var env, args []string
			check := func(n int, wantOrigin string) {
				t.Helper()
				_, want := sample(s, n)
				got := printed(t, env, args...)[s.name]
				if got.Value != want || got.Origin != wantOrigin {
					t.Errorf("got %q from %q, want %q from %q", got.Value, got.Origin, want, wantOrigin)
				}
			}
			value := func(n int) string { written, _ := sample(s, n); return written }

			if got := printed(t, nil)[s.name]; got.Origin != "default" {
				t.Errorf("unset: got %q from %q, want the default", got.Value, got.Origin)
			}
			if s.pomerium != "" {
				path := writeFile(t, "pomerium.yaml", fmt.Sprintf("%s: %q\nroutes: [{from: a, to: b}]\n", s.pomerium, value(1)))
				args = append(args, "--pomerium-config", path)
				check(1, "pomerium config "+path)
			}
			path := writeFile(t, "pgbroker.yaml", fmt.Sprintf("%s: %q\n", s.name, value(2)))
			args = append(args, "--config", path)
			check(2, "file "+path)
			if s.pomerium != "" {
				env = append(env, s.pomeriumEnv()+"="+value(3))
				check(3, "env "+s.pomeriumEnv())
			}
			env = append(env, s.env()+"="+value(4))
			check(4, "env "+s.env())
			args = append(args, "--"+s.flag()+"="+value(5))
			check(5, "flag --"+s.flag())
		})
	}
}

// TestPrintEffectiveDefault: where the default depends on who asks, it is shown.
func TestPrintEffectiveDefault(t *testing.T) {
	want, err := embedded.DefaultDir()
	if err != nil {
		t.Fatal(err)
	}
	if got := printed(t, nil)["data_dir"]; got.Value != want || got.Origin != "default" {
		t.Errorf("got %q from %q, want %q, the default", got.Value, got.Origin, want)
	}
}

func TestConfigFileFromEnvironment(t *testing.T) {
	path := writeFile(t, "pgbroker.yaml", "address: 127.0.0.1:1\n")
	other := writeFile(t, "other.yaml", "address: 127.0.0.1:2\n")
	pomerium := writeFile(t, "pomerium.yaml", "grpc_address: 127.0.0.1:3\nmetrics_address: 127.0.0.1:4\n")
	env := []string{"PGBROKER_CONFIG=" + path, "PGBROKER_POMERIUM_CONFIG=" + pomerium}
	if got := printed(t, env); got["address"].Origin != "file "+path || got["metrics_address"].Origin != "pomerium config "+pomerium {
		t.Errorf("got %v and %v", got["address"], got["metrics_address"])
	}
	if got := printed(t, env, "--config", other)["address"]; got.Origin != "file "+other {
		t.Errorf("with --config: got %v", got)
	}
}

// TestValueAndFile: a value and its _file are one setting with two spellings.
func TestValueAndFile(t *testing.T) {
	t.Run("higher source decides both", func(t *testing.T) {
		env := []string{"SHARED_SECRET=" + canary, "PGBROKER_SHARED_SECRET_FILE=/from/env", "CERTIFICATE=abc", "CERTIFICATE_KEY_FILE=/key"}
		got := printed(t, env)
		if got["shared_secret"].Value != "" || got["shared_secret_file"].Value != "/from/env" {
			t.Errorf("PGBROKER_SHARED_SECRET_FILE over SHARED_SECRET: got %v and %v", got["shared_secret"], got["shared_secret_file"])
		}
		got = printed(t, env, "--shared-secret", canary, "--tls-key", canary)
		if got["shared_secret"].Value != mask || got["shared_secret_file"].Value != "" {
			t.Errorf("--shared-secret over PGBROKER_SHARED_SECRET_FILE: got %v and %v", got["shared_secret"], got["shared_secret_file"])
		}
		if got["tls_key_file"].Value != "" || got["tls_cert"].Value != "abc" {
			t.Errorf("--tls-key over CERTIFICATE_KEY_FILE: got %v and %v", got["tls_key_file"], got["tls_cert"])
		}
	})
	for i := range settings {
		s := &settings[i]
		twin := s.twin()
		if twin == nil || strings.HasSuffix(s.name, "_file") {
			continue
		}
		value, _ := sample(s, 1)
		config := writeFile(t, "pgbroker.yaml", fmt.Sprintf("%s: %q\n%s: /file\n", s.name, value, twin.name))
		cases := map[string]struct{ env, args []string }{
			"flag": {args: []string{"--" + s.flag(), value, "--" + twin.flag(), "/file"}},
			"env":  {env: []string{s.env() + "=" + value, twin.env() + "=/file"}},
			"file": {args: []string{"--config", config}},
		}
		if s.pomerium != "" {
			pomerium := writeFile(t, "pomerium.yaml", fmt.Sprintf("%s: %q\n%s: /file\n", s.pomerium, value, twin.pomerium))
			cases["pomerium env"] = struct{ env, args []string }{env: []string{s.pomeriumEnv() + "=" + value, twin.pomeriumEnv() + "=/file"}}
			cases["pomerium config"] = struct{ env, args []string }{args: []string{"--pomerium-config", pomerium}}
		}
		for name, c := range cases {
			t.Run(s.name+" in "+name, func(t *testing.T) {
				r := try(t, c.env, append([]string{"config", "print"}, c.args...)...)
				want := fmt.Sprintf("%s (", s.name)
				if r.code != exitUsage || !strings.Contains(r.stderr, want) || !strings.Contains(r.stderr, twin.name+" (") ||
					!strings.Contains(r.stderr, "are both set") {
					t.Errorf("got exit code %d and %q, want %d and both names", r.code, r.stderr, exitUsage)
				}
				if strings.Contains(r.stderr, "hunter2") || strings.Contains(r.stderr, "secret1") {
					t.Errorf("the secret is in %q", r.stderr)
				}
			})
		}
	}
}

// TestSeveralSecrets: in every source there is a way to give more than one, for rotation.
func TestSeveralSecrets(t *testing.T) {
	file := writeFile(t, "pgbroker.yaml", "shared_secret_file: [/a, /b]\n")
	for name, got := range map[string]settingValue{
		"flag": printed(t, nil, "--shared-secret-file=/a", "--shared-secret-file=/b")["shared_secret_file"],
		"env":  printed(t, []string{"PGBROKER_SHARED_SECRET_FILE=/a,/b"})["shared_secret_file"],
		"file": printed(t, nil, "--config", file)["shared_secret_file"],
	} {
		if got.Value != "/a,/b" {
			t.Errorf("%s: got %q, want /a,/b", name, got.Value)
		}
	}
	if got := printed(t, []string{"SHARED_SECRET=" + canary + "," + canary})["shared_secret"].Value; got != mask+","+mask {
		t.Errorf("two secrets are shown as %q", got)
	}
}

func TestEmptyCountsAsUnset(t *testing.T) {
	file := writeFile(t, "pgbroker.yaml", "metrics_address:\nshared_secret: ~\n# nothing else\n")
	got := printed(t, []string{"PGBROKER_ADDRESS=", "GRPC_ADDRESS=", "SHARED_SECRET=", "PGBROKER_REQUEST_TIMEOUT="}, "--config", file)
	for _, name := range []string{"address", "shared_secret", "request_timeout", "metrics_address"} {
		if got[name].Origin != "default" {
			t.Errorf("%s: got %q from %q, want the default", name, got[name].Value, got[name].Origin)
		}
	}
	// A flag is explicit: it takes back what the environment says.
	if got := printed(t, []string{"METRICS_ADDRESS=:9090"}, "--metrics-address=")["metrics_address"]; got.Value != "" {
		t.Errorf("--metrics-address= leaves %q", got.Value)
	}
	empty := writeFile(t, "empty.yaml", "")
	comments := writeFile(t, "comments.yaml", "# address: 127.0.0.1:1\n")
	for _, path := range []string{empty, comments} {
		if got := printed(t, nil, "--config", path)["address"]; got.Origin != "default" {
			t.Errorf("%s: got %v", path, got)
		}
	}
}

// TestBadConfigFile: each bad file is refused with a message that says where and what, and never what a secret is.
func TestBadConfigFile(t *testing.T) {
	for name, c := range map[string]struct{ content, want string }{
		"unknown key":            {"adress: 127.0.0.1:1\n", `unknown key "adress" (did you mean address?)`},
		"unknown key far":        {"colour: blue\n", `unknown key "colour"`},
		"several unknown":        {"colour: blue\nsize: 1\n", `unknown key "colour"; unknown key "size"`},
		"dashes":                 {"metrics-address: 127.0.0.1:1\n", "did you mean metrics_address?"},
		"pomerium's name":        {"grpc_address: 127.0.0.1:1\n", "did you mean address?"},
		"nested":                 {"tls:\n  cert_file: x\n", `unknown key "tls"`},
		"only a secret":          {canary + "\n", "is not a mapping of settings"},
		"a secret as key":        {canary + ": x\n", "unknown key (one that is no name)"},
		"a list":                 {"- address\n", "is not a mapping of settings"},
		"two documents":          {"address: 127.0.0.1:1\n---\naddress: 127.0.0.1:2\n", "more than one YAML document"},
		"duplicate key":          {"address: 127.0.0.1:1\naddress: 127.0.0.1:2\n", "already defined at line 1"},
		"syntax":                 {"shared_secret: '" + canary + "\n", "is not valid YAML"},
		"bad indent":             {"shared_secret: " + canary + "\n  x: y\n", "is not valid YAML"},
		"unknown anchor":         {"shared_secret: *" + strings.TrimRight(canary, "=") + "\n", "unknown anchor"},
		"secret is a number":     {"shared_secret: 1234\n", "shared_secret: want text"},
		"secret is a map":        {"shared_secret: {a: " + canary + "}\n", "shared_secret: want text"},
		"secret list of numbers": {"shared_secret: [" + canary + ", 7]\n", "shared_secret: want text"},
		"address is a number":    {"address: 5443\n", "address: want text"},
		"bool is a number":       {"migrate: 1\n", "migrate: want true or false"},
		"number is a float":      {"pool_max_conns: 1.5\n", "pool_max_conns: want a whole number"},
		"duration without unit":  {"request_timeout: 8\n", "request_timeout"},
		"duration is a bool":     {"request_timeout: true\n", "request_timeout: want a duration"},
		"wrong tag":              {"shared_secret: !!int " + canary + "\n", "is not valid YAML"},
		"control characters":     {"address: \x01\n", "is not valid YAML"},
		"not UTF-8":              {"address: \xff\xfe\n", "is not valid YAML"},
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, "pgbroker.yaml", c.content)
			r := try(t, nil, "config", "print", "--config", path)
			if r.code != exitUsage {
				t.Errorf("got exit code %d, want %d", r.code, exitUsage)
			}
			for _, want := range []string{c.want, path} {
				if !strings.Contains(r.stderr, want) {
					t.Errorf("got %q, want it to contain %q", r.stderr, want)
				}
			}
			if strings.Contains(r.stderr, strings.TrimRight(canary, "=")) {
				t.Errorf("the secret is in %q", r.stderr)
			}
		})
	}
	for name, path := range map[string]string{"missing": "/does/not/exist.yaml", "directory": t.TempDir()} {
		r := try(t, nil, "config", "print", "--config", path)
		if r.code != exitUsage || !strings.Contains(r.stderr, "config (flag --config): "+path) {
			t.Errorf("%s: got exit code %d and %q", name, r.code, r.stderr)
		}
	}
}

// TestBadValues: a bad value is refused naming the setting, its source and what is allowed, from every source.
func TestBadValues(t *testing.T) {
	for _, c := range []struct{ name, value, want string }{
		{"address", "localhost", "want host:port"},
		{"address", "http://localhost:5443", "without http://"},
		{"address", "127.0.0.1:99999", "from 0 to 65535"},
		{"address", "127.0.0.1:https", "from 0 to 65535"},
		{"address", "127.0.0.1:", "from 0 to 65535"},
		{"address", "::1:5443", "want host:port"},
		{"metrics_address", "9090", "want host:port"},
		{"allow_unauthenticated", "yes please", "want true or false"},
		{"grpc_insecure", "2", "want true or false"},
		{"pool_max_conns", "many", "want a whole number"},
		{"pool_max_conns", "-1", "want a number from 0"},
		{"pool_max_conns", "99999999999999999999", "want a whole number"},
		{"pool_min_conns", "1000000", "want a number from 0"},
		{"request_timeout", "8", "want a duration with its unit"},
		{"request_timeout", "-8s", "must be more than 0"},
		{"request_timeout", "0", "must be more than 0"},
		{"statement_timeout", "-1s", "must not be negative"},
		{"max_message_size", "4MB", "KiB, MiB or GiB"},
		{"max_message_size", "-4", "KiB, MiB or GiB"},
		{"max_message_size", "1", "want from 64KiB to 1GiB"},
		{"max_message_size", "99999999999999GiB", "KiB, MiB or GiB"},
		{"feed_bytes", "4", "want from 1MiB"},
		{"keys", "ci", "key 1: want name, access"},
		{"keys", "name=ci,access=all,secret_file=/x", "key 1: access: want read, write or admin"},
		{"keys", "name=c i,access=read,secret_file=/x", "key 1: name: want 1 to 64"},
		{"keys", "name=ci,access=read", "key 1: want either secret or secret_file"},
		{"keys", "name=ci,access=read,secret=a,secret_file=/x", "key 1: want either secret or secret_file"},
		{"keys", "name=ci,name=ci,access=read,secret_file=/x", "key 1: want name, access"},
		{"keys", "name=ci,rights=read,secret_file=/x", `key 1: unknown field "rights"`},
		{"log_level", "verbose", "want one of debug, info, warn, error"},
		{"log_format", "xml", "want one of auto, text, json"},
	} {
		s := settingNamed(c.name)
		path := writeFile(t, "pgbroker.yaml", fmt.Sprintf("%s: %q\n", c.name, c.value))
		for source, r := range map[string]result{
			"flag --" + s.flag(): try(t, nil, "config", "validate", "--"+s.flag()+"="+c.value),
			"env " + s.env():     try(t, []string{s.env() + "=" + c.value}, "config", "validate"),
			"file " + path:       try(t, nil, "config", "validate", "--config", path),
		} {
			wants := []string{c.name + " (" + source + ")", c.want, strings.TrimPrefix(c.value, "-")}
			if s.secret {
				wants = wants[:2]
			}
			for _, want := range wants {
				if r.code != exitUsage || !strings.Contains(r.stderr, want) {
					t.Errorf("%s=%q from %s: got exit code %d and %q, want %d and %q", c.name, c.value, source, r.code, r.stderr, exitUsage, want)
				}
			}
		}
	}
	// All problems are shown at once.
	r := try(t, []string{"PGBROKER_ADDRESS=x", "GRPC_INSECURE=maybe"}, "config", "print", "--poll-interval=0s")
	for _, want := range []string{"3 problems", "address (env PGBROKER_ADDRESS)", "grpc_insecure (env GRPC_INSECURE)", "poll_interval (flag --poll-interval)"} {
		if !strings.Contains(r.stderr, want) {
			t.Errorf("got %q, want it to contain %q", r.stderr, want)
		}
	}
}

// TestSecretsAreMasked looks for secrets from every source in everything that the config commands print, good or bad.
func TestSecretsAreMasked(t *testing.T) {
	conn := "postgres://user:" + canary + "@host/db?sslpassword=" + canary
	keywords := "host=h password = '" + canary + "' user=u sslpassword=" + canary
	garbage := "postgres://user:" + canary + "@host/%zz"
	for _, commands := range [][]string{{"config", "print"}, {"config", "print", "-o", "json"}, {"config", "validate"}} {
		for i := range settings {
			s := &settings[i]
			if !s.secret && !s.conn {
				continue
			}
			values := []string{canary, canary + " ", "-" + canary, "x" + canary}
			if s.conn {
				values = []string{conn, keywords, garbage, canary, "password=" + canary + " '", "mysql://u:" + canary + "@h/d"}
			}
			if s.name == "keys" {
				for _, part := range []string{"name", "access", "secret", "secret_file", "x"} {
					values = append(values, part+"="+canary, "name=ci,access=read,"+part+"="+canary, "name=ci,access=read,secret="+canary+","+part+"="+canary)
				}
				values = append(values, `{"name": "ci", "access": "`+canary+`"`, `{"`+canary+`": "`+canary+`"}`)
			}
			for _, value := range values {
				path := writeFile(t, "pgbroker.yaml", fmt.Sprintf("%s: %q\n", s.name, value))
				for source, r := range map[string]result{
					"flag": try(t, nil, append(slices.Clone(commands), "--"+s.flag()+"="+value)...),
					"env":  try(t, []string{s.env() + "=" + value, s.pomeriumEnv() + "=" + value}, commands...),
					"file": try(t, []string{"PGBROKER_CONFIG=" + path}, commands...),
				} {
					if strings.Contains(r.stdout+r.stderr, strings.TrimRight(canary, "=")) {
						t.Errorf("%v with %s=%q from %s shows the secret; standard error: %q", commands, s.name, value, source, r.stderr)
					}
				}
			}
		}
	}
}

func TestRedactConnString(t *testing.T) {
	for conn, want := range map[string]string{
		"postgres://u@h/d":                       "postgres://u@h/d",
		"postgres://u:p@h1:1,h2:2/d?sslmode=off": "postgres://u:********@h1:1,h2:2/d?sslmode=off",
		"postgresql://u:p@h/d":                   "postgresql://u:********@h/d",
		"postgres://u:p/q@h/d":                   "postgres://u:********@h/d",
		"postgres://u:p@q@h/d":                   "postgres://u:********@h/d",
		"postgres:///d?host=/run&password=p":     "postgres:///d?host=/run&password=********",
		"postgres:///d?PASSWORD=p&user=u":        "postgres:///d?PASSWORD=********&user=u",
		"postgres:///d?p%61ssword=p&user=u":      "postgres:///d?p%61ssword=********&user=u",
		"postgres:///d?oauth_client_secret=p":    "postgres:///d?oauth_client_secret=********",
		"host=h scram_client_key=p user=u":       "host=h scram_client_key=******** user=u",
		"host=h keepalives_idle=5":               "host=h keepalives_idle=5",
		"host=h user=u":                          "host=h user=u",
		"host=h password=p user=u":               "host=h password=******** user=u",
		`host=h password='a b\'c' user=u`:        "host=h password=******** user=u",
		`password=a\ b host=h`:                   "password=******** host=h",
		"password=p'q host=h":                    mask,
		"password='unclosed host=h":              mask,
		"just-a-password":                        mask,
		canary:                                   mask, // base64 ends with =, as a keyword without a value does
		"hunter=":                                mask,
		"host=h stray":                           mask,
		"file:///var/lib/x":                      mask,
	} {
		if got := redactConnString(conn); got != want {
			t.Errorf("redactConnString(%q) = %q, want %q", conn, got, want)
		}
	}
}

func TestUnknownVariables(t *testing.T) {
	env := []string{
		"PGBROKER_ADRESS=x", "PGBROKER_COLOUR=blue",
		// What Kubernetes sets for a Service called pgbroker is no mistake, nor are the names of files and of binaries.
		"PGBROKER_PORT=tcp://10.0.0.1:5443", "PGBROKER_PORT_5443_TCP_ADDR=10.0.0.1", "PGBROKER_SERVICE_HOST=10.0.0.1",
		"PGBROKER_SERVICE_PORT=5443", "PGBROKER_SERVICE_PORT_GRPC=5443", "PGBROKER_CONFIG=", "PGBROKER_POSTGRES_BIN=/x",
	}
	r := try(t, env, "config", "print")
	if r.code != exitOK {
		t.Fatalf("got exit code %d: %s", r.code, r.stderr)
	}
	want := "pgbroker: warning: env PGBROKER_ADRESS is not a setting and is ignored (did you mean PGBROKER_ADDRESS?)\n" +
		"pgbroker: warning: env PGBROKER_COLOUR is not a setting and is ignored\n"
	if r.stderr != want {
		t.Errorf("got %q, want %q", r.stderr, want)
	}
	for i := range settings { // so that no setting can be taken for one of Kubernetes's
		if kubernetesVariable.MatchString(settings[i].env()) {
			t.Errorf("setting %s has the name of a variable that Kubernetes sets", settings[i].name)
		}
	}
}

func TestPomeriumConfig(t *testing.T) {
	full := `
address: :443
grpc_address: :5443
grpc_insecure: true
shared_secret: ` + canary + `
databroker_storage_type: postgres
databroker_storage_connection_string: postgres://pomerium:hunter2@db/pomerium
metrics_address: 127.0.0.1:9090
certificate_file: /c.pem
certificate_key_file: /k.pem
log_level: nonsense-that-is-not-ours
authenticate_service_url: https://auth.example.com
routes:
  - from: https://a.example.com
    to: http://b
    policy: [{allow: {or: [{domain: {is: example.com}}]}}]
`
	got := printed(t, nil, "--pomerium-config", writeFile(t, "pomerium.yaml", full))
	for name, want := range map[string]string{
		"address": ":5443", "grpc_insecure": "true", "shared_secret": mask, "metrics_address": "127.0.0.1:9090",
		"database_url": "postgres://pomerium:********@db/pomerium", "tls_cert_file": "/c.pem", "tls_key_file": "/k.pem", "log_level": "info",
	} {
		if got[name].Value != want {
			t.Errorf("%s: got %q, want %q", name, got[name].Value, want)
		}
	}

	for _, kind := range []string{"memory", "file", "redis"} {
		path := writeFile(t, "pomerium.yaml", "databroker_storage_type: "+kind+"\ndatabroker_storage_connection_string: file:///x\n")
		r := try(t, nil, "config", "print", "-o", "json", "--pomerium-config", path)
		if r.code != exitOK || !strings.Contains(r.stderr, "warning: databroker_storage_type (pomerium config "+path+") is not postgres") ||
			!strings.Contains(r.stdout, `{"setting":"database_url","value":"","origin":"default"}`) {
			t.Errorf("%s: got exit code %d, %q, %q", kind, r.code, r.stderr, r.stdout)
		}
		r = try(t, []string{"DATABROKER_STORAGE_TYPE=" + kind, "DATABROKER_STORAGE_CONNECTION_STRING=file:///x"}, "config", "validate")
		if r.code != exitOK || !strings.Contains(r.stderr, "warning: databroker_storage_type (env DATABROKER_STORAGE_TYPE) is not postgres") {
			t.Errorf("env %s: got exit code %d, %q", kind, r.code, r.stderr)
		}
	}
	for name, content := range map[string]string{"wrong type": "shared_secret: [1]\n", "number": "grpc_address: 5443\n"} {
		if r := try(t, nil, "config", "print", "--pomerium-config", writeFile(t, "pomerium.yaml", content)); r.code != exitUsage {
			t.Errorf("%s: got exit code %d, want %d", name, r.code, exitUsage)
		}
	}
}

// TestSettingsTable: what the table must hold for flags, variables and files to be made from it.
func TestSettingsTable(t *testing.T) {
	seen := map[string]bool{}
	for i := range settings {
		s := &settings[i]
		for _, name := range []string{s.name, s.pomerium} {
			if name == "" {
				continue
			}
			if seen["pomerium "+name] && name == s.pomerium || seen[name] && name == s.name {
				t.Errorf("%s is used twice", name)
			}
		}
		seen[s.name], seen["pomerium "+s.pomerium] = true, true
		if i == 0 && s.group == "" {
			t.Error("the first setting has no group")
		}
		if s.use == 0 {
			t.Errorf("%s: no command has a flag for it", s.name)
		}
		if !strings.HasSuffix(s.help, ".") || strings.Contains(s.help, "  ") {
			t.Errorf("%s: the help text is not made of sentences: %q", s.name, s.help)
		}
		if (s.secret || s.conn) && s.twin() == nil && s.name != "keys" { // which have files of their own
			t.Errorf("%s: a secret needs a setting %s_file", s.name, s.name)
		}
		if s.def == "" {
			continue
		}
		if err := s.parse(new(Config), []string{s.def}); err != nil {
			t.Errorf("%s: the default is not a good value: %v", s.name, err)
		}
	}
}

func TestReferenceIsCurrent(t *testing.T) {
	const path = "../../docs/configuration.md"
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want, err := reference()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s does not say what the program does: run go generate ./cmd/pgbroker", path)
	}
}

// FuzzConfigFile: whatever a file holds, it is read or refused, and no secret is ever shown.
func FuzzConfigFile(f *testing.F) {
	f.Add([]byte("address: 127.0.0.1:5443\nshared_secret: [a, b]\nrequest_timeout: 8s\n"))
	f.Add([]byte("shared_secret: " + canary + "\ndatabase_url: postgres://u:" + canary + "@h/d\n"))
	f.Add([]byte("keys: [{name: ci, access: read, secret: " + canary + "}, 'name=" + canary + "']\n"))
	f.Add([]byte("shared_secret_file: x\nshared_secret: y\n"))
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("<<: {address: ':1'}\n"))
	f.Add([]byte("\xff---\n..."))
	f.Add([]byte("max_message_size: 9223372036854775807\npool_max_conns: 0x10\n"))
	f.Add([]byte("database_url: host=h password='" + canary + "\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		path := writeFile(t, "fuzz.yaml", string(content))
		for _, flag := range []string{"PGBROKER_CONFIG=", "PGBROKER_POMERIUM_CONFIG="} {
			cfg, err := loadConfig(nil, []string{flag + path})
			if err != nil {
				if !strings.Contains(err.Error(), path) {
					t.Errorf("the error does not name its source: %v", err)
				}
				continue
			}
			for _, name := range []string{"shared_secret", "keys", "tls_key", "database_url", "listener_database_url"} {
				s := settingNamed(name)
				if shown := cfg.show(s); strings.Contains(shown, canary) && !strings.Contains(shown, "/"+canary) && !strings.Contains(shown, "host="+canary) {
					t.Errorf("%s is shown as %q", name, shown)
				}
			}
		}
	})
}

// TestTestsSeeNoSettings: whatever can be set in the environment, the tests do not see it.
func TestTestsSeeNoSettings(t *testing.T) {
	for i := range settings {
		for _, name := range []string{settings[i].env(), settings[i].pomeriumEnv()} {
			if name != "" && !testenv.Hides(name) {
				t.Errorf("a test sees %s", name)
			}
		}
	}
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); testenv.Hides(name) {
			t.Errorf("this test sees %s", name)
		}
	}
}
