package main

import (
	"bytes"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Every command's help fits a terminal of the usual width, and wider and narrower ones as far as commands to type allow.
func TestHelpFits(t *testing.T) {
	t.Parallel()
	a := &app{stdout: new(bytes.Buffer), stderr: new(bytes.Buffer)}
	root := a.rootCommand()
	var look func(cmd *cobra.Command)
	look = func(cmd *cobra.Command) {
		cmd.InitDefaultHelpFlag()
		for _, width := range []int{60, 80, 120} {
			text := helpText(cmd, width)
			_, rest, _ := strings.Cut(text, "\nExamples:\n")
			examples, _, _ := strings.Cut(rest, "\n\n")
			if strings.Contains(examples, `\\`) {
				t.Errorf("%s: an example for a shell has a backslash that is doubled: %q", cmd.CommandPath(), examples)
			}
			for line := range strings.Lines(text) {
				line = strings.TrimSuffix(line, "\n")
				if columnsOf(line) > max(width, 80) || columnsOf(line) > width && !strings.Contains(examples, line) {
					t.Errorf("%s, %d columns: %d are taken by %q", cmd.CommandPath(), width, columnsOf(line), line)
				}
				if strings.HasSuffix(line, " ") {
					t.Errorf("%s: %q ends with a space", cmd.CommandPath(), line)
				}
			}
		}
		for _, child := range cmd.Commands() {
			if !child.Hidden {
				look(child)
			}
		}
	}
	look(root)
	// What help consists of is all there, in one order.
	r := try(t, nil, "sessions", "--help")
	for _, want := range []string{"List and revoke sessions. A revoked", "\nUsage:\n  pgbroker sessions", "\nCommands:\n", "  revoke ", "\nFlags:\n", "\nFlags of all commands:\n", "--pomerium-config"} {
		before, after, found := strings.Cut(r.stdout, want)
		if !found || r.code != exitOK {
			t.Errorf("sessions --help has no %q after %q", want, before)
		}
		r.stdout = after
	}
}

func TestReflow(t *testing.T) {
	t.Parallel()
	text := "one two\nthree four\n\n  5    five six seven\n  130  eight nine ten\nlast"
	want := "one two three\nfour\n\n  5    five\n       six\n       seven\n  130  eight\n       nine\n       ten\nlast\n"
	if got := reflow(text, 13); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got, want := reflow("日本語 日本語 a", 9), "日本語\n日本語 a\n"; got != want {
		t.Errorf("wide characters: got\n%s\nwant\n%s", got, want)
	}
}

// Tables fit the terminal, whatever they hold.
func TestTablesFitTheTerminal(t *testing.T) {
	t.Parallel()
	for _, columns := range []uint16{80, 132} {
		var out bytes.Buffer
		// Not through a terminal of its own, whose output nobody could read here: the table knows only a width.
		table := newTable("SETTING", "VALUE", "ORIGIN").cut(1, 2)
		for i := range settings {
			table.add(settings[i].name, strings.Repeat("v", 90), "pomerium config /etc/a/very/long/path/to/a/file.yaml")
		}
		table.writeFor(&out, int(columns))
		numbers := newTable("TYPE", "RECORDS", "CAPACITY", "TTL", "EXPIRES BY", "IDLE TIMEOUT", "USER LIMIT", "AUDITED").cut(0)
		numbers.add("pomerium.device.Enrollment", "1000000000", "20000000000", "876000h", "oauth_token.expires_at", "876000h30m10s", "20000", "false")
		numbers.writeFor(&out, int(columns))
		for line := range strings.Lines(out.String()) {
			if n := columnsOf(strings.TrimSuffix(line, "\n")); n > int(columns) {
				t.Errorf("%d columns: %d are taken by %q", columns, n, line)
			}
		}
	}
}
