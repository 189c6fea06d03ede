package state

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"

	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/controlplane/wire"
)

// schema is the version of both formats. An agent reads the version before
// its own, and the one after it: fields it does not know are left out, which
// the newer agent then has to cope with.
const schema = 1

const (
	assignmentMagic  = "BLYA"
	assignmentHeader = 4 + 4 + 4 + 4 // magic, version, CRC, length
	logMagic         = "BLYJ"
	logHeader        = 4 + 4 // magic, version
	frameHeader      = 4 + 4 // length, CRC
	// maxPayload bounds what a damaged length can make us believe; the wire
	// carries no more than 4 MiB either.
	maxPayload = 8 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errNewer is no damage: the file is whole, but this agent is too old for it.
var errNewer = errors.New("written by a newer agent")

func checkVersion(v uint32) error {
	if v == 0 {
		return errors.New("version 0")
	}
	if v > schema+1 {
		return fmt.Errorf("%w: format %d, this one reads up to %d", errNewer, v, schema+1)
	}
	return nil
}

// encodeAssignment is the content of an assignment file.
func encodeAssignment(a *wire.Assignment) ([]byte, error) {
	payload, err := proto.MarshalOptions{Deterministic: true}.Marshal(a)
	if err != nil {
		return nil, err
	}
	if len(payload) > maxPayload {
		return nil, fmt.Errorf("assignment of %d bytes is over the limit of %d", len(payload), maxPayload)
	}
	b := make([]byte, 0, assignmentHeader+len(payload))
	b = append(b, assignmentMagic...)
	b = binary.BigEndian.AppendUint32(b, schema)
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(payload, castagnoli))
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...), nil
}

// decodeAssignment reads back what encodeAssignment made.
func decodeAssignment(b []byte) (*wire.Assignment, error) {
	if len(b) < assignmentHeader || string(b[:4]) != assignmentMagic {
		return nil, errors.New("not an assignment file")
	}
	if err := checkVersion(binary.BigEndian.Uint32(b[4:])); err != nil {
		return nil, err
	}
	sum, size := binary.BigEndian.Uint32(b[8:]), binary.BigEndian.Uint32(b[12:])
	payload := b[assignmentHeader:]
	if uint64(size) != uint64(len(payload)) {
		return nil, fmt.Errorf("holds %d bytes instead of %d", len(payload), size)
	}
	if crc32.Checksum(payload, castagnoli) != sum {
		return nil, errors.New("checksum does not match")
	}
	a := &wire.Assignment{}
	if err := proto.Unmarshal(payload, a); err != nil {
		return nil, fmt.Errorf("content: %w", err)
	}
	return a, nil
}

// entry is one frame of the log: a record, or what the journal itself notes.
type entry struct {
	agent.Record
	Forget bool `json:"forget,omitempty"` // everything about Task up to here
	Kept   bool `json:"kept,omitempty"`   // Task has an assignment again
}

func newLog() []byte {
	return binary.BigEndian.AppendUint32([]byte(logMagic), schema)
}

// appendFrame adds an entry to b.
func appendFrame(b []byte, e entry) ([]byte, error) {
	payload, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	if len(payload) > maxPayload {
		return nil, fmt.Errorf("record of %d bytes is over the limit of %d", len(payload), maxPayload)
	}
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(payload, castagnoli))
	return append(b, payload...), nil
}

// frameAt reads the frame at the beginning of b.
func frameAt(b []byte) (e entry, size int, ok bool) {
	if len(b) < frameHeader {
		return e, 0, false
	}
	n := binary.BigEndian.Uint32(b)
	if n == 0 || n > maxPayload || uint64(n) > uint64(len(b)-frameHeader) {
		return e, 0, false
	}
	payload := b[frameHeader : frameHeader+int(n)]
	if crc32.Checksum(payload, castagnoli) != binary.BigEndian.Uint32(b[4:]) {
		return e, 0, false
	}
	if err := json.Unmarshal(payload, &e); err != nil {
		return e, 0, false
	}
	return e, frameHeader + int(n), true
}

// replayed is what a log held.
type replayed struct {
	entries []entry
	good    int // bytes up to the end of the last entry
	// damaged stretches: not the torn tail of a write that power cut short,
	// which nobody was told had succeeded.
	damage []string
}

// replay reads a log. Past a damaged stretch it looks for the next frame that
// checks out, so that one bad sector does not take the rest with it.
func replay(b []byte) (replayed, error) {
	var r replayed
	if len(b) < logHeader {
		return r, nil // power went as it was made
	}
	if string(b[:4]) != logMagic {
		r.damage = append(r.damage, "its beginning is damaged")
	} else if err := checkVersion(binary.BigEndian.Uint32(b[4:])); errors.Is(err, errNewer) {
		return r, err
	} else if err != nil {
		r.damage = append(r.damage, "its version is damaged")
	}
	r.good = logHeader
	for at := logHeader; at < len(b); {
		e, size, ok := frameAt(b[at:])
		if ok {
			r.entries = append(r.entries, e)
			at += size
			r.good = at
			continue
		}
		next := resync(b, at+1)
		if next < 0 {
			if !torn(b[at:]) {
				r.damage = append(r.damage, fmt.Sprintf("%d bytes at offset %d are damaged", len(b)-at, at))
			}
			break
		}
		r.damage = append(r.damage, fmt.Sprintf("%d bytes at offset %d are damaged", next-at, at))
		at = next
	}
	return r, nil
}

// frameStart is how every payload begins: a JSON object with a first key, or
// an empty one.
var frameStart = []byte(`{`)

// resync finds the next whole frame at or after from, or -1.
func resync(b []byte, from int) int {
	for from+frameHeader < len(b) {
		i := bytes.Index(b[from+frameHeader:], frameStart)
		if i < 0 {
			return -1
		}
		at := from + i
		if _, _, ok := frameAt(b[at:]); ok {
			return at
		}
		from = at + 1
	}
	return -1
}

// torn says that what is left is a frame cut short, or blocks that were never
// written: what a power cut leaves of a write.
func torn(b []byte) bool {
	if len(bytes.TrimLeft(b, "\x00")) == 0 || len(b) < frameHeader {
		return true
	}
	n := binary.BigEndian.Uint32(b)
	if n > maxPayload {
		return false
	}
	return uint64(n) > uint64(len(b)-frameHeader) || b[len(b)-1] == 0
}
