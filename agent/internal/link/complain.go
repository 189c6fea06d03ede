package link

import (
	"errors"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
)

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

// connecting and resting tell what a search does, unless there is a session.
func (l *Link) connecting() {
	l.setStatus(func(s *Status) {
		if s.State != StateConnected {
			s.State, s.NextTry = StateConnecting, time.Time{}
		}
	})
}

func (l *Link) resting(err error, wait time.Duration, said *complaints) {
	if l.Status().State == StateConnected {
		return
	}
	if said.worth(err, time.Now()) {
		l.complain(err, wait)
	}
	l.setStatus(func(s *Status) {
		s.State, s.NextTry, s.LastError = StateWaiting, time.Now().Add(wait), err.Error()
		s.Refused = errors.As(err, new(*wire.Error)) || errors.Is(err, carrier.ErrWrongPin)
	})
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
