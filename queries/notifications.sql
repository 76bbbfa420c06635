-- name: NotificationQueueUsage :one
-- How full the queue of notifications is, from 0 to 1: all databases of the server share it. From a half on, nothing here notifies.
SELECT pg_notification_queue_usage()::double precision AS usage;

-- name: NotificationHolders :many
-- The sessions of the server, of any database, with the oldest transactions: one of them that listens, if any does, keeps the queue from
-- being emptied. Which sessions listen cannot be seen. Those of other roles only members of pg_read_all_stats see.
SELECT a.pid::integer AS pid, coalesce(a.datname, '')::text AS database_name, coalesce(a.usename, '')::text AS user_name,
       coalesce(a.application_name, '')::text AS application_name, coalesce(a.state, '')::text AS state,
       a.xact_start::timestamptz AS transaction_started_at
FROM pg_catalog.pg_stat_activity a
WHERE a.xact_start IS NOT NULL AND a.pid <> pg_backend_pid()
ORDER BY a.xact_start LIMIT @max_rows;
