DROP TABLE pgbroker.checkpoint;
DROP TABLE pgbroker.services;
DROP TABLE pgbroker.leases;
DROP FUNCTION pgbroker.services_notify;
