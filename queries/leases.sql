-- name: LeaseAcquire :one
-- Takes a lease that nobody holds; no row if somebody does. The database's clock decides.
INSERT INTO pgbroker.leases AS l (name, id, expires_at)
VALUES (@name, gen_random_uuid()::text, clock_timestamp() + @duration::interval)
ON CONFLICT (name) DO UPDATE
  SET id = excluded.id, acquired_at = excluded.acquired_at, expires_at = excluded.expires_at
  WHERE l.expires_at < clock_timestamp()
RETURNING id;

-- name: LeaseRenew :execrows
-- Prolongs a lease, and takes it again if it has lapsed and nobody else holds it; no row if somebody does.
INSERT INTO pgbroker.leases AS l (name, id, expires_at)
VALUES (@name, @id, clock_timestamp() + @duration::interval)
ON CONFLICT (name) DO UPDATE
  SET id = excluded.id, expires_at = excluded.expires_at,
      acquired_at = CASE WHEN l.id = excluded.id THEN l.acquired_at ELSE excluded.acquired_at END
  WHERE l.id = excluded.id OR l.expires_at < clock_timestamp();

-- name: LeaseRelease :execrows
DELETE FROM pgbroker.leases WHERE name = @name AND id = @id;

-- name: LeasesPurge :execrows
-- Forgets leases that ended long ago.
DELETE FROM pgbroker.leases WHERE expires_at < clock_timestamp() - interval '1 day';
