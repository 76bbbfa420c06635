package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/reflect/protoreflect"

	"pgbroker/cmd/pgbroker/duration"
	"pgbroker/db"
)

// The options here are not part of the databroker interface, so they are read and written in the database.

// onDatabaseOf is the body of a command that works on the database that psql would open.
func (a *app) onDatabaseOf(do func(ctx context.Context, cmd *cobra.Command, database *db.DB) error) func(*cobra.Command, []string) error {
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
		err = do(cmd.Context(), cmd, database)
		var refused *pgconn.PgError
		if errors.As(err, &refused) {
			return fmt.Errorf("the database refuses: %s", refused.Message)
		}
		return explainDatabase(err)
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
	EndsWith    bool     `json:"end_sessions_of_missing_users"`
	Audited     bool     `json:"audited"`
	LookedUpBy  []string `json:"looked_up_by"`
	UpToDate    bool     `json:"up_to_date"`
}

func (a *app) typesShowCommand() *cobra.Command {
	var name recordName
	cmd := &cobra.Command{
		Use: "show [--type TYPE]", Short: "Show for how long records of a type stay, from the database", Args: noArgs,
		RunE: a.onDatabaseOf(func(ctx context.Context, _ *cobra.Command, database *db.DB) error {
			if err := checkText("type", name.kind); err != nil {
				return err
			}
			return a.showTypes(ctx, db.New(database), name.kind)
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
	t := newTable("TYPE", "RECORDS", "CAPACITY", "TTL", "EXPIRES BY", "IDLE TIMEOUT", "USER LIMIT", "MISSING USERS", "AUDITED").cut(0)
	for _, row := range rows {
		if a.output == outputJSON {
			if err := a.writeJSON(shownType{
				row.Type, row.Records, row.Capacity, span(row.TTL), text(row.ExpiryField), span(row.IdleTimeout),
				row.UserLimit, row.EndSessionsOfMissingUsers, row.Audited, row.LookedUpBy, row.UpToDate,
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
			span(row.IdleTimeout), limit, strconv.FormatBool(row.EndSessionsOfMissingUsers), strconv.FormatBool(row.Audited))
	}
	if a.output == outputJSON {
		return nil
	}
	return t.write(a.stdout)
}

func (a *app) typesSetCommand() *cobra.Command {
	var (
		name    recordName
		options lifetimeFlags
		yes     bool
	)
	cmd := &cobra.Command{
		Use: "set --type TYPE", Short: "Set for how long records of a type stay, in the database", Args: noArgs,
		Long: `Set for how long records of a type stay. Only what is given is changed, and it soon holds for the records that are there,
too. Users that go end their sessions, if that is set, a minute or two after their record or that in the directory is deleted, unless
it is back by then; 'pgbroker sessions orphans' lists sessions of users that are missing. When it ends some of the records, it says how many and asks, unless --yes is given. Records that go leave tombstones. These options are
not part of the databroker interface, so this needs the database.

` + typeHelp,
		Example: `  pgbroker types set -t session.Session --idle-timeout 8h --user-limit 5
  pgbroker types set -t example.com/Thing --expiry-field valid_until --audit`,
		RunE: a.onDatabaseOf(func(ctx context.Context, cmd *cobra.Command, database *db.DB) error {
			set, err := lifetimesOf(cmd, recordType(name.kind), &options)
			if err != nil {
				return err
			}
			if err := checkExpiryField(set.kind, options.expiry); err != nil {
				return err
			}
			queries := db.New(database)
			known, err := queries.TypeSummary(ctx, set.kind)
			if err != nil {
				return err
			}
			if len(known) == 0 {
				a.say("warning: %s", unknownType(name.kind, "has neither records nor options yet"))
			}
			would, err := queries.TypeWouldEnd(ctx, db.TypeWouldEndParams{
				Type: set.kind, IdleTimeout: set.idle, UserLimit: set.limit, ExpiryField: set.expiry, MissingUsers: set.missing,
			})
			if err != nil {
				return err
			}
			if would > 0 && !yes {
				question := fmt.Sprintf("This ends %d of %d records of %s.", would, known[0].Records, name.kind)
				if err := a.confirm(ctx, question, "nothing was set"); err != nil {
					return err
				}
			}
			if err := pgx.BeginFunc(ctx, database, func(tx pgx.Tx) error { return set.apply(ctx, db.New(tx)) }); err != nil {
				return err
			}
			if would > 0 {
				a.say("%d %s end within about a minute", would, plural(int(would), "record"))
			}
			return a.showTypes(ctx, queries, name.kind)
		}),
	}
	name.addTypeFlag(cmd, "type of the records")
	must(cmd.MarkFlagRequired("type"))
	cmd.Flags().StringVar(&options.expiry, "expiry-field", "", "payload field with the time at which a record ends; empty for none")
	duration.Var(cmd.Flags(), &options.idle, "idle-timeout", 0, nil, "records whose accessed_at is longer ago end; 0 for none")
	cmd.Flags().Int32Var(&options.limit, "user-limit", 0, "how many records a user may have, those issued last; 0 for any number")
	cmd.Flags().BoolVar(&options.missing, "end-sessions-of-missing-users", false,
		"records end when their user is deleted or goes from the directory")
	cmd.Flags().BoolVar(&options.audit, "audit", false, "write to the audit when records end or change hands; for the owner of the schema")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	a.addOutputFlag(cmd)
	addSettingFlags(cmd.Flags(), usePsql)
	return cmd
}

// checkExpiryField refuses a field that a message does not have: with it, records would never end. Messages that are not known here
// may have any field.
func checkExpiryField(recordType, path string) error {
	message := knownMessage(recordType[strings.LastIndexByte(recordType, '/')+1:])
	if message == nil || path == "" {
		return nil
	}
	fields := message.Descriptor()
	for name := range strings.SplitSeq(path, ".") {
		if fields == nil || fields.FullName() == "google.protobuf.Struct" {
			return nil
		}
		field := fields.Fields().ByName(protoreflect.Name(name))
		if field == nil {
			return usagef("--expiry-field: %s has no field %q, and its records would never end; '' is for none", fields.FullName(), name)
		}
		if field.IsMap() {
			return nil
		}
		fields = field.Message()
	}
	return nil
}

// lifetimeFlags are what `types set` is given.
type lifetimeFlags struct {
	expiry  string
	idle    time.Duration
	limit   int32
	missing bool
	audit   bool
}

// lifetimes are options of a type that are to be set; what is nil and not given stays.
type lifetimes struct {
	kind    string
	expiry  *string
	idle    *time.Duration
	limit   *int64
	missing bool
	audit   bool
	given   func(flag string) bool
}

// lifetimesOf reads the flags. What takes an option back is given as nil.
func lifetimesOf(cmd *cobra.Command, kind string, flags *lifetimeFlags) (*lifetimes, error) {
	set := &lifetimes{kind: kind, missing: flags.missing, audit: flags.audit, given: cmd.Flags().Changed}
	for flag, text := range map[string]string{"type": kind, "expiry-field": flags.expiry} {
		if err := checkText(flag, text); err != nil {
			return nil, err
		}
	}
	switch {
	case kind == "":
		return nil, usagef("--type: must not be empty")
	case flags.idle < 0:
		return nil, usagef("--idle-timeout: %v: must be more than 0, or 0 for none", flags.idle)
	case flags.limit < 0:
		return nil, usagef("--user-limit: %d: must be more than 0, or 0 for none", flags.limit)
	case !slices.ContainsFunc([]string{"expiry-field", "idle-timeout", "user-limit", "end-sessions-of-missing-users", "audit"}, set.given):
		return nil, usagef("give what to set, such as --idle-timeout")
	}
	if flags.expiry != "" {
		set.expiry = &flags.expiry
	}
	if flags.idle != 0 {
		set.idle = &flags.idle
	}
	if limit := int64(flags.limit); limit != 0 {
		set.limit = &limit
	}
	return set, nil
}

func (l *lifetimes) apply(ctx context.Context, queries *db.Queries) error {
	if l.given("expiry-field") {
		if err := queries.TypeSetExpiry(ctx, db.TypeSetExpiryParams{Type: l.kind, Field: l.expiry}); err != nil {
			return err
		}
	}
	if l.given("idle-timeout") {
		if err := queries.TypeSetIdleTimeout(ctx, db.TypeSetIdleTimeoutParams{Type: l.kind, Timeout: l.idle}); err != nil {
			return err
		}
	}
	if l.given("user-limit") {
		var limit *int32
		if l.limit != nil {
			records := int32(*l.limit)
			limit = &records
		}
		if err := queries.TypeSetUserLimit(ctx, db.TypeSetUserLimitParams{Type: l.kind, Records: limit}); err != nil {
			return err
		}
	}
	if l.given("end-sessions-of-missing-users") {
		params := db.TypeSetEndSessionsOfMissingUsersParams{Type: l.kind, Ends: l.missing}
		if err := queries.TypeSetEndSessionsOfMissingUsers(ctx, params); err != nil {
			return err
		}
	}
	if l.given("audit") {
		return queries.TypeSetAudited(ctx, db.TypeSetAuditedParams{Type: l.kind, Audited: l.audit})
	}
	return nil
}
