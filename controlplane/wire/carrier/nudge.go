package carrier

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"time"
)

// nudge is what a control plane that was started again sends to where its
// sessions were. Its first byte marks it as no packet of QUIC: both of the two
// highest bits are zero. More may follow in a later version.
var nudge = []byte("\x00belay nudge 1\n")

// nudgeInterval is the least time between two doubts that nudges raise: anyone
// who can forge the control plane's address can send them.
const nudgeInterval = 3 * time.Second

// Nudge tells the agent whose QUIC session was at that address, as far as the
// last process here knew, to check whether its session still lives. It is one
// small datagram that nobody answers and that may get lost.
func (l *Listener) Nudge(to netip.AddrPort) error {
	_, err := l.tr.WriteTo(nudge, net.UDPAddrFromAddrPort(to))
	return err
}

// watchNudges calls doubt when a nudge comes from the server's address. That
// proves nothing, so doubt is all there is to it. read gives what arrives at the
// session's socket and is not QUIC; it fails once the socket is closed.
func watchNudges(read func(context.Context, []byte) (int, net.Addr, error), server func() net.Addr, doubt func()) {
	var last time.Time
	b := make([]byte, len(nudge))
	for {
		n, from, err := read(context.Background(), b)
		if err != nil {
			return
		}
		if !bytes.Equal(b[:n], nudge) || addrPort(from) != addrPort(server()) {
			continue
		}
		if now := time.Now(); last.IsZero() || now.Sub(last) >= nudgeInterval {
			last = now
			doubt()
		}
	}
}

// addrPort makes addresses of UDP comparable: one socket may call an IPv4
// address by its IPv6 name. Anything else becomes the zero one.
func addrPort(a net.Addr) netip.AddrPort {
	u, ok := a.(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	p := u.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}
