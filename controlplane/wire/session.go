package wire

import (
	"context"
	"crypto/x509"
	"io"
	"net"
	"time"
)

// Names of transports.
const (
	TransportQUIC = "quic"
	TransportTCP  = "tcp"
)

// Session is one authenticated connection between an agent and a control
// plane. Its methods may be called from several goroutines.
type Session interface {
	// OpenStream opens a stream. The peer learns of it with the first bytes.
	OpenStream(ctx context.Context) (Stream, error)
	// AcceptStream waits for the peer to open one. Streams past the limit of
	// the session are refused before they get here.
	AcceptStream(ctx context.Context) (Stream, error)
	// Close ends the session and every stream. Over QUIC the peer learns code
	// and reason; over TCP only that it ended, so what matters is said in a
	// Goodbye first. A second call does nothing.
	Close(code, reason string)
	// Done is closed once the session has ended, by either side or silence.
	Done() <-chan struct{}
	// Err says why it ended; nil before that. An *Error when a side closed it.
	Err() error
	// PeerCertificate is the leaf the peer proved to hold the key of.
	PeerCertificate() *x509.Certificate
	RemoteAddr() net.Addr
	// Transport is TransportQUIC or TransportTCP.
	Transport() string
	// Protocol is ProtocolTunnel or ProtocolEnroll.
	Protocol() string
}

// Doubter is a Session whose carrier can tell that the other side may be gone
// before it is sure. Whoever holds it should then ask with a Ping.
type Doubter interface {
	// Doubt receives an element each time; nil: never.
	Doubt() <-chan struct{}
}

// Pulse is a Session over a carrier whose other side acknowledges by itself what
// it gets: nothing heard a while after something was sent means that it does not
// get through, not that the other side is slow to answer.
type Pulse interface {
	// Heard counts what came from the other side so far, acknowledgements
	// included.
	Heard() uint64
}

// Stream is one ordered stream of bytes each way. One goroutine may read and
// one write at the same time.
type Stream interface {
	io.Reader
	io.Writer
	// CloseWrite tells the peer that nothing more will be written. What the
	// peer still has to say must follow within seconds: see the package
	// comment on half-close.
	CloseWrite() error
	// Close gives the stream up both ways and frees it. Unless CloseWrite was
	// called before, what was written may not arrive. Every stream needs it.
	Close() error
	SetDeadline(t time.Time) error
	SetReadDeadline(t time.Time) error
	SetWriteDeadline(t time.Time) error
}
