package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"pgbroker/db/dbtest"
	"pgbroker/migrations"
)

// publicDir is a directory that another user may enter, which t.TempDir is not: run by root, Postgres runs as somebody else.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "pgbroker-cmd-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// freeAddress returns an address that is free at the moment.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// TestServeEmbedded is the life of a developer's server: first start, the commands that it proposes, stop, second start.
func TestServeEmbedded(t *testing.T) {
	if testing.Short() {
		t.Skip("starts Postgres twice")
	}
	dir := filepath.Join(publicDir(t), "state")
	env := append(os.Environ(), "PGBROKER_DATA_DIR="+dir, "PGBROKER_ADDRESS="+freeAddress(t))
	server := start(t, env, "serve")
	server.line(t, "pgbroker is ready.")
	secret := filepath.Join(dir, secretFileName)
	if line := server.line(t, "secret"); !strings.HasSuffix(line, secret) {
		t.Errorf("got %q, want the file %s", line, secret)
	}
	_, psql, _ := strings.Cut(server.line(t, "psql"), "psql     ")
	info, err := os.Stat(secret)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the secret file: got %v, %v, want mode 0600", info, err)
	}
	before, err := os.ReadFile(secret)
	if err != nil {
		t.Fatal(err)
	}

	mustTry(t, env, "health", "--wait", "30s")
	watch := start(t, env, "watch", "--since", "0")
	mustTry(t, env, "record", "put", "-t", "session.Session", "-i", "demo", "-d", `{"id": "demo", "user_id": "jane"}`)
	mustTry(t, env, "record", "put", "-t", "session.Session", "-i", "stays", "-d", `{"id": "stays"}`)
	watch.line(t, "demo")
	out, err := exec.Command("sh", "-c", psql+` -c "DELETE FROM pgbroker.sessions WHERE id = 'demo'"`).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", psql, err, out)
	}
	if line := watch.line(t, "delete"); !strings.Contains(line, "demo") {
		t.Errorf("watch: got %q", line)
	}
	watch.stop(t)
	if r := try(t, env, "serve"); r.code == exitOK || !strings.Contains(r.stderr, "address (env PGBROKER_ADDRESS)") {
		t.Errorf("a second one on the same address: got exit code %d and %q", r.code, r.stderr)
	}
	if r := try(t, env, "serve", "--address", "127.0.0.1:0"); r.code != exitFailure || !strings.Contains(r.stderr, "in use by another process") {
		t.Errorf("a second one on the same data: got exit code %d and %q", r.code, r.stderr)
	}
	if r := server.stop(t); r.code != exitOK {
		t.Fatalf("stop: got exit code %d: %s", r.code, r.stderr)
	}
	if strings.Contains(server.said(), strings.TrimSpace(string(before))) {
		t.Error("the secret is in the log")
	}

	server = start(t, env, "serve")
	server.line(t, "pgbroker is ready.")
	mustTry(t, env, "record", "get", "-t", "session.Session", "-i", "stays")
	if after, err := os.ReadFile(secret); err != nil || string(after) != string(before) {
		t.Errorf("the secret has changed: %v", err)
	}

	// When its Postgres dies, it does not go on pretending.
	pidFile, err := os.ReadFile(filepath.Join(dir, "postgres", "data", "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(pidFile), "\n")
	pid, err := strconv.Atoi(first)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case r := <-server.done:
		server.done <- r
		if r.code != exitFailure || !strings.Contains(r.stderr, "Postgres ended") {
			t.Errorf("Postgres was killed: got exit code %d and %q", r.code, r.stderr)
		}
	case <-time.After(40 * time.Second):
		t.Error("Postgres was killed, and serve goes on")
	}
}

func TestServeEphemeral(t *testing.T) {
	if testing.Short() {
		t.Skip("starts Postgres")
	}
	state := filepath.Join(t.TempDir(), "pgbroker")
	t.Setenv("XDG_STATE_HOME", filepath.Dir(state)) // where the default is, unless root runs this
	args := []string{"--address", freeAddress(t), "--ephemeral"}
	if os.Geteuid() == 0 {
		state = publicDir(t) + "/pgbroker"
		if err := os.Mkdir(state, 0o755); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--data-dir", state)
	}
	server := start(t, os.Environ(), append([]string{"serve"}, args...)...)
	server.line(t, "pgbroker is ready.")
	clientArgs := []string{"--address", args[1], "--data-dir", state}
	mustTry(t, nil, append([]string{"record", "put", "-t", "x", "-i", "y", "-d", "{}"}, clientArgs...)...)
	if r := server.stop(t); r.code != exitOK {
		t.Errorf("stop: got exit code %d: %s", r.code, r.stderr)
	}
	left, err := os.ReadDir(state)
	if len(left) > 0 || err != nil && !os.IsNotExist(err) {
		t.Errorf("left behind in %s: %v, %v", state, left, err)
	}
}

// get asks the HTTP endpoint.
func get(t *testing.T, address, path string) (int, string) {
	t.Helper()
	response, err := http.Get("http://" + address + path)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(body)
}

func TestServeDatabase(t *testing.T) {
	database := dbtest.New(t)
	address, metrics := freeAddress(t), freeAddress(t)
	env := []string{
		"DATABROKER_STORAGE_CONNECTION_STRING=" + database.ConnString, "SHARED_SECRET=" + canary,
		"GRPC_ADDRESS=" + address, "METRICS_ADDRESS=" + metrics,
	}
	server := start(t, env, "serve", "--log-level", "debug")
	mustTry(t, env, "health", "--wait", "30s")
	mustTry(t, env, "record", "put", "-t", "x", "-i", "y", "-d", "{}")
	for path, want := range map[string]string{"/livez": "ok\n", "/readyz": "ok\n", "/metrics": "pgbroker_build_info{"} {
		if code, body := get(t, metrics, path); code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("GET %s: got %d and %.200q, want %q", path, code, body, want)
		}
	}
	for path, want := range map[string]int{
		"/readyz?for=reading": http.StatusOK, "/readyz?for=writing": http.StatusOK, "/readyz?for=everything": http.StatusBadRequest,
	} {
		if code, body := get(t, metrics, path); code != want {
			t.Errorf("GET %s: got %d and %q, want %d", path, code, body, want)
		}
	}
	// Without a restart, and only for writing.
	database.Exec(t, "ALTER DATABASE "+pgx.Identifier{database.Config(t).Database}.Sanitize()+" SET default_transaction_read_only = on")
	database.TerminateBackends(t, "pgbroker")
	awaitWriting := func(code int, text string) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) { // there is nothing to wait on but the answer
			got, body := get(t, metrics, "/readyz?for=writing")
			if got == code && strings.Contains(body, text) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("GET /readyz?for=writing: got %d and %q, want %d and %q", got, body, code, text)
			}
		}
	}
	awaitWriting(http.StatusServiceUnavailable, "read-only")
	mustTry(t, env, "health", "--wait", "30s")
	if code, body := get(t, metrics, "/readyz"); code != http.StatusOK {
		t.Errorf("GET /readyz of a read-only database: got %d and %q", code, body)
	}
	if r := try(t, env, "health", "--for", "writing"); r.code != exitUnreachable || r.stdout != "NOT_SERVING\n" || !strings.Contains(r.stderr, "nothing can be written") {
		t.Errorf("health for writing to a read-only database: got exit code %d, %q, %q", r.code, r.stdout, r.stderr)
	}
	if r := try(t, env, "record", "put", "-t", "x", "-i", "y", "-d", "{}"); r.code != exitUnreachable || !strings.Contains(r.stderr, "read-only") {
		t.Errorf("put into a read-only database: got exit code %d, %q", r.code, r.stderr)
	}
	if got := mustTry(t, env, "info"); !strings.Contains(got, "no: the database server in use is read-only") {
		t.Errorf("info of a read-only database: got %q", got)
	}
	if got := mustTry(t, env, "info", "-o", "json"); !strings.Contains(got, `"writable":false,"not_writable_because":"the database server in use is read-only`) {
		t.Errorf("info -o json of a read-only database: got %q", got)
	}
	if _, body := get(t, metrics, "/metrics"); !strings.Contains(body, "pgbroker_database_writable 0\n") {
		t.Error("the metric does not say that nothing can be written")
	}
	database.Exec(t, "BEGIN READ WRITE; ALTER DATABASE "+pgx.Identifier{database.Config(t).Database}.Sanitize()+" RESET default_transaction_read_only; COMMIT")
	awaitWriting(http.StatusOK, "ok")
	mustTry(t, env, "record", "put", "-t", "x", "-i", "y", "-d", "{}")
	if code, _ := get(t, metrics, "/"); code != http.StatusNotFound {
		t.Errorf("GET /: got %d", code)
	}
	response, err := http.Post("http://"+metrics+"/readyz", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST /readyz: got %d", response.StatusCode)
	}
	if r := server.stop(t); r.code != exitOK {
		t.Errorf("stop: got exit code %d: %s", r.code, r.stderr)
	}
	if !strings.Contains(server.said(), `"level":"INFO"`) {
		t.Errorf("the log is not JSON: %s", server.said())
	}
	if strings.Contains(server.said(), canary) {
		t.Error("the secret is in the log")
	}
	body := ""
	for line := range server.lines {
		body += line
	}
	if body != "" {
		t.Errorf("standard output: got %q, want nothing with a database of one's own", body)
	}
}

// TestServeWaits: a database that comes up late is waited for, and clients hear why nothing works meanwhile.
func TestServeWaits(t *testing.T) {
	database := dbtest.New(t)
	u, err := url.Parse(database.ConnString)
	if err != nil {
		t.Fatal(err)
	}
	network, real := "tcp", u.Host
	if host := u.Query().Get("host"); host != "" {
		port := u.Query().Get("port")
		if port == "" {
			port = "5432"
		}
		network, real = "unix", filepath.Join(host, ".s.PGSQL."+port)
	}
	late := freeAddress(t)
	query := u.Query()
	query.Del("host")
	query.Del("port")
	query.Set("sslmode", "disable")
	u.RawQuery, u.Host = query.Encode(), late

	address, metrics := freeAddress(t), freeAddress(t)
	env := []string{"PGBROKER_ADDRESS=" + address, "PGBROKER_SHARED_SECRET=" + canary}
	server := start(t, env, "serve", "--database-url", u.String(), "--metrics-address", metrics)
	deadline := time.Now().Add(30 * time.Second)
	for try(t, env, "health").stdout != "NOT_SERVING\n" && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond) // there is nothing to wait on but the port
	}
	for _, purpose := range []string{"reading", "writing"} {
		if r := try(t, env, "health", "--for", purpose); r.code != exitUnreachable || r.stdout != "NOT_SERVING\n" {
			t.Errorf("health for %s without a database: got exit code %d, %q, %q", purpose, r.code, r.stdout, r.stderr)
		}
	}
	if r := try(t, env, "types"); r.code != exitUnreachable {
		t.Errorf("request without a database: got exit code %d and %q, want %d", r.code, r.stderr, exitUnreachable)
	}
	if code, _ := get(t, metrics, "/livez"); code != http.StatusOK {
		t.Errorf("GET /livez without a database: got %d", code)
	}
	if code, body := get(t, metrics, "/readyz"); code != http.StatusServiceUnavailable || !strings.HasPrefix(body, "not ready: ") {
		t.Errorf("GET /readyz without a database: got %d and %q", code, body)
	}

	listener, err := net.Listen("tcp", late)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			in, err := listener.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial(network, real)
			if err != nil {
				in.Close()
				continue
			}
			forward(in, out)
		}
	}()
	mustTry(t, env, "health", "--wait", "60s")
	mustTry(t, env, "types")
	if r := server.stop(t); r.code != exitOK {
		t.Errorf("stop: got exit code %d: %s", r.code, r.stderr)
	}
}

// TestServeRefuses: what is wrong with the database is said with its remedy, and the server ends, instead of serving half of it.
func TestServeRefuses(t *testing.T) {
	database := dbtest.New(t)
	env := []string{"PGBROKER_DATABASE_URL=" + database.ServerConnString, "SHARED_SECRET=" + canary, "GRPC_ADDRESS=" + freeAddress(t)}
	for what, c := range map[string]struct {
		wrong, right string
		want         []string
	}{
		"row level security": {"ALTER TABLE pgbroker.records ENABLE ROW LEVEL SECURITY", "ALTER TABLE pgbroker.records DISABLE ROW LEVEL SECURITY",
			[]string{"hides rows of pgbroker.records", "DISABLE ROW LEVEL SECURITY"}},
		"a right": {"REVOKE UPDATE ON pgbroker.leases FROM " + dbtest.ServerRole, "GRANT UPDATE ON pgbroker.leases TO " + dbtest.ServerRole,
			[]string{"lacks rights: UPDATE on pgbroker.leases", "pgbroker migrate grants --server " + dbtest.ServerRole}},
		"every right": {"REVOKE USAGE ON SCHEMA pgbroker FROM " + dbtest.ServerRole, "GRANT USAGE ON SCHEMA pgbroker TO " + dbtest.ServerRole,
			[]string{"permission denied for schema pgbroker", "pgbroker migrate grants --server"}},
	} {
		database.Exec(t, c.wrong)
		r := try(t, env, "serve")
		for _, want := range c.want {
			if r.code != exitFailure || !strings.Contains(r.stderr, want) {
				t.Errorf("%s: got exit code %d and %q, want %q", what, r.code, r.stderr, want)
			}
		}
		database.Exec(t, c.right)
	}
	server := start(t, env, "serve")
	mustTry(t, env, "health", "--wait", "30s")
	if r := server.stop(t); r.code != exitOK {
		t.Errorf("stop: got exit code %d: %s", r.code, r.stderr)
	}
}

func TestServeSchema(t *testing.T) {
	database := dbtest.NewEmpty(t)
	env := []string{"PGBROKER_DATABASE_URL=" + database.ConnString, "SHARED_SECRET=" + canary, "GRPC_ADDRESS=" + freeAddress(t)}
	latest := fmt.Sprint(migrations.Latest())
	if r := try(t, env, "serve"); r.code != exitFailure || !strings.Contains(r.stderr, "pgbroker migrate up") {
		t.Errorf("serve without a schema: got exit code %d and %q", r.code, r.stderr)
	}
	expect := func(want string, args ...string) {
		t.Helper()
		if got := mustTry(t, env, args...); got != want {
			t.Errorf("%q: got %q, want %q", args, got, want)
		}
	}
	expect("0 of "+latest+"\n", "migrate", "version")
	if out := mustTry(t, env, "migrate", "plan"); strings.Count(out, "\n") != int(migrations.Latest()) || !strings.HasPrefix(out, "0001 ") {
		t.Errorf("migrate plan: got %q", out)
	}
	if out := mustTry(t, env, "migrate", "plan", "--sql", "-o", "json"); !strings.Contains(out, "CREATE TABLE") {
		t.Errorf("migrate plan --sql: got %.200q", out)
	}
	if out := mustTry(t, env, "migrate", "up"); !strings.HasSuffix(out, "the schema is at version "+latest+", the latest\n") {
		t.Errorf("migrate up: got %q", out)
	}
	expect("the schema is at version "+latest+", the latest\n", "migrate", "up")
	expect("", "migrate", "plan")
	expect(`{"version":`+latest+`,"latest":`+latest+`,"dirty":false}`+"\n", "migrate", "version", "-o", "json")
	expect(fmt.Sprintf("the schema is at version %d of %s\n", migrations.Latest()-1, latest), "migrate", "down", "1")
	expect(fmt.Sprintf("the schema is recorded as version %d of %[1]d\n", migrations.Latest()), "migrate", "force", latest)
	expect(fmt.Sprintf("the schema is recorded as version %d of %s\n", migrations.Latest()-1, latest), "migrate", "force", fmt.Sprint(migrations.Latest()-1))
	if r := try(t, env, "serve"); r.code != exitFailure || !strings.Contains(r.stderr, "pgbroker migrate up") {
		t.Errorf("serve with an old schema: got exit code %d and %q", r.code, r.stderr)
	}
	server := start(t, env, "serve", "--migrate")
	mustTry(t, env, "health", "--wait", "30s")
	expect(latest+" of "+latest+"\n", "migrate", "version")
	if r := server.stop(t); r.code != exitOK {
		t.Errorf("stop: got exit code %d: %s", r.code, r.stderr)
	}
	expect("the schema is at version 0 of "+latest+"\n", "migrate", "down", latest)
	r := try(t, env, "migrate", "up", "--database-url=postgres://u:"+canary+"@127.0.0.1:1/d?connect_timeout=2")
	if r.code == exitOK || strings.Contains(r.stderr, canary) {
		t.Errorf("migrate without a server: got exit code %d and %q", r.code, r.stderr)
	}
}

// authority writes a certificate that signs itself, for localhost, and its key.
func authority(t *testing.T) (certificate, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: []string{"broker.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	certificate = writeFile(t, "tls.crt", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	key = writeFile(t, "tls.key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
	return certificate, key
}

func TestServeTLS(t *testing.T) {
	database := dbtest.New(t)
	certificate, key := authority(t)
	encoded := func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return base64.StdEncoding.EncodeToString(b)
	}
	base := []string{"SHARED_SECRET=" + canary, "PGBROKER_DATABASE_URL=" + database.ConnString}
	for name, c := range map[string]struct{ server, client []string }{
		"files": {
			[]string{"CERTIFICATE_FILE=" + certificate, "CERTIFICATE_KEY_FILE=" + key},
			[]string{"PGBROKER_TLS_CA_FILE=" + certificate, "PGBROKER_TLS_SERVER_NAME=broker.test"},
		},
		"base64": {
			[]string{"CERTIFICATE=" + encoded(certificate), "CERTIFICATE_KEY=" + encoded(key)},
			[]string{"PGBROKER_TLS_CA_FILE=" + certificate, "PGBROKER_TLS_SERVER_NAME=broker.test"},
		},
		"client certificates": {
			[]string{"PGBROKER_TLS_CERT_FILE=" + certificate, "PGBROKER_TLS_KEY_FILE=" + key, "PGBROKER_TLS_CLIENT_CA_FILE=" + certificate},
			[]string{
				"PGBROKER_TLS_CA_FILE=" + certificate, "PGBROKER_TLS_SERVER_NAME=broker.test",
				"PGBROKER_TLS_CERT_FILE=" + certificate, "PGBROKER_TLS_KEY_FILE=" + key,
			},
		},
		"insecure in spite of a certificate": {
			[]string{"CERTIFICATE_FILE=" + certificate, "CERTIFICATE_KEY_FILE=" + key, "GRPC_INSECURE=true"},
			[]string{"GRPC_INSECURE=true"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			env := append(base[:len(base):len(base)], "GRPC_ADDRESS="+freeAddress(t))
			server := start(t, append(env, c.server...), "serve")
			client := append(env, c.client...)
			mustTry(t, client, "health", "--wait", "30s")
			mustTry(t, client, "types")
			if name != "insecure in spite of a certificate" {
				r := try(t, env, "types") // plaintext to a server that wants TLS
				if r.code != exitUnreachable || !strings.Contains(r.stderr, "--tls-ca-file") {
					t.Errorf("plaintext: got exit code %d and %q", r.code, r.stderr)
				}
			}
			if name == "client certificates" {
				if r := try(t, append(env, c.client[:2]...), "types"); r.code != exitUnreachable {
					t.Errorf("without a client certificate: got exit code %d and %q", r.code, r.stderr)
				}
			}
			if r := server.stop(t); r.code != exitOK {
				t.Errorf("stop: got exit code %d: %s", r.code, r.stderr)
			}
		})
	}
}

// TestValidate: what serve refuses to start with, known without a database.
func TestValidate(t *testing.T) {
	certificate, key := authority(t)
	unreadable := filepath.Join(t.TempDir(), "missing")
	empty := writeFile(t, "empty", "\n")
	secret := writeFile(t, "secret", canary+"\n")
	padded := writeFile(t, "padded", " "+canary)
	const other = "b3RoZXIgc2hhcmVkIHNlY3JldCBvZiAzMiBieXRlcyE="
	conn := "--database-url=postgres://h/d"
	dsn := writeFile(t, "dsn", "postgres://u:"+canary+"@h/d\n")
	for name, c := range map[string]struct {
		args []string
		want []string // nothing: it is good
	}{
		"embedded":                   {[]string{}, nil},
		"database":                   {[]string{"--database-url-file=" + dsn, "--shared-secret-file=" + secret}, nil},
		"keywords":                   {[]string{"--database-url=host=a,b port=1,2 dbname=d", "--shared-secret-file=" + secret}, nil},
		"unauthenticated":            {[]string{conn, "--allow-unauthenticated"}, nil},
		"TLS":                        {[]string{"--address=:5443", "--tls-cert-file=" + certificate, "--tls-key-file=" + key}, nil},
		"insecure":                   {[]string{"--address=:5443", "--grpc-insecure"}, nil},
		"no secret":                  {[]string{conn}, []string{"no shared secret", "--allow-unauthenticated"}},
		"secret and none":            {[]string{"--shared-secret-file=" + secret, "--allow-unauthenticated"}, []string{"allow_unauthenticated (flag --allow-unauthenticated) and shared_secret_file (flag --shared-secret-file) are both set"}},
		"bad secret":                 {[]string{"--shared-secret=" + canary[:40]}, []string{"shared_secret (flag --shared-secret)"}},
		"second secret bad":          {[]string{"--shared-secret=" + canary, "--shared-secret=x"}, []string{"shared_secret (flag --shared-secret)"}},
		"secret file missing":        {[]string{"--shared-secret-file=" + unreadable}, []string{"shared_secret_file (flag --shared-secret-file)", unreadable}},
		"secret file empty":          {[]string{"--shared-secret-file=" + empty}, []string{"shared_secret_file", empty}},
		"secret file with space":     {[]string{"--shared-secret-file=" + padded}, []string{"shared_secret_file", "whitespace"}},
		"named keys":                 {[]string{conn, "--keys=name=ci,access=read,secret_file=" + secret}, nil},
		"named key, file missing":    {[]string{"--keys=name=ci,access=read,secret_file=" + unreadable}, []string{"keys (flag --keys): key ci: ", unreadable}},
		"named key, bad secret":      {[]string{"--keys=name=ci,access=read,secret=" + canary[:40]}, []string{"keys (flag --keys): key ci: "}},
		"named key and none":         {[]string{"--keys=name=ci,access=read,secret_file=" + secret, "--allow-unauthenticated"}, []string{"allow_unauthenticated (flag --allow-unauthenticated) and keys (flag --keys) are both set"}},
		"one secret for two keys":    {[]string{"--keys=name=ci,access=read,secret_file=" + secret, "--shared-secret-file=" + secret}, []string{"keys (flag --keys): key ci has the same secret as key shared-secret"}},
		"two rights for one name":    {[]string{"--keys=name=ci,access=read,secret_file=" + secret, "--keys=name=ci,access=admin,secret=" + other}, []string{"key ci: has access read in one place and admin in another"}},
		"plaintext for everyone":     {[]string{"--address=0.0.0.0:5443"}, []string{"address (flag --address)", "--grpc-insecure"}},
		"plaintext on a name":        {[]string{"--address=broker:5443"}, []string{"address (flag --address)"}},
		"certificate without key":    {[]string{"--tls-cert-file=" + certificate}, []string{"tls_cert_file (flag --tls-cert-file)", "without its private key"}},
		"key without certificate":    {[]string{"--tls-key-file=" + key}, []string{"tls_key_file (flag --tls-key-file)", "without its certificate"}},
		"key that does not fit":      {[]string{"--tls-cert-file=" + certificate, "--tls-key-file=" + certificate}, []string{"tls_cert_file (flag --tls-cert-file)"}},
		"certificate missing":        {[]string{"--tls-cert-file=" + unreadable, "--tls-key-file=" + key}, []string{"tls_cert_file", unreadable}},
		"client CA without TLS":      {[]string{"--tls-client-ca-file=" + certificate}, []string{"tls_client_ca_file (flag --tls-client-ca-file): needs tls_cert_file"}},
		"certificate is no base64":   {[]string{"--tls-cert=%", "--tls-key=%"}, []string{"tls_cert (flag --tls-cert)", "tls_key (flag --tls-key)"}},
		"not a connection string":    {[]string{"--database-url=" + canary, "--allow-unauthenticated"}, []string{"database_url (flag --database-url)"}},
		"another database":           {[]string{"--database-url=mysql://u:" + canary + "@h/d", "--allow-unauthenticated"}, []string{"database_url (flag --database-url)"}},
		"unescaped password":         {[]string{"--database-url=postgres://u:%zz" + canary + "@h/d", "--allow-unauthenticated"}, []string{"database_url (flag --database-url)"}},
		"connection string missing":  {[]string{"--database-url-file=" + unreadable, "--allow-unauthenticated"}, []string{"database_url_file (flag --database-url-file)", unreadable}},
		"connection string empty":    {[]string{"--database-url-file=" + empty, "--allow-unauthenticated"}, []string{"database_url_file", "empty"}},
		"root certificate missing":   {[]string{"--database-url=postgres://h/d?sslmode=verify-full&sslrootcert=" + unreadable, "--allow-unauthenticated"}, []string{"database_url", unreadable}},
		"listener string bad":        {[]string{conn, "--allow-unauthenticated", "--listener-database-url=x://"}, []string{"listener_database_url (flag --listener-database-url)"}},
		"listener without database":  {[]string{"--listener-database-url=postgres://h/d"}, []string{"listener_database_url (flag --listener-database-url)", "without database_url"}},
		"pooler without database":    {[]string{"--database-pooler"}, []string{"database_pooler (flag --database-pooler)"}},
		"pooler without listener":    {[]string{"--database-pooler", conn, "--allow-unauthenticated"}, nil},
		"pooler":                     {[]string{"--database-pooler", conn, "--allow-unauthenticated", "--listener-database-url=postgres://h/d"}, nil},
		"ephemeral with a database":  {[]string{conn, "--ephemeral", "--allow-unauthenticated"}, []string{"ephemeral (flag --ephemeral) and database_url (flag --database-url) are both set"}},
		"pool upside down":           {[]string{"--pool-max-conns=2", "--pool-min-conns=3"}, []string{"pool_min_conns (flag --pool-min-conns): 3 is more than pool_max_conns (flag --pool-max-conns): 2"}},
		"one address for both":       {[]string{"--metrics-address=127.0.0.1:5443"}, []string{"metrics_address (flag --metrics-address)"}},
		"all problems at once":       {[]string{"--shared-secret=x", "--pool-max-conns=2", "--pool-min-conns=3", "--address=:1"}, []string{"3 problems", "shared_secret", "pool_min_conns", "address"}},
		"flags of clients, too":      {[]string{"--tls-ca-file=x", "--tls-server-name=x"}, nil},
		"no listener for TLS to all": {[]string{"--address=[::]:5443"}, []string{"address (flag --address)"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := try(t, []string{"HOME=/nonexistent"}, append([]string{"config", "validate"}, c.args...)...)
			if want := map[bool]int{true: exitOK, false: exitUsage}[c.want == nil]; r.code != want {
				t.Errorf("got exit code %d, want %d: %s", r.code, want, r.stderr)
			}
			for _, want := range c.want {
				if !strings.Contains(r.stderr, want) {
					t.Errorf("got %q, want it to contain %q", r.stderr, want)
				}
			}
			if strings.Contains(r.stdout+r.stderr, canary[:40]) {
				t.Errorf("the secret is in %q", r.stderr)
			}
		})
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--request-timeout=10s"}, "warning: request_timeout (flag --request-timeout): 10s: Pomerium gives up after 10s"},
		{[]string{"--grpc-insecure", "--tls-cert-file=x"}, "warning: the certificate is not used, because of grpc_insecure (flag --grpc-insecure)"},
		{[]string{"--database-url=postgres://a,b/d", "--allow-unauthenticated"}, "warning: \"several hosts without target_session_attrs: using read-write\""},
	} {
		if r := try(t, nil, append([]string{"config", "validate"}, c.args...)...); r.code != exitOK || !strings.Contains(r.stderr, c.want) {
			t.Errorf("%q: got exit code %d and %q, want %q", c.args, r.code, r.stderr, c.want)
		}
	}
}

// TestKeepSecret: whoever comes second gets the first one's secret.
func TestKeepSecret(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new", "dir")
	type kept struct {
		path    string
		created bool
		err     error
	}
	results := make(chan kept)
	const n = 8
	for range n {
		go func() {
			path, created, err := keepSecret(dir)
			results <- kept{path, created, err}
		}()
	}
	created := 0
	for range n {
		r := <-results
		if r.err != nil || r.path != filepath.Join(dir, secretFileName) {
			t.Errorf("got %+v, %v", r, r.err)
		}
		if r.created {
			created++
		}
	}
	entries, err := os.ReadDir(dir)
	if created != 1 || len(entries) != 1 || err != nil {
		t.Errorf("created %d times; the directory holds %v, %v", created, entries, err)
	}
	info, err := os.Stat(filepath.Join(dir, secretFileName))
	if err != nil || info.Mode() != fs.FileMode(0o600) {
		t.Errorf("got %v, %v, want mode 0600", info, err)
	}
	if _, _, err := keepSecret("/proc/nowhere"); err == nil {
		t.Error("a directory that cannot be made: got no error")
	}
}

func TestShellQuote(t *testing.T) {
	for _, word := range []string{"plain", "two words", "it's", `$HOME "x" \`, "a;b&c", "postgres:///d?host=/x&port=1"} {
		out, err := exec.CommandContext(context.Background(), "sh", "-c", "printf %s "+shellQuote(word)).Output()
		if err != nil || string(out) != word {
			t.Errorf("shellQuote(%q): the shell makes %q of it, %v", word, out, err)
		}
	}
}
