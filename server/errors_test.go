package server

import (
	"fmt"
	"log/slog"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"pgbroker/db"
)

// What is no fault of the request is Unavailable, which clients repeat; what the database says is not told.
func TestErrorsOfTheDatabase(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]struct {
		code    codes.Code
		message string
	}{
		"25006": {codes.Unavailable, "the database takes no writes at present"},
		"40001": {codes.Unavailable, "the database is busy with conflicting transactions"},
		"40P01": {codes.Unavailable, "the database is busy with conflicting transactions"},
		"53000": {codes.Unavailable, "the database has too few resources"},
		"53100": {codes.Unavailable, "the database's disk is full"},
		"53200": {codes.Unavailable, "the database has no memory left"},
		"53300": {codes.Unavailable, "the database has too many connections"},
		"53400": {codes.ResourceExhausted, "the request takes more than the database allows"},
		"54001": {codes.ResourceExhausted, "the request takes more than the database allows"},
		"55P03": {codes.Unavailable, errBlocked.Error()},
		"57014": {codes.DeadlineExceeded, "the request took too long"},
		"57P01": {codes.Unavailable, "the database is unavailable"},
		"57P03": {codes.Unavailable, "the database is unavailable"},
		"58030": {codes.Unavailable, "the database has trouble with its machine"},
		"58P01": {codes.Unavailable, "the database has trouble with its machine"},
		"72000": {codes.Unavailable, "the database is busy with conflicting transactions"},
		"3F000": {codes.Unavailable, errUnfit.Error()},
		"42501": {codes.Unavailable, errUnfit.Error()}, // also what row_security=off makes of a policy
		"42P01": {codes.Unavailable, errUnfit.Error()},
		"42883": {codes.Unavailable, errUnfit.Error()},
		"23505": {codes.Internal, "internal error"},
		"XX000": {codes.Internal, "internal error"},
		"XX001": {codes.Internal, "internal error"}, // data corrupted
	} {
		err := fmt.Errorf("write records: %w", &pgconn.PgError{Code: code, Severity: "ERROR", Message: "secret", Detail: "secret"})
		got := status.Convert(toStatus(t.Context(), slog.New(slog.DiscardHandler), "/databroker.DataBrokerService/Put", err))
		if got.Code() != want.code || got.Message() != want.message {
			t.Errorf("%s: got %v %q, want %v %q", code, got.Code(), got.Message(), want.code, want.message)
		}
	}
	unfit := &db.UnfitError{Problem: "the problem", Remedy: "the remedy"}
	if got := status.Convert(toStatus(t.Context(), slog.New(slog.DiscardHandler), "", unfit)); got.Code() != codes.Unavailable || got.Message() != errUnfit.Error() {
		t.Errorf("unfit: got %v", got)
	}
}
