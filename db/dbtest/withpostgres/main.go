// Withpostgres runs a command, usually go test, with an ephemeral PostgreSQL
// server whose connection string is in TEST_DATABASE_URL:
//
//	go run ./db/dbtest/withpostgres -- go test ./...
//
// The command sees no settings of pgbroker, Pomerium or libpq in its
// environment, and an empty state directory in the place of the user's.
//
// It passes signals on, ends with the command's exit status, and leaves
// nothing running. If TEST_DATABASE_URL is set already, that server is used.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"pgbroker/db/dbtest"
	"pgbroker/db/dbtest/testenv"
	"pgbroker/db/embedded"
)

func main() {
	args := os.Args[1:]
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, "usage: withpostgres [--] command [argument ...]")
		os.Exit(2)
	}
	status, err := run(args)
	if err != nil {
		fmt.Fprintln(os.Stderr, "withpostgres:", err)
	}
	os.Exit(status)
}

// run returns the exit status of the command, or 1 and an error.
func run(args []string) (exit int, err error) {
	signals := make(chan os.Signal, 10)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)

	state, err := os.MkdirTemp("", "pgbroker-test-state-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(state)) }()
	if err := os.Chmod(state, 0o711); err != nil { // as root, Postgres runs as somebody else
		return 1, err
	}
	if err := os.Setenv(testenv.StateEnv, state); err != nil {
		return 1, err
	}
	testenv.Clean()
	env := os.Environ()
	if os.Getenv(dbtest.URLEnv) == "" {
		ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
		server, err := embedded.Start(ctx, embedded.Config{
			Ephemeral: true,
			Settings: map[string]string{
				"max_connections":           "300",
				"max_locks_per_transaction": "256", // a dropped schema locks each of its objects
				"shared_buffers":            "256MB",
				"max_wal_size":              "4GB",
				"autovacuum_naptime":        "10s",
			},
		})
		cancel()
		if err != nil {
			return 1, err
		}
		defer func() {
			if stopErr := server.Stop(context.Background()); stopErr != nil {
				exit, err = max(exit, 1), errors.Join(err, stopErr)
			}
		}()
		env = append(env, dbtest.URLEnv+"="+server.ConnString())
	}

	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.Env = os.Stdin, os.Stdout, os.Stderr, env
	// A process group of its own: go test has children, and each of them gets
	// each signal exactly once, be it from a terminal or from a script.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case sig := <-signals:
			_ = syscall.Kill(-cmd.Process.Pid, sig.(syscall.Signal))
		case err := <-done:
			// Whatever the command left behind in its group ends with it.
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			return exitStatus(err)
		}
	}
}

func exitStatus(err error) (int, error) {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case !errors.As(err, &exit):
		return 1, err
	}
	if status := exit.Sys().(syscall.WaitStatus); status.Signaled() {
		return 128 + int(status.Signal()), nil // as a shell reports it
	}
	return exit.ExitCode(), nil
}
