package main

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/structpb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/user"
)

// The types that say who the user of a session is.
const (
	userType           = typeURLPrefix + "user.User"
	directoryUserType  = "pomerium.io/DirectoryUser"
	directoryGroupType = "pomerium.io/DirectoryGroup"
)

// people is what a filter needs to know of users: those that have its e-mail address, and those in its group.
type people struct {
	emailed, members map[string]bool // by user id
}

// A person is how a user is shown.
type person struct{ name, email string }

// searchable reports whether a text query finds an e-mail address wherever it is: what the server searches may have accents in
// another form.
func searchable(address string) bool {
	return !strings.ContainsFunc(address, func(r rune) bool { return r >= utf8.RuneSelf })
}

// findPeople looks up what a filter needs.
func findPeople(ctx context.Context, c *client, f *sessionFilter) (*people, error) {
	found := &people{emailed: make(map[string]bool), members: make(map[string]bool)}
	if f.email != "" {
		search := readRecords
		if searchable(f.email) {
			search = func(ctx context.Context, c *client, recordType string, pass func(*databroker.Record)) error {
				return queryText(ctx, c, recordType, f.email, pass)
			}
		}
		err := errors.Join(
			search(ctx, c, userType, func(record *databroker.Record) {
				u := new(user.User)
				if record.GetData().UnmarshalTo(u) == nil && (emailKey(u.GetEmail()) == emailKey(f.email) || hasEmail(u.GetClaims(), f.email)) {
					found.emailed[record.GetId()] = true
				}
			}),
			search(ctx, c, directoryUserType, func(record *databroker.Record) {
				if emailKey(directoryText(record, "email")) == emailKey(f.email) {
					found.emailed[record.GetId()] = true
				}
			}))
		if err != nil {
			return nil, err
		}
	}
	if f.group != "" {
		ids := map[string]bool{f.group: true}
		if err := readRecords(ctx, c, directoryGroupType, func(record *databroker.Record) {
			if directoryText(record, "name") == f.group {
				ids[record.GetId()] = true
			}
		}); err != nil {
			return nil, err
		}
		if err := readRecords(ctx, c, directoryUserType, func(record *databroker.Record) {
			if slices.ContainsFunc(directoryField(record, "group_ids").GetListValue().GetValues(), func(v *structpb.Value) bool {
				return ids[v.GetStringValue()]
			}) {
				found.members[record.GetId()] = true
			}
		}); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// directoryField returns a field of a record of the directory; nil if there is none.
func directoryField(record *databroker.Record, name string) *structpb.Value {
	data := new(structpb.Struct)
	if record.GetData().UnmarshalTo(data) != nil {
		return nil
	}
	return data.GetFields()[name]
}

func directoryText(record *databroker.Record, name string) string {
	return directoryField(record, name).GetStringValue()
}

// introduce adds to sessions what is known of their users, as the view session_details does.
func introduce(ctx context.Context, c *client, sessions []foundSession) error {
	known := make(map[string]person)
	for i := range sessions {
		known[sessions[i].session.GetUserId()] = person{}
	}
	delete(known, "")
	// More than a few pages of users are all of them.
	const most = 10 * queryValuesBatch
	get := readRecords
	if len(known) <= most {
		ids := slices.Sorted(maps.Keys(known))
		get = func(ctx context.Context, c *client, recordType string, pass func(*databroker.Record)) error {
			return queryValues(ctx, c, recordType, "id", ids, pass)
		}
	}
	learn := func(id, name, email string) {
		if old, asked := known[id]; asked {
			known[id] = person{cmp.Or(old.name, name), cmp.Or(old.email, email)}
		}
	}
	if len(known) > 0 {
		if err := get(ctx, c, userType, func(record *databroker.Record) {
			u := new(user.User)
			if record.GetData().UnmarshalTo(u) == nil {
				learn(record.GetId(), u.GetName(), u.GetEmail())
			}
		}); err != nil {
			return err
		}
		if err := get(ctx, c, directoryUserType, func(record *databroker.Record) {
			learn(record.GetId(), directoryText(record, "display_name"), directoryText(record, "email"))
		}); err != nil {
			return err
		}
	}
	for i := range sessions {
		sessions[i].known = known[sessions[i].session.GetUserId()]
	}
	return nil
}
