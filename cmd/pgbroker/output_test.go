package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"pgbroker/proto/session"
)

func TestClean(t *testing.T) {
	for text, want := range map[string]string{
		"plain":                 "plain",
		"naïve 日本":              "naïve 日本",
		"two\nlines":            "two\nlines",
		"\x1b[2Jcleared":        `\x1b[2Jcleared`,
		"bell\a, tab\t":         `bell\x07, tab\x09`,
		"csi\u009b2J":           `csi\u009b2J`,
		"right\u202eto left":    `right\u202eto left`,
		"bad \xff byte":         `bad \xff byte`,
		"replacement \ufffd":    "replacement \ufffd",
		"\xff and \ufffd alike": `\xff and ` + "\ufffd" + ` alike`,
	} {
		if got := clean(text); got != want {
			t.Errorf("clean(%q) = %q, want %q", text, got, want)
		}
	}
	if got := cell("a\nb"); got != `a\nb` {
		t.Errorf("cell: got %q", got)
	}
}

func TestTable(t *testing.T) {
	table := newTable("ID", "DATA", "N").cut(1, 0)
	table.add("ä", strings.Repeat("x", 40), "1")
	table.add("a long identifier of 34 characters", "\x1b", "12")
	var b bytes.Buffer
	if err := table.write(&b); err != nil {
		t.Fatal(err)
	}
	want := "" +
		"ID                                  DATA                                      N\n" +
		"ä                                   xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx  1\n" +
		"a long identifier of 34 characters  \\x1b                                      12\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

// Columns are straight under wide and under combining characters.
func TestTableOfWideCharacters(t *testing.T) {
	table := newTable("ID", "NAME", "N")
	table.add("a", "日本語", "1")
	table.add("b", "jose\u0301", "2")
	table.add("c", "plain", "3")
	var b bytes.Buffer
	if err := table.write(&b); err != nil {
		t.Fatal(err)
	}
	want := "ID  NAME    N\na   日本語  1\nb   jose\u0301    2\nc   plain   3\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

// A table whose columns cannot be cut to the terminal is shown cell by cell.
func TestExpandedTable(t *testing.T) {
	table := newTable("TYPE", "RECORDS")
	table.add("session.Session", "1")
	table.add("a", strings.Repeat("9", 20))
	var b bytes.Buffer
	table.expand(&b, 20)
	if want := "TYPE     session.Se…\nRECORDS  1\n\nTYPE     a\nRECORDS  9999999999…\n"; b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

func TestShrink(t *testing.T) {
	for _, c := range []struct {
		widths   []int
		terminal int
		want     []int
	}{
		{[]int{10, 50, 100}, 0, []int{10, 50, 100}},   // no terminal
		{[]int{10, 50, 100}, 200, []int{10, 50, 100}}, // room enough
		{[]int{10, 50, 100}, 120, []int{10, 50, 56}},
		{[]int{10, 50, 100}, 60, []int{10, 34, 12}},
		{[]int{10, 50, 100}, 20, []int{10, 12, 12}}, // narrower is not readable
		{[]int{10, 5, 6}, 20, []int{10, 5, 6}},      // never wider
	} {
		got := append([]int(nil), c.widths...)
		fits := shrink(got, []int{2, 1}, c.terminal)
		if total := got[0] + got[1] + got[2] + 2*len(gap); fits != (c.terminal == 0 || total <= c.terminal) {
			t.Errorf("shrink(%v) to %d: fits is %v", c.widths, c.terminal, fits)
		}
		for i := range got {
			if got[i] != c.want[i] {
				t.Errorf("shrink(%v) to %d = %v, want %v", c.widths, c.terminal, got, c.want)
				break
			}
		}
	}
	for _, c := range []struct {
		text  string
		width int
		want  string
	}{
		{"äöüß", 3, "äö…"}, {"äöüß", 4, "äöüß"}, {"日本語", 6, "日本語"}, {"日本語", 5, "日本…"}, {"日本語", 4, "日…"},
		{"e\u0301e\u0301e\u0301", 3, "e\u0301e\u0301e\u0301"}, {"e\u0301e\u0301e\u0301", 2, "e\u0301…"}, {"🇩🇪🇫🇷", 3, "🇩🇪…"},
	} {
		if got := ellipsis(c.text, c.width); got != c.want {
			t.Errorf("ellipsis(%q, %d) = %q, want %q", c.text, c.width, got, c.want)
		}
	}
}

func TestSafeJSON(t *testing.T) {
	if got := string(safeJSON([]byte("\"a\u009b2J\x7f\""))); got != `"a\u009b2J\u007f"` {
		t.Errorf("got %s", got)
	}
}

func TestChangePrinter(t *testing.T) {
	var b bytes.Buffer
	p := changePrinter{width: 63}
	for _, cells := range [][]string{
		{"1", "2030-01-01 00:00:00+00", "put", "session.Session", "s1", `{"id":"s1"}`},
		{"20000000000", "2030-01-01 00:00:00+00", "delete", "t", "s\n2", ""},
	} {
		if err := p.write(&b, cells...); err != nil {
			t.Fatal(err)
		}
	}
	want := "" +
		"VERSION   TIME                    CHANGE   TYPE              I…\n" +
		"1         2030-01-01 00:00:00+00  put      session.Session   s…\n" +
		"20000000000  2030-01-01 00:00:00+00  delete   t               …\n"
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}

// TestRedact: marked fields are left out at any depth, also inside payloads within payloads.
func TestRedact(t *testing.T) {
	inner, err := anypb.New(&session.Session{Id: "s1", OauthToken: &session.OAuthToken{AccessToken: canary, TokenType: "Bearer"}})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // an Any in an Any in an Any
		if inner, err = anypb.New(inner); err != nil {
			t.Fatal(err)
		}
	}
	shown, err := payloadJSON(inner, false)
	if err != nil || strings.Contains(string(shown), canary) || !strings.Contains(string(shown), `"token_type":"Bearer"`) {
		t.Errorf("got %s, %v", shown, err)
	}
	// A payload that cannot be shown as JSON is shown as bytes, but not with its secrets.
	unknown, err := anypb.New(&anypb.Any{TypeUrl: "type.googleapis.com/no.Such", Value: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	if shown, err := payloadJSON(unknown, false); err != nil || !strings.Contains(string(shown), `"value":"`) {
		t.Errorf("unknown within known: got %s, %v", shown, err)
	}
}

func TestPayloadSummary(t *testing.T) {
	pack := func(s *structpb.Struct) *anypb.Any {
		payload, err := anypb.New(s)
		if err != nil {
			t.Fatal(err)
		}
		return payload
	}
	object, err := structpb.NewStruct(map[string]any{"a": "x"})
	if err != nil {
		t.Fatal(err)
	}
	empty, err := anypb.New(new(session.Session))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		payload *anypb.Any
		want    string
	}{
		{nil, ""},
		{pack(object), `{"a":"x"}`},
		{pack(new(structpb.Struct)), `{}`},
		{empty, `{}`},
		{&anypb.Any{TypeUrl: "type.googleapis.com/no.Such", Value: []byte("abc")}, "3 bytes of type.googleapis.com/no.Such"},
		{&anypb.Any{TypeUrl: typeURLPrefix + "session.Session", Value: []byte("\xff")}, "1 bytes of type.googleapis.com/session.Session"},
		{new(anypb.Any), "0 bytes of "},
	} {
		if got := payloadSummary(c.payload, false); got != c.want {
			t.Errorf("payloadSummary(%v) = %q, want %q", c.payload, got, c.want)
		}
	}
}

func TestConfigError(t *testing.T) {
	if got := (configError{"a"}).Error(); got != "a" {
		t.Errorf("one problem: got %q", got)
	}
	if got := (configError{"a", "b"}).Error(); got != "2 problems with the configuration:\n  a\n  b" {
		t.Errorf("two problems: got %q", got)
	}
	if exitCode(errors.New("x")) != exitFailure || exitCode(usagef("x")) != exitUsage || exitCode(configError{"x"}) != exitUsage {
		t.Error("exit codes of errors that are no status")
	}
}
