package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// show prints a message in the chosen form; table prints it for a person.
func (c *cli) show(m proto.Message, table func()) error {
	if c.flags.output == "table" {
		table()
		return nil
	}
	raw, err := toJSON(m)
	if err != nil {
		return err
	}
	return c.showRaw(raw)
}

// toJSON is the message with every field there, zero or not.
func toJSON(m proto.Message) ([]byte, error) {
	raw, err := protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode the answer: %w", err)
	}
	return raw, nil
}

// showRaw prints JSON as JSON or YAML, keeping the order of fields. What
// protojson returns varies in white space on purpose: it is laid out anew.
func (c *cli) showRaw(raw []byte) error {
	var b bytes.Buffer
	if c.flags.output == "yaml" {
		var doc yaml.Node
		if err := yaml.Unmarshal(raw, &doc); err != nil {
			return fmt.Errorf("encode the answer as YAML: %w", err)
		}
		block(&doc)
		enc := yaml.NewEncoder(&b)
		enc.SetIndent(2)
		if err := enc.Encode(&doc); err != nil {
			return fmt.Errorf("encode the answer as YAML: %w", err)
		}
	} else {
		var compact bytes.Buffer
		if err := json.Compact(&compact, raw); err != nil {
			return fmt.Errorf("encode the answer: %w", err)
		}
		if err := json.Indent(&b, compact.Bytes(), "", "  "); err != nil {
			return fmt.Errorf("encode the answer: %w", err)
		}
		b.WriteByte('\n')
	}
	_, err := b.WriteTo(c.stdout)
	return err
}

// block undoes JSON's flow style; strings that look like something else keep
// their quotes by their tag.
func block(n *yaml.Node) {
	n.Style = 0
	for _, child := range n.Content {
		block(child)
	}
}

// table prints rows under a header within 80 columns: columns marked with a
// trailing ~ give way when it is too wide.
func (c *cli) table(header []string, rows [][]string) {
	const most, gap, least = 80, 2, 8
	widths := make([]int, len(header))
	flexible := make([]bool, len(header))
	all := [][]string{make([]string, len(header))}
	for i, h := range header {
		all[0][i], flexible[i] = strings.CutSuffix(h, "~")
	}
	all = append(all, rows...)
	total := gap * (len(header) - 1)
	for _, row := range all {
		for i, cell := range row {
			widths[i] = max(widths[i], len([]rune(cell)))
		}
	}
	for _, w := range widths {
		total += w
	}
	for ; total > most; total-- {
		widest := -1
		for i, w := range widths {
			if flexible[i] && w > least && (widest < 0 || w > widths[widest]) {
				widest = i
			}
		}
		if widest < 0 {
			break
		}
		widths[widest]--
	}
	for _, row := range all {
		var b strings.Builder
		for i, cell := range row {
			r := []rune(cell)
			if len(r) > widths[i] {
				r = append(r[:widths[i]-1], '…')
			}
			b.WriteString(string(r))
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-len(r)+gap))
			}
		}
		fmt.Fprintln(c.stdout, strings.TrimRight(b.String(), " "))
	}
}

// fields prints names and values, leaving out what is empty.
func (c *cli) fields(pairs ...string) {
	width := 0
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			width = max(width, len(pairs[i]))
		}
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			fmt.Fprintf(c.stdout, "%-*s  %s\n", width+1, pairs[i]+":", pairs[i+1])
		}
	}
}
