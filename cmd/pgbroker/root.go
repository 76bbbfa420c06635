package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Exit codes. They are documented in the help text and in docs/configuration.md.
const (
	exitOK              = 0
	exitFailure         = 1
	exitUsage           = 2
	exitNotFound        = 3
	exitTaken           = 4
	exitUnreachable     = 5
	exitUnauthenticated = 6
	exitNoneMatched     = 7
	exitProblems        = 8
	exitInterrupted     = 130
)

// exitCodes explains the codes, for the help text and the documentation.
var exitCodes = []struct {
	code    int
	meaning string
}{
	{exitOK, "done"},
	{exitFailure, "failed; the message says why"},
	{exitUsage, "wrong usage, configuration or input"},
	{exitNotFound, "no such record, type or setting"},
	{exitTaken, "the lease is held by somebody else"},
	{exitUnreachable, "the server cannot be reached, or its database cannot be used: it is away, or takes no writes"},
	{exitUnauthenticated, "the server does not accept the shared secret, or its access is not enough"},
	{exitNoneMatched, "nothing is chosen by the filters, so nothing was done"},
	{exitProblems, "check has found problems"},
	{exitInterrupted, "interrupted, or not confirmed"},
}

// An exitError is an error with an exit code of its own.
type exitError struct {
	code int
	err  error
}

// Error implements error.
func (e *exitError) Error() string { return e.err.Error() }

// Unwrap makes the cause visible to errors.Is.
func (e *exitError) Unwrap() error { return e.err }

// usagef is the error of a user who has to type something else.
func usagef(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// unfinished is the error of a command that has done a part of its work. It says what is done, also to whoever has interrupted it.
func unfinished(ctx context.Context, err error, done string) error {
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled) {
		return &exitError{exitInterrupted, errors.New("interrupted: " + done)}
	}
	return fmt.Errorf("%s: %w", done, err)
}

// untouched is the error of a command that has not yet begun to change anything. Whoever has interrupted it is told so.
func untouched(ctx context.Context, err error, nothing string) error {
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled) {
		return &exitError{exitInterrupted, errors.New("interrupted: " + nothing)}
	}
	return err
}

// An app is one run of the program: what it reads from and writes to, and the flags that all commands share.
type app struct {
	stdin          io.Reader
	person         io.Reader // stdin if that is a terminal, else nil
	stdout, stderr io.Writer
	environ        []string

	output  string
	as      string // the person behind the requests, if another one than is logged in
	timeout time.Duration
	secrets bool
	started bool // the command line was understood; errors from here on are not about usage
}

// run is the program without its process: it returns the exit code instead of exiting. A cancelled ctx is an orderly end.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, environ []string) int {
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, environ: environ}
	if isTerminal(stdin) {
		a.person = stdin
	}
	root := a.rootCommand()
	root.SetArgs(args)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	code := exitCode(err)
	if !a.started {
		code = exitUsage
	}
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled) {
		return exitInterrupted // whoever pressed Ctrl-C knows why
	}
	fmt.Fprintf(stderr, "pgbroker: %s\n", clean(err.Error()))
	if !a.started {
		fmt.Fprintf(stderr, "Run '%s --help' for usage.\n", cmd.CommandPath())
	}
	return code
}

// exitCode maps an error to the code that a script can branch on.
func exitCode(err error) int {
	var exit *exitError
	if errors.As(err, &exit) {
		return exit.code
	}
	var config configError
	if errors.As(err, &config) {
		return exitUsage
	}
	st, ok := status.FromError(err)
	if !ok {
		return exitFailure
	}
	switch st.Code() {
	case codes.OK:
		return exitOK
	case codes.InvalidArgument:
		return exitUsage
	case codes.NotFound:
		return exitNotFound
	case codes.AlreadyExists:
		return exitTaken
	case codes.Unavailable, codes.DeadlineExceeded:
		return exitUnreachable
	case codes.Unauthenticated, codes.PermissionDenied:
		return exitUnauthenticated
	default:
		return exitFailure
	}
}

// rootCommand builds the tree of commands.
func (a *app) rootCommand() *cobra.Command {
	var codesHelp strings.Builder
	for _, c := range exitCodes {
		fmt.Fprintf(&codesHelp, "  %-4d %s\n", c.code, c.meaning)
	}
	root := &cobra.Command{
		Use:   "pgbroker",
		Short: "A databroker on PostgreSQL",
		Long: `pgbroker stores the state of an identity-aware proxy (sessions, users, devices, directory) in PostgreSQL and speaks
Pomerium's databroker interface over gRPC.

'pgbroker serve' runs the server. Without a connection string it brings its own private Postgres, and the other commands
then find address and secret by themselves.

Every setting is a flag (--shared-secret-file), an environment variable (PGBROKER_SHARED_SECRET_FILE) and a key of the file
given with --config (shared_secret_file); flags win over the environment, that over the file. Pomerium's names for the same
settings are understood. 'pgbroker config print' shows every value and where it came from.

Exit codes:
` + strings.TrimSuffix(codesHelp.String(), "\n"),
		Version:       version(),
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.PersistentFlags().String(configFlag, "", "file of settings, in YAML [$PGBROKER_CONFIG]")
	root.PersistentFlags().String(pomeriumConfigFlag, "",
		"Pomerium configuration to take shared settings from, in YAML [$PGBROKER_POMERIUM_CONFIG]")
	for _, name := range []string{configFlag, pomeriumConfigFlag} {
		must(root.MarkPersistentFlagFilename(name, "yaml", "yml"))
	}
	root.AddGroup(
		&cobra.Group{ID: "server", Title: "Server:"},
		&cobra.Group{ID: "client", Title: "Client:"},
		&cobra.Group{ID: "tools", Title: "Tools:"},
	)
	add := func(group string, commands ...*cobra.Command) {
		for _, c := range commands {
			c.GroupID = group
			root.AddCommand(c)
		}
	}
	add("server", a.serveCommand(), a.migrateCommand(), a.schemaCommand(), a.psqlCommand())
	add("client", a.sessionsCommand(), a.recordCommand(), a.directoryCommand(), a.typesCommand(), a.optionsCommand(), a.watchCommand(), a.leaseCommand(),
		a.serviceCommand(), a.checkpointCommand(), a.infoCommand(), a.healthCommand(), a.checkCommand())
	add("tools", a.benchCommand(), a.configCommand(), a.secretCommand(), a.versionCommand())
	root.SetHelpCommandGroupID("tools")
	root.SetCompletionCommandGroupID("tools")
	root.SetOut(a.stdout) // before the next line, which remembers it
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() == "completion" { // cobra's own shows its help, whatever shell it is given
			holdsCommands(cmd)
		}
	}
	a.setHelp(root)
	root.SetFlagErrorFunc(explainFlag)
	suggestCommands(root)
	return root
}

// group is a command that only holds others.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short}
	cmd.AddCommand(commands...)
	holdsCommands(cmd)
	return cmd
}

// holdsCommands makes a command show its help, unless it is given the name of a command that it does not hold.
func holdsCommands(cmd *cobra.Command) {
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
}

// suggestCommands makes every command that holds others name the nearest one when it is given one that it does not hold.
func suggestCommands(cmd *cobra.Command) {
	if !cmd.HasSubCommands() {
		return
	}
	cmd.SuggestionsMinimumDistance = 2
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		hint := ""
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			hint = " (did you mean " + strings.Join(near, " or ") + "?)"
		}
		return fmt.Errorf("unknown command %.60q for %q%s", args[0], cmd.CommandPath(), hint)
	}
	for _, child := range cmd.Commands() {
		suggestCommands(child)
	}
}

// explainFlag adds to an error about a flag what may be meant: the command that the flag is for, the flag with the nearest name, an
// id that looks like a flag, or what its value has to be.
func explainFlag(cmd *cobra.Command, err error) error {
	if args := cmd.Flags().Args(); cmd.HasSubCommands() && len(args) > 0 {
		return cmd.Args(cmd, args)
	}
	var invalid *pflag.InvalidValueError
	if errors.As(err, &invalid) {
		return explainValue(invalid)
	}
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		return err
	}
	name := unknown.GetSpecifiedName()
	if short := unknown.GetSpecifiedShortnames(); short != "" {
		if strings.Contains(cmd.Use, "ID") {
			return fmt.Errorf("%w (an id that begins with - comes after --: %s -- -%s)", err, cmd.CommandPath(), short)
		}
		return err
	}
	const far = 3
	best, distance := "", min(far, len(name)/2)+1
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if d := editDistance(strings.ReplaceAll(name, "_", "-"), f.Name); d < distance && !f.Hidden {
			best, distance = f.Name, d
		}
	})
	switch {
	case best != "":
		return fmt.Errorf("unknown flag --%s (did you mean --%s?)", name, best)
	case strings.Contains(cmd.Use, "ID"):
		return fmt.Errorf("unknown flag --%s (an id that begins with - comes after --: %s -- --%[1]s)", name, cmd.CommandPath())
	}
	return fmt.Errorf("unknown flag --%s", name)
}

// explainValue says in people's words what the value of a flag has to be, where the library says how it has tried to read it.
func explainValue(err *pflag.InvalidValueError) error {
	var number *strconv.NumError
	if !errors.As(err, &number) {
		return err
	}
	want := "want a whole number"
	switch {
	case err.GetFlag().Value.Type() == "bool":
		want = "want true or false"
	case errors.Is(err, strconv.ErrRange):
		want = "the number is too large or too small"
	case strings.HasPrefix(err.GetFlag().Value.Type(), "uint"):
		want = "want a whole number, not below 0"
	}
	return fmt.Errorf("invalid argument %.60q for %q flag: %s", err.GetValue(), "--"+err.GetFlag().Name, want)
}

// noArgs accepts no arguments. They are not commands that do not exist.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := ""
	if cmd.Flags().Lookup("id") != nil {
		hint = " (an id is given as --id)"
	}
	return fmt.Errorf("%s takes no argument, but there is %.60q%s", cmd.CommandPath(), args[0], hint)
}

// action is the body of a command. It runs once the command line has been understood.
func (a *app) action(do func(cmd *cobra.Command, cfg *configuration) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		a.started = true
		cfg, err := loadConfig(cmd.Flags(), a.environ)
		if err != nil {
			return err
		}
		return do(cmd, cfg)
	}
}

// addOutputFlag gives a command -o.
func (a *app) addOutputFlag(cmd *cobra.Command) {
	a.output = outputTable
	f := cmd.Flags().VarPF(&choice{value: &a.output, allowed: []string{outputTable, outputJSON}}, "output", "o",
		"how to print: table for people, json for programs (one object per line)")
	f.DefValue = outputTable
	must(cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{outputTable, outputJSON}, cobra.ShellCompDirectiveNoFileComp)))
}

// A choice is a flag with a fixed list of values.
type choice struct {
	value   *string
	allowed []string
}

// String implements pflag.Value.
func (c *choice) String() string {
	if c.value == nil {
		return ""
	}
	return *c.value
}

// Set implements pflag.Value.
func (c *choice) Set(value string) error {
	for _, allowed := range c.allowed {
		if value == allowed {
			*c.value = value
			return nil
		}
	}
	return fmt.Errorf("want one of %s", strings.Join(c.allowed, ", "))
}

// Type implements pflag.Value.
func (c *choice) Type() string { return strings.Join(c.allowed, "|") }

// must is for errors that only a mistake in this program can cause.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
