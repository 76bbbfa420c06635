package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
)

const (
	sessionType = typeURLPrefix + "session.Session"

	// revokeBatch is how many sessions one request revokes.
	revokeBatch = 200
	// queryPage is how many sessions of a user one request asks for. What goes meanwhile would shift the next
	// page, so it should be all of them.
	queryPage = 10000
)

func (a *app) sessionsCommand() *cobra.Command {
	cmd := group("sessions", "List and revoke sessions", a.sessionsListCommand(), a.sessionsShowCommand(), a.sessionsRevokeCommand())
	cmd.Long = `List and revoke sessions. A revoked session is deleted, and every proxy hears of it at once. What these commands do goes
through the server, so they work with any databroker. For more than they can ask, see docs/sql.md.`
	return cmd
}

// A sessionFilter chooses sessions; conditions that are not given hold for all.
type sessionFilter struct {
	user, email, idp string
	idle             time.Duration
	expired          bool
}

func (f *sessionFilter) addFlags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.user, "user", "", "only sessions of the user with this id")
	cmd.Flags().StringVar(&f.email, "email", "", "only sessions with this e-mail address")
	cmd.Flags().StringVar(&f.idp, "idp", "", "only sessions of the identity provider with this id")
	cmd.Flags().Var(longDuration{&f.idle}, "idle-for", "only sessions that have not been used for so long, such as 30d")
	cmd.Flags().BoolVar(&f.expired, "expired", false, "only sessions whose time is over")
}

func (f *sessionFilter) check() error {
	for flag, text := range map[string]string{"user": f.user, "email": f.email, "idp": f.idp} {
		if err := checkText(flag, text); err != nil {
			return err
		}
	}
	if f.idle < 0 {
		return usagef("--idle-for: %v: must not be less than 0", f.idle)
	}
	return nil
}

func (f *sessionFilter) empty() bool { return *f == sessionFilter{} }

// holds reports whether all conditions hold for a session.
func (f *sessionFilter) holds(s *session.Session, now time.Time) bool {
	return (f.user == "" || s.GetUserId() == f.user) &&
		(f.idp == "" || s.GetIdpId() == f.idp) &&
		(f.email == "" || strings.EqualFold(claim(s, "email"), f.email)) &&
		(f.idle == 0 || now.Sub(lastUsed(s)) >= f.idle) &&
		(!f.expired || s.GetExpiresAt() != nil && !s.GetExpiresAt().AsTime().After(now))
}

// lastUsed is when a session was used for the last time; one that was never used, when it was issued.
func lastUsed(s *session.Session) time.Time {
	if s.GetAccessedAt() != nil {
		return s.GetAccessedAt().AsTime()
	}
	return s.GetIssuedAt().AsTime()
}

// claim returns the first value of a claim.
func claim(s *session.Session, name string) string {
	for _, v := range s.GetClaims()[name].GetValues() {
		return v.GetStringValue()
	}
	return ""
}

// A listedSession is one line of `sessions list -o json`.
type listedSession struct {
	ID        string     `json:"id"`
	UserID    string     `json:"user_id"`
	Email     string     `json:"email,omitempty"`
	Name      string     `json:"name,omitempty"`
	IdpID     string     `json:"idp_id,omitempty"`
	IssuedAt  *time.Time `json:"issued_at,omitempty"`
	LastUsed  *time.Time `json:"last_used,omitempty"`
	ExpiresAt *time.Time `json:"expires_at,omitempty"`
	Expired   bool       `json:"expired"`
	Version   uint64     `json:"version,string"`
}

// A foundSession is a session with its place among the records.
type foundSession struct {
	id      string
	version uint64
	session *session.Session
}

func (f foundSession) listed(now time.Time) listedSession {
	at := func(t *timestamppb.Timestamp) *time.Time {
		if t == nil {
			return nil
		}
		utc := t.AsTime().UTC()
		return &utc
	}
	s := f.session
	used := s.GetAccessedAt()
	if used == nil {
		used = s.GetIssuedAt()
	}
	return listedSession{
		ID: f.id, UserID: s.GetUserId(), Email: claim(s, "email"), Name: claim(s, "name"), IdpID: s.GetIdpId(),
		IssuedAt: at(s.GetIssuedAt()), LastUsed: at(used), ExpiresAt: at(s.GetExpiresAt()),
		Expired: s.GetExpiresAt() != nil && !s.GetExpiresAt().AsTime().After(now), Version: f.version,
	}
}

// findSessions returns the sessions that a filter chooses, those that were used last in front. Those of a user the server
// looks up; for the other conditions all sessions are read.
func findSessions(ctx context.Context, c *client, f *sessionFilter) (found []foundSession, err error) {
	now := time.Now()
	choose := func(record *databroker.Record) {
		s := new(session.Session)
		if err := record.GetData().UnmarshalTo(s); err == nil && f.holds(s, now) { // else it is no session
			found = append(found, foundSession{record.GetId(), record.GetVersion(), s})
		}
	}
	if f.user == "" {
		err = readSessions(ctx, c, choose)
	} else {
		err = querySessions(ctx, c, f.user, choose)
	}
	slices.SortStableFunc(found, func(x, y foundSession) int {
		return cmp.Or(lastUsed(y.session).Compare(lastUsed(x.session)), strings.Compare(x.id, y.id))
	})
	return found, err
}

// querySessions passes on every session of a user.
func querySessions(ctx context.Context, c *client, user string, choose func(*databroker.Record)) error {
	filter := &structpb.Struct{Fields: map[string]*structpb.Value{"user_id": structpb.NewStringValue(user)}}
	for offset := int64(0); ; offset += queryPage {
		page, err := c.records.Query(ctx, &databroker.QueryRequest{Type: sessionType, Filter: filter, Offset: offset, Limit: queryPage})
		if err != nil {
			return err
		}
		for _, record := range page.GetRecords() {
			choose(record)
		}
		if len(page.GetRecords()) < queryPage {
			return nil
		}
	}
}

// readSessions passes on every session.
func readSessions(ctx context.Context, c *client, choose func(*databroker.Record)) error {
	stream, err := c.records.SyncLatest(ctx, &databroker.SyncLatestRequest{Type: sessionType})
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
			choose(record)
		}
	}
}

func (a *app) sessionsListCommand() *cobra.Command {
	var (
		filter sessionFilter
		limit  int
	)
	cmd := &cobra.Command{
		Use: "list", Short: "List sessions", Args: cobra.NoArgs,
		Long: `List sessions, those that were used last in front. The server finds those of a user by its index; otherwise all
sessions are read. Times are compared with the clock of this machine.`,
		Example: `  pgbroker sessions list --user jane
  pgbroker sessions list --idle-for 30d -o json`,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			if err := filter.check(); err != nil {
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
	now := time.Now()
	show := func(t *time.Time) string {
		if t == nil {
			return "-"
		}
		return showTime(*t)
	}
	t := newTable("ID", "USER", "EMAIL", "IDP", "LAST USED", "EXPIRES").cut(3, 2, 1)
	for _, s := range sessions {
		listed := s.listed(now)
		if a.output == outputJSON {
			if err := a.writeJSON(listed); err != nil {
				return err
			}
			continue
		}
		t.add(listed.ID, listed.UserID, listed.Email, listed.IdpID, show(listed.LastUsed), show(listed.ExpiresAt))
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
		Long: "Show one session. Its tokens and other secrets are left out unless asked for.",
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
code is that for "not found".`,
		Example: `  pgbroker sessions revoke 4fb2
  pgbroker sessions revoke --user jane
  pgbroker sessions revoke --idle-for 30d --yes`,
		Args: func(_ *cobra.Command, args []string) error {
			ids = args
			return nil
		},
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			if err := filter.check(); err != nil {
				return err
			}
			for _, id := range ids {
				if err := checkText("id", id); err != nil {
					return err
				}
			}
			switch {
			case len(ids) > 0 && !filter.empty():
				return usagef("give either ids or filters, not both")
			case len(ids) == 0 && filter.empty():
				return usagef("give the ids of sessions, or a filter such as --user")
			}
			sessions, missing, err := a.sessionsToRevoke(ctx, c, ids, &filter)
			if err != nil {
				return err
			}
			if len(sessions) > 1 && !yes {
				if err := a.confirm(ctx, fmt.Sprintf("Revoke %d sessions of %s?", len(sessions), usersOf(sessions))); err != nil {
					return err
				}
			}
			revoked, err := revokeSessions(ctx, c, sessions)
			if len(revoked) > 0 {
				err = errors.Join(err, a.showSessions(revoked))
				a.say("%d %s revoked", len(revoked), plural(len(revoked), "session"))
			}
			switch {
			case err != nil:
				return err
			case len(missing) > 0:
				return status.Errorf(codes.NotFound, "no such session: %s", strings.Join(missing, ", "))
			case len(revoked) == 0:
				a.say("no session was revoked: none is chosen by the filters")
			}
			return nil
		}),
	}
	filter.addFlags(cmd)
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
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
		response, err := c.records.Get(ctx, &databroker.GetRequest{Type: sessionType, Id: id})
		switch {
		case status.Code(err) == codes.NotFound:
			missing = append(missing, id)
			continue
		case err != nil:
			return nil, nil, err
		}
		s := new(session.Session)
		if response.GetRecord().GetData() != nil {
			if err := response.GetRecord().GetData().UnmarshalTo(s); err != nil {
				s = new(session.Session) // what it is does not matter: it goes
			}
		}
		sessions = append(sessions, foundSession{id, response.GetRecord().GetVersion(), s})
	}
	return sessions, missing, nil
}

// revokeSessions deletes sessions and returns those that were still there.
func revokeSessions(ctx context.Context, c *client, sessions []foundSession) (revoked []foundSession, err error) {
	for batch := range slices.Chunk(sessions, revokeBatch) {
		request := new(databroker.PatchRequest)
		byID := make(map[string]foundSession)
		for _, s := range batch {
			byID[s.id] = s
			request.Records = append(request.Records, &databroker.Record{Type: sessionType, Id: s.id, DeletedAt: timestamppb.Now()})
		}
		// A Patch leaves out of its answer what was gone already.
		response, err := c.records.Patch(ctx, request)
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

func plural(n int, noun string) string {
	if n == 1 {
		return noun
	}
	return noun + "s"
}

// confirm asks a person; what is not "yes" is no. The exit code is that of an interruption.
func (a *app) confirm(ctx context.Context, question string) error {
	fmt.Fprintf(a.stderr, "%s Type yes to go on: ", clean(question))
	answer := make(chan string, 1)
	go func() {
		line, err := bufio.NewReader(a.stdin).ReadString('\n')
		if err != nil && line == "" {
			fmt.Fprintln(a.stderr)
		}
		answer <- line
	}()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case line := <-answer:
		if strings.TrimSpace(line) == "yes" {
			return nil
		}
		return &exitError{exitInterrupted, errors.New("nothing was revoked (give --yes to revoke without being asked)")}
	}
}
