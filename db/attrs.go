package db

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5/pgconn"
)

// validateAttrs returns what decides about a server by target_session_attrs. It differs from libpq where that would leave nobody
// to talk to: without a server that is just what was asked for, one is taken that serves reads and streams.
//
//   - read-write, also what several hosts mean without a word: a primary that takes no writes at present (a full disk, somebody has
//     set default_transaction_read_only) is taken if no other host is better. A standby is not: it may be behind, and is about to
//     be promoted, if it is the only one.
//   - standby, read-only: without one, any server is taken; so a standby that is promoted stays in use.
//   - prefer-standby, primary and any: as libpq has them.
func validateAttrs(attrs string, several bool) pgconn.ValidateConnectFunc {
	if attrs == "" && several {
		attrs = "read-write"
	}
	switch attrs {
	case "read-write":
		return func(ctx context.Context, conn *pgconn.PgConn) error {
			err := pgconn.ValidateConnectTargetSessionAttrsReadWrite(ctx, conn)
			if !errors.Is(err, pgconn.ErrReadOnlyConnection) {
				return err
			}
			return notPreferred(ctx, conn, err)
		}
	case "read-only":
		return func(ctx context.Context, conn *pgconn.PgConn) error {
			err := pgconn.ValidateConnectTargetSessionAttrsReadOnly(ctx, conn)
			if !errors.Is(err, pgconn.ErrReadWriteConnection) {
				return err
			}
			return notPreferred(ctx, conn, err)
		}
	case "primary":
		return pgconn.ValidateConnectTargetSessionAttrsPrimary
	case "standby", "prefer-standby":
		return pgconn.ValidateConnectTargetSessionAttrsPreferStandby
	}
	return nil
}

// notPreferred is why a primary is only taken if no other host is better; for a standby it is the given reason, which refuses it.
func notPreferred(ctx context.Context, conn *pgconn.PgConn, reason error) error {
	// Only pgconn can make the error that says so, of a primary.
	if err := pgconn.ValidateConnectTargetSessionAttrsPreferStandby(ctx, conn); err != nil {
		return err
	}
	return reason
}
