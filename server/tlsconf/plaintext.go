package tlsconf

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// PlaintextFlag is the flag that allows what [CheckPlaintext] refuses.
const PlaintextFlag = "--grpc-insecure"

// CheckPlaintext returns an error if a server without TLS at addr (host:port as for [net.Listen], or unix:path) could be
// reached from another machine, unless allow says that this is meant, for example because a proxy or a mesh encrypts. Tokens
// and sessions would cross the network readable for all in between.
//
// Loopback addresses (127.0.0.0/8 and ::1), the name localhost and Unix sockets are local. No other name is looked up: what
// it means may change.
func CheckPlaintext(addr string, allow bool) error {
	if strings.HasPrefix(addr, "unix:") {
		return nil
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("listen address %q: want host:port, for instance 127.0.0.1:5443", addr)
	}
	if allow || loopback(host) {
		return nil
	}
	return fmt.Errorf("listen address %q can be reached from other machines, and without TLS all can read its tokens and sessions: "+
		"give a certificate, or listen on %s, or allow plaintext with %s", addr, net.JoinHostPort("127.0.0.1", port), PlaintextFlag)
}

func loopback(host string) bool {
	if strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}
