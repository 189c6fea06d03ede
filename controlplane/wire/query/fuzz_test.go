package query

import (
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		"", "attribute:a", "attribute:memory_mib >= 8192 and attribute:vendor == nvidia",
		`(attribute:a in [b, "c d", 'e\'f'] or !attribute:g !exists) && not agentVersion < 1.2.3`,
		`attribute:a =~ (g2|p3).*[)\]] || attribute:b !~ "\d+\\.5"`, "attribute:a=~\\Qb|c", "attribute:a =~ (?i)\\pL{3,5}[^\\W]",
		"registeredAt > 2018-06-18T22:28:28+00:00", "attribute:größe == ß “x”", strings.Repeat("(", 60), strings.Repeat("!", 60),
		"attribute:a == \"b\\", "attribute:a > -0.50", "attribute:a =~ ((x{9}){9}){9}", "attribute:a == b\xff", "NOT attribute:a exists",
	} {
		f.Add(seed, "8192")
	}
	f.Fuzz(func(t *testing.T, text, value string) {
		begin := time.Now()
		e, err := Parse(text, "agentVersion")
		if took := time.Since(begin); took > 5*time.Second {
			t.Fatalf("parsing %q took %s", text, took)
		}
		if err != nil {
			var s *SyntaxError
			if !errors.As(err, &s) || s.Expression != text || s.Offset < 0 || s.Offset > len(text) || s.Message == "" {
				t.Fatalf("%q: %#v", text, err)
			}
			if line := s.Error(); !utf8.ValidString(line) || strings.ContainsAny(line, "\n\r\t\x00\x1b") || len(line) > 1500 {
				t.Fatalf("%q: %q", text, line)
			}
			return
		}
		again, err := Parse(e.String(), "agentVersion")
		if err != nil {
			t.Fatalf("%q, canonical %q: %v", text, e, err)
		}
		if diff := cmp.Diff(tree(e.root), tree(again.root)); diff != "" || again.String() != e.String() {
			t.Fatalf("%q and its canonical form %q, then %q, differ:\n%s", text, e, again, diff)
		}
		for _, present := range []bool{true, false} {
			lookup := func(subject string) (string, bool) { return value, present }
			begin = time.Now()
			got := e.Match(lookup)
			if took := time.Since(begin); took > 5*time.Second {
				t.Fatalf("matching %q with %d bytes took %s", text, len(value), took)
			}
			if again.Match(lookup) != got || (e.Explain(lookup) == "") != got {
				t.Fatalf("%q and its canonical form %q differ for %q", text, e, value)
			}
		}
	})
}
