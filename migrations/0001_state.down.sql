DROP FUNCTION pgbroker.current_system_identifier;
DROP FUNCTION pgbroker.current_timeline;
DROP FUNCTION pgbroker.server_system_identifier;
DROP FUNCTION pgbroker.server_timeline;
DROP TABLE pgbroker.epochs;
DROP TABLE pgbroker.state;
DROP FUNCTION pgbroker.random_server_version;
DROP SEQUENCE pgbroker.record_version;
