package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"
)

// ErrFrame is wrapped by every error that means the peer sent bytes that are
// no frame. The session is to be ended with CodeProtocol.
var ErrFrame = errors.New("not a frame")

// eagerly is how much is allocated on the word of a length alone; beyond it
// memory grows with what really arrives.
const eagerly = 64 << 10

// ReadFrame reads one frame. io.EOF means the stream ended between frames,
// io.ErrUnexpectedEOF that it ended inside one. A frame with a body unknown to
// this build has a nil Body and is to be ignored.
func ReadFrame(r io.Reader) (*Frame, error) { return ReadFrameMax(r, MaxFrame) }

// ReadFrameMax is ReadFrame for frames of at most max bytes.
func ReadFrameMax(r io.Reader, max int) (*Frame, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if int64(size) > int64(max) {
		return nil, fmt.Errorf("%w: it announces %d bytes, at most %d are allowed", ErrFrame, size, max)
	}
	body, err := readBody(r, int(size))
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	f := new(Frame)
	if err := proto.Unmarshal(body, f); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrFrame, err)
	}
	return f, nil
}

func readBody(r io.Reader, size int) ([]byte, error) {
	body := make([]byte, min(size, eagerly))
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, err
	}
	for len(body) < size {
		had := len(body)
		grown := make([]byte, min(size, had*4))
		copy(grown, body)
		body = grown
		if _, err := io.ReadFull(r, body[had:]); err != nil {
			return nil, err
		}
	}
	return body, nil
}

// AppendFrame appends the encoding of f to b. The same frame always encodes
// to the same bytes.
func AppendFrame(b []byte, f *Frame) ([]byte, error) {
	start := len(b)
	b = append(b, 0, 0, 0, 0)
	b, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend(b, f)
	if err != nil {
		return b[:start], fmt.Errorf("encode %s frame: %w", f.Kind(), err)
	}
	size := len(b) - start - 4
	if size > MaxFrame {
		return b[:start], fmt.Errorf("encode %s frame: %d bytes, at most %d are allowed", f.Kind(), size, MaxFrame)
	}
	binary.BigEndian.PutUint32(b[start:], uint32(size))
	return b, nil
}

// WriteFrame writes one frame in one Write.
func WriteFrame(w io.Writer, f *Frame) error {
	b, err := AppendFrame(nil, f)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// Kind names the body of a frame for logs, without its content.
func (x *Frame) Kind() string {
	m := x.ProtoReflect()
	if f := m.WhichOneof(m.Descriptor().Oneofs().ByName("body")); f != nil {
		return string(f.Name())
	}
	return "unknown"
}
