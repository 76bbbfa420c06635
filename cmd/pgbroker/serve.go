package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"pgbroker/db"
	"pgbroker/db/embedded"
	"pgbroker/migrations"
	"pgbroker/server"
)

func (a *app) serveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "serve", Short: "Run the server", Args: noArgs,
		Long: `Run the server until SIGINT or SIGTERM, which let requests end first; a second signal ends it at once. SIGHUP reads
secrets, certificates and the configuration again; the log says what changed, and what of it needs a restart.

With a connection string (--database-url or --database-url-file) it uses that database, whose schema 'pgbroker migrate up' or
--migrate builds. Without one it starts a private Postgres of its own from the binaries on this machine, keeps it and a new
shared secret in --data-dir, and stops it again at the end.`,
		Example: `  pgbroker serve
  pgbroker serve --ephemeral
  pgbroker serve --migrate --database-url-file /run/secrets/db \
    --shared-secret-file /run/secrets/shared`,
		RunE: a.action(func(cmd *cobra.Command, cfg *configuration) error {
			load := func() (*configuration, error) { return loadConfig(cmd.Flags(), a.environ) }
			return a.serve(cmd.Context(), cfg, load)
		}),
	}
	addSettingFlags(cmd.Flags(), useServe)
	return cmd
}

// ballastBytes is memory that is asked for and never touched, so that it takes none. A replica keeps little and makes much
// garbage: measured by the little, the garbage collector would run many times a second.
const ballastBytes = 64 << 20

// serve starts everything in the order in which it depends on each other, and stops it in the reverse order.
func (a *app) serve(ctx context.Context, cfg *configuration, load func() (*configuration, error)) (err error) {
	hangup, release := catchHangup()
	defer release()
	ballast := make([]byte, ballastBytes)
	defer runtime.KeepAlive(ballast)
	if err := cfg.validate(); err != nil {
		return err
	}
	log, err := newLogger(cfg, a.stderr)
	if err != nil {
		return err
	}
	for _, warning := range cfg.warnings {
		log.Warn(warning)
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), buildInfo())

	// The probes answer from the first moment to the last.
	var replica atomic.Pointer[server.Server]
	stopHTTP, err := startHTTP(cfg, metrics, &replica, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stopHTTP()) }()

	// An address that is taken is found before a database is started. It is given back until there is something to serve:
	// clients are to be refused meanwhile, not kept waiting.
	listener, err := listen(cfg)
	if err != nil {
		return err
	}
	listener.Close()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var postgres *embedded.Server
	if cfg.Embedded() {
		var stop func() error
		postgres, stop, err = startEmbedded(ctx, cfg, log)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, stop()) }()
		go func() {
			select {
			case <-postgres.Done():
				cancel(postgres.Err())
			case <-ctx.Done():
			}
		}()
	}

	database, err := cfg.openDatabase(ctx, log)
	if err != nil {
		return err
	}
	defer database.Close()
	s, err := newServer(cfg, database, metrics, log)
	if err != nil {
		return err
	}

	// The server does not run on a schema that lacks something. While the database cannot be asked it runs all the same, so
	// that clients hear why nothing works instead of finding nobody.
	unavailable := prepareSchema(ctx, cfg, database, log)
	if unavailable != nil && !db.IsUnavailable(unavailable) {
		return causeOf(ctx, unavailable)
	}
	if listener, err = listen(cfg); err != nil {
		return err
	}
	if err := giveUpRoot(cfg, postgres, log); err != nil {
		listener.Close()
		return err
	}
	group, running := errgroup.WithContext(ctx)
	if unavailable != nil {
		log.Warn("waiting for the database", "error", unavailable)
		group.Go(func() error { return awaitSchema(running, cfg, database, log) })
	}
	replica.Store(s)
	hangups := &reloader{stop: func() { cancel(nil) }, load: load, cfg: cfg, server: s, log: log}
	if isTerminal(a.stdin) {
		hangups.terminal = a.stdin
	}
	group.Go(func() error { hangups.follow(running, hangup); return nil })
	group.Go(func() error { return s.Run(running, listener) })
	if postgres != nil {
		go a.welcome(running, cfg, s, postgres, listener.Addr().String())
	}
	return causeOf(ctx, group.Wait())
}

// listen opens the address of the gRPC server.
func listen(cfg *configuration) (net.Listener, error) {
	listener, err := net.Listen("tcp", cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cfg.describe("address"), err)
	}
	return listener, nil
}

// causeOf puts the reason for which a context was ended by us before an error that only follows from it.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// newServer makes the replica that cfg describes.
func newServer(cfg *configuration, database *db.DB, metrics prometheus.Registerer, log *slog.Logger) (*server.Server, error) {
	tls, err := cfg.serverTLS(log)
	if err != nil {
		return nil, err
	}
	config := server.Config{
		DB:                   database,
		Auth:                 cfg.authConfig(),
		AllowUnauthenticated: cfg.AllowUnauthenticated,
		RequestTimeout:       cfg.RequestTimeout,
		ShutdownTimeout:      cfg.ShutdownTimeout,
		MaxMessageSize:       int(cfg.MaxMessageSize),
		TombstoneRetention:   cfg.TombstoneRetention,
		AuditRetention:       cfg.AuditRetention,
		RingBytes:            int(cfg.FeedBytes),
		PollInterval:         cfg.PollInterval,
		LockWarning:          cfg.LockWarning,
		Limits: server.Limits{
			Connections: cfg.MaxConnections, Streams: cfg.MaxStreams, StreamsPerConnection: cfg.MaxStreamsPerConnection,
			Requests: cfg.MaxRequests, RequestBytes: int(cfg.MaxRequestBytes), ResponseSize: int(cfg.MaxResponseSize), Scans: cfg.MaxScans,
		},
		Registerer: metrics,
		Logger:     log,
	}
	cfg.tls = tls
	if tls != nil {
		config.TLS = tls.TLSConfig()
		if err := metrics.Register(certificateExpiry(tls.NotAfter)); err != nil {
			return nil, err
		}
	}
	return server.New(config)
}

// certificateExpiry is the metric to be warned by before the certificate expires.
func certificateExpiry(notAfter func() time.Time) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "pgbroker_tls_certificate_expiry_timestamp_seconds", Help: "When the server's certificate expires.",
	}, func() float64 { return float64(notAfter().Unix()) })
}

// buildInfo is the metric that says which program this is.
func buildInfo() prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "pgbroker_build_info", Help: "Always 1; the labels say which program this is.",
		ConstLabels: prometheus.Labels{"version": version(), "go": runtime.Version()},
	}, func() float64 { return 1 })
}

// prepareSchema makes sure that this program works with the schema, by migrating it if that is wanted. A newer schema is served,
// so that a replica that restarts while others are being upgraded comes back.
func prepareSchema(ctx context.Context, cfg *configuration, database *db.DB, log *slog.Logger) error {
	// What is wrong with the database itself is found before anything is changed in it.
	if err := database.CheckRights(ctx); err != nil {
		return err
	}
	if cfg.Migrate {
		todo, err := migrations.Plan(ctx, database.ConnConfig())
		if err != nil {
			return err
		}
		if len(todo) > 0 {
			log.Info("migrating the schema", "migrations", len(todo), "to", migrations.Latest())
			if err := migrations.Up(ctx, database.ConnConfig()); err != nil {
				return err
			}
		}
	}
	version, err := migrations.Check(ctx, database.ConnConfig())
	if err != nil {
		return err
	}
	if known := migrations.Latest(); version > known {
		log.Warn("the database schema is newer than this pgbroker, which is meant for the time of an upgrade: replace it by the newer one",
			"schema", version, "known", known)
	}
	condition, err := database.Condition(ctx)
	if err != nil {
		return err
	}
	return condition.Unfit()
}

// awaitSchema is prepareSchema for a database that cannot be reached yet.
func awaitSchema(ctx context.Context, cfg *configuration, database *db.DB, log *slog.Logger) error {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		select {
		case <-ctx.Done():
			return nil // stopped while waiting, which is no failure
		case <-time.After(pause):
		}
		switch err := prepareSchema(ctx, cfg, database, log); {
		case err == nil:
			log.Info("the database is there")
			return nil
		case ctx.Err() == nil && !db.IsUnavailable(err):
			return err
		}
	}
}

// startHTTP starts the endpoint for metrics and probes, if there is to be one.
func startHTTP(cfg *configuration, metrics prometheus.Gatherer, replica *atomic.Pointer[server.Server], log *slog.Logger) (stop func() error, err error) {
	if cfg.MetricsAddress == "" {
		return func() error { return nil }, nil
	}
	listener, err := net.Listen("tcp", cfg.MetricsAddress)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cfg.describe("metrics_address"), err)
	}
	log.Info("serving metrics and probes", "address", listener.Addr().String())
	ask := func(question func(*server.Server) error) func() error {
		return func() error {
			s := replica.Load()
			if s == nil {
				return errors.New("starting")
			}
			return question(s)
		}
	}
	probes := newHTTPServer(metrics, ask((*server.Server).Ready), ask((*server.Server).Writable), log)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serveHTTP(ctx, probes, listener) }()
	return func() error {
		cancel()
		return <-done
	}, nil
}

// startEmbedded starts the private Postgres and completes cfg: the connection string, and the shared secret that is kept with
// the data.
func startEmbedded(ctx context.Context, cfg *configuration, log *slog.Logger) (_ *embedded.Server, stop func() error, err error) {
	postgres, err := embedded.Start(ctx, embedded.Config{Dir: cfg.DataDir, Ephemeral: cfg.Ephemeral, Logger: log})
	if err != nil {
		return nil, nil, err
	}
	removeCreated := func() error { return nil }
	stop = func() error {
		// By now nothing uses it any more, so this takes a moment only.
		ctx, cancel := context.WithTimeout(context.Background(), cfg.ShutdownTimeout)
		defer cancel()
		return errors.Join(postgres.Stop(ctx), removeCreated())
	}
	if !cfg.hasSecret() && !cfg.AllowUnauthenticated {
		// An ephemeral server uses the same place, because clients look there, and leaves it as it was.
		dir, err := cfg.dataDir()
		if err != nil {
			return nil, nil, errors.Join(err, stop())
		}
		path, created, err := keepSecret(dir)
		if err != nil {
			return nil, nil, errors.Join(err, stop())
		}
		if created {
			log.Info("made a new shared secret", "file", path)
		}
		if created && cfg.Ephemeral {
			removeCreated = func() error { return removeSecret(path) }
		}
		cfg.SharedSecretFile = []string{path}
	}
	cfg.DatabaseURL = postgres.ConnString()
	cfg.Migrate = true
	return postgres, stop, nil
}

// welcome tells a person what is there and what to do with it, once it works.
func (a *app) welcome(ctx context.Context, cfg *configuration, s *server.Server, postgres *embedded.Server, address string) {
	for s.Ready() != nil {
		select {
		case <-ctx.Done():
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
	fmt.Fprint(a.stdout, welcomeText(cfg, postgres, address))
}

func welcomeText(cfg *configuration, postgres *embedded.Server, address string) string {
	program := os.Args[0]
	psql := psqlCommand(postgres)
	flags := ""
	if address != settingNamed("address").def {
		flags += " --address " + shellQuote(reachable(address))
	}
	if cfg.DataDir != "" {
		flags += " --data-dir " + shellQuote(cfg.DataDir)
	}
	kept := "kept in " + postgres.Dir()
	if cfg.Ephemeral {
		kept = "gone when this ends (--ephemeral)"
	}
	secret := "none: everybody who reaches the address may read and write (--allow-unauthenticated)"
	switch {
	case len(cfg.SharedSecretFile) > 0:
		secret = cfg.SharedSecretFile[0]
	case len(cfg.SharedSecret) > 0:
		secret = cfg.origin("shared_secret")
	case len(cfg.Keys) > 0:
		secret = "those of keys (" + cfg.origin("keys") + ")"
	}
	var b strings.Builder
	fmt.Fprintf(&b, `
pgbroker is ready.

  address  %s
  secret   %s
  data     %s
  psql     %s

Try, in a second terminal:

  %[5]s watch%[6]s
  %[5]s record put --type session.Session --id demo --data '{"id": "demo", "user_id": "jane"}'%[6]s
  %[4]s -c "DELETE FROM pgbroker.sessions WHERE id = 'demo'"

The watch shows both changes. Ctrl-C stops the server and its Postgres.

`, address, secret, kept, psql, program, flags)
	return b.String()
}

// psqlCommand is what a person types to get to the private Postgres.
func psqlCommand(postgres *embedded.Server) string {
	program := "psql"
	if _, err := exec.LookPath(program); err != nil {
		if beside := filepath.Join(postgres.Binaries().Dir, program); readableFile(beside) == nil {
			program = beside
		}
	}
	config, err := pgconn.ParseConfig(postgres.ConnString())
	if err != nil { // it is made by package embedded, but then psql takes it as it is, too
		return shellQuote(program) + " " + shellQuote(postgres.ConnString())
	}
	words := []string{program, "-h", config.Host, "-p", strconv.Itoa(int(config.Port)), "-U", config.User, config.Database}
	for i := range words {
		words[i] = shellQuote(words[i])
	}
	return strings.Join(words, " ")
}

// shellQuote writes a word so that a shell takes it as it is.
func shellQuote(word string) string {
	if strings.Trim(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:@%+,=") == "" {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}
