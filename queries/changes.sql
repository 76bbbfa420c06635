-- name: ChangesAfter :many
-- What follows a version in the change log, of one type or ('') of all: up to max_rows changes and, after
-- the first, up to max_bytes of payload. At least one row, without a change (version 0) if nothing follows.
-- latest_version is the end of the log in the same snapshot; purged_version the highest tombstone that is
-- missing from it: a reader below that may have missed a deletion. lost is how many versions, up to the one
-- read from, a failover or restore has undone; 0 if that one is there. Without all_payloads only
-- changes of payload_types come with theirs. standby says that the server may be behind others, so that
-- nothing follows from a log that ends early.
SELECT pg_is_in_recovery()::boolean AS standby, v.server_version, v.options_version, v.latest_version::bigint AS latest_version,
       coalesce(g.purged_version, 0)::bigint AS purged_version,
       coalesce((SELECT max(sqlc.arg(after) - e.last_version) FROM pgbroker.epochs e
                 WHERE e.last_version < @after AND @after < e.first_version), 0)::bigint AS lost,
       coalesce(c.version, 0)::bigint AS version, coalesce(c.type, '')::text AS type, coalesce(c.id, '')::text AS id,
       coalesce(c.changed_at, 'epoch')::timestamptz AS changed_at, coalesce(c.deleted, false)::boolean AS deleted, c.payload
FROM pgbroker.versions v
CROSS JOIN (
  SELECT max(t.purged_version) AS purged_version FROM pgbroker.record_types t
  WHERE @type::text = '' OR t.type = @type::text
) g
LEFT JOIN (
  SELECT p.*, sum(coalesce(octet_length(p.payload), 0)) OVER (ORDER BY p.version) - coalesce(octet_length(p.payload), 0) AS bytes_before
  FROM (
    SELECT l.version, l.type, l.id, l.changed_at, l.deleted, r.payload
    FROM (
      SELECT * FROM pgbroker.changes
      WHERE changes.version > @after AND (@type::text = '' OR changes.type = @type::text)
      ORDER BY changes.version LIMIT @max_rows
    ) l
    -- The fence keeps the planner from joining the whole table for a page.
    LEFT JOIN LATERAL (
      SELECT payload FROM pgbroker.records
      WHERE (@all_payloads::boolean OR l.type = ANY (@payload_types::text[]))
        AND records.type = l.type AND records.id = l.id AND records.version = l.version OFFSET 0
    ) r ON true
  ) p
) c ON c.bytes_before < @max_bytes::bigint
ORDER BY c.version;

-- name: ChangesPurgeTombstones :one
-- Removes tombstones past their retention, the oldest first.
SELECT pgbroker.purge_tombstones(@max_rows::bigint, @retention::interval)::bigint AS purged;
