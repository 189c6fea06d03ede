package link

import (
	"context"
	"errors"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/controlplane/wire"
)

// errSuperseded ends a session whose control plane has been started anew, and
// has welcomed this device, since.
var errSuperseded = errors.New("a control plane started later has taken over")

func markOf(m *wire.Mark) agent.Mark {
	return agent.Mark{Life: m.GetLife(), Revision: m.GetRevision()}
}

// mark is what Hello says the device relies on; nil before anything.
func (l *Link) mark() *wire.Mark {
	w, ok := l.down.(agent.Witness)
	if !ok {
		return nil
	}
	m := w.Mark()
	if m.Life == "" {
		return nil
	}
	return &wire.Mark{Life: m.Life, Revision: m.Revision}
}

func (l *Link) welcomed(welcome *wire.Welcome) {
	if w, ok := l.down.(agent.Witness); ok {
		w.Welcomed(markOf(welcome.GetMark()), welcome.GetReconcile())
	}
}

func (l *Link) saw(m *wire.Mark) bool {
	w, ok := l.down.(agent.Witness)
	return !ok || w.Saw(markOf(m))
}

// assign hands a set to the agent.
func (s *session) assign(ctx context.Context, todo *set) error {
	if w, ok := s.link.down.(agent.Witness); ok && todo.settled {
		return w.AssignSettled(ctx, s.welcome.Incarnation, todo.assignments, todo.sequence)
	}
	return s.link.down.Assign(ctx, s.welcome.Incarnation, todo.full, todo.assignments, todo.sequence)
}

// Holdings implements agent.Holder.
func (l *Link) Holdings(hs []*wire.Holding) {
	l.mu.Lock()
	l.held = hs
	l.heldGen++
	l.mu.Unlock()
	l.nudge()
}

// newHoldings is the next of what a session that asked for it is told of what
// the device holds. l.mu is held.
func (s *session) newHoldings() (frames []*wire.Frame) {
	const batch = 8 // each may be large
	l := s.link
	if s.welcome.GetReconcile() && s.heldGen != l.heldGen {
		s.heldGen, s.holdings = l.heldGen, l.held
		l.held = nil
		if len(s.holdings) == 0 {
			frames = append(frames, endOfHoldings(0))
		}
		s.told = len(s.holdings)
	}
	for len(s.holdings) > 0 && len(frames) < batch {
		frames = append(frames, &wire.Frame{Body: &wire.Frame_Holding{Holding: s.holdings[0]}})
		if s.holdings = s.holdings[1:]; len(s.holdings) == 0 {
			frames = append(frames, endOfHoldings(s.told))
		}
	}
	return frames
}

func endOfHoldings(count int) *wire.Frame {
	return &wire.Frame{Body: &wire.Frame_EndOfHoldings{EndOfHoldings: &wire.EndOfHoldings{Count: uint32(count)}}}
}
