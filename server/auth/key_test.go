package auth

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

func TestParseKey(t *testing.T) {
	of := func(n int) string { return base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{0xfb}, n)) }
	for _, test := range []struct {
		name, secret, want string // want is part of the error, empty for none
	}{
		{"32 bytes", of(32), ""},
		{"empty", "", "empty, want 32 bytes in base64"},
		{"only spaces", "  ", "whitespace before or after"},
		{"space before", " " + of(32), "whitespace before or after"},
		{"line break after", of(32) + "\n", "whitespace before or after"},
		{"no-break space after", of(32) + "\u00a0", "whitespace before or after"},
		{"line break within", of(32)[:10] + "\n" + of(32)[10:], "line break within"},
		{"carriage return within", of(32)[:10] + "\r\n" + of(32)[10:], "line break within"},
		{"space within", of(32)[:10] + " " + of(32)[10:], "not padded base64"},
		{"31 bytes", of(31), "31 bytes after base64 decoding, want exactly 32"},
		{"33 bytes", of(33), "33 bytes after base64 decoding, want exactly 32"},
		{"hexadecimal", strings.Repeat("0f", 32), "48 bytes after base64 decoding, want exactly 32"},
		{"not padded", strings.TrimRight(of(32), "="), "not padded base64"},
		{"URL-safe", base64.URLEncoding.EncodeToString(bytes.Repeat([]byte{0xfb}, 32)), "standard alphabet"},
		{"not base64", strings.Repeat("!", 44), "not base64"},
		{"quotes around it", `"` + of(32) + `"`, "not padded base64"},
		{"NUL", of(32)[:43] + "\x00", "not base64"},
		{"two secrets", of(32) + of(32), "not base64"},
	} {
		t.Run(test.name, func(t *testing.T) {
			key, err := ParseKey(test.secret)
			if test.want == "" {
				if err != nil || key.Secret() != test.secret {
					t.Fatalf("got %v, %v", key, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.HasPrefix(err.Error(), "shared secret: ") {
				t.Fatalf("got error %v, want one with %q", err, test.want)
			}
			if key != (Key{}) {
				t.Error("got a key with the error")
			}
		})
	}
}

func TestZeroKey(t *testing.T) {
	var key Key
	if got := key.Secret() + " " + key.Fingerprint() + " " + key.String(); got != " none key none" {
		t.Errorf("got %q", got)
	}
	if _, err := NewCredentials(key).GetRequestMetadata(t.Context()); err == nil {
		t.Error("signs tokens without a key")
	}
}

func TestKeyRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		key := drawKey(t, "key")
		back, err := ParseKey(key.Secret())
		if err != nil || back != key {
			t.Fatalf("got %v, %v", back, err)
		}
	})
	if one, other := NewKey(), NewKey(); one == other {
		t.Error("two new keys are equal")
	}
}

// The value of `head -c32 FILE | sha256sum | head -c8` for the bytes 0 to 31.
func TestFingerprint(t *testing.T) {
	if got, want := parsed(t, fixedSecret).Fingerprint(), "630dcd29"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// No error about a secret shows a piece of it, whatever is wrong with it.
func TestErrorsHideSecrets(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		secret := drawKey(t, "key").Secret()
		i := rapid.IntRange(0, len(secret)).Draw(t, "position")
		garbage := rapid.SampledFrom([]string{"", "!", "-", "=", " ", "\n", "\x00", "é"}).Draw(t, "garbage")
		spoiled := secret[:i] + garbage + secret[min(len(secret), i+rapid.IntRange(0, 3).Draw(t, "cut")):]
		file := filepath.Join(dir, "secret")
		if err := os.WriteFile(file, []byte(spoiled+"\n\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err1 := ParseKey(spoiled)
		_, err2 := ReadKey(file)
		_, err3 := New(Config{Secrets: []string{fixedSecret, spoiled}})
		_, err4 := ReadKey(secret) // the secret given for the name of its file
		_, err5 := New(Config{Files: []string{secret}})
		for _, err := range []error{err1, err2, err3, err4, err5} {
			if err != nil && sharesText(err.Error(), secret) {
				t.Fatalf("%q shows part of %q", err, secret)
			}
		}
		if err2 == nil || err4 == nil || err5 == nil {
			t.Fatal("accepted")
		}
	})
}

// sharesText reports whether text has any 6 characters of secret in a row.
func sharesText(text, secret string) bool {
	for i := range len(secret) - 5 {
		if piece := secret[i : i+6]; piece != "AAAAAA" && strings.Contains(text, piece) {
			return true
		}
	}
	return false
}

// A key that is printed, logged or encoded by accident shows its fingerprint only.
func TestFormattingHidesKeys(t *testing.T) {
	key := parsed(t, fixedSecret)
	nested := struct{ K Key }{key}
	a, err := New(Config{Secrets: []string{fixedSecret}})
	if err != nil {
		t.Fatal(err)
	}
	var texts []string
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%t", "%08b"} {
		// A key's own methods, a key in structs whose fields fmt may call methods on, and in structs where it may not.
		for _, value := range []any{key, &key, nested, &nested, []Key{key}, map[Key]Key{key: key}, newSigner(key, Caller{}), a, NewCredentials(key)} {
			texts = append(texts, fmt.Sprintf(verb, value))
		}
	}
	for _, value := range []any{key, nested} {
		encoded, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, string(encoded))
	}
	var log bytes.Buffer
	for _, handler := range []slog.Handler{slog.NewJSONHandler(&log, nil), slog.NewTextHandler(&log, nil)} {
		slog.New(handler).Info("", "key", key, "nested", nested, "signer", newSigner(key, Caller{}), "pointer", &key, "credentials", NewCredentials(key))
	}
	texts = append(texts, log.String())
	for _, text := range texts {
		for _, shown := range []string{fixedSecret[:8], "0001020304", "00 01 02", "0 1 2 3 4", "0x0, 0x1", "0x00, 0x01", "0, 1, 2", `\x00\x01\x02`, "00000000 00000001 00000010"} {
			if strings.Contains(text, shown) {
				t.Errorf("shows the key: %s", text)
			}
		}
	}
	if got := fmt.Sprint(key); got != "key 630dcd29" {
		t.Errorf("got %s", got)
	}
	if !strings.Contains(log.String(), "630dcd29") {
		t.Errorf("the fingerprint is not logged: %s", log.String())
	}
}

func TestReadKey(t *testing.T) {
	dir := t.TempDir()
	for _, test := range []struct{ name, content, want string }{
		{"bare", fixedSecret, ""},
		{"line break", fixedSecret + "\n", ""},
		{"line break of Windows", fixedSecret + "\r\n", ""},
		{"two line breaks", fixedSecret + "\n\n", "whitespace before or after"},
		{"carriage return", fixedSecret + "\r", "whitespace before or after"},
		{"space", fixedSecret + " \n", "whitespace before or after"},
		{"line break before", "\n" + fixedSecret, "whitespace before or after"},
		{"byte order mark", "\ufeff" + fixedSecret, "not padded base64"},
		{"two lines", fixedSecret + "\n" + fixedSecret + "\n", "line break within"},
		{"empty", "", "empty, want"},
		{"only a line break", "\n", "empty, want"},
		{"huge", strings.Repeat("A", 2<<20), "larger than 1048576 bytes"},
	} {
		t.Run(test.name, func(t *testing.T) {
			file := filepath.Join(dir, "secret")
			if err := os.WriteFile(file, []byte(test.content), 0o600); err != nil {
				t.Fatal(err)
			}
			key, err := ReadKey(file)
			if test.want == "" {
				if err != nil || key.Secret() != fixedSecret {
					t.Fatalf("got %v, %v", key, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), "shared secret file "+file) {
				t.Fatalf("got error %v, want one with %q and the file", err, test.want)
			}
		})
	}
	for _, path := range []string{filepath.Join(dir, "absent"), dir, ""} {
		if _, err := ReadKey(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%q: got error %v", path, err)
		}
	}
}
