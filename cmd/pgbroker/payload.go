package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	// The payloads that can be shown and written as JSON, besides those that the services use themselves.
	_ "google.golang.org/protobuf/types/known/wrapperspb"

	"pgbroker/proto/databroker"
	_ "pgbroker/proto/device"
	_ "pgbroker/proto/events"
	_ "pgbroker/proto/identity"
	_ "pgbroker/proto/oauth21"
	_ "pgbroker/proto/rfc7591"
	_ "pgbroker/proto/session"
	_ "pgbroker/proto/user"
)

// typeURLPrefix precedes the name of a message in a type URL.
const typeURLPrefix = "type.googleapis.com/"

// recordType completes the name of a known message, so that people can say session.Session. Record types in general are free
// texts.
func recordType(name string) string {
	if strings.Contains(name, "/") || knownMessage(name) == nil {
		return name
	}
	return typeURLPrefix + name
}

// knownMessage returns the type of a message by its full name, or nil.
func knownMessage(name string) protoreflect.MessageType {
	t, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(name))
	if err != nil {
		return nil
	}
	return t
}

// readInput returns the JSON that a flag holds or points to: @FILE is a file, - is standard input.
func (a *app) readInput(ctx context.Context, flag, value string) ([]byte, error) {
	path, isFile := strings.CutPrefix(value, "@")
	switch {
	case value == "-":
		b, err := readAll(ctx, a.stdin)
		if err != nil {
			return nil, fmt.Errorf("--%s: read standard input: %w", flag, err)
		}
		return b, nil
	case isFile:
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, usagef("--%s: %w", flag, err)
		}
		return b, nil
	default:
		return []byte(value), nil
	}
}

// readAll is io.ReadAll that ctx can interrupt: somebody may sit at the keyboard and think better of it.
func readAll(ctx context.Context, r io.Reader) ([]byte, error) {
	type read struct {
		b   []byte
		err error
	}
	done := make(chan read, 1)
	go func() {
		b, err := io.ReadAll(r)
		done <- read{b, err}
	}()
	select {
	case r := <-done:
		return r.b, r.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// A rawPayload is how a payload of an unknown type looks as JSON, both ways: `record get` prints it, `record put` takes it.
type rawPayload struct {
	TypeURL string `json:"@type"`
	Value   []byte `json:"value"`
}

// encodePayload makes a payload of JSON. Its type is the one that the JSON names in @type, else payloadType, else that of the
// record type when it is a type URL, else google.protobuf.Struct.
func encodePayload(data []byte, recordType, payloadType string) (*anypb.Any, error) {
	if !json.Valid(data) {
		var syntax *json.SyntaxError
		if err := json.Unmarshal(data, new(any)); errors.As(err, &syntax) {
			return nil, usagef("--data: not valid JSON at byte %d: %w", syntax.Offset, err)
		}
		return nil, usagef("--data: not valid JSON")
	}
	if payloadType == "" {
		var named struct {
			TypeURL *string `json:"@type"`
		}
		if err := json.Unmarshal(data, &named); err == nil && named.TypeURL != nil {
			return encodeNamed(data, *named.TypeURL)
		}
	}

	name := payloadType
	if name == "" {
		if message, isURL := strings.CutPrefix(recordType, typeURLPrefix); isURL {
			name = message
		} else {
			name = string((*structpb.Struct)(nil).ProtoReflect().Descriptor().FullName())
		}
	}
	name = name[strings.LastIndexByte(name, '/')+1:]
	known := knownMessage(name)
	if known == nil {
		return nil, usagef("--data: the message %q is not known to this program: name another one with --payload-type, "+
			`or give the bytes as {"@type": "%s%s", "value": "BASE64"}`, name, typeURLPrefix, name)
	}
	message := known.New().Interface()
	if err := protojson.Unmarshal(data, message); err != nil {
		return nil, usagef("--data: not a %s: %w", name, plain(err))
	}
	return packed(message)
}

// encodeNamed makes a payload of JSON that names its type.
func encodeNamed(data []byte, typeURL string) (*anypb.Any, error) {
	payload := new(anypb.Any)
	if knownMessage(typeURL[strings.LastIndexByte(typeURL, '/')+1:]) != nil {
		if err := protojson.Unmarshal(data, payload); err != nil {
			return nil, usagef("--data: not a %s: %w", typeURL, plain(err))
		}
		return payload, nil
	}
	var raw rawPayload
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&raw); err != nil {
		return nil, usagef(`--data: the message %q is not known to this program: give its bytes as {"@type": ..., "value": "BASE64"}`,
			typeURL)
	}
	return &anypb.Any{TypeUrl: typeURL, Value: raw.Value}, nil
}

// packed makes an Any with the same bytes for the same message, so that writing a record again changes nothing.
func packed(message proto.Message) (*anypb.Any, error) {
	payload := new(anypb.Any)
	err := anypb.MarshalFrom(payload, message, proto.MarshalOptions{Deterministic: true})
	return payload, err
}

// plain takes protobuf's prefix off an error, which it writes with a random space on purpose.
func plain(err error) error {
	message := strings.ReplaceAll(err.Error(), "\u00a0", " ")
	return errors.New(strings.TrimSpace(strings.TrimPrefix(message, "proto:")))
}

// payloadJSON shows a payload: decoded when its type is known, else as base64. Without secrets, fields that hold some are left
// out, as in the readable projection of the database.
func payloadJSON(payload *anypb.Any, secrets bool) (json.RawMessage, error) {
	if payload == nil {
		return nil, nil
	}
	raw := rawPayload{TypeURL: payload.GetTypeUrl(), Value: payload.GetValue()}
	message, err := payload.UnmarshalNew()
	if err != nil { // not known, or not decodable
		return json.Marshal(raw)
	}
	if !secrets {
		redact(message.ProtoReflect())
	}
	shown, err := packed(message)
	if err != nil {
		return nil, err
	}
	shown.TypeUrl = raw.TypeURL
	if b, err := toJSON(shown); err == nil {
		return b, nil
	}
	raw.Value = shown.GetValue() // it holds an Any of a type that is not known
	return json.Marshal(raw)
}

// redact clears every field that is marked as secret, however deep.
func redact(message protoreflect.Message) {
	message.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		if options, ok := field.Options().(*descriptorpb.FieldOptions); ok && options.GetDebugRedact() {
			message.Clear(field)
			return true
		}
		switch {
		case field.IsMap():
			if field.MapValue().Message() != nil {
				value.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
					redact(v.Message())
					return true
				})
			}
		case field.Message() == nil:
		case field.IsList():
			for i := range value.List().Len() {
				redact(value.List().Get(i).Message())
			}
		default:
			redact(value.Message())
		}
		return true
	})
	if nested, ok := message.Interface().(*anypb.Any); ok {
		if inner, err := nested.UnmarshalNew(); err == nil {
			redact(inner.ProtoReflect())
			if b, err := proto.Marshal(inner); err == nil {
				nested.Value = b
			}
		}
	}
}

// recordJSON is protojson of a record, except that numbers are numbers and a payload of an unknown type is no error.
func recordJSON(record *databroker.Record, secrets bool) (json.RawMessage, error) {
	envelope := &databroker.Record{
		Version: record.GetVersion(), Type: record.GetType(), Id: record.GetId(),
		ModifiedAt: record.GetModifiedAt(), DeletedAt: record.GetDeletedAt(),
	}
	b, err := plainJSON(envelope)
	if err != nil {
		return nil, err
	}
	payload, err := payloadJSON(record.GetData(), secrets)
	if err != nil || payload == nil {
		return b, err
	}
	b = bytes.TrimSuffix(b, []byte("}"))
	if len(b) > 1 {
		b = append(b, ',')
	}
	b = append(b, `"data":`...)
	return append(append(b, payload...), '}'), nil
}

// payloadSummary shows a payload in one cell of a table, without its type, which is usually that of the record.
func payloadSummary(payload *anypb.Any, secrets bool) string {
	if payload == nil {
		return ""
	}
	if _, err := payload.UnmarshalNew(); err != nil {
		return fmt.Sprintf("%d bytes of %s", len(payload.GetValue()), payload.GetTypeUrl())
	}
	b, err := payloadJSON(payload, secrets)
	if err != nil {
		return fmt.Sprintf("%d bytes of %s", len(payload.GetValue()), payload.GetTypeUrl())
	}
	var wellKnown struct {
		Value json.RawMessage `json:"value"`
	}
	if strings.HasPrefix(payload.GetTypeUrl(), typeURLPrefix+"google.protobuf.") && json.Unmarshal(b, &wellKnown) == nil {
		return string(wellKnown.Value)
	}
	// {"@type":"...","id":...} without its first member.
	if _, rest, more := strings.Cut(string(b), `",`); more && strings.HasPrefix(string(b), `{"@type":"`) {
		return "{" + rest
	}
	return "{}"
}
