package main

import (
	"context"
	"os/user"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"pgbroker/server/auth"
)

// addPersonFlag gives a command that changes something --as.
func (a *app) addPersonFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&a.as, "as", "", "the person whom the audit names; otherwise whoever is logged in here")
}

// sayWho is an interceptor that names to the server who runs this program, for the audit. The server believes it: the name is
// worth as much as whoever has the shared secret.
func (a *app) sayWho(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, call grpc.UnaryInvoker, options ...grpc.CallOption) error {
	named, err := auth.OnBehalfOf(ctx, a.as)
	switch {
	case err != nil:
		return usagef("--as: %v", err)
	case a.as == "":
		if named, err = auth.OnBehalfOf(ctx, loggedIn(environMap(a.environ))); err != nil {
			named = ctx // a name that cannot be sent is none
		}
	}
	return call(named, method, request, reply, conn, options...)
}

// loggedIn returns the name of whoever is logged in to this machine, also behind sudo; empty if it has none, as in many
// containers.
func loggedIn(env map[string]string) string {
	if name := env["SUDO_USER"]; name != "" {
		return name
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return ""
}
