package auth

import (
	"context"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/peer"
)

// clockMargin is how far apart clocks may be that are called right.
const clockMargin = 5 * time.Minute

// maxRemembered is how many pairs of client and reason a peerLog keeps apart. At about 100 bytes each this bounds its memory
// when somebody connects from very many addresses; what is forgotten may be logged again.
const maxRemembered = 4096

// explanations say in the log what the reasons mean and what to look at.
var explanations = map[Reason]string{
	ReasonMissing:      "request rejected: it has no token; the client has no shared secret configured or is not meant for this server",
	ReasonMalformed:    "request rejected: its token is not a JWT with an expiry as its claim",
	ReasonAlgorithm:    "request rejected: its token is not signed with HS256, HS384 or HS512",
	ReasonBadSignature: "request rejected: its token is signed with another shared secret; compare fingerprints on both sides",
	ReasonExtraClaim:   "request rejected: its token has claims other than exp, the only one allowed",
	ReasonExpired:      "request rejected: its token has expired; the client reuses tokens or a clock is wrong",
	ReasonClock:        "request rejected: its token has just expired; the client reuses tokens or a clock is wrong",
	ReasonAccess:       "request rejected: its key has less access than it needs",
	longLived:          "request accepted, but its token expires later than a new one would; a clock may be wrong",
}

// longLived is a reason to write to the log, though not to reject.
const longLived Reason = "long_lived"

// peerLog writes about a client and a reason once, because a client that is set up wrongly tries again for ever.
type peerLog struct {
	log *slog.Logger

	mu           sync.Mutex
	fingerprints []string // of the keys accepted when the maps began; other keys make old news new
	// When recent is full it becomes older, and what was older is forgotten unless it comes up again.
	recent, older map[peerReason]struct{}
}

type peerReason struct {
	host   string
	reason Reason
	key    string // its name, where it is known
}

// rejected logs that a request for method was rejected at now.
func (l *peerLog) rejected(ctx context.Context, method string, v verdict, now time.Time, fingerprints []string) {
	host := peerHost(ctx)
	if !l.first(peerReason{host, v.reason, v.keyName()}, fingerprints) {
		return
	}
	attrs := []slog.Attr{
		slog.String("peer", host),
		slog.String("reason", string(v.reason)),
		slog.String("method", method),
		slog.Any("accepted_keys", fingerprints),
	}
	if v.signer != nil {
		attrs = append(attrs, slog.String("key", v.keyName()))
	}
	if v.reason == ReasonAccess {
		attrs = append(attrs, slog.String("access", v.signer.caller.Access.String()), slog.String("needed", Needed(method).String()))
	}
	if v.reason == ReasonExpired || v.reason == ReasonClock {
		attrs = append(attrs, slog.Time("expired", time.Unix(v.expires, 0).UTC()), slog.Time("now", now.UTC()))
	}
	l.log.LogAttrs(ctx, slog.LevelWarn, explanations[v.reason], attrs...)
}

// longLived logs that a request was accepted at now although its token is valid for longer than clients make them.
func (l *peerLog) longLived(ctx context.Context, method string, v verdict, now time.Time, fingerprints []string) {
	host := peerHost(ctx)
	if !l.first(peerReason{host, longLived, v.keyName()}, fingerprints) {
		return
	}
	l.log.LogAttrs(ctx, slog.LevelWarn, explanations[longLived],
		slog.String("peer", host),
		slog.String("reason", string(ReasonClock)),
		slog.String("method", method),
		slog.String("key", v.keyName()),
		slog.Int64("expires_unix", v.expires), // any number at all, so not a time
		slog.Time("now", now.UTC()),
	)
}

// keyName is the name of the key that signed a token, or nothing.
func (v verdict) keyName() string {
	if v.signer == nil {
		return ""
	}
	return v.signer.caller.Key
}

// first reports whether nothing was logged yet about a client for a reason, and remembers that now it was.
func (l *peerLog) first(id peerReason, fingerprints []string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !slices.Equal(fingerprints, l.fingerprints) || l.recent == nil {
		l.fingerprints = fingerprints
		l.recent, l.older = make(map[peerReason]struct{}), nil
	}
	if _, ok := l.recent[id]; ok {
		return false
	}
	if len(l.recent) >= maxRemembered/2 {
		l.recent, l.older = make(map[peerReason]struct{}), l.recent
	}
	l.recent[id] = struct{}{}
	_, known := l.older[id]
	return !known
}

// peerHost returns the address of the client without its port, which changes with every connection.
func peerHost(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return "unknown"
	}
	addr := p.Addr.String()
	if host, _, err := net.SplitHostPort(addr); err == nil {
		return host
	}
	return addr // a Unix socket
}
