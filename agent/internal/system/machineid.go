package system

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"
)

// machineSalt keeps the hash from matching the one any other program makes of
// the same machine id, as machine-id(5) asks for.
const machineSalt = "belay machine id v1"

// machineID hashes what is constant about this very device. The machine id
// alone is not enough: images of cards are cloned with theirs inside, so the
// serial numbers that are readable go in too (HARDWARE 7).
func (t tree) machineID() string {
	id := t.read("etc/machine-id")
	if id == "uninitialized" { // machine-id(5): an image before its first boot
		id = ""
	}
	serials := []string{
		t.deviceTree("serial-number"), // Jetson and Raspberry Pi
		t.dmiField("product_serial"),  // root only
		t.dmiField("board_serial"),
		t.dmiField("product_uuid"),
	}
	if id == "" && strings.Join(serials, "") == "" {
		return ""
	}
	h := sha256.New()
	for _, s := range append([]string{machineSalt, id}, serials...) {
		h.Write([]byte(s))
		h.Write([]byte{0})
	}
	return hex.EncodeToString(h.Sum(nil))
}
