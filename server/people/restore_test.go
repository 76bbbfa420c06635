package people

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"pgbroker/db/dbtest"
	"pgbroker/migrations"
	"pgbroker/proto/databroker"
	"pgbroker/proto/user"
	"pgbroker/server/servertest"
)

// TestRestoreByAnOrdinaryOwner: the owner of an empty database restores a dump into it, on a server that has none of the roles
// whose rights the dump has; then the grants give everybody what they had, and nobody more. Where the roles are there before,
// the dump brings their rights along.
func TestRestoreByAnOrdinaryOwner(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	roles := []string{dbtest.ReaderRole, dbtest.WriterRole, dbtest.ServerRole}
	create := func(p *dbtest.Postgres) {
		for _, role := range roles {
			p.Exec("CREATE ROLE " + role + " LOGIN PASSWORD '" + dbtest.Password + "'")
		}
	}
	connect := func(connString string) *pgx.Conn {
		t.Helper()
		conn, err := pgx.Connect(ctx, connString)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close(context.Background()) })
		return conn
	}
	// grants runs what `pgbroker migrate grants` prints, as the owner.
	grants := func(p *dbtest.Postgres) error {
		t.Helper()
		owner := connect(p.As(dbtest.OwnerRole))
		rows, err := owner.Query(ctx, "SELECT pgbroker.grants($1, $2, $3)", dbtest.ReaderRole, dbtest.WriterRole, dbtest.ServerRole)
		if err != nil {
			t.Fatal(err)
		}
		statements, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err == nil {
			_, err = owner.Exec(ctx, strings.Join(statements, "\n"))
		}
		return err
	}
	// rights is all that can be said of rights in the schema.
	rights := func(p *dbtest.Postgres) (all string) {
		t.Helper()
		err := connect(p.SocketConnString()).QueryRow(ctx, `
			SELECT string_agg(concat_ws(' ', name, grantee::text, privilege_type), E'\n' ORDER BY name, grantee::text, privilege_type) FROM (
				SELECT oid::regclass::text AS name, CASE WHEN relkind = 'S' THEN 's' ELSE 'r' END::"char" AS kind, relowner AS owner, relacl AS acl
					FROM pg_class WHERE relnamespace = 'pgbroker'::regnamespace AND relkind IN ('r', 'v', 'S')
				UNION ALL
				SELECT oid::regprocedure::text, 'f', proowner, proacl FROM pg_proc WHERE pronamespace = 'pgbroker'::regnamespace
				UNION ALL
				SELECT attrelid::regclass || '.' || attname, 'c', NULL, attacl FROM pg_attribute
					WHERE attacl IS NOT NULL AND attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'pgbroker'::regnamespace)
				UNION ALL
				SELECT 'the schema', 'n', nspowner, nspacl FROM pg_namespace WHERE nspname = 'pgbroker'
			) AS o (name, kind, owner, acl), LATERAL (
				SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS grantee, a.privilege_type
				FROM aclexplode(coalesce(acl, acldefault(kind, owner))) AS a) AS a`).Scan(&all)
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	check := func(p *dbtest.Postgres, want string) {
		t.Helper()
		if got := rights(p); got != want {
			t.Errorf("rights after the restore:\n%s\nbefore:\n%s", diff(got, want), diff(want, got))
		}
		replica := servertest.Start(t, p.As(dbtest.ServerRole), servertest.Options{})
		if _, err := replica.Get(ctx, &databroker.GetRequest{Type: userType, Id: "jane"}); err != nil {
			t.Errorf("what the dump has: %v", err)
		}
		put(t, replica, record(t, "", "joe", &user.User{Id: "joe"}))
	}

	before := dbtest.Server(t, nil)
	cfg, err := pgx.ParseConfig(before.ConnString())
	if err != nil {
		t.Fatal(err)
	}
	if err := migrations.Up(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	create(before)
	if err := grants(before); err != nil {
		t.Fatal(err)
	}
	put(t, servertest.Start(t, before.As(dbtest.ServerRole), servertest.Options{}), record(t, "", "jane", &user.User{Id: "jane"}))
	want, dump := rights(before), before.Dump()

	bare := dbtest.Server(t, nil)
	bare.Load(dump, "--no-owner", "--no-acl")
	var refused *pgconn.PgError
	if err := grants(bare); !errors.As(err, &refused) || !strings.Contains(refused.Hint, fmt.Sprintf("CREATE ROLE %s LOGIN;", dbtest.ServerRole)) {
		t.Errorf("grants without the roles: %v", err)
	}
	create(bare)
	if err := grants(bare); err != nil {
		t.Fatal(err)
	}
	check(bare, want)

	prepared := dbtest.Server(t, nil)
	create(prepared)
	prepared.Load(dump)
	check(prepared, want)
}

// diff returns the lines of a text that another one does not have.
func diff(text, other string) string {
	var lines []string
	for line := range strings.Lines(text) {
		if !strings.Contains("\n"+other+"\n", "\n"+strings.TrimSpace(line)+"\n") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return strings.Join(lines, "\n")
}
