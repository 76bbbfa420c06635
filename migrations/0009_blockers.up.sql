-- Who keeps writers waiting: for operators, and for the replicas, which report it.

CREATE VIEW pgbroker.blockers AS
  WITH RECURSIVE order_lock AS (
    SELECT l.pid, l.granted, l.waitstart
    FROM pg_catalog.pg_locks l
    WHERE l.locktype = 'advisory' AND l.objsubid = 1
      AND l.classid = (7236837420591218 >> 32)::oid AND l.objid = (7236837420591218 & 4294967295)::oid
      AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
  ),
  -- Sessions that wait for the order lock, for a table of the schema or, while they hold the order lock, for
  -- anything at all, such as a row. Writers pass the order lock on within milliseconds: that is no blocking.
  waiting AS (
    SELECT l.pid, min(l.waitstart) AS since
    FROM pg_catalog.pg_locks l
    WHERE NOT l.granted AND l.waitstart < clock_timestamp() - interval '100 milliseconds'
      AND (l.pid IN (SELECT o.pid FROM order_lock o)
        OR l.relation IN (SELECT c.oid FROM pg_catalog.pg_class c WHERE c.relnamespace = 'pgbroker'::regnamespace)
           AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database()))
    GROUP BY l.pid
  ),
  chain AS (
    SELECT w.pid AS waiter, w.since, b.pid
    FROM waiting w CROSS JOIN unnest(pg_blocking_pids(w.pid)) AS b (pid)
    UNION
    SELECT c.waiter, c.since, b.pid
    FROM chain c CROSS JOIN unnest(pg_blocking_pids(c.pid)) AS b (pid)
  )
  SELECT c.pid, a.usename AS user_name, a.application_name, a.client_addr, a.state,
         a.backend_start AS connected_at, a.xact_start AS transaction_started_at, a.state_change AS state_changed_at,
         count(DISTINCT c.waiter) AS waiting, min(c.since) AS waiting_since, a.query
  FROM chain c
  LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = c.pid
  -- Only those at the end of the chain: who waits is no cause.
  WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_locks l WHERE l.pid = c.pid AND NOT l.granted)
  GROUP BY c.pid, a.usename, a.application_name, a.client_addr, a.state, a.backend_start, a.xact_start, a.state_change, a.query;
COMMENT ON VIEW pgbroker.blockers IS
  'Sessions whose open transactions keep writers waiting, usually a transaction that somebody has forgotten: nothing is '
  'revoked meanwhile. pg_terminate_backend(pid) ends one. Of other roles'' sessions only members of pg_read_all_stats '
  'see state, times and query.';
COMMENT ON COLUMN pgbroker.blockers.pid IS 'Process of the session; 0 is a prepared transaction (pg_prepared_xacts).';
COMMENT ON COLUMN pgbroker.blockers.user_name IS 'Role of the session.';
COMMENT ON COLUMN pgbroker.blockers.application_name IS 'What the session calls itself.';
COMMENT ON COLUMN pgbroker.blockers.client_addr IS 'Where it comes from; NULL over a socket.';
COMMENT ON COLUMN pgbroker.blockers.state IS 'What it is doing: "idle in transaction" is doing nothing.';
COMMENT ON COLUMN pgbroker.blockers.connected_at IS 'When the session began.';
COMMENT ON COLUMN pgbroker.blockers.transaction_started_at IS 'When its transaction began.';
COMMENT ON COLUMN pgbroker.blockers.state_changed_at IS 'Since when it is in that state.';
COMMENT ON COLUMN pgbroker.blockers.waiting IS 'How many sessions wait for it.';
COMMENT ON COLUMN pgbroker.blockers.waiting_since IS 'Since when the one that has waited longest waits.';
COMMENT ON COLUMN pgbroker.blockers.query IS 'What it runs, or ran last: not always what has taken the lock.';
