package projection

import (
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"pgbroker/proto/user"
	"pgbroker/server/filter"
)

func TestIndexCIDR(t *testing.T) {
	for js, want := range map[string]string{
		`{"$index":{"cidr":"10.0.0.0/8"}}`:                 "10.0.0.0/8",
		`{"$index":{"cidr":"10.1.2.3/8"},"a":"b"}`:         "10.0.0.0/8",
		`{"$index":{"cidr":"192.0.2.7/32"}}`:               "192.0.2.7/32",
		`{"$index":{"cidr":"0.0.0.0/0"}}`:                  "0.0.0.0/0",
		`{"$index":{"cidr":"2001:DB8:0:0::1/32"}}`:         "2001:db8::/32",
		`{"$index":{"cidr":"::ffff:10.1.2.3/104"}}`:        "10.0.0.0/8",
		`{"$index":{"cidr":"::ffff:0:0/90"}}`:              "::ffc0:0:0/90",
		`{"$index":{"cidr":"10.0.0.1"}}`:                   "", // an address is not a prefix
		`{"$index":{"cidr":"10.0.0.0/33"}}`:                "",
		`{"$index":{"cidr":"10.0.0.0/8 "}}`:                "",
		`{"$index":{"cidr":"fe80::%eth0/64"}}`:             "",
		`{"$index":{"cidr":""}}`:                           "",
		`{"$index":{"cidr":8}}`:                            "",
		`{"$index":{"cidr":["10.0.0.0/8"]}}`:               "",
		`{"$index":{"CIDR":"10.0.0.0/8"}}`:                 "",
		`{"$index":"10.0.0.0/8"}`:                          "",
		`{"$index":null}`:                                  "",
		`{"a":{"$index":{"cidr":"10.0.0.0/8"}}}`:           "",
		`{"index":{"cidr":"10.0.0.0/8"},"a":"has $index"}`: "",
	} {
		s := parseStruct(t, js)
		for what, m := range map[string]proto.Message{
			"Struct":               s,
			"Value":                structpb.NewStructValue(s),
			"Any of Struct":        nestedAny(t, s),
			"Any of Any of Struct": nestedAny(t, nestedAny(t, s)),
			"Any of Value":         nestedAny(t, structpb.NewStructValue(s)),
		} {
			if got := New(nil).Project(serialize(t, m)).IndexCIDR; got != want {
				t.Errorf("%s %s: IndexCIDR = %q, want %q", what, js, got, want)
			}
		}
	}
	for what, m := range map[string]proto.Message{
		"list":            structpb.NewListValue(list(parseStruct(t, `{"$index":{"cidr":"10.0.0.0/8"}}`).AsMap())),
		"other message":   &user.User{Name: "$index"},
		"Any of unknown":  &anypb.Any{TypeUrl: "x/y", Value: []byte("$index")},
		"Any of bad Any":  &anypb.Any{TypeUrl: "x/google.protobuf.Any", Value: []byte("\x0f$index")},
		"Any of nonsense": &anypb.Any{TypeUrl: "x/google.protobuf.Struct", Value: []byte("$index")},
		"Any of bad":      &anypb.Any{TypeUrl: "x/google.protobuf.Value", Value: []byte("$index")},
	} {
		if got := New(nil).Project(serialize(t, m)).IndexCIDR; got != "" {
			t.Errorf("%s: IndexCIDR = %q, want none", what, got)
		}
	}
}

// Anys within Anys cost time in proportion to their size, whatever somebody builds of them.
func TestIndexCIDRInManyAnys(t *testing.T) {
	b, err := proto.Marshal(parseStruct(t, `{"$index":{"cidr":"10.0.0.0/8"}}`))
	if err != nil {
		t.Fatal(err)
	}
	if got := New(nil).Project(nestAny(2_000, "google.protobuf.Struct", b)).IndexCIDR; got != "10.0.0.0/8" {
		t.Errorf("IndexCIDR = %q", got)
	}
}

// What a payload is indexed by and what a filter looks for have to be the same prefix.
func TestFilterFindsIndexCIDR(t *testing.T) {
	for _, cidr := range []string{"10.1.2.3/8", "::ffff:10.1.2.3/104", "::ffff:0:0/90", "2001:db8::1/32", "192.0.2.7/32", "::/0"} {
		stored := New(nil).Project(serialize(t, parseStruct(t, `{"$index":{"cidr":"`+cidr+`"}}`))).IndexCIDR
		f, err := filter.Parse(parseStruct(t, `{"$index":"`+cidr+`"}`))
		if err != nil {
			t.Fatal(err)
		}
		if wanted := f.IndexValues(); len(wanted) != 1 || wanted[0].String() != stored {
			t.Errorf("%s is stored as %q and looked for as %v", cidr, stored, wanted)
		}
	}
}
