// Package jsontext writes any text so that PostgreSQL can hold it as JSON, and no two texts look the same afterwards.
package jsontext

import (
	"bytes"
	"strings"
)

// escape begins what stands for a character that text in PostgreSQL cannot hold. It is one that no text has a use for, and where a text
// has it, it is doubled: so different texts stay different.
const escape = "\U0010FFFF"

var escaper = strings.NewReplacer("\x00", escape+"0", escape, escape+escape)

// String returns a text as projections have it, in which U+0000 is U+10FFFF followed by 0, and U+10FFFF comes twice. All others are as
// they are. Left out, U+0000 would make two users one, and the sessions of both would end with those of either.
func String(s string) string {
	if strings.IndexByte(s, 0) < 0 && !strings.Contains(s, escape) {
		return s
	}
	return escaper.Replace(s)
}

// Bytes is String for bytes, which it returns as they are in most cases.
func Bytes(s []byte) []byte {
	if bytes.IndexByte(s, 0) < 0 && !bytes.Contains(s, []byte(escape)) {
		return s
	}
	return []byte(escaper.Replace(string(s)))
}
