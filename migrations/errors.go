package migrations

import "fmt"

// TooOldError says that the schema lacks migrations that this program needs.
type TooOldError struct {
	Version uint // of the schema; 0: there is none
	Latest  uint // that this program knows
}

func (e *TooOldError) Error() string {
	if e.Version == 0 {
		return fmt.Sprintf("the database has no pgbroker schema (need version %d); run: pgbroker migrate up", e.Latest)
	}
	return fmt.Sprintf("the database schema is at version %d, this pgbroker needs version %d; run: pgbroker migrate up",
		e.Version, e.Latest)
}

// TooNewError says that the schema was made by a newer program, so that this
// one cannot tell how to revert it.
type TooNewError struct {
	Version uint // of the schema
	Latest  uint // that this program knows
}

func (e *TooNewError) Error() string {
	return fmt.Sprintf("the database schema is at version %d, this pgbroker knows versions up to %d; "+
		"use the newer pgbroker for this", e.Version, e.Latest)
}

// DirtyError says that a migration was interrupted that does not run in a
// transaction, so that nobody knows how much of it was done.
type DirtyError struct {
	Version  uint // of the interrupted migration
	Previous uint // the version before it; 0: none
	Unknown  bool // it is one of a newer program
}

func (e *DirtyError) Error() string {
	if e.Unknown {
		return fmt.Sprintf("the database schema is dirty: migration %d was interrupted, which this pgbroker does not know; "+
			"run the newer one, which says what to do: pgbroker migrate up", e.Version)
	}
	return fmt.Sprintf("the database schema is dirty: migration %d was interrupted; look at what it did, undo the rest of it by hand, "+
		"run: pgbroker migrate force %d, then: pgbroker migrate up (or, if it did all of its work, run: pgbroker migrate force %d)",
		e.Version, e.Previous, e.Version)
}

// MigrationError says that a migration failed.
type MigrationError struct {
	Version    uint   // of the migration
	Direction  string // "up" or "down"
	Line       uint   // of its file; 0: unknown
	RolledBack bool   // nothing of it was done, for certain
	Err        error  // often a *pgconn.PgError
}

func (e *MigrationError) Error() string {
	at, outcome := "", "failed"
	if e.Line > 0 {
		at = fmt.Sprintf(", line %d", e.Line)
	}
	if e.RolledBack {
		outcome = "failed and was rolled back"
	}
	return fmt.Sprintf("migration %d (%s%s) %s: %v", e.Version, e.Direction, at, outcome, e.Err)
}

func (e *MigrationError) Unwrap() error { return e.Err }
