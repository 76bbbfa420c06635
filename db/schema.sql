-- For sqlc alone, which reads this before the migrations: they find the schema made by the migrator, or by whoever has made
-- it for a role that may create none, and sqlc does not look into the DO block that asks.
CREATE SCHEMA pgbroker;
