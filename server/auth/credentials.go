package auth

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"google.golang.org/grpc/credentials"
)

// TokenLifetime is how long a token is valid that [NewCredentials] mints, the same as Pomerium's.
const TokenLifetime = time.Hour

// NewCredentials returns what a client passes to [google.golang.org/grpc.WithPerRPCCredentials]: each call and each new
// stream gets a new token, signed with HS256, that expires after [TokenLifetime] by the client's clock.
//
// The token is sent over plaintext connections too, as Pomerium does towards its local proxy. Over a network that others can
// read it can be used by them until it expires; use TLS there. With the zero Key every call fails.
func NewCredentials(key Key) credentials.PerRPCCredentials { return perRPC{key} }

type perRPC struct{ key Key }

// GetRequestMetadata implements [credentials.PerRPCCredentials].
func (c perRPC) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := mint(c.key, time.Now().Add(TokenLifetime))
	if err != nil {
		return nil, err
	}
	return map[string]string{MetadataKey: token}, nil
}

// RequireTransportSecurity implements [credentials.PerRPCCredentials].
func (perRPC) RequireTransportSecurity() bool { return false }

// mint returns a token that is valid until expires, to the second.
func mint(key Key, expires time.Time) (string, error) {
	if key == (Key{}) {
		return "", errors.New("sign token: no shared key")
	}
	claims := jwt.MapClaims{"exp": expires.Unix()}
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString(key.bytes())
	if err != nil {
		return "", fmt.Errorf("sign token: %w", err)
	}
	return token, nil
}
