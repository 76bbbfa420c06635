-- A look ahead: how many records an option would end, before it is set.

CREATE FUNCTION pgbroker.would_end(
  record_type text, idle_timeout interval DEFAULT NULL, user_limit bigint DEFAULT NULL, ttl interval DEFAULT NULL,
  capacity bigint DEFAULT NULL, expiry_field text DEFAULT NULL, missing_users boolean DEFAULT false) RETURNS bigint
  LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  kind    text := pgbroker.type_named(record_type);
  present timestamptz := clock_timestamp();
  ends    bigint;
BEGIN
  -- What is not asked for is not looked at: planned for these values, it is known to be nothing.
  EXECUTE $query$
    SELECT count(*) FROM (
      SELECT r.id FROM pgbroker.records r
        WHERE $3 IS NOT NULL AND r.type = $1
          AND coalesce(pgbroker.parse_time(r.data ->> 'accessed_at'), pgbroker.parse_time(r.data ->> 'issued_at'), r.modified_at) < $2 - $3
      UNION
      SELECT o.id FROM (
          SELECT r.id, row_number() OVER (
                   PARTITION BY r.data ->> 'user_id'
                   ORDER BY pgbroker.parse_time(r.data ->> 'issued_at') DESC NULLS LAST, r.version DESC) AS place
          FROM pgbroker.records r
          WHERE $4 IS NOT NULL AND r.type = $1 AND jsonb_typeof(r.data -> 'user_id') IN ('string', 'number', 'boolean')
        ) AS o
        WHERE o.place > $4
      UNION
      SELECT c.id FROM pgbroker.changes c
        WHERE $5 IS NOT NULL AND c.type = $1 AND NOT c.deleted AND c.changed_at < $2 - $5
      UNION
      (SELECT c.id FROM pgbroker.changes c
        WHERE $6 IS NOT NULL AND c.type = $1 AND NOT c.deleted
        ORDER BY c.version DESC OFFSET $6)
      UNION
      SELECT r.id FROM pgbroker.records r
        WHERE $7 IS NOT NULL AND r.type = $1 AND pgbroker.parse_time(r.data #>> string_to_array($7, '.')) <= $2
      UNION
      SELECT m.id FROM pgbroker.records_of_missing_users($1, ARRAY(
          SELECT c.version FROM pgbroker.changes c
          WHERE c.deleted AND c.type IN ('type.googleapis.com/user.User', 'pomerium.io/DirectoryUser')), interval '0') AS m
        WHERE $8
    ) AS e
  $query$ INTO ends USING kind, present, idle_timeout, user_limit, ttl, capacity, nullif(expiry_field, ''), missing_users;
  RETURN ends;
END
$$;
COMMENT ON FUNCTION pgbroker.would_end(text, interval, bigint, interval, bigint, text, boolean) IS
  'How many of the records that a type has now would end if these options were set; NULL leaves one out. It changes nothing.';
