package link

import (
	"context"
	"errors"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

// What a search does so that a control plane which is silent, or has thousands
// of devices to take back, is spared handshakes that lead nowhere.

const (
	// outright is how many waves there are to one whose tries over QUIC begin
	// with the handshake, as the very first does, and outrightQUIC the same where
	// there is no TCP. The others knock before, which costs next to nothing, and
	// after the end of a session many may come at once; but something on the way
	// may let QUIC through and no knock.
	outright     = 32
	outrightQUIC = 8
	// busyPatience is how long a control plane may be too busy for QUIC before
	// TCP is tried: a handshake costs it the same there.
	busyPatience = time.Minute
	// lastCall is how long QUIC has once TCP has got through: a link that is
	// back lets both pass, and which one's next packet was due first is chance.
	lastCall = 300 * time.Millisecond
	// knockTime is how much longer it has where it knocks before.
	knockTime = 150 * time.Millisecond
)

// knocks tells whether the wave of number n knocks before it begins handshakes.
func (s *search) knocks(n int) bool {
	if s.crowded {
		n++
	}
	every := outright
	if s.l.cfg.Transport == wire.TransportQUIC {
		every = outrightQUIC
	}
	return !s.probe && n%every != 0
}

// note remembers how a try has ended, and tells whether its address is not to
// be tried over TCP as well: it is busy, and has not been so for long.
func (s *search) note(way way, err error) (spare bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		return false
	}
	s.latest[way] = err
	switch {
	case way.transport != wire.TransportQUIC:
		return false
	case !errors.Is(err, carrier.ErrBusy):
		delete(s.busy, way.address)
		return false
	}
	since, known := s.busy[way.address]
	if !known {
		since = time.Now()
		s.busy[way.address] = since
	}
	return time.Since(since) < busyPatience
}

// callQUIC tries QUIC anew and waits a moment for it.
func (s *search) callQUIC(ctx, tries context.Context, address string) {
	over := make(chan struct{})
	s.work.Go(func() {
		defer close(over)
		conn, err := s.dial(tries, way{wire.TransportQUIC, address}, freshTimeout, s.crowded)
		if err == nil {
			// What comes of it, the tries of the wave would tell, too.
			_ = s.use(ctx, tries, conn, way{wire.TransportQUIC, address})
		}
	})
	last := lastCall
	if s.crowded {
		last += knockTime
	}
	t := time.NewTimer(last)
	defer t.Stop()
	select {
	case <-over:
	case <-t.C:
	case <-tries.Done():
	}
}

// isBusy tells whether the control plane there said so last, over QUIC.
func (s *search) isBusy(address string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.busy[address].IsZero()
}
