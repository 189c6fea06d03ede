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
