-- Record types and their options, and how long records live.

-- ---------------------------------------------------------------------------------------------
-- Options
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.plan_projected_fields() RETURNS trigger
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  wanted  text[];
  applied text := CASE WHEN TG_OP = 'UPDATE' THEN OLD.expiry_field END;
BEGIN
  IF cardinality(NEW.indexable_fields) > 64
    OR EXISTS (SELECT FROM unnest(NEW.indexable_fields) AS f WHERE f IS NULL OR octet_length(f) > 256) THEN
    RAISE EXCEPTION 'indexable_fields: at most 64 fields of at most 256 bytes each are allowed'
      USING ERRCODE = 'program_limit_exceeded', SCHEMA = 'pgbroker', TABLE = 'record_types', COLUMN = 'indexable_fields';
  END IF;
  wanted := ARRAY(
    SELECT DISTINCT f
    FROM unnest(NEW.indexable_fields || NEW.builtin_fields || CASE WHEN NEW.user_limit IS NOT NULL THEN '{user_id}'::text[] END) AS f
    ORDER BY f);
  IF wanted <> NEW.projected_fields OR NEW.expiry_field IS DISTINCT FROM applied THEN
    NEW.index_version := NEW.index_version + 1;
  END IF;
  -- A field that is no longer wanted leaves at once: who looks records up by it asks in the same snapshot whether it is indexed.
  NEW.projected_fields := wanted;
  NEW.indexed_fields := ARRAY(SELECT f FROM unnest(NEW.indexed_fields) AS f WHERE f = ANY (wanted) ORDER BY f);
  IF NEW.record_count = 0 THEN
    NEW.indexed_fields := wanted;
    NEW.expiry_applied := NEW.expiry_field;
    NEW.indexed_version := NEW.index_version;
  END IF;
  RETURN NEW;
END
$$;
COMMENT ON FUNCTION pgbroker.plan_projected_fields() IS
  'Trigger: which fields writes must index from now on; the existing records are brought up to it in the background.';

CREATE FUNCTION pgbroker.announce_options() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  UPDATE pgbroker.state SET options_version = options_version + 1;
  PERFORM pg_notify('pgbroker_changes', '') WHERE pg_notification_queue_usage() < 0.5;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.announce_options() IS 'Trigger: makes every replica reload the options and tell its streams.';
REVOKE EXECUTE ON FUNCTION pgbroker.announce_options() FROM PUBLIC;

CREATE FUNCTION pgbroker.refuse_forgetting_types() RETURNS trigger
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
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
  FOR EACH ROW WHEN (NEW.indexable_fields <> '{}' OR NEW.builtin_fields <> '{}' OR NEW.user_limit IS NOT NULL OR NEW.expiry_field IS NOT NULL)
  EXECUTE FUNCTION pgbroker.plan_projected_fields();
CREATE TRIGGER record_types_projected_update
  BEFORE UPDATE OF indexable_fields, builtin_fields, user_limit, expiry_field ON pgbroker.record_types
  FOR EACH ROW EXECUTE FUNCTION pgbroker.plan_projected_fields();
CREATE TRIGGER record_types_options_insert AFTER INSERT ON pgbroker.record_types
  FOR EACH STATEMENT WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION pgbroker.announce_options();
CREATE TRIGGER record_types_options_update
  AFTER UPDATE OF capacity, ttl, indexable_fields, indexed_fields, expiry_field, user_limit ON pgbroker.record_types
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
    INSERT INTO pgbroker.record_types AS t (type, expiry_field)
      VALUES (pgbroker.type_named(record_type), nullif(field, ''))
      ON CONFLICT (type) DO UPDATE SET expiry_field = excluded.expiry_field;
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
    INSERT INTO pgbroker.record_types AS t (type, user_limit)
      VALUES (pgbroker.type_named(record_type), records)
      ON CONFLICT (type) DO UPDATE SET user_limit = excluded.user_limit;
  END;
COMMENT ON FUNCTION pgbroker.set_user_limit(text, integer) IS
  'Each user keeps so many records of the type, those issued last, and older ones end; NULL takes that back.';

CREATE FUNCTION pgbroker.set_end_sessions_of_missing_users(record_type text, ends boolean) RETURNS void
  LANGUAGE sql
  BEGIN ATOMIC
    -- Looking for the records of a user needs the index.
    INSERT INTO pgbroker.record_types AS t (type, end_sessions_of_missing_users, projected_fields, indexed_fields)
      VALUES (pgbroker.type_named(record_type), ends, '{user_id}', '{user_id}')
      ON CONFLICT (type) DO UPDATE
        SET end_sessions_of_missing_users = excluded.end_sessions_of_missing_users,
            projected_fields = ARRAY(SELECT DISTINCT f FROM unnest(t.projected_fields || '{user_id}') AS f ORDER BY f),
            indexed_fields = (CASE WHEN t.record_count = 0
              THEN ARRAY(SELECT DISTINCT f FROM unnest(t.indexed_fields || '{user_id}') AS f ORDER BY f)
              ELSE t.indexed_fields END);
  END;
COMMENT ON FUNCTION pgbroker.set_end_sessions_of_missing_users(text, boolean) IS
  'Records of the type end when their user (user_id) is deleted or goes from the directory; false takes that back.';

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
INSERT INTO pgbroker.record_types AS t (type, builtin_fields, expiry_field, builtin)
  VALUES ('type.googleapis.com/session.Session', '{idp_id,user_id}', 'expires_at', true)
  ON CONFLICT (type) DO UPDATE
    SET builtin_fields = excluded.builtin_fields, expiry_field = excluded.expiry_field, builtin = true;

-- ---------------------------------------------------------------------------------------------
-- Ending records
-- ---------------------------------------------------------------------------------------------

-- The functions below delete for the periodic work: what is due, and nothing else, whoever calls them, because the audit
-- says of what they delete that it was due. What is to go is found before the order lock is taken, which most of the time is
-- not needed at all, and looked at once more under it. As in write_records only look-ups by key stay right when tables grow.

CREATE FUNCTION pgbroker.end_records(cause text, types text[], ids text[], versions bigint[]) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
DECLARE
  present timestamptz := clock_timestamp();
  audited bigint;
  ended   bigint;
BEGIN
  -- In the order of Clear, which holds the table when it asks for the order lock.
  LOCK TABLE pgbroker.records IN ROW EXCLUSIVE MODE;
  PERFORM pgbroker.lock_order();
  audited := coalesce(pg_sequence_last_value('pgbroker.audit_number_seq'), 0);
  DELETE FROM pgbroker.records r
    USING unnest(types, ids, versions) AS i (type, id, version)
    WHERE r.type = ANY (ARRAY[i.type]) AND r.id = i.id AND r.version = i.version
      -- Which field holds it may have changed without a write.
      AND (cause <> 'expiry' OR r.expires_at <= present);
  GET DIAGNOSTICS ended = ROW_COUNT;
  IF pg_sequence_last_value('pgbroker.audit_number_seq') > audited THEN
    UPDATE pgbroker.audit AS a SET cause = end_records.cause WHERE a.number > audited AND a.cause = 'sql';
  END IF;
  RETURN ended;
END
$$;
COMMENT ON FUNCTION pgbroker.end_records(text, text[], text[], bigint[]) IS
  'Deletes records, given as parallel arrays, unless they were written since, returns how many, and gives the audit the '
  'cause. The only way to do so; for the owner alone.';
REVOKE EXECUTE ON FUNCTION pgbroker.end_records(text, text[], text[], bigint[]) FROM PUBLIC;

CREATE FUNCTION pgbroker.expire_records(max_rows bigint) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
DECLARE
  -- One time for all: for one that may change from row to row the index would be read to its end.
  present  timestamptz := clock_timestamp();
  types    text[];
  ids      text[];
  versions bigint[];
BEGIN
  SELECT array_agg(e.type), array_agg(e.id), array_agg(e.version) INTO types, ids, versions
    FROM (SELECT r.type, r.id, r.version FROM pgbroker.records r
          WHERE r.expires_at <= present
          ORDER BY r.expires_at LIMIT max_rows) AS e;
  IF types IS NULL THEN
    RETURN 0;
  END IF;
  RETURN pgbroker.end_records('expiry', types, ids, versions);
END
$$;
COMMENT ON FUNCTION pgbroker.expire_records(bigint) IS
  'Deletes records whose own expiry time has passed, the longest expired first, and returns how many.';
REVOKE EXECUTE ON FUNCTION pgbroker.expire_records(bigint) FROM PUBLIC;

CREATE FUNCTION pgbroker.expire_by_ttl(record_type text, max_rows bigint) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
DECLARE
  types    text[];
  ids      text[];
  versions bigint[];
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
  RETURN pgbroker.end_records('ttl', types, ids, versions);
END
$$;
COMMENT ON FUNCTION pgbroker.expire_by_ttl(text, bigint) IS
  'Deletes records of a type that have not been written for longer than its TTL, and returns how many.';
REVOKE EXECUTE ON FUNCTION pgbroker.expire_by_ttl(text, bigint) FROM PUBLIC;

CREATE FUNCTION pgbroker.end_idle_records(record_type text, ids text[], versions bigint[]) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
DECLARE
  types    text[];
  idle     text[];
  of_these bigint[];
BEGIN
  SELECT array_agg(r.type), array_agg(r.id), array_agg(r.version) INTO types, idle, of_these
    FROM pgbroker.record_types t
    CROSS JOIN unnest(ids, versions) AS i (id, version)
    JOIN pgbroker.records r ON r.type = ANY (ARRAY[t.type]) AND r.id = i.id AND r.version = i.version
    WHERE t.type = record_type
      AND coalesce(pgbroker.parse_time(r.data ->> 'accessed_at'), pgbroker.parse_time(r.data ->> 'issued_at'), r.modified_at)
          < clock_timestamp() - t.idle_timeout;
  IF types IS NULL THEN
    RETURN 0;
  END IF;
  RETURN pgbroker.end_records('idle', types, idle, of_these);
END
$$;
COMMENT ON FUNCTION pgbroker.end_idle_records(text, text[], bigint[]) IS
  'Deletes those of the given records that are idle, unless they were written since, and returns how many.';
REVOKE EXECUTE ON FUNCTION pgbroker.end_idle_records(text, text[], bigint[]) FROM PUBLIC;

CREATE FUNCTION pgbroker.excess_records(record_type text, users jsonb[]) RETURNS TABLE (id text, version bigint)
  LANGUAGE plpgsql STABLE
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
BEGIN
  RETURN QUERY
    SELECT k.id, k.version
    FROM (
      SELECT r.id, r.version, t.user_limit,
             row_number() OVER (
               PARTITION BY u.user_id ORDER BY pgbroker.parse_time(r.data ->> 'issued_at') DESC NULLS LAST, r.version DESC) AS place
      FROM pgbroker.record_types t
      CROSS JOIN unnest(users) AS u (user_id)
      -- The fence keeps the planner from joining the whole table.
      CROSS JOIN LATERAL (
        SELECT records.id, records.version, records.data FROM pgbroker.records
        WHERE records.type || '' = record_type AND records.index_fields @> jsonb_build_object('user_id', u.user_id) OFFSET 0
      ) r
      WHERE t.type = record_type
    ) AS k
    WHERE k.place > k.user_limit;
END
$$;
COMMENT ON FUNCTION pgbroker.excess_records(text, jsonb[]) IS
  'The records of a type above the limit of their user, of the given users: all but those issued last.';

CREATE FUNCTION pgbroker.end_excess_records(record_type text, ids text[], versions bigint[]) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER
  SET enable_seqscan = off SET enable_mergejoin = off SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
DECLARE
  users    jsonb[];
  types    text[];
  excess   text[];
  of_these bigint[];
BEGIN
  users := ARRAY(
    SELECT DISTINCT r.index_fields -> 'user_id'
    FROM unnest(ids) AS i (id)
    JOIN pgbroker.records r ON r.type = ANY (ARRAY[record_type]) AND r.id = i.id
    WHERE r.index_fields ? 'user_id');
  SELECT array_agg(record_type), array_agg(e.id), array_agg(e.version) INTO types, excess, of_these
    FROM pgbroker.excess_records(record_type, users) AS e
    WHERE (e.id, e.version) IN (SELECT i.id, i.version FROM unnest(ids, versions) AS i (id, version));
  IF types IS NULL THEN
    RETURN 0;
  END IF;
  RETURN pgbroker.end_records('limit', types, excess, of_these);
END
$$;
COMMENT ON FUNCTION pgbroker.end_excess_records(text, text[], bigint[]) IS
  'Deletes those of the given records that are above the limit of their user, unless they were written since, and returns how many.';
REVOKE EXECUTE ON FUNCTION pgbroker.end_excess_records(text, text[], bigint[]) FROM PUBLIC;

CREATE FUNCTION pgbroker.records_of_missing_users(record_type text, tombstones bigint[], grace interval)
  RETURNS TABLE (id text, version bigint)
  LANGUAGE plpgsql STABLE
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
BEGIN
  RETURN QUERY
    SELECT DISTINCT r.id, r.version
    FROM unnest(tombstones) AS i (version)
    JOIN pgbroker.changes c ON c.version = i.version
    -- The fence keeps the planner from joining the whole table.
    CROSS JOIN LATERAL (
      SELECT records.id, records.version, records.modified_at, records.data FROM pgbroker.records
      WHERE records.type || '' = record_type AND records.index_fields @> jsonb_build_object('user_id', c.id) OFFSET 0
    ) r
    WHERE c.deleted AND c.type IN ('type.googleapis.com/user.User', 'pomerium.io/DirectoryUser')
      -- A directory that is loaded anew may be gone for a moment. One without any user is lost rather than left by everybody.
      AND c.changed_at < clock_timestamp() - grace
      AND NOT EXISTS (SELECT FROM pgbroker.records u WHERE u.type = c.type AND u.id = c.id)
      AND (c.type <> 'pomerium.io/DirectoryUser'
           OR EXISTS (SELECT FROM pgbroker.record_types t WHERE t.type = 'pomerium.io/DirectoryUser' AND t.record_count > 0))
      -- Whoever signs in later is let in by the identity provider. Clocks differ.
      AND coalesce(pgbroker.parse_time(r.data ->> 'issued_at'), r.modified_at) <= c.changed_at + interval '1 minute';
END
$$;
COMMENT ON FUNCTION pgbroker.records_of_missing_users(text, bigint[], interval) IS
  'The records of a type whose user is gone: those that it had when the tombstone with one of the given versions was written, '
  'unless it is back, or that is not yet as long ago as grace.';

CREATE FUNCTION pgbroker.end_records_of_missing_users(record_type text, tombstones bigint[], max_rows bigint) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  grace    CONSTANT interval := '1 minute';
  types    text[];
  ids      text[];
  versions bigint[];
BEGIN
  IF NOT EXISTS (SELECT FROM pgbroker.record_types t WHERE t.type = record_type AND t.end_sessions_of_missing_users)
     OR NOT EXISTS (SELECT FROM pgbroker.records_of_missing_users(record_type, tombstones, grace)) THEN
    RETURN 0;
  END IF;
  -- Found under the order lock: one that is used meanwhile has to go all the same, and nobody looks at a tombstone again.
  LOCK TABLE pgbroker.records IN ROW EXCLUSIVE MODE;
  PERFORM pgbroker.lock_order();
  SELECT array_agg(record_type), array_agg(m.id), array_agg(m.version) INTO types, ids, versions
    FROM (SELECT * FROM pgbroker.records_of_missing_users(record_type, tombstones, grace) LIMIT max_rows) AS m;
  IF types IS NULL THEN
    RETURN 0;
  END IF;
  RETURN pgbroker.end_records('user', types, ids, versions);
END
$$;
COMMENT ON FUNCTION pgbroker.end_records_of_missing_users(text, bigint[], bigint) IS
  'Deletes records whose user is gone for a minute, as tombstones with the given versions say, if that is an option of the type, and '
  'returns how many.';
REVOKE EXECUTE ON FUNCTION pgbroker.end_records_of_missing_users(text, bigint[], bigint) FROM PUBLIC;

CREATE FUNCTION pgbroker.purge_tombstones(max_rows bigint, retention interval) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER
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
REVOKE EXECUTE ON FUNCTION pgbroker.purge_tombstones(bigint, interval) FROM PUBLIC;
