package embedded_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	_ "pgbroker/db/dbtest/testenv"
	"pgbroker/db/embedded"
)

// helperEnv makes this test binary start a server and wait to be killed.
const helperEnv = "EMBEDDED_TEST_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		helper()
		return
	}
	goleak.VerifyTestMain(m)
}

// helper prints the process number of the postmaster, the directory and the
// connection string, and waits for the end of its input.
func helper() {
	s, err := embedded.Start(context.Background(), embedded.Config{
		Dir: os.Getenv("DIR"), Ephemeral: os.Getenv(helperEnv) == "ephemeral",
	})
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	fmt.Println(s.PID(), s.Dir(), s.ConnString())
	_, _ = io.Copy(io.Discard, os.Stdin)
	if err := s.Stop(context.Background()); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

// helperProcess is a running helper.
type helperProcess struct {
	cmd        *exec.Cmd
	stdin      io.Closer
	pid        int // of the postmaster
	dir        string
	connString string
}

func startHelper(t *testing.T, kind, dir string, change func(*exec.Cmd)) *helperProcess {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), helperEnv+"="+kind, "DIR="+dir)
	cmd.Stderr = os.Stderr
	if change != nil {
		change(cmd)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h := &helperProcess{cmd: cmd, stdin: stdin}
	t.Cleanup(h.kill)
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if _, scanErr := fmt.Sscan(line, &h.pid, &h.dir, &h.connString); err != nil || scanErr != nil {
		t.Fatalf("the helper says %q (%v)", line, err)
	}
	return h
}

func (h *helperProcess) kill() {
	_ = h.cmd.Process.Kill()
	_ = h.cmd.Wait()
}

// tempDir is t.TempDir for servers, which other users must be able to enter.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "embedded-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func start(t *testing.T, cfg embedded.Config) *embedded.Server {
	t.Helper()
	s, err := embedded.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return s
}

func stop(t *testing.T, s *embedded.Server) {
	t.Helper()
	if err := s.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	if err := s.Err(); err != nil {
		t.Errorf("after Stop: %v", err)
	}
}

func query(t *testing.T, connString, sql string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), connString)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	var v string
	if err := conn.QueryRow(t.Context(), sql).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

func execute(t *testing.T, connString, sql string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), connString)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func awaitGone(t *testing.T, pid int) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for embedded.Alive(pid) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d still runs", pid)
		}
		time.Sleep(10 * time.Millisecond) // not a child: there is no event to wait for
	}
}

// What is stored is there again at the next start; the server can be reached
// as documented and in no other way.
func TestDurable(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(tempDir(t), "a", "b")
	s := start(t, embedded.Config{Dir: dir})
	execute(t, s.ConnString(), "CREATE TABLE kept AS SELECT 'data'::text AS v")
	for name, want := range map[string]string{
		"server_encoding": "UTF8", "lc_collate": "C", "data_checksums": "on", "fsync": "on", "listen_addresses": "",
	} {
		if got := query(t, s.ConnString(), "SHOW "+name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	if s.TCPConnString() != "" {
		t.Error("it listens without being told to")
	}
	info, err := os.Stat(filepath.Join(dir, "postgres"))
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory of the socket is open to others: %v (%v)", info.Mode(), err)
	}
	if psql, err := exec.LookPath("psql"); err == nil {
		out, err := exec.Command(psql, "-XAtc", "SELECT v FROM kept", s.ConnString()).CombinedOutput()
		if string(out) != "data\n" {
			t.Errorf("psql: got %q (%v)", out, err)
		}
	}
	stop(t, s)
	if embedded.Alive(s.PID()) {
		t.Error("the server still runs")
	}
	select {
	case <-s.Done():
	default:
		t.Error("Done is not closed after Stop")
	}

	s = start(t, embedded.Config{Dir: dir, Settings: map[string]string{"work_mem": "7MB"}})
	if got := query(t, s.ConnString(), "SELECT v || ' ' || current_setting('work_mem') FROM kept"); got != "data 7MB" {
		t.Errorf("after a restart: got %q", got)
	}
}

func TestEphemeral(t *testing.T) {
	t.Parallel()
	parent := filepath.Join(tempDir(t), "made")
	s := start(t, embedded.Config{Dir: parent, Ephemeral: true, TCP: true})
	if got := query(t, s.ConnString(), "SELECT concat_ws(' ', current_setting('fsync'), current_setting('synchronous_commit'), current_setting('full_page_writes'))"); got != "off off off" {
		t.Errorf("got %q, want all off", got)
	}
	if got := query(t, s.TCPConnString(), "SELECT host(inet_server_addr())"); got != "127.0.0.1" {
		t.Errorf("TCP: got %q", got)
	}
	// TCP needs the password.
	cfg, err := pgx.ParseConfig(s.TCPConnString())
	if err != nil {
		t.Fatal(err)
	}
	cfg.Password = "wrong"
	if conn, err := pgx.ConnectConfig(t.Context(), cfg); err == nil {
		conn.Close(t.Context())
		t.Error("TCP needs no password")
	}
	stop(t, s)
	if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Errorf("second Stop: %v", err)
	}
}

// A directory has one server.
func TestInUse(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	s := start(t, embedded.Config{Dir: dir})
	_, err := embedded.Start(t.Context(), embedded.Config{Dir: dir})
	if !errors.Is(err, embedded.ErrInUse) || !strings.Contains(err.Error(), strconv.Itoa(os.Getpid())) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v, want that the directory is in use, by whom, and its name", err)
	}
	if got := query(t, s.ConnString(), "SELECT 'alive'"); got != "alive" {
		t.Error("the first server has suffered")
	}
}

// When the server ends by itself the caller learns of it, and can start it
// again.
func TestPostmasterDies(t *testing.T) {
	t.Parallel()
	s := start(t, embedded.Config{Dir: tempDir(t)})
	execute(t, s.ConnString(), "CREATE TABLE kept AS SELECT 'data'::text AS v")
	if err := s.Restart(t.Context()); err == nil {
		t.Error("a running server is restarted")
	}
	if err := syscall.Kill(s.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-s.Done()
	if err := s.Err(); err == nil || !strings.Contains(err.Error(), "killed") || !strings.Contains(err.Error(), s.LogFile()) {
		t.Errorf("got %v, want how it ended and where the log is", err)
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Err(); err != nil {
		t.Errorf("after Restart: %v", err)
	}
	if got := query(t, s.ConnString(), "SELECT v FROM kept"); got != "data" {
		t.Errorf("got %q", got)
	}
}

// When this process is killed, Postgres ends as well, and the next start finds
// everything in order.
func TestParentKilled(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	h := startHelper(t, "durable", dir, nil)
	execute(t, h.connString, "CREATE TABLE kept AS SELECT 'data'::text AS v")
	h.kill()
	// Not awaited: the next start must cope with a server that still runs.
	s := start(t, embedded.Config{Dir: dir})
	if got := query(t, s.ConnString(), "SELECT v FROM kept"); got != "data" {
		t.Errorf("got %q", got)
	}
	if s.PID() == h.pid {
		t.Error("the same postmaster")
	}

	parent := tempDir(t)
	h = startHelper(t, "ephemeral", parent, nil)
	h.kill()
	awaitGone(t, h.pid) // by itself
	if _, err := os.Stat(h.dir); err != nil {
		t.Errorf("the directory should be left behind: %v", err)
	}
	// The next ephemeral start cleans up, but not after the living.
	living := startHelper(t, "ephemeral", parent, nil)
	if _, err := os.Stat(h.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there (%v)", h.dir, err)
	}
	start(t, embedded.Config{Dir: parent, Ephemeral: true})
	if got := query(t, living.connString, "SELECT 'alive'"); got != "alive" {
		t.Error("a living server has suffered")
	}
}

// A postmaster that is still there although its process is gone is stopped.
func TestOrphanIsStopped(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	s := start(t, embedded.Config{Dir: dir})
	execute(t, s.ConnString(), "CREATE TABLE kept AS SELECT 'data'::text AS v")
	// An orphan as kill -9 leaves it where there is no death signal: it runs,
	// and nobody holds the lock.
	orphan := exec.Command("sh", "-c", `"$@" >/dev/null 2>&1 & echo $!`, "sh")
	bin := s.Binaries().Dir
	stop(t, s)
	orphan.Args = append(orphan.Args, filepath.Join(bin, "postgres"), "-D", filepath.Join(dir, "postgres", "data"),
		"-c", "listen_addresses=", "-c", "unix_socket_directories="+filepath.Join(dir, "postgres"))
	orphan.Dir = filepath.Join(dir, "postgres")
	if os.Geteuid() == 0 {
		info, err := os.Stat(filepath.Join(dir, "postgres"))
		if err != nil {
			t.Fatal(err)
		}
		st := info.Sys().(*syscall.Stat_t)
		orphan.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: st.Uid, Gid: st.Gid}}
	}
	out, err := orphan.Output()
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGQUIT); awaitGone(t, pid) })
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		conn, err := pgx.Connect(t.Context(), s.ConnString())
		if err == nil {
			conn.Close(t.Context())
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	s = start(t, embedded.Config{Dir: dir})
	if s.PID() == pid || embedded.Alive(pid) {
		t.Error("the orphan still runs")
	}
	if got := query(t, s.ConnString(), "SELECT v FROM kept"); got != "data" {
		t.Errorf("got %q", got)
	}
}

// The process number of a dead postmaster may belong to another process now.
func TestStalePIDFile(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	s := start(t, embedded.Config{Dir: dir})
	pidFile := filepath.Join(dir, "postgres", "data", "postmaster.pid")
	content, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(s.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-s.Done()
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A process of the user that runs Postgres, which Postgres would respect.
	other := exec.Command("sleep", "600")
	info, err := os.Stat(filepath.Join(dir, "postgres"))
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*syscall.Stat_t); os.Geteuid() == 0 {
		other.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: st.Uid, Gid: st.Gid}}
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Process.Kill(); _ = other.Wait() })
	_, rest, _ := strings.Cut(string(content), "\n")
	if err := os.WriteFile(pidFile, []byte(strconv.Itoa(other.Process.Pid)+"\n"+rest), 0o600); err != nil {
		t.Fatal(err)
	}
	s = start(t, embedded.Config{Dir: dir})
	if got := query(t, s.ConnString(), "SELECT 'alive'"); got != "alive" || !embedded.Alive(other.Process.Pid) {
		t.Error("the other process was harmed")
	}
}

// A path that is too long for a socket.
func TestLongPath(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(tempDir(t), strings.Repeat("long/", 25))
	s := start(t, embedded.Config{Dir: dir})
	if got := query(t, s.ConnString(), "SELECT 'reached'"); got != "reached" {
		t.Error(got)
	}
	cfg, err := pgx.ParseConfig(s.ConnString())
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(cfg.Host)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory of the socket is open to others: %v (%v)", info.Mode(), err)
	}
	stop(t, s)
	if _, err := os.Stat(cfg.Host); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left behind (%v)", cfg.Host, err)
	}
}

// A start that fails says why, and leaves nothing running.
func TestStartFails(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	_, err := embedded.Start(t.Context(), embedded.Config{Dir: dir, Settings: map[string]string{"shared_buffers": "lots"}})
	if err == nil || !strings.Contains(err.Error(), `invalid value for parameter "shared_buffers": "lots"`) {
		t.Errorf("got %v, want what Postgres said", err)
	}
	start(t, embedded.Config{Dir: dir})

	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	parent := tempDir(t)
	_, err = embedded.Start(t.Context(), embedded.Config{Dir: parent, Ephemeral: true, TCP: true, Port: taken.Addr().(*net.TCPAddr).Port})
	if err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("got %v, want that the port is in use", err)
	}
	if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
	if _, err := embedded.Start(t.Context(), embedded.Config{Dir: dir, Port: 70000}); err == nil || !strings.Contains(err.Error(), "allowed 0") {
		t.Errorf("got %v, want the allowed ports", err)
	}
}

// The end of the context ends a start at any moment, and the next one works.
func TestStartCancelled(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	for _, after := range []time.Duration{0, 50 * time.Millisecond, 300 * time.Millisecond, 700 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		s, err := embedded.Start(ctx, embedded.Config{Dir: dir})
		cancel()
		if err == nil {
			stop(t, s) // a fast machine
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %v: got %v, want the end of the context", after, err)
		}
	}
	start(t, embedded.Config{Dir: dir})
}

// Stop waits for no session, and with a context that has ended for nothing.
func TestStop(t *testing.T) {
	t.Parallel()
	for _, ended := range []bool{false, true} {
		s := start(t, embedded.Config{Dir: tempDir(t)})
		conn, err := pgx.Connect(t.Context(), s.ConnString())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background())
		if _, err := conn.Exec(t.Context(), "BEGIN; CREATE TABLE t ()"); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		if ended {
			cancel()
		}
		if err := s.Stop(ctx); err != nil {
			t.Error(err)
		}
		cancel()
		if embedded.Alive(s.PID()) {
			t.Error("the server still runs")
		}
	}
}

// A data directory needs binaries of its version.
func TestOtherMajorVersion(t *testing.T) {
	t.Parallel()
	dir := tempDir(t)
	s := start(t, embedded.Config{Dir: dir})
	stop(t, s)
	if err := os.WriteFile(filepath.Join(dir, "postgres", "data", "PG_VERSION"), []byte("12\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := embedded.Start(t.Context(), embedded.Config{Dir: dir})
	for _, want := range []string{dir, "made by PostgreSQL 12", s.Binaries().Version, "install PostgreSQL 12", "pg_upgrade"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to hold %q", err, want)
		}
	}
}

// fakeBinaries makes a directory of binaries that claim a version.
func fakeBinaries(t *testing.T, dir, version string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"postgres", "initdb"} {
		script := "#!/bin/sh\necho '" + name + " (PostgreSQL) " + version + "'\n"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(embedded.BinEnv, "")
	t.Setenv("PATH", "/usr/bin:/bin")
	for _, version := range []string{"9.6.24", "14.9", "15.3", "17.1 (Debian 17.1-1)", "18beta1"} {
		fakeBinaries(t, filepath.Join(dir, "pg", version, "bin"), version)
	}
	embedded.SetBinDirs(t, dir+"/nowhere/*", dir+"/pg/*/bin")
	find := func() string {
		t.Helper()
		b, err := embedded.Find(t.Context())
		if err != nil {
			return err.Error()
		}
		return fmt.Sprint(b.Major, " ", b.Version)
	}
	if got := find(); got != "18 18beta1" {
		t.Errorf("newest: got %s", got)
	}
	// PATH comes first, also through a link.
	if err := os.MkdirAll(dir+"/path", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(dir+"/pg/15.3/bin/postgres", dir+"/path/postgres"); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+"/path:/usr/bin:/bin")
	if got := find(); got != "15 15.3" {
		t.Errorf("PATH: got %s", got)
	}
	// The variable comes before everything, and is not second-guessed.
	t.Setenv(embedded.BinEnv, dir+"/pg/17.1 (Debian 17.1-1)/bin")
	if got := find(); got != "17 17.1" {
		t.Errorf("%s: got %s", embedded.BinEnv, got)
	}
	t.Setenv(embedded.BinEnv, dir+"/pg/14.9/bin")
	if got := find(); !strings.Contains(got, embedded.BinEnv) || !strings.Contains(got, "need 15 or newer") {
		t.Errorf("%s too old: got %s", embedded.BinEnv, got)
	}
	t.Setenv(embedded.BinEnv, dir+"/missing")
	if got := find(); !strings.Contains(got, dir+"/missing") {
		t.Errorf("%s missing: got %s", embedded.BinEnv, got)
	}
	// Nothing usable: what was searched, what was wrong, what to do.
	t.Setenv(embedded.BinEnv, "")
	t.Setenv("PATH", "/usr/bin:/bin")
	embedded.SetBinDirs(t, dir+"/pg/14*/bin", dir+"/nowhere/*")
	_, err := embedded.Find(t.Context())
	if !errors.Is(err, embedded.ErrNoBinaries) {
		t.Fatalf("got %v, want ErrNoBinaries", err)
	}
	for _, want := range []string{"PATH", dir + "/nowhere/*", "version 14.9", "nstall", embedded.BinEnv} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to hold %q", err, want)
		}
	}
}

func TestDefaultDir(t *testing.T) {
	t.Setenv("HOME", "/home/x")
	t.Setenv("XDG_STATE_HOME", "")
	without := "/home/x/.local/state/pgbroker"
	if os.Geteuid() == 0 {
		without = "/var/lib/pgbroker"
	}
	if got, err := embedded.DefaultDir(); got != without || err != nil {
		t.Errorf("got %s (%v), want %s", got, err, without)
	}
	t.Setenv("XDG_STATE_HOME", "/state") // also for root
	if got, err := embedded.DefaultDir(); got != "/state/pgbroker" || err != nil {
		t.Errorf("got %s (%v)", got, err)
	}
}

// Started by root, Postgres runs as somebody else; a directory that this user
// cannot enter is refused.
func TestRoot(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("for root only")
	}
	s := start(t, embedded.Config{Dir: tempDir(t)})
	info, err := os.Stat("/proc/" + strconv.Itoa(s.PID()))
	if err != nil {
		t.Fatal(err)
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; uid == 0 {
		t.Error("Postgres runs as root")
	}

	closed := filepath.Join(tempDir(t), "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	_, err = embedded.Start(t.Context(), embedded.Config{Dir: filepath.Join(closed, "data")})
	if err == nil || !strings.Contains(err.Error(), "chmod o+x "+closed) {
		t.Errorf("got %v, want what to do about %s", err, closed)
	}
}

// The same for others than root.
func TestNotRoot(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("all other tests are this one")
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Skip(err)
	}
	uid, _ := strconv.Atoi(nobody.Uid)
	gid, _ := strconv.Atoi(nobody.Gid)
	// This binary may lie where nobody but root can get.
	dir := tempDir(t)
	binary, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/helper", binary, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir+"/state", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir+"/state", uid, gid); err != nil {
		t.Fatal(err)
	}
	h := startHelper(t, "durable", "", func(cmd *exec.Cmd) {
		cmd.Path, cmd.Dir = dir+"/helper", dir
		cmd.Env = append(cmd.Env, "XDG_STATE_HOME="+dir+"/state")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	})
	if h.dir != dir+"/state/pgbroker" {
		t.Errorf("got directory %s", h.dir)
	}
	info, err := os.Stat(h.dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the state directory is open to others: %v (%v)", info.Mode(), err)
	}
	if got := query(t, h.connString, "SELECT current_user::text"); got != "pgbroker" {
		t.Errorf("got user %s", got)
	}
	h.stdin.Close()
	if err := h.cmd.Wait(); err != nil {
		t.Error(err)
	}
	if embedded.Alive(h.pid) {
		t.Error("the server still runs")
	}
}
