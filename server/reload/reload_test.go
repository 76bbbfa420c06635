package reload

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A text is a value that shows itself as anything but its content.
type text string

func (text) LogValue() slog.Value { return slog.StringValue("shown") }

// A fixture is a value made of files, joined by +. Content with "bad" in it cannot be parsed.
type fixture struct {
	*Value[text]
	t      *testing.T
	log    bytes.Buffer
	parsed int
}

func open(t *testing.T, paths ...string) *fixture {
	t.Helper()
	f := &fixture{t: t}
	v, err := New("greeting", paths, func(contents [][]byte) (text, error) {
		f.parsed++
		all := string(bytes.Join(contents, []byte("+")))
		if strings.Contains(all, "bad") {
			return "", errors.New("it is bad")
		}
		return text(all), nil
	}, slog.New(slog.NewTextHandler(&f.log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	f.Value = v
	return f
}

// want checks the value, and that since the last time n lines were logged, each with the text.
func (f *fixture) want(value text, n int, logged string) {
	f.t.Helper()
	if got := f.Get(); got != value {
		f.t.Errorf("got %q, want %q", got, value)
	}
	if strings.Count(f.log.String(), "\n") != n || strings.Count(f.log.String(), logged) < n {
		f.t.Errorf("logged %q, want %d lines with %q", f.log.String(), n, logged)
	}
	if strings.Contains(f.log.String(), "hello") {
		f.t.Errorf("the content is logged: %s", f.log.String())
	}
	f.log.Reset()
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, two := filepath.Join(t.TempDir(), "one"), filepath.Join(t.TempDir(), "two")
		write(t, one, "hello1")
		write(t, two, "hello2")
		f := open(t, one, two)
		f.want("hello1+hello2", 0, "")

		// Same size, and the time stamp is put back: only the content tells.
		info, err := os.Stat(one)
		if err != nil {
			t.Fatal(err)
		}
		write(t, one, "hello3")
		if err := os.Chtimes(one, info.ModTime(), info.ModTime()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(Interval - 1)
		f.want("hello1+hello2", 0, "")
		time.Sleep(time.Nanosecond)
		f.want("hello3+hello2", 1, `msg="file reloaded" what=greeting files="[`+one+" "+two+`]" in_force=shown`)

		// A check has just been, so neither this caller nor one that was about to check, too, reads again.
		write(t, two, "hello4")
		f.want("hello3+hello2", 0, "")
		f.mu.Lock()
		f.check()
		f.mu.Unlock()
		f.want("hello3+hello2", 0, "")
		write(t, two, "hello2")

		// Unchanged files are not parsed again.
		before := f.parsed
		for range 5 {
			time.Sleep(Interval)
			f.want("hello3+hello2", 0, "")
		}
		if f.parsed != before {
			t.Errorf("parsed %d times without a change", f.parsed-before)
		}

		// What goes from one file to the other is a change too.
		write(t, one, "")
		write(t, two, "hello3hello2")
		time.Sleep(Interval)
		f.want("+hello3hello2", 1, "file reloaded")
	})
}

func TestBadChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "file")
		write(t, path, "hello")
		f := open(t, path)

		time.Sleep(Interval)
		write(t, path, "bad")
		f.want("hello", 1, `error="it is bad" in_force=shown`)
		for range 3 {
			time.Sleep(Interval)
			f.want("hello", 0, "")
		}
		write(t, path, "bad in another way")
		time.Sleep(Interval)
		f.want("hello", 1, "it is bad")

		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(Interval)
		f.want("hello", 1, "no such file")
		time.Sleep(Interval)
		f.want("hello", 0, "")

		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		time.Sleep(Interval)
		f.want("hello", 1, "is a directory")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}

		write(t, path, strings.Repeat("x", MaxFileSize+1))
		time.Sleep(Interval)
		f.want("hello", 1, "larger than 1048576 bytes")

		// What was there before is news after an error, so that the log says that all is well.
		write(t, path, "hello")
		time.Sleep(Interval)
		f.want("hello", 1, "file reloaded")
	})
}

// Kubernetes mounts a secret as symbolic links through ..data, which it replaces by renaming.
func TestSymlinkSwap(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		publish := func(version, content string) {
			t.Helper()
			if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, version, "secret"), content)
			if err := errors.Join(
				os.Symlink(version, filepath.Join(dir, "..data_tmp")),
				os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data"))); err != nil {
				t.Fatal(err)
			}
		}
		publish("..1", "hello1")
		path := filepath.Join(dir, "secret")
		if err := os.Symlink(filepath.Join("..data", "secret"), path); err != nil {
			t.Fatal(err)
		}
		f := open(t, path)
		publish("..2", "hello2")
		if err := os.RemoveAll(filepath.Join(dir, "..1")); err != nil {
			t.Fatal(err)
		}
		time.Sleep(Interval)
		f.want("hello2", 1, "file reloaded")
	})
}

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad")
	write(t, bad, "bad")
	huge := filepath.Join(dir, "huge")
	write(t, huge, strings.Repeat("x", MaxFileSize+1))
	for path, want := range map[string]string{
		bad:                          "greeting: it is bad",
		huge:                         "greeting: read " + huge + ": larger than 1048576 bytes",
		filepath.Join(dir, "absent"): "greeting: open " + filepath.Join(dir, "absent") + ": no such file or directory",
		dir:                          "greeting: read " + dir + ": is a directory",
		"":                           "greeting: the file name is empty",
		"/dev/zero":                  "greeting: read /dev/zero: larger than 1048576 bytes",
	} {
		v, err := New("greeting", []string{path}, func(c [][]byte) (text, error) {
			if string(c[0]) == "bad" {
				return "", errors.New("it is bad")
			}
			return text(c[0]), nil
		}, nil)
		if v != nil || err == nil || err.Error() != want {
			t.Errorf("%q: got error %v, want %s", path, err, want)
		}
	}
}

func TestConstant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := open(t)
		time.Sleep(time.Hour)
		f.want("", 0, "")
		if f.parsed != 1 {
			t.Errorf("parsed %d times", f.parsed)
		}
	})
}

// A pipe, as `--secret-file <(vault read ...)` gives, has its content once.
func TestPipe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Skip(err)
	}
	wrote := make(chan error)
	go func() { wrote <- os.WriteFile(path, []byte("hello"), 0) }()
	f := open(t, path)
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	f.start = f.start.Add(-time.Hour) // a check is long due, and would wait for a writer
	f.want("hello", 0, "")
}

// While one caller is held up by the file system, the others go on with what is known.
func TestSlowFileSystem(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write(t, path, "hello")
	f := open(t, path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Skip(err)
	}
	f.start = f.start.Add(-time.Hour) // a check is due
	held := make(chan text)
	go func() { held <- f.Get() }()
	for f.mu.TryLock() { // until the goroutine has begun to read, which it cannot finish
		f.mu.Unlock()
		if !f.due() {
			t.Fatal("the check is over already")
		}
		time.Sleep(time.Millisecond)
	}
	if got := f.Get(); got != "hello" {
		t.Errorf("got %q", got)
	}
	write(t, path, "hello again") // lets it finish
	if got := <-held; got != "hello again" {
		t.Errorf("got %q", got)
	}
}

// Under load from many goroutines each sees one value or the other, never an older one after a newer, and the files are read
// no more than once per interval.
func TestConcurrentUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "file")
		write(t, path, "0")
		var parsed atomic.Int32
		v, err := New("greeting", []string{path}, func(c [][]byte) (text, error) {
			parsed.Add(1)
			return text(c[0]), nil
		}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		for generation := range 8 {
			want := text('1' + rune(generation))
			write(t, path, string(want))
			time.Sleep(Interval)
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					var last text
					for range 200 {
						got := v.Get()
						if got < last {
							t.Errorf("%q after %q", got, last)
						}
						last = got
					}
				})
			}
			wg.Wait()
			if got := v.Get(); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
			if got := int(parsed.Load()); got != generation+2 {
				t.Errorf("parsed %d times after %d changes", got, generation+1)
			}
		}
	})
}

func BenchmarkGet(b *testing.B) {
	path := filepath.Join(b.TempDir(), "file")
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		b.Fatal(err)
	}
	v, err := New("greeting", []string{path}, func(c [][]byte) (text, error) { return text(c[0]), nil }, nil)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("use", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			v.Get()
		}
	})
	b.Run("check", func(b *testing.B) { // once per interval
		b.ReportAllocs()
		for b.Loop() {
			v.start = v.start.Add(-Interval)
			v.Get()
		}
	})
}
