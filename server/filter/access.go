package filter

import (
	"net/netip"
	"slices"
	"strings"
)

// AccessKind is a way to find the records of a filter without looking at all of them.
type AccessKind uint8

const (
	// AccessNone: the filter can only be evaluated record by record.
	AccessNone AccessKind = iota
	// AccessKeys: every matching record has one of Access.IDs as its id, or the prefix that one of Access.Index
	// resolves to. If both are empty, nothing matches.
	AccessKeys
	// AccessField: every matching record satisfies each of Access.Fields.
	AccessField
)

// Access tells how the records that match a filter can be found through an index. It is a hint: the records that it
// leads to include every match, and unless Exact is set, the JSONPath still has to decide about each of them.
//
// The slices belong to the filter; do not modify them.
type Access struct {
	Kind   AccessKind
	IDs    []string
	Index  []netip.Prefix
	Fields []Field // pick any one for which there is an index
	// Exact says that the records the hint leads to are all matches (by the only one of Fields, with AccessField), so
	// that the JSONPath need not be evaluated. With AccessNone it says that every record matches.
	Exact bool

	rest *node // what the JSONPath still has to decide about, if that is not all
}

// Field says that the text of the payload field at Path is one of Values.
//
// Path is made of proto field names joined by dots. As everywhere in filters, a key that is spelled like the whole
// path goes before the path, and only strings, numbers and booleans have a text. So an index that stands in for the
// JSONPath has to hold the text of coalesce(data -> path, data #> string_to_array(path, '.')), and nothing for objects
// and arrays.
type Field struct {
	Path   string
	Values []string
}

// maxFields bounds the candidates offered; nobody has more indexes on a type.
const maxFields = 16

// Rest returns what has to be decided about each record that a hint of this filter leads to: the filter without the condition
// that the hint is made from, or all of it.
func (f *Filter) Rest(a Access) *Filter {
	if a.rest == nil {
		return f
	}
	return &Filter{root: *a.rest}
}

// Access returns the best hint for the filter.
func (f *Filter) Access() Access {
	if f == nil {
		return Access{Exact: true}
	}
	return f.root.access()
}

func (n *node) access() Access {
	switch n.op {
	case opAnd:
		return accessAll(n.kids)
	case opOr:
		return accessAny(n.kids)
	case opID:
		return Access{Kind: AccessKeys, IDs: n.values, Exact: true}
	case opIndex:
		return Access{Kind: AccessKeys, Index: n.index, Exact: true}
	case opField:
		if indexable(n.key) {
			return Access{Kind: AccessField, Fields: []Field{{n.key, n.values}}, Exact: true}
		}
	}
	return Access{}
}

// accessAll: what one condition implies, their conjunction implies.
func accessAll(kids []node) Access {
	if len(kids) == 0 {
		return Access{Exact: true}
	}
	var best Access
	for i := range kids {
		switch a := kids[i].access(); a.Kind {
		case AccessKeys:
			if best.Kind != AccessKeys || len(a.IDs)+len(a.Index) < len(best.IDs)+len(best.Index) {
				best = a
				best.rest = nil
				if a.Exact {
					others := and(slices.Concat(kids[:i], kids[i+1:]))
					best.rest = &others
				}
			}
		case AccessField:
			if best.Kind != AccessKeys {
				best.Kind = AccessField
				best.Fields = append(best.Fields[:len(best.Fields):len(best.Fields)], a.Fields...)
				best.Fields = best.Fields[:min(len(best.Fields), maxFields)]
			}
		}
	}
	best.Exact = false
	return best
}

// accessAny: a disjunction implies only what all its parts imply together.
func accessAny(kids []node) Access {
	if len(kids) == 0 {
		return Access{Kind: AccessKeys, Exact: true}
	}
	all := kids[0].access()
	all.rest = nil
	all.IDs, all.Index = slices.Clip(all.IDs), slices.Clip(all.Index) // not to append to the filter's own
	for i := range kids[1:] {
		a := kids[1+i].access()
		if a.Kind != all.Kind {
			return Access{}
		}
		all.Exact = all.Exact && a.Exact
		all.IDs = append(all.IDs, a.IDs...)
		all.Index = append(all.Index, a.Index...)
		all.Fields = slices.DeleteFunc(all.Fields, func(f Field) bool { return fieldOf(a, f.Path) == nil })
		for i := range all.Fields {
			f := &all.Fields[i]
			f.Values = append(slices.Clip(f.Values), fieldOf(a, f.Path).Values...)
		}
	}
	if all.Kind == AccessNone || all.Kind == AccessField && len(all.Fields) == 0 {
		return Access{}
	}
	return all
}

func fieldOf(a Access, path string) *Field {
	for i := range a.Fields {
		if a.Fields[i].Path == path {
			return &a.Fields[i]
		}
	}
	return nil
}

// indexable reports whether a key is a path of proto field names that has no reading besides those that Field
// documents. (Camel case has: a Struct may hold "userId" where a message holds "user_id".)
func indexable(key string) bool {
	for i, part := range strings.Split(key, ".") {
		if part == "" || i == 0 && part == "value" {
			return false
		}
		for j := range len(part) {
			c := part[j]
			if c != '_' && (c < 'a' || c > 'z') && (j == 0 || c < '0' || c > '9') {
				return false
			}
		}
	}
	return true
}
