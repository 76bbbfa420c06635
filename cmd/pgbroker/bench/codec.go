package bench

import (
	"errors"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// codec is the standard protobuf codec with two more kinds of messages. Streams are read into frames, because decoding every
// record a thousand times would measure the generator of the load and not the server; and the bare server sends what is
// encoded already.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

// encoded is a message that is serialized already.
type encoded []byte

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(message any) (mem.BufferSlice, error) {
	if message, ok := message.(encoded); ok {
		return mem.BufferSlice{mem.SliceBuffer(message)}, nil
	}
	return c.CodecV2.Marshal(message)
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, message any) error {
	f, ok := message.(*frame)
	if !ok {
		return c.CodecV2.Unmarshal(data, message)
	}
	buffer := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buffer.Free()
	return f.parse(buffer.ReadOnlyData())
}

// A frame is what matters of a SyncResponse or a SyncLatestResponse.
type frame struct {
	// What to look for.
	ids    space // the records that count
	latest bool  // whether it is a SyncLatestResponse

	kind    frameKind
	version uint64 // of the record; in a frame of versions, the latest record version
	server  uint64 // server version, in a frame of versions
	index   uint32 // of the record in ids
	ours    bool   // whether it is one of ids
	deleted bool
	size    int // of the message in bytes
}

type frameKind uint8

const (
	frameOther frameKind = iota // options
	frameRecord
	frameVersions
)

// Field numbers of the contract.
const (
	fieldRecord         protowire.Number = 1 // of SyncResponse and SyncLatestResponse
	fieldLatestVersions protowire.Number = 2 // of SyncLatestResponse

	fieldVersion   protowire.Number = 1 // of Record
	fieldType      protowire.Number = 2
	fieldID        protowire.Number = 3
	fieldData      protowire.Number = 4
	fieldModified  protowire.Number = 5
	fieldDeletedAt protowire.Number = 6

	fieldServerVersion       protowire.Number = 1 // of Versions
	fieldLatestRecordVersion protowire.Number = 2
)

var errFrame = errors.New("a message of a stream is not valid protobuf")

func (f *frame) parse(b []byte) error {
	f.kind, f.version, f.server, f.index, f.ours, f.deleted, f.size = frameOther, 0, 0, 0, false, false, len(b)
	return fields(b, func(number protowire.Number, _ uint64, value []byte) error {
		switch {
		case number == fieldRecord:
			f.kind = frameRecord
			return fields(value, f.recordField)
		case number == fieldLatestVersions && f.latest:
			f.kind = frameVersions
			return fields(value, f.versionsField)
		}
		return nil
	})
}

func (f *frame) recordField(number protowire.Number, n uint64, value []byte) error {
	switch number {
	case fieldVersion:
		f.version = n
	case fieldID:
		f.index, f.ours = f.ids.index(value)
	case fieldDeletedAt:
		f.deleted = true
	}
	return nil
}

func (f *frame) versionsField(number protowire.Number, n uint64, _ []byte) error {
	switch number {
	case fieldServerVersion:
		f.server = n
	case fieldLatestRecordVersion:
		f.version = n
	}
	return nil
}

// fields calls do for each field of a message, with its number or its bytes.
func fields(b []byte, do func(number protowire.Number, n uint64, value []byte) error) error {
	for len(b) > 0 {
		number, kind, length := protowire.ConsumeTag(b)
		if length < 0 {
			return errFrame
		}
		b = b[length:]
		var n uint64
		var value []byte
		switch kind {
		case protowire.VarintType:
			n, length = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			value, length = protowire.ConsumeBytes(b)
		default:
			length = protowire.ConsumeFieldValue(number, kind, b)
		}
		if length < 0 {
			return errFrame
		}
		b = b[length:]
		if err := do(number, n, value); err != nil {
			return err
		}
	}
	return nil
}
