package server

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"pgbroker/db"
	"pgbroker/proto/databroker"
	"pgbroker/server/changefeed"
	"pgbroker/server/projection"
	"pgbroker/server/schema"
)

// projector reads payloads of all types that are known at the moment: those of the product, and those that users have
// added to the database. It follows the database while it is used.
type projector struct {
	queries *db.Queries
	feed    *changefeed.Feed
	logger  *slog.Logger

	known   atomic.Pointer[knownTypes] // nil before the first load
	loading sync.Mutex                 // one load at a time
}

// knownTypes is one state of what is known.
type knownTypes struct {
	version int64
	*projection.Projector
}

// Project reads a payload.
func (p *projector) Project(payload []byte) projection.Projection {
	return p.known.Load().Project(payload)
}

// Patch applies a field mask.
func (p *projector) Patch(dst, src []byte, mask *fieldmaskpb.FieldMask) ([]byte, error) {
	return p.known.Load().Patch(dst, src, mask)
}

// load makes known what the database says at the moment.
func (p *projector) load(ctx context.Context) (*knownTypes, error) {
	p.loading.Lock()
	defer p.loading.Unlock()
	version, err := p.queries.SchemaVersion(ctx)
	if err != nil {
		return nil, err
	}
	if known := p.known.Load(); known != nil && known.version == version {
		return known, nil
	}
	found, problems, err := schema.Load(ctx, p.queries)
	if err != nil {
		return nil, err
	}
	if problems != nil {
		p.logger.ErrorContext(ctx, "message types that are stored in the database cannot be used; records of theirs have no projection", "error", problems)
	}
	known := &knownTypes{version: found.Version, Projector: projection.New(found.Types, found.Redacted...)}
	if before := p.known.Swap(known); before != nil {
		p.logger.InfoContext(ctx, "message types and redaction reloaded", "version", known.version)
	}
	return known, nil
}

// follow loads what is known each time that the database announces a change, until ctx ends. It comes with the options,
// so that nothing is asked while nothing changes.
func (p *projector) follow(ctx context.Context) {
	var seen *changefeed.Options
	for {
		changed := p.feed.Watch()
		var retry <-chan time.Time
		if options := p.feed.Options(); options != seen {
			if _, err := p.load(ctx); err == nil {
				seen = options
			} else if ctx.Err() == nil {
				p.logger.WarnContext(ctx, "cannot load message types; it is tried again", "error", err)
				retry = time.After(time.Second)
			}
		}
		select {
		case <-changed:
		case <-retry:
		case <-ctx.Done():
			return
		}
	}
}

// prepare is an interceptor that lets no payload be read before it is known what can be read.
func (p *projector) prepare(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if p.known.Load() == nil {
		switch request.(type) {
		case *databroker.PutRequest, *databroker.PatchRequest:
			if _, err := p.load(ctx); err != nil {
				return nil, err
			}
		}
	}
	return handler(ctx, request)
}
