package wiretest

import (
	"bufio"
	"bytes"
	"embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/belay-edge/belay/controlplane/wire"
)

//go:embed testdata/*.txt
var transcripts embed.FS

// Sides of a transcript.
const (
	Agent   = "agent"
	Control = "control"
)

// Step is one frame of a transcript.
type Step struct {
	From  string // Agent or Control
	Frame *wire.Frame
	Bytes []byte // as it travels, with its length
}

// Transcript is a conversation on one stream. Once committed it never changes:
// every later version has to understand it, and to produce its own side of it
// when it speaks to a peer of that version.
type Transcript struct {
	Name  string
	Steps []Step
}

// Names lists the transcripts.
func Names() ([]string, error) { return fs.Glob(transcripts, "testdata/*.txt") }

// Load reads a transcript: for each frame a line "agent {JSON}" or "control
// {JSON}" and a line of hex; # begins a comment.
func Load(name string) (*Transcript, error) {
	text, err := transcripts.ReadFile(name)
	if err != nil {
		return nil, err
	}
	return parse(name, text)
}

func parse(name string, text []byte) (*Transcript, error) {
	t := &Transcript{Name: name}
	sc := bufio.NewScanner(bytes.NewReader(text))
	sc.Buffer(nil, 1<<20)
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(sc.Text())
		head, rest, _ := strings.Cut(line, " ")
		switch {
		case line == "" || head == "#":
		case head == Agent || head == Control:
			f := new(wire.Frame)
			if err := protojson.Unmarshal([]byte(rest), f); err != nil {
				return nil, fmt.Errorf("%s:%d: %w", name, n, err)
			}
			t.Steps = append(t.Steps, Step{From: head, Frame: f})
		case len(t.Steps) > 0 && rest == "":
			b, err := hex.DecodeString(line)
			if err != nil {
				return nil, fmt.Errorf("%s:%d: %w", name, n, err)
			}
			t.Steps[len(t.Steps)-1].Bytes = b
		default:
			return nil, fmt.Errorf("%s:%d: what is this line?", name, n)
		}
	}
	return t, sc.Err()
}

// format writes the transcript with bytes made from its frames, keeping the
// comments of the text it came from.
func format(text []byte) ([]byte, error) {
	var out bytes.Buffer
	for line := range strings.Lines(string(text)) {
		trimmed := strings.TrimSpace(line)
		head, rest, _ := strings.Cut(trimmed, " ")
		if head != Agent && head != Control {
			if trimmed == "" || head == "#" {
				out.WriteString(trimmed + "\n")
			}
			continue
		}
		f := new(wire.Frame)
		if err := protojson.Unmarshal([]byte(rest), f); err != nil {
			return nil, err
		}
		b, err := wire.AppendFrame(nil, f)
		if err != nil {
			return nil, err
		}
		// protojson varies its spaces on purpose.
		pretty, err := protojson.Marshal(f)
		if err != nil {
			return nil, err
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, pretty); err != nil {
			return nil, err
		}
		fmt.Fprintf(&out, "%s %s\n%x\n", head, compact.Bytes(), b)
	}
	return out.Bytes(), nil
}

// Play takes one side of the transcript against the real other side on the
// control stream: it sends its own frames and wants the other's byte for byte.
// Before each frame of the other side it calls before, which may make it
// happen.
func (p *Peer) Play(tr *Transcript, side string, before func(*wire.Frame)) {
	p.t.Helper()
	for i, step := range tr.Steps {
		if step.From == side {
			p.Send(step.Frame)
			continue
		}
		if before != nil {
			before(step.Frame)
		}
		_ = p.Control.SetReadDeadline(time.Now().Add(Patience))
		f, err := wire.ReadFrame(p.Control)
		if err != nil {
			p.t.Fatalf("%s, step %d, waiting for %s: %v", tr.Name, i+1, step.Frame.Kind(), err)
		}
		got, err := wire.AppendFrame(nil, f)
		if err != nil {
			p.t.Fatal(err)
		}
		if !bytes.Equal(got, step.Bytes) {
			p.t.Fatalf("%s, step %d:\n got %x %v\nwant %x %v", tr.Name, i+1, got, f, step.Bytes, step.Frame)
		}
	}
}

// Must is Load for tests.
func Must(t testing.TB, name string) *Transcript {
	t.Helper()
	tr, err := Load("testdata/" + name + ".txt")
	if err != nil {
		t.Fatal(err)
	}
	return tr
}
