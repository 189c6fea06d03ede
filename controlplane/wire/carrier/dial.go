package carrier

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/quic-go/quic-go"

	"github.com/belay-edge/belay/controlplane/wire"
)

// DialConfig says whom to call and as whom.
type DialConfig struct {
	Address     string          // host:port
	Transport   string          // wire.TransportQUIC or wire.TransportTCP
	Protocol    string          // wire.ProtocolTunnel or wire.ProtocolEnroll
	Certificate tls.Certificate // the device's, see SelfSigned
	Pins        []wire.Pin      // keys of CAs to accept, at least one
	Proxy       *Proxy          // for TCP; nil: directly
	Resolver    *Resolver       // nil: one that remembers nothing
	Answered    func()          // called once when the other side has answered and the handshake goes on; nil: nobody asks
	// Knock asks first whether to begin the handshake, see ask; over QUIC only. Let
	// is called when it may begin, by an answer that nothing proves to be the
	// control plane's; nil: nobody asks.
	Knock bool
	Let   func()
}

// Dial opens a session. ctx bounds the dialling only. Errors: ErrWrongPin,
// ErrNotControlPlane, ErrUnreachable, ErrBusy or a *BusyError.
func Dial(ctx context.Context, cfg DialConfig) (wire.Session, error) {
	if err := wire.CheckAddress(cfg.Address); err != nil {
		return nil, err
	}
	host, _, _ := net.SplitHostPort(cfg.Address)
	conf := clientTLS(cfg.Certificate, cfg.Pins, cfg.Protocol, host)
	if cfg.Resolver == nil {
		cfg.Resolver = NewResolver(nil, nil)
	}
	if cfg.Answered == nil {
		cfg.Answered = func() {}
	}
	cfg.Answered = sync.OnceFunc(cfg.Answered)
	if cfg.Let == nil {
		cfg.Let = func() {}
	}
	verify := conf.VerifyConnection
	conf.VerifyConnection = func(s tls.ConnectionState) error {
		cfg.Answered()
		return verify(s)
	}
	var s wire.Session
	var err error
	switch cfg.Transport {
	case wire.TransportQUIC:
		s, err = dialQUIC(ctx, cfg, conf)
	case wire.TransportTCP:
		s, err = dialTCP(ctx, cfg, conf)
	default:
		return nil, fmt.Errorf("transport %q: want %s or %s", cfg.Transport, wire.TransportQUIC, wire.TransportTCP)
	}
	if err != nil {
		return nil, fmt.Errorf("dial %s over %s: %w", cfg.Address, cfg.Transport, classify(err))
	}
	return s, nil
}

func dialTCP(ctx context.Context, cfg DialConfig, conf *tls.Config) (wire.Session, error) {
	var raw net.Conn
	var err error
	through := cfg.Proxy.of(cfg.Address)
	if through != nil {
		raw, err = dialProxy(ctx, through, cfg.Address, cfg.Resolver)
	} else {
		raw, err = dialDirect(ctx, cfg.Address, cfg.Resolver)
	}
	var s wire.Session
	if err == nil {
		cfg.Answered()
		s, err = overTLS(ctx, raw, conf)
	}
	if err != nil && through != nil {
		err = &proxyError{describe(through), classify(err)}
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Reach asks whether anything takes TCP connections at an address, through the
// proxy if that is the way there, and by nothing that was used before.
func Reach(ctx context.Context, address string, proxy *Proxy) error {
	var raw net.Conn
	var err error
	if through := proxy.of(address); through != nil {
		raw, err = dialProxy(ctx, through, address, NewResolver(nil, nil))
	} else {
		raw, err = dialDirect(ctx, address, NewResolver(nil, nil))
	}
	if err != nil {
		return err
	}
	return raw.Close()
}

// dialDirect races the addresses of the host.
func dialDirect(ctx context.Context, address string, r *Resolver) (net.Conn, error) {
	addrs, err := r.resolve(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return race(ctx, len(addrs), func(ctx context.Context, i int) (net.Conn, error) {
		// Keepalives of TCP would cost traffic that the session's own make
		// unnecessary.
		d := net.Dialer{KeepAlive: -1}
		return d.DialContext(ctx, "tcp", addrs[i].String())
	}, func(late net.Conn) { _ = late.Close() })
}

func overTLS(ctx context.Context, raw net.Conn, conf *tls.Config) (wire.Session, error) {
	conn := tls.Client(raw, conf)
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, err
	}
	s, err := newTCPSession(conn, true)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return s, nil
}

// dialQUIC races the addresses of the host: a UDP port where nobody listens only
// stays silent, as ::1 does when a control plane listens on 127.0.0.1.
func dialQUIC(ctx context.Context, cfg DialConfig, conf *tls.Config) (wire.Session, error) {
	addrs, err := cfg.Resolver.resolve(ctx, "udp", cfg.Address)
	if err != nil {
		return nil, err
	}
	return race(ctx, len(addrs), func(ctx context.Context, i int) (wire.Session, error) {
		return dialQUICAddr(ctx, cfg, addrs[i], conf)
	}, func(late wire.Session) { late.Close("", "") })
}

func dialQUICAddr(ctx context.Context, cfg DialConfig, addr netip.AddrPort, conf *tls.Config) (wire.Session, error) {
	quietQUIC()
	// A wildcard socket, never connected: it survives a change of the
	// device's address and a NAT that forgets.
	sock, err := net.ListenUDP("udp", nil)
	if err != nil {
		return nil, fmt.Errorf("open a UDP socket: %w", err)
	}
	if cfg.Knock {
		if err := ask(ctx, sock, addr); err != nil {
			_ = sock.Close()
			return nil, err
		}
		cfg.Let()
	}
	tr := &quic.Transport{Conn: sock}
	release := func() {
		_ = tr.Close()
		_ = sock.Close()
	}
	conn, err := tr.Dial(ctx, net.UDPAddrFromAddrPort(addr), conf, quicConfig(true))
	if err != nil {
		release()
		return nil, err
	}
	s, err := newQUICSession(conn, release)
	if err != nil {
		_ = conn.CloseWithError(0, "")
		release()
		return nil, err
	}
	s.doubt = make(chan struct{}, 1)
	go watchSilence(s)
	go watchNudges(tr.ReadNonQUICPacket, conn.RemoteAddr, s.raiseDoubt)
	return s, nil
}

// watchSilence signals doubt when packets were sent and nothing came back for
// some time. quic-go itself gives up only after wire.Idle, and a control plane
// that was started again does not reset a connection for packets as small as a
// keepalive; its nudge, which may get lost, is quicker. It may be wrong (an acknowledgement needs no answer, a probe of
// the path's MTU gets none where it is too big): the answer to a ping decides.
func watchSilence(s *quicSession) {
	tick := time.NewTicker(silenceCheck)
	defer tick.Stop()
	stats := s.conn.ConnectionStats()
	sent, received := stats.PacketsSent, stats.PacketsReceived
	silent := time.Duration(0) // for so long something sent was not answered
	for {
		select {
		case <-s.ended:
			return
		case <-tick.C:
		}
		stats = s.conn.ConnectionStats()
		switch {
		case stats.PacketsReceived != received:
			sent, received, silent = stats.PacketsSent, stats.PacketsReceived, 0
		case stats.PacketsSent == sent:
		default:
			if silent += silenceCheck; silent < silenceLimit {
				continue
			}
			sent, silent = stats.PacketsSent, 0
			s.raiseDoubt()
		}
	}
}

const (
	silenceCheck = 2 * time.Second
	silenceLimit = 4 * time.Second
)

// noProtocol is TLS's alert for ALPN without a common name (RFC 7301).
const noProtocol = 120

// classify puts one of the package's errors around what the libraries say.
func classify(err error) error {
	var proxied *proxyError
	if errors.As(err, &proxied) {
		return err // classified before it was wrapped
	}
	if errors.Is(err, ErrProxy) {
		return fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	if errors.Is(err, ErrWrongPin) || errors.Is(err, ErrNotControlPlane) {
		return plain(err)
	}
	var remote *net.OpError
	if errors.As(err, &remote) && remote.Op == "remote error" {
		// A TLS server that does not know our protocol, or none of ours.
		return fmt.Errorf("%w (%w)", ErrNotControlPlane, remote.Err)
	}
	var transport *quic.TransportError
	if errors.As(err, &transport) {
		if transport.ErrorCode.IsCryptoError() {
			if transport.ErrorCode == 0x100+noProtocol || transport.Remote {
				return fmt.Errorf("%w (%w)", ErrNotControlPlane, err)
			}
			return err
		}
		if transport.ErrorCode == quic.ConnectionRefused {
			return fmt.Errorf("%w: %w", ErrUnreachable, ErrBusy)
		}
	}
	var version *quic.VersionNegotiationError
	var record tls.RecordHeaderError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &version), errors.As(err, &record), errors.As(err, &unknown):
		return fmt.Errorf("%w (%w)", ErrNotControlPlane, err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF),
		// Only after TCP connected: a refused connection reads otherwise.
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return fmt.Errorf("%w (it closed the connection)", ErrNotControlPlane)
	case errors.Is(err, context.Canceled):
		return err
	}
	var dns *net.DNSError
	var timeout interface{ Timeout() bool }
	switch {
	case errors.As(err, &dns):
		return fmt.Errorf("%w: the name %q is not known to DNS (%s)", ErrUnreachable, dns.Name, dns.Err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w: connection refused, nothing listens there", ErrUnreachable)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Errorf("%w in time", ErrUnreachable)
	}
	if strings.HasPrefix(err.Error(), "tls:") {
		return fmt.Errorf("%w (%w)", ErrNotControlPlane, err)
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

// plain drops what quic-go and crypto/tls wrapped around our own error.
func plain(err error) error {
	if errors.Is(err, ErrWrongPin) {
		return ErrWrongPin
	}
	return ErrNotControlPlane
}
