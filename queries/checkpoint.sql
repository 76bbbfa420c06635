-- The columns span the whole range of uint64, which bigint does not: they travel as text.

-- name: CheckpointGet :one
SELECT server_version::text AS server_version, record_version::text AS record_version FROM pgbroker.checkpoint;

-- name: CheckpointSet :exec
UPDATE pgbroker.checkpoint
SET server_version = (@server_version::text)::numeric, record_version = (@record_version::text)::numeric;
