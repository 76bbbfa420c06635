package server

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/server/auth"
)

// Limits of a record's key: together they fit an index entry, which Postgres bounds to a third of a page.
const (
	maxTypeBytes = 512
	maxIDBytes   = 2048
)

// maxRepeats bounds how often one request may write one record: each time is a statement of its own, and
// all of them one transaction that keeps other writers waiting.
const maxRepeats = 100

// recordOverhead is room for all of a record that is not payload in the message that delivers it.
const recordOverhead = 4 << 10

// brokerServer serves databroker.DataBrokerService. Its methods are grouped by file.
type brokerServer struct {
	databroker.UnimplementedDataBrokerServiceServer
	*Server
}

// Get returns a live record.
func (s *brokerServer) Get(ctx context.Context, request *databroker.GetRequest) (*databroker.GetResponse, error) {
	if strings.ContainsRune(request.Type+request.Id, 0) {
		return nil, errRecordNotFound // it cannot have been stored
	}
	var row db.RecordGetRow
	err := db.RetryRead(ctx, func(ctx context.Context) (err error) {
		row, err = s.reads.RecordGet(ctx, db.RecordGetParams{Type: request.Type, ID: request.Id})
		return err
	})
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, errRecordNotFound
	}
	if err != nil {
		return nil, err
	}
	record := &databroker.Record{
		Version: uint64(row.Version), Type: request.Type, Id: request.Id, ModifiedAt: timestamppb.New(row.ModifiedAt),
	}
	if record.Data, err = decodeAny(row.Payload); err != nil {
		return nil, err
	}
	if s.recordTooLarge(record) {
		s.misfits.note(ctx, key{request.Type, request.Id}, row.Version, len(row.Payload), misfitTooLarge)
		return nil, &limitError{"the record is too large", s.config.MaxMessageSize, " bytes", "max_message_size"}
	}
	return &databroker.GetResponse{Record: record}, nil
}

// Put writes or deletes records, all or nothing.
func (s *brokerServer) Put(ctx context.Context, request *databroker.PutRequest) (*databroker.PutResponse, error) {
	rows := make([]writeRow, len(request.Records))
	repeats := make(map[key]int, len(request.Records))
	for i, record := range request.Records {
		row := &rows[i]
		field := fmt.Sprintf("records[%d]", i)
		if err := checkKey(field, record); err != nil {
			return nil, err
		}
		row.key = key{record.Type, record.Id}
		if repeats[row.key]++; repeats[row.key] > maxRepeats {
			return nil, invalid(field, "a record may be written at most %d times in one request", maxRepeats)
		}
		if record.DeletedAt != nil {
			row.delete = true
			continue
		}
		payload, err := encodeAny(record.Data)
		if err != nil {
			return nil, err
		}
		if err := s.setPayload(field, row, payload); err != nil {
			return nil, err
		}
	}
	if len(rows) == 0 {
		version, err := s.serverVersion(ctx)
		return &databroker.PutResponse{ServerVersion: version}, err
	}
	result, err := s.write(ctx, rows)
	if err != nil {
		return nil, err
	}
	// The request is ours, and what it says of each record is the answer, but for versions and times.
	for i, record := range request.Records {
		stamp(record, result.written[i])
	}
	return &databroker.PutResponse{ServerVersion: uint64(result.serverVersion), Records: request.Records}, nil
}

// Patch overwrites the fields named by the mask in those of the records that exist, all or nothing.
//
// It is optimistic: it reads, merges, and writes on condition that the records are still of the versions
// read, so that no lock is held while a replica computes.
func (s *brokerServer) Patch(ctx context.Context, request *databroker.PatchRequest) (*databroker.PatchResponse, error) {
	for i, record := range request.Records {
		if err := checkKey(fmt.Sprintf("records[%d]", i), record); err != nil {
			return nil, err
		}
	}
	for {
		rows, records, err := s.merge(ctx, request)
		if err != nil {
			return nil, err
		}
		if len(rows) == 0 {
			version, err := s.serverVersion(ctx)
			return &databroker.PatchResponse{ServerVersion: version}, err
		}
		result, err := s.write(ctx, rows)
		if err != nil {
			return nil, err
		}
		if result.conflict {
			continue // somebody was faster; ctx bounds the attempts
		}
		position := make(map[key]int, len(rows))
		for i := range rows {
			position[rows[i].key] = i
		}
		for _, record := range records {
			stamp(record, result.written[position[key{record.Type, record.Id}]])
		}
		return &databroker.PatchResponse{ServerVersion: uint64(result.serverVersion), Records: records}, nil
	}
}

// merge reads the records of a Patch and returns what to write, with one row for each record that exists,
// and the records of the answer in the order of the request.
func (s *brokerServer) merge(ctx context.Context, request *databroker.PatchRequest) (rows []writeRow, records []*databroker.Record, err error) {
	var params db.RecordsGetParams
	for _, record := range request.Records {
		params.Types = append(params.Types, record.Type)
		params.IDs = append(params.IDs, record.Id)
	}
	var stored []db.RecordsGetRow
	err = db.RetryRead(ctx, func(ctx context.Context) (err error) {
		stored, err = s.bounded.RecordsGet(ctx, params)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	// A record that the request names twice is patched twice and written once.
	current := make(map[key]*writeRow, len(stored))
	rows = make([]writeRow, 0, len(stored))
	for i := range stored {
		k := key{stored[i].Type, stored[i].ID}
		if current[k] == nil {
			rows = append(rows, writeRow{key: k, payload: stored[i].Payload, expected: stored[i].Version})
			current[k] = &rows[len(rows)-1]
		}
	}
	for i, record := range request.Records {
		row := current[key{record.Type, record.Id}]
		if row == nil || row.delete {
			continue
		}
		field := fmt.Sprintf("records[%d]", i)
		source, err := encodeAny(record.Data)
		if err != nil {
			return nil, nil, err
		}
		merged, err := s.projector.Patch(row.payload, source, request.FieldMask)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", field, err)
		}
		if record.DeletedAt != nil {
			row.delete = true
		}
		if err := s.setPayload(field, row, merged); err != nil {
			return nil, nil, err
		}
		data, err := decodeAny(merged)
		if err != nil {
			return nil, nil, err
		}
		records = append(records, &databroker.Record{
			Type: record.Type, Id: record.Id, Data: data, DeletedAt: record.DeletedAt,
		})
	}
	return rows, records, nil
}

// write performs a request. One that has waited in vain because something blocks writes is told what.
func (s *brokerServer) write(ctx context.Context, rows []writeRow) (writeResult, error) {
	result, err := s.writer.write(ctx, rows)
	if errors.Is(err, context.DeadlineExceeded) {
		if cause := s.blockers.cause(); cause != nil {
			return result, cause
		}
	}
	return result, err
}

// setPayload sets a row's payload and what is projected from it.
func (s *brokerServer) setPayload(field string, row *writeRow, payload []byte) error {
	if limit := s.config.MaxMessageSize - recordOverhead; len(payload) > limit {
		return invalid(field+".data", "%d bytes, at most %d are allowed", len(payload), limit)
	}
	row.payload = payload
	if !row.delete {
		row.projection = s.projector.Project(payload)
	}
	return nil
}

// ListTypes returns the types that have live records.
func (s *brokerServer) ListTypes(ctx context.Context, _ *emptypb.Empty) (*databroker.ListTypesResponse, error) {
	response := new(databroker.ListTypesResponse)
	err := db.RetryRead(ctx, func(ctx context.Context) (err error) {
		response.Types, err = s.reads.TypesList(ctx)
		return err
	})
	return response, err
}

// What ServerInfo says in headers, for which the contract has no fields.
const (
	// InfoWriting is "yes", or "no: " and why nothing can be written.
	InfoWriting = "pgbroker-writing"
	// InfoStandbyLag is how far the database is behind its primary, if it is a standby; such as "1.5s".
	InfoStandbyLag = "pgbroker-standby-lag"
)

// ServerInfo returns the server version and the range of the change log.
func (s *brokerServer) ServerInfo(ctx context.Context, _ *emptypb.Empty) (*databroker.ServerInfoResponse, error) {
	state, err := s.state(ctx)
	if err != nil {
		return nil, err
	}
	header := metadata.Pairs(InfoWriting, "yes")
	if problem := s.writing.err(); problem != nil {
		header.Set(InfoWriting, "no: "+problem.Error())
	}
	if condition := s.writing.condition(); condition.Standby {
		header.Set(InfoStandbyLag, condition.Lag.Round(time.Millisecond).String())
	}
	if err := grpc.SetHeader(ctx, header); err != nil {
		return nil, err
	}
	return &databroker.ServerInfoResponse{
		ServerVersion:         uint64(state.ServerVersion),
		EarliestRecordVersion: uint64(state.EarliestVersion),
		LatestRecordVersion:   uint64(state.LatestVersion),
	}, nil
}

// Clear removes every record, and with them all that clients know.
func (s *brokerServer) Clear(ctx context.Context, _ *emptypb.Empty) (*databroker.ClearResponse, error) {
	response := new(databroker.ClearResponse)
	caller := auth.CallerFrom(ctx)
	err := db.Retry(ctx, func(ctx context.Context) error {
		return pgx.BeginFunc(ctx, s.lanes.changes, func(tx pgx.Tx) error {
			queries := db.New(tx)
			// TRUNCATE first: it waits for the table, and what we read then nobody else can change.
			if err := queries.RecordsLock(ctx); err != nil {
				return err
			}
			before, err := queries.StateGet(ctx)
			if err != nil {
				return err
			}
			if err := queries.RecordsClear(ctx, db.RecordsClearParams{Key: caller.Key, Person: caller.Person}); err != nil {
				return err
			}
			after, err := queries.StateGet(ctx)
			response.OldServerVersion, response.NewServerVersion = uint64(before.ServerVersion), uint64(after.ServerVersion)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("clear: %w", err)
	}
	s.logger.InfoContext(ctx, "cleared", "old_server_version", response.OldServerVersion, "new_server_version", response.NewServerVersion)
	return response, nil
}

func (s *brokerServer) state(ctx context.Context) (state db.StateGetRow, err error) {
	err = db.RetryRead(ctx, func(ctx context.Context) (err error) {
		state, err = s.reads.StateGet(ctx)
		return err
	})
	return state, err
}

func (s *brokerServer) serverVersion(ctx context.Context) (uint64, error) {
	state, err := s.state(ctx)
	return uint64(state.ServerVersion), err
}

// checkKey checks that Postgres can hold a record's key.
func checkKey(field string, record *databroker.Record) error {
	return errors.Join(
		checkText(field+".type", record.GetType(), maxTypeBytes),
		checkText(field+".id", record.GetId(), maxIDBytes))
}

// checkText checks that Postgres can hold a text. That it is valid UTF-8 has been checked when the
// message was decoded.
func checkText(field, text string, limit int) error {
	switch {
	case len(text) > limit:
		return invalid(field, "%d bytes, at most %d are allowed", len(text), limit)
	case strings.ContainsRune(text, 0):
		return invalid(field, "must not contain the character U+0000")
	}
	return nil
}

// stamp sets what the server decides about a record that was written.
func stamp(record *databroker.Record, w written) {
	if w.version == 0 {
		return // the deletion of a record that was not there
	}
	record.Version = uint64(w.version)
	record.ModifiedAt = timestamppb.New(w.modifiedAt)
	if record.DeletedAt != nil {
		record.DeletedAt = record.ModifiedAt
	}
}

// encodeAny serializes a payload; nil stays nil, and an empty one is not nil.
func encodeAny(data *anypb.Any) ([]byte, error) {
	if data == nil {
		return nil, nil
	}
	return proto.MarshalOptions{}.MarshalAppend([]byte{}, data)
}

// decodeAny is the inverse of encodeAny. A payload that was written in SQL and is no Any is absent, as it is
// on streams.
func decodeAny(payload []byte) (*anypb.Any, error) {
	if payload == nil || !isAny(payload) {
		return nil, nil
	}
	data := new(anypb.Any)
	return data, proto.Unmarshal(payload, data)
}
