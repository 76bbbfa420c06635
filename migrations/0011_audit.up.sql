-- Who revoked what: the audit, and roles with no more privileges than they need.

CREATE TABLE pgbroker.audit (
  number      bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  at          timestamptz NOT NULL DEFAULT clock_timestamp(),
  cause       text        NOT NULL CHECK (cause IN ('request', 'sql', 'expiry', 'idle', 'ttl', 'limit', 'capacity', 'clear')),
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
  'request: of a gRPC client; sql: a statement; expiry, idle, ttl, limit, capacity: an option of the type; clear: everything was deleted.';
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

ALTER TABLE pgbroker.record_types ADD COLUMN audited boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN pgbroker.record_types.audited IS 'Whether deletions of the type''s records are written to the audit.';

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

CREATE TRIGGER records_audit_delete AFTER DELETE ON pgbroker.records
  REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.audit_deletes();
-- Its name comes before records_clear, which forgets the counts.
CREATE TRIGGER records_audit_clear AFTER TRUNCATE ON pgbroker.records
  FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.audit_clear();

CREATE VIEW pgbroker.revocations AS
  SELECT
    a.at,
    a.cause,
    CASE WHEN starts_with(a.type, 'type.googleapis.com/') THEN substr(a.type, 21) ELSE a.type END AS what,
    a.id,
    a.user_id,
    coalesce(a.acting_role, a.role) AS by_role,
    a.application,
    a.address,
    a.records,
    a.number
  FROM pgbroker.audit a;
COMMENT ON VIEW pgbroker.revocations IS 'Who revoked what, when, how and from where: the audit for people.';
COMMENT ON COLUMN pgbroker.revocations.at IS 'When.';
COMMENT ON COLUMN pgbroker.revocations.cause IS
  'request: of a gRPC client; sql: a statement; expiry, idle, ttl, limit, capacity: an option of the type; clear: everything was deleted.';
COMMENT ON COLUMN pgbroker.revocations.what IS 'Type of the record, short.';
COMMENT ON COLUMN pgbroker.revocations.id IS 'Id of the record; NULL after clear.';
COMMENT ON COLUMN pgbroker.revocations.user_id IS 'User whom it belonged to.';
COMMENT ON COLUMN pgbroker.revocations.by_role IS 'Role that did it.';
COMMENT ON COLUMN pgbroker.revocations.application IS 'Program that did it; for a request the replica.';
COMMENT ON COLUMN pgbroker.revocations.address IS 'Where it was connected from; NULL for a local socket.';
COMMENT ON COLUMN pgbroker.revocations.records IS 'How many records: 1, and after clear all of the type.';
COMMENT ON COLUMN pgbroker.revocations.number IS 'Order of the entries.';

CREATE VIEW pgbroker.type_summary AS
  SELECT
    CASE WHEN starts_with(t.type, 'type.googleapis.com/') THEN substr(t.type, 21) ELSE t.type END AS name,
    t.record_count AS records,
    (SELECT c.changed_at FROM pgbroker.changes c
     WHERE c.type = t.type AND NOT c.deleted ORDER BY c.version DESC LIMIT 1) AS written_at,
    t.capacity,
    t.ttl,
    t.expiry_field,
    t.idle_timeout,
    t.user_limit,
    t.audited,
    t.projected_fields AS looked_up_by,
    t.projected_fields <@ t.indexed_fields AND t.expiry_field IS NOT DISTINCT FROM t.expiry_applied AS up_to_date,
    t.type
  FROM pgbroker.record_types t;
COMMENT ON VIEW pgbroker.type_summary IS 'The record types: how many records each has, and for how long they stay.';
COMMENT ON COLUMN pgbroker.type_summary.name IS 'Record type, short.';
COMMENT ON COLUMN pgbroker.type_summary.records IS 'Live records, counted exactly.';
COMMENT ON COLUMN pgbroker.type_summary.written_at IS 'When a live record of the type was last written.';
COMMENT ON COLUMN pgbroker.type_summary.capacity IS 'How many records are kept, those written last; NULL all.';
COMMENT ON COLUMN pgbroker.type_summary.ttl IS 'Records not written for longer are deleted; NULL never.';
COMMENT ON COLUMN pgbroker.type_summary.expiry_field IS 'Payload field whose time, once passed, deletes the record; NULL never.';
COMMENT ON COLUMN pgbroker.type_summary.idle_timeout IS 'Records whose accessed_at is longer ago are deleted; NULL never.';
COMMENT ON COLUMN pgbroker.type_summary.user_limit IS 'How many records one user may have; NULL any number.';
COMMENT ON COLUMN pgbroker.type_summary.audited IS 'Whether deletions are audited.';
COMMENT ON COLUMN pgbroker.type_summary.looked_up_by IS 'Payload fields that look-ups find by index.';
COMMENT ON COLUMN pgbroker.type_summary.up_to_date IS 'Whether that and the expiry hold for every record already; if not, that is being done in the background.';
COMMENT ON COLUMN pgbroker.type_summary.type IS 'Record type in full.';

-- ---------------------------------------------------------------------------------------------
-- Roles
-- ---------------------------------------------------------------------------------------------

-- Who may write records need not be allowed to write the change log: what the triggers do, they do as the
-- owner. Nobody else may use their functions, or he could hang them on a table of his own and forge changes.
-- What runs for each row stays as it is, for speed; it only reads options and takes a version.
DO $$
DECLARE
  f regprocedure;
BEGIN
  FOR f IN
    SELECT DISTINCT t.tgfoid::regprocedure FROM pg_trigger t
    WHERE t.tgrelid = 'pgbroker.records'::regclass AND NOT t.tgisinternal AND t.tgtype & 1 = 0
  LOOP
    EXECUTE format('ALTER FUNCTION %s SECURITY DEFINER SET search_path = pg_catalog, pg_temp', f);
    EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', f);
  END LOOP;
END
$$;

CREATE FUNCTION pgbroker.grants(reader text, writer text, server text) RETURNS SETOF text
  LANGUAGE plpgsql STABLE AS $$
DECLARE
  r        text;
  relation record;
  readable text;
  deletable text;
BEGIN
  RETURN NEXT 'BEGIN;';
  FOREACH r IN ARRAY ARRAY[reader, writer, server] LOOP
    CONTINUE WHEN r IS NULL OR r = '';
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = r) THEN
      RETURN NEXT format('CREATE ROLE %I LOGIN;', r);
    END IF;
    -- What it has too much goes.
    RETURN NEXT format('REVOKE ALL ON ALL TABLES IN SCHEMA pgbroker FROM %I;', r);
    RETURN NEXT format('REVOKE ALL ON ALL SEQUENCES IN SCHEMA pgbroker FROM %I;', r);
    RETURN NEXT format('GRANT USAGE ON SCHEMA pgbroker TO %I;', r);
  END LOOP;

  -- The views, also those that users have added, but none that names what is secret. Of those, the ones over one type of
  -- record can be deleted from.
  WITH RECURSIVE uses (relation, number, view) AS (
    SELECT d.refobjid, d.refobjsubid, w.ev_class::oid
      FROM pg_depend d JOIN pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
      WHERE d.refclassid = 'pg_class'::regclass AND w.ev_class <> d.refobjid
  ), over_records (view) AS (
    SELECT u.view FROM uses u WHERE u.relation = 'pgbroker.records'::regclass
    UNION
    SELECT u.view FROM over_records o JOIN uses u ON u.relation = o.view
  ), over_secrets (view) AS (
    SELECT u.view FROM uses u JOIN pg_attribute a ON a.attrelid = u.relation AND a.attnum = u.number
      WHERE (a.attrelid, a.attname) IN (('pgbroker.records'::regclass, 'payload'), ('pgbroker.leases'::regclass, 'id'))
    UNION
    SELECT u.view FROM over_secrets o JOIN uses u ON u.relation = o.view
  )
  SELECT string_agg('pgbroker.' || quote_ident(c.relname), ', ' ORDER BY c.relname),
         string_agg('pgbroker.' || quote_ident(c.relname), ', ' ORDER BY c.relname) FILTER (
           WHERE c.oid IN (SELECT o.view FROM over_records o) AND pg_relation_is_updatable(c.oid, false) & 16 <> 0)
    INTO readable, deletable
    FROM pg_class c
    WHERE c.relnamespace = 'pgbroker'::regnamespace AND c.relkind = 'v' AND c.oid NOT IN (SELECT o.view FROM over_secrets o);
  FOREACH r IN ARRAY ARRAY[reader, writer] LOOP
    CONTINUE WHEN r IS NULL OR r = '';
    RETURN NEXT format('GRANT SELECT ON %s TO %I;', readable, r);
  END LOOP;

  IF writer <> '' THEN
    RETURN NEXT format('GRANT DELETE ON %s TO %I;', deletable, writer);
    -- Whoever writes a payload need not be able to read it back.
    RETURN NEXT format(
      'GRANT SELECT (%s), INSERT (type, id, payload, data, index_cidr), '
      'UPDATE (payload, data, index_cidr), DELETE ON pgbroker.records TO %I;',
      (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a
       WHERE a.attrelid = 'pgbroker.records'::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attname <> 'payload'),
      writer);
    RETURN NEXT format('GRANT SELECT (type, projected_fields, expiry_field) ON pgbroker.record_types TO %I;', writer);
    RETURN NEXT format('GRANT USAGE ON SEQUENCE pgbroker.record_version TO %I;', writer);
    RETURN NEXT format('GRANT EXECUTE ON FUNCTION pgbroker.put_search_texts(text[], text[], text[]) TO %I;', writer);
  END IF;

  IF server <> '' THEN
    FOR relation IN
      SELECT CASE
               WHEN c.relkind = 'v'                                  THEN 'SELECT'
               WHEN c.relname = 'records'                            THEN 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE'
               WHEN c.relname = 'record_types'                       THEN 'SELECT, INSERT, UPDATE'
               WHEN c.relname = 'epochs'                             THEN 'SELECT, INSERT'
               WHEN c.relname IN ('state', 'checkpoint')             THEN 'SELECT, UPDATE'
               WHEN c.relname IN ('changes', 'audit')                THEN 'SELECT, DELETE'
               WHEN c.relname IN ('search_texts', 'schema_migrations') THEN 'SELECT'
               ELSE 'SELECT, INSERT, UPDATE, DELETE'
             END AS privileges,
             string_agg('pgbroker.' || quote_ident(c.relname), ', ' ORDER BY c.relname) AS names
      FROM pg_class c
      WHERE c.relnamespace = 'pgbroker'::regnamespace AND c.relkind IN ('r', 'v')
      GROUP BY 1 ORDER BY 1
    LOOP
      RETURN NEXT format('GRANT %s ON %s TO %I;', relation.privileges, relation.names, server);
    END LOOP;
    RETURN NEXT format('GRANT SELECT, UPDATE ON SEQUENCE pgbroker.record_version TO %I;', server);
    RETURN NEXT format('GRANT EXECUTE ON FUNCTION pgbroker.put_search_texts(text[], text[], text[]) TO %I;', server);
  END IF;
  RETURN NEXT 'COMMIT;';
END
$$;
COMMENT ON FUNCTION pgbroker.grants(text, text, text) IS
  'The statements that give three roles what they need and take the rest: a reader sees the views, a writer also revokes and '
  'writes records without reading payloads, the server is what replicas connect as. NULL leaves a role out.';
