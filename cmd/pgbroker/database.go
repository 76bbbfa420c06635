package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/spf13/cobra"

	"pgbroker/db"
	"pgbroker/db/embedded"
)

// withDatabase is the body of a command that works on the database that serve uses: the one configured, or that of a
// running server in embedded mode. The connection is a session of its own, not one of a pooler in transaction mode, and
// without the timeouts that are right for requests.
func (a *app) withDatabase(do func(ctx context.Context, cmd *cobra.Command, conn *pgx.Conn) error) func(*cobra.Command, []string) error {
	return a.action(func(cmd *cobra.Command, cfg *configuration) error {
		conn, err := cfg.connectDatabase(cmd.Context())
		if err != nil {
			return explainDatabase(err)
		}
		defer endConn(cmd.Context(), conn)
		return explainDatabase(do(cmd.Context(), cmd, conn))
	})
}

// connectDatabase opens a connection of its own to the server's database.
func (c *configuration) connectDatabase(ctx context.Context) (*pgx.Conn, error) {
	settings := c.databaseConfig(nil)
	settings.StatementTimeout, settings.IdleInTransactionTimeout = -1, -1
	if c.Embedded() {
		dir, err := c.dataDir()
		if err != nil {
			return nil, err
		}
		if settings.ConnString, err = runningIn(dir); err != nil {
			return nil, err
		}
	} else if err := c.checkConnStrings(); err != nil {
		return nil, err
	}
	database, err := db.Open(ctx, settings)
	if err != nil {
		return nil, err
	}
	defer database.Close()
	if err := database.Look(ctx); err != nil {
		return nil, err
	}
	conn, err := pgx.ConnectConfig(ctx, database.ConnConfig())
	if err != nil {
		return nil, err
	}
	if err := db.RequireSession(ctx, conn, database.ConnConfig()); err != nil {
		_ = conn.Close(context.WithoutCancel(ctx)) // it is of no use
		return nil, err
	}
	return conn, nil
}

// endConn closes a connection. When a command is interrupted, the statement under way is cancelled beside it, and that is waited
// for: a program that has ended cancels nothing, and the database would work on for nobody.
func endConn(ctx context.Context, conn *pgx.Conn) {
	_ = conn.Close(context.WithoutCancel(ctx)) // it is of no use any more
	select {
	case <-conn.PgConn().CleanupDone():
	case <-time.After(2 * time.Second):
	}
}

// runningIn is where the database of a server in embedded mode is, which runs with its data in dir.
func runningIn(dir string) (string, error) {
	connString, err := embedded.Running(dir)
	if errors.Is(err, embedded.ErrNotRunning) {
		return "", &exitError{exitUnreachable, fmt.Errorf("%w: start one with `pgbroker serve`, or give --database-url. "+
			"A server with --ephemeral has its database elsewhere: --database-url 'host=DIRECTORY user=pgbroker dbname=pgbroker', with what it shows after psql -h", err)}
	}
	return connString, err
}

// plainConnectError says in one line what has become of each host, once.
func plainConnectError(err *pgconn.ConnectError) error {
	var parts []string
	for line := range strings.Lines(err.Error()) {
		if line = strings.TrimSpace(line); !slices.Contains(parts, line) {
			parts = append(parts, line)
		}
	}
	if len(parts) < 2 {
		return err
	}
	return fmt.Errorf("%s %s", parts[0], strings.Join(parts[1:], "; "))
}

// explainDatabase turns an error of the database into what a person needs to know, with an exit code.
func explainDatabase(err error) error {
	var (
		exit       *exitError
		connectErr *pgconn.ConnectError
		pgErr      *pgconn.PgError
	)
	switch {
	case err == nil, errors.As(err, &exit):
		return err
	case db.PoolerHint(err) != "":
		return &exitError{exitFailure, fmt.Errorf("%w (%s)", err, db.PoolerHint(err))}
	case errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &connectErr):
		return &exitError{exitUnreachable, plainConnectError(connectErr)}
	case db.IsUnavailable(err):
		return &exitError{exitUnreachable, err}
	case errors.As(err, &pgErr):
		message := pgErr.Message
		if pgErr.Hint != "" {
			message += " (" + pgErr.Hint + ")"
		}
		switch pgErr.SQLState() {
		case pgerrcode.UndefinedTable, pgerrcode.UndefinedFunction, pgerrcode.InvalidSchemaName:
			message += " (is the schema up to date? see `pgbroker migrate version`)"
		case pgerrcode.InsufficientPrivilege:
			message += " (this takes the role of the replicas, or the owner of the schema; see `pgbroker migrate grants`)"
		}
		return &exitError{exitFailure, errors.New(message)}
	}
	return err
}
