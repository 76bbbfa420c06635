-- name: BlockersList :many
-- What keeps writers waiting, those that do so for longest first. What the server's role may not see is empty.
SELECT b.pid::integer AS pid, coalesce(b.gid, '')::text AS gid, b.reason::text AS reason, b.remedy::text AS remedy,
       coalesce(b.user_name, '')::text AS user_name,
       coalesce(b.application_name, '')::text AS application_name, coalesce(host(b.client_addr), '')::text AS client,
       coalesce(b.state, '')::text AS state, coalesce(b.transaction_started_at, 'epoch')::timestamptz AS transaction_started_at,
       b.waiting, extract(epoch FROM clock_timestamp() - b.waiting_since)::double precision AS waiting_seconds
FROM pgbroker.blockers b
ORDER BY b.waiting_since, b.pid
LIMIT @max_rows::bigint;
