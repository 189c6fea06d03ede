package link

import (
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// doubt is how sure a session is that it still reaches the control plane.
type doubt int

const (
	calm    doubt = iota
	suspect       // other ways are dialled, and no more
	alarmed       // the first other way to register takes over
)

const (
	// quiet is how long the carrier may hear nothing at all after something was
	// sent, on a carrier that acknowledges by itself.
	quiet = time.Second
	// deaf is how long a ping may stay unanswered where the carrier says
	// nothing, before another way is looked for. It is less than lost: the
	// session is not given up while there is no other.
	deaf = 3 * time.Second
	// watchEvery is how soon a session that is heard again is believed.
	watchEvery = 250 * time.Millisecond
)

// vigil watches a session after something was sent that wants an answer. It
// belongs to the session's writer.
type vigil struct {
	s     *session
	pulse wire.Pulse // nil: the carrier tells nothing
	timer *time.Timer

	since  time.Time // what was asked; zero: nothing is awaited
	frames int64     // heard before
	heard  uint64    // by the carrier, before
	pinged bool      // because the session was in doubt already
	level  doubt
}

func newVigil(s *session) *vigil {
	v := &vigil{s: s, timer: time.NewTimer(time.Hour)}
	v.timer.Stop()
	v.pulse, _ = s.conn.(wire.Pulse)
	return v
}

// ask begins to watch, before something is sent that wants an answer. A ping is
// answered at once, anything else when the control plane has stored it.
func (v *vigil) ask(ping bool) {
	if !v.since.IsZero() && (!ping || v.pinged || v.pulse != nil && v.level > calm) {
		return // what was asked first counts
	}
	if v.pulse == nil && !ping {
		return
	}
	v.since, v.pinged, v.frames = time.Now(), ping, v.s.heard.Load()
	first := deaf
	if v.pulse != nil {
		v.heard, first = v.pulse.Heard(), quiet
	}
	v.timer.Reset(first)
}

// look decides when the timer fires.
func (v *vigil) look() {
	if v.since.IsZero() {
		return
	}
	if v.s.heard.Load() != v.frames || v.pulse != nil && v.pulse.Heard() != v.heard {
		v.since = time.Time{}
		v.set(calm)
		return
	}
	limit := unanswered
	if v.pinged {
		limit = quiet
	}
	if v.pulse == nil || time.Since(v.since) >= limit {
		v.set(alarmed)
	} else {
		v.set(suspect)
	}
	v.timer.Reset(watchEvery)
}

func (v *vigil) set(level doubt) {
	if level == v.level {
		return
	}
	v.level = level
	// The latest counts, and the writer alone puts it there.
	select {
	case <-v.s.doubts:
	default:
	}
	v.s.doubts <- level
}
