-- Failover: versions that no other server has issued, and servers that hide who they are.

CREATE FUNCTION pgbroker.server_timeline() RETURNS bigint
  LANGUAGE plpgsql VOLATILE AS $$
BEGIN
  IF pg_is_in_recovery() THEN
    RETURN NULL;
  END IF;
  -- The WAL file name shows a promotion at once; pg_control_checkpoint() only after the next checkpoint.
  RETURN ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint;
EXCEPTION
  WHEN insufficient_privilege OR feature_not_supported OR object_not_in_prerequisite_state THEN
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.server_timeline() IS
  'Timeline that this server writes now; a promotion raises it. NULL on a standby, and where a managed service hides it.';

CREATE FUNCTION pgbroker.server_system_identifier() RETURNS bigint
  LANGUAGE plpgsql VOLATILE AS $$
BEGIN
  RETURN (pg_control_system()).system_identifier;
EXCEPTION
  WHEN insufficient_privilege OR feature_not_supported OR object_not_in_prerequisite_state THEN
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.server_system_identifier() IS
  'Identity of this database cluster; NULL where a managed service hides it.';

COMMENT ON COLUMN pgbroker.state.server_started IS
  'Start time of the server process that issued the latest versions. Another one has its system identifier compared; where '
  'the timeline is hidden, it counts as another server.';

CREATE OR REPLACE FUNCTION pgbroker.current_timeline() RETURNS bigint
  LANGUAGE plpgsql VOLATILE AS $$
DECLARE
  visible bigint := pgbroker.server_timeline();
BEGIN
  IF visible IS NULL AND NOT pg_is_in_recovery() THEN
    -- It may have changed with every start. An epoch too many does no harm.
    RETURN (SELECT CASE WHEN s.server_started = pg_postmaster_start_time() THEN s.timeline ELSE 0 END FROM pgbroker.state s);
  END IF;
  RETURN visible;
END
$$;
COMMENT ON FUNCTION pgbroker.current_timeline() IS
  'Timeline of this server. Where that is hidden, the one in pgbroker.state, or 0 if the server has been started since. '
  'NULL on a standby.';

CREATE OR REPLACE FUNCTION pgbroker.current_system_identifier() RETURNS bigint
  LANGUAGE plpgsql VOLATILE AS $$
DECLARE
  visible bigint := pgbroker.server_system_identifier();
BEGIN
  IF visible IS NULL THEN
    RETURN (SELECT s.system_identifier FROM pgbroker.state s);
  END IF;
  RETURN visible;
END
$$;
COMMENT ON FUNCTION pgbroker.current_system_identifier() IS
  'Identity of this database cluster, or where it is not visible the one in pgbroker.state.';

CREATE OR REPLACE FUNCTION pgbroker.begin_epoch() RETURNS void
  LANGUAGE plpgsql AS $$
DECLARE
  survived bigint := (SELECT latest_version FROM pgbroker.versions);
  issued   bigint := greatest(survived, (SELECT last_value FROM pgbroker.record_version));
  -- By the clock, 2^20 versions a second since 2026, which nobody issues: above all that any other server can have
  -- issued, also on a branch of history that this one knows nothing of, as after a restore to a time before an
  -- earlier epoch. The fraction counts: two branches can begin within the same second. Fits into 53 bits for centuries.
  first    bigint := floor(extract(epoch FROM clock_timestamp() - timestamptz '2026-01-01 00:00:00+00') * (1 << 20));
BEGIN
  IF first <= issued THEN
    -- The clock is wrong: far ahead, and by chance not where another branch has gone.
    first := issued + (1::bigint << 32) + floor(random() * (1::bigint << 32))::bigint;
  END IF;
  PERFORM setval('pgbroker.record_version', first, false);
  UPDATE pgbroker.state
    SET system_identifier = pgbroker.current_system_identifier(),
        timeline = coalesce(pgbroker.server_timeline(), timeline),
        server_started = pg_postmaster_start_time();
  INSERT INTO pgbroker.epochs (first_version, last_version, system_identifier, timeline)
    SELECT first, survived, s.system_identifier, s.timeline FROM pgbroker.state s;
  IF current_setting('synchronous_commit') = 'off' THEN
    -- Replicas refuse servers that do not know an epoch they have seen: it must survive a crash.
    PERFORM set_config('synchronous_commit', 'local', true);
  END IF;
  PERFORM pg_notify('pgbroker_changes', '');
END
$$;
COMMENT ON FUNCTION pgbroker.begin_epoch() IS
  'Records that versions are issued from here on by another server or timeline, and moves them to where nobody has '
  'issued any. Call under the order lock.';
COMMENT ON COLUMN pgbroker.epochs.first_version IS 'Versions of this epoch start here: far above all that any other server has issued.';

CREATE FUNCTION pgbroker.settle_epoch() RETURNS void
  LANGUAGE plpgsql AS $$
BEGIN
  -- Whoever holds the order lock has looked, and has begun the epoch if it was due.
  IF pg_try_advisory_xact_lock(7236837420591218) THEN
    PERFORM pgbroker.lock_order();
  END IF;
END
$$;
COMMENT ON FUNCTION pgbroker.settle_epoch() IS
  'Begins an epoch if the server has changed, without waiting for writers.';
