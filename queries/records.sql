-- name: RecordGet :one
SELECT version, modified_at, payload
FROM pgbroker.records
WHERE type = @type AND id = @id;

-- name: RecordsGet :many
-- The live records among the given keys, in no particular order.
SELECT r.type, r.id, r.version, r.modified_at, r.payload
FROM ROWS FROM (unnest(@types::text[]), unnest(@ids::text[])) AS k (type, id)
JOIN pgbroker.records r ON r.type = k.type AND r.id = k.id;

-- name: RecordsWrite :many
-- Writes or deletes records, all or nothing, and returns the changes made, beside the server version:
-- at least one row, without a change (version 0) if nothing was changed.
SELECT s.server_version, coalesce(c.version, 0)::bigint AS version, coalesce(c.type, '')::text AS type,
       coalesce(c.id, '')::text AS id, coalesce(c.changed_at, 'epoch')::timestamptz AS changed_at,
       coalesce(c.deleted, false)::boolean AS deleted
FROM pgbroker.state s
LEFT JOIN pgbroker.write_records(
  @types::text[], @ids::text[], @deletes::boolean[], @payloads::bytea[], @projections::text[],
  @search_texts::text[], @index_cidrs::text[], @requests::integer[], @expected::bigint[]) c ON true;

-- name: RecordsPage :many
-- Records from a key on, in key order: up to max_rows of them and, after the first, up to max_bytes of
-- payload.
SELECT p.type, p.id, p.version, p.modified_at, p.payload
FROM (
  SELECT r.type, r.id, r.version, r.modified_at, r.payload,
         sum(octet_length(r.payload)) OVER (ORDER BY r.type, r.id) - octet_length(r.payload) AS bytes_before
  FROM (
    SELECT * FROM pgbroker.records
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
    SELECT * FROM pgbroker.records
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
-- Removes every record; a trigger makes that a new data set.
TRUNCATE pgbroker.records;

-- name: RecordLongestPrefix :one
-- The longest stored prefix that contains the given address or prefix.
SELECT index_cidr::text AS prefix
FROM pgbroker.records
WHERE (@type::text = '' OR type = @type::text) AND index_cidr >>= (@address::text)::inet
ORDER BY masklen(index_cidr) DESC
LIMIT 1;

-- name: RecordsExpire :execrows
-- Deletes records whose own expiry time has passed, the longest expired first.
DELETE FROM pgbroker.records
WHERE (type, id) IN (
  SELECT r.type, r.id FROM pgbroker.records r
  WHERE r.expires_at <= clock_timestamp()
  ORDER BY r.expires_at LIMIT @max_rows);

-- name: RecordsExpireByTTL :execrows
-- Deletes records of a type that have not been written for longer than its TTL. Versions ascend with
-- time, so only the least recently written ones are looked at.
DELETE FROM pgbroker.records
WHERE (type, id) IN (
  SELECT o.type, o.id
  FROM (
    SELECT c.type, c.id, c.changed_at FROM pgbroker.changes c
    WHERE c.type = @type AND NOT c.deleted
    ORDER BY c.version LIMIT @max_rows
  ) o
  WHERE o.changed_at < clock_timestamp() - (SELECT t.ttl FROM pgbroker.record_types t WHERE t.type = @type));

-- name: RecordsReindex :many
-- Indexes a page of records of a type by the fields that writes index now; no change is logged.
UPDATE pgbroker.records r
SET index_fields = pgbroker.index_terms(r.data, t.projected_fields)
FROM pgbroker.record_types t
WHERE t.type = @type AND r.type = @type
  AND r.id IN (
    SELECT p.id FROM pgbroker.records p
    WHERE p.type = @type AND p.id >= @from_id::text
    ORDER BY p.id LIMIT @max_rows)
RETURNING r.id;

-- name: RecordsStage :exec
-- Makes the temporary table staged_records, or empties it.
SELECT pgbroker.stage_records();

-- name: RecordsReplace :one
-- Makes the records of a type those that are staged, up to max_changes of them.
SELECT r.inserted::bigint AS inserted, r.updated::bigint AS updated, r.deleted::bigint AS deleted, r.remaining::bigint AS remaining
FROM pgbroker.replace_records(@type::text, @max_changes::bigint, @allow_empty::boolean) AS r;
