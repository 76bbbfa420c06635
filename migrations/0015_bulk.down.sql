DROP FUNCTION pgbroker.project_records;
DROP TRIGGER records_unstamp ON pgbroker.records;
DROP FUNCTION pgbroker.keep_version;
DROP FUNCTION pgbroker.replace_records;
DROP FUNCTION pgbroker.write_differences;
DROP FUNCTION pgbroker.compare_staged;
DROP FUNCTION pgbroker.stage_records(jsonb);
DROP FUNCTION pgbroker.stage_records();
