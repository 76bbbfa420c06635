-- name: LeaseAcquire :one
-- Takes a lease that nobody holds; no row if somebody does. The database's clock decides. It may have been ahead: a lease that ends
-- later than it could if it had just been taken is free, but for a second by which clocks are put right all the time.
INSERT INTO pgbroker.leases AS l (name, id, duration, expires_at)
VALUES (@name, gen_random_uuid()::text, @duration::interval, clock_timestamp() + @duration::interval)
ON CONFLICT (name) DO UPDATE
  SET id = excluded.id, acquired_at = excluded.acquired_at, duration = excluded.duration, expires_at = excluded.expires_at
  WHERE l.expires_at < clock_timestamp() OR l.expires_at > clock_timestamp() + l.duration + interval '1 second'
RETURNING id;

-- name: LeaseRenew :execrows
-- Prolongs a lease, and takes it again if it has lapsed and nobody else holds it; no row if somebody does.
INSERT INTO pgbroker.leases AS l (name, id, duration, expires_at)
VALUES (@name, @id, @duration::interval, clock_timestamp() + @duration::interval)
ON CONFLICT (name) DO UPDATE
  SET id = excluded.id, duration = excluded.duration, expires_at = excluded.expires_at,
      acquired_at = CASE WHEN l.id = excluded.id THEN l.acquired_at ELSE excluded.acquired_at END
  WHERE l.id = excluded.id OR l.expires_at < clock_timestamp() OR l.expires_at > clock_timestamp() + l.duration + interval '1 second';

-- name: LeaseRelease :execrows
DELETE FROM pgbroker.leases WHERE name = @name AND id = @id;

-- name: LeasesPurge :execrows
-- Forgets leases that ended long ago.
DELETE FROM pgbroker.leases WHERE expires_at < clock_timestamp() - interval '1 day';
