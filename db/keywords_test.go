package db_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"pgbroker/db"
	"pgbroker/db/dbtest"
)

// What keywords of libpq promise about the server holds against a real one: who it is, how it asks for the password, and what
// TLS it speaks.
func TestKeywordsOnAServer(t *testing.T) {
	t.Parallel()
	p := dbtest.Server(t, nil)
	ca := newAuthority(t)
	file := func(name string) string { return filepath.Join(p.Dir(), name) }
	cert, key := ca.sign(t, "database.example")
	writeCert(t, file("server.crt"), cert)
	writeKey(t, file("server.key"), key)
	if err := os.WriteFile(file("hba.conf"), []byte("local all all trust\nhostssl all trusted 127.0.0.1/32 trust\nhostssl all plain 127.0.0.1/32 password\n"+
		"host all all 127.0.0.1/32 scram-sha-256\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(p.Dir())
	if err != nil {
		t.Fatal(err)
	}
	owner := info.Sys().(*syscall.Stat_t)
	for _, name := range []string{"server.crt", "server.key", "hba.conf"} {
		if err := os.Chown(file(name), int(owner.Uid), int(owner.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	p.Exec("CREATE ROLE trusted LOGIN")
	p.Exec("CREATE ROLE plain LOGIN PASSWORD '" + dbtest.Password + "'")
	for name, value := range map[string]string{
		"ssl": "on", "ssl_cert_file": file("server.crt"), "ssl_key_file": file("server.key"), "hba_file": file("hba.conf"),
		"ssl_max_protocol_version": "TLSv1.2",
	} {
		p.Exec("ALTER SYSTEM SET " + name + " = '" + value + "'")
	}
	p.Stop()
	p.Restart()
	root := filepath.Join(t.TempDir(), "ca.crt")
	writeCert(t, root, ca.cert)

	_, port, err := net.SplitHostPort(p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	base := fmt.Sprintf("port=%s dbname=pgbroker password='%s' ", port, dbtest.Password)
	verified := base + "user=pgbroker sslmode=verify-full sslrootcert=" + root + " "
	for _, tt := range []struct {
		name, text string
		fails      string // part of the error; "": it works
	}{
		{"address and name", verified + "host=database.example hostaddr=127.0.0.1", ""},
		{"address and another name", verified + "host=other.example hostaddr=127.0.0.1", "other.example"},
		{"address alone", verified + "hostaddr=127.0.0.1", ""},
		{"name that is not looked up", verified + "host=database.example", "database.example"},
		{"several, and an address of one", verified + "host=127.0.0.2,database.example hostaddr=,127.0.0.1", ""},
		{"any order", verified + "host=database.example,database.example hostaddr=127.0.0.1,127.0.0.1 load_balance_hosts=random", ""},
		{"TLS of the server", verified + "host=127.0.0.1 ssl_min_protocol_version=TLSv1.2 ssl_max_protocol_version=TLSv1.2", ""},
		{"newer TLS", verified + "host=127.0.0.1 ssl_min_protocol_version=TLSv1.3", "protocol version"},
		{"channel bound", verified + "host=127.0.0.1 channel_binding=require", ""},
		{"channel that cannot be bound", base + "user=pgbroker host=127.0.0.1 sslmode=disable channel_binding=require", "channel binding"},
		{"trust, channel bound", base + "user=trusted host=127.0.0.1 sslmode=require channel_binding=require", "channel binding"},
		{"scram demanded", verified + "host=127.0.0.1 require_auth=scram-sha-256", ""},
		{"scram demanded, password asked", base + "user=plain host=127.0.0.1 sslmode=require require_auth=scram-sha-256", "require_auth"},
		{"anything but a plain password", base + "user=plain host=127.0.0.1 sslmode=require require_auth=!password", "require_auth"},
		{"scram demanded, nothing asked", base + "user=trusted host=127.0.0.1 sslmode=require require_auth=scram-sha-256", "require_auth"},
		{"nothing asked", base + "user=trusted host=127.0.0.1 sslmode=require require_auth=none", ""},
		{"dialling", base + "user=pgbroker host=127.0.0.1 sslmode=disable keepalives_idle=9 keepalives_count=2 tcp_user_timeout=5000", ""},
		{"what changes nothing", base + "user=pgbroker host=127.0.0.1 sslmode=prefer gssencmode=prefer client_encoding=auto sslcompression=1 gsslib=gssapi " +
			"fallback_application_name=x krbsrvname=postgres replication=off sslkeylogfile=/x", ""},
		{"direct, which the server does not speak", base + "user=pgbroker host=127.0.0.1 sslmode=require sslnegotiation=direct", "failed to connect"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, log := open(t, db.Config{ConnString: tt.text})
			var n int
			err := d.QueryRow(t.Context(), "SELECT 1").Scan(&n)
			switch {
			case tt.fails == "" && err != nil:
				t.Error(err)
			case tt.fails != "" && (err == nil || !strings.Contains(err.Error(), tt.fails)):
				t.Errorf("got %v, want an error about %s", err, tt.fails)
			}
			if strings.Contains(fmt.Sprint(err, log), dbtest.Password) {
				t.Errorf("the password is shown: %v %s", err, log)
			}
		})
	}
}
