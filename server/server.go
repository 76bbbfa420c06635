// Package server is a pgbroker replica: it serves the databroker wire contract from PostgreSQL.
//
// Writes go down one column, reads come up another, and the two meet only in the database: a replica
// never tells its own streams about its own writes, so one replica and ten run the same code.
//
//	Put ─► auth ─► records ─► combiner ─► one statement ─► triggers ─► COMMIT (+ NOTIFY) ─► reply
//	                                                                       │
//	Sync ◄─ sync ◄─ changefeed cursor ◄─ ring ◄─ tailer ◄─ listener ◄──────┘
package server

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"time"

	grpcprometheus "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	_ "google.golang.org/grpc/encoding/gzip" // for clients that ask for compression
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/tap"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/proto/registry"
	"pgbroker/server/auth"
	"pgbroker/server/changefeed"
	"pgbroker/server/reload"
	"pgbroker/server/supervise"
)

// Defaults of Config.
const (
	DefaultRequestTimeout      = 8 * time.Second
	DefaultShutdownTimeout     = 25 * time.Second
	DefaultMaxMessageSize      = 4 << 20
	DefaultTombstoneRetention  = 7 * 24 * time.Hour
	DefaultAuditRetention      = 90 * 24 * time.Hour
	DefaultMaintenanceInterval = 10 * time.Second
	DefaultLockWarning         = 2 * time.Second
	DefaultProjectionGrace     = 30 * time.Second
)

// MinAuditRetention is the shortest retention of the audit that the database allows: whoever takes over a replica cannot hide at
// once what it has done.
const MinAuditRetention = 24 * time.Hour

// Config of a Server.
type Config struct {
	// DB is the database, opened; its schema must be of the version that this program knows. Required.
	DB *db.DB
	// Auth names the shared secrets of which requests must show one. Without any, New fails, unless
	// AllowUnauthenticated is set. Its hooks are used by the server.
	Auth auth.Config
	// AllowUnauthenticated serves everybody who can reach the listener. Only for tests and machines that
	// nobody else uses.
	AllowUnauthenticated bool
	// TLS is used if set; otherwise the server speaks plain text (h2c). That this is acceptable on the
	// listener's address is for the caller to check.
	TLS *tls.Config
	// RequestTimeout ends unary requests whose own deadline is later. It should be shorter than the
	// clients' (10 s), so that they see what went wrong. 0 means 8 s.
	RequestTimeout time.Duration
	// ShutdownTimeout bounds how long requests may take to end when the server stops. 0 means 25 s.
	ShutdownTimeout time.Duration
	// MaxMessageSize bounds a request in bytes, and with it a record: 4 KiB less. Clients accept 4 MiB,
	// so a larger one makes records that standard clients cannot receive. 0 means 4 MiB.
	MaxMessageSize int
	// TombstoneRetention is how long a client may be away and still resume its streams. 0 means 7 days.
	TombstoneRetention time.Duration
	// AuditRetention is how long the audit is kept: MinAuditRetention or more. 0 means 90 days.
	AuditRetention time.Duration
	// RingBytes bounds the recent changes kept in memory; 0 means 64 MiB.
	RingBytes int
	// MaintenanceInterval is how often what is due is looked for, which bounds how long a record outlives
	// its expiry; 0 means 10 s.
	MaintenanceInterval time.Duration
	// Limits bound what clients can make the server hold.
	Limits Limits
	// LockWarning is how long another session of the database may keep writers waiting before it is logged; 0 means 2 s.
	LockWarning time.Duration
	// ProjectionGrace is how long after a change of types or redaction a replica may still go by what was
	// before: what is written meanwhile is projected once more when it has passed. 0 means 30 s.
	ProjectionGrace time.Duration
	// PollInterval is how often changes are looked for when nobody announces any; 0 means 2 s.
	PollInterval time.Duration
	// Registerer takes the metrics; nil means none.
	Registerer prometheus.Registerer
	// Logger takes what operators should know; nil means slog.Default.
	Logger *slog.Logger
}

// Server is a replica. Make one with New.
type Server struct {
	config    Config
	logger    *slog.Logger
	outage    *outage
	db        *db.DB
	queries   *db.Queries // for what the replica does by itself
	lanes     *lanes      // for what clients ask for
	reads     *db.Queries
	changes   *db.Queries
	projector *projector
	writer    *writer
	feed      *changefeed.Feed
	services  *serviceFeed
	metrics   *metrics
	auth      *auth.Authenticator
	misfits   *misfits
	limiter   *limiter
	bounded   *db.Queries // for reads whose size a client decides
	blockers  *blockerWatch
	problems  *problemWatch
	writing   *writingWatch
	grpc      *grpc.Server
	health    *health.Server

	supervisor    *supervise.Supervisor // of all that runs in the background
	maintenance   *maintenance
	notifications *queueWatch

	stopping context.Context // ends when streams shall
	stop     context.CancelFunc
}

// New returns a server that does nothing until Run.
func New(config Config) (*Server, error) {
	config.RequestTimeout = cmp.Or(config.RequestTimeout, DefaultRequestTimeout)
	config.ShutdownTimeout = cmp.Or(config.ShutdownTimeout, DefaultShutdownTimeout)
	config.MaxMessageSize = cmp.Or(config.MaxMessageSize, DefaultMaxMessageSize)
	config.TombstoneRetention = cmp.Or(config.TombstoneRetention, DefaultTombstoneRetention)
	config.AuditRetention = cmp.Or(config.AuditRetention, DefaultAuditRetention)
	config.MaintenanceInterval = cmp.Or(config.MaintenanceInterval, DefaultMaintenanceInterval)
	config.LockWarning = cmp.Or(config.LockWarning, DefaultLockWarning)
	config.ProjectionGrace = cmp.Or(config.ProjectionGrace, DefaultProjectionGrace)
	config.Logger = cmp.Or(config.Logger, slog.Default())
	if config.DB == nil {
		return nil, errors.New("server: no database is configured")
	}
	if config.MaxMessageSize < 2*recordOverhead {
		return nil, fmt.Errorf("server: a maximum message size of %d bytes is too small, at least %d are needed", config.MaxMessageSize, 2*recordOverhead)
	}

	var database *outage
	database, config.Logger = newOutage(config.Logger)
	s := &Server{
		config:  config,
		outage:  database,
		logger:  config.Logger,
		db:      config.DB,
		queries: db.New(config.DB),
		writer:  newWriter(config.DB, config.RequestTimeout),
		metrics: newMetrics(),
		misfits: newMisfits(config.Logger),
		limiter: newLimiter(config.Limits, config.Logger),
		health:  health.NewServer(),
	}
	s.supervisor = &supervise.Supervisor{
		Logger: s.logger, OnPanic: func(task string) { s.metrics.panics.WithLabelValues(task).Inc() },
	}
	s.lanes = newLanes(s.db, s.limiter)
	s.lanes.warn(s.logger)
	s.reads, s.changes = db.New(s.lanes.short), db.New(s.lanes.changes)
	s.bounded = db.New(boundedReader{s.lanes.short, s.limiter})
	s.problems = newProblemWatch(s.queries, s.logger)
	s.blockers = &blockerWatch{queries: s.queries, logger: s.logger, after: config.LockWarning}
	s.writing = newWritingWatch(s.db, cmp.Or(config.PollInterval, changefeed.DefaultPollInterval), s.blockers.blocked, s.logger)
	s.writer.done = s.writing.note
	// Until the database has been read.
	for _, service := range []string{"", HealthReading, HealthWriting} {
		s.health.SetServingStatus(service, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	}
	s.stopping, s.stop = context.WithCancel(context.Background())
	s.services = newServiceFeed(s.queries, s.logger)
	s.feed = changefeed.New(changefeed.Config{
		Queries:      s.queries,
		Streams:      s.reads,
		Listen:       s.db.Listen,
		Settle:       s.db.Settle,
		Doubt:        s.db.Doubt,
		Encode:       s.encodeChange,
		Guard:        s.supervisor.Run,
		OnServices:   s.services.Wake,
		RingBytes:    config.RingBytes,
		PollInterval: config.PollInterval,
		Logger:       s.logger,
	})
	s.projector = &projector{queries: s.queries, feed: s.feed, logger: s.logger}
	s.maintenance = s.newMaintenance()
	s.notifications = &queueWatch{queries: s.queries, logger: s.logger, interval: config.MaintenanceInterval}
	if err := s.newGRPC(); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *Server) newGRPC() error {
	authenticator, err := s.authenticator()
	if err != nil {
		return err
	}
	s.auth = authenticator
	requests := grpcprometheus.NewServerMetrics(grpcprometheus.WithServerHandlingTimeHistogram())
	recovered := recovery.WithRecoveryHandlerContext(s.recovered)
	options := []grpc.ServerOption{
		grpc.ForceServerCodecV2(newCodec()),
		grpc.InTapHandle(s.guardTap(s.limiter.tap(authenticator))),
		grpc.ConnectionTimeout(handshakeTime),
		grpc.MaxHeaderListSize(maxHeaderBytes),
		grpc.MaxConcurrentStreams(s.limiter.maxConcurrentStreams()),
		grpc.MaxRecvMsgSize(s.config.MaxMessageSize),
		// Clients behind Envoy ping every few minutes, also without streams; none may be told that this
		// is too often. Our own pings find clients that have gone without a word.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 2 * time.Minute, Timeout: 20 * time.Second}),
		grpc.ChainUnaryInterceptor(
			requests.UnaryServerInterceptor(), s.unaryErrors, recovery.UnaryServerInterceptor(recovered), authenticator.Unary,
			s.limiter.unary, s.deadline, s.projector.prepare),
		grpc.ChainStreamInterceptor(
			requests.StreamServerInterceptor(), s.streamErrors, recovery.StreamServerInterceptor(recovered), authenticator.Stream,
			s.limiter.stream),
	}
	if s.config.TLS != nil {
		options = append(options, grpc.Creds(credentials.NewTLS(s.config.TLS)))
	}
	s.grpc = grpc.NewServer(options...)
	databroker.RegisterDataBrokerServiceServer(s.grpc, &brokerServer{Server: s})
	databroker.RegisterCheckpointServiceServer(s.grpc, &checkpointServer{Server: s})
	registry.RegisterRegistryServer(s.grpc, &registryServer{Server: s})
	grpc_health_v1.RegisterHealthServer(s.grpc, &healthServer{s.health})
	reflection.Register(s.grpc)
	requests.InitializeMetrics(s.grpc)
	s.limiter.methods = make(map[string]bool)
	for service, info := range s.grpc.GetServiceInfo() {
		for _, method := range info.Methods {
			s.limiter.methods["/"+service+"/"+method.Name] = true
		}
	}

	if s.config.Registerer == nil {
		return nil
	}
	for _, collector := range append(s.metrics.collectors(), s.limiter.reached, s.misfits, s.blockers, s.problems.found, requests, s.readings()) {
		if err := s.config.Registerer.Register(guardedCollector{collector, s.supervisor}); err != nil {
			return fmt.Errorf("server: register metrics: %w", err)
		}
	}
	return nil
}

func (s *Server) authenticator() (*auth.Authenticator, error) {
	if len(s.config.Auth.Secrets)+len(s.config.Auth.Files)+len(s.config.Auth.Keys) == 0 && s.config.AllowUnauthenticated {
		s.logger.Warn("requests are not authenticated")
		return auth.Disabled(), nil
	}
	config := s.config.Auth
	config.Log = s.logger
	config.OnAccept = func(caller auth.Caller, _ string) { s.metrics.accepted.WithLabelValues(caller.Key).Inc() }
	config.OnReject = func(reason auth.Reason) { s.metrics.rejected.WithLabelValues(string(reason)).Inc() }
	for _, reason := range auth.Reasons() {
		s.metrics.rejected.WithLabelValues(string(reason)) // a metric that is there before it is needed
	}
	authenticator, err := auth.New(config)
	if err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	s.logger.Info("requests are authenticated", "keys", authenticator.Fingerprints())
	return authenticator, nil
}

// ReplaceKeys makes the secrets and keys of a configuration those that are accepted, ends the streams of those that are not any
// more, and says so. If any of them cannot be used, it returns an error and changes nothing.
func (s *Server) ReplaceKeys(config auth.Config) error {
	if err := s.auth.Replace(config); err != nil {
		return err
	}
	s.logger.Info("requests are authenticated", "keys", s.auth.Fingerprints(), "streams_ended", s.auth.EndStreams())
	return nil
}

// endStreamsOfOldKeys keeps whoever had a key from going on with a stream after it was withdrawn, until ctx ends.
func (s *Server) endStreamsOfOldKeys(ctx context.Context) {
	tick := time.NewTicker(reload.Interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if ended := s.auth.EndStreams(); ended > 0 {
				s.logger.InfoContext(ctx, "streams are ended, because their key is no longer accepted", "streams", ended)
			}
		}
	}
}

// Run serves on a listener until ctx ends, then lets requests end, and returns when everything has
// stopped. It closes the listener. While the database is away it goes on: requests fail as Unavailable,
// streams wait.
func (s *Server) Run(ctx context.Context, listener net.Listener) error {
	// What requests depend on stops after them.
	background, stopBackground := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBackground()
	var group errgroup.Group
	group.Go(func() error { return s.feed.Run(background) })
	for task, run := range map[string]func(context.Context){
		"registered services": s.services.run, "message types": s.projector.follow, "periodic work": s.maintenance.run,
		"watch for blockers": s.blockers.run, "watch of notifications": s.notifications.run, "watch for problems": s.problems.run, "watch for writing": s.writing.run, "health": s.reportHealth, "keys": s.endStreamsOfOldKeys,
		"watch for outages": s.outage.watch(s.feed.Err),
	} {
		group.Go(func() error { s.supervisor.Run(background, task, run); return nil })
	}

	served := make(chan error, 1)
	go func() { served <- s.grpc.Serve(s.limiter.listener(listener)) }()
	s.logger.InfoContext(ctx, "serving", "address", listener.Addr().String())

	var err error
	select {
	case err = <-served:
		err = fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
		s.shutDown(ctx)
		if stopped := <-served; stopped != nil {
			err = fmt.Errorf("serve: %w", stopped)
		}
	}
	s.stop()
	stopBackground()
	return errors.Join(err, group.Wait())
}

// shutDown ends streams, waits for requests, and cuts off what takes too long.
func (s *Server) shutDown(ctx context.Context) {
	s.logger.InfoContext(ctx, "stopping")
	s.health.Shutdown()
	s.stop()
	cutOff := time.AfterFunc(s.config.ShutdownTimeout, func() {
		s.logger.WarnContext(ctx, "requests have not ended in time and are cut off", "timeout", s.config.ShutdownTimeout)
		s.grpc.Stop()
	})
	defer cutOff.Stop()
	s.grpc.GracefulStop()
}

// Ready says why the server cannot serve reads and streams at the moment; nil if it can.
func (s *Server) Ready() error {
	if s.stopping.Err() != nil {
		return errStopping
	}
	if err := s.feed.Err(); err != nil {
		return err
	}
	return s.writing.unfit()
}

// Writable says why nothing can be written, and so nothing revoked, by way of this server at the moment; nil if it can.
func (s *Server) Writable() error {
	if err := s.Ready(); err != nil {
		return err
	}
	return s.writing.err()
}

// reportHealth keeps the gRPC health status to the state of the feed and of writing until ctx ends.
func (s *Server) reportHealth(ctx context.Context) {
	status := func(problem error) grpc_health_v1.HealthCheckResponse_ServingStatus {
		if problem != nil {
			return grpc_health_v1.HealthCheckResponse_NOT_SERVING
		}
		return grpc_health_v1.HealthCheckResponse_SERVING
	}
	for {
		fed, writing := s.feed.Watch(), s.writing.watch()
		reading := status(s.Ready())
		s.health.SetServingStatus("", reading)
		s.health.SetServingStatus(HealthReading, reading)
		s.health.SetServingStatus(HealthWriting, status(s.Writable()))
		select {
		case <-fed:
		case <-writing:
		case <-ctx.Done():
			return
		}
	}
}

// healthServer is the standard health service. It tells reading from writing; about any other service it says what it says about
// reading, which is what load balancers should go by: a replica that cannot write serves streams.
type healthServer struct{ *health.Server }

func (h *healthServer) Check(ctx context.Context, request *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	return h.Server.Check(ctx, healthRequest(request))
}

func (h *healthServer) Watch(request *grpc_health_v1.HealthCheckRequest, stream grpc_health_v1.Health_WatchServer) error {
	return h.Server.Watch(healthRequest(request), stream)
}

func healthRequest(request *grpc_health_v1.HealthCheckRequest) *grpc_health_v1.HealthCheckRequest {
	switch service := request.GetService(); service {
	case HealthReading, HealthWriting:
		return &grpc_health_v1.HealthCheckRequest{Service: service}
	}
	return new(grpc_health_v1.HealthCheckRequest)
}

func (s *Server) unaryErrors(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	response, err := handler(ctx, request)
	if err != nil {
		s.writing.note(ctx, err)
		return nil, toStatus(ctx, s.logger, info.FullMethod, cmp.Or(endOfPublic(ctx), s.writing.explain(s.late(err))))
	}
	return response, nil
}

func (s *Server) streamErrors(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	err := handler(server, stream)
	if err != nil {
		err = cmp.Or(endOfPublic(stream.Context()), s.late(err))
	}
	return toStatus(stream.Context(), s.logger, info.FullMethod, err)
}

// late says why a request has run out of time, if that is because the database does not answer anybody.
func (s *Server) late(err error) error {
	if errors.Is(err, context.DeadlineExceeded) && s.config.DB.Silent() {
		return errors.Join(errSilent, err)
	}
	return err
}

// deadline bounds a unary request, so that its client hears of a failure before it gives up.
func (s *Server) deadline(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, s.config.RequestTimeout)
	defer cancel()
	return handler(ctx, request)
}

// guardTap makes a panic of a tap handle an error: it runs on the goroutine of a connection, where nobody recovers from one.
func (s *Server) guardTap(handle tap.ServerInHandle) tap.ServerInHandle {
	return func(ctx context.Context, info *tap.Info) (tapped context.Context, err error) {
		defer func() {
			if value := recover(); value != nil {
				tapped, err = nil, toStatus(ctx, s.logger, info.FullMethodName, s.recovered(ctx, value))
			}
		}()
		return handle(ctx, info)
	}
}

// recovered turns a panic into an error: one request must not end the others.
func (s *Server) recovered(ctx context.Context, panicked any) error {
	s.logger.ErrorContext(ctx, "a request panicked", "panic", panicked, "stack", string(debug.Stack()))
	return errPanicked
}

// Services returns the services that the server offers, and their methods.
func (s *Server) Services() map[string]grpc.ServiceInfo { return s.grpc.GetServiceInfo() }

// FeedStats returns figures of the change feed.
func (s *Server) FeedStats() changefeed.Stats { return s.feed.Stats() }
