package db

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// libpq are the keywords of PostgreSQL 15 to 18, by its documentation.
const libpq = `host hostaddr port dbname user password passfile require_auth channel_binding connect_timeout client_encoding options
	application_name fallback_application_name keepalives keepalives_idle keepalives_interval keepalives_count tcp_user_timeout
	replication gssencmode sslmode requiressl sslnegotiation sslcompression sslcert sslkey sslkeylogfile sslpassword sslcertmode
	sslrootcert sslcrl sslcrldir sslsni requirepeer ssl_min_protocol_version ssl_max_protocol_version min_protocol_version
	max_protocol_version krbsrvname gsslib gssdelegation scram_client_key scram_server_key service servicefile target_session_attrs
	load_balance_hosts oauth_issuer oauth_client_id oauth_client_secret oauth_scope authtype tty`

// variables are those of its environment that are about connections and sessions.
const variables = `PGHOST PGHOSTADDR PGPORT PGDATABASE PGUSER PGPASSWORD PGPASSFILE PGREQUIREAUTH PGCHANNELBINDING PGSERVICE PGSERVICEFILE
	PGOPTIONS PGAPPNAME PGSSLMODE PGREQUIRESSL PGSSLNEGOTIATION PGSSLCOMPRESSION PGSSLCERT PGSSLKEY PGSSLCERTMODE PGSSLROOTCERT
	PGSSLCRL PGSSLCRLDIR PGSSLSNI PGREQUIREPEER PGSSLMINPROTOCOLVERSION PGSSLMAXPROTOCOLVERSION PGMINPROTOCOLVERSION
	PGMAXPROTOCOLVERSION PGGSSENCMODE PGKRBSRVNAME PGGSSLIB PGGSSDELEGATION PGCONNECT_TIMEOUT PGCLIENTENCODING PGTARGETSESSIONATTRS
	PGLOADBALANCEHOSTS PGDATESTYLE PGTZ PGGEQO`

// parseText is what becomes of a connection string, and what is logged.
func parseText(text string) (*pgx.ConnConfig, string, error) {
	var log strings.Builder
	s, err := newSource("connection string", text, "", false, Config{}, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		return nil, log.String(), err
	}
	return s.current(), log.String(), nil
}

// Each keyword of libpq is in the table, and does what the table says, in both forms of a connection string, in a service file
// and in the environment. Errors and warnings do not repeat what was given.
func TestKeywords(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name := range strings.FieldsSeq(variables) {
		unset(t, name)
	}
	t.Setenv("HOME", dir)
	type config = *pgx.ConnConfig
	passfile := write("pgpass", "h:*:*:*:from-the-file\n")
	servicefile := write("services", "[here]\nhost=served\nhostaddr=127.0.0.9\nkeepalives_idle=7\n[crl]\nhost=served\nsslcrl=x\n")
	tlsOf := func(c config) *tls.Config { return c.TLSConfig }
	always := func(config) bool { return true }
	tests := map[string][]struct {
		value string
		with  string            // further keywords
		want  func(config) bool // nil: refused
		warns bool
		fails string // part of the error
	}{
		"host": {{value: "other", want: func(c config) bool { return c.Host == "other" }}},
		"hostaddr": {
			{value: "127.0.0.1", want: func(c config) bool { return c.Host == "127.0.0.1" && tlsOf(c).ServerName == "h" }},
			{value: "::1", want: func(c config) bool { return c.Host == "::1" && tlsOf(c).ServerName == "h" }},
			{value: "127.0.0.1,127.0.0.2", with: "host=a,b sslmode=prefer", want: func(c config) bool {
				return c.Host == "127.0.0.1" && len(c.Fallbacks) == 3 && c.Fallbacks[0].Host == "127.0.0.1" && c.Fallbacks[0].TLSConfig == nil &&
					c.Fallbacks[1].Host == "127.0.0.2" && c.Fallbacks[1].TLSConfig.ServerName == "b" && c.Fallbacks[2].Host == "127.0.0.2"
			}},
			{value: ",127.0.0.2", with: "host=a,a port=1,2", want: func(c config) bool {
				return c.Host == "a" && c.Port == 1 && c.Fallbacks[0].Host == "127.0.0.2" && c.Fallbacks[0].Port == 2
			}},
			{value: "127.0.0.1,127.0.0.2", fails: "2 addresses for 1 hosts"},
			{value: "canary", fails: "hostaddr: not an address"},
			{value: "127.0.0.1", with: "host=/tmp", fails: "directory of a socket"},
		},
		"port":   {{value: "77", want: func(c config) bool { return c.Port == 77 }}, {value: "0", fails: "port: allowed"}},
		"dbname": {{value: "other", want: func(c config) bool { return c.Database == "other" }}},
		"user":   {{value: "other", want: func(c config) bool { return c.User == "other" }}},
		"password": {
			{value: "other", want: func(c config) bool { return c.Password == "other" }},
		},
		"passfile":    {{value: passfile, want: func(c config) bool { return c.Password == "from-the-file" }}},
		"service":     {{value: "here", with: "servicefile=" + servicefile, want: func(c config) bool { return c.Host == "127.0.0.9" }}, {value: "crl", with: "servicefile=" + servicefile, fails: "sslcrl: not supported"}, {value: "x", with: "servicefile=" + servicefile, fails: "service"}},
		"servicefile": {{value: servicefile, with: "service=here", want: func(c config) bool { return tlsOf(c).ServerName == "h" }}, {value: dir + "/none", with: "service=here", fails: "service"}},
		"connect_timeout": {
			{value: "7", want: func(c config) bool { return c.ConnectTimeout == 7*time.Second }},
			{value: "0", want: func(c config) bool { return c.ConnectTimeout == defaultConnectTimeout }},
			{value: "canary", fails: "connect_timeout: allowed"},
		},
		"target_session_attrs": {{value: "primary", want: func(c config) bool { return c.ValidateConnect != nil }}, {value: "canary", fails: "target_session_attrs: allowed"}},
		"load_balance_hosts": {
			{value: "disable", want: always}, {value: "canary", fails: "load_balance_hosts: allowed disable, random"},
			{value: "random", with: "host=a,b,c sslmode=prefer", want: func(c config) bool {
				first := map[string]bool{}
				for range 200 {
					other, _, err := parseText("host=a,b,c sslmode=prefer load_balance_hosts=random")
					if err != nil || len(other.Fallbacks) != 5 || other.TLSConfig == nil || other.Fallbacks[0].TLSConfig != nil || other.Fallbacks[0].Host != other.Host {
						return false
					}
					first[other.Host] = true
				}
				return len(first) == 3
			}},
		},
		"application_name":          {{value: "mine", want: func(c config) bool { return c.RuntimeParams["application_name"] == "mine" }}},
		"fallback_application_name": {{value: "mine", want: func(c config) bool { return c.RuntimeParams["application_name"] == "mine" }}, {value: "mine", with: "application_name=other", want: func(c config) bool { return c.RuntimeParams["application_name"] == "other" }}},
		"options":                   {{value: "-cgeqo=off", want: func(c config) bool { return c.RuntimeParams["options"] == "-cgeqo=off" }}},
		"client_encoding": {
			{value: "auto", want: func(c config) bool { return c.RuntimeParams["client_encoding"] == "UTF8" }},
			{value: "utf-8", want: func(c config) bool { return c.RuntimeParams["client_encoding"] == "UTF8" }},
			{value: "LATIN1", want: func(c config) bool { return c.RuntimeParams["client_encoding"] == "UTF8" }, warns: true},
		},
		"keepalives":               {{value: "0", want: always}, {value: "1", want: always}, {value: "canary", fails: "keepalives: allowed"}}, // TestDialing
		"keepalives_idle":          {{value: "7", want: always}, {value: "canary", fails: "keepalives_idle: allowed"}},
		"keepalives_interval":      {{value: "7", want: always}, {value: "canary", fails: "keepalives_interval: allowed"}},
		"keepalives_count":         {{value: "7", want: always}, {value: "canary", fails: "keepalives_count: allowed"}},
		"tcp_user_timeout":         {{value: "7000", want: always, warns: setUserTimeout == nil}, {value: "canary", fails: "tcp_user_timeout: allowed"}},
		"sslmode":                  {{value: "disable", want: func(c config) bool { return tlsOf(c) == nil }}, {value: "canary", fails: "sslmode: allowed"}},
		"sslnegotiation":           {{value: "direct", with: "sslmode=require", want: func(c config) bool { return c.SSLNegotiation == "direct" }}, {value: "postgres", want: always}, {value: "canary", fails: "sslnegotiation: allowed"}, {value: "direct", with: "sslmode=allow", fails: "sslnegotiation: direct needs"}},
		"sslrootcert":              {{value: "system", want: func(c config) bool { return !tlsOf(c).InsecureSkipVerify && tlsOf(c).RootCAs != nil }}, {value: dir + "/none", fails: "CA file"}},
		"sslcert":                  {{value: dir + "/none", with: "sslkey=" + dir + "/none", fails: "sslkey"}}, // TestTLS
		"sslkey":                   {{value: dir + "/none", with: "sslcert=" + dir + "/none", fails: "sslkey"}},
		"sslpassword":              {{value: "canary", want: always}},
		"sslcertmode":              {{value: "disable", want: func(c config) bool { return c.SSLCertMode == "disable" }}, {value: "canary", fails: "sslcertmode: allowed"}},
		"sslsni":                   {{value: "0", want: func(c config) bool { return tlsOf(c).ServerName == "" }}},
		"ssl_min_protocol_version": {{value: "TLSv1.3", want: func(c config) bool { return tlsOf(c).MinVersion == tls.VersionTLS13 }}, {value: "tlsv1", want: func(c config) bool { return tlsOf(c).MinVersion == tls.VersionTLS10 }}, {value: "canary", fails: "ssl_min_protocol_version: allowed"}},
		"ssl_max_protocol_version": {{value: "TLSv1.2", want: func(c config) bool {
			return tlsOf(c).MaxVersion == tls.VersionTLS12 && tlsOf(c).MinVersion == tls.VersionTLS12
		}}, {value: "TLSv1.1", fails: "at least ssl_min_protocol_version"}, {value: "canary", fails: "ssl_max_protocol_version: allowed"}},
		"sslcrl":               {{value: "canary", fails: "sslcrl: not supported"}},
		"sslcrldir":            {{value: "canary", fails: "sslcrldir: not supported"}},
		"sslcompression":       {{value: "0", want: always}, {value: "1", want: always, warns: true}},
		"sslkeylogfile":        {{value: "canary", want: always, warns: true}},
		"requiressl":           {{value: "0", want: always}, {value: "1", fails: "requiressl: not supported: of libpq before 10: say `sslmode=require`"}},
		"requirepeer":          {{value: "somebody", want: always}}, // TestDialing
		"require_auth":         {{value: "scram-sha-256", want: func(c config) bool { return c.RequireAuth == "scram-sha-256" }}, {value: "canary", fails: "require_auth"}},
		"channel_binding":      {{value: "require", want: func(c config) bool { return c.ChannelBinding == "require" }}, {value: "canary", fails: "channel_binding: allowed"}},
		"min_protocol_version": {{value: "3.2", want: func(c config) bool { return c.MinProtocolVersion == "3.2" }}, {value: "canary", fails: "min_protocol_version: allowed"}},
		"max_protocol_version": {{value: "3.2", want: func(c config) bool { return c.MaxProtocolVersion == "3.2" }}, {value: "canary", fails: "max_protocol_version: allowed"}},
		"gssencmode":           {{value: "prefer", want: always}, {value: "disable", want: always}, {value: "require", fails: "gssencmode: not supported"}},
		"krbsrvname":           {{value: "canary", want: always, warns: true}},
		"gsslib":               {{value: "canary", want: always, warns: true}},
		"gssdelegation":        {{value: "0", want: always}, {value: "1", want: always, warns: true}},
		"scram_client_key":     {{value: "canary", fails: "scram_client_key: not supported: give the password"}},
		"scram_server_key":     {{value: "canary", fails: "scram_server_key: not supported"}},
		"oauth_issuer":         {{value: "canary", fails: "oauth_issuer: not supported"}},
		"oauth_client_id":      {{value: "canary", fails: "oauth_client_id: not supported"}},
		"oauth_client_secret":  {{value: "canary", fails: "oauth_client_secret: not supported"}},
		"oauth_scope":          {{value: "canary", fails: "oauth_scope: not supported"}},
		"replication":          {{value: "off", want: always}, {value: "database", fails: "replication: not supported"}, {value: "true", fails: "replication: not supported"}},
		"authtype":             {{value: "canary", want: always, warns: true}},
		"tty":                  {{value: "canary", want: always, warns: true}},
		"PGTZ":                 {{value: "UTC", want: always}, {value: "Asia/Tokyo", want: func(c config) bool { return c.RuntimeParams["TimeZone"] == "UTC" }, warns: true}},
		"PGDATESTYLE":          {{value: "German", want: func(c config) bool { return c.RuntimeParams["DateStyle"] == "ISO, MDY" }}},
		"PGGEQO":               {{value: "off", want: always}},
	}

	var names, env []string
	for _, k := range Keywords() {
		if k.Name != "" {
			names = append(names, k.Name)
		}
		if k.Env != "" {
			env = append(env, k.Env)
		}
		if len(tests[k.Name+strings.Repeat(k.Env, 1-min(1, len(k.Name)))]) == 0 {
			t.Errorf("%s %s is not tested", k.Name, k.Env)
		}
	}
	for _, pair := range []struct {
		have []string
		want string
	}{{names, libpq}, {env, variables}} {
		want := strings.Fields(pair.want)
		slices.Sort(want)
		slices.Sort(pair.have)
		if !slices.Equal(pair.have, want) {
			t.Errorf("the table has\n%v, want\n%v", pair.have, want)
		}
	}

	quote := strings.NewReplacer("'", `\'`, `\`, `\\`)
	for _, k := range Keywords() {
		for _, tt := range tests[k.Name+strings.Repeat(k.Env, 1-min(1, len(k.Name)))] {
			rest := tt.with
			for _, pair := range []string{"host=h", "user=u", "sslmode=require"} {
				if key, _, _ := strings.Cut(pair, "="); key != k.Name && !strings.Contains(rest, key+"=") {
					rest = strings.TrimSpace(rest + " " + pair)
				}
			}
			if k.Name == "service" {
				rest = strings.TrimSpace(strings.ReplaceAll(rest, "host=h", ""))
			}
			check := func(form, text string) {
				t.Helper()
				cfg, log, err := parseText(text)
				if strings.Contains(fmt.Sprint(err, log), "canary") {
					t.Errorf("%s: the value is shown: %v %s", form, err, log)
				}
				fails := tt.fails
				if form == "environment" && k.Kind == Refused {
					fails = strings.Replace(fails, k.Name, k.Env, 1)
				}
				switch {
				case tt.want == nil && (err == nil || !strings.Contains(err.Error(), fails)):
					t.Errorf("%s: %s: got %v, want an error with %q", form, text, err, fails)
				case tt.want == nil:
				case err != nil:
					t.Errorf("%s: %s: %v", form, text, err)
				case !tt.want(cfg):
					t.Errorf("%s: %s means something else", form, text)
				case warnings(log) != map[bool]int{true: 1}[tt.warns]:
					t.Errorf("%s: %s: warned with %q, want a warning: %t", form, text, log, tt.warns)
				}
				if cfg != nil {
					for name := range cfg.RuntimeParams {
						if slices.Contains(names, name) && !slices.Contains([]string{"options", "application_name", "client_encoding"}, name) {
							t.Errorf("%s: %s: %s is sent to the server", form, text, name)
						}
					}
				}
			}
			if k.Name != "" {
				check("keywords", rest+" "+k.Name+"='"+quote.Replace(tt.value)+"'")
				uri := "postgres:///?"
				for pair := range strings.FieldsSeq(rest) {
					uri += pair + "&"
				}
				value := ""
				for _, b := range []byte(tt.value) {
					value += fmt.Sprintf("%%%02X", b)
				}
				check("URI", uri+k.Name+"="+value)
			}
			if k.Name != "" && k.Name != "service" && k.Name != "servicefile" && !strings.Contains(tt.with, "service") {
				path := write("service-of-one", "[one]\n"+strings.ReplaceAll(rest, " ", "\n")+"\n"+k.Name+"="+tt.value+"\n")
				check("service", "service=one servicefile="+path)
			}
			if k.Env != "" {
				t.Setenv(k.Env, tt.value)
				check("environment", rest)
				unset(t, k.Env)
			}
		}
	}
}

// warnings counts those about keywords and settings.
func warnings(log string) int {
	return strings.Count(log, "level=WARN") - strings.Count(log, "using read-write") - strings.Count(log, "takes no writes")
}

// unset takes a variable out of the environment until the end of the test.
func unset(t *testing.T, name string) {
	t.Helper()
	t.Setenv(name, "") // sees to its return
	if err := os.Unsetenv(name); err != nil {
		t.Fatal(err)
	}
}

// An address without a host is what the certificate must be for.
func TestAddressWithoutHost(t *testing.T) {
	for _, text := range []string{
		"postgres://u@/d?hostaddr=127.0.0.1&sslmode=verify-full", "postgres://u@:5432/d?sslmode=verify-full&hostaddr=127.0.0.1",
		"hostaddr=127.0.0.1 user=u sslmode=verify-full",
	} {
		cfg, _, err := parseText(text)
		if err != nil || cfg.Host != "127.0.0.1" || cfg.Port != 5432 || cfg.TLSConfig == nil || cfg.TLSConfig.ServerName != "127.0.0.1" {
			t.Errorf("%s: got %+v, %v", text, cfg, err)
		}
	}
}

// dialed opens a connection to a listener of the test as a connection string says.
func dialed(t *testing.T, network, address, text string) (net.Conn, error) {
	t.Helper()
	cfg, _, err := parseText(text)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := cfg.DialFunc(ctx, network, address)
	if err == nil {
		t.Cleanup(func() { conn.Close() })
	}
	return conn, err
}
