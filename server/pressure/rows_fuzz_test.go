package pressure

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/registry"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// script is a list of statements, written as bytes.
type script []byte

func (s *script) number(limit int) int {
	if len(*s) == 0 {
		return 0
	}
	n := int((*s)[0])
	*s = (*s)[1:]
	return n % limit
}

// bytes takes some bytes, often as many as there are before a mark.
func (s *script) bytes() []byte {
	n := min(s.number(256), len(*s))
	taken := (*s)[:n]
	*s = (*s)[n:]
	return taken
}

// text takes text that Postgres can hold: whatever else it is.
func (s *script) text() string {
	odd := []string{
		"", "type.googleapis.com/session.Session", "t", " ", "%", "\u0301e", "é", "\U0001F9EA", "\u202e", "\x01", strings.Repeat("\U0010FFFF", 500),
		strings.Repeat("x", 70_000), "pgbroker-maintenance", "\ufeff", "'; --", "\x1f",
	}
	if n := s.number(2 * len(odd)); n < len(odd) {
		return odd[n]
	}
	return strings.ReplaceAll(strings.ToValidUTF8(string(s.bytes()), "?"), "\x00", "")
}

func (s *script) int64() int64 {
	odd := []int64{0, 1, -1, math.MaxInt64, math.MinInt64, math.MaxInt32, math.MinInt32, 1 << 53}
	if n := s.number(2 * len(odd)); n < len(odd) {
		return odd[n]
	}
	var b [8]byte
	copy(b[:], s.bytes())
	return int64(binary.LittleEndian.Uint64(b[:]))
}

func (s *script) time() string {
	return []string{"infinity", "-infinity", "4713-01-01 BC", "294276-12-31", "now", "epoch", "2030-01-01"}[s.number(7)]
}

func (s *script) interval() *string {
	odd := []string{
		"1 second", "-1 second", "0", "1 month", "178000000 years", "-178000000 years", "1 microsecond", "2147483647 days",
		"infinity", // not before Postgres 17
	}
	if n := s.number(len(odd) + 1); n < len(odd) {
		return &odd[n]
	}
	return nil
}

// run executes the script. Statements that are refused are as good as those that are not.
func (s *script) run(ctx context.Context, conn *pgx.Conn) error {
	for len(*s) > 0 && ctx.Err() == nil {
		var err error
		switch s.number(16) {
		case 0, 1:
			_, err = conn.Exec(ctx, "INSERT INTO pgbroker.records (type, id, payload) VALUES ($1, $2, $3)", s.text(), s.text(), s.bytes())
		case 2:
			_, err = conn.Exec(ctx, "INSERT INTO pgbroker.records (type, id, data) VALUES ($1, $2, $3::text::jsonb)", s.text(), s.text(), s.text())
		case 3:
			_, err = conn.Exec(ctx, "INSERT INTO pgbroker.records (type, id, payload, data) VALUES ($1, $2, $3, jsonb_build_object($4::text, $5::text))",
				s.text(), s.text(), s.bytes(), s.text(), s.text())
		case 4:
			_, err = conn.Exec(ctx, "UPDATE pgbroker.records SET payload = $2 WHERE type = $1", s.text(), s.bytes())
		case 5:
			_, err = conn.Exec(ctx, "UPDATE pgbroker.records SET data = coalesce(data, '{}') || jsonb_build_object($2::text, $3::text) WHERE type = $1",
				s.text(), s.text(), s.text())
		case 6:
			_, err = conn.Exec(ctx, "DELETE FROM pgbroker.records WHERE type = $1", s.text())
		case 7:
			_, err = conn.Exec(ctx, "TRUNCATE pgbroker.records")
		case 8:
			_, err = conn.Exec(ctx, `INSERT INTO pgbroker.record_types (type, capacity, ttl, indexable_fields) VALUES ($1, $2, $3::text::interval, ARRAY[$4::text])
				ON CONFLICT (type) DO UPDATE SET capacity = excluded.capacity, ttl = excluded.ttl, indexable_fields = excluded.indexable_fields`,
				s.text(), s.int64(), s.interval(), s.text())
		case 9:
			_, err = conn.Exec(ctx, `INSERT INTO pgbroker.services (kind, endpoint, reported_at, expires_at) VALUES ($1, $2, $3::text::timestamptz, $4::text::timestamptz)
				ON CONFLICT (kind, endpoint) DO UPDATE SET expires_at = excluded.expires_at`, int32(s.int64()), s.text(), s.time(), s.time())
		case 10:
			_, err = conn.Exec(ctx, `INSERT INTO pgbroker.leases (name, id, expires_at) VALUES ($1, $2, $3::text::timestamptz)
				ON CONFLICT (name) DO UPDATE SET id = excluded.id, expires_at = excluded.expires_at`, s.text(), s.text(), s.time())
		case 11:
			_, err = conn.Exec(ctx, "INSERT INTO pgbroker.schemas (name, descriptor_set) VALUES ($1, $2)", s.text(), s.bytes())
		case 12:
			_, err = conn.Exec(ctx, "INSERT INTO pgbroker.redacted_fields (message, field) VALUES ($1, $2)", s.text(), s.text())
		case 13:
			_, err = conn.Exec(ctx, "SELECT pg_notify($1, $2)", []string{"pgbroker_changes", "pgbroker_services"}[s.number(2)], s.text())
		case 14: // past all triggers, as a restore does
			err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
				_, err := tx.Exec(ctx, "SELECT pgbroker.lock_order(), set_config('session_replication_role', 'replica', true)")
				if err == nil {
					_, err = tx.Exec(ctx, `WITH written AS (
							INSERT INTO pgbroker.records (type, id, version, payload)
							VALUES ($1, $2, nextval('pgbroker.record_version'), convert_to(repeat($3, $4), 'UTF8')) RETURNING *)
						INSERT INTO pgbroker.changes (version, type, id, changed_at, deleted) SELECT version, type, id, modified_at, false FROM written`,
						s.text(), s.text(), string(rune('a'+s.number(26))), s.number(256)<<10)
				}
				return err
			})
		case 15:
			_, err = conn.Exec(ctx, "UPDATE pgbroker.record_types SET idle_timeout = $2::text::interval, user_limit = $3, expiry_field = $4 WHERE type = $1",
				s.text(), s.interval(), int32(s.int64()), s.text())
		}
		if err != nil && conn.IsClosed() {
			return err
		}
	}
	return ctx.Err()
}

// FuzzRows: whatever is written in SQL, replicas go on. Nothing in the background panics, every stream that begins gets what is
// written next, and lists can be read.
func FuzzRows(f *testing.F) {
	f.Add([]byte("\x00\x00\x10\x00\x00\x00\x10\x01\x00\x07\x00\x00\x10"))                     // records of type "", and a TRUNCATE
	f.Add([]byte("\x0e\x02\x00\x00\xff\x0e\x02\x01\x00\x20"))                                 // a record above the limit
	f.Add([]byte("\x09\x01\x02\x00\x00\x09\x02\x03\x01\x01\x09\x03\x04\x03\x03"))             // services for ever
	f.Add([]byte("\x08\x02\x02\x08\x00\x08\x00\x03\x04\x01\x08\x01\x01\x03\x0b\x02\x02\x02")) // odd options
	f.Add([]byte("\x0a\x0c\x00\x00\x0a\x0c\x01\x03\x0b\x02\x04\xff\xff\xff\xff\x0c\x01\x02")) // leases for ever, and a schema that is none
	f.Add([]byte("\x02\x01\x02\x04\x00\x01\x02\x02\x0a\x03\x05\x01\x02\x02\x0f\x01\x04\x02\x00\x06\x01"))
	metrics := prometheus.NewRegistry()
	b := servertest.New(f, servertest.Options{Configure: func(c *server.Config) {
		c.Registerer = metrics
		c.MaxMessageSize = 64 << 10
		c.MaintenanceInterval = 10 * time.Millisecond
		c.PollInterval = 50 * time.Millisecond
	}})
	n := 0
	f.Fuzz(func(t *testing.T, written []byte) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		conn, err := pgx.Connect(ctx, b.Database.AdminConnString)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.WithoutCancel(ctx))
		s := script(written)
		if err := s.run(ctx, conn); err != nil {
			t.Fatal(err)
		}
		latest, err := b.SyncLatest(ctx, new(databroker.SyncLatestRequest))
		if err != nil {
			t.Fatal(err)
		}
		var versions *databroker.Versions
		for versions == nil {
			response, err := latest.Recv()
			if err != nil {
				t.Fatalf("SyncLatest: %v", err)
			}
			versions = response.GetVersions()
		}
		// What others may just have left to be expired or evicted is not what is asked about.
		n++
		record := &databroker.Record{Type: "sentinel", Id: fmt.Sprint(n)}
		if _, err := b.Put(ctx, &databroker.PutRequest{Records: []*databroker.Record{record}}); err != nil {
			t.Fatalf("Put: %v", err)
		}
		for _, recordType := range []string{"", "sentinel"} {
			stream, err := b.Sync(ctx, &databroker.SyncRequest{ServerVersion: versions.ServerVersion, RecordVersion: versions.LatestRecordVersion, Type: recordType})
			if err != nil {
				t.Fatal(err)
			}
			for {
				found, err := nextRecord(stream)
				if err != nil {
					t.Fatalf("Sync of %q: %v", recordType, err)
				}
				if found.Type == "sentinel" && found.Id == record.Id {
					break
				}
			}
		}
		services, err := b.Registry.Watch(ctx, new(registry.ListRequest))
		if err == nil {
			_, err = services.Recv()
		}
		if err != nil {
			t.Fatalf("Watch: %v", err)
		}
		if _, err := b.ListTypes(ctx, new(emptypb.Empty)); err != nil {
			t.Fatalf("ListTypes: %v", err)
		}
		if _, err := b.Query(ctx, &databroker.QueryRequest{Limit: 100}); err != nil {
			t.Fatalf("Query: %v", err)
		}
		// The periodic work is done, to the end, whoever has taken its lease in SQL.
		asked := time.Now()
		await(t, "the periodic work", func() bool {
			age, ok := metric(t, metrics, "pgbroker_maintenance_age_seconds")
			return ok && age < time.Since(asked).Seconds()
		})
		families, err := metrics.Gather()
		if err != nil {
			t.Fatalf("metrics: %v", err)
		}
		for _, family := range families {
			if family.GetName() != "pgbroker_background_panics_total" {
				continue
			}
			for _, m := range family.Metric {
				if m.Counter.GetValue() > 0 {
					t.Fatalf("something panicked: %v", m)
				}
			}
		}
		if _, err := conn.Exec(ctx, "TRUNCATE pgbroker.services, pgbroker.leases"); err != nil {
			t.Fatal(err)
		}
	})
}
