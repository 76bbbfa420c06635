DROP FUNCTION pgbroker.grants;
