package chaos

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/db/embedded"
	"pgbroker/migrations"
	"pgbroker/proto/databroker"
	"pgbroker/server/auth"
)

// secret is the shared secret of the run: base64 of 32 bytes.
const secret = "Y2hhb3Mgc2hhcmVkIHNlY3JldCwgMzIgYnl0ZXMuLi4="

// role is who the replicas are in the database: nobody special, with what `pgbroker migrate grants` grants.
const (
	role         = "pgbroker_app"
	rolePassword = "chaos-password"
)

// diskMegabytes is the size of the file system of the database, if it can have one of its own.
const diskMegabytes = 320

// Cluster is a PostgreSQL server and replicas, each a process, with a link before each replica and another
// behind it.
type Cluster struct {
	recorder   *recorder
	postgres   *dbtest.Postgres
	replicas   []*replica
	dir        string // logs
	disk       string // where the database's small file system is; "" if it has none
	noDisk     error  // why not
	current    string // program
	previous   string // program of an earlier revision; "" if there is none
	noPrevious error  // why not
	skewed     string // program with a wrong clock; "" if there is none
}

// replica is one replica, which may be running or not.
type replica struct {
	number   int
	address  string
	front    *link // clients to replica
	back     *link // replica to database
	log      *os.File
	process  *process
	conn     *grpc.ClientConn // past the links, for looking at its health
	database string           // connection string
}

func newCluster(t testing.TB, dir string, replicas int, c *Cluster) {
	t.Helper()
	c.dir = dir
	if c.noDisk = c.makeDisk(t); c.noDisk != nil {
		c.disk = ""
	}
	c.postgres = dbtest.ServerIn(t, c.disk, map[string]string{
		"max_connections": "60", "shared_buffers": "32MB", "max_wal_size": "64MB", "min_wal_size": "32MB",
		"checkpoint_timeout": "30s", "log_line_prefix": "%m [%p] %u %a ", "restart_after_crash": "on",
	})
	config, err := pgx.ParseConfig(c.postgres.SocketConnString())
	if err != nil {
		t.Fatal(err)
	}
	if err := migrations.Up(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	if c.previous != "" {
		if c.noPrevious = c.tryPrevious(t.Context()); c.noPrevious != nil {
			c.previous = ""
		}
	}
	c.postgres.Exec(grants(t, config) + `
		ALTER ROLE ` + role + ` PASSWORD '` + rolePassword + `';
	` + journalSQL)
	for i := range replicas {
		c.replicas = append(c.replicas, c.newReplica(t, i))
	}
	for _, r := range c.replicas {
		if err := c.start(r, c.current, ""); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range c.replicas {
		if err := r.awaitServing(t.Context(), time.Minute); err != nil {
			t.Fatal(err)
		}
	}
}

// tryPrevious tells whether the earlier program accepts a schema that is newer than it knows. Those from before
// that was promised do not.
func (c *Cluster) tryPrevious(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, c.previous, "migrate", "plan", "--database-url", c.postgres.SocketConnString())
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("it does not accept today's schema: %s", bytes.TrimSpace(out))
	}
	return nil
}

// grants returns the statements that make the replicas' role, as `pgbroker migrate grants` prints them.
func grants(t testing.TB, config *pgx.ConnConfig) string {
	t.Helper()
	conn, err := pgx.ConnectConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	statements, err := db.New(conn).Grants(t.Context(), db.GrantsParams{Server: role})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(statements, "\n")
}

// makeDisk gives the database a small file system, where that is possible.
func (c *Cluster) makeDisk(t testing.TB) error {
	if os.Geteuid() != 0 {
		return errors.New("only root may mount the small file system that it needs")
	}
	dir, err := os.MkdirTemp("", "pgbroker-chaos-disk-")
	if err != nil {
		return err
	}
	t.Cleanup(func() { _ = os.Remove(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	if err := smallDisk(dir, diskMegabytes); err != nil {
		return err
	}
	t.Cleanup(func() {
		if err := unmount(dir); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	c.disk = dir
	return nil
}

func (c *Cluster) newReplica(t testing.TB, number int) *replica {
	t.Helper()
	r := &replica{number: number, address: freeAddress(t)}
	var err error
	if r.front, err = newLink(fmt.Sprintf("front-%d", number), r.address); err == nil {
		r.back, err = newLink(fmt.Sprintf("back-%d", number), c.postgres.Addr())
	}
	if err != nil {
		t.Fatal(err)
	}
	if r.log, err = os.Create(filepath.Join(c.dir, fmt.Sprintf("replica-%d.log", number))); err != nil {
		t.Fatal(err)
	}
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(role, rolePassword), Host: r.back.address(),
		Path: "/" + embedded.Database, RawQuery: "sslmode=disable",
	}
	r.database = u.String()
	r.conn = dial(t, r.address)
	t.Cleanup(func() {
		if r.process != nil && r.process.running() {
			_ = r.process.signal(syscall.SIGKILL)
			<-r.process.done
		}
		r.front.close()
		r.back.close()
		_ = r.log.Close()
	})
	return r
}

// start starts the process of a replica, with a clock that is wrong by a number of seconds if skew is set.
func (c *Cluster) start(r *replica, program, skew string) error {
	cmd := exec.Command(program, "serve", "--address", r.address)
	cmd.Env = append(os.Environ(), "PGBROKER_DATABASE_URL="+r.database, "PGBROKER_SHARED_SECRET="+secret, "PGBROKER_LOG_FORMAT=text")
	if skew != "" {
		cmd.Env = append(cmd.Env, skewEnv+"="+skew)
	}
	cmd.Dir = c.dir
	cmd.Stdout, cmd.Stderr = r.log, r.log
	fmt.Fprintf(r.log, "=== %s %s\n", filepath.Base(program), skew)
	var err error
	r.process, err = startProcess(cmd)
	c.recorder.addProgram(Program{r.number, c.recorder.now(), program == c.previous})
	return err
}

// stop ends the process of a replica by a signal.
func (r *replica) stop(sig syscall.Signal) error {
	if err := r.process.signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-r.process.done:
		return nil
	case <-time.After(40 * time.Second):
		_ = r.process.signal(syscall.SIGKILL)
		return fmt.Errorf("replica %d did not end within 40 s of signal %v", r.number, sig)
	}
}

// status asks the replica, past all links, whether it can do its work.
func (r *replica) status(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	response, err := grpc_health_v1.NewHealthClient(r.conn).Check(ctx, new(grpc_health_v1.HealthCheckRequest))
	if err != nil {
		return "no answer"
	}
	return response.Status.String()
}

func (r *replica) awaitServing(ctx context.Context, patience time.Duration) error {
	ctx, cancel := within(ctx, patience)
	defer cancel()
	stream, err := grpc_health_v1.NewHealthClient(r.conn).Watch(ctx, new(grpc_health_v1.HealthCheckRequest), grpc.WaitForReady(true))
	for err == nil {
		var response *grpc_health_v1.HealthCheckResponse
		if response, err = stream.Recv(); err == nil && response.Status == grpc_health_v1.HealthCheckResponse_SERVING {
			return nil
		}
	}
	return fmt.Errorf("replica %d is not serving after %v: %w", r.number, patience, err)
}

// admin runs a statement as the superuser. While the database is away, it fails.
func (c *Cluster) admin(ctx context.Context, sql string, args ...any) error {
	_, err := c.adminText(ctx, sql, args...)
	return err
}

// adminText is admin for statements that return one text, "" without a row.
func (c *Cluster) adminText(ctx context.Context, sql string, args ...any) (text string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second) // it may be frozen
	defer cancel()
	conn, err := pgx.Connect(ctx, c.postgres.SocketConnString())
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	rows, err := conn.Query(ctx, sql, args...)
	if err != nil {
		return "", err
	}
	text, err = pgx.CollectOneRow(rows, pgx.RowTo[string])
	if errors.Is(err, pgx.ErrNoRows) {
		err = nil
	}
	return text, err
}

// postgresRuns tells whether the postmaster lives.
func (c *Cluster) postgresRuns() bool {
	select {
	case <-c.postgres.Done():
		return false
	default:
		return true
	}
}

// saveLogs keeps what the database has said.
func (c *Cluster) saveLogs() error {
	text, err := os.ReadFile(filepath.Join(c.postgres.Dir(), "postgres.log"))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(c.dir, "postgres.log"), bytes.TrimSpace(text), 0o644)
}

func freeAddress(t testing.TB) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return net.JoinHostPort("127.0.0.1", strconv.Itoa(listener.Addr().(*net.TCPAddr).Port))
}

// dial makes a client that connects again soon after each failure.
func dial(t testing.TB, address string) *grpc.ClientConn {
	t.Helper()
	key, err := auth.ParseKey(secret)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient(address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithPerRPCCredentials(auth.NewCredentials(key)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.5, Jitter: 0.2, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// broker returns a client of a replica, through its front link.
func (r *replica) broker(t testing.TB) databroker.DataBrokerServiceClient {
	return databroker.NewDataBrokerServiceClient(dial(t, r.front.address()))
}
