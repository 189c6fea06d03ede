package agent

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// simulation is a device and its control plane, one event at a time.
type simulation struct {
	t       *rapid.T
	clock   *stillClock
	journal *simJournal
	runtime *simRuntime
	devices *simDevices
	hands   *hands
	state   *State
	began   time.Duration
	seq     uint64 // of statuses, per life of the agent

	pending []*pendingCall
	ghosts  []job // calls of an agent that died, which may yet take effect

	// The control plane.
	sequence uint64
	wanted   map[string]*wire.Assignment
	over     map[string]bool // it has the terminal status: assigned no more
	reported map[string]*wire.TaskStatus
	ids      int
	reboots  int
	rebooted map[sdk.Attempt]bool // ran when the device rebooted
	incarn   string

	simLink
}

type pendingCall struct {
	job  job
	done *result
}

func newSimulation(t *rapid.T) *simulation {
	j := newSimJournal()
	s := &simulation{
		t: t, clock: &stillClock{now: time.Minute, boot: "boot-0"}, journal: j, runtime: newSimRuntime(j),
		wanted: map[string]*wire.Assignment{}, over: map[string]bool{}, reported: map[string]*wire.TaskStatus{}, incarn: "one",
		rebooted: map[sdk.Attempt]bool{},
	}
	s.runtime.images = map[string][]string{"sha256:old": {"registry.test/old@sha256:old"}}
	s.runtime.disk = sdk.Disk{TotalBytes: 1000, FreeBytes: 500}
	s.devices = &simDevices{journal: j, runtime: s.runtime}
	s.devices.heal()
	s.hands = &hands{runtimes: s.runtime, devices: s.devices, outputs: nowhere{}, volumes: nowhere{}, clock: s.clock}
	s.boot()
	return s
}

// boot starts the agent on what the journal holds.
func (s *simulation) boot() {
	s.state = newState(Limits{PullGiveUp: 5 * time.Minute, KeepStopped: time.Hour, KeepStoppedTasks: 3,
		Images: ImagePolicy{KeepUnused: 10 * time.Minute, HighPercent: 85, LowPercent: 80, MinAge: time.Minute}},
		s.clock.boot, s.journal.saved(), s.clock.now, func() float64 { return 0.5 })
	s.linkAtBoot()
	s.state.runtime(defaultRuntime)
	s.state.refound(s.devices.Inventory(), s.clock.now)
	s.began, s.seq = s.clock.now, 0
	for _, p := range s.pending {
		if p.done == nil {
			s.ghosts = append(s.ghosts, p.job)
		}
	}
	s.pending = nil
}

// settle is one turn of the loop.
func (s *simulation) settle() time.Duration {
	s.state.told(s.clock.When(), s.clock.now)
	calls, wake, _ := s.state.step(s.journal, s.clock.now)
	s.checkLink()
	for _, c := range calls {
		j := s.state.begin(c)
		if c.Verb != callCancel {
			s.pending = append(s.pending, &pendingCall{job: j})
		}
	}
	statuses, later := s.state.reports(s.clock.now, s.began, s.clock.When, func() uint64 { s.seq++; return s.seq })
	for _, st := range statuses {
		s.receive(st)
	}
	if later != never && (wake == never || later < wake) {
		wake = later
	}
	for _, v := range s.runtime.violations {
		s.t.Fatal(v)
	}
	return wake
}

// receive is the control plane taking in a status.
func (s *simulation) receive(st *wire.TaskStatus) {
	before := s.reported[st.GetTaskId()]
	if before != nil && !s.journal.everBroken && rank(st.GetLastStatus()) < rank(before.GetLastStatus()) {
		s.t.Fatalf("task %s went from %s back to %s", st.GetTaskId(), before.GetLastStatus(), st.GetLastStatus())
	}
	for _, c := range st.GetContainers() {
		a := sdk.Attempt{Task: st.GetTaskId(), Container: c.GetName(), Number: int(c.GetAttempt())}
		truth, ended := s.runtime.exits[a]
		if c.ExitCode != nil && (!ended || truth == nil || int32(*truth) != c.GetExitCode()) {
			s.t.Fatalf("%s is said to have exited with %d; in truth: %v", a, c.GetExitCode(), truth)
		}
		if now := s.runtime.containers[a]; c.GetLastStatus() == Running && s.rebooted[a] && (now == nil || now.state != sdk.StateRunning) {
			s.t.Fatalf("%s is said to run, and the device rebooted since", a)
		}
		// After a reboot it is known to have ended before it is known how.
		if c.GetLastStatus() == Stopped && c.ExitCode == nil && ended && truth != nil && !s.unlisted(a) {
			s.t.Fatalf("the exit code %d of %s was lost", *truth, a)
		}
	}
	s.reported[st.GetTaskId()] = st
}

// unlisted says that the agent still waits for the runtime's word on an
// attempt, without which its task must not be called STOPPED.
func (s *simulation) unlisted(a sdk.Attempt) bool {
	t := s.state.task(a.Task)
	return t.Status != Stopped && t.container(a.Container).Phase == phaseUnknown
}

func (s *simulation) assign(full bool, set ...*wire.Assignment) {
	s.sequence++
	_ = s.state.assign(s.journal, s.incarn, full, set, s.sequence, s.clock.now)
}

// all is the whole set, as a reconnect without common ground gets it.
func (s *simulation) all() []*wire.Assignment {
	var set []*wire.Assignment
	for i := range s.ids {
		if a := s.wanted[id(i)]; a != nil && !s.over[id(i)] {
			set = append(set, a)
		}
	}
	return set
}

func id(n int) string { return fmt.Sprintf("%032x", n) }

// newTask makes up a task of one of several shapes.
func (s *simulation) newTask() *wire.Assignment {
	n := s.ids
	s.ids++
	main := &wire.Container{Name: "main", Image: "app:1", Essential: true}
	spec := &wire.TaskSpec{Family: "f", RestartInPlace: rapid.Bool().Draw(s.t, "service"), Containers: []*wire.Container{main}}
	switch rapid.IntRange(0, 4).Draw(s.t, "shape") {
	case 1: // a sidecar
		spec.Containers = append(spec.Containers, &wire.Container{
			Name: "side", Image: "side:1", DependsOn: []*wire.Dependency{{Container: "main", Condition: "START"}},
		})
	case 2: // something to be done before
		spec.Containers = append(spec.Containers, &wire.Container{Name: "init", Image: "app:1"})
		main.DependsOn = []*wire.Dependency{{Container: "init", Condition: "SUCCESS"}}
	case 3: // a healthy friend
		spec.Containers = append(spec.Containers, &wire.Container{
			Name: "db", Image: "db:1", Essential: true,
			HealthCheck: &wire.HealthCheck{Command: []string{"CMD", "true"}, IntervalS: 5, Retries: 2},
		})
		main.DependsOn = []*wire.Dependency{{Container: "db", Condition: "HEALTHY"}}
	case 4:
		main.RestartPolicy = &wire.RestartPolicy{Enabled: true, AttemptPeriodS: 60}
		main.Ports = []*wire.PortMapping{{ContainerPort: 80}}
	}
	for _, c := range spec.Containers {
		s.requests(c)
	}
	spec.DisconnectStopAfterS = rapid.SampledFrom([]uint32{0, 0, 30, 300}).Draw(s.t, "stop after")
	a := &wire.Assignment{Sequence: uint64(n + 1), TaskId: id(n), Desired: "RUNNING", Spec: spec}
	s.wanted[a.TaskId] = a
	return a
}

var troubles = []string{"", "", "", "unavailable", "deadline", "exhausted", "unavailable after", "deadline after"}

// hostile are the things that can happen.
func (s *simulation) hostile() map[string]func(*rapid.T) {
	pick := func(n int, what string) int { return rapid.IntRange(0, n-1).Draw(s.t, what) }
	all := map[string]func(*rapid.T){
		"": func(*rapid.T) { s.settle() },
		"time passes": func(*rapid.T) {
			s.clock.now += time.Duration(rapid.IntRange(0, 70_000).Draw(s.t, "ms")) * time.Millisecond
		},
		"things go on":       func(*rapid.T) { s.goOn(rapid.IntRange(1, 12).Draw(s.t, "turns")) },
		"things go on well":  func(*rapid.T) { s.heal(); s.goOn(8) },
		"things go on again": func(*rapid.T) { s.goOn(4) },
		"a call is made": func(t *rapid.T) {
			var open []*pendingCall
			for _, p := range s.pending {
				if p.done == nil {
					open = append(open, p)
				}
			}
			if len(open) == 0 {
				t.Skip("none")
			}
			p := open[pick(len(open), "call")]
			s.runtime.next = rapid.SampledFrom(troubles).Draw(s.t, "trouble")
			s.perform(p)
		},
		"a call reports back": func(t *rapid.T) {
			var done []int
			for i, p := range s.pending {
				if p.done != nil {
					done = append(done, i)
				}
			}
			if len(done) == 0 {
				t.Skip("none")
			}
			i := done[pick(len(done), "result")]
			r := *s.pending[i].done
			s.pending = slices.Delete(s.pending, i, i+1)
			s.state.finish(r, s.clock.now)
		},
		"a container dies": func(t *rapid.T) {
			var live []sdk.Attempt
			for n := range s.ids {
				live = append(live, s.runtime.live(id(n), "")...)
			}
			if len(live) == 0 {
				t.Skip("none")
			}
			code := rapid.SampledFrom([]int{0, 1, 137}).Draw(s.t, "code")
			s.runtime.exit(live[pick(len(live), "victim")], &code)
			if rapid.Bool().Draw(s.t, "seen") {
				s.state.relist(defaultRuntime, s.clock.now)
			}
		},
		"the plugin dies or comes back": func(*rapid.T) {
			s.runtime.down = !s.runtime.down
			s.state.runtime(defaultRuntime).want(s.clock.now)
		},
		"the agent dies": func(*rapid.T) { s.boot() },
		"a dead agent's call takes effect": func(t *rapid.T) {
			if len(s.ghosts) == 0 {
				t.Skip("none")
			}
			i := pick(len(s.ghosts), "ghost")
			j := s.ghosts[i]
			s.ghosts = slices.Delete(s.ghosts, i, i+1)
			// Plugins die with their agent, and a daemon keeps what it made:
			// late effects are those of calls already in the daemon's hands.
			if !slices.ContainsFunc(s.pending, func(p *pendingCall) bool { return p.job.Attempt == j.Attempt }) {
				s.hands.perform(context.Background(), j)
			}
		},
		"the device reboots": func(*rapid.T) {
			s.reboots++
			s.ghosts = nil
			for _, a := range s.runtime.live("", "") {
				s.runtime.exit(a, nil)
				s.rebooted[a] = true
				if rapid.Bool().Draw(s.t, "forgets") {
					delete(s.runtime.containers, a)
				}
			}
			s.linkAtReboot()
			s.clock.boot, s.clock.now, s.runtime.down = fmt.Sprintf("boot-%d", s.reboots), time.Second, false
			s.pending = nil
			s.boot()
		},
		"a task is assigned": func(t *rapid.T) {
			if s.ids >= 4 {
				t.Skip("enough")
			}
			s.assign(false, s.newTask())
		},
		"an orphan turns up": func(*rapid.T) {
			// As after somebody emptied the state directory.
			a := sdk.Attempt{Task: id(90 + pick(2, "orphan")), Container: "main", Number: 1 + pick(2, "number")}
			if s.runtime.containers[a] == nil && len(s.runtime.live(a.Task, "")) == 0 {
				s.runtime.containers[a] = &simContainer{state: sdk.StateRunning, pid: 1}
				s.runtime.tasks[a.Task] = true
			}
			s.boot()
			s.ghosts = nil
		},
		"the set is sent again": func(*rapid.T) { s.assign(true, s.all()...) },
		"a task is to stop": func(t *rapid.T) {
			if s.ids == 0 {
				t.Skip("none")
			}
			n := id(pick(s.ids, "task"))
			a := s.wanted[n]
			if a == nil || s.over[n] {
				t.Skip("gone")
			}
			stop := &wire.Assignment{Sequence: s.sequence + 1, TaskId: n, Desired: "STOPPED", StopReason: "enough"}
			if rapid.Bool().Draw(s.t, "with spec") {
				stop.Spec = a.Spec
			}
			s.wanted[n] = &wire.Assignment{Sequence: s.sequence + 1, TaskId: n, Desired: "STOPPED", StopReason: "enough", Spec: a.Spec}
			s.assign(false, stop)
		},
		"a task is removed": func(t *rapid.T) {
			if s.ids == 0 {
				t.Skip("none")
			}
			n := id(pick(s.ids, "task"))
			delete(s.wanted, n)
			if rapid.Bool().Draw(s.t, "by name") {
				s.assign(false, &wire.Assignment{Sequence: s.sequence + 1, TaskId: n, Removed: true})
			} else {
				s.assign(true, s.all()...)
			}
		},
		"statuses are acknowledged": func(*rapid.T) {
			s.acknowledge()
		},
		"the disk fills or empties": func(*rapid.T) { s.journal.broken = !s.journal.broken },
		"the disk lies":             func(*rapid.T) { s.journal.liar = !s.journal.liar },
		"the health check turns":    func(*rapid.T) { s.runtime.healthy = !s.runtime.healthy },
	}
	maps.Copy(all, s.devicesHostile())
	maps.Copy(all, s.linkHostile())
	all["the disk of images fills or empties"] = func(*rapid.T) { s.runtime.disk.FreeBytes = 1000 - 100 - s.runtime.disk.FreeBytes }
	return all
}

func (s *simulation) perform(p *pendingCall) {
	s.noteDiscard(p.job)
	if p.job.Verb == callList {
		s.ghosts = nil // a new plugin that lists has nothing of the old one under way
	}
	r := s.hands.perform(context.Background(), p.job)
	s.runtime.next = ""
	p.done = &r
}

// goOn makes the calls there are and reports them back, most of them well.
func (s *simulation) goOn(turns int) {
	for range turns {
		s.settle()
		for _, p := range s.pending {
			if p.done != nil {
				continue
			}
			if rapid.IntRange(0, 9).Draw(s.t, "luck") == 0 {
				s.runtime.next = rapid.SampledFrom(troubles).Draw(s.t, "trouble")
			}
			s.perform(p)
		}
		done := s.pending
		s.pending = nil
		for _, p := range done {
			s.state.finish(*p.done, s.clock.now)
		}
		if len(done) == 0 {
			s.clock.now += time.Second
		}
	}
}

func (s *simulation) acknowledge() {
	for task, st := range s.reported {
		s.state.acked(task, st.GetSequence())
		s.over[task] = s.over[task] || st.GetLastStatus() == Stopped
	}
}

func (s *simulation) heal() {
	s.journal.broken, s.journal.liar, s.runtime.down, s.runtime.healthy = false, false, false, true
	s.devices.heal()
	s.state.refound(s.devices.Inventory(), s.clock.now)
}

// calm ends the hostility and lets everything come to rest.
func (s *simulation) calm() {
	s.heal()
	s.setLink(true)
	s.ghosts = nil
	for range 20 { // a link that works repeats its set until it is taken over
		if s.state.assign(s.journal, s.incarn, true, s.all(), s.sequence, s.clock.now) == nil {
			break
		}
	}
	deadline := s.clock.now + 30*time.Minute
	for s.clock.now < deadline {
		s.settle()
		if len(s.pending) > 0 {
			for _, p := range s.pending {
				if p.done == nil {
					s.perform(p)
				}
			}
			done := s.pending
			s.pending = nil
			for _, p := range done {
				s.state.finish(*p.done, s.clock.now)
			}
			continue
		}
		s.acknowledge()
		for n := range s.ids { // what is to be done before gets done
			for _, a := range s.runtime.live(id(n), "init") {
				code := 0
				s.runtime.exit(a, &code)
				s.state.relist(defaultRuntime, s.clock.now)
			}
		}
		wake := s.settle()
		if len(s.pending) > 0 {
			continue
		}
		if wake == never {
			s.t.Fatal("the loop would sleep for ever")
		}
		s.clock.now = max(s.clock.now+time.Millisecond, wake)
	}
}

// check says whether the device is as the control plane wants it.
func (s *simulation) check() {
	for n := range s.ids {
		task := id(n)
		t, want, said := s.state.task(task), s.wanted[task], s.reported[task]
		live := s.runtime.live(task, "")
		switch {
		case s.over[task] && want != nil:
			if len(live) > 0 {
				s.t.Fatalf("task %s is over, running %v", task, live)
			}
			if said.GetStopCode() == CodeEssentialExited && !s.died(task) {
				s.t.Fatalf("task %s stopped for an exit that never was: %v", task, said)
			}
			if want.GetDesired() == Running && want.GetSpec().GetRestartInPlace() && said.GetStopCode() != CodeDisconnected {
				s.t.Fatalf("task %s of a service gave up: %v", task, said)
			}
		case want == nil:
			// A disk that failed a write may hold it all the same: the next
			// start finds the task, and the next whole set ends it.
			kept := s.journal.assignments[task] != nil && !s.journal.everBroken
			if t != nil || kept || len(live) > 0 {
				s.t.Fatalf("removed task %s is still there: %+v, running %v", task, t, live)
			}
		case want.GetDesired() == Stopped:
			if len(live) > 0 || said.GetLastStatus() != Stopped {
				s.t.Fatalf("task %s should be stopped, says %v, running %v", task, said, live)
			}
		case said.GetLastStatus() == Running:
			for _, c := range want.GetSpec().GetContainers() {
				running := len(s.runtime.live(task, c.GetName()))
				if running > 1 || c.GetEssential() && running != 1 {
					s.t.Fatalf("task %s says RUNNING with %d %s running: %v", task, running, c.GetName(), said)
				}
			}
		case t != nil && s.waits(t):
		default:
			s.t.Fatalf("task %s did not come to rest: %v (%+v)", task, said, t)
		}
	}
	for a := range s.runtime.containers {
		if s.wanted[a.Task] == nil {
			s.t.Fatalf("%s was left behind", a)
		}
	}
	for task := range s.runtime.tasks {
		if s.wanted[task] == nil {
			s.t.Fatalf("task %s was left prepared", task)
		}
	}
}

func (s *simulation) died(task string) bool {
	for a := range s.runtime.exits {
		if a.Task == task {
			return true
		}
	}
	return false
}

func TestEveryHostilityConverges(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSimulation(t)
		for range rapid.IntRange(0, 2).Draw(t, "tasks at first") {
			s.assign(false, s.newTask())
		}
		t.Repeat(s.hostile())
		s.calm()
		s.check()
	})
}
