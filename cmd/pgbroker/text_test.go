package main

import (
	"strings"
	"testing"
)

// TestHalfCharactersAreRefused: JSON can name halves of characters (lone surrogates), which no text can hold. Replaced by something,
// different ids would become the same.
func TestHalfCharactersAreRefused(t *testing.T) {
	t.Parallel()
	for _, text := range []string{`"a\ud800"`, `"\udc00"`, `"\ud800\ud800"`, `"\udfff\ud800x"`, `["\ud800"]`, `{"\ud800": 1}`} {
		if payload, err := encodePayload([]byte(`{"id": `+text+`}`), "t", ""); err == nil {
			t.Errorf("record put takes %s as %v", text, payload)
		}
	}
	load := &directoryLoad{path: "users.json"}
	if entries, err := load.readJSON([]byte(`[{"id": "a\ud800"}, {"id": "a\ud801"}]`)); err == nil || !strings.Contains(err.Error(), "line 1") && !strings.Contains(err.Error(), ":1") {
		t.Errorf("directory load takes %v, %v", entries, err)
	}
}
