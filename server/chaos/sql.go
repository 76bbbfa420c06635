package chaos

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// journalSQL makes the database keep a journal of all changes. It hangs on the change log, in the same
// transaction and under the same lock, and takes no lock that others wait for.
const journalSQL = `
	CREATE SCHEMA chaos;
	CREATE TABLE chaos.journal (version bigint, type text, id text, deleted boolean, payload bytea, at timestamptz);
	CREATE FUNCTION chaos.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
	BEGIN
		INSERT INTO chaos.journal
		SELECT a.version, a.type, a.id, a.deleted, r.payload, clock_timestamp()
		FROM added a LEFT JOIN LATERAL (
			SELECT payload FROM pgbroker.records r
			WHERE r.type = a.type AND r.id = a.id AND r.version = a.version OFFSET 0
		) r ON true;
		RETURN NULL;
	END $$;
	CREATE TRIGGER zz_note AFTER INSERT ON pgbroker.changes
		REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION chaos.note();`

// booksSQL finds what does not agree in the database's own accounts, a line for each.
const booksSQL = `
	SELECT 'the log has ' || count(*) || ' rows for the live record ' || r.type || ' ' || r.id
		FROM pgbroker.records r LEFT JOIN pgbroker.changes c ON c.type = r.type AND c.id = r.id AND NOT c.deleted
		GROUP BY r.type, r.id, r.version
		HAVING count(*) <> 1 OR bool_or(c.version IS DISTINCT FROM r.version)
	UNION ALL
	SELECT 'the log says that ' || c.type || ' ' || c.id || ' lives'
		FROM pgbroker.changes c
		WHERE NOT c.deleted AND NOT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = c.type AND r.id = c.id)
	UNION ALL
	SELECT 'there are ' || count(r.id) || ' records of ' || t.type || ', the count says ' || t.record_count
		FROM pgbroker.record_types t LEFT JOIN pgbroker.records r ON r.type = t.type
		GROUP BY t.type, t.record_count HAVING count(r.id) <> t.record_count
	UNION ALL
	SELECT 'the log lacks version ' || j.version || ' of the journal, a tombstone of ' || j.type || ' ' || j.id
		FROM (SELECT DISTINCT ON (type, id) * FROM chaos.journal ORDER BY type, id, version DESC) j
		WHERE j.deleted AND NOT EXISTS (SELECT FROM pgbroker.changes c WHERE c.version = j.version AND c.deleted)
	UNION ALL
	SELECT 'version ' || version || ' was issued ' || count(*) || ' times'
		FROM chaos.journal GROUP BY version HAVING count(*) > 1
	UNION ALL
	SELECT 'an epoch began at ' || first_version || ', and no other server was there' FROM pgbroker.epochs`

// sqlClient is a person or script that writes in SQL.
type sqlClient struct {
	*client
	connString string
	conn       *pgx.Conn // nil if it has to connect first
}

func (s *sqlClient) disconnect() {
	if s.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = s.conn.Close(ctx)
		s.conn = nil
	}
}

// record does something to records.
func (s *sqlClient) record(ctx context.Context) {
	ctx, cancel := s.context(ctx)
	defer cancel()
	if s.conn != nil && s.conn.IsClosed() {
		s.conn = nil
	}
	if s.conn == nil {
		conn, err := pgx.Connect(ctx, s.connString)
		if err != nil {
			pause(ctx, 100*time.Millisecond)
			return
		}
		s.conn = conn
	}
	switch n := s.random.IntN(100); {
	case n < 25:
		s.one(ctx, opSQLInsert, s.key())
	case n < 50:
		s.one(ctx, opSQLUpdate, s.key())
	case n < 70:
		s.one(ctx, opSQLDelete, s.key())
	case n < 85:
		s.one(ctx, opSQLSelect, s.key())
	default:
		s.transaction(ctx)
	}
}

// querier is a connection or a transaction.
type querier interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}

// statement runs one statement. Its outcome is final only when it is committed.
func (s *sqlClient) statement(ctx context.Context, q querier, op *Op) error {
	var version int64
	var data []byte
	var err error
	if op.Kind == opSQLInsert || op.Kind == opSQLUpdate {
		op.Write = s.newWrite()
		if data, err = proto.Marshal(payload(op.Key.ID, Content{op.Write, op.Write})); err != nil {
			return err
		}
	}
	switch op.Kind {
	case opSQLInsert:
		err = q.QueryRow(ctx, `INSERT INTO pgbroker.records (type, id, payload) VALUES ($1, $2, $3) RETURNING version`,
			op.Key.Type, op.Key.ID, data).Scan(&version)
	case opSQLUpdate:
		err = q.QueryRow(ctx, `UPDATE pgbroker.records SET payload = $3 WHERE type = $1 AND id = $2 RETURNING version`,
			op.Key.Type, op.Key.ID, data).Scan(&version)
	case opSQLDelete: // it returns the version that goes, and the tombstone's is another one
		err = q.QueryRow(ctx, `DELETE FROM pgbroker.records WHERE type = $1 AND id = $2 RETURNING 0`,
			op.Key.Type, op.Key.ID).Scan(&version)
	case opSQLSelect:
		err = q.QueryRow(ctx, `SELECT version, payload FROM pgbroker.records WHERE type = $1 AND id = $2`,
			op.Key.Type, op.Key.ID).Scan(&version, &data)
	}
	s.finishSQL(op, err)
	if err == nil {
		op.Version = uint64(version)
		if op.Kind == opSQLSelect {
			op.Content = sqlContent(data)
		}
	}
	return err
}

func (s *sqlClient) one(ctx context.Context, kind string, key Key) {
	op := s.begin(kind, -1, key)
	_ = s.statement(ctx, s.conn, &op) // noted in op
	s.recorder.add(op)
}

// transaction changes two records, or in the end none.
func (s *sqlClient) transaction(ctx context.Context) {
	kinds := []string{opSQLInsert, opSQLUpdate, opSQLDelete}
	keys := s.keys()
	number := int(s.requests.Add(1))
	var ops []Op
	begun := false
	err := pgx.BeginFunc(ctx, s.conn, func(tx pgx.Tx) error {
		begun = true
		for _, key := range keys {
			op := s.begin(kinds[s.random.IntN(len(kinds))], -1, key)
			op.Request = number
			err := s.statement(ctx, tx, &op)
			ops = append(ops, op)
			if err != nil && !errors.Is(err, pgx.ErrNoRows) {
				return err
			}
		}
		if s.random.IntN(10) == 0 {
			return errRollback
		}
		return nil
	})
	end := s.recorder.now()
	for i := range ops {
		op := &ops[i]
		op.Return = end
		switch {
		case err == nil, op.Outcome == exists: // its failure says what it found
		case errors.Is(err, errRollback), op.Outcome == failed:
			op.Outcome, op.Version = failed, 0
		default:
			// Before COMMIT is sent, all is lost for certain. Whether it was, the last statement tells.
			op.Outcome, op.Version = failed, 0
			if last := &ops[len(ops)-1]; len(ops) == len(keys) && last.Outcome != failed && last.Outcome != exists && sqlUnknown(err) {
				op.Outcome, op.Code = unknown, "sql"
			}
		}
	}
	if begun {
		s.recorder.add(ops...)
	}
}

var errRollback = errors.New("roll back")

func (s *sqlClient) finishSQL(op *Op, err error) {
	op.Return = s.recorder.now()
	var pgErr *pgconn.PgError
	switch {
	case err == nil:
		op.Outcome = ok
	case errors.Is(err, pgx.ErrNoRows):
		op.Outcome = absent
	case errors.As(err, &pgErr) && pgErr.Code == pgerrcode.UniqueViolation:
		op.Outcome = exists
	case sqlUnknown(err):
		op.Outcome, op.Code = unknown, "sql"
	default:
		op.Outcome, op.Code = failed, "sql"
	}
}

// sqlUnknown tells whether a statement that failed may have been committed: unless the server says that it
// was not, in words that do not come from its own end.
func sqlUnknown(err error) bool {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.SeverityUnlocalized != "ERROR"
	}
	return !pgconn.SafeToRetry(err)
}

func sqlContent(data []byte) Content {
	message := new(anypb.Any)
	if data == nil || proto.Unmarshal(data, message) != nil {
		return Content{errContent.Error(), errContent.Error()}
	}
	return contentOf(message)
}
