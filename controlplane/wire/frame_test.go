package wire

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

func TestFramesSurviveTheWire(t *testing.T) {
	frames := []*Frame{
		{Body: &Frame_Open{Open: &Open{Type: StreamType_STREAM_TYPE_CONTROL}}},
		{Body: &Frame_Chunk{Chunk: &Chunk{Stream: "stdout", Data: bytes.Repeat([]byte{7}, 1<<20)}}},
		{Body: &Frame_Done{Done: &Done{}}},
		{},
	}
	var b bytes.Buffer
	for _, f := range frames {
		if err := WriteFrame(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	r := iotest.OneByteReader(&b)
	for _, want := range frames {
		got, err := ReadFrame(r)
		if err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(got, want) {
			t.Errorf("a %s frame came back as %s", want.Kind(), got.Kind())
		}
	}
	if _, err := ReadFrame(r); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v, want EOF", err)
	}
}

func TestBadFramesAreErrors(t *testing.T) {
	tests := []struct {
		name, in string
		want     error
	}{
		{"nothing", "", io.EOF},
		{"half a length", "\x00\x00", io.ErrUnexpectedEOF},
		{"no body", "\x00\x00\x00\x05", io.ErrUnexpectedEOF},
		{"half a body", "\x00\x00\x00\x05ab", io.ErrUnexpectedEOF},
		{"half of a big body", "\x00\x20\x00\x00" + strings.Repeat("a", 100_000), io.ErrUnexpectedEOF},
		{"too long", "\x00\x40\x00\x01", ErrFrame},
		{"far too long", "\xff\xff\xff\xff", ErrFrame},
		{"HTTP", "GET / HTTP/1.1\r\n\r\n", ErrFrame},
		{"not protobuf", "\x00\x00\x00\x02\x0a\x05", ErrFrame},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := ReadFrame(strings.NewReader(tt.in)); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	big := &Frame{Body: &Frame_Chunk{Chunk: &Chunk{Data: make([]byte, MaxFrame)}}}
	if err := WriteFrame(io.Discard, big); err == nil {
		t.Error("a frame over the limit was written")
	}
}

func TestUnknownFramesAndFieldsAreTolerated(t *testing.T) {
	future := protowire.AppendTag(nil, 777, protowire.BytesType)
	future = protowire.AppendBytes(future, []byte("from a later version"))
	open, err := proto.Marshal(&Open{Type: 99})
	if err != nil {
		t.Fatal(err)
	}
	open = append(open, future...)
	known := protowire.AppendTag(nil, 1, protowire.BytesType)
	known = protowire.AppendBytes(known, open)
	for _, body := range [][]byte{future, append(known, future...)} {
		in := append([]byte{0, 0, 0, byte(len(body))}, body...)
		f, err := ReadFrame(bytes.NewReader(in))
		if err != nil {
			t.Fatal(err)
		}
		if o := f.GetOpen(); o != nil && o.Type != 99 {
			t.Errorf("type %d, want 99", o.Type)
		}
	}
}

func TestCodesKeepTheirNumbers(t *testing.T) {
	seen := map[uint64]string{}
	for code := range codeNumbers {
		n := CodeNumber(code)
		if seen[n] != "" {
			t.Errorf("%s and %s share number %d", code, seen[n], n)
		}
		seen[n] = code
		if CodeOfNumber(n) != code {
			t.Errorf("%s comes back as %s", code, CodeOfNumber(n))
		}
	}
	if CodeNumber("from the future") != CodeNumber(CodeInternal) || CodeOfNumber(12345) != CodeInternal {
		t.Error("an unknown code is not taken as internal")
	}
}

func FuzzReadFrame(f *testing.F) {
	for _, fr := range []*Frame{
		{Body: &Frame_Hello{Hello: &Hello{Version: 1, InstanceId: "i"}}},
		{Body: &Frame_Assignment{Assignment: &Assignment{Sequence: 1, Spec: &TaskSpec{Containers: []*Container{{Name: "a"}}}}}},
		{},
	} {
		b, err := AppendFrame(nil, fr)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("GET / HTTP/1.1\r\n"))
	f.Add([]byte{0, 0x3f, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		for {
			fr, err := ReadFrame(r)
			if err != nil {
				return
			}
			_ = fr.Kind()
			b, err := AppendFrame(nil, fr)
			if err != nil {
				t.Fatalf("what was read cannot be written: %v", err)
			}
			again, err := ReadFrame(bytes.NewReader(b))
			if err != nil || !proto.Equal(fr, again) {
				t.Fatalf("a frame changed on its second way: %v", err)
			}
		}
	})
}
