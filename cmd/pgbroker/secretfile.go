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
	path = filepath.Join(dir, secretFileName)
	if _, err := os.Stat(path); err == nil {
		return path, false, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", false, fmt.Errorf("directory for the shared secret: %w", err)
	}
	// The file appears under its name only when it is complete, and whoever comes second gets the first one's.
	temp, err := os.CreateTemp(dir, secretFileName+".*") // mode 0600
	if err != nil {
		return "", false, fmt.Errorf("keep the shared secret: %w", err)
	}
	defer os.Remove(temp.Name())
	_, err = temp.WriteString(auth.NewKey().Secret() + "\n")
	if err := errors.Join(err, temp.Sync(), temp.Close()); err != nil {
		return "", false, fmt.Errorf("keep the shared secret: %w", err)
	}
	switch err := os.Link(temp.Name(), path); {
	case errors.Is(err, fs.ErrExist):
		return path, false, nil
	case err != nil:
		return "", false, fmt.Errorf("keep the shared secret: %w", err)
	}
	return path, true, nil
}
