package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"pgbroker/cmd/pgbroker/duration"
	"pgbroker/proto/databroker"
	"pgbroker/proto/registry"
	"pgbroker/server/auth"
)

// A client is a connection to a server with the stubs of its services.
type client struct {
	*grpc.ClientConn
	records    databroker.DataBrokerServiceClient
	checkpoint databroker.CheckpointServiceClient
	registry   registry.RegistryClient

	// For messages.
	address     string
	tls         bool
	fingerprint string // of the key that signs; empty when there is none
}

// noSecretHint is what a client adds when the server wants a token and there was nothing to sign one with.
const noSecretHint = "no shared secret is configured: give --shared-secret-file or PGBROKER_SHARED_SECRET_FILE"

// addClientFlags gives a command what it needs to call the server.
func (a *app) addClientFlags(cmd *cobra.Command) {
	addSettingFlags(cmd.Flags(), useClient)
	a.addTimeoutFlag(cmd)
}

func (a *app) addTimeoutFlag(cmd *cobra.Command) {
	duration.Var(cmd.Flags(), &a.timeout, "timeout", 10*time.Second, checkPositive, "longest that a request may take")
}

// call is the body of a client command that makes a request or a few of them.
func (a *app) call(do func(ctx context.Context, cmd *cobra.Command, c *client) error) func(*cobra.Command, []string) error {
	return a.action(func(cmd *cobra.Command, cfg *configuration) error {
		c, err := a.connect(cfg)
		if err != nil {
			return err
		}
		defer c.Close()
		return c.explain(do(cmd.Context(), cmd, c))
	})
}

// connect prepares a connection. Nothing is dialled before the first request.
func (a *app) connect(cfg *configuration) (*client, error) {
	transport, err := clientTransport(cfg)
	if err != nil {
		return nil, err
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithUserAgent("pgbroker/" + version()),
		grpc.WithChainUnaryInterceptor(a.limit, a.sayWho),
		// Whatever the server stored must be readable here.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32), grpc.MaxCallSendMsgSize(math.MaxInt32)),
	}
	key, ok, err := clientKey(cfg)
	if err != nil {
		return nil, err
	}
	fingerprint := ""
	if ok {
		fingerprint = key.Fingerprint()
		options = append(options, grpc.WithPerRPCCredentials(auth.NewCredentials(key)))
	}
	address := reachable(cfg.Address)
	conn, err := grpc.NewClient(address, options...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cfg.describe("address"), err)
	}
	return &client{
		ClientConn: conn,
		records:    databroker.NewDataBrokerServiceClient(conn),
		checkpoint: databroker.NewCheckpointServiceClient(conn),
		registry:   registry.NewRegistryClient(conn),

		address:     address,
		tls:         transport.Info().SecurityProtocol == "tls",
		fingerprint: fingerprint,
	}, nil
}

// limit is an interceptor that lets no request take longer than the user has patience. Streams are as long as they are.
func (a *app) limit(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, call grpc.UnaryInvoker, options ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	return call(ctx, method, request, reply, conn, options...)
}

// clientTransport follows the same rule as the server: TLS, unless told otherwise or on a loopback address where nothing
// speaks of TLS.
func clientTransport(cfg *configuration) (credentials.TransportCredentials, error) {
	mentionsTLS := cfg.TLSCAFile != "" || cfg.TLSServerName != "" || cfg.hasCertificate()
	if cfg.GRPCInsecure || !mentionsTLS && loopback(reachable(cfg.Address)) {
		return insecure.NewCredentials(), nil
	}
	config, err := cfg.clientTLS()
	if err != nil {
		return nil, err
	}
	return credentials.NewTLS(config), nil
}

// clientKey returns the key to sign requests with: the first one configured, or that of a server in embedded mode on this
// machine.
func clientKey(cfg *configuration) (auth.Key, bool, error) {
	switch {
	case len(cfg.SharedSecret) > 0:
		key, err := auth.ParseKey(cfg.SharedSecret[0])
		if err != nil {
			return key, false, configError{cfg.describe("shared_secret") + ": " + err.Error()}
		}
		return key, true, nil
	case len(cfg.SharedSecretFile) > 0:
		key, err := auth.ReadKey(cfg.SharedSecretFile[0])
		if err != nil {
			return key, false, configError{cfg.describe("shared_secret_file") + ": " + err.Error()}
		}
		return key, true, nil
	case !loopback(reachable(cfg.Address)):
		return auth.Key{}, false, nil
	}
	dir, err := cfg.dataDir()
	if err != nil {
		return auth.Key{}, false, nil //nolint:nilerr // without a home directory there is no embedded server of ours either
	}
	key, err := auth.ReadKey(filepath.Join(dir, secretFileName))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return auth.Key{}, false, nil
	case err != nil:
		return auth.Key{}, false, configError{cfg.describe("data_dir") + ": " + err.Error()}
	}
	return key, true, nil
}

// A serverError is a failed request in words for a person. The status is still inside, for the exit code.
type serverError struct {
	message string
	err     error
}

// Error implements error.
func (e *serverError) Error() string { return e.message }

// Unwrap makes the status visible to status.Code.
func (e *serverError) Unwrap() error { return e.err }

// explain turns a status into what a person needs to know. Other errors pass.
func (c *client) explain(err error) error {
	st, ok := status.FromError(err)
	var explained *serverError
	if !ok || st.Code() == codes.OK || errors.As(err, &explained) {
		return err
	}
	message := st.Message()
	switch st.Code() {
	case codes.Unavailable:
		if _, cause, dialing := strings.Cut(message, `connection error: desc = "`); dialing { // grpc's words, not the server's
			cause = strings.TrimPrefix(strings.TrimSuffix(cause, `"`), "transport: ")
			cause = strings.TrimPrefix(cause, "Error while dialing: ")
			message = fmt.Sprintf("cannot reach a server at %s: %s", c.address, cause)
			switch {
			case strings.Contains(cause, "first record does not look like a TLS handshake"):
				message += " (the server speaks plaintext: give --grpc-insecure if that is meant)"
			case strings.Contains(cause, "error reading server preface") && !c.tls:
				message += " (does the server want TLS? give --tls-ca-file)"
			case strings.Contains(cause, "connection refused"):
				message += " (does it run? start one with `pgbroker serve`)"
			}
		}
	case codes.DeadlineExceeded:
		message = fmt.Sprintf("no answer from %s in time: %s", c.address, message)
	case codes.Unauthenticated:
		message = fmt.Sprintf("the server at %s does not accept this client: %s", c.address, message)
		if c.fingerprint == "" {
			message += " (" + noSecretHint + ")"
		} else {
			message += fmt.Sprintf(" (requests were signed with key %s: compare the server's log, and the clocks)", c.fingerprint)
		}
	}
	return &serverError{message: message, err: err}
}

// hasCertificate reports whether any part of a certificate is configured.
func (c *Config) hasCertificate() bool {
	return c.TLSCert != "" || c.TLSCertFile != "" || c.TLSKey != "" || c.TLSKeyFile != ""
}
