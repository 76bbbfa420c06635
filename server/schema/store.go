package schema

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/reflect/protoreflect"

	"pgbroker/db"
)

// validName is what the database accepts as the name of a set.
var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// CheckName returns an error if a set cannot have that name.
func CheckName(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("schema name %.80q: want up to 63 lower-case letters, digits, dots, dashes and underscores, a letter or digit first", name)
	}
	return nil
}

// Knowledge is what a replica has to know to read payloads, in one state.
type Knowledge struct {
	Version  int64 // of the state; it ascends
	Types    *Types
	Redacted []protoreflect.FullName // fields that projections leave out, besides those that descriptors mark
}

// Load reads the present state. Sets that do not fit the program any more are left out, and problems says which, and
// why; that is no reason for a replica not to work with the rest.
func Load(ctx context.Context, queries *db.Queries) (known *Knowledge, problems, err error) {
	known = new(Knowledge)
	// First, so that what is read after it is at least of that version.
	if known.Version, err = queries.SchemaVersion(ctx); err != nil {
		return nil, nil, err
	}
	sets, err := stored(ctx, queries)
	if err != nil {
		return nil, nil, err
	}
	rules, err := queries.RedactedFieldsList(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, rule := range rules {
		known.Redacted = append(known.Redacted, protoreflect.FullName(rule.Message+"."+rule.Field))
	}
	known.Types, problems = New(sets)
	return known, problems, nil
}

func stored(ctx context.Context, queries *db.Queries) ([]Set, error) {
	rows, err := queries.SchemasList(ctx)
	if err != nil {
		return nil, err
	}
	sets := make([]Set, len(rows))
	for i, row := range rows {
		sets[i] = Set{Name: row.Name, Descriptors: row.DescriptorSet}
	}
	return sets, nil
}

// beginner is a pool or a connection.
type beginner interface {
	Begin(ctx context.Context) (pgx.Tx, error)
}

// Add stores a set, or replaces the one of its name, and returns what it declares. A set that is broken, contradicts
// another or could not read records that are stored already is refused.
func Add(ctx context.Context, database beginner, set Set) (Definitions, error) {
	if err := CheckName(set.Name); err != nil {
		return Definitions{}, err
	}
	var added Definitions
	err := change(ctx, database, func(sets []Set) ([]Set, error) {
		before, _ := New(sets)
		sets = without(sets, set.Name)
		rest, _ := New(sets)
		after, err := rest.with(set)
		if err != nil {
			return nil, err
		}
		added = after.Definitions()[set.Name]
		if len(added.Messages) == 0 {
			return nil, fmt.Errorf("schema %s: holds no message that is not known already", set.Name)
		}
		if err := Incompatible(before.Definitions()[set.Name], added); err != nil {
			return nil, fmt.Errorf("schema %s: %w", set.Name, err)
		}
		return append(sets, set), nil
	}, func(queries *db.Queries) error {
		return queries.SchemaPut(ctx, db.SchemaPutParams{Name: set.Name, DescriptorSet: set.Descriptors})
	})
	return added, err
}

// ErrNotFound is the error of Remove where there is nothing to remove.
var ErrNotFound = errors.New("there is no schema of that name")

// Remove removes a set. Records of its types stay, without projections.
func Remove(ctx context.Context, database beginner, name string) error {
	return change(ctx, database, func(sets []Set) ([]Set, error) {
		rest := without(sets, name)
		if len(rest) == len(sets) {
			return nil, fmt.Errorf("%w: %q", ErrNotFound, name)
		}
		return rest, nil
	}, func(queries *db.Queries) error {
		_, err := queries.SchemaDelete(ctx, name)
		return err
	})
}

// change makes another list of sets of the present one, writes down what they declare, and last stores the difference:
// that takes the order lock. Sets that do not fit any more are of no concern here; replicas log them.
func change(ctx context.Context, database beginner, do func([]Set) ([]Set, error), store func(*db.Queries) error) error {
	return pgx.BeginFunc(ctx, database, func(tx pgx.Tx) error {
		queries := db.New(tx)
		if err := queries.SchemasLock(ctx); err != nil {
			return err
		}
		before, err := stored(ctx, queries)
		if err != nil {
			return err
		}
		sets, err := do(before)
		if err != nil {
			return err
		}
		slices.SortFunc(sets, func(a, b Set) int { return strings.Compare(a.Name, b.Name) })
		types, _ := New(sets)
		if err := define(ctx, queries, types); err != nil {
			return err
		}
		return store(queries)
	})
}

func without(sets []Set, name string) []Set {
	return slices.DeleteFunc(slices.Clone(sets), func(s Set) bool { return s.Name == name })
}

// define writes down what all sets declare, for SQL.
func define(ctx context.Context, queries *db.Queries, types *Types) error {
	if err := queries.MessagesForget(ctx); err != nil {
		return err
	}
	if err := queries.EnumValuesForget(ctx); err != nil {
		return err
	}
	bySet := types.Definitions()
	for _, set := range slices.Sorted(maps.Keys(bySet)) {
		var messages db.MessagesAddParams
		messages.Schema = set
		for _, m := range bySet[set].Messages {
			messages.Messages = append(messages.Messages, m.Name)
			messages.Forms = append(messages.Forms, m.Form)
		}
		var fields db.MessageFieldsAddParams
		for _, f := range bySet[set].Fields {
			fields.Messages = append(fields.Messages, f.Message)
			fields.Numbers = append(fields.Numbers, f.Number)
			fields.Names = append(fields.Names, f.Name)
			fields.JsonNames = append(fields.JsonNames, f.JSONName)
			fields.Kinds = append(fields.Kinds, f.Kind)
			fields.Labels = append(fields.Labels, f.Label)
			fields.TypeNames = append(fields.TypeNames, f.TypeName)
			fields.MapKeys = append(fields.MapKeys, f.MapKey)
			fields.Oneofs = append(fields.Oneofs, f.Oneof)
			fields.Secrets = append(fields.Secrets, f.Secret)
		}
		var values db.EnumValuesAddParams
		values.Schema = set
		for _, v := range bySet[set].EnumValues {
			values.Enums = append(values.Enums, v.Enum)
			values.Positions = append(values.Positions, v.Position)
			values.Names = append(values.Names, v.Name)
			values.Numbers = append(values.Numbers, v.Number)
		}
		if err := queries.MessagesAdd(ctx, messages); err != nil {
			return err
		}
		if err := queries.MessageFieldsAdd(ctx, fields); err != nil {
			return err
		}
		if err := queries.EnumValuesAdd(ctx, values); err != nil {
			return err
		}
	}
	return nil
}
