-- Leases, the service registry, and the replication checkpoint.

CREATE TABLE pgbroker.leases (
  name        text        COLLATE "C" PRIMARY KEY CHECK (octet_length(name) <= 512),
  id          text        NOT NULL CHECK (octet_length(id) <= 256),
  acquired_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  duration    interval    NOT NULL DEFAULT interval '1 day',
  expires_at  timestamptz NOT NULL
) WITH (fillfactor = 50);
COMMENT ON TABLE  pgbroker.leases IS 'Who may do a job at the moment. Only the database''s clock decides; an expired row is free to take, and so is '
  'one that ends later than anybody can have asked for, since the clock was ahead when it was taken.';
COMMENT ON COLUMN pgbroker.leases.name IS 'The job.';
COMMENT ON COLUMN pgbroker.leases.id IS 'Secret of the holder: whoever knows it may renew or release.';
COMMENT ON COLUMN pgbroker.leases.acquired_at IS 'When the present holder took it.';
COMMENT ON COLUMN pgbroker.leases.duration IS 'For how long it was asked for, the latest time.';
COMMENT ON COLUMN pgbroker.leases.expires_at IS 'When it ends unless renewed.';

CREATE TABLE pgbroker.services (
  kind        integer     NOT NULL,
  endpoint    text        COLLATE "C" NOT NULL CHECK (octet_length(endpoint) <= 2048),
  reported_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  expires_at  timestamptz NOT NULL,
  PRIMARY KEY (kind, endpoint)
) WITH (fillfactor = 50);
COMMENT ON TABLE  pgbroker.services IS 'Service registry: endpoints reported by running processes.';
COMMENT ON COLUMN pgbroker.services.kind IS
  'registry.ServiceKind: 1 databroker, 2 authorize, 3 authenticate, 4 proxy, 5 registry, 6 console, 7 prometheus metrics.';
COMMENT ON COLUMN pgbroker.services.endpoint IS 'URL of the service.';
COMMENT ON COLUMN pgbroker.services.reported_at IS 'When it was last reported.';
COMMENT ON COLUMN pgbroker.services.expires_at IS 'When it leaves the list unless reported again.';

CREATE TABLE pgbroker.checkpoint (
  singleton      boolean        PRIMARY KEY DEFAULT true CHECK (singleton),
  server_version numeric(20, 0) NOT NULL DEFAULT 0 CHECK (server_version BETWEEN 0 AND 18446744073709551615),
  record_version numeric(20, 0) NOT NULL DEFAULT 0 CHECK (record_version BETWEEN 0 AND 18446744073709551615)
);
COMMENT ON TABLE  pgbroker.checkpoint IS 'One row: how far somebody who copies another databroker into this one has come.';
COMMENT ON COLUMN pgbroker.checkpoint.singleton IS 'Always true: there is one row.';
COMMENT ON COLUMN pgbroker.checkpoint.server_version IS 'Server version of the source.';
COMMENT ON COLUMN pgbroker.checkpoint.record_version IS 'Record version reached in the source.';

INSERT INTO pgbroker.checkpoint DEFAULT VALUES;

CREATE FUNCTION pgbroker.services_notify() RETURNS trigger
  LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM pg_notify('pgbroker_services', '') WHERE pg_notification_queue_usage() < 0.5;
  RETURN NULL;
END
$$;
COMMENT ON FUNCTION pgbroker.services_notify() IS 'Wakes the replicas when the set of live services changes.';

-- Reports repeat every few seconds; only a change of the set is news.
CREATE TRIGGER services_added AFTER INSERT ON pgbroker.services
  FOR EACH ROW EXECUTE FUNCTION pgbroker.services_notify();
CREATE TRIGGER services_removed AFTER DELETE ON pgbroker.services
  FOR EACH ROW EXECUTE FUNCTION pgbroker.services_notify();
CREATE TRIGGER services_changed AFTER UPDATE ON pgbroker.services
  FOR EACH ROW WHEN (OLD.expires_at <= NEW.reported_at OR OLD.kind <> NEW.kind OR OLD.endpoint <> NEW.endpoint
                     OR NEW.expires_at <= OLD.expires_at)
  EXECUTE FUNCTION pgbroker.services_notify();
CREATE TRIGGER services_truncated AFTER TRUNCATE ON pgbroker.services
  FOR EACH STATEMENT EXECUTE FUNCTION pgbroker.services_notify();
