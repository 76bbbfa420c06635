package tlsconf

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"pgbroker/server/reload"
)

// ServerConfig says with what a server presents itself and whom it lets in.
type ServerConfig struct {
	// Certificate is the server's certificate, followed by those between it and the one that clients trust. Key is its
	// private key, not encrypted. Both are required.
	Certificate, Key PEM

	// ClientCA, if given, makes clients present a certificate that was signed by one of these (mutual TLS). Clients that are
	// Pomerium's do not have one (wire contract 4.4), unless something in between adds it. A file of it that is deleted, or has
	// nothing in it any more, lets nobody in; one that is spoiled is logged, and what it held before counts.
	ClientCA PEM

	// Log is told of changed files and of certificates outside their time of validity. Nil means [slog.Default].
	Log *slog.Logger
}

// Server is a server's side of TLS. Its methods may be called from several goroutines at once.
type Server struct {
	config *tls.Config
	pair   *reload.Value[pair]
	ca     *reload.Value[roots] // nil without
}

// NewServer reads all that a configuration names. The error says what cannot be used and why, and shows nothing of a private
// key. A certificate that has expired or is not valid yet is no error but logged at warn: the clock may be what is wrong, and
// clients tell their users better than a server that does not start.
func NewServer(c ServerConfig) (*Server, error) {
	log := c.Log
	if log == nil {
		log = slog.Default()
	}
	certs, err := loadPair("TLS certificate", c.Certificate, c.Key, log)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2"}, // gRPC is all there is behind it
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return certs.Get().cert, nil
		},
		// A session that is resumed skips the look at the client's certificate. gRPC connections last for hours, so nothing
		// is gained by resuming, and a client whose certificate authority was removed should not get in that way.
		SessionTicketsDisabled: true,
	}
	var clientCA *reload.Value[roots]
	if !c.ClientCA.IsZero() {
		clientCA, err = loadRoots("TLS client certificate authority", c.ClientCA, log)
		if err != nil {
			return nil, err
		}
		clientCA.WithdrawWhenGone(roots{pool: x509.NewCertPool()}) // which nobody's certificate is from
		config.ClientAuth = tls.RequireAndVerifyClientCert
		config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
			current := config.Clone()
			current.ClientCAs = clientCA.Get().pool
			return current, nil
		}
	}
	return &Server{config: config, pair: certs, ca: clientCA}, nil
}

// TLSConfig returns a configuration for [google.golang.org/grpc/credentials.NewTLS] or [tls.NewListener]. It demands TLS 1.2
// or newer and offers h2 only.
func (s *Server) TLSConfig() *tls.Config { return s.config.Clone() }

// Reload reads the files now, without waiting for the next connection. What cannot be used is logged and changes nothing.
func (s *Server) Reload() {
	s.pair.Check()
	if s.ca != nil {
		s.ca.Check()
	}
}

// NotAfter returns the moment at which the certificate in use expires, for a metric.
func (s *Server) NotAfter() time.Time { return s.pair.Get().cert.Leaf.NotAfter }

// ClientConfig says which server a client trusts. The zero ClientConfig trusts those with a certificate that the operating
// system's authorities signed for the name that the client dials.
type ClientConfig struct {
	// CA, if given, is trusted instead of the operating system's authorities.
	CA PEM

	// ServerName, if not empty, is the name that the server's certificate must be for, and the name it is asked for (SNI),
	// instead of the host that is dialled.
	ServerName string

	// Certificate and Key, if given, are shown to a server that demands a client certificate.
	Certificate, Key PEM

	// InsecureSkipVerify accepts whatever certificate a server shows, so that anybody in between can read the token and the
	// data. It contradicts CA.
	InsecureSkipVerify bool
}

// Client returns the configuration of a client, for [google.golang.org/grpc/credentials.NewTLS]. Files are read once. The
// error says what cannot be used and why.
func Client(c ClientConfig) (*tls.Config, error) {
	config := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		NextProtos:         []string{"h2"},
		ServerName:         c.ServerName,
		InsecureSkipVerify: c.InsecureSkipVerify,
	}
	if !c.CA.IsZero() {
		if c.InsecureSkipVerify {
			return nil, errors.New("a certificate authority is given and verification turned off: want one or the other")
		}
		ca, err := loadRoots("TLS certificate authority", c.CA, nil)
		if err != nil {
			return nil, err
		}
		config.RootCAs = ca.Get().pool
	}
	if !c.Certificate.IsZero() || !c.Key.IsZero() {
		certs, err := loadPair("TLS client certificate", c.Certificate, c.Key, slog.Default())
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{*certs.Get().cert}
	}
	return config, nil
}

// pair is a certificate with its private key.
type pair struct{ cert *tls.Certificate }

// LogValue implements [slog.LogValuer]. It shows what tells one certificate from the next.
func (p pair) LogValue() slog.Value {
	leaf := p.cert.Leaf
	return slog.GroupValue(
		slog.String("subject", leaf.Subject.String()),
		slog.Any("names", leaf.DNSNames),
		slog.String("serial", leaf.SerialNumber.Text(16)),
		slog.Time("not_before", leaf.NotBefore),
		slog.Time("not_after", leaf.NotAfter),
	)
}

func loadPair(name string, certificate, key PEM, log *slog.Logger) (*reload.Value[pair], error) {
	switch {
	case certificate.IsZero() && key.IsZero():
		return nil, fmt.Errorf("%s: neither certificate nor private key is given", name)
	case certificate.IsZero():
		return nil, fmt.Errorf("%s: the private key is given without its certificate", name)
	case key.IsZero():
		return nil, fmt.Errorf("%s: the certificate is given without its private key", name)
	}
	name = fmt.Sprintf("%s %s with private key %s", name, certificate, key)
	return load(name, []PEM{certificate, key}, func(contents [][]byte) (pair, error) {
		cert, err := tls.X509KeyPair(contents[0], contents[1])
		if err != nil {
			if encrypted(contents[1]) {
				return pair{}, errors.New("the private key is encrypted with a passphrase, want it without")
			}
			return pair{}, err // says nothing of the key but what kind it is
		}
		p := pair{&cert}
		switch now := time.Now(); {
		case now.After(cert.Leaf.NotAfter):
			log.Warn("certificate has expired, the other side will refuse it", "what", name, "certificate", p, "now", now.UTC())
		case now.Before(cert.Leaf.NotBefore):
			log.Warn("certificate is not valid yet, the other side will refuse it", "what", name, "certificate", p, "now", now.UTC())
		}
		return p, nil
	}, log)
}

// encrypted reports whether a private key needs a passphrase.
func encrypted(data []byte) bool {
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "ENCRYPTED PRIVATE KEY" || strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED") {
			return true
		}
	}
	return false
}
