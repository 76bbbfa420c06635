package main

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"pgbroker/db/dbtest"
	"pgbroker/server/servertest"
)

// lowPort is the last port that lowAddress has looked at: tests that run side by side get different ones.
var lowPort atomic.Int64

// lowAddress returns an address that only root can bind, that is free at the moment, and that no other test gets.
func lowAddress(t *testing.T) string {
	t.Helper()
	lowPort.CompareAndSwap(0, 1024)
	for port := lowPort.Add(-1); port > 600; port = lowPort.Add(-1) {
		if l, err := net.Listen("tcp", "127.0.0.1:"+strconv.FormatInt(port, 10)); err == nil {
			l.Close()
			return l.Addr().String()
		}
	}
	t.Skip("no port below 1024 is free")
	return ""
}

// rootlessThreads fails unless every thread of a process belongs to a user, for good, and has no capability.
func rootlessThreads(t *testing.T, pid, uid int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(tasks) == 0 {
		t.Fatalf("%v, %v", tasks, err)
	}
	for _, task := range tasks {
		status, err := os.ReadFile(task)
		if err != nil {
			continue // it has ended meanwhile
		}
		for line := range strings.Lines(string(status)) {
			name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
			fields := strings.Fields(value)
			switch name {
			case "Uid":
				for _, id := range fields {
					if id != strconv.Itoa(uid) {
						t.Errorf("%s: %s, want uid %d", task, line, uid)
						break
					}
				}
			case "Gid", "Groups":
				for _, id := range fields {
					if id == "0" {
						t.Errorf("%s: %s, want no group of root", task, line)
						break
					}
				}
			case "CapPrm", "CapEff", "CapAmb":
				if strings.Trim(fields[0], "0") != "" {
					t.Errorf("%s: %s, want none", task, line)
				}
			}
		}
	}
}

// program is pgbroker as a process of its own.
type program struct {
	*exec.Cmd
	stdout *bufio.Scanner
	stderr *os.File
}

func startProgram(t *testing.T, path string, env []string, args ...string) *program {
	t.Helper()
	p := &program{Cmd: exec.Command(path, args...)}
	p.Env = env
	out, err := p.StdoutPipe()
	if err == nil {
		p.stderr, err = os.Create(filepath.Join(t.TempDir(), "stderr"))
	}
	if err != nil {
		t.Fatal(err)
	}
	p.Stderr, p.stdout = p.stderr, bufio.NewScanner(out)
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Process.Kill(); _ = p.Wait() })
	return p
}

// said returns the log so far.
func (p *program) said(t *testing.T) string {
	t.Helper()
	content, err := os.ReadFile(p.stderr.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// TestServeGivesUpRoot: started by root, serve binds a port that only root can bind, makes its database, and is then a process of
// the user that runs Postgres, which still stops what it has started, and cleans up.
func TestServeGivesUpRoot(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("for root only")
	}
	path := buildProgram(t)
	for _, kind := range []string{"durable", "ephemeral"} {
		t.Run(kind, func(t *testing.T) {
			address := lowAddress(t)
			dir := filepath.Join(publicDir(t), "state")
			certificate, key := authority(t) // which only root can read
			args := []string{"serve", "--address", address, "--data-dir", dir,
				"--tls-cert-file", certificate, "--tls-key-file", key}
			if kind == "ephemeral" {
				args = append(args, "--ephemeral")
			}
			for range 2 { // the second one finds what the first has left
				p := startProgram(t, path, os.Environ(), args...)
				for p.stdout.Scan() {
					if strings.Contains(p.stdout.Text(), "pgbroker is ready") {
						break
					}
				}
				if !strings.Contains(p.said(t), "gave up root") {
					t.Fatalf("the log does not say that root was given up:\n%s", p.said(t))
				}
				info, err := os.Stat(filepath.Join(dir, secretFileName))
				if err != nil {
					t.Fatal(err)
				}
				uid := int(info.Sys().(*syscall.Stat_t).Uid)
				if uid == 0 {
					t.Error("the secret belongs to root, so that the server cannot read it again")
				}
				rootlessThreads(t, p.Process.Pid, uid)
				if warned := p.said(t); !strings.Contains(warned, "take effect at the next start") || !strings.Contains(warned, key) || strings.Contains(warned, "file="+dir) {
					t.Errorf("want a warning about the key that only root can read, and none about the secret:\n%s", warned)
				}
				client := []string{"--address", address, "--data-dir", dir, "--tls-ca-file", certificate, "--tls-server-name", "broker.test"}
				mustTry(t, nil, append([]string{"health", "--wait", "30s"}, client...)...)
				mustTry(t, nil, append([]string{"record", "put", "-t", "x", "-i", "y", "-d", "{}"}, client...)...)
				if err := p.Process.Signal(syscall.SIGTERM); err != nil {
					t.Fatal(err)
				}
				for p.stdout.Scan() { // to its end
				}
				if err := p.Wait(); err != nil {
					t.Errorf("stop: %v\n%s", err, p.said(t))
				}
				if kind == "durable" {
					continue
				}
				// In a directory of root's an empty one may stay, until the next start.
				left, err := filepath.Glob(filepath.Join(dir, "pgbroker-ephemeral-*", "*"))
				if err != nil || len(left) > 0 {
					t.Errorf("left behind: %v (%v)", left, err)
				}
				if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) > 2 {
					t.Errorf("left behind: %v (%v)", left, err)
				}
				if secret, err := os.ReadFile(filepath.Join(dir, secretFileName)); err != nil || len(secret) > 0 {
					t.Errorf("a secret is left behind (%v)", err)
				}
			}
		})
	}
}

// TestServeAsUser: with a database of its own, serve becomes the user that it is told, and warns when it stays root.
func TestServeAsUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		if r := try(t, nil, "config", "check", "--user", "root", "--database-url", "postgres://x@y/z"); r.code == exitOK {
			t.Error("becoming root was accepted")
		}
		return
	}
	server := dbtest.Server(t, nil) // over TCP, which nobody can reach, too
	path := buildProgram(t)
	env := append(os.Environ(), "PGBROKER_MIGRATE=true", "PGBROKER_DATABASE_URL="+server.ConnString(), "PGBROKER_SHARED_SECRET="+servertest.Secret)
	for _, user := range []string{"", "nobody"} {
		address := lowAddress(t)
		args := []string{"serve", "--address", address}
		if user != "" {
			args = append(args, "--user", user)
		}
		p := startProgram(t, path, env, args...)
		mustTry(t, env, "health", "--address", address, "--wait", "30s")
		if user == "" {
			if !strings.Contains(p.said(t), "running as root") {
				t.Errorf("want a warning:\n%s", p.said(t))
			}
		} else {
			rootlessThreads(t, p.Process.Pid, 65534)
		}
		if err := p.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		for p.stdout.Scan() { // to its end
		}
		if err := p.Wait(); err != nil {
			t.Errorf("stop: %v\n%s", err, p.said(t))
		}
	}
	for _, args := range [][]string{
		{"--user", "nobody"}, // embedded
		{"--user", "no such user", "--database-url", "postgres://x@y/z"},
	} {
		if r := try(t, nil, append([]string{"serve", "--address", "127.0.0.1:0"}, args...)...); r.code == exitOK || !strings.Contains(r.stderr, "user (flag --user)") {
			t.Errorf("%v: got exit code %d and %q", args, r.code, r.stderr)
		}
	}
}
