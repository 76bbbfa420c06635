package migrations_test

import (
	"errors"
	"testing"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/migrations"
)

// Through a pooler in session mode the schema is migrated; one that hands each transaction to another session is refused, in
// whatever way it chooses them, before anything is changed.
func TestThroughAPooler(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name     string
		settings map[string]string
		refused  bool
	}{
		{"session", map[string]string{"pool_mode": "session"}, false},
		{"session, one at a time", map[string]string{"pool_mode": "session", "default_pool_size": "1"}, false},
		{"session, in turns", map[string]string{"pool_mode": "session", "server_round_robin": "1"}, false},
		{"transaction", map[string]string{"pool_mode": "transaction"}, true},
		{"transaction, one", map[string]string{"pool_mode": "transaction", "default_pool_size": "1"}, true},
		{"transaction, in turns", map[string]string{"pool_mode": "transaction", "server_round_robin": "1", "min_pool_size": "3"}, true},
		{"statement", map[string]string{"pool_mode": "statement"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := dbtest.NewEmpty(t)
			b := dbtest.StartPgBouncer(t, p.ConnString, tt.settings)
			d, err := db.Open(t.Context(), db.Config{ConnString: b.ConnString(), Pooler: true})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			err = migrations.Up(t.Context(), d.ConnConfig())
			if errors.Is(err, db.ErrTransactionPooler) != tt.refused || !tt.refused && err != nil {
				t.Errorf("got %v, refused wanted: %t", err, tt.refused)
			}
			var there bool
			if err := p.Pool.QueryRow(t.Context(), "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'pgbroker')").Scan(&there); err != nil || there == tt.refused {
				t.Errorf("the schema is there: %t, %v", there, err)
			}
		})
	}
}
