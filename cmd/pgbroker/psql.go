package main

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/spf13/cobra"

	"pgbroker/db/embedded"
)

func (a *app) psqlCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "psql [-- PSQL_ARGUMENT...]", Short: "Open the server's database in psql",
		Long: `Open psql on the database that 'serve' uses: that of --database-url or --database-url-file, else the private Postgres that a
running 'pgbroker serve' keeps in --data-dir. What follows -- goes to psql.`,
		Example: `  pgbroker psql
  pgbroker psql -- -c "SELECT id, user_id FROM pgbroker.sessions"`,
		Args: cobra.ArbitraryArgs,
	}
	cmd.RunE = a.action(func(cmd *cobra.Command, cfg *configuration) error {
		connString, err := cfg.psqlConnString()
		if err != nil {
			return err
		}
		program, err := findPsql(cmd)
		if err != nil {
			return err
		}
		connString, password := takePassword(connString)
		environment := os.Environ()
		if password != "" {
			environment = append(environment, "PGPASSWORD="+password) // a command line is for everybody to see
		}
		return replaceProcess(program, append([]string{"psql", connString}, cmd.Flags().Args()...), environment)
	})
	addSettingFlags(cmd.Flags(), usePsql)
	return cmd
}

// psqlConnString is where the database is, past a pooler if there is such a way: a person expects a session.
func (c *configuration) psqlConnString() (string, error) {
	for _, s := range []struct{ name, path, text string }{
		{"listener_database_url_file", c.ListenerDatabaseURLFile, c.ListenerDatabaseURL},
		{"database_url_file", c.DatabaseURLFile, c.DatabaseURL},
	} {
		if s.path != "" {
			content, err := os.ReadFile(s.path)
			if err != nil {
				return "", fmt.Errorf("%s: %w", c.describe(s.name), err)
			}
			return strings.TrimSpace(string(content)), nil
		}
		if s.text != "" {
			return s.text, nil
		}
	}
	dir, err := c.dataDir()
	if err != nil {
		return "", err
	}
	return runningIn(dir)
}

// findPsql finds psql on the PATH or beside the server binaries.
func findPsql(cmd *cobra.Command) (string, error) {
	program, err := exec.LookPath("psql")
	if err == nil {
		return program, nil
	}
	if binaries, notFound := embedded.Find(cmd.Context()); notFound == nil {
		beside := filepath.Join(binaries.Dir, "psql")
		if readableFile(beside) == nil {
			return beside, nil
		}
	}
	return "", errors.Join(errors.New("psql is not installed"), err)
}

var passwordKeyword = regexp.MustCompile(`\bpassword\s*=\s*('(?:[^'\\]|\\.)*'|\S+)`)

// takePassword removes the password from a connection string.
func takePassword(connString string) (without, password string) {
	config, err := pgconn.ParseConfig(connString)
	if err != nil {
		return connString, "" // psql says what is wrong with it
	}
	if u, err := url.Parse(connString); err == nil && (u.Scheme == "postgres" || u.Scheme == "postgresql") {
		if u.User != nil {
			u.User = url.User(u.User.Username())
		}
		query := u.Query()
		query.Del("password")
		u.RawQuery = query.Encode()
		return u.String(), config.Password
	}
	return passwordKeyword.ReplaceAllString(connString, ""), config.Password
}

// replaceProcess is how psql gets the terminal, and its signals, for itself.
func replaceProcess(program string, args, environment []string) error {
	return syscall.Exec(program, args, environment)
}
