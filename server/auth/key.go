package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"unique"

	"pgbroker/server/reload"
)

// KeySize is the length of a shared key in bytes. Pomerium demands it because it also uses the key for an AEAD cipher.
const KeySize = 32

// Key is a shared key: what a shared secret stands for. Keys can be compared with ==; the zero Key is none at all. Formatting
// or logging a key, or anything that contains one, shows its fingerprint or nothing, never its bytes.
type Key struct {
	// Not an array of bytes, because package fmt would print it as part of another struct, where it cannot call String. A
	// handle is a pointer, and a pointer to a string is one that fmt never follows, with any verb and at any depth.
	handle unique.Handle[string]
}

func makeKey(b []byte) Key { return Key{unique.Make(string(b))} }

// bytes returns the key to compute with, nil for the zero Key.
func (k Key) bytes() []byte {
	if k == (Key{}) {
		return nil
	}
	return []byte(k.handle.Value())
}

// NewKey returns a random key.
func NewKey() Key {
	b := make([]byte, KeySize)
	rand.Read(b) // never fails, see its documentation
	return makeKey(b)
}

// ParseKey returns the key of a shared secret as Pomerium writes it in shared_secret: [KeySize] bytes in base64 with the
// standard alphabet and padding, without whitespace before, after or within. `head -c32 /dev/urandom | base64` makes one.
// No error contains any part of the secret.
func ParseKey(secret string) (Key, error) {
	k, err := parseKey(secret)
	if err != nil {
		return Key{}, fmt.Errorf("shared secret: %w", err)
	}
	return k, nil
}

// parseKey is ParseKey without saying in its errors which secret it is about.
func parseKey(secret string) (Key, error) {
	const want = "want 32 bytes in base64, as `head -c32 /dev/urandom | base64` makes them"
	if secret == "" {
		return Key{}, errors.New("empty, " + want)
	}
	if strings.TrimSpace(secret) != secret {
		return Key{}, errors.New("whitespace before or after it is not allowed")
	}
	if strings.ContainsAny(secret, "\r\n") { // which the decoder would skip
		return Key{}, errors.New("a line break within it is not allowed")
	}
	decoded, err := base64.StdEncoding.DecodeString(secret)
	switch {
	case err != nil && strings.ContainsAny(secret, "-_"):
		return Key{}, errors.New("not base64 with the standard alphabet: it has a - or _, where the standard has + and /")
	case err != nil && len(secret)%4 != 0:
		return Key{}, errors.New("not padded base64, part of it may be missing: " + want)
	case err != nil:
		return Key{}, errors.New("not base64: " + want)
	case len(decoded) != KeySize:
		return Key{}, fmt.Errorf("%d bytes after base64 decoding, want exactly %d", len(decoded), KeySize)
	}
	return makeKey(decoded), nil
}

// ReadKey returns the key of the shared secret that a file holds. One line break at the end of the file is allowed, since
// editors and echo add one; everything else is as for [ParseKey]. Errors name the file.
func ReadKey(path string) (Key, error) {
	file, err := openKeyFile(path, Caller{}, nil)
	if err != nil {
		return Key{}, err
	}
	return file.Get().key, nil
}

// openKeyFile returns the key in a file, which follows the file from then on: another secret takes the place of the first,
// and where there is none any more, the key is nil.
func openKeyFile(path string, caller Caller, log *slog.Logger) (*reload.Value[*signer], error) {
	if _, err := parseKey(path); err == nil { // else the error of opening it would show it
		return nil, errors.New("shared secret file: got a shared secret where the name of a file is wanted")
	}
	file, err := reload.New("shared secret file "+path, []string{path}, func(contents [][]byte) (*signer, error) {
		secret := string(contents[0])
		if line, ok := strings.CutSuffix(secret, "\n"); ok {
			secret = strings.TrimSuffix(line, "\r") // the line break of Windows
		}
		key, err := parseKey(secret)
		if err != nil {
			return nil, err
		}
		return newSigner(key, caller), nil
	}, log)
	if err != nil {
		return nil, err
	}
	file.WithdrawWhenGone(nil)
	return file, nil
}

// Secret returns the key as a shared secret, the inverse of [ParseKey], or "" for the zero Key.
func (k Key) Secret() string { return base64.StdEncoding.EncodeToString(k.bytes()) }

// Fingerprint returns a name for the key that may be shown to anybody: the first 8 hexadecimal digits of the SHA-256 of its
// bytes, or "none" for the zero Key. Two machines that show the same fingerprint have the same key; the key cannot be learned
// from it.
func (k Key) Fingerprint() string {
	if k == (Key{}) {
		return "none"
	}
	sum := sha256.Sum256(k.bytes())
	return hex.EncodeToString(sum[:4])
}

// String returns "key" and the fingerprint.
func (k Key) String() string { return "key " + k.Fingerprint() }

// LogValue implements [slog.LogValuer].
func (k Key) LogValue() slog.Value { return slog.StringValue(k.String()) }
