// Package auth admits to a gRPC server only requests that carry a token signed with a shared key, the way Pomerium's
// services authenticate to its databroker (wire contract 4.1 and 1.7).
//
// Every request has the metadata key jwt with a JSON Web Token whose only claim is its expiry, signed with HMAC by a 32-byte
// key that both parties share as a "shared secret" in base64. The token names nobody, so a caller is known by the key that
// signed it: who has a plain shared secret may do everything, and who has a named key ([NamedKey]) what its [Access] allows.
// Several secrets can be accepted at once, so that one can be replaced without an interruption: accept both, give the new one
// to all clients, and when [Config.OnAccept] no longer sees the old one, remove it.
package auth

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// MetadataKey is the gRPC metadata key of the token. Of several values the first counts: a Pomerium node that forwards a
// request appends its own token to the caller's.
const MetadataKey = "jwt"

// What a client is told (wire contract 1.7). Nothing that a client does depends on the texts, and they are the same for
// every kind of bad token so that they help nobody to forge one. The log has the reason.
var (
	errMissing = status.Error(codes.Unauthenticated, "unauthenticated")
	errInvalid = status.Error(codes.Unauthenticated, "invalid JWT")
	errNoKey   = status.Error(codes.Unavailable, "no shared key defined")

	errWithdrawn = status.Error(codes.Unauthenticated, "the key of this stream is no longer accepted")
)

// Reason is why a request was rejected, in a form fit for the label of a metric.
type Reason string

// The reasons.
const (
	ReasonMissing      Reason = "missing"       // no token
	ReasonMalformed    Reason = "malformed"     // not a JWT, or exp is missing or not a number
	ReasonAlgorithm    Reason = "algorithm"     // other than HS256, HS384 or HS512, for instance none
	ReasonBadSignature Reason = "bad_signature" // not made with an accepted key
	ReasonExtraClaim   Reason = "extra_claim"   // a claim other than a single exp
	ReasonExpired      Reason = "expired"       // more than five minutes ago
	ReasonClock        Reason = "clock"         // expired so recently that a clock may be wrong
	ReasonAccess       Reason = "access"        // the key may not be used for this
)

// Reasons returns all reasons, for a metric that is to show a zero before anything was rejected.
func Reasons() []Reason {
	return []Reason{ReasonMissing, ReasonMalformed, ReasonAlgorithm, ReasonBadSignature, ReasonExtraClaim, ReasonExpired, ReasonClock, ReasonAccess}
}

// Config says which tokens to accept. At least one secret or file is needed.
type Config struct {
	// Secrets are shared secrets in the form that [ParseKey] takes.
	Secrets []string

	// Files are files with one shared secret each, in the form that [ReadKey] takes. They are read again while requests
	// arrive, at most once per [reload.Interval]: a changed secret replaces the old one, which is then rejected at once (to
	// accept both for a time, give both). A file that is deleted, or has nothing in it any more, withdraws its secret. One
	// that cannot be read, or holds something that is no secret, is logged and its last good secret stays in force: that is
	// a mistake, and must not lock everybody out.
	Files []string

	// Keys are shared secrets with a name and rights. What is said about files above holds for theirs.
	Keys []NamedKey

	// Log gets a warning for a rejected request, once per client address and reason until the accepted keys change. Nil
	// means [slog.Default].
	Log *slog.Logger

	// OnAccept is called for each accepted request with its caller and the fingerprint of the key, for a metric. May be nil.
	// It is called by many goroutines at once and must be fast.
	OnAccept func(caller Caller, fingerprint string)

	// OnReject is called for each rejected request, for a metric. May be nil. It is called by many goroutines at once.
	OnReject func(Reason)
}

// Authenticator admits requests to a server. Its methods may be called from several goroutines at once. The zero value and
// nil admit nothing: requests fail with Unavailable, "no shared key defined".
type Authenticator struct {
	disabled bool
	ring     atomic.Pointer[ring]
	onAccept func(Caller, string)
	onReject func(Reason)
	log      peerLog
	streams  openStreams
}

// New returns an authenticator that accepts the secrets of a configuration. It fails if there is none, and if any of them or
// any file cannot be used; the error says which and why without showing it.
func New(c Config) (*Authenticator, error) {
	log := c.Log
	if log == nil {
		log = slog.Default()
	}
	a := &Authenticator{onAccept: c.OnAccept, onReject: c.OnReject, log: peerLog{log: log}}
	if err := a.Replace(c); err != nil {
		return nil, err
	}
	return a, nil
}

// Replace makes the secrets, files and keys of a configuration those that are accepted; the rest of it is ignored. If any of
// them cannot be used, it returns an error as [New] does and changes nothing. An authenticator that admits everybody stays
// as it is.
func (a *Authenticator) Replace(c Config) error {
	keys, err := newRing(c, a.log.log)
	if err != nil {
		return err
	}
	a.ring.Store(keys)
	return nil
}

// Disabled returns an authenticator that admits every request without looking for a token: whoever can reach the server can
// read, change and delete everything in it. It is a function of its own so that no empty or missing setting leads to it.
func Disabled() *Authenticator { return &Authenticator{disabled: true} }

// Fingerprints returns the fingerprints of the keys that are accepted now, without repetitions, in the order of the
// configuration. It is empty if authentication is disabled.
func (a *Authenticator) Fingerprints() []string {
	if a == nil {
		return nil
	}
	keys := a.ring.Load()
	if keys == nil {
		return nil
	}
	var prints []string
	for _, s := range inForce(keys.configured, nil) {
		if !slices.Contains(prints, s.fingerprint) {
			prints = append(prints, s.fingerprint)
		}
	}
	return prints
}

// signers appends the keys in force to buf.
func (a *Authenticator) signers(buf []*signer) []*signer {
	if a == nil {
		return nil
	}
	return a.ring.Load().signers(buf)
}

// Tap is for a grpc.InTapHandle: it judges a request by its header alone, before anything else of it is read, so that
// requests without a valid token cost next to nothing. [Authenticator.Unary] and [Authenticator.Stream] take its word, and
// are needed all the same: a server without the tap, or a tap that leaves requests out, must not let anybody in.
func (a *Authenticator) Tap(ctx context.Context, method string) (context.Context, error) {
	return a.admit(ctx, method)
}

// Recognizes reports whether a request carries a valid token, whatever it may be used for. It neither logs nor counts: it is for
// requests that need none.
func (a *Authenticator) Recognizes(ctx context.Context) bool {
	if a != nil && a.disabled {
		return true
	}
	tokens := metadata.ValueFromIncomingContext(ctx, MetadataKey)
	if len(tokens) == 0 {
		return false
	}
	var buf [8]*signer
	return verify(tokens[0], a.signers(buf[:0]), time.Now()).reason == ""
}

// Unary is a [grpc.UnaryServerInterceptor] that lets a request pass to the handler only with a valid token, by a key that may
// be used for it; the handler finds its caller with [CallerFrom]. The services for health checks (grpc.health.v1) and
// reflection need none.
func (a *Authenticator) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, err := a.admit(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// Stream is a [grpc.StreamServerInterceptor] that does for streams what [Authenticator.Unary] does for calls. The token is
// verified when the stream starts; the stream may outlive it, but not its key, see [Authenticator.EndStreams].
func (a *Authenticator) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, err := a.admit(ss.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	if Public(info.FullMethod) || a.disabled {
		return handler(srv, &callerStream{ss, ctx})
	}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer a.streams.add(ctx, end, info.FullMethod)()
	err = handler(srv, &callerStream{ss, ctx})
	if context.Cause(ctx) == errWithdrawn { //nolint:errorlint // this one, not one like it
		return errWithdrawn
	}
	return err
}

// callerStream is a stream whose context knows its caller.
type callerStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements [grpc.ServerStream].
func (s *callerStream) Context() context.Context { return s.ctx }

// admit returns the context of a request for method that may reach its handler.
func (a *Authenticator) admit(ctx context.Context, method string) (context.Context, error) {
	if Public(method) {
		return ctx, nil
	}
	if known, ok := ctx.Value(admissionKey{}).(*admission); ok && known.by == a {
		return ctx, nil
	}
	if a != nil && a.disabled {
		who, err := person(ctx)
		if err != nil {
			return nil, err
		}
		return context.WithValue(ctx, admissionKey{}, &admission{by: a, caller: Caller{Person: who, Access: AccessAdmin}}), nil
	}
	var buf [8]*signer
	keys := a.signers(buf[:0])
	if len(keys) == 0 {
		return nil, errNoKey
	}
	tokens := metadata.ValueFromIncomingContext(ctx, MetadataKey)
	if len(tokens) == 0 {
		a.reject(ctx, method, verdict{reason: ReasonMissing}, time.Time{})
		return nil, errMissing
	}
	now := time.Now()
	v := verify(tokens[0], keys, now)
	if v.reason != "" {
		a.reject(ctx, method, v, now)
		return nil, errInvalid
	}
	caller := v.signer.caller
	if access := Needed(method); caller.Access < access {
		v.reason = ReasonAccess
		a.reject(ctx, method, v, now)
		return nil, status.Errorf(codes.PermissionDenied, "the key %s has access %v, and %s needs %v",
			caller.Key, caller.Access, strings.TrimPrefix(method, "/"), access)
	}
	var err error
	if caller.Person, err = person(ctx); err != nil {
		return nil, err
	}
	if a.onAccept != nil {
		a.onAccept(caller, v.signer.fingerprint)
	}
	if v.expires > now.Add(TokenLifetime+clockMargin).Unix() {
		a.log.longLived(ctx, method, v, now, a.Fingerprints())
	}
	return context.WithValue(ctx, admissionKey{}, &admission{by: a, caller: caller, key: v.signer.key}), nil
}

func (a *Authenticator) reject(ctx context.Context, method string, v verdict, now time.Time) {
	if a.onReject != nil {
		a.onReject(v.reason)
	}
	a.log.rejected(ctx, method, v, now, a.Fingerprints())
}

// Public reports whether a method may be called without a token. The list is of whole service names, so that a service that
// is added later is protected until somebody decides otherwise.
func Public(method string) bool {
	service := strings.TrimPrefix(method, "/")
	service = service[:max(0, strings.LastIndexByte(service, '/'))] // the last one, as grpc itself does
	switch service {
	case "grpc.health.v1.Health",
		"grpc.reflection.v1.ServerReflection",
		"grpc.reflection.v1alpha.ServerReflection":
		return true
	}
	return false
}
