package dbtest_test

import (
	"context"
	"testing"

	"pgbroker/db/dbtest"
)

func TestNew(t *testing.T) {
	for range 4 {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			d := dbtest.New(t)
			var n int
			if err := d.Pool.QueryRow(context.Background(), "SELECT count(*) FROM pgbroker.records").Scan(&n); err != nil {
				t.Fatal(err)
			}
		})
	}
}
