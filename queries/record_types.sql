-- name: TypesList :many
-- Types that have live records, in byte order.
SELECT type FROM pgbroker.record_types WHERE record_count > 0 ORDER BY type;

-- name: OptionsList :many
-- Every type's options, and the fields of it that are indexed.
SELECT t.type, t.capacity, t.ttl, t.indexable_fields, t.indexed_fields
FROM pgbroker.record_types t
ORDER BY t.type;

-- name: OptionsGet :one
SELECT capacity, ttl, indexable_fields FROM pgbroker.record_types WHERE type = @type;

-- name: OptionsSet :one
INSERT INTO pgbroker.record_types AS t (type, capacity, ttl, indexable_fields)
VALUES (@type, sqlc.narg(capacity)::bigint, sqlc.narg(ttl)::interval, @indexable_fields::text[])
ON CONFLICT (type) DO UPDATE
  SET capacity = excluded.capacity, ttl = excluded.ttl, indexable_fields = excluded.indexable_fields
RETURNING capacity, ttl, indexable_fields;

-- name: TypesWithTTL :many
SELECT type FROM pgbroker.record_types WHERE ttl > interval '0' AND record_count > 0 ORDER BY type;

-- name: TypesToReindex :many
-- Types with fields that not every record is indexed by.
SELECT type, projected_fields FROM pgbroker.record_types
WHERE NOT projected_fields <@ indexed_fields ORDER BY type;

-- name: TypeIndexed :exec
-- Notes that every record of a type is indexed by the given fields.
UPDATE pgbroker.record_types
SET indexed_fields = ARRAY(SELECT DISTINCT f FROM unnest(indexed_fields || @fields::text[]) AS f ORDER BY f)
WHERE type = @type;
