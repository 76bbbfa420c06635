package main

import (
	"context"
	"maps"
	"net/url"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"pgbroker/proto/registry"
)

func (a *app) serviceCommand() *cobra.Command {
	return group("service", "Read and report to the registry of services", a.serviceListCommand(), a.serviceReportCommand())
}

// kindNames are the kinds of services as the command line spells them.
func kindNames() []string {
	numbers := slices.DeleteFunc(slices.Sorted(maps.Keys(registry.ServiceKind_name)), func(n int32) bool { return n == 0 })
	names := make([]string, len(numbers))
	for i, n := range numbers {
		names[i] = kindName(registry.ServiceKind(n))
	}
	return names
}

func kindName(kind registry.ServiceKind) string {
	return strings.ReplaceAll(strings.ToLower(kind.String()), "_", "-")
}

func parseKind(name string) (registry.ServiceKind, error) {
	number, ok := registry.ServiceKind_value[strings.ReplaceAll(strings.ToUpper(name), "-", "_")]
	if !ok || number == 0 {
		return 0, usagef("--kind: %.60q: want one of %s", name, strings.Join(kindNames(), ", "))
	}
	return registry.ServiceKind(number), nil
}

func addKindFlag(cmd *cobra.Command) {
	must(cmd.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions(kindNames(), cobra.ShellCompDirectiveNoFileComp)))
}

func (a *app) serviceListCommand() *cobra.Command {
	var kinds []string
	cmd := &cobra.Command{
		Use: "list", Short: "List the services that are running", Args: noArgs,
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			request := new(registry.ListRequest)
			for _, name := range kinds {
				kind, err := parseKind(name)
				if err != nil {
					return err
				}
				request.Kinds = append(request.Kinds, kind)
			}
			response, err := c.registry.List(ctx, request)
			if err != nil {
				return err
			}
			t := newTable("KIND", "ENDPOINT").cut(1)
			for _, service := range response.GetServices() {
				if !a.secrets {
					service = proto.CloneOf(service)
					service.Endpoint = redactURL(service.GetEndpoint())
				}
				if a.output == outputJSON {
					if err := a.writeProto(service); err != nil {
						return err
					}
					continue
				}
				t.add(kindName(service.GetKind()), service.GetEndpoint())
			}
			if a.output == outputJSON {
				return nil
			}
			return t.write(a.stdout)
		}),
	}
	cmd.Flags().StringArrayVar(&kinds, "kind", nil, "show only this kind; may be repeated")
	addKindFlag(cmd)
	cmd.Flags().BoolVar(&a.secrets, "show-secrets", false, "show passwords in endpoints")
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}

// redactURL hides the password of an endpoint: Pomerium puts that of its metrics there.
func redactURL(endpoint string) string {
	u, err := url.Parse(endpoint)
	switch {
	case err == nil:
		if _, has := u.User.Password(); !has {
			return endpoint
		}
		return u.Redacted()
	case strings.Contains(endpoint, "@"):
		return mask + endpoint[strings.LastIndexByte(endpoint, '@'):]
	default:
		return endpoint
	}
}

func (a *app) serviceReportCommand() *cobra.Command {
	var kind, endpoint string
	cmd := &cobra.Command{
		Use: "report --kind KIND --endpoint URL", Short: "Report a service as running", Args: noArgs,
		Long: "Report a service as running. It leaves the list unless it is reported again; the time to do so by is printed.",
		RunE: a.call(func(ctx context.Context, _ *cobra.Command, c *client) error {
			parsed, err := parseKind(kind)
			if err != nil {
				return err
			}
			if u, err := url.Parse(endpoint); err != nil || u.Scheme == "" || u.Host == "" || checkText("endpoint", endpoint) != nil {
				return usagef("--endpoint: want a URL such as https://host:port/path")
			}
			response, err := c.registry.Report(ctx, &registry.RegisterRequest{
				Services: []*registry.Service{{Kind: parsed, Endpoint: endpoint}},
			})
			if err != nil {
				return err
			}
			if a.output == outputJSON {
				return a.writeProto(response)
			}
			return a.writeLine([]byte("report again within " + response.GetCallBackAfter().AsDuration().String()))
		}),
	}
	cmd.Flags().StringVar(&kind, "kind", "", "kind of the service: "+strings.Join(kindNames(), ", "))
	cmd.Flags().StringVar(&endpoint, "endpoint", "", "URL of the service")
	must(cmd.MarkFlagRequired("kind"))
	must(cmd.MarkFlagRequired("endpoint"))
	addKindFlag(cmd)
	a.addOutputFlag(cmd)
	a.addClientFlags(cmd)
	return cmd
}
