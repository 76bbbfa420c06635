package people

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db/dbtest"
	"pgbroker/db/embedded"
	"pgbroker/proto/databroker"
	"pgbroker/proto/events"
	"pgbroker/proto/registry"
	"pgbroker/proto/session"
	"pgbroker/proto/user"
	"pgbroker/server/auth"
	"pgbroker/server/servertest"
)

var update = flag.Bool("update", false, "write what the statements of docs/sql.md print into docs/sql.md")

// sessionsEnv says for how many sessions TestCookbookAtScale looks at the plans, 1000000 for instance.
const sessionsEnv = "PGBROKER_COOKBOOK_SESSIONS"

const cookbookPath = "../../docs/sql.md"

// A recipe is a statement of the cookbook with its output. What stands behind "```sql" tells which role runs it, and:
// "look-up" that an index has to find its rows, "expanded" that psql shows a line for each column, "varies" that only the
// columns and the number of rows can be compared, "blocked" that somebody blocks the writers meanwhile.
type recipe struct {
	line   int
	title  string
	role   string
	words  []string
	sql    string
	output string
	from   int // place of the output among the document's lines
	to     int
}

// cookbook reads docs/sql.md.
func cookbook(t *testing.T) (recipes []recipe, lines []string) {
	t.Helper()
	text, err := os.ReadFile(cookbookPath)
	if err != nil {
		t.Fatal(err)
	}
	lines = strings.SplitAfter(string(text), "\n")
	title := ""
	for i := 0; i < len(lines); i++ {
		if heading, ok := strings.CutPrefix(lines[i], "### "); ok {
			title = strings.TrimSpace(heading)
		}
		words, ok := strings.CutPrefix(lines[i], "```sql ")
		if !ok {
			continue
		}
		r := recipe{line: i + 1, title: title, words: strings.Fields(words)}
		r.role = r.words[0]
		for i++; lines[i] != "```\n"; i++ {
			r.sql += lines[i]
		}
		i++
		r.from, r.to = i, i
		if lines[i] == "```text\n" {
			for i++; lines[i] != "```\n"; i++ {
				r.output += lines[i]
			}
			r.to = i + 1
		}
		recipes = append(recipes, r)
	}
	return recipes, lines
}

func (r recipe) is(word string) bool { return slices.Contains(r.words, word) }

// The roles of the cookbook, as its output shows them.
const (
	cookReader  = "pgbroker_reader"
	cookRevoker = "helpdesk"
	cookWriter  = "pgbroker_writer"
	cookServer  = "pgbroker_server"
)

// noon is what the document shows for the time at which its data were made.
var noon = time.Date(2030, 1, 15, 12, 0, 0, 0, time.UTC)

// seedCookbook writes what the cookbook is about.
func seedCookbook(t *testing.T, r *servertest.Replica, now time.Time) {
	t.Helper()
	ago := func(days, hours, minutes int) time.Time {
		return now.Add(-time.Duration(days)*24*time.Hour - time.Duration(hours)*time.Hour - time.Duration(minutes)*time.Minute)
	}
	for _, u := range []struct{ id, name string }{{"ada", "Ada"}, {"bob", "Bob"}, {"cem", "Cem"}, {"dana", "Dana"}, {"eve", "Eve"}, {"gus", "Gus"}} {
		put(t, r, aUser(t, u.id, u.name))
	}
	for _, u := range []struct {
		id, name string
		groups   []any
	}{
		{"ada", "Ada", []any{"g1"}},
		{"bob", "Bob", []any{"g1"}},
		{"cem", "Cem", []any{"g1", "g2"}},
		{"dana", "Dana", []any{"g2"}},
		{"eve", "Eve", nil},
		{"fay", "Fay", []any{"g2"}},
	} {
		put(t, r, record(t, "pomerium.io/DirectoryUser", u.id, object(t, map[string]any{
			"id": u.id, "display_name": u.name, "email": u.id + "@example.com", "group_ids": u.groups,
		})))
	}
	for id, name := range map[string]string{"g1": "Engineering", "g2": "Finance", "g3": "Night shift"} {
		put(t, r, record(t, "pomerium.io/DirectoryGroup", id, object(t, map[string]any{"id": id, "name": name})))
	}
	acting := aSession("session-bob-2", "bob", "google", ago(0, 3, 30), ago(0, 3, 10), ago(0, -9, 0))
	acts := "session-ada-1"
	acting.ImpersonateSessionId = &acts
	for _, s := range []*session.Session{
		aSession("session-ada-1", "ada", "google", ago(0, 2, 30), ago(0, 0, 30), ago(0, -11, 0)),
		aSession("session-ada-2", "ada", "google", ago(1, 5, 30), ago(1, 2, 30), ago(0, -4, 0)),
		aSession("session-bob-1", "bob", "okta", ago(3, 1, 30), ago(2, 2, 30), ago(0, 0, -30)),
		acting,
		aSession("session-cem-1", "cem", "google", ago(0, 6, 30), ago(0, 1, 30), ago(0, -8, 0)),
		aSession("session-dana-1", "dana", "okta", ago(0, 8, 30), ago(0, 4, 30), ago(0, -6, 0)),
		aSession("session-eve-1", "eve", "okta", ago(0, 9, 30), ago(0, 5, 30), ago(0, -5, 0)),
		aSession("session-eve-2", "eve", "okta", ago(0, 7, 30), ago(0, 6, 30), ago(0, -5, 0)),
		aSession("session-gus-1", "gus", "google", ago(20, 1, 30), ago(9, 1, 30), ago(-1, 0, 0)),
	} {
		put(t, r, record(t, "", s.GetId(), s))
	}
	put(t, r, deviceOf(t, "ada", "admin", ago(100, 0, 0))...)
	put(t, r, deviceOf(t, "bob", "", ago(3, 0, 0))...)
	put(t, r, deviceOf(t, "dana", "admin", ago(30, 0, 0))...)
	put(t, r, deviceOf(t, "gus", "admin", ago(400, 0, 0))...)
	for _, binding := range []*session.SessionBinding{
		{Protocol: "ssh", SessionId: "session-ada-1", UserId: "ada"},
		{Protocol: "ssh", SessionId: "session-dana-1", UserId: "dana"},
		{Protocol: "ssh", SessionId: "session-of-old", UserId: "bob"},
	} {
		put(t, r, record(t, "", "sshkey-SHA256:"+binding.UserId, binding))
	}
	for id, expires := range map[string]*timestamppb.Timestamp{"backup": nil, "ci": timestamppb.New(ago(-5, 0, 0)), "metrics": timestamppb.New(ago(-90, 0, 0))} {
		description := "for " + id
		put(t, r, record(t, "", id, &user.ServiceAccount{
			Id: id, UserId: id + "@robots.example.com", Description: &description, IssuedAt: timestamppb.New(ago(60, 0, 0)), ExpiresAt: expires,
		}))
	}
	put(t, r, record(t, "", "config_errors", &events.LastError{Time: timestamppb.New(ago(0, 1, 0)), Id: "config_errors", Message: "cannot read policy 7"}))

	ctx := t.Context()
	if _, err := r.AcquireLease(ctx, &databroker.AcquireLeaseRequest{Name: "identity_manager", Duration: durationpb.New(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Registry.Report(ctx, &registry.RegisterRequest{Services: []*registry.Service{
		{Kind: registry.ServiceKind_AUTHORIZE, Endpoint: "https://authorize.example.com"},
		{Kind: registry.ServiceKind_PROXY, Endpoint: "https://proxy.example.com"},
	}}); err != nil {
		t.Fatal(err)
	}
	onBehalf, err := auth.OnBehalfOf(ctx, "helen")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Put(onBehalf, &databroker.PutRequest{Records: []*databroker.Record{deletion(sessionType, "session-eve-1")}}); err != nil {
		t.Fatal(err)
	}
}

// TestCookbook runs every statement of docs/sql.md, each in the role that it says is enough, and compares what
// psql prints with what the document shows. With -update it writes the document.
func TestCookbook(t *testing.T) {
	psql := findPsql(t)
	d := dbtest.New(t)
	roles(t, d, cookReader, cookWriter, cookServer, cookRevoker)
	r := servertest.Start(t, d.As(t, cookServer), servertest.Options{Configure: quiet})
	now := time.Now().UTC().Truncate(time.Second)
	seedCookbook(t, r, now)

	recipes, lines := cookbook(t)
	if len(recipes) < 25 {
		t.Errorf("%d recipes, want at least 25", len(recipes))
	}
	for i, recipe := range recipes {
		login := ""
		switch recipe.role {
		case "reader":
			login = cookReader
		case "revoker":
			login = cookRevoker
		case "writer":
			login = cookWriter
		case "owner":
		default:
			t.Fatalf("%s:%d: there is no role %q", cookbookPath, recipe.line, recipe.role)
		}
		toDocument := func(text string) string { return text }
		if recipe.is("blocked") {
			toDocument = blockWriters(t, d)
		}
		if recipe.is("look-up") {
			checkLookUp(t, d, recipe, "SET enable_seqscan = off")
		}
		got := toDocument(timesOfDocument(runPsql(t, psql, d, login, recipe), now))
		recipes[i].output = got
		if !*update && squeeze(got, recipe) != squeeze(recipe.output, recipe) {
			t.Errorf("%s:%d: %s\ngot\n%s\nwant\n%s\n(go test ./server/people -run TestCookbook -update writes the document)",
				cookbookPath, recipe.line, recipe.title, got, recipe.output)
		}
	}
	if !*update {
		return
	}
	var text strings.Builder
	next := 0
	for _, recipe := range recipes {
		text.WriteString(strings.Join(lines[next:recipe.from], ""))
		text.WriteString("```text\n" + recipe.output + "```\n")
		next = recipe.to
	}
	text.WriteString(strings.Join(lines[next:], ""))
	if err := os.WriteFile(cookbookPath, []byte(text.String()), 0o644); err != nil {
		t.Fatal(err)
	}
}

func findPsql(t *testing.T) string {
	t.Helper()
	if path, err := exec.LookPath("psql"); err == nil {
		return path
	}
	binaries, err := embedded.Find(t.Context())
	if err == nil {
		path := filepath.Join(binaries.Dir, "psql")
		if _, err = os.Stat(path); err == nil {
			return path
		}
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("psql: %v", err)
	}
	t.Skipf("psql: %v", err)
	return ""
}

func runPsql(t *testing.T, psql string, d *dbtest.Database, role string, r recipe) string {
	t.Helper()
	args := []string{"-X", "-v", "ON_ERROR_STOP=1", "-P", "pager=off", "-f", "-", d.ConnString}
	if role != "" {
		args[len(args)-1] = d.As(t, role)
	}
	if r.is("expanded") {
		args = append([]string{"-x"}, args...)
	}
	cmd := exec.CommandContext(t.Context(), psql, args...)
	cmd.Stdin = strings.NewReader(r.sql)
	cmd.Env = append(os.Environ(), "PGTZ=UTC", "PGAPPNAME=psql", "LC_ALL=C.UTF-8")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	output, err := cmd.Output()
	if err != nil {
		t.Errorf("%s:%d: %s, as %s: %v\n%s", cookbookPath, r.line, r.title, r.role, err, stderr.String())
	}
	var shown []string
	for line := range strings.Lines(strings.TrimPrefix(string(output), "SET\n")) {
		shown = append(shown, strings.TrimRight(line, " \n"))
	}
	return strings.TrimRight(strings.Join(shown, "\n"), "\n") + "\n"
}

var (
	timestamp = regexp.MustCompile(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?\+00`)
	blanks    = regexp.MustCompile(`[ -]+`)
)

// timesOfDocument moves every time by as much as lies between the test and the document. What has been
// written during the test was written at noon.
func timesOfDocument(text string, now time.Time) string {
	return timestamp.ReplaceAllStringFunc(text, func(match string) string {
		const layout = "2006-01-02 15:04:05-07"
		at, err := time.Parse(layout, match)
		if err != nil {
			return match
		}
		at = at.Add(noon.Sub(now))
		if !at.Before(noon) && at.Sub(noon) < 10*time.Minute {
			at = noon
		}
		return at.UTC().Format(layout)
	})
}

// squeeze takes out what differs from run to run: the width of columns, or all but the first and the last
// line.
func squeeze(text string, r recipe) string {
	text = blanks.ReplaceAllString(text, " ")
	if lines := strings.Split(strings.TrimSpace(text), "\n"); r.is("varies") {
		return lines[0] + "\n" + lines[len(lines)-1]
	}
	return text
}

// blockWriters leaves a transaction open that has written, with a writer that waits for it, and returns what
// shows its process under the number that the document has.
func blockWriters(t *testing.T, d *dbtest.Database) func(string) string {
	t.Helper()
	ctx := t.Context()
	open := func(name string) *pgx.Conn {
		conn := d.Connect(t)
		if _, err := conn.Exec(ctx, "SELECT set_config('application_name', $1, false)", name); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	culprit, victim := open("forgotten"), open("victim")
	if _, err := culprit.Exec(ctx, "BEGIN; DELETE FROM pgbroker.users WHERE id = 'eve'"); err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := victim.Exec(context.WithoutCancel(ctx), "DELETE FROM pgbroker.users WHERE id = 'nobody'")
		waiting <- err
	}()
	t.Cleanup(func() {
		if _, err := culprit.Exec(context.WithoutCancel(ctx), "ROLLBACK"); err != nil {
			t.Error(err)
		}
		if err := <-waiting; err != nil {
			t.Error(err)
		}
	})
	for deadline := time.Now().Add(patience); ; {
		if value[bool](t, d, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = 'victim' AND wait_event_type = 'Lock')`) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nobody waits for the blocked order lock")
		}
	}
	pid := strconv.Itoa(int(culprit.PgConn().PID()))
	return func(text string) string {
		return strings.ReplaceAll(text, pid, fmt.Sprintf("%*s", len(pid), "4711"))
	}
}

var explainable = regexp.MustCompile(`^(SELECT|WITH|DELETE)\b`)

// statements returns those statements of a recipe that have a plan.
func (r recipe) statements() (plannable []string) {
	for _, statement := range strings.Split(r.sql, ";\n") {
		if statement = strings.TrimSpace(statement); explainable.MatchString(statement) {
			plannable = append(plannable, statement)
		}
	}
	return plannable
}

// checkLookUp checks that an index finds what a recipe wants of the large tables.
func checkLookUp(t *testing.T, d *dbtest.Database, r recipe, setting string) {
	t.Helper()
	for _, statement := range r.statements() {
		plan := explain(t, d, setting, "EXPLAIN "+statement)
		if strings.Contains(plan, "Seq Scan on records") || strings.Contains(plan, "Seq Scan on changes") || strings.Contains(plan, "Seq Scan on audit") {
			t.Errorf("%s:%d: %s reads everything:\n%s\n%s", cookbookPath, r.line, r.title, statement, plan)
		}
	}
}

// TestCookbookAtScale runs every statement of docs/sql.md that has a plan on many sessions, when asked to:
//
//	PGBROKER_COOKBOOK_SESSIONS=1000000 go test ./server/people -run TestCookbookAtScale -v -timeout 1h
//
// It shows plans and times, both as a table at the end, and fails where a look-up reads everything or is compiled.
func TestCookbookAtScale(t *testing.T) {
	count, err := strconv.Atoi(os.Getenv(sessionsEnv))
	if err != nil {
		t.Skipf("to run it, set %s to a number such as 1000000", sessionsEnv)
	}
	d := dbtest.New(t)
	const batch = 50_000
	for from := 0; from < count; from += batch {
		// Payloads of the size of real ones, on tables that autovacuum has seen.
		d.Exec(t, `INSERT INTO pgbroker.records (type, id, data, payload)
			SELECT $1, 'session-' || i, jsonb_build_object(
				'id', 'session-' || i, 'user_id', 'user-' || i / 3, 'idp_id', 'idp-' || i % 4,
				'issued_at', now() - make_interval(mins => i % 20000), 'accessed_at', now() - make_interval(mins => i % 10000),
				'expires_at', now() + make_interval(mins => 1 + i % 20000),
				'claims', jsonb_build_object('email', jsonb_build_array('user-' || i / 3 || '@example.com'), 'name', jsonb_build_array('User ' || i / 3),
				                             'groups', jsonb_build_array('a', 'b', 'c'), 'picture', jsonb_build_array(repeat('x', 100)))),
				repeat('payload', 200)::bytea
			FROM generate_series($2::integer, $3::integer) AS i`, sessionType, from, min(from+batch, count)-1)
	}
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data)
		SELECT $1, 'user-' || i, jsonb_build_object('id', 'user-' || i, 'name', 'User ' || i, 'email', 'user-' || i || '@example.com')
		FROM generate_series(0, $2::integer) AS i`, userType, count/30)
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data)
		SELECT 'pomerium.io/DirectoryUser', 'user-' || i, jsonb_build_object('id', 'user-' || i, 'email', 'user-' || i || '@example.com',
			'group_ids', jsonb_build_array('g' || i % 500, 'g' || i % 7))
		FROM generate_series(0, $1::integer) AS i`, count/20)
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data)
		SELECT 'pomerium.io/DirectoryGroup', 'g' || i, jsonb_build_object('name', 'Group ' || i) FROM generate_series(0, 499) AS i`)
	d.Exec(t, `INSERT INTO pgbroker.records (type, id, data)
		SELECT 'type.googleapis.com/pomerium.device.Enrollment', 'e' || i, jsonb_build_object('user_id', 'user-' || i, 'enrolled_at', now() - make_interval(days => i % 400))
		FROM generate_series(0, $1::integer) AS i`, count/100)
	d.Exec(t, `DELETE FROM pgbroker.records WHERE type = $1 AND id LIKE 'session-%9999'`, sessionType)
	d.Exec(t, `INSERT INTO pgbroker.audit (cause, type, id, user_id) SELECT 'expiry', $1, 'ended-' || i, 'user-' || i / 30 FROM generate_series(0, $2::integer) AS i`,
		sessionType, count/10)
	d.Exec(t, `VACUUM ANALYZE`)

	// What the cookbook names is something of the kind here.
	here := strings.NewReplacer("session-ada-1", "session-1", "session-cem-1", "session-7", "session-eve-1", "session-9999",
		"'ada'", "'user-1'", "'bob'", "'user-2'", "'dana'", "'user-3'", "Engineering", "Group 3", "Finance", "Group 400", "okta", "idp-1")
	recipes, _ := cookbook(t)
	table := new(strings.Builder)
	for _, recipe := range recipes {
		recipe.sql = here.Replace(recipe.sql)
		if recipe.is("look-up") {
			checkLookUp(t, d, recipe, "SET LOCAL statement_timeout = 0")
		}
		for _, statement := range recipe.statements() {
			if strings.Contains(statement, "USING unused") { // a table of the statement before
				statement = "SELECT id, version FROM pgbroker.sessions WHERE idle_for > interval '6.9 days'"
			}
			plan := explain(t, d, "SET LOCAL statement_timeout = 0", "EXPLAIN (ANALYZE, BUFFERS) "+statement)
			t.Logf("%s\n%s\n%s", recipe.title, statement, plan)
			if recipe.is("look-up") && strings.Contains(plan, "JIT:") {
				t.Errorf("%s:%d: %s is compiled", cookbookPath, recipe.line, recipe.title)
			}
			fmt.Fprintf(table, "| %s | %s | %s |\n", recipe.title, executionTime.FindStringSubmatch(plan)[1], whatIsRead(plan))
		}
	}
	t.Logf("\n| question | ms | reads |\n|---|---|---|\n%s", table)
}

var (
	executionTime = regexp.MustCompile(`Execution Time: ([\d.]+) ms`)
	scan          = regexp.MustCompile(`Seq Scan on (records|changes|audit)\b`)
	typeScan      = regexp.MustCompile(`Index Cond: \(type = '([^']*)'::text\)\n`)
	sorted        = regexp.MustCompile(`external merge +Disk: (\d+)kB`)
)

// whatIsRead says in a few words which plan it is.
func whatIsRead(plan string) string {
	var reads []string
	note := func(what string) {
		if !slices.Contains(reads, what) {
			reads = append(reads, what)
		}
	}
	for _, match := range scan.FindAllStringSubmatch(plan, -1) {
		note("all " + match[1])
	}
	for _, match := range typeScan.FindAllStringSubmatch(plan, -1) {
		note("all of type " + strings.TrimPrefix(match[1], "type.googleapis.com/"))
	}
	if len(reads) == 0 {
		note("what it shows")
	}
	for _, match := range sorted.FindAllStringSubmatch(plan, -1) {
		kB, _ := strconv.Atoi(match[1])
		note(fmt.Sprintf("sorts %d MB on disk", kB>>10))
	}
	if strings.Contains(plan, "JIT:") {
		note("compiled")
	}
	return strings.Join(reads, ", ")
}

// explain runs EXPLAIN in a transaction that leaves nothing.
func explain(t *testing.T, d *dbtest.Database, setting, sql string) string {
	t.Helper()
	var plan []string
	err := pgx.BeginFunc(t.Context(), d.Pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(t.Context(), setting); err != nil {
			return err
		}
		rows, err := tx.Query(t.Context(), sql)
		if err != nil {
			return err
		}
		if plan, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			return err
		}
		return errUndo
	})
	if err != nil && err != errUndo { //nolint:errorlint // BeginFunc returns it as it is
		t.Fatalf("%s: %v", sql, err)
	}
	return strings.Join(plan, "\n")
}

var errUndo = fmt.Errorf("undo")
