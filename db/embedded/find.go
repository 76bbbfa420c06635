package embedded

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// MinMajor is the oldest major version of PostgreSQL that is used.
const MinMajor = 15

// BinEnv is the environment variable that names the directory of the
// PostgreSQL server binaries. When it is set, no other place is searched.
const BinEnv = "PGBROKER_POSTGRES_BIN"

// ErrNoBinaries says that this machine has no usable PostgreSQL server
// binaries. The error that wraps it names the places searched and how to
// install them.
var ErrNoBinaries = errors.New("no usable PostgreSQL server binaries")

// Binaries is one set of PostgreSQL server binaries.
type Binaries struct {
	Dir     string // holds postgres and initdb
	Major   int    // 15
	Version string // "15.18"
}

// binDirs are the places where packages put server binaries, apart from PATH.
// A variable only so that tests can point it elsewhere.
var binDirs = []string{
	"/usr/lib/postgresql/*/bin",                          // Debian, Ubuntu
	"/usr/pgsql-*/bin",                                   // PGDG packages for RHEL, Fedora
	"/usr/libexec/postgresql*",                           // Alpine
	"/usr/lib/postgresql*/bin",                           // SUSE
	"/opt/homebrew/opt/postgresql@*/bin",                 // Homebrew, Apple silicon
	"/usr/local/opt/postgresql@*/bin",                    // Homebrew, Intel
	"/home/linuxbrew/.linuxbrew/opt/postgresql@*/bin",    // Homebrew, Linux
	"/Applications/Postgres.app/Contents/Versions/*/bin", // Postgres.app
	"/usr/local/pgsql/bin",                               // make install
}

// Find returns the PostgreSQL server binaries to use: those of the directory
// in PGBROKER_POSTGRES_BIN if that is set, else those on PATH, else the newest
// in the usual places of distributions and Homebrew. The error, which wraps
// ErrNoBinaries, says where it looked and how to install them.
func Find(ctx context.Context) (Binaries, error) {
	found, err := findAll(ctx)
	if err != nil {
		return Binaries{}, err
	}
	return found[0], nil
}

// findMajor is Find for a data directory that already has a major version;
// dir is only for the message.
func findMajor(ctx context.Context, major int, dir string) (Binaries, error) {
	found, err := findAll(ctx)
	if err != nil {
		return Binaries{}, err
	}
	for _, b := range found {
		if b.Major == major {
			return b, nil
		}
	}
	have := make([]string, len(found))
	for i, b := range found {
		have[i] = b.Version + " in " + b.Dir
	}
	return Binaries{}, fmt.Errorf("data directory %s was made by PostgreSQL %d, but the binaries found are %s: "+
		"install PostgreSQL %d; or convert the directory with pg_upgrade; or move it away to start with an empty one",
		dir, major, strings.Join(have, ", "), major)
}

// findAll returns every usable set of binaries, best first, and at least one.
func findAll(ctx context.Context) ([]Binaries, error) {
	if dir := os.Getenv(BinEnv); dir != "" {
		b, err := probe(ctx, dir)
		if err != nil {
			return nil, fmt.Errorf("%w: %s=%s: %w", ErrNoBinaries, BinEnv, dir, err)
		}
		return []Binaries{b}, nil
	}

	var (
		found    []Binaries
		searched = []string{"PATH"}
		rejected []string
		seen     = map[string]bool{}
	)
	add := func(dir string) {
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			dir = real
		}
		if seen[dir] {
			return
		}
		seen[dir] = true
		switch b, err := probe(ctx, dir); {
		case err == nil:
			found = append(found, b)
		case !errors.Is(err, os.ErrNotExist):
			rejected = append(rejected, fmt.Sprintf("%s (%v)", dir, err))
		}
	}
	if path, err := exec.LookPath("postgres"); err == nil {
		// PATH may hold a link to the real place, beside which initdb is.
		if real, err := filepath.EvalSymlinks(path); err == nil {
			path = real
		}
		add(filepath.Dir(path))
	}
	onPath := len(found)
	for _, pattern := range binDirs {
		searched = append(searched, pattern)
		dirs, _ := filepath.Glob(pattern) // the patterns are well-formed constants
		for _, dir := range dirs {
			add(dir)
		}
	}
	slices.SortStableFunc(found[onPath:], func(a, b Binaries) int { return cmp.Compare(b.Major, a.Major) })
	if err := ctx.Err(); err != nil {
		return nil, err // which made the probes fail
	}
	if len(found) > 0 {
		return found, nil
	}
	msg := fmt.Sprintf("searched %s", strings.Join(searched, ", "))
	if len(rejected) > 0 {
		msg += "; not usable: " + strings.Join(rejected, ", ")
	}
	return nil, fmt.Errorf("%w (version %d or newer): %s. Install them with: %s; or set %s to their directory; "+
		"or give a connection string of a server that already runs",
		ErrNoBinaries, MinMajor, msg, installCommand(), BinEnv)
}

var versionPattern = regexp.MustCompile(`\(PostgreSQL\) ((\d+)\S*)`)

// probe asks the postgres binary in dir for its version.
func probe(ctx context.Context, dir string) (Binaries, error) {
	for _, name := range []string{"postgres", "initdb"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return Binaries{}, err
		}
	}
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "postgres"), "--version")
	cmd.Env = childEnv("/")
	out, err := cmd.Output()
	if err != nil {
		return Binaries{}, fmt.Errorf("postgres --version: %w", err)
	}
	m := versionPattern.FindStringSubmatch(string(out))
	if m == nil {
		return Binaries{}, fmt.Errorf("postgres --version: got %q, want a line with (PostgreSQL) and a version",
			strings.TrimSpace(string(out)))
	}
	major, err := strconv.Atoi(m[2])
	if err != nil {
		return Binaries{}, fmt.Errorf("postgres --version: %w", err)
	}
	if major < MinMajor {
		return Binaries{}, fmt.Errorf("version %s, need %d or newer", m[1], MinMajor)
	}
	return Binaries{Dir: dir, Major: major, Version: m[1]}, nil
}

// installCommand is the command that installs PostgreSQL on this machine.
func installCommand() string {
	if runtime.GOOS == "darwin" {
		return "brew install postgresql@17"
	}
	for _, c := range []struct{ tool, command string }{
		{"apt-get", "apt-get install postgresql"},
		{"dnf", "dnf install postgresql-server"},
		{"yum", "yum install postgresql-server"},
		{"zypper", "zypper install postgresql-server"},
		{"apk", "apk add postgresql"},
		{"pacman", "pacman -S postgresql"},
		{"brew", "brew install postgresql@17"},
	} {
		if _, err := exec.LookPath(c.tool); err == nil {
			return c.command
		}
	}
	return "the package manager of this system (package postgresql or postgresql-server)"
}
