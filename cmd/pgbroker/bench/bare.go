package bench

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/proto/databroker"
	"pgbroker/server/auth"
)

// bareName is the target of results that were measured on a bare server.
const bareName = "bare gRPC"

// A bareServer is grpc-go with the interface of a databroker and nothing behind it: what every broker in Go has to pay before
// it does anything. It answers with messages of the same size as those of a broker, and sends every record that is put to all
// streams, serialized once. It checks no token and keeps no record.
type bareServer struct {
	databroker.UnimplementedDataBrokerServiceServer
	payload *anypb.Any                                    // of records that are read
	latest  encoded                                       // a SyncLatestResponse with such a record
	fault   func(stream int64, message encoded) []encoded // nil but in tests of what checks streams

	streams atomic.Int64
	opened  atomic.Int64
	version atomic.Uint64
	mu      sync.Mutex // serializes changes of view
	view    atomic.Pointer[bareView]
}

// A bareView is the end of the log of what was put, and immutable.
type bareView struct {
	first    uint64 // place in the log of messages[0]
	messages []encoded
	replaced chan struct{} // closed when there is a newer one
}

// maxBareLog bounds the log; a stream that falls behind it ends.
const maxBareLog = 1 << 15

// newBareServer returns a bare server with payloads as the load has them.
func newBareServer(c *corpus) *bareServer {
	record := c.collection("bare").record(0, 0)
	record.Version, record.ModifiedAt = 1<<20, timestamppb.Now()
	latest, err := proto.Marshal(&databroker.SyncLatestResponse{Response: &databroker.SyncLatestResponse_Record{Record: record}})
	if err != nil {
		panic(err) // it is a valid message
	}
	b := &bareServer{payload: record.GetData(), latest: latest}
	b.version.Store(1 << 20) // versions as long as those of a broker
	b.view.Store(&bareView{replaced: make(chan struct{})})
	return b
}

func (b *bareServer) Put(_ context.Context, request *databroker.PutRequest) (*databroker.PutResponse, error) {
	response := &databroker.PutResponse{ServerVersion: 1, Records: request.GetRecords()}
	at := timestamppb.Now()
	if b.streams.Load() == 0 {
		for _, record := range request.GetRecords() {
			record.Version, record.ModifiedAt = b.version.Add(1), at
		}
		return response, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.view.Load()
	messages := old.messages
	for _, record := range request.GetRecords() {
		record.Version, record.ModifiedAt = b.version.Add(1), at
		message, err := proto.Marshal(&databroker.SyncResponse{Response: &databroker.SyncResponse_Record{Record: record}})
		if err != nil {
			return nil, err
		}
		messages = append(messages, message)
	}
	next := &bareView{first: old.first, messages: messages, replaced: make(chan struct{})}
	if surplus := len(messages) - maxBareLog; surplus > 0 {
		next.first, next.messages = next.first+uint64(surplus), messages[surplus:]
	}
	b.view.Store(next)
	close(old.replaced)
	return response, nil
}

func (b *bareServer) Patch(_ context.Context, request *databroker.PatchRequest) (*databroker.PatchResponse, error) {
	for _, record := range request.GetRecords() {
		record.Version, record.ModifiedAt, record.Data = b.version.Add(1), timestamppb.Now(), b.payload
	}
	return &databroker.PatchResponse{ServerVersion: 1, Records: request.GetRecords()}, nil
}

func (b *bareServer) record(recordType, id string) *databroker.Record {
	return &databroker.Record{Version: 1 << 20, Type: recordType, Id: id, Data: b.payload, ModifiedAt: timestamppb.Now()}
}

func (b *bareServer) Get(_ context.Context, request *databroker.GetRequest) (*databroker.GetResponse, error) {
	return &databroker.GetResponse{Record: b.record(request.GetType(), request.GetId())}, nil
}

func (b *bareServer) Query(_ context.Context, request *databroker.QueryRequest) (*databroker.QueryResponse, error) {
	n := 1 // as the load expects: one record by id, those of a user by field, a page by text
	switch {
	case request.GetQuery() != "":
		n = textLimit
	case request.GetFilter().GetFields()[userField] != nil:
		n = sessionsPerUser
	}
	response := &databroker.QueryResponse{TotalCount: int64(n), ServerVersion: 1, RecordVersion: b.version.Load()}
	for range n {
		response.Records = append(response.Records, b.record(request.GetType(), "00000000-0000-4000-8000-000000000000"))
	}
	return response, nil
}

func (b *bareServer) ServerInfo(context.Context, *emptypb.Empty) (*databroker.ServerInfoResponse, error) {
	return &databroker.ServerInfoResponse{ServerVersion: 1, LatestRecordVersion: b.version.Load()}, nil
}

func (b *bareServer) SyncLatest(_ *databroker.SyncLatestRequest, stream grpc.ServerStreamingServer[databroker.SyncLatestResponse]) error {
	headers, _ := metadata.FromIncomingContext(stream.Context())
	n := 0
	if values := headers.Get(bareRecords); len(values) > 0 {
		var err error
		if n, err = strconv.Atoi(values[0]); err != nil {
			return status.Error(codes.InvalidArgument, bareRecords+": want a number")
		}
	}
	for range n {
		if err := stream.SendMsg(b.latest); err != nil {
			return err
		}
	}
	return stream.Send(&databroker.SyncLatestResponse{Response: &databroker.SyncLatestResponse_Versions{
		Versions: &databroker.Versions{ServerVersion: 1, LatestRecordVersion: b.version.Load()},
	}})
}

func (b *bareServer) Sync(request *databroker.SyncRequest, stream grpc.ServerStreamingServer[databroker.SyncResponse]) error {
	number := b.opened.Add(1) - 1
	b.mu.Lock()
	b.streams.Add(1)
	v := b.view.Load()
	b.mu.Unlock()
	defer b.streams.Add(-1)
	// Nothing is logged while there are no streams, so the client has to know that there is one.
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	// The log may hold what a stream has seen already that comes back.
	next := v.first + uint64(len(v.messages))
	if i := slices.IndexFunc(v.messages, func(m encoded) bool { return messageVersion(m) > request.GetRecordVersion() }); i >= 0 {
		next = v.first + uint64(i)
	}
	for {
		if next < v.first {
			return status.Error(codes.ResourceExhausted, "the stream is too slow")
		}
		for ; next < v.first+uint64(len(v.messages)); next++ {
			message := v.messages[next-v.first]
			if b.fault != nil {
				if err := b.sendFaulty(stream, number, message); err != nil {
					return err
				}
				continue
			}
			if err := stream.SendMsg(message); err != nil {
				return err
			}
		}
		select {
		case <-v.replaced:
			v = b.view.Load()
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// sendFaulty sends what a test wants instead of a message. An empty one cuts the stream.
func (b *bareServer) sendFaulty(stream grpc.ServerStream, number int64, message encoded) error {
	for _, m := range b.fault(number, message) {
		if m == nil {
			return status.Error(codes.Unavailable, "cut")
		}
		if err := stream.SendMsg(m); err != nil {
			return err
		}
	}
	return nil
}

// messageVersion returns the record version of a SyncResponse.
func messageVersion(message encoded) (version uint64) {
	_ = fields(message, func(number protowire.Number, _ uint64, record []byte) error { // it was made here
		if number != fieldRecord {
			return nil
		}
		return fields(record, func(number protowire.Number, n uint64, _ []byte) error {
			if number == fieldVersion {
				version = n
			}
			return nil
		})
	})
	return version
}

// serve serves until ctx ends.
func (b *bareServer) serve(ctx context.Context, listener net.Listener) error {
	s := grpc.NewServer(grpc.ForceServerCodecV2(newCodec()))
	databroker.RegisterDataBrokerServiceServer(s, b)
	stop := context.AfterFunc(ctx, s.Stop)
	defer stop()
	return s.Serve(listener)
}

// bareReady starts the line in which a bare server says where it listens.
const bareReady = "bench-bare "

// runBare is the hidden command in which a bare server runs: it says where it listens and ends with its input, so that it
// never outlives whoever started it.
func runBare(ctx context.Context, seed uint64, in io.Reader, out io.Writer) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, in) // until it is closed
		cancel()
	}()
	if _, err := fmt.Fprintln(out, bareReady+listener.Addr().String()); err != nil {
		return err
	}
	return newBareServer(newCorpus(seed, time.Now())).serve(ctx, listener)
}

// startBare starts a bare server in a process of its own, so that it shares the processors with the generator of the load as
// a broker does. Without a program it runs in this process.
func startBare(ctx context.Context, program string, c *corpus) (_ *broker, stop func(), err error) {
	if program == "" {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, nil, err
		}
		ctx, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			_ = newBareServer(c).serve(ctx, listener) // it ends with ctx
			close(done)
		}()
		b := newBare(listener.Addr().String(), &processes{})
		return b, func() { b.close(); cancel(); <-done }, nil
	}
	cmd := exec.Command(program, "bench", "bare", "--seed", strconv.FormatUint(c.seed, 10))
	cmd.Env = childEnvironment()
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	said := new(tail)
	cmd.Stderr = said
	cmd.SysProcAttr = ownGroup()
	if err := cmd.Start(); err != nil {
		return nil, nil, fmt.Errorf("start the bare server: %w", err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	address, ok := strings.CutPrefix(strings.TrimSpace(line), bareReady)
	if err != nil || !ok {
		_ = in.Close()
		return nil, nil, fmt.Errorf("start the bare server: %w\n%s", errors.Join(err, cmd.Wait()), said)
	}
	b := newBare(address, &processes{server: cmd.Process.Pid})
	return b, func() {
		b.close()
		_ = in.Close()
		kill := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		_ = cmd.Wait() // how it ended does not matter any more
	}, nil
}

// newBare returns the bare server at an address. Requests carry a token as those to a broker do, which nobody looks at.
func newBare(address string, p *processes) *broker {
	return &broker{
		name: bareName, bare: true, processes: p,
		connect:     func() (*grpc.ClientConn, error) { return dial(address, auth.NewKey()) },
		explain:     func(err error) error { return err },
		databaseURL: func() (string, error) { return "", errors.New("the bare server has no database") },
	}
}

// dial connects to a server on this machine that speaks plaintext.
func dial(address string, key auth.Key) (*grpc.ClientConn, error) {
	return grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithPerRPCCredentials(auth.NewCredentials(key)), grpc.WithUnaryInterceptor(bounded),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
}

// maxMessage is the largest message that is sent or received.
const maxMessage = 1 << 30

// bounded bounds a unary request as the clients of a broker do.
func bounded(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, call grpc.UnaryInvoker, options ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return call(ctx, method, request, reply, conn, options...)
}
