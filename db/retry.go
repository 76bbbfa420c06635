package db

import (
	"cmp"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/puddle/v2"
)

// conflictTries is how often something is tried that loses to other transactions: under isolation levels that somebody has chosen
// for the whole server, and behind poolers, that is nothing unusual.
const conflictTries = 5

// conflictPause is the longest pause after the first such loss; after each further one it is twice as long.
const conflictPause = 5 * time.Millisecond

// Retry calls fn, and once more if it fails in a way that says for certain that
// nothing of it was applied, see IsRetryable; a few times more if it was the
// victim of a conflict. All that fn does must be one statement or one
// transaction, otherwise its first half may be done twice.
func Retry(ctx context.Context, fn func(context.Context) error) error {
	return retry(ctx, fn, IsRetryable)
}

// RetryRead is Retry for what only reads: it is repeated after the loss of a
// connection at any moment.
func RetryRead(ctx context.Context, fn func(context.Context) error) error {
	return retry(ctx, fn, func(err error) bool { return IsRetryable(err) || isBroken(err) })
}

func retry(ctx context.Context, fn func(context.Context) error, retryable func(error) bool) error {
	for try := 1; ; try++ {
		err := fn(ctx)
		if err == nil || ctx.Err() != nil || !retryable(err) {
			return err
		}
		if !isConflict(err) {
			if try > 1 {
				return err
			}
			continue
		}
		if try == conflictTries {
			return err
		}
		select {
		case <-time.After(rand.N(conflictPause << (try - 1))):
		case <-ctx.Done():
			return err
		}
	}
}

// IsRetryable reports whether err says for certain that the statement or
// transaction was not applied, and that the same may well succeed now: the
// server was read-only, it chose the transaction as the victim of a conflict
// or deadlock, it had no memory left at that moment, a plan was out of date,
// or nothing was sent to it.
func IsRetryable(err error) bool {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && !endsSession(pgErr) {
		switch pgErr.Code {
		case pgerrcode.ReadOnlySQLTransaction, pgerrcode.OutOfMemory:
			return true
		case pgerrcode.FeatureNotSupported:
			return pgErr.Routine == "RevalidateCachedQuery" // a table has got another column since the statement was prepared
		}
		if isConflict(err) {
			return true
		}
	}
	var connectErr *pgconn.ConnectError
	return errors.As(err, &connectErr) || errors.Is(err, errUnchecked) || pgconn.SafeToRetry(err)
}

// isConflict reports whether err says that a transaction was rolled back for the sake of others.
func isConflict(err error) bool {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || endsSession(pgErr) {
		return false
	}
	switch pgErr.Code {
	case pgerrcode.SerializationFailure, pgerrcode.DeadlockDetected:
		return true
	}
	return false
}

// endsSession reports whether the session has ended with the error, whatever it is about.
func endsSession(err *pgconn.PgError) bool {
	return err.SeverityUnlocalized == "FATAL" || err.SeverityUnlocalized == "PANIC"
}

// IsReadOnly reports whether err says that the server takes no writes.
func IsReadOnly(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == pgerrcode.ReadOnlySQLTransaction
}

// IsDiskFull reports whether err says that there is no room left on a disk of the server.
func IsDiskFull(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == pgerrcode.DiskFull
}

// IsUnavailable reports whether err is about the way to the server or its
// condition, not about what was asked of it: it cannot be reached, starts up,
// shuts down, is read-only, has too many connections, too little memory or no
// room on its disk, is busy with others, or the connection broke.
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
	return condition(err) != "" || isStale(err) || errors.Is(err, puddle.ErrClosedPool) || errors.Is(err, errUnchecked)
}

// Condition says in a few words, fit for clients, what about the condition of the server made IsUnavailable true of err; that it
// is unavailable, if no more is known.
func Condition(err error) string {
	return cmp.Or(condition(err), "the database is unavailable")
}

func condition(err error) string {
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		return ""
	}
	switch pgErr.Code {
	case pgerrcode.ReadOnlySQLTransaction:
		return "the database takes no writes at present"
	case pgerrcode.DiskFull:
		return "the database's disk is full"
	case pgerrcode.OutOfMemory:
		return "the database has no memory left"
	case pgerrcode.TooManyConnections:
		return "the database has too many connections"
	case pgerrcode.SerializationFailure, pgerrcode.DeadlockDetected, pgerrcode.SnapshotTooOld:
		return "the database is busy with conflicting transactions"
	case pgerrcode.ConfigurationLimitExceeded: // by what was asked
		return ""
	}
	switch pgErr.Code[:min(2, len(pgErr.Code))] {
	case "53": // insufficient resources
		return "the database has too few resources"
	case "58": // errors outside of PostgreSQL itself: its disk, its files
		return "the database has trouble with its machine"
	}
	return ""
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
		if endsSession(pgErr) { // and may have committed
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
