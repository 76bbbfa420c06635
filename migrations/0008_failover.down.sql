DROP FUNCTION pgbroker.settle_epoch();

CREATE OR REPLACE FUNCTION pgbroker.begin_epoch() RETURNS void
  LANGUAGE plpgsql AS $$
DECLARE
  survived bigint := (SELECT latest_version FROM pgbroker.versions);
  issued   bigint := (SELECT last_value FROM pgbroker.record_version);
  first    bigint;
BEGIN
  -- The lost server can have issued versions that this one has never heard of, so jump far ahead of all
  -- of them: to the next multiple of 2^32.
  first := ((greatest(survived, issued) >> 32) + 1) << 32;
  PERFORM setval('pgbroker.record_version', first, false);
  INSERT INTO pgbroker.epochs (first_version, last_version, system_identifier, timeline)
    VALUES (first, survived, pgbroker.current_system_identifier(), pgbroker.current_timeline());
  UPDATE pgbroker.state
    SET system_identifier = pgbroker.current_system_identifier(), timeline = pgbroker.current_timeline();
  PERFORM pg_notify('pgbroker_changes', '');
END
$$;
COMMENT ON FUNCTION pgbroker.begin_epoch() IS
  'Records that versions are issued from here on by another server or timeline. Call under the order lock.';
COMMENT ON COLUMN pgbroker.epochs.first_version IS 'Versions of this epoch start here (a multiple of 2^32).';

CREATE OR REPLACE FUNCTION pgbroker.current_system_identifier() RETURNS bigint
  LANGUAGE sql VOLATILE
  BEGIN ATOMIC
    SELECT system_identifier FROM pg_control_system();
  END;
COMMENT ON FUNCTION pgbroker.current_system_identifier() IS
  'Identity of this database cluster; a dump restored elsewhere lives in a cluster with another one.';

CREATE OR REPLACE FUNCTION pgbroker.current_timeline() RETURNS bigint
  LANGUAGE sql VOLATILE
  -- The WAL file name shows a promotion at once; pg_control_checkpoint() only after the next checkpoint.
  RETURN ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint;
COMMENT ON FUNCTION pgbroker.current_timeline() IS
  'Timeline that this server writes now; a promotion raises it. Fails on a standby.';

COMMENT ON COLUMN pgbroker.state.server_started IS
  'Start time of the server process that system_identifier was last compared with: reading that takes a file.';
DROP FUNCTION pgbroker.server_system_identifier();
DROP FUNCTION pgbroker.server_timeline();
