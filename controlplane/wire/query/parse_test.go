package query

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

var subjects = []string{"agentConnected", "agentVersion", "registeredAt", "runningTasksCount", "task:group"}

func parse(t *testing.T, text string) Expr {
	t.Helper()
	e, err := Parse(text, subjects...)
	if err != nil {
		t.Fatalf("Parse(%q): %v", text, err)
	}
	return e
}

func TestCanonicalForm(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		// Every spelling of every operator.
		{`attribute:a==b`, `attribute:a == b`},
		{`attribute:a equals b`, `attribute:a == b`},
		{`attribute:a!=b`, `attribute:a != b`},
		{`attribute:a not_equals b`, `attribute:a != b`},
		{`attribute:a>1`, `attribute:a > 1`},
		{`attribute:a greater_than 1`, `attribute:a > 1`},
		{`attribute:a>=1`, `attribute:a >= 1`},
		{`attribute:a greater_than_equal 1`, `attribute:a >= 1`},
		{`attribute:a<1`, `attribute:a < 1`},
		{`attribute:a less_than 1`, `attribute:a < 1`},
		{`attribute:a<=1`, `attribute:a <= 1`},
		{`attribute:a less_than_equal 1`, `attribute:a <= 1`},
		{`attribute:a exists`, `attribute:a exists`},
		{`attribute:a !exists`, `attribute:a not_exists`},
		{`attribute:a not_exists`, `attribute:a not_exists`},
		{`attribute:a in[b,c]`, `attribute:a in [b, c]`},
		{`attribute:a !in [ b , c ]`, `attribute:a not_in [b, c]`},
		{`attribute:a not_in ["b", 'c d']`, `attribute:a not_in [b, "c d"]`},
		{`attribute:a=~b`, `attribute:a =~ b`},
		{`attribute:a matches b`, `attribute:a =~ b`},
		{`attribute:a!~b`, `attribute:a !~ b`},
		{`attribute:a not_matches b`, `attribute:a !~ b`},
		{`attribute:a==b&&attribute:c==d`, `attribute:a == b and attribute:c == d`},
		{`attribute:a==b||attribute:c==d`, `attribute:a == b or attribute:c == d`},
		{`!attribute:a==b`, `not attribute:a == b`},

		// Precedence, and what parentheses are kept.
		{`attribute:a exists or attribute:b exists and attribute:c exists`, `attribute:a exists or attribute:b exists and attribute:c exists`},
		{`(attribute:a exists or attribute:b exists) and attribute:c exists`, `(attribute:a exists or attribute:b exists) and attribute:c exists`},
		{`attribute:a exists or (attribute:b exists and attribute:c exists)`, `attribute:a exists or attribute:b exists and attribute:c exists`},
		{`(attribute:a exists and (attribute:b exists and attribute:c exists))`, `attribute:a exists and attribute:b exists and attribute:c exists`},
		{`not attribute:a exists and attribute:b exists`, `not attribute:a exists and attribute:b exists`},
		{`not(attribute:a exists and attribute:b exists)`, `not (attribute:a exists and attribute:b exists)`},
		{`!!(((attribute:a exists)))`, `not not attribute:a exists`},

		// ECS's own examples.
		{`attribute:ecs.instance-type =~ t2.*`, `attribute:ecs.instance-type =~ t2.*`},
		{`attribute:ecs.availability-zone in [us-east-1a, us-east-1b]`, `attribute:ecs.availability-zone in [us-east-1a, us-east-1b]`},
		{`attribute:ecs.instance-type =~ g2.* and attribute:ecs.availability-zone != us-east-1d`, `attribute:ecs.instance-type =~ g2.* and attribute:ecs.availability-zone != us-east-1d`},
		{`task:group == service:production`, `task:group == service:production`},
		{`not(task:group == database)`, `not task:group == database`},
		{`runningTasksCount == 0`, `runningTasksCount == 0`},
		{`registeredAt > 2018-06-18T22:28:28+00:00`, `registeredAt > 2018-06-18T22:28:28+00:00`},

		// Values.
		{`attribute:a == nvidia.com/gpu`, `attribute:a == nvidia.com/gpu`},
		{`attribute:a == 00:1a:2b@x`, `attribute:a == 00:1a:2b@x`},
		{`attribute:a == "b"`, `attribute:a == b`},
		{`attribute:a == ""`, `attribute:a == ""`},
		{`attribute:a == 'say "hi"'`, `attribute:a == "say \"hi\""`},
		{`attribute:a == "say \"hi\""`, `attribute:a == "say \"hi\""`},
		{`attribute:a == "c:\d \\ e"`, `attribute:a == "c:\\d \\ e"`},
		{`attribute:a == "and"`, `attribute:a == "and"`},
		{`attribute:a == in`, `attribute:a == in`},
		{`attribute:a == größe`, `attribute:a == größe`},
		{"attribute:a\n\t== b\r\nand attribute:c exists\n", `attribute:a == b and attribute:c exists`},

		// Where bare patterns end.
		{`(attribute:a =~ (b|c).*)`, `attribute:a =~ "(b|c).*"`},
		{`attribute:a =~ [)]b and attribute:c exists`, `attribute:a =~ "[)]b" and attribute:c exists`},
		{`(attribute:a =~ []) ]b)`, ``},
		{`(attribute:a =~ []))]b)`, `attribute:a =~ "[]))]b"`},
		{`(attribute:a =~ b\))`, `attribute:a =~ "b\\)"`},
		{`attribute:a =~ b|c`, `attribute:a =~ "b|c"`},
		{`attribute:a=~b&&attribute:c=~d||attribute:e=~f`, `attribute:a =~ b and attribute:c =~ d or attribute:e =~ f`},
		{`attribute:a =~ "b c"`, `attribute:a =~ "b c"`},
		{`attribute:a =~ "\d+\.5"`, `attribute:a =~ \d+\.5`},
		{`attribute:a =~ \Qb.`, `attribute:a =~ \Qb.`},
	} {
		e, err := Parse(c.text, subjects...)
		if c.want == "" {
			if err == nil {
				t.Errorf("Parse(%q) = %s, want an error", c.text, e)
			}
			continue
		}
		if err != nil {
			t.Errorf("Parse(%q): %v", c.text, err)
			continue
		}
		if e.String() != c.want {
			t.Errorf("Parse(%q) = %s, want %s", c.text, e, c.want)
		}
		if again, err := Parse(c.want, subjects...); err != nil || !again.Equal(e) {
			t.Errorf("Parse(%q) = %s, %v; want the same again", c.want, again, err)
		}
	}
}

func TestMessages(t *testing.T) {
	const (
		known = "attribute:NAME, agentConnected, agentVersion, registeredAt, runningTasksCount, task:group"
		ops   = `expected an operator after "attribute:a": ==, !=, >, >=, <, <=, =~, !~, in, !in, exists or !exists`
		value = "expected a value, in quotes if it is not plain"
	)
	for _, c := range []struct {
		text   string
		offset int
		want   string
	}{
		{``, 0, `at the end: the expression is empty; expected a subject (` + known + `), "not" or "("`},
		{`  `, 2, `at the end: the expression is empty; expected a subject (` + known + `), "not" or "("`},
		{`vendor == x`, 0, `at character 1, near "vendor == x": unknown subject "vendor"; known are ` + known},
		{`attribute:a == b and ec2InstanceId == i-1`, 21, `at character 22, near "ec2InstanceId == i-1": unknown subject "ec2InstanceId"; known are ` + known},
		{`attribute: == 1`, 10, `at character 11, near " == 1": the attribute has no name`},
		{`attribute:a:b == 1`, 11, `at character 12, near ":b == 1": an attribute's name has letters, digits and -_./ only`},
		{`attribute:a`, 11, `at the end: the expression ends; ` + ops},
		{`attribute:a = b`, 12, `at character 13, near "= b": found "=", did you mean "=="?; ` + ops},
		{`attribute:a IN [b]`, 12, `at character 13, near "IN [b]": found "IN", write it in; ` + ops},
		{`attribute:a ! exists`, 12, `at character 13, near "! exists": found "!"; ` + ops},
		{`attribute:a == `, 15, `at the end: the expression ends; ` + value},
		{`attribute:a === b`, 14, `at character 15, near "= b": found "="; ` + value},
		{`attribute:a == and`, 15, `at character 16, near "and": found "and"; ` + value},
		{`attribute:a == “b”`, 15, `at character 16, near "“b”": found "“", a quote is " or '; ` + value},
		{`attribute:a == b=c`, 16, `at character 17, near "=c": '=' cannot stand in a value that is not in quotes`},
		{`attribute:a == b,c`, 16, `at character 17, near ",c": ',' cannot stand in a value that is not in quotes`},
		{`attribute:a == 'b`, 15, `at character 16, near "'b": the quote is not closed`},
		{"attribute:a == 'b\n'", 17, `at character 18, near "\n'": a value in quotes holds no tab and no end of line`},
		{`attribute:a == Raspberry Pi 4`, 25, `at character 26, near "Pi 4": found "Pi" (a value with spaces is put in quotes); expected "and", "or" or the end`},
		{`attribute:größe == b`, 12, `at character 13, near "öße == b": found "ö"; expected an operator after "attribute:gr": ==, !=, >, >=, <, <=, =~, !~, in, !in, exists or !exists`},
		{`attribute:a == ß adn attribute:b == c`, 18, `at character 18, near "adn attribute:b == c": found "adn" (a value with spaces is put in quotes); expected "and", "or" or the end`},
		{`attribute:a exists attribute:b exists`, 19, `at character 20, near "attribute:b exists": found "attribute:b"; expected "and", "or" or the end`},
		{`attribute:a == b AND attribute:c == d`, 17, `at character 18, near "AND attribute:c == d": found "AND", write it and; expected "and", "or" or the end`},
		{`NOT attribute:a exists`, 0, `at character 1, near "NOT attribute:a exists": found "NOT", write it not`},
		{`attribute:a == b and`, 20, `at the end: the expression ends; expected a subject (` + known + `), "not" or "("`},
		{`or attribute:a == b`, 0, `at character 1, near "or attribute:a == b": found "or"; expected a subject (` + known + `), "not" or "("`},
		{`(attribute:a == b`, 17, `at the end: the expression ends; expected "and", "or" or the ) of the ( at character 1`},
		{`attribute:a == b)`, 16, `at character 17, near ")": this ")" closes nothing; expected "and", "or" or the end`},
		{`attribute:a in b`, 15, `at character 16, near "b": found "b"; expected a list after "in": [a, b]`},
		{`attribute:a in []`, 16, `at character 17, near "]": found "]"; ` + value},
		{`attribute:a in [b c]`, 18, `at character 19, near "c]": found "c"; expected "," or the "]" of the list`},
		{`attribute:a in [b,`, 18, `at the end: the expression ends; ` + value},
		{`attribute:a > big`, 14, `at character 15, near "big": > compares numbers (8192), versions (1.10.0) and dates (2026-11-21); this is none`},
		{`attribute:a >= 8GiB`, 15, `at character 16, near "8GiB": >= compares numbers (8192), versions (1.10.0) and dates (2026-11-21); this is none`},
		{`attribute:a =~ [b`, 15, `at character 16, near "[b": the pattern is not valid: missing closing ]: "[b"`},
		{`attribute:a =~ *`, 15, `at character 16, near "*": the pattern is not valid: missing argument to repetition operator: "*"`},
		{`attribute:a =~ (b c)`, 15, `at character 16, near "(b c)": the pattern is not valid: missing closing ): "(b" (a pattern with spaces is put in quotes)`},
		{`attribute:a =~ (?!b).*`, 15, `at character 16, near "(?!b).*": the pattern is not valid: it looks ahead or behind with "(?!", which RE2 cannot: use !~, and, or`},
		{`attribute:a =~ (b)\1`, 15, `at character 16, near "(b)\\1": the pattern is not valid: invalid escape sequence: "\\1"`},
		{`attribute:a =~ b` + "\u00a0", 16, `at character 17, near "\u00a0": found "\u00a0"; expected "and", "or" or the end`},
		{"attribute:a == b\x00", 16, `at character 17, near "\x00": this is not UTF-8 text, or is a control character`},
		{"attribute:a == \xff", 15, `at character 16, near "\xff": this is not UTF-8 text, or is a control character`},
	} {
		_, err := Parse(c.text, subjects...)
		var e *SyntaxError
		if !errors.As(err, &e) {
			t.Errorf("Parse(%q): %v, want a SyntaxError", c.text, err)
			continue
		}
		if e.Offset != c.offset || e.Expression != c.text {
			t.Errorf("Parse(%q): offset %d of %q, want %d", c.text, e.Offset, e.Expression, c.offset)
		}
		if diff := cmp.Diff(c.want, e.Error()); diff != "" {
			t.Errorf("Parse(%q) (-want +got):\n%s", c.text, diff)
		}
	}
}

func TestLimits(t *testing.T) {
	exists := func(n int) string { return strings.TrimSuffix(strings.Repeat("attribute:a exists or ", n), " or ") }
	list := func(n int) string {
		return "attribute:a in [" + strings.TrimSuffix(strings.Repeat("b,", n), ",") + "]"
	}
	nest := func(n int) string {
		return strings.Repeat("(", n) + "attribute:a exists" + strings.Repeat(")", n)
	}
	for _, c := range []struct{ name, text, want string }{
		{"longest", "attribute:a == " + strings.Repeat("b", MaxLength-15), ""},
		{"too long", "attribute:a == " + strings.Repeat("b", MaxLength-14), "the expression has 2001 bytes; at most 2000 are allowed"},
		{"too long when canonical", strings.Repeat("attribute:a<1&&", 100) + exists(20), "the expression has 2436 bytes when written with spaces and quotes; at most 2000 are allowed"},
		{"many parts do not nest", exists(80), ""},
		{"deepest", nest(MaxDepth), ""},
		{"too deep", nest(MaxDepth + 1), `at character 51, near "(attribute:a exists)))))...": parentheses and nots nest deeper than 50 here`},
		{"too many nots", strings.Repeat("!", MaxDepth+1) + "attribute:a exists", "parentheses and nots nest deeper than 50 here"},
		{"longest list", list(MaxList), ""},
		{"list too long", list(MaxList + 1), "the list has more than 100 values"},
		{"longest name", "attribute:" + strings.Repeat("a", MaxName) + " exists", ""},
		{"name too long", "attribute:" + strings.Repeat("a", MaxName+1) + " exists", "the attribute's name has 129 bytes; at most 128 are allowed"},
		{"large pattern", "attribute:a =~ .{900}", ""},
		{"pattern too large", "attribute:a =~ .{999}b{9}", "the patterns of the expression are too large: repeat less in { }"},
		{"patterns too large together", "attribute:a =~ .{600} or attribute:a =~ .{600}", "the patterns of the expression are too large: repeat less in { }"},
		{"nested repetition", "attribute:a =~ ((b{31}){31})", "the patterns of the expression are too large: repeat less in { }"},
		{"Unicode classes", "attribute:a =~ " + strings.Repeat(`\pL`, 5), ""},
		{"too many Unicode classes", "attribute:a =~ " + strings.Repeat(`\pL`, 6), "the patterns of the expression have too many Unicode classes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse(c.text)
			switch {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (err == nil || !strings.HasSuffix(err.Error(), c.want)):
				t.Errorf("err = %v, want %s", err, c.want)
			}
		})
	}
}

// What is worst within the limits is far from what would be felt: the first of
// these took 1.3 s before wide classes were counted.
func TestWorstCases(t *testing.T) {
	const limit = time.Second // of this thread, however busy the machine is; milliseconds are usual
	cpu := func() time.Duration {
		var u unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
			t.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	value := strings.Repeat("a", 4096)
	for i, pattern := range []string{
		strings.Repeat(`(?i)`, 10) + strings.Repeat(`[\pL]`, 350),
		`(?i)` + strings.Repeat(`[B-\x{1e942}]`, 5),
		`(?i)` + strings.Repeat(`[\W]`, 450),
		strings.Repeat(`\pL`, 600),
		strings.Repeat(`(.*)*`, 350),
		strings.Repeat(`(`, 900) + strings.Repeat(`)`, 900),
		strings.Repeat(`a?`, 300) + strings.Repeat(`a`, 300),
		`(a{1,30}){1,30}`,
		`(a|a)*b`,
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			begin := cpu()
			e, err := Parse("attribute:a =~ " + pattern)
			if err == nil {
				e.Match(Attributes(map[string]string{"a": value}))
			}
			if took := cpu() - begin; took > limit {
				t.Errorf("%s (error: %v)", took, err)
			}
		})
	}
}

func TestErrorsAreOneLine(t *testing.T) {
	for _, text := range []string{"attribute:a == 'b\nc", "attribute:a == b\nc\nd", "\x1b[2J", "attribute:a\u2028== b"} {
		_, err := Parse(text)
		if err == nil {
			t.Fatalf("Parse(%q) succeeds", text)
		}
		if s := err.Error(); strings.ContainsAny(s, "\n\x1b\u2028") || !utf8.ValidString(s) {
			t.Errorf("Parse(%q): %q", text, s)
		}
	}
}
