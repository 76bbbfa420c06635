// Package filter compiles the filter of a databroker Query into one predicate that PostgreSQL evaluates, so that
// limits, counts and pages are taken in SQL and no row leaves the database in vain.
//
// # Meaning
//
// A filter is a boolean tree over four kinds of condition:
//
//   - {"id": v}: the record's id equals v.
//   - {"type": v}: the record's type equals v.
//   - {"$index": v}: v is an IP address or a CIDR, and the record carries the longest stored prefix that contains it.
//     Several records may carry that prefix; a record with a shorter one does not match. A v that is neither an
//     address nor a CIDR matches nothing. An IPv4 address inside IPv6 (::ffff:10.0.0.1) is that IPv4 address.
//   - any other path: the text of the payload field at that path equals v.
//
// Keys of one object are joined by AND, elements of a list by OR; "$and", "$or" and "$not" do what they say at any
// depth. An empty object or "$and" matches everything, an empty list or "$or" nothing. Equality may be spelled
// {"key": v} or {"key": {"$eq": v}} (also "=", "==", "$equals", "$is"). Every condition is true or false, never
// unknown: $not of a condition on an absent field holds. A record without a readable payload has no fields, and can
// still be found by id, type, $index and $not.
//
// # Values
//
// Values are compared as text, exactly and case-sensitively. A string is its own text, booleans are "true" and
// "false", null is "", and a number is its shortest plain decimal form, without exponent ("1000000", "0.1"). So 7 and
// "7" are the same value, and both find the number 7 as well as the string "7", which is how proto3 JSON writes
// 64-bit integers. Numbers stored as 7.0 or 7e0 are 7. Objects, arrays and null in the payload have no text and equal
// nothing. Fields at their default value are absent from proto3 JSON and equal nothing, not even "".
//
// # Paths
//
// A path walks the payload's projection: proto field names (snake_case) for messages, keys for maps and Structs. At
// each object a filter key is tried as it is written; if the object has no such key, then
//
//   - a key with dots is the path of its parts: {"a.b": v} finds the key "a.b", else what {"a": {"b": v}} finds;
//   - a key with upper-case letters is its snake_case form: {"userId": v} finds the key "userId", else "user_id";
//   - "value" in front of the path means nothing, since Pomerium's own backend needs it to look into a Struct:
//     {"value.email": v} finds what {"email": v} finds.
//
// Elements of an array are reached by number, {"group_ids.0": v}, and only so: a condition on an array is not a
// condition on its elements. Commas separate nothing.
package filter

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/structpb"

	"pgbroker/server/jsontext"
)

var (
	// ErrInvalid is the error of a filter that breaks the grammar or one of the limits.
	ErrInvalid = errors.New("invalid query filter")
	// ErrUnsupported is the error of a filter that uses an operator other than equality.
	ErrUnsupported = errors.New("operator not supported")
)

// The limits keep one request from costing the database more than it is worth; both are far above what a person or a
// Pomerium component writes.
const (
	// MaxDepth is how deep lists and objects may nest, and how many steps a path may have.
	MaxDepth = 64
	// MaxNodes is how many lists, objects and values a filter may hold in all. A path of which several readings are
	// possible (see the package comment) counts once per reading.
	MaxNodes = 10_000
	// maxText bounds the compiled jsonpath, in which keys and values are repeated for every reading of their path.
	maxText = 4 << 20
)

// Filter is a parsed filter. It is immutable. A nil Filter matches every record.
type Filter struct {
	root node
}

// node is one node of the boolean tree. Constants have no op of their own: true is an empty and, false an empty or.
type node struct {
	op     op
	kids   []node         // and, or, not (exactly one)
	path   *step          // field
	key    string         // field: the path if it was given as one key, see Access
	keys   string         // field: all keys of the path, to tell one from another
	values []string       // id, type, field: equals any of these
	index  []netip.Prefix // index: any of these
}

type op uint8

const (
	opAnd op = iota
	opOr
	opNot
	opID
	opType
	opIndex
	opField
)

// operators maps every operator key of the wire contract to its canonical name.
var operators = map[string]string{
	"=": opEquals, "==": opEquals, "$eq": opEquals, "$equals": opEquals, "$is": opEquals,
	"!=": "doesNotEqual", "$doesNotEqual": "doesNotEqual",
	">": ">", ">=": ">=", "<": "<", "<=": "<=",
	"$after": "after", "$before": "before", "$onOrAfter": "onOrAfter", "$onOrBefore": "onOrBefore",
	"$contains": "contains", "$doesNotContain": "doesNotContain",
	"$startsWith": "startsWith", "$endsWith": "endsWith",
	"$isAnyOf": "isAnyOf", "$isEmpty": "isEmpty", "$isNotEmpty": "isNotEmpty",
}

const opEquals = "equals"

// Parse reads a filter as QueryRequest carries it. A nil struct is no filter, and gives a nil Filter. Errors wrap
// ErrInvalid or ErrUnsupported and never contain values from the filter.
func Parse(s *structpb.Struct) (*Filter, error) {
	if s == nil {
		return nil, nil
	}
	p := parser{nodes: MaxNodes, text: maxText}
	root, err := p.object(nil, s, 1)
	if err != nil {
		return nil, err
	}
	return &Filter{root: root}, nil
}

// Comparisons returns how many comparisons it takes to evaluate the filter for one record.
func (f *Filter) Comparisons() int {
	if f == nil {
		return 0
	}
	return f.root.comparisons()
}

func (n *node) comparisons() int {
	count := len(n.values) + len(n.index)
	if n.op == opField {
		count *= n.path.readings()
	}
	for i := range n.kids {
		count += n.kids[i].comparisons()
	}
	return count
}

// parser holds what may still be spent.
type parser struct {
	nodes int
	text  int // bytes
}

func (p *parser) spend(nodes int) error {
	if p.nodes -= nodes; p.nodes < 0 {
		return fmt.Errorf("%w: more than %d conditions", ErrInvalid, MaxNodes)
	}
	return nil
}

// spendPath accounts for a comparison as often as the jsonpath will repeat it.
func (p *parser) spendPath(path []string, values []string, readings int) error {
	if err := p.spend((readings - 1) * len(values)); err != nil {
		return err
	}
	bytes := 0
	for _, s := range path {
		bytes += 2 * len(s) // a key may be asked for, and asked for whether it is there
	}
	for _, s := range values {
		bytes += len(s)
	}
	if p.text -= readings * bytes; p.text < 0 {
		return fmt.Errorf("%w: larger than %d MiB when compiled", ErrInvalid, maxText>>20)
	}
	return nil
}

func (p *parser) object(path []string, s *structpb.Struct, depth int) (node, error) {
	fields := s.GetFields()
	if len(fields) == 1 { // the usual case, spared the sorting
		for key, v := range fields {
			return p.field(path, key, v, depth)
		}
	}
	kids := make([]node, 0, len(fields))
	for _, key := range slices.Sorted(maps.Keys(fields)) { // sorted so that the first error is always the same one
		kid, err := p.field(path, key, fields[key], depth)
		if err != nil {
			return node{}, err
		}
		kids = append(kids, kid)
	}
	return and(kids), nil
}

func (p *parser) field(path []string, key string, v *structpb.Value, depth int) (node, error) {
	switch key {
	case "$and", "$or":
		list, ok := v.GetKind().(*structpb.Value_ListValue)
		if !ok {
			return node{}, fmt.Errorf("%w: %s must be an array", ErrInvalid, key)
		}
		if key == "$or" {
			return p.any(path, list.ListValue, depth+1)
		}
		return p.all(path, list.ListValue, depth+1)
	case "$not":
		kid, err := p.value(path, v, depth+1)
		if err != nil {
			return node{}, err
		}
		return not(kid), nil
	}
	if name, ok := operators[key]; ok {
		if name != opEquals {
			return node{}, fmt.Errorf("%w: %s", ErrUnsupported, name)
		}
		text, ok := scalar(v)
		if !ok { // a list or an object is no text, so nothing equals it
			return or(nil), p.spend(1)
		}
		return p.compare(path, text)
	}
	return p.value(append(path, key), v, depth+1) // nothing keeps a path, so siblings may share its memory
}

func (p *parser) value(path []string, v *structpb.Value, depth int) (node, error) {
	switch v := v.GetKind().(type) {
	case *structpb.Value_StructValue:
		if err := p.enter(depth); err != nil {
			return node{}, err
		}
		return p.object(path, v.StructValue, depth)
	case *structpb.Value_ListValue:
		return p.any(path, v.ListValue, depth)
	}
	text, _ := scalar(v)
	return p.compare(path, text)
}

// enter accounts for one object or list at the given depth.
func (p *parser) enter(depth int) error {
	if depth > MaxDepth {
		return fmt.Errorf("%w: nested deeper than %d levels", ErrInvalid, MaxDepth)
	}
	return p.spend(1)
}

func (p *parser) all(path []string, list *structpb.ListValue, depth int) (node, error) {
	if err := p.enter(depth); err != nil {
		return node{}, err
	}
	kids := make([]node, 0, len(list.GetValues()))
	for _, v := range list.GetValues() {
		kid, err := p.value(path, v, depth+1)
		if err != nil {
			return node{}, err
		}
		kids = append(kids, kid)
	}
	return and(kids), nil
}

// any gathers the plain values of the list in one condition, so that a list of thousands of values has its path
// evaluated once.
func (p *parser) any(path []string, list *structpb.ListValue, depth int) (node, error) {
	if err := p.enter(depth); err != nil {
		return node{}, err
	}
	var values []string
	kids := make([]node, 0, len(list.GetValues()))
	for _, v := range list.GetValues() {
		if text, ok := scalar(v); ok {
			values = append(values, text)
			continue
		}
		kid, err := p.value(path, v, depth+1)
		if err != nil {
			return node{}, err
		}
		kids = append(kids, kid)
	}
	if len(values) > 0 {
		kid, err := p.compare(path, values...)
		if err != nil {
			return node{}, err
		}
		kids = append(kids, kid)
	}
	return or(kids), nil
}

// compare is the condition that the path equals one of the values.
func (p *parser) compare(path []string, values ...string) (node, error) {
	if err := p.spend(len(values)); err != nil {
		return node{}, err
	}
	if len(path) == 1 && path[0] == "$index" {
		n := node{op: opIndex}
		for _, v := range values {
			if prefix, ok := parseIndex(v); ok {
				n.index = append(n.index, prefix)
			}
		}
		if len(n.index) == 0 {
			return or(nil), nil
		}
		return n, nil
	}
	// Postgres stores no invalid UTF-8, so such a value or key can not be found. Asking for it all the same would be an error there.
	invalid := func(s string) bool { return !utf8.ValidString(s) }
	values = slices.DeleteFunc(values, invalid)
	if len(values) == 0 || slices.ContainsFunc(path, invalid) {
		return or(nil), nil
	}
	if len(path) == 1 && (path[0] == "id" || path[0] == "type") {
		// No id and no type has U+0000.
		values = slices.DeleteFunc(values, func(s string) bool { return strings.IndexByte(s, 0) >= 0 })
		switch {
		case len(values) == 0:
			return or(nil), nil
		case path[0] == "id":
			return node{op: opID, values: values}, nil
		}
		return node{op: opType, values: values}, nil
	}
	// What is looked at is the projection.
	values, path = slices.Clone(values), slices.Clone(path)
	for i := range values {
		values[i] = jsontext.String(values[i])
	}
	for i := range path {
		path[i] = jsontext.String(path[i])
	}
	steps, err := compilePath(path)
	if err != nil {
		return node{}, err
	}
	if err := p.spendPath(path, values, steps.readings()); err != nil {
		return node{}, err
	}
	n := node{op: opField, path: steps, keys: strings.Join(path, "\x00"), values: values} // no key has U+0000
	if len(path) == 1 {
		n.key = path[0]
	}
	return n, nil
}

// and, or and not fold constants, so that what is left has none below its root.

func and(kids []node) node { return join(opAnd, kids) }
func or(kids []node) node  { return join(opOr, kids) }

func join(op op, kids []node) node {
	neutral, absorbing := node.isTrue, node.isFalse
	if op == opOr {
		neutral, absorbing = absorbing, neutral
	}
	kids = slices.DeleteFunc(kids, neutral)
	if i := slices.IndexFunc(kids, absorbing); i >= 0 {
		return kids[i]
	}
	if op == opOr {
		kids = merge(kids)
	}
	if len(kids) == 1 {
		return kids[0]
	}
	return node{op: op, kids: kids}
}

// merge makes one condition of those parts of a disjunction that ask the same thing for a value. People and programs write
// long lists in both ways, and in one condition the path is evaluated once.
func merge(kids []node) []node {
	type asked struct {
		op   op
		keys string
	}
	first := make(map[asked]int)
	merged := kids[:0]
	for _, kid := range kids {
		if kid.op < opID {
			merged = append(merged, kid)
			continue
		}
		what := asked{kid.op, kid.keys}
		if i, ok := first[what]; ok {
			merged[i].values = append(merged[i].values, kid.values...)
			merged[i].index = append(merged[i].index, kid.index...)
			continue
		}
		first[what] = len(merged)
		merged = append(merged, kid)
	}
	return merged
}

func not(kid node) node {
	switch {
	case kid.isTrue():
		return or(nil)
	case kid.isFalse():
		return and(nil)
	}
	return node{op: opNot, kids: []node{kid}}
}

func (n node) isTrue() bool  { return n.op == opAnd && len(n.kids) == 0 }
func (n node) isFalse() bool { return n.op == opOr && len(n.kids) == 0 }

// scalar returns the text of a value, and whether it has one.
func scalar(v *structpb.Value) (string, bool) {
	switch v := v.GetKind().(type) {
	case *structpb.Value_StringValue:
		return v.StringValue, true
	case *structpb.Value_BoolValue:
		return strconv.FormatBool(v.BoolValue), true
	case *structpb.Value_NumberValue:
		return formatNumber(v.NumberValue), true
	case *structpb.Value_StructValue, *structpb.Value_ListValue:
		return "", false
	}
	return "", true // null, or a Value with nothing in it
}

// formatNumber writes a number in its shortest plain decimal form. What JSON has no number for is spelled as proto3
// JSON spells it.
func formatNumber(f float64) string {
	switch {
	case math.IsInf(f, 1):
		return "Infinity"
	case math.IsInf(f, -1):
		return "-Infinity"
	case f == 0:
		return "0" // -0 too
	}
	return strconv.FormatFloat(f, 'f', -1, 64)
}

// parseIndex reads an address or a CIDR as the prefix it stands for.
func parseIndex(s string) (netip.Prefix, bool) {
	var prefix netip.Prefix
	if strings.Contains(s, "/") {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return netip.Prefix{}, false
		}
		prefix = p
	} else {
		addr, err := netip.ParseAddr(s)
		if err != nil || addr.Zone() != "" { // an address with a zone is on a link, not in a network
			return netip.Prefix{}, false
		}
		prefix = netip.PrefixFrom(addr, addr.BitLen())
	}
	if addr := prefix.Addr(); addr.Is4In6() && prefix.Bits() >= 96 {
		prefix = netip.PrefixFrom(addr.Unmap(), prefix.Bits()-96)
	}
	return prefix.Masked(), true
}

// IndexValues lists the distinct prefixes that the filter's $index conditions look up, an address being a prefix of
// full length. The caller finds the longest stored prefix that contains each, and hands the answers to JSONPath.
func (f *Filter) IndexValues() []netip.Prefix {
	if f == nil {
		return nil
	}
	prefixes, seen := []netip.Prefix(nil), make(map[netip.Prefix]bool)
	f.root.eachIndex(func(p netip.Prefix) {
		if !seen[p] {
			seen[p] = true
			prefixes = append(prefixes, p)
		}
	})
	return prefixes
}

func (n *node) eachIndex(do func(netip.Prefix)) {
	for _, p := range n.index {
		do(p)
	}
	for i := range n.kids {
		n.kids[i].eachIndex(do)
	}
}
