package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"pgbroker/server/auth"
)

func (a *app) secretCommand() *cobra.Command {
	return group("secret", "Make and identify shared secrets", a.secretGenerateCommand(), a.secretFingerprintCommand())
}

func (a *app) secretGenerateCommand() *cobra.Command {
	return &cobra.Command{
		Use: "generate", Short: "Print a new shared secret", Args: noArgs,
		Example: `  (umask 077; pgbroker secret generate > shared-secret)`,
		RunE: func(*cobra.Command, []string) error {
			a.started = true
			return a.writeLine([]byte(auth.NewKey().Secret()))
		},
	}
}

// A keyFingerprint is one line of `secret fingerprint -o json`.
type keyFingerprint struct {
	Fingerprint string `json:"fingerprint"`
	Source      string `json:"source"`
}

func (a *app) secretFingerprintCommand() *cobra.Command {
	var stdin bool
	cmd := &cobra.Command{
		Use: "fingerprint", Short: "Print the fingerprints of the configured shared secrets", Args: noArgs,
		Long: `Print the fingerprints of the configured shared secrets. The server logs the same fingerprints when it rejects a request,
so that two machines can be compared without showing a secret.`,
		Example: `  pgbroker secret fingerprint --shared-secret-file /run/secrets/shared
  kubectl get secret pomerium -o jsonpath='{.data.shared_secret}' |
    base64 -d | pgbroker secret fingerprint --stdin`,
		RunE: a.action(func(cmd *cobra.Command, cfg *configuration) error {
			keys, err := a.configuredKeys(cmd.Context(), cfg, stdin)
			if err != nil {
				return err
			}
			t := newTable("FINGERPRINT", "SOURCE").cut(1)
			for _, key := range keys {
				if a.output == outputJSON {
					if err := a.writeJSON(key); err != nil {
						return err
					}
					continue
				}
				t.add(key.Fingerprint, key.Source)
			}
			if a.output == outputJSON {
				return nil
			}
			return t.write(a.stdout)
		}),
	}
	addSettingFlags(cmd.Flags(), useSecret)
	cmd.Flags().BoolVar(&stdin, "stdin", false, "read the secret from standard input instead")
	a.addOutputFlag(cmd)
	return cmd
}

func (a *app) configuredKeys(ctx context.Context, cfg *configuration, stdin bool) ([]keyFingerprint, error) {
	if stdin {
		text, err := readAll(ctx, io.LimitReader(a.stdin, 1<<16))
		if err != nil {
			return nil, fmt.Errorf("read standard input: %w", err)
		}
		key, err := auth.ParseKey(strings.TrimRight(string(text), "\r\n"))
		if err != nil {
			return nil, usagef("standard input: %w", err)
		}
		return []keyFingerprint{{key.Fingerprint(), "standard input"}}, nil
	}
	var (
		keys     []keyFingerprint
		problems configError
	)
	for _, secret := range cfg.SharedSecret {
		key, err := auth.ParseKey(secret)
		if err != nil {
			problems = append(problems, cfg.describe("shared_secret")+": "+err.Error())
			continue
		}
		keys = append(keys, keyFingerprint{key.Fingerprint(), cfg.origin("shared_secret")})
	}
	for _, path := range cfg.SharedSecretFile {
		key, err := auth.ReadKey(path)
		if err != nil {
			problems = append(problems, cfg.describe("shared_secret_file")+": "+err.Error())
			continue
		}
		keys = append(keys, keyFingerprint{key.Fingerprint(), path})
	}
	for _, named := range cfg.Keys {
		key, err := named.read()
		if err != nil {
			problems = append(problems, fmt.Sprintf("%s: key %s: %v", cfg.describe("keys"), named.name, err))
			continue
		}
		keys = append(keys, keyFingerprint{key.Fingerprint(), fmt.Sprintf("key %s (%s)", named.name, cmp.Or(named.secretFile, cfg.origin("keys")))})
	}
	if len(problems) > 0 {
		return nil, problems
	}
	if len(keys) > 0 {
		return keys, nil
	}
	dir, err := cfg.dataDir()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, secretFileName)
	key, err := auth.ReadKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &exitError{exitNotFound, errors.New("no shared secret is configured, and the embedded mode has not made one yet")}
	}
	if err != nil {
		return nil, configError{cfg.describe("data_dir") + ": " + err.Error()}
	}
	return []keyFingerprint{{key.Fingerprint(), path}}, nil
}
