package embedded_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgbroker/db/embedded"
)

func ownerOf(info os.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }

// precious is a file of root's that nobody else may read.
func precious(t *testing.T, dir string) (path string, check func()) {
	t.Helper()
	path = filepath.Join(dir, "precious")
	if err := os.WriteFile(path, []byte("1 secret of root\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path, func() {
		t.Helper()
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(path)
		if stat := info.Sys().(*syscall.Stat_t); err != nil || string(content) != "1 secret of root\n" || stat.Uid != 0 || info.Mode().Perm() != 0o600 {
			t.Errorf("root's file now says %q (%v), belongs to uid %d and has mode %v", content, err, stat.Uid, info.Mode())
		}
	}
}

// TestRootFollowsNothing: the user that runs Postgres owns the directory of the server, and puts links of all kinds where root
// will look for files. Root neither writes to what they lead to, nor gives it away, nor removes it, nor says what is in it.
func TestRootFollowsNothing(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("for root only")
	}
	traps := map[string]func(target, path string) error{
		"symbolic link": os.Symlink,
		"hard link":     os.Link, // where fs.protected_hardlinks is off, anybody can make one
		"pipe":          func(_, path string) error { return syscall.Mkfifo(path, 0o666) },
	}
	// As after a first start: what the user of Postgres owns is there.
	dir, outside := tempDir(t), tempDir(t)
	stop(t, start(t, embedded.Config{Dir: dir}))
	info, err := os.Stat(filepath.Join(dir, "postgres"))
	if err != nil {
		t.Fatal(err)
	}
	uid := int(ownerOf(info))
	target, check := precious(t, outside)
	for _, name := range []string{"postgres/postgres.log", "postgres/password", "postgres/data/postmaster.pid", "postgres/data/PG_VERSION", "postgres.lock"} {
		for kind, trap := range traps {
			t.Run(name+" "+kind, func(t *testing.T) {
				path := filepath.Join(dir, name)
				if err := os.Rename(path, path+".kept"); err != nil && !os.IsNotExist(err) {
					t.Fatal(err)
				}
				if err := trap(target, path); err != nil {
					t.Fatal(err)
				}
				if kind != "hard link" {
					if err := os.Lchown(path, uid, -1); err != nil {
						t.Fatal(err)
					}
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				s, err := embedded.Start(ctx, embedded.Config{Dir: dir})
				switch {
				case err == nil:
					t.Error("the trap was not noticed")
					stop(t, s)
				case ctx.Err() != nil, strings.Contains(err.Error(), "secret of root"), !strings.Contains(err.Error(), "remove it"):
					t.Errorf("got %v, want it to say what to remove", err)
				}
				check()
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
				if err := os.Rename(path+".kept", path); err != nil && !os.IsNotExist(err) {
					t.Fatal(err)
				}
			})
		}
	}
	stop(t, start(t, embedded.Config{Dir: dir}))
	t.Run("data.new", func(t *testing.T) {
		t.Parallel()
		dir, outside := tempDir(t), tempDir(t)
		stop(t, start(t, embedded.Config{Dir: dir}))
		_, check := precious(t, outside)
		if err := os.RemoveAll(dir + "/postgres/data"); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(outside, dir+"/postgres/data.new"); err != nil {
			t.Fatal(err)
		}
		stop(t, start(t, embedded.Config{Dir: dir}))
		check()
	})
	t.Run("postgres", func(t *testing.T) {
		t.Parallel()
		dir, outside := tempDir(t), tempDir(t)
		_, check := precious(t, outside)
		if err := os.Symlink(outside, dir+"/postgres"); err != nil {
			t.Fatal(err)
		}
		if s, err := embedded.Start(t.Context(), embedded.Config{Dir: dir}); err == nil {
			t.Error("a link was taken for the directory of the server")
			stop(t, s)
		}
		check()
	})
}

// TestRootStaysWhereRootRules: in a directory that somebody else can exchange at any moment root starts nothing, and says what to do.
func TestRootStaysWhereRootRules(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("for root only")
	}
	foreign, open := tempDir(t), tempDir(t)
	if err := os.Chown(foreign, 65534, 65534); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{foreign: "start pgbroker as that user", open: "chmod go-w"} {
		_, err := embedded.Start(t.Context(), embedded.Config{Dir: filepath.Join(dir, "state")})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: got %v, want it to say %q", dir, err, want)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			t.Errorf("%s: left behind %v (%v)", dir, entries, err)
		}
	}
}
