-- Record types and their options, and how long records live.

-- ---------------------------------------------------------------------------------------------
-- Options
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

CREATE FUNCTION pgbroker.type_named(name text) RETURNS text
  LANGUAGE sql STABLE
  RETURN coalesce(
    (SELECT t.type FROM pgbroker.record_types t WHERE t.type = name),
    (SELECT t.type FROM pgbroker.record_types t WHERE t.type = 'type.googleapis.com/' || name),
    name);
COMMENT ON FUNCTION pgbroker.type_named(text) IS
  'The record type that a person means: session.Session stands for type.googleapis.com/session.Session.';

CREATE FUNCTION pgbroker.set_expiry(record_type text, field text) RETURNS void
  LANGUAGE sql
  BEGIN ATOMIC
    INSERT INTO pgbroker.record_types AS t (type, expiry_field, expiry_applied)
      VALUES (pgbroker.type_named(record_type), nullif(field, ''), nullif(field, ''))
      ON CONFLICT (type) DO UPDATE
        SET expiry_field = excluded.expiry_field,
            expiry_applied = (CASE WHEN t.record_count = 0 THEN excluded.expiry_field ELSE t.expiry_applied END);
  END;
COMMENT ON FUNCTION pgbroker.set_expiry(text, text) IS
  'Records of the type end at the time in this payload field (a path joined by dots); NULL takes that back. '
  'It soon holds for the records that are there, too.';

CREATE FUNCTION pgbroker.set_idle_timeout(record_type text, timeout interval) RETURNS void
  LANGUAGE sql
  BEGIN ATOMIC
    -- In seconds: a month is 30 days here.
    INSERT INTO pgbroker.record_types AS t (type, idle_timeout)
      VALUES (pgbroker.type_named(record_type), make_interval(secs => extract(epoch FROM timeout)))
      ON CONFLICT (type) DO UPDATE SET idle_timeout = excluded.idle_timeout;
  END;
COMMENT ON FUNCTION pgbroker.set_idle_timeout(text, interval) IS
  'Records of the type end when their accessed_at is so long ago, give or take a twentieth; NULL takes that back.';

CREATE FUNCTION pgbroker.set_user_limit(record_type text, records integer) RETURNS void
  LANGUAGE sql
  BEGIN ATOMIC
    -- Looking for the records of a user needs the index.
    INSERT INTO pgbroker.record_types AS t (type, user_limit, projected_fields, indexed_fields)
      VALUES (pgbroker.type_named(record_type), records, '{user_id}', '{user_id}')
      ON CONFLICT (type) DO UPDATE
        SET user_limit = excluded.user_limit,
            projected_fields = ARRAY(SELECT DISTINCT f FROM unnest(t.projected_fields || '{user_id}') AS f ORDER BY f),
            indexed_fields = (CASE WHEN t.record_count = 0
              THEN ARRAY(SELECT DISTINCT f FROM unnest(t.indexed_fields || '{user_id}') AS f ORDER BY f)
              ELSE t.indexed_fields END);
  END;
COMMENT ON FUNCTION pgbroker.set_user_limit(text, integer) IS
  'Each user keeps so many records of the type, those issued last, and older ones end; NULL takes that back.';

-- ---------------------------------------------------------------------------------------------
-- What the product brings along
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

SELECT pgbroker.install_builtin_options();

-- Sessions have no options of their own, but people and proxies look for them by user and by identity
-- provider, and each names the time at which it ends.
INSERT INTO pgbroker.record_types AS t (type, projected_fields, indexed_fields, expiry_field, expiry_applied, builtin)
  VALUES ('type.googleapis.com/session.Session', '{idp_id,user_id}', '{idp_id,user_id}', 'expires_at', 'expires_at', true)
  ON CONFLICT (type) DO UPDATE
    SET projected_fields = excluded.projected_fields, indexed_fields = excluded.indexed_fields,
        expiry_field = excluded.expiry_field, expiry_applied = excluded.expiry_applied, builtin = true;

-- ---------------------------------------------------------------------------------------------
-- Ending records
-- ---------------------------------------------------------------------------------------------

-- The functions below delete for the periodic work. Their names tell the audit why a record went. What is to go is found
-- before the order lock is taken, which most of the time is not needed at all, and looked at once more under it. As in
-- write_records only look-ups by key stay right when tables grow.
CREATE FUNCTION pgbroker.expire_records(max_rows bigint) RETURNS bigint
  LANGUAGE plpgsql
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  AS $$
DECLARE
  -- One time for all: for one that may change from row to row the index would be read to its end.
  present timestamptz := clock_timestamp();
  types   text[];
  ids     text[];
  ended   bigint;
BEGIN
  SELECT array_agg(e.type), array_agg(e.id) INTO types, ids
    FROM (SELECT r.type, r.id FROM pgbroker.records r
          WHERE r.expires_at <= present
          ORDER BY r.expires_at LIMIT max_rows) AS e;
  IF types IS NULL THEN
    RETURN 0;
  END IF;
  DELETE FROM pgbroker.records r
    USING unnest(types, ids) AS i (type, id)
    WHERE r.type = ANY (ARRAY[i.type]) AND r.id = i.id AND r.expires_at <= present;
  GET DIAGNOSTICS ended = ROW_COUNT;
  RETURN ended;
END
$$;
COMMENT ON FUNCTION pgbroker.expire_records(bigint) IS
  'Deletes records whose own expiry time has passed, the longest expired first, and returns how many.';

CREATE FUNCTION pgbroker.expire_by_ttl(record_type text, max_rows bigint) RETURNS bigint
  LANGUAGE plpgsql
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  AS $$
DECLARE
  types    text[];
  ids      text[];
  versions bigint[];
  ended    bigint;
BEGIN
  -- Versions ascend with time, so only the least recently written records are looked at.
  SELECT array_agg(o.type), array_agg(o.id), array_agg(o.version) INTO types, ids, versions
    FROM (
      SELECT c.type, c.id, c.version, c.changed_at FROM pgbroker.changes c
      WHERE c.type = record_type AND NOT c.deleted
      ORDER BY c.version LIMIT max_rows
    ) o
    WHERE o.changed_at < clock_timestamp() - (SELECT t.ttl FROM pgbroker.record_types t WHERE t.type = record_type);
  IF types IS NULL THEN
    RETURN 0;
  END IF;
  DELETE FROM pgbroker.records r
    USING unnest(types, ids, versions) AS i (type, id, version)
    WHERE r.type = ANY (ARRAY[i.type]) AND r.id = i.id AND r.version = i.version;
  GET DIAGNOSTICS ended = ROW_COUNT;
  RETURN ended;
END
$$;
COMMENT ON FUNCTION pgbroker.expire_by_ttl(text, bigint) IS
  'Deletes records of a type that have not been written for longer than its TTL, and returns how many.';

CREATE FUNCTION pgbroker.end_idle_records(record_type text, ids text[], versions bigint[]) RETURNS bigint
  LANGUAGE plpgsql
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  AS $$
DECLARE
  ended bigint;
BEGIN
  DELETE FROM pgbroker.records r
    USING unnest(array_fill(record_type, ARRAY[cardinality(ids)]), ids, versions) AS i (type, id, version)
    WHERE r.type = ANY (ARRAY[i.type]) AND r.id = i.id AND r.version = i.version;
  GET DIAGNOSTICS ended = ROW_COUNT;
  RETURN ended;
END
$$;
COMMENT ON FUNCTION pgbroker.end_idle_records(text, text[], bigint[]) IS
  'Deletes records that were found idle, unless they were written since, and returns how many.';

CREATE FUNCTION pgbroker.end_excess_records(record_type text, ids text[], versions bigint[]) RETURNS bigint
  LANGUAGE plpgsql
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  AS $$
DECLARE
  ended bigint;
BEGIN
  DELETE FROM pgbroker.records r
    USING unnest(array_fill(record_type, ARRAY[cardinality(ids)]), ids, versions) AS i (type, id, version)
    WHERE r.type = ANY (ARRAY[i.type]) AND r.id = i.id AND r.version = i.version;
  GET DIAGNOSTICS ended = ROW_COUNT;
  RETURN ended;
END
$$;
COMMENT ON FUNCTION pgbroker.end_excess_records(text, text[], bigint[]) IS
  'Deletes records above the limit of their user, unless they were written since, and returns how many.';

CREATE FUNCTION pgbroker.purge_tombstones(max_rows bigint, retention interval) RETURNS bigint
  LANGUAGE plpgsql
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
DECLARE
  purged bigint[];
  n      bigint;
BEGIN
  purged := ARRAY(
    SELECT o.version
    FROM (
      SELECT c.version, c.changed_at FROM pgbroker.changes c
      WHERE c.deleted AND c.version < (SELECT v.latest_version FROM pgbroker.versions v)
      ORDER BY c.version LIMIT max_rows
    ) o
    WHERE o.changed_at < clock_timestamp() - retention);
  IF purged = '{}' THEN
    RETURN 0;
  END IF;
  LOCK TABLE pgbroker.records IN ROW EXCLUSIVE MODE;
  PERFORM pgbroker.lock_order();
  UPDATE pgbroker.record_types t
    SET purged_version = p.version
    FROM (SELECT c.type, max(c.version) AS version FROM unnest(purged) AS o (version) JOIN pgbroker.changes c ON c.version = ANY (ARRAY[o.version])
          GROUP BY c.type) p
    WHERE t.type = p.type AND t.purged_version < p.version;
  DELETE FROM pgbroker.changes c
    USING unnest(purged) AS o (version)
    WHERE c.version = ANY (ARRAY[o.version]) AND c.deleted; -- by key, as in write_records
  GET DIAGNOSTICS n = ROW_COUNT;
  RETURN n;
END
$$;
COMMENT ON FUNCTION pgbroker.purge_tombstones(bigint, interval) IS
  'Removes tombstones past their retention, the oldest first, but never the newest change, which holds the latest version; and notes by '
  'type how far, so that a stream that might have missed one starts over. Returns how many.';
