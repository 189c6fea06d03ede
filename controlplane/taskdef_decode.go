package controlplane

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"
)

// The standard decoder matches names in any case, keeps the last of two equal
// names and stops at the first problem. This one does none of that: a document
// becomes a tree of nodes that remember their lines, and the tree is laid over
// a Go value.

// node is a JSON value with the line it began on.
type node struct {
	line    int
	kind    byte     // 'o' object, 'a' array, 's' string, 'n' number, 'b' boolean, '0' null
	text    string   // of a string, number or boolean
	members []member // of an object, in its order
	items   []*node  // of an array
}

type member struct {
	name  string
	line  int
	value *node
}

const (
	maxDocumentDepth = 32
	maxProblems      = 100 // told at once; a person reads them
)

// parseDocument reads exactly one JSON object, or says why it cannot.
func parseDocument(doc []byte) (*node, *Problem) {
	if len(doc) > MaxTaskDefinitionBytes {
		return nil, &Problem{Message: fmt.Sprintf("the document has %d bytes; at most %d are allowed", len(doc), MaxTaskDefinitionBytes)}
	}
	p := &documentParser{doc: doc}
	if at := invalidUTF8(doc); at >= 0 {
		return nil, &Problem{Line: p.lineAt(at), Message: "the text is not UTF-8"}
	}
	if len(bytes.TrimSpace(doc)) == 0 {
		return nil, &Problem{Message: "the document is empty; it must be a JSON object"}
	}
	// Checked as a whole first: the token reader alone is laxer about commas.
	var probe json.RawMessage
	if err := json.Unmarshal(doc, &probe); err != nil {
		return nil, p.syntax(err)
	}
	p.dec = json.NewDecoder(bytes.NewReader(doc))
	p.dec.UseNumber()
	root, err := p.value(0)
	if err != nil {
		return nil, p.syntax(err)
	}
	if root.kind != 'o' {
		return nil, &Problem{Line: root.line, Message: "the document is " + root.describe() + "; it must be a JSON object"}
	}
	return root, nil
}

type documentParser struct {
	doc   []byte
	dec   *json.Decoder
	at    int // offset up to which newlines are counted
	lines int // newlines before it
}

// lineAt counts on from where it last was: offsets mostly grow.
func (p *documentParser) lineAt(offset int) int {
	offset = min(max(offset, 0), len(p.doc))
	if offset < p.at {
		p.at, p.lines = 0, 0
	}
	p.lines += bytes.Count(p.doc[p.at:offset], []byte("\n"))
	p.at = offset
	return 1 + p.lines
}

func (p *documentParser) syntax(err error) *Problem {
	var s *json.SyntaxError
	switch {
	case errors.As(err, &s):
		return &Problem{Line: p.lineAt(int(s.Offset) - 1), Message: "malformed JSON: " + s.Error()}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return &Problem{Line: p.lineAt(len(p.doc)), Message: "malformed JSON: unexpected end"}
	}
	return &Problem{Line: p.lineAt(int(p.offset())), Message: err.Error()}
}

func (p *documentParser) offset() int64 {
	if p.dec == nil {
		return 0
	}
	return p.dec.InputOffset()
}

func (p *documentParser) value(depth int) (*node, error) {
	if depth > maxDocumentDepth {
		return nil, fmt.Errorf("more than %d levels of nesting", maxDocumentDepth)
	}
	tok, err := p.dec.Token()
	if err != nil {
		return nil, err
	}
	n := &node{line: p.lineAt(int(p.offset()) - 1)}
	switch t := tok.(type) {
	case json.Delim:
		if t == '[' {
			n.kind = 'a'
			for p.dec.More() {
				item, err := p.value(depth + 1)
				if err != nil {
					return nil, err
				}
				n.items = append(n.items, item)
			}
		} else {
			n.kind = 'o'
			if err := p.object(n, depth); err != nil {
				return nil, err
			}
		}
		_, err = p.dec.Token() // the closing one
		return n, err
	case string:
		n.kind, n.text = 's', t
	case json.Number:
		n.kind, n.text = 'n', t.String()
	case bool:
		n.kind, n.text = 'b', strconv.FormatBool(t)
	default:
		n.kind = '0'
	}
	return n, nil
}

func (p *documentParser) object(n *node, depth int) error {
	for p.dec.More() {
		tok, err := p.dec.Token()
		if err != nil {
			return err
		}
		name, ok := tok.(string)
		if !ok {
			return fmt.Errorf("malformed JSON: want a name, found %v", tok)
		}
		m := member{name: name, line: p.lineAt(int(p.offset()) - 1)}
		if m.value, err = p.value(depth + 1); err != nil {
			return err
		}
		n.members = append(n.members, m)
	}
	return nil
}

func (n *node) describe() string {
	switch n.kind {
	case 'o':
		return "an object"
	case 'a':
		return "a list"
	case 's':
		return "the string " + quote(n.text)
	case 'n':
		return "the number " + shorten(n.text)
	case 'b':
		return n.text
	}
	return "null"
}

// documentValue is a Go type with a reading of its own.
type documentValue interface{ fromDocument(n *node) error }

// documentDecoder lays a tree over a Go value, collecting every problem and,
// for fields the table says are only kept, every warning.
type documentDecoder struct {
	rules    map[string]FieldRule
	lines    map[string]int // by path
	order    map[string]int // by path: where it came in the document
	problems []Problem
	bad      map[string]bool // paths with problems
	warnings []string
}

func newDocumentDecoder(rules []FieldRule) *documentDecoder {
	d := &documentDecoder{rules: map[string]FieldRule{}, lines: map[string]int{}, order: map[string]int{}, bad: map[string]bool{}}
	for _, r := range rules {
		d.rules[r.Path] = r
	}
	return d
}

func (d *documentDecoder) decode(root *node, into any) {
	d.value(root, reflect.ValueOf(into).Elem(), place{}, false)
}

// place is where in the document a value is: its own path, and the path with
// every index left out that rules are found by.
type place struct{ path, rule string }

func (at place) field(name string) place {
	if at.path == "" {
		return place{name, name}
	}
	return place{at.path + "." + name, at.rule + "." + name}
}

func (at place) index(i int) place {
	return place{at.path + "[" + strconv.Itoa(i) + "]", at.rule + "[]"}
}

func (d *documentDecoder) saw(at place, line int) {
	d.lines[at.path] = line
	d.order[at.path] = len(d.order)
}

// problem records a broken rule, at the line of the path or its nearest parent.
func (d *documentDecoder) problem(path, format string, args ...any) {
	line := 0
	for p := path; line == 0 && p != ""; p = parentPath(p) {
		line = d.lines[p]
	}
	d.bad[path] = true
	d.problems = append(d.problems, Problem{Path: path, Line: line, Message: fmt.Sprintf(format, args...)})
}

func (d *documentDecoder) warn(path, format string, args ...any) {
	d.warnings = append(d.warnings, path+": "+fmt.Sprintf(format, args...))
}

func parentPath(p string) string {
	return p[:max(strings.LastIndexAny(p, ".["), 0)]
}

// inOrder sorts the problems as the document goes.
func (d *documentDecoder) inOrder() []Problem {
	rank := func(p Problem) int {
		for path := p.Path; path != ""; path = parentPath(path) {
			if n, ok := d.order[path]; ok {
				return n
			}
		}
		return -1
	}
	slices.SortStableFunc(d.problems, func(a, b Problem) int { return cmp.Compare(rank(a), rank(b)) })
	if more := len(d.problems) - maxProblems; more > 0 {
		return append(d.problems[:maxProblems:maxProblems], Problem{Message: fmt.Sprintf("and %d more problems", more)})
	}
	return d.problems
}

// value lays n over v. kept: a parent has already been warned about.
func (d *documentDecoder) value(n *node, v reflect.Value, at place, kept bool) {
	if n.kind == '0' {
		return // as ECS's clients have it: null is not given
	}
	if dv, ok := v.Addr().Interface().(documentValue); ok {
		if err := dv.fromDocument(n); err != nil {
			d.problem(at.path, "%s", err)
		}
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		d.value(n, v.Elem(), at, kept)
	case reflect.Struct:
		if n.kind != 'o' {
			d.problem(at.path, "must be an object, not %s", n.describe())
			return
		}
		d.object(n, v, at, kept)
	case reflect.Slice:
		if n.kind != 'a' {
			d.problem(at.path, "must be a list, not %s", n.describe())
			return
		}
		v.Set(reflect.MakeSlice(v.Type(), len(n.items), len(n.items)))
		for i, item := range n.items {
			d.saw(at.index(i), item.line)
			if item.kind == '0' {
				d.problem(at.index(i).path, "must not be null")
				continue
			}
			d.value(item, v.Index(i), at.index(i), kept)
		}
	case reflect.Map:
		d.stringMap(n, v, at)
	case reflect.String:
		switch {
		case n.kind != 's':
			d.problem(at.path, "must be a string, not %s", n.describe())
		case strings.ContainsRune(n.text, 0):
			d.problem(at.path, "holds a NUL character, which no program could be given")
		default:
			v.SetString(n.text)
		}
	case reflect.Bool:
		if n.kind != 'b' {
			d.problem(at.path, "must be true or false, not %s", n.describe())
			return
		}
		v.SetBool(n.text == "true")
	case reflect.Int:
		if n.kind != 'n' {
			d.problem(at.path, "must be a whole number, not %s", n.describe())
			return
		}
		i, err := strconv.ParseInt(n.text, 10, 64)
		if errors.Is(err, strconv.ErrRange) {
			d.problem(at.path, "%s is too large", shorten(n.text))
		} else if err != nil {
			d.problem(at.path, "must be a whole number, not %s", shorten(n.text))
		}
		v.SetInt(i)
	}
}

func (d *documentDecoder) stringMap(n *node, v reflect.Value, at place) {
	if n.kind != 'o' {
		d.problem(at.path, "must be an object of strings, not %s", n.describe())
		return
	}
	m := reflect.MakeMapWithSize(v.Type(), len(n.members))
	for _, mb := range n.members {
		key := place{at.path + "[" + quote(mb.name) + "]", at.rule}
		if m.MapIndex(reflect.ValueOf(mb.name)).IsValid() {
			d.problem(key.path, "is given a second time on line %d", mb.line)
			continue
		}
		d.saw(key, mb.line)
		if strings.ContainsRune(mb.name, 0) {
			d.problem(key.path, "has a NUL character in its name")
		}
		if mb.value.kind == '0' {
			d.problem(key.path, "must be a string, not null")
		}
		item := reflect.New(v.Type().Elem()).Elem()
		d.value(mb.value, item, key, true)
		m.SetMapIndex(reflect.ValueOf(mb.name), item)
	}
	v.Set(m)
}

func (d *documentDecoder) object(n *node, v reflect.Value, at place, kept bool) {
	fields := map[string]int{}
	for i := range v.NumField() {
		name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
		fields[name] = i
	}
	given := map[string]bool{}
	for _, m := range n.members {
		field := at.field(m.name)
		if given[m.name] {
			d.problem(field.path, "is given a second time on line %d", m.line)
			continue
		}
		given[m.name] = true
		rule, ruled := d.rules[field.rule]
		i, known := fields[m.name]
		if !known && !ruled {
			field.path = at.field(printable(m.name)).path
			d.saw(field, m.line)
			d.problem(field.path, "%s", d.unknown(m.name, at.rule, fields))
			continue
		}
		d.saw(field, m.line)
		switch {
		case m.value.kind == '0':
			continue
		case ruled && rule.Treatment == Refused && m.value.kind == 'a' && len(m.value.items) == 0:
			continue // an empty list asks for nothing; described definitions have many
		case ruled && rule.Treatment == Refused:
			d.problem(field.path, "is refused: %s", rule.Note)
			continue
		case ruled && rule.Treatment == Kept && !kept && !rule.matters(m.value):
			d.value(m.value, v.Field(i), field, kept)
			continue
		case ruled && rule.Treatment == Kept && !kept:
			d.warn(field.path, "kept, but has no effect: %s", rule.Note)
			d.value(m.value, v.Field(i), field, true)
			continue
		}
		d.value(m.value, v.Field(i), field, kept)
	}
}

// unknown says what may have been meant by a name that is no field here.
func (d *documentDecoder) unknown(name, parent string, fields map[string]int) string {
	if why, ok := outputFields[name]; ok && parent == "" {
		return why
	}
	if strings.HasSuffix(parent, "belay") {
		for _, reserved := range reservedNames {
			if name == reserved {
				return "is reserved for a later version of Belay; leave it out"
			}
		}
	}
	names := make([]string, 0, len(fields))
	for f := range fields {
		names = append(names, f)
	}
	for path, r := range d.rules {
		if r.Treatment == Refused && parentPath(path) == parent {
			names = append(names, strings.TrimPrefix(path[len(parentPath(path)):], "."))
		}
	}
	sort.Strings(names)
	best, bestAway := "", 3
	for _, f := range names {
		if strings.EqualFold(f, name) {
			return fmt.Sprintf("unknown field: names are case-sensitive, did you mean %q?", f)
		}
		if away := editDistance(strings.ToLower(f), strings.ToLower(name)); away < bestAway && away*3 <= len(f) {
			best, bestAway = f, away
		}
	}
	if best != "" {
		return fmt.Sprintf("unknown field: did you mean %q?", best)
	}
	return "unknown field"
}

// editDistance counts the letters to add, drop or change to get from a to b;
// names that differ by more than 2 in length are simply far apart.
func editDistance(a, b string) int {
	if d := len(a) - len(b); d > 2 || d < -2 {
		return 3
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j+1]+1, row[j]+1)
		}
	}
	return row[len(b)]
}

// quote shows a string of the document in a message, within reason.
func quote(s string) string { return strconv.Quote(shorten(s)) }

// printable keeps strange names from breaking a message over lines.
func printable(s string) string {
	q := quote(s)
	if q[1:len(q)-1] == s {
		return s
	}
	return q
}

func shorten(s string) string {
	if len(s) <= 80 {
		return s
	}
	cut := 77
	for !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "..."
}

func invalidUTF8(b []byte) int {
	for i := 0; i < len(b); {
		r, size := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && size <= 1 {
			return i
		}
		i += size
	}
	return -1
}
