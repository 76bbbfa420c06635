package changefeed

import "sync/atomic"

// Stats are figures of a feed, for metrics and tests.
type Stats struct {
	Head        int64 // latest record version read
	RingBytes   int   // memory held by recent changes
	Listening   bool  // whether notifications arrive
	Connects    int64 // connections that the listener has opened
	TailReads   int64 // reads of the change log for all streams
	TableReads  int64 // reads of the change log for single streams that are behind the ring
	Unannounced int64 // reads that found changes although listening and not notified
	// VersionsLost is how many versions this replica has delivered, or might have, that the database then no
	// longer had.
	VersionsLost int64
}

type stats struct {
	listening   atomic.Bool
	standby     atomic.Bool // the server read last is one
	connects    atomic.Int64
	tailReads   atomic.Int64
	tableReads  atomic.Int64
	unannounced atomic.Int64

	versionsLost atomic.Int64
}

// Stats returns the figures of the moment.
func (f *Feed) Stats() Stats {
	v := f.view.Load()
	return Stats{
		Head:        v.head,
		RingBytes:   v.bytes,
		Listening:   f.stats.listening.Load(),
		Connects:    f.stats.connects.Load(),
		TailReads:   f.stats.tailReads.Load(),
		TableReads:  f.stats.tableReads.Load(),
		Unannounced: f.stats.unannounced.Load(),

		VersionsLost: f.stats.versionsLost.Load(),
	}
}
