-- Versioning, the change log, counts, capacity and notification, for every writer: gRPC and SQL alike.
--
-- Lock order, everywhere: tables, then the order lock, then rows.

-- ---------------------------------------------------------------------------------------------
-- The one global order
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.begin_epoch() RETURNS void
  LANGUAGE plpgsql AS $$
DECLARE
  survived bigint := (SELECT latest_version FROM pgbroker.versions);
  issued   bigint := (SELECT last_value FROM pgbroker.record_version);
  first    bigint;
BEGIN
  -- The lost server can have issued versions that this one has never heard of, so jump far ahead of all
  -- of them: to the next multiple of 2^32.
  first := ((greatest(survived, issued) >> 32) + 1) << 32;
  PERFORM setval('pgbroker.record_version', first, false);
  INSERT INTO pgbroker.epochs (first_version, last_version, system_identifier, timeline)
    VALUES (first, survived, pgbroker.current_system_identifier(), pgbroker.current_timeline());
  UPDATE pgbroker.state
    SET system_identifier = pgbroker.current_system_identifier(), timeline = pgbroker.current_timeline();
  PERFORM pg_notify('pgbroker_changes', '');
END
$$;
COMMENT ON FUNCTION pgbroker.begin_epoch() IS
  'Records that versions are issued from here on by another server or timeline. Call under the order lock.';

CREATE FUNCTION pgbroker.lock_order() RETURNS void
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
COMMENT ON FUNCTION pgbroker.lock_order() IS
  'Takes the order lock until the end of the transaction, and begins an epoch if the server has changed. '
  'Everything that assigns record versions or changes options takes it before any row.';

CREATE FUNCTION pgbroker.take_order_lock() RETURNS trigger
  LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pgbroker.lock_order();
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.take_order_lock() IS 'Trigger: the order lock before any row of the statement.';

-- ---------------------------------------------------------------------------------------------
-- Record types: options
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.plan_projected_fields() RETURNS trigger
  LANGUAGE plpgsql AS $$
BEGIN
  -- Grow only: a replica that has not yet heard of a change of options may still rely on any of them.
  NEW.projected_fields := ARRAY(
    SELECT DISTINCT f FROM unnest(NEW.projected_fields || NEW.indexable_fields) AS f ORDER BY f);
  IF NEW.record_count = 0 THEN
    NEW.indexed_fields := NEW.projected_fields;
  END IF;
  RETURN NEW;
END
$$;
COMMENT ON FUNCTION pgbroker.plan_projected_fields() IS
  'Trigger: which fields writes must index from now on; the existing records are brought up to it in the background.';

CREATE FUNCTION pgbroker.announce_options() RETURNS trigger
  LANGUAGE plpgsql AS $$
BEGIN
  UPDATE pgbroker.state SET options_version = options_version + 1;
  PERFORM pg_notify('pgbroker_changes', '');
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.announce_options() IS 'Trigger: makes every replica reload the options and tell its streams.';

CREATE FUNCTION pgbroker.refuse_forgetting_types() RETURNS trigger
  LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'record types cannot be deleted: their counts and purged versions are needed'
    USING ERRCODE = 'integrity_constraint_violation',
          HINT = 'To remove options, set capacity and ttl to NULL and indexable_fields to ''{}''.';
END
$$;
COMMENT ON FUNCTION pgbroker.refuse_forgetting_types() IS 'Trigger: a forgotten purged_version would let streams miss tombstones.';

-- The triggers on records update record_types themselves, under the lock they already hold and without
-- touching options: depth 0 leaves those out.
CREATE TRIGGER record_types_order BEFORE INSERT OR UPDATE ON pgbroker.record_types
  FOR EACH STATEMENT WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION pgbroker.take_order_lock();
CREATE TRIGGER record_types_keep BEFORE DELETE OR TRUNCATE ON pgbroker.record_types
  FOR EACH STATEMENT WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION pgbroker.refuse_forgetting_types();
CREATE TRIGGER record_types_projected_insert BEFORE INSERT ON pgbroker.record_types
  FOR EACH ROW WHEN (NEW.indexable_fields <> '{}') EXECUTE FUNCTION pgbroker.plan_projected_fields();
CREATE TRIGGER record_types_projected_update BEFORE UPDATE OF indexable_fields ON pgbroker.record_types
  FOR EACH ROW EXECUTE FUNCTION pgbroker.plan_projected_fields();
CREATE TRIGGER record_types_options_insert AFTER INSERT ON pgbroker.record_types
  FOR EACH STATEMENT WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION pgbroker.announce_options();
CREATE TRIGGER record_types_options_update
  AFTER UPDATE OF capacity, ttl, indexable_fields, indexed_fields, expiry_field ON pgbroker.record_types
  FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.announce_options();

-- ---------------------------------------------------------------------------------------------
-- Records: before
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.index_terms(data jsonb, fields text[]) RETURNS jsonb
  LANGUAGE sql IMMUTABLE
  -- Text, because filters compare text. Numbers in their shortest form; lists and objects cannot be indexed.
  RETURN (
    SELECT jsonb_object_agg(
             f,
             CASE jsonb_typeof(v) WHEN 'number' THEN trim_scale((v #>> '{}')::numeric)::text ELSE v #>> '{}' END)
    FROM unnest(fields) AS f, LATERAL (SELECT coalesce(data -> f, data #> string_to_array(f, '.')) AS v) AS field
    WHERE jsonb_typeof(v) IN ('string', 'number', 'boolean'));
COMMENT ON FUNCTION pgbroker.index_terms(jsonb, text[]) IS
  'The text of the given payload fields (paths joined by dots), as filters compare it.';

CREATE FUNCTION pgbroker.stamp_record() RETURNS trigger
  LANGUAGE plpgsql AS $$
DECLARE
  fields text[];
  expiry text;
BEGIN
  -- Nothing is logged here: this also fires for the insert half of an upsert that then updates, and a
  -- skipped version is harmless where a phantom change is not.
  NEW.version := nextval('pgbroker.record_version');
  NEW.modified_at := clock_timestamp();
  SELECT t.projected_fields, t.expiry_field INTO fields, expiry
    FROM pgbroker.record_types t WHERE t.type = NEW.type;
  NEW.index_fields := CASE WHEN fields <> '{}' THEN pgbroker.index_terms(NEW.data, fields) END;
  NEW.expires_at := CASE WHEN expiry IS NOT NULL THEN (NEW.data #>> string_to_array(expiry, '.'))::timestamptz END;
  RETURN NEW;
END
$$;
COMMENT ON FUNCTION pgbroker.stamp_record() IS
  'Trigger: the version and time of a write, and what is indexed of its payload.';

CREATE FUNCTION pgbroker.refuse_key_change() RETURNS trigger
  LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'the type and id of a record cannot be changed'
    USING ERRCODE = 'integrity_constraint_violation', HINT = 'Delete the record and insert a new one.';
END
$$;
COMMENT ON FUNCTION pgbroker.refuse_key_change() IS 'Trigger: a record that moved would leave its old key without a tombstone.';

CREATE TRIGGER records_order BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON pgbroker.records
  FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.take_order_lock();
CREATE TRIGGER records_key BEFORE UPDATE OF type, id ON pgbroker.records
  FOR EACH ROW WHEN ((OLD.type, OLD.id) IS DISTINCT FROM (NEW.type, NEW.id))
  EXECUTE FUNCTION pgbroker.refuse_key_change();
CREATE TRIGGER records_stamp_insert BEFORE INSERT ON pgbroker.records
  FOR EACH ROW EXECUTE FUNCTION pgbroker.stamp_record();
-- Not for updates of the index columns alone: indexing a record again is not a write.
CREATE TRIGGER records_stamp_update BEFORE UPDATE OF payload, data, search_text, index_cidr, version, modified_at ON pgbroker.records
  FOR EACH ROW EXECUTE FUNCTION pgbroker.stamp_record();

-- ---------------------------------------------------------------------------------------------
-- Records: after
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.evict_records(written text[]) RETURNS void
  LANGUAGE plpgsql AS $$
DECLARE
  full_type record;
BEGIN
  FOR full_type IN
    SELECT t.type, t.record_count - t.capacity AS excess
    FROM pgbroker.record_types t
    WHERE t.type = ANY (written) AND t.record_count > t.capacity
  LOOP
    DELETE FROM pgbroker.records r
      WHERE (r.type, r.id) IN (
        SELECT c.type, c.id FROM pgbroker.changes c
        WHERE c.type = full_type.type AND NOT c.deleted
        ORDER BY c.version LIMIT full_type.excess);
  END LOOP;
END
$$;
COMMENT ON FUNCTION pgbroker.evict_records(text[]) IS
  'Deletes, of each of the given types, the least recently written records above its capacity.';

CREATE FUNCTION pgbroker.log_inserts() RETURNS trigger
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
COMMENT ON FUNCTION pgbroker.log_inserts() IS 'Trigger: logs, counts and announces new records, and enforces capacity.';

CREATE FUNCTION pgbroker.log_updates() RETURNS trigger
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
COMMENT ON FUNCTION pgbroker.log_updates() IS 'Trigger: logs and announces rewritten records, and enforces capacity.';

CREATE FUNCTION pgbroker.log_deletes() RETURNS trigger
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
COMMENT ON FUNCTION pgbroker.log_deletes() IS 'Trigger: a tombstone for every way out.';

CREATE TRIGGER records_log_insert AFTER INSERT ON pgbroker.records
  REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.log_inserts();
CREATE TRIGGER records_log_update AFTER UPDATE ON pgbroker.records
  REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.log_updates();
CREATE TRIGGER records_log_delete AFTER DELETE ON pgbroker.records
  REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.log_deletes();

-- ---------------------------------------------------------------------------------------------
-- Clear
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.install_builtin_options() RETURNS void
  LANGUAGE sql VOLATILE
  BEGIN ATOMIC
    -- What an operator has set stays; only a type without any options gets these.
    INSERT INTO pgbroker.record_types AS t (type, capacity, indexable_fields, ttl, builtin)
      VALUES
        ('type.googleapis.com/session.SessionBindingRequest', 50000, '{key}',                interval '15 minutes', true),
        ('type.googleapis.com/session.SessionBinding',        NULL,  '{session_id,user_id}', NULL, true),
        ('type.googleapis.com/session.IdentityBinding',       NULL,  '{user_id}',            NULL, true),
        ('type.googleapis.com/oauth21.UpstreamMCPToken',      NULL,  '{user_id,route_id}',   NULL, true),
        ('type.googleapis.com/oauth21.PendingUpstreamAuth',   NULL,  '{state_id}',           interval '15 minutes', true)
      ON CONFLICT (type) DO UPDATE
        SET capacity = excluded.capacity, indexable_fields = excluded.indexable_fields, ttl = excluded.ttl, builtin = true
        WHERE t.capacity IS NULL AND t.ttl IS NULL AND t.indexable_fields = '{}';
  END;
COMMENT ON FUNCTION pgbroker.install_builtin_options() IS
  'Sets the options that the product brings along, for each of those types that has none.';

CREATE FUNCTION pgbroker.forget_everything() RETURNS trigger
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
COMMENT ON FUNCTION pgbroker.forget_everything() IS
  'Trigger: TRUNCATE pgbroker.records clears the broker. Clients start over under a new server version; leases and services stay.';

CREATE TRIGGER records_clear AFTER TRUNCATE ON pgbroker.records
  FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.forget_everything();

SELECT pgbroker.install_builtin_options();

-- Sessions have no options of their own, but people and proxies look for them by user and by identity
-- provider, and each names the time at which it ends.
INSERT INTO pgbroker.record_types (type, projected_fields, indexed_fields, expiry_field, builtin)
  VALUES ('type.googleapis.com/session.Session', '{idp_id,user_id}', '{idp_id,user_id}', 'expires_at', true);
