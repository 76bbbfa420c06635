package main

import (
	"errors"
	"os"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"pgbroker/cmd/pgbroker/bench"
	"pgbroker/db/embedded"
)

var errNoDatabase = errors.New("which database it is, is not known: give --database-url or --database-url-file")

// benchCommand is package bench with the settings and connections of this program.
func (a *app) benchCommand() *cobra.Command {
	program, err := os.Executable()
	if err != nil {
		program = "" // bench then does without
	}
	return bench.NewCommand(bench.Deps{
		Stdin: a.stdin, Stdout: a.stdout, Stderr: a.stderr,
		Version: version(), Program: program, TerminalWidth: terminalWidth, Usage: usagef,
		Flags: func(cmd *cobra.Command) {
			a.addClientFlags(cmd)
			for _, name := range []string{"database_url", "database_url_file"} {
				s := settingNamed(name)
				cmd.Flags().Var(&settingFlag{setting: s}, s.flag(), s.summary())
			}
		},
		Action: func(do func(*cobra.Command, bench.Target) error) func(*cobra.Command, []string) error {
			return a.action(func(cmd *cobra.Command, cfg *configuration) error {
				explain := (&client{address: reachable(cfg.Address)}).explain
				return do(cmd, bench.Target{
					Address: reachable(cfg.Address),
					Named:   cmd.Flags().Changed("address"),
					Connect: func() (*grpc.ClientConn, error) {
						c, err := a.connect(cfg)
						if err != nil {
							return nil, err
						}
						explain = c.explain
						return c.ClientConn, nil
					},
					Explain: func(err error) error { return explain(err) },
					DatabaseURL: func() (string, error) {
						if cfg.Embedded() && !loopback(reachable(cfg.Address)) {
							return "", errNoDatabase
						}
						url, err := cfg.psqlConnString()
						if errors.Is(err, embedded.ErrNotRunning) {
							err = errNoDatabase
						}
						return url, err
					},
				})
			})
		},
	})
}
