package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

func asks(c *wire.Container, requests ...*wire.DeviceRequest) *wire.Container {
	c.DeviceRequests = requests
	return c
}

func gpus(ids ...string) PluginDevices {
	p := PluginDevices{Plugin: "nvidia", Ready: true}
	for _, id := range ids {
		p.Devices = append(p.Devices, sdk.Device{ID: id, Kind: "gpu", Ready: true})
	}
	return p
}

func ids(ids ...string) (out []DeviceRef) {
	for _, id := range ids {
		out = append(out, DeviceRef{Plugin: "nvidia", ID: id})
	}
	return out
}

func TestPlanOfDevices(t *testing.T) {
	gpu := &wire.DeviceRequest{Kind: "gpu", Count: 1}
	one := func() *wire.TaskSpec {
		return &wire.TaskSpec{RestartInPlace: true, Containers: []*wire.Container{asks(essential("main"), gpu)}}
	}
	at := func(n int) sdk.Attempt { return sdk.Attempt{Task: "t", Container: "main", Number: n} }
	choose := func(n int, devices ...DeviceRef) []action {
		return []action{{Verb: decideAttempt, Attempt: at(n), Devices: devices}}
	}
	start := []action{{Verb: callStart, Runtime: defaultRuntime, Attempt: at(1)}}
	sick := gpus("a", "b")
	sick.Devices[0].Health, sick.Devices[0].Reason = sdk.HealthUnhealthy, "Xid 79"
	away := gpus("a", "b")
	away.Ready, away.Error = false, "plugin nvidia is failed"
	had := func(p phase, devices ...DeviceRef) func(*State, *Task, *Container) {
		return func(_ *State, t *Task, c *Container) {
			in(c, p, 1)
			c.Devices, c.Removed = devices, p == phaseExited
			c.saved = c.record()
			if p == phaseExited {
				t.Status = Running
			}
		}
	}
	for _, tc := range []struct {
		name   string
		found  []PluginDevices
		change func(*State, *Task, *Container)
		want   []action
		note   string
	}{
		{"the choice is part of the attempt", []PluginDevices{gpus("a", "b")}, nil, choose(1, ids("a")...), ""},
		{"without devices there is no attempt", nil, nil, nil, "main: waiting for devices: no device of kind gpu"},
		{"nor with ones that are not healthy", []PluginDevices{{Plugin: "nvidia", Ready: true, Devices: sick.Devices[:1]}}, nil, nil,
			"main: waiting for devices: 1 wanted, 1 device(s) of kind gpu: 1 not ready (a: Xid 79)"},
		{"nor while their plugin is away", []PluginDevices{away}, nil, nil,
			"main: waiting for devices: 1 wanted, 2 device(s) of kind gpu: 2 not ready (a: plugin nvidia is failed; b: plugin nvidia is failed)"},
		{"an attempt on record keeps its choice", []PluginDevices{gpus("a", "b")}, had(phaseRecorded, ids("b")...), start, ""},
		{"and waits for a plugin that is away", []PluginDevices{away}, had(phaseRecorded, ids("b")...), nil,
			"main: waiting for device b of nvidia: plugin nvidia is failed"},
		{"and chooses anew when the device is gone", []PluginDevices{gpus("a")}, had(phaseRecorded, ids("b")...),
			[]action{{Verb: decideDevices, Runtime: defaultRuntime, Attempt: at(1), Devices: ids("a")}}, ""},
		{"or waits when there is no other", []PluginDevices{gpus()}, had(phaseRecorded, ids("b")...), nil, "main: waiting for device b of nvidia: it is gone"},
		{"a plugin that is not up yet is waited for at first", []PluginDevices{{Plugin: "other", Ready: true, Devices: gpus("a").Devices}}, had(phaseRecorded, ids("b")...), nil,
			`main: waiting for device b of nvidia: this device has no plugin "nvidia"`},
		{"and then it is gone", []PluginDevices{{Plugin: "other", Ready: true, Devices: gpus("a").Devices}}, func(s *State, t *Task, c *Container) {
			had(phaseRecorded, ids("b")...)(s, t, c)
			s.began = -pluginGrace
		}, []action{{Verb: decideDevices, Runtime: defaultRuntime, Attempt: at(1), Devices: []DeviceRef{{"other", "a"}}}}, ""},
		{"an attempt without devices on record gets some", []PluginDevices{gpus("a")}, had(phaseRecorded),
			[]action{{Verb: decideDevices, Runtime: defaultRuntime, Attempt: at(1), Devices: ids("a")}}, ""},
		{"the next attempt keeps them", []PluginDevices{gpus("a", "b")}, had(phaseExited, ids("b")...), choose(2, ids("b")...), "main: exited, will be started again"},
		{"the next attempt replaces one that is not healthy", []PluginDevices{sick}, had(phaseExited, ids("a")...), choose(2, ids("b")...), "main: exited, will be started again"},
		{"what another holds is not given", []PluginDevices{gpus("a")}, func(s *State, _ *Task, _ *Container) {
			o := newTask(&wire.Assignment{TaskId: "o", Spec: one()})
			o.inRuntime, o.prepared, o.Status = true, true, Running
			in(o.Containers[0], phaseRunning, 0)
			o.Containers[0].Devices = ids("a")
			o.Containers[0].saved = o.Containers[0].record()
			s.add(o)
		}, nil, "main: waiting for devices: 1 wanted, 1 device(s) of kind gpu: 1 of 1 in use"},
		{"nor what a running one may hold whose record was lost", []PluginDevices{gpus("a")}, func(s *State, _ *Task, _ *Container) {
			o := newTask(&wire.Assignment{TaskId: "o", Spec: one()})
			o.inRuntime, o.prepared, o.Status = true, true, Running
			in(o.Containers[0], phaseRunning, 0)
			s.add(o)
		}, nil, "main: waiting for devices: 1 wanted, 1 device(s) of kind gpu: 1 of 1 in use"},
		{"nor anything while nobody knows what an orphan holds", []PluginDevices{gpus("a")}, func(s *State, _ *Task, _ *Container) {
			s.trusted = false
			s.runtime(defaultRuntime).strays[sdk.Attempt{Task: "x", Container: "c", Number: 1}] = &stray{seen: sdk.Container{State: sdk.StateRunning}}
		}, nil, "main: waiting for devices: container x/c/1, which belongs to no known task, may hold them"},
		{"a plugin that did not answer is asked again later", []PluginDevices{gpus("a")}, func(s *State, t *Task, c *Container) {
			had(phaseRecorded, ids("a")...)(s, t, c)
			c.deviceRetry = retry{failures: 1, at: time.Minute, err: "it is being reset"}
		}, nil, "main: waiting for its devices, will try again: it is being reset"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := stateOf(one(), func(s *State, t *Task) {
				s.devices = tc.found
				if tc.change != nil {
					tc.change(s, t, t.container("main"))
				}
			})
			const now = 10 * time.Second
			got, _ := plan(s, now)
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("actions (-want +got):\n%s", d)
			}
			(&planner{s: s, now: now, wake: never}).awaits(s.task("t"))
			if d := cmp.Diff(tc.note, s.note(s.task("t"))); d != "" {
				t.Errorf("note (-want +got):\n%s", d)
			}
		})
	}
}

func TestRequestsThisAgentCannotReadEndTheTask(t *testing.T) {
	spec := &wire.TaskSpec{Containers: []*wire.Container{asks(essential("main"), &wire.DeviceRequest{Kind: "gpu", Where: "a new word"})}}
	s := stateOf(spec, func(s *State, _ *Task) { s.devices = []PluginDevices{gpus("a")} })
	got, _ := plan(s, time.Second)
	if len(got) != 1 || got[0].Verb != decideStop || got[0].Code != CodeFailedToStart || !strings.Contains(got[0].Reason, `device request "a new word"`) {
		t.Errorf("plan: %+v", got)
	}
}

func TestWhatComesWithDevicesIsAdded(t *testing.T) {
	s := sdk.ContainerSpec{
		Env:            []string{"BELAY_TASK_ID=t", "MINE=1"},
		Mounts:         []sdk.Mount{{Type: "bind", Source: "/own", Target: "/lib/gpu"}, {Type: "bind", Source: "/data", Target: "/data"}},
		Devices:        []sdk.HostDevice{{HostPath: "/dev/null", ContainerPath: "/dev/gpu0", Permissions: "r"}, {HostPath: "/dev/x"}},
		AdditionalGIDs: nil,
	}
	apply(&s, sdk.Edits{
		Env:            []string{"GPU=0", "MINE=2"},
		Mounts:         []sdk.Mount{{Type: "bind", Source: "/driver", Target: "/lib/gpu", ReadOnly: true}},
		Devices:        []sdk.HostDevice{{HostPath: "/dev/gpu0"}},
		CDIDevices:     []string{"x.com/gpu=0"},
		Hooks:          []sdk.Hook{{Point: "createRuntime", Path: "/hook"}},
		AdditionalGIDs: []uint32{44, 7, 44},
	})
	want := sdk.ContainerSpec{
		Env:            []string{"GPU=0", "BELAY_TASK_ID=t", "MINE=1"},
		Mounts:         []sdk.Mount{{Type: "bind", Source: "/data", Target: "/data"}, {Type: "bind", Source: "/driver", Target: "/lib/gpu", ReadOnly: true}},
		Devices:        []sdk.HostDevice{{HostPath: "/dev/x"}, {HostPath: "/dev/gpu0"}},
		CDIDevices:     []string{"x.com/gpu=0"},
		Hooks:          []sdk.Hook{{Point: "createRuntime", Path: "/hook"}},
		AdditionalGIDs: []uint32{7, 44},
	}
	if d := cmp.Diff(want, s); d != "" {
		t.Error(d)
	}
}

// plugins are device plugins that answer Edits with their name and the ids.
type plugins map[string]error

func (p plugins) Inventory() []PluginDevices     { return nil }
func (p plugins) DeviceChanges() <-chan struct{} { return nil }
func (p plugins) Device(name string) (sdk.Devices, error) {
	if err, ok := p[name]; !ok || err != nil {
		return nil, errors.Join(sdk.Unavailable, err)
	}
	return editor{name: name}, nil
}

type editor struct {
	sdk.Devices
	name string
}

func (e editor) Edits(_ context.Context, ids []string) (sdk.Edits, error) {
	return sdk.Edits{Env: []string{fmt.Sprint(e.name, ids)}}, nil
}

func TestEditsAreAskedOfEachPluginOnce(t *testing.T) {
	h := &hands{devices: plugins{"a": nil, "b": nil}}
	got, err := h.edits(t.Context(), []DeviceRef{{"a", "1"}, {"b", "1"}, {"a", "2"}})
	if d := cmp.Diff([]string{"a[1 2]", "b[1]"}, got.Env); d != "" || err != nil {
		t.Error(d, err)
	}
	r := (&hands{devices: plugins{}, runtimes: newSimRuntime(newSimJournal())}).perform(t.Context(),
		job{action: action{Verb: callStart, Attempt: sdk.Attempt{Task: "t", Container: "c", Number: 1}}, devices: []DeviceRef{{"a", "1"}}})
	if !r.withheld || !errors.Is(r.err, sdk.Unavailable) {
		t.Errorf("%+v", r.err)
	}
}

// However often what a task waits for changes, it is told once in 3 s, and
// ever less; that it waits no longer is told at once.
func TestWhatIsAwaitedIsDamped(t *testing.T) {
	var d damped
	said, last := 0, ""
	for now := time.Second; now < time.Hour; now += 100 * time.Millisecond {
		d.say(fmt.Sprint("reason ", now), now)
		if d.text != last {
			said, last = said+1, d.text
		}
	}
	if said > 70 || said < 50 {
		t.Errorf("told %d times in an hour", said)
	}
	if d.say("", time.Hour); d.text != "" {
		t.Errorf("it still waits: %q", d.text)
	}
	if wake := d.say("again", time.Hour+time.Second); d.text != "" || wake <= time.Hour+time.Second {
		t.Errorf("told %q at once, wakes at %v", d.text, wake)
	}
}

// bench is a device plugin whose inventory a test sets.
type bench struct {
	mu      sync.Mutex
	found   []sdk.Device
	edits   func(ids []string) error
	asked   int
	changes chan struct{}
}

func newBench() *bench { return &bench{changes: make(chan struct{}, 1)} }

func (b *bench) set(found ...sdk.Device) {
	b.mu.Lock()
	b.found = found
	b.mu.Unlock()
	select {
	case b.changes <- struct{}{}:
	default:
	}
}

func (b *bench) Inventory() []PluginDevices {
	b.mu.Lock()
	defer b.mu.Unlock()
	return []PluginDevices{{Plugin: "sim", Ready: true, Devices: b.found}}
}
func (b *bench) DeviceChanges() <-chan struct{}                             { return b.changes }
func (b *bench) Device(string) (sdk.Devices, error)                         { return b, nil }
func (b *bench) Watch(context.Context, func([]sdk.Device)) error            { return nil }
func (b *bench) Stats(context.Context, []string) ([]sdk.DeviceStats, error) { return nil, nil }
func (b *bench) Edits(_ context.Context, ids []string) (sdk.Edits, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked++
	if b.edits != nil {
		if err := b.edits(ids); err != nil {
			return sdk.Edits{}, err
		}
	}
	var e sdk.Edits
	for _, id := range ids {
		e.Devices = append(e.Devices, sdk.HostDevice{HostPath: "/dev/" + id})
	}
	return e, nil
}

// An inventory that flaps for an hour makes neither traffic nor writes of it,
// and a task that waits past every other patience starts when it can.
func TestAFlappingInventoryCostsLittle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		devices := newBench()
		b := newBubble(t, 0.5, func(c *Config) { c.Devices = devices })
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{asks(essential("main"), &wire.DeviceRequest{Kind: "gpu", Count: 1})}}))
		time.Sleep(time.Second)
		if st := b.last(); st.GetLastStatus() != Pending || !strings.Contains(st.GetNote(), "no device of kind gpu") {
			t.Fatalf("status %v", st)
		}
		for n := range 3600 {
			devices.set(sdk.Device{ID: "gpu-0", Kind: "gpu", Reason: fmt.Sprint("flap ", n)})
			time.Sleep(time.Second)
		}
		b.mu.Lock()
		said := len(b.statuses[id(1)])
		b.mu.Unlock()
		if written := len(b.journal.records); said > 80 || written > 5 {
			t.Errorf("an hour of it was told %d times and written %d times", said, written)
		}
		devices.set(sdk.Device{ID: "gpu-0", Kind: "gpu", Ready: true})
		time.Sleep(time.Second)
		st := b.last()
		if st.GetLastStatus() != Running || len(st.GetContainers()[0].GetDevices()) != 1 || st.GetContainers()[0].GetDevices()[0].GetId() != "gpu-0" {
			t.Errorf("status %v", st)
		}

		// Unplugged in use: its own affair.
		devices.set()
		time.Sleep(time.Minute)
		if st := b.last(); st.GetLastStatus() != Running || st.GetNote() != "" {
			t.Errorf("status %v", st)
		}
		if len(b.runtime.violations) > 0 {
			t.Error(b.runtime.violations)
		}
	})
}

// A plugin that cannot say what its devices need is asked again, ever more
// rarely and sooner when the inventory changes, and the task waits for ever.
func TestEditsAreRetriedWithBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		devices := newBench()
		devices.set(sdk.Device{ID: "gpu-0", Kind: "gpu", Ready: true})
		devices.edits = func([]string) error { return sdk.Errorf(sdk.Unavailable, "edits", "the firmware is loading") }
		b := newBubble(t, 1, func(c *Config) { c.Devices = devices })
		b.assign(running(&wire.TaskSpec{Containers: []*wire.Container{asks(essential("main"), &wire.DeviceRequest{Kind: "gpu", Count: 1})}}))
		time.Sleep(time.Hour)
		if st := b.last(); st.GetLastStatus() != Pending || !strings.Contains(st.GetNote(), "waiting for its devices, will try again: ") ||
			!strings.Contains(st.GetNote(), "the firmware is loading") {
			t.Fatalf("status %v", st)
		}
		devices.mu.Lock()
		asked := devices.asked
		devices.edits = nil
		devices.mu.Unlock()
		if asked > 70 || asked < 55 {
			t.Errorf("asked %d times in an hour", asked)
		}
		devices.set(sdk.Device{ID: "gpu-0", Kind: "gpu", Ready: true, Attributes: map[string]string{"firmware": "2"}})
		time.Sleep(2 * time.Second)
		if st := b.last(); st.GetLastStatus() != Running {
			t.Errorf("status %v", st)
		}
	})
}
