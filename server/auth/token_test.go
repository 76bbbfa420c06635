package auth

import (
	"bytes"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"pgregory.net/rapid"
)

var (
	b64 = base64.RawURLEncoding

	// The bytes 0 to 31, and tokens that a few lines of Python made with them, neither with our code nor with the library
	// that ours is compared to.
	fixedSecret = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
	fixedTokens = map[string]string{ // exp is the start of 2100
		"HS256": "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJleHAiOjQxMDI0NDQ4MDB9.rh_t4p2WS9apHn-l7kvz91gtlOfSWbf2e8TNxBoAlq0",
		"HS384": "eyJhbGciOiJIUzM4NCIsInR5cCI6IkpXVCJ9.eyJleHAiOjQxMDI0NDQ4MDB9.eJEv0npf822N8tUK-fw2VQOd83VC03AeT9_Nj1dIhBteUg1ZKy8diUbGfakD5tXb",
		"HS512": "eyJhbGciOiJIUzUxMiIsInR5cCI6IkpXVCJ9.eyJleHAiOjQxMDI0NDQ4MDB9.LHn0VWHhqAJbTbik2IqDuzRg-MpW9uj3o_K0pBo5OZb0YI8TW_aKuSXDG5sZgq2RXpL7WP_dfL_wqukJy2V7og",
	}

	// An arbitrary present, for tests that need a fixed one.
	now = time.Date(2026, 9, 1, 12, 0, 0, 0, time.UTC)
)

const hs256Header = `{"alg":"HS256","typ":"JWT"}`

func parsed(t testing.TB, secret string) Key {
	t.Helper()
	key, err := ParseKey(secret)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// sign makes a token of any header and payload, correctly signed with the given hash whatever the header says.
func sign(key Key, hash crypto.Hash, header, payload string) string {
	return signSegments(key, hash, b64.EncodeToString([]byte(header)), b64.EncodeToString([]byte(payload)))
}

func signSegments(key Key, hash crypto.Hash, header, payload string) string {
	h := hmac.New(hash.New, key.bytes())
	h.Write([]byte(header + "." + payload))
	return header + "." + payload + "." + b64.EncodeToString(h.Sum(nil))
}

func claims(exp int64) string { return fmt.Sprintf(`{"exp":%d}`, exp) }

func TestVerifyAcceptsForeignTokens(t *testing.T) {
	keys := []*signer{newSigner(NewKey(), Caller{}), newSigner(parsed(t, fixedSecret), Caller{}), newSigner(NewKey(), Caller{})}
	for alg, token := range fixedTokens {
		v := verify(token, keys, now)
		if v.reason != "" || v.expires != 4102444800 || v.signer != keys[1] {
			t.Errorf("%s: got reason %q, expires %d, key %v", alg, v.reason, v.expires, v.signer)
		}
	}
}

// The table of tokens that are refused, and next to each kind the nearest one that is not.
func TestVerify(t *testing.T) {
	key, other := NewKey(), NewKey()
	exp := now.Unix() + 3600
	good := claims(exp)
	usual := sign(key, crypto.SHA256, hs256Header, good)
	segments := strings.Split(usual, ".")

	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rs256, err := jwt.NewWithClaims(jwt.SigningMethodRS256, jwt.MapClaims{"exp": exp}).SignedString(rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	none, err := jwt.NewWithClaims(jwt.SigningMethodNone, jwt.MapClaims{"exp": exp}).SignedString(jwt.UnsafeAllowNoneSignatureType)
	if err != nil {
		t.Fatal(err)
	}
	hs := func(header string) string { return sign(key, crypto.SHA256, header, good) }
	with := func(payload string) string { return sign(key, crypto.SHA256, hs256Header, payload) }
	// The length of claims, before encoding, that makes a token as long as it may be.
	longest := b64.DecodedLen(MaxTokenSize - len(segments[0]) - len(segments[2]) - 2)

	for _, test := range []struct {
		name, token string
		want        Reason
	}{
		{"usual", usual, ""},
		{"HS384", sign(key, crypto.SHA384, `{"alg":"HS384"}`, good), ""},
		{"HS512", sign(key, crypto.SHA512, `{"alg":"HS512"}`, good), ""},

		// The form.
		{"empty", "", ReasonMalformed},
		{"one dot", ".", ReasonMalformed},
		{"two dots", "..", ReasonMalformed},
		{"no dots", "garbage", ReasonMalformed},
		{"two segments", segments[0] + "." + segments[1], ReasonMalformed},
		{"four segments", usual + ".", ReasonMalformed},
		{"four segments with the last signed", usual + "." + segments[2], ReasonMalformed},
		{"bearer", "Bearer " + usual, ReasonMalformed},
		{"JSON form", `{"payload":"` + segments[1] + `"}`, ReasonMalformed},
		{"header is not base64", signSegments(key, crypto.SHA256, "!"+segments[0], segments[1]), ReasonMalformed},
		{"padded header", signSegments(key, crypto.SHA256, base64.URLEncoding.EncodeToString([]byte(hs256Header+"  ")), segments[1]), ReasonMalformed},
		{"payload is not base64", signSegments(key, crypto.SHA256, segments[0], "!"+segments[1]), ReasonMalformed},
		{"signature is not base64", segments[0] + "." + segments[1] + ".!" + segments[2], ReasonMalformed},
		{"longest", with(strings.Repeat(" ", longest-len(good)) + good), ""},
		{"too long", with(strings.Repeat(" ", longest-len(good)+1) + good), ReasonMalformed},
		{"huge", with(strings.Repeat(" ", 1<<20) + good), ReasonMalformed},
		{"huge without dots", strings.Repeat("a", 1<<20), ReasonMalformed},
		{"only dots", strings.Repeat(".", 1<<10), ReasonMalformed},

		// The header.
		{"header is not JSON", hs(`alg=HS256`), ReasonMalformed},
		{"header is not an object", hs(`["HS256"]`), ReasonMalformed},
		{"header is null", hs(`null`), ReasonMalformed},
		{"header with something after it", hs(hs256Header + "{}"), ReasonMalformed},
		{"no algorithm", hs(`{"typ":"JWT"}`), ReasonMalformed},
		{"algorithm is null", hs(`{"alg":null}`), ReasonMalformed},
		{"algorithm is a number", hs(`{"alg":256}`), ReasonMalformed},
		{"algorithm's name in capitals", hs(`{"ALG":"HS256"}`), ReasonMalformed},
		{"critical extension", hs(`{"alg":"HS256","crit":["b64"],"b64":false}`), ReasonMalformed},
		{"other fields", hs(`{"typ":"anything","kid":"../../etc/passwd","jwk":{"kty":"oct","k":"AA"},"alg":"HS256"}`), ""},
		{"none, unsigned", none, ReasonAlgorithm},
		{"none, signed", hs(`{"alg":"none"}`), ReasonAlgorithm},
		{"None", hs(`{"alg":"None"}`), ReasonAlgorithm},
		{"empty algorithm", hs(`{"alg":""}`), ReasonAlgorithm},
		{"hs256", hs(`{"alg":"hs256"}`), ReasonAlgorithm},
		{"RS256", rs256, ReasonAlgorithm},
		{"RS256 with our MAC", hs(`{"alg":"RS256"}`), ReasonAlgorithm},
		{"ES256 with our MAC", hs(`{"alg":"ES256"}`), ReasonAlgorithm},

		// The signature.
		{"no signature", segments[0] + "." + segments[1] + ".", ReasonBadSignature},
		{"half a signature", segments[0] + "." + segments[1] + "." + segments[2][:20], ReasonBadSignature},
		{"another key", sign(other, crypto.SHA256, hs256Header, good), ReasonBadSignature},
		{"another key and expired", sign(other, crypto.SHA256, hs256Header, claims(1)), ReasonBadSignature},
		{"another key and another claim", sign(other, crypto.SHA256, hs256Header, `{"exp":1,"sub":"x"}`), ReasonBadSignature},
		{"another key and no JSON", sign(other, crypto.SHA256, hs256Header, `x`), ReasonBadSignature},
		{"another payload", segments[0] + "." + b64.EncodeToString([]byte(claims(exp+1))) + "." + segments[2], ReasonBadSignature},
		{"another header", b64.EncodeToString([]byte(`{"alg":"HS256"}`)) + "." + segments[1] + "." + segments[2], ReasonBadSignature},
		{"HS256 under HS512", sign(key, crypto.SHA256, `{"alg":"HS512"}`, good), ReasonBadSignature},
		{"HS512 under HS256", sign(key, crypto.SHA512, hs256Header, good), ReasonBadSignature},

		// The claims.
		{"no claims at all", with(``), ReasonMalformed},
		{"not JSON", with(`exp=1`), ReasonMalformed},
		{"null", with(`null`), ReasonMalformed},
		{"a number", with(`4102444800`), ReasonMalformed},
		{"an array", with(`["exp",4102444800]`), ReasonMalformed},
		{"an object in an array", with(`[` + good + `]`), ReasonMalformed},
		{"empty object", with(`{}`), ReasonMalformed},
		{"unfinished", with(`{"exp":4102444800`), ReasonMalformed},
		{"trailing comma", with(`{"exp":4102444800,}`), ReasonMalformed},
		{"no colon", with(`{"exp" 4102444800}`), ReasonMalformed},
		{"name without quotes", with(`{exp:4102444800}`), ReasonMalformed},
		{"something after it", with(good + `{}`), ReasonMalformed},
		{"a brace after it", with(good + `}`), ReasonMalformed},
		{"exp is a string", with(`{"exp":"4102444800"}`), ReasonMalformed},
		{"exp is null", with(`{"exp":null}`), ReasonMalformed},
		{"exp is true", with(`{"exp":true}`), ReasonMalformed},
		{"exp is an array", with(`{"exp":[4102444800]}`), ReasonMalformed},
		{"exp is deep", with(`{"exp":` + strings.Repeat("[", 1000) + strings.Repeat("]", 1000) + `}`), ReasonMalformed},
		{"exp is an object", with(`{"exp":{"exp":4102444800}}`), ReasonMalformed},
		{"exp is nothing", with(`{"exp":}`), ReasonMalformed},
		{"exp has a leading zero", with(`{"exp":04102444800}`), ReasonMalformed},
		{"exp has a plus", with(`{"exp":+4102444800}`), ReasonMalformed},
		{"exp has an underscore", with(`{"exp":4_102_444_800}`), ReasonMalformed},
		{"exp is hexadecimal", with(`{"exp":0xf4865700}`), ReasonMalformed},
		{"exp is NaN", with(`{"exp":NaN}`), ReasonMalformed},
		{"exp beyond int64", with(`{"exp":9223372036854775808}`), ReasonMalformed},
		{"exp beyond float64", with(`{"exp":1e999}`), ReasonMalformed},
		{"exp below int64", with(`{"exp":-1e19}`), ReasonMalformed},
		{"extra claim", with(`{"exp":4102444800,"sub":"x"}`), ReasonExtraClaim},
		{"extra claim first", with(`{"iat":1,"exp":4102444800}`), ReasonExtraClaim},
		{"extra claim that is null", with(`{"exp":4102444800,"nbf":null}`), ReasonExtraClaim},
		{"extra claim that is an array", with(`{"exp":4102444800,"aud":["a",["b"]]}`), ReasonExtraClaim},
		{"another claim", with(`{"iat":4102444800}`), ReasonExtraClaim},
		{"EXP", with(`{"EXP":4102444800}`), ReasonExtraClaim},
		{"exp twice, first expired", with(`{"exp":1,"exp":4102444800}`), ReasonExtraClaim},
		{"exp twice, last expired", with(`{"exp":4102444800,"exp":1}`), ReasonExtraClaim},
		{"exp twice, once escaped", with(`{"exp":4102444800,"\u0065xp":4102444800}`), ReasonExtraClaim},
		{"exp escaped", with(`{"\u0065xp":4102444800}`), ""},
		{"spaces", with(" {\n \"exp\" : 4102444800 }\n"), ""},
		{"exponent", with(`{"exp":4.1024448e9}`), ""},
		{"fraction", with(fmt.Sprintf(`{"exp":%d.5}`, exp)), ""},
		{"far away", with(`{"exp":9223372036854774784}`), ""}, // the largest float64 below 2^63

		// The time: exp is the last moment at which the token is valid.
		{"this second", with(claims(now.Unix())), ""},
		{"this second and a fraction", with(fmt.Sprintf(`{"exp":%d.9}`, now.Unix())), ""},
		{"a second ago", with(claims(now.Unix() - 1)), ReasonClock},
		{"a fraction ago", with(fmt.Sprintf(`{"exp":%d.9}`, now.Unix()-1)), ReasonClock},
		{"five minutes ago", with(claims(now.Unix() - 300)), ReasonClock},
		{"longer ago", with(claims(now.Unix() - 301)), ReasonExpired},
		{"1970", with(claims(0)), ReasonExpired},
		{"negative", with(claims(-1)), ReasonExpired},
		{"longest ago", with(`{"exp":-9223372036854775808}`), ReasonExpired},
	} {
		t.Run(test.name, func(t *testing.T) {
			keys := []*signer{newSigner(key, Caller{})}
			if got := verify(test.token, keys, now).reason; got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
			// With more keys the outcome is the same, and without ours nothing is accepted.
			keys = []*signer{newSigner(NewKey(), Caller{}), newSigner(key, Caller{}), newSigner(NewKey(), Caller{})}
			if got := verify(test.token, keys, now).reason; got != test.want {
				t.Errorf("with several keys: got %q, want %q", got, test.want)
			}
			if got := verify(test.token, keys[:1], now).reason; got == "" {
				t.Error("accepted without its key")
			}
		})
	}
}

func TestVerifyHasNoLeeway(t *testing.T) {
	key := NewKey()
	token := sign(key, crypto.SHA256, hs256Header, claims(now.Unix()))
	keys := []*signer{newSigner(key, Caller{})}
	if v := verify(token, keys, now); v.reason != "" {
		t.Errorf("at exp: %q", v.reason)
	}
	if v := verify(token, keys, now.Add(time.Nanosecond)); v.reason != ReasonClock {
		t.Errorf("a nanosecond after exp: %q", v.reason)
	}
}

// reference is the rule of the contract in terms of the library.
func reference(token string, key Key, now time.Time) error {
	claims := jwt.MapClaims{}
	parser := jwt.NewParser(jwt.WithValidMethods([]string{"HS256", "HS384", "HS512"}), jwt.WithoutClaimsValidation())
	_, err := parser.ParseWithClaims(token, claims, func(*jwt.Token) (any, error) { return key.bytes(), nil })
	if err != nil {
		return err
	}
	exp, ok := claims["exp"].(float64)
	if !ok || len(claims) != 1 {
		return fmt.Errorf("claims are %v", claims)
	}
	if exp < -1<<63 || exp >= 1<<63 {
		return errors.New("exp is out of range")
	}
	if s := int64(exp); s < now.Unix() || s == now.Unix() && now.Nanosecond() > 0 {
		return errors.New("expired")
	}
	return nil
}

// members counts the members of a JSON object, repetitions included.
func members(object []byte) (n int) {
	d := json.NewDecoder(bytes.NewReader(object))
	_, _ = d.Token()
	for d.More() {
		var value json.RawMessage
		if _, err := d.Token(); err != nil {
			return n
		}
		if err := d.Decode(&value); err != nil {
			return n
		}
		n++
	}
	return n
}

// checkAgainstReference fails if verify and the library disagree about a token in other ways than we mean to.
func checkAgainstReference(t interface{ Fatalf(string, ...any) }, token string, key Key, now time.Time) {
	v := verify(token, []*signer{newSigner(key, Caller{})}, now)
	err := reference(token, key, now)
	if (v.reason == "") == (err == nil) {
		return
	}
	segments := strings.Split(token, ".")
	header, _ := b64.DecodeString(segments[0])
	if v.reason == "" {
		// The library decodes numbers in the header, we do not look at them.
		if json.Valid(header) && strings.Contains(err.Error(), "could not JSON decode header") {
			return
		}
		t.Fatalf("accepted %s, the library says: %v", token, err)
	}
	payload, _ := b64.DecodeString(segments[1])
	var fields map[string]any
	_ = json.Unmarshal(header, &fields)
	_, crit := fields["crit"]
	switch {
	case v.reason == ReasonExtraClaim && members(payload) > 1: // exp twice
	case v.reason == ReasonMalformed && (len(token) > MaxTokenSize || crit):
	default:
		t.Fatalf("rejected %s (header %s, claims %s) as %s, the library accepts it", token, header, payload, v.reason)
	}
}

// FuzzVerify looks for tokens that crash the verifier or that it judges differently from the library.
func FuzzVerify(f *testing.F) {
	key := parsed(f, fixedSecret)
	for _, token := range fixedTokens {
		f.Add(token)
		f.Add(token[:len(token)-1])
	}
	for _, token := range []string{"", ".", "..", "...", "a.b.c", usualHeader + "..", "eyJhbGciOiJub25lIn0.eyJleHAiOjF9."} {
		f.Add(token)
	}
	f.Fuzz(func(t *testing.T, token string) { checkAgainstReference(t, token, key, now) })
}

// FuzzVerifySigned does the same for tokens with a correct signature, which FuzzVerify will not find.
func FuzzVerifySigned(f *testing.F) {
	key := parsed(f, fixedSecret)
	for _, header := range []string{hs256Header, `{"alg":"HS384"}`, `{"alg":"HS512","crit":["exp"]}`, `{"alg":"none"}`, `{"ALG":"HS256"}`, `{"alg":"HS256","x":1e999}`} {
		for _, payload := range []string{
			`{"exp":4102444800}`, `{"exp":1}`, `{"exp":"4102444800"}`, `{"exp":4102444800.5}`, `{"exp":4.2e9}`, `{"exp":-0}`,
			`{"exp":04102444800}`, `{"exp":1,"exp":4102444800}`, `{"exp":4102444800,"a":[1,[2]]}`, `{"\u0065xp":4102444800}`,
			`{"Exp":4102444800}`, `{}`, `[]`, `null`, ``, ` {"exp" : 4102444800} `, `{"exp":4102444800}x`, `{"exp":9223372036854775807}`,
		} {
			f.Add(header, payload, uint8(0))
		}
	}
	f.Fuzz(func(t *testing.T, header, payload string, hash uint8) {
		hashes := []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512}
		checkAgainstReference(t, sign(key, hashes[int(hash)%len(hashes)], header, payload), key, now)
	})
}

// The quick way to read claims gives what the thorough one does.
func TestUsualClaims(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		payload := []byte(rapid.OneOf(
			rapid.Custom(func(t *rapid.T) string { return claims(rapid.Int64().Draw(t, "exp")) }),
			rapid.StringMatching(`\{"exp":[-+]?[0-9_x]{0,20}\}?`),
			rapid.StringMatching(`\{"exp":[1-9][0-9]{0,14}\}`),
		).Draw(t, "claims"))
		quick, ok := parseUsualClaims(payload)
		if !ok {
			return
		}
		thorough, reason := parseClaims(append(payload, ' ')) // a space at the end makes them unusual
		if reason != "" || thorough != quick {
			t.Fatalf("%s: quick %d, thorough %d and %q", payload, quick, thorough, reason)
		}
	})
	if _, ok := parseUsualClaims([]byte(claims(time.Now().Unix()))); !ok {
		t.Error("the quick way is not taken for the claims that clients send")
	}
}

// Every token that we mint is accepted until its hour is over, by its own key and no other.
func TestMintedTokens(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		key, other := drawKey(t, "key"), drawKey(t, "other")
		expires := time.Unix(rapid.Int64Range(0, 1<<40).Draw(t, "expires"), 0)
		after := time.Duration(rapid.Int64Range(-int64(2*time.Hour), int64(2*time.Hour)).Draw(t, "after"))
		token, err := mint(key, expires)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(token, usualHeader+".") {
			t.Fatalf("unusual header in %s", token)
		}
		ours := verify(token, []*signer{newSigner(key, Caller{})}, expires.Add(after))
		if got, want := ours.reason == "", after <= 0; got != want {
			t.Fatalf("%v after its expiry, accepted: %v", after, got)
		}
		if key != other {
			if v := verify(token, []*signer{newSigner(other, Caller{})}, expires.Add(after)); v.reason != ReasonBadSignature {
				t.Fatalf("other key: %q", v.reason)
			}
		}
		// Any change of a single character makes it invalid, except in the bits that base64 leaves unused at the end.
		i := rapid.IntRange(0, len(token)-2).Draw(t, "position")
		c := rapid.SampledFrom([]byte("ABab01-_.")).Draw(t, "character")
		if token[i] != c {
			changed := token[:i] + string(c) + token[i+1:]
			if v := verify(changed, []*signer{newSigner(key, Caller{})}, expires); v.reason == "" {
				t.Fatalf("changed token accepted: %s", changed)
			}
		}
	})
}

func drawKey(t *rapid.T, label string) Key {
	return makeKey(rapid.SliceOfN(rapid.Byte(), KeySize, KeySize).Draw(t, label))
}

func TestVerifyConcurrently(t *testing.T) {
	keys := []*signer{newSigner(NewKey(), Caller{}), newSigner(parsed(t, fixedSecret), Caller{})}
	done := make(chan error)
	for range 4 {
		go func() {
			for range 2000 {
				for alg, token := range fixedTokens {
					if v := verify(token, keys, now); v.reason != "" {
						done <- fmt.Errorf("%s: %q", alg, v.reason)
						return
					}
				}
			}
			done <- nil
		}()
	}
	for range 4 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	key := NewKey()
	present := time.Now()
	usual, err := mint(key, present.Add(TokenLifetime))
	if err != nil {
		b.Fatal(err)
	}
	unusual := sign(key, crypto.SHA256, `{"typ":"JWT","alg":"HS256"}`, claims(present.Unix()+3600)+" ")
	one := []*signer{newSigner(key, Caller{})}
	two := []*signer{newSigner(NewKey(), Caller{}), newSigner(key, Caller{})}
	for _, bench := range []struct {
		name, token string
		keys        []*signer
	}{{"usual", usual, one}, {"second key", usual, two}, {"unusual form", unusual, one}} {
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if v := verify(bench.token, bench.keys, present); v.reason != "" {
					b.Fatal(v.reason)
				}
			}
		})
	}
	b.Run("library", func(b *testing.B) { // for comparison
		b.ReportAllocs()
		for b.Loop() {
			if err := reference(usual, key, present); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkMint(b *testing.B) {
	key := NewKey()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := mint(key, now); err != nil {
			b.Fatal(err)
		}
	}
}
