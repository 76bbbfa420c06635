package tlsconf

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/test/bufconn"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// An authority signs certificates for tests.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

var serial = big.NewInt(0)

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial = new(big.Int).Add(serial, big.NewInt(1))
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: fmt.Sprint("authority ", serial)},
		NotBefore: time.Now().Add(-1000 * time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t, cert, key, encode("CERTIFICATE", der)}
}

// issue returns a certificate for name, valid from an hour ago until expires from now, and its key.
func (a *authority) issue(name string, expires time.Duration) (certificate, key []byte) {
	a.t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	serial = new(big.Int).Add(serial, big.NewInt(1))
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(min(expires, 0) - time.Hour), NotAfter: time.Now().Add(expires),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, private.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		a.t.Fatal(err)
	}
	return encode("CERTIFICATE", der), encode("PRIVATE KEY", pkcs8)
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// A folder holds the files of a test.
type folder struct {
	t   *testing.T
	dir string
}

func newFolder(t *testing.T) folder { return folder{t, t.TempDir()} }

func (f folder) path(name string) string { return filepath.Join(f.dir, name) }

func (f folder) write(name string, content []byte) PEM {
	f.t.Helper()
	if err := os.WriteFile(f.path(name), content, 0o600); err != nil {
		f.t.Fatal(err)
	}
	return File(f.path(name))
}

// A journal is a log to look at.
type journal struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.Write(p)
}

func (j *journal) logger() *slog.Logger { return slog.New(slog.NewTextHandler(j, nil)) }

// take returns what was logged since the last time.
func (j *journal) take() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.b.Reset()
	return j.b.String()
}

// handshake connects a client to a server. It returns what the client got to know of the server, what the server got to know
// of the client, and the errors of both, of which the client's includes not being served after a handshake that it thought
// complete.
func handshake(server, client *tls.Config) (seen, met tls.ConnectionState, clientErr, serverErr error) {
	listener := bufconn.Listen(1 << 16) // unlike net.Pipe it has room for an alert that nobody reads yet
	defer listener.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		var a net.Conn
		if a, serverErr = listener.Accept(); serverErr != nil {
			return
		}
		conn := tls.Server(a, server)
		if serverErr = conn.Handshake(); serverErr == nil {
			met = conn.ConnectionState()
			_, serverErr = conn.Write([]byte("hello"))
		}
		conn.Close()
	}()
	b, clientErr := listener.Dial()
	if clientErr != nil {
		return seen, met, clientErr, errors.New("not dialled")
	}
	conn := tls.Client(b, client)
	if clientErr = conn.Handshake(); clientErr == nil {
		seen = conn.ConnectionState()
		_, clientErr = io.ReadFull(conn, make([]byte, 5))
	}
	conn.Close()
	<-done
	return seen, met, clientErr, serverErr
}

func mustServer(t *testing.T, c ServerConfig) *Server {
	t.Helper()
	s, err := NewServer(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustClient(t *testing.T, c ClientConfig) *tls.Config {
	t.Helper()
	config, err := Client(c)
	if err != nil {
		t.Fatal(err)
	}
	return config
}

func wantError(t *testing.T, err error, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("got error %v, want one with %q", err, text)
		}
	}
}

// A server from files and one from memory serve the clients that trust them, and no others.
func TestTrust(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	cert, key := ca.issue("broker.test", time.Hour)
	f := newFolder(t)
	inBase64 := func(data []byte) PEM {
		p, err := Base64(base64.StdEncoding.EncodeToString(data))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	for name, c := range map[string]ServerConfig{
		"files":  {Certificate: f.write("cert.pem", cert), Key: f.write("key.pem", key)},
		"memory": {Certificate: Memory(cert), Key: Memory(key)},
		"base64": {Certificate: inBase64(cert), Key: inBase64(key)},
		"mixed":  {Certificate: Memory(cert), Key: File(f.path("key.pem"))},
	} {
		t.Run(name, func(t *testing.T) {
			s := mustServer(t, c)
			if left := time.Until(s.NotAfter()); left < 58*time.Minute || left > time.Hour {
				t.Errorf("expires in %v", left)
			}
			state, _, err, _ := handshake(s.TLSConfig(), mustClient(t, ClientConfig{CA: Memory(ca.pem), ServerName: "broker.test"}))
			if err != nil || state.Version != tls.VersionTLS13 || state.NegotiatedProtocol != "h2" {
				t.Errorf("got version %x, protocol %q, error %v", state.Version, state.NegotiatedProtocol, err)
			}
			_, _, err, _ = handshake(s.TLSConfig(), mustClient(t, ClientConfig{CA: Memory(ca.pem), ServerName: "other.test"}))
			wantError(t, err, "certificate is valid for broker.test, not other.test")
			_, _, err, _ = handshake(s.TLSConfig(), mustClient(t, ClientConfig{CA: Memory(other.pem), ServerName: "broker.test"}))
			wantError(t, err, "signed by unknown authority")
			_, _, err, _ = handshake(s.TLSConfig(), mustClient(t, ClientConfig{ServerName: "broker.test"})) // the system's
			wantError(t, err, "signed by unknown authority")
			_, _, err, _ = handshake(s.TLSConfig(), mustClient(t, ClientConfig{ServerName: "broker.test", InsecureSkipVerify: true}))
			if err != nil {
				t.Errorf("without verification: %v", err)
			}
			both := append(bytes.Clone(other.pem), ca.pem...)
			_, _, err, _ = handshake(s.TLSConfig(), mustClient(t, ClientConfig{CA: Memory(both), ServerName: "broker.test"}))
			if err != nil {
				t.Errorf("the second of two authorities: %v", err)
			}
		})
	}
}

// Envoy offers both HTTP versions, old peers an old TLS.
func TestProtocols(t *testing.T) {
	ca := newAuthority(t)
	cert, key := ca.issue("broker.test", time.Hour)
	s := mustServer(t, ServerConfig{Certificate: Memory(cert), Key: Memory(key)})
	for _, test := range []struct {
		name   string
		change func(*tls.Config)
		want   string // the protocol, or part of the error
	}{
		{"h2 and http/1.1", func(c *tls.Config) { c.NextProtos = []string{"h2", "http/1.1"} }, "h2"},
		{"http/1.1 and h2", func(c *tls.Config) { c.NextProtos = []string{"http/1.1", "h2"} }, "h2"},
		{"h3", func(c *tls.Config) { c.NextProtos = []string{"h3"} }, "no application protocol"},
		// crypto/tls lets these through without a protocol, and grpc then refuses them.
		{"only http/1.1", func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }, ""},
		{"none", func(c *tls.Config) { c.NextProtos = nil }, ""},
		{"TLS 1.2", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, "h2"},
		{"TLS 1.1", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }, "protocol version not supported"},
	} {
		t.Run(test.name, func(t *testing.T) {
			client := mustClient(t, ClientConfig{CA: Memory(ca.pem), ServerName: "broker.test"})
			test.change(client)
			state, _, err, _ := handshake(s.TLSConfig(), client)
			if err != nil && test.want != "" {
				wantError(t, err, test.want)
			} else if err != nil {
				t.Error(err)
			} else if state.NegotiatedProtocol != test.want {
				t.Errorf("got %q, want %q", state.NegotiatedProtocol, test.want)
			}
		})
	}
	// Our client is as strict about what it talks to.
	old := s.TLSConfig()
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	_, _, err, _ := handshake(old, mustClient(t, ClientConfig{CA: Memory(ca.pem), ServerName: "broker.test"}))
	wantError(t, err, "protocol version not supported")
}

func TestClientCertificates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, clients, newClients := newAuthority(t), newAuthority(t), newAuthority(t)
		cert, key := ca.issue("broker.test", 100*time.Hour)
		f := newFolder(t)
		var log journal
		s := mustServer(t, ServerConfig{
			Certificate: Memory(cert), Key: Memory(key), ClientCA: f.write("clients.pem", clients.pem), Log: log.logger(),
		})
		config := s.TLSConfig()
		sessions := tls.NewLRUClientSessionCache(10)
		connect := func(signer *authority, expires time.Duration) error {
			c := ClientConfig{CA: Memory(ca.pem), ServerName: "broker.test"}
			if signer != nil {
				cert, key := signer.issue("client.test", expires)
				c.Certificate, c.Key = Memory(cert), Memory(key)
			}
			client := mustClient(t, c)
			client.ClientSessionCache = sessions
			if signer != nil { // else the client holds back a certificate that the server does not ask for
				client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &client.Certificates[0], nil }
			}
			_, met, clientErr, serverErr := handshake(config, client)
			if (clientErr == nil) != (serverErr == nil) {
				t.Errorf("client %v, server %v", clientErr, serverErr)
			}
			if serverErr == nil && met.VerifiedChains[0][0].Subject.CommonName != "client.test" {
				t.Errorf("met %v", met.VerifiedChains)
			}
			return serverErr
		}
		if err := connect(clients, time.Hour); err != nil {
			t.Error(err)
		}
		wantError(t, connect(nil, 0), "client didn't provide a certificate")
		wantError(t, connect(ca, time.Hour), "unknown authority")
		wantError(t, connect(clients, -time.Minute), "expired")

		f.write("clients.pem", newClients.pem)
		time.Sleep(time.Second)
		if err := connect(newClients, time.Hour); err != nil {
			t.Error(err)
		}
		wantError(t, connect(clients, time.Hour), "unknown authority")
		if got := log.take(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "file reloaded") || !strings.Contains(got, "certificates=1") {
			t.Errorf("logged %s", got)
		}

		// An authority file that is spoiled lets in neither everybody nor nobody.
		for _, spoiled := range [][]byte{[]byte("rubbish"), append(bytes.Clone(newClients.pem), encode("CERTIFICATE", []byte("rubbish"))...)} {
			f.write("clients.pem", spoiled)
			time.Sleep(time.Second)
			if err := connect(newClients, time.Hour); err != nil {
				t.Error(err)
			}
			wantError(t, connect(clients, time.Hour), "unknown authority")
			wantError(t, connect(nil, 0), "client didn't provide a certificate")
			if got := log.take(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "level=ERROR") || !strings.Contains(got, "clients.pem") {
				t.Errorf("logged %s", got)
			}
		}

		// One that is taken away lets in nobody, until it is back.
		f.write("clients.pem", newClients.pem)
		time.Sleep(time.Second)
		if err := connect(newClients, time.Hour); err != nil {
			t.Error(err)
		}
		log.take()
		f.write("clients.pem", nil)
		time.Sleep(time.Second)
		wantError(t, connect(newClients, time.Hour), "unknown authority")
		wantError(t, connect(nil, 0), "client didn't provide a certificate")
		if got := log.take(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "no longer in force") {
			t.Errorf("logged %s", got)
		}
		f.write("clients.pem", newClients.pem)
		time.Sleep(time.Second)
		if err := connect(newClients, time.Hour); err != nil {
			t.Error(err)
		}
		log.take()
	})
}

// A new certificate is used a second after it was written. While the files do not fit together the old one is.
func TestReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca := newAuthority(t)
		f := newFolder(t)
		cert1, key1 := ca.issue("broker.test", 10*time.Hour)
		cert2, key2 := ca.issue("broker.test", 20*time.Hour)
		cert3, key3 := ca.issue("broker.test", -time.Minute)
		if err := os.Mkdir(f.path("private"), 0o700); err != nil { // as in /etc/ssl
			t.Fatal(err)
		}
		var log journal
		s := mustServer(t, ServerConfig{Certificate: f.write("cert.pem", cert1), Key: f.write("private/key.pem", key1), Log: log.logger()})
		config := s.TLSConfig()
		client := mustClient(t, ClientConfig{CA: Memory(ca.pem), ServerName: "broker.test"})
		secrets := []string{lines(key1)[1][:20], lines(key2)[1][:20], lines(key3)[1][:20]}
		want := func(what string, cert []byte, logged ...string) {
			t.Helper()
			time.Sleep(time.Second)
			for range 2 { // the second connection must change nothing
				state, _, err, _ := handshake(config, client)
				if err != nil {
					t.Errorf("%s: %v", what, err)
				} else if got := encode("CERTIFICATE", state.PeerCertificates[0].Raw); !bytes.Equal(got, cert) {
					t.Errorf("%s: another certificate: %v", what, state.PeerCertificates[0].NotAfter)
				} else if !s.NotAfter().Equal(state.PeerCertificates[0].NotAfter) {
					t.Errorf("%s: NotAfter is %v", what, s.NotAfter())
				}
			}
			got := log.take()
			if strings.Count(got, "\n") != min(1, len(logged)) {
				t.Errorf("%s: logged %s", what, got)
			}
			for _, text := range logged {
				if !strings.Contains(got, text) {
					t.Errorf("%s: logged %s, want %s", what, got, text)
				}
			}
			for _, secret := range secrets {
				if strings.Contains(got, secret) {
					t.Errorf("%s: a private key is logged: %s", what, got)
				}
			}
		}
		want("at first", cert1)
		f.write("cert.pem", cert2)
		want("only the certificate is new", cert1, "level=ERROR", "private key does not match public key", f.path("cert.pem"), f.path("private/key.pem"))
		want("still", cert1)
		f.write("private/key.pem", key2)
		want("both are new", cert2, "level=INFO", "file reloaded", "names=[broker.test]", "not_after=")
		f.write("private/key.pem", []byte("rubbish"))
		want("spoiled key", cert2, "level=ERROR", "failed to find any PEM data in key input")
		if err := os.Remove(f.path("private/key.pem")); err != nil {
			t.Fatal(err)
		}
		want("no key", cert2, "level=ERROR", "private/key.pem: no such file")
		f.write("private/key.pem", key2)
		want("key is back", cert2, "level=INFO")

		// An expired certificate is what was asked for, so it is used and complained about.
		f.write("cert.pem", cert3)
		f.write("private/key.pem", key3)
		time.Sleep(time.Second)
		_, _, err, _ := handshake(config, client)
		wantError(t, err, "certificate has expired")
		if got := log.take(); !strings.Contains(got, "level=WARN msg=\"certificate has expired, the other side will refuse it\"") {
			t.Errorf("logged %s", got)
		}
	})
}

func lines(b []byte) []string { return strings.Split(string(b), "\n") }

func TestValidity(t *testing.T) {
	ca := newAuthority(t)
	synctest.Test(t, func(t *testing.T) { // in the year 2000, when no certificate of ca is valid yet
		cert, key := ca.issue("broker.test", time.Hour)
		var log journal
		mustServer(t, ServerConfig{Certificate: Memory(cert), Key: Memory(key), Log: log.logger()})
		if got := log.take(); got != "" {
			t.Errorf("valid: logged %s", got)
		}
		time.Sleep(2 * time.Hour)
		s := mustServer(t, ServerConfig{Certificate: Memory(cert), Key: Memory(key), Log: log.logger()})
		if got := log.take(); !strings.Contains(got, "level=WARN") || !strings.Contains(got, "has expired") || !strings.Contains(got, "broker.test") {
			t.Errorf("expired: logged %s", got)
		}
		if s.NotAfter().After(time.Now()) {
			t.Errorf("not after %v", s.NotAfter())
		}
	})
	cert, key := ca.issue("broker.test", time.Hour)
	synctest.Test(t, func(t *testing.T) {
		var log journal
		mustServer(t, ServerConfig{Certificate: Memory(cert), Key: Memory(key), Log: log.logger()})
		if got := log.take(); !strings.Contains(got, "level=WARN") || !strings.Contains(got, "not valid yet") {
			t.Errorf("not valid yet: logged %s", got)
		}
	})
}

func TestNewServerRefuses(t *testing.T) {
	ca := newAuthority(t)
	cert, key := ca.issue("broker.test", time.Hour)
	_, otherKey := ca.issue("broker.test", time.Hour)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	f := newFolder(t)
	certFile, keyFile := f.write("cert.pem", cert), f.write("key.pem", key)
	absent := File(f.path("absent"))
	unreadable := f.write("unreadable", key)
	if err := os.Chmod(f.path("unreadable"), 0); err != nil {
		t.Fatal(err)
	}
	passphrase := encode("ENCRYPTED PRIVATE KEY", []byte("secret"))
	oldPassphrase := pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Headers: map[string]string{"Proc-Type": "4,ENCRYPTED"}, Bytes: []byte("secret")})

	for _, test := range []struct {
		name   string
		config ServerConfig
		want   []string
	}{
		{"nothing", ServerConfig{}, []string{"TLS certificate: neither certificate nor private key is given"}},
		{"no key", ServerConfig{Certificate: certFile}, []string{"without its private key"}},
		{"no certificate", ServerConfig{Key: keyFile}, []string{"without its certificate"}},
		{"only clients", ServerConfig{ClientCA: Memory(ca.pem)}, []string{"neither certificate nor private key"}},
		{"absent certificate", ServerConfig{Certificate: absent, Key: keyFile}, []string{absent.String() + ": no such file"}},
		{"absent key", ServerConfig{Certificate: certFile, Key: absent}, []string{absent.String() + ": no such file"}},
		{"unreadable key", ServerConfig{Certificate: certFile, Key: unreadable}, []string{unreadable.String() + ": permission denied"}},
		{"folder", ServerConfig{Certificate: File(f.dir), Key: keyFile}, []string{f.dir + ": is a directory"}},
		{"other key", ServerConfig{Certificate: certFile, Key: f.write("other.pem", otherKey)}, []string{"private key does not match public key", certFile.String(), f.path("other.pem")}},
		{"other kind of key", ServerConfig{Certificate: certFile, Key: Memory(encode("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey)))}, []string{"private key type does not match", "(in memory)"}},
		{"swapped", ServerConfig{Certificate: keyFile, Key: certFile}, []string{"failed to find certificate PEM data"}},
		{"key is a certificate", ServerConfig{Certificate: certFile, Key: certFile}, []string{"found a certificate rather than a key"}},
		{"rubbish", ServerConfig{Certificate: Memory([]byte("rubbish")), Key: keyFile}, []string{"failed to find any PEM data in certificate input"}},
		{"passphrase", ServerConfig{Certificate: certFile, Key: Memory(passphrase)}, []string{"encrypted with a passphrase, want it without"}},
		{"old passphrase", ServerConfig{Certificate: certFile, Key: Memory(oldPassphrase)}, []string{"encrypted with a passphrase, want it without"}},
		{"PEM for a file name", ServerConfig{Certificate: certFile, Key: File(string(key))}, []string{"got PEM data where the name of a file is wanted"}},
		{"base64 for a file name", ServerConfig{Certificate: certFile, Key: File(base64.StdEncoding.EncodeToString(key))}, []string{"got PEM data where the name of a file is wanted"}},
		{"absent clients", ServerConfig{Certificate: certFile, Key: keyFile, ClientCA: absent}, []string{"client certificate authority", absent.String() + ": no such file"}},
		{"no clients", ServerConfig{Certificate: certFile, Key: keyFile, ClientCA: Memory([]byte("\n"))}, []string{"client certificate authority (in memory): no certificate in PEM form"}},
		{"clients are a key", ServerConfig{Certificate: certFile, Key: keyFile, ClientCA: keyFile}, []string{"PEM block 1 is a PRIVATE KEY, want only CERTIFICATE"}},
		{"spoiled clients", ServerConfig{Certificate: certFile, Key: keyFile, ClientCA: Memory(append(bytes.Clone(ca.pem), encode("CERTIFICATE", []byte("x"))...))}, []string{"certificate 2: x509: malformed certificate"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if strings.HasPrefix(test.name, "unreadable") && os.Getuid() == 0 {
				t.Skip("root reads everything")
			}
			s, err := NewServer(test.config)
			if s != nil {
				t.Error("got a server")
			}
			wantError(t, err, test.want...)
			for _, secret := range append(lines(key), lines(otherKey)...) {
				if len(secret) > 8 && !strings.Contains(secret, "---") && (strings.Contains(err.Error(), secret) ||
					strings.Contains(err.Error(), base64.StdEncoding.EncodeToString([]byte(secret))[4:12])) {
					t.Errorf("the error shows a private key: %v", err)
				}
			}
		})
	}
}

func TestClientRefuses(t *testing.T) {
	ca := newAuthority(t)
	cert, key := ca.issue("client.test", time.Hour)
	absent := File(filepath.Join(t.TempDir(), "absent"))
	for _, test := range []struct {
		name   string
		config ClientConfig
		want   string
	}{
		{"absent authority", ClientConfig{CA: absent}, absent.String() + ": no such file"},
		{"authority and no verification", ClientConfig{CA: Memory(ca.pem), InsecureSkipVerify: true}, "want one or the other"},
		{"no key", ClientConfig{Certificate: Memory(cert)}, "TLS client certificate: the certificate is given without its private key"},
		{"no certificate", ClientConfig{Key: Memory(key)}, "TLS client certificate: the private key is given without its certificate"},
	} {
		t.Run(test.name, func(t *testing.T) {
			config, err := Client(test.config)
			if config != nil {
				t.Error("got a configuration")
			}
			wantError(t, err, test.want)
		})
	}
	if config := mustClient(t, ClientConfig{}); config.InsecureSkipVerify || config.MinVersion != tls.VersionTLS12 {
		t.Error("the zero configuration does not verify")
	}
}

func TestPEM(t *testing.T) {
	_, key := newAuthority(t).issue("x", time.Hour)
	encoded := base64.StdEncoding.EncodeToString(key)
	for _, given := range []string{"", encoded, encoded[:76] + "\n" + encoded[76:] + "\n"} {
		p, err := Base64(given)
		if err != nil || p.IsZero() != (given == "") || given != "" && *p.data != string(key) {
			t.Errorf("%q: got %v, %v", given, p, err)
		}
	}
	for given, want := range map[string]string{
		string(key): "got PEM, want it in base64",
		encoded[1:]: "not base64",
		base64.StdEncoding.EncodeToString([]byte("/etc/ssl/cert.pem")): "not PEM, want a block that begins with -----BEGIN",
	} {
		p, err := Base64(given)
		wantError(t, err, want)
		if !p.IsZero() {
			t.Error("got data with the error")
		}
		if err != nil && strings.Contains(err.Error(), given[len(given)/2:]) {
			t.Errorf("the error shows what was given: %v", err)
		}
	}
	if !File("").IsZero() || !Memory(nil).IsZero() || File("x").IsZero() || Memory([]byte("x")).IsZero() {
		t.Error("zero is not what it should be")
	}
	// A configuration that is printed or logged shows no private key.
	for _, c := range []any{ServerConfig{Key: Memory(key)}, ServerConfig{Key: File(string(key))}, &ClientConfig{Key: Memory(key)}, Memory(key),
		struct{ p PEM }{Memory(key)}} {
		var b bytes.Buffer
		slog.New(slog.NewTextHandler(&b, nil)).Info("", "c", c)
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
			fmt.Fprintf(&b, verb, c)
		}
		if err := json.NewEncoder(&b).Encode(c); err != nil && !strings.Contains(err.Error(), "unsupported type") {
			t.Error(err)
		}
		secret := lines(key)[1][10:30]
		if text := b.String(); strings.Contains(text, secret) || strings.Contains(text, fmt.Sprintf("%x", secret)) {
			t.Errorf("shows a private key: %s", text)
		}
	}
	if got := fmt.Sprint(Memory(key), File("a.pem"), PEM{}); got != "(in memory) a.pem (none)" {
		t.Errorf("got %s", got)
	}
}

// A gRPC server keeps its connections through a change of certificate and uses the new one for the next.
func TestGRPC(t *testing.T) {
	ca, clients := newAuthority(t), newAuthority(t)
	f := newFolder(t)
	cert1, key1 := ca.issue("broker.test", 10*time.Hour)
	cert2, key2 := ca.issue("broker.test", 20*time.Hour)
	s := mustServer(t, ServerConfig{
		Certificate: f.write("cert.pem", cert1), Key: f.write("key.pem", key1), ClientCA: Memory(clients.pem), Log: slog.New(slog.DiscardHandler),
	})
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(s.TLSConfig())))
	grpc_health_v1.RegisterHealthServer(server, health.NewServer())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
	dial := func(c ClientConfig) *grpc.ClientConn {
		conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(mustClient(t, c))))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	check := func(conn *grpc.ClientConn) (serverCert []byte, err error) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		var p peer.Peer
		if _, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.Peer(&p)); err != nil {
			return nil, err
		}
		return encode("CERTIFICATE", p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates[0].Raw), nil
	}

	clientCert, clientKey := clients.issue("client.test", time.Hour)
	good := ClientConfig{CA: Memory(ca.pem), ServerName: "broker.test", Certificate: Memory(clientCert), Key: Memory(clientKey)}
	first := dial(good)
	if got, err := check(first); err != nil || !bytes.Equal(got, cert1) {
		t.Fatalf("the first certificate: %v", err)
	}
	without := good
	without.Certificate, without.Key = PEM{}, PEM{}
	if _, err := check(dial(without)); err == nil {
		t.Error("served without a client certificate")
	}
	for _, protocols := range [][]string{nil, {"http/1.1"}} {
		config := mustClient(t, good)
		config.NextProtos = protocols
		conn, err := tls.Dial("tcp", listener.Addr().String(), config)
		if err == nil { // with TLS 1.3 the client is done before the server has seen its certificate
			if n, readErr := conn.Read(make([]byte, 1)); !errors.Is(readErr, io.EOF) {
				t.Errorf("%q: read %d bytes, %v, want the connection closed", protocols, n, readErr)
			}
			conn.Close()
		}
	}
	f.write("cert.pem", cert2)
	f.write("key.pem", key2)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		got, err := check(dial(good))
		if err == nil && bytes.Equal(got, cert2) {
			break
		}
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("the second certificate is not used: %v", err)
		}
	}
	if got, err := check(first); err != nil || !bytes.Equal(got, cert1) {
		t.Errorf("the first connection: %v", err)
	}
}

func TestCheckPlaintext(t *testing.T) {
	for addr, local := range map[string]bool{
		"127.0.0.1:5443":          true,
		"127.1.2.3:5443":          true,
		"[::1]:5443":              true,
		"[::ffff:127.0.0.1]:5443": true,
		"[::1%lo]:5443":           true,
		"localhost:5443":          true,
		"LOCALHOST.:5443":         true,
		"unix:/run/pgbroker.sock": true,
		":5443":                   false,
		"0.0.0.0:5443":            false,
		"[::]:5443":               false,
		"10.0.0.1:5443":           false,
		"[fe80::1%eth0]:5443":     false,
		"[::ffff:10.0.0.1]:5443":  false,
		"broker.test:5443":        false,
		"localhost.test:5443":     false,
		"127.0.0.1.test:5443":     false,
		"0x7f.1:5443":             false,
	} {
		err := CheckPlaintext(addr, false)
		if (err == nil) != local {
			t.Errorf("%s: %v", addr, err)
		}
		if err != nil {
			wantError(t, err, PlaintextFlag, `"`+addr+`"`, "127.0.0.1:5443")
		}
		if err := CheckPlaintext(addr, true); err != nil {
			t.Errorf("%s, allowed: %v", addr, err)
		}
	}
	for _, addr := range []string{"", "127.0.0.1", "::1:5443", "http://127.0.0.1:5443"} {
		for _, allow := range []bool{false, true} {
			wantError(t, CheckPlaintext(addr, allow), "want host:port, for instance 127.0.0.1:5443")
		}
	}
}
