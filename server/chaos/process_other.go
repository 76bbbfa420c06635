//go:build !linux

package chaos

import (
	"errors"
	"os/exec"
	"syscall"
)

var errLinux = errors.New("this needs Linux")

type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

func startProcess(*exec.Cmd) (*process, error) { return nil, errLinux }

func (p *process) signal(sig syscall.Signal) error { return p.cmd.Process.Signal(sig) }

func (p *process) running() bool { return p.cmd.ProcessState == nil }

func children(int) []int { return nil }

func smallDisk(string, int) error { return errLinux }

func unmount(string) error { return errLinux }

func fillDisk(string) error { return errLinux }
