DELETE FROM pgbroker.messages WHERE schema IS NULL;
DELETE FROM pgbroker.enum_values WHERE schema IS NULL;
