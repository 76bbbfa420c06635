package db

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// FuzzConnString: whatever a connection string is, it is taken or refused; one that is refused is not repeated, because it may
// hold a password; one that is taken leads where pgx says it does, with our settings in all that it does not set itself.
func FuzzConnString(f *testing.F) {
	const password = "{password}" // is replaced by one that can be told from everything else
	for _, text := range []string{
		"postgres://u:" + password + "@h/d", "postgres://u:" + password + "@h:1,i:2/d?target_session_attrs=any", "postgres://u@h/d?password=" + password,
		"postgresql://u:" + password + "@[::1]:5432/d?sslmode=disable&pool_max_conns=7", "postgres://u:" + password + "@/d?host=/tmp", "postgres://u:" + password,
		"host=h user=u password=" + password + " dbname=d", "host=a,b port=1,2 password='" + password + "' statement_timeout=5", "host=h password='" + password,
		`password='a\'` + password + `' host=h`, "postgres://u:" + password + "@h:99999/d", "postgres://u:" + password + "@h/d?connect_timeout=x", "host=h options='-c lock_timeout=3s'",
		"postgres://u:p@" + password + "@h/d", "postgres://u:%zz" + password + "@h/d", "pool_max_conns=0 password=" + password, "application_name=x host=h", "=", "", " ", "\x00", "host=h sslmode=" + password,
		"host=h hostaddr=" + password, "host=h keepalives_idle=" + password, "host=h sslcrl=" + password, "postgres://h/?load_balance_hosts=" + password,
		"host=h scram_client_key=" + password, "host=h oauth_client_secret=" + password, "host=h gsslib=" + password, "hostaddr=::1,127.0.0.1 host=a,b",
	} {
		f.Add(text)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel() // nothing is dialled
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Contains(text, "/") && (strings.Contains(text, "pass") || strings.Contains(text, "ssl") || strings.Contains(text, "service")) &&
			!strings.Contains(text, password) {
			return // do not make it read the machine's files
		}
		const mark = "Hunter2Hunter2"
		text = strings.ReplaceAll(text, password, mark)
		var log strings.Builder
		d, err := Open(ended, Config{ConnString: text, MaxConns: 9, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			// The names of files are said, and those of services.
			named := strings.Contains(text, "ssl") || strings.Contains(text, "service") || strings.Contains(text, "passfile")
			if strings.Contains(err.Error(), mark) && !named {
				t.Fatalf("%q is refused with: %v", text, err)
			}
			return
		}
		defer d.Close()
		if strings.Contains(text, "hostaddr") || strings.Contains(text, "load_balance_hosts") || strings.Contains(text, "%") {
			return // which pgx does not know, so that it would go elsewhere
		}
		want, err := pgx.ParseConfig(text)
		if err != nil {
			t.Fatalf("%q is taken, which pgx refuses: %v", text, err)
		}
		got := d.ConnConfig()
		if got.Host != want.Host || got.Port != want.Port || got.User != want.User || got.Password != want.Password || got.Database != want.Database {
			t.Fatalf("%q leads elsewhere than pgx says", text)
		}
		for _, name := range []string{"application_name", "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"} {
			value, given := want.RuntimeParams[name]
			switch {
			case given && got.RuntimeParams[name] != value:
				t.Fatalf("%q: %s is %q", text, name, got.RuntimeParams[name])
			case !given && got.RuntimeParams[name] == "" && !strings.Contains(want.RuntimeParams["options"], name):
				t.Fatalf("%q: %s is not set", text, name)
			}
		}
		if max := d.Config().MaxConns; max < 1 {
			t.Fatalf("%q: a pool of %d", text, max)
		}
		if shown := fmt.Sprint(log.String()); got.Password != "" && len(got.Password) > 8 && strings.Contains(shown, got.Password) && !strings.Contains(got.Host, got.Password) {
			t.Fatalf("%q: the password is logged: %s", text, shown)
		}
		if u, err := url.Parse(text); err == nil && u.User != nil && strings.Contains(log.String(), mark) && !strings.Contains(u.Host, mark) && !strings.Contains(u.RawQuery, mark) {
			t.Fatalf("%q: the password is logged: %s", text, log.String())
		}
	})
}
