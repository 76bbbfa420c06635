package auth

import (
	"context"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Access is what a key may be used for. Each level includes those below it.
type Access uint8

// The levels of access.
const (
	AccessNone  Access = iota // nothing: what the zero Caller may do
	AccessRead                // look at records and follow their changes
	AccessWrite               // change records, take leases, report services
	AccessAdmin               // change options of types, delete everything
)

var accessNames = [...]string{AccessNone: "none", AccessRead: "read", AccessWrite: "write", AccessAdmin: "admin"}

// String returns the name of a level as it is configured.
func (a Access) String() string {
	if int(a) < len(accessNames) {
		return accessNames[a]
	}
	return fmt.Sprintf("Access(%d)", uint8(a))
}

// ParseAccess returns the level of a name: read, write or admin.
func ParseAccess(name string) (Access, error) {
	if i := slices.Index(accessNames[:], name); i > int(AccessNone) {
		return Access(i), nil
	}
	return AccessNone, fmt.Errorf("%.40q: want read, write or admin", name)
}

// needed is the access that each method needs. A method that is missing here needs admin, so that one that is added is
// protected until somebody decides otherwise; a test of the server holds the table against what it offers.
var needed = map[string]Access{
	"/databroker.DataBrokerService/Get":           AccessRead,
	"/databroker.DataBrokerService/GetOptions":    AccessRead,
	"/databroker.DataBrokerService/ListTypes":     AccessRead,
	"/databroker.DataBrokerService/Query":         AccessRead,
	"/databroker.DataBrokerService/ServerInfo":    AccessRead,
	"/databroker.DataBrokerService/Sync":          AccessRead,
	"/databroker.DataBrokerService/SyncLatest":    AccessRead,
	"/databroker.DataBrokerService/AcquireLease":  AccessWrite,
	"/databroker.DataBrokerService/Patch":         AccessWrite,
	"/databroker.DataBrokerService/Put":           AccessWrite,
	"/databroker.DataBrokerService/ReleaseLease":  AccessWrite,
	"/databroker.DataBrokerService/RenewLease":    AccessWrite,
	"/databroker.DataBrokerService/Clear":         AccessAdmin,
	"/databroker.DataBrokerService/SetOptions":    AccessAdmin,
	"/databroker.CheckpointService/GetCheckpoint": AccessRead,
	"/databroker.CheckpointService/SetCheckpoint": AccessWrite,
	"/registry.Registry/List":                     AccessRead,
	"/registry.Registry/Watch":                    AccessRead,
	"/registry.Registry/Report":                   AccessWrite,
}

// Methods returns the full names of all methods whose access somebody has decided on.
func Methods() []string {
	methods := make([]string, 0, len(needed))
	for method := range needed {
		methods = append(methods, method)
	}
	slices.Sort(methods)
	return methods
}

// Needed returns the access that a method needs, by its full name. It says nothing of those that are [Public].
func Needed(method string) Access {
	if access, ok := needed[method]; ok {
		return access
	}
	return AccessAdmin
}

// SharedSecret is the name of keys that have none of their own: those of [Config.Secrets] and [Config.Files].
const SharedSecret = "shared-secret"

// Caller is who makes a request, as far as a server can know.
type Caller struct {
	// Key is the name of the key that signed the request. It is empty where requests are not authenticated.
	Key string
	// Person is on whose behalf the request is made, as its sender says: nobody has checked it. Empty if nobody is named.
	Person string
	// Access is what the key may be used for.
	Access Access
}

// admission is what a context keeps of an admitted request.
type admission struct {
	by     *Authenticator
	caller Caller
	key    Key // the zero Key where requests are not authenticated
}

type admissionKey struct{}

// CallerFrom returns who makes the request that ctx belongs to. It is the zero Caller for requests that need no token and
// for contexts of no request, such as that of periodic work.
func CallerFrom(ctx context.Context) Caller {
	if a, ok := ctx.Value(admissionKey{}).(*admission); ok {
		return a.caller
	}
	return Caller{}
}

// PersonKey is the gRPC metadata key that names on whose behalf a request is made.
const PersonKey = "pgbroker-on-behalf-of"

// MaxPersonSize is the longest name of a person in bytes.
const MaxPersonSize = 200

// OnBehalfOf returns a context whose requests name a person. The name is sent with everything but printable ASCII, and the
// percent sign, in percent-encoding, because metadata may hold nothing else. An empty name is not sent.
func OnBehalfOf(ctx context.Context, person string) (context.Context, error) {
	if person == "" {
		return ctx, nil
	}
	if err := checkPerson(person); err != nil {
		return nil, fmt.Errorf("on behalf of: %w", err)
	}
	var b strings.Builder
	for i := range len(person) {
		if c := person[i]; c < ' ' || c > '~' || c == '%' {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return metadata.AppendToOutgoingContext(ctx, PersonKey, b.String()), nil
}

// person returns the person that a request names.
func person(ctx context.Context) (string, error) {
	values := metadata.ValueFromIncomingContext(ctx, PersonKey)
	if len(values) == 0 {
		return "", nil
	}
	refuse := func(problem string) (string, error) {
		return "", status.Error(codes.InvalidArgument, "metadata "+PersonKey+": "+problem)
	}
	if len(values) > 1 {
		return refuse("is given more than once")
	}
	name, err := url.PathUnescape(values[0])
	if err != nil {
		return refuse("want a percent sign only before two hexadecimal digits")
	}
	if err := checkPerson(name); err != nil {
		return refuse(err.Error())
	}
	return name, nil
}

// checkPerson refuses what cannot be shown in a line of a log or a table.
func checkPerson(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("empty, want the name of a person")
	case len(name) > MaxPersonSize:
		return fmt.Errorf("%d bytes, want at most %d", len(name), MaxPersonSize)
	case !utf8.ValidString(name):
		return fmt.Errorf("not UTF-8")
	case strings.TrimSpace(name) != name:
		return fmt.Errorf("white space before or after it is not allowed")
	}
	for _, r := range name {
		if !unicode.IsPrint(r) {
			return fmt.Errorf("has a character that cannot be printed (U+%04X)", r)
		}
	}
	return nil
}
