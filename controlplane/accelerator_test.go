package controlplane_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
)

// accelerators are a GPU for one container and a TPU for two.
func accelerators() []controlplane.DeviceFact {
	return []controlplane.DeviceFact{
		{Plugin: "nvidia", ID: "GPU-1", Kind: "gpu", Ready: true, Health: "healthy", Attributes: map[string]string{"memory_mib": "8192"}},
		{Plugin: "nvidia", ID: "GPU-2", Kind: "gpu", Ready: true, Health: "healthy", Attributes: map[string]string{"memory_mib": "4096"}},
		{Plugin: "edgetpu", ID: "0000:01:00.0", Kind: "tpu", Ready: true, Health: "unknown", Shares: 2},
	}
}

func (f *fixture) tell(t *testing.T, instance string, devices []controlplane.DeviceFact, capabilities ...string) {
	t.Helper()
	h := controlplane.Hello{AgentVersion: "1", Capabilities: capabilities, Facts: facts()}
	h.Facts.Devices = devices
	if err := f.ReportFacts(t.Context(), instance, h); err != nil {
		t.Fatal(err)
	}
}

func wants(family string, requests string) string {
	return fmt.Sprintf(`{"family":%q,"containerDefinitions":[{"name":"c","image":"i:1","belay":{"devices":[%s]}}]}`, family, requests)
}

// refusal runs a task that does not fit and says why not.
func (f *fixture) refusal(t *testing.T, family string) string {
	t.Helper()
	tasks, failures, _, err := f.RunTask(t.Context(), controlplane.NewTasks{TaskDefinition: family})
	if err != nil || len(tasks) != 0 || len(failures) != 1 {
		t.Fatalf("tasks %v, failures %v, %v", tasks, failures, err)
	}
	return failures[0].Reason + ": " + failures[0].Detail
}

func TestDevicesAreCounted(t *testing.T) {
	f := newPlane(t)
	i := f.device(t, 1)
	f.register(t, wants("gpu", `{"kind":"gpu"}`))
	f.register(t, wants("big", `{"kind":"gpu","where":"attribute:memory_mib >= 8192"}`))
	f.register(t, wants("huge", `{"kind":"gpu","where":"attribute:memory_mib >= 80000"}`))
	f.register(t, wants("tpu", `{"kind":"tpu"}`))
	f.register(t, wants("camera", `{"kind":"camera"}`))
	f.register(t, `{"family":"ecs","containerDefinitions":[{"name":"c","image":"i:1","resourceRequirements":[{"type":"GPU","value":"2"}]}]}`)

	f.tell(t, i.ID, accelerators())
	if got := f.refusal(t, "gpu"); got != "RESOURCE:GPU: its agent is too old to give devices to containers: update it" {
		t.Error(got)
	}
	f.tell(t, i.ID, accelerators(), wire.CapabilityDevices)
	for family, why := range map[string]string{
		"camera": "RESOURCE:DEVICE: no device of kind camera",
		"huge":   `RESOURCE:GPU: no gpu of 2 for which attribute:memory_mib >= 80000 (GPU-1: attribute:memory_mib >= 80000: it is "8192"; GPU-2: attribute:memory_mib >= 80000: it is "4096")`,
	} {
		if got := f.refusal(t, family); got != why {
			t.Error(got)
		}
	}
	f.run(t, controlplane.NewTasks{TaskDefinition: "gpu"})
	if got := f.refusal(t, "ecs"); !strings.Contains(got, "1 of 2 in use") {
		t.Error(got)
	}
	big := f.run(t, controlplane.NewTasks{TaskDefinition: "big"})[0] // the first may have the other one
	if got := f.refusal(t, "gpu"); got != "RESOURCE:GPU: 1 wanted, 2 device(s) of kind gpu: 2 of 2 in use" {
		t.Error(got)
	}
	f.run(t, controlplane.NewTasks{TaskDefinition: "tpu", Count: 2})
	if got := f.refusal(t, "tpu"); got != "RESOURCE:DEVICE: 1 wanted, 1 device(s) of kind tpu: 1 of 1 in use" {
		t.Error(got)
	}
	f.report(t, big, &wire.TaskStatus{LastStatus: "STOPPED"})
	f.run(t, controlplane.NewTasks{TaskDefinition: "big"})

	devices := accelerators()
	devices[2].Ready, devices[2].Reason = false, "its driver is not bound"
	f.tell(t, i.ID, devices, wire.CapabilityDevices)
	if got := f.refusal(t, "tpu"); got != "RESOURCE:DEVICE: 1 wanted, 1 device(s) of kind tpu: 1 not ready (0000:01:00.0: its driver is not bound)" {
		t.Error(got)
	}
}

func TestAChoiceOfTheAgentStands(t *testing.T) {
	f := newPlane(t)
	i := f.device(t, 1)
	f.tell(t, i.ID, accelerators(), wire.CapabilityDevices)
	f.register(t, wants("gpu", `{"kind":"gpu"}`))
	f.register(t, wants("big", `{"kind":"gpu","where":"attribute:memory_mib >= 8192"}`))
	first := f.run(t, controlplane.NewTasks{TaskDefinition: "gpu"})[0]
	f.report(t, first, &wire.TaskStatus{LastStatus: "RUNNING", Containers: []*wire.ContainerStatus{{
		Name: "c", LastStatus: "RUNNING", Attempt: 1, Devices: []*wire.DeviceRef{{Plugin: "nvidia", Id: "GPU-1"}},
	}}})
	if got := f.refusal(t, "big"); !strings.Contains(got, "1 of 1 in use") {
		t.Error(got)
	}
	f.run(t, controlplane.NewTasks{TaskDefinition: "gpu"})

	// It is unplugged while it is in use.
	f.tell(t, i.ID, accelerators()[1:], wire.CapabilityDevices)
	v, _, err := f.DescribeInstance(t.Context(), controlplane.Freshness{Consistent: true}, i.ID)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range v.Devices {
		got = append(got, fmt.Sprintf("%s %s %s ready=%t shares=%d used=%v %s", d.Plugin, d.ID, d.Kind, d.Ready, d.Shares, d.UsedBy, d.Reason))
	}
	want := []string{
		"edgetpu 0000:01:00.0 tpu ready=true shares=2 used=[] ",
		"nvidia GPU-1 gpu ready=false shares=1 used=[{" + first.ID + " c}] it is no longer in the device's inventory: unplugged, or its plugin is gone",
		"nvidia GPU-2 gpu ready=true shares=1 used=[] ",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	task := f.describe(t, first.ID)
	if d := cmp.Diff([]controlplane.DeviceKey{{Plugin: "nvidia", ID: "GPU-1"}}, task.Containers[0].Devices); d != "" {
		t.Error(d)
	}
}

// However placements, reports and ends race over two replicas, the tasks of an
// instance never ask for more than it has, and what fits is placed.
func TestRacingPlacementsNeverOvercommitDevices(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		f := newPlane(t)
		g := open(t, f.store)
		i := f.device(t, 1)
		shares := rapid.IntRange(1, 3).Draw(rt, "shares")
		devices := accelerators()
		devices[0].Shares = shares
		f.tell(t, i.ID, devices, wire.CapabilityDevices)
		f.register(t, wants("gpu", `{"kind":"gpu"}`))
		f.register(t, wants("big", `{"kind":"gpu","where":"attribute:memory_mib >= 8192"}`))
		for _, family := range []string{"gpu", "big"} {
			if _, _, err := g.DescribeTaskDefinition(t.Context(), controlplane.Freshness{Consistent: true}, family); err != nil {
				rt.Fatal(err)
			}
		}
		if _, _, err := g.DescribeInstance(t.Context(), controlplane.Freshness{Consistent: true}, i.ID); err != nil {
			rt.Fatal(err)
		}
		var mu sync.Mutex
		placed := map[string]int{}
		var wg sync.WaitGroup
		for n := range rapid.IntRange(2, 8).Draw(rt, "callers") {
			family := rapid.SampledFrom([]string{"gpu", "big"}).Draw(rt, "family")
			chooses := rapid.Bool().Draw(rt, "chooses")
			at := []*fixture{f, g}[n%2]
			wg.Go(func() {
				tasks, _, _, err := at.RunTask(t.Context(), controlplane.NewTasks{TaskDefinition: family})
				if err != nil {
					rt.Errorf("run: %v", err)
				}
				for _, task := range tasks {
					mu.Lock()
					placed[family]++
					mu.Unlock()
					if chooses && family == "big" {
						s := &wire.TaskStatus{TaskId: task.ID, LastStatus: "RUNNING", Containers: []*wire.ContainerStatus{{
							Name: "c", LastStatus: "RUNNING", Devices: []*wire.DeviceRef{{Plugin: "nvidia", Id: "GPU-1"}}}}}
						if err := at.ReportTask(t.Context(), i.ID, s); err != nil {
							rt.Errorf("report: %v", err)
						}
					}
				}
			})
		}
		wg.Wait()
		if placed["big"] > shares || placed["big"]+placed["gpu"] > shares+1 {
			rt.Fatalf("placed %v on %d shares of the big GPU and one other", placed, shares)
		}
		if _, _, _, err := f.ListTasks(t.Context(), controlplane.Freshness{Consistent: true}, controlplane.TaskFilter{}, controlplane.Page{}); err != nil {
			rt.Fatal(err)
		}
		tasks, _, _, err := f.RunTask(t.Context(), controlplane.NewTasks{TaskDefinition: "gpu"})
		if room := shares + 1 - placed["big"] - placed["gpu"]; err != nil || (len(tasks) > 0) != (room > 0) {
			rt.Fatalf("with room for %d more, %d placed: %v", room, len(tasks), err)
		}
	})
}

func TestAnOversizedInventoryCostsDevicesNotTheSession(t *testing.T) {
	f := newPlane(t)
	i := f.device(t, 1)
	var devices []controlplane.DeviceFact
	for n := range 3000 {
		devices = append(devices, controlplane.DeviceFact{Plugin: "p", ID: fmt.Sprint(n), Kind: "gpu", Ready: true,
			Attributes: map[string]string{"x": strings.Repeat("y", 1000)}})
	}
	f.tell(t, i.ID, devices, wire.CapabilityDevices)
	v, _, err := f.DescribeInstance(t.Context(), controlplane.Freshness{Consistent: true}, i.ID)
	if err != nil || len(v.Devices) == 0 || len(v.Devices) > 1024 {
		t.Errorf("%d devices kept, %v", len(v.Devices), err)
	}
}
