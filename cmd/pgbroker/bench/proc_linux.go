package bench

import (
	"bytes"
	"encoding/hex"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// ticksPerSecond is the unit of times in /proc: the same on every architecture that Go runs on.
const ticksPerSecond = 100

// processStat is what matters of /proc/PID/stat.
type processStat struct {
	name          string
	parent        int
	own, children float64 // seconds of CPU: its own, and that of ended children
}

func readStat(pid int) (stat processStat, ok bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return stat, false
	}
	// The name in parentheses may hold anything; fields are counted after it.
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return stat, false
	}
	rest := strings.Fields(string(b[end+1:]))
	const parent, userTime, systemTime, childUserTime, childSystemTime = 1, 11, 12, 13, 14 // proc(5), from the third field on
	if len(rest) <= childSystemTime {
		return stat, false
	}
	number := func(i int) float64 { n, _ := strconv.ParseFloat(rest[i], 64); return n }
	return processStat{
		name: string(b[open+1 : end]), parent: int(number(parent)),
		own:      (number(userTime) + number(systemTime)) / ticksPerSecond,
		children: (number(childUserTime) + number(childSystemTime)) / ticksPerSecond,
	}, true
}

// cpuSeconds returns the CPU time that a process has used, with its children if wanted; negative when there is none.
func cpuSeconds(pid int, withChildren bool) float64 {
	stat, ok := readStat(pid)
	if !ok {
		return unknown
	}
	if !withChildren {
		return stat.own
	}
	seconds := stat.own + stat.children
	for _, child := range childrenOf(pid) {
		if stat, ok := readStat(child); ok {
			seconds += stat.own + stat.children
		}
	}
	return seconds
}

func childrenOf(pid int) []int {
	var found []int
	entries, _ := filepath.Glob("/proc/[0-9]*") // constant pattern
	for _, entry := range entries {
		child, err := strconv.Atoi(filepath.Base(entry))
		if err != nil {
			continue
		}
		if stat, ok := readStat(child); ok && stat.parent == pid {
			found = append(found, child)
		}
	}
	return found
}

func processName(pid int) string {
	stat, _ := readStat(pid)
	return stat.name
}

func parentOf(pid int) int {
	stat, _ := readStat(pid)
	return stat.parent
}

// residentBytes returns the memory of a process, or 0.
func residentBytes(pid int) int64 {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseInt(fields[1], 10, 64)
	return pages * int64(os.Getpagesize())
}

// listenerOf returns the process that listens on an address of this machine, or 0 if it cannot be seen.
func listenerOf(address string) int {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return 0
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return 0
	}
	wanted := ":" + strings.ToUpper(hex.EncodeToString([]byte{byte(number >> 8), byte(number)}))
	sockets := make(map[string]bool)
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(table)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			// sl local_address rem_address st ... inode
			fields := strings.Fields(line)
			if len(fields) > 9 && strings.HasSuffix(fields[1], wanted) && fields[3] == "0A" {
				sockets["socket:["+fields[9]+"]"] = true
			}
		}
	}
	if len(sockets) == 0 {
		return 0
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*") // constant pattern
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && sockets[target] {
			pid, _ := strconv.Atoi(strings.Split(link, "/")[2])
			return pid
		}
	}
	return 0
}

// machineFacts returns the processor, the kernel and the memory of this machine, as far as they are known.
func machineFacts() (processor, kernel string, memory int64) {
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				processor = strings.TrimSpace(value)
				break
			}
		}
	}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		kernel = "Linux " + strings.TrimSpace(string(b))
	}
	if b, err := os.ReadFile("/proc/meminfo"); err == nil {
		if fields := strings.Fields(string(b)); len(fields) > 1 && fields[0] == "MemTotal:" {
			kilobytes, _ := strconv.ParseInt(fields[1], 10, 64)
			memory = kilobytes << 10
		}
	}
	return processor, kernel, memory
}

// fileSystemOf returns the kind of file system that a path lies on, or "".
func fileSystemOf(path string) string {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return ""
	}
	kind, longest := "", -1
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) < 3 {
			continue
		}
		at := fields[1]
		if (path == at || at == "/" || strings.HasPrefix(path, at+"/")) && len(at) > longest {
			kind, longest = fields[2], len(at)
		}
	}
	return kind
}

// loadAverage returns how many processes have lately wanted to run, or "".
func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return ""
	}
	fields := strings.Fields(string(b))
	return strings.Join(fields[:min(3, len(fields))], ", ")
}
