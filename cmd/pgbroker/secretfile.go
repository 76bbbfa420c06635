package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"pgbroker/db/embedded"
	"pgbroker/server/auth"
)

// secretFileName is the file in the data directory that holds the shared secret of the embedded mode.
const secretFileName = "shared-secret"

// dataDir returns the data directory of the embedded mode.
func (c *Config) dataDir() (string, error) {
	if c.DataDir != "" {
		return filepath.Abs(c.DataDir)
	}
	return embedded.DefaultDir()
}

// keepSecret returns the file with the shared secret in dir, which it fills with a new secret if there is none. created says
// whether it did.
func keepSecret(dir string) (path string, created bool, err error) {
	path, created, err = embedded.Keep(dir, secretFileName, func() string { return auth.NewKey().Secret() + "\n" })
	if err != nil {
		return "", false, fmt.Errorf("keep the shared secret: %w", err)
	}
	return path, created, nil
}

// removeSecret removes what keepSecret has made. Whoever has given up root since may no longer remove the file, and leaves it
// empty.
func removeSecret(path string) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrPermission) {
		err = os.Truncate(path, 0)
	}
	_ = os.Remove(filepath.Dir(path)) // if nothing else is in it
	return err
}
