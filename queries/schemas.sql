-- name: SchemaVersion :one
-- The state of types and redaction that replicas must know.
SELECT version FROM pgbroker.schema_state;

-- name: SchemasLock :exec
-- Keeps everybody else from changing schemas until the end of the transaction.
LOCK TABLE pgbroker.schemas IN SHARE ROW EXCLUSIVE MODE;

-- name: SchemasList :many
SELECT name, descriptor_set, added_at, modified_at FROM pgbroker.schemas ORDER BY name;

-- name: SchemaPut :exec
INSERT INTO pgbroker.schemas AS s (name, descriptor_set) VALUES (@name, @descriptor_set)
ON CONFLICT (name) DO UPDATE SET descriptor_set = excluded.descriptor_set, modified_at = clock_timestamp();

-- name: SchemaDelete :execrows
DELETE FROM pgbroker.schemas WHERE name = @name;

-- name: MessagesForget :exec
-- Forgets the messages of all schemas, with their fields.
DELETE FROM pgbroker.messages WHERE schema IS NOT NULL;

-- name: EnumValuesForget :exec
DELETE FROM pgbroker.enum_values WHERE schema IS NOT NULL;

-- name: MessagesAdd :exec
INSERT INTO pgbroker.messages (message, form, schema)
SELECT m.message, m.form, @schema::text
FROM ROWS FROM (unnest(@messages::text[]), unnest(@forms::text[])) AS m (message, form);

-- name: MessageFieldsAdd :exec
-- Empty text stands for NULL.
INSERT INTO pgbroker.message_fields (message, number, name, json_name, kind, label, type_name, map_key, oneof, secret)
SELECT f.message, f.number, f.name, f.json_name, f.kind, f.label, nullif(f.type_name, ''), nullif(f.map_key, ''), nullif(f.oneof, ''), f.secret
FROM ROWS FROM (
  unnest(@messages::text[]), unnest(@numbers::integer[]), unnest(@names::text[]), unnest(@json_names::text[]), unnest(@kinds::text[]),
  unnest(@labels::text[]), unnest(@type_names::text[]), unnest(@map_keys::text[]), unnest(@oneofs::text[]), unnest(@secrets::boolean[])
) AS f (message, number, name, json_name, kind, label, type_name, map_key, oneof, secret);

-- name: EnumValuesAdd :exec
INSERT INTO pgbroker.enum_values (enum, position, name, number, schema)
SELECT v.enum, v.position, v.name, v.number, @schema::text
FROM ROWS FROM (unnest(@enums::text[]), unnest(@positions::integer[]), unnest(@names::text[]), unnest(@numbers::integer[]))
  AS v (enum, position, name, number);

-- name: MessageFieldsList :many
-- The fields of a message, and whether projections leave them out.
SELECT f.number, f.name, f.kind, f.label, coalesce(f.type_name, '')::text AS type_name, coalesce(f.map_key, '')::text AS map_key,
       EXISTS (SELECT FROM pgbroker.secret_fields s WHERE s.message = f.message AND s.field = f.name)::boolean AS redacted
FROM pgbroker.message_fields f
WHERE f.message = @message
ORDER BY f.number;

-- name: SecretFieldsList :many
-- Every field that projections leave out.
SELECT message, field, declared FROM pgbroker.secret_fields ORDER BY message, field;

-- name: RedactedFieldsList :many
-- The fields that projections leave out besides those that descriptors mark.
SELECT message, field FROM pgbroker.redacted_fields ORDER BY message, field;

-- name: RedactedFieldAdd :exec
INSERT INTO pgbroker.redacted_fields (message, field) VALUES (@message, @field) ON CONFLICT DO NOTHING;

-- name: RedactedFieldDelete :execrows
DELETE FROM pgbroker.redacted_fields WHERE message = @message AND field = @field;

-- name: ReprojectionsList :many
-- Types whose records are to be projected again.
SELECT type, schema_version, next_id FROM pgbroker.reprojections ORDER BY type;

-- name: ReprojectionAdvance :exec
-- Notes how far a type has come, unless its work has begun anew.
UPDATE pgbroker.reprojections SET next_id = @next_id WHERE type = @type AND schema_version = @schema_version;

-- name: ReprojectionDone :exec
DELETE FROM pgbroker.reprojections WHERE type = @type AND schema_version = @schema_version;

-- name: RecordsToProject :many
-- Records of a type from an id on: up to max_rows of them and, after the first, up to max_bytes of payload.
SELECT p.type, p.id, p.version, p.payload
FROM (
  SELECT r.type, r.id, r.version, r.payload,
         sum(octet_length(r.payload)) OVER (ORDER BY r.id) - octet_length(r.payload) AS bytes_before
  FROM (
    SELECT records.type, records.id, records.version, records.payload FROM pgbroker.records
    WHERE records.type = @type AND records.id >= @from_id::text
    ORDER BY records.id LIMIT @max_rows
  ) r
) p
WHERE coalesce(p.bytes_before, 0) < @max_bytes::bigint
ORDER BY p.id;

-- name: SweepDue :many
-- The sweep that is due: no row if none is. What was written since the change of types and rules may have been
-- projected by those before, for as long as a replica may not have heard of it.
SELECT version, record_version FROM pgbroker.schema_state
WHERE NOT swept
  AND (changed_at < clock_timestamp() - @grace::interval OR changed_at > clock_timestamp() + interval '1 second'); -- the clock was ahead

-- name: SweepDone :exec
UPDATE pgbroker.schema_state SET swept = true WHERE version = @version;

-- name: RecordsToSweep :many
-- Records written after a version, in the order of their versions.
SELECT p.type, p.id, p.version, p.payload
FROM (
  SELECT r.type, r.id, r.version, r.payload,
         sum(octet_length(r.payload)) OVER (ORDER BY r.version) - octet_length(r.payload) AS bytes_before
  FROM (
    SELECT * FROM pgbroker.changes
    WHERE changes.version > @after AND NOT changes.deleted
    ORDER BY changes.version LIMIT @max_rows
  ) l
  JOIN pgbroker.records r ON r.type = l.type AND r.id = l.id AND r.version = l.version
) p
WHERE coalesce(p.bytes_before, 0) < @max_bytes::bigint
ORDER BY p.version;

-- name: RecordsMisprojected :many
-- Which of the given records, as positions from 1, have not the given projection. Nothing is locked for that.
SELECT i.position::integer AS position
FROM ROWS FROM (
  unnest(@types::text[]), unnest(@ids::text[]), unnest(@versions::bigint[]), unnest(@projections::text[]),
  unnest(@search_texts::text[]), unnest(@index_cidrs::text[])
) WITH ORDINALITY AS i (type, id, version, data, search_text, index_cidr, position)
JOIN pgbroker.records r ON r.type = i.type AND r.id = i.id AND r.version = i.version
LEFT JOIN pgbroker.search_texts t ON t.type = i.type AND t.id = i.id
WHERE r.data IS DISTINCT FROM nullif(i.data, '')::jsonb
   OR coalesce(t.search_text, '') <> i.search_text
   OR r.index_cidr IS DISTINCT FROM nullif(i.index_cidr, '')::inet;

-- name: RecordsProject :one
-- Sets the projections of records that still have the given versions; no change is logged.
SELECT pgbroker.project_records(
  @types::text[], @ids::text[], @versions::bigint[], @projections::text[], @search_texts::text[], @index_cidrs::text[])::bigint;

-- name: SchemaView :one
-- The statements that make a view of the records of a type. Empty text stands for the default.
SELECT pgbroker.view_definition(@record_type::text, nullif(@message::text, ''), nullif(@view_name::text, ''))::text AS definition;
