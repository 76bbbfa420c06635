// Package invariants holds the tests of the invariants in docs/design.md, named after them. Each has been
// seen to fail when the invariant is broken on purpose.
package invariants

import (
	"bytes"
	"runtime"
	"sync"
	"testing"

	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"pgbroker/db"
	"pgbroker/migrations"
	"pgbroker/proto/databroker"
	"pgbroker/server/servertest"
)

// record returns a record with a payload.
func record(t testing.TB, recordType, id string, payload proto.Message) *databroker.Record {
	t.Helper()
	data, err := anypb.New(payload)
	if err != nil {
		t.Fatal(err)
	}
	return &databroker.Record{Type: recordType, Id: id, Data: data}
}

// open opens a database until the test ends.
func open(t testing.TB, connString string) *db.DB {
	t.Helper()
	database, err := db.Open(t.Context(), db.Config{ConnString: connString})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(database.Close)
	return database
}

// migrate installs the schema on a server of the test's own.
func migrate(t testing.TB, connString string) {
	t.Helper()
	if err := migrations.Up(t.Context(), open(t, connString).ConnConfig()); err != nil {
		t.Fatal(err)
	}
}

func awaitServing(t testing.TB, r *servertest.Replica) {
	t.Helper()
	r.AwaitHealth(t, grpc_health_v1.HealthCheckResponse_SERVING)
}

// syncWriter makes a buffer safe for concurrent writers.
type syncWriter struct {
	mu     sync.Mutex
	buffer *bytes.Buffer
}

func (w *syncWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buffer.Write(p)
}

// String returns what was written so far.
func (w *syncWriter) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buffer.String()
}

// yield lets others run.
func yield() { runtime.Gosched() }
