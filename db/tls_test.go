package db_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgbroker/db"
	"pgbroker/db/dbtest"
)

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := new(authority)
	a.cert, a.key = a.sign(t, "test authority")
	return a
}

// sign makes a certificate for a name, the authority's own when it has none
// yet.
func (a *authority) sign(t *testing.T, name string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
	}
	if !strings.Contains(name, " ") {
		cert.DNSNames = []string{name}
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		cert.IsCA, cert.KeyUsage = true, x509.KeyUsageCertSign
		parent, signer = cert, key
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func writeCert(t *testing.T, path string, cert *x509.Certificate) {
	t.Helper()
	writePEM(t, path, "CERTIFICATE", cert.Raw)
}

func writeKey(t *testing.T, path string, key *ecdsa.PrivateKey) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, path, "PRIVATE KEY", der)
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// sslmode and certificates are as libpq has them, and certificates are read
// again for each new connection.
func TestTLS(t *testing.T) {
	t.Parallel()
	p := dbtest.Server(t, nil)
	ca, other := newAuthority(t), newAuthority(t)

	// The server's side: it asks for a certificate with the name of the user.
	serverFile := func(name string) string { return filepath.Join(p.Dir(), name) }
	cert, key := ca.sign(t, "server")
	writeCert(t, serverFile("server.crt"), cert)
	writeKey(t, serverFile("server.key"), key)
	writeCert(t, serverFile("ca.crt"), ca.cert)
	if err := os.WriteFile(serverFile("hba.conf"), []byte("local all all trust\nhostssl all all 127.0.0.1/32 cert\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(p.Dir())
	if err != nil {
		t.Fatal(err)
	}
	owner := info.Sys().(*syscall.Stat_t)
	for _, name := range []string{"server.crt", "server.key", "ca.crt", "hba.conf"} {
		if err := os.Chown(serverFile(name), int(owner.Uid), int(owner.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	for name, value := range map[string]string{
		"ssl": "on", "ssl_cert_file": serverFile("server.crt"), "ssl_key_file": serverFile("server.key"),
		"ssl_ca_file": serverFile("ca.crt"), "hba_file": serverFile("hba.conf"),
	} {
		p.Exec("ALTER SYSTEM SET " + name + " = '" + value + "'")
	}
	p.Stop()
	p.Restart()

	// The client's side.
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	writeCert(t, file("ca.crt"), ca.cert)
	writeCert(t, file("other.crt"), other.cert)
	cert, key = ca.sign(t, dbtest.OwnerRole)
	writeCert(t, file("client.crt"), cert)
	writeKey(t, file("client.key"), key)
	base := strings.Replace(p.ConnString(), "?sslmode=disable", "?", 1)
	client := "&sslcert=" + file("client.crt") + "&sslkey=" + file("client.key")

	for _, tt := range []struct {
		options string
		want    string // part of the error; empty: it works
	}{
		{"sslmode=require" + client, ""},
		{"sslmode=verify-ca&sslrootcert=" + file("ca.crt") + client, ""},
		{"sslmode=verify-full&sslrootcert=" + file("ca.crt") + client, ""},
		{"sslmode=verify-full&sslrootcert=" + file("other.crt") + client, "certificate"},
		{"sslmode=verify-full&sslrootcert=" + file("ca.crt"), "valid client certificate"},
		{"sslmode=disable", "no pg_hba.conf entry"},
	} {
		d, _ := open(t, db.Config{ConnString: base + tt.options})
		err := ping(d)(t.Context())
		switch {
		case tt.want == "" && err != nil:
			t.Errorf("%s: %v", tt.options, err)
		case tt.want != "" && (!db.IsUnavailable(err) || !strings.Contains(err.Error(), tt.want)):
			t.Errorf("%s: got %v, want an error that is unavailable and holds %q", tt.options, err, tt.want)
		}
	}

	// A certificate is renewed.
	d, _ := open(t, db.Config{ConnString: base + "sslmode=verify-full&sslrootcert=" + file("ca.crt") + client})
	if err := ping(d)(t.Context()); err != nil {
		t.Fatal(err)
	}
	cert, key = other.sign(t, dbtest.OwnerRole)
	writeCert(t, file("client.crt"), cert)
	writeKey(t, file("client.key"), key)
	d.Reset()
	await(t, func(ctx context.Context) error {
		if err := ping(d)(ctx); err == nil {
			return errors.New("a certificate of another authority is accepted")
		}
		return nil
	})
	cert, key = ca.sign(t, dbtest.OwnerRole)
	writeCert(t, file("client.crt"), cert)
	writeKey(t, file("client.key"), key)
	await(t, ping(d))
}
