package filter

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// step is one step of a path through JSON: "the member called name; if there is none, continue with alt from where
// you are". The several readings that the package comment gives to dots, upper-case letters and a leading "value" are
// all such alternatives. A nil step is the end of the path.
//
// At every point of a walk exactly one reading applies, so a path leads to at most one value.
type step struct {
	name   string
	index  int // name as the index of an array element, or -1
	next   *step
	hasAlt bool
	alt    *step
	depth  int // steps to the end by the longest reading
	size   int // readings of the path from here on; see readings
}

// compilePath turns the keys that were walked in a filter into steps.
func compilePath(keys []string) (*step, error) {
	var first *step
	for i := len(keys) - 1; i >= 0; i-- {
		first = keyStep(keys[i], first, i == 0)
		if first.depth > MaxDepth {
			return nil, fmt.Errorf("%w: path longer than %d steps", ErrInvalid, MaxDepth)
		}
	}
	return first, nil
}

// keyStep is the step by a key of the filter, which may stand for several.
func keyStep(key string, next *step, root bool) *step {
	if !strings.Contains(key, ".") {
		return partStep(key, next, root)
	}
	parts := strings.Split(key, ".")
	split := next
	for i := len(parts) - 1; i >= 0; i-- {
		split = partStep(parts[i], split, root && i == 0)
	}
	return newStep(step{name: key, index: -1, next: next, hasAlt: true, alt: split})
}

// partStep is the step by a key without dots or by a part of a key with dots.
func partStep(name string, next *step, root bool) *step {
	s := step{name: name, index: arrayIndex(name), next: next}
	if root && name == "value" {
		s.hasAlt, s.alt = true, next
	} else if snake := snakeCase(name); snake != name {
		s.hasAlt, s.alt = true, newStep(step{name: snake, index: -1, next: next})
	}
	return newStep(s)
}

func newStep(s step) *step {
	s.depth = 1 + s.next.steps()
	s.size = s.next.readings()
	if s.index >= 0 { // an object's key or an array's index
		s.size = saturate(s.size, s.size)
	}
	if s.hasAlt {
		s.depth = max(s.depth, s.alt.steps())
		s.size = saturate(s.size, s.alt.readings())
	}
	return &s
}

func (s *step) steps() int {
	if s == nil {
		return 0
	}
	return s.depth
}

// readings counts the ways in which the path can be read, which is also how often the generated jsonpath repeats the
// comparison at its end: jsonpath has no conditional steps, so every reading is written out.
func (s *step) readings() int {
	if s == nil {
		return 1
	}
	return s.size
}

// saturate adds, and stops at a number above every limit: readings double with each ambiguous step.
func saturate(a, b int) int { return min(a+b, MaxNodes+1) }

// arrayIndex returns the name as an array index, or -1 if it is not one in its usual spelling.
func arrayIndex(name string) int {
	if name == "" || name[0] < '0' || name[0] > '9' || name[0] == '0' && len(name) > 1 {
		return -1
	}
	n, err := strconv.Atoi(name)
	if err != nil || n > math.MaxInt32 {
		return -1
	}
	return n
}

// snakeCase reverses the lowerCamelCase that proto3 JSON makes of field names.
func snakeCase(name string) string {
	i := strings.IndexFunc(name, isUpper)
	if i < 0 {
		return name
	}
	b := make([]byte, 0, len(name)+4)
	for _, c := range []byte(name) {
		if isUpper(rune(c)) {
			b = append(b, '_')
			c += 'a' - 'A'
		}
		b = append(b, c)
	}
	return string(b)
}

// isUpper knows ASCII only, which is all that field names are made of.
func isUpper(r rune) bool { return 'A' <= r && r <= 'Z' }
