DROP FUNCTION pgbroker.latest_version();
DROP TABLE pgbroker.changes;
DROP TABLE pgbroker.records;
DROP TABLE pgbroker.record_types;
