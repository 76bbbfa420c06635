package db

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// Reasons for which a server takes no writes.
var (
	ErrStandby  = errors.New("the database server in use is a standby")
	ErrReadOnly = errors.New("the database server in use is read-only (default_transaction_read_only)")
)

// ServerCondition is what the server in use can do at present.
type ServerCondition struct {
	// NoWrites is why it takes no writes: ErrStandby, ErrReadOnly, or nil if it does.
	NoWrites error
	// Standby: it is one, and Lag behind its primary, as far as it knows.
	Standby bool
	Lag     time.Duration
	// Hidden names the tables of which a policy of row level security hides something from us. It is empty if all is well.
	Hidden string
}

// Unfit returns an *UnfitError if nothing that is read can be relied on, else nil.
func (c *ServerCondition) Unfit() error {
	if c.Hidden == "" {
		return nil
	}
	return &UnfitError{
		Problem: "row level security is in force for this program's role, and hides rows of " + c.Hidden,
		Remedy:  "ALTER TABLE … DISABLE ROW LEVEL SECURITY for each of them, as the owner of the schema, or ALTER ROLE … BYPASSRLS",
	}
}

// Condition asks the server in use for its condition. If it takes no writes, a new connection is tried, which may lead to a
// server that does, or have settings that were changed since; then all connections are given up for new ones. When a server
// begins to take writes, its epoch begins.
func (d *DB) Condition(ctx context.Context) (ServerCondition, error) {
	row, err := New(d).ServerCondition(ctx)
	if err != nil {
		return ServerCondition{}, fmt.Errorf("ask the server for its condition: %w", err)
	}
	condition := ServerCondition{Standby: row.Standby, Lag: time.Duration(row.LagSeconds * float64(time.Second)), Hidden: row.Hidden}
	switch {
	case row.Standby:
		condition.NoWrites = ErrStandby
	case row.ReadOnly:
		condition.NoWrites = ErrReadOnly
	}
	before := d.readOnly.Load()
	if condition.NoWrites != nil {
		switch better, err := d.writable(ctx); {
		case err != nil:
			return ServerCondition{}, fmt.Errorf("look for a server that takes writes: %w", err)
		case better:
			d.leave()
			condition = ServerCondition{Hidden: row.Hidden}
		}
	}
	d.readOnly.Store(condition.NoWrites != nil)
	if before && condition.NoWrites == nil {
		if err := d.Settle(ctx); err != nil {
			return ServerCondition{}, fmt.Errorf("settle with a server that takes writes now: %w", err)
		}
	}
	return condition, nil
}

// writable reports whether a new connection leads to a server that takes writes.
func (d *DB) writable(ctx context.Context) (bool, error) {
	cfg := d.main.current()
	d.lookout.arrange(cfg)
	d.fence.guard(cfg)
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return false, err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }() // it was only asked
	row, err := New(conn).ServerCondition(ctx)
	return err == nil && !row.ReadOnly, err
}

// CheckRights returns an *UnfitError that names the rights which this program's role lacks, if there is a schema.
func (d *DB) CheckRights(ctx context.Context) error {
	missing, err := New(d).RightsMissing(ctx)
	if err != nil {
		return fmt.Errorf("look at the rights of the role: %w", err)
	}
	if len(missing) == 0 {
		return nil
	}
	role := d.main.current().User
	var list []string
	for _, right := range missing {
		list = append(list, right.Privileges+" on "+right.Object)
	}
	return &UnfitError{
		Problem: fmt.Sprintf("the role %s lacks rights: %s", role, strings.Join(list, "; ")),
		Remedy:  grantsRemedy(role),
	}
}

func grantsRemedy(role string) string {
	return fmt.Sprintf("as the owner of the schema, run: pgbroker migrate grants --server %s | psql", role)
}
