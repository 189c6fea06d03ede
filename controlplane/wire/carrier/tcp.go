package carrier

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"

	"github.com/belay-edge/belay/controlplane/wire"
)

func yamuxConfig(client bool) *yamux.Config {
	c := yamux.DefaultConfig()
	c.LogOutput = io.Discard // what matters comes back as errors
	c.AcceptBacklog = serverStreams
	if client {
		c.AcceptBacklog = agentStreams
	}
	// The client shows life, the server answers: as with QUIC.
	c.EnableKeepAlive = client
	c.KeepAliveInterval = wire.KeepAliveTCP
	// Also how long a keepalive may stay unanswered.
	c.ConnectionWriteTimeout = wire.Idle - wire.KeepAliveTCP
	c.StreamOpenTimeout = wire.Idle
	c.StreamCloseTimeout = halfClosed
	c.MaxStreamWindowSize = 1 << 20
	return c
}

// tcpSession is yamux over TLS.
type tcpSession struct {
	mux      *yamux.Session
	conn     *watchedConn
	peer     *x509.Certificate
	protocol string
	max      int32 // streams of the peer at once
	open     atomic.Int32

	mu     sync.Mutex
	reason *wire.Error // given to Close
}

func newTCPSession(conn *tls.Conn, client bool) (*tcpSession, error) {
	state := conn.ConnectionState()
	if len(state.PeerCertificates) == 0 {
		return nil, errors.New("the peer showed no certificate")
	}
	s := &tcpSession{
		conn: &watchedConn{Conn: conn}, peer: state.PeerCertificates[0],
		protocol: state.NegotiatedProtocol, max: serverStreams,
	}
	start := yamux.Server
	if client {
		start, s.max = yamux.Client, agentStreams
	}
	var err error
	if s.mux, err = start(s.conn, yamuxConfig(client)); err != nil {
		return nil, fmt.Errorf("start multiplexing: %w", err)
	}
	return s, nil
}

func (s *tcpSession) OpenStream(ctx context.Context) (wire.Stream, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	st, err := s.mux.OpenStream()
	if err != nil {
		return nil, fmt.Errorf("open a stream: %w", s.cause(err))
	}
	return &tcpStream{Stream: st, free: func() {}}, nil
}

func (s *tcpSession) AcceptStream(ctx context.Context) (wire.Stream, error) {
	for {
		st, err := s.mux.AcceptStreamWithContext(ctx)
		if err != nil {
			return nil, s.cause(err)
		}
		if s.open.Add(1) > s.max {
			s.open.Add(-1)
			_ = st.Close()
			continue
		}
		return &tcpStream{Stream: st, free: sync.OnceFunc(func() { s.open.Add(-1) })}, nil
	}
}

func (s *tcpSession) Close(code, reason string) {
	s.mu.Lock()
	if s.reason == nil {
		s.reason = &wire.Error{Code: code, Message: reason}
	}
	s.mu.Unlock()
	// The writer of yamux may hang in a connection that takes nothing, and
	// its Close waits for the writer: this frees it.
	s.conn.closing.Store(true)
	_ = s.conn.SetWriteDeadline(time.Now().Add(lastWords))
	_ = s.mux.Close()
}

func (s *tcpSession) Done() <-chan struct{} { return s.mux.CloseChan() }

func (s *tcpSession) Err() error {
	select {
	case <-s.mux.CloseChan():
		return s.cause(io.EOF)
	default:
		return nil
	}
}

// cause finds why the session ended, which yamux does not tell.
func (s *tcpSession) cause(err error) error {
	if !s.mux.IsClosed() {
		return err
	}
	s.mu.Lock()
	reason := s.reason
	s.mu.Unlock()
	if reason != nil {
		return reason
	}
	if failed := s.conn.failed.Load(); failed != nil {
		return *failed
	}
	return err
}

func (s *tcpSession) PeerCertificate() *x509.Certificate { return s.peer }
func (s *tcpSession) RemoteAddr() net.Addr               { return s.conn.RemoteAddr() }
func (s *tcpSession) Transport() string                  { return wire.TransportTCP }
func (s *tcpSession) Protocol() string                   { return s.protocol }

type tcpStream struct {
	*yamux.Stream
	free func()
}

// CloseWrite is all that yamux knows of closing: the peer's data may be read
// for as long as halfClosed.
func (s *tcpStream) CloseWrite() error { return s.Stream.Close() }

func (s *tcpStream) Close() error {
	s.free()
	// Nobody reads any more: a peer that still writes is woken by its window
	// or by the reset that yamux sends after halfClosed.
	return s.Stream.Close()
}

// watchedConn ends a connection that has been silent, or has taken nothing,
// for too long, and remembers what ended it.
type watchedConn struct {
	*tls.Conn
	failed  atomic.Pointer[error]
	closing atomic.Bool
}

func (c *watchedConn) Read(p []byte) (int, error) {
	if err := c.SetReadDeadline(time.Now().Add(wire.Idle)); err != nil {
		return 0, c.note(err)
	}
	n, err := c.Conn.Read(p)
	return n, c.note(err)
}

func (c *watchedConn) Write(p []byte) (int, error) {
	stall := writeStall
	if c.closing.Load() {
		stall = lastWords
	}
	if err := c.SetWriteDeadline(time.Now().Add(stall)); err != nil {
		return 0, c.note(err)
	}
	n, err := c.Conn.Write(p)
	return n, c.note(err)
}

func (c *watchedConn) note(err error) error {
	if err != nil {
		c.failed.CompareAndSwap(nil, &err)
	}
	return err
}
