package embedded

import "testing"

// SetBinDirs replaces the places that are searched for binaries.
func SetBinDirs(t *testing.T, dirs ...string) {
	old := binDirs
	binDirs = dirs
	t.Cleanup(func() { binDirs = old })
}

// Alive reports whether a process exists.
var Alive = alive
