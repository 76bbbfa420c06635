package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/user"
)

// The types of the records. The last has a capacity, so that the database deletes records of it by itself;
// nobody reads those one by one.
const (
	typeA      = "chaos.A"
	typeB      = "chaos.B"
	typeCapped = "chaos.Capped"
	capacity   = 10
)

const (
	slots = 5 // records of typeA and of typeB at one time
	// keyAge is how long clients use the same keys: histories of one key stay short enough to be checked.
	keyAge = 8 * time.Second
	// opsPerSecond bounds the operations of a run.
	opsPerSecond = 1000
)

// workload is the clients that write and read. What it does is drawn from the seed; what comes of it is not.
type workload struct {
	recorder *recorder
	cluster  *Cluster
	seed     uint64
	timeout  time.Duration // of an operation
	most     int           // operations in all

	requests atomic.Int64 // numbers requests for several records
	clients  atomic.Int64 // numbers clients
	group    sync.WaitGroup
	stop     context.CancelFunc
}

// start starts the clients.
func (w *workload) start(t testing.TB, writers, sqlWriters, lessees int) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w.stop = cancel
	for range writers {
		c := w.newClient(t)
		w.group.Go(func() { c.loop(ctx, c.record) })
	}
	for range lessees {
		c := w.newClient(t)
		w.group.Go(func() { c.loop(ctx, c.lease) })
	}
	for range sqlWriters {
		c := w.newClient(t)
		s := &sqlClient{client: c, connString: w.cluster.postgres.SocketConnString()}
		w.group.Go(func() {
			defer s.disconnect()
			c.loop(ctx, s.record)
		})
	}
}

// end stops the clients, and returns when none is at work any more.
func (w *workload) end() {
	w.stop()
	w.group.Wait()
}

// client is one client, which does one thing after the other.
type client struct {
	*workload
	number  int
	random  *rand.Rand
	brokers []databroker.DataBrokerServiceClient
	writes  int
}

func (w *workload) newClient(t testing.TB) *client {
	number := int(w.clients.Add(1))
	c := &client{workload: w, number: number, random: rand.New(rand.NewPCG(w.seed, uint64(number)))}
	for _, r := range w.cluster.replicas {
		c.brokers = append(c.brokers, r.broker(t))
	}
	return c
}

// loop does something again and again, with a pause after each.
func (c *client) loop(ctx context.Context, do func(context.Context)) {
	for ctx.Err() == nil && c.recorder.count() < c.most {
		do(ctx)
		pause(ctx, time.Duration(c.random.ExpFloat64()*float64(10*time.Millisecond)))
	}
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// context bounds an operation. Operations are not cut short by the end of the run: what they have done
// would remain unknown.
func (c *client) context(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), c.timeout)
}

func (c *client) pick() (replica int, broker databroker.DataBrokerServiceClient) {
	replica = c.random.IntN(len(c.brokers))
	return replica, c.brokers[replica]
}

// key draws one of the present keys.
func (c *client) key() Key {
	recordType := typeA
	if c.random.IntN(2) == 0 {
		recordType = typeB
	}
	return c.keyOf(recordType)
}

func (c *client) keyOf(recordType string) Key {
	return Key{recordType, fmt.Sprintf("%d-%d", c.random.IntN(slots), c.recorder.now()/keyAge)}
}

// keys draws two keys.
func (c *client) keys() [2]Key { return [2]Key{c.keyOf(typeA), c.keyOf(typeB)} }

// newWrite returns a name for a write.
func (c *client) newWrite() string {
	c.writes++
	return fmt.Sprintf("c%d-%d", c.number, c.writes)
}

// record does something to records.
func (c *client) record(ctx context.Context) {
	ctx, cancel := c.context(ctx)
	defer cancel()
	switch n := c.random.IntN(100); {
	case n < 25:
		c.put(ctx, c.key())
	case n < 33:
		keys := c.keys()
		c.put(ctx, keys[:]...)
	case n < 48:
		c.patch(ctx, c.key())
	case n < 57:
		c.delete(ctx, c.key())
	case n < 65:
		c.put(ctx, Key{typeCapped, fmt.Sprint(c.random.IntN(3 * capacity))})
	case n < 83:
		replica, broker := c.pick()
		c.recorder.add(c.get(ctx, replica, broker, c.key(), 0))
	default:
		c.query(ctx, c.key())
	}
}

// begin notes the call of an operation.
func (c *client) begin(kind string, replica int, key Key) Op {
	return Op{Client: c.number, Kind: kind, Key: key, Replica: replica, Call: c.recorder.now()}
}

func (c *client) finish(op *Op, err error) { op.finish(c.recorder.now(), err) }

// finish notes the return of an operation; the outcome is ok, unless there is an error.
func (op *Op) finish(now time.Duration, err error) {
	op.Return = now
	if err == nil {
		op.Outcome = ok
		return
	}
	op.Code = status.Code(err).String()
	switch status.Code(err) {
	case codes.InvalidArgument, codes.Unauthenticated, codes.PermissionDenied, codes.ResourceExhausted, codes.Unimplemented:
		op.Outcome = failed
	default:
		op.Outcome = unknown
	}
}

// put writes records that say the name of the write.
func (c *client) put(ctx context.Context, keys ...Key) {
	replica, broker := c.pick()
	write := c.newWrite()
	request := new(databroker.PutRequest)
	ops := make([]Op, len(keys))
	for i, key := range keys {
		ops[i] = c.begin(opPut, replica, key)
		ops[i].Write = write
		request.Records = append(request.Records, &databroker.Record{Type: key.Type, Id: key.ID, Data: payload(key.ID, Content{write, write})})
	}
	if len(keys) > 1 {
		number := int(c.requests.Add(1))
		for i := range ops {
			ops[i].Request = number
		}
	}
	response, err := broker.Put(ctx, request)
	for i := range ops {
		c.finish(&ops[i], err)
		if err == nil {
			ops[i].Version = response.Records[i].Version
		}
	}
	c.recorder.add(ops...)
}

// patch writes the second field.
func (c *client) patch(ctx context.Context, key Key) {
	replica, broker := c.pick()
	op := c.begin(opPatch, replica, key)
	op.Write = c.newWrite()
	response, err := broker.Patch(ctx, &databroker.PatchRequest{
		Records:   []*databroker.Record{{Type: key.Type, Id: key.ID, Data: payload("", Content{"", op.Write})}},
		FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"email"}},
	})
	c.finish(&op, err)
	if err == nil {
		if len(response.Records) == 0 {
			op.Outcome = absent
		} else {
			op.Version, op.Content = response.Records[0].Version, contentOf(response.Records[0].Data)
		}
	}
	c.recorder.add(op)
}

func (c *client) delete(ctx context.Context, key Key) {
	replica, broker := c.pick()
	op := c.begin(opDelete, replica, key)
	response, err := broker.Put(ctx, &databroker.PutRequest{
		Records: []*databroker.Record{{Type: key.Type, Id: key.ID, DeletedAt: timestamppb.Now()}},
	})
	c.finish(&op, err)
	if err == nil {
		if op.Version = response.Records[0].Version; op.Version == 0 {
			op.Outcome = absent
		}
	}
	c.recorder.add(op)
}

// get reads a record that is at least of a version.
func (c *client) get(ctx context.Context, replica int, broker databroker.DataBrokerServiceClient, key Key, atLeast uint64) Op {
	op := c.begin(opGet, replica, key)
	op.AtLeast = atLeast
	response, err := broker.Get(ctx, &databroker.GetRequest{Type: key.Type, Id: key.ID})
	c.finish(&op, err)
	switch {
	case err == nil:
		op.Version, op.Content = response.Record.Version, contentOf(response.Record.Data)
	case status.Code(err) == codes.NotFound:
		op.Outcome, op.Code = absent, ""
	}
	return op
}

// query reads a record in the way of an authorize service.
func (c *client) query(ctx context.Context, key Key) {
	replica, broker := c.pick()
	op := c.begin(opQuery, replica, key)
	filter, err := structpb.NewStruct(map[string]any{"id": key.ID})
	if err != nil {
		panic(err) // a text can always be one
	}
	response, err := broker.Query(ctx, &databroker.QueryRequest{Type: key.Type, Filter: filter, Limit: 1})
	c.finish(&op, err)
	if err == nil {
		if len(response.Records) == 0 {
			op.Outcome = absent
		} else {
			op.Version, op.Content = response.Records[0].Version, contentOf(response.Records[0].Data)
		}
	}
	c.recorder.add(op)
}

// payload is a user of whom two fields matter.
func payload(id string, content Content) *anypb.Any {
	data, err := anypb.New(&user.User{Id: id, Name: content.First, Email: content.Second})
	if err != nil {
		panic(err) // a message of ours can always be one
	}
	return data
}

// errContent is in place of a content that is not one of ours.
var errContent = errors.New("not a payload that was written")

func contentOf(data *anypb.Any) Content {
	message := new(user.User)
	if data == nil || data.UnmarshalTo(message) != nil {
		return Content{errContent.Error(), errContent.Error()}
	}
	return Content{message.Name, message.Email}
}
