package invariants

import (
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/db"
	"pgbroker/db/dbtest"
	"pgbroker/proto/databroker"
)

// poolerModes are the ways a PgBouncer may be set up, as far as they matter here.
func poolerModes(t *testing.T) map[string]map[string]string {
	t.Helper()
	modes := map[string]map[string]string{
		"transaction": {"pool_mode": "transaction", "default_pool_size": "4"},
		"session":     {"pool_mode": "session", "default_pool_size": "40"},
	}
	if dbtest.PgBouncerPrepares(t) {
		for _, name := range []string{"transaction", "session"} {
			prepared := map[string]string{"max_prepared_statements": "100"}
			for key, value := range modes[name] {
				prepared[key] = value
			}
			modes[name]["max_prepared_statements"] = "0"
			modes[name+", prepared"] = prepared
		}
	}
	return modes
}

// serveAs makes a role that serves, without any other right, and returns the connection string of the server as this role.
func serveAs(t *testing.T, p *dbtest.Postgres) string {
	t.Helper()
	p.Exec("CREATE ROLE app LOGIN PASSWORD '" + dbtest.Password + "'")
	p.Exec(ask[string](t, p, `SELECT string_agg(g, E'\n') FROM pgbroker.grants(reader => NULL, writer => NULL, server => 'app') AS g`))
	u, err := url.Parse(p.ConnString())
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword("app", dbtest.Password)
	return u.String()
}

// TestThroughPoolers serves through each kind of pooler with no other setting than that there is one: writers, readers and
// streams go on through a pause, a reload and restarts of the pooler, and a restart of PostgreSQL behind it. What fails is
// Unavailable; nothing that was acknowledged is lost, and nobody has to start over.
func TestThroughPoolers(t *testing.T) {
	t.Parallel()
	for name, settings := range poolerModes(t) {
		for _, direct := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, direct listener %t", name, direct), func(t *testing.T) {
				t.Parallel()
				p := newPrimary(t)
				as := serveAs(t, p)
				b := dbtest.StartPgBouncer(t, as, settings)
				config := db.Config{ConnString: b.ConnString(), Pooler: true}
				if direct {
					config.ListenerConnString = as
				}
				w := newQuietWorldWith(t, 2, config)
				w.strict = true
				for i := range 4 {
					w.addFollower(w.replicas[i%2])
				}
				w.write()
				w.more(200)
				w.observed()

				// In session mode a pause waits for the sessions to end, and the listener's does not.
				if direct || settings["pool_mode"] == "transaction" {
					paused := make(chan struct{})
					go func() { defer close(paused); b.Pause() }()
					if settings["pool_mode"] == "session" {
						for _, r := range w.replicas {
							r.DB.Reset()
						}
					}
					<-paused
					b.Resume()
					w.more(100)
					w.observed()
				}
				b.Reload(settings)
				w.more(100)
				b.Stop()
				b.Start()
				w.more(100)
				b.Kill()
				b.Start()
				w.more(100)
				p.Stop()
				p.Restart()
				w.more(100)
				p.Kill()
				p.Restart()
				w.more(100)
				w.observed()
				w.end(p)
				w.expectNoLoss()
				listening := w.replicas[0].Server.FeedStats().Listening
				if want := direct || settings["pool_mode"] == "session"; listening != want {
					t.Errorf("listening: %t, want %t", listening, want)
				}
				said := strings.Count(w.log.String(), "pooler in transaction mode")
				if want := !direct && settings["pool_mode"] == "transaction"; want != (said > 0) || said > len(w.replicas) {
					t.Errorf("the log says %d times that there is nothing to listen to", said)
				}
			})
		}
	}
}

// TestPausedPoolerIsUnavailable: what waits for a paused pooler, or a frozen server, until its time is over fails as
// Unavailable.
func TestPausedPoolerIsUnavailable(t *testing.T) {
	t.Parallel()
	p := newPrimary(t)
	b := dbtest.StartPgBouncer(t, p.ConnString(), map[string]string{"pool_mode": "transaction"})
	for _, tt := range []struct {
		name         string
		config       db.Config
		stop, resume func()
	}{
		{"paused pooler", db.Config{ConnString: b.ConnString(), Pooler: true, ListenerConnString: p.ConnString()}, b.Pause, b.Resume},
		{"frozen server", db.Config{ConnString: p.ConnString()}, p.Freeze, p.Thaw},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newQuietWorldWith(t, 1, tt.config)
			r := w.replicas[0]
			w.put(r, newValue("before", "x"))
			tt.stop()
			resume := tt.resume
			defer func() { resume() }()
			failed := make(chan error)
			calls := []func() error{
				func() error {
					_, err := r.Put(w.ctx, &databroker.PutRequest{Records: []*databroker.Record{newValue("x", "y")}})
					return err
				},
				func() error {
					_, err := r.Get(w.ctx, &databroker.GetRequest{Type: worldType, Id: "before"})
					return err
				},
				func() error {
					_, err := r.Query(w.ctx, &databroker.QueryRequest{Type: worldType, Limit: 1})
					return err
				},
			}
			for i := range 30 { // more than there are connections, and more than one batch of writes
				go func() {
					time.Sleep(time.Duration(i) * 100 * time.Millisecond)
					start := time.Now()
					err := calls[i%len(calls)]()
					if took := time.Since(start); took > 10*time.Second {
						err = fmt.Errorf("it took %v, so that Pomerium has given up: %v", took, err) //nolint:errorlint // it is not Unavailable
					}
					failed <- err
				}()
			}
			for range 30 {
				if err := <-failed; status.Code(err) != codes.Unavailable {
					t.Errorf("got %v, want Unavailable", err)
				}
			}
			r.AwaitHealth(t, grpc_health_v1.HealthCheckResponse_NOT_SERVING)
			tt.resume()
			resume = func() {}
			r.AwaitHealth(t, grpc_health_v1.HealthCheckResponse_SERVING)
			start := time.Now()
			w.put(r, newValue("after", "x"))
			t.Logf("written after %v", time.Since(start))
		})
	}
}

// TestFenceBehindAPooler points a pooler from the new primary back to the old one, which takes writes, without an error on
// any connection: no statement reads or writes there.
func TestFenceBehindAPooler(t *testing.T) {
	t.Parallel()
	primary := newPrimary(t)
	standby := newStandby(primary)
	settings := map[string]string{"pool_mode": "transaction"}
	b := dbtest.StartPgBouncer(t, primary.ConnString(), settings)
	w := newQuietWorldWith(t, 1, db.Config{ConnString: b.ConnString(), Pooler: true})
	r := w.replicas[0]
	w.put(r, newValue("a", "on the first"))
	standby.CatchUp(primary)
	standby.Detach()
	standby.Promote()
	b.Lead(standby.ConnString(), settings)
	w.put(r, newValue("a", "on the second"))
	before := latestVersionOf(t, primary)
	if latestVersionOf(t, standby) <= before {
		t.Fatal("the pooler does not lead to the new primary")
	}

	b.Lead(primary.ConnString(), settings)
	for range 20 {
		if _, err := r.Put(w.ctx, &databroker.PutRequest{Records: []*databroker.Record{newValue("b", "in the past")}}); status.Code(err) != codes.Unavailable {
			t.Errorf("put: got %v, want Unavailable", err)
		}
		if got, err := r.Get(w.ctx, &databroker.GetRequest{Type: worldType, Id: "a"}); status.Code(err) != codes.Unavailable {
			t.Errorf("get: got %v, %v, want Unavailable", got, err)
		}
		// Transactions of several statements.
		if got, err := r.Clear(w.ctx, new(emptypb.Empty)); status.Code(err) != codes.Unavailable {
			t.Errorf("clear: got %v, %v, want Unavailable", got, err)
		}
	}
	if after := latestVersionOf(t, primary); after != before {
		t.Errorf("the old primary has new changes, up to %d instead of %d", after, before)
	}
	if !strings.Contains(w.log.String(), "refused a connection to postgres") {
		t.Error("the log does not say that the server is refused")
	}
	b.Lead(standby.ConnString(), settings)
	w.put(r, newValue("a", "on the second again"))
}
