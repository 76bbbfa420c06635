DROP FUNCTION pgbroker.would_end;
