package embedded

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path/filepath"
	"strings"
)

// ErrNotRunning is the error of [Running] when no server uses the directory.
var ErrNotRunning = errors.New("no embedded postgres is running")

// Running returns the connection string of the server that another process
// runs with its data in dir, as [Server.ConnString] does there.
func Running(dir string) (string, error) {
	a, err := chooseAccount(dir)
	if err != nil {
		return "", err
	}
	content, err := readFile(filepath.Join(dir, homeName), pidFile, a)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w in %s", ErrNotRunning, dir)
	}
	if err != nil {
		return "", err
	}
	// The fourth line is the port, the fifth the directory of the socket.
	// Source: src/include/utils/pidfile.h of PostgreSQL.
	lines := strings.Split(string(content), "\n")
	if len(lines) < 5 {
		return "", fmt.Errorf("%w in %s yet: it is starting", ErrNotRunning, dir)
	}
	u := url.URL{Scheme: "postgres", Path: "/" + Database, RawQuery: url.Values{
		"host": {strings.TrimSpace(lines[4])}, "port": {strings.TrimSpace(lines[3])}, "user": {User},
	}.Encode()}
	return u.String(), nil
}
