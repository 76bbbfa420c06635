package projection

import (
	"sync/atomic"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// plan is what the walker needs to know of a message type.
type plan struct {
	form   form
	dense  []*field // by number, as far as numbers are small
	sparse map[protowire.Number]*field
	oneofs int // oneofs with more than one member
}

// form is how a message looks in JSON.
type form uint8

const (
	formObject form = iota // an object of its fields
	formAny
	formTimestamp
	formDuration
	formFieldMask
	formInner // what its only field looks like: Struct, ListValue and the wrappers
	formValue // what the one field that is set looks like
)

var wellKnown = map[protoreflect.FullName]form{
	"google.protobuf.Any":         formAny,
	"google.protobuf.Timestamp":   formTimestamp,
	"google.protobuf.Duration":    formDuration,
	"google.protobuf.FieldMask":   formFieldMask,
	"google.protobuf.Struct":      formInner,
	"google.protobuf.ListValue":   formInner,
	"google.protobuf.Value":       formValue,
	"google.protobuf.DoubleValue": formInner,
	"google.protobuf.FloatValue":  formInner,
	"google.protobuf.Int64Value":  formInner,
	"google.protobuf.UInt64Value": formInner,
	"google.protobuf.Int32Value":  formInner,
	"google.protobuf.UInt32Value": formInner,
	"google.protobuf.BoolValue":   formInner,
	"google.protobuf.StringValue": formInner,
	"google.protobuf.BytesValue":  formInner,
}

// field is what the walker needs to know of a field.
type field struct {
	desc     protoreflect.FieldDescriptor
	number   protowire.Number
	kind     protoreflect.Kind
	wire     protowire.Type // of one value
	narrow   bool           // a varint of 32 bits
	list     bool
	mapped   bool // a map; its entries are messages with the fields 1 and 2
	presence bool // shown even if zero
	secret   bool // never shown
	oneof    int  // 1 + index of the oneof, or 0
	key      string
	enum     protoreflect.EnumValueDescriptors
	null     bool // the enum google.protobuf.NullValue

	message protoreflect.MessageDescriptor // nil for scalars
	sub     atomic.Pointer[plan]           // the message's plan, once it was needed (types are recursive)
}

// plan returns the plan of a message type.
func (p *Projector) plan(md protoreflect.MessageDescriptor) *plan {
	if pl, ok := p.plans.Load(md); ok {
		return pl.(*plan)
	}
	pl, _ := p.plans.LoadOrStore(md, p.newPlan(md))
	return pl.(*plan)
}

func (p *Projector) subPlan(f *field) *plan {
	if pl := f.sub.Load(); pl != nil {
		return pl
	}
	pl := p.plan(f.message)
	f.sub.Store(pl)
	return pl
}

// maxDense is the highest field number that is looked up in a slice.
const maxDense = 255

func (p *Projector) newPlan(md protoreflect.MessageDescriptor) *plan {
	pl := &plan{form: wellKnown[md.FullName()]}
	fields := md.Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		f := newField(fd)
		f.secret = f.secret || p.redacted[fd.FullName()]
		if f.oneof > 0 {
			pl.oneofs = max(pl.oneofs, f.oneof)
		}
		if f.number > maxDense {
			if pl.sparse == nil {
				pl.sparse = make(map[protowire.Number]*field)
			}
			pl.sparse[f.number] = f
			continue
		}
		for len(pl.dense) <= int(f.number) {
			pl.dense = append(pl.dense, nil)
		}
		pl.dense[f.number] = f
	}
	return pl
}

func (pl *plan) field(n protowire.Number) *field {
	if int(n) < len(pl.dense) {
		return pl.dense[n]
	}
	return pl.sparse[n]
}

// redacted reports whether a field holds a secret.
func redacted(fd protoreflect.FieldDescriptor) bool {
	options, ok := fd.Options().(*descriptorpb.FieldOptions)
	return ok && options.GetDebugRedact()
}

func newField(fd protoreflect.FieldDescriptor) *field {
	f := &field{
		desc:     fd,
		number:   fd.Number(),
		kind:     fd.Kind(),
		wire:     wireTypes[fd.Kind()],
		list:     fd.IsList(),
		mapped:   fd.IsMap(),
		presence: fd.HasPresence(),
		secret:   redacted(fd),
		key:      `"` + fd.TextName() + `":`,
		message:  fd.Message(),
	}
	if od := fd.ContainingOneof(); od != nil && od.Fields().Len() > 1 {
		f.oneof = 1 + od.Index()
	}
	switch f.kind {
	case protoreflect.Int32Kind, protoreflect.Uint32Kind, protoreflect.Sint32Kind, protoreflect.EnumKind:
		f.narrow = true
	}
	if ed := fd.Enum(); ed != nil {
		f.enum = ed.Values()
		f.null = ed.FullName() == "google.protobuf.NullValue"
	}
	return f
}

var wireTypes = map[protoreflect.Kind]protowire.Type{
	protoreflect.BoolKind:     protowire.VarintType,
	protoreflect.EnumKind:     protowire.VarintType,
	protoreflect.Int32Kind:    protowire.VarintType,
	protoreflect.Sint32Kind:   protowire.VarintType,
	protoreflect.Uint32Kind:   protowire.VarintType,
	protoreflect.Int64Kind:    protowire.VarintType,
	protoreflect.Sint64Kind:   protowire.VarintType,
	protoreflect.Uint64Kind:   protowire.VarintType,
	protoreflect.Sfixed32Kind: protowire.Fixed32Type,
	protoreflect.Fixed32Kind:  protowire.Fixed32Type,
	protoreflect.FloatKind:    protowire.Fixed32Type,
	protoreflect.Sfixed64Kind: protowire.Fixed64Type,
	protoreflect.Fixed64Kind:  protowire.Fixed64Type,
	protoreflect.DoubleKind:   protowire.Fixed64Type,
	protoreflect.StringKind:   protowire.BytesType,
	protoreflect.BytesKind:    protowire.BytesType,
	protoreflect.MessageKind:  protowire.BytesType,
	protoreflect.GroupKind:    protowire.StartGroupType,
}
