package main

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgbroker/db/dbtest"
)

// mainEnv makes this test binary be the program.
const mainEnv = "WITHPOSTGRES_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(mainEnv) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// program returns the program with arguments, without a server given to it,
// and with a directory of its own for what it leaves behind.
func program(t *testing.T, args ...string) (*exec.Cmd, string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "withpostgres-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), mainEnv+"=1", dbtest.URLEnv+"=", "TMPDIR="+dir)
	cmd.Stderr = os.Stderr
	return cmd, dir
}

func status(t *testing.T, err error) int {
	t.Helper()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if err == nil {
		return 0
	}
	return exit.ExitCode()
}

func leftBehind(t *testing.T, dir string) {
	t.Helper()
	if left, _ := filepath.Glob(dir + "/*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestStatusAndServer(t *testing.T) {
	t.Parallel()
	cmd, dir := program(t, "--", "sh", "-c", `psql -XAtc 'SHOW max_connections' "$`+dbtest.URLEnv+`"; exit 7`)
	out, err := cmd.Output()
	if got := status(t, err); got != 7 {
		t.Errorf("got status %d, want 7", got)
	}
	if _, err := exec.LookPath("psql"); err == nil && string(out) != "300\n" {
		t.Errorf("got max_connections %q", out)
	}
	leftBehind(t, dir)
}

// The command finds neither what somebody has set nor what a server has left.
func TestEnvironment(t *testing.T) {
	t.Parallel()
	cmd, dir := program(t, "--", "sh", "-c", `env; ls -A "$XDG_STATE_HOME"`)
	state := filepath.Join(dir, "state")
	if err := os.Mkdir(state, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(state, "left"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd.Env = append(cmd.Env, "XDG_STATE_HOME="+state, "PGBROKER_ADDRESS=192.0.2.1:1", "SHARED_SECRET=hostile", "SHARED_SECRET_FILE=/hostile",
		"DATABROKER_STORAGE_CONNECTION_STRING=hostile", "PGHOST=192.0.2.1", "PGOPTIONS=-c hostile=1", "GRPC_ADDRESS=hostile", "GOFLAGS=-mod=mod")
	out, err := cmd.Output()
	if got := status(t, err); got != 0 {
		t.Fatalf("got status %d: %s", got, out)
	}
	for _, word := range []string{"hostile", "192.0.2.1", "left", state + "\n"} {
		if strings.Contains(string(out), word) {
			t.Errorf("the command sees %q:\n%s", word, out)
		}
	}
	if !strings.Contains(string(out), "GOFLAGS=-mod=mod\n") {
		t.Error("the command does not see what is not ours")
	}
	if err := os.RemoveAll(state); err != nil {
		t.Fatal(err)
	}
	leftBehind(t, dir)
}

func TestMissingCommand(t *testing.T) {
	t.Parallel()
	cmd, dir := program(t, "/no/such/command")
	cmd.Stderr = io.Discard
	if got := status(t, cmd.Run()); got != 1 {
		t.Errorf("got status %d, want 1", got)
	}
	leftBehind(t, dir)
	cmd, _ = program(t)
	cmd.Stderr = io.Discard
	if got := status(t, cmd.Run()); got != 2 {
		t.Errorf("without arguments: got status %d, want 2", got)
	}
}

func TestGivenServer(t *testing.T) {
	t.Parallel()
	cmd, dir := program(t, "sh", "-c", `echo "$`+dbtest.URLEnv+`"; ls -A "$TMPDIR" | grep -v state || true`)
	cmd.Env = append(cmd.Env, dbtest.URLEnv+"=postgres://given/")
	out, err := cmd.Output()
	if err != nil || string(out) != "postgres://given/\n" {
		t.Errorf("got %q (%v), want the given server and no other", out, err)
	}
	leftBehind(t, dir)
}

// Signals reach the command and its children, once; nothing stays behind.
func TestSignals(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		// The command takes the signal and ends with a status of its own; a
		// child of it does not, and is not waited for.
		cmd, dir := program(t, "sh", "-c", `
			(trap '' INT TERM; exec sleep 600) &
			trap 'echo got; exit 9' INT TERM
			echo $!
			while :; do sleep 0.05; done`)
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		out := bufio.NewReader(stdout)
		line, err := out.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		child, err := strconv.Atoi(strings.TrimSpace(line))
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		rest, _ := io.ReadAll(out)
		if got := status(t, cmd.Wait()); got != 9 || string(rest) != "got\n" {
			t.Errorf("%v: got status %d and %q, want 9 and one signal", sig, got, rest)
		}
		for deadline := time.Now().Add(10 * time.Second); running(child); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Errorf("%v: a child of the command still runs", sig)
				break
			}
		}
		leftBehind(t, dir)
	}
	// A command that dies of a signal.
	cmd, _ := program(t, "sh", "-c", "kill -TERM $$")
	if got := status(t, cmd.Run()); got != 128+int(syscall.SIGTERM) {
		t.Errorf("got status %d, want %d", got, 128+int(syscall.SIGTERM))
	}
}

// running reports whether a process exists and is not a zombie.
func running(pid int) bool {
	out, err := exec.Command("ps", "-o", "stat=", "-p", strconv.Itoa(pid)).Output()
	return err == nil && !strings.HasPrefix(strings.TrimSpace(string(out)), "Z")
}
