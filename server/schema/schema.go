// Package schema knows message types that users have added to those of the product: it checks sets of protobuf
// descriptors, finds types in them, and writes them down in a form that SQL can work with.
package schema

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	// The descriptors of the product, which sets may import.
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"pgbroker/proto/device"
	"pgbroker/proto/events"
	"pgbroker/proto/identity"
	"pgbroker/proto/oauth21"
	"pgbroker/proto/rfc7591"
	"pgbroker/proto/session"
	"pgbroker/proto/user"
)

// builtin are the files that payloads of the product are declared in.
var builtin = []protoreflect.FileDescriptor{
	anypb.File_google_protobuf_any_proto,
	durationpb.File_google_protobuf_duration_proto,
	emptypb.File_google_protobuf_empty_proto,
	fieldmaskpb.File_google_protobuf_field_mask_proto,
	structpb.File_google_protobuf_struct_proto,
	timestamppb.File_google_protobuf_timestamp_proto,
	wrapperspb.File_google_protobuf_wrappers_proto,
	device.File_device_device_proto,
	events.File_events_events_proto,
	identity.File_identity_identity_proto,
	oauth21.File_oauth21_oauth21_proto,
	rfc7591.File_rfc7591_rfc7591_proto,
	session.File_session_session_proto,
	user.File_user_user_proto,
}

// Set is a set of descriptors that users have added under a name.
type Set struct {
	Name string
	// Descriptors is a serialized google.protobuf.FileDescriptorSet.
	Descriptors []byte
}

// parse decodes the set. What it returns has at least one file, and each has a name.
func (s Set) parse() ([]*descriptorpb.FileDescriptorProto, error) {
	const hint = "make one with `protoc --include_imports --descriptor_set_out=FILE` or `buf build -o FILE.binpb`"
	files := new(descriptorpb.FileDescriptorSet)
	if err := proto.Unmarshal(s.Descriptors, files); err != nil {
		return nil, fmt.Errorf("schema %s: not a serialized google.protobuf.FileDescriptorSet: %s", s.Name, hint)
	}
	if len(files.File) == 0 {
		return nil, fmt.Errorf("schema %s: holds no file: %s", s.Name, hint)
	}
	for _, file := range files.File {
		if file.GetName() == "" {
			return nil, fmt.Errorf("schema %s: holds a file without a name: %s", s.Name, hint)
		}
	}
	return files.File, nil
}

// Types finds message types: those linked into the program, and those of sets. It is a projection.Resolver.
type Types struct {
	files *protoregistry.Files // of the sets
	added *dynamicpb.Types
	owner map[string]string // path of a file -> name of the set
}

// New returns the types of the product and of the sets. Sets that do not fit, because they are broken, lack something
// or contradict others, are left out, each with one of the errors that New returns joined; the rest can be used.
func New(sets []Set) (*Types, error) {
	t := &Types{files: new(protoregistry.Files), owner: make(map[string]string)}
	var problems []error
	for _, set := range sets {
		grown, err := t.with(set)
		if err != nil {
			problems = append(problems, err)
			continue
		}
		t = grown
	}
	t.added = dynamicpb.NewTypes(t.files)
	return t, errors.Join(problems...)
}

// with returns the types with those of one more set.
func (t *Types) with(set Set) (*Types, error) {
	files, err := set.parse()
	if err != nil {
		return nil, err
	}
	grown := &Types{files: new(protoregistry.Files), owner: make(map[string]string)}
	t.files.RangeFiles(func(fd protoreflect.FileDescriptor) bool {
		grown.owner[fd.Path()] = t.owner[fd.Path()]
		err = grown.files.RegisterFile(fd)
		return err == nil
	})
	if err != nil {
		return nil, err
	}
	pending := make(map[string]*descriptorpb.FileDescriptorProto, len(files))
	for _, file := range files {
		if pending[file.GetName()] != nil {
			return nil, fmt.Errorf("schema %s: holds %s twice", set.Name, file.GetName())
		}
		pending[file.GetName()] = file
	}
	adding := &adding{types: grown, set: set.Name, pending: pending, begun: make(map[string]bool)}
	for _, file := range files {
		if err := adding.file(file); err != nil {
			return nil, fmt.Errorf("schema %s: %w", set.Name, err)
		}
	}
	return grown, nil
}

// adding is the work of adding the files of a set, each after those that it imports.
type adding struct {
	types   *Types
	set     string
	pending map[string]*descriptorpb.FileDescriptorProto
	begun   map[string]bool
}

func (a *adding) file(file *descriptorpb.FileDescriptorProto) error {
	path := file.GetName()
	if a.begun[path] {
		return nil
	}
	a.begun[path] = true
	for _, dependency := range file.GetDependency() {
		next := a.pending[dependency]
		if next != nil {
			if err := a.file(next); err != nil {
				return err
			}
		}
		_, err := a.FindFileByPath(dependency)
		switch _, known := protoregistry.GlobalFiles.FindFileByPath(dependency); {
		case next != nil && err != nil && known != nil:
			return fmt.Errorf("%s and %s import each other", path, dependency)
		case next == nil && known != nil: // though another set may have it: sets come and go
			return fmt.Errorf("%s imports %s, which is neither in the set nor part of pgbroker: "+
				"make the set with its imports (protoc --include_imports)", path, dependency)
		}
	}
	if isWellKnown(path) {
		return nil // everybody brings those along, in versions that differ in nothing that matters
	}
	fd, err := protodesc.NewFile(file, a)
	if err != nil {
		return fmt.Errorf("%s: %s", path, plain(err))
	}
	if known, err := a.FindFileByPath(path); err == nil {
		if Compile(known).equal(Compile(fd)) {
			return nil
		}
		return fmt.Errorf("%s is another file of that name than that of %s", path, a.types.ownerOf(known))
	}
	if err := a.conflict(fd); err != nil {
		return err
	}
	if err := a.types.files.RegisterFile(fd); err != nil {
		return fmt.Errorf("%s: %s", path, plain(err))
	}
	a.types.owner[path] = a.set
	return nil
}

// conflict reports the first name in a file that is taken by a file of the product or of another set.
func (a *adding) conflict(fd protoreflect.FileDescriptor) error {
	for _, d := range declarations(fd) {
		if known, err := a.FindDescriptorByName(d.FullName()); err == nil {
			return fmt.Errorf("%s declares %s, which %s has already, in %s",
				fd.Path(), d.FullName(), a.types.ownerOf(known.ParentFile()), known.ParentFile().Path())
		}
	}
	return nil
}

// FindFileByPath implements protodesc.Resolver.
func (a *adding) FindFileByPath(path string) (protoreflect.FileDescriptor, error) {
	if fd, err := protoregistry.GlobalFiles.FindFileByPath(path); err == nil {
		return fd, nil
	}
	return a.types.files.FindFileByPath(path)
}

// FindDescriptorByName implements protodesc.Resolver.
func (a *adding) FindDescriptorByName(name protoreflect.FullName) (protoreflect.Descriptor, error) {
	if d, err := protoregistry.GlobalFiles.FindDescriptorByName(name); err == nil {
		return d, nil
	}
	return a.types.files.FindDescriptorByName(name)
}

// ownerOf says in words whose a file is.
func (t *Types) ownerOf(fd protoreflect.FileDescriptor) string {
	if owner, ok := t.owner[fd.Path()]; ok {
		return "schema " + owner
	}
	return "pgbroker itself"
}

func isWellKnown(path string) bool { return strings.HasPrefix(path, "google/protobuf/") }

// declarations returns everything in a file that has a name of its own among all files.
func declarations(fd protoreflect.FileDescriptor) []protoreflect.Descriptor {
	var found []protoreflect.Descriptor
	for i := range fd.Messages().Len() {
		found = append(found, fd.Messages().Get(i))
	}
	for i := range fd.Enums().Len() {
		found = append(found, fd.Enums().Get(i))
		for j := range fd.Enums().Get(i).Values().Len() {
			found = append(found, fd.Enums().Get(i).Values().Get(j))
		}
	}
	for i := range fd.Extensions().Len() {
		found = append(found, fd.Extensions().Get(i))
	}
	for i := range fd.Services().Len() {
		found = append(found, fd.Services().Get(i))
	}
	return found
}

// plain takes protobuf's prefix off an error, which it writes with a random space on purpose.
func plain(err error) string {
	message := strings.ReplaceAll(err.Error(), "\u00a0", " ")
	return strings.TrimSpace(strings.TrimPrefix(message, "proto:"))
}

// FindMessageByName implements protoregistry.MessageTypeResolver.
func (t *Types) FindMessageByName(name protoreflect.FullName) (protoreflect.MessageType, error) {
	if mt, err := protoregistry.GlobalTypes.FindMessageByName(name); err == nil {
		return mt, nil
	}
	return t.added.FindMessageByName(name)
}

// FindMessageByURL implements protoregistry.MessageTypeResolver.
func (t *Types) FindMessageByURL(url string) (protoreflect.MessageType, error) {
	if mt, err := protoregistry.GlobalTypes.FindMessageByURL(url); err == nil {
		return mt, nil
	}
	return t.added.FindMessageByURL(url)
}

// FindExtensionByName implements protoregistry.ExtensionTypeResolver.
func (t *Types) FindExtensionByName(name protoreflect.FullName) (protoreflect.ExtensionType, error) {
	if et, err := protoregistry.GlobalTypes.FindExtensionByName(name); err == nil {
		return et, nil
	}
	return t.added.FindExtensionByName(name)
}

// FindExtensionByNumber implements protoregistry.ExtensionTypeResolver.
func (t *Types) FindExtensionByNumber(message protoreflect.FullName, number protoreflect.FieldNumber) (protoreflect.ExtensionType, error) {
	if et, err := protoregistry.GlobalTypes.FindExtensionByNumber(message, number); err == nil {
		return et, nil
	}
	return t.added.FindExtensionByNumber(message, number)
}

// Definitions returns what the sets declare, by set.
func (t *Types) Definitions() map[string]Definitions {
	bySet := make(map[string]Definitions)
	paths := make([]string, 0, len(t.owner))
	for path := range t.owner {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	for _, path := range paths {
		fd, err := t.files.FindFileByPath(path)
		if err != nil {
			continue // owner and files have the same paths
		}
		bySet[t.owner[path]] = bySet[t.owner[path]].plus(Compile(fd))
	}
	return bySet
}

// Builtin returns what the files of the product declare.
func Builtin() Definitions {
	var all Definitions
	for _, fd := range builtin {
		all = all.plus(Compile(fd))
	}
	return all
}
