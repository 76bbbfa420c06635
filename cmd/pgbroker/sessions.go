package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/text/unicode/norm"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/cmd/pgbroker/duration"
	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
)

const (
	sessionType = typeURLPrefix + "session.Session"

	// revokeBatch is how many sessions one request revokes.
	revokeBatch = 200
	// queryPage is how many records one request asks for. What goes meanwhile would shift the next page, so it should be all
	// of them.
	queryPage = 10000
	// queryValuesBatch is how many values one request looks up.
	queryValuesBatch = 500
)

func (a *app) sessionsCommand() *cobra.Command {
	cmd := group("sessions", "List and revoke sessions", a.sessionsListCommand(), a.sessionsShowCommand(), a.sessionsOrphansCommand(), a.sessionsRevokeCommand())
	cmd.Long = `List and revoke sessions. A revoked session is deleted, and every proxy hears of it at once. What these commands do goes
through the server, so they work with any databroker. For more than they can ask, see docs/sql.md.

Name and e-mail address are those of the user's record, else those of the directory, else those of the session's claims. --email
finds all of them, whatever the case and however accents are written.`
	return cmd
}

// A sessionFilter chooses sessions; conditions that are not given hold for all.
type sessionFilter struct {
	user, email, idp, group string
	claims                  []string // name=value
	idle                    time.Duration
	expired                 bool
	except                  []string
}

func (f *sessionFilter) addFlags(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.user, "user", "", "only sessions of the user with this id")
	flags.StringVar(&f.email, "email", "", "only sessions whose user or claims have this e-mail address")
	flags.StringVar(&f.idp, "idp", "", "only sessions of the identity provider with this id")
	flags.StringVar(&f.group, "group", "", "only sessions of the members of a group: its id or name in the directory, or a value of the claim groups")
	flags.StringArrayVar(&f.claims, "claim", nil, "only sessions with this claim, as name=value; may be repeated")
	duration.Var(flags, &f.idle, "idle-for", 0, nil, "only sessions that have not been used for so long, such as 30d")
	flags.BoolVar(&f.expired, "expired", false, "only sessions whose time is over")
	flags.StringArrayVar(&f.except, "except", nil, "not the session with this id; may be repeated")
}

// check refuses values that cannot be meant. An empty one would be a script's variable that is not set, and choose
// everybody's sessions.
func (f *sessionFilter) check(flags *pflag.FlagSet) error {
	texts := map[string][]string{"user": {f.user}, "email": {f.email}, "idp": {f.idp}, "group": {f.group}, "claim": f.claims, "except": f.except}
	for flag, values := range texts {
		for _, text := range values {
			if flags.Changed(flag) && strings.TrimSpace(text) == "" {
				return usagef("--%s: must not be empty", flag)
			}
			if err := checkText(flag, text); err != nil {
				return err
			}
		}
	}
	for _, claim := range f.claims {
		if name, _, ok := strings.Cut(claim, "="); !ok || name == "" {
			return usagef("--claim: %.60q: want name=value", claim)
		}
	}
	if f.idle < 0 || f.idle == 0 && flags.Changed("idle-for") {
		return usagef("--idle-for: %v: must be more than 0", f.idle)
	}
	return nil
}

// empty reports whether there is no condition. What is excepted is none: it chooses nothing by itself.
func (f *sessionFilter) empty() bool {
	return f.user == "" && f.email == "" && f.idp == "" && f.group == "" && len(f.claims) == 0 && f.idle == 0 && !f.expired
}

// holds reports whether all conditions hold for a session.
func (f *sessionFilter) holds(s *foundSession, people *people, now time.Time) bool {
	return (f.user == "" || s.session.GetUserId() == f.user) &&
		(f.idp == "" || s.session.GetIdpId() == f.idp) &&
		(f.email == "" || people.emailed[s.session.GetUserId()] || hasEmail(s.session.GetClaims(), f.email)) &&
		(f.group == "" || people.members[s.session.GetUserId()] || hasClaim(s.session.GetClaims(), "groups", f.group)) &&
		!slices.ContainsFunc(f.claims, func(claim string) bool {
			name, value, _ := strings.Cut(claim, "=")
			return !hasClaim(s.session.GetClaims(), name, value)
		}) &&
		(f.idle == 0 || now.Sub(s.lastUsed()) >= f.idle) &&
		(!f.expired || s.session.GetExpiresAt() != nil && !s.session.GetExpiresAt().AsTime().After(now)) &&
		!slices.Contains(f.except, s.id)
}

// emailKey is the same for e-mail addresses that people take for the same: whatever the case, and however accents are written.
func emailKey(address string) string {
	return strings.ToLower(norm.NFC.String(strings.TrimSpace(address)))
}

// hasEmail reports whether one of the e-mail claims is an address.
func hasEmail(claims map[string]*structpb.ListValue, address string) bool {
	return slices.ContainsFunc(claims["email"].GetValues(), func(v *structpb.Value) bool {
		return emailKey(v.GetStringValue()) == emailKey(address)
	})
}

// hasClaim reports whether a claim has a value. Numbers and booleans are as JSON writes them.
func hasClaim(claims map[string]*structpb.ListValue, name, value string) bool {
	return slices.ContainsFunc(claims[name].GetValues(), func(v *structpb.Value) bool {
		switch kind := v.GetKind().(type) {
		case *structpb.Value_StringValue:
			return kind.StringValue == value
		case *structpb.Value_NumberValue:
			return strconv.FormatFloat(kind.NumberValue, 'f', -1, 64) == value
		case *structpb.Value_BoolValue:
			return strconv.FormatBool(kind.BoolValue) == value
		}
		return false
	})
}

// claim returns the first value of a claim.
func claim(s *session.Session, name string) string {
	for _, v := range s.GetClaims()[name].GetValues() {
		return v.GetStringValue()
	}
	return ""
}

// A listedSession is one line of `sessions list -o json`. Its members are columns of the view session_details.
type listedSession struct {
	ID         string     `json:"id"`
	UserID     string     `json:"user_id"`
	Name       string     `json:"name,omitempty"`
	Email      string     `json:"email,omitempty"`
	IdpID      string     `json:"idp_id,omitempty"`
	IssuedAt   *time.Time `json:"issued_at,omitempty"`
	AccessedAt *time.Time `json:"accessed_at,omitempty"`
	ExpiresAt  *time.Time `json:"expires_at,omitempty"`
	Expired    bool       `json:"expired"`
	Version    uint64     `json:"version"`
	ModifiedAt *time.Time `json:"modified_at,omitempty"`
}

// A foundSession is a session with its place among the records.
type foundSession struct {
	id       string
	version  uint64
	modified *timestamppb.Timestamp
	session  *session.Session
	known    person // of whom it is
}

// lastUsed is when a session was used for the last time; one that was never used, when it was issued, or else written.
func (f *foundSession) lastUsed() time.Time {
	for _, t := range []*timestamppb.Timestamp{f.session.GetAccessedAt(), f.session.GetIssuedAt(), f.modified} {
		if t != nil && t.IsValid() {
			return t.AsTime()
		}
	}
	return time.Now() // a server that does not say when it was written: it cannot be called idle
}

func (f *foundSession) listed(now time.Time) listedSession {
	at := func(t *timestamppb.Timestamp) *time.Time {
		if t == nil {
			return nil
		}
		utc := t.AsTime().UTC()
		return &utc
	}
	s := f.session
	return listedSession{
		ID: f.id, UserID: s.GetUserId(), Name: cmp.Or(f.known.name, claim(s, "name")), Email: cmp.Or(f.known.email, claim(s, "email")),
		IdpID: s.GetIdpId(), IssuedAt: at(s.GetIssuedAt()), AccessedAt: at(s.GetAccessedAt()), ExpiresAt: at(s.GetExpiresAt()),
		Expired: s.GetExpiresAt() != nil && !s.GetExpiresAt().AsTime().After(now), Version: f.version, ModifiedAt: at(f.modified),
	}
}

// findSessions returns the sessions that a filter chooses, those that were used last in front. Those of a user or an e-mail
// address the server looks up; for the other conditions all sessions are read.
func findSessions(ctx context.Context, c *client, f *sessionFilter) (found []foundSession, err error) {
	now := time.Now()
	people, err := findPeople(ctx, c, f)
	if err != nil {
		return nil, err
	}
	seen := make(map[string]bool)
	choose := func(record *databroker.Record) {
		s := foundSession{id: record.GetId(), version: record.GetVersion(), modified: record.GetModifiedAt(), session: new(session.Session)}
		err := record.GetData().UnmarshalTo(s.session)
		if err == nil && !seen[s.id] && f.holds(&s, people, now) { // else it is no session
			seen[s.id] = true
			found = append(found, s)
		}
	}
	switch {
	case f.user != "":
		err = queryValues(ctx, c, sessionType, "user_id", []string{f.user}, choose)
	case f.email != "" && searchable(f.email):
		err = errors.Join(queryText(ctx, c, sessionType, f.email, choose),
			queryValues(ctx, c, sessionType, "user_id", slices.Sorted(maps.Keys(people.emailed)), choose))
	default:
		err = readRecords(ctx, c, sessionType, choose)
	}
	if err == nil {
		err = introduce(ctx, c, found)
	}
	slices.SortStableFunc(found, func(x, y foundSession) int {
		return cmp.Or(y.lastUsed().Compare(x.lastUsed()), strings.Compare(x.id, y.id))
	})
	return found, err
}

// queryValues passes on every record of a type in which a field has one of the given values.
func queryValues(ctx context.Context, c *client, recordType, field string, values []string, pass func(*databroker.Record)) error {
	for batch := range slices.Chunk(values, queryValuesBatch) {
		list := new(structpb.ListValue)
		for _, value := range batch {
			list.Values = append(list.Values, structpb.NewStringValue(value))
		}
		filter := &structpb.Struct{Fields: map[string]*structpb.Value{field: structpb.NewListValue(list)}}
		if err := queryPages(ctx, c, &databroker.QueryRequest{Type: recordType, Filter: filter}, pass); err != nil {
			return err
		}
	}
	return nil
}

// queryText passes on every record of a type that has a text.
func queryText(ctx context.Context, c *client, recordType, text string, pass func(*databroker.Record)) error {
	return queryPages(ctx, c, &databroker.QueryRequest{Type: recordType, Query: strings.TrimSpace(text)}, pass)
}

func queryPages(ctx context.Context, c *client, request *databroker.QueryRequest, pass func(*databroker.Record)) error {
	for request.Limit = queryPage; ; request.Offset += queryPage {
		page, err := c.records.Query(ctx, request)
		if err != nil {
			return err
		}
		for _, record := range page.GetRecords() {
			pass(record)
		}
		if len(page.GetRecords()) < queryPage {
			return nil
		}
	}
}

// readRecords passes on every record of a type.
func readRecords(ctx context.Context, c *client, recordType string, pass func(*databroker.Record)) error {
	stream, err := c.records.SyncLatest(ctx, &databroker.SyncLatestRequest{Type: recordType})
	if err != nil {
		return err
	}
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if record := response.GetRecord(); record != nil && record.GetDeletedAt() == nil {
			pass(record)
		}
	}
}

func (a *app) sessionsListCommand() *cobra.Command {
	var (
		filter sessionFilter
		limit  int
	)
	cmd := &cobra.Command{
		Use: "list", Short: "List sessions", Args: noArgs,
		Long: `List sessions, those that were used last in front. The server finds those of a user by its index, and those of an e-mail
address by their texts; otherwise all sessions are read. Times are compared with the clock of this machine. A session that was
never used counts as used when it was issued.`,
		Example: `  pgbroker sessions list --user jane
  pgbroker sessions list --idle-for 30d -o json
  pgbroker sessions list --group Engineering --claim amr=pwd`,
		RunE: a.call(func(ctx context.Context, cmd *cobra.Command, c *client) error {
			if err := filter.check(cmd.Flags()); err != nil {
				return err
			}
			if limit < 0 {
				return usagef("--limit: %d: must not be less than 0", limit)
			}
			sessions, err := findSessions(ctx, c, &filter)
			if err != nil {
				return err
			}
			if limit > 0 {
				sessions = sessions[:min(limit, len(sessions))]
			}
			return a.showSessions(sessions)
		}),
	}
	filter.addFlags(cmd)
	cmd.Flags().IntVar(&limit, "limit", 0, "longest list; 0 for all")
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

func (a *app) showSessions(sessions []foundSession) error {
	return a.showSessionsWith(sessions, "", nil)
}

// showSessionsWith shows sessions with one more column, which more returns for each, with what is shown as JSON.
func (a *app) showSessionsWith(sessions []foundSession, column string, more func(*foundSession, listedSession) (string, any)) error {
	now := time.Now()
	show := func(t *time.Time) string {
		if t == nil {
			return "-"
		}
		return showTime(*t)
	}
	header := []string{"ID", "USER", "EMAIL", "IDP", "LAST USED", "EXPIRES"}
	if column != "" {
		header = append(header, column)
	}
	t := newTable(header...).cut(3, 2, 1, 0)
	for i := range sessions {
		listed := sessions[i].listed(now)
		used := sessions[i].lastUsed()
		cells := []string{listed.ID, listed.UserID, listed.Email, listed.IdpID, show(&used), show(listed.ExpiresAt)}
		var line any = listed
		if more != nil {
			cell, object := more(&sessions[i], listed)
			cells, line = append(cells, cell), object
		}
		if a.output == outputJSON {
			if err := a.writeJSON(line); err != nil {
				return err
			}
			continue
		}
		t.add(cells...)
	}
	if a.output == outputJSON {
		return nil
	}
	return t.write(a.stdout)
}

func (a *app) sessionsShowCommand() *cobra.Command {
	var id string
	cmd := &cobra.Command{
		Use: "show ID", Short: "Show one session",
		Long: "Show one session. Its tokens and other secrets are left out unless asked for. " + dashHelp,
		Args: oneText(&id, "ID"),
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			if err := checkText("id", id); err != nil {
				return err
			}
			response, err := c.records.Get(ctx, &databroker.GetRequest{Type: sessionType, Id: id})
			if err != nil {
				return err
			}
			return a.showRecord(response.GetRecord())
		}),
	}
	a.addSecretsFlag(cmd)
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

// oneText accepts one argument.
func oneText(text *string, name string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("want one argument, %s, not %d", name, len(args))
		}
		*text = args[0]
		return nil
	}
}

// dashHelp says how an id that looks like a flag is given.
const dashHelp = "An id that begins with - comes after --: sessions show -- -4fb2."

func (a *app) sessionsRevokeCommand() *cobra.Command {
	var (
		filter sessionFilter
		ids    []string
		yes    bool
	)
	cmd := &cobra.Command{
		Use: "revoke [ID...]", Short: "Revoke sessions",
		Long: `Revoke the sessions with the given ids, or those that the filters choose, and show them. To revoke more than one it asks,
unless --yes is given. Every proxy hears of it at once. When some of the ids do not exist, the others are revoked and the exit
code is that for "not found". When the filters choose none, it has an exit code of its own. When it is interrupted, it ends the
request that is under way, and says what was revoked and what was not. The audit names whoever runs it. ` + dashHelp,
		Example: `  pgbroker sessions revoke 4fb2
  pgbroker sessions revoke --user jane --except 4fb2
  pgbroker sessions revoke --idle-for 30d --yes`,
		Args: func(_ *cobra.Command, args []string) error {
			ids = args
			return nil
		},
		RunE: a.call(func(ctx context.Context, cmd *cobra.Command, c *client) error {
			if err := filter.check(cmd.Flags()); err != nil {
				return err
			}
			for _, id := range ids {
				if id == "" {
					return usagef("one of the ids is empty")
				}
				if err := checkText("id", id); err != nil {
					return err
				}
			}
			switch {
			case len(ids) > 0 && !filter.empty():
				return usagef("give either ids or filters, not both")
			case len(ids) > 0 && len(filter.except) > 0:
				return usagef("--except: is for filters; leave the id out instead")
			case len(ids) == 0 && filter.empty():
				return usagef("give the ids of sessions, or a filter such as --user")
			}
			sessions, missing, err := a.sessionsToRevoke(ctx, c, ids, &filter)
			if err != nil {
				return untouched(ctx, err, "nothing was revoked")
			}
			if len(sessions) == 0 && len(missing) == 0 {
				return &exitError{exitNoneMatched, errors.New("no session was revoked: none is chosen by the filters")}
			}
			if len(sessions) > 1 && !yes {
				question := fmt.Sprintf("Revoke %d sessions of %s?", len(sessions), usersOf(sessions))
				if err := a.confirm(ctx, question, "nothing was revoked"); err != nil {
					return err
				}
			}
			revoked, err := revokeSessions(ctx, c, sessions)
			if len(revoked) > 0 {
				if shown := a.showSessions(revoked); shown != nil && err == nil {
					err = shown
				}
			}
			if err != nil {
				return unfinished(ctx, c.explain(err), fmt.Sprintf("%d of %d %s revoked", len(revoked), len(sessions), plural(len(sessions), "session")))
			}
			if len(revoked) > 0 {
				a.say("%d %s revoked", len(revoked), plural(len(revoked), "session"))
			}
			switch {
			case len(missing) > 0:
				return status.Errorf(codes.NotFound, "no such session: %s", strings.Join(missing, ", "))
			case len(revoked) == 0:
				return &exitError{exitNoneMatched, errors.New("no session was revoked: all have ended meanwhile")}
			}
			return nil
		}),
	}
	filter.addFlags(cmd)
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	a.addPersonFlag(cmd)
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

// sessionsToRevoke returns the sessions that are meant, and the ids of which there is none.
func (a *app) sessionsToRevoke(ctx context.Context, c *client, ids []string, filter *sessionFilter) (sessions []foundSession, missing []string, err error) {
	if len(ids) == 0 {
		sessions, err = findSessions(ctx, c, filter)
		return sessions, nil, err
	}
	for _, id := range ids {
		if slices.ContainsFunc(sessions, func(s foundSession) bool { return s.id == id }) {
			continue
		}
		response, err := c.records.Get(ctx, &databroker.GetRequest{Type: sessionType, Id: id})
		switch {
		case status.Code(err) == codes.NotFound:
			missing = append(missing, id)
			continue
		case err != nil:
			return nil, nil, err
		}
		record := response.GetRecord()
		s := foundSession{id: id, version: record.GetVersion(), modified: record.GetModifiedAt(), session: new(session.Session)}
		if record.GetData() != nil {
			if err := record.GetData().UnmarshalTo(s.session); err != nil {
				s.session = new(session.Session) // what it is does not matter: it goes
			}
		}
		sessions = append(sessions, s)
	}
	return sessions, missing, introduce(ctx, c, sessions)
}

// revokeSessions deletes sessions and returns those that were still there. A request that is under way when ctx ends is waited
// for, so that it is known what has become of each session.
func revokeSessions(ctx context.Context, c *client, sessions []foundSession) (revoked []foundSession, err error) {
	for batch := range slices.Chunk(sessions, revokeBatch) {
		if ctx.Err() != nil {
			return revoked, ctx.Err()
		}
		request := new(databroker.PatchRequest)
		byID := make(map[string]foundSession)
		for _, s := range batch {
			byID[s.id] = s
			request.Records = append(request.Records, &databroker.Record{Type: sessionType, Id: s.id, DeletedAt: timestamppb.Now()})
		}
		// A Patch leaves out of its answer what was gone already.
		response, err := c.records.Patch(context.WithoutCancel(ctx), request)
		if err != nil {
			return revoked, err
		}
		for _, record := range response.GetRecords() {
			s := byID[record.GetId()]
			s.version = record.GetVersion()
			revoked = append(revoked, s)
		}
	}
	return revoked, nil
}

// usersOf names the users of sessions, a few of them.
func usersOf(sessions []foundSession) string {
	var users []string
	known := make(map[string]bool)
	for _, s := range sessions {
		if id := s.session.GetUserId(); !known[id] {
			known[id] = true
			users = append(users, id)
		}
	}
	const most = 3
	if len(users) > most {
		return fmt.Sprintf("%s and %d others", strings.Join(users[:most], ", "), len(users)-most)
	}
	return strings.Join(users, ", ")
}

// plural returns the noun for so many; the plural is the one given, or has an s.
func plural(n int, noun string, several ...string) string {
	switch {
	case n == 1:
		return noun
	case len(several) > 0:
		return several[0]
	}
	return noun + "s"
}

// confirm asks a person; what is not "yes" is no. The exit code is that of an interruption. Where there is no person to ask,
// nothing is read: the input may be a list that a script goes through.
func (a *app) confirm(ctx context.Context, question, otherwise string) error {
	if a.person == nil {
		return usagef("%s This is no terminal, so nobody can be asked: %s (give --yes to go on without being asked)", question, otherwise)
	}
	fmt.Fprintf(a.stderr, "%s Type yes to go on: ", clean(question))
	answer := make(chan string, 1)
	go func() {
		line, err := bufio.NewReader(a.person).ReadString('\n')
		if err != nil && line == "" {
			fmt.Fprintln(a.stderr)
		}
		answer <- line
	}()
	select {
	case <-ctx.Done():
		fmt.Fprintln(a.stderr)
		return untouched(ctx, ctx.Err(), otherwise)
	case line := <-answer:
		if strings.TrimSpace(line) == "yes" {
			return nil
		}
		return &exitError{exitInterrupted, fmt.Errorf("%s (give --yes to go on without being asked)", otherwise)}
	}
}
