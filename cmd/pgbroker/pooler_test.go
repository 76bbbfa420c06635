package main

import (
	"strings"
	"testing"

	"pgbroker/db/dbtest"
)

// Commands that work on the database go through a pooler in session mode, and past one in transaction mode; else they say what
// to set.
func TestCommandsBehindAPooler(t *testing.T) {
	p := dbtest.New(t)
	session := dbtest.StartPgBouncer(t, p.ConnString, map[string]string{"pool_mode": "session"})
	transaction := dbtest.StartPgBouncer(t, p.ConnString, map[string]string{"pool_mode": "transaction"})
	for _, tt := range []struct {
		name  string
		flags []string
		says  string // part of the error; "": it works
	}{
		{"session mode", []string{"--database-url", session.ConnString(), "--database-pooler"}, ""},
		{"past transaction mode", []string{"--database-url", transaction.ConnString(), "--database-pooler", "--listener-database-url", p.ConnString}, ""},
		{"transaction mode", []string{"--database-url", transaction.ConnString(), "--database-pooler"}, "listener_database_url"},
		{"not told", []string{"--database-url", session.ConnString()}, "set database_pooler"},
	} {
		for _, command := range [][]string{{"migrate", "up"}, {"schema", "list"}} {
			r := try(t, nil, append(command, tt.flags...)...)
			if (r.code == exitOK) != (tt.says == "") || !strings.Contains(r.stderr, tt.says) {
				t.Errorf("%s: %v: got exit code %d: %s", tt.name, command, r.code, r.stderr)
			}
		}
	}
}
