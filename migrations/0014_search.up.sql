-- What is looked up in a payload: the texts that text queries search, and prefixes of addresses.

DO $do$
BEGIN
  -- Replicas fold case by Unicode, whatever the locale of the database; most builds of Postgres can do so, too.
  EXECUTE format($sql$
    CREATE FUNCTION pgbroker.fold_case(words text) RETURNS text
      LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE
      RETURN lower(words%s)$sql$,
    CASE WHEN EXISTS (SELECT FROM pg_collation WHERE collname = 'und-x-icu' AND collnamespace = 'pg_catalog'::regnamespace)
      THEN ' COLLATE pg_catalog."und-x-icu"' ELSE '' END);
END
$do$;
COMMENT ON FUNCTION pgbroker.fold_case(text) IS 'Text in lower case.';

CREATE FUNCTION pgbroker.searched_texts(of_type text, value jsonb) RETURNS SETOF text
  LANGUAGE plpgsql STABLE STRICT SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  looks text := (SELECT m.form FROM pgbroker.messages m WHERE m.message = of_type);
BEGIN
  CASE
    WHEN looks = 'object' THEN
      RETURN QUERY
        SELECT t.words
        FROM pgbroker.message_fields f,
          LATERAL (SELECT value -> f.name AS given) AS g,
          LATERAL (
            SELECT g.given AS one WHERE f.label IN ('single', 'optional')
            UNION ALL SELECT e FROM jsonb_array_elements(CASE WHEN f.label IN ('repeated', 'packed') THEN g.given END) AS e
            UNION ALL SELECT m.value FROM jsonb_each(CASE WHEN f.label = 'map' THEN g.given END) AS m
          ) AS v,
          LATERAL (
            SELECT v.one #>> '{}' AS words WHERE f.kind = 'string'
            UNION ALL SELECT pgbroker.searched_texts(f.type_name, v.one) WHERE f.kind = 'message'
          ) AS t
        WHERE f.message = of_type AND f.kind IN ('string', 'message') AND value ? f.name
        ORDER BY f.number;
    WHEN looks = 'any' THEN
      RETURN NEXT value ->> '@type'; -- its type, and nothing of what is in it
    WHEN looks IN ('struct', 'value', 'list') THEN
      RETURN QUERY SELECT leaf #>> '{}' FROM jsonb_path_query(value, 'strict $.** ? (@.type() == "string")') AS leaf;
    WHEN looks = 'field_mask' THEN
      RETURN QUERY SELECT lower(regexp_replace(p, '([A-Z])', '_\1', 'g')) FROM string_to_table(value #>> '{}', ',') AS p;
    WHEN of_type = 'google.protobuf.StringValue' THEN
      RETURN NEXT value #>> '{}';
    ELSE
      NULL;
  END CASE;
END
$$;
COMMENT ON FUNCTION pgbroker.searched_texts(text, jsonb) IS 'The strings of a projection that a text query searches.';

CREATE FUNCTION pgbroker.search_text(of_type text, value jsonb) RETURNS text
  LANGUAGE sql STABLE STRICT
  -- U+001F stands between any two, and in none of them.
  RETURN pgbroker.fold_case((
    SELECT string_agg(words, E'\x1f')
    FROM (SELECT translate(found, E'\x1f', '') FROM pgbroker.searched_texts(of_type, value) AS found) AS t (words)
    WHERE words <> ''));
COMMENT ON FUNCTION pgbroker.search_text(text, jsonb) IS 'search_texts.search_text of a projection.';

CREATE FUNCTION pgbroker.index_cidr(value jsonb) RETURNS inet
  LANGUAGE plpgsql STABLE STRICT SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  given  text := value #>> '{$index,cidr}';
  prefix inet;
BEGIN
  IF jsonb_typeof(value #> '{$index,cidr}') IS DISTINCT FROM 'string' OR given NOT LIKE '%/%' THEN
    RETURN NULL;
  END IF;
  BEGIN
    prefix := network(given::inet);
  EXCEPTION WHEN invalid_text_representation THEN
    RETURN NULL;
  END;
  -- An IPv4 network inside IPv6 is that IPv4 network.
  IF prefix <<= '::ffff:0:0/96' THEN
    prefix := set_masklen(regexp_replace(host(prefix), '^::ffff:', '')::inet, masklen(prefix) - 96);
  END IF;
  RETURN prefix;
END
$$;
COMMENT ON FUNCTION pgbroker.index_cidr(jsonb) IS 'records.index_cidr of the projection of a google.protobuf.Struct.';

CREATE FUNCTION pgbroker.search_text_of(payload bytea, data jsonb) RETURNS text
  LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  url bytea;
BEGIN
  IF payload IS NULL OR data IS NULL THEN
    RETURN '';
  END IF;
  SELECT f.content INTO url FROM pgbroker.wire_fields(payload, 'payload') WITH ORDINALITY AS f
    WHERE f.number = 1 AND f.wire = 2 ORDER BY f.ordinality DESC LIMIT 1;
  RETURN coalesce(pgbroker.search_text(regexp_replace(pgbroker.wire_text(url), '^.*/', ''), data), '');
EXCEPTION WHEN data_exception THEN
  RETURN ''; -- whoever has written no Any beside the data
END
$$;
COMMENT ON FUNCTION pgbroker.search_text_of(bytea, jsonb) IS 'search_texts.search_text of a record with this payload and projection.';

CREATE FUNCTION pgbroker.search_written() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM pgbroker.put_search_texts(
    ARRAY[NEW.type], ARRAY[NEW.id], ARRAY[pgbroker.search_text_of(NEW.payload, NEW.data)]);
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.search_written() IS 'Trigger: what is written in SQL can be found by text.';
REVOKE EXECUTE ON FUNCTION pgbroker.search_written() FROM PUBLIC;

-- What replicas write comes with its texts.
CREATE TRIGGER records_search_insert AFTER INSERT ON pgbroker.records
  FOR EACH ROW WHEN (NEW.projected IS NULL)
  EXECUTE FUNCTION pgbroker.search_written();
CREATE TRIGGER records_search_update AFTER UPDATE ON pgbroker.records
  FOR EACH ROW WHEN (NEW.projected IS NULL AND (NEW.data IS DISTINCT FROM OLD.data OR NEW.payload IS DISTINCT FROM OLD.payload))
  EXECUTE FUNCTION pgbroker.search_written();
