package people

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/proto/user"
	"pgbroker/server/servertest"
)

// withoutTriggers runs statements as somebody who knows better, a superuser or a restore: no trigger sees them.
func withoutTriggers(t testing.TB, b *servertest.Broker, statements ...string) {
	t.Helper()
	conn := b.Database.Admin(t)
	for _, s := range append([]string{"SET session_replication_role = replica"}, statements...) {
		if _, err := conn.Exec(t.Context(), s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
}

// problems returns what problems() lists, a line each.
func problems(t testing.TB, b *servertest.Broker) []string {
	t.Helper()
	return column[string](t, b.Database,
		`SELECT concat_ws(' ', problem, replace(subject, 'type.googleapis.com/', ''), id) FROM pgbroker.problems() ORDER BY 1`)
}

// repair does what pgbroker check --repair does.
func repair(t testing.TB, b *servertest.Broker) {
	t.Helper()
	queries := db.New(b.Database.Pool)
	if err := queries.SetupRepair(t.Context()); err != nil {
		t.Fatal(err)
	}
	found, err := queries.ProblemsList(t.Context(), 1000)
	if err != nil {
		t.Fatal(err)
	}
	var params db.RecordsRepairParams
	for _, p := range found {
		if p.ID != "" && p.Repairable {
			params.Types, params.IDs, params.Versions = append(params.Types, p.Subject), append(params.IDs, p.ID), append(params.Versions, p.Version)
		}
	}
	if _, err := queries.RecordsRepair(t.Context(), params); err != nil {
		t.Fatal(err)
	}
	if err := queries.SetupRepair(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestCheckFindsAndRepairs: each way in which the books can disagree is found, and nothing else is; and after the repair
// nothing is left, and every stream has the state of the tables.
func TestCheckFindsAndRepairs(t *testing.T) {
	t.Parallel()
	const session, users = "'" + sessionType + "'", "'" + userType + "'"
	for name, test := range map[string]struct {
		damage []string
		want   []string
	}{
		"deleted without a tombstone": {
			[]string{"DELETE FROM pgbroker.records WHERE id = 's1'"},
			[]string{"change without its record session.Session s1", "search text without its record session.Session s1", "wrong count session.Session"},
		},
		"written without a change": {
			[]string{"INSERT INTO pgbroker.records (type, id) VALUES ('t', 'new')"},
			[]string{"record not in the log t new", "wrong count t"},
		},
		"lost from the log": {
			[]string{"DELETE FROM pgbroker.changes WHERE id IN ('u1', 's2')"},
			[]string{"record not in the log session.Session s2", "record not in the log user.User u1"},
		},
		"a tombstone too many": {
			[]string{"INSERT INTO pgbroker.changes SELECT latest_version + 5, " + users + ", 'u2', now(), true FROM pgbroker.versions"},
			[]string{"sequence behind record_version", "tombstone of a live record user.User u2"},
		},
		"only the log was restored": {
			[]string{"DELETE FROM pgbroker.records WHERE type = " + users, "DELETE FROM pgbroker.search_texts WHERE type = " + users},
			[]string{"change without its record user.User u1", "change without its record user.User u2", "wrong count user.User"},
		},
		"index": {
			[]string{"UPDATE pgbroker.records SET index_fields = '{}' WHERE id = 's1'"},
			[]string{"wrong index terms session.Session s1"},
		},
		"expiry": {
			[]string{"UPDATE pgbroker.records SET expires_at = now() + interval '1 year' WHERE id = 's1'"},
			[]string{"wrong expiry session.Session s1"},
		},
		"texts": {
			[]string{"DELETE FROM pgbroker.search_texts WHERE id = 's1'"},
			[]string{"missing search text session.Session s1"},
		},
		"counts": {
			[]string{"UPDATE pgbroker.record_types SET record_count = 77 WHERE type = " + session},
			[]string{"wrong count session.Session"},
		},
		"sequence": {
			[]string{"SELECT setval('pgbroker.record_version', 1)"},
			[]string{"sequence behind record_version"},
		},
		"checkpoint": {
			[]string{"DELETE FROM pgbroker.checkpoint"},
			[]string{"missing row checkpoint"},
		},
		"purged ahead": {
			[]string{"UPDATE pgbroker.record_types SET purged_version = (SELECT latest_version + 10 FROM pgbroker.versions) WHERE type = " + session},
			[]string{"purged ahead session.Session"},
		},
		"epoch": {
			[]string{"INSERT INTO pgbroker.epochs SELECT first_version + 1000, first_version, system_identifier, timeline FROM " +
				"(SELECT latest_version AS first_version, s.system_identifier, s.timeline FROM pgbroker.versions, pgbroker.state s) e"},
			[]string{"sequence behind record_version"},
		},
		"trigger": {
			[]string{"ALTER TABLE pgbroker.records DISABLE TRIGGER records_log_delete"},
			[]string{"disabled trigger records.records_log_delete"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := servertest.New(t, servertest.Options{Configure: quiet})
			now := time.Now()
			for i := range 3 {
				id := fmt.Sprintf("s%d", i+1)
				put(t, b.Replica, record(t, "", id, aSession(id, "jane", "idp", now, now, now.Add(time.Hour))))
			}
			put(t, b.Replica, record(t, "", "u1", &user.User{Id: "u1", Name: "One"}), record(t, "", "u2", &user.User{Id: "u2", Name: "Two"}),
				record(t, "", "u3", &user.User{Id: "u3", Name: "Three"}))
			put(t, b.Replica, deletion(userType, "u3"))
			if found := problems(t, b); len(found) > 0 {
				t.Fatalf("a sound database has problems: %q", found)
			}
			streamed := newCopy(t, b.Replica)

			withoutTriggers(t, b, test.damage...)
			if found := problems(t, b); !slices.Equal(found, test.want) {
				t.Fatalf("found %q,\nwant  %q", found, test.want)
			}
			repair(t, b)
			if found := problems(t, b); len(found) > 0 {
				t.Errorf("after the repair: %q", found)
			}
			streamed.awaitEqual(t, b)
		})
	}
}

// TestCheckComputesNoTextThatIsThere: a text takes a hundred times as long to compute as to look for.
func TestCheckComputesNoTextThatIsThere(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: quiet})
	put(t, b.Replica, record(t, "", "u1", &user.User{Id: "u1", Name: "One"}), record(t, "", "u2", &user.User{Id: "u2", Name: "Two"}))
	b.Database.Exec(t, `CREATE OR REPLACE FUNCTION pgbroker.search_text_of(payload bytea, data jsonb) RETURNS text
		LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$BEGIN RAISE 'computed'; END$$`)
	if found := problems(t, b); len(found) > 0 {
		t.Errorf("a sound database has problems: %q", found)
	}
}

// TestCheckFindsWhatItCannotRepair: some things only a person can put right. They are named.
func TestCheckFindsWhatItCannotRepair(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: quiet})
	conn := b.Database.Admin(t)
	role := "other_" + b.Database.Name
	for _, s := range []string{
		"CREATE ROLE " + role, "GRANT CREATE, USAGE ON SCHEMA pgbroker TO " + role,
		"ALTER TABLE pgbroker.services OWNER TO " + role, "ALTER FUNCTION pgbroker.log_deletes() OWNER TO " + role,
		"GRANT SELECT (id) ON pgbroker.records TO PUBLIC", "GRANT DELETE ON pgbroker.audit TO PUBLIC",
		"ALTER TABLE pgbroker.leases ENABLE ROW LEVEL SECURITY",
		"SET session_replication_role = replica", "DELETE FROM pgbroker.record_types WHERE type LIKE '%session.Session'",
		"DELETE FROM pgbroker.state",
		"UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'pgbroker.audit_id'::regclass",
	} {
		if _, err := conn.Exec(t.Context(), s); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
	}
	t.Cleanup(func() {
		b.Database.AdminExec(t, "REASSIGN OWNED BY "+role+" TO CURRENT_USER; DROP OWNED BY "+role+"; DROP ROLE "+role)
	})
	want := []string{
		"foreign owner log_deletes()", "foreign owner services", "invalid index audit_id", "missing options session.Session",
		"missing row state", "open to everybody audit", "open to everybody records", "row security leases",
	}
	if found := problems(t, b); !slices.Equal(found, want) {
		t.Errorf("found %q,\nwant  %q", found, want)
	}
}

// TestTombstonesRemovedByHand: whoever removes tombstones from the log makes the streams that might have missed them start
// over; whoever wants to change anything else in it is refused.
func TestTombstonesRemovedByHand(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: quiet})
	put(t, b.Replica, record(t, "", "u1", &user.User{Id: "u1"}), record(t, "", "u2", &user.User{Id: "u2"}))
	info, err := b.ServerInfo(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	put(t, b.Replica, deletion(userType, "u1"))

	for _, statement := range []string{
		"DELETE FROM pgbroker.changes", "DELETE FROM pgbroker.changes WHERE id = 'u2'", "TRUNCATE pgbroker.changes",
		"UPDATE pgbroker.changes SET version = version + 1000", "UPDATE pgbroker.changes SET deleted = false WHERE deleted",
	} {
		if _, err := b.Database.Pool.Exec(t.Context(), statement); err == nil || !strings.Contains(err.Error(), "kept by triggers") {
			t.Errorf("%s: %v, want to be refused", statement, err)
		}
	}
	latest := value[int64](t, b.Database, "SELECT latest_version FROM pgbroker.versions")
	b.Database.Exec(t, "DELETE FROM pgbroker.changes WHERE deleted")
	if now := value[int64](t, b.Database, "SELECT latest_version FROM pgbroker.versions"); now != latest {
		t.Errorf("the latest version has gone from %d to %d", latest, now)
	}
	stream, err := b.Sync(t.Context(), &databroker.SyncRequest{
		ServerVersion: info.GetServerVersion(), RecordVersion: info.GetLatestRecordVersion(), Type: userType,
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Aborted {
		t.Errorf("a stream that has missed a tombstone: %v, want Aborted", err)
	}
}

// TestEveryTriggerIsChecked: what setup_problems looks for is what there is.
func TestEveryTriggerIsChecked(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Configure: quiet})
	conn := b.Database.Connect(t)
	rows, err := conn.Query(t.Context(), `
		SELECT c.relname || '.' || t.tgname FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
		WHERE NOT t.tgisinternal AND c.relnamespace = 'pgbroker'::regnamespace ORDER BY 1`)
	if err != nil {
		t.Fatal(err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range all {
		relation, trigger, _ := strings.Cut(name, ".")
		for _, statement := range []string{
			"ALTER TABLE pgbroker." + relation + " DISABLE TRIGGER " + trigger, "DROP TRIGGER " + trigger + " ON pgbroker." + relation,
		} {
			if _, err := conn.Exec(t.Context(), statement); err != nil {
				t.Fatal(err)
			}
			found := column[string](t, b.Database, "SELECT subject FROM pgbroker.setup_problems() WHERE problem LIKE '% trigger' AND subject = $1", name)
			if len(found) != 1 {
				t.Errorf("%s is not noticed", statement)
			}
		}
	}
}

// copyOfAll is what a client knows that follows a broker.
type copyOfAll struct {
	state chan map[string]uint64 // versions by type and id; taken out while somebody works on it
}

// newCopy reads all that a replica has, and follows what changes.
func newCopy(t *testing.T, r *servertest.Replica) *copyOfAll {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	latest, err := r.SyncLatest(ctx, &databroker.SyncLatestRequest{})
	if err != nil {
		t.Fatal(err)
	}
	known := make(map[string]uint64)
	var versions *databroker.Versions
	for {
		response, err := latest.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if record := response.GetRecord(); record != nil {
			known[record.GetType()+" "+record.GetId()] = record.GetVersion()
		} else {
			versions = response.GetVersions()
		}
	}
	stream, err := r.Sync(ctx, &databroker.SyncRequest{
		ServerVersion: versions.GetServerVersion(), RecordVersion: versions.GetLatestRecordVersion(),
	})
	if err != nil {
		t.Fatal(err)
	}
	c := &copyOfAll{make(chan map[string]uint64, 1)}
	c.state <- known
	go func() {
		for {
			response, err := stream.Recv()
			if err != nil {
				return
			}
			record := response.GetRecord()
			if record == nil {
				continue
			}
			state := <-c.state
			if record.GetDeletedAt() != nil {
				delete(state, record.GetType()+" "+record.GetId())
			} else {
				state[record.GetType()+" "+record.GetId()] = record.GetVersion()
			}
			c.state <- state
		}
	}()
	return c
}

// awaitEqual waits until the copy is what the table has.
func (c *copyOfAll) awaitEqual(t *testing.T, b *servertest.Broker) {
	t.Helper()
	want := column[string](t, b.Database, `SELECT type || ' ' || id || ' ' || version FROM pgbroker.records ORDER BY 1`)
	var have []string
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) {
		state := <-c.state
		have = have[:0]
		for key, version := range state {
			have = append(have, fmt.Sprintf("%s %d", key, version))
		}
		c.state <- state
		slices.Sort(have)
		slices.Sort(want)
		if slices.Equal(have, want) {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Errorf("a client that follows has %q,\nthe table %q", have, want)
}
