package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"pgbroker/db"
	"pgbroker/server/auth"
	"pgbroker/server/tlsconf"
)

// pomeriumPatience is how long Pomerium waits for an answer (its grpc_client_timeout).
const pomeriumPatience = 10 * time.Second

// validate checks everything that serve needs and that can be known without a network: what is in files, and values that have
// to do with each other. It adds to the warnings what works but is probably not meant.
func (c *configuration) validate() error {
	var problems configError
	add := func(err error) {
		var several configError
		switch {
		case errors.As(err, &several):
			problems = append(problems, several...)
		case err != nil:
			problems = append(problems, err.Error())
		}
	}
	warn := func(format string, args ...any) { c.warnings = append(c.warnings, fmt.Sprintf(format, args...)) }

	add(c.checkSecrets())
	_, err := c.serverTLS(c.noting())
	add(err)
	if c.GRPCInsecure && c.hasCertificate() {
		warn("the certificate is not used, because of %s", c.describe("grpc_insecure"))
	}
	add(c.checkDatabase())
	add(c.checkUser())
	if c.RequestTimeout >= pomeriumPatience {
		warn("%s: %v: Pomerium gives up after %v and then does not learn the reason",
			c.describe("request_timeout"), c.RequestTimeout, pomeriumPatience)
	}
	if c.MetricsAddress != "" && c.MetricsAddress == c.Address && !strings.HasSuffix(c.Address, ":0") {
		add(fmt.Errorf("%s: %s is the address of the gRPC server, too", c.describe("metrics_address"), c.MetricsAddress))
	}
	if len(problems) > 0 {
		return problems
	}
	return nil
}

// hasSecret reports whether a shared secret is configured.
func (c *Config) hasSecret() bool { return len(c.SharedSecret)+len(c.SharedSecretFile)+len(c.Keys) > 0 }

func (c *configuration) checkSecrets() error {
	var problems configError
	for _, secret := range c.SharedSecret {
		if _, err := auth.ParseKey(secret); err != nil {
			problems = append(problems, c.describe("shared_secret")+": "+err.Error())
		}
	}
	for _, path := range c.SharedSecretFile {
		if _, err := auth.ReadKey(path); err != nil {
			problems = append(problems, c.describe("shared_secret_file")+": "+err.Error())
		}
	}
	for i := range c.Keys {
		if _, err := c.Keys[i].read(); err != nil {
			problems = append(problems, fmt.Sprintf("%s: key %s: %v", c.describe("keys"), c.Keys[i].name, err))
		}
	}
	if len(problems) == 0 && c.hasSecret() {
		// What is wrong with all of them together.
		config := c.authConfig()
		config.Log = c.noting()
		if _, err := auth.New(config); err != nil {
			problems = append(problems, c.describe("keys")+": "+err.Error())
		}
	}
	switch {
	case c.AllowUnauthenticated && c.hasSecret():
		name := "shared_secret"
		switch {
		case len(c.SharedSecretFile) > 0:
			name = "shared_secret_file"
		case len(c.Keys) > 0:
			name = "keys"
		}
		problems = append(problems, fmt.Sprintf("%s and %s are both set: keep one of them",
			c.describe("allow_unauthenticated"), c.describe(name)))
	case !c.AllowUnauthenticated && !c.hasSecret() && !c.Embedded():
		problems = append(problems, "no shared secret: set shared_secret_file (--shared-secret-file, PGBROKER_SHARED_SECRET_FILE); "+
			"`pgbroker secret generate` makes one. To serve everyone without a secret, say --allow-unauthenticated")
	}
	if len(problems) > 0 {
		return problems
	}
	return nil
}

func (c *configuration) checkDatabase() error {
	var problems configError
	both := func(a, b, reason string) {
		problems = append(problems, fmt.Sprintf("%s and %s are both set: %s", c.describe(a), c.describe(b), reason))
	}
	set := func(name string) bool { return len(c.values[name].items) > 0 && c.values[name].items[0] != "" }
	database := "database_url"
	if set("database_url_file") {
		database = "database_url_file"
	}
	listener := "listener_database_url"
	if set("listener_database_url_file") {
		listener = "listener_database_url_file"
	}
	if c.Ephemeral && !c.Embedded() {
		both("ephemeral", database, "ephemeral is for the embedded mode, which a connection string turns off")
	}
	if c.Embedded() {
		if set(listener) {
			problems = append(problems, c.describe(listener)+": is set without database_url")
		}
		if c.DatabasePooler {
			problems = append(problems, c.describe("database_pooler")+": is set without database_url")
		}
	} else {
		var bad configError
		if errors.As(c.checkConnStrings(), &bad) {
			problems = append(problems, bad...)
		}
	}
	if c.PoolMaxConns > 0 && c.PoolMinConns > c.PoolMaxConns {
		problems = append(problems, fmt.Sprintf("%s: %d is more than %s: %d",
			c.describe("pool_min_conns"), c.PoolMinConns, c.describe("pool_max_conns"), c.PoolMaxConns))
	}
	if len(problems) > 0 {
		return problems
	}
	return nil
}

// databaseConfig is the part of the configuration that package db is about.
func (c *configuration) databaseConfig(log *slog.Logger) db.Config {
	return db.Config{
		ConnString: c.DatabaseURL, ConnStringFile: c.DatabaseURLFile,
		ListenerConnString: c.ListenerDatabaseURL, ListenerConnStringFile: c.ListenerDatabaseURLFile,
		MaxConns: c.PoolMaxConns, MinConns: c.PoolMinConns,
		StatementTimeout: orServer(c.StatementTimeout), LockTimeout: orServer(c.LockTimeout),
		Pooler: c.DatabasePooler,
		Logger: log,
	}
}

// orServer is a timeout as package db wants it: for a user 0 means none of ours, there it means the default.
func orServer(d time.Duration) time.Duration {
	if d == 0 {
		return -1
	}
	return d
}

// openDatabase prepares connections to the configured database. Nothing is dialled before the first use.
func (c *configuration) openDatabase(ctx context.Context, log *slog.Logger) (*db.DB, error) {
	if err := c.checkConnStrings(); err != nil {
		return nil, err
	}
	return db.Open(ctx, c.databaseConfig(log))
}

// checkConnStrings parses both connection strings, and the files that they are in or name.
func (c *configuration) checkConnStrings() error {
	var problems configError
	// With a context that has ended nothing is dialled, not even what pool_min_conns asks for.
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	for _, s := range []struct{ name, value, path string }{
		{"database_url", c.DatabaseURL, c.DatabaseURLFile},
		{"listener_database_url", c.ListenerDatabaseURL, c.ListenerDatabaseURLFile},
	} {
		switch {
		case s.path != "":
			s.name += "_file"
		case s.value == "":
			continue
		}
		d, err := db.Open(ended, db.Config{
			ConnString: s.value, ConnStringFile: s.path, Pooler: c.DatabasePooler && strings.HasPrefix(s.name, "database_url"), Logger: c.noting(),
		})
		if err == nil {
			err = checkConnString(s.value, s.path)
		}
		if err != nil {
			problems = append(problems, c.describe(s.name)+": "+strings.TrimPrefix(err.Error(), "db: "))
			continue
		}
		d.Close()
	}
	if len(problems) > 0 {
		return problems
	}
	return nil
}

// checkConnString refuses what passes for keywords by accident: any text with an = in it would be taken for the name of a
// session setting, which Postgres then repeats in its error, and a secret in base64 ends with =.
func checkConnString(text, path string) error {
	if path != "" {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		text = string(b)
	}
	if strings.HasPrefix(strings.TrimSpace(text), "postgres://") || strings.HasPrefix(strings.TrimSpace(text), "postgresql://") {
		return nil
	}
	for _, pair := range keyword.FindAllString(text, -1) {
		if key, _, _ := strings.Cut(pair, "="); !settingKeyword.MatchString(strings.TrimSpace(key)) {
			return errors.New("connection string: want keywords like host=... user=... dbname=... or a URI like postgres://user@host/database")
		}
	}
	return nil
}

// noting returns a log whose warnings become notes of the configuration. The packages that it is given to warn again when they
// are used in earnest.
func (c *configuration) noting() *slog.Logger {
	return slog.New(slog.NewTextHandler(noteWriter{c}, &slog.HandlerOptions{
		Level: slog.LevelWarn,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == slog.LevelKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}

type noteWriter struct{ c *configuration }

// Write implements io.Writer.
func (w noteWriter) Write(line []byte) (int, error) {
	note := strings.TrimSuffix(strings.TrimPrefix(string(line), "msg="), "\n")
	if !slices.Contains(w.c.notes, note) {
		w.c.notes = append(w.c.notes, note)
	}
	return len(line), nil
}

// certificate returns the certificate and its key, each from a file or from base64.
func (c *configuration) certificate() (certificate, key tlsconf.PEM, err error) {
	var problems configError
	pem := func(name, encoded, path string) tlsconf.PEM {
		if encoded == "" {
			return tlsconf.File(path)
		}
		p, err := tlsconf.Base64(encoded)
		if err != nil {
			problems = append(problems, c.describe(name)+": "+err.Error())
		}
		return p
	}
	certificate, key = pem("tls_cert", c.TLSCert, c.TLSCertFile), pem("tls_key", c.TLSKey, c.TLSKeyFile)
	if len(problems) > 0 {
		return certificate, key, problems
	}
	return certificate, key, nil
}

// serverTLS returns the server's side of TLS, or nil when it is to speak plaintext.
func (c *configuration) serverTLS(log *slog.Logger) (*tlsconf.Server, error) {
	if c.GRPCInsecure {
		return nil, nil
	}
	if !c.hasCertificate() {
		if c.TLSClientCAFile != "" {
			return nil, configError{c.describe("tls_client_ca_file") + ": needs tls_cert_file and tls_key_file"}
		}
		if err := tlsconf.CheckPlaintext(c.Address, false); err != nil {
			return nil, configError{c.describe("address") + ": " + err.Error()}
		}
		return nil, nil
	}
	certificate, key, err := c.certificate()
	if err != nil {
		return nil, err
	}
	server, err := tlsconf.NewServer(tlsconf.ServerConfig{
		Certificate: certificate, Key: key, ClientCA: tlsconf.File(c.TLSClientCAFile), Log: log,
	})
	if err != nil {
		return nil, configError{c.describe(c.certificateSetting()) + ": " + err.Error()}
	}
	return server, nil
}

// certificateSetting names the setting that messages about the certificate are to start with.
func (c *configuration) certificateSetting() string {
	for _, s := range []struct{ name, value string }{
		{"tls_cert_file", c.TLSCertFile}, {"tls_cert", c.TLSCert}, {"tls_key_file", c.TLSKeyFile},
	} {
		if s.value != "" {
			return s.name
		}
	}
	return "tls_key"
}

// clientTLS returns a client's side of TLS.
func (c *configuration) clientTLS() (*tls.Config, error) {
	certificate, key, err := c.certificate()
	if err != nil {
		return nil, err
	}
	config, err := tlsconf.Client(tlsconf.ClientConfig{
		CA: tlsconf.File(c.TLSCAFile), ServerName: c.TLSServerName, Certificate: certificate, Key: key,
	})
	if err != nil {
		name := "tls_ca_file"
		if c.TLSCAFile == "" {
			name = c.certificateSetting()
		}
		return nil, configError{c.describe(name) + ": " + err.Error()}
	}
	return config, nil
}
