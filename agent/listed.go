package agent

import (
	"slices"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// listed takes in what a runtime holds: the truth about every attempt that no
// call touched since the List was asked for.
func (s *State) listed(r result, now time.Duration) {
	rt := s.runtime(r.Runtime)
	again := rt.again
	rt.listing, rt.again = false, false
	if r.err != nil {
		missing := sdk.KindOf(r.err) == sdk.NotFound
		if missing && !rt.missing {
			rt.since = now
		}
		if missing && len(rt.strays) == 0 && !slices.ContainsFunc(s.Tasks, func(t *Task) bool { return t.runtimeName() == rt.name }) {
			// It turned out to be a plugin of another kind, or is gone: nobody
			// asks for it.
			delete(s.Runtimes, rt.name)
			return
		}
		rt.known, rt.missing = false, missing
		rt.retry.fail(now, s.jitter(), r.err)
		rt.listAt = min(rt.retry.at, now+listRetryCap)
		return
	}
	if !rt.known { // what is to start goes first
		rt.images.at = max(rt.images.at, now+imagesSoon)
	}
	rt.known, rt.missing, rt.retry, rt.info = true, false, retry{}, r.info
	rt.listAt = now + listEvery
	if again {
		s.relist(rt.name, now)
	}

	found := map[sdk.Attempt]bool{}
	claimed := map[*Container]sdk.Container{}
	for _, seen := range r.inventory.Containers {
		found[seen.Attempt] = true
		c, stale := s.claim(rt, seen, r.tick)
		if stale {
			s.relist(rt.name, now)
			continue
		}
		if c == nil {
			rt.adoptStray(seen)
			continue
		}
		if prior, ok := claimed[c]; ok {
			if prior.Attempt.Number >= seen.Attempt.Number {
				rt.adoptStray(seen)
				continue
			}
			rt.adoptStray(prior)
		}
		claimed[c] = seen
	}
	for _, t := range s.Tasks {
		if t.runtimeName() != rt.name {
			continue
		}
		for _, c := range t.Containers {
			s.reconcile(t, c, claimed, rt, r.tick, now)
		}
	}
	for a, st := range rt.strays {
		if !found[a] && st.busy == "" {
			delete(rt.strays, a)
		}
	}
	s.listedTasks(rt, r)
}

// claim finds whose current attempt a listed one is: nobody's, or the
// container's. stale says that the answer must wait for another List.
func (s *State) claim(rt *runtimeState, seen sdk.Container, tick uint64) (*Container, bool) {
	t := s.task(seen.Attempt.Task)
	if t == nil || t.runtimeName() != rt.name {
		return nil, false
	}
	c := t.container(seen.Attempt.Container)
	if c == nil {
		return nil, false
	}
	if c.busy != "" || c.changed > tick {
		return nil, true
	}
	if st := rt.strays[seen.Attempt]; st != nil && st.busy != "" {
		c.floor = max(c.floor, seen.Attempt.Number)
		return nil, true // it is being ended
	}
	switch {
	case seen.Attempt.Number < c.Number:
		return nil, false
	case seen.Attempt.Number == c.Number && c.Phase == phaseExited && seen.State == sdk.StateRunning,
		t.Status == Stopped && seen.State != sdk.StateExited:
		// Its end is on record, and yet it runs: it must not.
		return nil, false
	}
	return c, false
}

func (rt *runtimeState) adoptStray(seen sdk.Container) {
	if st := rt.strays[seen.Attempt]; st != nil {
		if st.busy == "" {
			st.seen = seen
		}
		return
	}
	rt.strays[seen.Attempt] = &stray{seen: seen}
}

// reconcile brings one container in line with what was listed of it.
func (s *State) reconcile(t *Task, c *Container, claimed map[*Container]sdk.Container,
	rt *runtimeState, tick uint64, now time.Duration,
) {
	if c.busy != "" || c.changed > tick {
		return
	}
	seen, ok := claimed[c]
	if !ok {
		switch {
		case c.Phase == phaseUnknown && c.Number == 0:
			c.Phase = phaseNone
		case c.Phase == phaseRunning, c.Phase == phaseUnknown:
			s.lost(t, c, now)
		}
		// One that has exited and is not listed is removed all the same: what
		// a Remove that was cut short left, such as a shim, no List tells of.
		return
	}
	if bug("double-start") && c.Phase == phaseUnknown {
		c.Phase, c.Removed, c.Rebooted = phaseExited, true, true
		return
	}
	delete(rt.strays, seen.Attempt)
	if seen.Attempt.Number > c.Number {
		// Its record was lost: what runs is what counts.
		c.clearRun()
		c.Number, c.Phase, c.Removed, c.Devices = seen.Attempt.Number, phaseUnknown, false, nil
		c.BootID, c.StartedAt = s.BootID, now
	}
	if c.Phase == phaseExited {
		c.Removed = false
		return
	}
	s.observe(t, c, seen, now, true)
}

// listedTasks compares the prepared tasks with those that are known.
func (s *State) listedTasks(rt *runtimeState, r result) {
	prepared := map[string]bool{}
	for _, id := range r.inventory.Tasks {
		prepared[id] = true
		if t := s.task(id); t != nil && t.runtimeName() == rt.name {
			continue
		}
		if rt.tasks[id] == nil {
			rt.tasks[id] = &stray{}
		}
	}
	for id, st := range rt.tasks {
		if !prepared[id] && st.busy == "" {
			delete(rt.tasks, id)
		}
	}
	for _, t := range s.Tasks {
		if t.runtimeName() != rt.name || t.busy || t.changed > r.tick {
			continue
		}
		t.inRuntime = prepared[t.ID]
		t.prepared = t.prepared && t.inRuntime
	}
}
