-- Who revoked what.

CREATE TABLE pgbroker.audit (
  number      bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  at          timestamptz NOT NULL DEFAULT clock_timestamp(),
  change      text        NOT NULL DEFAULT 'ended' CHECK (change IN ('ended', 'moved', 'shortened', 'emptied')),
  cause       text        NOT NULL CHECK (cause IN ('request', 'sql', 'expiry', 'idle', 'ttl', 'limit', 'capacity', 'user', 'clear', 'repair')),
  type        text        COLLATE "C" NOT NULL,
  id          text        COLLATE "C",
  user_id     text,
  became      text,
  records     bigint      NOT NULL DEFAULT 1,
  role        text        NOT NULL DEFAULT session_user,
  acting_role text        DEFAULT nullif(current_setting('role'), 'none'),
  application text        NOT NULL DEFAULT current_setting('application_name'),
  address     inet        DEFAULT inet_client_addr(),
  key         text,
  on_behalf_of text
);
COMMENT ON TABLE  pgbroker.audit IS
  'Ends of records whose type is audited, and changes of whom they belong to, however they came about, for as long as '
  'audit_retention says. Triggers write it; nobody but the owner can change a line.';
COMMENT ON COLUMN pgbroker.audit.number IS 'Order of the entries.';
COMMENT ON COLUMN pgbroker.audit.at IS 'When, by the database''s clock.';
COMMENT ON COLUMN pgbroker.audit.change IS
  'ended: the record is gone; moved: it belongs to another user; shortened: it expires sooner, or has; emptied: it has lost its payload, or the message of its type in there.';
COMMENT ON COLUMN pgbroker.audit.cause IS
  'request: of a gRPC client; sql: a statement; expiry, idle, ttl, limit, capacity, user: an option of the type; clear: everything was deleted; repair: pgbroker check found that it was gone.';
COMMENT ON COLUMN pgbroker.audit.type IS 'Type of the record.';
COMMENT ON COLUMN pgbroker.audit.id IS 'Id of the record; NULL after clear.';
COMMENT ON COLUMN pgbroker.audit.user_id IS 'User whom the record belonged to, if it said so.';
COMMENT ON COLUMN pgbroker.audit.became IS 'The user whom a record that was moved belongs to now, or the time at which one that was shortened expires.';
COMMENT ON COLUMN pgbroker.audit.records IS 'How many records: 1, and after clear all of the type.';
COMMENT ON COLUMN pgbroker.audit.role IS 'Role that was logged in: a person''s, or that of the replicas.';
COMMENT ON COLUMN pgbroker.audit.acting_role IS 'Role that it had taken on with SET ROLE; NULL if none.';
COMMENT ON COLUMN pgbroker.audit.application IS 'application_name of the connection; replicas have pgbroker or what their connection string says.';
COMMENT ON COLUMN pgbroker.audit.address IS 'Where the connection came from: for a request the replica; NULL for a local socket.';
COMMENT ON COLUMN pgbroker.audit.key IS 'Of a request: name of the key that signed it; NULL without authentication.';
COMMENT ON COLUMN pgbroker.audit.on_behalf_of IS
  'Of a request: whom its sender has named as the person behind it, which nobody has checked; NULL if nobody.';

CREATE INDEX audit_id ON pgbroker.audit (id);
COMMENT ON INDEX pgbroker.audit_id IS 'What has become of a record.';

CREATE INDEX audit_user ON pgbroker.audit (user_id) WHERE user_id IS NOT NULL;
COMMENT ON INDEX pgbroker.audit_user IS 'What has become of a user''s records.';

CREATE INDEX audit_at ON pgbroker.audit USING brin (at) WITH (pages_per_range = 16);
COMMENT ON INDEX pgbroker.audit_at IS 'What was revoked in a span of time.';

-- What lets somebody in. Not the directory, of which a resync may replace everything, and not what lapses
-- by itself within minutes.
INSERT INTO pgbroker.record_types AS t (type, audited, builtin)
  VALUES
    ('type.googleapis.com/session.Session',           true, true),
    ('type.googleapis.com/session.SessionBinding',    true, true),
    ('type.googleapis.com/session.IdentityBinding',   true, true),
    ('type.googleapis.com/user.ServiceAccount',       true, true),
    ('type.googleapis.com/pomerium.device.Enrollment', true, true),
    ('type.googleapis.com/pomerium.device.Credential', true, true),
    ('type.googleapis.com/oauth21.MCPRefreshToken',   true, true)
  ON CONFLICT (type) DO UPDATE SET audited = true, builtin = true;

CREATE FUNCTION pgbroker.set_audited(record_type text, audited boolean) RETURNS void
  LANGUAGE sql
  BEGIN ATOMIC
    INSERT INTO pgbroker.record_types AS t (type, audited) VALUES (pgbroker.type_named(record_type), set_audited.audited)
      ON CONFLICT (type) DO UPDATE SET audited = excluded.audited;
  END;
COMMENT ON FUNCTION pgbroker.set_audited(text, boolean) IS 'Whether it is written to the audit when records of the type end or change hands.';

-- A line says sql when it is written. What may say otherwise, end_records, write_records and clear_records, changes it
-- afterwards, in the same transaction, as the owner: there is nothing that others could set to be taken for it.

CREATE FUNCTION pgbroker.audit_deletes() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  audited text[] := ARRAY(SELECT t.type FROM pgbroker.record_types t WHERE t.audited);
BEGIN
  INSERT INTO pgbroker.audit (cause, type, id, user_id)
    SELECT 'sql', o.type, o.id, o.data ->> 'user_id'
    FROM old_rows o
    WHERE o.type = ANY (audited)
    ORDER BY o.type, o.id;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.audit_deletes() IS 'Trigger: writes to the audit who deleted records of audited types.';
REVOKE EXECUTE ON FUNCTION pgbroker.audit_deletes() FROM PUBLIC;

CREATE FUNCTION pgbroker.audit_update() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  of_user  text := OLD.data ->> 'user_id';
  new_user text := NEW.data ->> 'user_id';
  old_ends timestamptz := OLD.expires_at;
  new_ends timestamptz := NEW.expires_at;
  field    text;
  own      bytea;
BEGIN
  SELECT coalesce(t.expiry_field, 'expires_at') INTO field FROM pgbroker.record_types t WHERE t.type = NEW.type AND t.audited;
  IF NOT FOUND THEN
    RETURN NULL;
  END IF;
  IF new_user IS NOT DISTINCT FROM of_user AND (NEW.index_fields ->> 'user_id') <> (OLD.index_fields ->> 'user_id') THEN
    of_user := OLD.index_fields ->> 'user_id';
    new_user := NEW.index_fields ->> 'user_id';
  END IF;
  IF new_user IS DISTINCT FROM of_user THEN
    INSERT INTO pgbroker.audit (change, cause, type, id, user_id, became)
      VALUES ('moved', 'sql', NEW.type, NEW.id, of_user, new_user);
  END IF;
  -- What a google.protobuf.Any with the message of the type begins with: its URL, behind a tag and a length. Without it no
  -- proxy takes the record for what its type says.
  IF octet_length(NEW.type) < 128 THEN
    own := set_byte('\x0a00', 1, octet_length(NEW.type)) || convert_to(NEW.type, 'UTF8');
  END IF;
  IF NEW.payload IS NULL AND OLD.payload IS NOT NULL
     OR substring(OLD.payload FOR octet_length(own)) = own AND substring(NEW.payload FOR octet_length(own)) <> own THEN
    INSERT INTO pgbroker.audit (change, cause, type, id, user_id) VALUES ('emptied', 'sql', NEW.type, NEW.id, of_user);
  END IF;
  -- Proxies look at the time in the record, also of types whose records nothing here ends when it has come.
  IF NEW.version <> OLD.version THEN
    old_ends := coalesce(old_ends, pgbroker.parse_time(OLD.data ->> field));
    new_ends := coalesce(new_ends, pgbroker.parse_time(NEW.data ->> field));
  END IF;
  -- Where an option of the type takes the time from another field now, this is no change of the record, unless it ends it.
  IF new_ends < coalesce(old_ends, 'infinity') AND (NEW.version <> OLD.version OR new_ends <= clock_timestamp()) THEN
    INSERT INTO pgbroker.audit (change, cause, type, id, user_id, became)
      VALUES ('shortened', 'sql', NEW.type, NEW.id, of_user,
              to_char(new_ends AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"'));
  END IF;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.audit_update() IS 'Trigger: writes to the audit who has changed whom a record of an audited type belongs to, or has ended it by a change.';
REVOKE EXECUTE ON FUNCTION pgbroker.audit_update() FROM PUBLIC;

CREATE FUNCTION pgbroker.name_requests(
  after bigint, types text[], ids text[], requests integer[], keys text[], persons text[]) RETURNS void
  LANGUAGE plpgsql SECURITY DEFINER
  -- One request may delete tens of thousands of records: each line is found once.
  SET enable_hashjoin = on SET enable_nestloop = off SET enable_mergejoin = off SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
BEGIN
  UPDATE pgbroker.audit AS a
    SET cause = 'request', key = nullif(keys[i.request + 1], ''), on_behalf_of = nullif(persons[i.request + 1], '')
    FROM unnest(types, ids, requests) AS i (type, id, request)
    WHERE a.number > after AND a.cause = 'sql' AND a.type = i.type AND a.id = i.id;
END
$$;
COMMENT ON FUNCTION pgbroker.name_requests(bigint, text[], text[], integer[], text[], text[]) IS
  'Gives the lines of the audit after a number the request that each is from, for write_records; for the owner alone.';
REVOKE EXECUTE ON FUNCTION pgbroker.name_requests(bigint, text[], text[], integer[], text[], text[]) FROM PUBLIC;

CREATE FUNCTION pgbroker.audit_clear() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  INSERT INTO pgbroker.audit (cause, type, records)
    SELECT 'clear', t.type, t.record_count FROM pgbroker.record_types t
    WHERE t.audited AND t.record_count > 0 ORDER BY t.type;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.audit_clear() IS 'Trigger: writes to the audit who cleared the broker.';
REVOKE EXECUTE ON FUNCTION pgbroker.audit_clear() FROM PUBLIC;

CREATE TRIGGER records_audit_delete AFTER DELETE ON pgbroker.records
  REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.audit_deletes();

-- Hardly any update of what expires passes the condition. Times that move on, which is what updates are about, do not. To find the user in data
-- takes 4 µs, so where writes index it, as of sessions, that is looked at; a change of the index alone has its line, too.
CREATE TRIGGER records_audit_update AFTER UPDATE ON pgbroker.records
  FOR EACH ROW WHEN (
    NEW.expires_at < OLD.expires_at OR OLD.expires_at IS NULL AND NEW.expires_at IS NOT NULL
    OR NEW.payload IS NULL AND OLD.payload IS NOT NULL
    -- Its message is another one: as long as the URL of that of the type are the bytes that are looked at.
    OR substring(NEW.payload FOR octet_length(NEW.type) + 2) <> substring(OLD.payload FOR octet_length(OLD.type) + 2)
    OR NEW.expires_at IS NULL AND OLD.expires_at IS NULL AND (NEW.data ->> 'expires_at') IS DISTINCT FROM (OLD.data ->> 'expires_at')
    OR (NEW.index_fields ->> 'user_id') IS DISTINCT FROM (OLD.index_fields ->> 'user_id')
    OR (NEW.index_fields ? 'user_id') IS NOT TRUE AND (NEW.data ->> 'user_id') IS DISTINCT FROM (OLD.data ->> 'user_id'))
  EXECUTE FUNCTION pgbroker.audit_update();

-- Its name comes before records_clear, which forgets the counts.
CREATE TRIGGER records_audit_clear AFTER TRUNCATE ON pgbroker.records
  FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.audit_clear();

-- ---------------------------------------------------------------------------------------------
-- For the replicas
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.clear_records(key text, person text) RETURNS void
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  audited bigint;
BEGIN
  LOCK TABLE pgbroker.records IN ACCESS EXCLUSIVE MODE;
  PERFORM pgbroker.lock_order();
  audited := coalesce(pg_sequence_last_value('pgbroker.audit_number_seq'), 0);
  TRUNCATE pgbroker.records;
  UPDATE pgbroker.audit AS a
    SET key = nullif(clear_records.key, ''), on_behalf_of = nullif(clear_records.person, '') WHERE a.number > audited;
END
$$;
COMMENT ON FUNCTION pgbroker.clear_records(text, text) IS
  'Removes every record, which makes a new data set, as a request: signed by a key, on behalf of a person. Empty text stands for none.';
REVOKE EXECUTE ON FUNCTION pgbroker.clear_records(text, text) FROM PUBLIC;

CREATE FUNCTION pgbroker.purge_audit(max_rows bigint, retention interval) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  purged bigint;
BEGIN
  -- Whoever takes over a replica cannot hide what it has done, or not at once.
  IF retention IS NULL OR retention < interval '1 day' THEN
    RAISE EXCEPTION 'the audit is kept for a day at least' USING ERRCODE = 'invalid_parameter_value';
  END IF;
  DELETE FROM pgbroker.audit
    WHERE number IN (SELECT a.number FROM pgbroker.audit a ORDER BY a.number LIMIT max_rows)
      AND at < clock_timestamp() - retention;
  GET DIAGNOSTICS purged = ROW_COUNT;
  RETURN purged;
END
$$;
COMMENT ON FUNCTION pgbroker.purge_audit(bigint, interval) IS
  'Removes lines of the audit past their retention, which is a day at least, the oldest first, and returns how many.';
REVOKE EXECUTE ON FUNCTION pgbroker.purge_audit(bigint, interval) FROM PUBLIC;
