package hub

import (
	"context"
	"net"
	"net/netip"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// Peers remembers, past the end of this process, where the QUIC sessions of
// instances are: *peers.Book. Its methods do not block.
type Peers interface {
	// Put says where an instance's session is; the zero address: nowhere.
	Put(instance string, addr netip.AddrPort)
	// Left are the sessions of the process before of instances not put since.
	Left() map[string]netip.AddrPort
	// Forget drops what is left.
	Forget()
}

// Nudger is an Acceptor that can tell whoever was at an address to check its
// session: *carrier.Listener.
type Nudger interface {
	Nudge(to netip.AddrPort) error
}

const (
	// Nudges go out at these times after the start, at nudgeRate in a second,
	// so that ten thousand devices do not come back in one wave.
	nudgeRate  = 1000
	nudgeBatch = 10
	// nudgeForget is when devices that did not come back are forgotten. Until
	// then a second crash does not lose them.
	nudgeForget = 15 * time.Second
	// whereaboutsInterval is how often changed addresses (NATs give new ones)
	// are looked for.
	whereaboutsInterval = 30 * time.Second
)

var nudgeRounds = []time.Duration{0, time.Second, 3 * time.Second}

// keepPeers nudges whoever was connected to the process before, then follows
// the addresses of those connected to this one.
func (h *Hub) keepPeers(ctx context.Context, n Nudger) {
	begun := time.Now()
	were := len(h.cfg.Peers.Left())
	for _, round := range nudgeRounds {
		if !pause(ctx, round-time.Since(begun)) || !h.nudgeLeft(ctx, n) {
			return
		}
	}
	if !pause(ctx, nudgeForget-time.Since(begun)) {
		return
	}
	if were > 0 {
		h.log.Info("nudged the devices of the process before", "connected", were, "absent", len(h.cfg.Peers.Left()))
	}
	h.cfg.Peers.Forget()
	for pause(ctx, whereaboutsInterval) {
		h.mu.Lock()
		for _, s := range h.sessions {
			h.cfg.Peers.Put(s.instance, whereabouts(s.wire))
		}
		h.mu.Unlock()
	}
}

// nudgeLeft nudges everyone who is not back yet, once.
func (h *Hub) nudgeLeft(ctx context.Context, n Nudger) bool {
	sent := 0
	for instance, addr := range h.cfg.Peers.Left() {
		if sent++; sent%nudgeBatch == 0 && !pause(ctx, nudgeBatch*time.Second/nudgeRate) {
			return false
		}
		if _, back := h.Session(instance); back {
			continue
		}
		// A network that is not there now; the next round or the device's own
		// patience makes up for it.
		if err := n.Nudge(addr); err != nil {
			h.log.Debug("nudge a device", "instance", instance, "to", addr, "err", err)
		}
	}
	return true
}

// whereabouts is the address a session can be nudged at; the zero one for a
// session over TCP, which the kernel resets.
func whereabouts(s wire.Session) netip.AddrPort {
	u, ok := s.RemoteAddr().(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	p := u.AddrPort()
	return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
}

// pause returns false when ctx ends first.
func pause(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
