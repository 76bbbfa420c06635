package db

import (
	"net"
	"os/user"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Keepalive and tcp_user_timeout are options of the socket; requirepeer looks who is at its other end.
func TestDialing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, tt := range []struct {
		text string
		want map[int]int // by option of the socket
	}{
		{"", map[int]int{unix.SO_KEEPALIVE: 1, unix.TCP_KEEPIDLE: 15, unix.TCP_KEEPINTVL: 15, unix.TCP_KEEPCNT: 9, unix.TCP_USER_TIMEOUT: 0}},
		{"keepalives=0", map[int]int{unix.SO_KEEPALIVE: 0}},
		{"keepalives_idle=7 keepalives_interval=8 keepalives_count=3 tcp_user_timeout=4321", map[int]int{
			unix.SO_KEEPALIVE: 1, unix.TCP_KEEPIDLE: 7, unix.TCP_KEEPINTVL: 8, unix.TCP_KEEPCNT: 3, unix.TCP_USER_TIMEOUT: 4321,
		}},
		{"keepalives=1 keepalives_idle=0", map[int]int{unix.SO_KEEPALIVE: 1, unix.TCP_KEEPIDLE: 7200}},
	} {
		conn, err := dialed(t, "tcp", l.Addr().String(), "host=h "+tt.text)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := conn.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		err = raw.Control(func(fd uintptr) {
			for option, want := range tt.want {
				level := unix.IPPROTO_TCP
				if option == unix.SO_KEEPALIVE {
					level = unix.SOL_SOCKET
				}
				if got, err := unix.GetsockoptInt(int(fd), level, option); err != nil || got != want {
					t.Errorf("%q: option %d is %d, %v, want %d", tt.text, option, got, err, want)
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
	}

	path := filepath.Join(t.TempDir(), "socket")
	s, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dialed(t, "unix", path, "host=h requirepeer="+me.Username); err != nil {
		t.Error(err)
	}
	if _, err := dialed(t, "unix", path, "host=h requirepeer=somebody_else"); err == nil || !strings.Contains(err.Error(), "must run as somebody_else") {
		t.Errorf("another user's server: got %v", err)
	}
	if _, err := dialed(t, "tcp", l.Addr().String(), "host=h requirepeer=somebody_else"); err != nil {
		t.Errorf("over TCP: %v", err)
	}
}
