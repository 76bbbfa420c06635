package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/spf13/cobra"

	"pgbroker/cmd/pgbroker/duration"
	"pgbroker/db"
)

// The options here are not part of the databroker interface, so they are read and written in the database.

// onQueries is the body of a command that works on the database that psql would open.
func (a *app) onQueries(do func(ctx context.Context, cmd *cobra.Command, queries *db.Queries) error) func(*cobra.Command, []string) error {
	return a.action(func(cmd *cobra.Command, cfg *configuration) error {
		connString, err := cfg.psqlConnString()
		if err != nil {
			return err
		}
		database, err := db.Open(cmd.Context(), db.Config{ConnString: connString, MaxConns: 1})
		if err != nil {
			return err
		}
		defer database.Close()
		err = pgx.BeginFunc(cmd.Context(), database, func(tx pgx.Tx) error { return do(cmd.Context(), cmd, db.New(tx)) })
		var refused *pgconn.PgError
		if errors.As(err, &refused) {
			return fmt.Errorf("the database refuses: %s", refused.Message)
		}
		return err
	})
}

// A shownType is one line of `types show -o json`.
type shownType struct {
	Type        string   `json:"type"`
	Records     int64    `json:"records"`
	Capacity    *int64   `json:"capacity,omitempty"`
	TTL         string   `json:"ttl,omitempty"`
	ExpiryField string   `json:"expiry_field,omitempty"`
	IdleTimeout string   `json:"idle_timeout,omitempty"`
	UserLimit   *int32   `json:"user_limit,omitempty"`
	Audited     bool     `json:"audited"`
	LookedUpBy  []string `json:"looked_up_by"`
	UpToDate    bool     `json:"up_to_date"`
}

func (a *app) typesShowCommand() *cobra.Command {
	var name recordName
	cmd := &cobra.Command{
		Use: "show [--type TYPE]", Short: "Show for how long records of a type stay, from the database", Args: cobra.NoArgs,
		RunE: a.onQueries(func(ctx context.Context, _ *cobra.Command, queries *db.Queries) error {
			if err := checkText("type", name.kind); err != nil {
				return err
			}
			return a.showTypes(ctx, queries, name.kind)
		}),
	}
	name.addTypeFlag(cmd, "only this type")
	a.addOutputFlag(cmd)
	addSettingFlags(cmd.Flags(), usePsql)
	return cmd
}

func (a *app) showTypes(ctx context.Context, queries *db.Queries, kind string) error {
	if kind != "" {
		kind = recordType(kind)
	}
	rows, err := queries.TypeSummary(ctx, kind)
	if err != nil {
		return err
	}
	if kind != "" && len(rows) == 0 {
		return &exitError{exitNotFound, fmt.Errorf("type %s has neither records nor options", kind)}
	}
	span := func(d *time.Duration) string {
		if d == nil {
			return ""
		}
		return duration.Format(*d)
	}
	text := func(s *string) string {
		if s == nil {
			return ""
		}
		return *s
	}
	t := newTable("TYPE", "RECORDS", "CAPACITY", "TTL", "EXPIRES BY", "IDLE TIMEOUT", "USER LIMIT", "AUDITED").cut(0)
	for _, row := range rows {
		if a.output == outputJSON {
			if err := a.writeJSON(shownType{
				row.Type, row.Records, row.Capacity, span(row.TTL), text(row.ExpiryField), span(row.IdleTimeout),
				row.UserLimit, row.Audited, row.LookedUpBy, row.UpToDate,
			}); err != nil {
				return err
			}
			continue
		}
		capacity, limit := "", ""
		if row.Capacity != nil {
			capacity = strconv.FormatInt(*row.Capacity, 10)
		}
		if row.UserLimit != nil {
			limit = strconv.Itoa(int(*row.UserLimit))
		}
		t.add(row.Name, strconv.FormatInt(row.Records, 10), capacity, span(row.TTL), text(row.ExpiryField),
			span(row.IdleTimeout), limit, strconv.FormatBool(row.Audited))
	}
	if a.output == outputJSON {
		return nil
	}
	return t.write(a.stdout)
}

func (a *app) typesSetCommand() *cobra.Command {
	var (
		name   recordName
		expiry string
		idle   time.Duration
		limit  int32
		audit  bool
	)
	cmd := &cobra.Command{
		Use: "set --type TYPE", Short: "Set for how long records of a type stay, in the database", Args: cobra.NoArgs,
		Long: `Set for how long records of a type stay. Only what is given is changed, and it soon holds for the records that are there,
too. Records that go leave tombstones. These options are not part of the databroker interface, so this needs the database.

` + typeHelp,
		Example: `  pgbroker types set -t session.Session --idle-timeout 8h --user-limit 5
  pgbroker types set -t example.com/Thing --expiry-field valid_until --audit`,
		RunE: a.onQueries(func(ctx context.Context, cmd *cobra.Command, queries *db.Queries) error {
			if err := checkText("type", name.kind); err != nil {
				return err
			}
			if err := checkText("expiry-field", expiry); err != nil {
				return err
			}
			kind, given := recordType(name.kind), cmd.Flags().Changed
			var problems []error
			if given("expiry-field") {
				field := &expiry
				if expiry == "" {
					field = nil
				}
				problems = append(problems, queries.TypeSetExpiry(ctx, db.TypeSetExpiryParams{Type: kind, Field: field}))
			}
			if given("idle-timeout") {
				if idle < 0 {
					return usagef("--idle-timeout: %v: must be more than 0, or 0 for none", idle)
				}
				timeout := &idle
				if idle == 0 {
					timeout = nil
				}
				problems = append(problems, queries.TypeSetIdleTimeout(ctx, db.TypeSetIdleTimeoutParams{Type: kind, Timeout: timeout}))
			}
			if given("user-limit") {
				if limit < 0 {
					return usagef("--user-limit: %d: must be more than 0, or 0 for none", limit)
				}
				records := &limit
				if limit == 0 {
					records = nil
				}
				problems = append(problems, queries.TypeSetUserLimit(ctx, db.TypeSetUserLimitParams{Type: kind, Records: records}))
			}
			if given("audit") {
				problems = append(problems, queries.TypeSetAudited(ctx, db.TypeSetAuditedParams{Type: kind, Audited: audit}))
			}
			if len(problems) == 0 {
				return usagef("give what to set, such as --idle-timeout")
			}
			if err := errors.Join(problems...); err != nil {
				return err
			}
			return a.showTypes(ctx, queries, name.kind)
		}),
	}
	name.addTypeFlag(cmd, "type of the records")
	must(cmd.MarkFlagRequired("type"))
	cmd.Flags().StringVar(&expiry, "expiry-field", "", "payload field with the time at which a record ends; empty for none")
	duration.Var(cmd.Flags(), &idle, "idle-timeout", 0, nil, "records whose accessed_at is longer ago end; 0 for none")
	cmd.Flags().Int32Var(&limit, "user-limit", 0, "how many records a user may have, those issued last; 0 for any number")
	cmd.Flags().BoolVar(&audit, "audit", false, "write deletions to the audit")
	a.addOutputFlag(cmd)
	addSettingFlags(cmd.Flags(), usePsql)
	return cmd
}
