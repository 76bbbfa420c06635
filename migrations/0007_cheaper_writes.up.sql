-- The same work with fewer statements, never compiled, and in narrower rows. A write of one record costs what its
-- statements cost to start, so each that is saved counts; a batch costs what a row costs.

-- ---------------------------------------------------------------------------------------------
-- What a text query searches
-- ---------------------------------------------------------------------------------------------

-- In a table of its own: a query reads nothing else then, and a write of a record leaves it alone unless its
-- texts change, which times, the most frequent change by far, are not.
CREATE TABLE pgbroker.search_texts (
  type        text COLLATE "C" NOT NULL,
  id          text COLLATE "C" NOT NULL,
  search_text text NOT NULL,
  PRIMARY KEY (type, id)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);
COMMENT ON TABLE  pgbroker.search_texts IS 'What a text query searches of each live record that has texts; kept by the writers of records, and by triggers.';
COMMENT ON COLUMN pgbroker.search_texts.type IS 'records.type.';
COMMENT ON COLUMN pgbroker.search_texts.id IS 'records.id.';
COMMENT ON COLUMN pgbroker.search_texts.search_text IS
  'Lower-case text of the payload''s string fields without secrets, with U+001F between any two.';

INSERT INTO pgbroker.search_texts (type, id, search_text)
  SELECT type, id, search_text FROM pgbroker.records WHERE search_text <> '';
COMMENT ON COLUMN pgbroker.records.search_text IS
  'Unused: pgbroker.search_texts has the text. It is still here for replicas of the release before, which name it in their queries.';

CREATE FUNCTION pgbroker.put_search_texts(types text[], ids text[], texts text[]) RETURNS void
  -- Whoever may write records need not be allowed to read these. By key, as the callers have it planned.
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  INSERT INTO pgbroker.search_texts AS t (type, id, search_text)
    SELECT i.type, i.id, i.search_text
    FROM unnest(types, ids, texts) AS i (type, id, search_text)
    WHERE i.search_text <> coalesce(
      (SELECT s.search_text FROM pgbroker.search_texts s WHERE s.type = i.type AND s.id = i.id), '')
    ON CONFLICT (type, id) DO UPDATE SET search_text = excluded.search_text;
END
$$;
COMMENT ON FUNCTION pgbroker.put_search_texts(text[], text[], text[]) IS
  'Sets the texts of records, given as parallel arrays, that differ. Empty text stands for none. Call under the order lock.';
REVOKE EXECUTE ON FUNCTION pgbroker.put_search_texts(text[], text[], text[]) FROM PUBLIC;
-- Replicas that run write on, until they are given the rights that a newer one needs.
DO $$
DECLARE
  writer text;
BEGIN
  FOR writer IN
    SELECT DISTINCT CASE p.grantee WHEN 0 THEN 'PUBLIC' ELSE p.grantee::regrole::text END
    FROM pg_class c CROSS JOIN aclexplode(c.relacl) p
    WHERE c.oid = 'pgbroker.records'::regclass AND p.privilege_type = 'UPDATE'
  LOOP
    EXECUTE format('GRANT EXECUTE ON FUNCTION pgbroker.put_search_texts(text[], text[], text[]) TO %s', writer);
  END LOOP;
END
$$;

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
  DELETE FROM pgbroker.search_texts t USING old_rows o WHERE t.type = ANY (ARRAY[o.type]) AND t.id = o.id;
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
  -- Not TRUNCATE: readers lock the log, or the texts, before they lock the records, which we hold.
  DELETE FROM pgbroker.changes;
  DELETE FROM pgbroker.search_texts;
  DELETE FROM pgbroker.record_types WHERE NOT builtin;
  UPDATE pgbroker.record_types SET record_count = 0, purged_version = 0;
  PERFORM pgbroker.install_builtin_options();
  UPDATE pgbroker.checkpoint SET server_version = 0, record_version = 0;
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
  -- key stay right when they grow. To a join on "type =" the order of the whole index would be of use, and of a table that
  -- seems empty it would be read; to one on "type = ANY" of a single value it is of none, so look-ups are all that is left.
  -- No plan here is worth compiling, or making anew for the arrays at hand.
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off SET plan_cache_mode = force_generic_plan
  -- That of the triggers, which take the order lock again: what is planned under one search path is planned anew under another.
  SET search_path = pg_catalog, pg_temp
  AS $$
DECLARE
  conflicts integer[] := '{}';
  puts      bigint := cardinality(ids);
  first_put integer := array_position(deletes, false);
  is_update boolean;
  written   bigint := 0;
  more      bigint;
  before    bigint;
BEGIN
  -- In the order of Clear, which holds the table when it asks for the order lock.
  LOCK TABLE pgbroker.records IN ROW EXCLUSIVE MODE;
  PERFORM pgbroker.lock_order();
  SELECT last_value INTO before FROM pgbroker.record_version;

  IF 0 < ANY (expected) THEN
    conflicts := ARRAY(
      SELECT DISTINCT i.request
      FROM unnest(types, ids, requests, expected) AS i (type, id, request, expected)
      WHERE i.expected > 0
        AND (SELECT NOT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = i.type AND r.id = i.id AND r.version = i.expected)));
  END IF;
  IF conflicts <> '{}' OR true = ANY (deletes) THEN
    puts := (SELECT count(*) FROM unnest(deletes, requests) AS i (delete, request)
             WHERE NOT i.delete AND i.request <> ALL (conflicts));
  END IF;

  -- Deletes first: capacity is enforced at the puts, when every place that becomes free is free.
  IF true = ANY (deletes) THEN
    DELETE FROM pgbroker.records AS r
      USING unnest(types, ids, deletes, requests) AS i (type, id, delete, request)
      WHERE r.type = ANY (ARRAY[i.type]) AND r.id = i.id AND i.delete AND i.request <> ALL (conflicts);
    IF FOUND THEN
      RETURN QUERY
        SELECT c.version, c.type, c.id, c.changed_at, c.deleted FROM pgbroker.changes c
        WHERE c.version > before;
    END IF;
  END IF;

  -- Update what is there, insert the rest: the order lock keeps other writers out, so this is exact, and
  -- unlike an upsert it stamps and indexes each row once. Most batches are all of one kind, that of their
  -- first record; then one statement is enough.
  is_update := EXISTS (SELECT FROM pgbroker.records r WHERE r.type = types[first_put] AND r.id = ids[first_put]);
  FOR pass IN 1..2 LOOP
    EXIT WHEN written = puts;
    IF is_update THEN
      RETURN QUERY
        UPDATE pgbroker.records AS r
        SET payload = i.payload, data = nullif(i.data, '')::jsonb, index_cidr = nullif(i.index_cidr, '')::inet
        FROM unnest(types, ids, deletes, payloads, projections, index_cidrs, requests)
          AS i (type, id, delete, payload, data, index_cidr, request)
        WHERE r.type = ANY (ARRAY[i.type]) AND r.id = i.id AND NOT i.delete AND i.request <> ALL (conflicts)
          AND (pass = 1 OR r.version <= before) -- and not inserted just now
        RETURNING r.version, r.type, r.id, r.modified_at, false;
    ELSE
      RETURN QUERY
        INSERT INTO pgbroker.records AS r (type, id, payload, data, index_cidr)
        SELECT i.type, i.id, i.payload, nullif(i.data, '')::jsonb, nullif(i.index_cidr, '')::inet
        FROM unnest(types, ids, deletes, payloads, projections, index_cidrs, requests)
          AS i (type, id, delete, payload, data, index_cidr, request)
        WHERE NOT i.delete AND i.request <> ALL (conflicts)
          AND (pass = 1 OR (SELECT NOT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = i.type AND r.id = i.id)))
        ON CONFLICT (type, id) DO NOTHING
        RETURNING r.version, r.type, r.id, r.modified_at, false;
    END IF;
    GET DIAGNOSTICS more = ROW_COUNT;
    written := written + more;
    is_update := NOT is_update;
  END LOOP;

  IF conflicts = '{}' THEN
    PERFORM pgbroker.put_search_texts(types, ids, search_texts);
  ELSIF written > 0 THEN
    PERFORM pgbroker.put_search_texts(array_agg(i.type), array_agg(i.id), array_agg(i.search_text))
      FROM unnest(types, ids, deletes, search_texts, requests) AS i (type, id, delete, search_text, request)
      WHERE NOT i.delete AND i.request <> ALL (conflicts);
  END IF;
END
$$;

-- ---------------------------------------------------------------------------------------------
-- Storage
-- ---------------------------------------------------------------------------------------------

-- Three rows to a page: two, and room for the next version of one, so that updates stay HOT. Rows that are
-- larger than that are compressed, lz4 takes some microseconds for it, and as long as they fit a page they
-- are kept whole (MAIN): a payload elsewhere would have to be fetched by every read.
ALTER TABLE pgbroker.records SET (fillfactor = 66, toast_tuple_target = 2600);
ALTER TABLE pgbroker.records
  ALTER COLUMN payload SET STORAGE MAIN,
  ALTER COLUMN data SET STORAGE MAIN,
  ALTER COLUMN type SET STORAGE MAIN,
  ALTER COLUMN id SET STORAGE MAIN,
  ALTER COLUMN index_fields SET STORAGE MAIN;
DO $$
BEGIN
  ALTER TABLE pgbroker.records
    ALTER COLUMN payload SET COMPRESSION lz4,
    ALTER COLUMN data SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
  RAISE NOTICE 'this PostgreSQL has no lz4: large records are written more slowly';
END
$$;

-- To give free space at the end of a table back to the file system, VACUUM locks everybody out, for up to a second: after
-- many records have gone, the next revocation would wait for that. What comes next needs the space anyway.
ALTER TABLE pgbroker.records SET (vacuum_truncate = off, toast.vacuum_truncate = off);
ALTER TABLE pgbroker.search_texts SET (vacuum_truncate = off, toast.vacuum_truncate = off);
ALTER TABLE pgbroker.changes SET (vacuum_truncate = off);
