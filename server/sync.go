package server

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/server/changefeed"
)

// encodeChange serializes a change as the SyncResponse that every stream sends. A record that cannot be delivered is one that
// clients do not have: it goes out as a deletion, lest they keep what was there before. Nil if not even that can be made.
func (s *Server) encodeChange(row *db.ChangesAfterRow) []byte {
	ctx := s.stopping
	message := s.encodeRow(ctx, &wireRecord{row.Version, row.Type, row.ID, row.Payload, row.ChangedAt, row.Deleted})
	if message == nil && !row.Deleted {
		message = s.encodeRow(ctx, &wireRecord{row.Version, row.Type, row.ID, nil, row.ChangedAt, true})
	}
	return message
}

// Sync sends what follows a record version: options first, then changes in the order of their versions,
// and more of either as they happen. Of a record that has changed several times it may send only the
// latest change.
func (s *brokerServer) Sync(request *databroker.SyncRequest, stream grpc.ServerStreamingServer[databroker.SyncResponse]) error {
	ctx, done := s.streamContext(stream.Context())
	defer done()
	if err := checkText("type", request.Type, maxTypeBytes); err != nil {
		return err
	}
	if request.ServerVersion > math.MaxInt64 {
		return changefeed.ErrDataSetChanged
	}
	version := int64(min(request.RecordVersion, math.MaxInt64))
	cursor, err := s.feed.Open(ctx, int64(request.ServerVersion), version, request.Type)
	if err != nil {
		return s.streamError(ctx, err)
	}
	defer cursor.Close()
	s.metrics.streams.Inc()
	defer s.metrics.streams.Dec()
	wait := request.Wait == nil || *request.Wait
	options := optionsSender{
		recordType: request.Type,
		send: func(o *databroker.TypedOptions) error {
			return stream.Send(&databroker.SyncResponse{Response: &databroker.SyncResponse_Options{Options: o}})
		},
	}
	for {
		event, err := cursor.Next(ctx, wait)
		if err != nil {
			return s.streamError(ctx, err)
		}
		if event.Options != nil {
			if err := options.update(event.Options); err != nil {
				return err
			}
		}
		end := len(event.Changes) == 0 && event.Options == nil
		if err := s.sendChanges(cursor, event.Changes, stream); err != nil {
			return err
		}
		if end {
			return nil // for a stream that does not wait
		}
	}
}

// holdBytes is how much a stream may hold for a client that has stopped reading, beside what is being sent.
const holdBytes = 16 << 10

func (s *Server) sendChanges(cursor *changefeed.Cursor, changes []*changefeed.Change, stream grpc.ServerStream) error {
	size := 0
	for _, change := range changes {
		size += len(change.Message)
	}
	if len(changes) <= 1 || size <= holdBytes { // the usual case, spared the timer
		for _, change := range changes {
			if err := stream.SendMsg(encoded(change.Message)); err != nil {
				return err
			}
		}
		s.metrics.delivered.Add(float64(len(changes)))
		return nil
	}
	rest := newOutbox(changes, maxSendTime, func() {})
	defer rest.stop()
	sent := int64(0)
	for {
		change, ok := rest.next()
		if !ok {
			break
		}
		if err := stream.SendMsg(encoded(change.Message)); err != nil {
			return err
		}
		sent = change.Version
		s.metrics.delivered.Inc()
	}
	if taken, dropped := rest.stop(); dropped {
		cursor.Rewind(sent, taken)
	}
	return nil
}

// SyncLatest sends every live record in the order of types and ids, then options, and last the versions
// with which to call Sync.
func (s *brokerServer) SyncLatest(request *databroker.SyncLatestRequest, stream grpc.ServerStreamingServer[databroker.SyncLatestResponse]) error {
	ctx, done := s.streamContext(stream.Context())
	defer done()
	if err := checkText("type", request.Type, maxTypeBytes); err != nil {
		return err
	}
	snapshot := s.newSnapshot()
	defer snapshot.end()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // whatever is still being read
	state, typed, err := snapshot.state(ctx)
	if err != nil {
		return s.streamError(ctx, err)
	}
	for from := (key{recordType: request.Type}); ; {
		page, err := snapshot.page(ctx, request.Type, from)
		if err != nil {
			return s.streamError(ctx, err)
		}
		if len(page) == 0 {
			break
		}
		snapshot.readAhead(ctx, request.Type, keyAfter(&page[len(page)-1]))
		if from, err = s.sendPage(snapshot, page, stream); err != nil {
			return err
		}
	}
	snapshot.close()
	options := optionsSender{
		recordType: request.Type,
		send: func(o *databroker.TypedOptions) error {
			return stream.Send(&databroker.SyncLatestResponse{Response: &databroker.SyncLatestResponse_Options{Options: o}})
		},
	}
	if err := options.sendRows(typed); err != nil {
		return err
	}
	versions := &databroker.Versions{
		ServerVersion: uint64(state.ServerVersion), LatestRecordVersion: uint64(state.LatestVersion),
	}
	return stream.Send(&databroker.SyncLatestResponse{Response: &databroker.SyncLatestResponse_Versions{Versions: versions}})
}

// sendPage sends records and returns the key from which to go on.
func (s *Server) sendPage(snapshot *snapshot, page []db.RecordsPageRow, stream grpc.ServerStream) (from key, err error) {
	rest := newOutbox(page, maxSendTime, snapshot.close)
	defer rest.stop()
	for {
		row, ok := rest.next()
		if !ok {
			snapshot.pace(rest.stop())
			return from, nil
		}
		message := s.encodeRow(stream.Context(), &wireRecord{row.Version, row.Type, row.ID, row.Payload, row.ModifiedAt, false})
		if message != nil {
			if err := stream.SendMsg(message); err != nil {
				return from, err
			}
		}
		from = keyAfter(&row)
	}
}

// keyAfter returns the lowest key above that of a record: no text sorts between a text and the same followed by U+0001, the
// lowest character there is.
func keyAfter(row *db.RecordsPageRow) key { return key{row.Type, row.ID + "\x01"} }

// optionsSender sends the options of a stream's types, and later those that have changed.
type optionsSender struct {
	recordType string // "" for all
	send       func(*databroker.TypedOptions) error
	sent       map[string]*databroker.Options
}

// update sends what has changed since the last update.
func (o *optionsSender) update(options *changefeed.Options) error {
	if o.recordType != "" {
		if row, ok := options.Types[o.recordType]; ok {
			return o.sendRows([]db.OptionsListRow{row})
		}
		return nil
	}
	rows := make([]db.OptionsListRow, 0, len(options.Types))
	for _, row := range options.Types {
		rows = append(rows, row)
	}
	slices.SortFunc(rows, func(a, b db.OptionsListRow) int { return strings.Compare(a.Type, b.Type) })
	return o.sendRows(rows)
}

func (o *optionsSender) sendRows(rows []db.OptionsListRow) error {
	if o.sent == nil {
		o.sent = make(map[string]*databroker.Options)
	}
	for i := range rows {
		row := &rows[i]
		if o.recordType != "" && row.Type != o.recordType {
			continue
		}
		options := newOptions(row.Capacity, row.TTL, row.IndexableFields)
		before, known := o.sent[row.Type]
		if !known && isEmpty(options) || known && proto.Equal(before, options) {
			continue // never had any, or no news
		}
		o.sent[row.Type] = options
		if err := o.send(&databroker.TypedOptions{TypeURL: row.Type, Options: options}); err != nil {
			return err
		}
	}
	return nil
}

// streamContext derives the context of a stream, which also ends when the server stops.
func (s *Server) streamContext(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.stopping, func() { cancel(errStopping) })
	return ctx, func() { stop(); cancel(nil) }
}

// streamError is how a stream ends: never as canceled by the server, because clients take that as an end
// for good. Unavailable makes them come back, to this replica or another.
func (s *Server) streamError(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), errStopping) {
		return errStopping
	}
	return err
}
