package invariants

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
)

// newPrimary starts a server with the schema.
func newPrimary(t testing.TB) *dbtest.Postgres {
	t.Helper()
	p := dbtest.Server(t, nil)
	migrate(t, p.ConnString())
	return p
}

// newStandby starts a standby that has everything so far.
func newStandby(primary *dbtest.Postgres) *dbtest.Postgres {
	standby := primary.Standby(nil)
	standby.CatchUp(primary)
	return standby
}

// TestI5_WhatAFailoverLosesIsForgotten kills a primary under load whose standby is behind, and promotes
// that: every client comes to have what the new primary has, the loss is reported, and no version means two
// things. Then the old primary comes back, and takes writes, and no replica goes there (I6).
func TestI5_WhatAFailoverLosesIsForgotten(t *testing.T) {
	t.Parallel()
	primary := newPrimary(t)
	standby := newStandby(primary)
	w := newWorld(t, 3, dbtest.ConnString(primary.Addr(), standby.Addr()))
	w.more(200)
	standby.Detach()
	w.more(200)
	w.observed()
	primary.Kill()
	standby.Promote()
	w.more(200)
	w.observed()
	primary.Restart()
	w.expectRefusal(primary)
	w.end(standby)
	w.expectLoss()
}

// TestI5_WithAHiddenTimeline does the same where the replicas' role may not see the timeline, as on some
// managed services.
func TestI5_WithAHiddenTimeline(t *testing.T) {
	t.Parallel()
	primary := newPrimary(t)
	primary.Exec(`
		REVOKE EXECUTE ON FUNCTION pg_walfile_name(pg_lsn) FROM PUBLIC;
		CREATE ROLE broker LOGIN PASSWORD '` + dbtest.Password + `';
		DO $$
		DECLARE statement text;
		BEGIN
			FOR statement IN SELECT pgbroker.grants(NULL, NULL, 'broker') LOOP
				CONTINUE WHEN statement IN ('BEGIN;', 'COMMIT;');
				EXECUTE statement;
			END LOOP;
		END $$`)
	standby := newStandby(primary)
	w := newWorld(t, 2, strings.Replace(dbtest.ConnString(primary.Addr(), standby.Addr()), "//"+dbtest.OwnerRole+":", "//broker:", 1))
	if !strings.Contains(w.log.String(), "hides its timeline") {
		t.Error("the log does not say that the timeline is hidden")
	}
	if got := w.replicas[0].DB.Timeline(); got != 0 {
		t.Errorf("the timeline is %d: this test proves nothing", got)
	}
	w.more(100)
	standby.Detach()
	w.more(100)
	w.observed()
	primary.Kill()
	standby.Promote()
	w.more(100)
	w.observed()
	primary.Restart()
	w.expectRefusal(primary)
	w.end(standby)
	w.expectLoss()
}

// TestI5_ASynchronousStandbyLosesNothing kills a primary under load whose standby has to confirm commits:
// not one acknowledged write is missing. (Clients may still have seen a change that was not confirmed: when
// the postmaster dies, sessions that wait for the standby give up, and for a moment others see their
// commits. Those are then lost like any other.)
func TestI5_ASynchronousStandbyLosesNothing(t *testing.T) {
	t.Parallel()
	primary := newPrimary(t)
	standby := newStandby(primary)
	primary.Exec("ALTER SYSTEM SET synchronous_standby_names = '*'")
	primary.Exec("SELECT pg_reload_conf()")
	w := newWorld(t, 2, dbtest.ConnString(primary.Addr(), standby.Addr()))
	w.more(300)
	primary.Kill()
	standby.Promote()
	w.more(100)
	w.end(standby)
	for id, version := range w.acked {
		// Later writes of the same record have superseded it, or nothing has.
		if got := ask[int64](t, standby, fmt.Sprintf(`SELECT coalesce(max(version), 0) FROM pgbroker.changes WHERE type = '%s' AND id = '%s'`, worldType, id)); got < int64(version) {
			t.Errorf("version %d of %s was acknowledged and is missing: the latest is %d", version, id, got)
		}
	}
	if n := ask[int](t, standby, `SELECT count(*) FROM pgbroker.epochs`); n != 1 {
		t.Errorf("%d epochs have begun, want 1", n)
	}
}

// TestI5_SwitchoverBackAndForth changes the roles of two servers ten times under load, as an operator does
// who loses nothing: nobody starts over.
func TestI5_SwitchoverBackAndForth(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("takes a while")
	}
	primary := newPrimary(t)
	standby := newStandby(primary)
	w := newWorld(t, 2, dbtest.ConnString(primary.Addr(), standby.Addr()))
	for range 10 {
		w.more(20)
		primary.Stop() // sends all to the standby before it ends
		standby.Promote()
		primary.Follow(standby)
		primary, standby = standby, primary
	}
	w.more(20)
	w.end(primary)
	w.expectNoLoss()
	if n := ask[int](t, primary, `SELECT count(*) FROM pgbroker.epochs`); n != 10 {
		t.Errorf("%d epochs have begun, want 10", n)
	}
}

// TestI5_RestoreToBeforeAnEpoch restores a backup from before a failover, which knows nothing of the epoch
// that began then: no version of that is issued again.
func TestI5_RestoreToBeforeAnEpoch(t *testing.T) {
	t.Parallel()
	first := newPrimary(t)
	second := newStandby(first)
	backup := newStandby(first)
	w := newWorld(t, 2, dbtest.ConnString(first.Addr(), second.Addr(), backup.Addr()))
	w.more(50)
	backup.Detach()
	w.more(50)
	second.CatchUp(first)
	first.Kill()
	second.Promote()
	w.more(50)
	w.observed()
	if n := ask[int](t, second, `SELECT count(*) FROM pgbroker.epochs`); n != 1 {
		t.Fatalf("%d epochs have begun, want 1", n)
	}
	second.Kill()
	// A restore finds in the archive which timelines there are, and begins one of its own.
	knowTimelines(t, backup, second)
	backup.Promote()
	if got := ask[int](t, backup, `SELECT pgbroker.server_timeline()::int`); got != 3 {
		t.Fatalf("the restored server is on timeline %d, want 3", got)
	}
	w.more(50)
	w.observed()
	second.Restart()
	w.expectRefusal(second)
	w.end(backup)
	w.expectLoss()
}

// TestI5_EpochsOfTwoBranches begins an epoch on two branches of history that know nothing of each other, as
// fast as it goes: their versions lie apart, in each order, and with a clock that is behind the versions too.
func TestI5_EpochsOfTwoBranches(t *testing.T) {
	t.Parallel()
	branches := []*pgx.Conn{dbtest.New(t).Connect(t), dbtest.New(t).Connect(t)}
	exec := func(conn *pgx.Conn, sql string) {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	const issue = `SELECT min(v), max(v) FROM (SELECT nextval('pgbroker.record_version') v FROM generate_series(1, 50)) issued`
	var ranges [][2]int64
	for _, ahead := range []int64{0, 1 << 52} {
		for range 5 {
			for _, conn := range branches {
				if ahead > 0 {
					exec(conn, fmt.Sprintf(`SELECT setval('pgbroker.record_version', %d)`, ahead))
				}
				exec(conn, `SELECT pgbroker.begin_epoch()`)
				var r [2]int64
				if err := conn.QueryRow(t.Context(), issue).Scan(&r[0], &r[1]); err != nil {
					t.Fatal(err)
				}
				ranges = append(ranges, r)
			}
		}
	}
	for i, a := range ranges {
		for _, b := range ranges[:i] {
			if a[0] <= b[1] && b[0] <= a[1] {
				t.Errorf("versions %v and %v were issued by different epochs", a, b)
			}
		}
	}
}

// knowTimelines gives a server the history files of another one.
func knowTimelines(t testing.TB, to, from *dbtest.Postgres) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(from.Dir(), "data", "pg_wal", "*.history"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no history: %v", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(filepath.Join(to.Dir(), "data", "pg_wal", filepath.Base(file)), text, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestI5_DumpAndRestore moves the database to other clusters by dump and restore: once with the loss of
// what was written after the dump, once without. The originals come back and are refused (I6).
func TestI5_DumpAndRestore(t *testing.T) {
	t.Parallel()
	first := newPrimary(t)
	second, third := dbtest.Server(t, nil), dbtest.Server(t, nil)
	second.Stop()
	third.Stop()
	w := newWorld(t, 2, dbtest.ConnString(first.Addr(), second.Addr(), third.Addr()))
	w.more(100)
	dump := first.Dump()
	w.more(100)
	w.observed()
	first.Kill()
	second.Restart()
	second.Load(dump)
	w.more(100)
	w.observed()
	if n := ask[int](t, second, `SELECT count(*) FROM pgbroker.epochs`); n != 1 {
		t.Errorf("%d epochs have begun, want 1", n)
	}
	w.expectLoss()

	// Planned: nothing is written from the dump on.
	w.pause()
	w.observed()
	lost, resyncs := w.lost(), w.resyncs()
	before := contentOf(t, second)
	dump = second.Dump()
	second.Stop()
	third.Restart()
	third.Load(dump)
	if after := contentOf(t, third); after != before {
		t.Errorf("the restored database differs:\n%s\nwant:\n%s", after, before)
	}
	w.write()
	w.more(100)
	w.observed()
	first.Restart()
	second.Restart()
	w.expectRefusal(first)
	w.expectRefusal(second)
	w.end(third)
	if w.lost() != lost || !slices.Equal(w.resyncs(), resyncs) {
		t.Errorf("the planned move has lost %d versions, and followers have started over %v times, before that %v", w.lost()-lost, w.resyncs(), resyncs)
	}
}

// TestI5_TheFirstConnectionBeginsTheEpoch: not the first write, because until then versions of the server that was left pass for
// those of this one. It looks at the cluster, which a dump restored elsewhere changes, and at the timeline.
func TestI5_TheFirstConnectionBeginsTheEpoch(t *testing.T) {
	t.Parallel()
	for _, left := range []string{
		"system_identifier = system_identifier + 1, server_started = server_started - interval '1 day'", "timeline = timeline + 1",
	} {
		t.Run(left, func(t *testing.T) {
			t.Parallel()
			database := dbtest.New(t)
			database.Exec(t, "UPDATE pgbroker.state SET "+left)
			for range 2 { // the second one finds it begun
				replica, err := db.Open(t.Context(), db.Config{ConnString: database.ConnString})
				if err != nil {
					t.Fatal(err)
				}
				_, err = db.New(replica).StateGet(t.Context())
				replica.Close()
				if err != nil {
					t.Fatal(err)
				}
				var n int
				if err := database.Pool.QueryRow(t.Context(), `SELECT count(*) FROM pgbroker.epochs`).Scan(&n); err != nil || n != 1 {
					t.Errorf("%d epochs have begun (%v), want 1", n, err)
				}
			}
		})
	}
}

// contentOf returns what the triggers keep, to see that none of them fires during a restore. (The epoch begins
// as soon as a replica finds the server.)
func contentOf(t testing.TB, p *dbtest.Postgres) string {
	t.Helper()
	return ask[string](t, p, `SELECT concat_ws(E'\n',
		(SELECT string_agg(r::text, ' ' ORDER BY r.type, r.id) FROM pgbroker.records r),
		(SELECT string_agg(c::text, ' ' ORDER BY c.version) FROM pgbroker.changes c),
		(SELECT string_agg(o::text, ' ' ORDER BY o.type) FROM pgbroker.record_types o),
		(SELECT c::text FROM pgbroker.checkpoint c), (SELECT s.server_version FROM pgbroker.state s))`)
}

// TestI5_AStreamAheadOfItsReplica comes from a faster replica and has seen what a failover then undid,
// unlike the replica that it is on now.
func TestI5_AStreamAheadOfItsReplica(t *testing.T) {
	t.Parallel()
	primary := newPrimary(t)
	w := newWorld(t, 1, primary.ConnString())
	w.more(10)
	w.pause()
	now := latest(t, w.replicas[0])
	stream, err := w.replicas[0].Sync(t.Context(), &databroker.SyncRequest{ServerVersion: now.ServerVersion, RecordVersion: now.RecordVersion + 5})
	if err != nil {
		t.Fatal(err)
	}
	for options := 0; options == 0; { // then it is open
		response, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if response.GetOptions() != nil {
			options++
		}
	}
	// As the first write after a promotion finds it.
	primary.Exec(`UPDATE pgbroker.state SET timeline = timeline + 1000`)
	w.put(w.replicas[0], &databroker.Record{Type: "other", Id: "first of the epoch"})
	for {
		response, err := stream.Recv()
		if status.Code(err) == codes.Aborted {
			break
		}
		if err != nil || response.GetRecord() != nil {
			t.Fatalf("got %v (%v), want the stream to be aborted", response, err)
		}
	}
	w.end(primary)
	w.expectNoLoss() // this replica and its other clients had not seen it
}

// TestI6_NoWayBackInASplitBrain: two servers take writes. A replica that has seen the newer one does not use
// the older one, also over connections that are open, nor does one that has just started and can ask both;
// with nowhere else to go it says why it does not work.
func TestI6_NoWayBackInASplitBrain(t *testing.T) {
	t.Parallel()
	older := newPrimary(t)
	newer := newStandby(older)
	path := filepath.Join(t.TempDir(), "conn")
	write := func(connString string) {
		t.Helper()
		if err := os.WriteFile(path+".new", []byte(connString), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	write(older.ConnString())
	w := newWorld(t, 1, dbtest.ConnString(older.Addr(), newer.Addr()))
	w.more(20)
	r := w.start(db.Config{ConnStringFile: path}, "")
	w.put(r, newValue("x", "before"))
	w.observed()
	held, err := r.DB.Acquire(t.Context()) // a connection in use, to the older server
	if err != nil {
		t.Fatal(err)
	}
	defer held.Release()
	w.pause()
	newer.CatchUp(older)
	newer.Promote() // and nobody has stopped the older one

	write(newer.ConnString())
	connects := r.Server.FeedStats().Connects
	if conn, err := r.DB.Listen(t.Context()); err != nil { // any new connection tells of the newer server
		t.Fatal(err)
	} else {
		conn.Close(t.Context())
	}
	if _, err := held.Exec(t.Context(), `DELETE FROM pgbroker.records`); !db.IsUnavailable(err) {
		t.Errorf("a connection to the older server is still in use: %v", err)
	}
	version := w.put(r, newValue("x", "after"))
	if got := ask[int64](t, newer, `SELECT version FROM pgbroker.records WHERE id = 'x'`); got != int64(version) {
		t.Errorf("the newer server has version %d, want %d", got, version)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for r.Server.FeedStats().Connects == connects { // until it listens to the newer server
		if ctx.Err() != nil {
			t.Fatal("the listener still listens to the older server")
		}
		yield()
	}

	// There is only the older one now.
	write(older.ConnString())
	r.DB.Reset()
	r.AwaitHealth(t, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	_, err = r.Get(t.Context(), &databroker.GetRequest{Type: worldType, Id: "x"})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "left for a newer one") {
		t.Errorf("got %v, want Unavailable and the reason", err)
	}
	write(newer.ConnString())
	awaitServing(t, r)

	// One that has just started is told by the newer server itself.
	fresh := w.start(db.Config{ConnString: dbtest.ConnString(older.Addr(), newer.Addr())}, "")
	got, err := fresh.Get(t.Context(), &databroker.GetRequest{Type: worldType, Id: "x"})
	if err != nil || got.Record.Version != version {
		t.Errorf("the fresh replica got %v (%v), want version %d", got, err, version)
	}
	if fresh.DB.Refused() == 0 || fresh.DB.Timeline() != 2 {
		t.Errorf("the fresh replica has refused %d connections and is on timeline %d", fresh.DB.Refused(), fresh.DB.Timeline())
	}
}
