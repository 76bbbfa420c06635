-- name: RecordGet :one
SELECT version, modified_at, payload
FROM pgbroker.records
WHERE type = @type AND id = @id;

-- name: RecordsGet :many
-- The live records among the given keys, in no particular order.
SELECT r.type, r.id, r.version, r.modified_at, r.payload
FROM ROWS FROM (unnest(@types::text[]), unnest(@ids::text[])) AS k (type, id)
JOIN pgbroker.records r ON r.type = ANY (ARRAY[k.type]) AND r.id = k.id; -- by key, as in write_records

-- name: RecordsWrite :many
-- Writes or deletes records, all or nothing, and returns the changes made, beside the server version:
-- at least one row, without a change (version 0) if nothing was changed.
SELECT s.server_version, coalesce(c.version, 0)::bigint AS version, coalesce(c.type, '')::text AS type,
       coalesce(c.id, '')::text AS id, coalesce(c.changed_at, 'epoch')::timestamptz AS changed_at,
       coalesce(c.deleted, false)::boolean AS deleted
FROM pgbroker.state s
LEFT JOIN pgbroker.write_records(
  @types::text[], @ids::text[], @deletes::boolean[], @payloads::bytea[], @projections::text[],
  @search_texts::text[], @index_cidrs::text[], @requests::integer[], @expected::bigint[],
  @keys::text[], @persons::text[]) c ON true;

-- name: RecordsPage :many
-- Records from a key on, in key order: up to max_rows of them and, after the first, up to max_bytes of
-- payload.
SELECT p.type, p.id, p.version, p.modified_at, p.payload
FROM (
  SELECT r.type, r.id, r.version, r.modified_at, r.payload,
         sum(octet_length(r.payload)) OVER (ORDER BY r.type, r.id) - octet_length(r.payload) AS bytes_before
  FROM (
    SELECT records.type, records.id, records.version, records.modified_at, records.payload FROM pgbroker.records
    WHERE (records.type, records.id) >= (@from_type::text, @from_id::text)
    ORDER BY records.type, records.id LIMIT @max_rows
  ) r
) p
WHERE coalesce(p.bytes_before, 0) < @max_bytes::bigint
ORDER BY p.type, p.id;

-- name: RecordsPageOfType :many
-- Like RecordsPage, of one type.
SELECT p.type, p.id, p.version, p.modified_at, p.payload
FROM (
  SELECT r.type, r.id, r.version, r.modified_at, r.payload,
         sum(octet_length(r.payload)) OVER (ORDER BY r.id) - octet_length(r.payload) AS bytes_before
  FROM (
    SELECT records.type, records.id, records.version, records.modified_at, records.payload FROM pgbroker.records
    WHERE records.type = @type AND records.id >= @from_id::text
    ORDER BY records.id LIMIT @max_rows
  ) r
) p
WHERE coalesce(p.bytes_before, 0) < @max_bytes::bigint
ORDER BY p.id;

-- name: RecordsLock :exec
-- Keeps everybody else away until the end of the transaction.
LOCK TABLE pgbroker.records IN ACCESS EXCLUSIVE MODE;

-- name: RecordsClear :exec
-- Removes every record, which makes a new data set; the audit names the key and the person, '' for none.
SELECT pgbroker.clear_records(@key::text, @person::text);

-- name: RecordLongestPrefixes :many
-- The longest stored prefix that contains each of the given addresses or prefixes, for those of which there is one.
SELECT a.address::text AS address, l.prefix
FROM unnest(@addresses::text[]) AS a (address)
CROSS JOIN LATERAL (
  SELECT r.index_cidr::text AS prefix
  FROM pgbroker.records r
  WHERE (@type::text = '' OR r.type = @type::text) AND r.index_cidr >>= a.address::inet
  ORDER BY masklen(r.index_cidr) DESC
  LIMIT 1
) l;

-- name: RecordsExpire :one
-- Deletes records whose own expiry time has passed, the longest expired first.
SELECT pgbroker.expire_records(@max_rows)::bigint AS ended;

-- name: RecordsExpireByTTL :one
-- Deletes records of a type that have not been written for longer than its TTL.
SELECT pgbroker.expire_by_ttl(@type, @max_rows)::bigint AS ended;

-- name: RecordsIdle :one
-- Which records of a page, in the order of ids, have not been used for longer than their type allows. The
-- last id is that of the page. There is no index on accessed_at, which would make every write of it dearer.
SELECT coalesce(max(p.id), '')::text AS last_id, count(*) AS seen,
       coalesce(array_agg(p.id) FILTER (WHERE p.idle), '{}')::text[] AS ids,
       coalesce(array_agg(p.version) FILTER (WHERE p.idle), '{}')::bigint[] AS versions
FROM (
  SELECT r.id, r.version,
         coalesce(pgbroker.parse_time(r.data ->> 'accessed_at'), pgbroker.parse_time(r.data ->> 'issued_at'), r.modified_at)
           < clock_timestamp() - t.idle_timeout AS idle
  FROM pgbroker.record_types t
  CROSS JOIN LATERAL (
    SELECT records.id, records.version, records.modified_at, records.data FROM pgbroker.records
    WHERE records.type = @type AND records.id > @after_id::text
    ORDER BY records.id LIMIT @max_rows
  ) r
  WHERE t.type = @type
) p;

-- name: RecordsEndIdle :one
SELECT pgbroker.end_idle_records(@type, @ids::text[], @versions::bigint[])::bigint AS ended;

-- name: RecordsExcess :one
-- Which records are above the limit of their user, of the users with a record in the next page of the change
-- log: whoever has not got a new one is not above it.
WITH page AS MATERIALIZED (
  SELECT c.version, c.type, c.id FROM pgbroker.changes c
  WHERE c.type = @type AND NOT c.deleted AND c.version > @after_version
  ORDER BY c.version LIMIT @max_rows
),
owners AS MATERIALIZED (
  SELECT DISTINCT r.index_fields -> 'user_id' AS user_id
  FROM page p
  JOIN pgbroker.records r ON r.type = ANY (ARRAY[p.type]) AND r.id = p.id
  WHERE r.index_fields ? 'user_id'
)
SELECT (SELECT coalesce(max(p.version), @after_version) AS version FROM page p)::bigint AS last_version,
       (SELECT count(*) AS n FROM page p)::bigint AS seen,
       coalesce(array_agg(e.id), '{}')::text[] AS ids, coalesce(array_agg(e.version), '{}')::bigint[] AS versions
FROM pgbroker.excess_records(@type, ARRAY(SELECT o.user_id FROM owners o)) AS e;

-- name: RecordsEndExcess :one
SELECT pgbroker.end_excess_records(@type, @ids::text[], @versions::bigint[])::bigint AS ended;

-- name: UsersGone :one
-- The tombstones of users of a type, of the next page of tombstones, all at least a minute old. An empty directory is lost rather
-- than left by everybody: nothing is looked at then.
SELECT coalesce(max(p.version), @after_version)::bigint AS last_version, count(*) AS seen,
       coalesce(array_agg(p.version) FILTER (WHERE p.wanted), '{}')::bigint[] AS versions
FROM (
  SELECT c.version, c.type = @user_type::text AS wanted FROM pgbroker.changes c
  WHERE c.deleted AND c.version > @after_version AND c.changed_at < clock_timestamp() - interval '1 minute'
    AND (@user_type::text <> 'pomerium.io/DirectoryUser'
         OR EXISTS (SELECT FROM pgbroker.record_types t WHERE t.type = 'pomerium.io/DirectoryUser' AND t.record_count > 0))
  ORDER BY c.version LIMIT @max_rows
) p;

-- name: RecordsEndOfMissingUsers :one
SELECT pgbroker.end_records_of_missing_users(@type, @tombstones::bigint[], @max_rows)::bigint AS ended;

-- name: RecordsReindex :many
-- Computes anew what writes take from the payload now, for a page of records of a type: the index, and the
-- time of expiry. No change is logged.
UPDATE pgbroker.records r
SET index_fields = CASE WHEN t.projected_fields <> '{}' THEN pgbroker.index_terms(r.data, t.projected_fields) END,
    expires_at = pgbroker.parse_time(r.data #>> string_to_array(t.expiry_field, '.'))
FROM pgbroker.record_types t,
  (SELECT p.type, p.id FROM pgbroker.records p WHERE p.type = @type AND p.id >= @from_id::text ORDER BY p.id LIMIT @max_rows) AS page
WHERE t.type = @type AND r.type = ANY (ARRAY[page.type]) AND r.id = page.id
RETURNING r.id;

-- name: RecordsStage :exec
-- Makes the temporary table staged_records, or empties it.
SELECT pgbroker.stage_records();

-- name: RecordsCompare :one
-- What would become of the records of a type if they were made those that are staged.
SELECT r.inserted::bigint AS inserted, r.updated::bigint AS updated, r.deleted::bigint AS deleted, r.unchanged::bigint AS unchanged
FROM pgbroker.compare_records(@type::text) AS r;

-- name: RecordsReplace :one
-- Makes the records of a type those that are staged, up to max_changes of them.
SELECT r.inserted::bigint AS inserted, r.updated::bigint AS updated, r.deleted::bigint AS deleted, r.remaining::bigint AS remaining
FROM pgbroker.replace_records(@type::text, @max_changes::bigint, @allow_empty::boolean) AS r;
