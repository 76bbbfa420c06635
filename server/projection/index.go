package projection

import (
	"bytes"
	"net/netip"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/structpb"
)

// indexCIDR returns the index prefix of a message of the named type, or "".
func (p *Projector) indexCIDR(name protoreflect.FullName, value []byte) string {
	// Few payloads have an index; for the others this look is all it costs.
	if !bytes.Contains(value, []byte("$index")) {
		return ""
	}
	for name == "google.protobuf.Any" {
		url, inner, ok := splitAny(value)
		if !ok {
			return ""
		}
		md := p.descriptor(url)
		if md == nil {
			return ""
		}
		name, value = md.FullName(), inner
	}
	s := new(structpb.Struct)
	switch name {
	case "google.protobuf.Struct":
		if proto.Unmarshal(value, s) != nil {
			return ""
		}
	case "google.protobuf.Value":
		v := new(structpb.Value)
		if proto.Unmarshal(value, v) != nil {
			return ""
		}
		s = v.GetStructValue()
	}
	cidr, ok := s.GetFields()["$index"].GetStructValue().GetFields()["cidr"].GetKind().(*structpb.Value_StringValue)
	if !ok {
		return ""
	}
	prefix, err := netip.ParsePrefix(cidr.StringValue)
	if err != nil {
		return ""
	}
	// An IPv4 network inside IPv6 is that IPv4 network, as it is in $index conditions.
	if addr := prefix.Addr(); addr.Is4In6() && prefix.Bits() >= 96 {
		prefix = netip.PrefixFrom(addr.Unmap(), prefix.Bits()-96)
	}
	return prefix.Masked().String()
}
