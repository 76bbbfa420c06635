-- Many records at once: making all records of a type equal to a given set, and projecting records again.

-- ---------------------------------------------------------------------------------------------
-- All records of a type
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.forget_comparison() RETURNS trigger
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  DELETE FROM pg_temp.staged_progress;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.forget_comparison() IS 'Trigger: what is staged has changed, so it is compared anew.';

CREATE FUNCTION pgbroker.stage_records() RETURNS void
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF to_regclass('pg_temp.staged_records') IS NULL THEN
    CREATE TEMP TABLE staged_records (
      id          text COLLATE "C" PRIMARY KEY,
      data        jsonb NOT NULL,
      -- What data become. Whoever has encoded and projected them already says so here.
      payload     bytea,
      search_text text,
      index_cidr  inet
    );
    CREATE TEMP TABLE staged_differences (
      position    bigint GENERATED ALWAYS AS IDENTITY UNIQUE, -- in the order of which they are written
      id          text COLLATE "C" PRIMARY KEY,
      version     bigint, -- of the stored record; NULL if there is none
      payload     bytea,
      data        jsonb, -- NULL if the record is to go
      search_text text,
      index_cidr  inet
    );
    CREATE TEMP TABLE staged_progress (
      type text COLLATE "C", server_version bigint, record_version bigint, written_position bigint, remaining bigint);
    CREATE TRIGGER forget_comparison AFTER INSERT OR UPDATE OR DELETE ON pg_temp.staged_records
      FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.forget_comparison();
  ELSE
    TRUNCATE pg_temp.staged_records, pg_temp.staged_differences, pg_temp.staged_progress;
  END IF;
END
$$;
COMMENT ON FUNCTION pgbroker.stage_records() IS
  'Makes the temporary table staged_records (id, data), or empties it: fill it, with COPY or INSERT, for replace_records.';

CREATE FUNCTION pgbroker.stage_records(records jsonb) RETURNS bigint
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  staged bigint;
BEGIN
  PERFORM pgbroker.stage_records();
  INSERT INTO pg_temp.staged_records (id, data) SELECT m.key, m.value FROM jsonb_each(records) AS m;
  GET DIAGNOSTICS staged = ROW_COUNT;
  RETURN staged;
END
$$;
COMMENT ON FUNCTION pgbroker.stage_records(jsonb) IS 'Fills staged_records from an object {id: data}, and returns how many that are.';

CREATE FUNCTION pgbroker.compare_staged(record_type text, among text[]) RETURNS void
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  DELETE FROM pg_temp.staged_differences d WHERE among IS NULL OR d.id = ANY (among);
  INSERT INTO pg_temp.staged_differences (id, version, payload, data, search_text, index_cidr)
    SELECT c.id, c.version, coalesce(c.payload, e.payload), coalesce(e.data, c.data), coalesce(c.search_text, e.search_text),
           coalesce(c.index_cidr, e.index_cidr)
    FROM (
      SELECT coalesce(s.id, r.id) AS id, r.version, s.payload, s.data, s.search_text, s.index_cidr,
             CASE WHEN r.data IS NOT NULL THEN r.payload END AS old_payload, r.data AS old_data
      FROM (SELECT * FROM pg_temp.staged_records WHERE among IS NULL OR staged_records.id = ANY (among)) AS s
      FULL JOIN (
        SELECT * FROM pgbroker.records
        WHERE records.type = record_type AND (among IS NULL OR records.id = ANY (among))
      ) AS r ON r.id = s.id
      WHERE s.data IS DISTINCT FROM r.data
      OFFSET 0 -- encode only these
    ) AS c
    -- The same may be said in another spelling: what counts is what it becomes. The fence keeps what is encoded
    -- already from being encoded once more.
    LEFT JOIN LATERAL (
      SELECT * FROM pgbroker.encode_payload(record_type, c.old_payload, c.old_data, c.data, c.id)
      WHERE c.data IS NOT NULL AND c.payload IS NULL
      OFFSET 0
    ) AS e ON true
    WHERE e.data IS DISTINCT FROM c.old_data OR c.version IS NULL OR c.payload IS NOT NULL OR c.data IS NULL
    ORDER BY c.id;
  -- All of the set is refused before anything of it is written.
  PERFORM pgbroker.refuse_size('type', octet_length(record_type), 512, NULL, NULL);
  PERFORM pgbroker.refuse_size('id', octet_length(d.id), 2048, record_type, NULL),
          pgbroker.refuse_size('payload', octet_length(d.payload), (SELECT s.max_record_bytes FROM pgbroker.state s), record_type, d.id)
    FROM pg_temp.staged_differences AS d
    WHERE octet_length(d.payload) > 16384 OR octet_length(d.id) > 2048;
END
$$;
COMMENT ON FUNCTION pgbroker.compare_staged(text, text[]) IS
  'Notes which records of a type, or which among those with the given ids, differ from those staged, and what they are to be.';

CREATE FUNCTION pgbroker.write_differences(
  record_type text, after bigint, upto bigint, OUT inserted bigint, OUT updated bigint, OUT deleted bigint)
  LANGUAGE plpgsql
  -- By key, whatever is known of the temporary table.
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
BEGIN
  deleted := 0;
  updated := 0;
  -- Only what there is to do: an initial load would plan the others while there is no record yet, and then read all records
  -- of the type for each batch.
  IF EXISTS (SELECT FROM pg_temp.staged_differences AS d WHERE d.position > after AND d.position <= upto AND d.data IS NULL) THEN
    DELETE FROM pgbroker.records AS r USING pg_temp.staged_differences AS d
      WHERE d.position > after AND d.position <= upto AND d.data IS NULL AND r.type = record_type AND r.id = d.id;
    GET DIAGNOSTICS deleted = ROW_COUNT;
  END IF;
  IF EXISTS (SELECT FROM pg_temp.staged_differences AS d
             WHERE d.position > after AND d.position <= upto AND d.data IS NOT NULL AND d.version IS NOT NULL) THEN
    UPDATE pgbroker.records AS r
      SET payload = d.payload, data = d.data, index_cidr = d.index_cidr, projected = 1
      FROM pg_temp.staged_differences AS d
      WHERE d.position > after AND d.position <= upto AND d.data IS NOT NULL AND d.version IS NOT NULL
        AND r.type = record_type AND r.id = d.id;
    GET DIAGNOSTICS updated = ROW_COUNT;
  END IF;
  INSERT INTO pgbroker.records (type, id, payload, data, index_cidr, projected)
    SELECT record_type, d.id, d.payload, d.data, d.index_cidr, 1
    FROM pg_temp.staged_differences AS d
    WHERE d.position > after AND d.position <= upto AND d.data IS NOT NULL AND d.version IS NULL
    ORDER BY d.position;
  GET DIAGNOSTICS inserted = ROW_COUNT;
  PERFORM pgbroker.put_search_texts(array_agg(record_type), array_agg(d.id), array_agg(coalesce(d.search_text, '')))
    FROM pg_temp.staged_differences AS d
    WHERE d.position > after AND d.position <= upto AND d.data IS NOT NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.write_differences(text, bigint, bigint) IS 'Writes some of the differences that compare_staged has noted.';

CREATE FUNCTION pgbroker.begin_replacement(record_type text) RETURNS void
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  progress record;
  present  record;
BEGIN
  IF to_regclass('pg_temp.staged_records') IS NULL THEN
    RAISE EXCEPTION 'nothing is staged in this session' USING ERRCODE = 'object_not_in_prerequisite_state',
      HINT = 'Call pgbroker.stage_records(), and fill the table staged_records.';
  END IF;
  -- Nobody waits while all is compared.
  SELECT * INTO progress FROM pg_temp.staged_progress;
  SELECT s.server_version, q.last_value - (NOT q.is_called)::integer AS record_version INTO present
    FROM pgbroker.state s, pgbroker.record_version q;
  IF progress.type IS DISTINCT FROM record_type OR progress.server_version IS DISTINCT FROM present.server_version THEN
    TRUNCATE pg_temp.staged_progress;
    ANALYZE pg_temp.staged_records;
    PERFORM pgbroker.compare_staged(record_type, NULL);
    -- The version before the comparison: what comes later is compared again, under the order lock.
    INSERT INTO pg_temp.staged_progress
      SELECT record_type, present.server_version, present.record_version, coalesce(min(d.position), 1) - 1, count(*)
      FROM pg_temp.staged_differences d;
    ANALYZE pg_temp.staged_differences;
  END IF;
END
$$;
COMMENT ON FUNCTION pgbroker.begin_replacement(text) IS
  'Compares the records of a type with those of staged_records, unless that is done already.';

CREATE FUNCTION pgbroker.compare_records(
  record_type text, OUT inserted bigint, OUT updated bigint, OUT deleted bigint, OUT unchanged bigint)
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM pgbroker.begin_replacement(record_type);
  SELECT count(*) FILTER (WHERE d.data IS NOT NULL AND d.version IS NULL),
         count(*) FILTER (WHERE d.data IS NOT NULL AND d.version IS NOT NULL),
         count(*) FILTER (WHERE d.data IS NULL)
    INTO inserted, updated, deleted
    FROM pg_temp.staged_differences d, pg_temp.staged_progress p
    WHERE d.position > p.written_position;
  unchanged := (SELECT count(*) FROM pg_temp.staged_records) - inserted - updated;
END
$$;
COMMENT ON FUNCTION pgbroker.compare_records(text) IS
  'How many records replace_records would insert, update and delete, and how many are as they are staged. It writes nothing.';

CREATE FUNCTION pgbroker.replace_records(
  record_type text, max_changes bigint DEFAULT NULL, allow_empty boolean DEFAULT false,
  OUT inserted bigint, OUT updated bigint, OUT deleted bigint, OUT remaining bigint)
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  progress record;
  changed  text[];
  done     record;
  last     bigint;
  again    boolean := false;
BEGIN
  PERFORM pgbroker.begin_replacement(record_type);
  IF NOT allow_empty AND NOT EXISTS (SELECT FROM pg_temp.staged_records) THEN
    RAISE EXCEPTION 'staged_records is empty: every record of type % would be deleted', quote_literal(record_type)
      USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'If that is meant, pass allow_empty => true.';
  END IF;

  -- In the order of Clear, which holds the table when it asks for the order lock.
  LOCK TABLE pgbroker.records IN ROW EXCLUSIVE MODE;
  PERFORM pgbroker.lock_order();
  SELECT * INTO progress FROM pg_temp.staged_progress;
  IF progress.server_version <> (SELECT s.server_version FROM pgbroker.state s) THEN
    PERFORM pgbroker.compare_staged(record_type, NULL); -- cleared in between
    again := true;
  ELSE
    changed := ARRAY(SELECT DISTINCT c.id FROM pgbroker.changes c WHERE c.version > progress.record_version AND c.type = record_type);
    IF changed <> '{}' THEN
      PERFORM pgbroker.compare_staged(record_type, changed);
      again := true;
    END IF;
  END IF;
  IF again THEN
    progress.remaining := (SELECT count(*) FROM pg_temp.staged_differences d WHERE d.position > progress.written_position);
  END IF;

  SELECT coalesce(max(b.position), progress.written_position), progress.remaining - count(*) INTO last, remaining
    FROM (SELECT d.position FROM pg_temp.staged_differences d WHERE d.position > progress.written_position
          ORDER BY d.position LIMIT max_changes) AS b;
  SELECT * INTO done FROM pgbroker.write_differences(record_type, progress.written_position, last);
  inserted := done.inserted;
  updated := done.updated;
  deleted := done.deleted;
  UPDATE pg_temp.staged_progress AS p
    SET server_version = (SELECT s.server_version FROM pgbroker.state s),
        record_version = (SELECT q.last_value - (NOT q.is_called)::integer FROM pgbroker.record_version q),
        written_position = last, remaining = replace_records.remaining;
  IF remaining = 0 THEN
    PERFORM pgbroker.stage_records();
  END IF;
END
$$;
COMMENT ON FUNCTION pgbroker.replace_records(text, bigint, boolean) IS
  'Makes the records of a type those of staged_records, writing only what differs, and returns how many it has inserted, '
  'updated and deleted. With max_changes it writes so many at most: call it again, in a transaction of its own, until '
  'none remain, and others get their turn in between. An empty set is refused unless allow_empty says that it is meant.';

-- ---------------------------------------------------------------------------------------------
-- Projecting again
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.project_records(
  types text[], ids text[], versions bigint[], projections text[], search_texts text[], index_cidrs text[]) RETURNS bigint
  LANGUAGE plpgsql
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
DECLARE
  positions bigint[];
BEGIN
  WITH projected AS (
    UPDATE pgbroker.records AS r
      SET data = nullif(i.data, '')::jsonb, index_cidr = nullif(i.index_cidr, '')::inet, projected = 2
      FROM unnest(types, ids, versions, projections, index_cidrs) WITH ORDINALITY AS i (type, id, version, data, index_cidr, position)
      WHERE r.type = ANY (ARRAY[i.type]) AND r.id = i.id AND r.version = i.version -- by key, as in write_records
      RETURNING i.position
  )
  SELECT coalesce(array_agg(position), '{}') INTO positions FROM projected;
  PERFORM pgbroker.put_search_texts(array_agg(types[p]), array_agg(ids[p]), array_agg(search_texts[p])) FROM unnest(positions) AS p;
  RETURN cardinality(positions);
END
$$;
COMMENT ON FUNCTION pgbroker.project_records(text[], text[], bigint[], text[], text[], text[]) IS
  'Sets the projections of records, given as parallel arrays, that still have the given versions, and returns how many. '
  'The records count as unchanged. Empty text stands for NULL.';
