package db

import (
	"fmt"
	"log/slog"
	"runtime/debug"
)

// survive is to be deferred in work that goes on beside requests: a panic there is a bug, and would end the process. It is logged, and
// what was to be done is done the next time.
func survive(log *slog.Logger, task string) {
	if value := recover(); value != nil {
		log.Error("work in the background panicked, which is a bug", "task", task, "panic", fmt.Sprint(value), "stack", string(debug.Stack()))
	}
}
