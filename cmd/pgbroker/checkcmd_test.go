package main

import (
	"context"
	"os"
	"strings"
	"testing"

	"pgbroker/db/dbtest"
)

func TestCheckCommand(t *testing.T) {
	t.Parallel()
	d := dbtest.New(t)
	env := append(os.Environ(), "PGBROKER_DATABASE_URL="+d.ConnString)
	if out := mustTry(t, env, "check"); out != "no problems found\n" {
		t.Errorf("check: %s", out)
	}
	d.Exec(t, "INSERT INTO pgbroker.records (type, id) VALUES ('t', 'a')")
	d.Exec(t, "UPDATE pgbroker.record_types SET record_count = 5 WHERE type = 't'")
	d.Exec(t, "ALTER TABLE pgbroker.records DISABLE TRIGGER records_log_delete")
	d.Exec(t, "DELETE FROM pgbroker.records")

	check := func(args ...string) (code int, stdout, stderr string) {
		var out, errs strings.Builder
		code = run(context.Background(), append([]string{"check"}, args...), strings.NewReader(""), &out, &errs, env)
		return code, out.String(), errs.String()
	}
	code, stdout, stderr := check()
	for _, want := range []string{"disabled trigger", "records.records_log_delete", "change without its record", "wrong count"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q is not in the output:\n%s", want, stdout)
		}
	}
	if code != exitProblems || !strings.Contains(stderr, "found problems: 3, of which 'pgbroker check --repair' can repair 3") {
		t.Errorf("exit code %d, want %d: %s", code, exitProblems, stderr)
	}
	code, stdout, _ = check("--quick", "-o", "json")
	if code != exitProblems || strings.Count(stdout, "\n") != 1 ||
		!strings.Contains(stdout, `"problem":"disabled trigger","subject":"records.records_log_delete"`) {
		t.Errorf("exit code %d, want %d and one line: %s", code, exitProblems, stdout)
	}
	code, stdout, stderr = check("--repair")
	if code != exitOK || stdout != "no problems found\n" || !strings.Contains(stderr, "repaired 1 records and changes") {
		t.Errorf("exit code %d: %s%s", code, stdout, stderr)
	}
	if out := mustTry(t, env, "check"); out != "no problems found\n" {
		t.Errorf("check: %s", out)
	}
}
