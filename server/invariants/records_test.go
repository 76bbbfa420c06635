package invariants

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

const (
	sessionType = "type.googleapis.com/session.Session"
	bindingType = "type.googleapis.com/session.SessionBinding"
)

// TestI2_APutIsSeenWholeOrNotAtAll: readers on another replica see all records of each Put, or none.
func TestI2_APutIsSeenWholeOrNotAtAll(t *testing.T) {
	t.Parallel()
	const records, puts = 20, 100
	b := servertest.New(t, servertest.Options{Replicas: 2})
	ctx, stop := context.WithCancel(t.Context())
	var writers, readers errgroup.Group
	for w := range 4 {
		writers.Go(func() error {
			for n := range puts {
				data, err := anypb.New(structpb.NewStringValue(fmt.Sprintf("%d/%d", w, n)))
				if err != nil {
					return err
				}
				request := new(databroker.PutRequest)
				for i := range records {
					request.Records = append(request.Records, &databroker.Record{Type: "t", Id: fmt.Sprint(i), Data: data})
				}
				if _, err := b.Replicas[w%2].Put(ctx, request); err != nil {
					return err
				}
			}
			return nil
		})
	}
	reads := 0
	readers.Go(func() error {
		for ctx.Err() == nil {
			response, err := b.Replicas[1].Query(t.Context(), &databroker.QueryRequest{Type: "t", Limit: records})
			if err != nil {
				return err
			}
			reads++
			if n := len(response.Records); n != 0 && n != records {
				return fmt.Errorf("%d records of %d are visible", n, records)
			}
			for _, record := range response.Records {
				if !proto.Equal(record.Data, response.Records[0].Data) {
					return fmt.Errorf("records of two puts are visible at once: %v and %v", record, response.Records[0])
				}
			}
		}
		return nil
	})
	if err := writers.Wait(); err != nil {
		t.Fatal(err)
	}
	stop()
	if err := readers.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d reads", reads)
}

// TestI2_AFailedPutLeavesNothing: the second record cannot be written, so the first is not either.
func TestI2_AFailedPutLeavesNothing(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	b.Database.Exec(t, `ALTER TABLE pgbroker.records ADD CHECK (id <> 'forbidden')`)
	stream, err := b.Sync(t.Context(), latest(t, b.Replica))
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{{Type: "t", Id: "first"}, {Type: "t", Id: "forbidden"}}})
	if err == nil {
		t.Fatal("the Put succeeded")
	}
	if _, err := b.Get(t.Context(), &databroker.GetRequest{Type: "t", Id: "first"}); status.Code(err) != codes.NotFound {
		t.Errorf("Get of the first record: %v, want NotFound", err)
	}
	put(t, b.Replica, &databroker.Record{Type: "t", Id: "next"})
	if record := next(t, stream); record.Id != "next" {
		t.Errorf("the stream got %v of the failed Put", record)
	}
}

// TestI2_AcknowledgedWritesSurviveACrashOfPostgres kills the database with SIGKILL under load.
func TestI2_AcknowledgedWritesSurviveACrashOfPostgres(t *testing.T) {
	t.Parallel()
	postgres := dbtest.Server(t, map[string]string{"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"})
	migrate(t, postgres.ConnString())
	r := servertest.Start(t, postgres.ConnString(), servertest.Options{})
	acknowledged := make([]map[string]uint64, 8)
	enough := make(chan struct{}, len(acknowledged))
	var writers errgroup.Group
	for w := range acknowledged {
		acknowledged[w] = make(map[string]uint64)
		writers.Go(func() error {
			for n := 0; ; n++ {
				id := fmt.Sprintf("%d/%d", w, n)
				response, err := r.Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{{Type: "t", Id: id}}})
				if err != nil {
					if code := status.Code(err); code != codes.Unavailable {
						return fmt.Errorf("put during the crash: %w, want Unavailable", err)
					}
					return nil
				}
				acknowledged[w][id] = response.Records[0].Version
				if n == 50 {
					enough <- struct{}{}
				}
			}
		})
	}
	for range acknowledged {
		<-enough
	}
	postgres.Kill()
	if err := writers.Wait(); err != nil {
		t.Fatal(err)
	}
	postgres.Restart()
	awaitServing(t, r)
	for _, records := range acknowledged {
		for id, version := range records {
			response, err := r.Get(t.Context(), &databroker.GetRequest{Type: "t", Id: id})
			if err != nil || response.Record.Version != version {
				t.Fatalf("acknowledged write %s at version %d: %v, %v", id, version, response, err)
			}
		}
	}
}

// TestI3_OneTombstoneForEveryWayOut: however a record goes, streams get one tombstone.
func TestI3_OneTombstoneForEveryWayOut(t *testing.T) {
	t.Parallel()
	past := timestamppb.New(time.Now().Add(-time.Hour))
	live := func(id string) *databroker.Record {
		return record(t, sessionType, id, &session.Session{Id: id, UserId: "user-" + id})
	}
	for _, test := range []struct {
		name   string
		record *databroker.Record
		end    func(*testing.T, *servertest.Broker)
	}{
		{"Put with deleted_at", live("x"), func(t *testing.T, b *servertest.Broker) {
			put(t, b.Replica, &databroker.Record{Type: sessionType, Id: "x", DeletedAt: past})
		}},
		{"Patch with deleted_at", live("x"), func(t *testing.T, b *servertest.Broker) {
			if _, err := b.Patch(t.Context(), &databroker.PatchRequest{Records: []*databroker.Record{{Type: sessionType, Id: "x", DeletedAt: past}}}); err != nil {
				t.Fatal(err)
			}
		}},
		{"DELETE", live("x"), sql(`DELETE FROM pgbroker.records WHERE id = 'x'`)},
		{"DELETE on a view", live("x"), sql(`DELETE FROM pgbroker.sessions WHERE user_id = 'user-x'`)},
		{"revoke_session", live("x"), sql(`SELECT pgbroker.revoke_session('x')`)},
		{"revoke_user_sessions", live("x"), sql(`SELECT pgbroker.revoke_user_sessions('user-x')`)},
		{"TTL", record(t, bindingType, "x", &session.SessionBinding{}), sql(
			`UPDATE pgbroker.record_types SET ttl = '1 microsecond' WHERE type = '` + bindingType + `'`)},
		{"expiry", record(t, sessionType, "x", &session.Session{Id: "x", ExpiresAt: past}), func(*testing.T, *servertest.Broker) {}},
		{"capacity", live("x"), func(t *testing.T, b *servertest.Broker) {
			capacity := uint64(1)
			if _, err := b.SetOptions(t.Context(), &databroker.SetOptionsRequest{Type: sessionType, Options: &databroker.Options{Capacity: &capacity}}); err != nil {
				t.Fatal(err)
			}
			put(t, b.Replica, live("newer"))
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) { c.MaintenanceInterval = 50 * time.Millisecond }})
			stream, err := b.Sync(t.Context(), latest(t, b.Replica))
			if err != nil {
				t.Fatal(err)
			}
			put(t, b.Replica, test.record)
			test.end(t, b)
			tombstones := 0
			for marked := false; !marked; {
				switch record := next(t, stream); {
				case record.Id == "x" && record.DeletedAt != nil:
					tombstones++
					put(t, b.Replica, &databroker.Record{Type: "marker", Id: "end"})
				case record.Type == "marker":
					marked = true
				}
			}
			if tombstones != 1 {
				t.Errorf("%d tombstones, want 1", tombstones)
			}
			if _, err := b.Get(t.Context(), &databroker.GetRequest{Type: test.record.Type, Id: "x"}); status.Code(err) != codes.NotFound {
				t.Errorf("Get afterwards: %v, want NotFound", err)
			}
		})
	}
}

func sql(statements string) func(*testing.T, *servertest.Broker) {
	return func(t *testing.T, b *servertest.Broker) {
		t.Helper()
		b.Database.Exec(t, statements)
	}
}

// TestI10_PayloadsAreKeptByteForByte: whatever a payload is, every way of reading returns it unchanged.
func TestI10_PayloadsAreKeptByteForByte(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	stream, err := b.Sync(t.Context(), latest(t, b.Replica))
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(rt *rapid.T) {
		var data *anypb.Any
		switch rapid.IntRange(0, 4).Draw(rt, "kind") {
		case 0: // absent
		case 1:
			data = new(anypb.Any) // empty
		case 2:
			data = &anypb.Any{TypeUrl: rapid.String().Draw(rt, "type"), Value: rapid.SliceOf(rapid.Byte()).Draw(rt, "value")}
		case 3: // of a known type, undecodable or with unknown fields
			data = &anypb.Any{TypeUrl: sessionType, Value: rapid.SliceOf(rapid.Byte()).Draw(rt, "value")}
		case 4: // fields that Any itself does not have
			data = &anypb.Any{TypeUrl: sessionType}
			data.ProtoReflect().SetUnknown(append([]byte{0x9a, 0x06, 0x03}, "abc"...))
		}
		id := rapid.StringMatching(`[a-z]{1,8}`).Draw(rt, "id")
		want := marshal(rt, data)
		check := func(how string, got *anypb.Any) {
			if (got == nil) != (data == nil) || !bytes.Equal(marshal(rt, got), want) {
				rt.Fatalf("%s returned %v, want %v", how, got, data)
			}
		}
		put(t, b.Replica, &databroker.Record{Type: "t", Id: id, Data: data})
		check("Sync", next(t, stream).Data)
		response, err := b.Get(t.Context(), &databroker.GetRequest{Type: "t", Id: id})
		if err != nil {
			rt.Fatal(err)
		}
		check("Get", response.Record.Data)
		filter, _ := structpb.NewStruct(map[string]any{"id": id})
		queried, err := b.Query(t.Context(), &databroker.QueryRequest{Type: "t", Filter: filter, Limit: 1})
		if err != nil || len(queried.Records) != 1 {
			rt.Fatalf("Query: %v, %v", queried, err)
		}
		check("Query", queried.Records[0].Data)
		all, err := b.SyncLatest(t.Context(), &databroker.SyncLatestRequest{Type: "t"})
		if err != nil {
			rt.Fatal(err)
		}
		for found := false; !found; {
			message, err := all.Recv()
			if err != nil {
				rt.Fatalf("SyncLatest: %v", err)
			}
			if record := message.GetRecord(); record.GetId() == id {
				check("SyncLatest", record.Data)
				found = true
			}
		}
		for { // to the end
			if _, err := all.Recv(); err != nil {
				break
			}
		}
	})
}

func marshal(t *rapid.T, message proto.Message) []byte {
	b, err := proto.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestI11_SecretsStayInThePayload: tokens are in no column but the payload, and in no log line, metric or
// error.
func TestI11_SecretsStayInThePayload(t *testing.T) {
	t.Parallel()
	const secret = "s3cr3t-t0k3n"
	var log bytes.Buffer
	metrics := prometheus.NewRegistry()
	b := servertest.New(t, servertest.Options{Configure: func(c *server.Config) {
		c.Logger = slog.New(slog.NewTextHandler(&syncWriter{buffer: &log}, &slog.HandlerOptions{Level: slog.LevelDebug}))
		c.Registerer = metrics
	}})
	s := &session.Session{
		Id: "s", UserId: "u",
		IdToken:    &session.IDToken{Raw: secret, Subject: "visible"},
		OauthToken: &session.OAuthToken{AccessToken: secret, RefreshToken: secret, TokenType: "visible"},
	}
	put(t, b.Replica, record(t, sessionType, "s", s))
	// Errors too: a statement that fails with the secret in its parameters.
	b.Database.Exec(t, `ALTER TABLE pgbroker.records ADD CHECK (id <> 'forbidden')`)
	_, failure := b.Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{record(t, sessionType, "forbidden", s)}})
	if failure == nil {
		t.Fatal("the forbidden record was written")
	}
	_, badMask := b.Patch(t.Context(), &databroker.PatchRequest{
		Records: []*databroker.Record{record(t, sessionType, "s", s)}, FieldMask: &fieldmaskpb.FieldMask{Paths: []string{"oauth_token.nope"}},
	})
	if badMask == nil {
		t.Fatal("the bad mask was accepted")
	}
	var visible, hidden string
	if err := b.Database.Pool.QueryRow(t.Context(), `
		SELECT (to_jsonb(r) - 'payload')::text, encode(r.payload, 'escape') FROM pgbroker.records r WHERE id = 's'`).Scan(&visible, &hidden); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(hidden, secret) || !strings.Contains(visible, "visible") {
		t.Fatalf("the record is not what this test expects: %s", visible)
	}
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for where, text := range map[string]string{
		"a readable column": visible, "an error": failure.Error(), "the error of a mask": badMask.Error(),
		"the log": log.String(), "the metrics": fmt.Sprint(families),
	} {
		if strings.Contains(text, secret) || strings.Contains(text, "c3Izcj") {
			t.Errorf("%s shows the secret: %s", where, text)
		}
	}
	found, err := b.Query(t.Context(), &databroker.QueryRequest{Type: sessionType, Query: secret, Limit: 1})
	if err != nil || found.TotalCount != 0 {
		t.Errorf("a text query finds the secret: %v, %v", found, err)
	}
}

// TestI12_NothingWithoutAToken calls every method of every service without a token, and with a bad one.
func TestI12_NothingWithoutAToken(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	for name, secret := range map[string]string{"none": "", "wrong": "d3Jvbmcgc2hhcmVkIHNlY3JldCBvZiAzMiBieXRlcyE="} {
		conn := servertest.Dial(t, b.Address, secret)
		methods := 0
		for service, info := range b.Server.Services() {
			open := strings.HasPrefix(service, "grpc.")
			for _, method := range info.Methods {
				if open {
					continue
				}
				methods++
				full := "/" + service + "/" + method.Name
				err := call(t.Context(), conn, full, method)
				if status.Code(err) != codes.Unauthenticated {
					t.Errorf("token %s, %s: %v, want Unauthenticated", name, full, err)
				}
			}
		}
		if methods != 14+2+3 {
			t.Errorf("%d methods were called, want 19", methods)
		}
	}
}

// TestI12_NoServerWithoutASecret: forgetting the secret does not open the server.
func TestI12_NoServerWithoutASecret(t *testing.T) {
	t.Parallel()
	database := dbtest.New(t)
	if _, err := server.New(server.Config{DB: open(t, database.ConnString)}); err == nil || !strings.Contains(err.Error(), "secret") {
		t.Errorf("New without a secret: %v, want an error that says so", err)
	}
	if _, err := server.New(server.Config{DB: open(t, database.ConnString), AllowUnauthenticated: true}); err != nil {
		t.Errorf("New, allowing it: %v", err)
	}
}

func call(ctx context.Context, conn *grpc.ClientConn, method string, info grpc.MethodInfo) error {
	if !info.IsServerStream {
		return conn.Invoke(ctx, method, new(databroker.GetRequest), new(databroker.GetResponse))
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(new(databroker.GetRequest)); err != nil {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	return stream.RecvMsg(new(databroker.GetResponse))
}

// TestI14_WhatAStreamDeliversIsVisibleEverywhere: a change that one replica's stream has delivered is
// there for Get and Query on another.
func TestI14_WhatAStreamDeliversIsVisibleEverywhere(t *testing.T) {
	t.Parallel()
	const changes = 500
	b := servertest.New(t, servertest.Options{Replicas: 2})
	stream, err := b.Sync(t.Context(), latest(t, b.Replica))
	if err != nil {
		t.Fatal(err)
	}
	var writers errgroup.Group
	for w := range 4 {
		writers.Go(func() error {
			for n := range changes / 4 {
				_, err := b.Replicas[w%2].Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{{Type: "t", Id: fmt.Sprintf("%d/%d", w, n%10)}}})
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	put(t, b.Replica, &databroker.Record{Type: "t", Id: "first"})
	latest := make(map[string]uint64)
	for len(latest) < 41 {
		record := next(t, stream)
		latest[record.Id] = record.Version
		response, err := b.Replicas[1].Get(t.Context(), &databroker.GetRequest{Type: "t", Id: record.Id})
		if err != nil || response.Record.Version < record.Version {
			t.Fatalf("delivered %v, but Get returns %v, %v", record, response, err)
		}
		queried, err := b.Replicas[1].Query(t.Context(), &databroker.QueryRequest{Type: "t", Limit: 1})
		if err != nil || queried.RecordVersion < record.Version {
			t.Fatalf("delivered version %d, but Query knows only %d, %v", record.Version, queried.GetRecordVersion(), err)
		}
	}
	if err := writers.Wait(); err != nil {
		t.Fatal(err)
	}
}

// TestARecordMayBeWrittenOnlySoOftenInOneRequest: each time is a statement, and other writers wait for all.
func TestARecordMayBeWrittenOnlySoOftenInOneRequest(t *testing.T) {
	t.Parallel()
	b := servertest.New(t, servertest.Options{})
	request := new(databroker.PutRequest)
	for range 100 {
		request.Records = append(request.Records, &databroker.Record{Type: "t", Id: "1"})
	}
	if _, err := b.Put(t.Context(), request); err != nil {
		t.Errorf("100 times: %v", err)
	}
	request.Records = append(request.Records, &databroker.Record{Type: "t", Id: "1"})
	_, err := b.Put(t.Context(), request)
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(status.Convert(err).Message(), "records[100]") {
		t.Errorf("101 times: %v, want InvalidArgument that names the record", err)
	}
}
