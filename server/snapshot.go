package server

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"pgbroker/db"
	"pgbroker/server/supervise"
)

// Bounds of a page of SyncLatest.
const (
	pageRows  = 2000
	pageBytes = 2 << 20
)

// How long SyncLatest holds on to a snapshot, and with it to a connection: until a client is slow to take
// a page, and in all. The client then goes on from a newer snapshot: what has changed in between it may
// get now and gets again from Sync. Variables for tests.
var (
	maxSendTime    = time.Second
	maxSnapshotAge = 30 * time.Second
)

// snapshot is a view of the database in which all reads see the same state, as long as it lasts. It is
// opened when it is read, and again after close. But for close, it is used by one goroutine.
type snapshot struct {
	db         *lane
	supervisor *supervise.Supervisor

	rows int32 // of the next page

	mu     sync.Mutex // protects what follows; held while reading
	tx     pgx.Tx     // nil while closed
	opened time.Time
	ahead  *nextPage // nil if none has been asked for
}

// nextPage is a page that is read while the one before it is sent.
type nextPage struct {
	from  key
	done  chan struct{} // closed when the read has ended
	valid bool          // it has been read, and is still wanted; protected by snapshot.mu, as page is
	page  []db.RecordsPageRow
}

func (s *Server) newSnapshot() *snapshot {
	return &snapshot{db: s.lanes.snapshots, supervisor: s.supervisor, rows: pageRows}
}

// state returns the versions and the options of all types.
func (s *snapshot) state(ctx context.Context) (state db.StateGetRow, options []db.OptionsListRow, err error) {
	err = s.read(ctx, func(queries *db.Queries) (err error) {
		if state, err = queries.StateGet(ctx); err == nil {
			options, err = queries.OptionsList(ctx)
		}
		return err
	})
	return state, options, err
}

// page returns the records of a type, or of all types, from a key on; none at the end.
func (s *snapshot) page(ctx context.Context, recordType string, from key) (page []db.RecordsPageRow, err error) {
	if page, ok := s.takeAhead(from); ok {
		return page, nil
	}
	err = s.read(ctx, func(queries *db.Queries) (err error) {
		page, err = readPage(ctx, queries, recordType, from, s.rows)
		return err
	})
	return page, err
}

func readPage(ctx context.Context, queries *db.Queries, recordType string, from key, limit int32) ([]db.RecordsPageRow, error) {
	if recordType == "" {
		return queries.RecordsPage(ctx, db.RecordsPageParams{
			FromType: from.recordType, FromID: from.id, MaxRows: limit, MaxBytes: pageBytes,
		})
	}
	rows, err := queries.RecordsPageOfType(ctx, db.RecordsPageOfTypeParams{
		Type: recordType, FromID: from.id, MaxRows: limit, MaxBytes: pageBytes,
	})
	return convertRows(rows, func(r db.RecordsPageOfTypeRow) db.RecordsPageRow { return db.RecordsPageRow(r) }), err
}

// readAhead begins to read the page that will be asked for next. A client that turns out to be slow loses it with the
// snapshot.
func (s *snapshot) readAhead(ctx context.Context, recordType string, from key) {
	next := &nextPage{from: from, done: make(chan struct{})}
	limit := s.rows
	s.mu.Lock()
	s.ahead = next
	s.mu.Unlock()
	go func() {
		defer close(next.done)
		defer s.supervisor.Recover(ctx, "page of SyncLatest") // the read that follows meets the same, and says so
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.tx == nil || s.ahead != next {
			return
		}
		page, err := readPage(ctx, db.New(s.tx), recordType, from, limit)
		if err != nil {
			return // the read that follows meets the same, and says so
		}
		next.page, next.valid = page, true
	}()
}

// takeAhead returns the page from a key on that was read ahead, if there is one.
func (s *snapshot) takeAhead(from key) (page []db.RecordsPageRow, ok bool) {
	s.mu.Lock()
	next := s.ahead
	s.mu.Unlock()
	if next == nil {
		return nil, false
	}
	<-next.done
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ahead = nil
	return next.page, next.valid && next.from == from
}

// pace sets the size of the next page by what a client has taken of the one before, and whether that was too much for it.
func (s *snapshot) pace(taken int, tooMuch bool) {
	if tooMuch {
		s.rows = int32(max(taken, 1))
		return
	}
	s.rows = min(2*s.rows, pageRows)
}

func (s *snapshot) read(ctx context.Context, read func(*db.Queries) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tx != nil && time.Since(s.opened) > maxSnapshotAge {
		s.closeLocked()
	}
	if s.tx == nil {
		if err := s.openLocked(ctx); err != nil {
			return fmt.Errorf("open a snapshot: %w", err)
		}
	}
	if err := read(db.New(s.tx)); err != nil {
		return fmt.Errorf("read records: %w", err)
	}
	return nil
}

func (s *snapshot) openLocked(ctx context.Context) error {
	tx, err := s.db.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return err
	}
	s.tx, s.opened = tx, time.Now()
	return nil
}

// close ends the snapshot and gives its connection back, and what was read ahead with it. It may be called at any time, from
// any goroutine, and waits for a read that is under way.
func (s *snapshot) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ahead != nil {
		s.ahead.valid, s.ahead.page = false, nil
	}
	s.closeLocked()
}

// end closes the snapshot for good: nothing is read any more when it returns.
func (s *snapshot) end() {
	s.takeAhead(key{})
	s.close()
}

func (s *snapshot) closeLocked() {
	if s.tx == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = s.tx.Rollback(ctx) // it has only read; a connection that cannot even do this is not used again
	s.tx = nil
}
