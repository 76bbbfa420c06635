package bench

import (
	"context"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
)

// Processes are those whose CPU time is reported, where they run on this machine. 0 is unknown.
type processes struct {
	server   int
	postgres int // the postmaster, whose children count
	peak     atomic.Int64
}

// A usage is the CPU time that processes have used, in seconds; negative where it is not known.
type usage struct{ server, postgres, client float64 }

const unknown = -1

// usage reads the CPU times of the moment.
func (p *processes) usage() usage {
	u := usage{unknown, unknown, cpuSeconds(os.Getpid(), false)}
	if p == nil {
		return u
	}
	if p.server != 0 {
		u.server = cpuSeconds(p.server, false)
	}
	if p.postgres != 0 {
		u.postgres = cpuSeconds(p.postgres, true)
	}
	return u
}

// minus returns what was used between two readings.
func (u usage) minus(before usage) usage {
	difference := func(after, before float64) float64 {
		if after < 0 || before < 0 {
			return unknown
		}
		return max(0, after-before)
	}
	return usage{
		difference(u.server, before.server), difference(u.postgres, before.postgres), difference(u.client, before.client),
	}
}

// watchMemory notes the most memory that the server has resident until the returned function is called, which returns it; 0 if
// it is not known.
func (p *processes) watchMemory() (peak func() int64) {
	if p == nil || p.server == 0 || residentBytes(p.server) == 0 {
		return func() int64 { return 0 }
	}
	p.peak.Store(0)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			atMost(&p.peak, residentBytes(p.server))
			select {
			case <-tick.C:
			case <-done:
				return
			}
		}
	}()
	return func() int64 {
		close(done)
		<-ended
		atMost(&p.peak, residentBytes(p.server))
		return p.peak.Load()
	}
}

// findProcesses looks for the processes behind an address and a connection string, where the user has not named them. What
// runs elsewhere, or in this very process, is unknown.
func findProcesses(ctx context.Context, address, databaseURL string, server, postgres int) *processes {
	p := &processes{server: server, postgres: postgres}
	if p.server == 0 && isLoopback(address) {
		p.server = listenerOf(address)
	}
	if p.postgres == 0 && databaseURL != "" {
		p.postgres = postmasterOf(ctx, databaseURL)
	}
	if p.server == os.Getpid() {
		p.server = 0 // a test, in which nobody can tell the two apart
	}
	return p
}

// postmasterOf returns the postmaster of a server on this machine, or 0.
func postmasterOf(ctx context.Context, databaseURL string) int {
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil || !strings.HasPrefix(config.Host, "/") && !isLoopback(net.JoinHostPort(config.Host, "0")) {
		return 0
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return 0
	}
	defer conn.Close(ctx)
	// A tunnel or a container looks local, too: the process must also be one of Postgres.
	backend := int(conn.PgConn().PID())
	if processName(backend) != "postgres" {
		return 0
	}
	return parentOf(backend)
}

// isLoopback reports whether an address is one of this machine's own.
func isLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	if host == "localhost" {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}
