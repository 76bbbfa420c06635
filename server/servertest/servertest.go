// Package servertest runs replicas on a private database, with clients that speak to them over real
// gRPC.
package servertest

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/registry"
	"pgbroker/server"
	"pgbroker/server/auth"
)

// Secret is the shared secret of the replicas that New starts: base64 of 32 bytes.
const Secret = "c2VydmVydGVzdCBzaGFyZWQgc2VjcmV0IDMyIGJ5dGU="

// startTime bounds how long a replica may take until it is healthy.
const startTime = 30 * time.Second

// Broker is any number of replicas on one database.
type Broker struct {
	*Replica // the first
	Database *dbtest.Database
	Replicas []*Replica
}

// Options of a broker; the zero value is a good default.
type Options struct {
	// Replicas is how many to start; 0 means one.
	Replicas int
	// AsOwner makes the replicas that New starts connect as the owner of the schema, which sees what other sessions of
	// its own do.
	AsOwner bool
	// Address is where Start listens; "" is any free port of the loopback interface.
	Address string
	// Configure changes the configuration of each replica before it starts.
	Configure func(*server.Config)
	// ConfigureDB changes how each replica opens the database.
	ConfigureDB func(*db.Config)
}

// New starts a broker that is stopped when the test ends. Its replicas connect as dbtest.ServerRole, if options do not say
// otherwise.
func New(t testing.TB, options Options) *Broker {
	t.Helper()
	b := &Broker{Database: dbtest.New(t)}
	connString := b.Database.ServerConnString
	if options.AsOwner {
		connString = b.Database.ConnString
	}
	for range max(1, options.Replicas) {
		b.Replicas = append(b.Replicas, Start(t, connString, options))
	}
	b.Replica = b.Replicas[0]
	return b
}

// Replica is a running server and a client of it.
type Replica struct {
	Server  *server.Server
	DB      *db.DB
	Address string
	Conn    *grpc.ClientConn // authenticated with Secret

	databroker.DataBrokerServiceClient
	Checkpoints databroker.CheckpointServiceClient
	Registry    registry.RegistryClient
	Health      grpc_health_v1.HealthClient

	stop    context.CancelFunc
	stopped chan struct{}
	err     error
}

// Start starts one replica on a database, which is stopped when the test ends.
func Start(t testing.TB, connString string, options Options) *Replica {
	t.Helper()
	logger := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	dbConfig := db.Config{ConnString: connString, MaxConns: 8, Logger: logger}
	if options.ConfigureDB != nil {
		options.ConfigureDB(&dbConfig)
	}
	database, err := db.Open(t.Context(), dbConfig)
	if err != nil {
		t.Fatalf("open the database: %v", err)
	}
	config := server.Config{DB: database, Auth: auth.Config{Secrets: []string{Secret}}, Logger: logger}
	if options.Configure != nil {
		options.Configure(&config)
	}
	s, err := server.New(config)
	if err != nil {
		t.Fatalf("new server: %v", err)
	}
	listener, err := net.Listen("tcp", cmp.Or(options.Address, "127.0.0.1:0"))
	if err != nil {
		t.Fatalf("listen: %v", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &Replica{Server: s, DB: database, Address: listener.Addr().String(), stop: stop, stopped: make(chan struct{})}
	go func() {
		defer close(r.stopped)
		r.err = s.Run(ctx, listener)
		database.Close()
	}()
	t.Cleanup(func() {
		if err := r.Stop(); err != nil {
			t.Errorf("the server ended with: %v", err)
		}
	})
	r.Conn = Dial(t, r.Address, Secret)
	r.DataBrokerServiceClient = databroker.NewDataBrokerServiceClient(r.Conn)
	r.Checkpoints = databroker.NewCheckpointServiceClient(r.Conn)
	r.Registry = registry.NewRegistryClient(r.Conn)
	r.Health = grpc_health_v1.NewHealthClient(r.Conn)
	r.AwaitHealth(t, grpc_health_v1.HealthCheckResponse_SERVING)
	return r
}

// Stop stops the replica gracefully, and returns how it ended. It may be called again.
func (r *Replica) Stop() error {
	r.stop()
	<-r.stopped
	return r.err
}

// AwaitHealth waits until the replica reports a status.
func (r *Replica) AwaitHealth(t testing.TB, status grpc_health_v1.HealthCheckResponse_ServingStatus) {
	t.Helper()
	r.AwaitHealthFor(t, "", status)
}

// AwaitHealthFor waits until the replica reports a status for reading or writing.
func (r *Replica) AwaitHealthFor(t testing.TB, purpose string, status grpc_health_v1.HealthCheckResponse_ServingStatus) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	stream, err := r.Health.Watch(ctx, &grpc_health_v1.HealthCheckRequest{Service: purpose}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatalf("watch health: %v", err)
	}
	for {
		response, err := stream.Recv()
		if err != nil {
			t.Fatalf("await health %v: %v", status, errors.Join(err, ctx.Err()))
		}
		if response.Status == status {
			return
		}
	}
}

// Dial connects to a replica, with a shared secret or without.
func Dial(t testing.TB, address, secret string) *grpc.ClientConn {
	t.Helper()
	options := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	if secret != "" {
		key, err := auth.ParseKey(secret)
		if err != nil {
			t.Fatalf("parse the shared secret: %v", err)
		}
		options = append(options, grpc.WithPerRPCCredentials(auth.NewCredentials(key)))
	}
	conn, err := grpc.NewClient(address, options...)
	if err != nil {
		t.Fatalf("dial %s: %v", address, err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}
