-- What people see: one view per known type with typed columns, joined views, and revocation by function.
--
-- A view names no payload and nothing secret. Its columns come from the projection, and what is malformed
-- there is NULL in its row and breaks nothing else. A function that a reader brings along gets to see no data of another
-- type: most views are security barriers, and those that are joined to others guard their columns themselves. The time is
-- that of the statement: a function that may change its mind from row to row would keep PostgreSQL from leaving out columns
-- that nobody asks for.

-- ---------------------------------------------------------------------------------------------
-- Sessions
-- ---------------------------------------------------------------------------------------------

CREATE VIEW pgbroker.session_data AS
  SELECT
    r.id,
    pgbroker.short_key(r.index_fields ->> 'user_id') COLLATE "C" AS user_id,
    r.expires_at,
    -- Not a security barrier, which would keep look-ups by user from their index: so what a reader's own
    -- function may be called with for a record of another type is nothing.
    CASE WHEN r.type = 'type.googleapis.com/session.Session' THEN r.data END AS data,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/session.Session';
COMMENT ON VIEW pgbroker.session_data IS 'Live sessions as JSON without secrets; what the view sessions is made of.';
COMMENT ON COLUMN pgbroker.session_data.id IS 'Session id.';
COMMENT ON COLUMN pgbroker.session_data.user_id IS 'Owner: users.id. Of more than 600 characters it is the first 500 and a hash, for the index.';
COMMENT ON COLUMN pgbroker.session_data.expires_at IS 'When it ends; it is then deleted, with a tombstone.';
COMMENT ON COLUMN pgbroker.session_data.data IS 'Projection: the payload as JSON without secrets.';
COMMENT ON COLUMN pgbroker.session_data.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.session_data.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.sessions AS
  SELECT
    s.id,
    s.user_id,
    s.data ->> 'idp_id'                                 AS idp_id,
    s.data -> 'claims' -> 'email' ->> 0                 AS email,
    s.data -> 'claims' -> 'name' ->> 0                  AS name,
    s.data -> 'claims' -> 'groups'                      AS groups,
    pgbroker.parse_time(s.data ->> 'issued_at')         AS issued_at,
    pgbroker.parse_time(s.data ->> 'accessed_at')       AS accessed_at,
    s.expires_at,
    coalesce(s.expires_at <= statement_timestamp(), false)  AS expired,
    pgbroker.parse_time(s.data -> 'oauth_token' ->> 'expires_at') AS oauth_token_expires_at,
    coalesce((s.data -> 'refresh_disabled') = 'true', false) AS refresh_disabled,
    s.data ->> 'impersonate_session_id'                 AS impersonate_session_id,
    s.data -> 'audience'                                AS audience,
    s.data -> 'device_credentials'                      AS device_credentials,
    s.data -> 'claims'                                  AS claims,
    s.version,
    s.modified_at,
    -- Never used means idle since it was issued.
    statement_timestamp() - coalesce(pgbroker.parse_time(s.data ->> 'accessed_at'),
                                 pgbroker.parse_time(s.data ->> 'issued_at'), s.modified_at) AS idle_for
  FROM pgbroker.session_data s;
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
COMMENT ON COLUMN pgbroker.sessions.idle_for IS 'How long ago it was last used.';

-- ---------------------------------------------------------------------------------------------
-- The other known types
-- ---------------------------------------------------------------------------------------------

-- Users are joined to everything, by id. Of a security barrier PostgreSQL would read all of them to find one, so
-- these guard their columns themselves, as session_data does.
CREATE VIEW pgbroker.users AS
  SELECT
    r.id,
    CASE WHEN r.type = 'type.googleapis.com/user.User' THEN r.data ->> 'name' END                 AS name,
    CASE WHEN r.type = 'type.googleapis.com/user.User' THEN r.data ->> 'email' END                AS email,
    CASE WHEN r.type = 'type.googleapis.com/user.User' THEN r.data -> 'device_credential_ids' END AS device_credential_ids,
    CASE WHEN r.type = 'type.googleapis.com/user.User' THEN r.data -> 'claims' END                AS claims,
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

CREATE VIEW pgbroker.service_accounts WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'user_id'                              AS user_id,
    r.data ->> 'description'                          AS description,
    r.data ->> 'namespace_id'                         AS namespace_id,
    r.data ->> 'originator_id'                        AS originator_id,
    pgbroker.parse_time(r.data ->> 'issued_at')       AS issued_at,
    pgbroker.parse_time(r.data ->> 'accessed_at')     AS accessed_at,
    pgbroker.parse_time(r.data ->> 'expires_at')      AS expires_at,
    coalesce(pgbroker.parse_time(r.data ->> 'expires_at') <= statement_timestamp(), false) AS expired,
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
    CASE WHEN r.type = 'pomerium.io/DirectoryUser' THEN r.data ->> 'display_name' END AS display_name,
    CASE WHEN r.type = 'pomerium.io/DirectoryUser' THEN r.data ->> 'email' END        AS email,
    CASE WHEN r.type = 'pomerium.io/DirectoryUser' THEN r.data -> 'group_ids' END     AS group_ids,
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

CREATE VIEW pgbroker.directory_groups WITH (security_barrier) AS
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

CREATE VIEW pgbroker.session_bindings WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'protocol'                                    AS protocol,
    r.data ->> 'session_id'                                  AS session_id,
    r.data ->> 'user_id'                                     AS user_id,
    pgbroker.parse_time(r.data ->> 'issued_at')              AS issued_at,
    pgbroker.parse_time(r.data ->> 'expires_at')             AS expires_at,
    coalesce(pgbroker.parse_time(r.data ->> 'expires_at') <= statement_timestamp(), false) AS expired,
    r.data -> 'details'                                      AS details,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/session.SessionBinding';
COMMENT ON VIEW pgbroker.session_bindings IS 'Keys, such as those of SSH, that are tied to a session. A DELETE unties.';
COMMENT ON COLUMN pgbroker.session_bindings.id IS 'Binding key, for SSH the fingerprint of the public key.';
COMMENT ON COLUMN pgbroker.session_bindings.protocol IS 'Protocol of the connection, such as ssh.';
COMMENT ON COLUMN pgbroker.session_bindings.session_id IS 'Bound session: sessions.id.';
COMMENT ON COLUMN pgbroker.session_bindings.user_id IS 'Owner: users.id.';
COMMENT ON COLUMN pgbroker.session_bindings.issued_at IS 'When the binding was made.';
COMMENT ON COLUMN pgbroker.session_bindings.expires_at IS 'When proxies stop honouring it; NULL never.';
COMMENT ON COLUMN pgbroker.session_bindings.expired IS 'Whether expires_at has passed.';
COMMENT ON COLUMN pgbroker.session_bindings.details IS 'Facts for the user, a JSON object.';
COMMENT ON COLUMN pgbroker.session_bindings.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.session_bindings.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.session_binding_requests WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'protocol'                                    AS protocol,
    r.data ->> 'idp_id'                                      AS idp_id,
    r.data ->> 'key'                                         AS key,
    coalesce(r.data ->> 'state', 'InFlight')                 AS state,
    pgbroker.parse_time(r.data ->> 'created_at')             AS created_at,
    pgbroker.parse_time(r.data ->> 'expires_at')             AS expires_at,
    coalesce(pgbroker.parse_time(r.data ->> 'expires_at') <= statement_timestamp(), false) AS expired,
    r.data -> 'details'                                      AS details,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/session.SessionBindingRequest';
COMMENT ON VIEW pgbroker.session_binding_requests IS 'Connections that ask for a session and wait for their user''s answer.';
COMMENT ON COLUMN pgbroker.session_binding_requests.id IS 'Code that is shown to the user.';
COMMENT ON COLUMN pgbroker.session_binding_requests.protocol IS 'Protocol of the connection, such as ssh.';
COMMENT ON COLUMN pgbroker.session_binding_requests.idp_id IS 'Identity provider to sign in with.';
COMMENT ON COLUMN pgbroker.session_binding_requests.key IS 'Binding key: session_bindings.id, once the user agrees.';
COMMENT ON COLUMN pgbroker.session_binding_requests.state IS 'InFlight, Accepted or Revoked.';
COMMENT ON COLUMN pgbroker.session_binding_requests.created_at IS 'When it was made.';
COMMENT ON COLUMN pgbroker.session_binding_requests.expires_at IS 'When it lapses.';
COMMENT ON COLUMN pgbroker.session_binding_requests.expired IS 'Whether expires_at has passed.';
COMMENT ON COLUMN pgbroker.session_binding_requests.details IS 'Facts for the user, a JSON object.';
COMMENT ON COLUMN pgbroker.session_binding_requests.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.session_binding_requests.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.identity_bindings WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'protocol' AS protocol,
    r.data ->> 'user_id'  AS user_id,
    r.data ->> 'idp_id'   AS idp_id,
    r.data -> 'details'   AS details,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/session.IdentityBinding';
COMMENT ON VIEW pgbroker.identity_bindings IS 'Keys that belong to a user, so that a session can be bound without asking. A DELETE makes the user answer again.';
COMMENT ON COLUMN pgbroker.identity_bindings.id IS 'Binding key, for SSH the fingerprint of the public key.';
COMMENT ON COLUMN pgbroker.identity_bindings.protocol IS 'Protocol of the connection, such as ssh.';
COMMENT ON COLUMN pgbroker.identity_bindings.user_id IS 'Owner: users.id.';
COMMENT ON COLUMN pgbroker.identity_bindings.idp_id IS 'Identity provider to sign in with.';
COMMENT ON COLUMN pgbroker.identity_bindings.details IS 'Facts for the user, a JSON object.';
COMMENT ON COLUMN pgbroker.identity_bindings.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.identity_bindings.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.device_types WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'name'    AS name,
    r.data -> 'webauthn' AS webauthn,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/pomerium.device.Type';
COMMENT ON VIEW pgbroker.device_types IS 'Kinds of device that a policy may ask for.';
COMMENT ON COLUMN pgbroker.device_types.id IS 'Device type id.';
COMMENT ON COLUMN pgbroker.device_types.name IS 'Display name.';
COMMENT ON COLUMN pgbroker.device_types.webauthn IS 'What is asked of the device at registration, a JSON object.';
COMMENT ON COLUMN pgbroker.device_types.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.device_types.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.device_enrollments WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'user_id'                          AS user_id,
    r.data ->> 'type_id'                          AS type_id,
    r.data ->> 'credential_id'                    AS credential_id,
    r.data ->> 'approved_by'                      AS approved_by,
    pgbroker.parse_time(r.data ->> 'enrolled_at') AS enrolled_at,
    r.data ->> 'user_agent'                       AS user_agent,
    r.data ->> 'ip_address'                       AS ip_address,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/pomerium.device.Enrollment';
COMMENT ON VIEW pgbroker.device_enrollments IS 'Devices that users have registered. A DELETE revokes the device.';
COMMENT ON COLUMN pgbroker.device_enrollments.id IS 'Enrollment id.';
COMMENT ON COLUMN pgbroker.device_enrollments.user_id IS 'Owner: users.id.';
COMMENT ON COLUMN pgbroker.device_enrollments.type_id IS 'Device type: device_types.id.';
COMMENT ON COLUMN pgbroker.device_enrollments.credential_id IS 'Credential: device_credentials.id.';
COMMENT ON COLUMN pgbroker.device_enrollments.approved_by IS 'Who approved the device; NULL while nobody has.';
COMMENT ON COLUMN pgbroker.device_enrollments.enrolled_at IS 'When it was registered.';
COMMENT ON COLUMN pgbroker.device_enrollments.user_agent IS 'Browser that registered it, as it named itself.';
COMMENT ON COLUMN pgbroker.device_enrollments.ip_address IS 'Address from which it was registered.';
COMMENT ON COLUMN pgbroker.device_enrollments.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.device_enrollments.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.device_credentials WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'user_id'       AS user_id,
    r.data ->> 'type_id'       AS type_id,
    r.data ->> 'enrollment_id' AS enrollment_id,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/pomerium.device.Credential';
COMMENT ON VIEW pgbroker.device_credentials IS 'What devices prove themselves with. A DELETE revokes.';
COMMENT ON COLUMN pgbroker.device_credentials.id IS 'Credential id.';
COMMENT ON COLUMN pgbroker.device_credentials.user_id IS 'Owner: users.id.';
COMMENT ON COLUMN pgbroker.device_credentials.type_id IS 'Device type: device_types.id.';
COMMENT ON COLUMN pgbroker.device_credentials.enrollment_id IS 'Registration: device_enrollments.id.';
COMMENT ON COLUMN pgbroker.device_credentials.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.device_credentials.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.device_owner_credentials WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'owner_id' AS owner_id,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/pomerium.device.OwnerCredentialRecord';
COMMENT ON VIEW pgbroker.device_owner_credentials IS 'Credentials that are reserved for their owner.';
COMMENT ON COLUMN pgbroker.device_owner_credentials.id IS 'Credential id.';
COMMENT ON COLUMN pgbroker.device_owner_credentials.owner_id IS 'Handle of the owner, in base64.';
COMMENT ON COLUMN pgbroker.device_owner_credentials.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.device_owner_credentials.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.oauth_authorization_requests WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'client_id'     AS client_id,
    r.data ->> 'user_id'       AS user_id,
    r.data ->> 'session_id'    AS session_id,
    r.data ->> 'redirect_uri'  AS redirect_uri,
    r.data ->> 'response_type' AS response_type,
    r.data -> 'scopes'         AS scopes,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/oauth21.AuthorizationRequest';
COMMENT ON VIEW pgbroker.oauth_authorization_requests IS 'OAuth requests of clients that are not answered yet.';
COMMENT ON COLUMN pgbroker.oauth_authorization_requests.id IS 'Request id.';
COMMENT ON COLUMN pgbroker.oauth_authorization_requests.client_id IS 'Client: oauth_clients.id.';
COMMENT ON COLUMN pgbroker.oauth_authorization_requests.user_id IS 'User who is asked: users.id.';
COMMENT ON COLUMN pgbroker.oauth_authorization_requests.session_id IS 'The user''s session: sessions.id.';
COMMENT ON COLUMN pgbroker.oauth_authorization_requests.redirect_uri IS 'Where the user is sent afterwards.';
COMMENT ON COLUMN pgbroker.oauth_authorization_requests.response_type IS 'What the client wants in return.';
COMMENT ON COLUMN pgbroker.oauth_authorization_requests.scopes IS 'Scopes asked for, a JSON list.';
COMMENT ON COLUMN pgbroker.oauth_authorization_requests.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.oauth_authorization_requests.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.oauth_clients WITH (security_barrier) AS
  SELECT
    r.id,
    pgbroker.parse_time(r.data -> 'client_secret' ->> 'created_at') AS secret_created_at,
    pgbroker.parse_time(r.data -> 'client_secret' ->> 'expires_at') AS secret_expires_at,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/ietf.rfc7591.v1.ClientRegistration';
COMMENT ON VIEW pgbroker.oauth_clients IS 'Clients registered by OAuth dynamic client registration.';
COMMENT ON COLUMN pgbroker.oauth_clients.id IS 'Client id.';
COMMENT ON COLUMN pgbroker.oauth_clients.secret_created_at IS 'When the client''s secret was made; NULL if it has none.';
COMMENT ON COLUMN pgbroker.oauth_clients.secret_expires_at IS 'When the client''s secret expires; NULL never.';
COMMENT ON COLUMN pgbroker.oauth_clients.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.oauth_clients.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.mcp_refresh_tokens WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'user_id'                                     AS user_id,
    r.data ->> 'client_id'                                   AS client_id,
    r.data ->> 'idp_id'                                      AS idp_id,
    pgbroker.parse_time(r.data ->> 'issued_at')              AS issued_at,
    pgbroker.parse_time(r.data ->> 'expires_at')             AS expires_at,
    coalesce(pgbroker.parse_time(r.data ->> 'expires_at') <= statement_timestamp(), false) AS expired,
    coalesce((r.data -> 'revoked') = 'true', false)          AS revoked,
    r.data -> 'scopes'                                       AS scopes,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/oauth21.MCPRefreshToken';
COMMENT ON VIEW pgbroker.mcp_refresh_tokens IS 'Refresh tokens given to MCP clients, without the tokens. A DELETE revokes.';
COMMENT ON COLUMN pgbroker.mcp_refresh_tokens.id IS 'Token id.';
COMMENT ON COLUMN pgbroker.mcp_refresh_tokens.user_id IS 'Owner: users.id.';
COMMENT ON COLUMN pgbroker.mcp_refresh_tokens.client_id IS 'Client: oauth_clients.id.';
COMMENT ON COLUMN pgbroker.mcp_refresh_tokens.idp_id IS 'Identity provider that vouches for the user.';
COMMENT ON COLUMN pgbroker.mcp_refresh_tokens.issued_at IS 'When it was issued.';
COMMENT ON COLUMN pgbroker.mcp_refresh_tokens.expires_at IS 'When it expires.';
COMMENT ON COLUMN pgbroker.mcp_refresh_tokens.expired IS 'Whether expires_at has passed.';
COMMENT ON COLUMN pgbroker.mcp_refresh_tokens.revoked IS 'Whether it was revoked.';
COMMENT ON COLUMN pgbroker.mcp_refresh_tokens.scopes IS 'Scopes granted, a JSON list.';
COMMENT ON COLUMN pgbroker.mcp_refresh_tokens.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.mcp_refresh_tokens.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.upstream_mcp_tokens WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'user_id'                                     AS user_id,
    r.data ->> 'route_id'                                    AS route_id,
    r.data ->> 'upstream_server'                             AS upstream_server,
    pgbroker.parse_time(r.data ->> 'issued_at')              AS issued_at,
    pgbroker.parse_time(r.data ->> 'expires_at')             AS expires_at,
    coalesce(pgbroker.parse_time(r.data ->> 'expires_at') <= statement_timestamp(), false) AS expired,
    pgbroker.parse_time(r.data ->> 'refresh_expires_at')     AS refresh_expires_at,
    r.data ->> 'client_id'                                   AS client_id,
    r.data ->> 'authorization_server_issuer'                 AS authorization_server_issuer,
    r.data -> 'scopes'                                       AS scopes,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/oauth21.UpstreamMCPToken';
COMMENT ON VIEW pgbroker.upstream_mcp_tokens IS 'Users'' tokens for upstream MCP servers, without the tokens. A DELETE makes the user sign in there again.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.id IS 'Route, server and user.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.user_id IS 'Owner: users.id.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.route_id IS 'Route that it is for.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.upstream_server IS 'URL of the upstream server.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.issued_at IS 'When it was issued.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.expires_at IS 'When the access token expires.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.expired IS 'Whether expires_at has passed.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.refresh_expires_at IS 'When the refresh token expires.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.client_id IS 'Client id at the authorization server.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.authorization_server_issuer IS 'Issuer name of the authorization server.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.scopes IS 'Scopes granted, a JSON list.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.upstream_mcp_tokens.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.pending_upstream_auths WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'user_id'                                     AS user_id,
    r.data ->> 'route_id'                                    AS route_id,
    r.data ->> 'upstream_server'                             AS upstream_server,
    r.data ->> 'downstream_host'                             AS downstream_host,
    pgbroker.parse_time(r.data ->> 'created_at')             AS created_at,
    pgbroker.parse_time(r.data ->> 'expires_at')             AS expires_at,
    coalesce(pgbroker.parse_time(r.data ->> 'expires_at') <= statement_timestamp(), false) AS expired,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/oauth21.PendingUpstreamAuth';
COMMENT ON VIEW pgbroker.pending_upstream_auths IS 'Sign-ins at upstream MCP servers that users have not finished.';
COMMENT ON COLUMN pgbroker.pending_upstream_auths.id IS 'Downstream host and user.';
COMMENT ON COLUMN pgbroker.pending_upstream_auths.user_id IS 'Who signs in: users.id.';
COMMENT ON COLUMN pgbroker.pending_upstream_auths.route_id IS 'Route that it is for.';
COMMENT ON COLUMN pgbroker.pending_upstream_auths.upstream_server IS 'URL of the upstream server.';
COMMENT ON COLUMN pgbroker.pending_upstream_auths.downstream_host IS 'Host that the user visited here.';
COMMENT ON COLUMN pgbroker.pending_upstream_auths.created_at IS 'When the sign-in began.';
COMMENT ON COLUMN pgbroker.pending_upstream_auths.expires_at IS 'When it lapses.';
COMMENT ON COLUMN pgbroker.pending_upstream_auths.expired IS 'Whether expires_at has passed.';
COMMENT ON COLUMN pgbroker.pending_upstream_auths.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.pending_upstream_auths.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.upstream_oauth_clients WITH (security_barrier) AS
  SELECT
    r.id,
    r.data ->> 'issuer'                          AS issuer,
    r.data ->> 'downstream_host'                 AS downstream_host,
    r.data ->> 'client_id'                       AS client_id,
    r.data ->> 'registration_endpoint'           AS registration_endpoint,
    pgbroker.parse_time(r.data ->> 'created_at') AS created_at,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/oauth21.UpstreamOAuthClient';
COMMENT ON VIEW pgbroker.upstream_oauth_clients IS 'Clients registered at upstream authorization servers, without their secrets.';
COMMENT ON COLUMN pgbroker.upstream_oauth_clients.id IS 'Downstream host and issuer.';
COMMENT ON COLUMN pgbroker.upstream_oauth_clients.issuer IS 'Issuer name of the authorization server.';
COMMENT ON COLUMN pgbroker.upstream_oauth_clients.downstream_host IS 'Host for which it was registered.';
COMMENT ON COLUMN pgbroker.upstream_oauth_clients.client_id IS 'Client id there.';
COMMENT ON COLUMN pgbroker.upstream_oauth_clients.registration_endpoint IS 'Where it was registered.';
COMMENT ON COLUMN pgbroker.upstream_oauth_clients.created_at IS 'When it was registered.';
COMMENT ON COLUMN pgbroker.upstream_oauth_clients.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.upstream_oauth_clients.modified_at IS 'Time of the latest write.';

CREATE VIEW pgbroker.last_errors WITH (security_barrier) AS
  SELECT
    r.id,
    pgbroker.parse_time(r.data ->> 'time') AS time,
    r.data ->> 'message'                   AS message,
    r.version,
    r.modified_at
  FROM pgbroker.records r
  WHERE r.type = 'type.googleapis.com/pomerium.events.LastError';
COMMENT ON VIEW pgbroker.last_errors IS 'The latest error of each kind that proxies have reported.';
COMMENT ON COLUMN pgbroker.last_errors.id IS 'Kind of error: the metric that counts it.';
COMMENT ON COLUMN pgbroker.last_errors.time IS 'When it happened.';
COMMENT ON COLUMN pgbroker.last_errors.message IS 'What happened.';
COMMENT ON COLUMN pgbroker.last_errors.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.last_errors.modified_at IS 'Time of the latest write.';

-- ---------------------------------------------------------------------------------------------
-- Joined
-- ---------------------------------------------------------------------------------------------

CREATE VIEW pgbroker.directory_members AS
  SELECT
    m.group_id,
    CASE WHEN g.type = 'pomerium.io/DirectoryGroup' THEN g.data ->> 'name' END AS group_name,
    u.id                                                                       AS user_id,
    u.display_name,
    u.email
  FROM pgbroker.directory_users u
  -- unnest is taken to return ten rows, jsonb_array_elements_text a hundred: plans are made for what comes.
  CROSS JOIN LATERAL unnest(ARRAY(SELECT jsonb_array_elements_text(
    CASE jsonb_typeof(u.group_ids) WHEN 'array' THEN u.group_ids ELSE '[]' END))) AS m (group_id)
  LEFT JOIN pgbroker.records g ON g.type = 'pomerium.io/DirectoryGroup' AND g.id = m.group_id;
COMMENT ON VIEW pgbroker.directory_members IS 'Who is in which group of the company directory: a row for each membership.';
COMMENT ON COLUMN pgbroker.directory_members.group_id IS 'Group: directory_groups.id.';
COMMENT ON COLUMN pgbroker.directory_members.group_name IS 'Display name of the group; NULL if the directory does not have it.';
COMMENT ON COLUMN pgbroker.directory_members.user_id IS 'User: directory_users.id.';
COMMENT ON COLUMN pgbroker.directory_members.display_name IS 'Display name of the user.';
COMMENT ON COLUMN pgbroker.directory_members.email IS 'E-mail address of the user.';

CREATE VIEW pgbroker.session_details AS
  SELECT
    s.id,
    s.user_id,
    coalesce(u.name, d.display_name, s.name)  AS name,
    coalesce(u.email, d.email, s.email)       AS email,
    s.idp_id,
    (SELECT array_agg(m.group_id ORDER BY m.group_id)
     FROM pgbroker.directory_members m WHERE m.user_id = s.user_id) AS group_ids,
    (SELECT array_agg(coalesce(m.group_name, m.group_id) ORDER BY coalesce(m.group_name, m.group_id))
     FROM pgbroker.directory_members m WHERE m.user_id = s.user_id) AS groups,
    s.issued_at,
    s.accessed_at,
    s.idle_for,
    s.expires_at,
    s.expired,
    s.device_credentials,
    s.version,
    s.modified_at
  FROM pgbroker.sessions s
  LEFT JOIN pgbroker.users u ON u.id = s.user_id
  LEFT JOIN pgbroker.directory_users d ON d.id = s.user_id;
COMMENT ON VIEW pgbroker.session_details IS 'Live sessions with what is known of their user. To revoke, DELETE from sessions.';
COMMENT ON COLUMN pgbroker.session_details.id IS 'Session id.';
COMMENT ON COLUMN pgbroker.session_details.user_id IS 'Owner: users.id.';
COMMENT ON COLUMN pgbroker.session_details.name IS 'Name of the user: as signed in, else of the directory, else of the session''s claims.';
COMMENT ON COLUMN pgbroker.session_details.email IS 'E-mail address of the user, found like the name.';
COMMENT ON COLUMN pgbroker.session_details.idp_id IS 'Identity provider that authenticated the session.';
COMMENT ON COLUMN pgbroker.session_details.group_ids IS 'Groups that the directory has the user in.';
COMMENT ON COLUMN pgbroker.session_details.groups IS 'Display names of these groups.';
COMMENT ON COLUMN pgbroker.session_details.issued_at IS 'When the session was created.';
COMMENT ON COLUMN pgbroker.session_details.accessed_at IS 'When it was last used, to within seconds.';
COMMENT ON COLUMN pgbroker.session_details.idle_for IS 'How long ago it was last used.';
COMMENT ON COLUMN pgbroker.session_details.expires_at IS 'When it ends.';
COMMENT ON COLUMN pgbroker.session_details.expired IS 'Whether expires_at has passed.';
COMMENT ON COLUMN pgbroker.session_details.device_credentials IS 'Device credentials known to the session, a JSON list.';
COMMENT ON COLUMN pgbroker.session_details.version IS 'Record version of the latest write.';
COMMENT ON COLUMN pgbroker.session_details.modified_at IS 'Time of the latest write.';

-- ---------------------------------------------------------------------------------------------
-- The broker itself
-- ---------------------------------------------------------------------------------------------

CREATE VIEW pgbroker.type_summary AS
  SELECT
    CASE WHEN starts_with(t.type, 'type.googleapis.com/') THEN substr(t.type, 21) ELSE t.type END AS name,
    t.record_count AS records,
    (SELECT c.changed_at FROM pgbroker.changes c
     WHERE c.type = t.type AND NOT c.deleted ORDER BY c.version DESC LIMIT 1) AS written_at,
    t.capacity,
    t.ttl,
    t.expiry_field,
    t.idle_timeout,
    t.user_limit,
    t.end_sessions_of_missing_users,
    t.audited,
    t.projected_fields AS looked_up_by,
    t.index_version = t.indexed_version AS up_to_date,
    t.type
  FROM pgbroker.record_types t;
COMMENT ON VIEW pgbroker.type_summary IS 'The record types: how many records each has, and for how long they stay.';
COMMENT ON COLUMN pgbroker.type_summary.name IS 'Record type, short.';
COMMENT ON COLUMN pgbroker.type_summary.records IS 'Live records, counted exactly.';
COMMENT ON COLUMN pgbroker.type_summary.written_at IS 'When a live record of the type was last written.';
COMMENT ON COLUMN pgbroker.type_summary.capacity IS 'How many records are kept, those written last; NULL all.';
COMMENT ON COLUMN pgbroker.type_summary.ttl IS 'Records not written for longer are deleted; NULL never.';
COMMENT ON COLUMN pgbroker.type_summary.expiry_field IS 'Payload field whose time, once passed, deletes the record; NULL never.';
COMMENT ON COLUMN pgbroker.type_summary.idle_timeout IS 'Records whose accessed_at is longer ago are deleted; NULL never.';
COMMENT ON COLUMN pgbroker.type_summary.user_limit IS 'How many records one user may have; NULL any number.';
COMMENT ON COLUMN pgbroker.type_summary.end_sessions_of_missing_users IS 'Whether records end when their user is deleted or goes from the directory.';
COMMENT ON COLUMN pgbroker.type_summary.audited IS 'Whether deletions are audited.';
COMMENT ON COLUMN pgbroker.type_summary.looked_up_by IS 'Payload fields that look-ups find by index.';
COMMENT ON COLUMN pgbroker.type_summary.up_to_date IS 'Whether that and the expiry hold for every record already; if not, that is being done in the background.';
COMMENT ON COLUMN pgbroker.type_summary.type IS 'Record type in full.';

CREATE VIEW pgbroker.change_log AS
  SELECT
    c.version,
    c.changed_at,
    CASE WHEN c.deleted THEN 'delete' ELSE 'put' END         AS change,
    CASE WHEN starts_with(c.type, 'type.googleapis.com/') THEN substr(c.type, 21) ELSE c.type END AS what,
    c.id,
    c.deleted,
    c.type
  FROM pgbroker.changes c;
COMMENT ON VIEW pgbroker.change_log IS
  'The latest change of each live record, and the deletions of the last days, in the order in which they became visible.';
COMMENT ON COLUMN pgbroker.change_log.version IS 'Position in the one global order of changes.';
COMMENT ON COLUMN pgbroker.change_log.changed_at IS 'When, by the database''s clock.';
COMMENT ON COLUMN pgbroker.change_log.change IS 'put or delete.';
COMMENT ON COLUMN pgbroker.change_log.what IS 'Type of the changed record, short.';
COMMENT ON COLUMN pgbroker.change_log.id IS 'Id of the changed record.';
COMMENT ON COLUMN pgbroker.change_log.deleted IS 'Whether this is a tombstone.';
COMMENT ON COLUMN pgbroker.change_log.type IS 'Type of the changed record in full.';

CREATE VIEW pgbroker.revocations AS
  SELECT
    a.at,
    a.change,
    a.cause,
    CASE WHEN starts_with(a.type, 'type.googleapis.com/') THEN substr(a.type, 21) ELSE a.type END AS what,
    a.id,
    a.user_id,
    a.became,
    a.role AS by_role,
    a.acting_role,
    a.key,
    a.on_behalf_of,
    a.application,
    a.address,
    a.records,
    a.number
  FROM pgbroker.audit a;
COMMENT ON VIEW pgbroker.revocations IS 'Who revoked what, or gave it to another user, when, how and from where: the audit for people.';
COMMENT ON COLUMN pgbroker.revocations.at IS 'When.';
COMMENT ON COLUMN pgbroker.revocations.change IS
  'ended: the record is gone; moved: it belongs to another user; shortened: it expires sooner, or has; emptied: it has lost its payload, or the message of its type in there.';
COMMENT ON COLUMN pgbroker.revocations.cause IS
  'request: of a gRPC client; sql: a statement; expiry, idle, ttl, limit, capacity, user: an option of the type; clear: everything was deleted; repair: pgbroker check found that it was gone.';
COMMENT ON COLUMN pgbroker.revocations.what IS 'Type of the record, short.';
COMMENT ON COLUMN pgbroker.revocations.id IS 'Id of the record; NULL after clear.';
COMMENT ON COLUMN pgbroker.revocations.user_id IS 'User whom it belonged to.';
COMMENT ON COLUMN pgbroker.revocations.became IS 'The user whom a record that was moved belongs to now, or the time at which one that was shortened expires.';
COMMENT ON COLUMN pgbroker.revocations.by_role IS 'Role that did it: the one that has logged in.';
COMMENT ON COLUMN pgbroker.revocations.acting_role IS 'Role that it had taken on with SET ROLE; NULL if none.';
COMMENT ON COLUMN pgbroker.revocations.key IS 'Of a request: name of the key that signed it.';
COMMENT ON COLUMN pgbroker.revocations.on_behalf_of IS 'Of a request: the person behind it, as its sender says; nobody has checked that.';
COMMENT ON COLUMN pgbroker.revocations.application IS 'Program that did it; for a request the replica.';
COMMENT ON COLUMN pgbroker.revocations.address IS 'Where it was connected from; NULL for a local socket.';
COMMENT ON COLUMN pgbroker.revocations.records IS 'How many records: 1, and after clear all of the type.';
COMMENT ON COLUMN pgbroker.revocations.number IS 'Order of the entries.';

CREATE VIEW pgbroker.live_leases WITH (security_barrier) AS
  -- Without the id: whoever knows that may release the lease.
  SELECT l.name, l.acquired_at, l.expires_at,
         CASE WHEN isfinite(l.expires_at) THEN l.expires_at - statement_timestamp() END AS remaining
  FROM pgbroker.leases l
  WHERE l.expires_at > statement_timestamp();
COMMENT ON VIEW pgbroker.live_leases IS 'Jobs that somebody does at the moment.';
COMMENT ON COLUMN pgbroker.live_leases.name IS 'The job.';
COMMENT ON COLUMN pgbroker.live_leases.acquired_at IS 'When the present holder took it.';
COMMENT ON COLUMN pgbroker.live_leases.expires_at IS 'When it ends unless renewed.';
COMMENT ON COLUMN pgbroker.live_leases.remaining IS 'How long that is from now; NULL for ever.';

CREATE VIEW pgbroker.live_services AS
  SELECT
    coalesce((ARRAY['databroker', 'authorize', 'authenticate', 'proxy', 'registry', 'console', 'metrics'])[s.kind],
             s.kind::text) AS kind,
    s.endpoint,
    s.reported_at,
    s.expires_at,
    CASE WHEN isfinite(s.expires_at) THEN s.expires_at - statement_timestamp() END AS remaining
  FROM pgbroker.services s
  WHERE s.expires_at > statement_timestamp();
COMMENT ON VIEW pgbroker.live_services IS 'Services that have reported themselves and not gone silent.';
COMMENT ON COLUMN pgbroker.live_services.kind IS 'What it does.';
COMMENT ON COLUMN pgbroker.live_services.endpoint IS 'URL of the service.';
COMMENT ON COLUMN pgbroker.live_services.reported_at IS 'When it was last reported.';
COMMENT ON COLUMN pgbroker.live_services.expires_at IS 'When it leaves the list unless reported again.';
COMMENT ON COLUMN pgbroker.live_services.remaining IS 'How long that is from now; NULL for ever.';

-- ---------------------------------------------------------------------------------------------
-- Revoking
-- ---------------------------------------------------------------------------------------------

-- As the owner: who may execute these may end sessions, and needs no right to the table.

-- Sessions that a policy hides are not to look as if they were not there: row_security is off, which makes that an error.
CREATE FUNCTION pgbroker.revoke_session(session_id text) RETURNS boolean
  LANGUAGE plpgsql SECURITY DEFINER SET row_security = off SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  DELETE FROM pgbroker.records r WHERE r.type = 'type.googleapis.com/session.Session' AND r.id = session_id;
  RETURN FOUND;
END
$$;
COMMENT ON FUNCTION pgbroker.revoke_session(text) IS 'Revokes a session; false if there is none with that id.';

CREATE FUNCTION pgbroker.revoke_user_sessions(user_id text) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER SET row_security = off SET search_path = pg_catalog, pg_temp AS $$
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

CREATE FUNCTION pgbroker.revoke_idp_sessions(idp_id text) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER SET row_security = off SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  revoked bigint;
BEGIN
  DELETE FROM pgbroker.records r
    WHERE r.type = 'type.googleapis.com/session.Session'
      AND r.index_fields @> jsonb_build_object('idp_id', revoke_idp_sessions.idp_id);
  GET DIAGNOSTICS revoked = ROW_COUNT;
  RETURN revoked;
END
$$;
COMMENT ON FUNCTION pgbroker.revoke_idp_sessions(text) IS
  'Revokes every session that an identity provider has authenticated and returns how many.';
REVOKE EXECUTE ON FUNCTION pgbroker.revoke_session(text), pgbroker.revoke_user_sessions(text), pgbroker.revoke_idp_sessions(text) FROM PUBLIC;
