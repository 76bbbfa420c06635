package projection

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgbroker/db/dbtest"
)

// TestSQLWriteOfLongLists: encoding takes time in proportion to what is encoded. It runs under the order lock, so nobody else writes
// meanwhile. Each of these took 10 s to 80 s, or longer, when each element was appended to those before.
func TestSQLWriteOfLongLists(t *testing.T) {
	t.Parallel()
	const n = 36_000
	d := dbtest.New(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	conn, err := d.Pool.Acquire(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	// What is measured is the time of the processor, which says more on a busy machine. A tenth of this is usual.
	const patience = 3 * time.Second
	timed := func(what, sql string) {
		t.Helper()
		before := processorTime(t, conn.Conn().PgConn().PID())
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		took := processorTime(t, conn.Conn().PgConn().PID()) - before
		t.Logf("%s: %v", what, took.Round(time.Millisecond))
		if took > patience {
			t.Errorf("%s takes %v", what, took)
		}
	}
	list := func(element string) string {
		return fmt.Sprintf("(SELECT jsonb_agg(%s) FROM generate_series(1, %d) AS g)", element, n)
	}
	object := func(value string) string {
		return fmt.Sprintf("(SELECT jsonb_object_agg('key-' || g, %s) FROM generate_series(1, %d) AS g)", value, n)
	}
	const text, number = "'00000000-0000-4000-8000-' || lpad(g::text, 12, '0')", "g"
	groups := func(recordType, field, value string) {
		insert := fmt.Sprintf(`INSERT INTO pgbroker.records (type, id, data) VALUES ('%s', '%s', jsonb_build_object('%s', %s))`, recordType, field, field, value)
		timed("insert "+field+" of "+recordType, insert)
		timed("another field", fmt.Sprintf(`UPDATE pgbroker.records SET data = data || '{"id": "x"}' WHERE type = '%s' AND id = '%s'`, recordType, field))
	}
	// A user of a company directory, and the claims of a session.
	const user, session = "pomerium.io/DirectoryUser", "type.googleapis.com/session.Session"
	groups(user, "group_ids", list(text))
	timed("longer", `UPDATE pgbroker.records SET data = jsonb_set(data, '{group_ids,-1}', '"last"', false) WHERE type = '`+user+`'`)
	fewer := func(list string) string { return strings.Replace(list, fmt.Sprint(n), fmt.Sprint(n/4), 1) }
	groups(user, "objects", fewer(list("jsonb_build_object('a', g)")))
	groups(user, "long", fewer(list("repeat('x', 100) || g || repeat('x', 100)")))
	groups(user, "digits", list("(10000000000000000 + g)::text"))
	groups(user, "numbers", list(number))
	groups(user, "members", object(text))
	groups(session, "claims", "jsonb_build_object('groups', "+list(text)+")")
	d.Exec(t, "DELETE FROM pgbroker.records WHERE type = '"+session+"'")
	groups(session, "claims", fewer(object("jsonb_build_array(g)")))
	timed("claims change", `UPDATE pgbroker.records SET data = jsonb_set(data, '{claims,key-7}', '["another"]') WHERE type = '`+session+`'`)
}

// processorTime returns what a process has used of the processor.
func processorTime(t *testing.T, pid uint32) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Skipf("needs a Postgres on the same machine, and Linux: %v", err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	ticks := 0 // of 10 ms
	for _, field := range fields[11:13] {
		n, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * (10 * time.Millisecond)
}
