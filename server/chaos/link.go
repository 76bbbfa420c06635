package chaos

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
)

// link is a way over the network that can be cut, slowed down, or made to swallow what passes.
type link struct {
	proxy *toxiproxy.Proxy
}

func newLink(name, upstream string) (*link, error) {
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	l := &link{proxy: toxiproxy.NewProxy(server, name, "127.0.0.1:0", upstream)}
	return l, l.proxy.Start()
}

// address is where the link begins. It stays the same.
func (l *link) address() string { return l.proxy.Listen }

// cut closes all connections, and refuses new ones until join.
func (l *link) cut() error { return bounded(func() error { l.proxy.Stop(); return nil }) }

func (l *link) join() error {
	return bounded(func() error {
		if err := l.proxy.Start(); !errors.Is(err, toxiproxy.ErrProxyAlreadyStarted) {
			return err
		}
		return nil
	})
}

// slow delays what passes, in both directions.
func (l *link) slow(delay, jitter time.Duration) error {
	attributes := fmt.Sprintf(`{"latency": %d, "jitter": %d}`, delay.Milliseconds(), jitter.Milliseconds())
	return errors.Join(l.add("latency", "upstream", attributes), l.add("latency", "downstream", attributes))
}

// swallow makes what goes in a direction ("upstream", "downstream") disappear; connections stay open.
func (l *link) swallow(direction string) error { return l.add("timeout", direction, `{"timeout": 0}`) }

func (l *link) add(kind, direction, attributes string) error {
	return bounded(func() error {
		_, err := l.proxy.Toxics.AddToxicJson(strings.NewReader(fmt.Sprintf(
			`{"name": "%s-%s", "type": "%s", "stream": "%s", "attributes": %s}`, kind, direction, kind, direction, attributes)))
		return err
	})
}

// clear ends slow and swallow. Connections of which something was swallowed are closed.
func (l *link) clear() error {
	return bounded(func() error { l.proxy.Toxics.ResetToxics(context.Background()); return nil })
}

// close is for the end.
func (l *link) close() { _ = l.cut() }

// bounded keeps a proxy that waits for somebody who does not read from stopping the run.
func bounded(do func() error) error {
	done := make(chan error, 1)
	go func() { done <- do() }()
	select {
	case err := <-done:
		return err
	case <-time.After(10 * time.Second):
		return errors.New("the proxy does not answer")
	}
}
