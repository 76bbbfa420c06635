package embedded_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"pgbroker/db/embedded"
)

// TestKeepWaitsForAnotherProcess: a file that another process is just making has two names for a moment. That is no trap.
func TestKeepWaitsForAnotherProcess(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "secret")
	if err := os.WriteFile(path+".made", []byte("first"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(path+".made", path); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(100*time.Millisecond, func() { _ = os.Remove(path + ".made") })
	kept, created, err := embedded.Keep(dir, "secret", func() string { return "second" })
	if err != nil || created {
		t.Fatalf("kept %s, made again: %t, %v", kept, created, err)
	}
	if content, err := os.ReadFile(kept); string(content) != "first" || err != nil {
		t.Errorf("the file holds %q, %v", content, err)
	}
}
