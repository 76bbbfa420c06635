package db

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/puddle/v2"
)

// Retry calls fn, and once more if it fails in a way that says for certain that
// nothing of it was applied; see IsRetryable. All that fn does must be one
// statement or one transaction, otherwise its first half may be done twice.
func Retry(ctx context.Context, fn func(context.Context) error) error {
	err := fn(ctx)
	if err == nil || ctx.Err() != nil || !IsRetryable(err) {
		return err
	}
	return fn(ctx)
}

// RetryRead is Retry for what only reads: it is repeated after the loss of a
// connection at any moment.
func RetryRead(ctx context.Context, fn func(context.Context) error) error {
	err := fn(ctx)
	if err == nil || ctx.Err() != nil || !IsRetryable(err) && !isBroken(err) {
		return err
	}
	return fn(ctx)
}

// IsRetryable reports whether err says for certain that the statement or
// transaction was not applied, and that the same may well succeed now: the
// server was read-only, it chose the transaction as the victim of a conflict
// or deadlock, or nothing was sent to it.
func IsRetryable(err error) bool {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		switch pgErr.Code {
		case pgerrcode.ReadOnlySQLTransaction, pgerrcode.SerializationFailure, pgerrcode.DeadlockDetected:
			return true
		}
	}
	var connectErr *pgconn.ConnectError
	return errors.As(err, &connectErr) || pgconn.SafeToRetry(err)
}

// IsUnavailable reports whether err is about the way to the server or its
// condition, not about what was asked of it: it cannot be reached, starts up,
// shuts down, is read-only, has too many connections or no room on its disk,
// or the connection broke.
// The end of the caller's own context is not such an error.
func IsUnavailable(err error) bool {
	var connectErr *pgconn.ConnectError
	var unfit *UnfitError
	switch {
	case err == nil, errors.As(err, &unfit): // the way is free, and leads to something of no use
		return false
	case errors.As(err, &connectErr):
		// Whatever the server said: this program has no connection. (A
		// deadline in here may be the one for connecting.)
		return !errors.Is(err, context.Canceled)
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		switch pgErr.Code {
		case pgerrcode.TooManyConnections, pgerrcode.DiskFull, pgerrcode.IOError:
			return true
		}
	}
	return isStale(err) || errors.Is(err, puddle.ErrClosedPool)
}

// isStale reports whether err says that the connection leads to a server that
// is not, or not any more, the one to use, or to nothing at all.
func isStale(err error) bool {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == pgerrcode.ReadOnlySQLTransaction {
		return true
	}
	return isBroken(err)
}

// isBroken reports whether err says that the connection is gone.
func isBroken(err error) bool {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		switch pgErr.SeverityUnlocalized {
		case "FATAL", "PANIC": // the session ends with it, whatever it is about, and may have committed
			return true
		}
		switch pgErr.Code {
		case pgerrcode.AdminShutdown, pgerrcode.CrashShutdown, pgerrcode.CannotConnectNow,
			pgerrcode.IdleSessionTimeout, pgerrcode.IdleInTransactionSessionTimeout:
			return true // as poolers repeat them
		}
		return strings.HasPrefix(pgErr.Code, "08") // connection exceptions; poolers send them
	}
	var connectErr *pgconn.ConnectError
	if errors.As(err, &connectErr) {
		return true
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	var netErr net.Error
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, net.ErrClosed) || errors.Is(err, pgconn.ErrConnClosed) || errors.As(err, &netErr)
}
