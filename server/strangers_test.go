package server

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b budget
		spend := func(n int, want bool) {
			t.Helper()
			if got := b.spend(n, 100, 10); got != want {
				t.Errorf("spending %d: %v with %+v", n, got, b)
			}
		}
		spend(100, true)
		spend(1, false)
		time.Sleep(99 * time.Millisecond)
		spend(0, false)
		time.Sleep(time.Millisecond) // what has come back before is not lost
		spend(0, true)
		time.Sleep(time.Second)
		spend(10, true)
		spend(1, false)
		time.Sleep(time.Hour)
		spend(100, true) // and no more than there was
		spend(1, false)
	})
}
