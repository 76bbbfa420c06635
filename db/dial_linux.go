package db

import (
	"fmt"
	"net"
	"os/user"
	"strconv"

	"golang.org/x/sys/unix"
)

// setUserTimeout ends a connection whose data nobody has acknowledged for so many milliseconds.
var setUserTimeout = func(fd uintptr, milliseconds int) error {
	return unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, milliseconds)
}

// peerOf returns the user that the other end of a socket runs as.
var peerOf = func(conn net.Conn) (name string, err error) {
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return "", fmt.Errorf("requirepeer: %w", err)
	}
	var peer *unix.Ucred
	var optErr error
	if err := raw.Control(func(fd uintptr) { peer, optErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return "", fmt.Errorf("requirepeer: %w", err)
	}
	if optErr != nil {
		return "", fmt.Errorf("requirepeer: %w", optErr)
	}
	u, err := user.LookupId(strconv.Itoa(int(peer.Uid)))
	if err != nil {
		return "", fmt.Errorf("requirepeer: %w", err)
	}
	return u.Username, nil
}
