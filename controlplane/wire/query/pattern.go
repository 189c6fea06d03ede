package query

import (
	"errors"
	"fmt"
	"regexp"
	"regexp/syntax"
	"strings"
)

// patternBudget is what the patterns of one expression may still cost.
type patternBudget struct {
	steps int // for one character of a value
	wide  int // classes and ranges that reach far into Unicode
}

// newPatternBudget: "[a-z]{1,20}" takes 20 steps. Wide classes are tables of a
// thousand entries each, and take milliseconds to parse: 350 times [\pL], 1.3 s.
func newPatternBudget() patternBudget { return patternBudget{steps: 1000, wide: 5} }

// wideClass finds what makes the parser fill or walk a large table.
var wideClass = regexp.MustCompile(`\\[pP]|-\\x|-[^\x00-\x7f]`)

// compile compiles a regular expression that a whole value must match. reason
// says for a person what is wrong; "": nothing.
func (b *patternBudget) compile(pattern string) (re *regexp.Regexp, reason string) {
	if b.wide -= len(wideClass.FindAllStringIndex(pattern, b.wide+1)); b.wide < 0 {
		return nil, "the patterns of the expression have too many Unicode classes"
	}
	tree, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return nil, patternReason(err)
	}
	// Before compiling: that writes repetitions out, "a{1000}" a thousand times.
	if b.steps -= patternCost(tree, b.steps); b.steps < 0 {
		return nil, "the patterns of the expression are too large: repeat less in { }"
	}
	// The group keeps alternatives inside the anchors; \z knows no line ends.
	re, err = regexp.Compile(`\A(?:` + pattern + `)\z`)
	if err != nil {
		// It ends in a \Q that is open and took in the end of the group.
		re, err = regexp.Compile(`\A(?:` + pattern + `\E)\z`)
	}
	if err != nil {
		return nil, patternReason(err)
	}
	return re, ""
}

// patternCost estimates the instructions of a compiled pattern; anything above
// limit is as good as limit+1. The parser bounds the depth of the tree.
func patternCost(re *syntax.Regexp, limit int) int {
	cost := 1
	if re.Op == syntax.OpLiteral {
		cost = len(re.Rune)
	}
	for _, sub := range re.Sub {
		cost += patternCost(sub, limit)
		if cost > limit {
			return limit + 1
		}
	}
	if re.Op == syntax.OpRepeat {
		// x{2,} is written xx+, x{0,3} is written (x(x(x)?)?)?.
		cost = 1 + (cost-1)*max(re.Min, re.Max)
	}
	return min(cost, limit+1)
}

func patternReason(err error) string {
	var e *syntax.Error
	if !errors.As(err, &e) {
		return err.Error()
	}
	if e.Code == syntax.ErrInvalidPerlOp && (strings.HasPrefix(e.Expr, "(?=") || strings.HasPrefix(e.Expr, "(?!") || strings.HasPrefix(e.Expr, "(?<")) {
		return fmt.Sprintf("it looks ahead or behind with %s, which RE2 cannot: use !~, and, or", clip(e.Expr))
	}
	return fmt.Sprintf("%s: %s", e.Code, clip(e.Expr))
}
