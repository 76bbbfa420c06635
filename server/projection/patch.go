package projection

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// ErrInvalidPatch is the error of a patch that can not be applied: its mask names what the message does not have, or
// one of the two payloads can not be read.
var ErrInvalidPatch = errors.New("invalid patch")

// Patch returns dst with the fields that the mask names taken from src. Both are serialized Anys of the same message
// type, which must be known.
//
// The mask's paths are proto field names (snake_case) joined by dots. A field that src has replaces that of dst as a
// whole: nothing is merged or appended. A field that src does not have is cleared; a scalar without presence counts
// as had if it is not zero. A longer path descends through singular message fields: where only src has the parent, dst
// gets one; where only dst has it, what the path names is cleared in it; where neither has it, nothing happens. If one
// path of the mask begins with another, the shorter one counts and the longer one is not looked at.
//
// Whether a mask is valid depends on the type only, not on what is set in the messages. A nil or empty mask returns
// dst itself. Fields of dst that are unknown are kept. Errors wrap ErrInvalidPatch and contain no field values.
func (p *Projector) Patch(dst, src []byte, mask *fieldmaskpb.FieldMask) ([]byte, error) {
	tree, err := newMaskTree(mask.GetPaths())
	if err != nil {
		return nil, err
	}
	if len(tree) == 0 {
		return dst, nil
	}
	to, err := p.decode(dst)
	if err != nil {
		return nil, fmt.Errorf("%w: could not unmarshal existing record data: %w", ErrInvalidPatch, err)
	}
	from, err := p.decode(src)
	if err != nil {
		return nil, fmt.Errorf("%w: could not unmarshal new record data: %w", ErrInvalidPatch, err)
	}
	if a, b := to.Descriptor().FullName(), from.Descriptor().FullName(); a != b {
		return nil, fmt.Errorf("%w: descriptor mismatch: %s, %s", ErrInvalidPatch, a, b)
	}
	if err := tree.check(to.Descriptor()); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidPatch, err)
	}
	tree.overwrite(to, from)
	value, err := proto.MarshalOptions{Deterministic: true, AllowPartial: true}.Marshal(to.Interface())
	if err != nil {
		return nil, fmt.Errorf("%w: could not marshal patched record data: %w", ErrInvalidPatch, err)
	}
	return replaceValue(dst, value), nil
}

var (
	errNoData  = errors.New("there is none")
	errBadAny  = errors.New("not a google.protobuf.Any")
	errNoType  = errors.New("its type URL is empty")
	errBadData = errors.New("not a valid message of its type")
)

// decode reads a serialized Any. The library's own errors are not passed on, so that no payload can be in them.
func (p *Projector) decode(payload []byte) (protoreflect.Message, error) {
	if payload == nil {
		return nil, errNoData
	}
	url, value, ok := splitAny(payload)
	if !ok {
		return nil, errBadAny
	}
	if len(url) == 0 {
		return nil, errNoType
	}
	mt, err := p.types.FindMessageByURL(string(url))
	if err != nil {
		return nil, fmt.Errorf("unknown type %q", url)
	}
	m := mt.New()
	if !p.unmarshal(value, m) {
		return nil, fmt.Errorf("%w (%s)", errBadData, m.Descriptor().FullName())
	}
	return m, nil
}

// unmarshal decodes a message, which a client has sent and may have made up to do harm: decoding into dynamic messages
// panics on a map entry whose key is there twice, the second time with the wrong wire type (seen with protobuf
// v1.36.12; generated messages are immune).
func (p *Projector) unmarshal(b []byte, m protoreflect.Message) (ok bool) {
	defer func() {
		if recover() != nil {
			ok = false
		}
	}()
	return (proto.UnmarshalOptions{AllowPartial: true, Resolver: p.types}).Unmarshal(b, m.Interface()) == nil
}

// replaceValue returns the serialized Any with another value and everything else as it was.
func replaceValue(payload, value []byte) []byte {
	out := make([]byte, 0, len(payload)+len(value))
	for b := payload; len(b) > 0; {
		num, typ, n := protowire.ConsumeField(b)
		if n < 0 { // splitAny has accepted it
			break
		}
		if num != anyValue || typ != protowire.BytesType {
			out = append(out, b[:n]...)
		}
		b = b[n:]
	}
	if len(value) == 0 {
		return out
	}
	out = protowire.AppendTag(out, anyValue, protowire.BytesType)
	return protowire.AppendBytes(out, value)
}

// maskTree is a field mask by path elements. An empty tree is the end of a path.
type maskTree map[string]maskTree

// maxMaskDepth bounds the recursion over a mask; types that nest deeper in themselves can not be patched that deep.
const maxMaskDepth = 100

func newMaskTree(paths []string) (maskTree, error) {
	root := maskTree{}
	for _, path := range paths {
		if strings.Count(path, ".") >= maxMaskDepth {
			return nil, fmt.Errorf("%w: field mask path with more than %d elements", ErrInvalidPatch, maxMaskDepth)
		}
		tree := root
		for name, rest, more := strings.Cut(path, "."); ; name, rest, more = strings.Cut(rest, ".") {
			sub, ok := tree[name]
			if ok && len(sub) == 0 { // a shorter path is here already
				break
			}
			if !more {
				tree[name] = nil
				break
			}
			if !ok {
				sub = maskTree{}
				tree[name] = sub
			}
			tree = sub
		}
	}
	return root, nil
}

// check reports the first path, in alphabetical order, that messages of the type do not have.
func (t maskTree) check(md protoreflect.MessageDescriptor) error {
	for _, name := range slices.Sorted(maps.Keys(t)) {
		fd := md.Fields().ByName(protoreflect.Name(name))
		if fd == nil {
			return fmt.Errorf("cannot overwrite unknown field %q in message %s", name, md.FullName())
		}
		sub := t[name]
		if len(sub) == 0 {
			continue
		}
		if fd.Message() == nil || fd.Cardinality() == protoreflect.Repeated {
			return fmt.Errorf("cannot overwrite sub-fields of field %q in message %s", name, md.FullName())
		}
		if err := sub.check(fd.Message()); err != nil {
			return err
		}
	}
	return nil
}

func (t maskTree) overwrite(dst, src protoreflect.Message) {
	fields := dst.Descriptor().Fields()
	for _, name := range slices.Sorted(maps.Keys(t)) {
		fd := fields.ByName(protoreflect.Name(name))
		sub := t[name]
		switch {
		case len(sub) > 0:
			if dst.Has(fd) || src.Has(fd) {
				sub.overwrite(dst.Mutable(fd).Message(), src.Get(fd).Message())
			}
		case src.Has(fd):
			dst.Set(fd, src.Get(fd))
		default:
			dst.Clear(fd)
		}
	}
}
