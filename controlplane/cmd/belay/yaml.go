package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v3"
)

// yamlToJSON turns one YAML document into JSON in which every value stands on
// the line it had, so that what the control plane says of a line is true of
// the file. Aliases are written out; a name given twice is an error.
func yamlToJSON(text []byte) ([]byte, error) {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc, more yaml.Node
	if err := dec.Decode(&doc); errors.Is(err, io.EOF) {
		return nil, errors.New("the document is empty")
	} else if err != nil {
		return nil, errors.New(strings.TrimPrefix(err.Error(), "yaml: "))
	}
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more than one YAML document; register them one by one")
	}
	w := &yamlWriter{line: 1}
	if err := w.value(doc.Content[0], 0); err != nil {
		return nil, err
	}
	return w.out.Bytes(), nil
}

type yamlWriter struct {
	out  bytes.Buffer
	line int
}

const (
	maxYAMLDepth = 64
	maxYAMLBytes = 1 << 20 // aliases of aliases grow without end
)

// to moves down to a line of the file; an alias may lie above, then it stays.
func (w *yamlWriter) to(line int) {
	for w.line < line {
		w.out.WriteByte('\n')
		w.line++
	}
}

func (w *yamlWriter) value(n *yaml.Node, depth int) error {
	if depth > maxYAMLDepth || w.out.Len() > maxYAMLBytes {
		return fmt.Errorf("line %d: nested too deep, or aliases that grow too large", n.Line)
	}
	w.to(n.Line)
	switch n.Kind {
	case yaml.AliasNode:
		return w.value(n.Alias, depth+1)
	case yaml.SequenceNode:
		w.out.WriteByte('[')
		for i, item := range n.Content {
			if i > 0 {
				w.out.WriteByte(',')
			}
			if err := w.value(item, depth+1); err != nil {
				return err
			}
		}
		w.out.WriteByte(']')
	case yaml.MappingNode:
		return w.mapping(n, depth)
	default:
		return w.scalar(n)
	}
	return nil
}

func (w *yamlWriter) mapping(n *yaml.Node, depth int) error {
	w.out.WriteByte('{')
	first := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		if key.Kind == yaml.AliasNode {
			key = key.Alias
		}
		switch {
		case key.Kind != yaml.ScalarNode:
			return fmt.Errorf("line %d: a name must be a string", key.Line)
		case key.ShortTag() == "!!merge":
			return fmt.Errorf("line %d: merge keys (<<) are not supported; write the fields out", key.Line)
		case first[key.Value] != 0:
			return fmt.Errorf("line %d: %q is given a second time, first on line %d", key.Line, key.Value, first[key.Value])
		}
		first[key.Value] = key.Line
		if i > 0 {
			w.out.WriteByte(',')
		}
		w.to(n.Content[i].Line)
		w.json(key.Value)
		w.out.WriteByte(':')
		if err := w.value(n.Content[i+1], depth+1); err != nil {
			return err
		}
	}
	w.out.WriteByte('}')
	return nil
}

func (w *yamlWriter) scalar(n *yaml.Node) error {
	switch tag := n.ShortTag(); tag {
	case "!!str", "!!timestamp": // a date without quotes is still text
		w.json(n.Value)
	case "!!null":
		w.out.WriteString("null")
	case "!!bool", "!!int", "!!float":
		var v any
		if err := n.Decode(&v); err != nil {
			return fmt.Errorf("line %d: %q is not a value of its kind", n.Line, n.Value)
		}
		raw, err := json.Marshal(v)
		if err != nil {
			return fmt.Errorf("line %d: %s is not a number JSON has", n.Line, n.Value)
		}
		w.out.Write(raw)
	default:
		return fmt.Errorf("line %d: values tagged %s are not supported", n.Line, tag)
	}
	return nil
}

func (w *yamlWriter) json(s string) {
	raw, _ := json.Marshal(s) // strings always encode
	w.out.Write(raw)
}
