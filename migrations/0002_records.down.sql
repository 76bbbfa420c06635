DROP VIEW pgbroker.versions;
DROP TABLE pgbroker.changes;
DROP TABLE pgbroker.records;
DROP TABLE pgbroker.record_types;
