package chaos

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSameMigrations: only a program whose migrations are the first of today's runs beside today's.
func TestSameMigrations(t *testing.T) {
	migrations := func(files ...string) string {
		dir := t.TempDir()
		for i := 0; i < len(files); i += 2 {
			if err := os.WriteFile(filepath.Join(dir, files[i]), []byte(files[i+1]), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	today := migrations("0001_a.up.sql", "a", "0002_b.up.sql", "b")
	for name, c := range map[string]struct{ earlier, refused string }{
		"the same":  {today, ""},
		"fewer":     {migrations("0001_a.up.sql", "a"), ""},
		"changed":   {migrations("0001_a.up.sql", "other"), "0001_a.up.sql"},
		"renamed":   {migrations("0001_x.up.sql", "a"), "0001_x.up.sql"},
		"more":      {migrations("0001_a.up.sql", "a", "0002_b.up.sql", "b", "0003_c.up.sql", "c"), "0003_c.up.sql"},
		"elsewhere": {migrations(), "no migrations"},
	} {
		switch err := sameMigrations(today, c.earlier); {
		case c.refused == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.refused != "" && (err == nil || !strings.Contains(err.Error(), c.refused)):
			t.Errorf("%s: got %v, want an error that names %q", name, err, c.refused)
		}
	}
}
