package link

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

const (
	// quicHeadStart is how long QUIC may take to register before TCP is tried.
	quicHeadStart = 2 * time.Second
	// registerTimeout is the same for a transport that is the only or last one.
	registerTimeout = 15 * time.Second
)

// Run keeps a session up until ctx ends; then it returns nil. It never gives
// up: what it cannot reach or what refuses it is tried again.
func (l *Link) Run(ctx context.Context) error {
	if l.down == nil {
		return errors.New("link: Attach was not called")
	}
	back := newBackoff(time.Now(), l.cfg.rand)
	said := complaints{}
	for ctx.Err() == nil {
		l.setStatus(func(s *Status) {
			s.State, s.Transport, s.Address, s.NextTry = StateConnecting, "", "", time.Time{}
		})
		registered, err := l.round(ctx) // when; zero: not
		if ctx.Err() != nil {
			break
		}
		if !registered.IsZero() {
			back.reset(time.Now(), time.Since(registered))
			said = complaints{}
		}
		wait := back.next(time.Now(), err)
		if said.worth(err, time.Now()) {
			l.complain(err, wait)
		}
		l.setStatus(func(s *Status) {
			s.State, s.Transport, s.Address = StateWaiting, "", ""
			s.NextTry, s.LastError = time.Now().Add(wait), err.Error()
		})
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
	l.setStatus(func(s *Status) { s.State, s.Transport, s.Address, s.NextTry = StateWaiting, "", "", time.Time{} })
	return nil
}

// round tries every address over every transport allowed until one registers,
// and serves that session to its end.
func (l *Link) round(ctx context.Context) (registered time.Time, err error) {
	l.mu.Lock()
	addresses := l.addresses
	l.mu.Unlock()
	var failed []error
	for _, address := range addresses {
		for _, try := range plan(l.cfg.Transport) {
			s, err := l.register(ctx, try, address)
			if err == nil {
				l.prefer(address)
				registered = time.Now()
				return registered, s.serve(ctx)
			}
			failed = append(failed, err)
			if ctx.Err() != nil {
				return registered, ctx.Err()
			}
			var refusal *wire.Error
			if errors.As(err, &refusal) {
				// The control plane has spoken: another way to it is still
				// the same control plane.
				return registered, err
			}
			if errors.Is(err, carrier.ErrWrongPin) {
				break // so is another transport
			}
		}
	}
	return registered, joined(failed)
}

// attempt is one transport and how long it has to register.
type attempt struct {
	transport string
	within    time.Duration
}

func plan(transport string) []attempt {
	if transport == TransportAuto {
		return []attempt{{wire.TransportQUIC, quicHeadStart}, {wire.TransportTCP, registerTimeout}}
	}
	return []attempt{{transport, registerTimeout}}
}

// register dials and says hello. The session it returns is registered.
func (l *Link) register(ctx context.Context, try attempt, address string) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, try.within)
	defer cancel()
	conn, err := l.cfg.dial(ctx, try.transport, address)
	if err != nil {
		return nil, err
	}
	s, err := l.hello(ctx, conn)
	if err != nil {
		code := ""
		if errors.Is(err, wire.ErrFrame) {
			code = wire.CodeProtocol
		}
		conn.Close(code, "")
		return nil, fmt.Errorf("register at %s over %s: %w", address, try.transport, err)
	}
	s.address = address
	return s, nil
}

// prefer puts the address that worked first.
func (l *Link) prefer(address string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ordered := []string{address}
	for _, a := range l.addresses {
		if a != address {
			ordered = append(ordered, a)
		}
	}
	l.addresses = ordered
}

// complaints are what was logged since the link was lost. Offline is a normal
// state that may last for weeks: a log on flash must not grow by every try.
type complaints struct {
	seen map[string]bool
	at   time.Time // of the last
}

const (
	complainAgain = time.Hour // what was said before is said again
	mostNews      = 16        // errors that may be new until then
)

// worth says whether to log a failed try.
func (c *complaints) worth(err error, now time.Time) bool {
	again := now.Sub(c.at) >= complainAgain
	if again {
		c.seen = map[string]bool{}
	}
	if c.seen[err.Error()] || len(c.seen) >= mostNews {
		return false
	}
	c.seen[err.Error()], c.at = true, now
	return true
}

func (l *Link) complain(err error, wait time.Duration) {
	code := wire.CodeOf(err)
	switch {
	case hopeless(code):
		l.log.Error("the control plane refuses this device; its tasks go on. Enrol it again, or deregister it for good and wipe its state directory",
			"code", code, "err", err, "retry", wait.Round(time.Millisecond))
	case errors.Is(err, carrier.ErrWrongPin):
		l.log.Error("not the control plane this device was enrolled with", "err", err, "retry", wait.Round(time.Millisecond))
	case wait < silenceCap:
		l.log.Info("not connected", "err", err, "retry", wait.Round(time.Millisecond))
	default:
		l.log.Warn("not connected", "err", err, "retry", wait.Round(time.Millisecond))
	}
}

// joined puts errors on one line.
func joined(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	return &several{errs}
}

type several struct{ errs []error }

func (s *several) Error() string {
	text := ""
	for i, err := range s.errs {
		if i > 0 {
			text += "; "
		}
		text += err.Error()
	}
	return text
}

func (s *several) Unwrap() []error { return s.errs }
