package projection

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// scalarKinds are all scalar kinds of protobuf.
var scalarKinds = []string{
	"DOUBLE", "FLOAT", "INT64", "UINT64", "INT32", "FIXED64", "FIXED32", "BOOL", "STRING", "BYTES", "UINT32", "SFIXED32",
	"SFIXED64", "SINT32", "SINT64",
}

// testTypes returns types that have every kind of field in every position, known only through descriptors, as if they
// had been loaded at run time. They are:
//
//   - pb3.All: a proto3 message with each scalar, an enum, itself and the well-known types, each singular, optional,
//     repeated (packed and not), in a oneof, as map value, and redacted;
//   - pb2.Old: a proto2 message with groups and the like.
func testTypes(t testing.TB) *dynamicpb.Types {
	t.Helper()
	types := make([]string, 0, 40)
	for _, k := range scalarKinds {
		types = append(types, "type: TYPE_"+k)
	}
	types = append(types, `type: TYPE_ENUM type_name: ".pb3.Color"`, `type: TYPE_ENUM type_name: ".google.protobuf.NullValue"`,
		`type: TYPE_MESSAGE type_name: ".pb3.All"`)
	for _, m := range []string{
		"Any", "Timestamp", "Duration", "FieldMask", "Struct", "Value", "ListValue", "Empty", "DoubleValue", "FloatValue",
		"Int64Value", "UInt64Value", "Int32Value", "UInt32Value", "BoolValue", "StringValue", "BytesValue",
	} {
		types = append(types, `type: TYPE_MESSAGE type_name: ".google.protobuf.`+m+`"`)
	}

	var msg, choice strings.Builder // choice: the members of the oneof, which have to stand together
	number := 0
	field := func(prefix, format string, args ...any) {
		number++
		n := number
		if n > 150 {
			n += 1000 // some beyond what is looked up in a slice
		}
		b := &msg
		if strings.Contains(format, "oneof_index: 0") {
			b = &choice
		}
		fmt.Fprintf(b, "field { name: \"%s_%d\" number: %d %s }\n", prefix, number, n, fmt.Sprintf(format, args...))
	}
	oneofs := 1
	for i, typ := range types {
		field("single", "label: LABEL_OPTIONAL %s", typ)
		field("opt", "label: LABEL_OPTIONAL %s proto3_optional: true oneof_index: %d", typ, oneofs)
		oneofs++
		field("many", "label: LABEL_REPEATED %s", typ)
		if i < len(scalarKinds)+2 && !strings.Contains(typ, "STRING") && !strings.Contains(typ, "BYTES") {
			field("unpacked", "label: LABEL_REPEATED %s options { packed: false }", typ)
		}
		field("one_of", "label: LABEL_OPTIONAL %s oneof_index: 0", typ)
		field("secret", "label: LABEL_OPTIONAL %s options { debug_redact: true }", typ)
		if i%3 == 0 {
			field("secrets", "label: LABEL_REPEATED %s options { debug_redact: true }", typ)
			field("one_of_secret", "label: LABEL_OPTIONAL %s oneof_index: 0 options { debug_redact: true }", typ)
		}
		field("by_string", `label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".pb3.All.ByString%dEntry"`, number+1)
		fmt.Fprintf(&msg, `nested_type { name: "ByString%dEntry" options { map_entry: true }
			field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
			field { name: "value" number: 2 label: LABEL_OPTIONAL %s } }`+"\n", number, typ)
	}
	for _, k := range scalarKinds {
		if k == "DOUBLE" || k == "FLOAT" || k == "BYTES" {
			continue
		}
		field("by_key", `label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".pb3.All.ByKey%dEntry"`, number+1)
		fmt.Fprintf(&msg, `nested_type { name: "ByKey%dEntry" options { map_entry: true }
			field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_%s }
			field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_STRING } }`+"\n", number, k)
	}
	msg.WriteString(choice.String())
	msg.WriteString("oneof_decl { name: \"choice\" }\n")
	// Descriptors want the synthetic oneofs declared in the order of their fields.
	for i := range oneofs - 1 {
		fmt.Fprintf(&msg, "oneof_decl { name: \"_synthetic_%d\" }\n", i)
	}

	files := new(descriptorpb.FileDescriptorSet)
	text := `file { name: "pb3.proto" package: "pb3" syntax: "proto3"
		dependency: "google/protobuf/any.proto" dependency: "google/protobuf/timestamp.proto"
		dependency: "google/protobuf/duration.proto" dependency: "google/protobuf/field_mask.proto"
		dependency: "google/protobuf/struct.proto" dependency: "google/protobuf/empty.proto"
		dependency: "google/protobuf/wrappers.proto"
		enum_type { name: "Color" value { name: "RED" number: 0 } value { name: "GREEN" number: 1 } value { name: "NEGATIVE" number: -1 } }
		message_type { name: "All" ` + msg.String() + ` } }
	file { name: "pb2.proto" package: "pb2" syntax: "proto2"
		message_type { name: "Old"
			extension_range { start: 100 end: 200 }
			field { name: "required" number: 1 label: LABEL_REQUIRED type: TYPE_STRING }
			field { name: "fallback" number: 2 label: LABEL_OPTIONAL type: TYPE_INT32 default_value: "7" }
			field { name: "packed" number: 3 label: LABEL_REPEATED type: TYPE_SINT32 options { packed: true } }
			field { name: "loose" number: 4 label: LABEL_REPEATED type: TYPE_SINT64 }
			field { name: "part" number: 5 label: LABEL_OPTIONAL type: TYPE_GROUP type_name: ".pb2.Old.Part" }
			field { name: "parts" number: 6 label: LABEL_REPEATED type: TYPE_GROUP type_name: ".pb2.Old.Parts" }
			field { name: "u" number: 12 label: LABEL_OPTIONAL type: TYPE_STRING oneof_index: 1 }
			field { name: "v" number: 10 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".pb2.Old" oneof_index: 1 }
			field { name: "x" number: 9 label: LABEL_OPTIONAL type: TYPE_STRING oneof_index: 0 }
			field { name: "y" number: 11 label: LABEL_OPTIONAL type: TYPE_BOOL oneof_index: 0 }
			field { name: "far" number: 536870911 label: LABEL_OPTIONAL type: TYPE_STRING }
			oneof_decl { name: "first" }
			oneof_decl { name: "second" }
			nested_type { name: "Part"
				field { name: "text" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
				field { name: "old" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".pb2.Old" } }
			nested_type { name: "Parts"
				field { name: "text" number: 1 label: LABEL_REPEATED type: TYPE_STRING }
				field { name: "token" number: 2 label: LABEL_OPTIONAL type: TYPE_STRING options { debug_redact: true } } } } }`
	if err := prototext.Unmarshal([]byte(text), files); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"google/protobuf/any.proto", "google/protobuf/timestamp.proto", "google/protobuf/duration.proto",
		"google/protobuf/field_mask.proto", "google/protobuf/struct.proto", "google/protobuf/empty.proto",
		"google/protobuf/wrappers.proto",
	} {
		fd, err := protoregistry.GlobalFiles.FindFileByPath(name)
		if err != nil {
			t.Fatal(err)
		}
		files.File = append(files.File, protodesc.ToFileDescriptorProto(fd))
	}
	reg, err := protodesc.NewFiles(files)
	if err != nil {
		t.Fatal(err)
	}
	return dynamicpb.NewTypes(reg)
}

// payloadTypes returns the linked-in message types of our payload packages.
func payloadTypes() []protoreflect.MessageType {
	found := map[protoreflect.FullName]protoreflect.MessageType{}
	protoregistry.GlobalTypes.RangeMessages(func(mt protoreflect.MessageType) bool {
		switch name := mt.Descriptor().FullName(); name.Parent() {
		case "session", "user", "pomerium.device", "pomerium.identity", "oauth21", "ietf.rfc7591.v1", "pomerium.events":
			found[name] = mt
		}
		return true
	})
	var types []protoreflect.MessageType
	for _, name := range slices.Sorted(maps.Keys(found)) {
		types = append(types, found[name])
	}
	return types
}
