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
-- Types with fields that not every record is indexed by, or of which the expiry is not computed everywhere.
SELECT type, projected_fields, index_version FROM pgbroker.record_types WHERE index_version <> indexed_version ORDER BY type;

-- name: TypeIndexed :exec
-- Notes that every record of a type is indexed as it was to be when the work began, unless that has changed since.
UPDATE pgbroker.record_types
SET indexed_fields = projected_fields, expiry_applied = expiry_field, indexed_version = index_version
WHERE type = @type AND index_version = @index_version;

-- name: TypesWithIdleTimeout :many
SELECT type, make_interval(secs => extract(epoch FROM idle_timeout))::interval AS idle_timeout FROM pgbroker.record_types
WHERE idle_timeout IS NOT NULL AND record_count > 0 ORDER BY type;

-- name: TypesWithUserLimit :many
-- Types with a limit for each user, once every record can be found by its user.
SELECT type, user_limit::integer AS user_limit FROM pgbroker.record_types
WHERE user_limit IS NOT NULL AND record_count > 0 AND 'user_id' = ANY (indexed_fields) ORDER BY type;

-- name: TypesEndingWithUsers :many
-- Types whose records end with their user, once every record can be found by its user.
SELECT type FROM pgbroker.record_types
WHERE end_sessions_of_missing_users AND record_count > 0 AND 'user_id' = ANY (indexed_fields) ORDER BY type;

-- name: TypeSetEndSessionsOfMissingUsers :exec
SELECT pgbroker.set_end_sessions_of_missing_users(@type, @ends::boolean);

-- name: TypeSetExpiry :exec
SELECT pgbroker.set_expiry(@type, sqlc.narg(field)::text);

-- name: TypeSetIdleTimeout :exec
SELECT pgbroker.set_idle_timeout(@type, sqlc.narg(timeout)::interval);

-- name: TypeSetUserLimit :exec
SELECT pgbroker.set_user_limit(@type, sqlc.narg(records)::integer);

-- name: TypeSetAudited :exec
SELECT pgbroker.set_audited(@type, @audited::boolean);

-- name: TypeSummary :many
-- Every type, or the one that a person means; written_at is the epoch where nothing was written yet.
SELECT s.name::text AS name, s.records, coalesce(s.written_at, 'epoch')::timestamptz AS written_at, s.capacity, s.ttl, s.expiry_field, s.idle_timeout, s.user_limit, s.end_sessions_of_missing_users, s.audited,
       s.looked_up_by::text[] AS looked_up_by, s.up_to_date::boolean AS up_to_date, s.type
FROM pgbroker.type_summary s
WHERE @type::text = '' OR s.type = pgbroker.type_named(@type::text)
ORDER BY s.type;

-- name: TypeWouldEnd :one
-- How many records the options would end if they were set.
SELECT pgbroker.would_end(
  @type, sqlc.narg(idle_timeout)::interval, sqlc.narg(user_limit)::bigint, NULL, NULL, sqlc.narg(expiry_field)::text,
  @missing_users::boolean)::bigint AS records;
