package link

import (
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// doubt is how sure a session is that it still reaches the control plane.
type doubt int

// String is for the log.
func (d doubt) String() string { return [...]string{"calm", "suspect", "alarmed"}[d] }

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

	first  asked // what has waited longest; zero: nothing is awaited
	last   asked // what was asked last
	pinged bool  // because the session was in doubt already
	level  doubt
}

// asked is the moment before something was sent.
type asked struct {
	at     time.Time
	frames int64  // heard until then
	heard  uint64 // by the carrier, until then
}

// silent tells whether nothing came since.
func (v *vigil) silent(a asked) bool {
	return v.s.heard.Load() == a.frames && (v.pulse == nil || v.pulse.Heard() == a.heard)
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
	if v.pulse == nil && !ping {
		return
	}
	v.last = asked{at: time.Now(), frames: v.s.heard.Load()}
	if v.pulse != nil {
		v.last.heard = v.pulse.Heard()
	}
	if v.first.at.IsZero() || ping && !v.pinged && v.level == calm {
		v.begin(ping)
	}
}

// begin watches from what was asked last.
func (v *vigil) begin(ping bool) {
	v.first, v.pinged = v.last, ping
	wait := deaf
	if v.pulse != nil {
		wait = quiet
	}
	v.timer.Reset(time.Until(v.first.at.Add(wait)))
}

// look decides when the timer fires.
func (v *vigil) look() {
	switch {
	case v.first.at.IsZero():
		return
	case v.silent(v.first):
	case v.silent(v.last):
		v.begin(false) // what came was before that
		v.set(calm)
		return
	default:
		v.first = asked{}
		v.set(calm)
		return
	}
	limit := unanswered
	if v.pinged {
		limit = quiet
	}
	if v.pulse == nil || time.Since(v.first.at) >= limit {
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
