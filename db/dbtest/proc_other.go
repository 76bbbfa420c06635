//go:build !linux

package dbtest

import "syscall"

// endWithTest does nothing where the kernel does not do it.
func endWithTest(*syscall.SysProcAttr) {}
