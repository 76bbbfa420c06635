DROP FUNCTION pgbroker.write_records(text[], text[], boolean[], bytea[], text[], text[], text[], integer[], bigint[]);
