package invariants

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	"pgregory.net/rapid"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/server/servertest"
)

// stored is what a record is expected to be.
type stored struct {
	version       int64
	payload, text string
}

// TestWritesAgainstAModel writes batches of every kind, records that are there and records that are not, deletions and
// conditions in any mix, and compares what it is told, and what the tables then hold, with a map.
func TestWritesAgainstAModel(t *testing.T) {
	t.Parallel()
	conn := dbtest.New(t).Connect(t)
	queries := db.New(conn)
	keys := []string{"t/a", "t/b", "t/c", "u/a", "u/b", "u/c"}
	texts := []string{"", "one", "two\x1fthree"}
	rapid.Check(t, func(t *rapid.T) {
		// Each try is a data set of its own.
		if _, err := conn.Exec(t.Context(), "TRUNCATE pgbroker.records"); err != nil {
			t.Fatal(err)
		}
		model := make(map[string]stored)
		tombstones := 0
		for step := range rapid.IntRange(1, 6).Draw(t, "batches") {
			var batch db.RecordsWriteParams
			conflicts := make(map[int32]bool)
			requests := rapid.Int32Range(1, 3).Draw(t, "requests")
			for i, key := range rapid.Permutation(keys).Draw(t, "keys")[:rapid.IntRange(1, len(keys)).Draw(t, "records")] {
				recordType, id, _ := strings.Cut(key, "/")
				var payload, text string
				deletes := rapid.IntRange(0, 3).Draw(t, "delete") == 0
				if !deletes {
					payload, text = fmt.Sprintf("%d-%d", step, i), rapid.SampledFrom(texts).Draw(t, "text")
				}
				request := rapid.Int32Range(0, requests-1).Draw(t, "request")
				var expected int64
				if before, ok := model[key]; ok && rapid.IntRange(0, 2).Draw(t, "conditional") == 0 {
					expected = before.version + rapid.Int64Range(0, 1).Draw(t, "wrong")
					conflicts[request] = conflicts[request] || expected != before.version
				}
				batch.Types = append(batch.Types, recordType)
				batch.IDs = append(batch.IDs, id)
				batch.Deletes = append(batch.Deletes, deletes)
				batch.Payloads = append(batch.Payloads, []byte(payload))
				batch.Projections = append(batch.Projections, "")
				batch.SearchTexts = append(batch.SearchTexts, text)
				batch.IndexCIDRs = append(batch.IndexCIDRs, "")
				batch.Requests = append(batch.Requests, request)
				batch.Expected = append(batch.Expected, expected)
			}

			rows, err := queries.RecordsWrite(t.Context(), batch)
			if err != nil {
				t.Fatal(err)
			}
			told := make(map[string]db.RecordsWriteRow)
			for _, row := range rows {
				if row.Version == 0 {
					continue
				}
				key := row.Type + "/" + row.ID
				if before, ok := told[key]; ok {
					t.Fatalf("%s was written twice: %+v, %+v", key, before, row)
				}
				told[key] = row
			}
			changes := 0
			for i, id := range batch.IDs {
				key := batch.Types[i] + "/" + id
				before, present := model[key]
				switch row := told[key]; {
				case conflicts[batch.Requests[i]] || batch.Deletes[i] && !present:
					if row.Version != 0 {
						t.Fatalf("%s was changed: %+v", key, row)
					}
				case row.Version <= before.version || row.Deleted != batch.Deletes[i]:
					t.Fatalf("%s: told %+v", key, row)
				case batch.Deletes[i]:
					delete(model, key)
					changes, tombstones = changes+1, tombstones+1
				default:
					model[key] = stored{row.Version, string(batch.Payloads[i]), batch.SearchTexts[i]}
					changes++
				}
			}
			if len(told) != changes {
				t.Fatalf("told of %d changes of %d: %+v", len(told), changes, rows)
			}
			wantStored(t, conn, model, tombstones)
		}
	})
}

// wantStored compares the tables with the model.
func wantStored(t *rapid.T, conn *pgx.Conn, model map[string]stored, tombstones int) {
	t.Helper()
	got := make(map[string]stored)
	rows, err := conn.Query(t.Context(), `
		SELECT type || '/' || id, r.version, convert_from(r.payload, 'UTF8'), coalesce(t.search_text, '')
		FROM pgbroker.records r LEFT JOIN pgbroker.search_texts t USING (type, id)`)
	if err != nil {
		t.Fatal(err)
	}
	_, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (struct{}, error) {
		var key string
		var record stored
		err := row.Scan(&key, &record.version, &record.payload, &record.text)
		got[key] = record
		return struct{}{}, err
	})
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(got, model) {
		t.Fatalf("stored: %v\nwant:   %v", got, model)
	}
	// The log has the latest change of each record and every tombstone since; the counts and texts are those of the records.
	counts := make([]int, 4)
	if err := conn.QueryRow(t.Context(), `
		SELECT (SELECT count(*) FROM pgbroker.changes c JOIN pgbroker.records r USING (type, id, version) WHERE NOT c.deleted),
		       (SELECT count(*) FROM pgbroker.changes c),
		       (SELECT coalesce(sum(record_count), 0) FROM pgbroker.record_types),
		       (SELECT count(*) FROM pgbroker.search_texts t WHERE NOT EXISTS (SELECT FROM pgbroker.records r WHERE (r.type, r.id) = (t.type, t.id)))`,
	).Scan(&counts[0], &counts[1], &counts[2], &counts[3]); err != nil {
		t.Fatal(err)
	}
	if want := []int{len(model), len(model) + tombstones, len(model), 0}; !slices.Equal(counts, want) {
		t.Fatalf("records in the log, changes in it, records counted, texts without a record: %v, want %v", counts, want)
	}
}

// TestWritesLookUpByKey: what is planned while the table is empty, and PostgreSQL knows it, goes on looking up by key when the
// table has grown.
func TestWritesLookUpByKey(t *testing.T) {
	t.Parallel()
	conn := dbtest.New(t).Connect(t)
	queries := db.New(conn)
	exec := func(sql string) {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	write := func(from, n int, deletes bool, expected int64) {
		var batch db.RecordsWriteParams
		for i := range n {
			batch.Types, batch.IDs = append(batch.Types, "t"), append(batch.IDs, fmt.Sprint(from+i))
			batch.Deletes, batch.Payloads = append(batch.Deletes, deletes), append(batch.Payloads, []byte("x"))
			batch.Projections, batch.SearchTexts = append(batch.Projections, ""), append(batch.SearchTexts, fmt.Sprint("text ", deletes))
			batch.IndexCIDRs, batch.Requests = append(batch.IndexCIDRs, ""), append(batch.Requests, int32(i))
			batch.Expected = append(batch.Expected, expected)
		}
		if _, err := queries.RecordsWrite(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
	}
	for _, table := range []string{"records", "search_texts", "changes"} {
		exec("ALTER TABLE pgbroker." + table + " SET (autovacuum_enabled = off)") // it would have the statements planned anew
		exec("VACUUM ANALYZE pgbroker." + table)
	}
	// Each statement is planned, on one record.
	write(0, 1, false, 0)
	write(0, 1, false, 0)
	write(0, 1, false, 7)
	write(0, 1, true, 0)
	const records, batch = 3000, 100
	for _, round := range []struct {
		deletes  bool
		expected int64
	}{{}, {}, {expected: 7}, {deletes: true}} {
		for from := 0; from < records; from += batch {
			write(from, batch, round.deletes, round.expected)
		}
	}
	exec("SELECT pg_stat_force_next_flush()")
	var read, scanned int64
	if err := conn.QueryRow(t.Context(), `
		SELECT (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname IN ('records', 'search_texts')),
		       (SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE relname IN ('records', 'search_texts'))`).Scan(&read, &scanned); err != nil {
		t.Fatal(err)
	}
	// A few look-ups for each record and round; reading all for each batch would be half a million.
	if most := int64(20 * records); read > most || scanned > most {
		t.Errorf("%d entries of indexes and %d rows of tables were read for %d records, want at most %d", read, scanned, records, most)
	}
}

// TestReadsLookUpByKey: the same for what a replica is asked.
func TestReadsLookUpByKey(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{ConfigureDB: func(c *db.Config) { c.MaxConns = 2 }})
	for _, table := range []string{"records", "search_texts", "changes", "record_types"} {
		b.Database.Exec(t, "ALTER TABLE pgbroker."+table+" SET (autovacuum_enabled = off)")
	}
	// No VACUUM in between: it has the statements planned anew.
	if _, err := b.SetOptions(t.Context(), &databroker.SetOptionsRequest{
		Type: "t", Options: &databroker.Options{IndexableFields: []string{"color"}},
	}); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"records", "search_texts", "changes"} {
		b.Database.Exec(t, "VACUUM ANALYZE pgbroker."+table)
	}
	ask := func(i int) {
		t.Helper()
		if _, err := b.Get(t.Context(), &databroker.GetRequest{Type: "t", Id: fmt.Sprint(i)}); err != nil && status.Code(err) != codes.NotFound {
			t.Fatal(err)
		}
		for _, filter := range []map[string]any{
			{"id": fmt.Sprint(i)},
			{"color": fmt.Sprint("c", i)},
			{"$or": []any{map[string]any{"id": fmt.Sprint(i)}, map[string]any{"id": fmt.Sprint(i + 1)}}},
		} {
			asked, err := structpb.NewStruct(filter)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := b.Query(t.Context(), &databroker.QueryRequest{Type: "t", Filter: asked, Limit: 1}); err != nil {
				t.Fatal(err)
			}
		}
	}
	askAll := func(n int) {
		var group errgroup.Group
		for worker := range 2 {
			group.Go(func() error {
				for i := range n / 2 {
					ask(2*i + worker)
				}
				return nil
			})
		}
		if err := group.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	askAll(20)
	const records = 3000
	b.Database.Exec(t, `INSERT INTO pgbroker.records (type, id, payload, data)
		SELECT 't', i, 'x', jsonb_build_object('color', 'c' || i) FROM generate_series(1, $1::integer) AS i`, records)
	read := func() (n int64) {
		t.Helper()
		for worker := range 4 {
			ask(worker) // what a connection has read is known a moment after its next statement
		}
		err := b.Database.Pool.QueryRow(t.Context(), `
			SELECT (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes WHERE relname IN ('records', 'search_texts')) +
			       (SELECT sum(seq_tup_read) FROM pg_stat_user_tables WHERE relname IN ('records', 'search_texts'))`).Scan(&n)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := read()
	const questions = 200
	askAll(questions)
	b.Database.TerminateBackends(t, "pgbroker") // they say what they have read when they end
	if n := read() - before; n > 20*questions {
		t.Errorf("%d entries and rows were read for %d records", n, questions)
	}
}

// TestExpiryReadsWhatHasExpired: looking for what has expired costs what has expired, however many records have not, and
// waits for no writer when there is nothing.
func TestExpiryReadsWhatHasExpired(t *testing.T) {
	t.Parallel()
	database := dbtest.New(t)
	conn := database.Connect(t)
	count := func(sql string, args ...any) (n int64) {
		t.Helper()
		if err := conn.QueryRow(t.Context(), sql, args...).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	const sessions = 5000
	insert := func(from, to int, expiry string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), `INSERT INTO pgbroker.records (type, id, data)
			SELECT 'type.googleapis.com/session.Session', 's' || i, jsonb_build_object('expires_at', now() + $3::text::interval)
			FROM generate_series($1::integer, $2::integer) AS i`, from, to, expiry); err != nil {
			t.Fatal(err)
		}
	}
	const read = `SELECT sum(idx_tup_read) + sum(seq_tup_read) FROM pg_stat_user_indexes i JOIN pg_stat_user_tables t USING (relid) WHERE t.relname = 'records'`
	flush := func() {
		t.Helper()
		if _, err := conn.Exec(t.Context(), "SELECT pg_stat_force_next_flush()"); err != nil {
			t.Fatal(err)
		}
	}
	count("SELECT pgbroker.expire_records(200)") // planned on an empty table
	insert(1, sessions, "1 hour")
	flush()
	before := count(read)
	writer := database.Connect(t)
	if _, err := writer.Exec(t.Context(), "BEGIN; SELECT pgbroker.lock_order()"); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if n := count("SELECT pgbroker.expire_records(200)"); n != 0 {
			t.Errorf("%d sessions ended before their time", n)
		}
	}
	if _, err := writer.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	insert(sessions+1, sessions+30, "-1 hour")
	for _, want := range []int64{20, 10, 0} {
		if n := count("SELECT pgbroker.expire_records(20)"); n != want {
			t.Errorf("%d sessions ended, want %d", n, want)
		}
	}
	flush()
	if n := count(read) - before; n > sessions {
		t.Errorf("%d entries and rows were read to find 30 that had expired", n)
	}
	if n := count("SELECT count(*) FROM pgbroker.records"); n != sessions {
		t.Errorf("%d sessions are left, want %d", n, sessions)
	}
}

// TestVacuumLocksNobodyOut: the space of records that have gone stays with the tables. To give it back VACUUM would lock
// all writers out for a while.
func TestVacuumLocksNobodyOut(t *testing.T) {
	t.Parallel()
	conn := dbtest.New(t).Connect(t)
	for _, sql := range []string{
		`INSERT INTO pgbroker.records (type, id, data) SELECT 't', i, '{"text": "some text"}' FROM generate_series(1, 20000) AS i`,
		`DELETE FROM pgbroker.records`,
		`DELETE FROM pgbroker.changes`,
		`VACUUM pgbroker.records, pgbroker.search_texts, pgbroker.changes`,
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	for _, table := range []string{"records", "search_texts", "changes"} {
		var size int64
		if err := conn.QueryRow(t.Context(), "SELECT pg_relation_size('pgbroker."+table+"')").Scan(&size); err != nil {
			t.Fatal(err)
		}
		if size == 0 {
			t.Errorf("%s was truncated", table)
		}
	}
}

// TestOneSearchPathUnderTheOrderLock: a function that is called under another search path than before is planned anew. What
// takes the order lock on the way of each write, before the triggers take it again, must do so under theirs.
func TestOneSearchPathUnderTheOrderLock(t *testing.T) {
	t.Parallel()
	conn := dbtest.New(t).Connect(t)
	rows, err := conn.Query(t.Context(), `
		SELECT DISTINCT array_to_string(f.proconfig, ' ') ~ 'search_path=pg_catalog, pg_temp'
		FROM pg_proc f
		WHERE f.oid IN ('pgbroker.write_records'::regproc, 'pgbroker.write_differences'::regproc, 'pgbroker.put_search_texts'::regproc)
		   OR f.oid IN (SELECT tgfoid FROM pg_trigger WHERE tgrelid = 'pgbroker.records'::regclass AND tgtype & 1 = 0)`)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := pgx.CollectRows(rows, pgx.RowTo[*bool]); err != nil || len(got) != 1 || got[0] == nil || !*got[0] {
		t.Errorf("not all functions set the same search path (%v)", err)
	}
}
