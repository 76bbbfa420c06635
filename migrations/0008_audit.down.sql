DROP TRIGGER records_audit_clear ON pgbroker.records;
DROP TRIGGER records_audit_delete ON pgbroker.records;
DROP FUNCTION pgbroker.audit_clear;
DROP FUNCTION pgbroker.audit_deletes;
DROP FUNCTION pgbroker.set_audited;
DROP TABLE pgbroker.audit;
