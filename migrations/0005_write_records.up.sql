-- How the broker writes: any number of records in one statement.

CREATE FUNCTION pgbroker.write_records(
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
COMMENT ON FUNCTION pgbroker.write_records(text[], text[], boolean[], bytea[], text[], text[], text[], integer[], bigint[]) IS
  'Writes or deletes records given as parallel arrays, all or nothing, and returns the changes made. Keys must be distinct. '
  'Empty text stands for NULL. Records of one request belong together: where expected is above 0 and not the version of '
  'the record, nothing of that request is written and none of its changes returned. Deleting an absent record is no change.';
