package main

import (
	"fmt"
	"net"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// The checks here look at one value each and need no network and no file. What needs files, or several values together, is
// in validate.go.

func checkAddress(address string) error {
	const want = "want host:port, such as 127.0.0.1:5443 or :5443"
	if scheme, _, isURL := strings.Cut(address, "://"); isURL {
		return fmt.Errorf("%.60q: %s, without %s://", address, want, scheme)
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%.60q: %s", address, want)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || strconv.FormatUint(n, 10) != port {
		return fmt.Errorf("%.60q: the port must be a number from 0 to 65535", address)
	}
	return nil
}

func checkAtLeast(n, least int) error {
	if n < least || n > 1<<15 {
		return fmt.Errorf("%d: want a number from %d to %d", n, least, 1<<15)
	}
	return nil
}

func checkPositive(d time.Duration) error {
	if d <= 0 {
		return fmt.Errorf("%v: must be more than 0", d)
	}
	return nil
}

func checkNotNegative(d time.Duration) error {
	if d < 0 {
		return fmt.Errorf("%v: must not be negative", d)
	}
	return nil
}

func checkSize(size, least, most byteSize) error {
	if size < least || size > most {
		return fmt.Errorf("%v: want from %v to %v", size, least, most)
	}
	return nil
}

// loopback reports whether only this machine reaches a listener at address.
func loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// reachable turns the address that a server listens on into one that a client on the same machine can call.
func reachable(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	switch ip := net.ParseIP(host); {
	case host == "", ip != nil && ip.Equal(net.IPv4zero):
		host = "127.0.0.1"
	case ip != nil && ip.IsUnspecified():
		host = "::1"
	}
	return net.JoinHostPort(host, port)
}

var (
	uriPassword = regexp.MustCompile(`(?i)((?:(?:ssl)?password|scram_(?:client|server)_key|oauth_client_secret)=)[^&]*`)
	// escapedKeyword is a key=value of a URI whose key is written in a way that nobody has to understand.
	escapedKeyword = regexp.MustCompile(`([?&][^=&]*%[^=&]*=)[^&]*`)
	// secretKeyword is the keyword of a value that is never shown.
	secretKeyword = regexp.MustCompile(`(?i)^((ssl)?password|scram_(client|server)_key|oauth_client_secret)$`)
	// keyword is one `key = value` of a keyword connection string, whose value may be quoted.
	keyword = regexp.MustCompile(`(\w+)\s*=\s*('(?:\\.|[^'\\])*'|(?:\\.|[^\s'\\])*)`)
	// settingKeyword is what the keyword of a setting of libpq or of a session looks like.
	settingKeyword  = regexp.MustCompile(`^[a-z][a-z0-9_.]{0,62}$`)
	harmlessKeyword = regexp.MustCompile(`^(host|hostaddr|port|dbname|database|user|passfile|service|servicefile|options|` +
		`application_name|search_path|target_session_attrs|load_balance_hosts|krbsrvname|krbspn|client_encoding|keepalives[a-z_]*|` +
		`ssl[a-z_]+|pool_[a-z_]+|[a-z_]+_timeout|default_query_exec_mode|statement_cache_capacity|description_cache_capacity)$`)
	keywords = regexp.MustCompile(`^\s*(?:` + keyword.String() + `(?:\s+|$))+$`)
)

// redactConnString shows a connection string without its passwords. What it does not understand it hides altogether.
func redactConnString(conn string) string {
	scheme, rest, isURI := strings.Cut(conn, "://")
	if isURI && (scheme == "postgres" || scheme == "postgresql") {
		// Up to the last @ of all, because a password that should have been escaped may hold a slash, a ? or an @.
		if at := strings.LastIndex(rest, "@"); at >= 0 {
			user, _, hasPassword := strings.Cut(rest[:at], ":")
			if hasPassword {
				user += ":" + mask
			}
			rest = user + rest[at:]
		}
		return scheme + "://" + escapedKeyword.ReplaceAllString(uriPassword.ReplaceAllString(rest, "${1}"+mask), "${1}"+mask)
	}
	if !keywords.MatchString(conn) {
		return mask
	}
	understood := true
	shown := keyword.ReplaceAllStringFunc(conn, func(pair string) string {
		key, _, _ := strings.Cut(pair, "=")
		key = strings.TrimSpace(key)
		if secretKeyword.MatchString(key) {
			return key + "=" + mask
		}
		// A secret that ends with = would pass for a keyword without a value.
		understood = understood && harmlessKeyword.MatchString(key)
		return pair
	})
	if !understood {
		return mask
	}
	return shown
}
