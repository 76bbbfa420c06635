package invariants

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"pgbroker/proto/databroker"
	"pgbroker/server/auth"
	"pgbroker/server/servertest"
)

// TestRollingRestartLosesNoRequest restarts three replicas one after the other, twice, under load from
// clients that know all of them: not one request fails.
func TestRollingRestartLosesNoRequest(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{Replicas: 3})
	conn := dialAll(t, b.Replicas)
	client := databroker.NewDataBrokerServiceClient(conn)

	ctx, stop := context.WithCancel(t.Context())
	var requests atomic.Int64
	load, failed := errgroup.WithContext(t.Context())
	for i := range 16 {
		load.Go(func() error {
			for n := 0; ctx.Err() == nil; n++ {
				record := &databroker.Record{Type: "t", Id: fmt.Sprintf("%d/%d", i, n%100)}
				put, err := client.Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{record}}, grpc.WaitForReady(true))
				if err != nil {
					return fmt.Errorf("put: %w", err)
				}
				got, err := client.Get(t.Context(), &databroker.GetRequest{Type: record.Type, Id: record.Id}, grpc.WaitForReady(true))
				if err != nil {
					return fmt.Errorf("get: %w", err)
				}
				if got.Record.Version != put.Records[0].Version {
					return fmt.Errorf("version %d of %s is gone: now %d", put.Records[0].Version, record.Id, got.Record.Version)
				}
				requests.Add(2)
			}
			return nil
		})
	}
	for range 2 {
		for i, r := range b.Replicas {
			awaitMore(failed, &requests, 500)
			if err := r.Stop(); err != nil {
				t.Errorf("the replica ended with: %v", err)
			}
			awaitMore(failed, &requests, 200)
			b.Replicas[i] = servertest.Start(t, b.Database.ServerConnString, servertest.Options{Address: r.Address})
		}
	}
	stop()
	if err := load.Wait(); err != nil {
		t.Errorf("after %d requests: %v", requests.Load(), err)
	}
	t.Logf("%d requests", requests.Load())
}

// dialAll connects to all of the replicas at once.
func dialAll(t testing.TB, replicas []*servertest.Replica) *grpc.ClientConn {
	t.Helper()
	addresses := manual.NewBuilderWithScheme("replicas")
	state := resolver.State{}
	for _, r := range replicas {
		state.Addresses = append(state.Addresses, resolver.Address{Addr: r.Address})
	}
	addresses.InitialState(state)
	key, err := auth.ParseKey(servertest.Secret)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("replicas:///all", grpc.WithResolvers(addresses),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithPerRPCCredentials(auth.NewCredentials(key)),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// awaitMore waits until the load has done so much more, or has failed.
func awaitMore(failed context.Context, requests *atomic.Int64, n int64) {
	for until := requests.Load() + n; requests.Load() < until && failed.Err() == nil; {
		yield()
	}
}

// TestStreamsEndAsUnavailableWhenTheServerStops: never as canceled, which clients take as an end for good.
func TestStreamsEndAsUnavailableWhenTheServerStops(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	stream, err := b.Sync(t.Context(), latest(t, b.Replica))
	if err != nil {
		t.Fatal(err)
	}
	put(t, b.Replica, &databroker.Record{Type: "t", Id: "1"})
	next(t, stream)
	if err := b.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ended with %v, want Unavailable", err)
	}
}
