-- What people see and do: one view per known type, and revocation by function.

CREATE VIEW pgbroker.sessions AS
  SELECT
    r.id,
    r.data ->> 'user_id'                                AS user_id,
    r.data ->> 'idp_id'                                 AS idp_id,
    r.data -> 'claims' -> 'email' ->> 0                 AS email,
    r.data -> 'claims' -> 'name' ->> 0                  AS name,
    r.data -> 'claims' -> 'groups'                      AS groups,
    (r.data ->> 'issued_at')::timestamptz               AS issued_at,
    (r.data ->> 'accessed_at')::timestamptz             AS accessed_at,
    r.expires_at,
    coalesce(r.expires_at <= clock_timestamp(), false)  AS expired,
    (r.data -> 'oauth_token' ->> 'expires_at')::timestamptz AS oauth_token_expires_at,
    coalesce((r.data ->> 'refresh_disabled')::boolean, false) AS refresh_disabled,
    r.data ->> 'impersonate_session_id'                 AS impersonate_session_id,
    r.data -> 'audience'                                AS audience,
    r.data -> 'device_credentials'                      AS device_credentials,
    r.data -> 'claims'                                  AS claims,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/session.Session';
COMMENT ON VIEW pgbroker.sessions IS 'Live sessions. DELETE FROM pgbroker.sessions WHERE … revokes.';
COMMENT ON COLUMN pgbroker.sessions.id IS 'Session id.';
COMMENT ON COLUMN pgbroker.sessions.user_id IS 'Owner: users.id.';
COMMENT ON COLUMN pgbroker.sessions.idp_id IS 'Identity provider that authenticated the session.';
COMMENT ON COLUMN pgbroker.sessions.email IS 'First e-mail claim.';
COMMENT ON COLUMN pgbroker.sessions.name IS 'First name claim.';
COMMENT ON COLUMN pgbroker.sessions.groups IS 'Groups claim, a JSON list.';
COMMENT ON COLUMN pgbroker.sessions.issued_at IS 'When it was created.';
COMMENT ON COLUMN pgbroker.sessions.accessed_at IS 'When it was last used, to within seconds.';
COMMENT ON COLUMN pgbroker.sessions.expires_at IS 'When it ends; it is then deleted, with a tombstone.';
COMMENT ON COLUMN pgbroker.sessions.expired IS 'Whether expires_at has passed.';
COMMENT ON COLUMN pgbroker.sessions.oauth_token_expires_at IS 'When the provider''s access token ends.';
COMMENT ON COLUMN pgbroker.sessions.refresh_disabled IS 'Whether the session is never refreshed.';
COMMENT ON COLUMN pgbroker.sessions.impersonate_session_id IS 'Session that this one acts as.';
COMMENT ON COLUMN pgbroker.sessions.audience IS 'Hosts that the session is for, a JSON list.';
COMMENT ON COLUMN pgbroker.sessions.device_credentials IS 'Device credentials known to the session, a JSON list.';
COMMENT ON COLUMN pgbroker.sessions.claims IS 'All claims, a JSON object of lists.';
COMMENT ON COLUMN pgbroker.sessions.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.sessions.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.users AS
  SELECT
    r.id,
    r.data ->> 'name'                    AS name,
    r.data ->> 'email'                   AS email,
    r.data -> 'device_credential_ids'    AS device_credential_ids,
    r.data -> 'claims'                   AS claims,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/user.User';
COMMENT ON VIEW pgbroker.users IS 'Users who have signed in.';
COMMENT ON COLUMN pgbroker.users.id IS 'User id, as the identity provider names the user.';
COMMENT ON COLUMN pgbroker.users.name IS 'Display name.';
COMMENT ON COLUMN pgbroker.users.email IS 'E-mail address.';
COMMENT ON COLUMN pgbroker.users.device_credential_ids IS 'Registered device credentials, a JSON list of ids.';
COMMENT ON COLUMN pgbroker.users.claims IS 'All claims, a JSON object of lists.';
COMMENT ON COLUMN pgbroker.users.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.users.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.service_accounts AS
  SELECT
    r.id,
    r.data ->> 'user_id'                    AS user_id,
    r.data ->> 'description'                AS description,
    r.data ->> 'namespace_id'               AS namespace_id,
    r.data ->> 'originator_id'              AS originator_id,
    (r.data ->> 'issued_at')::timestamptz   AS issued_at,
    (r.data ->> 'accessed_at')::timestamptz AS accessed_at,
    (r.data ->> 'expires_at')::timestamptz  AS expires_at,
    coalesce((r.data ->> 'expires_at')::timestamptz <= clock_timestamp(), false) AS expired,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/user.ServiceAccount';
COMMENT ON VIEW pgbroker.service_accounts IS 'Service accounts. A DELETE revokes.';
COMMENT ON COLUMN pgbroker.service_accounts.id IS 'Service account id.';
COMMENT ON COLUMN pgbroker.service_accounts.user_id IS 'User that the account acts as.';
COMMENT ON COLUMN pgbroker.service_accounts.description IS 'What it is for.';
COMMENT ON COLUMN pgbroker.service_accounts.namespace_id IS 'Namespace that it belongs to.';
COMMENT ON COLUMN pgbroker.service_accounts.originator_id IS 'System that created it.';
COMMENT ON COLUMN pgbroker.service_accounts.issued_at IS 'When it was created.';
COMMENT ON COLUMN pgbroker.service_accounts.accessed_at IS 'When it was last used.';
COMMENT ON COLUMN pgbroker.service_accounts.expires_at IS 'When it stops being valid; NULL never.';
COMMENT ON COLUMN pgbroker.service_accounts.expired IS 'Whether expires_at has passed.';
COMMENT ON COLUMN pgbroker.service_accounts.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.service_accounts.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.directory_users AS
  SELECT
    r.id,
    r.data ->> 'display_name' AS display_name,
    r.data ->> 'email'        AS email,
    r.data -> 'group_ids'     AS group_ids,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'pomerium.io/DirectoryUser';
COMMENT ON VIEW pgbroker.directory_users IS 'Users of the company directory.';
COMMENT ON COLUMN pgbroker.directory_users.id IS 'User id: users.id of one who has signed in.';
COMMENT ON COLUMN pgbroker.directory_users.display_name IS 'Display name.';
COMMENT ON COLUMN pgbroker.directory_users.email IS 'E-mail address.';
COMMENT ON COLUMN pgbroker.directory_users.group_ids IS 'Groups of the user, a JSON list of directory_groups.id.';
COMMENT ON COLUMN pgbroker.directory_users.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.directory_users.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.directory_groups AS
  SELECT
    r.id,
    r.data ->> 'name'  AS name,
    r.data ->> 'email' AS email,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'pomerium.io/DirectoryGroup';
COMMENT ON VIEW pgbroker.directory_groups IS 'Groups of the company directory.';
COMMENT ON COLUMN pgbroker.directory_groups.id IS 'Group id.';
COMMENT ON COLUMN pgbroker.directory_groups.name IS 'Display name.';
COMMENT ON COLUMN pgbroker.directory_groups.email IS 'E-mail address.';
COMMENT ON COLUMN pgbroker.directory_groups.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.directory_groups.modified_at IS 'Time of the latest write.';

CREATE FUNCTION pgbroker.revoke_session(session_id text) RETURNS boolean
  LANGUAGE plpgsql AS $$
BEGIN
  DELETE FROM pgbroker.records r WHERE r.type = 'type.googleapis.com/session.Session' AND r.id = session_id;
  RETURN FOUND;
END
$$;
COMMENT ON FUNCTION pgbroker.revoke_session(text) IS 'Revokes a session; false if there is none with that id.';

CREATE FUNCTION pgbroker.revoke_user_sessions(user_id text) RETURNS bigint
  LANGUAGE plpgsql AS $$
DECLARE
  revoked bigint;
BEGIN
  DELETE FROM pgbroker.records r
    WHERE r.type = 'type.googleapis.com/session.Session'
      AND r.index_fields @> jsonb_build_object('user_id', revoke_user_sessions.user_id);
  GET DIAGNOSTICS revoked = ROW_COUNT;
  RETURN revoked;
END
$$;
COMMENT ON FUNCTION pgbroker.revoke_user_sessions(text) IS 'Revokes every session of a user and returns how many.';
