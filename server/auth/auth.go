// Package auth admits to a gRPC server only requests that carry a token signed with a shared key, the way Pomerium's
// services authenticate to its databroker (wire contract 4.1 and 1.7).
//
// Every request has the metadata key jwt with a JSON Web Token whose only claim is its expiry, signed with HMAC by a 32-byte
// key that all parties share as a "shared secret" in base64. There are no users and no permissions: who has the secret may
// do everything. Several secrets can be accepted at once, so that one can be replaced without an interruption: accept both,
// give the new one to all clients, and when [Config.OnAccept] no longer sees the old one, remove it.
package auth

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"pgbroker/server/reload"
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
)

// Reasons returns all reasons, for a metric that is to show a zero before anything was rejected.
func Reasons() []Reason {
	return []Reason{ReasonMissing, ReasonMalformed, ReasonAlgorithm, ReasonBadSignature, ReasonExtraClaim, ReasonExpired, ReasonClock}
}

// Config says which tokens to accept. At least one secret or file is needed.
type Config struct {
	// Secrets are shared secrets in the form that [ParseKey] takes.
	Secrets []string

	// Files are files with one shared secret each, in the form that [ReadKey] takes. They are read again while requests
	// arrive, at most once per [reload.Interval]: a changed secret replaces the old one, which is then rejected at once (to
	// accept both for a time, give both). A file that cannot be used any more is logged and its last good secret stays in
	// force.
	Files []string

	// Log gets a warning for a rejected request, once per client address and reason until the accepted keys change. Nil
	// means [slog.Default].
	Log *slog.Logger

	// OnAccept is called for each accepted token with the fingerprint of its key, for a metric. May be nil. It is called by
	// many goroutines at once and must be fast.
	OnAccept func(fingerprint string)

	// OnReject is called for each rejected request, for a metric. May be nil. It is called by many goroutines at once.
	OnReject func(Reason)
}

// Authenticator admits requests to a server. Its methods may be called from several goroutines at once. The zero value and
// nil admit nothing: requests fail with Unavailable, "no shared key defined".
type Authenticator struct {
	disabled bool
	keys     []*reload.Value[*signer]
	onAccept func(string)
	onReject func(Reason)
	log      peerLog
}

// New returns an authenticator that accepts the secrets of a configuration. It fails if there is none, and if any of them or
// any file cannot be used; the error says which and why without showing it.
func New(c Config) (*Authenticator, error) {
	if len(c.Secrets)+len(c.Files) == 0 {
		return nil, errors.New("no shared secret: give at least one, or turn authentication off explicitly")
	}
	log := c.Log
	if log == nil {
		log = slog.Default()
	}
	a := &Authenticator{onAccept: c.OnAccept, onReject: c.OnReject, log: peerLog{log: log}}
	for i, secret := range c.Secrets {
		name := "shared secret"
		if len(c.Secrets) > 1 {
			name = fmt.Sprintf("shared secret %d of %d", i+1, len(c.Secrets))
		}
		key, err := parseKey(secret)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		constant, err := reload.New(name, nil, func([][]byte) (*signer, error) { return newSigner(key), nil }, log)
		if err != nil {
			return nil, err
		}
		a.keys = append(a.keys, constant)
	}
	for _, path := range c.Files {
		file, err := openKeyFile(path, log)
		if err != nil {
			return nil, err
		}
		a.keys = append(a.keys, file)
	}
	return a, nil
}

// Disabled returns an authenticator that admits every request without looking for a token: whoever can reach the server can
// read, change and delete everything in it. It is a function of its own so that no empty or missing setting leads to it.
func Disabled() *Authenticator { return &Authenticator{disabled: true} }

// Fingerprints returns the fingerprints of the keys that are accepted now, without repetitions, in the order of the
// configuration. It is empty if authentication is disabled.
func (a *Authenticator) Fingerprints() []string {
	var prints []string
	for _, s := range a.signers(nil) {
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
	for _, k := range a.keys {
		buf = append(buf, k.Get())
	}
	return buf
}

// admitted marks the context of a request that Tap has let pass.
type admitted struct{ by *Authenticator }

// Tap is for a grpc.InTapHandle: it judges a request by its header alone, before anything else of it is read, so that
// requests without a valid token cost next to nothing. [Authenticator.Unary] and [Authenticator.Stream] take its word, and
// are needed all the same: a server without the tap, or a tap that leaves requests out, must not let anybody in.
func (a *Authenticator) Tap(ctx context.Context, method string) (context.Context, error) {
	if err := a.admit(ctx, method); err != nil {
		return nil, err
	}
	return context.WithValue(ctx, admitted{a}, true), nil
}

// Unary is a [grpc.UnaryServerInterceptor] that lets a request pass to the handler only with a valid token. The services
// for health checks (grpc.health.v1) and reflection need none.
func (a *Authenticator) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if err := a.admit(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// Stream is a [grpc.StreamServerInterceptor] that does for streams what [Authenticator.Unary] does for calls. The token is
// verified when the stream starts; the stream may outlive it.
func (a *Authenticator) Stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if err := a.admit(ss.Context(), info.FullMethod); err != nil {
		return err
	}
	return handler(srv, ss)
}

// admit returns nil if a request for method may reach its handler.
func (a *Authenticator) admit(ctx context.Context, method string) error {
	if Public(method) || a != nil && a.disabled || ctx.Value(admitted{a}) != nil {
		return nil
	}
	var buf [4]*signer
	keys := a.signers(buf[:0])
	if len(keys) == 0 {
		return errNoKey
	}
	tokens := metadata.ValueFromIncomingContext(ctx, MetadataKey)
	if len(tokens) == 0 {
		a.reject(ctx, method, verdict{reason: ReasonMissing}, time.Time{})
		return errMissing
	}
	now := time.Now()
	v := verify(tokens[0], keys, now)
	if v.reason != "" {
		a.reject(ctx, method, v, now)
		return errInvalid
	}
	if a.onAccept != nil {
		a.onAccept(v.signer.fingerprint)
	}
	if v.expires > now.Add(TokenLifetime+clockMargin).Unix() {
		a.log.longLived(ctx, method, v, now, a.Fingerprints())
	}
	return nil
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
