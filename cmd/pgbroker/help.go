package main

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// The width of help: that of the terminal, as far as lines are good to read; 80 where there is none.
const (
	usualWidth  = 80
	widestLines = 120
)

// setHelp makes a command and those that it holds show help that fits the terminal.
func (a *app) setHelp(root *cobra.Command) {
	width := min(terminalWidth(a.stdout), widestLines)
	if width == 0 {
		width = usualWidth
	}
	root.SetHelpFunc(func(cmd *cobra.Command, _ []string) { fmt.Fprint(cmd.OutOrStdout(), helpText(cmd, width)) })
	root.SetUsageFunc(func(cmd *cobra.Command) error {
		_, err := fmt.Fprint(cmd.OutOrStderr(), usageText(cmd, width))
		return err
	})
}

func helpText(cmd *cobra.Command, width int) string {
	text := cmd.Long
	if text == "" {
		text = cmd.Short
	}
	return reflow(text, width) + "\n" + usageText(cmd, width)
}

// usageText is all that follows the description.
func usageText(cmd *cobra.Command, width int) string {
	var b strings.Builder
	b.WriteString("Usage:\n")
	if cmd.Runnable() {
		b.WriteString(hang("  "+cmd.UseLine(), width, 6))
	}
	if cmd.HasAvailableSubCommands() {
		b.WriteString(hang("  "+cmd.CommandPath()+" COMMAND", width, 6))
	}
	if cmd.HasExample() {
		b.WriteString("\nExamples:\n" + strings.TrimRight(cmd.Example, "\n") + "\n")
	}
	list := func(title, group string) {
		var commands strings.Builder
		for _, child := range cmd.Commands() {
			if (child.IsAvailableCommand() || child.Name() == "help") && child.GroupID == group {
				line := fmt.Sprintf("  %-*s  ", cmd.NamePadding(), child.Name())
				commands.WriteString(hangFrom(line, child.Short, width, len(line)))
			}
		}
		if commands.Len() > 0 {
			fmt.Fprintf(&b, "\n%s\n%s", title, commands.String())
		}
	}
	for _, group := range cmd.Groups() {
		list(group.Title, group.ID)
	}
	list("Commands:", "")
	if cmd.HasAvailableLocalFlags() {
		b.WriteString("\nFlags:\n" + flagsText(cmd.LocalFlags(), width))
	}
	if cmd.HasAvailableInheritedFlags() {
		b.WriteString("\nFlags of all commands:\n" + flagsText(cmd.InheritedFlags(), width))
	}
	if cmd.HasAvailableSubCommands() {
		b.WriteString("\n" + hang(fmt.Sprintf("More of a command: %s COMMAND --help", cmd.CommandPath()), width, 2))
	}
	return b.String()
}

// flagsText lists flags, each with what it is for beside it, or beneath it where there is no room.
func flagsText(flags *pflag.FlagSet, width int) string {
	const leastRoom = 42
	var names, meanings []string
	widest := 0
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		name := "      --" + f.Name
		if f.Shorthand != "" {
			name = "  -" + f.Shorthand + ", --" + f.Name
		}
		kind, meaning := pflag.UnquoteUsage(f)
		if kind = strings.TrimSuffix(kind, "Array"); kind != "" {
			name += " " + kind
		}
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" && f.DefValue != "[]" {
			meaning += " (default " + f.DefValue + ")"
		}
		names, meanings = append(names, name), append(meanings, meaning)
		widest = max(widest, columnsOf(name))
	})
	var b strings.Builder
	indent := min(widest+3, max(10, width-leastRoom))
	for i, name := range names {
		if columnsOf(name)+2 > indent {
			b.WriteString(name + "\n")
			name = ""
		}
		start := fmt.Sprintf("%-*s", indent, name)
		b.WriteString(hangFrom(start, meanings[i], width, indent))
	}
	return b.String()
}

// listed is how a line begins that is an element of a list: what follows stands beneath what it says.
var listed = regexp.MustCompile(`^ +\S+ +`)

// reflow breaks the paragraphs of a text anew. What is indented is a list, an element on each line.
func reflow(text string, width int) string {
	var (
		b         strings.Builder
		paragraph []string
	)
	flush := func() {
		if len(paragraph) > 0 {
			b.WriteString(hang(strings.Join(paragraph, " "), width, 0))
		}
		paragraph = nil
	}
	for line := range strings.Lines(strings.TrimSpace(text) + "\n") {
		switch line = strings.TrimRight(line, " \n"); {
		case line == "":
			flush()
			b.WriteByte('\n')
		case strings.HasPrefix(line, " "):
			flush()
			b.WriteString(hang(line, width, len(listed.FindString(line))))
		default:
			paragraph = append(paragraph, line)
		}
	}
	flush()
	return b.String()
}

// hang breaks a line at its spaces. The lines that follow the first one are indented.
func hang(line string, width, indent int) string {
	if prefix := listed.FindString(line); len(prefix) == indent && indent > 0 {
		return hangFrom(prefix, line[len(prefix):], width, indent)
	}
	words := strings.TrimLeft(line, " ")
	return hangFrom(line[:len(line)-len(words)], words, width, indent)
}

// hangFrom is hang for a line of which the start is not to be touched.
func hangFrom(start, words string, width, indent int) string {
	var b strings.Builder
	b.WriteString(start)
	column := columnsOf(start)
	for i, word := range strings.Fields(words) {
		size := columnsOf(word)
		switch {
		case i == 0:
		case column+1+size > width:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			column = indent
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += size
	}
	return strings.TrimRight(b.String(), " ") + "\n"
}
