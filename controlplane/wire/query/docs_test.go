package query

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// docBlock is a fenced block of the page: its kind and its lines.
type docBlock struct {
	kind  string
	lines []string
}

func docBlocks(t *testing.T) (blocks []docBlock) {
	t.Helper()
	page, err := os.ReadFile("../../../docs/query-language.md")
	if err != nil {
		t.Fatal(err)
	}
	open := false
	for line := range strings.Lines(string(page)) {
		line = strings.TrimSuffix(line, "\n")
		kind, fence := strings.CutPrefix(line, "```")
		switch {
		case fence && !open:
			blocks = append(blocks, docBlock{kind: kind})
			open = true
		case fence:
			open = false
		case open:
			b := &blocks[len(blocks)-1]
			b.lines = append(b.lines, line)
		}
	}
	return blocks
}

// Every example of the page is as it says.
func TestDocumentedExamples(t *testing.T) {
	var (
		columns  = regexp.MustCompile(`^(.*\S)\s{2,}(\S.*)$`)
		device   = map[string]string{}
		examples = map[string]int{}
	)
	blocks := docBlocks(t)
	for _, b := range blocks {
		if b.kind != "attributes" {
			continue
		}
		for _, line := range b.lines {
			m := columns.FindStringSubmatch(line)
			if m == nil {
				t.Fatalf("attribute %q has no two columns", line)
			}
			device[m[1]] = m[2]
		}
	}
	for _, b := range blocks {
		switch b.kind {
		case "attributes":
		case "expressions":
			for _, line := range b.lines {
				m := columns.FindStringSubmatch(line)
				if m == nil || m[2] != "yes" && m[2] != "no" {
					t.Errorf("example %q does not end in yes or no", line)
					continue
				}
				examples[b.kind]++
				e, err := Parse(m[1])
				if err != nil {
					t.Errorf("%s: %v", m[1], err)
				} else if e.Match(Attributes(device)) != (m[2] == "yes") {
					t.Errorf("%s: the page says %s, it is the other way round", m[1], m[2])
				}
			}
		case "errors":
			for example := range strings.SplitSeq(strings.Join(b.lines, "\n"), "\n\n") {
				text, want, _ := strings.Cut(example, "\n")
				examples[b.kind]++
				if _, err := Parse(text); err == nil || err.Error() != want {
					t.Errorf("%s\ngives %v\nthe page says %s", text, err, want)
				}
			}
		default:
			t.Errorf("a block of kind %q is not checked", b.kind)
		}
	}
	if examples["expressions"] < 25 || examples["errors"] < 3 {
		t.Errorf("found %v examples: is the page still read right?", examples)
	}
}
