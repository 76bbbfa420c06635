// Package projection reads payloads: it turns the google.protobuf.Any of a record into what people, SQL and filters
// see of it, and applies field masks to it.
//
// The payload itself is never changed by being read; what can not be read has no projection and is stored all the
// same. Which types can be read is up to a Resolver. Nothing here needs generated code: types whose descriptors were
// loaded at run time are as good as those linked in.
package projection

import (
	"sync"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	// The payload types that the default resolver knows, beside those of google.protobuf.
	_ "google.golang.org/protobuf/types/known/anypb"
	_ "google.golang.org/protobuf/types/known/emptypb"
	_ "google.golang.org/protobuf/types/known/wrapperspb"

	_ "pgbroker/proto/device"
	_ "pgbroker/proto/events"
	_ "pgbroker/proto/identity"
	_ "pgbroker/proto/oauth21"
	_ "pgbroker/proto/rfc7591"
	_ "pgbroker/proto/session"
	_ "pgbroker/proto/user"
)

// Resolver finds message types by name or type URL. *protoregistry.Types and *dynamicpb.Types are resolvers.
type Resolver interface {
	protoregistry.MessageTypeResolver
	protoregistry.ExtensionTypeResolver
}

// Projector reads payloads of the types that its resolver knows. It is safe for concurrent use. It remembers the
// descriptors that it has seen: when types change, make a new one.
type Projector struct {
	types    Resolver
	redacted map[protoreflect.FullName]bool
	plans    sync.Map // protoreflect.MessageDescriptor -> *plan
}

// New returns a projector for the types of the resolver; nil stands for all types linked into the program. It leaves
// out the redacted fields, which are given by their full names, besides those that descriptors mark debug_redact.
func New(types Resolver, redacted ...protoreflect.FullName) *Projector {
	if types == nil {
		types = protoregistry.GlobalTypes
	}
	p := &Projector{types: types, redacted: make(map[protoreflect.FullName]bool, len(redacted))}
	for _, field := range redacted {
		p.redacted[field] = true
	}
	return p
}

// Projection is what can be read of a payload.
type Projection struct {
	// Data is the message in proto3 JSON with proto field names (snake_case), compact and always the same for the same
	// payload. For most messages it is an object. A google.protobuf.Struct is the object that it stands for, and the
	// other well-known types are whatever JSON they stand for.
	//
	// Redacted fields are left out at any depth. PostgreSQL takes every Data as jsonb: for U+0000, which it can
	// not store, strings have what package jsontext says, numbers that JSON does not have become the strings "NaN", "Infinity" and
	// "-Infinity", and timestamps and durations out of range become null.
	//
	// Data is nil if the type is unknown, if the bytes are not a message of the type, and for messages that would be
	// more trouble than use as JSON: nested deeper than 200 messages, larger than 8 MiB or with lists of a million
	// elements.
	Data []byte

	// SearchText is the text that a text query searches: every string in the message in lower case, with U+001F
	// between any two; strings that occur in earlier ones may be left out. The strings themselves are without it, so a query that contains none matches within one string,
	// and a query that contains one should match nothing. Map values are in SearchText and map keys are not; of a
	// nested Any it has the type URL only. Like Data it is without redacted fields, has U+0000 as package jsontext says, and is
	// empty if Data is nil.
	SearchText string

	// IndexCIDR is the network that $index conditions find the record by, as a prefix in canonical form ("10.0.0.0/8",
	// host bits cleared), or empty. Structs carry one, also inside a Value or a nested Any: {"$index": {"cidr": …}}.
	IndexCIDR string
}

// Project reads a payload, which is a serialized google.protobuf.Any. It never fails: what can not be read is empty.
func (p *Projector) Project(payload []byte) Projection {
	url, value, ok := splitAny(payload)
	if !ok {
		return Projection{}
	}
	md := p.descriptor(url)
	if md == nil {
		return Projection{}
	}
	w := walkers.Get().(*walker)
	w.p = p
	w.message(p.plan(md), value)
	var pr Projection
	if w.state == fine && len(w.json) <= maxData {
		pr.Data = append(make([]byte, 0, len(w.json)), w.json...)
		pr.SearchText = string(w.search)
	}
	w.release()
	pr.IndexCIDR = p.indexCIDR(md.FullName(), value)
	return pr
}

// descriptor returns the descriptor of a type URL, or nil if the type is unknown.
func (p *Projector) descriptor(url []byte) protoreflect.MessageDescriptor {
	mt, err := p.types.FindMessageByURL(string(url))
	if err != nil {
		return nil
	}
	return mt.Descriptor()
}

// splitAny takes a serialized Any apart without copying it. The last occurrence of a field counts, as always in
// protobuf.
func splitAny(b []byte) (url, value []byte, ok bool) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return nil, nil, false
		}
		b = b[n:]
		if typ == protowire.BytesType && (num == anyTypeURL || num == anyValue) {
			v, n := protowire.ConsumeBytes(b)
			if n < 0 {
				return nil, nil, false
			}
			if num == anyTypeURL {
				url = v
			} else {
				value = v
			}
			b = b[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(num, typ, b); n < 0 {
			return nil, nil, false
		}
		b = b[n:]
	}
	return url, value, true
}

// Field numbers of google.protobuf.Any.
const (
	anyTypeURL protowire.Number = 1
	anyValue   protowire.Number = 2
)
