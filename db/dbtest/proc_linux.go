package dbtest

import "syscall"

// endWithTest makes a process end with that of the test.
func endWithTest(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGKILL }
