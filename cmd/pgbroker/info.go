package main

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/emptypb"

	"pgbroker/cmd/pgbroker/duration"
	"pgbroker/proto/databroker"
	"pgbroker/server"
)

func (a *app) infoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "info", Short: "Show the versions of the server's data", Args: noArgs,
		Long: `Show the server version, which names the data set, and the earliest and latest record version, between which a client can
resume (see 'pgbroker watch --since'); whether anything can be written, and so revoked, and if not why; and how far the
database is behind, if it is a standby.`,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			var header metadata.MD
			response, err := c.records.ServerInfo(ctx, new(emptypb.Empty), grpc.Header(&header))
			if err != nil {
				return err
			}
			return a.showInfo(response, header)
		}),
	}
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

// showInfo shows what a server says of itself: in the response, which is part of the contract, and beside it. Another broker than
// this one says nothing there.
func (a *app) showInfo(response *databroker.ServerInfoResponse, header metadata.MD) error {
	said := func(key string) string { return clean(strings.Join(header.Get(key), ", ")) }
	writing, lag := said(server.InfoWriting), said(server.InfoStandbyLag)
	if a.output == outputJSON {
		info := struct {
			ServerVersion         uint64   `json:"server_version"`
			EarliestRecordVersion uint64   `json:"earliest_record_version"`
			LatestRecordVersion   uint64   `json:"latest_record_version"`
			Writable              *bool    `json:"writable,omitempty"`
			NotWritableBecause    string   `json:"not_writable_because,omitempty"`
			StandbyLagSeconds     *float64 `json:"standby_lag_seconds,omitempty"`
		}{
			ServerVersion: response.GetServerVersion(), EarliestRecordVersion: response.GetEarliestRecordVersion(),
			LatestRecordVersion: response.GetLatestRecordVersion(),
		}
		if writing != "" {
			reason, no := strings.CutPrefix(writing, "no: ")
			info.Writable = new(bool)
			if *info.Writable = !no; no {
				info.NotWritableBecause = reason
			}
		}
		if behind, err := time.ParseDuration(lag); err == nil {
			seconds := behind.Seconds()
			info.StandbyLagSeconds = &seconds
		}
		return a.writeJSON(info)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "server version:          %d\nearliest record version: %d\nlatest record version:   %d\n",
		response.GetServerVersion(), response.GetEarliestRecordVersion(), response.GetLatestRecordVersion())
	if writing != "" {
		fmt.Fprintf(&b, "writing:                 %s\n", writing)
	}
	if lag != "" {
		fmt.Fprintf(&b, "behind the primary:      %s\n", lag)
	}
	_, err := io.WriteString(a.stdout, b.String())
	return err
}

func (a *app) checkpointCommand() *cobra.Command {
	cmd := group("checkpoint", "Read and set the replication checkpoint", a.checkpointGetCommand(), a.checkpointSetCommand())
	cmd.Long = `Read and set the replication checkpoint: how far something that copies another databroker into this one has come.`
	return cmd
}

func (a *app) checkpointGetCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "get", Short: "Show the checkpoint", Args: noArgs,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			response, err := c.checkpoint.GetCheckpoint(ctx, new(databroker.GetCheckpointRequest))
			if err != nil {
				return err
			}
			if a.output == outputJSON {
				return a.writeProto(response)
			}
			_, err = fmt.Fprintf(a.stdout, "server version: %d\nrecord version: %d\nleader:         %t\n",
				response.GetCheckpoint().GetServerVersion(), response.GetCheckpoint().GetRecordVersion(), response.GetIsLeader())
			return err
		}),
	}
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

func (a *app) checkpointSetCommand() *cobra.Command {
	var checkpoint databroker.Checkpoint
	cmd := &cobra.Command{
		Use: "set --server-version N --record-version N", Short: "Set the checkpoint", Args: noArgs,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			_, err := c.checkpoint.SetCheckpoint(ctx, &databroker.SetCheckpointRequest{Checkpoint: &checkpoint})
			return err
		}),
	}
	cmd.Flags().Uint64Var(&checkpoint.ServerVersion, "server-version", 0, "server version of the source")
	cmd.Flags().Uint64Var(&checkpoint.RecordVersion, "record-version", 0, "record version reached in the source")
	must(cmd.MarkFlagRequired("server-version"))
	must(cmd.MarkFlagRequired("record-version"))
	a.addClientFlags(cmd)
	return cmd
}

func (a *app) healthCommand() *cobra.Command {
	var (
		service, purpose string

		wait time.Duration
	)
	cmd := &cobra.Command{
		Use: "health", Short: "Ask the server whether it can serve", Args: noArgs,
		Long: fmt.Sprintf(`Ask the server whether it can serve. The exit code is 0 when it can and %d when it cannot, or cannot be reached; no shared secret
is needed. --wait asks again and again until it can or the time is over.

--for %s asks whether records can be written as well: a server whose database is a standby, or read-only, serves reads and
streams, and nothing can be revoked there.`, exitUnreachable, server.HealthWriting),
		Example: `  pgbroker health --wait 30s && pgbroker types
  pgbroker health --for writing`,
		RunE: a.action(func(cmd *cobra.Command, cfg *configuration) error {
			switch purpose {
			case "":
			case server.HealthReading, server.HealthWriting:
				if service != "" {
					return usagef("--for and --service: allowed is one of them")
				}
				service = purpose
			default:
				return usagef("--for: got %q, allowed %s and %s", purpose, server.HealthReading, server.HealthWriting)
			}
			c, err := a.connect(cfg)
			if err != nil {
				return err
			}
			defer c.Close()
			if wait > 0 {
				a.timeout = min(a.timeout, wait) // a server that does not answer is not waited for longer
			}
			deadline := time.Now().Add(wait)
			for {
				serving, err := checkHealth(cmd.Context(), c, service)
				if err == nil && serving == grpc_health_v1.HealthCheckResponse_SERVING || !time.Now().Before(deadline) {
					return a.showHealth(c, service, serving, err)
				}
				c.ResetConnectBackoff()
				select {
				case <-cmd.Context().Done():
					return cmd.Context().Err()
				case <-time.After(min(250*time.Millisecond, time.Until(deadline))):
				}
			}
		}),
	}
	cmd.Flags().StringVar(&purpose, "for", "", "what the server is to be able to do: reading (default) or writing")
	cmd.Flags().StringVar(&service, "service", "", "service to ask about; all when left out")
	duration.Var(cmd.Flags(), &wait, "wait", 0, nil, "longest to wait until it can serve")
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

func checkHealth(ctx context.Context, c *client, service string) (grpc_health_v1.HealthCheckResponse_ServingStatus, error) {
	response, err := grpc_health_v1.NewHealthClient(c).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: service})
	return response.GetStatus(), err
}

func (a *app) showHealth(c *client, service string, serving grpc_health_v1.HealthCheckResponse_ServingStatus, err error) error {
	if err != nil {
		return c.explain(err)
	}
	if a.output == outputJSON {
		err = a.writeProto(&grpc_health_v1.HealthCheckResponse{Status: serving})
	} else {
		err = a.writeLine([]byte(serving.String()))
	}
	if err == nil && serving != grpc_health_v1.HealthCheckResponse_SERVING {
		if service == server.HealthWriting {
			return &exitError{exitUnreachable, fmt.Errorf("nothing can be written by way of the server at %s at present; 'pgbroker info' says why", c.address)}
		}
		return &exitError{exitUnreachable, fmt.Errorf("the server at %s cannot serve at present", c.address)}
	}
	return err
}

// buildVersion is set by the build with -ldflags "-X main.buildVersion=...".
var buildVersion string

// version is the version of this program.
func version() string {
	if buildVersion != "" {
		return buildVersion
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// A versionInfo is the output of `version -o json`.
type versionInfo struct {
	Version  string `json:"version"`
	Commit   string `json:"commit,omitempty"`
	Modified bool   `json:"modified,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func (a *app) versionCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "version", Short: "Show the version of this program", Args: noArgs,
		RunE: func(*cobra.Command, []string) error {
			a.started = true
			v := versionInfo{Version: version(), Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
			if info, ok := debug.ReadBuildInfo(); ok {
				for _, setting := range info.Settings {
					switch setting.Key {
					case "vcs.revision":
						v.Commit = setting.Value
					case "vcs.modified":
						v.Modified, _ = strconv.ParseBool(setting.Value) // the Go command writes true or false
					}
				}
			}
			if a.output == outputJSON {
				return a.writeJSON(v)
			}
			line := "pgbroker " + v.Version
			if v.Commit != "" {
				line += " " + v.Commit
			}
			return a.writeLine([]byte(line + " " + v.Go + " " + v.Platform))
		},
	}
	a.addOutputFlag(cmd)
	return cmd
}
