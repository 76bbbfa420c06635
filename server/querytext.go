package server

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxQueryText bounds what is shown of a query.
const maxQueryText = 200

// redactQuery returns the text of an SQL query without anything that could be a secret, for logs and metrics: of its
// words only those that nobody quotes are kept, which are keywords and names. Literals, numbers, quoted names (with which
// people who come from other databases write texts), comments, and the values that SET sets become "?". What cannot be
// told for certain counts as a literal: the server cuts long queries off, and what a backslash means in a text depends on
// a setting of the session.
func redactQuery(query string) string {
	r := redaction{rest: query}
	for r.rest != "" && r.out.Len() < maxQueryText {
		r.token()
	}
	text := strings.TrimSpace(r.out.String())
	text = strings.ToValidUTF8(text[:min(len(text), maxQueryText)], "")
	if r.rest != "" {
		text += "…"
	}
	return text
}

type redaction struct {
	rest string
	out  strings.Builder

	first   string // word of the statement
	setting int    // 1 after SET, 2 after the name that is set, 3 in its value
}

const hidden = "?"

func (r *redaction) token() {
	c, size := utf8.DecodeRuneInString(r.rest)
	switch {
	case unicode.IsSpace(c):
		r.rest = strings.TrimLeftFunc(r.rest, unicode.IsSpace)
		r.space()
	case strings.HasPrefix(r.rest, "--"):
		_, r.rest, _ = strings.Cut(r.rest, "\n")
		r.space()
	case strings.HasPrefix(r.rest, "/*"):
		r.comment()
		r.space()
	case c == '\'':
		r.quoted('\'')
	case c == '"':
		r.quoted('"')
	case c == '$':
		r.dollar()
	case isWordStart(c):
		r.word()
	case '0' <= c && c <= '9':
		// With all that sticks to it: 0xFF, 1e5, and whatever may follow in a text cut in two.
		r.rest = strings.TrimLeftFunc(r.rest, func(c rune) bool { return isWordPart(c) || c == '.' })
		r.hide()
	case c == ';':
		r.first, r.setting = "", 0
		r.keep(size)
	case strings.ContainsRune("(),.*=<>+-/%[]:|&!~^#@", c):
		if r.setting == 2 && c == '=' {
			r.setting = 3
			r.keep(size)
			return
		}
		if r.setting == 3 {
			r.rest = r.rest[size:]
			return
		}
		r.keep(size)
	default: // a backslash of psql, a control character, what is no UTF-8: nothing that a query needs
		r.rest = r.rest[size:]
		r.hide()
	}
}

// word takes an unquoted word, with the literal that it may be the prefix of.
func (r *redaction) word() {
	end := strings.IndexFunc(r.rest, func(c rune) bool { return !isWordPart(c) })
	if end < 0 {
		end = len(r.rest)
	}
	word := r.rest[:end]
	upper := strings.ToUpper(word)
	if end < len(r.rest) && r.rest[end] == '\'' && (upper == "E" || upper == "B" || upper == "X" || upper == "N") {
		r.rest = r.rest[end:]
		r.quoted('\'')
		return
	}
	if strings.HasPrefix(r.rest[end:], "&") && upper == "U" {
		r.rest = r.rest[end+1:]
		return // the literal or quoted name comes next
	}
	if r.first == "" {
		r.first = upper
	}
	switch {
	case r.setting == 3:
		r.rest = r.rest[end:]
		r.hide()
		return
	case r.setting == 2 && upper == "TO":
		r.setting = 3
	case r.setting == 1 && upper != "LOCAL" && upper != "SESSION":
		r.setting = 2
	case upper == "SET" && !assigns(r.first):
		r.setting = 1
	}
	r.keep(end)
}

// assigns reports whether SET in a statement is followed by columns rather than by a setting.
func assigns(first string) bool {
	switch first {
	case "UPDATE", "INSERT", "MERGE", "WITH", "EXPLAIN", "PREPARE":
		return true
	}
	return false
}

// quoted takes a text or a name in quotes. If there is a backslash in it, or no end, nothing is certain any more.
func (r *redaction) quoted(quote byte) {
	r.hide()
	for i := 1; i < len(r.rest); i++ {
		switch {
		case r.rest[i] == '\\':
			r.rest = ""
			return
		case r.rest[i] != quote:
		case i+1 < len(r.rest) && r.rest[i+1] == quote:
			i++
		default:
			r.rest = r.rest[i+1:]
			return
		}
	}
	r.rest = ""
}

// dollar takes a text in dollar quotes, or a parameter.
func (r *redaction) dollar() {
	r.hide()
	end := strings.IndexFunc(r.rest[1:], func(c rune) bool { return !isWordPart(c) || c == '$' }) + 1
	if end == 0 || r.rest[end] != '$' {
		// A parameter such as $1, or a tag that has been cut off.
		if end == 0 {
			end = len(r.rest)
		}
		r.rest = r.rest[end:]
		return
	}
	tag := r.rest[:end+1]
	_, after, found := strings.Cut(r.rest[len(tag):], tag)
	if !found {
		after = ""
	}
	r.rest = after
}

// comment takes a comment, and those within it.
func (r *redaction) comment() {
	depth := 0
	for i := 0; i < len(r.rest); i++ {
		switch {
		case strings.HasPrefix(r.rest[i:], "/*"):
			depth++
			i++
		case strings.HasPrefix(r.rest[i:], "*/"):
			depth--
			i++
			if depth == 0 {
				r.rest = r.rest[i+1:]
				return
			}
		}
	}
	r.rest = ""
}

func (r *redaction) keep(n int) {
	r.out.WriteString(r.rest[:n])
	r.rest = r.rest[n:]
}

// hide stands for something that is not shown; several in a row are one.
func (r *redaction) hide() {
	if !strings.HasSuffix(r.out.String(), hidden) {
		r.out.WriteString(hidden)
	}
}

func (r *redaction) space() {
	if !strings.HasSuffix(r.out.String(), " ") {
		r.out.WriteByte(' ')
	}
}

// Names beyond ASCII are legal and rare; they are not shown.
func isWordStart(c rune) bool {
	return c == '_' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

func isWordPart(c rune) bool {
	return isWordStart(c) || '0' <= c && c <= '9' || c == '$' || c >= utf8.RuneSelf
}

// toValidText makes a text from the database fit for the label of a metric.
func toValidText(text string) string { return strings.ToValidUTF8(text, "?") }
