package agent

import (
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// stateOf is a State at rest with one task whose runtime is known.
func stateOf(spec *wire.TaskSpec, change func(*State, *Task)) *State {
	s := newState(Limits{PullGiveUp: 5 * time.Minute, KeepStopped: time.Hour, KeepStoppedTasks: 100},
		"boot", Saved{}, 0, func() float64 { return 0.5 })
	s.connected(true, 0)
	t := newTask(&wire.Assignment{TaskId: "t", Spec: spec})
	s.add(t)
	rt := s.runtime(defaultRuntime)
	rt.known, rt.info, rt.listAt = true, sdk.RuntimeInfo{Images: true, Exec: true}, time.Hour
	rt.images.none = true
	t.prepared, t.inRuntime = true, true
	for _, c := range t.Containers {
		c.Image, c.Digest = "image", "sha256:1"
	}
	if change != nil {
		change(s, t)
	}
	return s
}

// in puts a container into a phase, with that on record.
func in(c *Container, p phase, code int) {
	c.Number, c.Phase, c.BootID, c.Started = 1, p, "boot", p != phaseRecorded
	if p == phaseExited {
		c.ExitCode = &code
	}
	c.saved = c.record()
}

func TestPlan(t *testing.T) {
	spec := func(cs ...*wire.Container) *wire.TaskSpec { return &wire.TaskSpec{Containers: cs} }
	needs := func(name, on, cond string) *wire.Container {
		c := essential(name)
		c.DependsOn = []*wire.Dependency{{Container: on, Condition: cond}}
		return c
	}
	a := func(container string, n int) sdk.Attempt {
		return sdk.Attempt{Task: "t", Container: container, Number: n}
	}
	main := func(f func(*State, *Task, *Container)) func(*State, *Task) {
		return func(s *State, t *Task) { f(s, t, t.container("main")) }
	}
	one := spec(essential("main"))
	const now = 10 * time.Second
	for _, tc := range []struct {
		name   string
		spec   *wire.TaskSpec
		change func(*State, *Task)
		want   []action
		wake   time.Duration
	}{
		{"a task is prepared first", one, func(_ *State, t *Task) { t.prepared = false },
			[]action{{Verb: callPrepare, Runtime: defaultRuntime, Attempt: a("", 0)}}, time.Hour},
		{"an image is pulled once for all that use it",
			spec(essential("main"), &wire.Container{Name: "other", Image: "main:1"}),
			func(_ *State, t *Task) { t.Containers[0].Digest, t.Containers[1].Digest = "", "" },
			[]action{{Verb: callPull, Runtime: defaultRuntime, Attempt: a("main", 0)}}, time.Hour},
		{"an attempt is decided on before it is started", one, nil,
			[]action{{Verb: decideAttempt, Attempt: a("main", 1)}}, time.Hour},
		{"an attempt is not started before it is on record", one,
			main(func(_ *State, _ *Task, c *Container) { in(c, phaseRecorded, 0); c.saved = AttemptRecord{} }), nil, time.Hour},
		{"an attempt on record is started", one,
			main(func(_ *State, _ *Task, c *Container) { in(c, phaseRecorded, 0) }),
			[]action{{Verb: callStart, Runtime: defaultRuntime, Attempt: a("main", 1)}}, time.Hour},
		{"nothing is assumed of an unknown attempt", one,
			main(func(_ *State, _ *Task, c *Container) { in(c, phaseUnknown, 0); c.Started = false; c.saved = c.record() }), nil, time.Hour},
		{"nothing is called while the runtime is down", one,
			main(func(s *State, _ *Task, c *Container) {
				in(c, phaseRecorded, 0)
				s.runtime(defaultRuntime).known = false
			}), nil, time.Hour},
		{"all started is RUNNING", one,
			main(func(_ *State, _ *Task, c *Container) { in(c, phaseRunning, 0) }),
			[]action{{Verb: decideStatus, Attempt: a("", 0), Status: Running}}, time.Hour},
		{"one that waits for another is PENDING", spec(essential("init"), needs("main", "init", "SUCCESS")),
			func(_ *State, t *Task) { in(t.Containers[0], phaseRunning, 0) }, nil, time.Hour},
		{"an essential exit ends the task", one,
			main(func(_ *State, _ *Task, c *Container) { in(c, phaseExited, 0) }),
			[]action{{Verb: decideStop, Attempt: a("", 0), Code: CodeEssentialExited, Reason: "Essential container in task exited"}}, never},
		{"a failed dependency ends the task", spec(&wire.Container{Name: "init"}, needs("main", "init", "SUCCESS")),
			func(_ *State, t *Task) { in(t.Containers[0], phaseExited, 4) },
			[]action{{Verb: decideStop, Attempt: a("", 0), Code: CodeFailedToStart,
				Reason: "Container main depends on init being SUCCESS, but it exited with code 4"}}, never},
		{"a completed dependency is enough for COMPLETE", spec(&wire.Container{Name: "init"}, needs("main", "init", "COMPLETE")),
			func(_ *State, t *Task) { in(t.Containers[0], phaseExited, 4); t.Containers[0].Removed = true },
			[]action{{Verb: decideAttempt, Attempt: a("main", 1)}}, time.Hour},
		{"a healthy dependency lets its dependent start", spec(essential("db"), needs("main", "db", "HEALTHY")),
			func(_ *State, t *Task) {
				in(t.Containers[0], phaseRunning, 0)
				t.Containers[0].health.status = HealthHealthy
			},
			[]action{{Verb: decideAttempt, Attempt: a("main", 1)}}, time.Hour},
		{"a dependency that takes too long ends the task",
			spec(&wire.Container{Name: "db", StartTimeoutS: 5}, needs("main", "db", "HEALTHY")),
			func(_ *State, t *Task) { in(t.Containers[0], phaseRunning, 0) },
			[]action{{Verb: decideStop, Attempt: a("", 0), Code: CodeFailedToStart,
				Reason: "Container db did not become HEALTHY within its startTimeout of 5 s, and main depends on it"}}, never},
		{"an exited attempt is removed before the next", &wire.TaskSpec{RestartInPlace: true, Containers: []*wire.Container{essential("main")}},
			main(func(_ *State, t *Task, c *Container) { in(c, phaseExited, 1); t.Status = Running }),
			[]action{{Verb: callRemove, Runtime: defaultRuntime, Attempt: a("main", 1)}}, time.Hour},
		{"a service waits for its backoff", &wire.TaskSpec{RestartInPlace: true, Containers: []*wire.Container{essential("main")}},
			main(func(_ *State, t *Task, c *Container) {
				in(c, phaseExited, 1)
				c.Removed, c.notBefore, t.Status = true, 15*time.Second, Running
				c.saved = c.record()
			}), nil, 15 * time.Second},
		{"a reboot is the next attempt, of any task", one,
			main(func(_ *State, t *Task, c *Container) {
				in(c, phaseExited, 0)
				c.ExitCode, c.Rebooted, c.Removed, t.Status = nil, true, true, Running
				c.saved = c.record()
			}), []action{{Verb: decideAttempt, Attempt: a("main", 2)}}, time.Hour},
		{"no attempt is made while a stray one may run", one,
			func(s *State, _ *Task) {
				s.runtime(defaultRuntime).strays[a("main", 7)] = &stray{seen: sdk.Container{State: sdk.StateRunning}}
			},
			[]action{{Verb: callHalt, Runtime: defaultRuntime, Attempt: a("main", 7), Stray: true, Grace: 30 * time.Second}}, time.Hour},
		{"strays of unknown tasks are left alone after damage", one,
			func(s *State, t *Task) {
				in(t.Containers[0], phaseRunning, 0)
				t.Status, s.trusted = Running, false
				s.runtime(defaultRuntime).strays[sdk.Attempt{Task: "x", Container: "c", Number: 1}] = &stray{seen: sdk.Container{State: sdk.StateRunning}}
				s.runtime(defaultRuntime).tasks["x"] = &stray{}
			}, nil, time.Hour},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := stateOf(tc.spec, tc.change)
			got, wake := plan(s, now)
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("actions (-want +got):\n%s", d)
			}
			if tc.wake != never && wake != tc.wake {
				t.Errorf("wakes at %v, want %v", wake, tc.wake)
			}
			again, _ := plan(s, now)
			if d := cmp.Diff(got, again); d != "" {
				t.Errorf("planning again gives something else, so it is not pure:\n%s", d)
			}
		})
	}
}

func TestNeverGivingUpIsNoOverflow(t *testing.T) {
	s := stateOf(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}, func(s *State, t *Task) {
		s.Limits.PullGiveUp, s.Limits.KeepStopped = math.MaxInt64, math.MaxInt64
		t.Containers[0].Digest = ""
		t.Containers[0].pullRetry = retry{failures: 9, since: time.Second, at: time.Minute, err: "away"}
	})
	if acts, wake := plan(s, 30*time.Second); len(acts) != 0 || wake != time.Minute {
		t.Errorf("plan: %+v, wakes at %v", acts, wake)
	}
}

// A runtime may take long to come up after a reboot, or never do.
func TestContainerWasReportedRunningThroughAReboot(t *testing.T) {
	for _, tc := range []struct {
		name, boot string
		want       *wire.ContainerStatus
	}{
		{"the agent alone restarted", "boot", &wire.ContainerStatus{LastStatus: Running}},
		{"the device restarted", "earlier", &wire.ContainerStatus{LastStatus: Stopped, Reason: reasonRebooted}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newState(Limits{}, "boot", Saved{Tasks: []SavedTask{{
				Assignment: &wire.Assignment{TaskId: "t", Spec: &wire.TaskSpec{Containers: []*wire.Container{essential("main")}}},
				Status:     &StatusRecord{LastStatus: Running},
				Attempts:   []AttemptRecord{{Container: "main", Number: 1, BootID: tc.boot, Started: true}},
			}}}, 0, func() float64 { return 0.5 })
			next := func() uint64 { return 1 }
			when := func() *wire.When { return &wire.When{} }
			if got, _ := s.reports(settleWait-1, 0, when, next); len(got) != 0 {
				t.Errorf("before anything can be known it says %v", got)
			}
			got, _ := s.reports(settleWait, 0, when, next)
			if len(got) != 1 || len(got[0].GetContainers()) != 1 {
				t.Fatalf("reports %v, want one of one container", got)
			}
			c := got[0].GetContainers()[0]
			said := &wire.ContainerStatus{LastStatus: c.GetLastStatus(), Reason: c.GetReason()}
			if d := cmp.Diff(tc.want.String(), said.String()); d != "" {
				t.Errorf("container (-want +got):\n%s", d)
			}
		})
	}
}

func TestStatusOnlyAdvances(t *testing.T) {
	all := []string{"", Provisioning, Pending, Activating, Running, Deactivating, Stopping, Deprovisioning, Stopped}
	for i, from := range all {
		for k, to := range all {
			if got := advance(from, to); got != all[max(i, k)] {
				t.Errorf("advance(%q, %q) = %q", from, to, got)
			}
		}
	}
}

func TestDamagedStateIsAskedForAgainAndThenTrusted(t *testing.T) {
	applied := Applied{Incarnation: "one", Sequence: 5}
	s := newState(Limits{}, "boot", Saved{Applied: applied, Problems: []string{"damage"}}, 0, nil)
	if s.trusted || !s.resync {
		t.Fatal("damage changed nothing")
	}
	if err := s.assign(newSimJournal(), "two", true, nil, 6, 0); err != nil || s.trusted {
		t.Errorf("a set of another incarnation was enough: %v", err)
	}
	s.Applied = applied
	if err := s.assign(newSimJournal(), "one", true, nil, 6, 0); err != nil || !s.trusted || s.resync {
		t.Errorf("a whole set of the same incarnation was not enough: %v", err)
	}
}

func TestIdleAgentWritesNothing(t *testing.T) {
	j := newSimJournal()
	s := stateOf(&wire.TaskSpec{Containers: []*wire.Container{essential("main")}}, func(_ *State, t *Task) { in(t.Containers[0], phaseRunning, 0) })
	settle := func(now time.Duration) {
		if _, _, err := s.step(j, now); err != nil {
			t.Fatal(err)
		}
	}
	settle(time.Second)
	before := len(j.records)
	inv := sdk.Inventory{Tasks: []string{"t"}, Containers: []sdk.Container{{
		Attempt: sdk.Attempt{Task: "t", Container: "main", Number: 1}, State: sdk.StateRunning, PID: 7,
	}}}
	for now := time.Minute; now < 24*time.Hour; now += time.Minute {
		r := result{job: s.begin(action{Verb: callList, Runtime: defaultRuntime}), inventory: inv, info: sdk.RuntimeInfo{Images: true}}
		s.finish(r, now)
		settle(now)
	}
	if n := len(j.records) - before; n != 0 {
		t.Errorf("%d records were written in a day in which nothing happened: %+v", n, j.records[before:])
	}
}
