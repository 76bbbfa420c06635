package conformance_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/anypb"

	"pgbroker/proto/registry"
	"pgbroker/server/servertest"
)

func service(kind registry.ServiceKind, endpoint string) *registry.Service {
	return &registry.Service{Kind: kind, Endpoint: endpoint}
}

func report(t *testing.T, r *servertest.Replica, services ...*registry.Service) *registry.RegisterResponse {
	t.Helper()
	response, err := r.Registry.Report(testContext(t), &registry.RegisterRequest{Services: services})
	if err != nil {
		t.Fatalf("report: %v", err)
	}
	return response
}

func listServices(t *testing.T, r *servertest.Replica, kinds ...registry.ServiceKind) []*registry.Service {
	t.Helper()
	response, err := r.Registry.List(testContext(t), &registry.ListRequest{Kinds: kinds})
	if err != nil {
		t.Fatalf("list: %v", err)
	}
	return response.Services
}

// TestRegistry: what has been reported is listed, by every replica, once, in order.
func TestRegistry(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	same(t, "at first", listServices(t, b.Replica), nil)
	var (
		metrics1 = service(registry.ServiceKind_PROMETHEUS_METRICS, "http://user:pass@10.0.0.1:9902/metrics")
		metrics2 = service(registry.ServiceKind_PROMETHEUS_METRICS, "https://10.0.0.2:9902/metrics")
		proxy    = service(registry.ServiceKind_PROXY, "https://10.0.0.2:9902/metrics")
	)
	report(t, b.Replicas[0], metrics2, metrics2, proxy)
	report(t, b.Replicas[1], metrics1)
	report(t, b.Replicas[0], metrics2, proxy)
	for _, r := range b.Replicas {
		same(t, "all", listServices(t, r), []*registry.Service{proxy, metrics1, metrics2})
		same(t, "of a kind", listServices(t, r, registry.ServiceKind_PROMETHEUS_METRICS), []*registry.Service{metrics1, metrics2})
		same(t, "of several kinds", listServices(t, r, registry.ServiceKind_PROXY, registry.ServiceKind_PROMETHEUS_METRICS, registry.ServiceKind_PROXY), []*registry.Service{proxy, metrics1, metrics2})
		same(t, "of a kind without services", listServices(t, r, registry.ServiceKind_CONSOLE), nil)
	}
	report(t, b.Replica) // nothing: fine
	if _, err := b.Registry.Report(testContext(t), &registry.RegisterRequest{
		Services: []*registry.Service{proxy}, Metadata: map[string]*anypb.Any{"k": {TypeUrl: "x", Value: []byte{0xff}}},
	}); err != nil {
		t.Errorf("with metadata: %v", err)
	}
}

// TestD32_ReportersComeBackInTime: well before what they have reported expires, so that it does not flicker.
func TestD32_ReportersComeBackInTime(t *testing.T) {
	t.Parallel()
	b := startWithClock(t, 1)
	proxy := service(registry.ServiceKind_PROXY, "https://proxy.example.com")
	pause := report(t, b.Replica, proxy).CallBackAfter.AsDuration()
	if pause <= 0 || pause > 15*time.Second {
		t.Errorf("reporters are to call back after %v", pause)
	}
	for range 3 {
		b.clock.advance(pause + 10*time.Second) // late, or one report was lost
		same(t, "services", listServices(t, b.Replica), []*registry.Service{proxy})
		report(t, b.Replica, proxy)
	}
}

// TestD33_ExpiredServicesAreNotListed, not even for a moment.
func TestD33_ExpiredServicesAreNotListed(t *testing.T) {
	t.Parallel()
	b := startWithClock(t, 1)
	gone, staying := service(registry.ServiceKind_PROXY, "https://gone.example.com"), service(registry.ServiceKind_PROXY, "https://staying.example.com")
	report(t, b.Replica, gone)
	b.clock.advance(20 * time.Second)
	report(t, b.Replica, staying)
	b.clock.advance(10*time.Second + time.Millisecond)
	same(t, "services", listServices(t, b.Replica), []*registry.Service{staying})
	b.clock.advance(30 * time.Second)
	same(t, "services", listServices(t, b.Replica), nil)
	report(t, b.Replica, gone)
	same(t, "services", listServices(t, b.Replica), []*registry.Service{gone})
}

func watch(t *testing.T, r *servertest.Replica, kinds ...registry.ServiceKind) grpc.ServerStreamingClient[registry.ServiceList] {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	stream, err := r.Registry.Watch(ctx, &registry.ListRequest{Kinds: kinds})
	if err != nil {
		t.Fatalf("watch: %v", err)
	}
	return stream
}

// TestRegistryWatch: the list at once, even if it is empty, and again whenever it is another one.
func TestRegistryWatch(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	proxy, console := service(registry.ServiceKind_PROXY, "https://proxy.example.com"), service(registry.ServiceKind_CONSOLE, "https://console.example.com")
	all, proxies := watch(t, b.Replicas[1]), watch(t, b.Replicas[1], registry.ServiceKind_PROXY)
	next := func(what string, stream grpc.ServerStreamingClient[registry.ServiceList], want ...*registry.Service) {
		t.Helper()
		list, err := stream.Recv()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		same(t, what, list.Services, want)
	}
	next("at first", all)
	next("at first", proxies)
	report(t, b.Replicas[0], console)
	next("another kind", all, console)
	report(t, b.Replicas[0], console) // no news
	report(t, b.Replicas[0], proxy)
	next("a proxy", all, proxy, console)
	next("a proxy, and nothing of consoles", proxies, proxy)

	if err := b.Replicas[1].Stop(); err != nil {
		t.Fatal(err)
	}
	for _, stream := range []grpc.ServerStreamingClient[registry.ServiceList]{all, proxies} {
		_, err := stream.Recv()
		wantStatus(t, err, codes.Unavailable, "")
	}
}

// TestD32_WatchersHearOfExpiry: a list without the service comes when it expires, not when somebody reports.
func TestD32_WatchersHearOfExpiry(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	proxy := service(registry.ServiceKind_PROXY, "https://proxy.example.com")
	report(t, b.Replicas[0], proxy)
	stream := watch(t, b.Replicas[1])
	for {
		list, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(list.Services) > 0 {
			break
		}
	}
	begin := time.Now()
	b.Database.Exec(t, "UPDATE pgbroker.services SET expires_at = clock_timestamp() + interval '100 milliseconds'")
	list, err := stream.Recv()
	if err != nil || len(list.Services) > 0 {
		t.Errorf("got %v, %v", list, err)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("heard of it after %v", took)
	}
}

// TestWatchNeverGoesBack: a list without a service that has been reported never comes after one with it, nor
// at all when the watch starts after the report.
func TestWatchNeverGoesBack(t *testing.T) {
	t.Parallel()
	b := startReplicas(t, 2)
	for i := range 25 {
		report(t, b.Replicas[i%2], service(registry.ServiceKind_PROXY, fmt.Sprintf("https://%02d.example.com", i)))
		stream := watch(t, b.Replicas[(i+i/2)%2])
		// One more, which is the news that ends the wait.
		for n, reported := 0, false; n <= i+1; {
			list, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if n = len(list.Services); n < i+1 {
				t.Fatalf("the list has %d services after %d were reported", n, i+1)
			}
			if !reported {
				report(t, b.Replicas[0], service(registry.ServiceKind_CONSOLE, "https://last.example.com"))
				reported = true
			}
		}
		b.Database.Exec(t, "DELETE FROM pgbroker.services WHERE kind = $1", int(registry.ServiceKind_CONSOLE))
	}
}

// TestD34_BadServicesAreRefused: a kind of 0 and endpoints that are no URIs.
func TestD34_BadServicesAreRefused(t *testing.T) {
	t.Parallel()
	b := start(t)
	good := service(registry.ServiceKind_PROXY, "https://proxy.example.com")
	for _, test := range []struct {
		service *registry.Service
		message string
	}{
		{service(0, "https://proxy.example.com"), "services[1].kind: must be set"},
		{new(registry.Service), "services[1].kind: must be set"},
		{service(registry.ServiceKind_PROXY, ""), "services[1].endpoint: must be an absolute URI"},
		{service(registry.ServiceKind_PROXY, "proxy.example.com"), "services[1].endpoint: must be an absolute URI"},
		{service(registry.ServiceKind_PROXY, "/metrics"), "services[1].endpoint: must be an absolute URI"},
		{service(registry.ServiceKind_PROXY, "http://a b"), "services[1].endpoint: must be an absolute URI"},
		{service(registry.ServiceKind_PROXY, "http://h/%zz"), "services[1].endpoint: must be an absolute URI"},
		{service(registry.ServiceKind_PROXY, "http://h/\x00"), "services[1].endpoint: must not contain the character U+0000"},
	} {
		_, err := b.Registry.Report(testContext(t), &registry.RegisterRequest{Services: []*registry.Service{good, test.service}})
		wantStatus(t, err, codes.InvalidArgument, test.message)
	}
	same(t, "services", listServices(t, b.Replica), nil)
	// A kind that is newer than this server is as good as any.
	report(t, b.Replica, service(99, "https://new.example.com"))
	same(t, "services", listServices(t, b.Replica), []*registry.Service{service(99, "https://new.example.com")})
}
