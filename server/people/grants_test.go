package people

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"pgbroker/db/dbtest"
)

// TestGrantsOfAnOrdinaryOwner: the owner of the schema, who may create no roles, is told what to have created, and then gives
// roles that exist what they need; also where somebody else has put something of theirs into the schema, and where the owner
// of the schema does not own the database.
func TestGrantsOfAnOrdinaryOwner(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	owner, reader, server := "owner_"+d.Name, `The "Reader" `+d.Name, "server_"+d.Name
	quoted := pgx.Identifier{reader}.Sanitize()
	d.Role(t, owner)
	d.AdminExec(t, `DO $$
		DECLARE
			one record;
		BEGIN
			FOR one IN SELECT oid::regclass AS name FROM pg_class WHERE relnamespace = 'pgbroker'::regnamespace AND relkind IN ('r', 'v') LOOP
				EXECUTE format('ALTER TABLE %s OWNER TO `+owner+`', one.name);
			END LOOP;
			FOR one IN SELECT oid::regprocedure AS name FROM pg_proc WHERE pronamespace = 'pgbroker'::regnamespace LOOP
				EXECUTE format('ALTER FUNCTION %s OWNER TO `+owner+`', one.name);
			END LOOP;
		END $$;
		ALTER SEQUENCE pgbroker.record_version OWNER TO `+owner+`;
		ALTER SCHEMA pgbroker OWNER TO `+owner)

	conn, err := pgx.Connect(t.Context(), d.As(t, owner))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	run := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%v\n%s", err, sql)
		}
	}
	grants := func() (string, error) {
		t.Helper()
		rows, err := conn.Query(t.Context(), "SELECT pgbroker.grants($1, NULL, $2)", reader, server)
		if err != nil {
			t.Fatal(err)
		}
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		return strings.Join(lines, "\n"), err
	}

	_, err = grants()
	var refused *pgconn.PgError
	if !errors.As(err, &refused) || refused.Code != pgerrcode.UndefinedObject || !strings.Contains(refused.Message, owner+" may not create roles") {
		t.Errorf("without the roles: got %v", err)
	} else {
		for _, statement := range []string{"CREATE ROLE " + quoted + " LOGIN;", "CREATE ROLE " + server + " LOGIN;"} {
			if !strings.Contains(refused.Hint, statement) {
				t.Errorf("the hint does not say %q: %s", statement, refused.Hint)
			}
		}
		d.AdminExec(t, refused.Hint[strings.Index(refused.Hint, "CREATE"):])
		t.Cleanup(func() {
			for _, role := range []string{quoted, server} {
				d.AdminExec(t, "DROP OWNED BY "+role+"; DROP ROLE "+role)
			}
		})
	}
	d.AdminExec(t, "CREATE VIEW pgbroker.theirs AS SELECT 1; CREATE TABLE pgbroker.their_table (); "+
		"CREATE FUNCTION pgbroker.theirs() RETURNS integer LANGUAGE sql RETURN 1")
	statements, err := grants()
	if err != nil {
		t.Fatal(err)
	}
	if line := "-- The owner of the database: GRANT CONNECT ON DATABASE " + d.Name + " TO " + quoted; !strings.Contains(statements, line) {
		t.Errorf("no line %q in\n%s", line, statements)
	}
	run(statements)
	var got string
	if err := d.Admin(t).QueryRow(t.Context(), `SELECT concat_ws(' ', has_table_privilege($1, 'pgbroker.sessions', 'SELECT'),
			has_table_privilege($1, 'pgbroker.theirs', 'SELECT'), has_table_privilege($2, 'pgbroker.records', 'UPDATE'))`,
		reader, server).Scan(&got); err != nil || got != "t f t" {
		t.Errorf("the rights to read sessions, to read what belongs to others, and to write records: got %s, want t f t, %v", got, err)
	}

	// Rights are taken from nobody who needs them.
	if _, err := conn.Exec(t.Context(), "SELECT pgbroker.grants(NULL, NULL, $1)", owner); err == nil || !strings.Contains(err.Error(), "owns the schema") {
		t.Errorf("grants for the owner: got %v", err)
	}
}

// TestGrantsUnderDefaultPrivileges: where functions are for nobody and nobody may connect unless it is said, the grants say it.
func TestGrantsUnderDefaultPrivileges(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	reader, writer, server := "r_"+d.Name, "w_"+d.Name, "s_"+d.Name
	before := value[string](t, d, `SELECT count(*)::text FROM pg_proc WHERE pronamespace = 'pgbroker'::regnamespace AND has_function_privilege('public', oid, 'EXECUTE')`)
	if before == "0" {
		t.Fatal("PUBLIC may execute nothing to begin with")
	}
	d.Exec(t, `REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA pgbroker FROM PUBLIC; REVOKE ALL ON DATABASE `+d.Name+` FROM PUBLIC`)
	roles(t, d, reader, writer, server)
	for _, role := range []string{reader, writer, server} {
		if got := value[string](t, d, `SELECT count(*)::text FROM pg_proc WHERE pronamespace = 'pgbroker'::regnamespace
				AND NOT prosecdef AND has_function_privilege($1, oid, 'EXECUTE')`, role); got != before {
			t.Errorf("%s may execute %s functions, want %s as usual", role, got, before)
		}
		if !value[bool](t, d, `SELECT has_database_privilege($1, current_database(), 'CONNECT')`, role) {
			t.Errorf("%s may not connect", role)
		}
	}
}
