package db_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/migrations"
)

// patience bounds what the tests wait for; nothing takes as long unless it is
// broken.
const patience = 30 * time.Second

// logBuffer collects what a DB logs.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func open(t *testing.T, cfg db.Config) (*db.DB, *logBuffer) {
	t.Helper()
	log := new(logBuffer)
	cfg.Logger = slog.New(slog.NewTextHandler(log, nil))
	d, err := db.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d, log
}

func get[T any](t *testing.T, d *db.DB, sql string, args ...any) (v T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := d.QueryRow(ctx, sql, args...).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// await calls fn until it succeeds.
func await(t *testing.T, fn func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := fn(ctx)
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond) // between polls of something outside this process
	}
}

// refused returns an address where nobody listens.
func refused(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// unresolvable is a host that has no address (RFC 2606).
const unresolvable = "no-such-host.invalid:5432"

func TestOpenRefusesMalformed(t *testing.T) {
	const secret = "s3cr3t-pa55word"
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, tt := range []struct {
		name string
		cfg  db.Config
		want string // part of the error
	}{
		{"nothing", db.Config{}, "connection string: empty"},
		{"both", db.Config{ConnString: "postgres://u:" + secret + "@h/d", ConnStringFile: "/f"}, "given twice"},
		{"missing file", db.Config{ConnStringFile: dir + "/missing"}, dir + "/missing: no such file"},
		{"empty file", db.Config{ConnStringFile: write("empty", " \n")}, "empty"},
		{"malformed file", db.Config{ConnStringFile: write("bad", "postgres://u:"+secret+"@h:x/d")}, "file " + dir + "/bad: port: allowed 1 to 65535"},
		{"not a string", db.Config{ConnString: secret}, "expected a URI"},
		{"unencoded at", db.Config{ConnString: "postgres://u:a@" + secret + "@h:5432x/d"}, "percent-encoded"},
		{"unencoded slash", db.Config{ConnString: "postgres://u:" + secret + "/more@h/d"}, "percent-encoded"},
		{"unencoded percent", db.Config{ConnString: "postgres://u:" + secret + "%zz@h/d"}, "not a valid URI"},
		{"unencoded hash and bracket", db.Config{ConnString: "postgres://u:[" + secret + "@h/d"}, ""},
		{"keyword without value", db.Config{ConnString: "host=h password=" + secret + " user"}, "keywords and values"},
		{"password with a space", db.Config{ConnString: "host=h password=my " + secret + " user=u"}, "single quotes"},
		{"unterminated quote", db.Config{ConnString: "host=h password='" + secret}, "keywords and values"},
		{"NUL", db.Config{ConnString: "host=h password=" + secret + "\x00"}, "keywords and values"},
		{"port", db.Config{ConnString: "host=h port=99999 password=" + secret}, "port: allowed 1 to 65535"},
		{"ports", db.Config{ConnString: "host=a,b,c port=1,2 password=" + secret}, "as many ports as hosts"},
		{"target_session_attrs", db.Config{ConnString: "host=h target_session_attrs=writable password=" + secret}, "allowed any, read-write, read-only, primary, standby, prefer-standby"},
		{"sslmode", db.Config{ConnString: "host=h sslmode=on password=" + secret}, "sslmode: allowed disable"},
		{"certificate", db.Config{ConnString: "host=h sslmode=verify-full sslrootcert=/missing.pem password=" + secret}, "/missing.pem"},
		{"service", db.Config{ConnString: "service=nobody servicefile=/missing.conf password=" + secret}, "/missing.conf"},
		{"connect_timeout", db.Config{ConnString: "host=h connect_timeout=fast password=" + secret}, "whole number of seconds"},
		{"pool_max_conns", db.Config{ConnString: "postgres://u:" + secret + "@h/d?pool_max_conns=many"}, "pool_max_conns: allowed"},
		{"pool_max_conns 0", db.Config{ConnString: "postgres://u:" + secret + "@h/d?pool_max_conns=0"}, "pool_max_conns: allowed"},
		{"pool duration", db.Config{ConnString: "postgres://u:" + secret + "@h/d?pool_max_conn_lifetime=1"}, "duration like 30m"},
		{"exec mode", db.Config{ConnString: "postgres://u:" + secret + "@h/d?default_query_exec_mode=fast"}, "allowed cache_statement"},
		{"maximum", db.Config{ConnString: "host=h", MaxConns: -1}, "got -1"},
		{"minimum above maximum", db.Config{ConnString: "host=h", MaxConns: 2, MinConns: 3}, "got 3, allowed 0 to the maximum of connections, 2"},
		{"listener", db.Config{ConnString: "host=h", ListenerConnString: "postgres://u:" + secret + "@h:x/d"}, "listener connection string: port"},
		{"listener file", db.Config{ConnString: "host=h", ListenerConnStringFile: dir + "/gone"}, "listener connection string in file " + dir + "/gone"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, err := db.Open(t.Context(), tt.cfg)
			if err == nil {
				d.Close()
				if tt.want == "" {
					return // pgx takes it for something valid
				}
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %q, want it to hold %q", err, tt.want)
			}
			for e := err; e != nil; e = errors.Unwrap(e) {
				if text := fmt.Sprintf("%s %+v %#v", e, e, e); strings.Contains(text, secret) {
					t.Errorf("the error shows the password: %s", text)
				}
			}
			if pe := (*pgconn.ParseConfigError)(nil); errors.As(err, &pe) {
				t.Error("the error wraps a pgconn.ParseConfigError, which holds the connection string")
			}
		})
	}
}

// An error of a connection attempt must not show the password either.
func TestConnectErrorHidesPassword(t *testing.T) {
	d, log := open(t, db.Config{ConnString: "postgres://u:s3cr3t@" + unresolvable + "," + refused(t) + "/d"})
	_, err := d.Exec(t.Context(), "SELECT 1")
	if err == nil || !db.IsUnavailable(err) || !db.IsRetryable(err) {
		t.Errorf("got %v, want an error that is unavailable and retryable", err)
	}
	if strings.Contains(fmt.Sprintf("%v %+v", err, err), "s3cr3t") || strings.Contains(log.String(), "s3cr3t") {
		t.Errorf("the password is shown: %v\n%s", err, log)
	}
}

func TestConnStringForms(t *testing.T) {
	t.Parallel()
	p := dbtest.Server(t, nil)
	_, port, _ := net.SplitHostPort(p.Addr())
	socket, err := url.Parse(p.SocketConnString())
	if err != nil {
		t.Fatal(err)
	}
	dir := socket.Query().Get("host")
	for name, connString := range map[string]string{
		"URI":                    p.ConnString(),
		"URI, postgresql":        strings.Replace(p.ConnString(), "postgres:", "postgresql:", 1),
		"URI, socket":            p.SocketConnString(),
		"URI, encoded socket":    "postgres://pgbroker@" + url.QueryEscape(dir) + ":" + port + "/pgbroker",
		"keywords":               "host=127.0.0.1 port=" + port + " user=pgbroker password='" + dbtest.Password + "' dbname=pgbroker sslmode=disable",
		"keywords, socket":       "host=" + dir + " port=" + port + " user=pgbroker dbname=pgbroker",
		"keywords, lines":        "host=" + dir + "\nport=" + port + "\nuser=pgbroker\ndbname=pgbroker\n",
		"socket then TCP":        "host=/nowhere," + dir + " port=" + port + " user=pgbroker dbname=pgbroker",
		"sslmode prefer":         strings.Replace(p.ConnString(), "disable", "prefer", 1),
		"pool and session words": p.ConnString() + "&pool_max_conns=3&pool_min_conns=1&statement_timeout=1234&default_query_exec_mode=exec",
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := open(t, db.Config{ConnString: connString})
			if got := get[string](t, d, "SELECT current_database()::text"); got != "pgbroker" {
				t.Errorf("got database %s", got)
			}
			conn, err := d.Listen(t.Context()) // pool settings mean nothing there
			if err != nil {
				t.Fatal(err)
			}
			conn.Close(t.Context())
		})
	}
}

func TestSettings(t *testing.T) {
	t.Parallel()
	p := dbtest.NewEmpty(t)
	with := func(t *testing.T, options string) string {
		t.Helper()
		sep := "?"
		if strings.Contains(p.ConnString, "?") {
			sep = "&"
		}
		return p.ConnString + sep + options
	}
	const settings = `SELECT concat_ws(' ', current_setting('application_name'), current_setting('statement_timeout'),
		current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout'), current_setting('jit'), current_setting('enable_seqscan'))`
	for _, tt := range []struct {
		name string
		cfg  db.Config
		want string
	}{
		{"defaults", db.Config{ConnString: p.ConnString}, "pgbroker 8s 5s 10s off off"},
		{"fields", db.Config{ConnString: p.ConnString, StatementTimeout: time.Second, LockTimeout: time.Microsecond, IdleInTransactionTimeout: -1, ApplicationName: "x"}, "x 1s 1ms 0 off off"},
		{"string wins", db.Config{ConnString: with(t, "statement_timeout=3000&jit=on&application_name=mine"), StatementTimeout: time.Second, ApplicationName: "x"}, "mine 3s 5s 10s on off"},
		{"options win", db.Config{ConnString: with(t, "options=-c%20lock_timeout%3D7s")}, "pgbroker 8s 7s 10s off off"},
		{"pooler", db.Config{ConnString: p.ConnString, Pooler: true}, "pgbroker 8s 5s 10s off off"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, _ := open(t, tt.cfg)
			if got := get[string](t, d, settings); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	t.Run("pool", func(t *testing.T) {
		for _, tt := range []struct {
			name     string
			cfg      db.Config
			max, min int32
			lifetime time.Duration
		}{
			{"defaults", db.Config{ConnString: p.ConnString}, 4, 0, 30 * time.Minute},
			{"fields", db.Config{ConnString: p.ConnString, MaxConns: 7, MinConns: 2}, 7, 2, 30 * time.Minute},
			{"string wins", db.Config{ConnString: with(t, "pool_max_conns=9&pool_min_conns=1&pool_max_conn_lifetime=1h"), MaxConns: 7, MinConns: 2}, 9, 1, time.Hour},
		} {
			d, _ := open(t, tt.cfg)
			got := d.Config()
			if tt.name != "defaults" && got.MaxConns != tt.max || got.MaxConns < tt.max || got.MinConns != tt.min || got.MaxConnLifetime != tt.lifetime {
				t.Errorf("%s: got %d, %d, %v; want %d, %d, %v", tt.name, got.MaxConns, got.MinConns, got.MaxConnLifetime, tt.max, tt.min, tt.lifetime)
			}
		}
	})
}

// A connection string with a name that does not resolve, a host that refuses,
// a standby and the primary leads to the primary.
func TestSeveralHosts(t *testing.T) {
	t.Parallel()
	primary := dbtest.Server(t, nil)
	standby := primary.Standby(nil)
	readOnly := dbtest.Server(t, map[string]string{"default_transaction_read_only": "on"})
	ends := map[string]string{primary.Addr(): "primary", standby.Addr(): "standby", readOnly.Addr(): "read-only"}
	of := func(d *db.DB) string {
		return ends["127.0.0.1:"+get[string](t, d, "SELECT current_setting('port')")]
	}
	all := dbtest.ConnString(unresolvable, refused(t), readOnly.Addr(), standby.Addr(), primary.Addr())

	t.Run("without target_session_attrs", func(t *testing.T) {
		d, log := open(t, db.Config{ConnString: all})
		if got := of(d); got != "primary" {
			t.Errorf("led to the %s", got)
		}
		if _, err := d.Exec(t.Context(), "CREATE TABLE public.written ()"); err != nil {
			t.Error(err)
		}
		conn, err := d.Listen(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		if _, err := conn.Exec(t.Context(), "LISTEN x"); err != nil {
			t.Errorf("the listener is not on the primary: %v", err)
		}
		if n := strings.Count(log.String(), "using read-write"); n != 1 {
			t.Errorf("%d warnings about target_session_attrs, want 1:\n%s", n, log)
		}
	})
	for attrs, want := range map[string]string{
		"any": "read-only", "read-write": "primary", "read-only": "read-only",
		"primary": "read-only", // a primary by role
		"standby": "standby", "prefer-standby": "standby",
	} {
		t.Run(attrs, func(t *testing.T) {
			for _, connString := range []string{
				all + "&target_session_attrs=" + attrs,
				keywords(t, all) + " target_session_attrs = " + attrs,
			} {
				d, log := open(t, db.Config{ConnString: connString})
				if got := of(d); got != want {
					t.Errorf("led to the %s, want the %s", got, want)
				}
				if strings.Contains(log.String(), "using read-write") {
					t.Errorf("warned:\n%s", log)
				}
			}
		})
	}
}

// Without a server that is just what was asked for, one is taken that serves reads and streams, if it is not behind.
func TestNoServerIsJustRight(t *testing.T) {
	t.Parallel()
	primary := dbtest.Server(t, nil)
	standby := primary.Standby(nil)
	readOnly := dbtest.Server(t, map[string]string{"default_transaction_read_only": "on"})
	ends := map[string]string{primary.Addr(): "primary", standby.Addr(): "standby", readOnly.Addr(): "read-only"}
	for _, tt := range []struct {
		attrs string
		hosts []*dbtest.Postgres
		want  string // "": none
	}{
		{"", []*dbtest.Postgres{standby, readOnly}, "read-only"},
		{"read-write", []*dbtest.Postgres{standby, readOnly}, "read-only"},
		{"read-write", []*dbtest.Postgres{readOnly, standby}, "read-only"},
		{"read-write", []*dbtest.Postgres{readOnly, standby, primary}, "primary"},
		{"read-write", []*dbtest.Postgres{readOnly}, "read-only"},
		{"read-write", []*dbtest.Postgres{standby}, ""},
		{"primary", []*dbtest.Postgres{standby}, ""},
		{"standby", []*dbtest.Postgres{primary}, "primary"},
		{"standby", []*dbtest.Postgres{primary, standby}, "standby"},
		{"read-only", []*dbtest.Postgres{primary}, "primary"},
		{"read-only", []*dbtest.Postgres{primary, readOnly}, "read-only"},
		{"prefer-standby", []*dbtest.Postgres{primary}, "primary"},
	} {
		name := tt.attrs
		var addrs []string
		for _, p := range tt.hosts {
			addrs = append(addrs, p.Addr())
			name += " " + ends[p.Addr()]
		}
		t.Run(name, func(t *testing.T) {
			connString := dbtest.ConnString(addrs...)
			if tt.attrs != "" {
				connString += "&target_session_attrs=" + tt.attrs
			}
			d, _ := open(t, db.Config{ConnString: connString})
			if tt.want == "" {
				if _, err := d.Exec(t.Context(), "SELECT 1"); !db.IsUnavailable(err) {
					t.Errorf("got %v", err)
				}
				return
			}
			if got := ends["127.0.0.1:"+get[string](t, d, "SELECT current_setting('port')")]; got != tt.want {
				t.Errorf("led to the %s, want the %s", got, tt.want)
			}
			conn, err := d.Listen(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			conn.Close(t.Context())
		})
	}
}

// A server that is taken for want of a better one passes the fence like any other: here one that was left for its standby.
func TestNoServerIsJustRightBehindTheFence(t *testing.T) {
	t.Parallel()
	old := dbtest.Server(t, nil)
	config, err := pgx.ParseConfig(old.ConnString())
	if err != nil {
		t.Fatal(err)
	}
	if err := migrations.Up(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	next := old.Standby(nil)
	next.CatchUp(old)
	next.Promote()
	for _, attrs := range []string{"prefer-standby", "standby", "read-only"} {
		d, _ := open(t, db.Config{ConnString: dbtest.ConnString(next.Addr(), old.Addr()) + "&target_session_attrs=" + attrs})
		if got := "127.0.0.1:" + get[string](t, d, "SELECT current_setting('port')"); got != next.Addr() {
			t.Errorf("%s led to the server in the past", attrs)
		}
	}
}

func TestTargetSessionAttrsFromEnvironment(t *testing.T) {
	t.Setenv("PGTARGETSESSIONATTRS", "any")
	d, log := open(t, db.Config{ConnString: "postgres://one,two/d"})
	if d.ConnConfig().ValidateConnect != nil || log.String() != "" {
		t.Errorf("any of the environment is not respected:\n%s", log)
	}
	t.Setenv("PGTARGETSESSIONATTRS", "standby")
	d, log = open(t, db.Config{ConnString: "postgres://one,two/d"})
	if d.ConnConfig().ValidateConnect == nil || !strings.Contains(log.String(), "nothing can be revoked") {
		t.Errorf("standby of the environment is not respected, or nobody warned:\n%s", log)
	}
}

// keywords turns a URI of TCP hosts into keywords and values.
func keywords(t *testing.T, uri string) string {
	t.Helper()
	cfg, err := pgx.ParseConfig(uri)
	if err != nil {
		t.Fatal(err)
	}
	hosts, ports := cfg.Host, fmt.Sprint(cfg.Port)
	for _, f := range cfg.Fallbacks {
		hosts += "," + f.Host
		ports += "," + fmt.Sprint(f.Port)
	}
	return fmt.Sprintf("host=%s port=%s user=%s password='%s' dbname=%s sslmode=disable", hosts, ports, cfg.User, cfg.Password, cfg.Database)
}
