// Package carrier moves the sessions of package wire: over QUIC, and over TLS
// 1.3 on TCP with yamux, both behind wire.Session, for both ends. It also holds
// what their TLS needs: device keys, the control plane's CA, and the checks that
// take the place of names and validity times.
package carrier

import (
	"errors"
	"os"
	"sync"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// Reasons a dial failed, for errors.Is.
var (
	// ErrWrongPin: a control plane answered, but not the pinned one.
	ErrWrongPin = errors.New("the control plane has another key than the one pinned")
	// ErrNotControlPlane: something answered that does not speak Belay.
	ErrNotControlPlane = errors.New("this is not a Belay control plane")
	// ErrUnreachable: nothing answered.
	ErrUnreachable = errors.New("no answer")
	// ErrBusy, an ErrUnreachable too: it has more handshakes under way than it
	// takes at once. It is alive, and another way to it would be no quicker.
	ErrBusy = errors.New("the control plane is busy")
)

const (
	// agentStreams is how many streams a control plane may have open on an
	// agent at once, and serverStreams the reverse: an agent opens few.
	agentStreams  = 64
	serverStreams = 16

	// writeStall is how long a TCP peer may refuse to take bytes.
	writeStall = wire.Idle
	// lastWords is how long a session that is being closed may still write.
	lastWords = time.Second
	// halfClosed is how long a yamux stream closed by one side is kept.
	halfClosed = 30 * time.Second
)

// quietQUIC keeps quic-go from printing advice about socket buffers to stderr:
// the packages ship a sysctl for it, and the advice is not for whoever types a
// command. The library reads only the environment.
var quietQUIC = sync.OnceFunc(func() {
	const name = "QUIC_GO_DISABLE_RECEIVE_BUFFER_WARNING"
	if _, set := os.LookupEnv(name); !set {
		_ = os.Setenv(name, "true")
	}
})
