// Package conformance checks pgbroker against the wire contract, over real gRPC and on a real Postgres.
// docs/conformance.md says which test stands for which part of it.
//
// TestS<n>_… is statement n of the contract's checklist (section 8), TestD<n>_… is defect n of the servers
// that came before (section 7): it fails on a server that has the defect.
package conformance_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/server/servertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what a sound server does at once.
const patience = 40 * time.Second

// Record types of the contract, and one of our own.
const (
	sessionType         = "type.googleapis.com/session.Session"
	bindingType         = "type.googleapis.com/session.SessionBinding"
	bindingRequestType  = "type.googleapis.com/session.SessionBindingRequest"
	identityBindingType = "type.googleapis.com/session.IdentityBinding"
	userType            = "type.googleapis.com/user.User"
	lastErrorType       = "type.googleapis.com/pomerium.events.LastError"
	directoryUserType   = "pomerium.io/DirectoryUser"
	geoIPType           = "pomerium.io/GeoIP"

	thingType = "example.com/Thing"
)

type client = databroker.DataBrokerServiceClient

// start starts a broker of one replica.
func start(t *testing.T) *servertest.Broker {
	t.Helper()
	return startReplicas(t, 1)
}

// startReplicas starts a broker of n replicas.
func startReplicas(t *testing.T, n int) *servertest.Broker {
	t.Helper()
	return servertest.New(t, servertest.Options{Replicas: n})
}

// startOn starts a broker of n replicas on a database that the test has prepared.
func startOn(t *testing.T, database *dbtest.Database, n int) *servertest.Broker {
	t.Helper()
	b := &servertest.Broker{Database: database}
	for range n {
		b.Replicas = append(b.Replicas, startMore(t, b))
	}
	b.Replica = b.Replicas[0]
	return b
}

// setting changes a setting of Postgres for all connections that are opened from now on.
func setting(t *testing.T, database *dbtest.Database, name, value string) {
	t.Helper()
	database.AdminExec(t, "ALTER DATABASE "+database.Name+" SET "+name+" = "+value)
	database.Pool.Reset()
}

// startMore starts a further replica of a broker.
func startMore(t *testing.T, b *servertest.Broker) *servertest.Replica {
	t.Helper()
	return servertest.Start(t, b.Database.ServerConnString, servertest.Options{})
}

// queriesOf returns the server's own queries on a database, for the periodic work that a test cannot wait
// for.
func queriesOf(database *dbtest.Database) *db.Queries { return db.New(database.Pool) }

// testContext ends with the test, or before it if the test takes too long.
func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// must returns a function that passes a call's result on, and fails the test if the call has failed:
// must[…](t)(c.Get(…)).
func must[T any](t *testing.T) func(T, error) T {
	t.Helper()
	return func(result T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return result
	}
}

// ---------------------------------------------------------------------------------------------
// Records
// ---------------------------------------------------------------------------------------------

func newAny(message proto.Message) *anypb.Any {
	data, err := anypb.New(message)
	if err != nil {
		panic(err)
	}
	return data
}

func newRecord(recordType, id string, message proto.Message) *databroker.Record {
	return &databroker.Record{Type: recordType, Id: id, Data: newAny(message)}
}

// thing returns a record whose payload is a text.
func thing(id, text string) *databroker.Record {
	return newRecord(thingType, id, wrapperspb.String(text))
}

// object returns a record whose payload is a Struct.
func object(recordType, id string, fields map[string]any) *databroker.Record {
	return newRecord(recordType, id, newStruct(fields))
}

func newStruct(fields map[string]any) *structpb.Struct {
	s, err := structpb.NewStruct(fields)
	if err != nil {
		panic(err)
	}
	return s
}

// deletion returns a record that deletes.
func deletion(recordType, id string) *databroker.Record {
	return &databroker.Record{Type: recordType, Id: id, DeletedAt: timestamppb.Now()}
}

// textOf returns the text of a thing's payload.
func textOf(t *testing.T, record *databroker.Record) string {
	t.Helper()
	return payload[*wrapperspb.StringValue](t, record).Value
}

// payload decodes a record's payload.
func payload[M proto.Message](t *testing.T, record *databroker.Record) M {
	t.Helper()
	message, err := record.GetData().UnmarshalNew()
	if err != nil {
		t.Fatalf("payload of %s: %v", record.GetId(), err)
	}
	typed, ok := message.(M)
	if !ok {
		t.Fatalf("payload of %s is a %T", record.GetId(), message)
	}
	return typed
}

func idsOf(records []*databroker.Record) []string {
	ids := make([]string, len(records))
	for i, record := range records {
		ids[i] = record.Id
	}
	return ids
}

// same fails the test if two values differ: messages, or slices or maps of anything. Nil is as good as empty.
func same[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if diff := cmp.Diff(want, got, protocmp.Transform(), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// ---------------------------------------------------------------------------------------------
// Calls
// ---------------------------------------------------------------------------------------------

// put writes records and returns them as the server answers.
func put(t *testing.T, c client, records ...*databroker.Record) []*databroker.Record {
	t.Helper()
	response, err := c.Put(testContext(t), &databroker.PutRequest{Records: records})
	if err != nil {
		t.Fatalf("put: %v", err)
	}
	return response.Records
}

// putOne writes one record.
func putOne(t *testing.T, c client, record *databroker.Record) *databroker.Record {
	t.Helper()
	return put(t, c, record)[0]
}

func get(t *testing.T, c client, recordType, id string) *databroker.Record {
	t.Helper()
	response, err := c.Get(testContext(t), &databroker.GetRequest{Type: recordType, Id: id})
	if err != nil {
		t.Fatalf("get %s: %v", id, err)
	}
	return response.Record
}

// wantAbsent fails the test if a record is there.
func wantAbsent(t *testing.T, c client, recordType, id string) {
	t.Helper()
	_, err := c.Get(testContext(t), &databroker.GetRequest{Type: recordType, Id: id})
	wantStatus(t, err, codes.NotFound, "record not found")
}

// query returns up to a thousand records that match a filter in JSON; "" is none.
func query(t *testing.T, c client, recordType, filter string) *databroker.QueryResponse {
	t.Helper()
	request := &databroker.QueryRequest{Type: recordType, Limit: 1000}
	if filter != "" {
		request.Filter = parseFilter(t, filter)
	}
	response, err := c.Query(testContext(t), request)
	if err != nil {
		t.Fatalf("query %s: %v", filter, err)
	}
	return response
}

// queryIDs is query for tests that care about ids only.
func queryIDs(t *testing.T, c client, recordType, filter string) []string {
	t.Helper()
	response := query(t, c, recordType, filter)
	if response.TotalCount != int64(len(response.Records)) {
		t.Errorf("query %s: total_count %d with %d records", filter, response.TotalCount, len(response.Records))
	}
	return idsOf(response.Records)
}

func parseFilter(t *testing.T, text string) *structpb.Struct {
	t.Helper()
	filter := new(structpb.Struct)
	if err := filter.UnmarshalJSON([]byte(text)); err != nil {
		t.Fatalf("filter %s: %v", text, err)
	}
	return filter
}

// position returns the server version and the latest record version.
func position(t *testing.T, c client) *databroker.Versions {
	t.Helper()
	info, err := c.ServerInfo(testContext(t), new(emptypb.Empty))
	if err != nil {
		t.Fatalf("server info: %v", err)
	}
	return &databroker.Versions{ServerVersion: info.ServerVersion, LatestRecordVersion: info.LatestRecordVersion}
}

// wantStatus fails the test if an error does not have the code and, unless it is "", the message.
func wantStatus(t *testing.T, err error, code codes.Code, message string) {
	t.Helper()
	if status.Code(err) != code || message != "" && status.Convert(err).Message() != message {
		t.Errorf("got %v, want %v %q", err, code, message)
	}
}

// background does things over and over while a test goes on.
type background struct {
	t     *testing.T
	ctx   context.Context
	end   context.CancelFunc
	group sync.WaitGroup
}

// inBackground returns a background that ends with the test, if not before.
func inBackground(t *testing.T) *background {
	t.Helper()
	ctx, end := context.WithCancel(testContext(t))
	b := &background{t: t, ctx: ctx, end: end}
	t.Cleanup(b.stop)
	return b
}

// repeat calls f in a goroutine of its own until the end, or until it fails, which fails the test.
func (b *background) repeat(what string, f func(ctx context.Context, i int) error) {
	b.group.Go(func() {
		for i := 0; b.ctx.Err() == nil; i++ {
			if err := f(b.ctx, i); err != nil && b.ctx.Err() == nil {
				b.t.Errorf("%s: %v", what, err)
				return
			}
		}
	})
}

// stop returns when everything has ended.
func (b *background) stop() {
	b.end()
	b.group.Wait()
}

// ---------------------------------------------------------------------------------------------
// Streams
// ---------------------------------------------------------------------------------------------

// snapshot is what SyncLatest has sent.
type snapshot struct {
	records  []*databroker.Record
	options  []*databroker.TypedOptions
	versions *databroker.Versions
}

// syncLatest reads SyncLatest to its end, and checks its shape: records by type and id in byte order, then
// options by type, then versions, once.
func syncLatest(t *testing.T, c client, recordType string) *snapshot {
	t.Helper()
	s, err := readLatest(testContext(t), c, recordType)
	if err != nil {
		t.Fatalf("sync latest: %v", err)
	}
	return s
}

func readLatest(ctx context.Context, c client, recordType string) (*snapshot, error) {
	stream, err := c.SyncLatest(ctx, &databroker.SyncLatestRequest{Type: recordType})
	if err != nil {
		return nil, err
	}
	s := new(snapshot)
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if s.versions != nil {
			return nil, errors.New("there is more after the versions")
		}
		switch response := response.Response.(type) {
		case *databroker.SyncLatestResponse_Record:
			if len(s.options) > 0 {
				return nil, errors.New("a record after options")
			}
			if n := len(s.records); n > 0 && compareKeys(s.records[n-1], response.Record) >= 0 {
				return nil, errors.New("records out of order")
			}
			if response.Record.DeletedAt != nil || recordType != "" && response.Record.Type != recordType {
				return nil, errors.New("a record that was not asked for")
			}
			s.records = append(s.records, response.Record)
		case *databroker.SyncLatestResponse_Options:
			s.options = append(s.options, response.Options)
		case *databroker.SyncLatestResponse_Versions:
			s.versions = response.Versions
		}
	}
	if s.versions == nil {
		return nil, errors.New("the end without versions")
	}
	return s, nil
}

func compareKeys(a, b *databroker.Record) int {
	if c := strings.Compare(a.Type, b.Type); c != 0 {
		return c
	}
	return strings.Compare(a.Id, b.Id)
}

// syncStream is an open Sync stream.
type syncStream struct {
	t       *testing.T
	stream  grpc.ServerStreamingClient[databroker.SyncResponse]
	close   context.CancelFunc
	version uint64                     // of the latest change
	options []*databroker.TypedOptions // all that have come
}

// follow opens a Sync stream that waits.
func follow(t *testing.T, c client, from *databroker.Versions, recordType string) *syncStream {
	t.Helper()
	ctx, cancel := context.WithCancel(testContext(t))
	stream, err := c.Sync(ctx, &databroker.SyncRequest{
		ServerVersion: from.ServerVersion, RecordVersion: from.LatestRecordVersion, Type: recordType,
	})
	if err != nil {
		t.Fatalf("sync: %v", err)
	}
	return &syncStream{t: t, stream: stream, close: cancel, version: from.LatestRecordVersion}
}

// followNow is follow from the present on.
func followNow(t *testing.T, c client, recordType string) *syncStream {
	t.Helper()
	return follow(t, c, position(t, c), recordType)
}

// change returns the next change. Options on the way to it are kept. It checks that versions ascend.
func (s *syncStream) change() *databroker.Record {
	s.t.Helper()
	for {
		switch response := s.next().Response.(type) {
		case *databroker.SyncResponse_Record:
			return response.Record
		case *databroker.SyncResponse_Options:
		}
	}
}

// changes returns the next n changes.
func (s *syncStream) changes(n int) []*databroker.Record {
	s.t.Helper()
	records := make([]*databroker.Record, n)
	for i := range records {
		records[i] = s.change()
	}
	return records
}

// change returns the next change of one record, and passes over those of others.
func (s *syncStream) changeOf(id string) *databroker.Record {
	s.t.Helper()
	for {
		if record := s.change(); record.Id == id {
			return record
		}
	}
}

// nextOptions returns the next options, which must come before any record.
func (s *syncStream) nextOptions() *databroker.TypedOptions {
	s.t.Helper()
	response := s.next()
	options, ok := response.Response.(*databroker.SyncResponse_Options)
	if !ok {
		s.t.Fatalf("got %v, want options", response)
	}
	return options.Options
}

func (s *syncStream) next() *databroker.SyncResponse {
	s.t.Helper()
	response, err := s.recv()
	if err != nil {
		s.t.Fatalf("sync: %v", err)
	}
	return response
}

func (s *syncStream) recv() (*databroker.SyncResponse, error) {
	response, err := s.stream.Recv()
	if err != nil {
		return nil, err
	}
	switch response := response.Response.(type) {
	case *databroker.SyncResponse_Record:
		if response.Record.Version <= s.version {
			return nil, errors.New("versions do not ascend")
		}
		s.version = response.Record.Version
	case *databroker.SyncResponse_Options:
		s.options = append(s.options, response.Options)
	}
	return response, nil
}

// end reads the stream to its end and returns why it has ended: io.EOF or a status.
func (s *syncStream) end() error {
	for {
		if _, err := s.recv(); err != nil {
			return err
		}
	}
}

// syncNow returns what Sync sends without waiting.
func syncNow(t *testing.T, c client, from *databroker.Versions, recordType string) ([]*databroker.Record, []*databroker.TypedOptions) {
	t.Helper()
	stream, err := c.Sync(testContext(t), &databroker.SyncRequest{
		ServerVersion: from.ServerVersion, RecordVersion: from.LatestRecordVersion, Type: recordType, Wait: proto.Bool(false),
	})
	if err != nil {
		t.Fatalf("sync: %v", err)
	}
	s := &syncStream{t: t, stream: stream, version: from.LatestRecordVersion}
	var records []*databroker.Record
	for {
		response, err := s.recv()
		if errors.Is(err, io.EOF) {
			return records, s.options
		}
		if err != nil {
			t.Fatalf("sync: %v", err)
		}
		if record := response.GetRecord(); record != nil {
			records = append(records, record)
		}
	}
}

// wantSyncRefused fails the test if Sync is not aborted with the message.
func wantSyncRefused(t *testing.T, c client, request *databroker.SyncRequest, message string) {
	t.Helper()
	stream, err := c.Sync(testContext(t), request)
	if err != nil {
		t.Fatalf("sync: %v", err)
	}
	response, err := stream.Recv()
	if err == nil {
		t.Fatalf("got %v before the stream was refused", response)
	}
	wantStatus(t, err, codes.Aborted, message)
}

// fold applies changes to records by key, as a client does that keeps a copy.
func fold(state map[string]*databroker.Record, changes ...*databroker.Record) {
	for _, change := range changes {
		key := change.Type + "\x00" + change.Id
		if change.DeletedAt != nil {
			delete(state, key)
		} else {
			state[key] = change
		}
	}
}

// recordsByKey is the state that fold reaches after the records were put.
func recordsByKey(records []*databroker.Record) map[string]*databroker.Record {
	state := make(map[string]*databroker.Record)
	fold(state, records...)
	return state
}

// typesOf returns the types that options are about.
func typesOf(options []*databroker.TypedOptions) []string {
	types := make([]string, len(options))
	for i, o := range options {
		types[i] = o.TypeURL
	}
	return types
}

// contains reports whether an element satisfies the condition.
func contains[T any](elements []T, condition func(T) bool) bool {
	return slices.ContainsFunc(elements, condition)
}

func isCode(err error, code codes.Code) bool { return err != nil && status.Code(err) == code }

// clock is the clock of a database, which the test moves: whatever asks Postgres for the time gets that one.
type clock struct {
	t        *testing.T
	database *dbtest.Database
}

// newClock gives a database a clock of its own, in the place of PostgreSQL's: search paths are fixed, so that nobody can put one
// before it. Connections that are open already keep the old one.
func newClock(t *testing.T, database *dbtest.Database) *clock {
	t.Helper()
	database.AdminExec(t, `CREATE SCHEMA test_clock;
		CREATE TABLE test_clock.ahead (by interval NOT NULL);
		INSERT INTO test_clock.ahead VALUES ('0');
		GRANT USAGE ON SCHEMA test_clock TO PUBLIC;
		GRANT SELECT ON test_clock.ahead TO PUBLIC;
		ALTER FUNCTION pg_catalog.clock_timestamp() RENAME TO real_clock_timestamp;
		CREATE FUNCTION pg_catalog.clock_timestamp() RETURNS timestamptz LANGUAGE sql
			AS 'SELECT pg_catalog.real_clock_timestamp() + by FROM test_clock.ahead'`)
	return &clock{t, database}
}

// advance moves the clock forward.
func (c *clock) advance(d time.Duration) {
	c.t.Helper()
	c.database.AdminExec(c.t, "UPDATE test_clock.ahead SET by = by + $1", d)
}

// brokerWithClock is a broker on a database whose clock the test moves.
type brokerWithClock struct {
	*servertest.Broker
	clock *clock
}

// expire does what the periodic work does about TTLs.
func (b brokerWithClock) expire(t *testing.T) {
	t.Helper()
	queries := queriesOf(b.Database)
	for _, recordType := range must[[]string](t)(queries.TypesWithTTL(t.Context())) {
		must[int64](t)(queries.RecordsExpireByTTL(t.Context(), db.RecordsExpireByTTLParams{Type: recordType, MaxRows: 100}))
	}
}
