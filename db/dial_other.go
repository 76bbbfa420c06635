//go:build !linux

package db

import "net"

var (
	setUserTimeout func(fd uintptr, milliseconds int) error
	peerOf         func(net.Conn) (name string, err error)
)
