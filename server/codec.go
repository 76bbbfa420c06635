package server

import (
	"context"
	"fmt"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	gproto "google.golang.org/protobuf/proto"

	"pgbroker/proto/databroker"
)

// encoded is a message that is serialized already. Streams send records in this form: the payload goes
// from the table to the wire without being decoded, and a change is encoded once for all streams.
type encoded []byte

// codec is the standard protobuf codec, which also takes encoded messages as they are. It runs on goroutines where nobody else
// recovers from a panic.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(message any) (data mem.BufferSlice, err error) {
	defer recoverAs(&err)
	if message, ok := message.(encoded); ok {
		return mem.BufferSlice{mem.SliceBuffer(message)}, nil
	}
	return c.CodecV2.Marshal(message)
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, message any) (err error) {
	defer recoverAs(&err)
	return c.CodecV2.Unmarshal(data, message)
}

// recoverAs is to be deferred: it makes a panic an error, without what it may quote of the data.
func recoverAs(err *error) {
	if value := recover(); value != nil {
		*err = fmt.Errorf("panic in the codec (%T)", value)
	}
}

// Field numbers of databroker.Record and of the responses that carry one.
const (
	responseRecord protowire.Number = 1 // SyncResponse.record, SyncLatestResponse.record

	recordVersion    protowire.Number = 1
	recordType       protowire.Number = 2
	recordID         protowire.Number = 3
	recordData       protowire.Number = 4
	recordModifiedAt protowire.Number = 5
	recordDeletedAt  protowire.Number = 6

	timestampSeconds protowire.Number = 1
	timestampNanos   protowire.Number = 2

	anyTypeURL protowire.Number = 1
)

// wireRecord is a databroker.Record of which the payload is still serialized.
type wireRecord struct {
	version    int64
	recordType string
	id         string
	payload    []byte // serialized Any; nil if the record has no data
	modifiedAt time.Time
	deleted    bool
}

// encodeRow serializes the response that delivers a row of the table, whatever is in it; nil if it cannot be delivered.
func (s *Server) encodeRow(ctx context.Context, r *wireRecord) (message encoded) {
	k := key{r.recordType, r.id}
	err := s.supervisor.Catch(ctx, "encoding of a record", func() error {
		if !isAny(r.payload) {
			s.misfits.note(ctx, k, r.version, len(r.payload), misfitMalformed)
			r.payload = nil
		}
		if s.tooLarge(r.size()) {
			s.misfits.note(ctx, k, r.version, len(r.payload), misfitTooLarge)
			return nil
		}
		message = encodeResponse(r)
		return nil
	})
	if err != nil {
		s.misfits.note(ctx, k, r.version, len(r.payload), misfitPanicked)
	}
	return message
}

// tooLarge reports whether a record of this size, serialized, cannot be delivered.
func (s *Server) tooLarge(size int) bool {
	return protowire.SizeTag(responseRecord)+protowire.SizeBytes(size) > s.config.MaxMessageSize
}

// recordTooLarge is tooLarge for a record that is not serialized yet; most are seen at once to be small.
func (s *Server) recordTooLarge(record *databroker.Record) bool {
	return len(record.GetData().GetValue()) > s.config.MaxMessageSize-2*recordOverhead && s.tooLarge(gproto.Size(record))
}

// isAny reports whether a payload can be decoded as a google.protobuf.Any.
func isAny(payload []byte) bool {
	for len(payload) > 0 {
		number, wireType, n := protowire.ConsumeTag(payload)
		if n < 0 {
			return false
		}
		payload = payload[n:]
		if n = protowire.ConsumeFieldValue(number, wireType, payload); n < 0 {
			return false
		}
		if number == anyTypeURL && wireType == protowire.BytesType {
			if url, _ := protowire.ConsumeBytes(payload); !utf8.Valid(url) {
				return false
			}
		}
		payload = payload[n:]
	}
	return true
}

// encodeResponse serializes a SyncResponse or SyncLatestResponse that carries a record.
func encodeResponse(r *wireRecord) encoded {
	size := r.size()
	b := make([]byte, 0, 1+protowire.SizeBytes(size))
	b = protowire.AppendTag(b, responseRecord, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	return r.append(b)
}

func (r *wireRecord) size() int {
	size := sizeVarint(recordVersion, uint64(r.version)) + sizeBytes(recordType, len(r.recordType)) + sizeBytes(recordID, len(r.id))
	if r.payload != nil {
		size += protowire.SizeTag(recordData) + protowire.SizeBytes(len(r.payload))
	}
	at := protowire.SizeTag(recordModifiedAt) + protowire.SizeBytes(sizeTimestamp(r.modifiedAt))
	if r.deleted {
		at *= 2
	}
	return size + at
}

func (r *wireRecord) append(b []byte) []byte {
	b = appendVarint(b, recordVersion, uint64(r.version))
	b = appendString(b, recordType, r.recordType)
	b = appendString(b, recordID, r.id)
	if r.payload != nil {
		b = protowire.AppendTag(b, recordData, protowire.BytesType)
		b = protowire.AppendBytes(b, r.payload)
	}
	b = appendTimestamp(b, recordModifiedAt, r.modifiedAt)
	if r.deleted {
		b = appendTimestamp(b, recordDeletedAt, r.modifiedAt)
	}
	return b
}

// The zero value of a field is absent from the wire (proto3).

func sizeVarint(field protowire.Number, value uint64) int {
	if value == 0 {
		return 0
	}
	return protowire.SizeTag(field) + protowire.SizeVarint(value)
}

func appendVarint(b []byte, field protowire.Number, value uint64) []byte {
	if value == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, field, protowire.VarintType), value)
}

func sizeBytes(field protowire.Number, n int) int {
	if n == 0 {
		return 0
	}
	return protowire.SizeTag(field) + protowire.SizeBytes(n)
}

func appendString(b []byte, field protowire.Number, value string) []byte {
	if value == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, field, protowire.BytesType), value)
}

func sizeTimestamp(at time.Time) int {
	return sizeVarint(timestampSeconds, uint64(at.Unix())) + sizeVarint(timestampNanos, uint64(at.Nanosecond()))
}

func appendTimestamp(b []byte, field protowire.Number, at time.Time) []byte {
	b = protowire.AppendTag(b, field, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(sizeTimestamp(at)))
	b = appendVarint(b, timestampSeconds, uint64(at.Unix()))
	return appendVarint(b, timestampNanos, uint64(at.Nanosecond()))
}
