package auth

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"pgbroker/server/reload"
)

// MaxKeys is how many keys can be accepted at the same time. Each costs a microsecond for a token that none of them signed.
const MaxKeys = 64

// maxKeyName is the longest name of a key. Names are labels of metrics.
const maxKeyName = 64

// NamedKey is a shared secret with a name and rights.
type NamedKey struct {
	// Name appears in logs, metrics and the audit: 1 to 64 letters, digits and any of . _ - in ASCII, beginning with a letter
	// or digit. Several keys may have the same name, so that one can be replaced without an interruption; their access is
	// then the same, too. [SharedSecret] is taken.
	Name string
	// Secret is the shared secret in the form that [ParseKey] takes, or File names a file with it. Exactly one is given.
	Secret, File string
	// Access is what the key may be used for.
	Access Access
}

// CheckKeyName returns an error that says what is allowed if a key cannot have a name.
func CheckKeyName(name string) error {
	const want = "want 1 to 64 letters, digits and . _ -, beginning with a letter or digit"
	if name == SharedSecret {
		return fmt.Errorf("%s is the name of keys without one", name)
	}
	if name == "" || len(name) > maxKeyName {
		return errors.New(want)
	}
	for i, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case i > 0 && (c == '.' || c == '_' || c == '-'):
		default:
			return errors.New(want)
		}
	}
	return nil
}

// ring is the keys of a configuration.
type ring struct {
	configured []held // in the order of the configuration
	weakest    []held // those with the least access first, as they are tried
}

// held is a key and whose it is.
type held struct {
	caller Caller
	signer *reload.Value[*signer] // of nil while it is withdrawn
}

// newRing returns the keys that a configuration names.
func newRing(c Config, log *slog.Logger) (*ring, error) {
	switch n := len(c.Secrets) + len(c.Files) + len(c.Keys); {
	case n == 0:
		return nil, errors.New("no shared secret: give at least one, or turn authentication off explicitly")
	case n > MaxKeys:
		return nil, fmt.Errorf("%d shared secrets, at most %d are accepted at the same time", n, MaxKeys)
	}
	r := &ring{}
	for i, secret := range c.Secrets {
		name := "shared secret"
		if len(c.Secrets) > 1 {
			name = fmt.Sprintf("shared secret %d of %d", i+1, len(c.Secrets))
		}
		if err := r.add(name, secret, Caller{Key: SharedSecret, Access: AccessAdmin}, log); err != nil {
			return nil, err
		}
	}
	for _, path := range c.Files {
		if err := r.addFile(path, Caller{Key: SharedSecret, Access: AccessAdmin}, log); err != nil {
			return nil, err
		}
	}
	for i, k := range c.Keys {
		if err := CheckKeyName(k.Name); err != nil {
			return nil, fmt.Errorf("key %d: name: %w", i+1, err)
		}
		what := "key " + k.Name
		if k.Access < AccessRead || k.Access > AccessAdmin {
			return nil, fmt.Errorf("%s: access: want read, write or admin", what)
		}
		if (k.Secret == "") == (k.File == "") {
			return nil, fmt.Errorf("%s: want either a secret or the file that holds it", what)
		}
		caller := Caller{Key: k.Name, Access: k.Access}
		var err error
		if k.File != "" {
			err = r.addFile(k.File, caller, log)
		} else {
			err = r.add("secret", k.Secret, caller, log)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	r.weakest = slices.Clone(r.configured)
	slices.SortStableFunc(r.weakest, func(a, b held) int { return int(a.caller.Access) - int(b.caller.Access) })
	return r, nil
}

func (r *ring) add(name, secret string, caller Caller, log *slog.Logger) error {
	key, err := parseKey(secret)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	constant, err := reload.New(name, nil, func([][]byte) (*signer, error) { return newSigner(key, caller), nil }, log)
	if err != nil {
		return err
	}
	r.configured = append(r.configured, held{caller, constant})
	return nil
}

func (r *ring) addFile(path string, caller Caller, log *slog.Logger) error {
	file, err := openKeyFile(path, caller, log)
	if err != nil {
		return err
	}
	r.configured = append(r.configured, held{caller, file})
	return nil
}

// check refuses what makes it unclear who a caller is. When files that change make it so later, the key with the least
// access counts.
func (r *ring) check() error {
	access := make(map[string]Access)
	owner := make(map[Key]string)
	for _, h := range r.configured {
		name := h.caller.Key
		if other, ok := access[name]; ok && other != h.caller.Access {
			return fmt.Errorf("key %s: has access %v in one place and %v in another: keys of one name have the same", name, other, h.caller.Access)
		}
		access[name] = h.caller.Access
		s := h.signer.Get()
		if s == nil {
			continue
		}
		if other, ok := owner[s.key]; ok && other != name {
			return fmt.Errorf("key %s has the same secret as key %s: want a secret for each", name, other)
		}
		owner[s.key] = name
	}
	return nil
}

// signers appends the keys in force to buf, in the order in which they are to be tried.
func (r *ring) signers(buf []*signer) []*signer {
	if r == nil {
		return nil
	}
	return inForce(r.weakest, buf)
}

// inForce appends the keys that values have now, leaving out those that were withdrawn.
func inForce(keys []held, buf []*signer) []*signer {
	for _, h := range keys {
		if s := h.signer.Get(); s != nil {
			buf = append(buf, s)
		}
	}
	return buf
}
