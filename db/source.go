package db

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// descriptionCache is how many statements a connection behind a pooler knows the types of.
const descriptionCache = 512

// source is where a connection string comes from, and what becomes of it.
type source struct {
	name string // for errors; never the string itself
	text string
	file string
	cfg  Config
	log  *slog.Logger
	gate *gate

	pool   *pgxpool.Config // from the first reading
	named  bool            // the string sets application_name
	pooled bool            // it leads through a pooler

	mu     sync.Mutex // protects what follows
	last   *pgx.ConnConfig
	local  []sessionSetting // what transactions behind a pooler begin with
	answer time.Duration    // how long a statement may go without an answer; 0 is for ever
	broken bool             // the last reading failed
}

// newSource reads a connection string for the first time.
func newSource(name, text, file string, pooled bool, cfg Config, log *slog.Logger) (*source, error) {
	switch {
	case text == "" && file == "":
		return nil, fmt.Errorf("db: %s: empty; allowed are a URI like postgres://user@host/database and keywords like host=HOST user=USER dbname=NAME", name)
	case text != "" && file != "":
		return nil, fmt.Errorf("db: %s: given twice, as text and as file %s; allowed is one of them", name, file)
	case file != "":
		name += " in file " + file
	}
	s := &source{name: name, text: text, file: file, pooled: pooled, cfg: cfg, log: log, gate: newGate(log)}
	parsed, err := s.parse()
	if err != nil {
		return nil, err
	}
	s.pool, s.last, s.named = parsed.pool, parsed.pool.ConnConfig, parsed.named
	s.local, s.answer = parsed.local, parsed.answer
	switch hosts := hosts(s.last); {
	case parsed.attrs == "" && len(hosts) > 1:
		log.Warn("several hosts without target_session_attrs: using read-write", "source", name, "hosts", hosts)
	case parsed.attrs == "read-only", parsed.attrs == "standby", parsed.attrs == "prefer-standby":
		log.Warn("target_session_attrs prefers servers that take no writes: nothing can be revoked by this replica while it uses one",
			"source", name, "target_session_attrs", parsed.attrs)
	}
	if len(parsed.ignored) > 0 {
		log.Warn("the connection string or the environment has keywords that change nothing here; see docs/configuration.md",
			"source", name, "keywords", parsed.ignored)
	}
	if len(parsed.overruled) > 0 {
		log.Warn("the connection string has settings that pgbroker's statements need otherwise; its own are used",
			"source", name, "settings", parsed.overruled)
	}
	return s, nil
}

// current returns the configuration for a new connection: the string is read
// again, and with it the files that it names (password file, certificates,
// service file). If that fails, which may be the moment between two versions
// of a file, the last one that was right is used.
func (s *source) current() *pgx.ConnConfig {
	parsed, err := s.parse()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.last, s.local, s.answer = parsed.pool.ConnConfig, parsed.local, parsed.answer
	} else if !s.broken {
		s.log.Warn("using the last connection string that was right", "error", err)
	}
	s.broken = err != nil
	return s.last.Copy()
}

// localSettings returns what transactions behind a pooler begin with.
func (s *source) localSettings() []sessionSetting {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.local
}

// answerTime returns how long a statement may go without an answer, which a
// server that can be reached gives within the statement timeout; 0 is for ever.
func (s *source) answerTime() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answer
}

// parsed is a connection string with the defaults applied.
type parsed struct {
	pool   *pgxpool.Config
	attrs  string // target_session_attrs as given; empty: not given
	named  bool   // application_name was given
	local  []sessionSetting
	answer time.Duration

	overruled []string // settings that were given and are not used
	ignored   []string // keywords that were given and mean nothing here
}

// anyPattern finds target_session_attrs=any, which pgx does not tell from
// nothing. A service file's is not found.
var anyPattern = regexp.MustCompile(`target_session_attrs\s*=\s*'?any\b`)

// attrsOf returns target_session_attrs as given, wherever that was, and "" if it was not.
func attrsOf(cfg *pgx.ConnConfig, text string) string {
	if cfg.ValidateConnect == nil {
		if unescaped, err := url.PathUnescape(text); err == nil {
			text = unescaped
		}
		if anyPattern.MatchString(text) || os.Getenv("PGTARGETSESSIONATTRS") == "any" {
			return "any"
		}
		return ""
	}
	chosen := reflect.ValueOf(cfg.ValidateConnect).Pointer()
	for attrs, validate := range map[string]pgconn.ValidateConnectFunc{
		"read-write": pgconn.ValidateConnectTargetSessionAttrsReadWrite, "read-only": pgconn.ValidateConnectTargetSessionAttrsReadOnly,
		"primary": pgconn.ValidateConnectTargetSessionAttrsPrimary, "standby": pgconn.ValidateConnectTargetSessionAttrsStandby,
		"prefer-standby": pgconn.ValidateConnectTargetSessionAttrsPreferStandby,
	} {
		if reflect.ValueOf(validate).Pointer() == chosen {
			return attrs
		}
	}
	return ""
}

// parse reads the connection string.
func (s *source) parse() (p parsed, err error) {
	text := s.text
	if s.file != "" {
		content, err := os.ReadFile(s.file)
		if err != nil {
			return p, fmt.Errorf("db: %s: %w", s.name, err)
		}
		if text = strings.TrimSpace(string(content)); text == "" {
			return p, fmt.Errorf("db: %s: the file is empty", s.name)
		}
	}
	// pgxpool takes its settings out of RuntimeParams; here it matters which
	// ones were given.
	given, err := pgx.ParseConfig(text)
	if err == nil {
		text = withHost(text, keyword(given.RuntimeParams, "hostaddr"))
		p.pool, err = pgxpool.ParseConfig(text)
	}
	if err != nil {
		return p, fmt.Errorf("db: %s: %s", s.name, parseReason(err))
	}
	if p.ignored, err = applyKeywords(p.pool.ConnConfig); err != nil {
		return p, fmt.Errorf("db: %s: %w", s.name, err)
	}
	cfg := p.pool.ConnConfig
	p.attrs = attrsOf(cfg, text)
	cfg.ValidateConnect = validateAttrs(p.attrs, len(hosts(cfg)) > 1)
	_, p.named = given.RuntimeParams["application_name"]
	s.setPoolDefaults(p.pool, given.RuntimeParams)
	p.overruled = s.setSessionDefaults(cfg)
	// Another notation than milliseconds is one from the connection string.
	if milliseconds, err := strconv.Atoi(cfg.RuntimeParams["statement_timeout"]); err == nil {
		p.answer = time.Duration(milliseconds) * time.Millisecond * 3 / 2
	}
	if s.pooled {
		if p.local, err = keepFromSession(cfg, given.DefaultQueryExecMode, text); err != nil {
			return p, fmt.Errorf("db: %s: %w", s.name, err)
		}
	}
	return p, nil
}

// keepFromSession makes a configuration one that leaves nothing in a session and asks for nothing when it opens but
// its name, and returns the settings that each transaction needs instead.
func keepFromSession(cfg *pgx.ConnConfig, mode pgx.QueryExecMode, text string) ([]sessionSetting, error) {
	if strings.Contains(text, "default_query_exec_mode") && mode != pgx.QueryExecModeCacheDescribe {
		return nil, errors.New("default_query_exec_mode: with database_pooler allowed is cache_describe, which is its default")
	}
	// Statements are described once and then sent without a name, with their types: in one round trip, of which
	// the session keeps nothing.
	cfg.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	cfg.StatementCacheCapacity = 0
	if cfg.DescriptionCacheCapacity == 0 {
		cfg.DescriptionCacheCapacity = descriptionCache
	}
	local, err := parseOptions(cfg.RuntimeParams["options"])
	if err != nil {
		return nil, err
	}
	delete(cfg.RuntimeParams, "options")
	for _, s := range newer {
		local = append(local, sessionSetting{s.Name, s.Value})
	}
	for _, name := range slices.Sorted(maps.Keys(cfg.RuntimeParams)) {
		if name == "application_name" {
			continue
		}
		local = append(local, sessionSetting{name, cfg.RuntimeParams[name]})
		delete(cfg.RuntimeParams, name)
	}
	return local, nil
}

func (s *source) setPoolDefaults(pool *pgxpool.Config, given map[string]string) {
	unset := func(name string) bool { _, ok := given[name]; return !ok }
	if s.cfg.MaxConns > 0 && unset("pool_max_conns") {
		pool.MaxConns = int32(s.cfg.MaxConns)
	}
	if s.cfg.MaxConns == 0 && unset("pool_max_conns") {
		pool.MaxConns = max(pool.MaxConns, defaultMaxConns)
	}
	if s.cfg.MinConns > 0 && unset("pool_min_conns") {
		pool.MinConns = int32(s.cfg.MinConns)
	}
	if unset("pool_max_conn_lifetime") {
		pool.MaxConnLifetime = defaultMaxConnLifetime
	}
	if unset("pool_max_conn_lifetime_jitter") {
		pool.MaxConnLifetimeJitter = pool.MaxConnLifetime / 10
	}
	if unset("pool_ping_timeout") {
		pool.PingTimeout = defaultPingTimeout
	}
}

// setSessionDefaults gives connections what sessions of ours have. It returns what the connection string would have otherwise.
func (s *source) setSessionDefaults(cfg *pgx.ConnConfig) (overruled []string) {
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = defaultConnectTimeout
	}
	if _, ok := cfg.RuntimeParams["application_name"]; !ok && !strings.Contains(cfg.RuntimeParams["options"], "application_name") {
		cfg.RuntimeParams["application_name"] = cmp.Or(s.cfg.ApplicationName, defaultApplicationName)
	}
	cfg.AfterConnect = func(ctx context.Context, conn *pgconn.PgConn) error { return settle(ctx, conn, s.pooled) }
	return apply(cfg.RuntimeParams, Settings(s.cfg))
}

// hosts returns the different addresses of a configuration; with sslmode
// prefer each host is in it twice.
func hosts(cfg *pgx.ConnConfig) []string {
	list := []string{address(cfg.Host, cfg.Port)}
	seen := map[string]bool{list[0]: true}
	for _, f := range cfg.Fallbacks {
		if a := address(f.Host, f.Port); !seen[a] {
			seen[a] = true
			list = append(list, a)
		}
	}
	return list
}

func address(host string, port uint16) string {
	_, a := pgconn.NetworkAddress(host, port)
	return a
}

// parseReasons are the things that can be wrong with a connection string, by
// what pgx says, and what we say. pgx repeats the string as far as it can tell
// what the password in it is; in a malformed one it cannot.
var parseReasons = []struct{ pgx, reason string }{
	{"failed to parse as URL", "not a valid URI; expected postgres://user:password@host:port/database?option=value, " +
		"with special characters of user and password percent-encoded (@ is %40, / is %2F, : is %3A)"},
	{"failed to parse as keyword/value", "not valid; expected a URI (postgres://user@host/database) or keywords and values " +
		"(host=... user=... dbname=...), with values that hold spaces in single quotes"},
	{"could not match", "port: allowed are one port for all hosts, or as many ports as hosts"},
	{"invalid port", "port: allowed 1 to 65535 (special characters of a password must be percent-encoded: @ is %40, / is %2F, : is %3A)"},
	{"unknown target_session_attrs value", "target_session_attrs: allowed any, read-write, read-only, primary, standby, prefer-standby"},
	{"unknown channel_binding value", "channel_binding: allowed disable, prefer, require"},
	{"invalid require_auth", "require_auth: not a valid list of authentication methods"},
	{"invalid sslcertmode", "sslcertmode: allowed disable, allow, require"},
	{"invalid connect_timeout", "connect_timeout: allowed is a whole number of seconds, 0 and more"},
	{"invalid min_protocol_version", "min_protocol_version: allowed 3.0, 3.2, latest"},
	{"invalid max_protocol_version", "max_protocol_version: allowed 3.0, 3.2, latest"},
	{"min_protocol_version cannot", "min_protocol_version: allowed is at most max_protocol_version"},
	{"cannot parse statement_cache_capacity", "statement_cache_capacity: allowed is a whole number"},
	{"cannot parse description_cache_capacity", "description_cache_capacity: allowed is a whole number"},
	{"invalid default_query_exec_mode", "default_query_exec_mode: allowed cache_statement, cache_describe, describe_exec, exec, simple_protocol"},
	{"cannot parse pool_max_conns", "pool_max_conns: allowed is a whole number, 1 and more"},
	{"pool_max_conns too small", "pool_max_conns: allowed is a whole number, 1 and more"},
	{"cannot parse pool_min_conns", "pool_min_conns: allowed is a whole number, 0 and more"},
	{"cannot parse pool_min_idle_conns", "pool_min_idle_conns: allowed is a whole number, 0 and more"},
	{"cannot parse pool_max_conn_lifetime_jitter", "pool_max_conn_lifetime_jitter: allowed is a duration like 3m"},
	{"cannot parse pool_max_conn_lifetime", "pool_max_conn_lifetime: allowed is a duration like 30m"},
	{"cannot parse pool_max_conn_idle_time", "pool_max_conn_idle_time: allowed is a duration like 30m"},
	{"cannot parse pool_health_check_period", "pool_health_check_period: allowed is a duration like 1m"},
	{"cannot parse pool_ping_timeout", "pool_ping_timeout: allowed is a duration like 3s"},
}

// parseReason says what is wrong with a connection string without a word of
// it.
func parseReason(err error) string {
	// What pgx says follows the string in backquotes; the last pair of them
	// is not part of the string.
	text := err.Error()
	text = text[strings.LastIndex(text, "`: ")+1:]
	for _, p := range parseReasons {
		if strings.HasPrefix(text, ": "+p.pgx) {
			return p.reason
		}
	}
	if strings.HasPrefix(text, ": failed to configure TLS (sslmode is invalid)") {
		return "sslmode: allowed disable, allow, prefer, require, verify-ca, verify-full"
	}
	// These name files and the service, which are no secrets.
	for _, prefix := range []string{"failed to configure TLS", "failed to read service"} {
		if rest, ok := strings.CutPrefix(text, ": "+prefix); ok {
			return prefix + rest
		}
	}
	return "not a valid PostgreSQL connection string"
}
