DROP FUNCTION pgbroker.repair_setup;
DROP FUNCTION pgbroker.repair_records;
DROP FUNCTION pgbroker.problems;
DROP FUNCTION pgbroker.setup_problems;
