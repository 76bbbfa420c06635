DROP FUNCTION pgbroker.grants(text, text, text);
DO $$
DECLARE
  f regprocedure;
BEGIN
  FOR f IN
    SELECT DISTINCT t.tgfoid::regprocedure FROM pg_trigger t
    WHERE t.tgrelid = 'pgbroker.records'::regclass AND NOT t.tgisinternal AND t.tgtype & 1 = 0
  LOOP
    EXECUTE format('ALTER FUNCTION %s SECURITY INVOKER RESET ALL', f);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC', f);
  END LOOP;
END
$$;
DROP VIEW pgbroker.type_summary;
DROP VIEW pgbroker.revocations;
DROP TRIGGER records_audit_clear ON pgbroker.records;
DROP TRIGGER records_audit_delete ON pgbroker.records;
DROP FUNCTION pgbroker.audit_clear();
DROP FUNCTION pgbroker.audit_deletes();
DROP FUNCTION pgbroker.set_audited(text, boolean);
ALTER TABLE pgbroker.record_types DROP COLUMN audited;
DROP TABLE pgbroker.audit;
