package bench

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
	"pgbroker/server/projection"
)

// postgresName is the target of results that were measured on Postgres alone.
const postgresName = "bare Postgres"

// A postgres measures what the database can do without a broker. It works in a schema of its own.
type postgres struct {
	*runner
	url       string
	schema    string
	conn      *pgx.Conn
	projector *projection.Projector
}

// openPostgres makes the schema. close removes it.
func (r *runner) openPostgres(ctx context.Context) (*postgres, error) {
	url, err := r.databaseURL()
	if err != nil {
		return nil, err
	}
	conn, err := connectPostgres(ctx, url)
	if err != nil {
		return nil, err
	}
	p := &postgres{
		runner: r, url: url, conn: conn, projector: projection.New(nil), schema: "pgbroker_bench_" + strings.ToLower(rand.Text()[:8]),
	}
	if _, err := conn.Exec(ctx, fmt.Sprintf(sqlLimitTable, p.schema)); err != nil {
		conn.Close(ctx)
		return nil, fmt.Errorf("make a table to compare with: %w", err)
	}
	return p, nil
}

func connectPostgres(ctx context.Context, url string) (*pgx.Conn, error) {
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, errors.New("the connection string is not valid") // pgx's own error repeats parts of it
	}
	config.RuntimeParams["application_name"] = "pgbroker-bench"
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	return conn, nil
}

// close removes what was made, also when ctx has ended.
func (p *postgres) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	_ = p.conn.Close(ctx) // it may be in any state
	conn, err := connectPostgres(ctx, p.url)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, fmt.Sprintf(sqlLimitDrop, p.schema)); err != nil {
		return fmt.Errorf("remove schema %s: %w", p.schema, err)
	}
	return nil
}

// limitRows are rows as the server writes them, as parallel arrays.
type limitRows struct {
	types, ids, indexFields, data, search []string
	versions                              []int64
	expires                               []time.Time
	payloads                              [][]byte
}

func (l *limitRows) args() []any {
	return []any{l.types, l.ids, l.versions, l.expires, l.indexFields, l.payloads, l.data, l.search}
}

// makeRows returns n rows from an index on.
func (p *postgres) makeRows(c *collection, from, n int) (*limitRows, error) {
	rows := new(limitRows)
	for i := from; i < from+n; i++ {
		record := c.record(uint32(i), 0)
		payload, err := proto.Marshal(record.GetData())
		if err != nil {
			return nil, err
		}
		readable := p.projector.Project(payload)
		rows.types, rows.ids = append(rows.types, record.GetType()), append(rows.ids, record.GetId())
		rows.versions = append(rows.versions, int64(i))
		rows.expires = append(rows.expires, expiryOf(record))
		rows.indexFields = append(rows.indexFields, fmt.Sprintf(`{"idp_id": "idp", "user_id": %q}`, c.userID(uint32(i))))
		rows.payloads = append(rows.payloads, payload)
		rows.data, rows.search = append(rows.data, string(readable.Data)), append(rows.search, readable.SearchText)
	}
	return rows, nil
}

func expiryOf(record *databroker.Record) time.Time {
	var s session.Session
	if err := proto.Unmarshal(record.GetData().GetValue(), &s); err != nil || s.GetExpiresAt() == nil {
		return timestamppb.Now().AsTime()
	}
	return s.GetExpiresAt().AsTime()
}

// preparedBatches is how many batches are made before the measurement and used in turns.
const preparedBatches = 64

// write measures how many rows one connection writes in statements of a size. With notify each commits with a notification,
// which is waited for: the latency is then that of a commit and the round trip of its notification.
func (p *postgres) write(ctx context.Context, l load, batch int, notify bool) (*Result, error) {
	l.clients = 1
	work := fmt.Sprintf("write %s in one statement", counted(batch, "row"))
	if notify {
		work = "write 1 row and receive its notification"
	}
	if l.rate > 0 {
		work += fmt.Sprintf(", %.1f/s", l.rate)
	}
	p.progress.step(work)
	c := p.corpus.collection("limit")
	prepared := make([]*limitRows, max(1, min(preparedBatches, 20_000/batch)))
	for i := range prepared {
		var err error
		if prepared[i], err = p.makeRows(c, i*batch, batch); err != nil {
			return nil, err
		}
	}
	channel := p.schema
	sql := fmt.Sprintf(sqlLimitWrite, p.schema)
	var listener *pgx.Conn
	if notify {
		sql = fmt.Sprintf(sqlLimitWriteNotify, p.schema)
		var err error
		if listener, err = p.listen(ctx, channel); err != nil {
			return nil, err
		}
		defer listener.Close(context.WithoutCancel(ctx))
	}
	// New keys at first, then the same ones again: as a store does that has them all.
	outcome, err := l.run(ctx, p.processes, p.progress, func(ctx context.Context, _ int, n, _ int64) error {
		rows := prepared[n%int64(len(prepared))]
		if !notify {
			_, err := p.conn.Exec(ctx, sql, rows.args()...)
			return err
		}
		if _, err := p.conn.Exec(ctx, sql, append(rows.args(), channel)...); err != nil {
			return err
		}
		_, err := listener.WaitForNotification(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	result := p.result("limits", work, l, map[string]any{"batch": batch}).take(outcome)
	result.Target = postgresName
	result.Records, result.RecordUnit = result.Operations*int64(batch), "rows"
	result.RecordsRate = result.Rate * float64(batch)
	return result, nil
}

func (p *postgres) listen(ctx context.Context, channel string) (*pgx.Conn, error) {
	listener, err := connectPostgres(ctx, p.url)
	if err != nil {
		return nil, err
	}
	if _, err := listener.Exec(ctx, "LISTEN "+pgx.Identifier{channel}.Sanitize()); err != nil {
		listener.Close(ctx)
		return nil, fmt.Errorf("listen: %w", err)
	}
	return listener, nil
}

// notify measures the round trip of a notification that commits nothing.
func (p *postgres) notify(ctx context.Context, l load) (*Result, error) {
	l.clients = 1
	const work = "round trip of a notification"
	p.progress.step(work)
	listener, err := p.listen(ctx, p.schema)
	if err != nil {
		return nil, err
	}
	defer listener.Close(context.WithoutCancel(ctx))
	outcome, err := l.run(ctx, p.processes, p.progress, func(ctx context.Context, _ int, _, _ int64) error {
		if _, err := p.conn.Exec(ctx, sqlNotify, p.schema, ""); err != nil {
			return err
		}
		_, err := listener.WaitForNotification(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	result := p.result("limits", work, l, nil).take(outcome)
	result.Target = postgresName
	return result, nil
}

// copyOut measures reading a number of rows with COPY.
func (p *postgres) copyOut(ctx context.Context, l load, rows int) (*Result, error) {
	l.clients = 1
	work := fmt.Sprintf("COPY of %s", counted(rows, "row"))
	p.progress.step(work)
	if err := p.fill(ctx, rows); err != nil {
		return nil, err
	}
	var copied int64
	outcome, err := l.run(ctx, p.processes, p.progress, func(ctx context.Context, _ int, _, _ int64) error {
		tag, err := p.conn.PgConn().CopyTo(ctx, io.Discard, fmt.Sprintf(sqlLimitCopy, p.schema))
		copied = tag.RowsAffected()
		return err
	})
	if err != nil {
		return nil, err
	}
	result := p.result("limits", work, l, map[string]any{"rows": rows}).take(outcome)
	result.Target = postgresName
	result.Records, result.RecordUnit = copied*result.Operations, "rows"
	result.RecordsRate = result.Rate * float64(copied)
	return result, nil
}

// fill makes the table hold exactly a number of rows.
func (p *postgres) fill(ctx context.Context, rows int) error {
	if _, err := p.conn.Exec(ctx, fmt.Sprintf(sqlLimitEmpty, p.schema)); err != nil {
		return fmt.Errorf("empty the table: %w", err)
	}
	c := p.corpus.collection("limit")
	const batch = 1000
	for from := 0; from < rows; from += batch {
		made, err := p.makeRows(c, from, min(batch, rows-from))
		if err != nil {
			return err
		}
		if _, err := p.conn.Exec(ctx, fmt.Sprintf(sqlLimitWrite, p.schema), made.args()...); err != nil {
			return fmt.Errorf("fill the table: %w", err)
		}
	}
	return nil
}
