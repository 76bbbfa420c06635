package embedded

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// What another user can write, root does not follow: in a directory that belongs to the account of Postgres, whoever has that
// account may put links where files are expected, and exchange them at any moment. So all work there is done relative to an
// open directory (os.Root), on open files, after a look at whom they belong to; nothing that belongs to somebody else is opened,
// changed or given away.

// maxSmallFile bounds the files that are read whole.
const maxSmallFile = 64 << 10

// mayOwn reports whether a file of this user may be used: those of root and of the account, if this process is root.
// Others find out by themselves what they may do.
func (a account) mayOwn(uid uint32) bool {
	return os.Geteuid() != 0 || uid == 0 || uid == a.uid
}

// openDir opens a directory that is no link and belongs to root or the account.
func openDir(path string, a account) (*os.Root, error) {
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	opened, err := root.Stat(".")
	if err == nil {
		var named fs.FileInfo
		named, err = os.Lstat(path) // after opening it: a link is found out
		switch {
		case err != nil:
		case !os.SameFile(opened, named):
			err = fmt.Errorf("%s is a symbolic link or was exchanged: remove it", path)
		case !a.mayOwn(ownerOf(opened)):
			err = fmt.Errorf("%s belongs to another user (uid %d) than root and %s: remove it, or name another directory", path, ownerOf(opened), a.name)
		}
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// openFile opens a regular file in a directory that may belong to the account. A file that os.O_CREATE makes is given to the
// account. One that is there already must belong to the account or to root, under this name only: otherwise it is a trap.
func openFile(root *os.Root, name string, flag int, a account) (*os.File, error) {
	if flag&os.O_CREATE != 0 {
		f, err := root.OpenFile(name, flag|os.O_EXCL, 0o600)
		if err == nil {
			return f, a.own(f)
		}
		if !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	// O_NONBLOCK: nobody may be at the other end of a pipe.
	f, err := root.OpenFile(name, flag&^os.O_CREATE|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		if info, statErr := root.Lstat(name); statErr == nil && !info.Mode().IsRegular() {
			err = fmt.Errorf("%s is not a regular file: remove it (%w)", filepath.Join(root.Name(), name), err)
		}
		return nil, err
	}
	if err := a.checkFile(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// errNotOurs is a part of the error about a file of others, or with a second name.
var errNotOurs = errors.New("belongs to another user")

// checkFile refuses an open file that is not one of ours.
func (a account) checkFile(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	stat := info.Sys().(*syscall.Stat_t)
	switch {
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file: remove it", f.Name())
	case os.Geteuid() == 0 && (!a.mayOwn(stat.Uid) || stat.Nlink != 1):
		return fmt.Errorf("%s %w (uid %d) or has a second name: remove it", f.Name(), errNotOurs, stat.Uid)
	}
	return nil
}

// own gives an open file or directory to the account.
func (a account) own(f *os.File) error {
	if !a.switched {
		return nil
	}
	if err := f.Chown(int(a.uid), int(a.gid)); err != nil {
		f.Close()
		return err
	}
	return nil
}

// readFile returns what a small file in dir says.
func readFile(dir, name string, a account) ([]byte, error) {
	root, err := openDir(dir, a)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	f, err := openFile(root, name, os.O_RDONLY, a)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxSmallFile))
}

// inDir does something in a directory of the account.
func inDir(dir string, a account, do func(*os.Root) error) error {
	root, err := openDir(dir, a)
	if err != nil {
		return err
	}
	defer root.Close()
	return do(root)
}

// checkPath makes sure, for root, that nobody else can exchange a directory that may not exist yet: all that are above it belong
// to root, and others may write there only in a place like /tmp, where names stay whose they are. The directory itself may
// belong to the account. path has no symbolic links in it.
func checkPath(path string, a account) error {
	if os.Geteuid() != 0 {
		return nil
	}
	for at := path; ; at = filepath.Dir(at) {
		info, err := os.Lstat(at)
		switch {
		case errors.Is(err, fs.ErrNotExist) && at != "/":
			continue
		case err != nil:
			return err
		}
		uid, mode := ownerOf(info), info.Mode()
		if !info.IsDir() || uid != 0 && !(at == path && a.switched && uid == a.uid) {
			return fmt.Errorf("embedded: %s belongs to uid %d, who could put anything in its place, and this is root: "+
				"start pgbroker as that user, or name a data directory in a place of root's", at, uid)
		}
		shared := mode.Perm()&0o002 != 0 || mode.Perm()&0o020 != 0 && info.Sys().(*syscall.Stat_t).Gid != 0
		if shared && mode&fs.ModeSticky == 0 {
			return fmt.Errorf("embedded: others than root may write to %s, and this is root: "+
				"take that away (chmod go-w %s), or name another data directory", at, at)
		}
		if at == "/" {
			return nil
		}
	}
}

func ownerOf(info fs.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }

// setMode sets the mode of a directory that is no link and belongs to root or the account, and gives it to the account if own is
// true.
func setMode(path string, mode fs.FileMode, a account, own bool) error {
	return inDir(path, a, func(root *os.Root) error {
		dir, err := root.Open(".")
		if err != nil {
			return err
		}
		defer dir.Close()
		if own {
			if err := a.own(dir); err != nil {
				return err
			}
		}
		return dir.Chmod(mode)
	})
}

// uidText names a user by number.
func uidText(uid uint32) string { return "uid " + strconv.FormatUint(uint64(uid), 10) }

// Keep returns the path of a file in dir, which only the user that runs Postgres and root can read; both are made if they are
// missing, the file with the content that make returns. created says whether that was done. A file without content, which is
// what an ephemeral server may leave behind, counts as missing.
func Keep(dir, name string, make func() string) (path string, created bool, err error) {
	if dir, err = filepath.Abs(dir); err != nil {
		return "", false, err
	}
	if dir, err = resolve(dir); err != nil {
		return "", false, err
	}
	a, err := chooseAccount(dir)
	if err != nil {
		return "", false, err
	}
	if err := checkPath(dir, a); err != nil {
		return "", false, err
	}
	if err := makeDir(dir, a); err != nil {
		return "", false, err
	}
	err = inDir(dir, a, func(root *os.Root) error {
		created, err = keep(root, name, make, a)
		// While another process makes the file, it has two names for a moment, which is else a trap.
		for deadline := time.Now().Add(time.Second); errors.Is(err, errNotOurs) && time.Now().Before(deadline); {
			time.Sleep(10 * time.Millisecond)
			created, err = keep(root, name, make, a)
		}
		return err
	})
	return filepath.Join(dir, name), created, err
}

func keep(root *os.Root, name string, make func() string, a account) (created bool, err error) {
	f, err := openFile(root, name, os.O_RDONLY, a)
	if err == nil {
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return false, err
		}
		if info.Size() > 0 {
			return false, a.own(f)
		}
		if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	// It appears under its name only when it is complete, and whoever comes second gets the first one's.
	temp := name + "." + rand.Text()
	f, err = openFile(root, temp, os.O_WRONLY|os.O_CREATE, a)
	if err != nil {
		return false, err
	}
	defer func() { _ = root.Remove(temp) }()
	_, err = f.WriteString(make())
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return false, err
	}
	switch err := root.Link(temp, name); {
	case errors.Is(err, fs.ErrExist):
		return false, nil
	case err != nil:
		return false, err
	}
	return true, nil
}

// User returns the user that runs Postgres, and whether that is another one than the user of this process.
func (s *Server) User() (uid, gid int, another bool) {
	return int(s.account.uid), int(s.account.gid), s.account.switched
}

// HandOver prepares that this process, which is root's, becomes one of the user that runs Postgres: what Stop has to remove is given to
// that user. Afterwards this process may do nothing else with the server than to stop it.
func (s *Server) HandOver() error {
	if !s.account.switched || !s.cfg.Ephemeral {
		return nil
	}
	s.mu.Lock()
	s.handedOver = true
	s.mu.Unlock()
	// It was made by this process, in a place where nobody else could exchange it.
	return setMode(s.dir, 0o700, s.account, true)
}
