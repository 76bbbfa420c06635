package migrations

import (
	"context"
	"io/fs"

	"github.com/jackc/pgx/v5"
)

// Of makes the functions of this package work on other files.
type Of struct{ FS fs.FS }

func (o Of) Up(ctx context.Context, cfg *pgx.ConnConfig) error { return migrator{o.FS}.up(ctx, cfg) }

func (o Of) Down(ctx context.Context, cfg *pgx.ConnConfig, steps int) error {
	return migrator{o.FS}.down(ctx, cfg, steps)
}

func (o Of) Force(ctx context.Context, cfg *pgx.ConnConfig, version int) error {
	return migrator{o.FS}.force(ctx, cfg, version)
}

func (o Of) Plan(ctx context.Context, cfg *pgx.ConnConfig) ([]Migration, error) {
	return migrator{o.FS}.plan(ctx, cfg)
}

func (o Of) Check(ctx context.Context, cfg *pgx.ConnConfig) (uint, error) {
	return migrator{o.FS}.check(ctx, cfg)
}

// Embedded are the real files.
var Embedded fs.FS = embedded
