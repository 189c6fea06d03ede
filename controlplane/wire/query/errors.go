package query

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// SyntaxError says what is wrong with an expression, and where.
type SyntaxError struct {
	Expression string
	Offset     int    // bytes from the beginning, at most len(Expression)
	Message    string // what was found there, or which rule it breaks
	Expected   []string
}

// Error is one line: the place, what is near it, what is wrong, what would be
// right.
func (e *SyntaxError) Error() string {
	var b strings.Builder
	if at := min(max(0, e.Offset), len(e.Expression)); at == len(e.Expression) {
		b.WriteString("at the end")
	} else {
		fmt.Fprintf(&b, "at character %d, near %s", 1+utf8.RuneCountInString(e.Expression[:at]), clip(e.Expression[at:]))
	}
	b.WriteString(": ")
	b.WriteString(e.Message)
	switch n := len(e.Expected); n {
	case 0:
	case 1:
		b.WriteString("; expected " + e.Expected[0])
	default:
		b.WriteString("; expected " + strings.Join(e.Expected[:n-1], ", ") + " or " + e.Expected[n-1])
	}
	return b.String()
}

// clip quotes the beginning of s.
func clip(s string) string {
	const length = 24
	n := 0
	for i := range s {
		if n++; n > length {
			return strconv.Quote(s[:i] + "...")
		}
	}
	return strconv.Quote(s)
}
