package dbtest_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"

	"pgbroker/db/dbtest"
)

func query[T any](t *testing.T, connString, sql string) (v T) {
	t.Helper()
	conn, err := pgx.Connect(context.Background(), connString)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := conn.QueryRow(context.Background(), sql).Scan(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestServer(t *testing.T) {
	t.Parallel()
	p := dbtest.Server(t, map[string]string{"work_mem": "5MB"})
	p.Exec("CREATE TABLE kept AS SELECT 42 AS answer; GRANT SELECT ON kept TO PUBLIC")

	p.Kill()
	if conn, err := pgx.Connect(context.Background(), p.ConnString()); err == nil {
		conn.Close(context.Background())
		t.Error("a killed server accepts connections")
	}
	p.Restart()
	if got := query[int](t, p.ConnString(), "SELECT answer FROM kept"); got != 42 {
		t.Errorf("after kill and restart: got %d, want 42", got)
	}
	p.Stop()
	p.Restart()
	if got := query[int](t, p.ConnString(), "SELECT answer FROM kept"); got != 42 {
		t.Errorf("after stop and restart: got %d, want 42", got)
	}
	if got := query[string](t, p.ConnString(), "SHOW work_mem"); got != "5MB" {
		t.Errorf("work_mem: got %s, want 5MB", got)
	}
}

func TestStandby(t *testing.T) {
	t.Parallel()
	primary := dbtest.Server(t, nil)
	standby := primary.Standby(nil)
	primary.Exec("CREATE TABLE t (x int)")
	standby.CatchUp(primary)
	if !query[bool](t, standby.ConnString(), "SELECT pg_is_in_recovery() AND to_regclass('t') IS NOT NULL") {
		t.Error("the standby is no standby, or lacks the table")
	}
	primary.Kill()
	standby.Promote()
	standby.Exec("INSERT INTO t VALUES (1)")
	if got := query[string](t, standby.ConnString(), "SELECT substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)"); got != "00000002" {
		t.Errorf("timeline: got %s, want 00000002", got)
	}
}
