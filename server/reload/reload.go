// Package reload keeps a value that is read from files current while the process runs.
//
// There is no watcher and no goroutine. A value is checked when it is used, at most once per [Interval], by reading the
// files again and comparing their contents. That is cheaper than it sounds (a secret or a certificate is a few kilobytes,
// once a second) and cannot miss a change the way file system events and modification times can: not a Kubernetes secret,
// whose files are symbolic links that get swapped, not a bind mount, not an editor that keeps size and time stamp.
package reload

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Interval is how long a value is used before its files are read again: a change is in force about a second after it was
// written, provided that the value is in use.
const Interval = time.Second

// MaxFileSize is the most bytes that one file may hold. It is far above any bundle of certificates and exists so that a
// wrong path (a device, a log) is an error instead of a loss of memory.
const MaxFileSize = 1 << 20

// Value is a T that follows the files it was read from. Its methods may be called from several goroutines at once.
type Value[T slog.LogValuer] struct {
	name  string
	paths []string
	parse func(contents [][]byte) (T, error)
	log   *slog.Logger
	start time.Time
	gone  *T // takes the place of the value when the files have gone; nil if the last value is to stay

	current atomic.Pointer[T]
	checked atomic.Int64 // when the files were last read, as the time since start

	mu     sync.Mutex // held while reading files; whoever does not get it uses current
	digest string     // what the files were when last read, good or bad
}

// New reads the files at paths and makes a value of their contents with parse, which gets one element per path and must not
// keep it. An error of either is returned: a process is not to start with a file that it cannot use.
//
// From then on a change that cannot be read or parsed leaves the value as it was and is logged at error, once until the
// files change again; a change that can be is logged at info together with the new value, which is why T must know how to
// show itself without its secrets. The name says in errors and logs what the value is. Paths that are not regular files,
// such as the pipe of a shell's process substitution, can be read once only and are never read again. Without paths the
// value is constant. A nil log means [slog.Default].
func New[T slog.LogValuer](name string, paths []string, parse func(contents [][]byte) (T, error), log *slog.Logger) (*Value[T], error) {
	if log == nil {
		log = slog.Default()
	}
	v := &Value[T]{name: name, paths: paths, parse: parse, log: log, start: time.Now()}
	contents, regular, err := readAll(paths)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	value, err := parse(contents)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	v.current.Store(&value)
	v.digest = digest(contents)
	if !regular {
		v.paths = nil
	}
	return v, nil
}

// replacing is how long a file may be missing or empty while it is being replaced, by those who do not rename.
const replacing = 20 * time.Millisecond

// WithdrawWhenGone makes gone the value from the moment at which one of the files is found to be deleted, or to have nothing
// but white space in it, to that at which all are good again. Without it the last good value stays in force. It is for values
// that allow something. It is called once, before any other method.
func (v *Value[T]) WithdrawWhenGone(gone T) { v.gone = &gone }

// Check reads the files now, whenever the last check was.
func (v *Value[T]) Check() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.paths) > 0 {
		v.read()
	}
}

// Get returns the value. If the last check is [Interval] ago, it reads the files first; calls made in the meantime get the
// value as it was instead of waiting, so that a file system that hangs holds up one caller and not all.
func (v *Value[T]) Get() T {
	if len(v.paths) > 0 && v.due() && v.mu.TryLock() {
		v.check()
		v.mu.Unlock()
	}
	return *v.current.Load()
}

func (v *Value[T]) due() bool {
	return time.Since(v.start)-time.Duration(v.checked.Load()) >= Interval
}

// check reads the files and replaces the value if they have changed. The caller holds mu.
func (v *Value[T]) check() {
	if v.due() { // otherwise another caller was faster
		v.read()
	}
}

// read is check without asking whether it is time. The caller holds mu.
func (v *Value[T]) read() {
	// The time is taken after reading, so that reads which take long do not follow each other without a pause.
	defer func() { v.checked.Store(int64(time.Since(v.start))) }()

	contents, _, err := readAll(v.paths)
	if stateOf(contents, err) == v.digest {
		return
	}
	if v.gone != nil && absent(contents, err) {
		time.Sleep(replacing)
		contents, _, err = readAll(v.paths)
	}
	now := stateOf(contents, err)
	if now == v.digest {
		return
	}
	v.digest = now

	if v.gone != nil && absent(contents, err) {
		v.current.Store(v.gone)
		v.log.Error("file is gone or empty: what it held is no longer in force", "what", v.name, "files", v.paths)
		return
	}
	var value T
	if err == nil {
		value, err = v.parse(contents)
	}
	if err != nil {
		v.log.Error("changed file cannot be used, the last good one stays in force",
			"what", v.name, "files", v.paths, "error", err, "in_force", *v.current.Load())
		return
	}
	v.current.Store(&value)
	v.log.Info("file reloaded", "what", v.name, "files", v.paths, "in_force", value)
}

// absent reports whether one of the files is not there or has nothing in it.
func absent(contents [][]byte, err error) bool {
	if err != nil {
		// ENOTDIR: a directory on the way is a file now.
		return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
	}
	return slices.ContainsFunc(contents, func(c []byte) bool { return len(bytes.TrimSpace(c)) == 0 })
}

// stateOf identifies what files were found to be.
func stateOf(contents [][]byte, err error) string {
	if err != nil {
		return err.Error()
	}
	return digest(contents)
}

// digest identifies contents without keeping a second copy of a secret in memory.
func digest(contents [][]byte) string {
	all := make([]byte, 0, len(contents)*sha256.Size)
	for _, c := range contents {
		sum := sha256.Sum256(c)
		all = append(all, sum[:]...)
	}
	return string(all)
}

// readAll returns the contents of the files at paths and whether all of them are regular files.
func readAll(paths []string) (contents [][]byte, regular bool, err error) {
	regular = true
	for _, path := range paths {
		content, reg, err := read(path)
		if err != nil {
			return nil, false, err
		}
		contents = append(contents, content)
		regular = regular && reg
	}
	return contents, regular, nil
}

func read(path string) (content []byte, regular bool, err error) {
	if path == "" {
		return nil, false, errors.New("the file name is empty")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, false, err
	}
	content, err = io.ReadAll(io.LimitReader(f, MaxFileSize+1))
	if err != nil {
		return nil, false, err
	}
	if len(content) > MaxFileSize {
		return nil, false, fmt.Errorf("read %s: larger than %d bytes", path, MaxFileSize)
	}
	return content, info.Mode().IsRegular(), nil
}
