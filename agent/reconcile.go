package agent

import (
	"context"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

var _ Witness = (*Agent)(nil)

// Mark implements Witness.
func (a *Agent) Mark() Mark {
	a.held.Lock()
	defer a.held.Unlock()
	return a.held.mark
}

// Welcomed implements Witness. A control plane that found out what it has lost
// has written that down before it says so: from here on its own history is the
// one to rely on.
func (a *Agent) Welcomed(m Mark, reconcile bool) {
	a.held.Lock()
	a.held.life = m.Life
	if m.Life != "" {
		a.held.mark = m
	}
	a.held.Unlock()
	if reconcile {
		a.inbox.put(func(c *contents) { c.reconcile = true })
	}
}

// Saw implements Witness.
func (a *Agent) Saw(m Mark) bool {
	a.held.Lock()
	defer a.held.Unlock()
	switch {
	case m.Life == "":
	case a.held.life != "" && a.held.life != m.Life:
		return false
	case a.held.mark.Life != m.Life || a.held.mark.Revision < m.Revision:
		a.held.life, a.held.mark = m.Life, m
	}
	return true
}

// AssignSettled implements Witness.
func (a *Agent) AssignSettled(ctx context.Context, incarnation string, set []*wire.Assignment, sequence uint64) error {
	return a.takeOver(ctx, incarnation, set, sequence, func(s *State, now time.Duration) error {
		return s.assignSettled(a.cfg.Journal, incarnation, set, sequence, now)
	})
}

// reconcile tells a control plane that asked for it everything, once a set of
// its own is on stable storage: it then takes this device at its word.
func (a *Agent) reconcile(s *State) {
	if !s.tellAll {
		return
	}
	s.tellAll = false
	h, ok := a.cfg.Uplink.(Holder)
	if !ok {
		return
	}
	a.cfg.Logger.Warn("the control plane was restored from a backup that lacks some of what this device has: tasks go on as they are until an operator adopts or drops it",
		"tasks", len(s.Tasks))
	h.Holdings(s.holdings())
	s.tellAgain()
}

// holdings are all tasks, for a control plane that may not know them.
func (s *State) holdings() []*wire.Holding {
	out := make([]*wire.Holding, 0, len(s.Tasks))
	for _, t := range s.Tasks {
		if t.removed() {
			continue
		}
		h := &wire.Holding{TaskId: t.ID, Desired: Running, Spec: t.Spec, Status: s.taskStatus(t)}
		if t.unwanted() {
			h.Desired, h.StopReason = Stopped, t.Desired.Reason
		}
		out = append(out, h)
	}
	return out
}

// tellAgain forgets that anything was told, final statuses included: none of
// them counts as known, and none of their tasks may be forgotten, until the
// control plane says so again.
func (s *State) tellAgain() {
	for _, t := range s.Tasks {
		t.report.last, t.Acked = nil, false
	}
}
