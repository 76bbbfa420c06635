//go:build unix && !linux

package embedded

import (
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

// setDeathSignal does nothing: only Linux has a parent-death signal. A
// postmaster left behind by kill -9 is stopped by the next Start on its
// directory.
func setDeathSignal(*syscall.SysProcAttr) {}

// isPostmasterOf reports whether process pid is the postmaster of dataDir, by
// the command line that Start gave it.
func isPostmasterOf(pid int, dataDir string) bool {
	out, err := exec.Command("ps", "-o", "command=", "-p", strconv.Itoa(pid)).Output()
	return err == nil && strings.Contains(string(out), "-D "+dataDir+" ")
}

// runsAs reports whether a process is one of the account.
func runsAs(pid int, a account) bool {
	out, err := exec.Command("ps", "-o", "uid=", "-p", strconv.Itoa(pid)).Output()
	return err == nil && strings.TrimSpace(string(out)) == strconv.FormatUint(uint64(a.uid), 10)
}

// alive reports whether process pid exists.
func alive(pid int) bool { return syscall.Kill(pid, 0) != syscall.ESRCH }
