-- name: AuditPurge :execrows
-- Removes entries past their retention, the oldest first.
DELETE FROM pgbroker.audit
WHERE number IN (SELECT a.number FROM pgbroker.audit a ORDER BY a.number LIMIT @max_rows)
  AND at < clock_timestamp() - @retention::interval;

-- name: Grants :many
-- The statements that give a reader, a writer and the role of the replicas their privileges; '' leaves one out.
SELECT pgbroker.grants(@reader::text, @writer::text, @server::text)::text;
