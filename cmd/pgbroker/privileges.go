package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/user"
	"slices"
	"strconv"
	"syscall"

	"pgbroker/db/embedded"
)

// checkUser refuses a user that serve could not become.
func (c *configuration) checkUser() error {
	if c.User == "" {
		return nil
	}
	if c.Embedded() {
		return fmt.Errorf("%s: embedded mode becomes the user that runs its Postgres", c.describe("user"))
	}
	wanted, err := user.Lookup(c.User)
	if err != nil {
		return fmt.Errorf("%s: there is no user %q", c.describe("user"), c.User)
	}
	if uid := strconv.Itoa(os.Geteuid()); uid != wanted.Uid && uid != "0" {
		return fmt.Errorf("%s: only root can become %s, and this is uid %s", c.describe("user"), c.User, uid)
	}
	return nil
}

// becomeUser is set by main: a process that is not only this program, such as a test, stays what it is.
var becomeUser func(uid, gid int) error

// giveUpRoot makes this process one of an ordinary user, if it is root's: the user that runs the private Postgres, or the one
// that is configured. By now the addresses are bound, and everything was read that only root may read.
func giveUpRoot(cfg *configuration, postgres *embedded.Server, log *slog.Logger) error {
	if os.Geteuid() != 0 || becomeUser == nil {
		return nil
	}
	var uid, gid int
	switch {
	case postgres != nil:
		var another bool
		if uid, gid, another = postgres.User(); !another {
			return nil
		}
		if err := postgres.HandOver(); err != nil {
			return fmt.Errorf("give up root: %w", err)
		}
	case cfg.User != "":
		wanted, err := user.Lookup(cfg.User)
		if err != nil {
			return fmt.Errorf("%s: %w", cfg.describe("user"), err)
		}
		uid, err = strconv.Atoi(wanted.Uid)
		if err == nil {
			gid, err = strconv.Atoi(wanted.Gid)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", cfg.describe("user"), err)
		}
	default:
		log.Warn("running as root, which nothing here needs: start pgbroker as an ordinary user, or give --user")
		return nil
	}
	if uid == 0 {
		return nil
	}
	if err := becomeUser(uid, gid); err != nil {
		return fmt.Errorf("give up root: %w", err)
	}
	log.Info("gave up root", "uid", uid, "gid", gid)
	for _, path := range cfg.rereadFiles() {
		if err := readableFile(path); errors.Is(err, fs.ErrPermission) {
			log.Warn("the file is readable for root only: it was read, and changes to it take effect at the next start", "file", path, "uid", uid)
		}
	}
	return nil
}

// become makes every thread of this process one of another user, with the groups of that one and without capabilities, for good.
func become(uid, gid int) error {
	groups := []int{gid}
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		ids, err := u.GroupIds() // such as ssl-cert, whose members may read keys
		if err != nil {
			ids = nil // whoever has no groups beside their own
		}
		for _, id := range ids {
			if n, err := strconv.Atoi(id); err == nil && !slices.Contains(groups, n) {
				groups = append(groups, n)
			}
		}
	}
	if err := syscall.Setgroups(groups); err != nil {
		return fmt.Errorf("set the groups: %w", err)
	}
	if err := syscall.Setgid(gid); err != nil {
		return fmt.Errorf("set the group: %w", err)
	}
	if err := syscall.Setuid(uid); err != nil { // of all threads: real, effective and saved, and with them go capabilities
		return fmt.Errorf("set the user: %w", err)
	}
	if syscall.Setuid(0) == nil || os.Geteuid() != uid || os.Getuid() != uid {
		return errors.New("this process can become root again")
	}
	return nil
}

// rereadFiles returns the files that are read again when they change.
func (c *configuration) rereadFiles() []string {
	files := slices.Concat(c.SharedSecretFile, []string{c.TLSCertFile, c.TLSKeyFile, c.TLSClientCAFile, c.DatabaseURLFile, c.ListenerDatabaseURLFile})
	for _, key := range c.Keys {
		files = append(files, key.secretFile)
	}
	return slices.DeleteFunc(files, func(path string) bool { return path == "" })
}
