-- The change log, and where the data set stands.

CREATE TABLE pgbroker.changes (
  version    bigint      PRIMARY KEY,
  type       text        COLLATE "C" NOT NULL,
  id         text        COLLATE "C" NOT NULL,
  changed_at timestamptz NOT NULL CHECK (isfinite(changed_at)),
  deleted    boolean     NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02, vacuum_truncate = off);
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
