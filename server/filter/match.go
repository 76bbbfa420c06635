package filter

import (
	"encoding/json"
	"math/big"
	"slices"
	"strconv"
)

// Record is what a filter sees of a record.
type Record struct {
	ID   string
	Type string
	Data any    // the projection as encoding/json decodes it, best with UseNumber; nil if there is none
	CIDR string // the index prefix as the Resolver spells it, or ""
}

// Match evaluates the filter in memory. It means exactly what JSONPath means in Postgres, and is the model that the
// tests hold JSONPath against.
func (f *Filter) Match(r Record, resolve Resolver) bool {
	return f == nil || f.root.match(&r, resolve)
}

func (n *node) match(r *Record, resolve Resolver) bool {
	switch n.op {
	case opAnd:
		return !slices.ContainsFunc(n.kids, func(kid node) bool { return !kid.match(r, resolve) })
	case opOr:
		return slices.ContainsFunc(n.kids, func(kid node) bool { return kid.match(r, resolve) })
	case opNot:
		return !n.kids[0].match(r, resolve)
	case opID:
		return slices.Contains(n.values, r.ID)
	case opType:
		return slices.Contains(n.values, r.Type)
	case opIndex:
		for _, prefix := range n.index {
			if resolve == nil {
				break
			}
			if cidr, ok := resolve(prefix); ok && cidr == r.CIDR {
				return true
			}
		}
		return false
	}
	v, ok := n.path.find(r.Data)
	return ok && slices.ContainsFunc(n.values, func(text string) bool { return hasText(v, text) })
}

// find returns what the path leads to.
func (s *step) find(v any) (any, bool) {
	for s != nil {
		var found any
		ok := false
		switch v := v.(type) {
		case map[string]any:
			found, ok = v[s.name]
		case []any:
			if ok = 0 <= s.index && s.index < len(v); ok {
				found = v[s.index]
			}
		}
		switch {
		case ok:
			v, s = found, s.next
		case s.hasAlt:
			s = s.alt
		default:
			return nil, false
		}
	}
	return v, true
}

// hasText reports whether a JSON value has this text.
func hasText(v any, text string) bool {
	switch v := v.(type) {
	case string:
		return v == text
	case bool:
		return strconv.FormatBool(v) == text
	case float64:
		return formatNumber(v) == text
	case json.Number:
		if !isPlainNumber(text) {
			return false
		}
		if _, err := v.Float64(); err != nil {
			return false // beyond float64; not worth the memory that an exponent of a billion takes
		}
		stored, ok := new(big.Rat).SetString(v.String())
		wanted, _ := new(big.Rat).SetString(text)
		return ok && stored.Cmp(wanted) == 0
	}
	return false
}
