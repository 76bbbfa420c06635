package server

import (
	"context"

	"github.com/jackc/pgx/v5"

	"pgbroker/db"
)

// boundedReader is a database of which no query returns more bytes than an answer may have: how many rows a client asks for
// says nothing about how much memory they take.
type boundedReader struct {
	db.DBTX
	limiter *limiter
}

// Query implements db.DBTX.
func (r boundedReader) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	rows, err := r.DBTX.Query(ctx, sql, args...) //nolint:rowserrcheck // whoever reads them checks
	if err != nil {
		return rows, err
	}
	return &boundedRows{Rows: rows, ctx: ctx, limiter: r.limiter}, nil
}

type boundedRows struct {
	pgx.Rows
	ctx     context.Context // of the query
	limiter *limiter
	bytes   int
	err     error
}

// Next implements pgx.Rows.
func (r *boundedRows) Next() bool {
	if r.err != nil || !r.Rows.Next() {
		return false
	}
	for _, value := range r.RawValues() {
		r.bytes += len(value)
	}
	limit := r.limiter.limits.ResponseSize
	if r.bytes <= limit {
		return true
	}
	r.Close()
	r.err = r.limiter.refuse(r.ctx, limitResponseSize, &limitError{"the answer is too large, ask for fewer records", limit, " bytes", limitResponseSize})
	return false
}

// Err implements pgx.Rows.
func (r *boundedRows) Err() error {
	if r.err != nil {
		return r.err
	}
	return r.Rows.Err()
}
