package dbtest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// poolerAdmin is the user of a PgBouncer's console.
const poolerAdmin = "pooler_admin"

// PgBouncer is a running pooler of one test.
type PgBouncer struct {
	t       testing.TB
	program string
	dir     string
	port    int
	target  *pgx.ConnConfig
	cred    *syscall.Credential
	process *exec.Cmd
	output  *poolerOutput
	ended   chan struct{}
}

type poolerOutput struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

// Write implements io.Writer.
func (o *poolerOutput) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *poolerOutput) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// StartPgBouncer starts a PgBouncer with further settings before the server that a connection string leads to, as
// the user who runs servers. It ends with the test.
//
// The test is skipped, or failed if CI=true, when the program is not there.
func StartPgBouncer(t testing.TB, connString string, settings map[string]string) *PgBouncer {
	t.Helper()
	program := findPgBouncer(t)
	target, err := pgx.ParseConfig(connString)
	if err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	port := free.Addr().(*net.TCPAddr).Port
	free.Close()

	dir, err := os.MkdirTemp("", "pgbroker-pgbouncer-") // not below t.TempDir, which others cannot enter
	if err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	b := &PgBouncer{t: t, program: program, dir: dir, port: port, target: target, output: new(poolerOutput)}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b.cred = unprivileged(t)
	if b.cred != nil {
		if err := os.Chown(dir, int(b.cred.Uid), int(b.cred.Gid)); err != nil {
			t.Fatalf("dbtest: %v", err)
		}
	}
	users := fmt.Sprintf("%q %q\n%q %q\n", target.User, target.Password, poolerAdmin, "")
	if err := os.WriteFile(b.path("users"), []byte(users), 0o644); err != nil {
		t.Fatalf("dbtest: %v", err)
	}
	b.configure(settings)
	b.Start()
	t.Cleanup(func() {
		b.Stop()
		if t.Failed() {
			t.Logf("dbtest: PgBouncer said:\n%s", b.output)
		}
	})
	return b
}

func (b *PgBouncer) path(name string) string { return filepath.Join(b.dir, name) }

// configure writes the configuration file.
func (b *PgBouncer) configure(settings map[string]string) {
	b.t.Helper()
	var text strings.Builder
	fmt.Fprintf(&text, "[databases]\n* = host=%s port=%d\n[pgbouncer]\n", b.target.Host, b.target.Port)
	fmt.Fprintf(&text, "listen_addr = 127.0.0.1\nlisten_port = %d\nunix_socket_dir =\nauth_type = trust\nauth_file = %s\n", b.port, b.path("users"))
	fmt.Fprintf(&text, "admin_users = %s\nserver_login_retry = 1\nlogfile =\n", poolerAdmin)
	for name, value := range settings {
		fmt.Fprintf(&text, "%s = %s\n", name, value)
	}
	if err := os.WriteFile(b.path("pgbouncer.ini"), []byte(text.String()), 0o644); err != nil {
		b.t.Fatalf("dbtest: %v", err)
	}
}

// Lead makes it lead to another server, with the same users, without a word to its clients.
func (b *PgBouncer) Lead(connString string, settings map[string]string) {
	b.t.Helper()
	target, err := pgx.ParseConfig(connString)
	if err != nil {
		b.t.Fatalf("dbtest: %v", err)
	}
	b.target = target
	b.Reload(settings)
}

// Reload changes its settings while it runs.
func (b *PgBouncer) Reload(settings map[string]string) {
	b.t.Helper()
	b.configure(settings)
	b.console("RELOAD")
}

// Start starts it again after Stop or Kill, at the same address.
func (b *PgBouncer) Start() {
	b.t.Helper()
	cmd := exec.Command(b.program, "-q", b.path("pgbouncer.ini"))
	cmd.Stdout, cmd.Stderr = b.output, b.output
	cmd.Dir = b.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: b.cred}
	endWithTest(cmd.SysProcAttr)
	if err := cmd.Start(); err != nil {
		b.t.Fatalf("dbtest: start PgBouncer: %v", err)
	}
	b.process, b.ended = cmd, make(chan struct{})
	go func() {
		defer close(b.ended)
		_ = cmd.Wait() // how it ends is for whoever ends it
	}()
	for deadline := time.Now().Add(patience); ; {
		conn, err := net.Dial("tcp", b.Addr())
		if err == nil {
			conn.Close()
			return
		}
		select {
		case <-b.ended:
			b.t.Fatalf("dbtest: PgBouncer ended at once:\n%s", b.output)
		case <-time.After(10 * time.Millisecond): // it tells nobody when it is ready
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("dbtest: PgBouncer does not listen: %v\n%s", err, b.output)
		}
	}
}

// Stop ends it at once, with all connections.
func (b *PgBouncer) Stop() { b.end(syscall.SIGTERM) }

// Kill kills it.
func (b *PgBouncer) Kill() { b.end(syscall.SIGKILL) }

func (b *PgBouncer) end(sig syscall.Signal) {
	b.t.Helper()
	_ = b.process.Process.Signal(sig) // it may have ended
	select {
	case <-b.ended:
	case <-time.After(patience):
		b.t.Errorf("dbtest: PgBouncer does not end")
	}
}

// Addr returns its address.
func (b *PgBouncer) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(b.port)) }

// ConnString returns the connection string of the database through it.
func (b *PgBouncer) ConnString() string {
	u := url.URL{Scheme: "postgres", User: url.User(b.target.User), Host: b.Addr(), Path: "/" + b.target.Database, RawQuery: "sslmode=disable"}
	return u.String()
}

// Pause makes it hold back everything; it returns when what was under way has ended.
func (b *PgBouncer) Pause() { b.t.Helper(); b.console("PAUSE") }

// Resume ends Pause.
func (b *PgBouncer) Resume() { b.t.Helper(); b.console("RESUME") }

// console runs a command of its console.
func (b *PgBouncer) console(command string) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cfg, err := pgx.ParseConfig("postgres://" + poolerAdmin + "@" + b.Addr() + "/pgbouncer?sslmode=disable")
	if err != nil {
		b.t.Fatalf("dbtest: %v", err)
	}
	cfg.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		b.t.Fatalf("dbtest: console of PgBouncer: %v", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, command); err != nil {
		b.t.Fatalf("dbtest: %s: %v", command, err)
	}
}

var pgBouncerVersion = regexp.MustCompile(`PgBouncer (\d+)\.(\d+)`)

// PgBouncerPrepares reports whether the PgBouncer of this machine can keep prepared statements in transaction mode,
// by max_prepared_statements: 1.21 and newer.
func PgBouncerPrepares(t testing.TB) bool {
	t.Helper()
	out, err := exec.Command(findPgBouncer(t), "--version").Output()
	if err != nil {
		t.Fatalf("dbtest: version of PgBouncer: %v", err)
	}
	m := pgBouncerVersion.FindSubmatch(out)
	if m == nil {
		t.Fatalf("dbtest: version of PgBouncer: got %q", out)
	}
	major, _ := strconv.Atoi(string(m[1]))
	minor, _ := strconv.Atoi(string(m[2]))
	return major > 1 || minor >= 21
}

// findPgBouncer returns the program; packages put it where only root looks.
func findPgBouncer(t testing.TB) string {
	t.Helper()
	for _, name := range []string{"pgbouncer", "/usr/sbin/pgbouncer", "/usr/local/bin/pgbouncer", "/opt/homebrew/bin/pgbouncer"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("dbtest: PgBouncer is not on this machine; .ci/need pgbouncer installs it")
	}
	t.Skip("dbtest: PgBouncer is not on this machine; .ci/need pgbouncer installs it")
	return ""
}

// unprivileged returns the user that runs what refuses to run as root, nil for the present one.
func unprivileged(t testing.TB) *syscall.Credential {
	t.Helper()
	if os.Geteuid() != 0 {
		return nil
	}
	for _, name := range []string{"postgres", "_postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err1 == nil && err2 == nil && uid != 0 {
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		}
	}
	t.Fatal("dbtest: neither a user postgres nor a user nobody")
	return nil
}
