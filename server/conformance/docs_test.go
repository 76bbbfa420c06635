package conformance_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// TestTheTableIsComplete keeps docs/conformance.md true: every test that it names exists, and every test here
// is named there.
func TestTheTableIsComplete(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/conformance.md")
	if err != nil {
		t.Fatal(err)
	}
	named := make(map[string]bool)
	for _, match := range regexp.MustCompile("`(Test[A-Za-z0-9_]+)`").FindAllSubmatch(text, -1) {
		named[string(match[1])] = true
	}
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	written := make(map[string]bool)
	for _, file := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range parsed.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if ok && f.Recv == nil && regexp.MustCompile(`^Test[A-Z]`).MatchString(f.Name.Name) && f.Name.Name != "TestMain" {
				written[f.Name.Name] = true
			}
		}
	}
	for name := range named {
		if !written[name] {
			t.Errorf("docs/conformance.md names %s, which does not exist", name)
		}
	}
	for name := range written {
		if !named[name] {
			t.Errorf("docs/conformance.md does not name %s", name)
		}
	}
}
