package db_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/migrations"
)

// contrary has for every setting of ours another value than ours, which a role, a database or a server may have.
var contrary = map[string]string{
	"client_encoding": "LATIN1", "standard_conforming_strings": "off", "array_nulls": "off", "bytea_output": "escape",
	"DateStyle": "SQL, DMY", "IntervalStyle": "sql_standard", "TimeZone": "Asia/Kathmandu", "extra_float_digits": "-15",
	"default_transaction_isolation": "serializable", "row_security": "on", "search_path": "public", "gin_fuzzy_search_limit": "1",
	"exit_on_error": "on", "plpgsql.extra_errors": "all", "default_table_access_method": "columnar",
	"jit": "on", "plan_cache_mode": "force_custom_plan", "enable_seqscan": "on", "enable_hashjoin": "on", "enable_mergejoin": "on",
	"enable_nestloop": "off", "enable_indexscan": "off", "enable_indexonlyscan": "off", "enable_bitmapscan": "off",
	"max_parallel_workers_per_gather": "8", "idle_session_timeout": "1h",
	"statement_timeout": "7min", "lock_timeout": "7min", "idle_in_transaction_session_timeout": "7min",
}

// Every kind of connection has our settings, whatever role and database say, and whatever of it the connection string says.
func TestSessionsHaveOurSettings(t *testing.T) {
	t.Parallel()
	p := dbtest.NewEmpty(t)
	role := "settings_" + strings.ToLower(t.Name()) + fmt.Sprint(p.Connect(t).PgConn().PID())
	p.AdminExec(t, "CREATE ROLE "+role+" LOGIN SUPERUSER PASSWORD 'settings'")
	t.Cleanup(func() { p.AdminExec(t, "DROP ROLE "+role) })
	database := p.Config(t).Database
	p.AdminExec(t, "CREATE ACCESS METHOD columnar TYPE TABLE HANDLER heap_tableam_handler")
	for i, s := range db.Settings(db.Config{}) {
		value, ok := contrary[s.Name]
		if !ok {
			t.Fatalf("no other value of %s is known here", s.Name)
		}
		where := "ROLE " + role
		if i%2 == 0 {
			where = "DATABASE " + pgx.Identifier{database}.Sanitize()
		}
		p.AdminExec(t, fmt.Sprintf("ALTER %s SET %s = '%s'", where, s.Name, value))
	}

	// Servers of some age do not know these.
	newer := map[string]struct{ other, ours string }{
		"transaction_timeout": {"7min", "0"}, "restrict_nonsystem_relation_kind": {"view", ""},
	}
	for name, s := range newer {
		var known bool
		if err := p.Connect(t).QueryRow(t.Context(), "SELECT current_setting($1, true) IS NOT NULL", name).Scan(&known); err != nil {
			t.Fatal(err)
		}
		if !known {
			delete(newer, name)
			continue
		}
		p.AdminExec(t, fmt.Sprintf("ALTER ROLE %s SET %s = '%s'", role, name, s.other))
	}

	cfg := p.Config(t)
	text := fmt.Sprintf("host=%s port=%d user=%s password=settings dbname=%s", cfg.Host, cfg.Port, role, database)
	for name, connString := range map[string]string{
		"nothing":    text,
		"parameters": text + " datestyle='Postgres, DMY' client_encoding=SQL_ASCII default_transaction_isolation=serializable",
		"options":    text + " options='-c standard_conforming_strings=off -c search_path=public'",
	} {
		t.Run(name, func(t *testing.T) {
			d, log := open(t, db.Config{ConnString: connString})
			for kind, connect := range map[string]func() (*pgx.Conn, error){
				"pool": func() (*pgx.Conn, error) {
					conn, err := d.Acquire(t.Context())
					if err != nil {
						return nil, err
					}
					return conn.Hijack(), nil
				},
				"listener": func() (*pgx.Conn, error) { return d.Listen(t.Context()) },
				"direct":   func() (*pgx.Conn, error) { return pgx.ConnectConfig(t.Context(), d.ConnConfig()) },
			} {
				conn, err := connect()
				if err != nil {
					t.Fatalf("%s: %v", kind, err)
				}
				defer conn.Close(t.Context())
				for _, s := range db.Settings(db.Config{}) {
					var same bool
					err := conn.QueryRow(t.Context(), `SELECT (s.setting = $2 OR s.setting ILIKE $2) AND s.source = 'client'
						FROM pg_settings s WHERE s.name = $1`, s.Name, s.Value).Scan(&same)
					if errors.Is(err, pgx.ErrNoRows) { // it belongs to a library that is not loaded
						err = conn.QueryRow(t.Context(), "SELECT current_setting($1) = $2", s.Name, s.Value).Scan(&same)
					}
					if err != nil || !same {
						t.Errorf("%s: %s is not %q (%v)", kind, s.Name, s.Value, err)
					}
				}
				for setting, s := range newer {
					var got string
					if err := conn.QueryRow(t.Context(), "SELECT current_setting($1)", setting).Scan(&got); err != nil || got != s.ours {
						t.Errorf("%s: %s is %q, want %q (%v)", kind, setting, got, s.ours, err)
					}
				}
			}
			if warned := strings.Contains(log.String(), "its own are used"); warned != (name != "nothing") {
				t.Errorf("warned: %v: %s", warned, log)
			}
		})
	}
}

// A session in which no trigger fires is refused, on every kind of connection, and that is not taken for an outage.
func TestSessionsWithoutTriggersAreRefused(t *testing.T) {
	t.Parallel()
	p := dbtest.NewEmpty(t)
	p.AdminExec(t, fmt.Sprintf("ALTER DATABASE %s SET session_replication_role = replica", pgx.Identifier{p.Config(t).Database}.Sanitize()))
	d, _ := open(t, db.Config{ConnString: p.ConnString})
	_, pooled := d.Exec(t.Context(), "SELECT 1")
	_, listener := d.Listen(t.Context())
	_, direct := pgx.ConnectConfig(t.Context(), d.ConnConfig())
	for kind, err := range map[string]error{"pool": pooled, "listener": listener, "direct": direct} {
		var unfit *db.UnfitError
		if !errors.As(err, &unfit) || db.IsUnavailable(err) || !strings.Contains(unfit.Error(), "RESET session_replication_role") {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

// A session that may use no views is refused behind a pooler, where that cannot be changed in time.
func TestSessionsWithoutViewsAreRefused(t *testing.T) {
	t.Parallel()
	p := dbtest.NewEmpty(t)
	const name = "restrict_nonsystem_relation_kind"
	var known bool
	if err := p.Connect(t).QueryRow(t.Context(), "SELECT current_setting($1, true) IS NOT NULL", name).Scan(&known); err != nil {
		t.Fatal(err)
	}
	if !known {
		t.Skip("the server does not know " + name)
	}
	p.AdminExec(t, fmt.Sprintf("ALTER DATABASE %s SET %s = 'foreign-table, view'", pgx.Identifier{p.Config(t).Database}.Sanitize(), name))
	d, _ := open(t, db.Config{ConnString: p.ConnString, Pooler: true})
	_, err := d.Exec(t.Context(), "SELECT 1")
	var unfit *db.UnfitError
	if !errors.As(err, &unfit) || db.IsUnavailable(err) || !strings.Contains(unfit.Error(), "RESET "+name) {
		t.Errorf("got %v", err)
	}
}

// A database in another encoding is refused by every kind of connection, before anything is changed in it.
func TestEncoding(t *testing.T) {
	t.Parallel()
	p := dbtest.Server(t, nil)
	for _, encoding := range []string{"LATIN1", "SQL_ASCII"} {
		name := strings.ToLower(encoding)
		p.Exec("CREATE DATABASE " + name + " TEMPLATE template0 ENCODING " + encoding + " LOCALE 'C'")
		d, _ := open(t, db.Config{ConnString: p.ConnString() + "&dbname=" + name})
		_, pooled := d.Exec(t.Context(), "SELECT 1")
		_, listener := d.Listen(t.Context())
		_, direct := pgx.ConnectConfig(t.Context(), d.ConnConfig())
		for kind, err := range map[string]error{"pool": pooled, "listener": listener, "direct": direct, "migrations": migrations.Up(t.Context(), d.ConnConfig())} {
			var unfit *db.UnfitError
			if !errors.As(err, &unfit) || db.IsUnavailable(err) || !strings.Contains(unfit.Error(), encoding) || !strings.Contains(unfit.Error(), "--encoding UTF8") {
				t.Errorf("%s, %s: %v", encoding, kind, err)
			}
		}
		config, err := pgx.ParseConfig(p.ConnString() + "&dbname=" + name)
		if err != nil {
			t.Fatal(err)
		}
		if version, _, err := migrations.Version(t.Context(), config); version != 0 || err != nil {
			t.Errorf("%s: there is a schema of version %d (%v)", encoding, version, err)
		}
		conn, err := pgx.ConnectConfig(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(t.Context())
		var schemas int
		if err := conn.QueryRow(t.Context(), "SELECT count(*) FROM pg_namespace WHERE nspname = 'pgbroker'").Scan(&schemas); err != nil || schemas != 0 {
			t.Errorf("%s: the schema was made (%v)", encoding, err)
		}
	}
}
