package db

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Keyword is a parameter keyword of libpq, as connection strings and service files have it, or a variable of its environment.
type Keyword struct {
	Name string // "" for what is a variable only
	Env  string // "" where there is none
	// Kind says what becomes of it.
	Kind KeywordKind
	// Meaning says, for a reader of the reference, what it does here, or why not.
	Meaning string

	// refuses returns whether a value of a refused keyword is one that cannot be ignored; nil: any but the empty one.
	refuses func(value string) bool
	// plain returns whether a value of an ignored keyword asks for what happens anyway, so that there is nothing to warn of.
	plain func(value string) bool
}

// KeywordKind is what becomes of a keyword.
type KeywordKind int

// The kinds of keywords.
const (
	// Honoured: it means what it means to libpq.
	Honoured KeywordKind = iota
	// Ignored, with one warning: it changes nothing that matters here.
	Ignored
	// Refused: ignoring it would weaken security, or the connection would be of no use.
	Refused
)

func (k KeywordKind) String() string { return [...]string{"honoured", "ignored", "refused"}[k] }

// Keywords returns the one table of keywords: those of libpq in PostgreSQL 15 to 18.
func Keywords() []Keyword { return slices.Clone(keywordTable) }

var keywordTable = []Keyword{
	{Name: "host", Env: "PGHOST", Meaning: "Name, address or socket directory; several with commas are tried in order, those that have just answered first."},
	{Name: "hostaddr", Env: "PGHOSTADDR", Meaning: "Address to connect to instead of looking the host up; one for each host. The certificate is still that of `host`."},
	{Name: "port", Env: "PGPORT", Meaning: "One for all hosts, or one for each."},
	{Name: "dbname", Env: "PGDATABASE", Meaning: "Default: the name of the user."},
	{Name: "user", Env: "PGUSER", Meaning: "Default: the user of the operating system."},
	{Name: "password", Env: "PGPASSWORD", Meaning: "Never shown. Better in a file: `database_url_file`, or `passfile`."},
	{Name: "passfile", Env: "PGPASSFILE", Meaning: "Read again for each connection. The first host's line counts for all hosts."},
	{Name: "service", Env: "PGSERVICE", Meaning: "Section of the service file. What the string itself says has precedence."},
	{Name: "servicefile", Env: "PGSERVICEFILE", Meaning: "Default: `~/.pg_service.conf`. The system-wide file (`PGSYSCONFDIR`) is read only if it is named here."},
	{Name: "connect_timeout", Env: "PGCONNECT_TIMEOUT", Meaning: "Seconds for each host; 0 or none: 5, since a host that does not answer would hide the next one."},
	{Name: "target_session_attrs", Env: "PGTARGETSESSIONATTRS", Meaning: "Several hosts without it mean `read-write`."},
	{Name: "load_balance_hosts", Env: "PGLOADBALANCEHOSTS", Meaning: "`random` shuffles hosts, and the addresses of each, for each connection."},
	{Name: "application_name", Env: "PGAPPNAME", Meaning: "Default: `pgbroker`; the listener's has `-listener` at its end."},
	{Name: "fallback_application_name", Meaning: "Used where there is no `application_name`."},
	{Name: "options", Env: "PGOPTIONS", Meaning: "Settings of the session, as `-c name=value`. Behind a pooler they travel with each statement."},
	{Name: "client_encoding", Env: "PGCLIENTENCODING", Kind: Ignored, Meaning: "Always UTF8, which `auto` is taken for.",
		plain: func(value string) bool {
			return slices.Contains([]string{"auto", "utf8", "utf-8", "unicode"}, strings.ToLower(value))
		}},
	{Name: "keepalives", Meaning: "0 turns TCP keepalive off. Default: on."},
	{Name: "keepalives_idle", Meaning: "Seconds; default 15."},
	{Name: "keepalives_interval", Meaning: "Seconds; default 15."},
	{Name: "keepalives_count", Meaning: "Default 9."},
	{Name: "tcp_user_timeout", Meaning: "Milliseconds; on Linux, elsewhere ignored with a warning."},
	{Name: "sslmode", Env: "PGSSLMODE", Meaning: "Default: `prefer`, as in libpq. Use `verify-full` on networks that are not yours."},
	{Name: "sslnegotiation", Env: "PGSSLNEGOTIATION", Meaning: "`postgres` or `direct`; the latter needs `sslmode=require` or more."},
	{Name: "sslrootcert", Env: "PGSSLROOTCERT", Meaning: "File, or `system`, which means `verify-full`."},
	{Name: "sslcert", Env: "PGSSLCERT", Meaning: "Read again for each connection."},
	{Name: "sslkey", Env: "PGSSLKEY", Meaning: "Read again for each connection; a file in PEM."},
	{Name: "sslpassword", Meaning: "Of a key in PEM that is encrypted the old way (PKCS#1). Never shown."},
	{Name: "sslcertmode", Env: "PGSSLCERTMODE", Meaning: "`disable`, `allow`, `require`."},
	{Name: "sslsni", Env: "PGSSLSNI", Meaning: "0 does not tell the name of the host before encryption begins."},
	{Name: "ssl_min_protocol_version", Env: "PGSSLMINPROTOCOLVERSION", Meaning: "`TLSv1`, `TLSv1.1`, `TLSv1.2`, `TLSv1.3`; default `TLSv1.2`."},
	{Name: "ssl_max_protocol_version", Env: "PGSSLMAXPROTOCOLVERSION", Meaning: "The same; no default."},
	{Name: "sslcrl", Env: "PGSSLCRL", Kind: Refused, Meaning: "Revoked certificates are not looked for."},
	{Name: "sslcrldir", Env: "PGSSLCRLDIR", Kind: Refused, Meaning: "Revoked certificates are not looked for."},
	{Name: "sslcompression", Env: "PGSSLCOMPRESSION", Kind: Ignored, Meaning: "There is none, and servers have none any more.", plain: isOff},
	{Name: "sslkeylogfile", Kind: Ignored, Meaning: "Keys of connections are not written down."},
	{Name: "requiressl", Env: "PGREQUIRESSL", Kind: Refused, Meaning: "Of libpq before 10: say `sslmode=require`.", refuses: func(value string) bool { return value == "1" }},
	{Name: "requirepeer", Env: "PGREQUIREPEER", Meaning: "User that the server must run as, on sockets. On Linux; elsewhere refused."},
	{Name: "require_auth", Env: "PGREQUIREAUTH", Meaning: "Ways of authentication that are accepted, or, with `!`, are not."},
	{Name: "channel_binding", Env: "PGCHANNELBINDING", Meaning: "`require` refuses a server that does not prove to have the key of its certificate and the password."},
	{Name: "min_protocol_version", Env: "PGMINPROTOCOLVERSION", Meaning: "`3.0`, `3.2`, `latest`."},
	{Name: "max_protocol_version", Env: "PGMAXPROTOCOLVERSION", Meaning: "The same. Default `3.0`."},
	{Name: "gssencmode", Env: "PGGSSENCMODE", Kind: Refused, Meaning: "There is no encryption by GSSAPI. Allowed are `prefer` and `disable`, which then mean the same.",
		refuses: func(value string) bool { return !slices.Contains([]string{"", "disable", "prefer"}, value) }},
	{Name: "krbsrvname", Env: "PGKRBSRVNAME", Kind: Ignored, Meaning: "There is no authentication by GSSAPI; a server that asks for it refuses the connection."},
	{Name: "gsslib", Env: "PGGSSLIB", Kind: Ignored, Meaning: "The same."},
	{Name: "gssdelegation", Env: "PGGSSDELEGATION", Kind: Ignored, Meaning: "The same.", plain: isOff},
	{Name: "scram_client_key", Kind: Refused, Meaning: "Give the password. Never shown."},
	{Name: "scram_server_key", Kind: Refused, Meaning: "Give the password. Never shown."},
	{Name: "oauth_issuer", Kind: Refused, Meaning: "There is no authentication by OAuth: give a password or a certificate."},
	{Name: "oauth_client_id", Kind: Refused, Meaning: "There is no authentication by OAuth: give a password or a certificate."},
	{Name: "oauth_client_secret", Kind: Refused, Meaning: "There is no authentication by OAuth: give a password or a certificate. Never shown."},
	{Name: "oauth_scope", Kind: Refused, Meaning: "There is no authentication by OAuth: give a password or a certificate."},
	{Name: "replication", Kind: Refused, Meaning: "Such a connection takes no statements of ours.", refuses: func(value string) bool { return !isOff(value) }},
	{Name: "authtype", Kind: Ignored, Meaning: "Without meaning for libpq, too."},
	{Name: "tty", Kind: Ignored, Meaning: "Without meaning for libpq, too."},
	{Env: "PGTZ", Kind: Ignored, Meaning: "Sessions are in UTC.", plain: func(string) bool { return true }}, // settings.go says so
	{Env: "PGDATESTYLE", Kind: Ignored, Meaning: "Sessions speak ISO.", plain: func(string) bool { return true }},
	{Env: "PGGEQO", Kind: Ignored, Meaning: "Statements are planned as they need it.", plain: func(string) bool { return true }},
}

// isOff reports whether a value says no, as libpq and PostgreSQL write that.
func isOff(value string) bool {
	return slices.Contains([]string{"", "0", "off", "false", "no", "n", "f"}, strings.ToLower(value))
}

// given returns what a connection string, its service, or the environment says of a keyword, in this order; those that pgx
// knows are not among what it returns.
func (k *Keyword) given(params map[string]string) string {
	if value, ok := params[k.Name]; ok && k.Name != "" {
		return value
	}
	if k.Env == "" {
		return ""
	}
	return os.Getenv(k.Env)
}

// reason returns why a keyword is refused, as part of an error.
func (k *Keyword) reason() string {
	reason := strings.TrimSuffix(strings.TrimSuffix(k.Meaning, " Never shown."), ".")
	return strings.ToLower(reason[:1]) + reason[1:]
}

// keyword returns the value of a keyword that pgx does not know.
func keyword(params map[string]string, name string) string {
	i := slices.IndexFunc(keywordTable, func(k Keyword) bool { return k.Name == name })
	return keywordTable[i].given(params)
}

// keywordError says what is wrong with a keyword's value, without the value.
func keywordError(name, format string, args ...any) error {
	return fmt.Errorf("%s: %s", name, fmt.Sprintf(format, args...))
}

// applyKeywords makes a configuration mean what the keywords say that pgx does not know, and takes them out of the settings of
// the session, which pgx takes them for. It returns the names of those that are ignored and would have changed something.
func applyKeywords(cfg *pgx.ConnConfig) (ignored []string, err error) {
	params := cfg.RuntimeParams
	for i := range keywordTable {
		k := &keywordTable[i]
		value := k.given(params)
		if k.Name == "client_encoding" && params[k.Name] != "" && !k.plain(value) {
			continue // settings.go has it, and says so
		}
		if k.Name == "krbsrvname" {
			value = cmp.Or(cfg.KerberosSrvName, value)
		}
		switch {
		case k.Kind == Refused && (k.refuses == nil && value != "" || k.refuses != nil && k.refuses(value)):
			name := cmp.Or(k.Name, k.Env)
			if _, inString := params[k.Name]; !inString {
				name = cmp.Or(k.Env, k.Name) // of the environment
			}
			return nil, keywordError(name, "not supported: %s", k.reason())
		case k.Kind == Ignored && value != "" && (k.plain == nil || !k.plain(value)):
			ignored = append(ignored, cmp.Or(k.Name, k.Env))
		}
	}

	if name := params["fallback_application_name"]; name != "" && params["application_name"] == "" {
		params["application_name"] = name
	}
	if err := applySSLVersions(cfg); err != nil {
		return nil, err
	}
	switch cfg.SSLNegotiation {
	case "", "postgres":
	case "direct":
		for _, way := range waysOf(cfg) {
			if way.TLSConfig == nil && !filepath.IsAbs(way.Host) {
				return nil, keywordError("sslnegotiation", "direct needs sslmode require, verify-ca or verify-full")
			}
		}
	default:
		return nil, keywordError("sslnegotiation", "allowed postgres, direct")
	}
	if err := applyAddresses(cfg, keyword(params, "hostaddr")); err != nil {
		return nil, err
	}
	switch keyword(params, "load_balance_hosts") {
	case "", "disable":
	case "random":
		shuffleHosts(cfg)
	default:
		return nil, keywordError("load_balance_hosts", "allowed disable, random")
	}
	unsupported, err := applyDialing(cfg)
	if err != nil {
		return nil, err
	}
	ignored = append(ignored, unsupported...)
	for _, k := range keywordTable {
		switch {
		case k.Name == "application_name", k.Name == "options", k.Name == "client_encoding" && !k.plain(params[k.Name]):
		default:
			delete(params, k.Name)
		}
	}
	return ignored, nil
}

var tlsVersions = map[string]uint16{"TLSv1": tls.VersionTLS10, "TLSv1.1": tls.VersionTLS11, "TLSv1.2": tls.VersionTLS12, "TLSv1.3": tls.VersionTLS13}

func applySSLVersions(cfg *pgx.ConnConfig) error {
	var bounds [2]uint16
	for i, name := range []string{"ssl_min_protocol_version", "ssl_max_protocol_version"} {
		value := keyword(cfg.RuntimeParams, name)
		if value == "" {
			continue
		}
		for known, version := range tlsVersions {
			if strings.EqualFold(value, known) {
				bounds[i] = version
			}
		}
		if bounds[i] == 0 {
			return keywordError(name, "allowed TLSv1, TLSv1.1, TLSv1.2, TLSv1.3")
		}
	}
	least := bounds[0]
	if least == 0 {
		least = tls.VersionTLS12
	}
	if bounds[1] != 0 && least > bounds[1] {
		return keywordError("ssl_max_protocol_version", "allowed is at least ssl_min_protocol_version, which is TLSv1.2 if not given")
	}
	for _, way := range waysOf(cfg) {
		if way.TLSConfig != nil {
			way.TLSConfig.MinVersion, way.TLSConfig.MaxVersion = least, bounds[1]
		}
	}
	return nil
}

// waysByHost returns the ways to each host of the string, in order: with sslmode prefer or allow there are two, one of them
// without TLS.
func waysByHost(cfg *pgx.ConnConfig) (list [][]*pgconn.FallbackConfig) {
	for _, way := range waysOf(cfg) {
		if n := len(list); n > 0 {
			last := list[n-1]
			if len(last) == 1 && last[0].Host == way.Host && last[0].Port == way.Port && (last[0].TLSConfig == nil) != (way.TLSConfig == nil) {
				list[n-1] = append(last, way)
				continue
			}
		}
		list = append(list, []*pgconn.FallbackConfig{way})
	}
	return list
}

// setWays makes a configuration have these ways.
func setWays(cfg *pgx.ConnConfig, ways []*pgconn.FallbackConfig) {
	cfg.Host, cfg.Port, cfg.TLSConfig, cfg.Fallbacks = ways[0].Host, ways[0].Port, ways[0].TLSConfig, ways[1:]
}

// applyAddresses replaces hosts by their addresses. What TLS expects of the server stays as it is.
func applyAddresses(cfg *pgx.ConnConfig, text string) error {
	if text == "" {
		return nil
	}
	addresses := strings.Split(text, ",")
	hosts := waysByHost(cfg)
	if len(addresses) != len(hosts) {
		return keywordError("hostaddr", "got %d addresses for %d hosts, allowed is one for each", len(addresses), len(hosts))
	}
	var all []*pgconn.FallbackConfig
	for i, ways := range hosts {
		for _, way := range ways {
			if addresses[i] == "" {
				continue
			}
			if _, err := netip.ParseAddr(addresses[i]); err != nil {
				return keywordError("hostaddr", "not an address")
			}
			if filepath.IsAbs(way.Host) {
				return keywordError("hostaddr", "host is the directory of a socket; allowed is one of both")
			}
			way.Host = addresses[i]
		}
		all = append(all, ways...)
	}
	setWays(cfg, all)
	return nil
}

// shuffleHosts puts hosts, and what their names resolve to, in any order.
func shuffleHosts(cfg *pgx.ConnConfig) {
	hosts := waysByHost(cfg)
	rand.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
	setWays(cfg, slices.Concat(hosts...))
	lookUp := cfg.LookupFunc
	cfg.LookupFunc = func(ctx context.Context, name string) ([]string, error) {
		found, err := lookUp(ctx, name)
		rand.Shuffle(len(found), func(i, j int) { found[i], found[j] = found[j], found[i] })
		return found, err
	}
}

// applyDialing makes connections as TCP keepalive, tcp_user_timeout and requirepeer say. It returns which of them this system
// does not have.
func applyDialing(cfg *pgx.ConnConfig) (unsupported []string, err error) {
	number := func(name string, zero int) (int, error) {
		value := keyword(cfg.RuntimeParams, name)
		if value == "" {
			return 0, nil
		}
		n, err := strconv.Atoi(strings.TrimSpace(value))
		if err != nil || n > 1<<31-1 {
			return 0, keywordError(name, "allowed is a whole number")
		}
		if n <= 0 { // the system's default
			return zero, nil
		}
		return n, nil
	}
	dialer := &net.Dialer{Timeout: cfg.ConnectTimeout, KeepAliveConfig: net.KeepAliveConfig{Enable: true}}
	for _, k := range []struct {
		name  string
		field func(n int)
	}{
		{"keepalives_idle", func(n int) { dialer.KeepAliveConfig.Idle = time.Duration(n) * time.Second }},
		{"keepalives_interval", func(n int) { dialer.KeepAliveConfig.Interval = time.Duration(n) * time.Second }},
		{"keepalives_count", func(n int) { dialer.KeepAliveConfig.Count = n }},
	} {
		n, err := number(k.name, -1)
		if err != nil {
			return nil, err
		}
		k.field(n)
	}
	if value := keyword(cfg.RuntimeParams, "keepalives"); value != "" {
		n, err := strconv.Atoi(strings.TrimSpace(value))
		if err != nil {
			return nil, keywordError("keepalives", "allowed 0, 1")
		}
		if n == 0 {
			dialer.KeepAlive, dialer.KeepAliveConfig = -1, net.KeepAliveConfig{}
		}
	}
	userTimeout, err := number("tcp_user_timeout", 0)
	if err != nil {
		return nil, err
	}
	if userTimeout > 0 {
		if setUserTimeout == nil {
			unsupported = append(unsupported, "tcp_user_timeout")
		} else {
			dialer.Control = func(network, _ string, raw syscall.RawConn) (err error) {
				if !strings.HasPrefix(network, "tcp") {
					return nil
				}
				return errors.Join(raw.Control(func(fd uintptr) { err = setUserTimeout(fd, userTimeout) }), err)
			}
		}
	}
	peer := keyword(cfg.RuntimeParams, "requirepeer")
	if peer != "" && peerOf == nil {
		return nil, keywordError("requirepeer", "not supported on this system")
	}
	cfg.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := dialer.DialContext(ctx, network, address)
		if err != nil || peer == "" || network != "unix" {
			return conn, err
		}
		name, err := peerOf(conn)
		if err == nil && name != peer {
			err = fmt.Errorf("requirepeer: the server runs as %s, and must run as %s", name, peer)
		}
		if err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		return conn, nil
	}
	return unsupported, nil
}

var hostKeyword = regexp.MustCompile(`(^|[\s'])host\s*=`)

// withHost gives a connection string that has addresses but no host these as hosts, as libpq does: they are what the
// certificate must be for then.
func withHost(text, addresses string) string {
	if addresses == "" || os.Getenv("PGHOST") != "" {
		return text
	}
	for address := range strings.SplitSeq(addresses, ",") {
		if _, err := netip.ParseAddr(address); err != nil {
			return text // refused later
		}
	}
	if strings.HasPrefix(text, "postgres://") || strings.HasPrefix(text, "postgresql://") {
		u, err := url.Parse(text)
		if err != nil || u.Hostname() != "" || u.Query().Has("host") || u.Query().Has("service") {
			return text
		}
		separator := "?"
		if strings.Contains(text, "?") {
			separator = "&"
		}
		return text + separator + "host=" + url.QueryEscape(addresses)
	}
	if hostKeyword.MatchString(text) || strings.Contains(text, "service") {
		return text
	}
	return text + " host='" + addresses + "'"
}
