package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/spf13/cobra"

	"pgbroker/db"
	"pgbroker/migrations"
)

func (a *app) migrateCommand() *cobra.Command {
	cmd := group("migrate", "Build and change the database schema",
		a.migrateUpCommand(), a.migrateDownCommand(), a.migrateVersionCommand(), a.migratePlanCommand(), a.migrateForceCommand(),
		a.migrateGrantsCommand())
	cmd.Long = `Build and change the schema of the database that database_url names. Any number of processes may do so at once: they take
turns. The connection must lead to Postgres directly, not through a pooler in transaction mode.`
	return cmd
}

// onDatabase is the body of a migrate command.
func (a *app) onDatabase(do func(ctx context.Context, database *pgx.ConnConfig) error) func(*cobra.Command, []string) error {
	return a.action(func(cmd *cobra.Command, cfg *configuration) error {
		if cfg.Embedded() {
			return configError{"database_url is not set: migrate works on a database of yours, as in " +
				"--database-url postgres://user@host/database; serve takes care of its embedded one"}
		}
		database, err := cfg.openDatabase(cmd.Context(), nil)
		if err != nil {
			return err
		}
		defer database.Close()
		if err := database.Look(cmd.Context()); err != nil {
			return err
		}
		err = do(cmd.Context(), database.ConnConfig())
		if hint := db.PoolerHint(err); hint != "" {
			return fmt.Errorf("%w (%s)", err, hint)
		}
		var connectErr *pgconn.ConnectError
		if errors.As(err, &connectErr) && db.IsUnavailable(err) {
			return explainDatabase(err)
		}
		return err
	})
}

func (a *app) addMigrateFlags(cmd *cobra.Command) *cobra.Command {
	addSettingFlags(cmd.Flags(), useMigrate)
	return cmd
}

func (a *app) migrateUpCommand() *cobra.Command {
	return a.addMigrateFlags(&cobra.Command{
		Use: "up", Short: "Run the migrations that have not run yet", Args: noArgs,
		RunE: a.onDatabase(func(ctx context.Context, database *pgx.ConnConfig) error {
			todo, err := migrations.Plan(ctx, database)
			if err != nil {
				return err
			}
			if err := migrations.Up(ctx, database); err != nil {
				return err
			}
			// Another process may have run some of them; in the end they have run.
			for _, m := range todo {
				fmt.Fprintf(a.stdout, "%04d %s\n", m.Version, m.Name)
			}
			version, err := migrations.Check(ctx, database)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.stdout, "the schema is at version %s\n", latestOrNewer(version))
			return err
		}),
	})
}

// latestOrNewer describes the version of a schema on which there is nothing to do.
func latestOrNewer(version uint) string {
	if known := migrations.Latest(); version > known {
		return fmt.Sprintf("%d, newer than this pgbroker, which knows versions up to %d", version, known)
	}
	return fmt.Sprintf("%d, the latest", version)
}

func (a *app) migrateDownCommand() *cobra.Command {
	var steps int
	cmd := a.addMigrateFlags(&cobra.Command{
		Use: "down STEPS", Short: "Revert the newest migrations; the data that they hold are lost",
		Long: `Revert the newest migrations, as many as STEPS says. What the reverted migrations made is removed with the data in it; when
all are reverted, nothing is left.`,
		Args: numberArg(&steps, 1),
		RunE: a.onDatabase(func(ctx context.Context, database *pgx.ConnConfig) error {
			if err := migrations.Down(ctx, database, steps); err != nil {
				return err
			}
			version, _, err := migrations.Version(ctx, database)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.stdout, "the schema is at version %d of %d\n", version, migrations.Latest())
			return err
		}),
	})
	return cmd
}

// numberArg accepts one argument that is a number.
func numberArg(n *int, least int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := cobra.ExactArgs(1)(cmd, args); err != nil {
			return err
		}
		var err error
		if *n, err = strconv.Atoi(args[0]); err != nil || *n < least {
			return fmt.Errorf("%.60q: want a number from %d", args[0], least)
		}
		return nil
	}
}

// A schemaVersion is the output of `migrate version -o json`.
type schemaVersion struct {
	Version uint `json:"version"`
	Latest  uint `json:"latest"`
	Dirty   bool `json:"dirty"`
}

func (a *app) migrateVersionCommand() *cobra.Command {
	cmd := a.addMigrateFlags(&cobra.Command{
		Use: "version", Short: "Show the version of the schema", Args: noArgs,
		RunE: a.onDatabase(func(ctx context.Context, database *pgx.ConnConfig) error {
			version, dirty, err := migrations.Version(ctx, database)
			if err != nil {
				return err
			}
			if a.output == outputJSON {
				return a.writeJSON(schemaVersion{version, migrations.Latest(), dirty})
			}
			note := ""
			if version > migrations.Latest() {
				note = ", newer than this pgbroker"
			}
			if dirty {
				note += ", dirty"
			}
			_, err = fmt.Fprintf(a.stdout, "%d of %d%s\n", version, migrations.Latest(), note)
			return err
		}),
	})
	a.addOutputFlag(cmd)
	return cmd
}

// A plannedMigration is one line of `migrate plan -o json`.
type plannedMigration struct {
	Version uint   `json:"version"`
	Name    string `json:"name"`
	SQL     string `json:"sql,omitempty"`
}

func (a *app) migratePlanCommand() *cobra.Command {
	var sql bool
	cmd := a.addMigrateFlags(&cobra.Command{
		Use: "plan", Short: "Show what up would run, without running it", Args: noArgs,
		RunE: a.onDatabase(func(ctx context.Context, database *pgx.ConnConfig) error {
			todo, err := migrations.Plan(ctx, database)
			if err != nil {
				return err
			}
			if len(todo) == 0 {
				version, err := migrations.Check(ctx, database)
				if err != nil {
					return err
				}
				a.say("nothing to do: the schema is at version %s", latestOrNewer(version))
			}
			for _, m := range todo {
				switch {
				case a.output == outputJSON:
					planned := plannedMigration{Version: m.Version, Name: m.Name}
					if sql {
						planned.SQL = m.SQL
					}
					err = a.writeJSON(planned)
				case sql:
					_, err = fmt.Fprintf(a.stdout, "-- %04d %s\n\n%s\n", m.Version, m.Name, m.SQL)
				default:
					_, err = fmt.Fprintf(a.stdout, "%04d %s\n", m.Version, m.Name)
				}
				if err != nil {
					return err
				}
			}
			return nil
		}),
	})
	cmd.Flags().BoolVar(&sql, "sql", false, "show the statements, too")
	a.addOutputFlag(cmd)
	return cmd
}

func (a *app) migrateForceCommand() *cobra.Command {
	var version int
	return a.addMigrateFlags(&cobra.Command{
		Use: "force VERSION", Short: "Record a version without running anything, after a migration was interrupted",
		Long: `Record that the schema is at VERSION (0: nothing applied) and clean, without running anything: the way out of a dirty
schema, for whoever has looked at it.`,
		Args: numberArg(&version, 0),
		RunE: a.onDatabase(func(ctx context.Context, database *pgx.ConnConfig) error {
			if err := migrations.Force(ctx, database, version); err != nil {
				return err
			}
			_, err := fmt.Fprintf(a.stdout, "the schema is recorded as version %d of %d\n", version, migrations.Latest())
			return err
		}),
	})
}

func (a *app) migrateGrantsCommand() *cobra.Command {
	var wanted db.GrantsParams
	cmd := a.addMigrateFlags(&cobra.Command{
		Use: "grants [--reader ROLE] [--revoker ROLE] [--writer ROLE] [--server ROLE]", Short: "Print the privileges that roles need, as SQL", Args: noArgs,
		Long: `Print the statements that give roles what they need, and take from them what they do not. They change nothing until they are
run, may be run again, and should be after each upgrade. Roles that do not exist yet are created by them, without a password; whoever
may not create roles is told what to have created.

The reader sees the views, which show no tokens. The revoker also ends sessions, and writes nothing: it is for the help desk. The
writer revokes and writes records, without reading payloads. The server is what replicas connect as.`,
		Example: `  pgbroker migrate grants --revoker helpdesk --server pgbroker_app |
    psql "$DATABASE_URL"`,
		RunE: a.onDatabase(func(ctx context.Context, database *pgx.ConnConfig) error {
			roles := 0
			for flag, role := range map[string]string{
				"reader": wanted.Reader, "revoker": wanted.Revoker, "writer": wanted.Writer, "server": wanted.Server,
			} {
				if err := checkText(flag, role); err != nil {
					return err
				}
				if role != "" {
					roles++
				}
			}
			if roles == 0 {
				return usagef("give --reader, --revoker, --writer or --server")
			}
			conn, err := pgx.ConnectConfig(ctx, database)
			if err != nil {
				return err
			}
			defer conn.Close(ctx)
			statements, err := db.New(conn).Grants(ctx, wanted)
			if err != nil {
				return explainDatabase(err)
			}
			for _, statement := range statements {
				if _, err := fmt.Fprintln(a.stdout, statement); err != nil {
					return err
				}
			}
			return nil
		}),
	})
	cmd.Flags().StringVar(&wanted.Reader, "reader", "", "role of people who look")
	cmd.Flags().StringVar(&wanted.Revoker, "revoker", "", "role of people who end sessions")
	cmd.Flags().StringVar(&wanted.Writer, "writer", "", "role of scripts that write")
	cmd.Flags().StringVar(&wanted.Server, "server", "", "role that replicas connect as")
	return cmd
}
