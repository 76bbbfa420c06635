DROP VIEW pgbroker.secret_fields;
DROP TABLE pgbroker.reprojections, pgbroker.schema_state, pgbroker.redacted_fields, pgbroker.enum_values,
  pgbroker.message_fields, pgbroker.messages, pgbroker.schemas;
DROP FUNCTION pgbroker.announce_schema();
DROP FUNCTION pgbroker.check_redaction();
