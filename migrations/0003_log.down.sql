DROP VIEW pgbroker.versions;
DROP TABLE pgbroker.changes;
