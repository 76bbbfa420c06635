package chaos

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// build builds the program from the sources in a directory; as `make build` does, so that one finds in the
// cache what the other has compiled.
func build(ctx context.Context, sources, program string, flags ...string) error {
	args := append([]string{"build", "-trimpath", "-o", program}, flags...)
	cmd := exec.CommandContext(ctx, "go", append(args, "./cmd/pgbroker")...)
	cmd.Dir = sources
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", filepath.Base(program), err, out)
	}
	return nil
}

// module returns the directory of this module.
func module(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("find the module: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// buildRevision builds the program as it was at a revision, without touching the checkout.
func buildRevision(ctx context.Context, root, revision, dir, program string) error {
	sources := filepath.Join(dir, "previous")
	if err := os.Mkdir(sources, 0o755); err != nil {
		return err
	}
	archive := exec.CommandContext(ctx, "git", "-C", root, "archive", revision)
	var sorry bytes.Buffer
	archive.Stderr = &sorry
	unpack := exec.CommandContext(ctx, "tar", "-x", "-C", sources)
	var err error
	if unpack.Stdin, err = archive.StdoutPipe(); err != nil {
		return err
	}
	if err := unpack.Start(); err != nil {
		return err
	}
	archiveErr := archive.Run()
	unpackErr := unpack.Wait()
	if err := errors.Join(archiveErr, unpackErr); err != nil {
		return fmt.Errorf("get revision %s: %w: %s", revision, err, &sorry)
	}
	if err := sameMigrations(filepath.Join(root, "migrations"), filepath.Join(sources, "migrations")); err != nil {
		return fmt.Errorf("revision %s: %w", revision, err)
	}
	return build(ctx, sources, program)
}

// sameMigrations returns an error unless today's migrations begin with those of an earlier revision. Before the first
// release they are changed in place: programs from before then need another schema, whatever its number is.
func sameMigrations(today, earlier string) error {
	names, err := filepath.Glob(filepath.Join(earlier, "*.up.sql"))
	if err != nil {
		return err
	}
	if len(names) == 0 {
		return errors.New("it has no migrations")
	}
	for _, name := range names {
		was, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		is, err := os.ReadFile(filepath.Join(today, filepath.Base(name)))
		if errors.Is(err, fs.ErrNotExist) || err == nil && !bytes.Equal(was, is) {
			return fmt.Errorf("its migration %s is not one of today's, so it needs another schema", filepath.Base(name))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// skewEnv tells a program that buildSkewed has built by how many seconds its clock is wrong.
const skewEnv = "CHAOS_CLOCK_SKEW"

// buildSkewed builds the program with another package time, whose Now is wrong by what skewEnv says. A
// static program asks the kernel without passing through any library that could be replaced, and time
// namespaces leave the wall clock alone; so the clock is bent where the program reads it, and the product's
// sources stay as they are.
func buildSkewed(ctx context.Context, root, dir, program string) error {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("find the sources of Go: %w", err)
	}
	original := filepath.Join(strings.TrimSpace(string(out)), "src", "time", "time.go")
	text, err := os.ReadFile(original)
	if err != nil {
		return err
	}
	const read = "sec, nsec, mono := runtimeNow()"
	if n := bytes.Count(text, []byte(read)); n != 1 {
		return fmt.Errorf("skew the clock: %s reads it at %d places, and is known with one", original, n)
	}
	text = bytes.Replace(text, []byte(read), []byte(read+"\n\tsec += chaosSkew"), 1)
	extra := `package time

import "syscall"

var chaosSkew = func() int64 {
	text, _ := syscall.Getenv("` + skewEnv + `")
	seconds, _ := atoi(text)
	return int64(seconds)
}()
`
	bent, added, overlay := filepath.Join(dir, "time.go"), filepath.Join(dir, "chaosskew.go"), filepath.Join(dir, "overlay.json")
	replace, err := json.Marshal(map[string]map[string]string{"Replace": {
		original: bent,
		filepath.Join(filepath.Dir(original), "chaosskew.go"): added,
	}})
	if err != nil {
		return err
	}
	for path, content := range map[string][]byte{bent: text, added: []byte(extra), overlay: replace} {
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
	}
	return build(ctx, root, program, "-overlay", overlay)
}
