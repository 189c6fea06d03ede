package wiretest

import (
	"bytes"
	"flag"
	"os"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/controlplane/wire"
)

var update = flag.Bool("update", false, "write the bytes of new transcripts; never for one that was released")

// What version 1 put on the wire is decoded, and encoded again to the same
// bytes, for ever.
func TestTranscriptsAreKept(t *testing.T) {
	names, err := Names()
	if err != nil || len(names) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			if *update {
				text, err := os.ReadFile(name)
				if err != nil {
					t.Fatal(err)
				}
				out, err := format(text)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name, out, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			tr, err := Load(name)
			if err != nil {
				t.Fatal(err)
			}
			for i, step := range tr.Steps {
				f, err := wire.ReadFrame(bytes.NewReader(step.Bytes))
				if err != nil {
					t.Fatalf("step %d: %v", i+1, err)
				}
				if !proto.Equal(f, step.Frame) {
					t.Errorf("step %d decodes as %v, want %v", i+1, f, step.Frame)
				}
				b, err := wire.AppendFrame(nil, step.Frame)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(b, step.Bytes) {
					t.Errorf("step %d encodes as %x, want %x", i+1, b, step.Bytes)
				}
			}
		})
	}
}

func TestFutureFramesAreFramesWithoutABody(t *testing.T) {
	for range 100 {
		f, err := wire.ReadFrame(bytes.NewReader(Future()))
		if err != nil || f.Body != nil {
			t.Fatalf("%v, %v", f, err)
		}
	}
}
