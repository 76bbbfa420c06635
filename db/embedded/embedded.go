// Package embedded runs a private PostgreSQL server from the binaries that are
// installed on this machine. It is what `pgbroker serve` uses when it is given
// no connection string, and what the tests run on.
//
// The server is private: its socket lies in a directory that only its own user
// can enter, and it listens on no network address unless told so. It lives as
// long as this process: Stop ends it, and when this process is killed the
// kernel asks Postgres to shut down (on Linux; elsewhere the next Start on the
// same directory stops what was left behind).
//
// Everything lies in one directory:
//
//	DIR/postgres.lock         held by the process that runs the server
//	DIR/postgres/data/        the data directory of PostgreSQL
//	DIR/postgres/postgres.log what the server says
//	DIR/postgres/.s.PGSQL.*   its socket, unless the path is too long for one
//
// Started by root, Postgres runs as the user postgres (or nobody), since it
// refuses to run as root; DIR/postgres then belongs to that user, and root follows
// nothing that this user could have put there (files.go).
package embedded

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	// User is the superuser of an embedded server, and Database its database.
	User     = "pgbroker"
	Database = "pgbroker"

	homeName    = "postgres"
	dataName    = "data"
	logName     = "postgres.log"
	defaultPort = 5432

	// maxLog is the size from which the log is set aside at the next start.
	maxLog = 8 << 20
)

// Config says which server to start. The zero value is the production default:
// a durable server in DefaultDir, reachable only through its socket.
type Config struct {
	// Dir is the directory that holds the server and all of its data; it is
	// created when missing. Empty: DefaultDir. For an ephemeral server it is
	// the directory in which the temporary one is made; empty: os.TempDir.
	Dir string

	// Ephemeral makes a server in a new temporary directory, fast because
	// nothing is forced to disk, that Stop removes with all its data.
	Ephemeral bool

	// TCP makes the server listen on 127.0.0.1 as well, with a password; see
	// TCPConnString.
	TCP bool

	// Port is the port for TCP, and part of the name of the socket. Zero: 5432
	// without TCP, any free port with it.
	Port int

	// StandbyOf, when not empty, is the connection string of a server to copy:
	// a new data directory becomes its streaming standby. For tests of
	// failover.
	StandbyOf string

	// Settings are further server settings, as in postgresql.conf. They have
	// precedence over those that this package chooses.
	Settings map[string]string

	// Logger is told about starting and stopping. Nil: nothing is logged.
	Logger *slog.Logger
}

// Server is a running PostgreSQL server, a child of this process.
type Server struct {
	cfg      Config
	dir      string // as in the package comment
	home     string // dir/postgres
	data     string // dir/postgres/data
	socket   string // directory of the socket
	password string
	account  account
	binaries Binaries
	lock     *lock
	log      *slog.Logger

	mu       sync.Mutex // protects what follows
	process  *os.Process
	done     chan struct{} // closed when the postmaster has ended
	stopping bool          // Stop was called
	err      error         // why the postmaster ended
	released bool          // directory and lock were given back

	handedOver bool // root has been given up since Start
}

// Start starts the server and returns when it accepts connections; its first
// start in a directory creates the data. What an earlier run left behind after
// a crash is cleaned up first. If ctx ends before the server is ready,
// everything is undone; afterwards ctx has no meaning for the server.
//
// The caller must call Stop, also when Done says that the server has ended.
func Start(ctx context.Context, cfg Config) (_ *Server, err error) {
	s := &Server{cfg: cfg, log: cfg.Logger}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if cfg.Port < 0 || cfg.Port > 65535 {
		return nil, fmt.Errorf("embedded: port: got %d, allowed 0 (choose one) to 65535", cfg.Port)
	}
	if s.cfg.Port == 0 {
		s.cfg.Port = defaultPort
		if cfg.TCP {
			if s.cfg.Port, err = freePort(); err != nil {
				return nil, err
			}
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.release())
		}
	}()
	if err := s.prepareDir(); err != nil {
		return nil, err
	}
	if err := s.settleLeftover(ctx); err != nil {
		return nil, err
	}
	if err := s.prepareData(ctx); err != nil {
		return nil, err
	}
	if err := s.run(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// Restart starts the server again after it has ended by itself, with the data
// as they are. It must not be called after Stop, nor concurrently.
func (s *Server) Restart(ctx context.Context) error {
	select {
	case <-s.Done():
	default:
		return errors.New("embedded: restart: the server still runs")
	}
	if err := s.settleLeftover(ctx); err != nil {
		return err
	}
	return s.run(ctx)
}

// prepareDir creates and locks the directories and sets the paths.
func (s *Server) prepareDir() (err error) {
	if s.cfg.Ephemeral {
		if s.account, err = chooseAccount(""); err != nil {
			return err
		}
		parent, err := ephemeralParent(s.cfg.Dir, s.account)
		if err != nil {
			return err
		}
		if s.dir, s.lock, err = ephemeralDir(parent, s.account); err != nil {
			return fmt.Errorf("embedded: %w", err)
		}
	} else {
		dir := s.cfg.Dir
		if dir == "" {
			if dir, err = DefaultDir(); err != nil {
				return err
			}
		}
		if dir, err = filepath.Abs(dir); err != nil {
			return fmt.Errorf("embedded: %w", err)
		}
		// Processes are recognized by their working directory, which has no
		// symbolic links in it.
		if s.dir, err = resolve(dir); err != nil {
			return fmt.Errorf("embedded: data directory: %w", err)
		}
		if s.account, err = chooseAccount(s.dir); err != nil {
			return err
		}
		if err := checkPath(s.dir, s.account); err != nil {
			return err
		}
		if err := makeDir(s.dir, s.account); err != nil {
			return fmt.Errorf("embedded: data directory: %w", err)
		}
		if s.lock, err = lockDir(s.dir, s.account); errors.Is(err, ErrInUse) {
			return fmt.Errorf("embedded: directory %s is %w: stop that process, or name another directory", s.dir, err)
		} else if err != nil {
			return fmt.Errorf("embedded: data directory: %w", err)
		}
	}
	s.home = filepath.Join(s.dir, homeName)
	s.data = filepath.Join(s.home, dataName)
	s.socket = socketDir(s.home, s.cfg.Port)
	if err := checkEntry(s.dir, s.account); err != nil {
		return err
	}
	for _, dir := range slices.Compact([]string{s.home, s.socket}) {
		if err := makePrivate(dir, s.account); err != nil {
			return err
		}
	}
	return nil
}

// resolve follows the symbolic links in a path of which the end may not exist
// yet.
func resolve(path string) (string, error) {
	real, err := filepath.EvalSymlinks(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return real, err
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&fs.ModeSymlink == 0 {
			return resolve(path) // another process has made it, a moment ago
		}
		return "", fmt.Errorf("%s is a symbolic link that leads nowhere", path)
	}
	parent, err := resolve(filepath.Dir(path))
	return filepath.Join(parent, filepath.Base(path)), err
}

// ephemeralParent returns the directory for temporary directories.
func ephemeralParent(dir string, a account) (string, error) {
	if dir == "" {
		dir = os.TempDir()
		// A TMPDIR inside a private home directory is of no use to another
		// user.
		if checkEntry(dir, a) != nil || checkPath(dir, a) != nil {
			dir = "/tmp"
		}
	} else if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("embedded: directory for temporary directories: %w", err)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("embedded: %w", err)
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return "", fmt.Errorf("embedded: directory for temporary directories: %w", err)
	}
	if err := checkPath(dir, a); err != nil {
		return "", err
	}
	return dir, checkEntry(dir, a)
}

// settleLeftover deals with what an earlier run that was killed left behind:
// it stops a postmaster that still runs, and clears away traces of one that
// does not. The lock is ours, so nobody else is using that postmaster.
func (s *Server) settleLeftover(ctx context.Context) error {
	if _, err := readFile(s.home, pidFile, s.account); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("embedded: %w", err)
	}
	if pid := postmasterPID(s.home, s.account); pid != 0 {
		s.log.Warn("stopping a postgres that an earlier run left behind", "pid", pid, "dir", s.dir)
		if err := syscall.Kill(pid, syscall.SIGINT); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("embedded: stop the Postgres (process %d) that an earlier run left in %s: %w", pid, s.dir, err)
		}
		for alive(pid) {
			select {
			case <-ctx.Done():
				return fmt.Errorf("embedded: wait for the Postgres (process %d) that an earlier run left in %s: %w",
					pid, s.dir, ctx.Err())
			case <-time.After(20 * time.Millisecond): // not a child: there is no event to wait for
			}
		}
	} else if pid := recordedPID(s.home, s.account); pid != 0 && alive(pid) {
		if err := disownPID(s.home, s.account); err != nil {
			return fmt.Errorf("embedded: %w", err)
		}
	}
	// A leftover socket has a lock file, for which the same holds as for
	// postmaster.pid; nobody uses it.
	err := inDir(s.socket, s.account, func(root *os.Root) error {
		for _, suffix := range []string{"", ".lock"} {
			if err := root.Remove(".s.PGSQL." + strconv.Itoa(s.cfg.Port) + suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("embedded: %w", err)
	}
	return nil
}

// prepareData finds the binaries and creates the data directory if there is
// none. An existing one needs binaries of its own major version.
func (s *Server) prepareData(ctx context.Context) error {
	version, err := readFile(s.home, filepath.Join(dataName, "PG_VERSION"), s.account)
	switch {
	case err == nil:
		major, err := strconv.Atoi(strings.TrimSpace(string(version)))
		if err != nil {
			return fmt.Errorf("embedded: %s: got %q, want the major version of PostgreSQL",
				filepath.Join(s.data, "PG_VERSION"), version)
		}
		if s.binaries, err = findMajor(ctx, major, s.data); err != nil {
			return fmt.Errorf("embedded: %w", err)
		}
		if err := s.ownData(); err != nil {
			return fmt.Errorf("embedded: %w", err)
		}
	case errors.Is(err, fs.ErrNotExist):
		if s.binaries, err = Find(ctx); err != nil {
			return fmt.Errorf("embedded: %w", err)
		}
		if err := s.createData(ctx); err != nil {
			return fmt.Errorf("embedded: %w", err)
		}
	default:
		return fmt.Errorf("embedded: %w", err)
	}
	password, err := readFile(s.home, passwordName, s.account)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("embedded: %w", err)
	}
	s.password = strings.TrimSpace(string(password))
	return nil
}

// ownData gives a data directory that root made (a base backup, a restore) to
// the account: what belongs to root in it, under one name only. Symbolic links
// stay as they are.
func (s *Server) ownData() error {
	if !s.account.switched {
		return nil
	}
	return inDir(s.home, s.account, func(home *os.Root) error {
		info, err := home.Lstat(dataName)
		if err != nil || ownerOf(info) == s.account.uid {
			return err
		}
		return fs.WalkDir(home.FS(), ".", func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.IsDir() && !entry.Type().IsRegular() {
				return err
			}
			f, err := home.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil || ownerOf(info) == s.account.uid {
				return err
			}
			if !info.IsDir() {
				if err := s.account.checkFile(f); err != nil {
					return err
				}
			}
			return s.account.own(f)
		})
	})
}

// passwordName is the file with the password of the superuser, which is needed
// over TCP.
const passwordName = "password"

// createData creates the data directory. It appears under its name only when
// it is complete.
func (s *Server) createData(ctx context.Context) error {
	// Whoever reaches the socket is trusted, since only the server's own user
	// (and root) can; over TCP a password is needed.
	home, err := openDir(s.home, s.account)
	if err != nil {
		return err
	}
	defer home.Close()
	if err := home.Remove(passwordName); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	password, err := openFile(home, passwordName, os.O_WRONLY|os.O_CREATE, s.account)
	if err != nil {
		return err
	}
	_, err = password.WriteString(rand.Text() + "\n")
	if err := errors.Join(err, password.Close()); err != nil {
		return err
	}
	unfinished := s.data + ".new"
	if err := home.RemoveAll(dataName + ".new"); err != nil {
		return err
	}
	tool, args := "initdb", []string{
		"--pgdata=" + unfinished, "--username=" + User, "--pwfile=" + filepath.Join(s.home, passwordName),
		"--auth-local=trust", "--auth-host=scram-sha-256",
		"--encoding=UTF8", "--locale=C", "--data-checksums",
	}
	if s.cfg.StandbyOf != "" {
		tool, args = "pg_basebackup", []string{
			"--pgdata=" + unfinished, "--dbname=" + s.cfg.StandbyOf,
			"--write-recovery-conf", "--checkpoint=fast", "--no-password",
		}
	}
	if s.cfg.Ephemeral {
		args = append(args, "--no-sync")
	}
	s.log.Info("creating the postgres data directory", "dir", s.data, "version", s.binaries.Version)
	cmd := exec.CommandContext(ctx, filepath.Join(s.binaries.Dir, tool), args...)
	cmd.Env, cmd.Dir, cmd.SysProcAttr = childEnv(s.home), s.home, s.account.sysProcAttr()
	// As in spawn: it ends when this process is killed.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	setDeathSignal(cmd.SysProcAttr)
	// It has children of its own.
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if out, err := cmd.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return fmt.Errorf("%s as %s in %s: %w\n%s", tool, s.account.name, s.home, err, lastLines(out, 20))
	}
	return home.Rename(dataName+".new", dataName)
}

// arguments returns the command line of the postmaster.
func (s *Server) arguments() []string {
	settings := map[string]string{
		"port":                    strconv.Itoa(s.cfg.Port),
		"listen_addresses":        "",
		"unix_socket_directories": `"` + strings.ReplaceAll(s.socket, `"`, `""`) + `"`,
		"unix_socket_permissions": "0700",
		"logging_collector":       "off",
		"log_destination":         "stderr",
		// What people and replicas write has tokens in it. Of a statement that fails neither its text, nor its parameters, nor the
		// row that it failed for are logged; whoever has sent it is told all of that.
		"log_min_error_statement":           "panic",
		"log_error_verbosity":               "terse",
		"log_parameter_max_length":          "0",
		"log_parameter_max_length_on_error": "0",
		// The defaults are for machines of long ago: with them a directory that is loaded makes a checkpoint every few
		// seconds, and the pages that sessions are in move in and out. The memory is taken as it is used.
		"shared_buffers": "512MB",
		"max_wal_size":   "4GB",
	}
	if s.cfg.TCP {
		settings["listen_addresses"] = "127.0.0.1"
	}
	if s.cfg.Ephemeral {
		maps.Copy(settings, map[string]string{
			"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off",
		})
	}
	maps.Copy(settings, s.cfg.Settings)
	args := []string{"-D", s.data}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}
	return args
}

// run starts the postmaster and waits until it accepts connections. After
// kill -9 of an earlier postmaster its children may take a moment to notice;
// as long as they live, Postgres refuses to start, so it is tried again.
func (s *Server) run(ctx context.Context) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		from, err := s.spawn()
		if err != nil {
			return fmt.Errorf("embedded: start Postgres: %w", err)
		}
		err = s.awaitReady(ctx)
		if err == nil {
			s.log.Info("postgres started", "version", s.binaries.Version, "binaries", s.binaries.Dir,
				"dir", s.dir, "user", s.account.name, "pid", s.PID())
			return nil
		}
		s.end(syscall.SIGQUIT, 5*time.Second)
		said := s.logSince(from)
		if bytes.Contains(said, []byte("pre-existing shared memory block")) && time.Now().Before(deadline) && ctx.Err() == nil {
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond): // those children are not ours to wait for
			}
			continue
		}
		if tail := lastLines(said, 20); len(tail) > 0 {
			err = fmt.Errorf("%w; its log %s ends with:\n%s", err, filepath.Join(s.home, logName), tail)
		}
		return fmt.Errorf("embedded: start Postgres: %w", err)
	}
}

// spawn starts the postmaster and the goroutine that waits for its end. It
// returns the size of the log before.
func (s *Server) spawn() (from int64, err error) {
	path := filepath.Join(s.home, logName)
	out, err := s.openLog()
	if err != nil {
		return 0, err
	}
	defer out.Close()
	info, err := out.Stat()
	if err != nil {
		return 0, err
	}

	cmd := exec.Command(filepath.Join(s.binaries.Dir, "postgres"), s.arguments()...)
	cmd.Env, cmd.Dir, cmd.SysProcAttr = childEnv(s.home), s.home, s.account.sysProcAttr()
	cmd.Stdout, cmd.Stderr = out, out
	setDeathSignal(cmd.SysProcAttr)
	s.mu.Lock()
	s.err = nil // of the postmaster before
	s.mu.Unlock()
	started, done := make(chan error, 1), make(chan struct{})
	go func() {
		// The death signal is sent when the thread that started the child
		// ends. This goroutine keeps its thread for as long as there is a
		// child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		err := cmd.Wait()
		s.mu.Lock()
		if !s.stopping {
			if err == nil {
				err = errors.New("exit status 0")
			}
			s.err = fmt.Errorf("embedded: Postgres ended: %w; see %s", err, path)
		}
		s.mu.Unlock()
		close(done)
	}()
	if err := <-started; err != nil {
		return 0, err
	}
	s.mu.Lock()
	s.process, s.done = cmd.Process, done
	s.mu.Unlock()
	return info.Size(), nil
}

// awaitReady waits until the server takes connections, and makes sure that
// its database exists.
func (s *Server) awaitReady(ctx context.Context) error {
	done := s.Done()
	for {
		err := s.createDatabase(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-done:
			return errors.New("it ended before it was ready")
		case <-ctx.Done():
			return fmt.Errorf("%w; last attempt to connect: %w", ctx.Err(), err)
		case <-time.After(20 * time.Millisecond): // Postgres announces its readiness nowhere but here
		}
	}
}

func (s *Server) createDatabase(ctx context.Context) error {
	cfg, err := pgx.ParseConfig(s.connString("postgres"))
	if err != nil {
		return err
	}
	// Whatever the settings and the environment say.
	cfg.RuntimeParams, cfg.ValidateConnect = map[string]string{"default_transaction_read_only": "off"}, nil
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	var exists bool
	err = conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", Database).Scan(&exists)
	if err != nil || exists {
		return err
	}
	_, err = conn.Exec(ctx, "CREATE DATABASE "+pgx.Identifier{Database}.Sanitize())
	return err
}

// ConnString returns the connection string of the server's database over its
// socket. It holds no secret; psql takes it as it is.
func (s *Server) ConnString() string { return s.connString(Database) }

func (s *Server) connString(database string) string {
	u := url.URL{Scheme: "postgres", Path: "/" + database, RawQuery: url.Values{
		"host": {s.socket}, "port": {strconv.Itoa(s.cfg.Port)}, "user": {User},
	}.Encode()}
	return u.String() // postgres:///database?host=...
}

// TCPConnString returns the connection string over TCP, which holds a
// password, or "" if the server was not told to listen.
func (s *Server) TCPConnString() string {
	if !s.cfg.TCP {
		return ""
	}
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(User, s.password),
		Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(s.cfg.Port)), Path: "/" + Database, RawQuery: "sslmode=disable",
	}
	return u.String()
}

// Port returns the port of the server.
func (s *Server) Port() int { return s.cfg.Port }

// PID returns the process number of the postmaster.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.process.Pid
}

// Dir returns the directory that holds the server.
func (s *Server) Dir() string { return s.dir }

// LogFile returns the path of the server's log.
func (s *Server) LogFile() string { return filepath.Join(s.home, logName) }

// Binaries returns the binaries that run.
func (s *Server) Binaries() Binaries { return s.binaries }

// Done returns a channel that is closed when the postmaster has ended, for
// whatever reason; Err then says why. Each restart has its own channel.
func (s *Server) Done() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done
}

// Err returns nil while the server runs and when Stop has ended it, else why
// it ended.
func (s *Server) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Stop ends the server: by a fast shutdown, which ends sessions and keeps all
// data, or at once when ctx is done (no committed data is lost then either;
// the next start takes longer). It returns when nothing runs any more, and
// removes an ephemeral server's directory. Stop may be called again.
func (s *Server) Stop(ctx context.Context) error {
	s.mu.Lock()
	s.stopping = true
	process, done := s.process, s.done
	s.mu.Unlock()
	sig := syscall.SIGINT
	if s.cfg.Ephemeral {
		sig = syscall.SIGQUIT // there is nothing to keep
	}
	_ = process.Signal(sig) // fails only if it has ended
	select {
	case <-done:
	case <-ctx.Done():
		s.log.Warn("postgres: immediate shutdown", "reason", ctx.Err())
		s.end(syscall.SIGQUIT, 10*time.Second)
	}
	if err := s.release(); err != nil {
		return fmt.Errorf("embedded: %w", err)
	}
	s.log.Info("postgres stopped", "dir", s.dir)
	return nil
}

// end signals the postmaster and waits for its end, which it enforces after
// the patience.
func (s *Server) end(sig syscall.Signal, patience time.Duration) {
	s.mu.Lock()
	process, done := s.process, s.done
	s.mu.Unlock()
	_ = process.Signal(sig)
	select {
	case <-done:
	case <-time.After(patience):
		_ = process.Kill()
		<-done
	}
}

// release removes what shall not stay and gives the directory free.
func (s *Server) release() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.released || s.lock == nil {
		return nil
	}
	s.released = true
	var err error
	if s.socket != "" && s.socket != s.home {
		err = os.RemoveAll(s.socket)
	}
	if s.cfg.Ephemeral {
		removeErr := os.RemoveAll(s.dir)
		if s.handedOver && errors.Is(removeErr, fs.ErrPermission) {
			// The empty directory stays where only root may remove it, until the next start of an ephemeral server there.
			if left, readErr := os.ReadDir(s.dir); readErr == nil && len(left) == 0 {
				removeErr = nil
			}
		}
		err = errors.Join(err, removeErr)
	}
	s.lock.release()
	return err
}

// openLog opens the log, after setting an old one aside that has become long.
func (s *Server) openLog() (out *os.File, err error) {
	err = inDir(s.home, s.account, func(home *os.Root) error {
		if info, err := home.Lstat(logName); err == nil && info.Size() > maxLog {
			if err := home.Rename(logName, logName+".1"); err != nil {
				return err
			}
		}
		out, err = openFile(home, logName, os.O_WRONLY|os.O_CREATE|os.O_APPEND, s.account)
		return err
	})
	return out, err
}

// logSince returns what the log holds from an offset.
func (s *Server) logSince(from int64) []byte {
	home, err := openDir(s.home, s.account)
	if err != nil {
		return nil
	}
	defer home.Close()
	f, err := openFile(home, logName, os.O_RDONLY, s.account)
	if err != nil {
		return nil
	}
	defer f.Close()
	content, _ := io.ReadAll(io.NewSectionReader(f, from, maxLog))
	return content
}

// lastLines returns the last n lines of text.
func lastLines(text []byte, n int) []byte {
	lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	return bytes.Join(lines[max(0, len(lines)-n):], []byte("\n"))
}

// freePort returns a TCP port of 127.0.0.1 that is free now. It lies below the
// ports that systems hand out for outgoing connections, so that one of those
// does not take it while the server is down.
func freePort() (int, error) {
	const low, high = 15000, 32000
	var err error
	for range 100 {
		n, randErr := rand.Int(rand.Reader, big.NewInt(high-low))
		if randErr != nil {
			return 0, randErr
		}
		port := low + int(n.Int64())
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("embedded: no free port on 127.0.0.1: %w", err)
}
