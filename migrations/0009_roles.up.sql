-- Roles with no more privileges than they need.

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
