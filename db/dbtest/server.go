package dbtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"pgbroker/db/embedded"
)

// Password is the password of OwnerRole, and of the superuser, on every server
// that Server starts, so that one connection string can name several of them.
const Password = "dbtest-password"

// Postgres is a server of one test, to be stopped and killed at will. Unlike
// one for databases, it commits synchronously: what it has acknowledged
// survives Kill.
type Postgres struct {
	t      testing.TB
	server *embedded.Server
	frozen []int // processes
}

// Server starts a private server with further settings, which may be nil. It
// listens on a port of 127.0.0.1, which stays the same through restarts, and on
// a socket. It is removed when the test ends. Its database pgbroker is empty and
// belongs to OwnerRole, which is no superuser.
//
// The test is skipped, or failed if CI=true, when there are no server binaries.
func Server(t testing.TB, settings map[string]string) *Postgres {
	t.Helper()
	return ServerIn(t, "", settings)
}

// ServerIn is Server with its files below a directory that others can enter;
// "" is the usual one.
func ServerIn(t testing.TB, dir string, settings map[string]string) *Postgres {
	t.Helper()
	return start(t, embedded.Config{Dir: dir, Settings: settings})
}

// Standby starts a streaming standby of the server.
func (p *Postgres) Standby(settings map[string]string) *Postgres {
	p.t.Helper()
	return start(p.t, embedded.Config{Settings: settings, StandbyOf: p.SocketConnString()})
}

func start(t testing.TB, cfg embedded.Config) *Postgres {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := embedded.Find(ctx); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("dbtest: %v", err)
		}
		t.Skipf("dbtest: %v", err)
	}
	cfg.Ephemeral, cfg.TCP = true, true
	settings := map[string]string{
		"synchronous_commit": "on", "max_locks_per_transaction": "256",
		"max_standby_streaming_delay": "-1",    // queries here are short: replay waits for them
		"wal_retrieve_retry_interval": "100ms", // a promotion may wait for its end
	}
	maps.Copy(settings, cfg.Settings)
	cfg.Settings = settings
	server, err := embedded.Start(ctx, cfg)
	if err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	p := &Postgres{t: t, server: server}
	t.Cleanup(func() {
		if t.Failed() {
			if text, err := os.ReadFile(server.LogFile()); err == nil {
				lines := strings.Split(strings.TrimSpace(string(text)), "\n")
				t.Logf("dbtest: the log of the server on port %d ends with:\n%s", server.Port(),
					strings.Join(lines[max(0, len(lines)-30):], "\n"))
			}
		}
		if err := server.Stop(context.Background()); err != nil {
			t.Errorf("dbtest: %v", err)
		}
	})
	if cfg.StandbyOf == "" { // a standby has it from its primary
		p.Exec("ALTER USER " + embedded.User + " PASSWORD '" + Password + "'")
		p.Exec("CREATE ROLE " + OwnerRole + " LOGIN PASSWORD '" + Password + "'")
		p.Exec("ALTER DATABASE " + embedded.Database + " OWNER TO " + OwnerRole)
	}
	return p
}

// Addr returns the address of the server, 127.0.0.1 and its port.
func (p *Postgres) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(p.server.Port())) }

// ConnString returns the connection string of the server over TCP, as
// OwnerRole.
func (p *Postgres) ConnString() string { return ConnString(p.Addr()) }

// SocketConnString returns the connection string of the server over its
// socket, as the superuser.
func (p *Postgres) SocketConnString() string { return p.server.ConnString() }

// Dir returns the directory of the server's files, which belongs to the user
// that it runs as.
func (p *Postgres) Dir() string { return filepath.Join(p.server.Dir(), "postgres") }

// LogFile returns the path of the server's log.
func (p *Postgres) LogFile() string { return p.server.LogFile() }

// PID returns the process of the postmaster, the parent of all others.
func (p *Postgres) PID() int { return p.server.PID() }

// Done is closed when the postmaster has ended, until Restart.
func (p *Postgres) Done() <-chan struct{} { return p.server.Done() }

// As returns the connection string of the server over its socket for another
// role.
func (p *Postgres) As(role string) string {
	connString, err := with(p.SocketConnString(), embedded.Database, role)
	if err != nil {
		p.t.Fatalf("dbtest: %v", err)
	}
	return connString
}

// ConnString returns a connection string that names several addresses, of
// servers that Server has started or of nobody, in the given order, as
// OwnerRole.
func ConnString(addrs ...string) string {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(OwnerRole, Password),
		Host: strings.Join(addrs, ","), Path: "/" + embedded.Database, RawQuery: "sslmode=disable",
	}
	return u.String()
}

// Stop shuts the server down as an operator would. Its data stay for Restart.
func (p *Postgres) Stop() {
	p.t.Helper()
	p.end(syscall.SIGINT)
}

// Kill kills the server as the kernel would that is out of memory. Its
// sessions end within moments by themselves, and its data stay for Restart.
func (p *Postgres) Kill() {
	p.t.Helper()
	p.end(syscall.SIGKILL)
}

func (p *Postgres) end(sig syscall.Signal) {
	p.t.Helper()
	if err := syscall.Kill(p.server.PID(), sig); err != nil {
		p.t.Fatalf("dbtest: end the server on %s: %v", p.Addr(), err)
	}
	select {
	case <-p.server.Done():
	case <-time.After(patience):
		p.t.Fatalf("dbtest: the server on %s does not end", p.Addr())
	}
}

// Restart starts the server again after Stop or Kill, at the same address.
func (p *Postgres) Restart() {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := p.server.Restart(ctx); err != nil {
		p.t.Fatalf("dbtest: %v", err)
	}
}

// Freeze makes the server stand still, with all its sessions, as a machine
// does that has other things to do. Thaw must follow.
func (p *Postgres) Freeze() {
	p.t.Helper()
	p.frozen = []int{p.PID()}
	if err := syscall.Kill(p.PID(), syscall.SIGSTOP); err != nil { // first: it starts no others
		p.t.Fatalf("dbtest: freeze the server on %s: %v", p.Addr(), err)
	}
	path := fmt.Sprintf("/proc/%d/task/%d/children", p.PID(), p.PID())
	list, err := os.ReadFile(path)
	if err != nil {
		p.Thaw()
		p.t.Skipf("dbtest: the sessions of a server are found in %s: %v", path, err)
	}
	for child := range strings.FieldsSeq(string(list)) {
		pid, err := strconv.Atoi(child)
		if err == nil && syscall.Kill(pid, syscall.SIGSTOP) == nil {
			p.frozen = append(p.frozen, pid)
		}
	}
}

// Thaw ends Freeze.
func (p *Postgres) Thaw() {
	p.t.Helper()
	for _, pid := range p.frozen {
		_ = syscall.Kill(pid, syscall.SIGCONT) // it may have ended
	}
	p.frozen = nil
}

// Promote makes a standby a primary, on a new timeline, and returns when it
// takes writes.
func (p *Postgres) Promote() {
	p.t.Helper()
	p.Exec("SELECT pg_promote(true, 60)")
}

// Detach makes a standby stop receiving from its primary: what is committed
// there from now on it does not have.
func (p *Postgres) Detach() {
	p.t.Helper()
	p.Exec("ALTER SYSTEM SET primary_conninfo = ''")
	p.Exec("SELECT pg_reload_conf()")
	p.await("the standby to be detached", "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver) FROM pg_sleep(0.01)")
}

// Follow starts a server that was stopped as a standby of another one. What it
// has must be part of what the other one has, as after Stop.
func (p *Postgres) Follow(primary *Postgres) {
	p.t.Helper()
	data := filepath.Join(p.Dir(), "data")
	settings, err := os.OpenFile(filepath.Join(data, "postgresql.auto.conf"), os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = fmt.Fprintf(settings, "primary_conninfo = '%s'\n", primary.SocketConnString())
		err = errors.Join(err, settings.Close())
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(data, "standby.signal"), nil, 0o644)
	}
	if err != nil {
		p.t.Fatalf("dbtest: make a standby: %v", err)
	}
	p.Restart()
}

// Dump writes the database into a new file, as pg_dump does for its owner, and
// returns its path.
func (p *Postgres) Dump() string {
	p.t.Helper()
	path := filepath.Join(p.t.TempDir(), "dump")
	p.run("pg_dump", "--format=custom", "--file="+path, "--dbname="+p.As(OwnerRole))
	return path
}

// Load restores a dump into the empty database, as pg_restore does for its
// owner, in one transaction: nobody sees half of it.
func (p *Postgres) Load(dump string, options ...string) {
	p.t.Helper()
	p.run("pg_restore", append(options, "--single-transaction", "--dbname="+p.As(OwnerRole), dump)...)
}

func (p *Postgres) run(tool string, args ...string) {
	p.t.Helper()
	cmd := exec.Command(filepath.Join(p.server.Binaries().Dir, tool), args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		p.t.Fatalf("dbtest: %s: %v\n%s", tool, err, out)
	}
}

// CatchUp returns when the standby has replayed all that the primary has
// committed so far.
func (p *Postgres) CatchUp(primary *Postgres) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn := primary.connect(ctx)
	defer conn.Close(ctx)
	var lsn string
	if err := conn.QueryRow(ctx, "SELECT pg_current_wal_lsn()::text").Scan(&lsn); err != nil {
		p.t.Fatalf("dbtest: wait for the standby: %v", err)
	}
	p.await("the standby to catch up", "SELECT pg_last_wal_replay_lsn() >= '"+lsn+"' FROM pg_sleep(0.01)")
}

// await repeats a query until its result is true. Postgres tells nobody when
// replication gets somewhere.
func (p *Postgres) await(what, sql string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn := p.connect(ctx)
	defer conn.Close(ctx)
	for done := false; !done; {
		if err := conn.QueryRow(ctx, sql).Scan(&done); err != nil {
			p.t.Fatalf("dbtest: wait for %s: %v", what, err)
		}
	}
}

// Exec runs statements on the server's database.
func (p *Postgres) Exec(sql string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn := p.connect(ctx)
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, sql); err != nil {
		p.t.Fatalf("dbtest: %s: %v", sql, err)
	}
}

func (p *Postgres) connect(ctx context.Context) *pgx.Conn {
	p.t.Helper()
	cfg, err := pgx.ParseConfig(p.SocketConnString())
	if err != nil {
		p.t.Fatalf("dbtest: %v", err)
	}
	cfg.RuntimeParams["default_transaction_read_only"] = "off" // whatever the settings say
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		p.t.Fatalf("dbtest: %v", err)
	}
	return conn
}
