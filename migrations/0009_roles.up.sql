-- Roles with no more privileges than they need.

CREATE FUNCTION pgbroker.grants(reader text, writer text, server text) RETURNS SETOF text
  LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  roles     text[] := ARRAY(SELECT DISTINCT r FROM unnest(ARRAY[reader, writer, server]) AS r WHERE r <> '');
  missing   text[] := ARRAY(SELECT r FROM unnest(roles) AS r WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = r));
  -- Others may have put something of theirs into the schema, and nobody gives or takes rights on what is not his.
  foreign_relations boolean := EXISTS (SELECT FROM pg_class c
                                       WHERE c.relnamespace = 'pgbroker'::regnamespace AND NOT pg_has_role(c.relowner, 'USAGE'));
  foreign_functions boolean := EXISTS (SELECT FROM pg_proc p
                                       WHERE p.pronamespace = 'pgbroker'::regnamespace AND NOT pg_has_role(p.proowner, 'USAGE'));
  r         text;
  relation  record;
  readable  text;
  deletable text;
  functions text;
BEGIN
  IF missing <> '{}' AND NOT (SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user) THEN
    RAISE EXCEPTION 'there is no role %, and % may not create roles',
        (SELECT string_agg(quote_ident(m), ', ') FROM unnest(missing) AS m), quote_ident(current_user)
      USING ERRCODE = 'undefined_object',
            HINT = 'Have it created by somebody who may: '
              || (SELECT string_agg(format('CREATE ROLE %I LOGIN;', m), ' ') FROM unnest(missing) AS m);
  END IF;
  IF EXISTS (SELECT FROM pg_namespace n JOIN pg_roles o ON o.oid = n.nspowner WHERE n.nspname = 'pgbroker' AND o.rolname = ANY (roles)) THEN
    RAISE EXCEPTION 'the role % owns the schema pgbroker and has every right in it; name another one',
        (SELECT quote_ident(pg_get_userbyid(nspowner)) FROM pg_namespace WHERE nspname = 'pgbroker')
      USING ERRCODE = 'invalid_parameter_value';
  END IF;

  RETURN NEXT 'BEGIN;';
  FOREACH r IN ARRAY missing LOOP
    RETURN NEXT format('CREATE ROLE %I LOGIN;', r);
  END LOOP;
  -- Functions that run with the rights of their caller are for everybody, also where the owner's default privileges take
  -- EXECUTE from PUBLIC: views and triggers call them as whoever uses these. Those that run as the owner (SECURITY DEFINER)
  -- are given out by name, below.
  SELECT string_agg(p.oid::regprocedure::text, ', ' ORDER BY p.oid::regprocedure::text) INTO functions
    FROM pg_proc p
    WHERE p.pronamespace = 'pgbroker'::regnamespace AND NOT p.prosecdef AND p.prorettype <> 'trigger'::regtype
      AND pg_has_role(p.proowner, 'USAGE') AND NOT has_function_privilege('public', p.oid, 'EXECUTE');
  FOREACH r IN ARRAY roles LOOP
    -- What it has too much goes.
    RETURN NEXT format('REVOKE ALL ON SCHEMA pgbroker FROM %I;', r);
    RETURN NEXT format('REVOKE ALL ON %s FROM %I;', CASE WHEN NOT foreign_relations THEN 'ALL TABLES IN SCHEMA pgbroker' ELSE (
      SELECT string_agg(c.oid::regclass::text, ', ' ORDER BY c.relname) FROM pg_class c
      WHERE c.relnamespace = 'pgbroker'::regnamespace AND c.relkind IN ('r', 'v') AND pg_has_role(c.relowner, 'USAGE')) END, r);
    RETURN NEXT format('REVOKE ALL ON %s FROM %I;', CASE WHEN NOT foreign_relations THEN 'ALL SEQUENCES IN SCHEMA pgbroker' ELSE (
      SELECT 'SEQUENCE ' || string_agg(c.oid::regclass::text, ', ' ORDER BY c.relname) FROM pg_class c
      WHERE c.relnamespace = 'pgbroker'::regnamespace AND c.relkind = 'S' AND pg_has_role(c.relowner, 'USAGE')) END, r);
    RETURN NEXT format('REVOKE ALL ON %s FROM %I;', CASE WHEN NOT foreign_functions THEN 'ALL FUNCTIONS IN SCHEMA pgbroker' ELSE (
      SELECT 'FUNCTION ' || string_agg(p.oid::regprocedure::text, ', ' ORDER BY p.proname) FROM pg_proc p
      WHERE p.pronamespace = 'pgbroker'::regnamespace AND p.prokind = 'f' AND pg_has_role(p.proowner, 'USAGE')) END, r);

    -- Bulk loads stage their records in a temporary table.
    RETURN NEXT format(
      CASE WHEN has_database_privilege(current_database(), 'CONNECT WITH GRANT OPTION') THEN '' ELSE '-- The owner of the database: ' END
      || 'GRANT %s ON DATABASE %I TO %I;', CASE WHEN r = server THEN 'CONNECT, TEMPORARY' ELSE 'CONNECT' END, current_database(), r);
    RETURN NEXT format('GRANT USAGE ON SCHEMA pgbroker TO %I;', r);
    IF functions IS NOT NULL THEN
      RETURN NEXT format('GRANT EXECUTE ON FUNCTION %s TO %I;', functions, r);
    END IF;
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
    WHERE c.relnamespace = 'pgbroker'::regnamespace AND c.relkind = 'v' AND pg_has_role(c.relowner, 'USAGE')
      AND c.oid NOT IN (SELECT o.view FROM over_secrets o);
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
      WHERE c.relnamespace = 'pgbroker'::regnamespace AND c.relkind IN ('r', 'v') AND pg_has_role(c.relowner, 'USAGE')
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
  'writes records without reading payloads, the server is what replicas connect as. NULL leaves a role out. Roles that '
  'are missing are created, by whoever may create roles.';
