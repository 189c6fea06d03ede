package api

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// jsonCodec is JSON that says everything: empty lists and zeros are there, so
// that a script need not tell absent from empty, and a field that does not
// exist is an error, so that a slip of the pen is not ignored. Fields with
// presence, exitCode above all, are still there only when they have a value.
type jsonCodec struct{ name string }

// Name implements connect.Codec.
func (c jsonCodec) Name() string { return c.name }

// Marshal implements connect.Codec.
func (jsonCodec) Marshal(m any) ([]byte, error) {
	p, ok := m.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("cannot encode %T as JSON", m)
	}
	return protojson.MarshalOptions{EmitUnpopulated: true}.Marshal(p)
}

// Unmarshal implements connect.Codec.
func (jsonCodec) Unmarshal(b []byte, m any) error {
	p, ok := m.(proto.Message)
	if !ok {
		return fmt.Errorf("cannot decode %T from JSON", m)
	}
	if len(b) == 0 {
		b = []byte("{}") // curl -d '' means: nothing special
	}
	return protojson.Unmarshal(b, p)
}
