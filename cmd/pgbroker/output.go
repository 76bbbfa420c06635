package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/rivo/uniseg"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// The values of --output.
const (
	outputTable = "table"
	outputJSON  = "json"
)

// isTerminal reports whether a person may sit behind a file.
func isTerminal(file any) bool {
	_, ok := windowSize(file)
	return ok
}

func windowSize(file any) (*unix.Winsize, bool) {
	f, ok := file.(*os.File)
	if !ok {
		return nil, false
	}
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	return size, err == nil
}

// terminalWidth returns the number of columns of the terminal that w is, or 0 when it is none.
func terminalWidth(w io.Writer) int {
	switch size, ok := windowSize(w); {
	case !ok:
		return 0
	case size.Col == 0: // a terminal that does not say
		return 80
	default:
		return int(size.Col)
	}
}

// columnsOf is how many columns of a terminal a text takes: wide characters take two, and what is combined with another none.
func columnsOf(text string) int { return uniseg.StringWidth(text) }

// A table is what people get to see: aligned columns, cut to the width of the terminal, uncut when the output is no
// terminal. The columns that hold long texts are the ones that give way. Where that is not enough, each row is shown as
// lines, one for each cell.
type table struct {
	header []string
	long   []int // columns that may be cut, in the order in which they are
	rows   [][]string
}

func newTable(header ...string) *table { return &table{header: header} }

// cut names the columns that may be cut.
func (t *table) cut(columns ...int) *table {
	t.long = columns
	return t
}

func (t *table) add(cells ...string) {
	for i := range cells {
		cells[i] = cell(cells[i])
	}
	t.rows = append(t.rows, cells)
}

// gap separates columns.
const gap = "  "

func (t *table) write(w io.Writer) error {
	var b bytes.Buffer
	t.writeFor(&b, terminalWidth(w))
	_, err := w.Write(b.Bytes())
	return err
}

// writeFor writes the table for a terminal that is so wide; 0 is none.
func (t *table) writeFor(b *bytes.Buffer, terminal int) {
	rows := append([][]string{t.header}, t.rows...)
	widths := make([]int, len(t.header))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], columnsOf(cell))
		}
	}
	if !shrink(widths, t.long, terminal) {
		t.expand(b, terminal)
		return
	}
	for _, row := range rows {
		writeRow(b, row, widths)
	}
}

// expand writes a table that is too wide for a terminal.
func (t *table) expand(b *bytes.Buffer, terminal int) {
	widths := []int{0, 0}
	for _, name := range t.header {
		widths[0] = max(widths[0], columnsOf(name))
	}
	widths[1] = max(1, terminal-widths[0]-len(gap))
	for i, row := range t.rows {
		if i > 0 {
			b.WriteByte('\n')
		}
		for column, cell := range row {
			writeRow(b, []string{t.header[column], cell}, widths)
		}
	}
}

// shrink makes the given columns narrower until a row fits into the terminal, none below what can still be read, and
// reports whether it fits.
func shrink(widths, columns []int, terminal int) bool {
	if terminal == 0 {
		return true
	}
	const least = 12
	total := len(gap) * (len(widths) - 1)
	for _, width := range widths {
		total += width
	}
	for _, column := range columns {
		if total <= terminal {
			return true
		}
		width := min(widths[column], max(least, widths[column]-(total-terminal)))
		total -= widths[column] - width
		widths[column] = width
	}
	return total <= terminal
}

func writeRow(b *bytes.Buffer, row []string, widths []int) {
	var line strings.Builder
	for i, cell := range row {
		if i > 0 {
			line.WriteString(gap)
		}
		cell = ellipsis(cell, widths[i])
		line.WriteString(cell)
		line.WriteString(strings.Repeat(" ", max(0, widths[i]-columnsOf(cell))))
	}
	b.WriteString(strings.TrimRight(line.String(), " "))
	b.WriteByte('\n')
}

// ellipsis cuts a text to a width, never within what is shown as one character.
func ellipsis(text string, width int) string {
	if columnsOf(text) <= width {
		return text
	}
	end, used := 0, 0
	for characters := uniseg.NewGraphemes(text); characters.Next(); {
		if used += characters.Width(); used > width-1 {
			break
		}
		_, end = characters.Positions()
	}
	return text[:end] + "…"
}

// clean makes a text safe to show: ids and payloads come from anybody, and a terminal obeys control characters.
func clean(text string) string {
	safe := func(r rune) bool { return unicode.IsPrint(r) || r == '\n' }
	if utf8.ValidString(text) && strings.IndexFunc(text, func(r rune) bool { return !safe(r) }) < 0 {
		return text
	}
	var b strings.Builder
	for i, r := range text {
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(text[i:], string(utf8.RuneError)):
			fmt.Fprintf(&b, `\x%02x`, text[i])
		case safe(r):
			b.WriteRune(r)
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

// cell makes a text safe to show in one line.
func cell(text string) string { return strings.ReplaceAll(clean(text), "\n", `\n`) }

// toJSON is protojson in one line, with the names of fields that SQL, filters and masks have too. Its whitespace is random by
// design, which would make output differ from run to run.
func toJSON(m proto.Message) (json.RawMessage, error) {
	b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
	if err != nil {
		return nil, err
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, b); err != nil {
		return nil, err
	}
	return safeJSON(compact.Bytes()), nil
}

// safeJSON escapes the control characters that JSON allows and terminals obey.
func safeJSON(b []byte) json.RawMessage {
	control := func(r rune) bool { return r >= 0x7f && r <= 0x9f }
	if bytes.IndexFunc(b, control) < 0 {
		return b
	}
	var out bytes.Buffer
	for _, r := range string(b) {
		if control(r) {
			fmt.Fprintf(&out, `\u%04x`, r)
		} else {
			out.WriteRune(r)
		}
	}
	return out.Bytes()
}

// plainJSON is toJSON for messages of the services: numbers are numbers, as in what SQL makes of a row, though protobuf would
// write those of 64 bits as text. Payloads have them as SQL has them in the column data: as text.
func plainJSON(m proto.Message) (json.RawMessage, error) {
	b, err := toJSON(m)
	if err != nil {
		return nil, err
	}
	names := longNumbers(m.ProtoReflect().Descriptor(), nil)
	return quotedNumber.ReplaceAllFunc(b, func(member []byte) []byte {
		parts := quotedNumber.FindSubmatch(member)
		if !names[string(parts[1])] {
			return member
		}
		return fmt.Appendf(nil, `"%s":%s`, parts[1], parts[2])
	}), nil
}

// quotedNumber is a member of an object; within a text its quotes would be escaped.
var quotedNumber = regexp.MustCompile(`"(\w+)":"(-?\d+)"`)

// longNumbers adds the names of the fields of a message, and of those within it, that are numbers of 64 bits.
func longNumbers(message protoreflect.MessageDescriptor, names map[string]bool) map[string]bool {
	if names == nil {
		names = make(map[string]bool)
	}
	for i := range message.Fields().Len() {
		field := message.Fields().Get(i)
		switch field.Kind() {
		case protoreflect.Int64Kind, protoreflect.Uint64Kind, protoreflect.Sint64Kind, protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind:
			names[string(field.Name())] = true
		case protoreflect.MessageKind:
			if field.Message().ParentFile().Package() != "google.protobuf" {
				longNumbers(field.Message(), names)
			}
		}
	}
	return names
}

// writeProto prints a message as a line of JSON.
func (a *app) writeProto(m proto.Message) error {
	b, err := plainJSON(m)
	if err != nil {
		return err
	}
	return a.writeLine(b)
}

// writeJSON prints a value of our own as a line of JSON.
func (a *app) writeJSON(v any) error {
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		return err
	}
	return a.writeLine(safeJSON(bytes.TrimRight(b.Bytes(), "\n")))
}

func (a *app) writeLine(b []byte) error {
	_, err := a.stdout.Write(append(b, '\n'))
	return err
}

// say tells the user something that is not part of the output.
func (a *app) say(format string, args ...any) {
	fmt.Fprintf(a.stderr, "pgbroker: %s\n", clean(fmt.Sprintf(format, args...)))
}

// showTime is a point in time for people: local, to the second, with the distance from UTC as psql shows it.
func showTime(t time.Time) string {
	return strings.TrimSuffix(t.Local().Format("2006-01-02 15:04:05-07:00"), ":00")
}
