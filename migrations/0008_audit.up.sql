-- Who revoked what.

CREATE TABLE pgbroker.audit (
  number      bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  at          timestamptz NOT NULL DEFAULT clock_timestamp(),
  cause       text        NOT NULL CHECK (cause IN ('request', 'sql', 'expiry', 'idle', 'ttl', 'limit', 'capacity', 'clear', 'repair')),
  type        text        COLLATE "C" NOT NULL,
  id          text        COLLATE "C",
  user_id     text,
  records     bigint      NOT NULL DEFAULT 1,
  role        text        NOT NULL DEFAULT session_user,
  acting_role text        DEFAULT nullif(current_setting('role'), 'none'),
  application text        NOT NULL DEFAULT current_setting('application_name'),
  address     inet        DEFAULT inet_client_addr()
);
COMMENT ON TABLE  pgbroker.audit IS
  'Deletions of records whose type is audited, however they came about, for as long as audit_retention says.';
COMMENT ON COLUMN pgbroker.audit.number IS 'Order of the entries.';
COMMENT ON COLUMN pgbroker.audit.at IS 'When, by the database''s clock.';
COMMENT ON COLUMN pgbroker.audit.cause IS
  'request: of a gRPC client; sql: a statement; expiry, idle, ttl, limit, capacity: an option of the type; clear: everything was deleted; repair: pgbroker check found that it was gone.';
COMMENT ON COLUMN pgbroker.audit.type IS 'Type of the record.';
COMMENT ON COLUMN pgbroker.audit.id IS 'Id of the record; NULL after clear.';
COMMENT ON COLUMN pgbroker.audit.user_id IS 'User whom the record belonged to, if it said so.';
COMMENT ON COLUMN pgbroker.audit.records IS 'How many records: 1, and after clear all of the type.';
COMMENT ON COLUMN pgbroker.audit.role IS 'Role that was logged in: a person''s, or that of the replicas.';
COMMENT ON COLUMN pgbroker.audit.acting_role IS 'Role that it had taken on with SET ROLE; NULL if none.';
COMMENT ON COLUMN pgbroker.audit.application IS 'application_name of the connection; replicas have pgbroker or what their connection string says.';
COMMENT ON COLUMN pgbroker.audit.address IS 'Where the connection came from: for a request the replica; NULL for a local socket.';

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
COMMENT ON FUNCTION pgbroker.set_audited(text, boolean) IS 'Whether deletions of the type''s records are written to the audit.';

CREATE FUNCTION pgbroker.audit_deletes() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  audited text[] := ARRAY(SELECT t.type FROM pgbroker.record_types t WHERE t.audited);
  stack   text;
  cause   text;
BEGIN
  IF NOT EXISTS (SELECT FROM old_rows o WHERE o.type = ANY (audited)) THEN
    RETURN NULL;
  END IF;
  -- The functions that are running tell why, innermost first. A setting would do it, too, but anybody can
  -- change a setting.
  GET DIAGNOSTICS stack = PG_CONTEXT;
  cause := CASE
    WHEN stack ~ '\mevict_records\('      THEN 'capacity'
    WHEN stack ~ '\mexpire_records\('     THEN 'expiry'
    WHEN stack ~ '\mexpire_by_ttl\('      THEN 'ttl'
    WHEN stack ~ '\mend_idle_records\('   THEN 'idle'
    WHEN stack ~ '\mend_excess_records\(' THEN 'limit'
    WHEN stack ~ '\mwrite_records\('      THEN 'request'
    ELSE 'sql'
  END;
  INSERT INTO pgbroker.audit (cause, type, id, user_id)
    SELECT cause, o.type, o.id, o.data ->> 'user_id'
    FROM old_rows o
    WHERE o.type = ANY (audited)
    ORDER BY o.type, o.id;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.audit_deletes() IS 'Trigger: writes to the audit who deleted records of audited types, and how.';
REVOKE EXECUTE ON FUNCTION pgbroker.audit_deletes() FROM PUBLIC;

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

-- Its name comes before records_clear, which forgets the counts.
CREATE TRIGGER records_audit_clear AFTER TRUNCATE ON pgbroker.records
  FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.audit_clear();
