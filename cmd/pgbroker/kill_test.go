package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/server/servertest"
)

// TestI2_AcknowledgedWritesSurviveTheKillOfAReplica kills a replica's process with SIGKILL under load, and
// looks for what it has acknowledged through another one.
func TestI2_AcknowledgedWritesSurviveTheKillOfAReplica(t *testing.T) {
	t.Parallel()
	program := buildProgram(t)
	database := dbtest.New(t)
	survivor := servertest.Start(t, database.ServerConnString, servertest.Options{})
	address := freeAddress(t)
	var log bytes.Buffer
	victim := exec.CommandContext(t.Context(), program, "serve", "--address", address)
	victim.Env = append(os.Environ(), "PGBROKER_DATABASE_URL="+database.ConnString, "PGBROKER_SHARED_SECRET="+servertest.Secret)
	victim.Stderr = &log
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	mustTry(t, []string{"PGBROKER_ADDRESS=" + address, "PGBROKER_SHARED_SECRET=" + servertest.Secret}, "health", "--wait", "30s")
	client := databroker.NewDataBrokerServiceClient(servertest.Dial(t, address, servertest.Secret))

	acknowledged := make([]map[string]uint64, 8)
	enough := make(chan struct{}, len(acknowledged))
	var writers errgroup.Group
	for w := range acknowledged {
		acknowledged[w] = make(map[string]uint64)
		writers.Go(func() error {
			for n := 0; ; n++ {
				request := &databroker.PutRequest{Records: []*databroker.Record{
					{Type: "t", Id: fmt.Sprintf("%d/%d/a", w, n)}, {Type: "t", Id: fmt.Sprintf("%d/%d/b", w, n)},
				}}
				response, err := client.Put(t.Context(), request)
				if status.Code(err) == codes.Unavailable {
					return nil
				}
				if err != nil {
					return err
				}
				for _, record := range response.Records {
					acknowledged[w][record.Id] = record.Version
				}
				if n == 50 {
					enough <- struct{}{}
				}
			}
		})
	}
	for range acknowledged {
		<-enough
	}
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = victim.Wait() // killed, which is an error
	if err := writers.Wait(); err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, records := range acknowledged {
		for id, version := range records {
			response, err := survivor.Get(t.Context(), &databroker.GetRequest{Type: "t", Id: id})
			if err != nil || response.Record.Version != version {
				t.Fatalf("acknowledged write of %s at version %d: %v, %v\n%s", id, version, response, err, &log)
			}
			count++
		}
	}
	// What was not acknowledged is there whole or not at all.
	var halves int
	if err := database.Pool.QueryRow(t.Context(), `
		SELECT count(*) FROM (SELECT FROM pgbroker.records GROUP BY left(id, -1) HAVING count(*) <> 2) AS half`).Scan(&halves); err != nil {
		t.Fatal(err)
	}
	if halves != 0 {
		t.Errorf("%d requests have left one of their two records", halves)
	}
	t.Logf("%d acknowledged records", count)
}
