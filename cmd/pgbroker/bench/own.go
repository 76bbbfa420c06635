package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"

	"pgbroker/db/embedded"
	"pgbroker/server/auth"
)

// An own is a broker that was started to be measured, with a Postgres of its own that forces every commit to disk.
type own struct {
	*broker
	stop func() error
	dir  string
}

// startOwn starts Postgres and, as a process of its own, the server: a program that understands `serve` as pgbroker does. dir
// is where the data go, below a temporary directory; empty is the usual place for those.
func startOwn(ctx context.Context, program, dir string) (_ *own, err error) {
	home, err := os.MkdirTemp(dir, "pgbroker-bench-")
	if err != nil {
		return nil, fmt.Errorf("directory for the data: %w", err)
	}
	o := &own{stop: func() error { return os.RemoveAll(home) }, dir: home}
	undo := func(f func() error) {
		before := o.stop
		o.stop = func() error { return errors.Join(f(), before()) }
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, o.stop())
		}
	}()
	if err := os.Chmod(home, 0o711); err != nil { // started by root, Postgres runs as another user
		return nil, fmt.Errorf("directory for the data: %w", err)
	}
	postgres, err := embedded.Start(ctx, embedded.Config{Dir: filepath.Join(home, "data"), Settings: map[string]string{"min_wal_size": "2GB"}})
	if err != nil {
		return nil, err
	}
	undo(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return postgres.Stop(ctx)
	})
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	key := auth.NewKey()
	cmd := exec.Command(program, "serve")
	cmd.Env = childEnvironment("PGBROKER_ADDRESS="+address, "PGBROKER_SHARED_SECRET="+key.Secret(),
		"PGBROKER_DATABASE_URL="+postgres.ConnString(), "PGBROKER_MIGRATE=true", "PGBROKER_LOG_LEVEL=warn")
	said := new(tail)
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = said, said, ownGroup()
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the server: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	undo(func() error {
		_ = cmd.Process.Signal(syscall.SIGTERM) // fails only if it has ended
		select {
		case err := <-ended:
			if err != nil {
				return fmt.Errorf("the server ended with: %w\n%s", err, said)
			}
			return nil
		case <-time.After(2 * patience):
			_ = cmd.Process.Kill()
			return fmt.Errorf("the server did not stop and was killed: %w\n%s", <-ended, said)
		}
	})
	o.broker = &broker{
		name: brokerName, connect: func() (*grpc.ClientConn, error) { return dial(address, key) },
		explain:     func(err error) error { return err },
		databaseURL: func() (string, error) { return postgres.ConnString(), nil },
		processes:   &processes{server: cmd.Process.Pid, postgres: postgres.PID()},
	}
	undo(func() error { o.broker.close(); return nil })
	if err := o.awaitHealth(ctx); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, said)
	}
	if err := o.useLog(ctx); err != nil {
		return nil, err
	}
	return o, nil
}

// useLog makes the database look like one that has run for a while: one that is new makes the files of its log while clients
// wait for it.
func (o *own) useLog(ctx context.Context) error {
	url, err := o.databaseURL()
	if err != nil {
		return err
	}
	conn, err := connectPostgres(ctx, url)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for _, sql := range []string{sqlUseLog, "CHECKPOINT"} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("use the log: %w", err)
		}
	}
	return nil
}

// awaitHealth waits until the server serves.
func (o *own) awaitHealth(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 3*patience, errors.New("the server does not serve"))
	defer cancel()
	conns, err := o.spread(1, 1)
	if err != nil {
		return err
	}
	for {
		response, err := grpc_health_v1.NewHealthClient(conns[0]).Check(ctx, new(grpc_health_v1.HealthCheckRequest), grpc.WaitForReady(true))
		if err == nil && response.GetStatus() == grpc_health_v1.HealthCheckResponse_SERVING {
			return nil
		}
		if !sleepUntil(ctx, now()+int64(50*time.Millisecond)) {
			return errors.Join(context.Cause(ctx), err)
		}
	}
}

// freeAddress returns an address of this machine that is free now.
func freeAddress() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return listener.Addr().String(), listener.Close()
}
