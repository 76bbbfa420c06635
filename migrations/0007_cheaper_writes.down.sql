-- The functions of migrations 4 and 5.

CREATE OR REPLACE FUNCTION pgbroker.lock_order() RETURNS void
  LANGUAGE plpgsql AS $$
DECLARE
  -- In variables, so that the planner does not expect to compute them for every row of a table that has
  -- one, and compiles nothing (JIT) for it.
  present_timeline bigint := pgbroker.current_timeline();
  present_system   bigint := pgbroker.current_system_identifier();
BEGIN
  -- Versions are assigned under this lock and it is held to the end of the transaction, so they become
  -- visible in the order in which they are assigned. A transaction that notifies serialises its commit
  -- on a lock of Postgres's own anyway.
  PERFORM pg_advisory_xact_lock(7236837420591218);
  IF NOT EXISTS (
    SELECT FROM pgbroker.state s
    WHERE s.timeline = present_timeline AND s.system_identifier = present_system
  ) THEN
    PERFORM pgbroker.begin_epoch();
  END IF;
END
$$;

CREATE OR REPLACE FUNCTION pgbroker.index_terms(data jsonb, fields text[]) RETURNS jsonb
  LANGUAGE sql IMMUTABLE
  -- Text, because filters compare text. Numbers in their shortest form; lists and objects cannot be indexed.
  RETURN (
    SELECT jsonb_object_agg(
             f,
             CASE jsonb_typeof(v) WHEN 'number' THEN trim_scale((v #>> '{}')::numeric)::text ELSE v #>> '{}' END)
    FROM unnest(fields) AS f, LATERAL (SELECT coalesce(data -> f, data #> string_to_array(f, '.')) AS v) AS field
    WHERE jsonb_typeof(v) IN ('string', 'number', 'boolean'));

CREATE OR REPLACE FUNCTION pgbroker.log_inserts() RETURNS trigger
  LANGUAGE plpgsql AS $$
DECLARE
  written text[] := ARRAY(SELECT DISTINCT type FROM new_rows);
BEGIN
  IF written = '{}' THEN
    RETURN NULL;
  END IF;
  INSERT INTO pgbroker.changes (version, type, id, changed_at, deleted)
    SELECT version, type, id, modified_at, false FROM new_rows;
  INSERT INTO pgbroker.record_types AS t (type, record_count)
    SELECT type, count(*) FROM new_rows GROUP BY type
    ON CONFLICT (type) DO UPDATE SET record_count = t.record_count + excluded.record_count;
  PERFORM pgbroker.evict_records(written);
  PERFORM pg_notify('pgbroker_changes', '');
  RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION pgbroker.log_updates() RETURNS trigger
  LANGUAGE plpgsql AS $$
DECLARE
  -- Rows whose version stays were only indexed again: no change, and their row in the log must live.
  superseded bigint[] := ARRAY(SELECT version FROM old_rows EXCEPT SELECT version FROM new_rows);
BEGIN
  IF superseded = '{}' THEN
    RETURN NULL;
  END IF;
  DELETE FROM pgbroker.changes WHERE version = ANY (superseded);
  INSERT INTO pgbroker.changes (version, type, id, changed_at, deleted)
    SELECT version, type, id, modified_at, false FROM new_rows
    ON CONFLICT (version) DO NOTHING;
  PERFORM pgbroker.evict_records(ARRAY(SELECT DISTINCT type FROM new_rows));
  PERFORM pg_notify('pgbroker_changes', '');
  RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION pgbroker.log_deletes() RETURNS trigger
  LANGUAGE plpgsql AS $$
DECLARE
  superseded bigint[] := ARRAY(SELECT version FROM old_rows);
BEGIN
  IF superseded = '{}' THEN
    RETURN NULL;
  END IF;
  DELETE FROM pgbroker.changes WHERE version = ANY (superseded);
  INSERT INTO pgbroker.changes (version, type, id, changed_at, deleted)
    SELECT nextval('pgbroker.record_version'), type, id, clock_timestamp(), true FROM old_rows;
  UPDATE pgbroker.record_types t
    SET record_count = t.record_count - gone.n
    FROM (SELECT type, count(*) AS n FROM old_rows GROUP BY type) AS gone
    WHERE t.type = gone.type;
  PERFORM pg_notify('pgbroker_changes', '');
  RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION pgbroker.forget_everything() RETURNS trigger
  LANGUAGE plpgsql AS $$
BEGIN
  UPDATE pgbroker.state
    SET server_version = pgbroker.random_server_version(),
        base_version = nextval('pgbroker.record_version'),
        options_version = options_version + 1;
  -- Not TRUNCATE: readers lock the log before they lock the records, which we hold.
  DELETE FROM pgbroker.changes;
  DELETE FROM pgbroker.record_types WHERE NOT builtin;
  UPDATE pgbroker.record_types SET record_count = 0, purged_version = 0;
  PERFORM pgbroker.install_builtin_options();
  UPDATE pgbroker.checkpoint SET server_version = 0, record_version = 0;
  PERFORM pg_notify('pgbroker_changes', '');
  RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION pgbroker.write_records(
  types        text[],
  ids          text[],
  deletes      boolean[],
  payloads     bytea[],
  projections  text[],
  search_texts text[],
  index_cidrs  text[],
  requests     integer[],
  expected     bigint[]
) RETURNS SETOF pgbroker.changes
  LANGUAGE plpgsql
  -- The plans are made once per connection, perhaps while the tables are still empty: only look-ups by
  -- key stay right when they grow.
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
  AS $$
DECLARE
  conflicts integer[] := '{}';
  puts      bigint := (SELECT count(*) FROM unnest(deletes) AS d WHERE NOT d);
  written   bigint := 0;
  before    bigint;
BEGIN
  -- In the order of Clear, which holds the table when it asks for the order lock.
  LOCK TABLE pgbroker.records IN ROW EXCLUSIVE MODE;
  PERFORM pgbroker.lock_order();

  IF EXISTS (SELECT FROM unnest(expected) AS e WHERE e > 0) THEN
    conflicts := ARRAY(
      SELECT DISTINCT i.request
      FROM unnest(types, ids, requests, expected) AS i (type, id, request, expected)
      WHERE i.expected > 0
        AND NOT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = i.type AND r.id = i.id AND r.version = i.expected));
    puts := (SELECT count(*) FROM unnest(deletes, requests) AS i (delete, request)
             WHERE NOT i.delete AND i.request <> ALL (conflicts));
  END IF;

  -- Deletes first: capacity is enforced at the puts, when every place that becomes free is free.
  IF true = ANY (deletes) THEN
    before := (SELECT latest_version FROM pgbroker.versions);
    DELETE FROM pgbroker.records AS r
      USING unnest(types, ids, deletes, requests) AS i (type, id, delete, request)
      WHERE r.type = i.type AND r.id = i.id AND i.delete AND i.request <> ALL (conflicts);
    IF FOUND THEN
      RETURN QUERY
        SELECT c.version, c.type, c.id, c.changed_at, c.deleted FROM pgbroker.changes c
        WHERE c.version > before;
    END IF;
  END IF;

  IF puts > 0 THEN
    -- Update, then insert the rest: the order lock keeps other writers out, so this is exact, and unlike
    -- an upsert it stamps and indexes each row once.
    RETURN QUERY
      UPDATE pgbroker.records AS r
      SET payload = i.payload,
          data = nullif(i.data, '')::jsonb,
          search_text = nullif(i.search_text, ''),
          index_cidr = nullif(i.index_cidr, '')::inet
      FROM unnest(types, ids, deletes, payloads, projections, search_texts, index_cidrs, requests)
        AS i (type, id, delete, payload, data, search_text, index_cidr, request)
      WHERE r.type = i.type AND r.id = i.id AND NOT i.delete AND i.request <> ALL (conflicts)
      RETURNING r.version, r.type, r.id, r.modified_at, false;
    GET DIAGNOSTICS written = ROW_COUNT;
  END IF;

  IF puts > written THEN
    RETURN QUERY
      INSERT INTO pgbroker.records AS r (type, id, payload, data, search_text, index_cidr)
      SELECT i.type, i.id, i.payload, nullif(i.data, '')::jsonb, nullif(i.search_text, ''), nullif(i.index_cidr, '')::inet
      FROM unnest(types, ids, deletes, payloads, projections, search_texts, index_cidrs, requests)
        WITH ORDINALITY AS i (type, id, delete, payload, data, search_text, index_cidr, request, position)
      WHERE NOT i.delete AND i.request <> ALL (conflicts)
        AND NOT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = i.type AND r.id = i.id)
      ORDER BY i.position
      RETURNING r.version, r.type, r.id, r.modified_at, false;
  END IF;
END
$$;

DROP FUNCTION pgbroker.check_epoch();
ALTER TABLE pgbroker.state DROP COLUMN server_started;

-- Put back without being written: nothing of the record has changed.
ALTER TABLE pgbroker.records DISABLE TRIGGER USER;
UPDATE pgbroker.records r SET search_text = t.search_text
  FROM pgbroker.search_texts t WHERE t.type = r.type AND t.id = r.id;
ALTER TABLE pgbroker.records ENABLE TRIGGER USER;
DROP FUNCTION pgbroker.put_search_texts(text[], text[], text[]);
DROP TABLE pgbroker.search_texts;
COMMENT ON COLUMN pgbroker.records.search_text IS 'Lower-case text of the payload''s string fields without secrets, for text queries.';

-- Rows that are compressed stay so until they are written again; that does no harm.
ALTER TABLE pgbroker.records SET (fillfactor = 70, toast_tuple_target = 4080);
ALTER TABLE pgbroker.records RESET (vacuum_truncate, toast.vacuum_truncate);
ALTER TABLE pgbroker.changes RESET (vacuum_truncate);
ALTER TABLE pgbroker.records
  ALTER COLUMN type SET STORAGE EXTENDED,
  ALTER COLUMN id SET STORAGE EXTENDED,
  ALTER COLUMN index_fields SET STORAGE EXTENDED,
  ALTER COLUMN payload SET STORAGE EXTENDED,
  ALTER COLUMN data SET STORAGE EXTENDED,
  ALTER COLUMN payload SET COMPRESSION default,
  ALTER COLUMN data SET COMPRESSION default;
