package main

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"pgbroker/proto/databroker"
	"pgbroker/proto/session"
)

// A listedOrphan is one line of `sessions orphans -o json`.
type listedOrphan struct {
	listedSession
	MissingFrom []string `json:"missing_from"`
}

func (a *app) sessionsOrphansCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "orphans", Short: "List sessions whose user is missing", Args: noArgs,
		Long: `List sessions of users of whom there is no record, or who are not in the directory, if that has any users. All sessions and
users are read. To have such sessions ended when a user goes, see 'pgbroker types set --end-sessions-of-missing-users'.`,
		Example: `  pgbroker sessions orphans
  pgbroker sessions orphans -o json | jq -r .id |
    xargs pgbroker sessions revoke --yes --`,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			known := map[string]map[string]bool{userType: {}, directoryUserType: {}}
			for recordType, ids := range known {
				if err := readRecords(ctx, c, recordType, func(record *databroker.Record) { ids[record.GetId()] = true }); err != nil {
					return err
				}
			}
			// Sessions after their users: one that has begun meanwhile is none without a user.
			sessions, err := findSessions(ctx, c, new(sessionFilter))
			if err != nil {
				return err
			}
			missingFrom := func(s *session.Session) (missing []string) {
				if !known[userType][s.GetUserId()] {
					missing = append(missing, "users")
				}
				if directory := known[directoryUserType]; len(directory) > 0 && !directory[s.GetUserId()] {
					missing = append(missing, "directory")
				}
				return missing
			}
			sessions = slices.DeleteFunc(sessions, func(s foundSession) bool { return len(missingFrom(s.session)) == 0 })
			return a.showSessionsWith(sessions, "MISSING FROM", func(s *foundSession, listed listedSession) (string, any) {
				missing := missingFrom(s.session)
				return strings.Join(missing, ", "), listedOrphan{listed, missing}
			})
		}),
	}
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}
