package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"pgbroker/server/auth"
)

// A namedKey is one of the setting keys.
type namedKey struct {
	name, access, secret, secretFile string
}

// keyFields are what a key has in a file or in a flag, in the order in which they are shown.
var keyFields = []struct {
	name  string
	field func(*namedKey) *string
}{
	{"name", func(k *namedKey) *string { return &k.name }},
	{"access", func(k *namedKey) *string { return &k.access }},
	{"secret", func(k *namedKey) *string { return &k.secret }},
	{"secret_file", func(k *namedKey) *string { return &k.secretFile }},
}

const wantKey = "want name, access, and secret or secret_file, such as name=ci,access=read,secret_file=/run/secrets/ci"

// keyFromYAML turns an entry of a file into text that parseKeys takes.
func keyFromYAML(value any) (string, error) {
	if text, ok := value.(string); ok {
		return text, nil
	}
	fields, ok := value.(map[string]any)
	if !ok {
		return "", errors.New(wantKey)
	}
	for name, value := range fields {
		if _, ok := value.(string); !ok {
			return "", fmt.Errorf("%s: want text: put a value that looks like something else in quotes", safeKey(name))
		}
	}
	text, err := json.Marshal(fields)
	return string(text), err
}

// parseKeys reads keys as flags have them, name=value,name=value, or as keyFromYAML makes them. No error shows a value.
func parseKeys(items []string) ([]namedKey, error) {
	keys := make([]namedKey, len(items))
	for i, item := range items {
		fields := map[string]string{}
		if strings.HasPrefix(item, "{") {
			if err := json.Unmarshal([]byte(item), &fields); err != nil {
				return nil, fmt.Errorf("key %d: %s", i+1, wantKey)
			}
		} else {
			for pair := range strings.SplitSeq(item, ",") {
				name, value, ok := strings.Cut(pair, "=")
				name = strings.TrimSpace(name)
				if _, twice := fields[name]; !ok || twice {
					return nil, fmt.Errorf("key %d: %s", i+1, wantKey)
				}
				fields[name] = value
			}
		}
		for _, f := range keyFields {
			*f.field(&keys[i]) = fields[f.name]
			delete(fields, f.name)
		}
		for name := range fields {
			return nil, fmt.Errorf("key %d: unknown field %s: %s", i+1, safeKey(name), wantKey)
		}
		if err := keys[i].check(); err != nil {
			return nil, fmt.Errorf("key %d: %w", i+1, err)
		}
	}
	return keys, nil
}

func (k *namedKey) check() error {
	if err := auth.CheckKeyName(k.name); err != nil {
		return fmt.Errorf("name: %w", err)
	}
	if _, err := auth.ParseAccess(k.access); err != nil {
		return errors.New("access: want read, write or admin")
	}
	if (k.secret == "") == (k.secretFile == "") {
		return errors.New("want either secret or secret_file")
	}
	return nil
}

// show writes a key as a flag has it, with its secret masked.
func (k *namedKey) show() string {
	var parts []string
	for _, f := range keyFields {
		switch value := *f.field(k); {
		case value == "":
		case f.name == "secret" || secretByMistake(value):
			parts = append(parts, f.name+"="+mask)
		default:
			parts = append(parts, f.name+"="+value)
		}
	}
	return strings.Join(parts, ",")
}

// secretByMistake reports whether a value is a shared secret where something else is wanted.
func secretByMistake(value string) bool {
	_, err := auth.ParseKey(value)
	return err == nil
}

// read returns the key itself.
func (k *namedKey) read() (auth.Key, error) {
	if k.secretFile != "" {
		return auth.ReadKey(k.secretFile)
	}
	return auth.ParseKey(k.secret)
}

// authConfig says which requests serve accepts.
func (c *Config) authConfig() auth.Config {
	config := auth.Config{Secrets: c.SharedSecret, Files: c.SharedSecretFile}
	for _, k := range c.Keys {
		access, err := auth.ParseAccess(k.access)
		if err != nil { // parse has refused it; and without access the authenticator does
			access = auth.AccessNone
		}
		config.Keys = append(config.Keys, auth.NamedKey{Name: k.name, Secret: k.secret, File: k.secretFile, Access: access})
	}
	return config
}

// several reports whether a setting has several values.
func (s *setting) several() bool {
	switch s.field(new(Config)).(type) {
	case *[]string, *[]namedKey:
		return true
	}
	return false
}

// separator stands between the values of a setting in its environment variable. A key has commas of its own.
func (s *setting) separator() string {
	if _, keys := s.field(new(Config)).(*[]namedKey); keys {
		return ";"
	}
	return ","
}
