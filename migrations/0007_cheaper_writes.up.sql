-- The same work with fewer statements, and never compiled. A write of one record costs what its statements
-- cost to start, so each that is saved counts; a batch costs what a row costs.

-- ---------------------------------------------------------------------------------------------
-- The order lock
-- ---------------------------------------------------------------------------------------------

ALTER TABLE pgbroker.state ADD COLUMN server_started timestamptz NOT NULL DEFAULT '-infinity';
COMMENT ON COLUMN pgbroker.state.server_started IS
  'Start time of the server process that system_identifier was last compared with: reading that takes a file.';

CREATE FUNCTION pgbroker.check_epoch() RETURNS void
  LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (
    SELECT FROM pgbroker.state s
    WHERE s.singleton
      AND s.timeline = pgbroker.current_timeline()
      AND s.system_identifier = pgbroker.current_system_identifier()
  ) THEN
    PERFORM pgbroker.begin_epoch();
  END IF;
  UPDATE pgbroker.state SET server_started = pg_postmaster_start_time();
END
$$;
COMMENT ON FUNCTION pgbroker.check_epoch() IS
  'Begins an epoch if the server or its timeline is not the one that issued the latest versions. Call under the order lock.';

CREATE OR REPLACE FUNCTION pgbroker.lock_order() RETURNS void
  LANGUAGE plpgsql AS $$
DECLARE
  present_timeline bigint      := pgbroker.current_timeline();
  present_server   timestamptz := pg_postmaster_start_time();
BEGIN
  -- Versions are assigned under this lock and it is held to the end of the transaction, so they become
  -- visible in the order in which they are assigned. A transaction that notifies serialises its commit
  -- on a lock of Postgres's own anyway.
  PERFORM pg_advisory_xact_lock(7236837420591218);
  -- Found by its key even where a caller has turned sequential scans off: one would look so expensive then
  -- that the statement is compiled (JIT) each time.
  IF NOT EXISTS (
    SELECT FROM pgbroker.state s
    WHERE s.singleton AND s.timeline = present_timeline AND s.server_started = present_server
  ) THEN
    PERFORM pgbroker.check_epoch();
  END IF;
END
$$;

-- ---------------------------------------------------------------------------------------------
-- Each row
-- ---------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgbroker.index_terms(data jsonb, fields text[]) RETURNS jsonb
  LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  terms jsonb := '{}';
  field text;
  value jsonb;
BEGIN
  -- Text, because filters compare text. Numbers in their shortest form; lists and objects cannot be indexed.
  FOREACH field IN ARRAY fields LOOP
    value := coalesce(data -> field, data #> string_to_array(field, '.'));
    CASE jsonb_typeof(value)
      WHEN 'string', 'boolean' THEN
        terms := terms || jsonb_build_object(field, value #>> '{}');
      WHEN 'number' THEN
        terms := terms || jsonb_build_object(field, trim_scale((value #>> '{}')::numeric)::text);
      ELSE
        NULL;
    END CASE;
  END LOOP;
  RETURN nullif(terms, '{}');
END
$$;

-- ---------------------------------------------------------------------------------------------
-- Each statement
-- ---------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION pgbroker.log_inserts() RETURNS trigger
  LANGUAGE plpgsql AS $$
DECLARE
  overfull text[];
BEGIN
  INSERT INTO pgbroker.changes (version, type, id, changed_at, deleted)
    SELECT version, type, id, modified_at, false FROM new_rows;
  IF NOT FOUND THEN
    RETURN NULL;
  END IF;
  WITH counted AS (
    INSERT INTO pgbroker.record_types AS t (type, record_count)
      SELECT type, count(*) FROM new_rows GROUP BY type
      ON CONFLICT (type) DO UPDATE SET record_count = t.record_count + excluded.record_count
      RETURNING t.type, t.record_count > t.capacity AS is_overfull
  )
  SELECT array_agg(type) INTO overfull FROM counted WHERE is_overfull;
  IF overfull IS NOT NULL THEN
    PERFORM pgbroker.evict_records(overfull);
  END IF;
  PERFORM pg_notify('pgbroker_changes', '');
  RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION pgbroker.log_updates() RETURNS trigger
  LANGUAGE plpgsql AS $$
DECLARE
  -- Rows whose version stays were only indexed again: no change, and their row in the log must live.
  superseded bigint[] := ARRAY(SELECT version FROM old_rows EXCEPT SELECT version FROM new_rows);
  overfull   text[];
BEGIN
  IF superseded = '{}' THEN
    RETURN NULL;
  END IF;
  DELETE FROM pgbroker.changes WHERE version = ANY (superseded);
  INSERT INTO pgbroker.changes (version, type, id, changed_at, deleted)
    SELECT version, type, id, modified_at, false FROM new_rows
    ON CONFLICT (version) DO NOTHING;
  -- An update adds nothing, but the capacity may have been lowered since.
  overfull := ARRAY(SELECT t.type FROM pgbroker.record_types t
                    WHERE t.record_count > t.capacity AND t.type IN (SELECT type FROM new_rows));
  IF overfull <> '{}' THEN
    PERFORM pgbroker.evict_records(overfull);
  END IF;
  PERFORM pg_notify('pgbroker_changes', '');
  RETURN NULL;
END
$$;

-- ---------------------------------------------------------------------------------------------
-- The broker's writes
-- ---------------------------------------------------------------------------------------------

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
  -- key stay right when they grow. No plan here is worth compiling, or making anew for the arrays at hand.
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off SET plan_cache_mode = force_generic_plan
  AS $$
DECLARE
  conflicts integer[] := '{}';
  puts      bigint := cardinality(ids);
  written   bigint := 0;
  present   boolean;
  before    bigint;
BEGIN
  -- In the order of Clear, which holds the table when it asks for the order lock.
  LOCK TABLE pgbroker.records IN ROW EXCLUSIVE MODE;
  PERFORM pgbroker.lock_order();

  IF 0 < ANY (expected) THEN
    conflicts := ARRAY(
      SELECT DISTINCT i.request
      FROM unnest(types, ids, requests, expected) AS i (type, id, request, expected)
      WHERE i.expected > 0
        AND NOT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = i.type AND r.id = i.id AND r.version = i.expected));
  END IF;
  IF conflicts <> '{}' OR true = ANY (deletes) THEN
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

  -- Update what is there, insert the rest: the order lock keeps other writers out, so this is exact, and
  -- unlike an upsert it stamps and indexes each row once. Most batches are all of one kind, and the
  -- statement that would do nothing is left out, for its triggers cost as much as a row.
  present := puts > 0 AND EXISTS (
    SELECT FROM unnest(types, ids, deletes) AS i (type, id, delete)
    JOIN pgbroker.records r ON r.type = i.type AND r.id = i.id
    WHERE NOT i.delete);
  IF present THEN
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
        AS i (type, id, delete, payload, data, search_text, index_cidr, request)
      WHERE NOT i.delete AND i.request <> ALL (conflicts)
        AND NOT (present AND (SELECT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = i.type AND r.id = i.id)))
      RETURNING r.version, r.type, r.id, r.modified_at, false;
  END IF;
END
$$;

-- ---------------------------------------------------------------------------------------------
-- Storage
-- ---------------------------------------------------------------------------------------------

-- Rows above toast_tuple_target are compressed, and if they are still above it, parts of them are moved out. lz4 takes some
-- microseconds for that; the older method takes several times as long.
DO $$
BEGIN
  ALTER TABLE pgbroker.records
    ALTER COLUMN payload SET COMPRESSION lz4,
    ALTER COLUMN data SET COMPRESSION lz4,
    ALTER COLUMN search_text SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
  RAISE NOTICE 'this PostgreSQL has no lz4: large records are written more slowly';
END
$$;
-- Keys stay in the row, or they would be the next thing to be moved out.
ALTER TABLE pgbroker.records
  ALTER COLUMN type SET STORAGE MAIN,
  ALTER COLUMN id SET STORAGE MAIN,
  ALTER COLUMN index_fields SET STORAGE MAIN;
