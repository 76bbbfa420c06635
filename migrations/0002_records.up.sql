-- Records, what text queries search of them, and the options and counts of each type.

CREATE TABLE pgbroker.record_types (
  type              text     COLLATE "C" PRIMARY KEY CHECK (octet_length(type) <= 512),
  record_count      bigint   NOT NULL DEFAULT 0 CHECK (record_count >= 0),
  builtin           boolean  NOT NULL DEFAULT false,
  capacity          bigint   CHECK (capacity >= 0),
  ttl               interval CHECK (ttl BETWEEN interval '0' AND interval '36500 days'),
  idle_timeout      interval CHECK (idle_timeout > interval '0' AND idle_timeout <= interval '36500 days'),
  user_limit        integer  CHECK (user_limit > 0),
  end_sessions_of_missing_users boolean NOT NULL DEFAULT false,
  expiry_field      text,
  expiry_applied    text,
  indexable_fields  text[]   NOT NULL DEFAULT '{}',
  builtin_fields    text[]   NOT NULL DEFAULT '{}',
  projected_fields  text[]   NOT NULL DEFAULT '{}',
  indexed_fields    text[]   NOT NULL DEFAULT '{}',
  index_version     bigint   NOT NULL DEFAULT 0,
  indexed_version   bigint   NOT NULL DEFAULT 0,
  purged_version    bigint   NOT NULL DEFAULT 0,
  audited           boolean  NOT NULL DEFAULT false
) WITH (fillfactor = 50);
COMMENT ON TABLE  pgbroker.record_types IS 'Options and exact counts of each record type, kept by triggers.';
COMMENT ON COLUMN pgbroker.record_types.type IS 'Record type, usually the type URL of the payload.';
COMMENT ON COLUMN pgbroker.record_types.record_count IS 'Live records of the type.';
COMMENT ON COLUMN pgbroker.record_types.builtin IS 'Whether the type''s options are part of the product: they survive Clear.';
COMMENT ON COLUMN pgbroker.record_types.capacity IS 'Option: how many records to keep, the most recently written ones; NULL keeps all.';
COMMENT ON COLUMN pgbroker.record_types.ttl IS 'Option: records not written for longer are deleted; NULL never.';
COMMENT ON COLUMN pgbroker.record_types.idle_timeout IS
  'Records whose accessed_at is longer ago are deleted; NULL never.';
COMMENT ON COLUMN pgbroker.record_types.user_limit IS
  'How many records one user may have, those issued last; NULL any number.';
COMMENT ON COLUMN pgbroker.record_types.end_sessions_of_missing_users IS
  'Whether the records of a user (user_id), its sessions for instance, end when the user is deleted or goes from the directory.';
COMMENT ON COLUMN pgbroker.record_types.expiry_field IS 'Payload field whose time, once passed, deletes the record; NULL never.';
COMMENT ON COLUMN pgbroker.record_types.expiry_applied IS
  'The expiry_field that expires_at of every record was computed from; where it differs, that is being done in the background.';
COMMENT ON COLUMN pgbroker.record_types.indexable_fields IS 'Option: payload fields that filters should find by index.';
COMMENT ON COLUMN pgbroker.record_types.builtin_fields IS 'Payload fields by which the product itself looks records up.';
COMMENT ON COLUMN pgbroker.record_types.projected_fields IS
  'Fields that every write of the type puts into records.index_fields: indexable_fields, builtin_fields and what user_limit needs.';
COMMENT ON COLUMN pgbroker.record_types.indexed_fields IS 'Fields that records.index_fields holds for every record of the type, so that filters may rely on it.';
COMMENT ON COLUMN pgbroker.record_types.index_version IS 'Raised by each change of projected_fields or expiry_field.';
COMMENT ON COLUMN pgbroker.record_types.indexed_version IS
  'The index_version that every record is indexed by; where it is another, that is being done in the background.';
COMMENT ON COLUMN pgbroker.record_types.purged_version IS 'Highest tombstone version of the type that retention has removed from the change log.';
COMMENT ON COLUMN pgbroker.record_types.audited IS 'Whether it is written to the audit when records of the type end or change hands.';

CREATE FUNCTION pgbroker.short_key(words text) RETURNS text
  -- Not strict, so that it can be inlined.
  LANGUAGE sql IMMUTABLE PARALLEL SAFE
  RETURN CASE WHEN length(words) <= 600 THEN words
    ELSE left(words, 500) || '…' || encode(sha256(replace(words, '\', '\\')::bytea), 'hex') END;
COMMENT ON FUNCTION pgbroker.short_key(text) IS
  'A text that fits an index: a long one by its beginning and its hash, so that different ones stay different.';

CREATE TABLE pgbroker.records (
  type         text        COLLATE "C" NOT NULL,
  id           text        COLLATE "C" NOT NULL,
  version      bigint      NOT NULL DEFAULT 0,
  modified_at  timestamptz NOT NULL DEFAULT clock_timestamp() CHECK (isfinite(modified_at)),
  expires_at   timestamptz CHECK (isfinite(expires_at)),
  projected    smallint    CHECK (projected = 0),
  index_cidr   inet,
  index_fields jsonb,
  payload      bytea,
  data         jsonb,
  PRIMARY KEY (type, id)
) WITH (
  -- Three rows to a page: two, and room for the next version of one, so that updates stay HOT. For the same reason no
  -- index covers a column that every update changes. Rows that are larger than that are compressed.
  fillfactor = 66,
  toast_tuple_target = 2600,
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_analyze_scale_factor = 0.02,
  -- To give free space at the end of a table back to the file system, VACUUM locks everybody out, for up to a second: after
  -- many records have gone, the next revocation would wait for that. What comes next needs the space anyway.
  vacuum_truncate = off,
  toast.vacuum_truncate = off
);
-- As long as they fit a page, rows are kept whole (MAIN): a payload elsewhere would have to be fetched by every read.
ALTER TABLE pgbroker.records
  ALTER COLUMN payload SET STORAGE MAIN,
  ALTER COLUMN data SET STORAGE MAIN,
  ALTER COLUMN type SET STORAGE MAIN,
  ALTER COLUMN id SET STORAGE MAIN,
  ALTER COLUMN index_fields SET STORAGE MAIN;
-- lz4 takes some microseconds for a row.
DO $$
BEGIN
  ALTER TABLE pgbroker.records
    ALTER COLUMN payload SET COMPRESSION lz4,
    ALTER COLUMN data SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
  RAISE NOTICE 'this PostgreSQL has no lz4: large records are written more slowly';
END
$$;
COMMENT ON TABLE  pgbroker.records IS 'Live records. A DELETE is a revocation: every proxy gets a tombstone.';
COMMENT ON COLUMN pgbroker.records.type IS 'Record type, usually the type URL of the payload.';
COMMENT ON COLUMN pgbroker.records.id IS 'Identifier within the type.';
COMMENT ON COLUMN pgbroker.records.version IS 'Record version of the latest write; set by trigger.';
COMMENT ON COLUMN pgbroker.records.modified_at IS 'Time of the latest write by the database''s clock; set by trigger.';
COMMENT ON COLUMN pgbroker.records.expires_at IS 'Time named by the payload field record_types.expiry_field; set by trigger.';
COMMENT ON COLUMN pgbroker.records.projected IS
  'Whose data are: 0 where a replica has made them from the payload, NULL where a payload was made from them, or both were written '
  'in SQL. A statement that sets it to 1 says that its data are the projection of its payload; to 2, that they are that of the '
  'payload that is there, so that the record has not changed. Who may not write this column can say neither.';
COMMENT ON COLUMN pgbroker.records.index_cidr IS 'Prefix named by the payload''s $index.cidr, for look-ups by address.';
COMMENT ON COLUMN pgbroker.records.index_fields IS 'Text of the payload fields in record_types.projected_fields; set by trigger.';
COMMENT ON COLUMN pgbroker.records.payload IS 'Serialized google.protobuf.Any exactly as written; NULL if the record has none.';
COMMENT ON COLUMN pgbroker.records.data IS 'Projection: the payload as JSON without secrets; NULL where its type is unknown.';

-- Serves filters on indexed fields: index_fields @> '{"user_id": "…"}'. No pending list: it would
-- make some readers pay for the writers before them.
CREATE INDEX records_index_fields ON pgbroker.records USING gin (index_fields jsonb_path_ops) WITH (fastupdate = off);
COMMENT ON INDEX pgbroker.records_index_fields IS 'Query and SQL by an indexed payload field.';

-- Serves $index filters: the stored prefixes that contain an address.
CREATE INDEX records_index_cidr ON pgbroker.records USING gist (index_cidr inet_ops) WHERE index_cidr IS NOT NULL;
COMMENT ON INDEX pgbroker.records_index_cidr IS 'Query by $index: longest prefix match.';

-- Serves expiry: the records whose own expiry time has passed.
CREATE INDEX records_expires_at ON pgbroker.records (expires_at) WHERE expires_at IS NOT NULL;
COMMENT ON INDEX pgbroker.records_expires_at IS 'Expiry: records whose expires_at has passed.';

-- On index_fields, which a write changes only if a field in it changes: updates stay HOT. The collation is that of ids, or
-- the index could not be used to join users with their sessions.
CREATE INDEX records_session_user ON pgbroker.records ((pgbroker.short_key(index_fields ->> 'user_id') COLLATE "C"))
  WHERE type = 'type.googleapis.com/session.Session';
COMMENT ON INDEX pgbroker.records_session_user IS 'The view sessions by user_id: who is logged in, and revoking by hand.';

-- PostgreSQL does not ask partial indexes how many rows a value has.
CREATE STATISTICS pgbroker.records_session_user ON (pgbroker.short_key(index_fields ->> 'user_id') COLLATE "C") FROM pgbroker.records;
COMMENT ON STATISTICS pgbroker.records_session_user IS 'Users have few sessions each: joins with sessions are planned by that.';

-- In a table of its own: a query reads nothing else then, and a write of a record leaves it alone unless its
-- texts change, which times, the most frequent change by far, are not.
CREATE TABLE pgbroker.search_texts (
  type        text COLLATE "C" NOT NULL,
  id          text COLLATE "C" NOT NULL,
  search_text text NOT NULL,
  PRIMARY KEY (type, id)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02,
        vacuum_truncate = off, toast.vacuum_truncate = off);
COMMENT ON TABLE  pgbroker.search_texts IS 'What a text query searches of each live record that has texts; kept by the writers of records, and by triggers.';
COMMENT ON COLUMN pgbroker.search_texts.type IS 'records.type.';
COMMENT ON COLUMN pgbroker.search_texts.id IS 'records.id.';
COMMENT ON COLUMN pgbroker.search_texts.search_text IS
  'Lower-case text of the payload''s string fields without secrets, with U+001F between any two.';
