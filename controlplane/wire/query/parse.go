package query

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// reserved words are values only in quotes: bare, they are most likely a slip.
var reserved = []string{"and", "or", "not"}

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

func (p *parser) list(op operator) ([]string, *SyntaxError) {
	if !p.take("[", "") {
		err := fail(p.at, "%s", p.found())
		err.Expected = []string{fmt.Sprintf("a list after %q: [a, b]", op)}
		return nil, err
	}
	var values []string
	for {
		p.skip()
		at := p.at
		v, err := p.value(",]")
		if err != nil {
			return nil, err
		}
		if values = append(values, v); len(values) > MaxList {
			return nil, fail(at, "the list has more than %d values", MaxList)
		}
		if p.take("]", "") {
			return values, nil
		}
		if !p.take(",", "") {
			p.skip()
			err := fail(p.at, "%s", p.found())
			err.Expected = []string{`","`, `the "]" of the list`}
			return nil, err
		}
	}
}

// value reads one value, in quotes or bare. What may follow a bare one at once
// is a space, a parenthesis, "&&", "||" and what ends says.
func (p *parser) value(ends string) (string, *SyntaxError) {
	p.skip()
	if v, quoted, err := p.quoted(); quoted || err != nil {
		return v, err
	}
	at := p.at
	v := p.scan(isBare)
	if v == "" || slices.Contains(reserved, v) {
		p.at = at
		return "", p.noValue("a value")
	}
	p.bare = p.at
	if c, _ := utf8.DecodeRuneInString(p.text[p.at:]); p.at < len(p.text) && !strings.ContainsRune(" \t\r\n()&|"+ends, c) {
		return "", fail(p.at, "%q cannot stand in a value that is not in quotes", c)
	}
	return v, nil
}

func (p *parser) noValue(what string) *SyntaxError {
	err := fail(p.at, "%s", p.found())
	if rest := p.text[p.at:]; rest != "" {
		if c, _ := utf8.DecodeRuneInString(rest); unicode.Is(unicode.Quotation_Mark, c) {
			err.Message += `, a quote is " or '`
		}
	}
	err.Expected = []string{what + ", in quotes if it is not plain"}
	return err
}

// quoted reads a value in quotes, if one is there. A backslash makes the quote
// and the backslash ordinary; before all else it is itself ordinary.
func (p *parser) quoted() (v string, ok bool, err *SyntaxError) {
	if p.at == len(p.text) || p.text[p.at] != '"' && p.text[p.at] != '\'' {
		return "", false, nil
	}
	var b strings.Builder
	quote := p.text[p.at]
	for i := p.at + 1; i < len(p.text); i++ {
		switch c := p.text[i]; {
		case c == quote:
			p.at = i + 1
			return b.String(), true, nil
		case c == '\n' || c == '\r' || c == '\t':
			return "", false, fail(i, "a value in quotes holds no tab and no end of line")
		case c == '\\' && i+1 < len(p.text) && (p.text[i+1] == quote || p.text[i+1] == '\\'):
			i++
			b.WriteByte(p.text[i])
		default:
			b.WriteByte(c)
		}
	}
	return "", false, fail(p.at, "the quote is not closed")
}

// pattern reads the argument of =~ and !~. Bare, it ends at a space, at "&&" and
// "||", and at a ")" that it did not open itself.
func (p *parser) pattern(c *comparison) *SyntaxError {
	at := p.at
	text, quoted, err := p.quoted()
	if err != nil {
		return err
	}
	if !quoted {
		text = barePattern(p.text[at:])
		if text == "" || slices.Contains(reserved, text) {
			return p.noValue("a pattern")
		}
		p.at += len(text)
	}
	re, reason := p.patterns.compile(text)
	if reason != "" {
		if !quoted && p.at < len(p.text) && isSpace(p.text[p.at]) && strings.ContainsAny(text, "([") {
			reason += " (a pattern with spaces is put in quotes)"
		}
		return fail(at, "the pattern is not valid: %s", reason)
	}
	c.values, c.pattern = []string{text}, re
	return nil
}

func barePattern(s string) string {
	open, class := 0, false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case isSpace(c):
			return s[:i]
		case c >= utf8.RuneSelf:
			r, size := utf8.DecodeRuneInString(s[i:])
			if !isBare(r) {
				return s[:i]
			}
			i += size - 1
		case c == '\\':
			if i+1 < len(s) && !isSpace(s[i+1]) && s[i+1] < utf8.RuneSelf {
				i++
			}
		case class:
			class = c != ']'
		case c == '[':
			class = true
			// A "]" that is first in the class belongs to it.
			if strings.HasPrefix(s[i+1:], "^") {
				i++
			}
			if strings.HasPrefix(s[i+1:], "]") {
				i++
			}
		case c == '(':
			open++
		case c == ')' && open == 0:
			return s[:i]
		case c == ')':
			open--
		case open == 0 && (strings.HasPrefix(s[i:], "&&") || strings.HasPrefix(s[i:], "||")):
			return s[:i]
		}
	}
	return s
}

// take reads the symbol or the whole word, if one of them is next.
func (p *parser) take(symbol, word string) bool {
	p.skip()
	if strings.HasPrefix(p.text[p.at:], symbol) {
		p.at += len(symbol)
		return true
	}
	if word != "" && p.word() == word {
		p.at += len(word)
		return true
	}
	return false
}

// word is the word that is next, unread; "": something else is.
func (p *parser) word() string {
	rest := p.text[p.at:]
	if end := strings.IndexFunc(rest, func(c rune) bool { return !isNameChar(c) && c != ':' }); end >= 0 {
		return rest[:end]
	}
	return rest
}

// found says what is next.
func (p *parser) found() string {
	switch c, _ := utf8.DecodeRuneInString(p.text[p.at:]); {
	case p.at == len(p.text) && strings.TrimSpace(p.text) == "":
		return "the expression is empty"
	case p.at == len(p.text):
		return "the expression ends"
	case isNameChar(c):
		return "found " + clip(p.word())
	default:
		return fmt.Sprintf("found %q", string(c))
	}
}

func (p *parser) scan(in func(rune) bool) string {
	start := p.at
	for i, c := range p.text[start:] {
		if !in(c) {
			p.at = start + i
			return p.text[start:p.at]
		}
	}
	p.at = len(p.text)
	return p.text[start:]
}

func (p *parser) skip() {
	for p.at < len(p.text) && isSpace(p.text[p.at]) {
		p.at++
	}
}

func fail(offset int, format string, args ...any) *SyntaxError {
	return &SyntaxError{Offset: offset, Message: fmt.Sprintf(format, args...)}
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\n' || c == '\r' }

// isNameChar: what names of attributes are made of, and words.
func isNameChar(c rune) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("-_./\\", c)
}

// isBare: what a value without quotes is made of. Of what is not ASCII, letters,
// digits and marks only: a typographic quote or space is a slip.
func isBare(c rune) bool {
	if c >= utf8.RuneSelf {
		return unicode.IsLetter(c) || unicode.IsNumber(c) || unicode.IsMark(c)
	}
	return isNameChar(c) || strings.ContainsRune(":@+*?%#$^{}", c)
}

// invalid is the offset of the first byte that no expression holds; -1: none.
func invalid(s string) int {
	for i, c := range s {
		if c == utf8.RuneError {
			if _, size := utf8.DecodeRuneInString(s[i:]); size == 1 {
				return i
			}
		}
		if unicode.IsControl(c) && !(c < utf8.RuneSelf && isSpace(byte(c))) {
			return i
		}
	}
	return -1
}
