-- The schema, and the identity of the data set: which one it is, and on which server versions are issued.

-- The migrator has made the schema, or somebody has made it for a role that may create none: CREATE SCHEMA IF NOT EXISTS
-- would ask for that right all the same.
DO $$
BEGIN
  IF to_regnamespace('pgbroker') IS NULL THEN
    CREATE SCHEMA pgbroker;
  END IF;
END
$$;
COMMENT ON SCHEMA pgbroker IS
  'Identity state behind an access proxy: records, their change log, leases and services. '
  'SELECT, INSERT, UPDATE and DELETE here are a supported interface; triggers tell every proxy.';

-- Record versions: the position of a change in the one global order. Taken only under the order
-- lock, so values become visible in ascending order; gaps are harmless.
CREATE SEQUENCE pgbroker.record_version AS bigint;
COMMENT ON SEQUENCE pgbroker.record_version IS
  'Record versions. Taken only under the order lock (pgbroker.lock_order), by triggers.';

CREATE FUNCTION pgbroker.random_server_version() RETURNS bigint
  LANGUAGE sql VOLATILE
  -- Positive, never 0 (0 tells clients to start over), and below 2^53 so that JSON carries it exactly.
  RETURN 1 + floor(random() * 9007199254740990)::bigint;
COMMENT ON FUNCTION pgbroker.random_server_version() IS
  'A new server version: random, never 0, below 2^53.';

CREATE TABLE pgbroker.state (
  singleton         boolean     PRIMARY KEY DEFAULT true CHECK (singleton),
  server_version    bigint      NOT NULL CHECK (server_version > 0),
  base_version      bigint      NOT NULL DEFAULT 0,
  options_version   bigint      NOT NULL DEFAULT 1,
  system_identifier bigint      NOT NULL,
  timeline          bigint      NOT NULL,
  server_started    timestamptz NOT NULL DEFAULT '-infinity',
  max_record_bytes  integer     NOT NULL DEFAULT 4190208 CHECK (max_record_bytes BETWEEN 16384 AND 67108864)
);
COMMENT ON TABLE  pgbroker.state IS 'One row: which data set this is and where its versions are issued.';
COMMENT ON COLUMN pgbroker.state.singleton IS 'Always true: there is one row.';
COMMENT ON COLUMN pgbroker.state.server_version IS 'Identity of the data set; changes only when clients must forget everything.';
COMMENT ON COLUMN pgbroker.state.base_version IS 'Latest record version when the change log was last emptied; 0 if never.';
COMMENT ON COLUMN pgbroker.state.options_version IS 'Raised by every change of a record type''s options, so that replicas reload them.';
COMMENT ON COLUMN pgbroker.state.system_identifier IS 'Cluster that issued the latest versions (pg_control_system).';
COMMENT ON COLUMN pgbroker.state.timeline IS 'Timeline on which the latest versions were issued.';
COMMENT ON COLUMN pgbroker.state.max_record_bytes IS
  'Largest payload that is taken, however it is written. By default it is what standard clients accept (4 MiB), without 4 KiB for '
  'all that is not payload. A replica takes less if its max_message_size is less.';
COMMENT ON COLUMN pgbroker.state.server_started IS
  'Start time of the server process that issued the latest versions. Another one has its system identifier compared; where '
  'the timeline is hidden, it counts as another server.';

CREATE TABLE pgbroker.epochs (
  first_version     bigint      PRIMARY KEY,
  last_version      bigint      NOT NULL,
  system_identifier bigint      NOT NULL,
  timeline          bigint      NOT NULL,
  started_at        timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE  pgbroker.epochs IS
  'A row for each promotion, restore or move of the database. Versions above last_version and below first_version '
  'were issued, if at all, by a server whose later writes are lost: a client that saw one starts over.';
COMMENT ON COLUMN pgbroker.epochs.first_version IS 'Versions of this epoch start here: far above all that any other server has issued.';
COMMENT ON COLUMN pgbroker.epochs.last_version IS 'Latest version of the epoch before that survived.';
COMMENT ON COLUMN pgbroker.epochs.system_identifier IS 'Cluster of this epoch.';
COMMENT ON COLUMN pgbroker.epochs.timeline IS 'Timeline of this epoch.';
COMMENT ON COLUMN pgbroker.epochs.started_at IS 'When the new server was first noticed.';

-- ---------------------------------------------------------------------------------------------
-- Which server this is
-- ---------------------------------------------------------------------------------------------

-- The two that tell the timeline run several times for each write, and setting a search path for them would take as long as
-- they do: instead every name in them, and every operator, says which schema it is from.
CREATE FUNCTION pgbroker.server_timeline() RETURNS bigint
  LANGUAGE plpgsql VOLATILE AS $$
BEGIN
  IF pg_catalog.pg_is_in_recovery() THEN
    RETURN NULL;
  END IF;
  -- The WAL file name shows a promotion at once; pg_control_checkpoint() only after the next checkpoint.
  RETURN ('x' OPERATOR(pg_catalog.||) pg_catalog.substr(
    pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8))::bit(32)::bigint;
EXCEPTION
  WHEN insufficient_privilege OR feature_not_supported OR object_not_in_prerequisite_state THEN
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.server_timeline() IS
  'Timeline that this server writes now; a promotion raises it. NULL on a standby, and where a managed service hides it.';

CREATE FUNCTION pgbroker.server_system_identifier() RETURNS bigint
  LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  RETURN (pg_control_system()).system_identifier;
EXCEPTION
  WHEN insufficient_privilege OR feature_not_supported OR object_not_in_prerequisite_state THEN
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.server_system_identifier() IS
  'Identity of this database cluster; NULL where a managed service hides it.';

CREATE FUNCTION pgbroker.current_timeline() RETURNS bigint
  LANGUAGE plpgsql VOLATILE AS $$
DECLARE
  visible bigint := pgbroker.server_timeline();
BEGIN
  IF visible IS NULL AND NOT pg_catalog.pg_is_in_recovery() THEN
    -- It may have changed with every start. An epoch too many does no harm.
    RETURN (SELECT CASE WHEN s.server_started OPERATOR(pg_catalog.=) pg_catalog.pg_postmaster_start_time() THEN s.timeline ELSE 0 END
            FROM pgbroker.state s);
  END IF;
  RETURN visible;
END
$$;
COMMENT ON FUNCTION pgbroker.current_timeline() IS
  'Timeline of this server. Where that is hidden, the one in pgbroker.state, or 0 if the server has been started since. '
  'NULL on a standby.';

CREATE FUNCTION pgbroker.current_system_identifier() RETURNS bigint
  LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $$
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

CREATE FUNCTION pgbroker.standby_lag() RETURNS interval
  LANGUAGE sql VOLATILE
  RETURN CASE
    WHEN NOT pg_is_in_recovery() THEN NULL
    -- What was received is replayed, and more may come. A receiver that hears nothing takes that for no news.
    WHEN pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn() AND EXISTS (SELECT FROM pg_stat_wal_receiver) THEN '0'
    ELSE clock_timestamp() - coalesce(pg_last_xact_replay_timestamp(), pg_postmaster_start_time())
  END;
COMMENT ON FUNCTION pgbroker.standby_lag() IS
  'How far this standby is behind its primary, as far as it knows: 0 if it has replayed all that it has received and is '
  'connected, else the time since the latest transaction that it has replayed. NULL on a primary.';

INSERT INTO pgbroker.state (server_version, system_identifier, timeline)
  VALUES (pgbroker.random_server_version(),
          -- 0 where a managed service hides it.
          coalesce(pgbroker.server_system_identifier(), 0), coalesce(pgbroker.server_timeline(), 0));
