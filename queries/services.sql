-- name: ServicesReport :exec
INSERT INTO pgbroker.services (kind, endpoint, expires_at)
SELECT r.kind, r.endpoint, clock_timestamp() + @ttl::interval
FROM ROWS FROM (unnest(@kinds::integer[]), unnest(@endpoints::text[])) AS r (kind, endpoint)
GROUP BY r.kind, r.endpoint
ORDER BY r.kind, r.endpoint
ON CONFLICT (kind, endpoint) DO UPDATE
  SET reported_at = excluded.reported_at, expires_at = excluded.expires_at;

-- name: ServicesList :many
-- Live services, and how long each stays unless reported again: an hour at most, since whoever writes one in SQL may have it stay
-- for ever.
SELECT kind, endpoint, (least(expires_at, clock_timestamp() + interval '1 hour') - clock_timestamp())::interval AS remaining
FROM pgbroker.services
WHERE expires_at > clock_timestamp() AND reported_at < clock_timestamp() + interval '1 minute' -- or the clock was ahead
ORDER BY kind, endpoint
LIMIT @max_rows;

-- name: ServicesPurge :execrows
DELETE FROM pgbroker.services WHERE expires_at <= clock_timestamp() OR reported_at >= clock_timestamp() + interval '1 minute';
