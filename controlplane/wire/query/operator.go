package query

import "slices"

type operator int

const (
	opEqual operator = iota
	opNotEqual
	opGreater
	opGreaterEqual
	opLess
	opLessEqual
	opExists
	opNotExists
	opIn
	opNotIn
	opMatches
	opNotMatches
)

// spellings of the operators, in the order of the constants, the canonical one
// first.
var spellings = [...][]string{
	{"==", "equals"},
	{"!=", "not_equals"},
	{">", "greater_than"},
	{">=", "greater_than_equal"},
	{"<", "less_than"},
	{"<=", "less_than_equal"},
	{"exists"},
	{"not_exists", "!exists"},
	{"in"},
	{"not_in", "!in"},
	{"=~", "matches"},
	{"!~", "not_matches"},
}

// operatorNames are told where one of them is missing.
var operatorNames = []string{"==", "!=", ">", ">=", "<", "<=", "=~", "!~", "in", "!in", "exists", "!exists"}

func (o operator) String() string { return spellings[o][0] }

// operatorOf finds an operator by any of its spellings.
func operatorOf(spelling string) (operator, bool) {
	i := slices.IndexFunc(spellings[:], func(s []string) bool { return slices.Contains(s, spelling) })
	return operator(i), i >= 0
}

func (o operator) orders() bool { return o >= opGreater && o <= opLessEqual }

// holds tells whether a value that compares as sign satisfies the operator.
func (o operator) holds(sign int) bool {
	switch o {
	case opGreater:
		return sign > 0
	case opGreaterEqual:
		return sign >= 0
	case opLess:
		return sign < 0
	default:
		return sign <= 0
	}
}
