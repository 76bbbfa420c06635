package bench

// The statements of the load tool. They are here and not in package db because they are no part of the server: they measure
// what Postgres can do without it, and look at the server's tables from outside.
const (
	// sqlDeleteRecord is a revocation as somebody types it.
	sqlDeleteRecord = `DELETE FROM pgbroker.records WHERE type = $1 AND id = $2`

	// sqlTables describes the tables of a schema.
	sqlTables = `
		SELECT relname::text, n_tup_upd, n_tup_hot_upd, n_dead_tup, pg_table_size(relid), pg_indexes_size(relid), n_live_tup
		FROM pg_stat_user_tables WHERE schemaname = $1 ORDER BY relname`

	// sqlWAL is how much write-ahead log there has ever been.
	sqlWAL = `SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint`

	// sqlSettings are the settings that decide how fast writes can be.
	sqlSettings = `
		SELECT name, CASE WHEN unit IS NULL OR unit = '' THEN setting ELSE current_setting(name) END FROM pg_settings
		WHERE name IN ('server_version', 'fsync', 'synchronous_commit', 'full_page_writes', 'wal_level', 'shared_buffers', 'max_wal_size', 'min_wal_size',
			'wal_sync_method', 'max_connections', 'jit')
		ORDER BY name`

	// sqlUseLog writes as much log as a checkpoint then finds to use again, so that no measurement waits for new files.
	sqlUseLog = `SELECT count(pg_logical_emit_message(false, 'pgbroker', repeat('x', 1 << 20))) FROM generate_series(1, 1500)`

	// sqlSettle does at once what autovacuum would do within minutes, so that no measurement has it by chance.
	sqlSettle = `VACUUM (ANALYZE) pgbroker.records, pgbroker.search_texts, pgbroker.changes`

	// sqlLimitTable makes a plain table with what the server stores of a record, without triggers and with the primary key
	// as the only index. %[1]s is a schema.
	sqlLimitTable = `
		CREATE SCHEMA %[1]s;
		CREATE TABLE %[1]s.records (
			type text COLLATE "C" NOT NULL, id text COLLATE "C" NOT NULL, version bigint NOT NULL, modified_at timestamptz NOT NULL,
			expires_at timestamptz, index_cidr inet, index_fields jsonb, payload bytea, data jsonb, search_text text,
			PRIMARY KEY (type, id)
		) WITH (fillfactor = 70, toast_tuple_target = 4080)`

	sqlLimitEmpty = `TRUNCATE %[1]s.records`

	sqlLimitDrop = `DROP SCHEMA IF EXISTS %[1]s CASCADE`

	// sqlLimitWrite writes rows given as parallel arrays.
	sqlLimitWrite = `
		INSERT INTO %[1]s.records AS r (type, id, version, modified_at, expires_at, index_fields, payload, data, search_text)
		SELECT i.type, i.id, i.version, now(), i.expires_at, i.index_fields::jsonb, i.payload, i.data::jsonb, i.search_text
		FROM unnest($1::text[], $2::text[], $3::bigint[], $4::timestamptz[], $5::text[], $6::bytea[], $7::text[], $8::text[])
			AS i (type, id, version, expires_at, index_fields, payload, data, search_text)
		ON CONFLICT (type, id) DO UPDATE SET version = excluded.version, modified_at = excluded.modified_at,
			expires_at = excluded.expires_at, index_fields = excluded.index_fields, payload = excluded.payload, data = excluded.data,
			search_text = excluded.search_text`

	// sqlLimitWriteNotify is the same with a notification.
	sqlLimitWriteNotify = `WITH written AS (` + sqlLimitWrite + ` RETURNING 1)
		SELECT pg_notify($9, count(*)::text) FROM written`

	sqlNotify = `SELECT pg_notify($1, $2)`

	// sqlLimitCopy is what a listing of all records has to read.
	sqlLimitCopy = `COPY (SELECT type, id, version, modified_at, payload FROM %[1]s.records ORDER BY type, id) TO STDOUT (FORMAT binary)`
)
