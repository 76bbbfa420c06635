-- Versioning, the change log, counts, capacity and notification, for every writer: gRPC and SQL alike.
--
-- Whoever may write records need not be allowed to write the change log: what the triggers of a statement do, they do as
-- the owner. Nobody else may use their functions, or he could hang them on a table of his own and forge changes. What runs
-- for each row runs as the writer, for speed; it only reads options and takes a version.
--
-- What decides whether a statement is trusted is which columns its role may write, never a setting: only who may write
-- records.projected can say that data are the projection of a payload.

-- ---------------------------------------------------------------------------------------------
-- Each row: before
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.parse_time(value text) RETURNS timestamptz
  -- Catching the error is four times as fast as a pattern that lets only valid times through. It is also why
  -- this cannot run in a parallel worker.
  LANGUAGE plpgsql STABLE STRICT PARALLEL UNSAFE AS $$
BEGIN
  -- One cannot compute with infinity.
  RETURN CASE WHEN pg_catalog.isfinite(value::pg_catalog.timestamptz) THEN value::pg_catalog.timestamptz END;
EXCEPTION WHEN data_exception THEN
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.parse_time(text) IS 'A time in a payload; NULL for what is none.';

CREATE FUNCTION pgbroker.index_terms(data jsonb, fields text[]) RETURNS jsonb
  LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  terms pg_catalog.jsonb := '{}';
  field pg_catalog.text;
  kind  pg_catalog.text;
  value pg_catalog.jsonb;
BEGIN
  -- Text, because filters compare text. Numbers in their shortest form; lists and objects cannot be indexed.
  FOREACH field IN ARRAY fields LOOP
    value := coalesce(data OPERATOR(pg_catalog.->) field,
                      data OPERATOR(pg_catalog.#>) pg_catalog.string_to_array(field, '.'));
    kind := pg_catalog.jsonb_typeof(value);
    IF kind OPERATOR(pg_catalog.=) 'string' OR kind OPERATOR(pg_catalog.=) 'boolean' THEN
      terms := terms OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object(field, value OPERATOR(pg_catalog.#>>) '{}');
    ELSIF kind OPERATOR(pg_catalog.=) 'number' THEN
      terms := terms OPERATOR(pg_catalog.||) pg_catalog.jsonb_build_object(
        field, pg_catalog.trim_scale((value OPERATOR(pg_catalog.#>>) '{}')::numeric)::pg_catalog.text);
    END IF;
  END LOOP;
  IF terms OPERATOR(pg_catalog.=) '{}' THEN
    RETURN NULL;
  END IF;
  RETURN terms;
END
$$;
COMMENT ON FUNCTION pgbroker.index_terms(jsonb, text[]) IS
  'The text of the given payload fields (paths joined by dots), as filters compare it.';

-- What runs for each row names everything in full, operators too, because no writer's search_path may choose what is
-- called. A search path of its own would do the same, and take 3 µs for each of the three on PostgreSQL 15.
CREATE FUNCTION pgbroker.stamp_record() RETURNS trigger
  LANGUAGE plpgsql AS $$
DECLARE
  fields pg_catalog.text[];
  expiry pg_catalog.text;
BEGIN
  IF TG_OP OPERATOR(pg_catalog.=) 'UPDATE' AND NEW.projected OPERATOR(pg_catalog.=) 2 THEN
    -- Projected again: what streams deliver is as it was.
    NEW.version := OLD.version;
    NEW.modified_at := OLD.modified_at;
    NEW.payload := OLD.payload;
  ELSE
    -- Nothing is logged here: this also fires for the insert half of an upsert that then updates, and a
    -- skipped version is harmless where a phantom change is not.
    NEW.version := pg_catalog.nextval('pgbroker.record_version');
    NEW.modified_at := pg_catalog.clock_timestamp();
  END IF;
  SELECT t.projected_fields, t.expiry_field INTO fields, expiry
    FROM pgbroker.record_types t WHERE t.type OPERATOR(pg_catalog.=) NEW.type;
  NEW.index_fields := CASE WHEN fields OPERATOR(pg_catalog.<>) '{}' THEN pgbroker.index_terms(NEW.data, fields) END;
  NEW.expires_at := CASE WHEN expiry IS NOT NULL THEN
    pgbroker.parse_time(NEW.data OPERATOR(pg_catalog.#>>) pg_catalog.string_to_array(expiry, '.')) END;
  -- What the statement has said counts for it alone. NULL stays for who said nothing: the value is that of the row before.
  NEW.projected := CASE WHEN NEW.projected OPERATOR(pg_catalog.<>) 0 THEN 0 END;
  RETURN NEW;
END
$$;
COMMENT ON FUNCTION pgbroker.stamp_record() IS
  'Trigger: the version and time of a write, and what is indexed of its payload.';

CREATE FUNCTION pgbroker.refuse_size(field text, bytes bigint, bound bigint, record_type text, record_id text) RETURNS void
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF bytes > bound THEN
    RAISE EXCEPTION '%: % bytes, at most % are allowed', field, bytes, bound
      USING ERRCODE = 'program_limit_exceeded', SCHEMA = 'pgbroker', TABLE = 'records', COLUMN = field,
            DETAIL = coalesce(format('In the record %s of type %s.', quote_literal(left(record_id, 100)), quote_literal(left(record_type, 100))),
              format('In a record of type %s.', quote_literal(left(record_type, 100))), 'In a record.'),
            HINT = CASE WHEN field = 'payload' THEN 'The owner of the schema can change pgbroker.state.max_record_bytes.' ELSE '' END;
  END IF;
END
$$;
COMMENT ON FUNCTION pgbroker.refuse_size(text, bigint, bigint, text, text) IS 'Fails if a field of a record is larger than a bound.';

CREATE FUNCTION pgbroker.refuse_key_change() RETURNS trigger
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  RAISE EXCEPTION 'the type and id of a record cannot be changed'
    USING ERRCODE = 'integrity_constraint_violation', HINT = 'Delete the record and insert a new one.';
END
$$;
COMMENT ON FUNCTION pgbroker.refuse_key_change() IS 'Trigger: a record that moved would leave its old key without a tombstone.';

CREATE FUNCTION pgbroker.check_record_size() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  bound integer := (SELECT s.max_record_bytes FROM pgbroker.state s);
BEGIN
  PERFORM pgbroker.refuse_size('type', octet_length(NEW.type), 512, NULL, NULL);
  PERFORM pgbroker.refuse_size('id', octet_length(NEW.id), 2048, NEW.type, NULL);
  PERFORM pgbroker.refuse_size('payload', octet_length(NEW.payload), bound, NEW.type, NEW.id);
  RETURN NEW;
END
$$;
COMMENT ON FUNCTION pgbroker.check_record_size() IS
  'Trigger: a record that its clients could not receive, since one message carries it, is refused at every door.';
REVOKE EXECUTE ON FUNCTION pgbroker.check_record_size() FROM PUBLIC;

CREATE TRIGGER records_order BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON pgbroker.records
  FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.take_order_lock();
CREATE TRIGGER records_key BEFORE UPDATE OF type, id ON pgbroker.records
  FOR EACH ROW WHEN ((OLD.type, OLD.id) IS DISTINCT FROM (NEW.type, NEW.id))
  EXECUTE FUNCTION pgbroker.refuse_key_change();
-- What most records are far below costs no look at the bound. Triggers fire in the order of their names: this one after what
-- makes payloads, and before versions are issued.
CREATE TRIGGER records_size_insert BEFORE INSERT ON pgbroker.records
  FOR EACH ROW WHEN (octet_length(NEW.payload) > 16384 OR octet_length(NEW.type) > 512 OR octet_length(NEW.id) > 2048)
  EXECUTE FUNCTION pgbroker.check_record_size();
CREATE TRIGGER records_size_update BEFORE UPDATE OF payload, data ON pgbroker.records
  FOR EACH ROW WHEN (octet_length(NEW.payload) > 16384 AND NEW.payload IS DISTINCT FROM OLD.payload)
  EXECUTE FUNCTION pgbroker.check_record_size();
CREATE TRIGGER records_stamp_insert BEFORE INSERT ON pgbroker.records
  FOR EACH ROW EXECUTE FUNCTION pgbroker.stamp_record();

-- Not for updates of the index columns alone: indexing a record again is not a write.
CREATE TRIGGER records_stamp_update BEFORE UPDATE OF payload, data, index_cidr, version, modified_at, projected ON pgbroker.records
  FOR EACH ROW EXECUTE FUNCTION pgbroker.stamp_record();

-- ---------------------------------------------------------------------------------------------
-- Each statement: after
-- ---------------------------------------------------------------------------------------------

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

CREATE FUNCTION pgbroker.evict_records(written text[]) RETURNS void
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  full_type record;
  types     text[];
  ids       text[];
  versions  bigint[];
BEGIN
  FOR full_type IN
    SELECT t.type, t.record_count - t.capacity AS excess
    FROM pgbroker.record_types t
    WHERE t.type = ANY (written) AND t.record_count > t.capacity
  LOOP
    SELECT array_agg(c.type), array_agg(c.id), array_agg(c.version) INTO types, ids, versions
      FROM (SELECT l.type, l.id, l.version FROM pgbroker.changes l
            WHERE l.type = full_type.type AND NOT l.deleted
            ORDER BY l.version LIMIT full_type.excess) AS c;
    PERFORM pgbroker.end_records('capacity', types, ids, versions);
  END LOOP;
END
$$;
COMMENT ON FUNCTION pgbroker.evict_records(text[]) IS
  'Deletes, of each of the given types, the least recently written records above its capacity.';
REVOKE EXECUTE ON FUNCTION pgbroker.evict_records(text[]) FROM PUBLIC;

CREATE FUNCTION pgbroker.log_inserts() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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
  PERFORM pg_notify('pgbroker_changes', '') WHERE pg_notification_queue_usage() < 0.5;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.log_inserts() IS 'Trigger: logs, counts and announces new records, and enforces capacity.';
REVOKE EXECUTE ON FUNCTION pgbroker.log_inserts() FROM PUBLIC;

CREATE FUNCTION pgbroker.log_updates() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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
  PERFORM pg_notify('pgbroker_changes', '') WHERE pg_notification_queue_usage() < 0.5;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.log_updates() IS 'Trigger: logs and announces rewritten records, and enforces capacity.';
REVOKE EXECUTE ON FUNCTION pgbroker.log_updates() FROM PUBLIC;

CREATE FUNCTION pgbroker.log_deletes() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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
  PERFORM pg_notify('pgbroker_changes', '') WHERE pg_notification_queue_usage() < 0.5;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.log_deletes() IS 'Trigger: a tombstone for every way out.';
REVOKE EXECUTE ON FUNCTION pgbroker.log_deletes() FROM PUBLIC;

CREATE TRIGGER records_log_insert AFTER INSERT ON pgbroker.records
  REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.log_inserts();
CREATE TRIGGER records_log_update AFTER UPDATE ON pgbroker.records
  REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.log_updates();
CREATE TRIGGER records_log_delete AFTER DELETE ON pgbroker.records
  REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.log_deletes();

-- ---------------------------------------------------------------------------------------------
-- Clear
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.forget_everything() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
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
  PERFORM pg_notify('pgbroker_changes', '') WHERE pg_notification_queue_usage() < 0.5;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.forget_everything() IS
  'Trigger: TRUNCATE pgbroker.records clears the broker. Clients start over under a new server version; leases and services stay.';
REVOKE EXECUTE ON FUNCTION pgbroker.forget_everything() FROM PUBLIC;

CREATE TRIGGER records_clear AFTER TRUNCATE ON pgbroker.records
  FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.forget_everything();

-- ---------------------------------------------------------------------------------------------
-- How the broker writes: any number of records in one statement
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.write_records(
  types        text[],
  ids          text[],
  deletes      boolean[],
  payloads     bytea[],
  projections  text[],
  search_texts text[],
  index_cidrs  text[],
  requests     integer[],
  expected     bigint[],
  keys         text[],
  persons      text[]
) RETURNS SETOF pgbroker.changes
  -- As the owner, who alone may say in the audit that this was a request, and whose.
  LANGUAGE plpgsql SECURITY DEFINER
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
  audited   bigint;
BEGIN
  -- In the order of Clear, which holds the table when it asks for the order lock.
  LOCK TABLE pgbroker.records IN ROW EXCLUSIVE MODE;
  PERFORM pgbroker.lock_order();
  SELECT last_value INTO before FROM pgbroker.record_version;
  audited := coalesce(pg_sequence_last_value('pgbroker.audit_number_seq'), 0);

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
        SET payload = i.payload, data = nullif(i.data, '')::jsonb, index_cidr = nullif(i.index_cidr, '')::inet, projected = 1
        FROM unnest(types, ids, deletes, payloads, projections, index_cidrs, requests)
          AS i (type, id, delete, payload, data, index_cidr, request)
        WHERE r.type = ANY (ARRAY[i.type]) AND r.id = i.id AND NOT i.delete AND i.request <> ALL (conflicts)
          AND (pass = 1 OR r.version <= before) -- and not inserted just now
        RETURNING r.version, r.type, r.id, r.modified_at, false;
    ELSE
      RETURN QUERY
        INSERT INTO pgbroker.records AS r (type, id, payload, data, index_cidr, projected)
        SELECT i.type, i.id, i.payload, nullif(i.data, '')::jsonb, nullif(i.index_cidr, '')::inet, 1
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
  IF pg_sequence_last_value('pgbroker.audit_number_seq') > audited THEN
    PERFORM pgbroker.name_requests(audited, types, ids, requests, keys, persons);
  END IF;
END
$$;
COMMENT ON FUNCTION pgbroker.write_records(text[], text[], boolean[], bytea[], text[], text[], text[], integer[], bigint[], text[], text[]) IS
  'Writes or deletes records given as parallel arrays, all or nothing, and returns the changes made. Keys must be distinct. '
  'Empty text stands for NULL. Records of one request belong together: where expected is above 0 and not the version of '
  'the record, nothing of that request is written and none of its changes returned. Deleting an absent record is no change. '
  'keys and persons say for the audit whose request that of a number is, counted from 0: the key that signed it, and on whose '
  'behalf it was made; a request beyond their end has neither.';
REVOKE EXECUTE ON FUNCTION pgbroker.write_records(
  text[], text[], boolean[], bytea[], text[], text[], text[], integer[], bigint[], text[], text[]) FROM PUBLIC;

-- ---------------------------------------------------------------------------------------------
-- The change log is no place for hands
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.guard_changes() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF TG_OP = 'DELETE' AND OLD.deleted THEN
    -- Whoever might have missed it starts over.
    UPDATE pgbroker.record_types t SET purged_version = OLD.version WHERE t.type = OLD.type AND t.purged_version < OLD.version;
    UPDATE pgbroker.state s SET base_version = OLD.version WHERE s.base_version < OLD.version
      AND NOT EXISTS (SELECT FROM pgbroker.changes c WHERE c.version > OLD.version);
    RETURN OLD;
  ELSIF TG_OP = 'DELETE' AND NOT EXISTS (
    SELECT FROM pgbroker.records r WHERE r.type = OLD.type AND r.id = OLD.id AND r.version = OLD.version)
  THEN
    RETURN OLD; -- pgbroker.repair_records
  END IF;
  RAISE EXCEPTION 'the change log is kept by triggers: a stream would not hear of what is changed in it by hand'
    USING ERRCODE = 'integrity_constraint_violation', SCHEMA = 'pgbroker', TABLE = 'changes',
      HINT = 'Change pgbroker.records instead. TRUNCATE pgbroker.records makes every client start over.';
END
$$;
COMMENT ON FUNCTION pgbroker.guard_changes() IS
  'Trigger: tombstones may be removed from the change log, and then streams that might have missed them start over. Nothing else may be changed in it by hand.';
REVOKE EXECUTE ON FUNCTION pgbroker.guard_changes() FROM PUBLIC;

-- Depth 0: what the triggers of records do is right, and is not slowed down.
CREATE TRIGGER changes_guard BEFORE UPDATE OR DELETE ON pgbroker.changes
  FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION pgbroker.guard_changes();
CREATE TRIGGER changes_guard_truncate BEFORE TRUNCATE ON pgbroker.changes
  FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.guard_changes();

-- ---------------------------------------------------------------------------------------------
-- Clients start over
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.restart_clients() RETURNS bigint
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  renewed bigint;
BEGIN
  UPDATE pgbroker.state SET server_version = pgbroker.random_server_version() RETURNING server_version INTO renewed;
  PERFORM pg_notify('pgbroker_changes', '') WHERE pg_notification_queue_usage() < 0.5;
  RETURN renewed;
END
$$;
COMMENT ON FUNCTION pgbroker.restart_clients() IS
  'Gives the data set a new server version: every client drops what it keeps, caches of answers among it, and fetches everything again. '
  'No record is touched. Returns the new server version. For the owner of the schema.';
