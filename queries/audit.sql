-- name: AuditPurge :one
-- Removes entries past their retention, the oldest first.
SELECT pgbroker.purge_audit(@max_rows::bigint, @retention::interval)::bigint AS purged;

-- name: Grants :many
-- The statements that give a reader, a revoker, a writer and the role of the replicas their privileges; '' leaves one out.
SELECT pgbroker.grants(@reader::text, @writer::text, @server::text, @revoker::text)::text;
