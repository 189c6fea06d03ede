package query

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

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
