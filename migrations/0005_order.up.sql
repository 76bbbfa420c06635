-- The one global order of changes: the lock under which versions are issued, and the epochs in which servers issue them.
--
-- Lock order, everywhere: tables, then the order lock, then rows.

CREATE FUNCTION pgbroker.begin_epoch() RETURNS void
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
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
  PERFORM pg_notify('pgbroker_changes', '') WHERE pg_notification_queue_usage() < 0.5;
END
$$;
COMMENT ON FUNCTION pgbroker.begin_epoch() IS
  'Records that versions are issued from here on by another server or timeline, and moves them to where nobody has '
  'issued any. Call under the order lock.';

CREATE FUNCTION pgbroker.check_epoch() RETURNS void
  -- As the owner: nobody else may move the versions, or say where they were issued.
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF NOT EXISTS (
    SELECT FROM pgbroker.state s
    WHERE s.singleton
      AND s.timeline = pgbroker.current_timeline()
      AND s.system_identifier = pgbroker.current_system_identifier()
  ) THEN
    PERFORM pgbroker.begin_epoch();
  END IF;
  UPDATE pgbroker.state SET server_started = pg_postmaster_start_time();
END
$$;
COMMENT ON FUNCTION pgbroker.check_epoch() IS
  'Begins an epoch if the server or its timeline is not the one that issued the latest versions. Call under the order lock.';
REVOKE EXECUTE ON FUNCTION pgbroker.check_epoch() FROM PUBLIC;

-- With names in full instead of a search path, as the functions that tell the timeline, and for the same reason.
CREATE FUNCTION pgbroker.lock_order() RETURNS void
  LANGUAGE plpgsql AS $$
DECLARE
  present_timeline bigint                 := pgbroker.current_timeline();
  present_server   pg_catalog.timestamptz := pg_catalog.pg_postmaster_start_time();
BEGIN
  -- Versions are assigned under this lock and it is held to the end of the transaction, so they become
  -- visible in the order in which they are assigned. A transaction that notifies serialises its commit
  -- on a lock of Postgres's own anyway.
  PERFORM pg_catalog.pg_advisory_xact_lock(7236837420591218);
  -- Found by its key even where a caller has turned sequential scans off: one would look so expensive then
  -- that the statement is compiled (JIT) each time.
  IF NOT EXISTS (
    SELECT FROM pgbroker.state s
    WHERE s.singleton AND s.timeline OPERATOR(pg_catalog.=) present_timeline AND s.server_started OPERATOR(pg_catalog.=) present_server
  ) THEN
    PERFORM pgbroker.check_epoch();
  END IF;
END
$$;
COMMENT ON FUNCTION pgbroker.lock_order() IS
  'Takes the order lock until the end of the transaction, and begins an epoch if the server has changed. '
  'Everything that assigns record versions or changes options takes it before any row.';

CREATE FUNCTION pgbroker.settle_epoch() RETURNS void
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  -- Whoever holds the order lock has looked, and has begun the epoch if it was due.
  IF pg_try_advisory_xact_lock(7236837420591218) THEN
    PERFORM pgbroker.lock_order();
  END IF;
END
$$;
COMMENT ON FUNCTION pgbroker.settle_epoch() IS
  'Begins an epoch if the server has changed, without waiting for writers.';

CREATE FUNCTION pgbroker.take_order_lock() RETURNS trigger
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM pgbroker.lock_order();
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    -- What such a transaction sees may be from before the order lock: options that have changed since, say. Then it has to
    -- be repeated, as PostgreSQL would say sooner or later, and without a word of what helps.
    BEGIN
      PERFORM FROM pgbroker.state FOR SHARE;
      PERFORM FROM pgbroker.record_types FOR SHARE;
    EXCEPTION WHEN serialization_failure THEN
      RAISE EXCEPTION 'others have written since this transaction began'
        USING ERRCODE = 'serialization_failure',
          HINT = 'Repeat the transaction, or run it at READ COMMITTED: writers take turns here, so that is enough.';
    END;
  END IF;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.take_order_lock() IS 'Trigger: the order lock before any row of the statement.';
REVOKE EXECUTE ON FUNCTION pgbroker.take_order_lock() FROM PUBLIC;

-- ---------------------------------------------------------------------------------------------
-- Who keeps writers waiting: for operators, and for the replicas, which report it
-- ---------------------------------------------------------------------------------------------

CREATE VIEW pgbroker.blockers AS
  WITH RECURSIVE locks AS (
    -- pg_locks is read once: each look at it stops all locking for a moment.
    SELECT l.*, coalesce(l.locktype = 'advisory' AND l.objsubid = 1
        AND l.classid = (7236837420591218 >> 32)::oid AND l.objid = (7236837420591218 & 4294967295)::oid, false) AS is_order_lock
    FROM pg_catalog.pg_locks l
    WHERE l.database IS NULL OR l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
  ),
  -- Sessions that wait for the order lock, for a table of the schema or, while they hold the order lock, for
  -- anything at all, such as a row. Writers pass the order lock on within milliseconds: that is no blocking.
  waiting AS (
    SELECT l.pid, min(l.waitstart) AS since
    FROM locks l
    WHERE NOT l.granted AND l.waitstart < clock_timestamp() - interval '100 milliseconds'
      AND (l.is_order_lock
        OR l.pid IN (SELECT o.pid FROM locks o WHERE o.is_order_lock)
        OR l.relation IN (SELECT c.oid FROM pg_catalog.pg_class c WHERE c.relnamespace = 'pgbroker'::regnamespace))
    GROUP BY l.pid
  ),
  chain AS (
    SELECT w.pid AS waiter, w.since, b.pid
    FROM waiting w CROSS JOIN unnest(pg_catalog.pg_blocking_pids(w.pid)) AS b (pid)
    UNION
    SELECT c.waiter, c.since, b.pid
    FROM chain c CROSS JOIN unnest(pg_catalog.pg_blocking_pids(c.pid)) AS b (pid)
    WHERE c.pid <> 0
  ),
  -- Only those at the end of the chain: who waits is no cause.
  causes AS (
    SELECT c.pid, count(DISTINCT c.waiter) AS waiting, min(c.since) AS waiting_since
    FROM chain c
    WHERE c.pid = 0 OR NOT EXISTS (SELECT FROM locks l WHERE l.pid = c.pid AND NOT l.granted)
    GROUP BY c.pid
  ),
  -- A prepared transaction has no session: PostgreSQL names it 0. It is found by what it holds and a session of the chain wants.
  prepared AS (
    SELECT DISTINCT p.gid, p.owner, p.prepared
    FROM locks want
    JOIN locks held ON held.pid IS NULL AND held.granted
      AND (held.locktype, held.relation, held.page, held.tuple, held.virtualxid, held.transactionid, held.classid, held.objid, held.objsubid)
        IS NOT DISTINCT FROM
          (want.locktype, want.relation, want.page, want.tuple, want.virtualxid, want.transactionid, want.classid, want.objid, want.objsubid)
    JOIN locks self ON self.pid IS NULL AND self.locktype = 'transactionid' AND self.virtualtransaction = held.virtualtransaction
    JOIN pg_catalog.pg_prepared_xacts p ON p.transaction = self.transactionid
    WHERE NOT want.granted AND want.pid IN (SELECT c.waiter FROM chain c UNION SELECT c.pid FROM chain c)
  ),
  -- A commit keeps its locks until the synchronous standby has answered, also while nobody waits behind it yet.
  unconfirmed AS (
    SELECT a.pid, a.state_change AS since
    FROM pg_catalog.pg_stat_activity a
    WHERE a.wait_event = 'SyncRep' AND a.datname = current_database()
      AND a.state_change < clock_timestamp() - interval '100 milliseconds'
      AND a.pid IN (SELECT o.pid FROM locks o WHERE o.is_order_lock AND o.granted)
  ),
  blocking AS (
    SELECT coalesce(c.pid, u.pid) AS pid, coalesce(c.waiting, 0) AS waiting, least(c.waiting_since, u.since) AS waiting_since
    FROM (SELECT * FROM causes WHERE causes.pid <> 0) c FULL JOIN unconfirmed u USING (pid)
  )
  SELECT b.pid, NULL::text AS gid, a.usename AS user_name, a.application_name, a.client_addr, a.state,
         CASE WHEN a.wait_event = 'SyncRep' THEN 'synchronous standby'
              WHEN a.state LIKE 'idle in transaction%' THEN 'open transaction'
              WHEN a.state IS NOT NULL THEN 'running statement'
              ELSE 'unknown' END AS reason,
         a.backend_start AS connected_at, a.xact_start AS transaction_started_at, a.state_change AS state_changed_at,
         b.waiting, b.waiting_since,
         CASE WHEN a.wait_event = 'SyncRep'
              THEN 'bring the standby back, or take it out of synchronous_standby_names and run SELECT pg_reload_conf()'
              ELSE pg_catalog.format('SELECT pg_terminate_backend(%s)', b.pid) END AS remedy,
         a.query
  FROM blocking b
  LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = b.pid
  UNION ALL
  SELECT 0, p.gid, p.owner, NULL, NULL, NULL, 'prepared transaction', NULL, NULL, p.prepared,
         c.waiting, c.waiting_since, pg_catalog.format('ROLLBACK PREPARED %L', p.gid), NULL
  FROM causes c CROSS JOIN prepared p
  WHERE c.pid = 0;
COMMENT ON VIEW pgbroker.blockers IS
  'What keeps writers waiting, usually a transaction that somebody has forgotten: nothing is revoked meanwhile. The column remedy '
  'has what ends it. Of other roles'' sessions only members of pg_read_all_stats see state, times and query.';
COMMENT ON COLUMN pgbroker.blockers.pid IS 'Process of the session; 0 is a prepared transaction.';
COMMENT ON COLUMN pgbroker.blockers.gid IS 'Name of the prepared transaction; NULL is a session.';
COMMENT ON COLUMN pgbroker.blockers.user_name IS 'Role of the session, or owner of the prepared transaction.';
COMMENT ON COLUMN pgbroker.blockers.application_name IS 'What the session calls itself.';
COMMENT ON COLUMN pgbroker.blockers.client_addr IS 'Where it comes from; NULL over a socket.';
COMMENT ON COLUMN pgbroker.blockers.state IS 'What it is doing: "idle in transaction" is doing nothing.';
COMMENT ON COLUMN pgbroker.blockers.reason IS
  'open transaction, running statement, prepared transaction, synchronous standby (a commit that waits for one), or unknown.';
COMMENT ON COLUMN pgbroker.blockers.connected_at IS 'When the session began.';
COMMENT ON COLUMN pgbroker.blockers.transaction_started_at IS 'When its transaction began.';
COMMENT ON COLUMN pgbroker.blockers.state_changed_at IS 'Since when it is in that state, or prepared.';
COMMENT ON COLUMN pgbroker.blockers.waiting IS 'How many sessions wait for it.';
COMMENT ON COLUMN pgbroker.blockers.waiting_since IS 'Since when the one that has waited longest waits.';
COMMENT ON COLUMN pgbroker.blockers.remedy IS 'What ends it.';
COMMENT ON COLUMN pgbroker.blockers.query IS 'What it runs, or ran last: not always what has taken the lock.';
