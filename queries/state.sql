-- name: StateGet :one
SELECT server_version, options_version, latest_version::bigint AS latest_version, earliest_version::bigint AS earliest_version
FROM pgbroker.versions;

-- name: OrderLock :exec
-- Takes the order lock until the end of the transaction, and begins an epoch if the server or its timeline
-- has changed since the last write.
SELECT pgbroker.lock_order();

-- name: StateReplaceServerVersion :one
-- Makes every client forget everything, unless somebody else has already seen to that: then the result is 0.
WITH replaced AS (
  UPDATE pgbroker.state SET server_version = pgbroker.random_server_version()
  WHERE server_version = @server_version
  RETURNING server_version
)
SELECT count(pg_notify('pgbroker_changes', '')) FROM replaced;

-- name: StreamCheck :one
-- Whether a stream may resume at a version: what it must compare.
SELECT s.server_version, s.options_version,
       coalesce((SELECT max(t.purged_version) FROM pgbroker.record_types t
                 WHERE @type::text = '' OR t.type = @type::text), 0)::bigint AS purged_version,
       EXISTS (SELECT FROM pgbroker.epochs e
               WHERE e.last_version < @version::bigint AND @version::bigint < e.first_version)::boolean AS lost
FROM pgbroker.state s;

-- name: EpochIsCurrent :one
-- Whether versions go on to be issued by the same server and timeline; OrderLock begins an epoch if not. It takes no
-- lock: who holds the order lock for long must not keep replicas from serving reads.
SELECT EXISTS (
  SELECT FROM pgbroker.state s
  WHERE s.timeline = pgbroker.current_timeline() AND s.system_identifier = pgbroker.current_system_identifier());
