package db

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// silence is how long a server that was asked something has not answered anybody when it is taken for one that
// cannot be reached: frozen, behind a paused pooler, or behind a network that swallows packets.
const silence = 2 * time.Second

// pulse tells a server that does not answer from one that takes its time for somebody's statement: the feed alone
// asks something short every few seconds.
type pulse struct {
	mu      sync.Mutex // protects what follows
	waiting int        // statements and connections that wait for an answer
	given   bool       // somebody has given up waiting since the last answer
	since   time.Time  // when there was the last answer, or the first question after it
}

// ask begins waiting for an answer; end must follow.
func (p *pulse) ask() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting == 0 && !p.given {
		p.since = time.Now()
	}
	p.waiting++
}

// end ends waiting: with an answer, which may be an error of the server's, or without.
func (p *pulse) end(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting--
	var pgErr *pgconn.PgError
	switch {
	case err == nil || errors.As(err, &pgErr):
		p.given, p.since = false, time.Now()
	case errors.Is(err, context.DeadlineExceeded):
		p.given = true
	}
}

func (p *pulse) silent() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return (p.waiting > 0 || p.given) && time.Since(p.since) >= silence
}

// Silent reports whether the server, though asked, has not answered anything for some seconds. A request that ran
// out of time meanwhile did so because the database is unavailable.
func (d *DB) Silent() bool { return d.pulse.silent() }
