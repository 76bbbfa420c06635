package embedded

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ErrInUse says that another live process runs the server of this directory.
var ErrInUse = errors.New("in use by another process")

// lockName is the file that is locked.
const lockName = "postgres.lock"

// ephemeralPattern names the directories of ephemeral servers.
const ephemeralPattern = "pgbroker-ephemeral-"

// DefaultDir returns the directory that Start uses when Config.Dir is empty:
// pgbroker in $XDG_STATE_HOME if that is set, else /var/lib/pgbroker for root,
// and pgbroker in ~/.local/state for others.
func DefaultDir() (string, error) {
	if state := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(state) {
		return filepath.Join(state, "pgbroker"), nil
	}
	if os.Geteuid() == 0 {
		return "/var/lib/pgbroker", nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("embedded: no directory for the data: set XDG_STATE_HOME or HOME, or name a directory: %w", err)
	}
	return filepath.Join(home, ".local", "state", "pgbroker"), nil
}

// account is the operating system user that runs Postgres.
type account struct {
	uid, gid uint32
	name     string
	switched bool // it is not the user of this process
}

// sysProcAttr makes a child run as the account, in a process group of its own
// so that Ctrl-C in a terminal reaches this process only, which then stops
// Postgres when everything that uses it has ended.
func (a account) sysProcAttr() *syscall.SysProcAttr {
	attr := &syscall.SysProcAttr{Setpgid: true}
	if a.switched {
		attr.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid}
	}
	return attr
}

// chooseAccount returns the user to run Postgres as. Postgres refuses to run
// as root; then it is the owner of what is there already (the data, the
// directory around them, the directory of all), else the user postgres, else
// nobody.
func chooseAccount(dir string) (account, error) {
	if uid := os.Geteuid(); uid != 0 {
		return account{uid: uint32(uid), gid: uint32(os.Getegid()), name: uidText(uint32(uid))}, nil
	}
	for _, path := range []string{filepath.Join(homeName, dataName), homeName, ""} {
		if dir == "" {
			break
		}
		info, err := os.Lstat(filepath.Join(dir, path))
		if err != nil || !info.IsDir() {
			continue
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != 0 {
			return account{uid: st.Uid, gid: st.Gid, name: uidText(st.Uid), switched: true}, nil
		}
	}
	for _, name := range []string{"postgres", "_postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err1 != nil || err2 != nil || uid == 0 {
			continue
		}
		return account{uid: uint32(uid), gid: uint32(gid), name: "user " + name, switched: true}, nil
	}
	return account{}, errors.New("embedded: Postgres does not run as root, and there is neither a user postgres nor a user nobody to run it as: " +
		"create one (useradd --system postgres), or start pgbroker as another user")
}

// lock is an exclusive lock on a directory that ends with the process.
type lock struct{ file *os.File }

// lockDir takes the lock of dir. It returns an error that wraps ErrInUse when
// another process holds it.
func lockDir(dir string, a account) (*lock, error) {
	root, err := openDir(dir, a)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	for {
		f, err := openLock(root, a)
		if err != nil {
			return nil, err
		}
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			holder := make([]byte, 20)
			n, _ := f.Read(holder)
			f.Close()
			if errors.Is(err, syscall.EWOULDBLOCK) {
				return nil, fmt.Errorf("%w (process %s)", ErrInUse, strings.TrimSpace(string(holder[:n])))
			}
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		// Whoever held the lock may have removed the directory with the file;
		// then this lock is on nothing.
		mine, err1 := f.Stat()
		named, err2 := os.Lstat(filepath.Join(dir, lockName))
		if err1 != nil || err2 != nil || !os.SameFile(mine, named) {
			f.Close()
			if _, err := os.Lstat(dir); err != nil {
				return nil, err
			}
			continue
		}
		_ = f.Truncate(0) // the content is only for messages
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
		return &lock{f}, nil
	}
}

// openLock opens the file of a lock, or makes it.
func openLock(root *os.Root, a account) (*os.File, error) {
	for {
		f, err := openFile(root, lockName, os.O_RDWR, a)
		if !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
		f, err = root.OpenFile(lockName, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if !errors.Is(err, fs.ErrExist) {
			return f, err
		}
	}
}

// release gives the lock up. Closing alone would not: a child that is being forked at the moment holds the
// same open file until it executes its program.
func (l *lock) release() {
	_ = syscall.Flock(int(l.file.Fd()), syscall.LOCK_UN) // closing does it otherwise
	l.file.Close()
}

// makeDir creates dir, and what is missing above it, so that the account can
// enter it.
func makeDir(dir string, a account) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if parent := filepath.Dir(dir); parent != dir {
		if err := makeDir(parent, a); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil // by another process, a moment ago
		}
		return err
	}
	if a.switched {
		return setMode(dir, 0o711, a, false)
	}
	return nil
}

// checkEntry checks that the account may enter dir and every directory above.
func checkEntry(dir string, a account) error {
	if !a.switched {
		return nil
	}
	for {
		info, err := os.Stat(dir)
		if err != nil {
			return err
		}
		st, execute := info.Sys().(*syscall.Stat_t), fs.FileMode(0o001)
		switch {
		case st.Uid == a.uid:
			execute = 0o100
		case st.Gid == a.gid:
			execute = 0o010
		}
		if info.Mode()&execute == 0 {
			return fmt.Errorf("embedded: Postgres runs as %s, which may not enter %s: "+
				"allow it (chmod o+x %s), or name a data directory elsewhere", a.name, dir, dir)
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return nil
		}
		dir = parent
	}
}

// makePrivate creates dir, or takes over an existing one, with access for the
// account only. A directory that belongs to somebody else is refused: in a
// shared place like /tmp it may be a trap.
func makePrivate(dir string, a account) error {
	if err := os.Mkdir(dir, 0o700); err == nil {
		return setMode(dir, 0o700, a, true)
	} else if !errors.Is(err, fs.ErrExist) {
		return err
	}
	root, err := openDir(dir, a)
	if err != nil {
		return fmt.Errorf("embedded: %w", err)
	}
	info, err := root.Stat(".")
	root.Close()
	if err != nil {
		return err
	}
	if ownerOf(info) != a.uid {
		return fmt.Errorf("embedded: %s exists and is not a directory of %s: remove it", dir, a.name)
	}
	if info.Mode().Perm() != 0o700 {
		return setMode(dir, 0o700, a, false)
	}
	return nil
}

// maxSocketPath is the longest path that fits into a socket address on every
// system (104 bytes with the terminating zero on macOS and BSD, 108 on Linux).
const maxSocketPath = 103

// socketDir returns the directory for the server's socket: home, or if its
// path is too long, a directory under /tmp named after it.
func socketDir(home string, port int) string {
	if len(filepath.Join(home, ".s.PGSQL."+strconv.Itoa(port))) <= maxSocketPath {
		return home
	}
	sum := sha256.Sum256([]byte(home))
	return fmt.Sprintf("/tmp/pgbroker-%x", sum[:8])
}

// ephemeralDir creates and locks the directory of an ephemeral server in
// parent, after removing those of dead processes.
func ephemeralDir(parent string, a account) (string, *lock, error) {
	removeLeftovers(parent, a)
	for {
		dir, err := os.MkdirTemp(parent, ephemeralPattern)
		if err != nil {
			return "", nil, err
		}
		// Another process may see the new directory before it is locked and
		// take it for a leftover. Then it is gone, and the next one is tried.
		l, err := lockDir(dir, a)
		if errors.Is(err, ErrInUse) || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			os.RemoveAll(dir)
			return "", nil, err
		}
		if a.switched {
			if err := setMode(dir, 0o711, a, false); err != nil {
				l.release()
				return "", nil, err
			}
		}
		return dir, l, nil
	}
}

// removeLeftovers removes what killed ephemeral servers left in parent. It
// does what it can; what it cannot remove is another run's to try.
func removeLeftovers(parent string, a account) {
	dirs, _ := filepath.Glob(filepath.Join(parent, ephemeralPattern+"*")) // constant pattern
	for _, dir := range dirs {
		info, err := os.Lstat(dir)
		if err != nil || !info.IsDir() || ownerOf(info) != uint32(os.Geteuid()) && ownerOf(info) != a.uid {
			continue
		}
		l, err := lockDir(dir, a)
		if err != nil {
			continue // its server lives
		}
		home := filepath.Join(dir, homeName)
		if pid := postmasterPID(home, a); pid != 0 {
			_ = syscall.Kill(pid, syscall.SIGQUIT)
			waitGone(pid, time.After(10*time.Second))
		}
		if s := socketDir(home, defaultPort); s != home {
			_ = os.RemoveAll(s)
		}
		_ = os.RemoveAll(dir)
		l.release()
	}
}

// postmasterPID returns the process of the live postmaster whose data are in
// home, or 0. What is written there is believed only of processes of the account.
func postmasterPID(home string, a account) int {
	pid := recordedPID(home, a)
	if pid != 0 && alive(pid) && runsAs(pid, a) && isPostmasterOf(pid, filepath.Join(home, dataName)) {
		return pid
	}
	return 0
}

// recordedPID returns the process that postmaster.pid names, or 0.
func recordedPID(home string, a account) int {
	content, err := readFile(home, pidFile, a)
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(content), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(first))
	if err != nil || pid <= 1 {
		return 0
	}
	return pid
}

// pidFile is the file in home in which the postmaster says who it is.
var pidFile = filepath.Join(dataName, "postmaster.pid")

// disownPID makes a postmaster.pid of a dead postmaster harmless whose process
// number now belongs to somebody else, which happens in containers, where
// numbers start over: Postgres would take that process for a postmaster and
// refuse to start. With the number of this process, its future parent, it
// recognizes the file as stale and still checks the shared memory that the
// other lines describe. (Deleting the file would skip that check.)
func disownPID(home string, a account) error {
	return inDir(home, a, func(root *os.Root) error {
		f, err := openFile(root, pidFile, os.O_RDWR, a)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close()
		content, err := io.ReadAll(io.LimitReader(f, maxSmallFile))
		if err != nil {
			return err
		}
		_, rest, _ := strings.Cut(string(content), "\n")
		// Written in place, so that owner and mode stay.
		if err := f.Truncate(0); err != nil {
			return err
		}
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"+rest), 0)
		return err
	})
}

// waitGone waits until process pid, which is not a child, has ended. It
// reports whether it did before the timeout.
func waitGone(pid int, timeout <-chan time.Time) bool {
	for alive(pid) {
		select {
		case <-timeout:
			return false
		case <-time.After(20 * time.Millisecond): // there is no event to wait for
		}
	}
	return true
}

// childEnv is the environment of Postgres and its tools: nothing of ours, as
// PGDATA, PGPORT and others would change what they do, and messages in
// English.
func childEnv(home string) []string {
	env := []string{"LC_ALL=C", "HOME=" + home, "PATH=" + os.Getenv("PATH")}
	if tz, ok := os.LookupEnv("TZ"); ok {
		env = append(env, "TZ="+tz)
	}
	return env
}
