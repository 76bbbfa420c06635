package embedded

import (
	"fmt"
	"os"
	"strconv"
	"syscall"
)

// setDeathSignal makes the kernel ask the postmaster for a fast shutdown when
// this process dies, kill -9 included. The signal is tied to the thread that
// starts the child, not to the process: run keeps that thread.
func setDeathSignal(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGINT }

// isPostmasterOf reports whether process pid is a server process of dataDir:
// PostgreSQL makes its data directory the working directory of all of them.
func isPostmasterOf(pid int, dataDir string) bool {
	cwd, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/cwd")
	return err == nil && cwd == dataDir
}

// runsAs reports whether a process is one of the account.
func runsAs(pid int, a account) bool {
	info, err := os.Stat("/proc/" + strconv.Itoa(pid))
	return err == nil && ownerOf(info) == a.uid
}

// alive reports whether process pid exists and is not a zombie, which is what
// an orphan stays in a container whose first process does not reap.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// The second field is the name in parentheses, which may hold anything;
	// the state follows the last one.
	for i := len(stat) - 1; i >= 0; i-- {
		if stat[i] == ')' {
			return i+2 >= len(stat) || stat[i+2] != 'Z'
		}
	}
	return true
}
