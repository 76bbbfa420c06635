package server

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"pgbroker/db"
	"pgbroker/proto/registry"
)

const (
	// serviceTTL is how long a reported service stays listed.
	serviceTTL = 30 * time.Second
	// serviceReportInterval is how soon reporters are told to report again: soon enough that one lost
	// report does not make the service flicker.
	serviceReportInterval = 10 * time.Second

	maxReportedServices = 1000
	maxEndpointBytes    = 2048
	// maxListedServices bounds a list, which is one message: with the longest endpoints it has 2 MiB.
	maxListedServices = 1000
)

// registryServer serves registry.Registry.
type registryServer struct {
	registry.UnimplementedRegistryServer
	*Server
}

// Report registers services for a while.
func (s *registryServer) Report(ctx context.Context, request *registry.RegisterRequest) (*registry.RegisterResponse, error) {
	if n := len(request.Services); n > maxReportedServices {
		return nil, invalid("services", "%d services, at most %d are allowed", n, maxReportedServices)
	}
	params := db.ServicesReportParams{TTL: serviceTTL}
	for i, service := range request.Services {
		field := fmt.Sprintf("services[%d]", i)
		if service.GetKind() == registry.ServiceKind_UNDEFINED_DO_NOT_USE {
			return nil, invalid(field+".kind", "must be set")
		}
		if err := checkText(field+".endpoint", service.GetEndpoint(), maxEndpointBytes); err != nil {
			return nil, err
		}
		// The endpoint may hold a password: it is not quoted.
		if endpoint, err := url.Parse(service.GetEndpoint()); err != nil || !endpoint.IsAbs() {
			return nil, invalid(field+".endpoint", "must be an absolute URI")
		}
		params.Kinds = append(params.Kinds, int32(service.GetKind()))
		params.Endpoints = append(params.Endpoints, service.GetEndpoint())
	}
	if len(params.Kinds) > 0 {
		err := db.Retry(ctx, func(ctx context.Context) error { return s.changes.ServicesReport(ctx, params) })
		if err != nil {
			return nil, fmt.Errorf("report services: %w", err)
		}
	}
	return &registry.RegisterResponse{CallBackAfter: durationpb.New(serviceReportInterval)}, nil
}

// List returns the live services of the given kinds, or of all.
func (s *registryServer) List(ctx context.Context, request *registry.ListRequest) (*registry.ServiceList, error) {
	var rows []db.ServicesListRow
	err := db.RetryRead(ctx, func(ctx context.Context) (err error) {
		rows, err = s.services.read(ctx, s.reads)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list services: %w", err)
	}
	return serviceList(rows, request.Kinds), nil
}

// Watch sends the list at once, and again each time that it has changed.
func (s *registryServer) Watch(request *registry.ListRequest, stream grpc.ServerStreamingServer[registry.ServiceList]) error {
	ctx, done := s.streamContext(stream.Context())
	defer done()
	// The first list is at least as new as whatever the watcher knows, and the view only moves forward.
	if err := s.services.refresh(ctx); err != nil {
		return s.streamError(ctx, fmt.Errorf("list services: %w", err))
	}
	var sent *registry.ServiceList
	for {
		view := s.services.view.Load()
		if list := serviceList(view.rows, request.Kinds); sent == nil || !proto.Equal(list, sent) {
			if err := stream.Send(list); err != nil {
				return err
			}
			sent = list
		}
		select {
		case <-view.replaced:
		case <-ctx.Done():
			return s.streamError(ctx, ctx.Err())
		}
	}
}

func serviceList(rows []db.ServicesListRow, kinds []registry.ServiceKind) *registry.ServiceList {
	list := new(registry.ServiceList)
	for _, row := range rows {
		kind := registry.ServiceKind(row.Kind)
		if len(kinds) == 0 || slices.Contains(kinds, kind) {
			list.Services = append(list.Services, &registry.Service{Kind: kind, Endpoint: row.Endpoint})
		}
	}
	return list
}

// serviceFeed follows the live services for all watchers of a replica.
type serviceFeed struct {
	queries *db.Queries
	logger  *slog.Logger
	wake    chan struct{}
	asked   chan chan error // by watchers who wait for a read
	view    atomic.Pointer[serviceView]
	logged  atomic.Int64 // Unix time of the latest log line about too many
}

type serviceView struct {
	rows     []db.ServicesListRow
	replaced chan struct{} // closed when a newer view is there
}

func newServiceFeed(queries *db.Queries, logger *slog.Logger) *serviceFeed {
	f := &serviceFeed{queries: queries, logger: logger, wake: make(chan struct{}, 1), asked: make(chan chan error)}
	f.view.Store(&serviceView{replaced: make(chan struct{})})
	return f
}

// read returns the live services, as many as one message can list.
func (f *serviceFeed) read(ctx context.Context, queries *db.Queries) ([]db.ServicesListRow, error) {
	rows, err := queries.ServicesList(ctx, maxListedServices+1)
	if err != nil || len(rows) <= maxListedServices {
		return rows, err
	}
	now := time.Now().Unix()
	if last := f.logged.Load(); now-last >= int64(limitLogInterval/time.Second) && f.logged.CompareAndSwap(last, now) {
		f.logger.WarnContext(ctx, "more services are registered than one answer can list; the others are left out", "listed", maxListedServices)
	}
	return rows[:maxListedServices], nil
}

// Wake makes the feed look for changes now.
func (f *serviceFeed) Wake() {
	select {
	case f.wake <- struct{}{}:
	default: // a look is due already
	}
}

// refresh returns when the view is of a read that began after the call.
func (f *serviceFeed) refresh(ctx context.Context) error {
	answer := make(chan error, 1)
	select {
	case f.asked <- answer:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// run publishes the list when asked, at each wake-up and each time that a service expires, until ctx ends.
func (f *serviceFeed) run(ctx context.Context) {
	var waiting []chan error
	defer func() { // nobody waits for an answer that does not come
		for _, answer := range waiting {
			answer <- errPanicked
		}
	}()
	for {
		next := serviceTTL
		rows, err := f.read(ctx, f.queries)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			f.logger.WarnContext(ctx, "cannot read the registered services", "error", err)
		default:
			for _, row := range rows {
				next = min(next, max(row.Remaining, 0)+time.Millisecond)
			}
			f.publish(rows)
		}
		for _, answer := range waiting {
			answer <- err
		}
		waiting = waiting[:0]
		expiry := time.NewTimer(next)
		select {
		case answer := <-f.asked:
			waiting = append(waiting, answer)
		case <-f.wake:
		case <-expiry.C:
		case <-ctx.Done():
		}
		expiry.Stop()
		for more := true; more; {
			select {
			case answer := <-f.asked:
				waiting = append(waiting, answer)
			default:
				more = false
			}
		}
	}
}

// publish replaces the view if the list has changed.
func (f *serviceFeed) publish(rows []db.ServicesListRow) {
	old := f.view.Load()
	same := func(a, b db.ServicesListRow) bool { return a.Kind == b.Kind && a.Endpoint == b.Endpoint }
	if slices.EqualFunc(old.rows, rows, same) {
		return
	}
	f.view.Store(&serviceView{rows: rows, replaced: make(chan struct{})})
	close(old.replaced)
}
