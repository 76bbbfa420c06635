package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"pgbroker/db"
	"pgbroker/server/changefeed"
	"pgbroker/server/combiner"
	"pgbroker/server/filter"
	"pgbroker/server/projection"
)

// What handlers fail with, beside the errors of the packages they use.
var (
	errRecordNotFound  = errors.New("record not found")
	errOptionsNotFound = errors.New("no options are set for this record type")
	errLeaseTaken      = errors.New("lease is already taken")
	errLeaseLost       = errors.New("lease no longer held")
	errOverloaded      = errors.New("the server is overloaded: too many writes are waiting")
	errStopping        = errors.New("the server is shutting down")
	errBlocked         = errors.New("another transaction in the database blocks writes; the server's log says which")
	errUnfit           = errors.New("the database is not set up for this server; the server's log says what is wrong")
	errUnconfirmed     = errors.New("commits wait for a synchronous standby that does not answer; this change may have been made, and lasts only if that comes back")
	errSilent          = errors.New("the database does not answer")
	errPublicTime      = fmt.Errorf("a request without a token may take %v, and a stream %v", publicCallTime, publicStreamTime) // who really watches begins anew
	errPanicked        = errors.New("a request panicked")                                                                       // logged where it is recovered
)

// invalidError is a request that names something impossible.
type invalidError struct{ message string }

func (e invalidError) Error() string { return e.message }

// invalid returns the error of a request whose field is not acceptable; the rest says what would be.
func invalid(field, format string, args ...any) error {
	return invalidError{field + ": " + fmt.Sprintf(format, args...)}
}

// toStatus is the one table from errors to status codes. What a caller cannot act upon is logged and
// hidden: a database error may quote data.
func toStatus(ctx context.Context, logger *slog.Logger, method string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	var invalid invalidError
	var limit *limitError
	var pgErr *pgconn.PgError
	var past *db.PastError
	var unfit *db.UnfitError
	var noWrites *noWritesError
	switch {
	case errors.As(err, &invalid), errors.Is(err, filter.ErrInvalid), errors.Is(err, projection.ErrInvalidPatch):
		return status.Error(codes.InvalidArgument, bounded(err.Error()))
	case errors.Is(err, filter.ErrUnsupported):
		return status.Error(codes.Unimplemented, bounded(err.Error()))
	case errors.Is(err, errRecordNotFound), errors.Is(err, errOptionsNotFound):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, errLeaseTaken), errors.Is(err, errLeaseLost):
		return status.Error(codes.AlreadyExists, err.Error())
	case errors.Is(err, changefeed.ErrDataSetChanged):
		return status.Error(codes.Aborted, "invalid server version")
	case errors.Is(err, changefeed.ErrPurged), errors.Is(err, changefeed.ErrLost):
		return status.Error(codes.Aborted, "invalid record version")
	case errors.As(err, &limit):
		return status.Error(codes.ResourceExhausted, limit.Error())
	case errors.Is(err, combiner.ErrFull):
		return status.Error(codes.ResourceExhausted, errOverloaded.Error())
	case errors.Is(err, errStopping), errors.Is(err, changefeed.ErrStopped):
		return status.Error(codes.Unavailable, errStopping.Error())
	case errors.As(err, &pgErr) && pgErr.Code == pgerrcode.LockNotAvailable:
		// blockerWatch logs it, once.
		logger.DebugContext(ctx, "another transaction blocks writes", "method", method, "error", err)
		return status.Error(codes.Unavailable, errBlocked.Error())
	case errors.Is(err, errBlocked), errors.Is(err, errUnconfirmed), errors.Is(err, errPublicTime):
		return status.Error(codes.Unavailable, err.Error())
	case errors.Is(err, errSilent):
		logger.WarnContext(ctx, "database unavailable", "method", method, "error", err)
		return status.Error(codes.Unavailable, errSilent.Error())
	case errors.As(err, &noWrites): // writingWatch logs it, once
		logger.DebugContext(ctx, "the database takes no writes", "method", method, "error", noWrites.err)
		return status.Error(codes.Unavailable, noWrites.Error())
	case errors.As(err, &past): // logged by package db, which knows when it has said so
		return status.Error(codes.Unavailable, "the database server is one that was left for a newer one")
	case errors.As(err, &pgErr) && pgErr.SchemaName == "pgbroker" && pgErr.Code == pgerrcode.ProgramLimitExceeded: // see refuse_size
		return status.Error(codes.InvalidArgument, bounded(pgErr.Message))
	case errors.As(err, &pgErr) && excessive(pgErr):
		logger.WarnContext(ctx, "a request exceeds what the database allows", "method", method, "error", err)
		return status.Error(codes.ResourceExhausted, "the request takes more than the database allows")
	case db.IsUnavailable(err):
		logger.WarnContext(ctx, "database unavailable", "method", method, "error", err)
		return status.Error(codes.Unavailable, db.Condition(err))
	case errors.As(err, &unfit), errors.As(err, &pgErr) && misconfigured(pgErr):
		// Whoever runs the database can put this right, and then the same request succeeds.
		logger.ErrorContext(ctx, "the database is not as this program needs it", "method", method, "error", err)
		return status.Error(codes.Unavailable, errUnfit.Error())
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &pgErr) && pgErr.Code == pgerrcode.QueryCanceled: // by statement_timeout
		return status.Error(codes.DeadlineExceeded, "the request took too long")
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, "the request was canceled")
	case errors.Is(err, errPanicked):
		return status.Error(codes.Internal, "internal error")
	case errors.Is(err, pgx.ErrNoRows):
		// Every query that may find nothing says so itself; state has its row always.
		logger.ErrorContext(ctx, "a row is missing: is the schema complete?", "method", method, "error", err)
		return status.Error(codes.Internal, "internal error")
	default:
		logger.ErrorContext(ctx, "request failed", "method", method, "error", err)
		return status.Error(codes.Internal, "internal error")
	}
}

// misconfigured reports whether an error is one of a database that lacks rights or parts of the schema: somebody has revoked them, has
// turned on row level security, or is restoring it.
func misconfigured(err *pgconn.PgError) bool {
	switch err.Code {
	case pgerrcode.InsufficientPrivilege, pgerrcode.InvalidSchemaName, pgerrcode.UndefinedTable, pgerrcode.UndefinedFunction,
		pgerrcode.UndefinedColumn:
		return true
	}
	return false
}

// excessive reports whether a request alone exceeds a limit of the database: the space of temporary files, the depth of its stack.
func excessive(err *pgconn.PgError) bool {
	return err.Code == pgerrcode.ConfigurationLimitExceeded || pgerrcode.IsProgramLimitExceeded(err.Code)
}

// maxErrorBytes bounds messages that may quote the request: they travel in a header, of which proxies take
// no more than some 60 kB.
const maxErrorBytes = 1024

func bounded(message string) string {
	if len(message) <= maxErrorBytes {
		return message
	}
	return strings.ToValidUTF8(message[:maxErrorBytes], "") + "…"
}

// showsToken reports whether a request that was admitted or refused with err has shown a valid token.
func showsToken(err error) bool {
	code := status.Code(err)
	return code != codes.Unauthenticated && code != codes.Unavailable
}
