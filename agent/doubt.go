package agent

import (
	"maps"
	"slices"

	"github.com/belay-edge/belay/controlplane/wire"
)

// What follows from saved state that was damaged. The agent goes on with what
// it has, ends nothing that it does not know, and asks the control plane for
// everything. A whole set of the control plane that it belonged to ends the
// doubt. All of this lasts across restarts: Saved tells of it every time.

// doubt is the part of State that deals with it.
type doubt struct {
	// mislaid are tasks on record whose assignment cannot be had. Their containers
	// are nobody's orphans; what is known of them counts again once the control
	// plane has sent the assignment again.
	mislaid map[string]SavedTask
	// unneeded are mislaid tasks that the control plane does not want any more.
	unneeded []string
	over     bool // it has ended, which is not yet on record
}

func (s *State) mislay(st SavedTask) {
	if s.mislaid == nil {
		s.mislaid = map[string]SavedTask{}
	}
	s.mislaid[st.ID] = st
}

// doubtTasks marks the tasks that may have run and ended already, for all that
// is left on record: they do not start before the control plane names them
// again. A service's is to run in any case.
func (s *State) doubtTasks() {
	for _, t := range s.Tasks {
		blank := t.Origin == "" && t.Desired == nil && t.saved.status == StatusRecord{} &&
			!slices.ContainsFunc(t.Containers, func(c *Container) bool { return c.Number > 0 })
		t.unsure = blank && !t.inPlace()
	}
}

// admit makes a task of an assignment that is not held yet.
func (s *State) admit(a *wire.Assignment) *Task {
	was, ok := s.mislaid[a.GetTaskId()]
	if !ok {
		t := newTask(a)
		s.add(t)
		return t
	}
	delete(s.mislaid, a.GetTaskId())
	was.Assignment = a
	s.load(was, s.began)
	return s.task(a.GetTaskId())
}

// vouches says whether a whole set of that incarnation can end doubt: it is the
// one on record, or nothing on record says otherwise. It cannot for a lost task
// that another incarnation named.
func (s *State) vouches(incarnation string) bool {
	other := func(origin string) bool { return origin != "" && origin != incarnation }
	for _, st := range s.mislaid {
		if other(st.Origin) {
			return false
		}
	}
	if s.Applied.Incarnation != "" {
		return s.Applied.Incarnation == incarnation
	}
	return !slices.ContainsFunc(s.Tasks, func(t *Task) bool { return other(t.Origin) })
}

// resent takes note that a whole set was taken over. vouched: the control plane
// that sent it is the one that everything on record is from.
func (s *State) resent(vouched bool) {
	s.resync = false
	if s.trusted || !vouched {
		return
	}
	s.trusted, s.over, s.Problems = true, true, nil
	s.unneeded = append(s.unneeded, slices.Sorted(maps.Keys(s.mislaid))...)
	s.mislaid = nil
	for _, t := range s.Tasks {
		t.unsure = false
	}
}

// forgetUnneeded is best effort: what it leaves is found by the next start.
func (s *State) forgetUnneeded(j Journal) {
	for _, id := range s.unneeded {
		if s.task(id) == nil {
			_ = j.ForgetTask(id)
		}
	}
	s.unneeded = nil
}
