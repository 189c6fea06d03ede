package query

import (
	"fmt"
	"math/big"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// The reference: expressions as a tree that is drawn, written down with every
// freedom the language has, and evaluated in the plainest way.

type reference interface {
	write(t *rapid.T) string
	holds(device map[string]string) bool
}

type (
	refJoin struct {
		or    bool
		parts []reference
	}
	refNot     struct{ part reference }
	refCompare struct {
		attribute string
		op        operator
		values    []string
	}
)

var (
	refNames    = []string{"a", "b.c", "d/e-f_g"}
	refTexts    = []string{"", "nvidia", "a b", `say "hi"`, `it's`, `c:\d`, `\\`, `"`, "and", "OR", "not", "in", "x,y", "[z]", "ß", "10", "9", "-3.50", "0.0", "007", "1.10", "2024-05-01", "a|b", "==", "“q”"}
	refNumbers  = []string{"10", "9", "-3.5", "0", "+7", "1.10", "123456789012345678901234567890"}
	refPatterns = []string{"nvidia", "n.*", ".*", "[0-9]+", "(a|say) .*", "a b", `\d+\.\d+`, "x|ß", `[)\]"]`, `(?i)AND`, ""}
)

func drawReference(t *rapid.T, depth int) reference {
	kinds := []string{"compare", "and", "or", "not"}
	if depth == 0 {
		kinds = kinds[:1]
	}
	switch kind := rapid.SampledFrom(kinds).Draw(t, "kind"); kind {
	case "not":
		return &refNot{drawReference(t, depth-1)}
	case "and", "or":
		j := &refJoin{or: kind == "or"}
		for range rapid.IntRange(2, 3).Draw(t, "parts") {
			j.parts = append(j.parts, drawReference(t, depth-1))
		}
		return j
	}
	c := &refCompare{
		attribute: rapid.SampledFrom(refNames).Draw(t, "name"),
		op:        operator(rapid.IntRange(int(opEqual), int(opNotMatches)).Draw(t, "op")),
	}
	from, n := refTexts, 1
	switch {
	case c.op == opExists || c.op == opNotExists:
		n = 0
	case c.op == opIn || c.op == opNotIn:
		n = rapid.IntRange(1, 3).Draw(t, "values")
	case c.op == opMatches || c.op == opNotMatches:
		from = refPatterns
	case c.op.orders():
		from = refNumbers
	}
	for range n {
		c.values = append(c.values, rapid.SampledFrom(from).Draw(t, "value"))
	}
	return c
}

func space(t *rapid.T) string {
	return rapid.SampledFrom([]string{"", " ", "\n", "\t  "}).Draw(t, "space")
}

func needed(t *rapid.T) string {
	return rapid.SampledFrom([]string{" ", "\r\n", "  "}).Draw(t, "needed space")
}

func (j *refJoin) write(t *rapid.T) string {
	spellings := []string{"and", "&&"}
	if j.or {
		spellings = []string{"or", "||"}
	}
	var b strings.Builder
	for i, p := range j.parts {
		if i > 0 {
			b.WriteString(needed(t) + rapid.SampledFrom(spellings).Draw(t, "join") + needed(t))
		}
		text := p.write(t)
		inner, joined := p.(*refJoin)
		if joined && inner.or && !j.or || rapid.IntRange(0, 4).Draw(t, "parentheses") == 0 {
			text = "(" + space(t) + text + space(t) + ")"
		}
		b.WriteString(text)
	}
	return b.String()
}

func (n *refNot) write(t *rapid.T) string {
	text := n.part.write(t)
	if _, joined := n.part.(*refJoin); joined || rapid.Bool().Draw(t, "parentheses") {
		text = "(" + text + ")"
	}
	return rapid.SampledFrom([]string{"not ", "!", "! "}).Draw(t, "not") + text
}

func (c *refCompare) write(t *rapid.T) string {
	spelling := rapid.SampledFrom(spellings[c.op]).Draw(t, "spelling")
	text := AttributePrefix + c.attribute + needed(t) + spelling
	var values []string
	for _, v := range c.values {
		values = append(values, writeRefValue(t, v))
	}
	switch c.op {
	case opExists, opNotExists:
		return text
	case opIn, opNotIn:
		return text + space(t) + "[" + space(t) + strings.Join(values, space(t)+","+space(t)) + space(t) + "]"
	default:
		return text + needed(t) + values[0]
	}
}

var plain = regexp.MustCompile(`^[A-Za-z0-9.+-][A-Za-z0-9.+/*-]*$`)

func writeRefValue(t *rapid.T, v string) string {
	if plain.MatchString(v) && !slices.Contains(reserved, v) && rapid.Bool().Draw(t, "bare") {
		return v
	}
	quote := rapid.SampledFrom([]string{`"`, `'`}).Draw(t, "quote")
	return quote + strings.NewReplacer(`\`, `\\`, quote, `\`+quote).Replace(v) + quote
}

func (j *refJoin) holds(device map[string]string) bool {
	held := 0
	for _, p := range j.parts {
		if p.holds(device) {
			held++
		}
	}
	return held == len(j.parts) || j.or && held > 0
}

func (n *refNot) holds(device map[string]string) bool { return !n.part.holds(device) }

func (c *refCompare) holds(device map[string]string) bool {
	value, present := device[c.attribute]
	if c.op == opNotExists {
		return !present
	}
	if !present || c.op == opExists {
		return present
	}
	in := slices.Contains(c.values, value)
	switch c.op {
	case opEqual, opIn:
		return in
	case opNotEqual, opNotIn:
		return !in
	case opMatches, opNotMatches:
		re := regexp.MustCompile(c.values[0])
		re.Longest()
		at := re.FindStringIndex(value)
		whole := at != nil && at[0] == 0 && at[1] == len(value)
		return whole == (c.op == opMatches)
	}
	if !regexp.MustCompile(`^[-+]?[0-9]+(\.[0-9]+)?$`).MatchString(value) {
		return false
	}
	x, _ := new(big.Rat).SetString(value)
	y, _ := new(big.Rat).SetString(c.values[0])
	sign := x.Cmp(y)
	return sign == 0 && (c.op == opGreaterEqual || c.op == opLessEqual) ||
		sign > 0 && (c.op == opGreater || c.op == opGreaterEqual) || sign < 0 && (c.op == opLess || c.op == opLessEqual)
}

// Whatever is written down means what the reference says, and its canonical
// form is the same tree.
func TestExpressionsMeanWhatTheReferenceSays(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ref := drawReference(t, rapid.IntRange(0, 3).Draw(t, "depth"))
		text := space(t) + ref.write(t) + space(t)
		if len(text) > MaxLength {
			t.Skip("longer than allowed")
		}
		e, err := Parse(text)
		if err != nil {
			if strings.HasSuffix(err.Error(), "when written with spaces and quotes; at most 2000 are allowed") {
				t.Skip(err)
			}
			t.Fatalf("Parse(%q): %v", text, err)
		}
		again, err := Parse(e.String())
		if err != nil {
			t.Fatalf("Parse(%q), the canonical form: %v", e, err)
		}
		if diff := cmp.Diff(tree(e.root), tree(again.root)); diff != "" {
			t.Fatalf("%q and its canonical form %q differ:\n%s", text, e, diff)
		}
		for range 8 {
			device := drawDevice(t)
			if got, want := e.Match(Attributes(device)), ref.holds(device); got != want {
				t.Fatalf("%q, canonical %q: %v for %q, want %v", text, e, got, device, want)
			}
			if explained := e.Explain(Attributes(device)) != ""; explained == e.Match(Attributes(device)) {
				t.Fatalf("%q: explained %v for %q", e, explained, device)
			}
		}
	})
}

func drawDevice(t *rapid.T) map[string]string {
	device := map[string]string{}
	for _, name := range refNames {
		if rapid.IntRange(0, 3).Draw(t, "present") > 0 {
			device[name] = rapid.SampledFrom(refTexts).Draw(t, "device value")
		}
	}
	return device
}

// tree is what two equal expressions have in common, for comparing.
func tree(n node) any {
	all := func(parts []node) (out []any) {
		for _, p := range parts {
			out = append(out, tree(p))
		}
		return out
	}
	switch n := n.(type) {
	case *conjunction:
		return map[string]any{"and": all(n.parts)}
	case *disjunction:
		return map[string]any{"or": all(n.parts)}
	case *negation:
		return map[string]any{"not": tree(n.part)}
	case *comparison:
		return []any{n.subject, n.op.String(), n.values, fmt.Sprint(n.order), fmt.Sprint(n.pattern)}
	default:
		return fmt.Sprintf("%T", n)
	}
}
