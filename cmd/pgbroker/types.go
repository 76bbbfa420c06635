package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/cmd/pgbroker/duration"
	"pgbroker/proto/databroker"
)

func (a *app) typesCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "types", Short: "List the types that have records, with their number", Args: noArgs,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			response, err := c.records.ListTypes(ctx, new(emptypb.Empty))
			if err != nil {
				return err
			}
			t := newTable("TYPE", "RECORDS").cut(0)
			for _, name := range response.GetTypes() {
				// A limit of 0 asks for nothing but the number.
				count, err := c.records.Query(ctx, &databroker.QueryRequest{Type: name})
				if err != nil {
					return err
				}
				if a.output == outputJSON {
					if err := a.writeJSON(typeCount{name, count.GetTotalCount()}); err != nil {
						return err
					}
					continue
				}
				t.add(shortType(name), strconv.FormatInt(count.GetTotalCount(), 10))
			}
			if a.output == outputJSON {
				return nil
			}
			return t.write(a.stdout)
		}),
	}
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	cmd.AddCommand(a.typesShowCommand(), a.typesSetCommand())
	return cmd
}

// A typeCount is one line of `types -o json`.
type typeCount struct {
	Type    string `json:"type"`
	Records int64  `json:"records"`
}

func (a *app) optionsCommand() *cobra.Command {
	cmd := group("options", "Read and set the options of a record type", a.optionsGetCommand(), a.optionsSetCommand())
	cmd.Long = "Read and set the options of a record type: how many records it keeps, for how long, and which fields are looked up.\n\n" + typeHelp
	return cmd
}

func (a *app) optionsGetCommand() *cobra.Command {
	var name recordName
	cmd := &cobra.Command{
		Use: "get --type TYPE", Short: "Show the options of a type", Args: noArgs,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			if err := checkText("type", name.kind); err != nil {
				return err
			}
			response, err := c.records.GetOptions(ctx, &databroker.GetOptionsRequest{Type: recordType(name.kind)})
			if err != nil {
				return err
			}
			return a.showOptions(response.GetOptions())
		}),
	}
	name.addTypeFlag(cmd, "type of the records")
	must(cmd.MarkFlagRequired("type"))
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

func (a *app) showOptions(options *databroker.Options) error {
	if a.output == outputJSON {
		return a.writeProto(options)
	}
	capacity, ttl := "unlimited", "unlimited"
	if options.Capacity != nil {
		capacity = strconv.FormatUint(options.GetCapacity(), 10)
	}
	if options.Ttl != nil {
		ttl = duration.Format(options.GetTtl().AsDuration())
	}
	t := newTable("OPTION", "VALUE").cut(1)
	t.add("capacity", capacity)
	t.add("ttl", ttl)
	for _, field := range options.GetIndexableFields() {
		t.add("indexable field", field)
	}
	return t.write(a.stdout)
}

func (a *app) optionsSetCommand() *cobra.Command {
	var (
		name     recordName
		capacity uint64
		ttl      time.Duration
		fields   []string
		yes      bool
	)
	cmd := &cobra.Command{
		Use: "set --type TYPE [--capacity N] [--ttl DURATION] [--indexable-field FIELD]", Short: "Set the options of a type", Args: noArgs,
		Long: `Set the options of a type, replacing all that were set before: what is left out is taken back. The capacity is enforced at
the next write of the type, the time to live within a minute; records that go leave tombstones, so that every stream sees it. When
that ends some of the records that are there, it says how many and asks, unless --yes is given.

` + typeHelp,
		Example: `  pgbroker options set -t session.SessionBindingRequest \
    --capacity 50000 --ttl 15m
  pgbroker options set -t example.com/Thing    # no options`,
		RunE: a.call(func(ctx context.Context, cmd *cobra.Command, c *client) error {
			if err := checkText("type", name.kind); err != nil {
				return err
			}
			for _, field := range fields {
				if err := checkText("indexable-field", field); err != nil {
					return err
				}
			}
			options := &databroker.Options{IndexableFields: fields}
			if cmd.Flags().Changed("capacity") {
				options.Capacity = &capacity
			}
			if cmd.Flags().Changed("ttl") {
				if ttl <= 0 {
					return usagef("--ttl: %v: must be more than 0; leave it out for no limit", ttl)
				}
				options.Ttl = durationpb.New(ttl)
			}
			a.warnOfType(ctx, c, name.kind)
			if would, all, err := optionsWouldEnd(ctx, c, recordType(name.kind), options); err != nil {
				return err
			} else if would > 0 && !yes {
				question := fmt.Sprintf("This ends %d of %d records of %s.", would, all, name.kind)
				if err := a.confirm(ctx, question, "nothing was set"); err != nil {
					return err
				}
			}
			response, err := c.records.SetOptions(ctx, &databroker.SetOptionsRequest{Type: recordType(name.kind), Options: options})
			if err != nil {
				return err
			}
			return a.showOptions(response.GetOptions())
		}),
	}
	name.addTypeFlag(cmd, "type of the records")
	must(cmd.MarkFlagRequired("type"))
	cmd.Flags().Uint64Var(&capacity, "capacity", 0, "keep only so many records, those written last")
	duration.Var(cmd.Flags(), &ttl, "ttl", 0, nil, "delete records that were not written for so long")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	cmd.Flags().StringArrayVar(&fields, "indexable-field", nil, "field that records are looked up by; may be repeated")
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

// optionsWouldEnd returns how many records of a type options would end if they were set, and how many there are. For a time to
// live all are read, since no databroker finds them by it.
func optionsWouldEnd(ctx context.Context, c *client, recordType string, options *databroker.Options) (would, all int64, err error) {
	if options.Capacity == nil && options.Ttl == nil {
		return 0, 0, nil
	}
	response, err := c.records.Query(ctx, &databroker.QueryRequest{Type: recordType})
	if err != nil {
		return 0, 0, err
	}
	all = response.GetTotalCount()
	if options.Capacity != nil && all > 0 && uint64(all) > options.GetCapacity() {
		would = all - int64(options.GetCapacity())
	}
	if options.Ttl != nil && all > 0 {
		oldest := time.Now().Add(-options.GetTtl().AsDuration())
		var outdated int64
		if err := readRecords(ctx, c, recordType, func(record *databroker.Record) {
			if record.GetModifiedAt().AsTime().Before(oldest) {
				outdated++
			}
		}); err != nil {
			return 0, 0, err
		}
		would = max(would, outdated) // both mean those that were written longest ago
	}
	return would, all, nil
}
