DROP FUNCTION pgbroker.revoke_user_sessions(text);
DROP FUNCTION pgbroker.revoke_session(text);
DROP VIEW pgbroker.directory_groups;
DROP VIEW pgbroker.directory_users;
DROP VIEW pgbroker.service_accounts;
DROP VIEW pgbroker.users;
DROP VIEW pgbroker.sessions;
