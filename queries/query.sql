-- Queries: each is one statement, so that versions, count and page belong to one snapshot, and returns
-- at least one row: without a record (version 0) if the page is empty.
--
-- A filter is a jsonpath predicate over the projection; with_vars gives it the record's id, type and prefix
-- as variables, which is what most of its time is spent on; the sub-select has it parsed once and not for
-- every record. Matching keys are collected and counted before any payload is read. Why "= ANY" of one value joins them
-- is said at write_records.

-- name: QueryAll :many
-- Every record of a type, or of all types; counted without a scan.
SELECT v.server_version, v.latest_version::bigint AS record_version, n.total_count,
       coalesce(r.type, '')::text AS type, coalesce(r.id, '')::text AS id, coalesce(r.version, 0)::bigint AS version,
       coalesce(r.modified_at, 'epoch')::timestamptz AS modified_at, r.payload
FROM pgbroker.versions v
CROSS JOIN (
  SELECT coalesce(sum(t.record_count), 0)::bigint AS total_count FROM pgbroker.record_types t
) n
LEFT JOIN (
  SELECT records.type, records.id, records.version, records.modified_at, records.payload FROM pgbroker.records ORDER BY records.type, records.id OFFSET @skip::bigint LIMIT @max_rows::bigint
) r ON true
ORDER BY r.type, r.id;

-- name: QueryType :many
SELECT v.server_version, v.latest_version::bigint AS record_version, n.total_count,
       coalesce(r.type, '')::text AS type, coalesce(r.id, '')::text AS id, coalesce(r.version, 0)::bigint AS version,
       coalesce(r.modified_at, 'epoch')::timestamptz AS modified_at, r.payload
FROM pgbroker.versions v
CROSS JOIN (
  SELECT coalesce(sum(t.record_count), 0)::bigint AS total_count FROM pgbroker.record_types t WHERE t.type = @type
) n
LEFT JOIN (
  SELECT records.type, records.id, records.version, records.modified_at, records.payload FROM pgbroker.records WHERE records.type = @type ORDER BY records.id OFFSET @skip::bigint LIMIT @max_rows::bigint
) r ON true
ORDER BY r.id;

-- name: QueryID :many
-- The record of a type and id: what a proxy asks for on each request.
SELECT v.server_version, v.latest_version::bigint AS record_version,
       CASE WHEN r.version IS NULL THEN 0 ELSE 1 END::bigint AS total_count,
       coalesce(r.type, '')::text AS type, coalesce(r.id, '')::text AS id, coalesce(r.version, 0)::bigint AS version,
       coalesce(r.modified_at, 'epoch')::timestamptz AS modified_at, r.payload
FROM pgbroker.versions v
LEFT JOIN pgbroker.records r ON r.type = @type AND r.id = @id;

-- name: QueryKeys :many
-- Records with one of the given ids, or whose prefix is the longest that contains one of the given
-- addresses.
WITH candidates AS (
  SELECT r.type, r.id
  FROM unnest(@ids::text[]) AS k (id)
  CROSS JOIN pgbroker.record_types t
  CROSS JOIN LATERAL (
    SELECT records.type, records.id FROM pgbroker.records WHERE records.type = t.type AND records.id = k.id OFFSET 0
  ) r
  WHERE @type::text = '' OR t.type = @type::text
  UNION
  SELECT r.type, r.id
  FROM unnest(@addresses::text[]) AS a (address)
  JOIN pgbroker.records r ON r.index_cidr = (
    SELECT l.index_cidr FROM pgbroker.records l
    WHERE (@type::text = '' OR l.type = @type::text) AND l.index_cidr >>= a.address::inet
    ORDER BY masklen(l.index_cidr) DESC LIMIT 1)
  WHERE @type::text = '' OR r.type = @type::text
),
matched AS MATERIALIZED (
  SELECT r.type, r.id
  FROM candidates c
  JOIN pgbroker.records r ON r.type = ANY (ARRAY[c.type]) AND r.id = c.id
  WHERE (@filter::text = '' OR jsonb_path_match(coalesce(r.data, '{}'), (SELECT nullif(@filter::text, '')::jsonpath),
           CASE WHEN @with_vars::boolean
             THEN jsonb_build_object('id', r.id, 'type', r.type, 'cidr', r.index_cidr::text) ELSE '{}' END, true))
    AND (@search::text = '' OR strpos((
           SELECT t.search_text FROM pgbroker.search_texts t WHERE t.type = r.type AND t.id = r.id), @search::text) > 0)
)
SELECT v.server_version, v.latest_version::bigint AS record_version, n.total_count,
       coalesce(r.type, '')::text AS type, coalesce(r.id, '')::text AS id, coalesce(r.version, 0)::bigint AS version,
       coalesce(r.modified_at, 'epoch')::timestamptz AS modified_at, r.payload
FROM pgbroker.versions v
CROSS JOIN (SELECT count(*) AS total_count FROM matched) n
LEFT JOIN (
  SELECT m.type, m.id, p.version, p.modified_at, p.payload FROM (SELECT * FROM matched ORDER BY matched.type, matched.id OFFSET @skip::bigint LIMIT @max_rows::bigint) m
  JOIN pgbroker.records p ON p.type = ANY (ARRAY[m.type]) AND p.id = m.id
) r ON true
ORDER BY r.type, r.id;

-- name: QueryField :many
-- Records of which an indexed field has one of the given values: terms are objects {field: value}. It says itself whether
-- the field is indexed: what the replica knows of that may be older than a Clear, after which it need not be.
WITH matched AS MATERIALIZED (
  SELECT r.type, r.id
  FROM pgbroker.records r
  WHERE r.index_fields @> ANY ((@terms::text[])::jsonb[])
    AND r.type || '' = @type -- so that nobody goes through the type by its key, however few records it seems to have
    AND (@filter::text = '' OR jsonb_path_match(coalesce(r.data, '{}'), (SELECT nullif(@filter::text, '')::jsonpath),
           CASE WHEN @with_vars::boolean
             THEN jsonb_build_object('id', r.id, 'type', r.type, 'cidr', r.index_cidr::text) ELSE '{}' END, true))
    AND (@search::text = '' OR strpos((
           SELECT t.search_text FROM pgbroker.search_texts t WHERE t.type = r.type AND t.id = r.id), @search::text) > 0)
)
SELECT (t.type IS NOT NULL)::boolean AS indexed, v.server_version, v.latest_version::bigint AS record_version, n.total_count,
       coalesce(r.type, '')::text AS type, coalesce(r.id, '')::text AS id, coalesce(r.version, 0)::bigint AS version,
       coalesce(r.modified_at, 'epoch')::timestamptz AS modified_at, r.payload
FROM pgbroker.versions v
CROSS JOIN (SELECT count(*) AS total_count FROM matched) n
LEFT JOIN pgbroker.record_types t ON t.type = @type AND @field::text = ANY (t.indexed_fields)
LEFT JOIN (
  SELECT m.type, m.id, p.version, p.modified_at, p.payload FROM (SELECT * FROM matched ORDER BY matched.type, matched.id OFFSET @skip::bigint LIMIT @max_rows::bigint) m
  JOIN pgbroker.records p ON p.type = ANY (ARRAY[m.type]) AND p.id = m.id
) r ON true
ORDER BY r.type, r.id;

-- name: ScanWhole :exec
-- Lets what follows in the transaction read whole tables, with so many more processes.
SELECT set_config('max_parallel_workers_per_gather', (@workers::integer)::text, true), set_config('enable_seqscan', 'on', true);

-- name: QueryScan :many
-- Records that match a filter, found by reading every record of the type, or of all types.
WITH matched AS MATERIALIZED (
  SELECT r.type, r.id
  FROM pgbroker.records r
  WHERE (@type::text = '' OR r.type = @type::text)
    AND jsonb_path_match(coalesce(r.data, '{}'), (SELECT (@filter::text)::jsonpath),
           CASE WHEN @with_vars::boolean
             THEN jsonb_build_object('id', r.id, 'type', r.type, 'cidr', r.index_cidr::text) ELSE '{}' END, true)
)
SELECT v.server_version, v.latest_version::bigint AS record_version, n.total_count,
       coalesce(r.type, '')::text AS type, coalesce(r.id, '')::text AS id, coalesce(r.version, 0)::bigint AS version,
       coalesce(r.modified_at, 'epoch')::timestamptz AS modified_at, r.payload
FROM pgbroker.versions v
CROSS JOIN (SELECT count(*) AS total_count FROM matched) n
LEFT JOIN (
  SELECT m.type, m.id, p.version, p.modified_at, p.payload FROM (SELECT * FROM matched ORDER BY matched.type, matched.id OFFSET @skip::bigint LIMIT @max_rows::bigint) m
  JOIN pgbroker.records p ON p.type = ANY (ARRAY[m.type]) AND p.id = m.id
) r ON true
ORDER BY r.type, r.id;

-- name: QueryText :many
-- Records that match a text, and perhaps a filter, found by reading every text of the type, or of all types.
WITH matched AS MATERIALIZED (
  SELECT t.type, t.id
  FROM pgbroker.search_texts t
  WHERE (@type::text = '' OR t.type = @type::text)
    AND strpos(t.search_text, @search::text) > 0
    AND (@filter::text = '' OR (
           SELECT jsonb_path_match(coalesce(r.data, '{}'), (SELECT nullif(@filter::text, '')::jsonpath),
             CASE WHEN @with_vars::boolean
               THEN jsonb_build_object('id', r.id, 'type', r.type, 'cidr', r.index_cidr::text) ELSE '{}' END, true)
           FROM pgbroker.records r
           WHERE r.type = t.type AND r.id = t.id))
)
SELECT v.server_version, v.latest_version::bigint AS record_version, n.total_count,
       coalesce(r.type, '')::text AS type, coalesce(r.id, '')::text AS id, coalesce(r.version, 0)::bigint AS version,
       coalesce(r.modified_at, 'epoch')::timestamptz AS modified_at, r.payload
FROM pgbroker.versions v
CROSS JOIN (SELECT count(*) AS total_count FROM matched) n
LEFT JOIN (
  SELECT m.type, m.id, p.version, p.modified_at, p.payload FROM (SELECT * FROM matched ORDER BY matched.type, matched.id OFFSET @skip::bigint LIMIT @max_rows::bigint) m
  JOIN pgbroker.records p ON p.type = ANY (ARRAY[m.type]) AND p.id = m.id
) r ON true
ORDER BY r.type, r.id;
