-- Roles with no more privileges than they need.

CREATE FUNCTION pgbroker.grants(reader text, writer text, server text, revoker text DEFAULT NULL) RETURNS SETOF text
  -- Superusers call this: nobody's schema may be in the path.
  LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  roles     text[] := ARRAY(SELECT DISTINCT r FROM unnest(ARRAY[reader, writer, server, revoker]) AS r WHERE r <> '');
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
  endable   text;
  functions text;
  -- Functions that run as the owner, by what they are for.
  for_revoking text[] := '{revoke_session,revoke_user_sessions,revoke_idp_sessions}';
  for_replicas text[] := '{write_records,put_search_texts,expire_records,expire_by_ttl,end_idle_records,end_excess_records,end_records_of_missing_users,'
    'clear_records,purge_audit,purge_tombstones,check_epoch}';
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
  -- What runs as the owner is for nobody else. PUBLIC has it back after a restore without rights (pg_restore --no-acl).
  SELECT string_agg(p.oid::regprocedure::text, ', ' ORDER BY p.oid::regprocedure::text) INTO functions
    FROM pg_proc p
    WHERE p.pronamespace = 'pgbroker'::regnamespace AND p.prosecdef
      AND pg_has_role(p.proowner, 'USAGE') AND has_function_privilege('public', p.oid, 'EXECUTE');
  IF functions IS NOT NULL THEN
    RETURN NEXT format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC;', functions);
  END IF;
  -- Functions that run with the rights of their caller are for everybody, also where the owner's default privileges take
  -- EXECUTE from PUBLIC: views and triggers call them as whoever uses these, and bulk loads make a trigger of their own. Those
  -- that run as the owner (SECURITY DEFINER) are given out by name, below.
  SELECT string_agg(p.oid::regprocedure::text, ', ' ORDER BY p.oid::regprocedure::text) INTO functions
    FROM pg_proc p
    WHERE p.pronamespace = 'pgbroker'::regnamespace AND NOT p.prosecdef
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

  -- The views, also those that users have added, but none that names what is secret, or a whole row of a table where
  -- something is: the dependencies of a view do not tell the latter, its expressions do (column 0). Of those, the ones over one
  -- type of record can be deleted from.
  WITH RECURSIVE uses (relation, number, view, whole) AS (
    SELECT d.refobjid, d.refobjsubid, w.ev_class::oid, w.ev_action::text ~ ':varattno 0 '
      FROM pg_depend d JOIN pg_rewrite w ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
      WHERE d.refclassid = 'pg_class'::regclass AND w.ev_class <> d.refobjid
  ), over_secrets (view) AS (
    SELECT u.view FROM uses u JOIN pg_attribute a ON a.attrelid = u.relation AND (a.attnum = u.number OR u.whole)
      WHERE (a.attrelid, a.attname) IN (('pgbroker.records'::regclass, 'payload'), ('pgbroker.leases'::regclass, 'id'))
    UNION
    SELECT u.view FROM over_secrets o JOIN uses u ON u.relation = o.view
  ), over_records (view, source) AS ( -- source is the view that names the table
    SELECT u.view, u.view FROM uses u WHERE u.relation = 'pgbroker.records'::regclass
    UNION
    SELECT u.view, o.source FROM over_records o JOIN uses u ON u.relation = o.view
  ), types (view, type) AS ( -- which types of records a view is about
    SELECT o.view, replace(literal[1], '''''', '''')
      FROM over_records o, regexp_matches(pg_get_viewdef(o.source), '\mtype = ''((?:[^'']|'''')*)''::text', 'g') AS literal
  ), given (name, is_deletable, is_endable) AS (
    SELECT c.oid::regclass::text, pg_relation_is_updatable(c.oid, false) & 16 <> 0 AND c.oid IN (SELECT o.view FROM over_records o),
           EXISTS (SELECT FROM types t WHERE t.view = c.oid)
             AND NOT EXISTS (SELECT FROM types t LEFT JOIN pgbroker.record_types o ON o.type = t.type
                             WHERE t.view = c.oid AND o.audited IS NOT TRUE)
      FROM pg_class c
      WHERE c.relnamespace = 'pgbroker'::regnamespace AND c.relkind = 'v' AND pg_has_role(c.relowner, 'USAGE')
        AND c.oid NOT IN (SELECT o.view FROM over_secrets o)
  )
  SELECT string_agg(g.name, ', ' ORDER BY g.name),
         string_agg(g.name, ', ' ORDER BY g.name) FILTER (WHERE g.is_deletable),
         -- What is audited is what lets somebody in. Whoever ends sessions has no business with the directory.
         string_agg(g.name, ', ' ORDER BY g.name) FILTER (WHERE g.is_deletable AND g.is_endable)
    INTO readable, deletable, endable
    FROM given g;
  FOREACH r IN ARRAY roles LOOP
    IF r IS DISTINCT FROM server THEN
      RETURN NEXT format('GRANT SELECT ON %s TO %I;', readable, r);
    END IF;
    IF r = revoker THEN
      RETURN NEXT format('GRANT DELETE ON %s TO %I;', endable, r);
    END IF;
    IF r IN (revoker, writer, server) THEN
      RETURN NEXT (
        SELECT format('GRANT EXECUTE ON FUNCTION %s TO %I;', string_agg(p.oid::regprocedure::text, ', ' ORDER BY p.oid::regprocedure::text), r)
        FROM pg_proc p
        WHERE p.pronamespace = 'pgbroker'::regnamespace AND p.prosecdef
          AND (p.proname = ANY (for_revoking) OR r = server AND p.proname = ANY (for_replicas)));
    END IF;
  END LOOP;

  IF writer <> '' THEN
    RETURN NEXT format('GRANT DELETE ON %s TO %I;', deletable, writer);
    -- Data alone, which become a payload: whoever could write that, too, could have the two say different things.
    RETURN NEXT format(
      'GRANT SELECT (%s), INSERT (type, id, data), UPDATE (data), DELETE ON pgbroker.records TO %I;',
      (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a
       WHERE a.attrelid = 'pgbroker.records'::regclass AND a.attnum > 0 AND NOT a.attisdropped AND a.attname <> 'payload'),
      writer);
    RETURN NEXT format('GRANT SELECT (type, projected_fields, expiry_field) ON pgbroker.record_types TO %I;', writer);
    RETURN NEXT format('GRANT USAGE ON SEQUENCE pgbroker.record_version TO %I;', writer);
  END IF;

  IF server <> '' THEN
    FOR relation IN
      SELECT CASE
               WHEN c.relkind = 'v'                                  THEN 'SELECT'
               WHEN c.relname = 'checkpoint'                         THEN 'SELECT, UPDATE'
               -- What goes into the log, the epochs and the audit, and out of them, goes by triggers and functions.
               WHEN c.relname IN ('state', 'changes', 'epochs', 'audit', 'record_types', 'search_texts', 'schema_migrations') THEN 'SELECT'
               ELSE 'SELECT, INSERT, UPDATE, DELETE'
             END AS privileges,
             string_agg('pgbroker.' || quote_ident(c.relname), ', ' ORDER BY c.relname) AS names
      FROM pg_class c
      WHERE c.relnamespace = 'pgbroker'::regnamespace AND c.relkind IN ('r', 'v') AND pg_has_role(c.relowner, 'USAGE')
      GROUP BY 1 ORDER BY 1
    LOOP
      RETURN NEXT format('GRANT %s ON %s TO %I;', relation.privileges, relation.names, server);
    END LOOP;
    -- Whether a type is audited is not for a replica to say: neither so, nor by calling it by another name. Nor is what the
    -- log does not have any more, from which streams know that they have to start over.
    RETURN NEXT (
      SELECT format('GRANT INSERT (%s), UPDATE (%s) ON pgbroker.record_types TO %I;',
                    string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum),
                    string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FILTER (WHERE a.attname <> 'type'), server)
      FROM pg_attribute a
      WHERE a.attrelid = 'pgbroker.record_types'::regclass AND a.attnum > 0 AND NOT a.attisdropped
        AND a.attname NOT IN ('audited', 'builtin', 'record_count', 'purged_version', 'index_version'));
    -- To have clients start over; not where the data set was, and is. What is counted up is counted by triggers: nobody can
    -- bring it to an end, with which TRUNCATE would fail.
    RETURN NEXT format('GRANT UPDATE (server_version) ON pgbroker.state TO %I;', server);
    -- The next version, and not which one that is.
    RETURN NEXT format('GRANT SELECT, USAGE ON SEQUENCE pgbroker.record_version TO %I;', server);
  END IF;
  RETURN NEXT 'COMMIT;';
END
$$;
COMMENT ON FUNCTION pgbroker.grants(text, text, text, text) IS
  'The statements that give four roles what they need and take the rest: a reader sees the views, a revoker also ends sessions, '
  'a writer also writes records without reading payloads, the server is what replicas connect as. NULL leaves a role out. Roles '
  'that are missing are created, by whoever may create roles.';
