package conformance_test

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
	"pgbroker/proto/oauth21"
	"pgbroker/proto/session"
	"pgbroker/proto/user"
	"pgbroker/server/servertest"
)

// The tests in this file replay what real clients do: contract section 5.

// replica is where a replayed client is connected at the moment. Tests move it, as a load balancer would.
type replica struct {
	mu sync.Mutex // protects r
	r  *servertest.Replica
}

func (r *replica) get() *servertest.Replica {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.r
}

func (r *replica) move(to *servertest.Replica) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.r = to
}

// copied is what a replayed client reports, for a test to wait on.
type copied struct {
	mu      sync.Mutex // protects what follows
	state   map[string]*databroker.Record
	version uint64        // highest record version known
	inits   int           // times that it has started over
	ended   error         // why it has given up for good
	changed chan struct{} // closed at each event
}

func newCopied() *copied { return &copied{changed: make(chan struct{})} }

func (e *copied) update(change func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change()
	close(e.changed)
	e.changed = make(chan struct{})
}

// await waits until a condition holds, which is called under the lock.
func (e *copied) await(t *testing.T, what string, condition func() bool) {
	t.Helper()
	timeout := time.After(patience)
	for {
		e.mu.Lock()
		done, changed := condition(), e.changed
		ended := e.ended
		e.mu.Unlock()
		if done {
			return
		}
		if ended != nil {
			t.Fatalf("await %s: the client has ended: %v", what, ended)
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("await %s: nothing", what)
		}
	}
}

// knows reports whether a client's state is that of the store.
func (e *copied) knows(records []*databroker.Record) bool {
	want := recordsByKey(records)
	return maps.EqualFunc(e.state, want, func(a, b *databroker.Record) bool { return proto.Equal(a, b) })
}

// runSyncer is the syncer of contract 5.1: it starts over when it is told Aborted, and otherwise resumes
// where it was. It knows where it is from the last record alone.
func runSyncer(ctx context.Context, at *replica, recordType string, e *copied) {
	var serverVersion, recordVersion uint64
	for ctx.Err() == nil {
		c := at.get()
		if serverVersion == 0 {
			latest, err := readLatest(ctx, c, recordType)
			if err != nil {
				awaitConnection(ctx, c)
				continue
			}
			serverVersion, recordVersion = latest.versions.ServerVersion, latest.versions.LatestRecordVersion
			e.update(func() {
				e.inits++
				e.state = recordsByKey(latest.records)
				e.version = recordVersion
			})
			continue
		}
		stream, err := c.Sync(ctx, &databroker.SyncRequest{ServerVersion: serverVersion, RecordVersion: recordVersion, Type: recordType})
		for err == nil {
			var response *databroker.SyncResponse
			if response, err = stream.Recv(); err == nil && response.GetRecord() != nil {
				record := response.GetRecord()
				recordVersion = record.Version
				e.update(func() { fold(e.state, record); e.version = recordVersion })
			}
		}
		if isCode(err, codes.Aborted) {
			serverVersion = 0
			continue
		}
		awaitConnection(ctx, c)
	}
}

// awaitConnection is the pause before a retry: until the connection is up or somebody has moved us, instead
// of for half a second and more.
func awaitConnection(ctx context.Context, c *servertest.Replica) {
	ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	for {
		state := c.Conn.GetState()
		if state == connectivity.Ready || !c.Conn.WaitForStateChange(ctx, state) {
			return
		}
	}
}

// runSyncQuerier is the sync-querier of contract 5.2: Aborted makes it start over, and Canceled makes it stop
// for good, with whatever it then has.
func runSyncQuerier(ctx context.Context, at *replica, recordType string, e *copied) {
	var versions *databroker.Versions
	for ctx.Err() == nil {
		c := at.get()
		if versions == nil {
			latest, err := readLatest(ctx, c, recordType)
			if err != nil {
				awaitConnection(ctx, c)
				continue
			}
			versions = latest.versions
			e.update(func() {
				e.inits++
				e.state = recordsByKey(latest.records)
				e.version = versions.LatestRecordVersion
			})
		}
		stream, err := c.Sync(ctx, &databroker.SyncRequest{ServerVersion: versions.ServerVersion, RecordVersion: versions.LatestRecordVersion, Type: recordType})
		for err == nil {
			var response *databroker.SyncResponse
			if response, err = stream.Recv(); err == nil && response.GetRecord() != nil {
				record := response.GetRecord()
				versions.LatestRecordVersion = max(versions.LatestRecordVersion, record.Version)
				e.update(func() { fold(e.state, record); e.version = max(e.version, record.Version) })
			}
		}
		switch {
		case ctx.Err() != nil:
			return
		case isCode(err, codes.Canceled):
			e.update(func() { e.ended = err })
			return
		case isCode(err, codes.Aborted):
			e.update(func() { e.state = nil })
			versions = nil
		}
		awaitConnection(ctx, c)
	}
}

// start runs a replayed client until the test ends.
func startClient(t *testing.T, run func(context.Context, *replica, string, *copied), at *replica, recordType string) *copied {
	t.Helper()
	e := newCopied()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); run(ctx, at, recordType, e) }()
	t.Cleanup(func() { cancel(); <-done })
	return e
}

// TestSyncersAndSyncQueriers: clients that keep copies have what the store has, through writes, Clear, the end
// of the replica that they are connected to, an outage of the database, and an absence longer than the
// retention of tombstones; and they start over only when they have to.
func TestSyncersAndSyncQueriers(t *testing.T) {
	t.Parallel()
	for name, run := range map[string]func(context.Context, *replica, string, *copied){"syncer": runSyncer, "sync-querier": runSyncQuerier} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := startReplicas(t, 2)
			at := &replica{r: b.Replicas[1]}
			writer := b.Replicas[0]
			put(t, writer, thing("a", "1"), thing("b", "1"), newRecord(sessionType, "s", &session.Session{Id: "s"}))
			clients := map[string]*copied{"": startClient(t, run, at, ""), thingType: startClient(t, run, at, thingType)}
			agree := func(what string, c client, inits int) {
				t.Helper()
				for recordType, e := range clients {
					stored := syncLatest(t, c, recordType).records
					e.await(t, fmt.Sprintf("%s, type %q", what, recordType), func() bool { return e.knows(stored) })
					e.await(t, what, func() bool { return e.inits >= inits })
					if e.inits != inits {
						t.Errorf("%s, type %q: the client has started over %d times, want %d", what, recordType, e.inits, inits)
					}
				}
			}
			agree("at first", writer, 1)
			put(t, writer, thing("a", "2"), deletion(thingType, "b"), thing("c", "1"))
			b.Database.Exec(t, "DELETE FROM pgbroker.records WHERE id = 's'")
			agree("after writes", writer, 1)

			clearAll(t, writer)
			agree("after Clear", writer, 2)
			put(t, writer, thing("d", "1"), thing("e", "1"))
			agree("after writes that follow Clear", writer, 2)

			// The replica ends; another one takes over.
			next := startMore(t, b)
			stopped := at.get()
			at.move(next)
			if err := stopped.Stop(); err != nil {
				t.Fatal(err)
			}
			put(t, writer, thing("f", "1"), deletion(thingType, "d"))
			agree("on another replica", writer, 2)

			end := outage(t, b.Database)
			end()
			putAgain(t, writer, thing("g", "1"))
			agree("after an outage of the database", writer, 2)

			// Nobody is there for so long that tombstones have passed their retention.
			if err := next.Stop(); err != nil {
				t.Fatal(err)
			}
			put(t, writer, deletion(thingType, "e"))
			put(t, writer, thing("h", "1"))
			purgeTombstones(t, b.Database)
			at.move(startMore(t, b))
			agree("after a long absence", writer, 3)
		})
	}
}

// TestVersionHints: a proxy answers from its copy as soon as that has reached the version that a write was
// answered with, and what it then answers is not older.
func TestVersionHints(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	e := startClient(t, runSyncQuerier, &replica{r: b.Replicas[1]}, sessionType)
	e.await(t, "the copy", func() bool { return e.inits == 1 })
	for i := range 30 {
		id := fmt.Sprint(i % 3)
		var written *databroker.Record
		switch i % 3 {
		case 0, 1:
			written = putOne(t, b, newRecord(sessionType, id, &session.Session{Id: id, UserId: fmt.Sprint(i)}))
		case 2:
			patched := patch(t, b, []string{"accessed_at"}, newRecord(sessionType, "0", &session.Session{AccessedAt: timestamppb.Now()}))
			written = patched[0]
		}
		e.await(t, "the version of the write", func() bool { return e.version >= written.Version })
		e.mu.Lock()
		got := e.state[written.Type+"\x00"+written.Id]
		e.mu.Unlock()
		same(t, "the copy", got, written)
		// And a proxy without one asks the server, on any replica.
		request := &databroker.QueryRequest{
			Type: sessionType, Limit: 1, MinimumRecordVersionHint: &written.Version,
			Filter: parseFilter(t, `{"$or": [{"id": "`+written.Id+`"}, {"$index": "`+written.Id+`"}]}`),
		}
		for _, r := range b.Replicas {
			response, err := r.Query(testContext(t), request, grpc.WaitForReady(true))
			if err != nil || response.RecordVersion < written.Version || len(response.Records) != 1 {
				t.Fatalf("query: %v, %v", response, err)
			}
			same(t, "the server's answer", response.Records[0], written)
		}
	}
}

// TestReconciler: one replica's job at a time, by lease, brings a type to a wanted state; in the next run
// there is nothing to do, because payloads are what was written, byte for byte.
func TestReconciler(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	wanted := make(map[string]*databroker.Record)
	want := func(record *databroker.Record) { wanted[record.Id] = record }
	for i := range 40 {
		id := fmt.Sprintf("user %02d", i)
		fields := map[string]any{"id": id, "email": id + "@example.com", "display_name": "X", "group_ids": []any{"g1", "g2"}}
		// A map is marshaled in another order each time: only the bytes themselves can be compared.
		want(object(directoryUserType, id, fields))
	}
	want(&databroker.Record{Type: directoryUserType, Id: "odd", Data: &anypb.Any{TypeUrl: "type.googleapis.com/new.Type", Value: []byte{0xff}}})

	reconcile := func(c client) (changes int) {
		t.Helper()
		lease := acquire(t, c, "directory-reconciler", time.Minute)
		defer release(t, c, "directory-reconciler", lease)
		wantTaken(t, b.Replicas[0], "directory-reconciler")
		current := make(map[string]*databroker.Record)
		for _, record := range syncLatest(t, c, directoryUserType).records {
			current[record.Id] = record
		}
		var batch []*databroker.Record
		for id, record := range current {
			if wanted[id] == nil {
				record.DeletedAt = timestamppb.Now()
				batch = append(batch, record)
			}
		}
		for id, record := range wanted {
			if !proto.Equal(current[id].GetData(), record.Data) {
				batch = append(batch, proto.CloneOf(record))
			}
		}
		if len(batch) > 0 {
			put(t, c, batch...)
		}
		if err := renew(t, c, "directory-reconciler", lease, time.Minute); err != nil {
			t.Errorf("renew: %v", err)
		}
		return len(batch)
	}
	for i, test := range []struct {
		change func()
		want   int
	}{
		{func() {}, 41},
		{func() {}, 0},
		{func() {
			delete(wanted, "user 00")
			want(object(directoryUserType, "user 01", nil))
			want(object(directoryUserType, "new", nil))
		}, 3},
		{func() {}, 0},
		{func() { put(t, b, object(directoryUserType, "stray", nil)) }, 1},
		{func() {}, 0},
	} {
		test.change()
		if n := reconcile(b.Replicas[i%2]); n != test.want {
			t.Errorf("run %d: %d changes, want %d", i, n, test.want)
		}
	}
}

// TestLoginFlow: what a sign-in, the requests after it, and a sign-out do.
func TestLoginFlow(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	authenticate, authorize := b.Replicas[0], b.Replicas[1]
	wantAbsent(t, authenticate, userType, "u1")
	put(t, authenticate, newRecord(userType, "u1", &user.User{Id: "u1", Name: "Ann", Claims: map[string]*structpb.ListValue{"groups": {Values: []*structpb.Value{structpb.NewStringValue("g")}}}}))
	end := timestamppb.New(time.Now().Add(14 * time.Hour))
	login := putOne(t, authenticate, newRecord(sessionType, "s1", &session.Session{
		Id: "s1", UserId: "u1", ExpiresAt: end, IssuedAt: timestamppb.Now(), OauthToken: &session.OAuthToken{AccessToken: "secret"},
	}))

	// The request that follows at once carries a cookie with the version of the session.
	lookUp := func(recordType, id string) *databroker.QueryResponse {
		t.Helper()
		response, err := authorize.Query(testContext(t), &databroker.QueryRequest{
			Type: recordType, Limit: 1, MinimumRecordVersionHint: &login.Version,
			Filter: parseFilter(t, `{"$or": [{"id": "`+id+`"}, {"$index": "`+id+`"}]}`),
		})
		if err != nil {
			t.Fatalf("query: %v", err)
		}
		if response.RecordVersion < login.Version {
			t.Errorf("record version %d is below that of the cookie, %d", response.RecordVersion, login.Version)
		}
		return response
	}
	if got := lookUp(sessionType, "s1").Records; len(got) != 1 || payload[*session.Session](t, got[0]).OauthToken.GetAccessToken() != "secret" {
		t.Errorf("session: %v", got)
	}
	if got := lookUp(userType, "u1").Records; len(got) != 1 {
		t.Errorf("user: %v", got)
	}
	for _, recordType := range []string{"type.googleapis.com/user.ServiceAccount", directoryUserType} {
		if got := lookUp(recordType, "s1"); got.TotalCount != 0 {
			t.Errorf("%s: %v", recordType, got)
		}
	}

	// Access is tracked, and the session refreshed, by two who do not know of each other.
	patch(t, authorize, []string{"accessed_at"}, newRecord(sessionType, "s1", &session.Session{AccessedAt: &timestamppb.Timestamp{Seconds: 99}}))
	patch(t, authenticate, []string{"oauth_token", "id_token", "claims"}, newRecord(sessionType, "s1", &session.Session{
		OauthToken: &session.OAuthToken{AccessToken: "fresh"}, IdToken: &session.IDToken{Subject: "u1"},
	}))
	put(t, authenticate, newRecord(userType, "u1", &user.User{Id: "u1", Name: "Ann B."}))
	got := payload[*session.Session](t, get(t, authorize, sessionType, "s1"))
	if got.AccessedAt.GetSeconds() != 99 || got.OauthToken.GetAccessToken() != "fresh" || got.UserId != "u1" || !proto.Equal(got.ExpiresAt, end) {
		t.Errorf("the session after all that: %v", got)
	}

	// The stateless way: both at once.
	both := put(t, authenticate, newRecord(sessionType, "s2", &session.Session{Id: "s2", UserId: "u2"}), newRecord(userType, "u2", &user.User{Id: "u2"}))
	login.Version = max(both[0].Version, both[1].Version)
	if got := lookUp(sessionType, "s2").Records; len(got) != 1 {
		t.Errorf("session: %v", got)
	}

	// Sign-out: the proxies that keep copies hear of it.
	stream := followNow(t, authorize, sessionType)
	leaving := get(t, authenticate, sessionType, "s1")
	leaving.DeletedAt = timestamppb.Now()
	put(t, authenticate, leaving)
	if tombstone := stream.change(); tombstone.Id != "s1" || tombstone.DeletedAt == nil {
		t.Errorf("got %v", tombstone)
	}
	wantAbsent(t, authenticate, sessionType, "s1")
	// Those who only find out later that it is gone: a patch does not bring it back.
	if patched := patch(t, authorize, []string{"accessed_at"}, newRecord(sessionType, "s1", &session.Session{AccessedAt: timestamppb.Now()})); len(patched) > 0 {
		t.Errorf("patched what is gone: %v", patched)
	}
	wantAbsent(t, authorize, sessionType, "s1")
}

// TestD38_SSHFlow: an SSH client waits on a stream for its user to agree in a browser. The moment that it
// hears of it, the binding must be there: it does not check.
func TestD38_SSHFlow(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	ssh, browser := b.Replicas[0], b.Replicas[1]
	requests, bindings := followNow(t, ssh, bindingRequestType), followNow(t, ssh, bindingType)
	for i := range 20 {
		key := fmt.Sprintf("sshkey-SHA256:%d", i)
		if got := queryIDs(t, ssh, bindingRequestType, `{"key": {"$eq": "`+key+`"}}`); len(got) > 0 {
			t.Errorf("requests at first: %v", got)
		}
		random := make([]byte, 16)
		rand.Read(random)
		code := base64.RawURLEncoding.EncodeToString(random)
		request := &session.SessionBindingRequest{
			Protocol: "ssh", Key: key, CreatedAt: timestamppb.Now(), ExpiresAt: timestamppb.New(time.Now().Add(15 * time.Minute)),
			Details: map[string]string{"Source Address": "192.0.2.1"},
		}
		put(t, ssh, newRecord(bindingRequestType, code, request))
		if change := requests.change(); change.Id != code {
			t.Fatalf("got %v", change)
		}
		same(t, "requests by key", queryIDs(t, ssh, bindingRequestType, `{"key": {"$eq": "`+key+`"}}`), []string{code})

		// In the browser.
		accepted := payload[*session.SessionBindingRequest](t, get(t, browser, bindingRequestType, code))
		same(t, "request", accepted, request)
		wantAbsent(t, browser, identityBindingType, key)
		accepted.State = session.SessionBindingRequestState_Accepted
		go func() {
			_, err := browser.Put(t.Context(), &databroker.PutRequest{Records: []*databroker.Record{
				newRecord(identityBindingType, key, &session.IdentityBinding{Protocol: "ssh", UserId: "u"}),
				newRecord(bindingType, key, &session.SessionBinding{Protocol: "ssh", SessionId: "s", UserId: "u"}),
				newRecord(bindingRequestType, code, accepted),
			}})
			if err != nil {
				t.Errorf("put: %v", err)
			}
		}()

		// Back at the SSH client.
		if state := payload[*session.SessionBindingRequest](t, requests.change()).State; state != session.SessionBindingRequestState_Accepted {
			t.Fatalf("state %v", state)
		}
		response, err := ssh.Get(testContext(t), &databroker.GetRequest{Type: bindingType, Id: key})
		if err != nil {
			t.Fatalf("the binding is not there yet: %v", err)
		}
		if got := payload[*session.SessionBinding](t, response.Record).SessionId; got != "s" {
			t.Errorf("session %q", got)
		}
		get(t, ssh, identityBindingType, key)
		if change := bindings.change(); change.Id != key {
			t.Errorf("got %v", change)
		}
	}

	// The session ends: all its bindings are found and revoked, those that somebody else has removed included.
	put(t, ssh, &databroker.Record{Type: sessionType, Id: "s", Data: newAny(new(session.Session)), DeletedAt: timestamppb.Now()})
	response, err := ssh.Query(testContext(t), &databroker.QueryRequest{Type: bindingType, Limit: 100000, Filter: parseFilter(t, `{"session_id": {"$eq": "s"}}`)})
	if err != nil || len(response.Records) != 20 {
		t.Fatalf("bindings: %d, %v", len(response.GetRecords()), err)
	}
	put(t, browser, deletion(bindingType, response.Records[7].Id))
	for _, record := range response.Records {
		record.DeletedAt = timestamppb.Now()
	}
	revoked, err := ssh.Patch(testContext(t), &databroker.PatchRequest{Records: response.Records})
	if err != nil || len(revoked.Records) != 19 {
		t.Errorf("revoked %d, %v", len(revoked.GetRecords()), err)
	}
	for range 20 {
		if change := bindings.change(); change.DeletedAt == nil {
			t.Errorf("got %v, want a tombstone", change)
		}
	}
	same(t, "bindings left", queryIDs(t, ssh, bindingType, ""), nil)
}

// TestAuthorizationFlow: pending authorizations are found by their state, and used once.
func TestAuthorizationFlow(t *testing.T) {
	t.Parallel()
	b := start(t)
	const pendingType = "type.googleapis.com/oauth21.PendingUpstreamAuth"
	const id = "downstream_host=app.example.com&user_id=u%2F1"
	put(t, b, newRecord(pendingType, id, &oauth21.PendingUpstreamAuth{StateId: "state", UserId: "u/1", PkceVerifier: "secret"}))
	found := query(t, b, pendingType, `{"state_id": "state"}`).Records
	if len(found) != 1 || payload[*oauth21.PendingUpstreamAuth](t, found[0]).PkceVerifier != "secret" {
		t.Fatalf("found %v", found)
	}
	for range 2 { // the second time it is gone already
		put(t, b, &databroker.Record{Type: pendingType, Id: id, Data: newAny(new(oauth21.PendingUpstreamAuth)), DeletedAt: timestamppb.Now()})
		same(t, "found", queryIDs(t, b, pendingType, `{"state_id": "state"}`), nil)
	}
}

// follower is a Pomerium node that replicates from us: contract 5.9. Its own store is a map.
type follower struct {
	leader     client
	checkpoint *databroker.Versions
	records    map[string]*databroker.Record
	options    map[string]*databroker.Options
	cleared    int
	waiting    chan struct{} // gets something when a stream that waits has begun
}

// run replicates until it has a record with the given id, and what came before it.
func (f *follower) run(ctx context.Context, last string) error {
	for ctx.Err() == nil {
		err := f.sync(ctx, false, last)
		if errors.Is(err, io.EOF) { // it has caught up
			err = f.sync(ctx, true, last)
		}
		switch {
		case errors.Is(err, errFound):
			return nil
		case !isCode(err, codes.Aborted):
			return fmt.Errorf("sync: %w", err)
		}
		latest, err := readLatest(ctx, f.leader, "")
		if err != nil {
			return fmt.Errorf("sync latest: %w", err)
		}
		f.cleared++
		f.records = recordsByKey(latest.records)
		f.options = make(map[string]*databroker.Options)
		for _, typed := range latest.options {
			f.setOptions(typed)
		}
		f.checkpoint = latest.versions
		if contains(latest.records, func(r *databroker.Record) bool { return r.Id == last }) {
			return nil
		}
	}
	return ctx.Err()
}

var errFound = errors.New("found")

func (f *follower) setOptions(typed *databroker.TypedOptions) {
	if proto.Size(typed.Options) == 0 {
		delete(f.options, typed.TypeURL)
	} else {
		f.options[typed.TypeURL] = typed.Options
	}
}

func (f *follower) sync(ctx context.Context, wait bool, last string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := f.leader.Sync(ctx, &databroker.SyncRequest{
		ServerVersion: f.checkpoint.ServerVersion, RecordVersion: f.checkpoint.LatestRecordVersion, Wait: &wait,
	})
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if err != nil {
			return err
		}
		if wait {
			select {
			case f.waiting <- struct{}{}:
			default: // it is known already
			}
		}
		switch response := response.Response.(type) {
		case *databroker.SyncResponse_Options:
			f.setOptions(response.Options)
		case *databroker.SyncResponse_Record:
			fold(f.records, response.Record)
			f.checkpoint.LatestRecordVersion = response.Record.Version
			if response.Record.Id == last {
				return errFound
			}
		}
	}
}

// TestFollower: a node that replicates has all records and all options, from nothing, from a checkpoint, on
// another replica, and after Clear.
func TestFollower(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	f := &follower{leader: b.Replicas[1], checkpoint: new(databroker.Versions), waiting: make(chan struct{}, 1)}
	round := 0
	follow := func(what string, cleared int, during ...func()) {
		t.Helper()
		round++
		last := fmt.Sprint("last ", round)
		select {
		case <-f.waiting: // of an earlier round
		default:
		}
		ctx := testContext(t)
		done := make(chan error, 1)
		go func() { done <- f.run(ctx, last) }()
		for _, change := range during {
			select {
			case <-f.waiting:
			case <-ctx.Done():
				t.Fatalf("%s: it does not follow", what)
			}
			change()
		}
		put(t, b, thing(last, ""))
		if err := <-done; err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		latest := syncLatest(t, b, "")
		same(t, what+": records", f.records, recordsByKey(latest.records))
		options := make(map[string]*databroker.Options)
		for _, typed := range latest.options {
			options[typed.TypeURL] = typed.Options
		}
		same(t, what+": options", f.options, options)
		if f.cleared != cleared {
			t.Errorf("%s: it has started over %d times, want %d", what, f.cleared, cleared)
		}
	}
	put(t, b, thing("a", ""), newRecord(userType, "u", new(user.User)))
	setOptions(t, b, "example.com/NoRecords", &databroker.Options{Capacity: proto.Uint64(3)})
	follow("from nothing", 1)
	put(t, b, thing("a", "again"), deletion(userType, "u"))
	follow("from a checkpoint", 1)
	setOptions(t, b, "example.com/NoRecords", &databroker.Options{Capacity: proto.Uint64(4)})
	setOptions(t, b, userType, &databroker.Options{Ttl: durationpb.New(time.Hour)})
	follow("after options have changed", 1)
	// That a type has options no more is news on an open stream, and nothing that the start of one could tell.
	follow("while options are removed", 1, func() { setOptions(t, b, "example.com/NoRecords", nil) })
	f.leader = startMore(t, b)
	follow("on another replica", 1)
	clearAll(t, b)
	put(t, b, thing("b", ""))
	follow("after Clear", 2)
	f.checkpoint = new(databroker.Versions)
	follow("without a checkpoint", 3)
	// The node that leads does not mind who else keeps a checkpoint.
	if _, err := b.Checkpoints.SetCheckpoint(testContext(t), &databroker.SetCheckpointRequest{Checkpoint: new(databroker.Checkpoint)}); err != nil {
		t.Errorf("set checkpoint: %v", err)
	}
}

// TestLeaser: the job passes to another process when its holder stops, and when it stalls.
func TestLeaser(t *testing.T) {
	t.Parallel()
	database := dbtest.New(t)
	clock := newClock(t, database)
	b := startOn(t, database, 2)
	const ttl = 30 * time.Second
	first := acquire(t, b.Replicas[0], "identity_manager", ttl)
	for range 5 {
		clock.advance(ttl / 2)
		wantTaken(t, b.Replicas[1], "identity_manager")
		if err := renew(t, b.Replicas[0], "identity_manager", first, ttl); err != nil {
			t.Fatalf("renew: %v", err)
		}
	}
	clock.advance(ttl + time.Second) // it stalls
	second := acquire(t, b.Replicas[1], "identity_manager", ttl)
	wantStatus(t, renew(t, b.Replicas[0], "identity_manager", first, ttl), codes.AlreadyExists, "lease no longer held")
	release(t, b.Replicas[0], "identity_manager", first) // on its way out
	wantTaken(t, b.Replicas[0], "identity_manager")
	release(t, b.Replicas[1], "identity_manager", second)
	acquire(t, b.Replicas[0], "identity_manager", ttl)
}
