package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/protobuf/types/known/anypb"

	"pgbroker/db/dbtest"
	"pgbroker/migrations"
	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server/servertest"
)

// newerSchema is what the migration of a later release may have done before all replicas are replaced: things were added.
const newerSchema = `
	DO $$
	DECLARE
		name text;
	BEGIN
		FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'pgbroker' LOOP
			-- A column of changes comes with another write_records, which returns such rows.
			IF name NOT IN ('changes', 'schema_migrations') THEN
				EXECUTE format('ALTER TABLE pgbroker.%I ADD COLUMN later text NOT NULL DEFAULT ''x''', name);
			END IF;
		END LOOP;
	END $$;
	CREATE TABLE pgbroker.later (x int);
	UPDATE pgbroker.schema_migrations SET version = version + 1`

// TestServeNewerSchema: a replica goes on while the schema becomes a newer one; when it is restarted in the middle of the upgrade
// it comes back, says so once, and does everything; and none of its commands takes the newer schema for its own.
func TestServeNewerSchema(t *testing.T) {
	t.Parallel()
	database := dbtest.New(t)
	known, newer := fmt.Sprint(migrations.Latest()), fmt.Sprint(migrations.Latest()+1)
	program := buildProgram(t)
	// serve starts a replica. stop ends it and returns the warnings that it has logged.
	serve := func(args ...string) (client databroker.DataBrokerServiceClient, stop func() []string) {
		address := freeAddress(t)
		var log bytes.Buffer
		replica := exec.CommandContext(t.Context(), program, append([]string{"serve", "--address", address}, args...)...)
		replica.Env = append(os.Environ(), "PGBROKER_DATABASE_URL="+database.ConnString, "PGBROKER_SHARED_SECRET="+servertest.Secret)
		replica.Stderr = &log
		if err := replica.Start(); err != nil {
			t.Fatal(err)
		}
		mustTry(t, []string{"PGBROKER_ADDRESS=" + address, "PGBROKER_SHARED_SECRET=" + servertest.Secret}, "health", "--wait", "30s")
		return databroker.NewDataBrokerServiceClient(servertest.Dial(t, address, servertest.Secret)), func() (warnings []string) {
			if err := replica.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := replica.Wait(); err != nil {
				t.Errorf("%v: %s", err, &log)
			}
			for line := range strings.Lines(log.String()) {
				if strings.Contains(line, "running as root") { // as tests do in containers
					continue
				}
				if strings.Contains(line, `"level":"WARN"`) || strings.Contains(line, `"level":"ERROR"`) {
					warnings = append(warnings, line)
				}
			}
			return warnings
		}
	}

	client, stop := serve()
	serves(t, client)
	database.Exec(t, newerSchema)
	serves(t, client)
	if warnings := stop(); len(warnings) > 0 {
		t.Errorf("the replica that was there before: got %q", warnings)
	}
	for _, migrate := range []string{"--migrate=false", "--migrate"} {
		client, stop := serve(migrate)
		serves(t, client)
		warnings := stop()
		if len(warnings) != 1 || !strings.Contains(warnings[0], fmt.Sprintf(`"schema":%s,"known":%s}`, newer, known)) {
			t.Errorf("serve %s: got %q, want one warning that names versions %s and %s", migrate, warnings, newer, known)
		}
	}

	env := []string{"PGBROKER_DATABASE_URL=" + database.ConnString}
	for command, want := range map[string]string{
		"version": newer + " of " + known + ", newer than this pgbroker\n",
		"up":      "the schema is at version " + newer + ", newer than this pgbroker, which knows versions up to " + known + "\n",
		"plan":    "",
	} {
		if got := mustTry(t, env, "migrate", command); got != want {
			t.Errorf("migrate %s: got %q, want %q", command, got, want)
		}
	}
	for _, args := range [][]string{{"migrate", "down", "1"}, {"migrate", "force", known}} {
		if r := try(t, env, args...); r.code != exitFailure || !strings.Contains(r.stderr, "use the newer pgbroker") {
			t.Errorf("%q: got exit code %d and %q", args, r.code, r.stderr)
		}
	}
	if version, dirty, err := migrations.Version(t.Context(), database.Config(t)); fmt.Sprint(version) != newer || dirty || err != nil {
		t.Errorf("got version %d, %v, %v", version, dirty, err)
	}
}

// serves fails the test unless a replica does what clients need: Put, Get, Patch, Query, SyncLatest and Sync, of deletions too.
func serves(t *testing.T, client databroker.DataBrokerServiceClient) {
	t.Helper()
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	const kind = "session.Session"
	info, err := client.ServerInfo(ctx, nil)
	must(err)
	stream, err := client.Sync(ctx, &databroker.SyncRequest{
		ServerVersion: info.ServerVersion, RecordVersion: info.LatestRecordVersion, Type: kind, Wait: new(true),
	})
	must(err)
	// delivered waits for a change on the stream.
	delivered := func(version uint64) {
		t.Helper()
		for {
			response, err := stream.Recv()
			must(err)
			if record := response.GetRecord(); record != nil {
				if record.Version != version {
					t.Fatalf("the stream delivers version %d, want %d", record.Version, version)
				}
				return
			}
		}
	}

	payload, err := anypb.New(&session.Session{Id: "s", UserId: "jane"})
	must(err)
	put, err := client.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{{Type: kind, Id: "s", Data: payload}}})
	must(err)
	delivered(put.Records[0].Version)
	got, err := client.Get(ctx, &databroker.GetRequest{Type: kind, Id: "s"})
	must(err)
	if got.Record.Version != put.Records[0].Version || !bytes.Equal(got.Record.Data.Value, payload.Value) {
		t.Errorf("get: %v, want what was put", got)
	}
	patched, err := client.Patch(ctx, &databroker.PatchRequest{Records: put.Records})
	must(err)
	delivered(patched.Records[0].Version)
	found, err := client.Query(ctx, &databroker.QueryRequest{Type: kind, Query: "jane", Limit: 10})
	must(err)
	if len(found.Records) != 1 {
		t.Errorf("query: got %v", found)
	}
	latest, err := client.SyncLatest(ctx, &databroker.SyncLatestRequest{Type: kind})
	must(err)
	if first, err := latest.Recv(); err != nil || first.GetRecord().GetId() != "s" {
		t.Errorf("SyncLatest: got %v, %v", first, err)
	}
	put.Records[0].DeletedAt = put.Records[0].ModifiedAt
	deleted, err := client.Put(ctx, &databroker.PutRequest{Records: put.Records})
	must(err)
	delivered(deleted.Records[0].Version)
}
