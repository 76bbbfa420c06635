DROP TABLE pgbroker.checkpoint;
DROP TABLE pgbroker.services;
DROP FUNCTION pgbroker.services_notify();
DROP TABLE pgbroker.leases;
