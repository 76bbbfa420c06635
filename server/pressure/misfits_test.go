package pressure

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"pgbroker/proto/databroker"
	"pgbroker/server"
	"pgbroker/server/servertest"
)

// TestRecordsAboveTheLimit: a record that a replica cannot deliver, because the limit is lower than it was when the record came,
// ends no stream and hides no other record. Clients have it no longer; log and metric name it.
func TestRecordsAboveTheLimit(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	metrics, log := prometheus.NewRegistry(), new(logBook)
	b := servertest.New(t, servertest.Options{}) // with the usual limit
	low := servertest.Start(t, b.Database.ServerConnString, servertest.Options{Configure: withMetrics(metrics, func(c *server.Config) {
		c.MaxMessageSize = limit
		c.Logger = slog.New(slog.NewTextHandler(log, nil))
	})})
	put(t, b, thing("a", 1), thing("b", 1), thing("c", limit-4<<10-100))
	ctx := testContext(t)
	from := present(t, low)
	stream := follow(ctx, t, low.Conn, from)
	put(t, b, thing("b", limit), thing("d", 1))

	// A client that has the record from before does not keep it.
	if record, err := nextRecord(stream); err != nil || record.Id != "b" || record.DeletedAt == nil || record.Data != nil {
		t.Errorf("%.100v, %v", record, err)
	}
	if record, err := nextRecord(stream); err != nil || record.Id != "d" {
		t.Errorf("%.100v, %v", record, err)
	}
	// From the start, too: what was there before, it may get or not.
	from.RecordVersion = 0
	stream = follow(ctx, t, low.Conn, from)
	copied := make(map[string]bool)
	for !copied["d"] {
		record, err := nextRecord(stream)
		if err != nil {
			t.Fatal(err)
		}
		copied[record.Id] = record.DeletedAt == nil
	}
	if !copied["a"] || copied["b"] || !copied["c"] {
		t.Errorf("a client has %v", copied)
	}
	for _, recordType := range []string{"", "t"} {
		if got := strings.Join(latestIDs(t, low, recordType), " "); got != "a c d" {
			t.Errorf("SyncLatest of %q: %s", recordType, got)
		}
	}
	found, err := low.Query(ctx, &databroker.QueryRequest{Type: "t", Limit: 10})
	if err != nil || len(found.Records) != 3 || found.TotalCount != 4 {
		t.Errorf("Query: %d of %d records, %v", len(found.GetRecords()), found.GetTotalCount(), err)
	}
	_, err = low.Get(ctx, &databroker.GetRequest{Type: "t", Id: "b"})
	wantStatus(t, err, codes.ResourceExhausted, "the record is too large: at most 65536 bytes (max_message_size)")
	get(t, low, "c")
	get(t, b, "b")

	if lines := log.lines("larger than max_message_size", "type=t", "id=b"); len(lines) != 1 {
		t.Errorf("%d lines: %v", len(lines), lines)
	}
	if bytes, ok := metric(t, metrics, "pgbroker_misfit_bytes", "type=t", "id=b", "reason=too_large"); !ok || bytes < limit {
		t.Errorf("metric: %v, %v", bytes, ok)
	}
	if n, _ := metric(t, metrics, "pgbroker_misfits_total", "reason=too_large"); n < 5 {
		t.Errorf("%v deliveries were counted", n)
	}

	// It can be replaced and deleted.
	put(t, low, thing("b", 1))
	get(t, low, "b")
}

// latestIDs returns the ids that SyncLatest sends, which must not fail.
func latestIDs(t *testing.T, client databroker.DataBrokerServiceClient, recordType string) (ids []string) {
	t.Helper()
	stream, err := client.SyncLatest(testContext(t), &databroker.SyncLatestRequest{Type: recordType})
	if err != nil {
		t.Fatal(err)
	}
	for {
		response, err := stream.Recv()
		if err != nil {
			t.Fatalf("SyncLatest: %v", err)
		}
		if record := response.GetRecord(); record != nil {
			ids = append(ids, record.Id)
		}
		if response.GetVersions() != nil {
			return ids
		}
	}
}

// TestPayloadsThatAreNone: bytes that are no message, or hold text that is no UTF-8, reach clients as a record without a payload.
func TestPayloadsThatAreNone(t *testing.T) {
	t.Parallel()
	metrics, log := prometheus.NewRegistry(), new(logBook)
	b := servertest.New(t, servertest.Options{Configure: withMetrics(metrics, func(c *server.Config) {
		c.Logger = slog.New(slog.NewTextHandler(log, nil))
	})})
	stream := follow(testContext(t), t, b.Conn, present(t, b))
	latin1 := append([]byte{0x0a, 4}, "caf\xe9"...) // the URL of the type
	for id, payload := range map[string][]byte{"noise": bytes.Repeat([]byte{0xff}, 100), "text": latin1} {
		b.Database.Exec(t, "INSERT INTO pgbroker.records (type, id, payload) VALUES ('t', $1, $2)", id, payload)
		for range 30 {
			get(t, b, id)
			latestIDs(t, b, "t")
		}
		if record, err := nextRecord(stream); err != nil || record.Id != id || record.Data != nil || record.DeletedAt != nil {
			t.Errorf("%v, %v", record, err)
		}
		if lines := log.lines("is not a serialized google.protobuf.Any", "id="+id); len(lines) != 1 {
			t.Errorf("%d lines", len(lines))
		}
		if _, ok := metric(t, metrics, "pgbroker_misfit_bytes", "id="+id, "reason=malformed"); !ok {
			t.Error("the metric does not name the record")
		}
	}
}

// TestTheMetricOfMisfitsIsBounded: however many records there are that cannot be delivered.
func TestTheMetricOfMisfitsIsBounded(t *testing.T) {
	t.Parallel()
	metrics, log := prometheus.NewRegistry(), new(logBook)
	b := servertest.New(t, servertest.Options{Configure: withMetrics(metrics, func(c *server.Config) {
		c.Logger = slog.New(slog.NewTextHandler(log, nil))
	})})
	b.Database.Exec(t, `INSERT INTO pgbroker.records (type, id, payload) SELECT 't', 'noise' || g, '\xffff' FROM generate_series(1, 500) g`)
	if got := len(latestIDs(t, b, "t")); got != 500 {
		t.Errorf("%d records", got)
	}
	series := 0
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() == "pgbroker_misfit_bytes" {
			series = len(family.Metric)
		}
	}
	if series != 20 {
		t.Errorf("%d series", series)
	}
	if lines := log.lines("noise"); len(lines) == 0 || len(lines) > 20 {
		t.Errorf("%d lines", len(lines))
	}
}
