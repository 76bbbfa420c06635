package changefeed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"pgbroker/db"
)

const (
	// quietTime is how long the listener hears nothing before it asks whether the connection is alive.
	quietTime = 500 * time.Millisecond
	// answerTime is how long it then waits: a half-open connection looks healthy for ever. Both together are within the
	// 2 s that docs/recovery.md promises.
	answerTime = time.Second
	// maxAnswerTime is how long it waits where answers have been late, as on a machine that is overloaded.
	maxAnswerTime = 5 * time.Second
	// pooledTime is how long the listener waits before it looks again whether a pooler carries notifications.
	pooledTime = time.Minute
)

// listener owns the one connection of a replica on which the database notifies.
type listener struct {
	connect func(context.Context) (*pgx.Conn, error)
	wake    map[string]func() // by channel; nil entries are not listened to
	doubt   func(error)       // is told that a connection does not answer
	logger  *slog.Logger
	stats   *stats
	retry   time.Duration // how often to look whether a standby has been promoted
	told    bool          // that it is one

	patience time.Duration // answerTime, or longer
}

// run listens until ctx ends, and reconnects as often as it takes.
func (l *listener) run(ctx context.Context) {
	delay := backoff.NewExponentialBackOff()
	delay.InitialInterval = 50 * time.Millisecond
	delay.MaxInterval = time.Second
	polling := false
	for ctx.Err() == nil {
		connected, err := l.listen(ctx)
		l.stats.listening.Store(false)
		if errors.Is(err, context.DeadlineExceeded) {
			l.patience = min(2*max(l.patience, answerTime), maxAnswerTime)
		}
		if ctx.Err() != nil {
			return
		}
		if connected {
			delay.Reset()
		}
		if db.IsReadOnly(err) {
			l.awaitPromotion(ctx)
			continue
		}
		wait, level := delay.NextBackOff(), slog.LevelWarn
		if errors.Is(err, db.ErrTransactionPooler) {
			// That is how it was set up, and said once.
			wait = pooledTime
			if polling {
				level = slog.LevelDebug
			}
			polling = true
		}
		l.logger.Log(ctx, level, "not listening for notifications; changes are found by polling",
			"error", err, "retry_in", wait)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// awaitPromotion waits as long as the server is a standby, where LISTEN is not allowed.
func (l *listener) awaitPromotion(ctx context.Context) {
	if !l.told {
		l.told = true
		l.logger.InfoContext(ctx, "the server is a standby, which announces nothing: changes are found by polling")
	}
	tick := time.NewTicker(l.retry)
	defer tick.Stop()
	for began := time.Now(); l.stats.standby.Load() || time.Since(began) < l.retry; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// listen is the life of one connection. It returns why that ended, and whether it had begun.
func (l *listener) listen(ctx context.Context) (connected bool, err error) {
	conn, err := l.connect(ctx)
	if err != nil {
		return false, fmt.Errorf("connect: %w", err)
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = conn.Close(closing) // whatever state it is in, it is not used again
	}()
	for channel, wake := range l.wake {
		if wake == nil {
			continue
		}
		if err := l.listenTo(ctx, conn, channel); err != nil {
			return false, fmt.Errorf("listen: %w", err)
		}
	}
	if err := l.selfTest(ctx, conn); err != nil {
		return false, err
	}
	l.stats.connects.Add(1)
	l.stats.listening.Store(true)
	l.told = false
	// What was announced before we listened is in the tables.
	for _, wake := range l.wake {
		if wake != nil {
			wake()
		}
	}
	for {
		notification, err := l.waitFor(ctx, conn)
		if err != nil {
			return true, err
		}
		if wake := l.wake[notification.Channel]; wake != nil {
			wake()
		}
	}
}

func (l *listener) listenTo(ctx context.Context, conn *pgx.Conn, channel string) error {
	answer, cancel := l.wait(ctx)
	defer cancel()
	_, err := conn.Exec(answer, "LISTEN "+pgx.Identifier{channel}.Sanitize())
	return err
}

// selfTest checks that a notification arrives at all: behind a pooler in transaction mode LISTEN succeeds
// and nothing ever comes.
func (l *listener) selfTest(ctx context.Context, conn *pgx.Conn) error {
	testing, cancel := l.wait(ctx)
	defer cancel()
	// Nobody notifies while the queue is half full: it could not be told from one that swallows notifications.
	var full bool
	if err := conn.QueryRow(testing, "SELECT pg_notification_queue_usage() >= 0.5").Scan(&full); err != nil || full {
		return err
	}
	if _, err := conn.Exec(testing, "NOTIFY "+pgx.Identifier{channelServices}.Sanitize()+", 'test'"); err != nil {
		return fmt.Errorf("notify myself: %w", err)
	}
	if _, err := conn.WaitForNotification(testing); err != nil {
		return fmt.Errorf("no notification arrives on this connection (a pooler in transaction mode cannot carry LISTEN: "+
			"give the listener its own connection string): %w", err)
	}
	return nil
}

// waitFor waits for a notification, and makes sure now and then that one could still arrive.
func (l *listener) waitFor(ctx context.Context, conn *pgx.Conn) (*pgconn.Notification, error) {
	for {
		quiet, cancel := context.WithTimeout(ctx, quietTime)
		notification, err := conn.WaitForNotification(quiet)
		cancel()
		if err == nil {
			return notification, nil
		}
		if !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			return nil, fmt.Errorf("wait for notifications: %w", err)
		}
		if err := l.ping(ctx, conn); err != nil {
			return nil, fmt.Errorf("ping: %w", err)
		}
	}
}

// ping asks whether the connection is alive. One that does not answer is hardly the only one.
func (l *listener) ping(ctx context.Context, conn *pgx.Conn) error {
	answer, cancel := l.wait(ctx)
	defer cancel()
	began := time.Now()
	err := conn.Ping(answer)
	switch {
	case err == nil:
		// Where answers take long, some will take longer.
		l.patience = min(max(answerTime, 4*time.Since(began)), maxAnswerTime)
	case ctx.Err() == nil && answer.Err() != nil:
		l.doubt(errUnanswered)
	}
	return err
}

// wait bounds how long an answer is waited for.
func (l *listener) wait(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, max(l.patience, answerTime))
}

// errUnanswered is why connections are doubted.
var errUnanswered = errors.New("the connection that listens does not answer")
