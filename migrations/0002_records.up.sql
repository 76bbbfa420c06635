-- Records, their change log, and the settings and counts of each record type.

CREATE TABLE pgbroker.record_types (
  type              text     COLLATE "C" PRIMARY KEY,
  record_count      bigint   NOT NULL DEFAULT 0 CHECK (record_count >= 0),
  capacity          bigint   CHECK (capacity >= 0),
  ttl               interval,
  indexable_fields  text[]   NOT NULL DEFAULT '{}',
  expiry_field      text,
  projected_fields  text[]   NOT NULL DEFAULT '{}',
  indexed_fields    text[]   NOT NULL DEFAULT '{}',
  purged_version    bigint   NOT NULL DEFAULT 0,
  builtin           boolean  NOT NULL DEFAULT false
) WITH (fillfactor = 50);
COMMENT ON TABLE  pgbroker.record_types IS 'Options and exact counts of each record type, kept by triggers.';
COMMENT ON COLUMN pgbroker.record_types.type IS 'Record type, usually the type URL of the payload.';
COMMENT ON COLUMN pgbroker.record_types.record_count IS 'Live records of the type.';
COMMENT ON COLUMN pgbroker.record_types.capacity IS 'Option: how many records to keep, the most recently written ones; NULL keeps all.';
COMMENT ON COLUMN pgbroker.record_types.ttl IS 'Option: records not written for longer are deleted; NULL never.';
COMMENT ON COLUMN pgbroker.record_types.indexable_fields IS 'Option: payload fields that filters should find by index.';
COMMENT ON COLUMN pgbroker.record_types.expiry_field IS 'Payload field whose time, once passed, deletes the record; NULL never.';
COMMENT ON COLUMN pgbroker.record_types.projected_fields IS 'Fields that every write of the type puts into records.index_fields; only ever grows.';
COMMENT ON COLUMN pgbroker.record_types.indexed_fields IS 'Fields that records.index_fields holds for every record of the type, so that filters may rely on it.';
COMMENT ON COLUMN pgbroker.record_types.purged_version IS 'Highest tombstone version of the type that retention has removed from the change log.';
COMMENT ON COLUMN pgbroker.record_types.builtin IS 'Whether the type''s options are part of the product: they survive Clear.';

CREATE TABLE pgbroker.records (
  type         text        COLLATE "C" NOT NULL,
  id           text        COLLATE "C" NOT NULL,
  version      bigint      NOT NULL DEFAULT 0,
  modified_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
  expires_at   timestamptz,
  index_cidr   inet,
  index_fields jsonb,
  payload      bytea,
  data         jsonb,
  search_text  text,
  PRIMARY KEY (type, id)
) WITH (
  -- Room for the new version of a row in its own page, and rows of up to 4 kB kept in the page: updates
  -- stay HOT. For the same reason no index covers a column that every update changes.
  fillfactor = 70,
  toast_tuple_target = 4080,
  autovacuum_vacuum_scale_factor = 0.02,
  autovacuum_analyze_scale_factor = 0.02
);
COMMENT ON TABLE  pgbroker.records IS 'Live records. A DELETE is a revocation: every proxy gets a tombstone.';
COMMENT ON COLUMN pgbroker.records.type IS 'Record type, usually the type URL of the payload.';
COMMENT ON COLUMN pgbroker.records.id IS 'Identifier within the type.';
COMMENT ON COLUMN pgbroker.records.version IS 'Record version of the latest write; set by trigger.';
COMMENT ON COLUMN pgbroker.records.modified_at IS 'Time of the latest write by the database''s clock; set by trigger.';
COMMENT ON COLUMN pgbroker.records.expires_at IS 'Time named by the payload field record_types.expiry_field; set by trigger.';
COMMENT ON COLUMN pgbroker.records.index_cidr IS 'Prefix named by the payload''s $index.cidr, for look-ups by address.';
COMMENT ON COLUMN pgbroker.records.index_fields IS 'Text of the payload fields in record_types.projected_fields; set by trigger.';
COMMENT ON COLUMN pgbroker.records.payload IS 'Serialized google.protobuf.Any exactly as written; NULL if the record has none.';
COMMENT ON COLUMN pgbroker.records.data IS 'Projection: the payload as JSON without secrets; NULL where its type is unknown.';
COMMENT ON COLUMN pgbroker.records.search_text IS 'Lower-case text of the payload''s string fields without secrets, for text queries.';

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

CREATE TABLE pgbroker.changes (
  version    bigint      PRIMARY KEY,
  type       text        COLLATE "C" NOT NULL,
  id         text        COLLATE "C" NOT NULL,
  changed_at timestamptz NOT NULL,
  deleted    boolean     NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);
COMMENT ON TABLE  pgbroker.changes IS
  'The change log: the latest change of each live record, and tombstones until their retention has passed. '
  'A write removes the row that it supersedes, so the log never grows with updates.';
COMMENT ON COLUMN pgbroker.changes.version IS 'Position in the one global order of changes.';
COMMENT ON COLUMN pgbroker.changes.type IS 'Type of the changed record.';
COMMENT ON COLUMN pgbroker.changes.id IS 'Id of the changed record.';
COMMENT ON COLUMN pgbroker.changes.changed_at IS 'When, by the database''s clock.';
COMMENT ON COLUMN pgbroker.changes.deleted IS 'Whether this is a tombstone.';

-- Serves capacity and TTL: the least recently written records of a type.
CREATE INDEX changes_live ON pgbroker.changes (type, version) WHERE NOT deleted;
COMMENT ON INDEX pgbroker.changes_live IS 'Capacity and TTL: the least recently written records of a type.';
-- Serves retention: the oldest tombstones.
CREATE INDEX changes_tombstones ON pgbroker.changes (version) WHERE deleted;
COMMENT ON INDEX pgbroker.changes_tombstones IS 'Retention: the oldest tombstones.';

CREATE VIEW pgbroker.versions AS
  SELECT
    s.server_version,
    greatest((SELECT max(c.version) FROM pgbroker.changes c), s.base_version) AS latest_version,
    coalesce((SELECT min(c.version) FROM pgbroker.changes c), 0)              AS earliest_version,
    s.options_version
  FROM pgbroker.state s;
COMMENT ON VIEW pgbroker.versions IS 'One row: where the data set stands.';
COMMENT ON COLUMN pgbroker.versions.server_version IS 'Identity of the data set.';
COMMENT ON COLUMN pgbroker.versions.latest_version IS
  'The highest record version visible to the caller; whoever sees it sees every lower one.';
COMMENT ON COLUMN pgbroker.versions.earliest_version IS 'The lowest record version in the change log; 0 if it is empty.';
COMMENT ON COLUMN pgbroker.versions.options_version IS 'Raised by every change of options.';
