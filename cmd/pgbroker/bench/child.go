package bench

import (
	"bytes"
	"os"
	"strings"
	"sync"
	"syscall"
)

// ownGroup puts a child into a process group of its own: Ctrl-C reaches this process only, which then ends the child in good
// order.
func ownGroup() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

// childEnvironment is the environment of children: nothing that would configure them, but for what is given.
func childEnvironment(variables ...string) []string {
	var environment []string
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "TZ", "PGBROKER_POSTGRES_BIN"} {
		if value, ok := os.LookupEnv(name); ok {
			environment = append(environment, name+"="+value)
		}
	}
	for _, variable := range os.Environ() { // GOMAXPROCS, GOGC, GODEBUG and the like act on all alike
		if strings.HasPrefix(variable, "GO") {
			environment = append(environment, variable)
		}
	}
	return append(environment, variables...)
}

// A tail keeps the end of what is written to it.
type tail struct {
	mu sync.Mutex // protects b
	b  []byte
}

const tailBytes = 8 << 10

// Write implements io.Writer.
func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, b...)
	if surplus := len(t.b) - tailBytes; surplus > 0 {
		t.b = t.b[surplus:]
	}
	return len(b), nil
}

// String returns the end.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.b))
}
