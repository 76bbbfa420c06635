package main

import (
	"fmt"
	"strings"
	"time"

	"pgbroker/server"
)

// Config is what every command is configured by, after flags, environment and files have been read. Each field belongs to
// one entry of the table below, which says what it means.
type Config struct {
	Address              string
	SharedSecret         []string
	SharedSecretFile     []string
	Keys                 []namedKey
	AllowUnauthenticated bool

	TLSCert         string
	TLSCertFile     string
	TLSKey          string
	TLSKeyFile      string
	TLSClientCAFile string
	TLSCAFile       string
	TLSServerName   string
	GRPCInsecure    bool

	DatabaseURL             string
	DatabaseURLFile         string
	ListenerDatabaseURL     string
	ListenerDatabaseURLFile string
	PoolMaxConns            int
	PoolMinConns            int
	StatementTimeout        time.Duration
	LockTimeout             time.Duration
	DatabasePooler          bool
	Migrate                 bool

	DataDir   string
	Ephemeral bool
	User      string

	RequestTimeout     time.Duration
	ShutdownTimeout    time.Duration
	MaxMessageSize     byteSize
	TombstoneRetention time.Duration
	AuditRetention     time.Duration
	FeedBytes          byteSize
	PollInterval       time.Duration
	LockWarning        time.Duration

	MaxConnections          int
	MaxStreams              int
	MaxStreamsPerConnection int
	MaxRequests             int
	MaxRequestBytes         byteSize
	MaxResponseSize         byteSize
	MaxScans                int

	MetricsAddress string
	LogLevel       string
	LogFormat      string
}

// Embedded reports whether the broker is to run its own private Postgres.
func (c *Config) Embedded() bool { return c.DatabaseURL == "" && c.DatabaseURLFile == "" }

// A use says which commands have a flag for a setting. The environment and the files may always name every setting, so that
// one file serves the server, its clients and its migrations.
type use uint8

const (
	useServe use = 1 << iota
	useClient
	useMigrate
	useSecret
	usePsql
)

// A setting is one row of the table that flags, environment variables, file keys, validation and docs/configuration.md are
// all made from.
type setting struct {
	// name is the key in the file. The flag is the same with dashes, the environment variable the same in capitals after
	// PGBROKER_.
	name string
	// field returns where the value goes. Its type is the setting's type: string, []string, []namedKey, bool, int, byteSize or
	// duration.
	field func(*Config) any
	// def is the default as a user would write it; empty means none.
	def string
	// effective returns what counts where nothing is set and def is not the same for everybody. It may be nil.
	effective func(*Config) (string, error)
	// pomerium is Pomerium's configuration key for the same thing. Its environment variable is the same in capitals.
	pomerium string
	// secret values are never shown; conn values are shown without their password.
	secret, conn bool
	// oneOf lists the allowed values, where there is a fixed list.
	oneOf []string
	// check refuses a value that parses but cannot work. It needs no network and no file.
	check func(*Config) error
	// commands that have a flag for it.
	use use
	// group is the heading that it stands under in the documentation; empty means that of the row before.
	group string
	// help is one or more sentences. The first one is the flag's help text.
	help string
}

// settings is the one table.
var settings = []setting{
	{
		group: "Listening and calling", name: "address", use: useServe | useClient,
		field: func(c *Config) any { return &c.Address }, def: "127.0.0.1:5443", pomerium: "grpc_address",
		check: func(c *Config) error { return checkAddress(c.Address) },
		help: "Address of the gRPC server: where serve listens and where the other commands call. " +
			"A client that finds no host or an unspecified one (:5443, 0.0.0.0:5443) calls this machine.",
	},
	{
		name: "shared_secret", use: useServe | useClient | useSecret,
		field: func(c *Config) any { return &c.SharedSecret }, pomerium: "shared_secret", secret: true,
		help: "Shared secret that signs and verifies requests: 32 random bytes in base64, as `pgbroker secret generate` prints. " +
			"Several are accepted, for rotation; clients sign with the first. Prefer the file: other users of a machine can see " +
			"flags. In embedded mode one is generated on first use and kept with the data.",
	},
	{
		name: "shared_secret_file", use: useServe | useClient | useSecret,
		field: func(c *Config) any { return &c.SharedSecretFile }, pomerium: "shared_secret_file",
		help: "File that holds a shared secret. It is read again when it changes; several files may be given, for rotation.",
	},
	{
		name: "keys", use: useServe | useSecret,
		field: func(c *Config) any { return &c.Keys }, secret: true,
		help: "Shared secrets with a name and rights: name=NAME,access=ACCESS,secret_file=FILE, or secret=SECRET instead of the file; in " +
			"a configuration file a list with name, access, and secret_file or secret. access is read (look and follow), write (change records, " +
			"take leases, report services, set the checkpoint) or admin (set options of types, clear); each includes the one before it. The name " +
			"appears in logs, metrics and the audit. Two keys may have the same name and access, for rotation. Clients are given the secret " +
			"alone, as their shared_secret. A plain shared_secret beside them may do everything.",
	},
	{
		name: "allow_unauthenticated", use: useServe,
		field: func(c *Config) any { return &c.AllowUnauthenticated }, def: "false",
		help: "Serve everyone who can connect, without any shared secret. Whoever reaches the address can then read and write " +
			"every session. Without this, serve refuses to start when it has no secret.",
	},

	{
		group: "TLS", name: "tls_cert_file", use: useServe | useClient,
		field: func(c *Config) any { return &c.TLSCertFile }, pomerium: "certificate_file",
		help: "Certificate chain in PEM: the server's own, or in a client the certificate that it shows. It is read again when " +
			"it changes.",
	},
	{
		name: "tls_key_file", use: useServe | useClient,
		field: func(c *Config) any { return &c.TLSKeyFile }, pomerium: "certificate_key_file",
		help: "Private key in PEM that belongs to the certificate.",
	},
	{
		name: "tls_cert", field: func(c *Config) any { return &c.TLSCert }, pomerium: "certificate",
		use:  useServe | useClient,
		help: "Certificate chain as base64 of PEM, for where a file cannot be mounted.",
	},
	{
		name: "tls_key", field: func(c *Config) any { return &c.TLSKey }, pomerium: "certificate_key", secret: true,
		use:  useServe | useClient,
		help: "Private key as base64 of PEM, for where a file cannot be mounted.",
	},
	{
		name: "tls_client_ca_file", use: useServe,
		field: func(c *Config) any { return &c.TLSClientCAFile },
		help: "Certificate authorities, in PEM, of the clients. When set, a client must show a certificate that one of them " +
			"signed. Pomerium shows none.",
	},
	{
		name: "tls_ca_file", use: useClient,
		field: func(c *Config) any { return &c.TLSCAFile },
		help:  "Certificate authorities, in PEM, that a client trusts instead of those of the system.",
	},
	{
		name: "tls_server_name", use: useClient,
		field: func(c *Config) any { return &c.TLSServerName },
		help:  "Name that a client expects in the server's certificate, where it differs from the address.",
	},
	{
		name: "grpc_insecure", use: useServe | useClient,
		field: func(c *Config) any { return &c.GRPCInsecure }, def: "false", pomerium: "grpc_insecure",
		help: "Speak HTTP/2 without TLS (h2c) on any address; certificates are then not used. Without this, plaintext is spoken " +
			"on a loopback address only, and there only when no certificate is given.",
	},

	{
		group: "PostgreSQL", name: "database_url", use: useServe | useMigrate | usePsql,
		field: func(c *Config) any { return &c.DatabaseURL }, pomerium: "databroker_storage_connection_string", conn: true,
		help: "Connection string of the database, as a libpq URI or as keywords, with one host or several. " +
			"Without it serve runs a private Postgres of its own (embedded mode).",
	},
	{
		name: "database_url_file", use: useServe | useMigrate | usePsql,
		field: func(c *Config) any { return &c.DatabaseURLFile }, pomerium: "databroker_storage_connection_string_file",
		help: "File that holds the connection string. It is read again for every new connection, so that passwords can rotate.",
	},
	{
		name: "listener_database_url", use: useServe | useMigrate | usePsql,
		field: func(c *Config) any { return &c.ListenerDatabaseURL }, conn: true,
		help: "Connection string that leads to Postgres directly, where database_url leads through a pooler (see database_pooler). " +
			"It is used for the one connection that listens for changes and for migrations. " +
			"Default: the same as database_url.",
	},
	{
		name: "listener_database_url_file", use: useServe | useMigrate | usePsql,
		field: func(c *Config) any { return &c.ListenerDatabaseURLFile },
		help:  "File that holds the listener's connection string. It is read again for every new connection.",
	},
	{
		name: "pool_max_conns", use: useServe,
		field: func(c *Config) any { return &c.PoolMaxConns }, def: "0",
		check: func(c *Config) error { return checkAtLeast(c.PoolMaxConns, 0) },
		help: "Most connections that this replica keeps, besides the listener's. 0 takes pool_max_conns from the connection " +
			"string, or else 10 or the number of processors, whichever is more. Of ten, three are left to the writer, the feed and the periodic " +
			"work, and of the others no more than two each are for scans, for SyncLatest and for leases and options, so that reads by key always " +
			"find one; with fewer than ten they wait for each other.",
	},
	{
		name: "pool_min_conns", use: useServe,
		field: func(c *Config) any { return &c.PoolMinConns }, def: "0",
		check: func(c *Config) error { return checkAtLeast(c.PoolMinConns, 0) },
		help:  "Connections that are kept open when there is nothing to do. 0 takes pool_min_conns from the connection string.",
	},
	{
		name: "statement_timeout", use: useServe,
		field: func(c *Config) any { return &c.StatementTimeout }, def: "8s",
		check: func(c *Config) error { return checkNotNegative(c.StatementTimeout) },
		help:  "Longest that Postgres works on one statement, set on every connection. 0 leaves it to the server's own setting.",
	},
	{
		name: "lock_timeout", use: useServe,
		field: func(c *Config) any { return &c.LockTimeout }, def: "5s",
		check: func(c *Config) error { return checkNotNegative(c.LockTimeout) },
		help:  "Longest that a statement waits for a lock, set on every connection. 0 leaves it to the server's own setting.",
	},
	{
		name: "database_pooler", use: useServe | useMigrate | usePsql,
		field: func(c *Config) any { return &c.DatabasePooler }, def: "false",
		help: "database_url leads through a pooler like PgBouncer, in whatever mode. Nothing is kept in its sessions then: " +
			"each statement brings its settings with it, and checks which server it has come to. Give listener_database_url a way " +
			"to PostgreSQL itself, too: through a pooler in transaction mode nobody hears notifications, so that changes are found " +
			"every poll_interval, and the schema cannot be migrated.",
	},
	{
		name: "migrate", use: useServe,
		field: func(c *Config) any { return &c.Migrate }, def: "false",
		help: "Bring the schema up to date when serve starts. Any number of replicas may do so at once. Embedded mode always " +
			"does; otherwise run `pgbroker migrate up`.",
	},

	{
		group: "Embedded mode", name: "data_dir", use: useServe | useClient | usePsql,
		field: func(c *Config) any { return &c.DataDir }, effective: (*Config).dataDir,
		help: "Directory of the private Postgres and of the shared secret that goes with it. Default: pgbroker in $XDG_STATE_HOME " +
			"if that is set, else in ~/.local/state, or /var/lib/pgbroker for root. Clients look there for the secret.",
	},
	{
		name: "ephemeral", use: useServe,
		field: func(c *Config) any { return &c.Ephemeral }, def: "false",
		help: "Keep the private Postgres in a temporary directory, without fsync, and remove it at the end.",
	},

	{
		group: "Process", name: "user", use: useServe,
		field: func(c *Config) any { return &c.User },
		help: "User to become, when root has started serve, as soon as the addresses are bound and all files have been read: " +
			"by name. Files that are to be read again when they change must be readable for that user. Embedded mode becomes the " +
			"user that runs its Postgres, and takes no other. Default: with a database_url, none.",
	},

	{
		group: "Limits and times", name: "request_timeout", use: useServe,
		field: func(c *Config) any { return &c.RequestTimeout }, def: "8s",
		check: func(c *Config) error { return checkPositive(c.RequestTimeout) },
		help: "Longest that one unary request may take. It stays below the 10s after which Pomerium gives up, so that the " +
			"client sees the reason.",
	},
	{
		name: "shutdown_timeout", use: useServe,
		field: func(c *Config) any { return &c.ShutdownTimeout }, def: "25s",
		check: func(c *Config) error { return checkPositive(c.ShutdownTimeout) },
		help:  "Longest that a stop may take before what is left is cut off. It stays below the 30s that Kubernetes waits.",
	},
	{
		name: "max_message_size", use: useServe,
		field: func(c *Config) any { return &c.MaxMessageSize }, def: "4MiB",
		check: func(c *Config) error { return checkSize(c.MaxMessageSize, 64<<10, 1<<30) },
		help: "Largest request that is accepted, and largest record that is delivered. Pomerium's clients accept answers up to 4MiB. " +
			"The database takes no larger records than pgbroker.state.max_record_bytes says, 4MiB by default, whatever this is.",
	},
	{
		name: "tombstone_retention", use: useServe,
		field: func(c *Config) any { return &c.TombstoneRetention }, def: "168h",
		check: func(c *Config) error { return checkPositive(c.TombstoneRetention) },
		help: "How long deletions are remembered. A client that was away for longer must load everything again, where records " +
			"of its type were deleted meanwhile.",
	},
	{
		name: "audit_retention", use: useServe,
		field: func(c *Config) any { return &c.AuditRetention }, def: "2160h",
		check: func(c *Config) error {
			if c.AuditRetention < server.MinAuditRetention {
				return fmt.Errorf("%v: must be %v or more", c.AuditRetention, server.MinAuditRetention)
			}
			return nil
		},
		help: "How long it is remembered who revoked what (the view `pgbroker.revocations`): a day or more.",
	},
	{
		name: "feed_bytes", use: useServe,
		field: func(c *Config) any { return &c.FeedBytes }, def: "64MiB",
		check: func(c *Config) error { return checkSize(c.FeedBytes, 1<<20, 1<<40) },
		help:  "Memory for recent changes, shared by all streams. A stream that falls behind it reads from the table.",
	},
	{
		name: "poll_interval", use: useServe,
		field: func(c *Config) any { return &c.PollInterval }, def: "2s",
		check: func(c *Config) error { return checkPositive(c.PollInterval) },
		help:  "How often the table is read for changes when no notification came; the upper bound on a lost wake-up.",
	},

	{
		name: "lock_warning", use: useServe,
		field: func(c *Config) any { return &c.LockWarning }, def: "2s",
		check: func(c *Config) error { return checkPositive(c.LockWarning) },
		help: "How long an open transaction of another session may keep writers waiting before it is logged and shown in the " +
			"metrics. See docs/operations.md.",
	},

	{
		group: "Limits against overload", name: "max_connections", use: useServe,
		field: func(c *Config) any { return &c.MaxConnections }, def: "5000",
		check: func(c *Config) error { return checkAtLeast(c.MaxConnections, 1) },
		help: "Most connections of clients at the same time. Further ones are closed at once. The process must be allowed as " +
			"many open files.",
	},
	{
		name: "max_streams", use: useServe,
		field: func(c *Config) any { return &c.MaxStreams }, def: "20000",
		check: func(c *Config) error { return checkAtLeast(c.MaxStreams, 1) },
		help: "Most streams (Sync, SyncLatest, Watch) that are open at the same time. One that is idle takes some 20 kB. Further " +
			"ones fail as ResourceExhausted, as does everything that exceeds the limits below.",
	},
	{
		name: "max_streams_per_connection", use: useServe,
		field: func(c *Config) any { return &c.MaxStreamsPerConnection }, def: "1000",
		check: func(c *Config) error { return checkAtLeast(c.MaxStreamsPerConnection, 1) },
		help:  "Most streams of one connection.",
	},
	{
		name: "max_requests", use: useServe,
		field: func(c *Config) any { return &c.MaxRequests }, def: "5000",
		check: func(c *Config) error { return checkAtLeast(c.MaxRequests, 1) },
		help:  "Most requests that are under way at the same time, besides streams. While the database is slow they pile up.",
	},
	{
		name: "max_request_bytes", use: useServe,
		field: func(c *Config) any { return &c.MaxRequestBytes }, def: "256MiB",
		check: func(c *Config) error { return checkSize(c.MaxRequestBytes, 1<<20, 1<<40) },
		help:  "Largest size of all requests that are under way at the same time.",
	},
	{
		name: "max_scans", use: useServe,
		field: func(c *Config) any { return &c.MaxScans }, def: "2",
		check: func(c *Config) error { return checkAtLeast(c.MaxScans, 1) },
		help: "Most queries that read all records of a type at the same time: those with a text, or with a filter that no index serves. " +
			"Eight times as many wait for their turn. No more run than a third of the pool has connections for.",
	},
	{
		name: "max_response_size", use: useServe,
		field: func(c *Config) any { return &c.MaxResponseSize }, def: "64MiB",
		check: func(c *Config) error { return checkSize(c.MaxResponseSize, 1<<20, 1<<40) },
		help: "Largest answer to one Query or Patch. Pomerium's clients take no more than 4MiB; this is for others, and keeps a " +
			"query without a limit from filling the memory.",
	},

	{
		group: "Observing", name: "metrics_address", use: useServe,
		field: func(c *Config) any { return &c.MetricsAddress }, pomerium: "metrics_address",
		check: func(c *Config) error {
			if c.MetricsAddress == "" {
				return nil
			}
			return checkAddress(c.MetricsAddress)
		},
		help: "Address of the HTTP server for /metrics, /livez and /readyz, such as 127.0.0.1:9090. Without it there is none, so " +
			"that several replicas can run on one machine. It has no authentication.",
	},
	{
		name: "log_level", use: useServe,
		field: func(c *Config) any { return &c.LogLevel }, def: "info", oneOf: []string{"debug", "info", "warn", "error"},
		help: "Least severe level that is logged.",
	},
	{
		name: "log_format", use: useServe,
		field: func(c *Config) any { return &c.LogFormat }, def: "auto", oneOf: []string{"auto", "text", "json"},
		help: "How logs are written to standard error. auto is text on a terminal and JSON otherwise.",
	},
}

// settingNamed finds a row of the table; nil when there is none.
func settingNamed(name string) *setting {
	for i := range settings {
		if settings[i].name == name {
			return &settings[i]
		}
	}
	return nil
}

// flag returns the setting's flag name, without dashes in front.
func (s *setting) flag() string { return strings.ReplaceAll(s.name, "_", "-") }

// env returns the setting's own environment variable.
func (s *setting) env() string { return envPrefix + strings.ToUpper(s.name) }

// pomeriumEnv returns Pomerium's environment variable for it, or nothing.
func (s *setting) pomeriumEnv() string { return strings.ToUpper(s.pomerium) }

// twin returns the other one of a value and its _file, or nil. Whoever sets either of them sets both, in effect: a file named
// by a flag must win over a value in the environment.
func (s *setting) twin() *setting {
	if base, isFile := strings.CutSuffix(s.name, "_file"); isFile {
		return settingNamed(base)
	}
	return settingNamed(s.name + "_file")
}

// typeName says what kind of value is expected, in a user's words.
func (s *setting) typeName() string {
	if len(s.oneOf) > 0 {
		return strings.Join(s.oneOf, "|")
	}
	switch s.field(new(Config)).(type) {
	case *bool:
		return "bool"
	case *int:
		return "number"
	case *byteSize:
		return "size"
	case *time.Duration:
		return "duration"
	case *[]string:
		return s.stringName() + ", ..."
	case *[]namedKey:
		return "key" + s.separator() + " ..."
	default:
		return s.stringName()
	}
}

func (s *setting) stringName() string {
	switch {
	case strings.HasSuffix(s.name, "_file"):
		return "file"
	case strings.HasSuffix(s.name, "_dir"):
		return "directory"
	case strings.HasSuffix(s.name, "address"):
		return "host:port"
	case s.conn:
		return "connection string"
	case s.secret, s.name == "tls_cert":
		return "base64"
	default:
		return "string"
	}
}

// summary is the first sentence of the help text.
func (s *setting) summary() string {
	first, _, _ := strings.Cut(s.help, ". ")
	return strings.ReplaceAll(strings.TrimSuffix(first, "."), "`", "'") // pflag gives backquotes a meaning
}
