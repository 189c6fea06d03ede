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

// decodeAssignment reads back what encodeAssignment made. With an error there
// may be an assignment all the same: what is damaged is only what stands before
// it, and its checksum is right.
func decodeAssignment(b []byte) (*wire.Assignment, error) {
	if len(b) < assignmentHeader {
		return nil, fmt.Errorf("holds %d bytes: it is no assignment", len(b))
	}
	payload := b[assignmentHeader:]
	var damage error
	size := binary.BigEndian.Uint32(b[12:])
	switch {
	case string(b[:4]) != assignmentMagic:
		damage = errors.New("does not begin as an assignment")
	case uint64(size) != uint64(len(payload)):
		damage = fmt.Errorf("holds %d bytes instead of %d", len(payload), size)
	default:
		damage = checkVersion(binary.BigEndian.Uint32(b[4:]))
	}
	if crc32.Checksum(payload, castagnoli) != binary.BigEndian.Uint32(b[8:]) {
		if damage == nil {
			damage = errors.New("checksum does not match")
		}
		return nil, damage
	}
	a := &wire.Assignment{}
	if err := proto.Unmarshal(payload, a); err != nil {
		return nil, fmt.Errorf("content: %w", err)
	}
	return a, damage
}

// entry is one frame of the log: a record, or what the journal itself notes.
type entry struct {
	agent.Record
	Forget bool `json:"forget,omitempty"` // everything about Task up to here
	Kept   bool `json:"kept,omitempty"`   // Task has an assignment again

	// Records that were written together count together: At is the place of
	// this one among them, and More says that it is not the last.
	At   int  `json:"at,omitempty"`
	More bool `json:"more,omitempty"`

	// Schema says the version of the log again, where a checksum covers it.
	Schema uint32 `json:"schema,omitempty"`

	// raw is the payload as it was read, if a newer agent put more into it
	// than this one knows. It is kept for the day that agent is back.
	raw []byte
}

// known says that the entry is of a kind this agent knows.
func (e entry) known() bool {
	return e.Forget || e.Kept || e.Schema != 0 || e.Applied != nil || e.Desired != nil || e.Attempt != nil ||
		e.Status != nil || e.Doubt != nil || e.Away != nil || e.Unused != nil || e.Origin != ""
}

func newLog() []byte {
	b := binary.BigEndian.AppendUint32([]byte(logMagic), schema)
	b, err := appendFrame(b, entry{Schema: schema})
	if err != nil {
		panic("state: encode the log's beginning: " + err.Error()) // a constant
	}
	return b
}

// appendFrame adds an entry to b.
func appendFrame(b []byte, e entry) ([]byte, error) {
	payload, err := e.raw, error(nil)
	if payload == nil {
		payload, err = json.Marshal(e)
	}
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

// newerParts returns the payload to keep when it has what this agent does not
// know, without what tied it to its neighbours; nil when there is nothing.
func newerParts(payload []byte) []byte {
	d := json.NewDecoder(bytes.NewReader(payload))
	d.DisallowUnknownFields()
	if err := d.Decode(&entry{}); err == nil {
		return nil
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(payload, &fields); err != nil {
		return nil
	}
	delete(fields, "at")
	delete(fields, "more")
	kept, err := json.Marshal(fields)
	if err != nil {
		return nil
	}
	return kept
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
		return entry{}, 0, false
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
	version := binary.BigEndian.Uint32(b[4:])
	first, _, _ := frameAt(b[logHeader:])
	switch err := checkVersion(version); {
	case string(b[:4]) != logMagic:
		r.damage = append(r.damage, "its beginning is damaged")
	case errors.Is(err, errNewer) && first.Schema == version:
		return r, err
	case err != nil:
		// Agents of version 3 and later say it again in the first frame.
		r.damage = append(r.damage, fmt.Sprintf("its version %d is damaged", version))
	}
	r.good = logHeader
	var t together
	for at := logHeader; at < len(b); {
		e, size, ok := frameAt(b[at:])
		if ok {
			e.raw = newerParts(b[at+frameHeader : at+size])
			at += size
			if t.add(&r, e) {
				r.good = at
			}
			continue
		}
		next := resync(b, at+1)
		if next < 0 {
			if e, ok := lastFrame(b[at:]); ok {
				// Only its length is damaged.
				t.add(&r, e)
				r.damage = append(r.damage, fmt.Sprintf("4 bytes at offset %d are damaged", at))
			} else if !torn(b[at:]) {
				r.damage = append(r.damage, fmt.Sprintf("%d bytes at offset %d are damaged", len(b)-at, at))
			}
			break
		}
		t.cut(gap{fmt.Sprintf("%d bytes at offset %d are damaged", next-at, at), unwritten(b[at:next])})
		at = next
	}
	t.end(&r)
	return r, nil
}

// together puts the entries of one write together. At the end of the log a
// write may be there in parts: power went, nobody was told that it succeeded,
// and none of it counts. Further up, parts are what damage left.
type together struct {
	parts  []entry // since the last whole write
	broken bool    // something is missing among them
	gaps   []gap
}

// gap is a stretch that does not check out.
type gap struct {
	text      string
	unwritten bool
}

// add takes in the next entry; true: the log is whole up to here.
func (t *together) add(r *replayed, e entry) bool {
	if e.At == 0 {
		t.flush(r) // a new write: what came before it was acknowledged
	} else if e.At != len(t.parts) {
		t.broken = true
	}
	t.parts = append(t.parts, e)
	if e.More || t.broken {
		return false
	}
	t.flush(r)
	return true
}

// cut notes a gap before the next entry.
func (t *together) cut(g gap) {
	t.broken = true
	t.gaps = append(t.gaps, g)
}

func (t *together) flush(r *replayed) {
	if n := len(t.parts); n > 0 && t.parts[n-1].More && len(t.gaps) == 0 {
		r.damage = append(r.damage, "the last of records written together are missing")
	}
	for _, g := range t.gaps {
		r.damage = append(r.damage, g.text)
	}
	r.entries = append(r.entries, t.parts...)
	*t = together{}
}

// end is the end of the log. Sectors that were never written are what power
// leaves; of others nobody knows, and it is better said.
func (t *together) end(r *replayed) {
	for _, g := range t.gaps {
		if !g.unwritten {
			r.damage = append(r.damage, g.text)
		}
	}
	*t = together{}
}

// lastFrame reads a frame that reaches to the end of b, whatever it says of
// its length.
func lastFrame(b []byte) (entry, bool) {
	if len(b) <= frameHeader || len(b)-frameHeader > maxPayload {
		return entry{}, false
	}
	whole := binary.BigEndian.AppendUint32(nil, uint32(len(b)-frameHeader))
	e, _, ok := frameAt(append(whole, b[4:]...))
	if ok {
		e.raw = newerParts(b[frameHeader:])
	}
	return e, ok
}

// unwritten says that a stretch has blocks in it that were never written: no
// frame holds so many zeros in a row.
func unwritten(b []byte) bool { return bytes.Contains(b, make([]byte, 8)) }

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
	return uint64(n) > uint64(len(b)-frameHeader) || unwritten(b)
}
