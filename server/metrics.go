package server

import (
	"context"
	"math"

	"github.com/prometheus/client_golang/prometheus"

	"pgbroker/server/supervise"
)

// metrics of a replica. docs/configuration.md lists them.
type metrics struct {
	streams    prometheus.Gauge
	delivered  prometheus.Counter
	maintained *prometheus.CounterVec
	accepted   *prometheus.CounterVec
	rejected   *prometheus.CounterVec
	panics     *prometheus.CounterVec
}

func newMetrics() *metrics {
	m := &metrics{
		streams: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "pgbroker_sync_streams", Help: "Open Sync streams.",
		}),
		delivered: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "pgbroker_sync_changes_sent_total", Help: "Changes sent on Sync streams.",
		}),
		maintained: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pgbroker_maintenance_rows_total", Help: "Rows handled by the periodic work.",
		}, []string{"job"}),
		accepted: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pgbroker_auth_accepted_total", Help: "Requests and streams that were let in, by the name of the key that signed them.",
		}, []string{"key"}),
		rejected: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pgbroker_auth_rejected_total", Help: "Requests without a valid token, or with a key that may not be used for them, by reason.",
		}, []string{"reason"}),
		panics: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pgbroker_background_panics_total", Help: "Panics of work in the background, which is then begun again; each is a bug, and logged with its stack.",
		}, []string{"task"}),
	}
	for _, task := range []string{
		"change feed", "listener", "registered services", "message types", "periodic work", "watch for blockers", "watch of notifications", "watch for problems", "watch for writing", "health", "keys",
		"encoding of a record", "page of SyncLatest", "metrics",
	} {
		m.panics.WithLabelValues(task) // a metric that is there before it is needed
	}
	return m
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.streams, m.delivered, m.maintained, m.accepted, m.rejected, m.panics}
}

// guardedCollector collects what it can: the registry asks on goroutines where nobody recovers from a panic, as one that
// metrics answer text that is no UTF-8 with.
type guardedCollector struct {
	prometheus.Collector
	supervisor *supervise.Supervisor
}

// Collect implements prometheus.Collector.
func (c guardedCollector) Collect(metrics chan<- prometheus.Metric) {
	defer c.supervisor.Recover(context.Background(), "metrics")
	c.Collector.Collect(metrics)
}

// reading is a metric that is read from somewhere else when it is asked for.
type reading struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	read func() float64
}

// readings collects metrics that other parts of the server count for themselves.
type readings []reading

func (r readings) Describe(descs chan<- *prometheus.Desc) {
	for _, reading := range r {
		descs <- reading.desc
	}
}

func (r readings) Collect(metrics chan<- prometheus.Metric) {
	for _, reading := range r {
		metrics <- prometheus.MustNewConstMetric(reading.desc, reading.kind, reading.read())
	}
}

// readings returns what other parts of the server count for themselves.
func (s *Server) readings() readings {
	feed, database := s.feed, s.db
	gauge := func(name, help string, read func() float64) reading {
		return reading{prometheus.NewDesc(name, help, nil, nil), prometheus.GaugeValue, read}
	}
	counter := func(name, help string, read func() float64) reading {
		return reading{prometheus.NewDesc(name, help, nil, nil), prometheus.CounterValue, read}
	}
	return readings{
		gauge("pgbroker_feed_record_version", "Latest record version that this replica has read.",
			func() float64 { return float64(feed.Stats().Head) }),
		gauge("pgbroker_feed_ring_bytes", "Memory held by recent changes.",
			func() float64 { return float64(feed.Stats().RingBytes) }),
		gauge("pgbroker_feed_healthy", "Whether the latest read of the change log succeeded.",
			func() float64 { return boolean(feed.Err() == nil) }),
		gauge("pgbroker_listener_connected", "Whether the database's notifications arrive.",
			func() float64 { return boolean(feed.Stats().Listening) }),
		counter("pgbroker_listener_connects_total", "Connections that the listener has opened.",
			func() float64 { return float64(feed.Stats().Connects) }),
		counter("pgbroker_feed_reads_total", "Reads of the change log for all streams.",
			func() float64 { return float64(feed.Stats().TailReads) }),
		counter("pgbroker_feed_catch_up_reads_total", "Reads of the change log for single streams that are behind the ring.",
			func() float64 { return float64(feed.Stats().TableReads) }),
		counter("pgbroker_feed_unannounced_total", "Reads that found changes although listening and not notified: lost wake-ups.",
			func() float64 { return float64(feed.Stats().Unannounced) }),
		gauge("pgbroker_maintenance_age_seconds",
			"Time since this replica has last completed a round of the periodic work, or since its start. One replica at a time does it: the least of all counts.",
			func() float64 { return s.maintenance.age().Seconds() }),
		gauge("pgbroker_notification_queue_usage",
			"How full the queue of notifications is that all databases of the server share, from 0 to 1. From 0.5 on changes are found by polling.",
			func() float64 { return math.Float64frombits(s.notifications.usage.Load()) }),
		gauge("pgbroker_writes_waiting", "Requests to write that wait for the batch under way to end.",
			func() float64 { return float64(s.writer.combiner.Waiting()) }),
		counter("pgbroker_feed_versions_lost_total", "Record versions that a failover or restore has undone after this replica had read them.",
			func() float64 { return float64(feed.Stats().VersionsLost) }),
		gauge("pgbroker_database_writable", "Whether records can be written: 0 means that nothing can be revoked.",
			func() float64 { return boolean(s.Writable() == nil) }),
		gauge("pgbroker_database_standby", "Whether the database server in use is a standby.",
			func() float64 { return boolean(s.writing.condition().Standby) }),
		gauge("pgbroker_database_standby_lag_seconds", "How far the standby in use is behind its primary, as far as it knows; 0 on a primary.",
			func() float64 { return s.writing.condition().Lag.Seconds() }),
		gauge("pgbroker_database_timeline", "Timeline of the database server in use; 0 where it is hidden.",
			func() float64 { return float64(database.Timeline()) }),
		counter("pgbroker_database_refused_connections_total", "Connections given up because the server is behind one that was seen before.",
			func() float64 { return float64(database.Refused()) }),
		counter("pgbroker_database_newer_server_found_total", "Times that another host of the connection string was newer than the server in use, which was left then.",
			func() float64 { return float64(database.NewerFound()) }),
		gauge("pgbroker_database_hosts", "Hosts that the connection strings name; 0 where one is named alone, which is not asked.",
			func() float64 { return float64(database.Hosts().Named) }),
		gauge("pgbroker_database_hosts_answering", "Hosts of the connection strings that have answered when last asked.",
			func() float64 { return float64(database.Hosts().Answering) }),
		gauge("pgbroker_database_hosts_past", "Hosts of the connection strings that answer and were left for a newer one: nobody has stopped them.",
			func() float64 { return float64(database.Hosts().Past) }),
		gauge("pgbroker_pool_connections", "Open connections to the database, without the listener's.",
			func() float64 { return float64(database.Pool.Stat().TotalConns()) }),
		gauge("pgbroker_pool_connections_in_use", "Connections to the database that are in use.",
			func() float64 { return float64(database.Pool.Stat().AcquiredConns()) }),
		gauge("pgbroker_pool_connections_max", "Bound of the connections to the database.",
			func() float64 { return float64(database.Pool.Stat().MaxConns()) }),
		counter("pgbroker_pool_waits_total", "Requests that had to wait for a connection to the database.",
			func() float64 { return float64(database.Pool.Stat().EmptyAcquireCount()) }),
		counter("pgbroker_pool_wait_seconds_total", "Time spent getting a connection to the database.",
			func() float64 { return database.Pool.Stat().AcquireDuration().Seconds() }),
	}
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
