// Package query is the expression language of placement constraints and device
// requests, ECS's cluster query language:
//
//	attribute:memory_mib >= 8192 and attribute:vendor == nvidia
//
// Both ends evaluate it: the control plane to filter instances and to count
// devices, the agent to pick devices. An expression is parsed once, which is
// when everything wrong with it is told, with its place; evaluating it cannot
// fail. docs/query-language.md describes the language to its users.
//
// Expressions come from outside and are bounded: in length, nesting, items of a
// list, and size of patterns. Parsing takes time linear in the text, evaluating
// time linear in the text and the values compared.
package query

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Limits of one expression.
const (
	MaxLength = 2000 // bytes, of the text and of its canonical form; as ECS
	MaxDepth  = 50   // parentheses and nots around one comparison
	MaxList   = 100  // values of one list
	MaxName   = 128  // bytes of a subject, without "attribute:"
)

// AttributePrefix begins the subjects that are attributes.
const AttributePrefix = "attribute:"

// Lookup gives the value of a subject, named as in Names: "attribute:vendor",
// "agentVersion". It is asked only for subjects of the expression, perhaps more
// than once.
type Lookup func(subject string) (value string, present bool)

// Attributes is a Lookup in a map from attribute names, without the prefix, to
// their values. No other subject is present.
func Attributes(values map[string]string) Lookup {
	return func(subject string) (string, bool) {
		name, ok := strings.CutPrefix(subject, AttributePrefix)
		if !ok {
			return "", false
		}
		value, ok := values[name]
		return value, ok
	}
}

// Expr is a parsed expression. It never changes and may be used from many
// goroutines. The zero Expr asks for nothing: it matches everything.
type Expr struct {
	root      node
	canonical string
}

// Match tells whether the expression holds. A comparison with a subject that is
// not present does not hold, whichever it is, but for not_exists.
func (e Expr) Match(lookup Lookup) bool {
	return e.root == nil || e.root.match(lookup)
}

// Explain says for a person why the expression does not hold: the first part
// that does not, and the value it met. It is "" when the expression holds.
func (e Expr) Explain(lookup Lookup) string {
	if e.Match(lookup) {
		return ""
	}
	part := e.root
	if all, ok := part.(*conjunction); ok {
		// A lookup in what changes may answer otherwise than a moment ago.
		if i := slices.IndexFunc(all.parts, func(n node) bool { return !n.match(lookup) }); i >= 0 {
			part = all.parts[i]
		}
	}
	text := render(part)
	c, ok := part.(*comparison)
	if !ok {
		return text + " does not hold"
	}
	if value, present := lookup(c.subject); !present {
		return text + ": it has no " + strings.TrimPrefix(c.subject, AttributePrefix)
	} else if c.op != opNotExists {
		return fmt.Sprintf("%s: it is %q", text, value)
	}
	return text + ": it has one"
}

// Names are the subjects of the expression, sorted, each once.
func (e Expr) Names() []string {
	var names []string
	if e.root != nil {
		e.root.each(func(c *comparison) { names = append(names, c.subject) })
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// String is the canonical form: one spelling of each operator, no parentheses
// that change nothing. It parses to an equal expression.
func (e Expr) String() string { return e.canonical }

// Equal tells whether the expressions are the same but for their spelling.
func (e Expr) Equal(other Expr) bool { return e.canonical == other.canonical }

// node is a part of an expression. Conjunctions hold no conjunctions and
// disjunctions no disjunctions: a chain is one node, so that only parentheses
// and nots nest.
type node interface {
	match(Lookup) bool
	each(func(*comparison))
	write(*strings.Builder)
}

type (
	conjunction struct{ parts []node } // at least two
	disjunction struct{ parts []node } // at least two
	negation    struct{ part node }
	comparison  struct {
		subject string // with its prefix
		op      operator
		values  []string // none for exists, one or more for in, else one

		order   ordered        // of values[0], for > >= < <=
		pattern *regexp.Regexp // of values[0], for =~ !~, anchored at both ends
	}
)

func (n *conjunction) match(l Lookup) bool {
	return !slices.ContainsFunc(n.parts, func(p node) bool { return !p.match(l) })
}

func (n *disjunction) match(l Lookup) bool {
	return slices.ContainsFunc(n.parts, func(p node) bool { return p.match(l) })
}

func (n *negation) match(l Lookup) bool { return !n.part.match(l) }

func (n *comparison) match(l Lookup) bool {
	value, present := l(n.subject)
	if !present {
		return n.op == opNotExists
	}
	switch n.op {
	case opExists:
		return true
	case opEqual:
		return value == n.values[0]
	case opNotEqual:
		return value != n.values[0]
	case opIn:
		return slices.Contains(n.values, value)
	case opNotIn:
		return !slices.Contains(n.values, value)
	case opMatches:
		return n.pattern.MatchString(value)
	case opNotMatches:
		return !n.pattern.MatchString(value)
	case opGreater, opGreaterEqual, opLess, opLessEqual:
		sign, comparable := n.order.compare(value)
		return comparable && n.op.holds(sign)
	default: // opNotExists
		return false
	}
}

func (n *conjunction) each(f func(*comparison)) { eachOf(n.parts, f) }
func (n *disjunction) each(f func(*comparison)) { eachOf(n.parts, f) }
func (n *negation) each(f func(*comparison))    { n.part.each(f) }
func (n *comparison) each(f func(*comparison))  { f(n) }

func eachOf(parts []node, f func(*comparison)) {
	for _, p := range parts {
		p.each(f)
	}
}

func render(n node) string {
	var b strings.Builder
	n.write(&b)
	return b.String()
}

func (n *conjunction) write(b *strings.Builder) {
	for i, p := range n.parts {
		if i > 0 {
			b.WriteString(" and ")
		}
		_, either := p.(*disjunction)
		writeIn(b, p, either)
	}
}

func (n *disjunction) write(b *strings.Builder) {
	for i, p := range n.parts {
		if i > 0 {
			b.WriteString(" or ")
		}
		p.write(b)
	}
}

func (n *negation) write(b *strings.Builder) {
	b.WriteString("not ")
	switch n.part.(type) {
	case *conjunction, *disjunction:
		writeIn(b, n.part, true)
	default:
		n.part.write(b)
	}
}

func writeIn(b *strings.Builder, n node, parentheses bool) {
	if !parentheses {
		n.write(b)
		return
	}
	b.WriteByte('(')
	n.write(b)
	b.WriteByte(')')
}

func (n *comparison) write(b *strings.Builder) {
	b.WriteString(n.subject)
	b.WriteByte(' ')
	b.WriteString(n.op.String())
	switch n.op {
	case opExists, opNotExists:
	case opIn, opNotIn:
		b.WriteString(" [")
		for i, v := range n.values {
			if i > 0 {
				b.WriteString(", ")
			}
			writeValue(b, v)
		}
		b.WriteByte(']')
	default:
		b.WriteByte(' ')
		writeValue(b, n.values[0])
	}
}

// writeValue quotes what would not be read back as one bare value.
func writeValue(b *strings.Builder, v string) {
	if v != "" && !slices.Contains(reserved, v) && strings.IndexFunc(v, func(c rune) bool { return !isBare(c) }) < 0 {
		b.WriteString(v)
		return
	}
	b.WriteByte('"')
	for i := range len(v) {
		if v[i] == '"' || v[i] == '\\' {
			b.WriteByte('\\')
		}
		b.WriteByte(v[i])
	}
	b.WriteByte('"')
}
