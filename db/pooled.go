package db

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// ErrTransactionPooler says that a connection leads through a pooler that hands each transaction to another session, where
// one session is needed: to listen, to migrate, to stage.
var ErrTransactionPooler = errors.New("the connection leads through a pooler in transaction mode, where nothing belongs to a session: " +
	"a connection string that leads to PostgreSQL itself, or through a pooler in session mode, is needed (listener_database_url)")

// probeTime is how long a look at a pooler may take. One in session mode may have no second session to give.
const probeTime = 2 * time.Second

// probeOrder is which of three clients asks next. It is irregular, so that handing sessions out in turn cannot look like
// each client having one of its own.
var probeOrder = []int{0, 1, 2, 1, 0, 2, 2, 0, 1, 0, 2, 1}

// RequireSession returns ErrTransactionPooler if connections of a configuration lead through a pooler in transaction or
// statement mode. Whether there is a pooler at all shows on the connection that is given, of the same configuration:
// poolers make up the key by which PostgreSQL would cancel its statements. Then it is asked which session serves whom.
func RequireSession(ctx context.Context, conn *pgx.Conn, cfg *pgx.ConnConfig) error {
	session, err := sessionOf(ctx, conn.PgConn())
	if err != nil {
		return err
	}
	if session == conn.PgConn().PID() {
		return nil
	}
	clients := []*pgconn.PgConn{conn.PgConn()}
	served := map[uint32]int{session: 0} // client by session
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	for len(clients) < 3 {
		client, err := pgconn.ConnectConfig(ctx, &cfg.Config)
		if err != nil {
			return nil // there is no second session: the one that there is belongs to us
		}
		defer func() { _ = client.Close(context.WithoutCancel(ctx)) }() // it was only asked
		clients = append(clients, client)
	}
	sessions := map[int]uint32{0: session}
	for _, i := range probeOrder {
		session, err := sessionOf(ctx, clients[i])
		if err != nil {
			return nil // as above
		}
		before, asked := sessions[i]
		client, serves := served[session]
		if asked && before != session || serves && client != i {
			return ErrTransactionPooler
		}
		sessions[i], served[session] = session, i
	}
	return nil
}

// sessionOf returns the session of the server that serves a connection at this moment.
func sessionOf(ctx context.Context, conn *pgconn.PgConn) (pid uint32, err error) {
	rows, err := conn.Exec(ctx, "SELECT pg_backend_pid()").ReadAll()
	if err == nil {
		_, err = fmt.Sscan(string(rows[0].Rows[0][0]), &pid)
	}
	if err != nil {
		return 0, fmt.Errorf("ask for the session: %w", err)
	}
	return pid, nil
}

// PoolerHint returns what to do about an error that a pooler has made because nobody said that it is there; "" for others.
func PoolerHint(err error) string {
	var pgErr *pgconn.PgError
	switch {
	case !errors.As(err, &pgErr):
	case pgErr.Code == pgerrcode.ProtocolViolation && strings.Contains(pgErr.Message, "startup parameter"):
		return "the connection leads through a pooler that refuses settings: set database_pooler"
	case pgErr.Code == pgerrcode.InvalidSQLStatementName, pgErr.Code == pgerrcode.DuplicatePreparedStatement:
		return "the connection seems to lead through a pooler: set database_pooler"
	}
	return ""
}
