package query

import (
	"cmp"
	"strings"
	"time"
)

// ordered is an argument that values can be more or less than. Its kind decides
// how values are read: one that cannot be read so is neither more nor less.
type ordered struct {
	kind    orderKind
	number  decimal
	version []string // digits without leading zeros
	date    time.Time
}

type orderKind int

const (
	orderNumber orderKind = iota
	orderVersion
	orderDate
)

// orderedOf reads an argument of > >= < <=.
func orderedOf(text string) (ordered, bool) {
	if n, ok := decimalOf(text); ok {
		// "1.10" is a number, but meets versions too: a kernel's 4.9.253 >= 4.14.
		v, _ := versionOf(text)
		return ordered{kind: orderNumber, number: n, version: v}, true
	}
	if t, ok := dateOf(text); ok {
		return ordered{kind: orderDate, date: t}, true
	}
	if v, ok := versionOf(text); ok {
		return ordered{kind: orderVersion, version: v}, true
	}
	return ordered{}, false
}

// compare tells whether value is less (-1), the same (0) or more (1), and
// whether the two can be compared at all.
func (o ordered) compare(value string) (sign int, ok bool) {
	switch o.kind {
	case orderNumber:
		if n, ok := decimalOf(value); ok {
			return n.compare(o.number), true
		}
		if o.version == nil {
			return 0, false
		}
	case orderDate:
		t, ok := dateOf(value)
		return t.Compare(o.date), ok
	}
	v, ok := versionOf(value)
	return compareVersions(v, o.version), ok
}

// decimal is a number of any size: comparing it loses nothing.
type decimal struct {
	negative bool   // never of zero
	whole    string // without leading zeros
	fraction string // without trailing zeros
}

// decimalOf reads digits with perhaps a sign before them and a period and
// digits after them.
func decimalOf(s string) (decimal, bool) {
	var d decimal
	if s != "" && (s[0] == '-' || s[0] == '+') {
		d.negative, s = s[0] == '-', s[1:]
	}
	whole, fraction, point := strings.Cut(s, ".")
	if !isDigits(whole) || point && !isDigits(fraction) {
		return decimal{}, false
	}
	d.whole, d.fraction = strings.TrimLeft(whole, "0"), strings.TrimRight(fraction, "0")
	d.negative = d.negative && d.whole+d.fraction != ""
	return d, true
}

func (d decimal) compare(other decimal) int {
	switch {
	case d.negative && other.negative:
		return -d.compareSize(other)
	case d.negative:
		return -1
	case other.negative:
		return 1
	}
	return d.compareSize(other)
}

func (d decimal) compareSize(other decimal) int {
	return cmp.Or(compareDigits(d.whole, other.whole), cmp.Compare(d.fraction, other.fraction))
}

// compareDigits compares whole numbers without leading zeros.
func compareDigits(a, b string) int {
	return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
}

// versionOf reads numbers with periods between them, perhaps after a "v". What
// follows a hyphen or plus is left out, "4.9.253-tegra", but not after a single
// number: "8-core" is no version, nor is a date.
func versionOf(s string) ([]string, bool) {
	s = strings.TrimPrefix(s, "v")
	end := strings.IndexAny(s, "-+")
	if end >= 0 {
		s = s[:end]
	}
	parts := strings.Split(s, ".")
	if len(parts) == 1 && end >= 0 {
		return nil, false
	}
	for i, p := range parts {
		if !isDigits(p) {
			return nil, false
		}
		parts[i] = strings.TrimLeft(p, "0")
	}
	return parts, true
}

// compareVersions takes parts that are missing for zero.
func compareVersions(a, b []string) int {
	for i := range max(len(a), len(b)) {
		var x, y string
		if i < len(a) {
			x = a[i]
		}
		if i < len(b) {
			y = b[i]
		}
		if sign := compareDigits(x, y); sign != 0 {
			return sign
		}
	}
	return 0
}

// dateOf reads the forms of dates that ECS documents for registeredAt; one
// without a zone is UTC.
func dateOf(s string) (time.Time, bool) {
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04:05", time.DateOnly} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, true
		}
	}
	return time.Time{}, false
}

func isDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}
