package main

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/server/servertest"
)

// buildProgram builds the program and returns its path.
func buildProgram(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "pgbroker")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return program
}

// TestASecondSignalStopsAtOnce: the first one lets requests end, however long they take; the second one does not wait.
func TestASecondSignalStopsAtOnce(t *testing.T) {
	t.Parallel()
	database := dbtest.New(t)
	address := freeAddress(t)
	cmd := exec.CommandContext(t.Context(), buildProgram(t), "serve", "--address", address,
		"--shutdown-timeout", "10m", "--request-timeout", "10m", "--statement-timeout", "10m", "--lock-timeout", "10m")
	cmd.Env = append(os.Environ(), "PGBROKER_DATABASE_URL="+database.ConnString, "PGBROKER_SHARED_SECRET="+servertest.Secret)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	mustTry(t, []string{"PGBROKER_ADDRESS=" + address, "PGBROKER_SHARED_SECRET=" + servertest.Secret}, "health", "--wait", "30s")

	// A request that does not end by itself.
	tx, err := database.Connect(t).Begin(t.Context())
	if err == nil {
		_, err = tx.Exec(t.Context(), "SELECT pgbroker.lock_order()")
	}
	if err != nil {
		t.Fatal(err)
	}
	client := databroker.NewDataBrokerServiceClient(servertest.Dial(t, address, servertest.Secret))
	request := make(chan error, 1)
	go func() {
		_, err := client.Put(context.WithoutCancel(t.Context()), &databroker.PutRequest{Records: []*databroker.Record{{Type: "t", Id: "a"}}})
		request <- err
	}()
	for waiting := false; !waiting; {
		if err := database.Pool.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = 'advisory'
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) FROM pg_sleep(0.01)`).Scan(&waiting); err != nil {
			t.Fatal(err)
		}
	}

	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stderr)
	for stopping := false; !stopping && lines.Scan(); {
		stopping = strings.Contains(lines.Text(), "stopping")
	}
	select {
	case err := <-request:
		t.Fatalf("the first signal has cut the request off: %v", err)
	default:
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for more := true; more; { // until the process has gone, which is what this is about: it takes no ten minutes
		more = lines.Scan()
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 128+int(syscall.SIGTERM) {
		t.Errorf("the second signal: %v", err)
	}
	if err := <-request; err == nil {
		t.Error("the request has succeeded")
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestClosingTheTerminalStops: SIGHUP reads the configuration again, but the terminal that is closed takes with it what was
// started there.
func TestClosingTheTerminalStops(t *testing.T) {
	t.Parallel()
	database := dbtest.New(t)
	address := freeAddress(t)
	person, terminal := openTerminal(t, 80)
	cmd := exec.CommandContext(t.Context(), buildProgram(t), "serve", "--address", address)
	cmd.Env = append(os.Environ(), "PGBROKER_DATABASE_URL="+database.ConnString, "PGBROKER_SHARED_SECRET="+servertest.Secret)
	cmd.Stdin = terminal
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := terminal.Close(); err != nil { // the program has its own
		t.Fatal(err)
	}
	env := []string{"PGBROKER_ADDRESS=" + address, "PGBROKER_SHARED_SECRET=" + servertest.Secret}
	mustTry(t, env, "health", "--wait", "30s")
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	mustTry(t, env, "types")
	if err := person.Close(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("serve ended with %v", err)
	}
}
