-- name: ProblemsList :many
-- Where the books disagree: everything is read once. Empty is well.
SELECT p.problem::text AS problem, p.subject::text AS subject, coalesce(p.id, '')::text AS id,
       coalesce(p.version, -1)::bigint AS version, p.detail::text AS detail, p.repairable::boolean AS repairable
FROM pgbroker.problems() AS p
LIMIT @max_rows::bigint;

-- name: SetupProblemsList :many
-- What is wrong with the installation itself, which takes no look at records.
SELECT p.problem::text AS problem, p.subject::text AS subject, p.detail::text AS detail, p.repairable::boolean AS repairable
FROM pgbroker.setup_problems() AS p
ORDER BY p.problem, p.subject;

-- name: RecordsRepair :one
-- Puts right what ProblemsList says of the given records, so that every stream hears of it.
SELECT pgbroker.repair_records(@types::text[], @ids::text[], @versions::bigint[])::bigint AS repaired;

-- name: SetupRepair :exec
-- Puts right what is not about one record: triggers, the sequence, counts.
SELECT pgbroker.repair_setup();
