//go:build !linux

package bench

// Where there is no /proc, nothing is known of other processes.

func cpuSeconds(int, bool) float64 { return unknown }

func processName(int) string { return "" }

func parentOf(int) int { return 0 }

func residentBytes(int) int64 { return 0 }

func listenerOf(string) int { return 0 }

func machineFacts() (processor, kernel string, memory int64) { return "", "", 0 }

func fileSystemOf(string) string { return "" }

func loadAverage() string { return "" }
