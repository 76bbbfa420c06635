package db

// Queries, its parameters and its rows are generated from queries/*.sql and from the
// schema that migrations/*.up.sql build, as sqlc.yaml says. sqlc is pinned here and is
// no dependency of the module; it needs neither a database nor a C compiler.

//go:generate env CGO_ENABLED=0 go run github.com/sqlc-dev/sqlc/cmd/sqlc@v1.31.1 generate --file ../sqlc.yaml
