-- Whether the books agree with each other: what is wrong, and how it is put right so that every stream hears of it.
--
-- Triggers keep them. They disagree after what triggers do not see: statements under session_replication_role = replica, disabled
-- triggers, a restore of some of the tables, an owner's hand in the change log, damaged storage.

-- ---------------------------------------------------------------------------------------------
-- What is cheap to see
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.setup_problems()
  RETURNS TABLE (problem text, subject text, detail text, repairable boolean)
  LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
  -- What each table must have. A test compares this with what the migrations have made.
  WITH expected (relation, trigger) AS (VALUES
    ('changes', 'changes_guard'),
    ('changes', 'changes_guard_truncate'),
    ('record_types', 'record_types_keep'),
    ('record_types', 'record_types_options_insert'),
    ('record_types', 'record_types_options_update'),
    ('record_types', 'record_types_order'),
    ('record_types', 'record_types_projected_insert'),
    ('record_types', 'record_types_projected_update'),
    ('records', 'records_audit_clear'),
    ('records', 'records_audit_delete'),
    ('records', 'records_audit_update'),
    ('records', 'records_clear'),
    ('records', 'records_encode_insert'),
    ('records', 'records_encode_update'),
    ('records', 'records_key'),
    ('records', 'records_log_delete'),
    ('records', 'records_log_insert'),
    ('records', 'records_log_update'),
    ('records', 'records_order'),
    ('records', 'records_search_insert'),
    ('records', 'records_search_update'),
    ('records', 'records_size_insert'),
    ('records', 'records_size_update'),
    ('records', 'records_stamp_insert'),
    ('records', 'records_stamp_update'),
    ('redacted_fields', 'redacted_fields_announce'),
    ('redacted_fields', 'redacted_fields_check'),
    ('schemas', 'schemas_announce'),
    ('services', 'services_added'),
    ('services', 'services_changed'),
    ('services', 'services_removed'),
    ('services', 'services_truncated')
  ), log AS (
    SELECT (SELECT s.last_value FROM pgbroker.record_version s) AS issued,
           greatest((SELECT max(c.version) FROM pgbroker.changes c),
                    (SELECT s.base_version FROM pgbroker.state s),
                    (SELECT max(e.first_version) FROM pgbroker.epochs e)) AS used
  )
  SELECT CASE WHEN t.oid IS NULL THEN 'missing trigger' ELSE 'disabled trigger' END AS problem,
         e.relation || '.' || e.trigger AS subject,
         CASE WHEN t.oid IS NULL THEN 'writes go unnoticed without it; restore the schema from a dump, or build it anew'
              ELSE 'writes have gone unnoticed since it was disabled' END AS detail,
         t.oid IS NOT NULL AS repairable
    FROM expected e
    LEFT JOIN pg_catalog.pg_class c ON c.relname = e.relation AND c.relnamespace = 'pgbroker'::regnamespace
    LEFT JOIN pg_catalog.pg_trigger t ON t.tgrelid = c.oid AND t.tgname = e.trigger AND NOT t.tgisinternal
    WHERE t.oid IS NULL OR t.tgenabled NOT IN ('O', 'A')
  UNION ALL
  -- After a restore as another role, say: triggers run with the rights of whoever owns their functions.
  SELECT 'foreign owner', o.name, pg_catalog.format('it belongs to %I, and the schema to %I; restore as one role, or ALTER … OWNER TO',
                                                    pg_catalog.pg_get_userbyid(o.owner), pg_catalog.pg_get_userbyid(n.nspowner)), false
    FROM pg_catalog.pg_namespace n CROSS JOIN (
      SELECT c.relname::text AS name, c.relowner AS owner FROM pg_catalog.pg_class c
        WHERE c.oid IN (SELECT pg_catalog.to_regclass('pgbroker.' || e.relation) FROM expected e)
      UNION
      SELECT p.proname || '()', p.proowner FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
        WHERE t.tgrelid IN (SELECT pg_catalog.to_regclass('pgbroker.' || e.relation) FROM expected e) AND NOT t.tgisinternal
          AND p.pronamespace = 'pgbroker'::regnamespace
    ) o
    WHERE n.oid = 'pgbroker'::regnamespace AND o.owner <> n.nspowner
  UNION ALL
  SELECT 'open to everybody', c.relname::text, pg_catalog.format('REVOKE ALL ON pgbroker.%I FROM PUBLIC', c.relname), false
    FROM pg_catalog.pg_class c
    WHERE c.relnamespace = 'pgbroker'::regnamespace
      AND (EXISTS (SELECT FROM pg_catalog.aclexplode(c.relacl) a WHERE a.grantee = 0)
        OR EXISTS (SELECT FROM pg_catalog.pg_attribute a CROSS JOIN pg_catalog.aclexplode(a.attacl) x
                   WHERE a.attrelid = c.oid AND x.grantee = 0))
  UNION ALL
  SELECT 'missing options', t.type, 'sessions would not expire; restore pgbroker.record_types from a dump', false
    FROM (VALUES ('type.googleapis.com/session.Session')) t (type)
    WHERE NOT EXISTS (SELECT FROM pgbroker.record_types r WHERE r.type = t.type)
  UNION ALL
  SELECT 'missing row', 'state', 'the data set has no identity; restore the table from a dump', false
    WHERE NOT EXISTS (SELECT FROM pgbroker.state)
  UNION ALL
  SELECT 'missing row', 'checkpoint', 'the replication checkpoint has no row', true
    WHERE NOT EXISTS (SELECT FROM pgbroker.checkpoint)
  UNION ALL
  SELECT 'sequence behind', 'record_version', pg_catalog.format('it stands at %s, and version %s is in use', l.issued, l.used), true
    FROM log l WHERE l.issued < l.used
  UNION ALL
  SELECT 'invalid index', c.relname::text, pg_catalog.format('REINDEX INDEX pgbroker.%I', c.relname), false
    FROM pg_catalog.pg_index i JOIN pg_catalog.pg_class c ON c.oid = i.indexrelid
    WHERE c.relnamespace = 'pgbroker'::regnamespace AND NOT i.indisvalid
  UNION ALL
  SELECT 'row security', c.relname::text,
         pg_catalog.format('hides rows from replicas; ALTER TABLE pgbroker.%I DISABLE ROW LEVEL SECURITY', c.relname), false
    FROM pg_catalog.pg_class c WHERE c.relnamespace = 'pgbroker'::regnamespace AND c.relrowsecurity
  UNION ALL
  SELECT 'purged ahead', t.type, pg_catalog.format('tombstones were purged up to version %s, and the latest is %s', t.purged_version, l.used), true
    FROM pgbroker.record_types t CROSS JOIN log l WHERE t.purged_version > l.used;
$$;
COMMENT ON FUNCTION pgbroker.setup_problems() IS
  'What is wrong with the installation itself, found without reading records: the kind of problem, what it is about, what follows from it or '
  'helps, and whether pgbroker check --repair puts it right. No row is well. pgbroker check shows it, and replicas look at it.';

-- ---------------------------------------------------------------------------------------------
-- What takes a look at every record
-- ---------------------------------------------------------------------------------------------

CREATE FUNCTION pgbroker.problems()
  RETURNS TABLE (problem text, subject text, id text, version bigint, detail text, repairable boolean)
  LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
  -- One statement, so one snapshot: writers may go on meanwhile.
  SELECT s.problem, s.subject, NULL::text AS id, NULL::bigint AS version, s.detail, s.repairable
    FROM pgbroker.setup_problems() s
  UNION ALL
  SELECT 'record not in the log', r.type, r.id, r.version, 'a stream that resumes does not hear of it', true
    FROM pgbroker.records r
    WHERE NOT EXISTS (SELECT FROM pgbroker.changes c WHERE c.version = r.version AND c.type = r.type AND c.id = r.id AND NOT c.deleted)
  UNION ALL
  SELECT 'change without its record', c.type, c.id, c.version, 'copies keep a record, or a state of it, that is gone here', true
    FROM pgbroker.changes c
    WHERE NOT c.deleted
      AND NOT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = c.type AND r.id = c.id AND r.version = c.version)
  UNION ALL
  SELECT 'tombstone of a live record', c.type, c.id, c.version, 'copies have deleted a record that is here', true
    FROM pgbroker.changes c JOIN pgbroker.records r ON r.type = c.type AND r.id = c.id
    WHERE c.deleted AND c.version > r.version
  UNION ALL
  SELECT 'wrong count', coalesce(n.type, t.type), NULL, NULL,
         pg_catalog.format('%s are counted, and there are %s', coalesce(t.record_count::text, 'none'), coalesce(n.records, 0)), true
    FROM (SELECT r.type, count(*) AS records FROM pgbroker.records r GROUP BY r.type) n
    FULL JOIN pgbroker.record_types t ON t.type = n.type
    WHERE t.record_count IS DISTINCT FROM coalesce(n.records, 0)
  UNION ALL
  SELECT 'wrong index terms', r.type, r.id, r.version, 'look-ups by field or filters may miss it', true
    FROM pgbroker.records r JOIN pgbroker.record_types t ON t.type = r.type
    WHERE t.index_version = t.indexed_version
      AND r.index_fields IS DISTINCT FROM CASE WHEN t.projected_fields <> '{}' THEN pgbroker.index_terms(r.data, t.projected_fields) END
  UNION ALL
  SELECT 'wrong expiry', r.type, r.id, r.version, 'it ends at another time than its payload says', true
    FROM pgbroker.records r JOIN pgbroker.record_types t ON t.type = r.type
    WHERE t.index_version = t.indexed_version
      AND r.expires_at IS DISTINCT FROM pgbroker.parse_time(r.data #>> string_to_array(t.expiry_field, '.'))
  UNION ALL
  SELECT 'missing search text', r.type, r.id, r.version, 'text queries do not find it', true
    FROM (
      SELECT r.type, r.id, r.version, r.payload, r.data FROM pgbroker.records r
        WHERE r.data IS NOT NULL AND NOT EXISTS (SELECT FROM pgbroker.search_texts s WHERE s.type = r.type AND s.id = r.id)
        OFFSET 0 -- compute the texts of these only, which takes far longer than to look
    ) r
    WHERE pgbroker.search_text_of(r.payload, r.data) <> ''
  UNION ALL
  SELECT 'search text without its record', s.type, s.id, NULL, 'it takes space', true
    FROM pgbroker.search_texts s
    WHERE NOT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = s.type AND r.id = s.id);
$$;
COMMENT ON FUNCTION pgbroker.problems() IS
  'What is wrong: setup_problems, and where records, change log, counts, index and search texts disagree, with the id and version of the '
  'record where it is about one. No row is well. Reads everything once. It cannot see what a statement without triggers has changed in '
  'a record without touching its version. For the owner of the schema.';

-- ---------------------------------------------------------------------------------------------
-- Repair
-- ---------------------------------------------------------------------------------------------

-- Both run as whoever calls them, who must own the schema, and what they do to records goes through the triggers: so every stream
-- hears of it, and the audit has it.

CREATE FUNCTION pgbroker.repair_records(types text[], ids text[], versions bigint[]) RETURNS bigint
  LANGUAGE plpgsql
  SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
DECLARE
  repaired bigint := 0;
  n        bigint;
BEGIN
  -- In the order of Clear, which holds the table when it asks for the order lock.
  LOCK TABLE pgbroker.records IN ROW EXCLUSIVE MODE;
  PERFORM pgbroker.lock_order();

  -- What the log has and the records have not is a deletion that nobody was told of. Of a record that is there in another version
  -- the newer change tells.
  WITH stale AS (
    DELETE FROM pgbroker.changes c
    USING unnest(versions) AS v (version)
    WHERE c.version = ANY (ARRAY[v.version]) AND NOT c.deleted
      AND (SELECT NOT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = c.type AND r.id = c.id AND r.version = c.version))
    RETURNING c.type, c.id
  ), gone AS (
    INSERT INTO pgbroker.changes (version, type, id, changed_at, deleted)
    SELECT nextval('pgbroker.record_version'), s.type, s.id, clock_timestamp(), true
    FROM (SELECT DISTINCT type, id FROM stale) s
    WHERE (SELECT NOT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = s.type AND r.id = s.id))
    RETURNING type, id
  ), audited AS (
    INSERT INTO pgbroker.audit (cause, type, id)
    SELECT 'repair', g.type, g.id FROM gone g JOIN pgbroker.record_types t ON t.type = g.type WHERE t.audited
  )
  SELECT count(*) INTO n FROM stale;
  repaired := repaired + n;

  -- Index terms and expiry are no change of a record.
  UPDATE pgbroker.records r
    SET index_fields = CASE WHEN t.projected_fields <> '{}' THEN pgbroker.index_terms(r.data, t.projected_fields) END,
        expires_at = pgbroker.parse_time(r.data #>> string_to_array(t.expiry_field, '.'))
    FROM unnest(types, ids) AS i (type, id), pgbroker.record_types t
    WHERE r.type = ANY (ARRAY[i.type]) AND r.id = i.id AND t.type = ANY (ARRAY[i.type])
      AND (r.index_fields IS DISTINCT FROM CASE WHEN t.projected_fields <> '{}' THEN pgbroker.index_terms(r.data, t.projected_fields) END
        OR r.expires_at IS DISTINCT FROM pgbroker.parse_time(r.data #>> string_to_array(t.expiry_field, '.')));
  GET DIAGNOSTICS n = ROW_COUNT;
  repaired := repaired + n;

  PERFORM pgbroker.put_search_texts(array_agg(r.type), array_agg(r.id), array_agg(pgbroker.search_text_of(r.payload, r.data)))
    FROM unnest(types, ids) AS i (type, id), pgbroker.records r
    WHERE r.type = ANY (ARRAY[i.type]) AND r.id = i.id
      AND (SELECT NOT EXISTS (SELECT FROM pgbroker.search_texts s WHERE s.type = r.type AND s.id = r.id));
  DELETE FROM pgbroker.search_texts s
    USING unnest(types, ids) AS i (type, id)
    WHERE s.type = ANY (ARRAY[i.type]) AND s.id = i.id
      AND (SELECT NOT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = s.type AND r.id = s.id));
  GET DIAGNOSTICS n = ROW_COUNT;
  repaired := repaired + n;

  -- A record that the log does not have, or has a tombstone above, is written again as it is.
  UPDATE pgbroker.records r
    SET payload = r.payload
    FROM (SELECT DISTINCT i.type, i.id FROM unnest(types, ids, versions) AS i (type, id, version) WHERE i.version >= 0) AS i
    WHERE r.type = ANY (ARRAY[i.type]) AND r.id = i.id
      AND ((SELECT NOT EXISTS (
             SELECT FROM pgbroker.changes c WHERE c.version = r.version AND c.type = r.type AND c.id = r.id AND NOT c.deleted))
        OR EXISTS (
             SELECT FROM unnest(types, ids, versions) AS above (type, id, version)
             WHERE above.type = r.type AND above.id = r.id AND above.version > r.version));
  GET DIAGNOSTICS n = ROW_COUNT;
  RETURN repaired + n;
END
$$;
COMMENT ON FUNCTION pgbroker.repair_records(text[], text[], bigint[]) IS
  'Puts right what problems() says of records, given as parallel arrays of its columns subject, id and version, with -1 '
  'for no version. Every stream hears of it. Returns how many changes and records it has mended. For the owner of the schema.';

CREATE FUNCTION pgbroker.repair_setup() RETURNS void
  LANGUAGE plpgsql
  SET jit = off
  SET search_path = pg_catalog, pg_temp
  AS $$
DECLARE
  subject text;
  used    bigint;
BEGIN
  FOR subject IN SELECT p.subject FROM pgbroker.setup_problems() p WHERE p.problem = 'disabled trigger' LOOP
    EXECUTE format('ALTER TABLE pgbroker.%I ENABLE TRIGGER %I', split_part(subject, '.', 1), split_part(subject, '.', 2));
  END LOOP;
  LOCK TABLE pgbroker.records IN ROW EXCLUSIVE MODE;
  PERFORM pgbroker.lock_order();
  INSERT INTO pgbroker.checkpoint DEFAULT VALUES ON CONFLICT DO NOTHING;
  used := greatest((SELECT max(c.version) FROM pgbroker.changes c), (SELECT s.base_version FROM pgbroker.state s),
                   (SELECT max(e.first_version) FROM pgbroker.epochs e), (SELECT max(r.version) FROM pgbroker.records r));
  IF used > (SELECT s.last_value FROM pgbroker.record_version s) THEN
    PERFORM setval('pgbroker.record_version', used);
  END IF;
  UPDATE pgbroker.record_types t SET purged_version = used WHERE t.purged_version > used;
  INSERT INTO pgbroker.record_types AS t (type, record_count)
    SELECT r.type, count(*) FROM pgbroker.records r GROUP BY r.type
    ON CONFLICT (type) DO UPDATE SET record_count = excluded.record_count WHERE t.record_count <> excluded.record_count;
  UPDATE pgbroker.record_types t SET record_count = 0
    WHERE t.record_count <> 0 AND NOT EXISTS (SELECT FROM pgbroker.records r WHERE r.type = t.type);
END
$$;
COMMENT ON FUNCTION pgbroker.repair_setup() IS
  'Puts right what problems() lists that is not about one record: disabled triggers, the sequence, counts. For the owner of the schema.';
