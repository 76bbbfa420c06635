package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"pgbroker/db"
)

const (
	// maxProblems bounds what one look takes into memory. A repair looks again until nothing is left.
	maxProblems = 100_000
	// maxProblemsShown bounds the table that a person reads; -o json has all.
	maxProblemsShown = 50
	// repairBatch bounds how long one repair holds the order lock.
	repairBatch = 500
)

// A problem is one line of `check -o json`. Its keys are the columns of pgbroker.problems().
type problem struct {
	Problem    string `json:"problem"`
	Subject    string `json:"subject"`
	ID         string `json:"id,omitempty"`
	Version    int64  `json:"version"`
	Detail     string `json:"detail"`
	Repairable bool   `json:"repairable"`
}

func (a *app) checkCommand() *cobra.Command {
	var quick, repair bool
	cmd := addDatabaseFlags(&cobra.Command{
		Use: "check", Short: "Check that the books agree, and repair them", Args: noArgs,
		Long: `Check that records, change log, counts, index, search texts, epochs, options and triggers agree, and say where they do not.
Everything is read once, while the replicas serve; --quick leaves the records out, as 'pgbroker serve' does at its start.

The books disagree after what triggers did not see: statements under session_replication_role = replica, disabled triggers, a
restore of some of the tables. Then proxies keep sessions that are gone here, or do not know some that are.

--repair puts right what can be, as the owner of the schema. What it does to records gets versions, so every stream hears of it:
what is gone here is deleted everywhere, and what is here is sent again. The exit code is 8 while problems are left.`,
		Example: `  pgbroker check
  pgbroker check --repair
  pgbroker check --quick -o json`,
		RunE: a.withDatabase(func(ctx context.Context, _ *cobra.Command, conn *pgx.Conn) error {
			queries := db.New(conn)
			if repair {
				if err := a.repairAll(ctx, queries); err != nil {
					return err
				}
			}
			found, err := findProblems(ctx, queries, quick && !repair)
			if err != nil {
				return err
			}
			return a.showProblems(found, repair)
		}),
	})
	cmd.Flags().BoolVar(&quick, "quick", false, "check the installation only, and not every record")
	cmd.Flags().BoolVar(&repair, "repair", false, "put right what can be, and check again")
	cmd.MarkFlagsMutuallyExclusive("quick", "repair")
	a.addOutputFlag(cmd)
	return cmd
}

func findProblems(ctx context.Context, queries *db.Queries, quick bool) ([]problem, error) {
	var found []problem
	if quick {
		rows, err := queries.SetupProblemsList(ctx)
		for _, r := range rows {
			found = append(found, problem{Problem: r.Problem, Subject: r.Subject, Detail: r.Detail, Repairable: r.Repairable})
		}
		return found, err
	}
	rows, err := queries.ProblemsList(ctx, maxProblems)
	for _, r := range rows {
		found = append(found, problem(r))
	}
	return found, err
}

// repairAll repairs until a look finds nothing that can be repaired, or no less than the look before.
func (a *app) repairAll(ctx context.Context, queries *db.Queries) error {
	// Triggers first: what follows relies on them.
	if err := queries.SetupRepair(ctx); err != nil {
		return fmt.Errorf("repair the installation: %w", err)
	}
	for {
		found, err := findProblems(ctx, queries, false)
		if err != nil {
			return err
		}
		var batch db.RecordsRepairParams
		var repaired int64
		for i, p := range found {
			if p.Repairable && p.ID != "" {
				batch.Types, batch.IDs, batch.Versions = append(batch.Types, p.Subject), append(batch.IDs, p.ID), append(batch.Versions, p.Version)
			}
			if len(batch.IDs) == repairBatch || i == len(found)-1 && len(batch.IDs) > 0 {
				n, err := queries.RecordsRepair(ctx, batch)
				repaired += n
				if err != nil {
					return fmt.Errorf("repair records (%d are repaired so far): %w", repaired, err)
				}
				batch = db.RecordsRepairParams{}
			}
		}
		if err := queries.SetupRepair(ctx); err != nil { // the counts
			return fmt.Errorf("repair the installation: %w", err)
		}
		if repaired > 0 {
			a.say("repaired %d records and changes", repaired)
		}
		if len(found) < maxProblems || repaired == 0 {
			return nil
		}
	}
}

// showProblems shows what was found, and fails if that is anything.
func (a *app) showProblems(found []problem, repaired bool) error {
	t := newTable("PROBLEM", "SUBJECT", "ID", "VERSION", "DETAIL").cut(4, 2, 1)
	for i, p := range found {
		if a.output == outputJSON {
			if err := a.writeJSON(p); err != nil {
				return err
			}
			continue
		}
		if i == maxProblemsShown {
			break
		}
		version := ""
		if p.Version >= 0 {
			version = strconv.FormatInt(p.Version, 10)
		}
		t.add(p.Problem, p.Subject, p.ID, version, p.Detail)
	}
	if len(found) == 0 {
		if a.output != outputJSON {
			_, err := fmt.Fprintln(a.stdout, "no problems found")
			return err
		}
		return nil
	}
	if a.output != outputJSON {
		if err := t.write(a.stdout); err != nil {
			return err
		}
	}
	repairable := 0
	for _, p := range found {
		if p.Repairable {
			repairable++
		}
	}
	count := strconv.Itoa(len(found))
	if len(found) == maxProblems {
		count = "at least " + count
	}
	hint := ""
	switch {
	case repaired:
		hint = " after the repair"
	case repairable > 0:
		hint = fmt.Sprintf(", of which 'pgbroker check --repair' can repair %d", repairable)
	}
	return &exitError{exitProblems, fmt.Errorf("found problems: %s%s", count, hint)}
}
