package schema

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// Definitions is what SQL needs to know of messages and enums: rows of pgbroker.messages, message_fields and
// enum_values, in the order of their keys.
type Definitions struct {
	Messages   []Message
	Fields     []Field
	EnumValues []EnumValue
}

// Message is a message type.
type Message struct {
	Name string // full
	Form string // how it looks as JSON
}

// Field is a field of a message type. What is "" does not apply.
type Field struct {
	Message  string // full name of the message that declares it
	Number   int32
	Name     string // as projections name it
	JSONName string
	Kind     string // of a value; of a map, that of its values
	Label    string // single, optional, repeated, packed or map
	TypeName string // full name of the message or enum
	MapKey   string // kind of a map's keys
	Oneof    string
	Secret   bool
}

// EnumValue is a value of an enum.
type EnumValue struct {
	Enum     string // full name
	Position int32  // in the declaration
	Name     string
	Number   int32
}

// forms are the forms of messages that are not objects of their fields.
var forms = map[protoreflect.FullName]string{
	"google.protobuf.Any":         "any",
	"google.protobuf.Timestamp":   "timestamp",
	"google.protobuf.Duration":    "duration",
	"google.protobuf.FieldMask":   "field_mask",
	"google.protobuf.Struct":      "struct",
	"google.protobuf.Value":       "value",
	"google.protobuf.ListValue":   "list",
	"google.protobuf.DoubleValue": "wrapper",
	"google.protobuf.FloatValue":  "wrapper",
	"google.protobuf.Int64Value":  "wrapper",
	"google.protobuf.UInt64Value": "wrapper",
	"google.protobuf.Int32Value":  "wrapper",
	"google.protobuf.UInt32Value": "wrapper",
	"google.protobuf.BoolValue":   "wrapper",
	"google.protobuf.StringValue": "wrapper",
	"google.protobuf.BytesValue":  "wrapper",
}

// Compile returns what a file declares.
func Compile(fd protoreflect.FileDescriptor) Definitions {
	var d Definitions
	d.addEnums(fd.Enums())
	d.addMessages(fd.Messages())
	d.sort()
	return d
}

func (d *Definitions) addMessages(messages protoreflect.MessageDescriptors) {
	for i := range messages.Len() {
		md := messages.Get(i)
		if md.IsMapEntry() {
			continue
		}
		form := cmp.Or(forms[md.FullName()], "object")
		d.Messages = append(d.Messages, Message{Name: string(md.FullName()), Form: form})
		for j := range md.Fields().Len() {
			d.Fields = append(d.Fields, newField(md.Fields().Get(j)))
		}
		d.addEnums(md.Enums())
		d.addMessages(md.Messages())
	}
}

func newField(fd protoreflect.FieldDescriptor) Field {
	f := Field{
		Message: string(fd.ContainingMessage().FullName()), Number: int32(fd.Number()),
		Name: fd.TextName(), JSONName: fd.JSONName(), Label: "single",
	}
	value := fd
	switch {
	case fd.IsMap():
		f.Label, f.MapKey = "map", fd.MapKey().Kind().String()
		value = fd.MapValue()
	case fd.IsList() && fd.IsPacked():
		f.Label = "packed"
	case fd.IsList():
		f.Label = "repeated"
	case fd.HasPresence():
		f.Label = "optional"
	}
	f.Kind = value.Kind().String()
	if md := value.Message(); md != nil {
		f.TypeName = string(md.FullName())
	}
	if ed := value.Enum(); ed != nil {
		f.TypeName = string(ed.FullName())
	}
	if od := fd.ContainingOneof(); od != nil && !od.IsSynthetic() {
		f.Oneof = string(od.Name())
	}
	if options, ok := fd.Options().(*descriptorpb.FieldOptions); ok {
		f.Secret = options.GetDebugRedact()
	}
	return f
}

func (d *Definitions) addEnums(enums protoreflect.EnumDescriptors) {
	for i := range enums.Len() {
		values := enums.Get(i).Values()
		for j := range values.Len() {
			d.EnumValues = append(d.EnumValues, EnumValue{
				Enum: string(enums.Get(i).FullName()), Position: int32(j),
				Name: string(values.Get(j).Name()), Number: int32(values.Get(j).Number()),
			})
		}
	}
}

func (d Definitions) plus(other Definitions) Definitions {
	sum := Definitions{
		slices.Concat(d.Messages, other.Messages), slices.Concat(d.Fields, other.Fields), slices.Concat(d.EnumValues, other.EnumValues),
	}
	sum.sort()
	return sum
}

func (d *Definitions) sort() {
	slices.SortFunc(d.Messages, func(a, b Message) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(d.Fields, func(a, b Field) int {
		return cmp.Or(cmp.Compare(a.Message, b.Message), cmp.Compare(a.Number, b.Number))
	})
	slices.SortFunc(d.EnumValues, func(a, b EnumValue) int {
		return cmp.Or(cmp.Compare(a.Enum, b.Enum), cmp.Compare(a.Position, b.Position))
	})
}

func (d Definitions) equal(other Definitions) bool { return reflect.DeepEqual(d, other) }

// compatible are kinds that read each other's values on the wire.
var compatible = map[string]string{
	"int32": "varint", "int64": "varint", "uint32": "varint", "uint64": "varint", "bool": "varint", "enum": "varint",
	"sint32": "zigzag", "sint64": "zigzag",
	"fixed32": "fixed32", "sfixed32": "fixed32", "fixed64": "fixed64", "sfixed64": "fixed64",
	"string": "text", "bytes": "text",
}

// Incompatible returns an error if payloads written by the definitions before can not be read by the ones after: if a
// field number has got another type.
func Incompatible(before, after Definitions) error {
	type key struct {
		message string
		number  int32
	}
	old := make(map[key]Field, len(before.Fields))
	for _, f := range before.Fields {
		old[key{f.Message, f.Number}] = f
	}
	for _, f := range after.Fields {
		was, ok := old[key{f.Message, f.Number}]
		if !ok || was.reads(f) {
			continue
		}
		return fmt.Errorf("field number %d of message %s was %s (%s) and would be %s (%s): records that are stored could not be read; "+
			"give the field a number of its own", f.Number, f.Message, was.describe(), was.Name, f.describe(), f.Name)
	}
	return nil
}

// reads reports whether values written as one field can be read as the other.
func (f Field) reads(other Field) bool {
	list := func(f Field) string {
		switch f.Label {
		case "single", "optional":
			return "one"
		case "packed": // readers take either
			return "repeated"
		}
		return f.Label
	}
	if list(f) != list(other) || f.MapKey != other.MapKey {
		return false
	}
	if compatible[f.Kind] != "" {
		return compatible[f.Kind] == compatible[other.Kind]
	}
	return f.Kind == other.Kind && f.TypeName == other.TypeName
}

func (f Field) describe() string {
	name := cmp.Or(f.TypeName, f.Kind)
	switch f.Label {
	case "repeated", "packed":
		return "repeated " + name
	case "map":
		return "map<" + f.MapKey + ", " + name + ">"
	}
	return name
}
