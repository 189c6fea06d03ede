package query

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Parse reads an expression. Its subjects may be attributes ("attribute:NAME")
// and those given. Whatever is wrong is told as a *SyntaxError.
func Parse(text string, subjects ...string) (Expr, error) {
	p := &parser{text: text, subjects: subjects, patterns: newPatternBudget()}
	e, err := p.parse()
	if err != nil {
		err.Expression = text
		return Expr{}, err
	}
	return e, nil
}

// parser reads text from left to right, once; what a word is depends on where
// it stands, so that values need few quotes.
type parser struct {
	text     string
	at       int // bytes read
	subjects []string
	bare     int // where the last value without quotes ended
	patterns patternBudget
}

func (p *parser) parse() (Expr, *SyntaxError) {
	if n := len(p.text); n > MaxLength {
		return Expr{}, fail(MaxLength, "the expression has %d bytes; at most %d are allowed", n, MaxLength)
	}
	if at := invalid(p.text); at >= 0 {
		return Expr{}, fail(at, "this is not UTF-8 text, or is a control character")
	}
	root, err := p.either(0)
	if err != nil {
		return Expr{}, err
	}
	if p.skip(); p.at < len(p.text) {
		return Expr{}, p.after(0)
	}
	e := Expr{root: root, canonical: render(root)}
	// Whoever is handed the canonical form must be able to read it.
	if n := len(e.canonical); n > MaxLength {
		return Expr{}, fail(len(p.text), "the expression has %d bytes when written with spaces and quotes; at most %d are allowed", n, MaxLength)
	}
	return e, nil
}

// either reads parts joined by "or".
func (p *parser) either(depth int) (node, *SyntaxError) {
	var parts []node
	for {
		part, err := p.all(depth)
		if err != nil {
			return nil, err
		}
		if inner, ok := part.(*disjunction); ok {
			parts = append(parts, inner.parts...)
		} else {
			parts = append(parts, part)
		}
		if !p.take("||", "or") {
			break
		}
	}
	if len(parts) == 1 {
		return parts[0], nil
	}
	return &disjunction{parts}, nil
}

// all reads parts joined by "and".
func (p *parser) all(depth int) (node, *SyntaxError) {
	var parts []node
	for {
		part, err := p.one(depth)
		if err != nil {
			return nil, err
		}
		if inner, ok := part.(*conjunction); ok {
			parts = append(parts, inner.parts...)
		} else {
			parts = append(parts, part)
		}
		if !p.take("&&", "and") {
			break
		}
	}
	if len(parts) == 1 {
		return parts[0], nil
	}
	return &conjunction{parts}, nil
}

// one reads a comparison, a part in parentheses, or "not" and one of these.
func (p *parser) one(depth int) (node, *SyntaxError) {
	p.skip()
	start := p.at
	negated := p.take("!", "not")
	if !negated && !p.take("(", "") {
		return p.comparison()
	}
	if depth == MaxDepth {
		return nil, fail(start, "parentheses and nots nest deeper than %d here", MaxDepth)
	}
	if negated {
		part, err := p.one(depth + 1)
		if err != nil {
			return nil, err
		}
		return &negation{part}, nil
	}
	part, err := p.either(depth + 1)
	if err != nil {
		return nil, err
	}
	if !p.take(")", "") {
		return nil, p.after(start + 1)
	}
	return part, nil
}

// after says that what follows a comparison does not join another one to it.
// open is one more than the offset of a parenthesis that is open; 0: none is.
func (p *parser) after(open int) *SyntaxError {
	p.skip()
	err := fail(p.at, "%s", p.found())
	err.Expected = []string{`"and"`, `"or"`}
	if open > 0 {
		err.Expected = append(err.Expected, fmt.Sprintf("the ) of the ( at character %d", utf8.RuneCountInString(p.text[:open])))
		return err
	}
	err.Expected = append(err.Expected, "the end")
	switch word := p.word(); {
	case strings.HasPrefix(p.text[p.at:], ")"):
		err.Message = `this ")" closes nothing`
	case slices.Contains(reserved, strings.ToLower(word)) && word != strings.ToLower(word):
		err.Message += fmt.Sprintf(", write it %s", strings.ToLower(word))
	case word != "" && p.bare > 0 && strings.TrimSpace(p.text[p.bare:p.at]) == "":
		err.Message += " (a value with spaces is put in quotes)"
	}
	return err
}

func (p *parser) comparison() (node, *SyntaxError) {
	subject, err := p.subject()
	if err != nil {
		return nil, err
	}
	c := &comparison{subject: subject}
	if c.op, err = p.operator(subject); err != nil {
		return nil, err
	}
	p.skip()
	at := p.at
	switch {
	case c.op == opExists || c.op == opNotExists:
	case c.op == opIn || c.op == opNotIn:
		c.values, err = p.list(c.op)
	case c.op == opMatches || c.op == opNotMatches:
		err = p.pattern(c)
	default:
		var value string
		if value, err = p.value(""); err != nil {
			return nil, err
		}
		c.values = []string{value}
		if !c.op.orders() {
			break
		}
		var ok bool
		if c.order, ok = orderedOf(value); !ok {
			return nil, fail(at, "%s compares numbers (8192), versions (1.10.0) and dates (2026-11-21); this is none", c.op)
		}
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

func (p *parser) subject() (string, *SyntaxError) {
	p.skip()
	at := p.at
	name := p.scan(func(c rune) bool { return isNameChar(c) || c == ':' })
	attribute, prefixed := strings.CutPrefix(name, AttributePrefix)
	switch {
	case name == "" || slices.Contains(reserved, name):
		p.at = at
		err := fail(at, "%s", p.found())
		err.Expected = []string{"a subject (" + p.known() + ")", `"not"`, `"("`}
		return "", err
	case prefixed && attribute == "":
		return "", fail(p.at, "the attribute has no name")
	case prefixed && len(attribute) > MaxName:
		return "", fail(at, "the attribute's name has %d bytes; at most %d are allowed", len(attribute), MaxName)
	case prefixed && strings.Contains(attribute, ":"):
		return "", fail(at+strings.LastIndexByte(name, ':'), "an attribute's name has letters, digits and -_./ only")
	case slices.Contains(reserved, strings.ToLower(name)):
		return "", fail(at, "found %s, write it %s", clip(name), strings.ToLower(name))
	case !prefixed && !slices.Contains(p.subjects, name):
		return "", fail(at, "unknown subject %s; known are %s", clip(name), p.known())
	}
	return name, nil
}

// known lists the subjects for a person.
func (p *parser) known() string {
	return strings.Join(append([]string{AttributePrefix + "NAME"}, p.subjects...), ", ")
}

func (p *parser) operator(subject string) (operator, *SyntaxError) {
	p.skip()
	rest := p.text[p.at:]
	// The longer first: "<=" begins with "<".
	for _, symbol := range []string{"==", "!=", ">=", "<=", "=~", "!~", ">", "<"} {
		if strings.HasPrefix(rest, symbol) {
			p.at += len(symbol)
			op, _ := operatorOf(symbol)
			return op, nil
		}
	}
	at := p.at
	bang := ""
	if strings.HasPrefix(rest, "!") {
		bang, p.at = "!", p.at+1
	}
	word := bang + p.scan(func(c rune) bool { return isNameChar(c) })
	if op, ok := operatorOf(word); ok {
		return op, nil
	}
	p.at = at
	message := p.found()
	if _, ok := operatorOf(strings.ToLower(word)); ok {
		message += ", write it " + strings.ToLower(word)
	}
	if strings.HasPrefix(rest, "=") {
		message += `, did you mean "=="?`
	}
	err := fail(at, "%s", message)
	err.Expected = slices.Clone(operatorNames)
	err.Expected[0] = "an operator after " + clip(subject) + ": " + err.Expected[0]
	return 0, err
}
