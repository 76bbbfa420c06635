package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	"pgbroker/cmd/pgbroker/duration"
	"pgbroker/proto/databroker"
)

func (a *app) leaseCommand() *cobra.Command {
	cmd := group("lease", "Take, renew and release leases", a.leaseAcquireCommand(), a.leaseRenewCommand(), a.leaseReleaseCommand())
	cmd.Long = `Take, renew and release leases. A lease gives one holder at a time the right to do a job, until it expires by the clock of
the database. Whoever takes it gets an id, without which nobody can renew or release it.`
	cmd.Example = `  id=$(pgbroker lease acquire --name nightly --duration 1m) || exit
  pgbroker lease renew --name nightly --id "$id" --duration 1m
  pgbroker lease release --name nightly --id "$id"`
	return cmd
}

// A lease is the flags of the lease commands.
type lease struct {
	name, id string
	duration time.Duration
}

func (l *lease) check() error {
	if err := checkText("name", l.name); err != nil {
		return err
	}
	return checkText("id", l.id)
}

func (l *lease) checkDuration() error {
	if l.duration <= 0 {
		return usagef("--duration: %v: must be more than 0", l.duration)
	}
	return l.check()
}

func (l *lease) addFlags(cmd *cobra.Command, withID, withDuration bool) {
	cmd.Flags().StringVar(&l.name, "name", "", "name of the lease")
	must(cmd.MarkFlagRequired("name"))
	if withID {
		cmd.Flags().StringVar(&l.id, "id", "", "id that acquire printed")
		must(cmd.MarkFlagRequired("id"))
	}
	if withDuration {
		duration.Var(cmd.Flags(), &l.duration, "duration", 30*time.Second, nil, "time until it expires")
	}
}

func (a *app) leaseAcquireCommand() *cobra.Command {
	var l lease
	cmd := &cobra.Command{
		Use: "acquire --name NAME", Short: "Take a lease and print its id", Args: noArgs,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			if err := l.checkDuration(); err != nil {
				return err
			}
			response, err := c.records.AcquireLease(ctx, &databroker.AcquireLeaseRequest{Name: l.name, Duration: durationpb.New(l.duration)})
			if err != nil {
				return err
			}
			if a.output == outputJSON {
				return a.writeProto(response)
			}
			return a.writeLine([]byte(clean(response.GetId()))) // bare, for $(...)
		}),
	}
	l.addFlags(cmd, false, true)
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

func (a *app) leaseRenewCommand() *cobra.Command {
	var l lease
	cmd := &cobra.Command{
		Use: "renew --name NAME --id ID", Short: "Keep a lease for longer", Args: noArgs,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			if err := l.checkDuration(); err != nil {
				return err
			}
			_, err := c.records.RenewLease(ctx, &databroker.RenewLeaseRequest{
				Name: l.name, Id: l.id, Duration: durationpb.New(l.duration),
			})
			return err
		}),
	}
	l.addFlags(cmd, true, true)
	a.addClientFlags(cmd)
	return cmd
}

func (a *app) leaseReleaseCommand() *cobra.Command {
	var l lease
	cmd := &cobra.Command{
		Use: "release --name NAME --id ID", Short: "Give a lease back", Args: noArgs,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			if err := l.check(); err != nil {
				return err
			}
			_, err := c.records.ReleaseLease(ctx, &databroker.ReleaseLeaseRequest{Name: l.name, Id: l.id})
			return err
		}),
	}
	l.addFlags(cmd, true, false)
	a.addClientFlags(cmd)
	return cmd
}
