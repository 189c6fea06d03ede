package carrier

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/belay-edge/belay/controlplane/wire"
)

// cancelled is the code of a stream given up by one side.
const cancelled = 1

func quicConfig(client bool) *quic.Config {
	c := &quic.Config{
		// A device that gives a handshake up does not say so, and it keeps its
		// place among them until then.
		HandshakeIdleTimeout:       5 * time.Second,
		MaxIdleTimeout:             wire.Idle,
		MaxIncomingStreams:         serverStreams,
		MaxIncomingUniStreams:      -1,
		MaxStreamReceiveWindow:     6 << 20,
		MaxConnectionReceiveWindow: 12 << 20,
	}
	if client {
		c.HandshakeIdleTimeout = 10 * time.Second
		c.KeepAlivePeriod = wire.KeepAlive
		c.MaxIncomingStreams = agentStreams
	}
	return c
}

type quicSession struct {
	conn     *quic.Conn
	peer     *x509.Certificate
	protocol string
	doubt    chan struct{} // of a dialled one, see watchSilence and watchNudges
	ended    chan struct{} // closed after conn's end and, for a dialled one, the socket's
}

// newQUICSession takes a connection over; finish runs once it has ended.
func newQUICSession(conn *quic.Conn, finish func()) (*quicSession, error) {
	state := conn.ConnectionState().TLS
	if len(state.PeerCertificates) == 0 {
		return nil, errors.New("the peer showed no certificate")
	}
	s := &quicSession{conn: conn, peer: state.PeerCertificates[0], protocol: state.NegotiatedProtocol, ended: make(chan struct{})}
	context.AfterFunc(conn.Context(), func() {
		defer close(s.ended)
		if finish != nil {
			finish()
		}
	})
	return s, nil
}

func (s *quicSession) OpenStream(ctx context.Context) (wire.Stream, error) {
	st, err := s.conn.OpenStreamSync(ctx)
	if err != nil {
		return nil, fmt.Errorf("open a stream: %w", translate(err))
	}
	return &quicStream{Stream: st}, nil
}

func (s *quicSession) AcceptStream(ctx context.Context) (wire.Stream, error) {
	st, err := s.conn.AcceptStream(ctx)
	if err != nil {
		return nil, translate(err)
	}
	return &quicStream{Stream: st}, nil
}

func (s *quicSession) Close(code, reason string) {
	// Errors only tell that it was closed before. The reason travels in one
	// packet, so it must be short.
	_ = s.conn.CloseWithError(quic.ApplicationErrorCode(wire.CodeNumber(code)), clip(reason, 512))
	<-s.ended
}

// Doubt implements wire.Doubter.
func (s *quicSession) Doubt() <-chan struct{} { return s.doubt }

// Heard implements wire.Pulse.
func (s *quicSession) Heard() uint64 { return s.conn.ConnectionStats().PacketsReceived }

func (s *quicSession) raiseDoubt() {
	select {
	case s.doubt <- struct{}{}:
	default: // one waits
	}
}

func (s *quicSession) Done() <-chan struct{} { return s.ended }

func (s *quicSession) Err() error {
	select {
	case <-s.ended:
		return translate(context.Cause(s.conn.Context()))
	default:
		return nil
	}
}

func (s *quicSession) PeerCertificate() *x509.Certificate { return s.peer }
func (s *quicSession) RemoteAddr() net.Addr               { return s.conn.RemoteAddr() }
func (s *quicSession) Transport() string                  { return wire.TransportQUIC }
func (s *quicSession) Protocol() string                   { return s.protocol }

type quicStream struct {
	*quic.Stream
	finished atomic.Bool
}

func (s *quicStream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	return n, translate(err)
}

func (s *quicStream) Write(p []byte) (int, error) {
	n, err := s.Stream.Write(p)
	return n, translate(err)
}

func (s *quicStream) CloseWrite() error {
	s.finished.Store(true)
	return translate(s.Stream.Close())
}

func (s *quicStream) Close() error {
	s.CancelRead(cancelled)
	if !s.finished.Swap(true) {
		// Close only where CloseWrite was not called: cancelling after it
		// would take back what was written.
		s.CancelWrite(cancelled)
	}
	return nil
}

var errClosedByPeer = errors.New("the other side closed the session")

// translate turns the end of a session by either side into a *wire.Error and
// leaves the rest (io.EOF among them) alone.
func translate(err error) error {
	var closed *quic.ApplicationError
	if !errors.As(err, &closed) {
		return err
	}
	code := wire.CodeOfNumber(uint64(closed.ErrorCode))
	if code == "" && closed.ErrorMessage == "" {
		if closed.Remote {
			return errClosedByPeer
		}
		return net.ErrClosed
	}
	return &wire.Error{Code: code, Message: closed.ErrorMessage}
}

func clip(s string, n int) string {
	if len(s) > n {
		return s[:n]
	}
	return s
}
