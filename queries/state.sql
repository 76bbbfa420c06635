-- name: StateGet :one
SELECT server_version, options_version, latest_version::bigint AS latest_version, earliest_version::bigint AS earliest_version
FROM pgbroker.versions;

-- name: OrderLock :exec
-- Takes the order lock until the end of the transaction, and begins an epoch if the server or its timeline
-- has changed since the last write.
SELECT pgbroker.lock_order();

-- name: EpochSettle :exec
-- Begins an epoch if the server or its timeline has changed since the last write, unless somebody is at it.
SELECT pgbroker.settle_epoch();

-- name: StateReplaceServerVersion :one
-- Makes every client forget everything, unless somebody else has already seen to that: then the result is 0.
WITH replaced AS (
  UPDATE pgbroker.state SET server_version = pgbroker.random_server_version()
  WHERE server_version = @server_version
  RETURNING server_version
)
SELECT count(*) FROM (
  SELECT CASE WHEN pg_notification_queue_usage() < 0.5 THEN pg_notify('pgbroker_changes', '') END FROM replaced OFFSET 0
) AS announced;

-- name: StreamCheck :one
-- Whether a stream may resume at a version: what it must compare.
SELECT s.server_version, s.options_version,
       coalesce((SELECT max(t.purged_version) FROM pgbroker.record_types t
                 WHERE @type::text = '' OR t.type = @type::text), 0)::bigint AS purged_version,
       EXISTS (SELECT FROM pgbroker.epochs e
               WHERE e.last_version < @version::bigint AND @version::bigint < e.first_version)::boolean AS lost
FROM pgbroker.state s;

-- name: LineageGet :one
-- Where the server stands in the history of the data set: who it is (0 where that is hidden), whether its latest
-- epoch is its own, which one that is, and whether it knows the epoch that the caller has seen. The fence reads this
-- on connections that are not open yet: see db/fence.go.
SELECT coalesce(pgbroker.server_system_identifier(), 0)::bigint AS system_identifier,
       coalesce(pgbroker.server_timeline(), 0)::bigint AS timeline,
       (pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean)::boolean AS read_only,
       coalesce(s.system_identifier = pgbroker.current_system_identifier() AND s.timeline = pgbroker.current_timeline(), false)::boolean AS settled,
       coalesce((SELECT max(e.first_version) FROM pgbroker.epochs e), 0)::bigint AS epoch,
       (@epoch::bigint = 0 OR EXISTS (SELECT FROM pgbroker.epochs e WHERE e.first_version = @epoch::bigint
          AND e.system_identifier = @epoch_system::bigint AND e.timeline = @epoch_timeline::bigint))::boolean AS knows_epoch,
       coalesce((SELECT e.system_identifier FROM pgbroker.epochs e ORDER BY e.first_version DESC LIMIT 1), 0)::bigint AS epoch_system,
       coalesce((SELECT e.timeline FROM pgbroker.epochs e ORDER BY e.first_version DESC LIMIT 1), 0)::bigint AS epoch_timeline
FROM pgbroker.state s;

-- name: ServerCondition :one
-- What the server can do at present: whether it takes writes, as this session sees it; how far it is behind as a standby;
-- which tables a policy of row level security hides something of from this role.
SELECT pg_is_in_recovery()::boolean AS standby,
       current_setting('transaction_read_only')::boolean AS read_only,
       coalesce(extract(epoch FROM pgbroker.standby_lag()), 0)::double precision AS lag_seconds,
       coalesce((SELECT string_agg('pgbroker.' || quote_ident(c.relname), ', ' ORDER BY c.relname) FROM pg_catalog.pg_class c
                 WHERE c.relnamespace = to_regnamespace('pgbroker') AND c.relkind IN ('r', 'p')
                   AND row_security_active(c.oid)), '')::text AS hidden;

-- name: ProbeRoom :exec
-- Writes some 70 kB, for a transaction that is rolled back: it fails as long as there is no room on the disk.
INSERT INTO pgbroker.leases (name, id, expires_at)
SELECT gen_random_uuid()::text, string_agg(gen_random_uuid()::text, ''), clock_timestamp() FROM generate_series(1, 2000);

-- name: RightsMissing :many
-- Rights that a replica needs and the role of this session lacks, of all that is there. It reads the catalog alone, for which
-- nobody needs a right.
SELECT n.object::text AS object, string_agg(n.privilege, ', ' ORDER BY n.place)::text AS privileges
FROM (
  SELECT 'pgbroker.' || c.relname AS object, p.privilege, p.place
  FROM pg_catalog.pg_class c
  CROSS JOIN LATERAL unnest(CASE
    WHEN c.relname IN ('leases', 'services')     THEN '{SELECT,INSERT,UPDATE,DELETE}'::text[]
    WHEN c.relname = 'checkpoint'                THEN '{SELECT,UPDATE}'
    WHEN c.relname IN ('state', 'epochs', 'records', 'changes', 'record_types', 'search_texts', 'schema_state', 'schema_migrations', 'versions', 'blockers')
                                                 THEN '{SELECT}'
    END) WITH ORDINALITY AS p (privilege, place)
  WHERE c.relnamespace = to_regnamespace('pgbroker') AND NOT has_table_privilege(c.oid, p.privilege)
  UNION ALL
  SELECT 'function pgbroker.' || p.proname, 'EXECUTE', 1
  FROM pg_catalog.pg_proc p
  WHERE p.pronamespace = to_regnamespace('pgbroker') AND NOT has_function_privilege(p.oid, 'EXECUTE')
    AND p.proname IN ('write_records', 'put_search_texts', 'lock_order', 'settle_epoch', 'parse_time', 'expire_records', 'expire_by_ttl',
                      'end_idle_records', 'end_excess_records', 'clear_records', 'purge_audit', 'purge_tombstones')
  UNION ALL
  SELECT 'schema pgbroker', 'USAGE', 1
  FROM pg_catalog.pg_namespace s
  WHERE s.nspname = 'pgbroker' AND NOT has_schema_privilege(s.oid, 'USAGE')
) n
GROUP BY n.object
ORDER BY n.object;
