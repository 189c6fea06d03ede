package carrier

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/controlplane/wire"
)

// ListenConfig describes the one port of a control plane.
type ListenConfig struct {
	Address string          // host:port, for TCP and UDP alike
	Tunnel  tls.Certificate // a leaf with the pinned CA in its chain
	API     tls.Certificate // what API clients see; zero: Tunnel
	// ResetKey lets agents notice a restart at once instead of after Idle: it
	// has to stay the same from start to start. Zero: they wait. See CA.Secret.
	ResetKey [32]byte
	Logger   *slog.Logger

	MaxConns         int           // over both transports each; 0: 20000
	MaxHandshakes    int           // unfinished at once, over both transports each; 0: see handshakes. One source address may have half
	HandshakeTimeout time.Duration // 0: 10 s
	HandshakeRate    int           // a second, of devices that knock; 0: 200 for each CPU
}

// Listener is one port, TCP and UDP: tunnels and enrolments from both come out
// of Accept, API connections out of HTTP.
type Listener struct {
	cfg   ListenConfig
	log   *slog.Logger
	tcp   net.Listener
	udp   *net.UDPConn
	quic  *quic.Listener
	tr    *quic.Transport
	http  *httpListener
	found chan wire.Session

	tunnel, api class       // of connections over TCP
	any         *tls.Config // of those that have not said which
	silent      *Sources    // unfinished handshakes over TCP
	fresh       *Sources    // and over QUIC

	stop      context.CancelFunc
	ctx       context.Context
	loops     sync.WaitGroup
	tcpConns  atomic.Int64
	quicConns atomic.Int64
	quicFresh atomic.Int64 // QUIC, not yet accepted

	shed struct {
		mu     sync.Mutex
		n      int // since logged
		logged time.Time
	}
}

// handshakes is how many to work at side by side. One costs this side 2 to 3 ms
// of a core. A device has 2.5 s for one in which nothing has answered: more at
// once than that allows, with a lot to spare, and all are given up and begun
// again, for ever. Too few would be felt where the other side is far away: 128
// with 300 ms between are 400 a second, what a core can do.
func handshakes(cpus int) int { return min(max(256, 128*cpus), 1024) }

// unproven is how many unfinished handshakes over QUIC new callers may join
// without proving their address first: one round trip, no state.
const unproven = 64

// class is one of two sorts of handshakes over TCP. They do not wait for each
// other: a person shall reach the API while ten thousand devices come back.
type class struct {
	conf   *tls.Config
	places *places
}

// Listen opens the port and starts accepting.
func Listen(cfg ListenConfig) (*Listener, error) {
	quietQUIC()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxConns == 0 {
		cfg.MaxConns = 20000
	}
	if cfg.MaxHandshakes == 0 {
		cfg.MaxHandshakes = handshakes(runtime.GOMAXPROCS(0))
	}
	if cfg.HandshakeTimeout == 0 {
		cfg.HandshakeTimeout = 10 * time.Second
	}
	if cfg.HandshakeRate == 0 {
		cfg.HandshakeRate = 200 * runtime.GOMAXPROCS(0)
	}
	if cfg.API.Certificate == nil {
		cfg.API = cfg.Tunnel
	}
	l := &Listener{cfg: cfg, log: cfg.Logger, found: make(chan wire.Session),
		tunnel: class{tunnelTLS(cfg.Tunnel), newPlaces(cfg.MaxHandshakes)}, api: class{apiTLS(cfg.API), newPlaces(max(2, cfg.MaxHandshakes/4))},
		silent: NewSources(max(1, cfg.MaxConns/4)), fresh: NewSources(max(1, cfg.MaxHandshakes/2))}
	l.ctx, l.stop = context.WithCancel(context.Background())
	if err := l.bind(); err != nil {
		l.stop()
		return nil, err
	}
	l.any = &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: l.inTurn}
	l.http = newHTTPListener(l.ctx, l.tcp.Addr())
	l.tr = &quic.Transport{
		Conn:                l.udp,
		VerifySourceAddress: func(net.Addr) bool { return l.quicFresh.Load() >= unproven },
		ConnContext:         l.admit,
		// A reset answers only packets above 42 bytes: with this a ping of
		// the agent is one, with the default of 4 it is not.
		ConnectionIDLength: 16,
	}
	if cfg.ResetKey != [32]byte{} {
		key := quic.StatelessResetKey(cfg.ResetKey)
		l.tr.StatelessResetKey = &key
	}
	var err error
	if l.quic, err = l.tr.Listen(l.tunnel.conf, quicConfig(false)); err != nil {
		l.stop()
		_ = l.tcp.Close()
		_ = l.udp.Close()
		return nil, fmt.Errorf("listen for QUIC on %s: %w", cfg.Address, err)
	}
	l.loops.Go(l.acceptTCP)
	l.loops.Go(l.acceptQUIC)
	l.loops.Go(l.answerKnocks)
	return l, nil
}

// bind takes the same port for TCP and UDP; with port 0, one free for both.
func (l *Listener) bind() error {
	host, port, err := net.SplitHostPort(l.cfg.Address)
	if err != nil {
		return fmt.Errorf("listen on %q: want host:port", l.cfg.Address)
	}
	lc := net.ListenConfig{KeepAlive: -1}
	for try := 0; ; try++ {
		tcp, err := lc.Listen(l.ctx, "tcp", l.cfg.Address)
		if err != nil {
			return listenError(l.cfg.Address, err)
		}
		got := tcp.Addr().(*net.TCPAddr)
		udp, err := lc.ListenPacket(l.ctx, "udp", net.JoinHostPort(host, strconv.Itoa(got.Port)))
		if err == nil {
			l.tcp, l.udp = tcp, udp.(*net.UDPConn)
			return nil
		}
		_ = tcp.Close()
		if port != "0" || try == 20 {
			return listenError(l.cfg.Address, err)
		}
	}
}

func listenError(address string, err error) error {
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("listen on %s: another process has this port, choose one with --listen: %w", address, err)
	}
	return fmt.Errorf("listen on %s: %w", address, err)
}

// Addr is the address of TCP; UDP has the same port.
func (l *Listener) Addr() net.Addr { return l.tcp.Addr() }

// HTTP hands out API connections, TLS done, for an http.Server without a
// TLSConfig: it then speaks HTTP/2 and HTTP/1.1 as negotiated.
func (l *Listener) HTTP() net.Listener { return l.http }

// Accept returns the next session of an agent, enrolments included.
func (l *Listener) Accept(ctx context.Context) (wire.Session, error) {
	select {
	case s := <-l.found:
		return s, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close ends the listener and waits for its loops. Sessions and API connections
// are for whoever took them to end before: what is left of QUIC is cut off
// without a word.
func (l *Listener) Close() error {
	l.stop()
	err := errors.Join(l.tcp.Close(), l.quic.Close(), l.tr.Close(), l.udp.Close())
	l.loops.Wait()
	return err
}

// deliver waits for whoever calls Accept: what piles up before it is bounded
// by MaxConns over TCP, and by quic-go's own queue, which refuses, over QUIC.
func (l *Listener) deliver(s wire.Session) {
	select {
	case l.found <- s:
	case <-l.ctx.Done():
		s.Close(wire.CodeShutdown, "the control plane is shutting down")
	}
}

// admit counts a QUIC connection from its first packet to its end. Who is
// refused is told so before anything was computed, see ErrBusy.
func (l *Listener) admit(ctx context.Context, info *quic.ClientInfo) (context.Context, error) {
	if l.quicFresh.Add(1) > int64(l.cfg.MaxHandshakes) {
		l.quicFresh.Add(-1)
		l.refused()
		return nil, errors.New("too many handshakes")
	}
	source, ok := l.fresh.Take(info.RemoteAddr)
	if !ok {
		l.quicFresh.Add(-1)
		l.refused()
		return nil, errors.New("too many handshakes from there")
	}
	fresh := sync.OnceFunc(func() { source(); l.quicFresh.Add(-1) })
	if l.quicConns.Add(1) > int64(l.cfg.MaxConns) {
		fresh()
		l.quicConns.Add(-1)
		return nil, errors.New("too many connections")
	}
	context.AfterFunc(ctx, func() {
		fresh()
		l.quicConns.Add(-1)
	})
	return context.WithValue(ctx, freshKey{}, fresh), nil
}

// refused logs now and then that handshakes were refused.
func (l *Listener) refused() {
	l.shed.mu.Lock()
	defer l.shed.mu.Unlock()
	l.shed.n++
	if now := time.Now(); now.Sub(l.shed.logged) >= shedLog {
		l.log.Warn("more devices connect than handshakes are done in time: they try again", "refused", l.shed.n, "at a time", l.cfg.MaxHandshakes)
		l.shed.n, l.shed.logged = 0, now
	}
}

// shedLog is how often refused logs.
const shedLog = 10 * time.Second

// freshKey finds in a connection's context what counts its handshake as done.
type freshKey struct{}

func (l *Listener) acceptQUIC() {
	for {
		conn, err := l.quic.Accept(l.ctx)
		if err != nil {
			if l.ctx.Err() == nil {
				l.log.Error("QUIC stopped accepting; agents use TCP until a restart", "err", err)
			}
			return
		}
		if fresh, ok := conn.Context().Value(freshKey{}).(func()); ok {
			fresh()
		}
		s, err := newQUICSession(conn, nil)
		if err != nil {
			_ = conn.CloseWithError(quic.ApplicationErrorCode(wire.CodeNumber(wire.CodeProtocol)), err.Error())
			continue
		}
		l.deliver(s)
	}
}

func (l *Listener) acceptTCP() {
	for {
		raw, err := l.tcp.Accept()
		if err != nil {
			if l.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of file descriptors, most likely: it passes.
			l.log.Warn("accept a TCP connection", "err", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-l.ctx.Done():
			}
			continue
		}
		if l.tcpConns.Load() >= int64(l.cfg.MaxConns) {
			_ = raw.Close()
			l.refused()
			continue
		}
		l.tcpConns.Add(1)
		counted := &countedConn{Conn: raw, free: sync.OnceFunc(func() { l.tcpConns.Add(-1) })}
		l.loops.Go(func() { l.greet(counted) })
	}
}

// turnTimeout is how long a connection over TCP waits for its handshake's turn.
// Whoever gave up before is noticed when it comes.
const turnTimeout = time.Minute

// greet does the handshake of one connection, in its turn, and sends it where
// it belongs.
func (l *Listener) greet(raw *countedConn) {
	over, ok := l.silent.Take(raw.RemoteAddr())
	if !ok {
		_ = raw.Close()
		l.refused()
		return
	}
	conn, err := l.handshake(raw)
	over()
	if err != nil {
		l.log.Debug("TLS handshake", "peer", raw.RemoteAddr(), "err", err)
		_ = raw.Close()
		return
	}
	switch conn.ConnectionState().NegotiatedProtocol {
	case wire.ProtocolTunnel, wire.ProtocolEnroll:
		s, err := newTCPSession(conn, false)
		if err != nil {
			l.log.Debug("start a session", "peer", raw.RemoteAddr(), "err", err)
			_ = conn.Close()
			return
		}
		l.deliver(s)
	default:
		if tcp, ok := raw.Conn.(*net.TCPConn); ok {
			_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true})
		}
		l.http.deliver(conn)
	}
}

// errTurn ends a handshake whose turn did not come in time, or too late for the
// other side.
var errTurn = errors.New("nobody waits for it any more")

// handshake reads what the other side wants, and waits for the turn of that
// before it computes anything.
func (l *Listener) handshake(raw *countedConn) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(l.ctx, turnTimeout+2*l.cfg.HandshakeTimeout)
	defer cancel()
	defer func() {
		if raw.done != nil {
			raw.done()
		}
	}()
	conn := tls.Server(raw, l.any)
	err := raw.SetDeadline(time.Now().Add(l.cfg.HandshakeTimeout))
	if err == nil {
		err = conn.HandshakeContext(ctx)
	}
	if err == nil {
		err = raw.SetDeadline(time.Time{})
	}
	return conn, err
}

// inTurn is called when a connection over TCP has said what it wants.
func (l *Listener) inTurn(h *tls.ClientHelloInfo) (*tls.Config, error) {
	raw, ok := h.Conn.(*countedConn)
	if !ok {
		return nil, fmt.Errorf("a connection of type %T", h.Conn)
	}
	class := l.api
	if forTunnel(h) {
		class = l.tunnel
	}
	waiting, cancel := context.WithTimeout(h.Context(), turnTimeout)
	raw.done = class.places.take(waiting, raw.RemoteAddr())
	cancel()
	if raw.done == nil || hungUp(raw.Conn) {
		_ = raw.Close() // without an alert, which says that something is wrong
		l.refused()
		return nil, errTurn
	}
	return class.conf, raw.SetDeadline(time.Now().Add(l.cfg.HandshakeTimeout))
}

// hungUp tells whether the other side has closed a connection, whatever it may
// have sent before: then the handshake is for nobody.
func hungUp(c net.Conn) bool {
	s, ok := c.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return false
	}
	gone := false
	_ = raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		gone = err == nil && info.State != established
	})
	return gone
}

// established is TCP_ESTABLISHED of the kernel's net/tcp_states.h.
const established = 1

// countedConn gives its place back when it is closed.
type countedConn struct {
	net.Conn
	free func()
	done func() // the handshake's place; nil: it has none
}

func (c *countedConn) Close() error {
	c.free()
	return c.Conn.Close()
}

// httpListener is a net.Listener over connections that arrive by channel. They
// are *tls.Conn, which is how http.Server learns what ALPN chose. Closing it
// leaves the tunnels alone.
type httpListener struct {
	addr  net.Addr
	conns chan net.Conn
	done  context.Context
	close context.CancelFunc
}

func newHTTPListener(ctx context.Context, addr net.Addr) *httpListener {
	h := &httpListener{addr: addr, conns: make(chan net.Conn)}
	h.done, h.close = context.WithCancel(ctx)
	return h
}

func (h *httpListener) deliver(c net.Conn) {
	select {
	case h.conns <- c:
	case <-h.done.Done():
		_ = c.Close()
	}
}

func (h *httpListener) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done.Done():
		return nil, net.ErrClosed
	}
}

func (h *httpListener) Close() error {
	h.close()
	return nil
}

func (h *httpListener) Addr() net.Addr { return h.addr }
