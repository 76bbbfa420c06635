package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
)

// A directoryEntry is a user or a group.
type directoryEntry struct {
	id   string
	line int
	data *structpb.Struct
}

// payload is the entry as clients get it. The same entry has always the same bytes.
func (e *directoryEntry) payload() (*anypb.Any, error) { return packed(e.data) }

// read returns the entries of the file, which has been checked as a whole before anything is written.
func (l *directoryLoad) read(ctx context.Context) ([]*directoryEntry, error) {
	l.recordType = directoryTypes[l.kind]
	format := l.format
	if format == "" {
		switch extension := strings.ToLower(filepath.Ext(l.path)); extension {
		case ".csv", ".json", ".jsonl":
			format = extension[1:]
		case ".tsv":
			format = "csv"
		case ".ndjson":
			format = "jsonl"
		default:
			return nil, usagef("--format: needed, because the name %.80q ends in none of .csv, .tsv, .json and .jsonl", l.path)
		}
	}
	content, err := l.readFile(ctx, l.path)
	if err != nil {
		return nil, err
	}
	for _, magic := range []string{"PK\x03\x04", "\xd0\xcf\x11\xe0"} {
		if bytes.HasPrefix(content, []byte(magic)) {
			return nil, usagef("%s: is no text, but a workbook of a spreadsheet or an archive: save it as CSV UTF-8", l.path)
		}
	}
	if content, err = l.toUTF8(content); err != nil {
		return nil, err
	}
	var entries []*directoryEntry
	switch {
	case format == "csv":
		entries, err = l.readCSV(content)
	case format == "jsonl" && !bytes.HasPrefix(bytes.TrimSpace(content), []byte("[")):
		entries, err = l.readLines(content)
	default:
		entries, err = l.readJSON(content)
	}
	if err != nil {
		return nil, err
	}
	known := make(map[string]*directoryEntry, len(entries))
	repeated := 0
	for _, entry := range entries {
		if err := l.check(entry); err != nil {
			return nil, err
		}
		switch other, twice := known[entry.id]; {
		case twice && !proto.Equal(other.data, entry.data):
			return nil, l.wrong(entry.line, "the id %.80q is that of line %d, too", entry.id, other.line)
		case twice:
			repeated++
		default:
			known[entry.id] = entry
		}
	}
	if repeated > 0 {
		entries = slices.DeleteFunc(entries, func(entry *directoryEntry) bool { return known[entry.id] != entry })
		l.say("%s: %d %s twice, in the same words", l.path, repeated, plural(repeated, "entry is there", "entries are there"))
	}
	l.tellNames()
	if len(entries) == 0 && l.allowDeletes < 100 {
		return nil, usagef("%s: holds no %s, so all there are would be deleted: give --allow-deletes 100%% if that is meant", l.path, l.kind)
	}
	return entries, nil
}

// wrong is an error in the file.
func (l *directoryLoad) wrong(line int, format string, args ...any) error {
	return usagef("%s:%d: %s", l.path, line, fmt.Sprintf(format, args...))
}

// ---------------------------------------------------------------------------------------------
// Characters
// ---------------------------------------------------------------------------------------------

// toUTF8 returns a text in UTF-8 that may also be UTF-16, as what Windows calls Unicode: with the mark at its begin, or
// without it, since what begins with a character of ASCII tells the order by its zero.
func (l *directoryLoad) toUTF8(content []byte) ([]byte, error) {
	var order binary.ByteOrder
	switch {
	case bytes.HasPrefix(content, []byte("\xef\xbb\xbf")):
		return content[3:], nil
	case len(content) < 2:
		return content, nil
	case content[0] == 0xff && content[1] == 0xfe, content[0] != 0 && content[1] == 0:
		order = binary.LittleEndian
	case content[0] == 0xfe && content[1] == 0xff, content[0] == 0 && content[1] != 0:
		order = binary.BigEndian
	default:
		return content, nil
	}
	if len(content)%2 != 0 {
		return nil, usagef("%s: is UTF-16 that ends in the midst of a character", l.path)
	}
	var out bytes.Buffer
	for i := 0; i < len(content); i += 2 {
		r := rune(order.Uint16(content[i:]))
		if utf16.IsSurrogate(r) {
			if i += 2; i < len(content) {
				r = utf16.DecodeRune(r, rune(order.Uint16(content[i:])))
			}
			if i >= len(content) || r == utf8.RuneError {
				return nil, l.wrong(1+bytes.Count(out.Bytes(), []byte("\n")), "holds half of a character of UTF-16")
			}
		}
		out.WriteRune(r)
	}
	return bytes.TrimPrefix(out.Bytes(), []byte("\ufeff")), nil
}

// trimCell takes off what nobody sees in a table: white space, the kind that does not break, and marks of no width.
func trimCell(cell string) string {
	return strings.TrimFunc(cell, func(r rune) bool { return unicode.IsSpace(r) || r == '\ufeff' || r == '\u200b' })
}

// ---------------------------------------------------------------------------------------------
// CSV
// ---------------------------------------------------------------------------------------------

// listSeparator stands between the elements of a list in a cell of a CSV file.
const listSeparator = ';'

var (
	// sepLine is how Excel is told which character separates cells.
	sepLine = regexp.MustCompile(`(?i)^"?sep=(.)"?[ \t]*(?:\r?\n|$)`)
	// typeLine is what PowerShell 5 writes in front.
	typeLine = regexp.MustCompile(`^#TYPE [^\n]*(?:\n|$)`)
)

func (l *directoryLoad) readCSV(content []byte) ([]*directoryEntry, error) {
	if !bytes.Contains(content, []byte("\n")) {
		content = bytes.ReplaceAll(content, []byte("\r"), []byte("\n"))
	}
	skipped := 0
	separator := rune(0)
	if found := sepLine.FindSubmatch(content); found != nil {
		separator, _ = utf8.DecodeRune(found[1])
		content, skipped = content[len(found[0]):], 1
	} else if found := typeLine.Find(content); found != nil {
		content, skipped = content[len(found):], 1
	}
	if separator == 0 {
		separator = l.guessSeparator(content)
	}
	reader := csv.NewReader(bytes.NewReader(content))
	reader.Comma = separator
	reader.FieldsPerRecord = -1 // checked here, where rows that are empty do not count
	wrongCSV := func(err error) error {
		var parse *csv.ParseError
		if errors.As(err, &parse) && parse.StartLine < parse.Line {
			return l.wrong(skipped+parse.StartLine, "the row that begins here is wrong in line %d: %v (is a quotation mark not closed?)", skipped+parse.Line, parse.Err)
		}
		if errors.As(err, &parse) {
			return l.wrong(skipped+parse.Line, "%v", parse.Err)
		}
		return usagef("%s: %w", l.path, err)
	}
	header, err := reader.Read()
	if errors.Is(err, io.EOF) {
		return nil, usagef("%s: is empty; the first line has the names of the fields", l.path)
	}
	if err != nil {
		return nil, wrongCSV(err)
	}
	line, _ := reader.FieldPos(0)
	line += skipped
	for i := range header {
		header[i] = trimCell(header[i])
	}
	for len(header) > 0 && header[len(header)-1] == "" { // a sheet has more columns than are used
		header = header[:len(header)-1]
	}
	if len(header) == 0 {
		return nil, l.wrong(line, "is empty; the first line has the names of the fields")
	}
	for i, name := range header {
		if name == "" || slices.Contains(header[:i], name) {
			return nil, l.wrong(line, "column %d has the name %q: want names, each once", i+1, name)
		}
	}
	if err := l.chooseNames(line, header); err != nil {
		return nil, err
	}
	var entries []*directoryEntry
	for {
		row, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return entries, nil
		}
		if err != nil {
			return nil, wrongCSV(err)
		}
		line, _ := reader.FieldPos(0)
		entry := &directoryEntry{line: skipped + line, data: &structpb.Struct{Fields: make(map[string]*structpb.Value, len(row))}}
		for i := range row {
			row[i] = trimCell(row[i])
		}
		for len(row) > len(header) && row[len(row)-1] == "" {
			row = row[:len(row)-1]
		}
		if !slices.ContainsFunc(row, func(cell string) bool { return cell != "" }) {
			continue
		}
		if len(row) != len(header) {
			return nil, l.wrong(entry.line, "wrong number of fields: %d, and the first line has %d", len(row), len(header))
		}
		for i, cell := range row {
			if cell != "" { // else unknown
				entry.data.Fields[header[i]] = structpb.NewStringValue(cell)
			}
		}
		l.rename(entry, true)
		entries = append(entries, entry)
	}
}

// guessSeparator returns the character with which the first line makes most sense.
func (l *directoryLoad) guessSeparator(content []byte) rune {
	best, most := ',', -1
	for _, separator := range []rune{',', ';', '\t', '|'} {
		reader := csv.NewReader(bytes.NewReader(content))
		reader.Comma, reader.FieldsPerRecord = separator, -1
		header, err := reader.Read()
		if err != nil {
			continue
		}
		sense := len(header)
		for _, name := range header {
			if l.target(plainName(trimCell(name))) != "" {
				sense += 1000
			}
		}
		if sense > most {
			best, most = separator, sense
		}
	}
	return best
}

// splitList returns the elements of a list in a cell. A distinguished name may have separators of its own, behind a backslash.
func splitList(cell string) []string {
	var elements []string
	begin, escaped := 0, false
	for i, r := range cell {
		if !escaped && (r == listSeparator || r == '\n') {
			elements = append(elements, cell[begin:i])
			begin = i + 1
		}
		escaped = r == '\\' && !escaped
	}
	return append(elements, cell[begin:])
}

// ---------------------------------------------------------------------------------------------
// JSON
// ---------------------------------------------------------------------------------------------

// readJSON reads a list of objects, objects one after the other, or pages as APIs return them.
func (l *directoryLoad) readJSON(content []byte) ([]*directoryEntry, error) {
	decoder := json.NewDecoder(bytes.NewReader(content))
	var (
		entries []*directoryEntry
		line    = 1
		from    int64 // where line was counted
		ended   bool
	)
	for {
		var raw json.RawMessage
		err := decoder.Decode(&raw)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			offset := decoder.InputOffset()
			var syntax *json.SyntaxError
			if errors.As(err, &syntax) {
				offset = syntax.Offset
			}
			return nil, l.wrong(1+bytes.Count(content[:min(offset, int64(len(content)))], []byte("\n")), "not JSON: %v", err)
		}
		begins := decoder.InputOffset() - int64(len(raw))
		line += bytes.Count(content[from:begins], []byte("\n"))
		from = begins
		if ended {
			return nil, l.wrong(line, "not JSON: something follows the list")
		}
		ended = raw[0] == '['
		if entries, err = l.value(entries, line, raw); err != nil {
			return nil, err
		}
	}
	return entries, l.complete()
}

func (l *directoryLoad) readLines(content []byte) ([]*directoryEntry, error) {
	var entries []*directoryEntry
	line := 0
	for text := range bytes.Lines(content) {
		line++
		if text = bytes.TrimSpace(text); len(text) == 0 {
			continue
		}
		var err error
		if entries, err = l.value(entries, line, text); err != nil {
			return nil, err
		}
	}
	return entries, l.complete()
}

// value adds what a value in JSON holds: a list of objects, a page with such a list, or one object.
func (l *directoryLoad) value(entries []*directoryEntry, line int, text []byte) ([]*directoryEntry, error) {
	if text[0] == '[' {
		return l.elements(entries, line, text)
	}
	var members map[string]json.RawMessage
	if text[0] != '{' || json.Unmarshal(text, &members) != nil {
		return l.object(entries, line, text)
	}
	if _, isEntry := members["id"]; !isEntry {
		// Microsoft Graph, Google Workspace, SCIM.
		for _, name := range []string{"value", "users", "groups", "Resources"} {
			list := members[name]
			if len(list) == 0 || list[0] != '[' {
				continue
			}
			l.morePages = ""
			for _, next := range []string{"@odata.nextLink", "nextPageToken"} {
				if next, has := members[next], next; len(next) > 0 && string(next) != "null" && string(next) != `""` {
					l.morePages = has
				}
			}
			// In the text, since a line is to be told: the list begins where its bytes do.
			line += bytes.Count(text[:bytes.Index(text, list)], []byte("\n"))
			return l.elements(entries, line, list)
		}
	}
	return l.object(entries, line, text)
}

// complete refuses a file that ends with a page that is not the last one: what is on the others would be deleted.
func (l *directoryLoad) complete() error {
	if l.morePages != "" {
		return usagef("%s: is not all: %s says that another page follows, and what is there would be deleted", l.path, l.morePages)
	}
	return nil
}

func (l *directoryLoad) elements(entries []*directoryEntry, line int, list []byte) ([]*directoryEntry, error) {
	decoder := json.NewDecoder(bytes.NewReader(list))
	if _, err := decoder.Token(); err != nil {
		return nil, l.wrong(line, "not JSON: %v", err)
	}
	for from := int64(0); decoder.More(); {
		var raw json.RawMessage
		if err := decoder.Decode(&raw); err != nil {
			return nil, l.wrong(line, "not JSON: %v", err)
		}
		begins := decoder.InputOffset() - int64(len(raw))
		line += bytes.Count(list[from:begins], []byte("\n"))
		from = begins
		var err error
		if entries, err = l.object(entries, line, raw); err != nil {
			return nil, err
		}
	}
	return entries, nil
}

func (l *directoryLoad) object(entries []*directoryEntry, line int, text []byte) ([]*directoryEntry, error) {
	entry := &directoryEntry{line: line, data: new(structpb.Struct)}
	if len(text) == 0 || text[0] != '{' {
		return nil, l.wrong(line, "not an object in JSON")
	}
	if err := entry.data.UnmarshalJSON(text); err != nil {
		return nil, l.wrong(line, "not an object in JSON: %v", plain(err))
	}
	// Okta has most in a profile, Google names in a name.
	for _, name := range []string{"profile", "name"} {
		inner := entry.data.Fields[name].GetStructValue()
		if inner == nil {
			continue
		}
		delete(entry.data.Fields, name)
		for key, value := range inner.Fields {
			if _, taken := entry.data.Fields[key]; !taken {
				entry.data.Fields[key] = value
			}
		}
	}
	if l.names == nil {
		names := make([]string, 0, len(entry.data.Fields))
		for name := range entry.data.Fields {
			names = append(names, name)
		}
		slices.Sort(names)
		if err := l.chooseNames(line, names); err != nil {
			return nil, err
		}
	}
	l.rename(entry, false)
	return append(entries, entry), nil
}

// ---------------------------------------------------------------------------------------------
// Names of fields
// ---------------------------------------------------------------------------------------------

// directoryFieldNames is a field that policies know, with the names under which it comes in exports of Microsoft Entra, Microsoft
// Graph, Okta, Google Workspace, LDAP servers and Active Directory: the better ones in front, spelled by plainName.
type directoryFieldNames struct {
	name  string
	names []string
}

var directoryFields = map[string][]directoryFieldNames{
	"users": {
		{"id", []string{"id", "objectid", "userid", "entryuuid", "objectguid"}},
		{"display_name", []string{"displayname", "fullname", "name", "cn", "commonname"}},
		{"email", []string{"email", "mail", "primaryemail", "emailaddress", "userprincipalname"}},
		{"group_ids", []string{"groupids", "groups", "memberof", "groupmemberships"}},
	},
	// The members of groups of an LDAP server name them by their distinguished name.
	"groups": {
		{"id", []string{"id", "objectid", "groupid", "distinguishedname", "dn", "entryuuid", "objectguid"}},
		{"name", []string{"name", "displayname", "groupname", "cn", "commonname"}},
		{"email", []string{"email", "mail", "groupemail", "emailaddress"}},
	},
}

// idOtherwise are names of fields that may have ids: which one it is depends on what the identity provider is told to send.
var idOtherwise = []string{
	"uid", "samaccountname", "login", "username", "userprincipalname", "primaryemail", "groupemail", "emailaddress", "email", "mail", "groupname", "cn",
}

var (
	firstNames = []string{"firstname", "givenname"}
	lastNames  = []string{"lastname", "surname", "familyname", "sn"}
)

var nameNote = regexp.MustCompile(`\[[^\]]*\]$`)

// plainName is the same for all spellings of a name: displayName, Display name, display_name, "Email Address [Required]".
func plainName(name string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsLetter(r) || unicode.IsDigit(r) {
			return unicode.ToLower(r)
		}
		return -1
	}, nameNote.ReplaceAllString(name, ""))
}

// target returns the field that a name stands for, or "".
func (l *directoryLoad) target(plain string) string {
	for _, field := range directoryFields[l.kind] {
		if slices.Contains(field.names, plain) {
			return field.name
		}
	}
	return ""
}

// chooseNames decides by the names of a file, or of its first object, which field has the ids.
func (l *directoryLoad) chooseNames(line int, names []string) error {
	l.names = make(map[string]string)
	byPlain := make(map[string]string)
	for _, name := range names {
		if _, taken := byPlain[plainName(name)]; !taken {
			byPlain[plainName(name)] = name
		}
	}
	if l.idField != "" {
		if !slices.Contains(names, l.idField) {
			return l.wrong(line, "there is no field %s, but %s", l.idField, strings.Join(names, ", "))
		}
		return nil
	}
	for _, plain := range slices.Concat(directoryFields[l.kind][0].names, idOtherwise) {
		if l.idField = byPlain[plain]; l.idField == "" {
			continue
		}
		if slices.Contains(idOtherwise, plain) {
			l.say("warning: %s: has no field id: the ids are taken from %s. They have to be those that sessions have as user_id; --id-field names another field",
				l.path, l.idField)
		}
		return nil
	}
	return l.wrong(line, "there is no column id, but %s: name the one that has ids with --id-field", strings.Join(names, ", "))
}

// rename gives the fields of an entry the names that policies know.
func (l *directoryLoad) rename(entry *directoryEntry, cells bool) {
	fields := entry.data.Fields
	byPlain := make(map[string]string, len(fields))
	for name, value := range fields {
		plain := l.plain(name)
		_, isNull := value.GetKind().(*structpb.Value_NullValue)
		switch {
		case strings.Contains(plain, "password"), plain == "unicodepwd":
			delete(fields, name)
			l.names[name] = ""
		case isNull && (l.target(plain) != "" || name == l.idField):
			delete(fields, name) // unknown
		case byPlain[plain] == "" || name < byPlain[plain]:
			byPlain[plain] = name
		}
	}
	for i, field := range directoryFields[l.kind] {
		names := field.names
		if i == 0 {
			names = []string{l.plain(l.idField)}
		}
		for _, plain := range names {
			name, has := byPlain[plain]
			if i == 0 && fields[l.idField] != nil {
				name, has = l.idField, true
			}
			text := fields[name].GetStringValue()
			if !has || plain == "userprincipalname" && i > 0 && (!strings.Contains(text, "@") || strings.Contains(strings.ToUpper(text), "#EXT#")) {
				continue
			}
			if _, taken := fields[field.name]; taken && name != field.name && i > 0 {
				break
			}
			value := fields[name]
			if field.name == "group_ids" {
				value = groupIDs(value, cells, name == field.name)
			}
			if i > 0 || !slices.Contains(idOtherwise, plain) { // an address that is the id is an address as well
				delete(fields, name)
			}
			fields[field.name] = value
			l.names[name] = field.name
			break
		}
	}
	if l.kind == "users" && fields["display_name"] == nil {
		var parts []string
		for _, names := range [][]string{firstNames, lastNames} {
			for _, plain := range names {
				if text := fields[byPlain[plain]].GetStringValue(); text != "" {
					parts = append(parts, text)
					l.names[byPlain[plain]] = "display_name"
					break
				}
			}
		}
		if len(parts) > 0 {
			fields["display_name"] = structpb.NewStringValue(strings.Join(parts, " "))
		}
	}
}

// plain is plainName, which is asked for the same names again and again.
func (l *directoryLoad) plain(name string) string {
	plain, known := l.plainNames[name]
	if !known {
		if l.plainNames == nil {
			l.plainNames = make(map[string]string)
		}
		plain = plainName(name)
		l.plainNames[name] = plain
	}
	return plain
}

// groupIDs makes a list of ids, each once: of a cell; of a list of texts or of objects with an id; of one text, since PowerShell
// writes a list of one element so. What is none of these stays, for check to refuse.
func groupIDs(value *structpb.Value, cells, own bool) *structpb.Value {
	elements := value.GetListValue().GetValues()
	if text, isText := value.GetKind().(*structpb.Value_StringValue); isText {
		switch {
		case cells:
			for _, id := range splitList(text.StringValue) {
				elements = append(elements, structpb.NewStringValue(trimCell(id)))
			}
		case own:
			return value
		default:
			elements = []*structpb.Value{value}
		}
	} else if value.GetListValue() == nil {
		return value
	}
	list := new(structpb.ListValue)
	seen := make(map[string]bool)
	for _, element := range elements {
		if id := element.GetStructValue().GetFields()["id"]; id != nil {
			element = id
		}
		if text, isText := element.GetKind().(*structpb.Value_StringValue); isText {
			if text.StringValue == "" || seen[text.StringValue] {
				continue
			}
			seen[text.StringValue] = true
		}
		list.Values = append(list.Values, element)
	}
	return structpb.NewListValue(list)
}

// tellNames says which names were understood, unless they are those of the documentation.
func (l *directoryLoad) tellNames() {
	if l.names == nil {
		return
	}
	var taken, dropped []string
	known := false
	for name, target := range l.names {
		switch {
		case target == "":
			dropped = append(dropped, name)
		case name != target:
			taken = append(taken, fmt.Sprintf("%s as %s", name, target))
		}
		known = known || target != "" && target != "id"
	}
	slices.Sort(taken)
	slices.Sort(dropped)
	if len(taken) > 0 {
		l.say("%s: taken are %s", l.path, strings.Join(taken, ", "))
	}
	if len(dropped) > 0 {
		l.say("%s: left out, as passwords are: %s", l.path, strings.Join(dropped, ", "))
	}
	if !known && len(l.names) > 0 {
		var names []string
		for _, field := range directoryFields[l.kind][1:] {
			names = append(names, field.name)
		}
		l.say("warning: %s: has nothing but ids that policies know: none of %s", l.path, strings.Join(names, ", "))
	}
}

// ---------------------------------------------------------------------------------------------
// What is refused
// ---------------------------------------------------------------------------------------------

// maxIDBytes is the longest id that a record may have.
const maxIDBytes = 2048

// rounded is what a spreadsheet makes of a long number.
var rounded = regexp.MustCompile(`^[0-9][.,]?[0-9]*[eE]\+[0-9]+$`)

// check refuses what policies could not work with, and sets the entry's id.
func (l *directoryLoad) check(entry *directoryEntry) error {
	id, ok := entry.data.Fields["id"].GetKind().(*structpb.Value_StringValue)
	switch {
	case !ok || id.StringValue == "":
		return l.wrong(entry.line, "id: want a text that is not empty")
	case len(id.StringValue) > maxIDBytes:
		return l.wrong(entry.line, "id: %d bytes, at most %d are allowed", len(id.StringValue), maxIDBytes)
	case rounded.MatchString(id.StringValue):
		return l.wrong(entry.line, "id: %s is a number that a spreadsheet has rounded: export it as text", id.StringValue)
	}
	entry.id = id.StringValue
	for name, value := range entry.data.Fields {
		switch name {
		case "display_name", "email", "name":
			if _, ok := value.GetKind().(*structpb.Value_StringValue); !ok {
				return l.wrong(entry.line, "%s: want a text", name)
			}
		case "group_ids":
			_, ok := value.GetKind().(*structpb.Value_ListValue)
			for _, element := range value.GetListValue().GetValues() {
				_, isText := element.GetKind().(*structpb.Value_StringValue)
				ok = ok && isText
			}
			if !ok {
				return l.wrong(entry.line, "group_ids: want a list of texts")
			}
		}
	}
	if !cleanText(structpb.NewStructValue(entry.data)) {
		return l.wrong(entry.line, "holds text that is not valid UTF-8, or the character U+0000 (in a spreadsheet, save as CSV UTF-8)")
	}
	return nil
}

// cleanText reports whether a database can keep every text in a value.
func cleanText(v *structpb.Value) bool {
	sound := func(s string) bool { return utf8.ValidString(s) && !strings.ContainsRune(s, 0) }
	switch kind := v.GetKind().(type) {
	case *structpb.Value_StringValue:
		return sound(kind.StringValue)
	case *structpb.Value_ListValue:
		return !slices.ContainsFunc(kind.ListValue.GetValues(), func(v *structpb.Value) bool { return !cleanText(v) })
	case *structpb.Value_StructValue:
		for name, member := range kind.StructValue.GetFields() {
			if !sound(name) || !cleanText(member) {
				return false
			}
		}
	}
	return true
}
