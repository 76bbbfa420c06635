package main

import (
	"context"
	"errors"
	"fmt"

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
		defer conn.Close(context.WithoutCancel(cmd.Context()))
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
		if settings.ConnString, err = embedded.Running(dir); err != nil {
			return nil, fmt.Errorf("%w: give --database-url, or start one with `pgbroker serve`", err)
		}
	} else if err := c.checkConnStrings(); err != nil {
		return nil, err
	}
	database, err := db.Open(ctx, settings)
	if err != nil {
		return nil, err
	}
	defer database.Close()
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

// explainDatabase turns an error of the database into what a person needs to know, with an exit code.
func explainDatabase(err error) error {
	var (
		exit  *exitError
		pgErr *pgconn.PgError
	)
	switch {
	case err == nil, errors.As(err, &exit):
		return err
	case db.PoolerHint(err) != "":
		return &exitError{exitFailure, fmt.Errorf("%w (%s)", err, db.PoolerHint(err))}
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
