package server

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/proto"

	"pgbroker/server/auth"
)

// Limits bound what clients can make a replica hold. They are far above what healthy clients need: what they are for is
// that one client that has gone wrong is told so, and others go on. 0 means the default.
type Limits struct {
	// Connections of clients. For a further one the oldest is closed on which nobody has shown a valid token; if there is
	// none, the further one is. Default: 5,000.
	Connections int
	// Streams that are open at the same time: Sync, SyncLatest and the registry's Watch. Default: 20,000.
	Streams int
	// StreamsPerConnection are those of one connection. Default: 1,000.
	StreamsPerConnection int
	// Requests that are under way at the same time, without streams. Default: 5,000.
	Requests int
	// RequestBytes is the size of all requests that are under way. Default: 256 MiB.
	RequestBytes int
	// Scans are the queries that read all records of a type at the same time: those with a text, or with a filter that no
	// index serves. Eight times as many may wait. No more run than a third of the pool has connections for. Default: 2.
	Scans int
	// ResponseSize is how many bytes of payload one answer may have. Default: 64 MiB.
	ResponseSize int
}

// Defaults of Limits.
const (
	DefaultMaxConnections          = 5000
	DefaultMaxStreams              = 20_000
	DefaultMaxStreamsPerConnection = 1000
	DefaultMaxRequests             = 5000
	DefaultMaxRequestBytes         = 256 << 20
	DefaultMaxResponseSize         = 64 << 20
	DefaultMaxScans                = 2
)

func (l *Limits) setDefaults() {
	l.Connections = cmp.Or(l.Connections, DefaultMaxConnections)
	l.Streams = cmp.Or(l.Streams, DefaultMaxStreams)
	l.StreamsPerConnection = cmp.Or(l.StreamsPerConnection, DefaultMaxStreamsPerConnection)
	l.Requests = cmp.Or(l.Requests, DefaultMaxRequests)
	l.RequestBytes = cmp.Or(l.RequestBytes, DefaultMaxRequestBytes)
	l.Scans = cmp.Or(l.Scans, DefaultMaxScans)
	l.ResponseSize = cmp.Or(l.ResponseSize, DefaultMaxResponseSize)
}

const (
	// maxPublicRequests bounds the calls that need no token, and, apart from them, the streams, so that nobody who has none
	// can use up what is there for those who do.
	maxPublicRequests = 256
	// maxHeaderBytes bounds the header of a request, which is read before anybody is asked who they are.
	maxHeaderBytes = 64 << 10
	// handshakeTime is how long a client may take to begin.
	handshakeTime = 20 * time.Second
	// limitLogInterval is how often it is logged that a limit has been reached.
	limitLogInterval = time.Minute
)

// limitError is a request that would have been one too many.
type limitError struct {
	what    string
	limit   int
	unit    string
	setting string // of the command line; "" where the limit is fixed
}

func (e *limitError) Error() string {
	text := fmt.Sprintf("%s: at most %d%s", e.what, e.limit, e.unit)
	if e.setting != "" {
		text += " (" + e.setting + ")"
	}
	return text
}

// The limits by the names of their settings, which are also the labels of the metric.
const (
	limitConnections          = "max_connections"
	limitStreams              = "max_streams"
	limitStreamsPerConnection = "max_streams_per_connection"
	limitRequests             = "max_requests"
	limitRequestBytes         = "max_request_bytes"
	limitResponseSize         = "max_response_size"
	limitScans                = "max_scans"
	limitPublicRequests       = "public_requests"
	limitStrangers            = "strangers"
)

// limiter enforces Limits.
type limiter struct {
	limits  Limits
	logger  *slog.Logger
	reached *prometheus.CounterVec
	methods map[string]bool          // all that the server has, by full name; set before it serves
	logged  map[string]*atomic.Int64 // Unix time of the latest log line by limit

	conns         connections
	publicCalls   *publicRequests
	publicStreams *publicRequests
	requests      atomic.Int64
	requestBytes  atomic.Int64

	mu        sync.Mutex // protects what follows
	streams   int
	streamsOf map[net.Addr]int // by the connection's own address value; without entries of 0
}

func newLimiter(limits Limits, logger *slog.Logger) *limiter {
	limits.setDefaults()
	l := &limiter{
		limits: limits, logger: logger, streamsOf: make(map[net.Addr]int), logged: make(map[string]*atomic.Int64),
		reached: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pgbroker_limit_reached_total", Help: "Connections and requests that were refused, by the limit that they would have exceeded.",
		}, []string{"limit"}),
	}
	l.conns.all = make(map[net.Addr]*limitedConn)
	l.publicCalls = &publicRequests{what: "too many requests without a token, such as health checks", time: publicCallTime, limiter: l}
	l.publicStreams = &publicRequests{what: "too many streams without a token, such as watches of health", time: publicStreamTime, limiter: l}
	for _, limit := range []string{
		limitConnections, limitStreams, limitStreamsPerConnection, limitRequests, limitRequestBytes, limitResponseSize, limitScans, limitPublicRequests, limitStrangers,
	} {
		l.reached.WithLabelValues(limit) // a metric that is there before it is needed
		l.logged[limit] = new(atomic.Int64)
	}
	return l
}

// refuse counts a refusal, and logs it now and then.
func (l *limiter) refuse(ctx context.Context, name string, err *limitError) error {
	l.reached.WithLabelValues(name).Inc()
	logged, now := l.logged[name], time.Now().Unix()
	if last := logged.Load(); now-last >= int64(limitLogInterval/time.Second) && logged.CompareAndSwap(last, now) {
		client := ""
		if p, ok := peer.FromContext(ctx); ok {
			client = p.Addr.String()
		}
		l.logger.WarnContext(ctx, "a limit is reached, and what exceeds it refused", "limit", name, "reason", err.Error(), "client", client, "key", auth.CallerFrom(ctx).Key)
	}
	return err
}

// tap runs for each request before anything of it is read but its header, on the goroutine of its connection. Requests
// without a valid token end here, and cost neither goroutine nor buffer.
func (l *limiter) tap(authenticator *auth.Authenticator) tap.ServerInHandle {
	return func(ctx context.Context, info *tap.Info) (context.Context, error) {
		conn := l.conns.of(ctx)
		if !auth.Public(info.FullMethodName) {
			if !l.methods[info.FullMethodName] {
				if !authenticator.Recognizes(ctx) {
					if err := conn.strange(); err != nil {
						return nil, toStatus(ctx, l.logger, info.FullMethodName, err)
					}
				}
				return ctx, nil // there is no such method, which is all that grpc will say
			}
			admitted, err := authenticator.Tap(ctx, info.FullMethodName)
			if showsToken(err) {
				l.conns.know(conn)
			} else if tooMany := conn.strange(); tooMany != nil {
				return nil, toStatus(ctx, l.logger, info.FullMethodName, tooMany)
			}
			return admitted, err
		}
		if authenticator.Recognizes(ctx) {
			l.conns.know(conn)
			return ctx, nil
		}
		if err := conn.strange(); err != nil {
			return nil, toStatus(ctx, l.logger, info.FullMethodName, err)
		}
		return l.publicKind(info.FullMethodName).enter(ctx), nil
	}
}

// unary bounds the requests that are under way, and their size.
func (l *limiter) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if auth.Public(info.FullMethod) {
		return handler(ctx, request)
	}
	defer l.requests.Add(-1)
	if l.requests.Add(1) > int64(l.limits.Requests) {
		return nil, l.refuse(ctx, limitRequests, &limitError{"too many requests at the same time", l.limits.Requests, "", limitRequests})
	}
	if message, ok := request.(proto.Message); ok {
		size := int64(proto.Size(message))
		defer l.requestBytes.Add(-size)
		// One request alone is always taken: how large it may be is another limit.
		if all := l.requestBytes.Add(size); all > int64(l.limits.RequestBytes) && all > size {
			return nil, l.refuse(ctx, limitRequestBytes,
				&limitError{"too many bytes of requests at the same time", l.limits.RequestBytes, " bytes", limitRequestBytes})
		}
	}
	return handler(ctx, request)
}

// stream bounds the streams that are open.
func (l *limiter) stream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if auth.Public(info.FullMethod) {
		return handler(server, stream)
	}
	var conn net.Addr
	if p, ok := peer.FromContext(stream.Context()); ok {
		conn = p.Addr
	}
	if err := l.openStream(stream.Context(), conn); err != nil {
		return err
	}
	defer l.closeStream(conn)
	return handler(server, stream)
}

func (l *limiter) openStream(ctx context.Context, conn net.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.streams >= l.limits.Streams:
		return l.refuse(ctx, limitStreams, &limitError{"too many open streams", l.limits.Streams, "", limitStreams})
	case l.streamsOf[conn] >= l.limits.StreamsPerConnection:
		return l.refuse(ctx, limitStreamsPerConnection,
			&limitError{"too many open streams on this connection", l.limits.StreamsPerConnection, "", limitStreamsPerConnection})
	}
	l.streams++
	l.streamsOf[conn]++
	return nil
}

func (l *limiter) closeStream(conn net.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.streams--
	if l.streamsOf[conn]--; l.streamsOf[conn] == 0 {
		delete(l.streamsOf, conn)
	}
}

// maxConcurrentStreams is what HTTP/2 tells clients about how many requests and streams a connection may have. Clients
// wait without a word when they reach it, so it leaves room for the limits that say something.
func (l *limiter) maxConcurrentStreams() uint32 {
	return uint32(min(2*int64(l.limits.StreamsPerConnection)+100, 1<<31))
}

// listener bounds the connections of a listener.
func (l *limiter) listener(inner net.Listener) net.Listener { return &limitedListener{inner, l} }

type limitedListener struct {
	net.Listener
	limiter *limiter
}

// Accept implements net.Listener.
func (l *limitedListener) Accept() (net.Conn, error) {
	for {
		inner, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		limit := l.limiter.limits.Connections
		conn := &limitedConn{Conn: inner, addr: inner.RemoteAddr(), limiter: l.limiter}
		evicted, ok := l.limiter.conns.add(conn, limit)
		if ok && evicted == nil {
			return conn, nil
		}
		ctx := peer.NewContext(context.Background(), &peer.Peer{Addr: conn.addr})
		_ = l.limiter.refuse(ctx, limitConnections, // it can be told only by its end: it speaks no gRPC yet, or shows no token
			&limitError{"too many connections", limit, "", limitConnections})
		if ok {
			_ = evicted.Close()
			return conn, nil
		}
		_ = inner.Close()
	}
}
