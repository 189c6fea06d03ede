package agent

import (
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// State is everything the loop owns. It has no goroutines and does no I/O, so
// that tests can drive it one event at a time.
type State struct {
	Limits   Limits
	BootID   string
	Applied  Applied
	Tasks    []*Task // sorted by ID
	Runtimes map[string]*runtimeState
	Problems []string // of the journal, at start

	// trusted: the tasks known are all the tasks there are, so that a
	// container of an unknown task is an orphan. Not so after damage.
	trusted bool
	// resync: tell the control plane that nothing is held, to get it all.
	resync bool
	doubt
	// tellAll: the control plane, restored from a backup, is to be told all.
	tellAll bool
	// mark is the latest of the control plane's history that was seen.
	mark Mark

	savedApplied Applied
	tick         uint64 // grows with every begin and end of a call
	jitter       func() float64
	journal      retry // of writing: failures > 0 means it does not work
	unreported   []string

	away absence       // how long without a session
	at   time.Duration // of the latest step

	savedUnused   Unused // images
	savedUnusedAt time.Duration

	devices []PluginDevices // the latest inventory
	began   time.Duration   // this life of the agent
}

// Limits are the agent's own bounds.
type Limits struct {
	// PullGiveUp ends the retries of a task that is not of a service; of pulls,
	// only time with a session counts.
	PullGiveUp time.Duration
	// KeepStopped is how long a stopped task's output stays readable.
	KeepStopped time.Duration
	// KeepStoppedTasks bounds how many stopped tasks are kept so.
	KeepStoppedTasks int
	Images           ImagePolicy
}

const (
	listEvery    = 30 * time.Second
	listDebounce = 20 * time.Millisecond
	listRetryCap = 5 * time.Second
	// cleanupWait is how long failing clean-up may hold back STOPPED.
	cleanupWait = 10 * time.Second
	// missingGrace is how long a plugin may be missing before a task that
	// never started is given up.
	missingGrace = 10 * time.Second
	// steadyRun is how long a container runs before its earlier crashes no
	// longer slow its restart.
	steadyRun = 60 * time.Second
)

// runtimeState is what the loop knows about one runtime plugin.
type runtimeState struct {
	name    string
	known   bool // listed since it was last seen down
	missing bool // the device has no such plugin
	since   time.Duration
	info    sdk.RuntimeInfo
	listing bool
	again   bool // asked for while listing: what is under way may be too old
	listAt  time.Duration
	retry   retry
	images  imageState
	strays  map[sdk.Attempt]*stray
	tasks   map[string]*stray // prepared tasks nobody knows
}

// stray is something a runtime holds that belongs to no current attempt.
type stray struct {
	seen  sdk.Container
	busy  verb
	retry retry
}

func newState(l Limits, bootID string, saved Saved, now time.Duration, jitter func() float64) *State {
	if jitter == nil {
		jitter = rand.Float64
	}
	s := &State{
		Limits: l, BootID: bootID, Applied: saved.Applied, savedApplied: saved.Applied,
		Runtimes: map[string]*runtimeState{}, Problems: saved.Problems,
		away:  loadAbsence(saved.Away, bootID, now),
		began: now, trusted: len(saved.Problems) == 0, resync: len(saved.Problems) > 0, jitter: jitter,
		mark: saved.mark(),
	}
	s.savedUnusedAt = now
	if saved.Unused != nil {
		s.savedUnused = *saved.Unused
	}
	for _, st := range saved.Tasks {
		if st.Assignment == nil {
			s.mislay(st)
			continue
		}
		s.load(st, now)
	}
	if !s.trusted {
		s.doubtTasks()
	}
	if saved.Unwritable != "" {
		s.journal = retry{failures: 1, since: now, at: now, err: saved.Unwritable}
	}
	return s
}

// mark is the latest of the control plane's history that anything saved relies
// on. Assignments know theirs, for when the record of the set is missing: it
// was cut short, or damage took it.
func (s Saved) mark() Mark {
	m := s.Applied.Mark
	for _, t := range s.Tasks {
		own := t.Assignment.GetMark()
		if (t.Origin == "" || s.Applied.Life == "") && own.GetLife() != "" && own.GetRevision() > m.Revision {
			m = Mark{Life: own.GetLife(), Revision: own.GetRevision()}
		}
	}
	return m
}

// load makes a task of what was persisted. What ran is unknown until listed.
func (s *State) load(saved SavedTask, now time.Duration) {
	t := newTask(saved.Assignment)
	t.Origin, t.saved.origin = saved.Origin, saved.Origin
	t.Desired, t.saved.desired = saved.Desired, saved.Desired
	if r := saved.Status; r != nil {
		t.saved.status = *r
		t.Status = advance(t.Status, r.LastStatus)
		t.Acked = r.Acked
		if r.StopCode != "" || rank(r.LastStatus) >= rank(Stopping) {
			t.Stop = &stopping{r.StopCode, r.Reason}
		}
		if t.Status == Stopped {
			t.stoppedAt = now
		}
	}
	for _, r := range saved.Attempts {
		c := t.container(r.Container)
		if c == nil || r.Number < c.Number {
			continue
		}
		c.Image, c.Digest = r.Image, r.Digest
		c.Number, c.BootID, c.HostPorts = r.Number, r.BootID, r.HostPorts
		c.Devices = r.Devices
		c.StartedAt, c.Started, c.RuntimeID = r.StartedAt, r.Started, r.RuntimeID
		c.ExitCode, c.Reason, c.RanFor = r.ExitCode, r.Reason, r.RanFor
		c.Rebooted, c.Removed, c.HaltedAt = r.Rebooted, r.Removed, r.HaltedAt
		c.crashes = max(0, r.Crashes)
		c.Phase = phaseUnknown
		if r.Exited {
			c.Phase = phaseExited
			if r.BootID == s.BootID {
				c.notBefore = min(r.NotBefore, now+retryCap) // whatever was written there
			}
		}
		c.saved = r
	}
	s.add(t)
}

func newTask(a *wire.Assignment) *Task {
	t := &Task{ID: a.GetTaskId(), Assignment: a, Spec: a.GetSpec(), Status: Pending}
	if t.Spec == nil {
		t.Spec = &wire.TaskSpec{}
	}
	for _, c := range t.Spec.GetContainers() {
		one := &Container{Spec: c}
		var err error
		if one.requests, err = deviceRequests(c); err != nil {
			one.failure = "CannotStartContainerError: " + err.Error()
		}
		t.Containers = append(t.Containers, one)
	}
	return t
}

func (s *State) find(id string) (int, bool) {
	return slices.BinarySearchFunc(s.Tasks, id, func(t *Task, id string) int { return strings.Compare(t.ID, id) })
}

func (s *State) task(id string) *Task {
	if i, ok := s.find(id); ok {
		return s.Tasks[i]
	}
	return nil
}

// add takes a task in and gives it what a runtime holds under its name.
func (s *State) add(t *Task) {
	i, _ := s.find(t.ID)
	s.Tasks = slices.Insert(s.Tasks, i, t)
	rt := s.runtime(t.runtimeName())
	if st := rt.tasks[t.ID]; st != nil && st.busy == "" {
		t.inRuntime = true
		delete(rt.tasks, t.ID)
	}
	ours := false
	for _, a := range strayAttempts(rt) {
		if a.Task != t.ID || t.container(a.Container) == nil {
			continue
		}
		ours = true
		if rt.strays[a].busy == "" {
			delete(rt.strays, a) // else it would be ended as nobody's
		}
	}
	if ours {
		rt.want(0) // the next List hands them over
		for _, c := range t.Containers {
			if c.Phase != phaseExited {
				c.Phase = phaseUnknown
			}
		}
	}
}

func strayAttempts(rt *runtimeState) []sdk.Attempt {
	out := make([]sdk.Attempt, 0, len(rt.strays))
	for a := range rt.strays {
		out = append(out, a)
	}
	slices.SortFunc(out, func(a, b sdk.Attempt) int { return strings.Compare(a.String(), b.String()) })
	return out
}

func (s *State) drop(id string) {
	if i, ok := s.find(id); ok {
		s.Tasks = slices.Delete(s.Tasks, i, i+1)
	}
}

// runtime finds or begins what is known about a runtime plugin.
func (s *State) runtime(name string) *runtimeState {
	rt := s.Runtimes[name]
	if rt == nil {
		rt = &runtimeState{name: name, strays: map[sdk.Attempt]*stray{}, tasks: map[string]*stray{}}
		s.Runtimes[name] = rt
	}
	return rt
}

// want asks for a List no later than at.
func (rt *runtimeState) want(at time.Duration) {
	if rt.listing {
		rt.again = true
		return
	}
	rt.listAt = min(rt.listAt, at)
}

// portsInUse are the host ports that attempts of this device hold or will.
func (s *State) portsInUse() map[int]bool {
	used := map[int]bool{}
	for _, t := range s.Tasks {
		if t.Status == Stopped {
			continue
		}
		for _, c := range t.Containers {
			for _, p := range c.HostPorts {
				used[p] = true
			}
			for _, m := range c.Spec.GetPorts() {
				used[int(m.GetHostPort())] = true
			}
		}
	}
	return used
}

// The range that host ports are chosen from: Linux's ephemeral ports.
const firstPort, lastPort = 32768, 60999

// choosePorts picks a host port for every mapping, keeping those that an
// earlier attempt had.
func (s *State) choosePorts(c *Container) {
	maps := c.Spec.GetPorts()
	if len(c.HostPorts) == len(maps) {
		return
	}
	c.HostPorts = nil
	used := s.portsInUse()
	ports := make([]int, 0, len(maps))
	for _, m := range maps {
		port := int(m.GetHostPort())
		if port == 0 {
			port = firstPort + int(s.jitter()*(lastPort-firstPort))
			for tries := 0; used[port] && tries <= lastPort-firstPort; tries++ {
				if port++; port > lastPort {
					port = firstPort
				}
			}
			used[port] = true
		}
		ports = append(ports, port)
	}
	c.HostPorts = ports
}
