package bench

import (
	"net"
	"os"
	"os/exec"
	"testing"
	"time"
)

func TestProcesses(t *testing.T) {
	pid := os.Getpid()
	before := cpuSeconds(pid, false)
	for spin := 0; cpuSeconds(pid, false) < before+0.05; spin++ {
		if spin > 1_000_000 {
			t.Fatal("work does not show as CPU time")
		}
	}
	if before < 0 || residentBytes(pid) < 1<<20 {
		t.Errorf("got %g s of CPU, %d bytes of memory", before, residentBytes(pid))
	}
	if parentOf(pid) != os.Getppid() || processName(pid) == "" {
		t.Errorf("got parent %d and name %q, want parent %d", parentOf(pid), processName(pid), os.Getppid())
	}
	const nobody = 1 << 30
	if cpuSeconds(nobody, true) >= 0 || residentBytes(nobody) != 0 || processName(nobody) != "" {
		t.Error("a process that is not there has figures")
	}
}

func TestCPUOfChildrenCounts(t *testing.T) {
	// A shell that has waited for a child that has worked, and another child that lives.
	cmd := exec.Command("sh", "-c", "sh -c 'i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done'; echo; cat")
	in, out := must(cmd.StdinPipe()), must(cmd.StdoutPipe())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }() // its input is closed by then
	defer in.Close()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if own, all := cpuSeconds(cmd.Process.Pid, false), cpuSeconds(cmd.Process.Pid, true); all < own+0.02 {
		t.Errorf("got %g s with children, %g s without", all, own)
	}
	if children := childrenOf(os.Getpid()); len(children) == 0 {
		t.Error("the shell is not found as a child")
	}
}

func TestListenerIsFound(t *testing.T) {
	for _, network := range []string{"tcp4", "tcp6"} {
		l, err := net.Listen(network, "localhost:0")
		if err != nil {
			t.Logf("no %s here: %v", network, err)
			continue
		}
		defer l.Close()
		if pid := listenerOf(l.Addr().String()); pid != os.Getpid() {
			t.Errorf("%s: got process %d, want this one, %d", l.Addr(), pid, os.Getpid())
		}
	}
	for _, address := range []string{"127.0.0.1:1", "", "127.0.0.1:x", "127.0.0.1:99999"} {
		if pid := listenerOf(address); pid != 0 {
			t.Errorf("%q: got process %d, want none", address, pid)
		}
	}
}

func TestProcessesOfThisTestAreUnknown(t *testing.T) {
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	if p := findProcesses(t.Context(), l.Addr().String(), "", 0, 0); p.server != 0 || p.postgres != 0 {
		t.Errorf("got %d and %d, want none: server and generator cannot be told apart", p.server, p.postgres)
	}
	if p := findProcesses(t.Context(), "192.0.2.1:5443", "postgres://192.0.2.1/x", 12, 34); p.server != 12 || p.postgres != 34 {
		t.Errorf("got %d and %d, want what the user has said", p.server, p.postgres)
	}
	if u := (*processes)(nil).usage().minus(usage{unknown, unknown, 0}); u.server >= 0 || u.postgres >= 0 || u.client <= 0 {
		t.Errorf("got %+v", u)
	}
}

func TestMemoryIsWatched(t *testing.T) {
	p := &processes{server: os.Getpid()}
	peak := p.watchMemory()
	block := make([]byte, 64<<20)
	for i := 0; i < len(block); i += 4096 {
		block[i] = 1
	}
	time.Sleep(150 * time.Millisecond) // one look
	block[0] = 2
	if got := peak(); got < 64<<20 {
		t.Errorf("got %d bytes, want at least the 64 MiB that were used", got)
	}
}

func TestMachineFacts(t *testing.T) {
	processor, kernel, memory := machineFacts()
	if kernel == "" || memory == 0 {
		t.Errorf("got %q, %q, %d", processor, kernel, memory)
	}
	if fileSystemOf("/proc/self") != "proc" || fileSystemOf("/") == "" {
		t.Errorf("got %q for /proc/self and %q for /", fileSystemOf("/proc/self"), fileSystemOf("/"))
	}
}
