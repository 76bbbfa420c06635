package server

import (
	"context"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"pgbroker/db"
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
// opened when it is read, and again after close.
type snapshot struct {
	db    *db.DB
	slots chan struct{} // bounds the open snapshots, so that other requests find connections

	mu     sync.Mutex // protects what follows; held while reading
	tx     pgx.Tx     // nil while closed
	opened time.Time
}

func (s *Server) newSnapshot() *snapshot { return &snapshot{db: s.db, slots: s.snapshots} }

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
	err = s.read(ctx, func(queries *db.Queries) (err error) {
		if recordType == "" {
			page, err = queries.RecordsPage(ctx, db.RecordsPageParams{
				FromType: from.recordType, FromID: from.id, MaxRows: pageRows, MaxBytes: pageBytes,
			})
			return err
		}
		rows, err := queries.RecordsPageOfType(ctx, db.RecordsPageOfTypeParams{
			Type: recordType, FromID: from.id, MaxRows: pageRows, MaxBytes: pageBytes,
		})
		page = convertRows(rows, func(r db.RecordsPageOfTypeRow) db.RecordsPageRow { return db.RecordsPageRow(r) })
		return err
	})
	return page, err
}

// pages returns the records of a type, or of all types, page by page in the order of their keys. While one page is used the
// next is read.
func (s *snapshot) pages(ctx context.Context, recordType string) iter.Seq2[[]db.RecordsPageRow, error] {
	type result struct {
		page []db.RecordsPageRow
		err  error
	}
	return func(yield func([]db.RecordsPageRow, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		next := make(chan result, 1)
		var reading sync.WaitGroup
		defer reading.Wait() // or it could open the snapshot again that the caller closes
		defer cancel()
		read := func(from key) {
			reading.Go(func() {
				page, err := s.page(ctx, recordType, from)
				next <- result{page, err}
			})
		}
		for read(key{recordType: recordType}); ; {
			r := <-next
			if r.err != nil {
				yield(nil, r.err)
				return
			}
			if len(r.page) == 0 {
				return
			}
			last := &r.page[len(r.page)-1]
			// No text sorts between a text and the same followed by U+0001, the lowest character there is.
			read(key{last.Type, last.ID + "\x01"})
			if !yield(r.page, nil) {
				return
			}
		}
	}
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
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	tx, err := s.db.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		<-s.slots
		return err
	}
	s.tx, s.opened = tx, time.Now()
	return nil
}

// close ends the snapshot and gives its connection back. It may be called at any time, from any
// goroutine, and waits for a read that is under way.
func (s *snapshot) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeLocked()
}

func (s *snapshot) closeLocked() {
	if s.tx == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = s.tx.Rollback(ctx) // it has only read; a connection that cannot even do this is not used again
	s.tx = nil
	<-s.slots
}
