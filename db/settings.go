package db

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Setting is a setting of PostgreSQL that sessions of ours have, whatever role, database and server say.
type Setting struct {
	Name, Value string
	// Kind says what would go wrong without it.
	Kind SettingKind
}

// SettingKind says why sessions of ours have a setting.
type SettingKind int

// The kinds of settings.
const (
	// Meaning: with another value, statements mean something else, or their results cannot be read. A connection string cannot
	// change these.
	Meaning SettingKind = iota
	// Speed: with another value, statements are right and slow. A connection string may change these, and what follows.
	Speed
	// Limit: how long something may take.
	Limit
)

// settings is the one list of what our statements rely on.
//
// Not in it, because operators may mean them: default_transaction_read_only, which is how providers protect a full disk;
// synchronous_commit, which says how much a crash may lose; work_mem and its like; role. Not in it,
// because nothing of ours depends on them: lc_*, transform_null_equals, xmlbinary, default_transaction_deferrable. Not in it,
// because only superusers may set it: session_replication_role, which is checked on each connection instead.
var settings = []Setting{
	// What comes and goes is UTF-8, in ISO notation, as pgx reads and writes it, in statements whose strings are standard.
	{"client_encoding", "UTF8", Meaning},
	{"standard_conforming_strings", "on", Meaning},
	{"array_nulls", "on", Meaning},
	{"bytea_output", "hex", Meaning},
	{"DateStyle", "ISO, MDY", Meaning},
	{"IntervalStyle", "postgres", Meaning},
	{"TimeZone", "UTC", Meaning},
	{"extra_float_digits", "1", Meaning}, // JSON made of floating-point numbers has all of their digits
	// After the order lock a statement must see what others have committed before they gave it back.
	{"default_transaction_isolation", "read committed", Meaning},
	// Rows that a policy hides would look as if they were not there: sooner no answer than a wrong one.
	{"row_security", "off", Meaning},
	// An operator that somebody made is not found before PostgreSQL's. It is the path of our functions, too, so that those
	// which have none of their own are not planned anew: see docs/design.md.
	{"search_path", "pg_catalog, pg_temp", Meaning},
	// An index of the kind that finds users' sessions may not leave some of them out.
	{"gin_fuzzy_search_limit", "0", Meaning},
	// An error ends a statement, not the session.
	{"exit_on_error", "off", Meaning},
	{"plpgsql.extra_errors", "none", Meaning},
	// Tables that are made (by migrations, for staging) are those that PostgreSQL comes with.
	{"default_table_access_method", "heap", Meaning},

	// The statements are the same all day: planning each once is enough, compiling one (JIT) takes longer than any of them.
	{"jit", "off", Speed},
	{"plan_cache_mode", "force_generic_plan", Speed},
	// Planned perhaps while a table is empty, they are to find their rows by key when it has grown, too.
	{"enable_seqscan", "off", Speed},
	{"enable_hashjoin", "off", Speed},
	{"enable_mergejoin", "off", Speed},
	{"enable_nestloop", "on", Speed},
	{"enable_indexscan", "on", Speed},
	{"enable_indexonlyscan", "on", Speed},
	{"enable_bitmapscan", "on", Speed},
	// Nor are they worth a parallel plan, which starts processes; those that scan ask for one.
	{"max_parallel_workers_per_gather", "0", Speed},

	// Connections are idle for as long as nobody needs them, the listener's always.
	{"idle_session_timeout", "0", Limit},
}

// newer are those that not all servers know, so that they cannot be sent when a connection opens.
var newer = []Setting{
	{"transaction_timeout", "0", Limit},               // every statement has its own
	{"restrict_nonsystem_relation_kind", "", Meaning}, // some statements are about views
}

// Settings returns the settings of sessions that are opened with a configuration, those of a kind together. They are sent when
// a connection opens, except to poolers, which refuse most of them, or carry them to the sessions of others: there each transaction
// brings them along (see pooler.go).
func Settings(cfg Config) []Setting {
	all := slices.Clone(settings)
	for _, limit := range []struct {
		name            string
		value, standard time.Duration
	}{
		{"statement_timeout", cfg.StatementTimeout, defaultStatementTimeout},
		{"lock_timeout", cfg.LockTimeout, defaultLockTimeout},
		{"idle_in_transaction_session_timeout", cfg.IdleInTransactionTimeout, defaultIdleInTransactionTimeout},
	} {
		if value := cmp.Or(limit.value, limit.standard); value > 0 {
			// In milliseconds; 0 would switch it off.
			all = append(all, Setting{limit.name, strconv.FormatInt(max(1, value.Milliseconds()), 10), Limit})
		}
	}
	return all
}

// apply gives a configuration the settings, and returns the names of those for which it had another value that is not used.
func apply(params map[string]string, all []Setting) (overruled []string) {
	options := strings.ToLower(params["options"])
	for _, s := range all {
		given, value := "", ""
		for name := range params {
			if strings.EqualFold(name, s.Name) {
				given, value = name, params[name]
			}
		}
		// Text like "-c jit=on" is not taken apart: whoever writes one of these knows what for.
		named := strings.Contains(options, strings.ToLower(s.Name))
		if s.Kind != Meaning {
			if given == "" && !named {
				params[s.Name] = s.Value
			}
			continue
		}
		if given != "" && !strings.EqualFold(value, s.Value) || given == "" && named {
			overruled = append(overruled, s.Name)
		}
		delete(params, given)
		params[s.Name] = s.Value // which comes after options, and before role, database and server
	}
	return overruled
}

// UnfitError says that a session, or the database, is not one on which this program can do its work, and what to do about it.
type UnfitError struct {
	Problem string // what is wrong: "the database's encoding is LATIN1, allowed is UTF8"
	Remedy  string // what to do: a statement, or words
}

func (e *UnfitError) Error() string { return e.Problem + ": " + e.Remedy }

// settle makes a session that was just opened one of ours, in what parameters of its start cannot do.
func settle(ctx context.Context, conn *pgconn.PgConn, pooled bool) error {
	if encoding := conn.ParameterStatus("server_encoding"); encoding != "UTF8" {
		return &UnfitError{
			Problem: fmt.Sprintf("the database's encoding is %s, allowed is UTF8: other encodings cannot hold the ids and names of all people", encoding),
			Remedy:  "make another database with: createdb --template template0 --encoding UTF8 NAME",
		}
	}
	sql := "SELECT current_setting('session_replication_role'), current_setting('restrict_nonsystem_relation_kind', true)"
	if !pooled {
		for _, s := range newer {
			sql = "SELECT pg_catalog.set_config('" + s.Name + "', '" + s.Value + "', false)" +
				" WHERE pg_catalog.current_setting('" + s.Name + "', true) OPERATOR(pg_catalog.<>) '" + s.Value + "'; " + sql
		}
	}
	results, err := conn.Exec(ctx, sql).ReadAll()
	if err != nil {
		return fmt.Errorf("look at the session's settings: %w", err)
	}
	rows := results[len(results)-1].Rows
	if role := string(rows[0][0]); role == "replica" {
		return &UnfitError{
			Problem: "session_replication_role is replica: no trigger would fire, so that no change would have a version",
			Remedy:  "ALTER ROLE … RESET session_replication_role, or ALTER DATABASE … RESET session_replication_role",
		}
	}
	// Behind a pooler, where statements are prepared before a transaction brings its settings.
	if kinds := string(rows[0][1]); strings.Contains(kinds, "view") {
		return &UnfitError{
			Problem: "restrict_nonsystem_relation_kind is " + kinds + ": statements about views would fail",
			Remedy:  "ALTER ROLE … RESET restrict_nonsystem_relation_kind, or ALTER DATABASE … RESET restrict_nonsystem_relation_kind",
		}
	}
	return nil
}
