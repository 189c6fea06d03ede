package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"pgregory.net/rapid"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// simDevices is a device plugin with two GPUs for one container each and a TPU
// for two, which come, go and fail as a test wants.
type simDevices struct {
	down    bool
	gone    map[string]bool // unplugged
	sick    map[string]bool // unhealthy
	trouble bool            // the next Edits fails
	journal *simJournal
	runtime *simRuntime
}

var simShares = map[string]int{"gpu-0": 1, "gpu-1": 1, "tpu-0": 2}

func (d *simDevices) Inventory() []PluginDevices {
	p := PluginDevices{Plugin: "sim", Ready: !d.down}
	if d.down {
		p.Error = "plugin sim is down"
	}
	for _, id := range []string{"gpu-0", "gpu-1", "tpu-0"} {
		if d.gone[id] {
			continue
		}
		one := sdk.Device{ID: id, Kind: id[:3], Ready: true, Shares: simShares[id]}
		if d.sick[id] {
			one.Health, one.Reason = sdk.HealthUnhealthy, "it fell off the bus"
		}
		p.Devices = append(p.Devices, one)
	}
	return []PluginDevices{p}
}

func (d *simDevices) DeviceChanges() <-chan struct{} { return nil }

func (d *simDevices) Device(string) (sdk.Devices, error) {
	if d.down {
		return nil, sdk.Unavailable
	}
	return d, nil
}

func (d *simDevices) Watch(ctx context.Context, _ func([]sdk.Device)) error { return ctx.Err() }

func (d *simDevices) Edits(_ context.Context, ids []string) (sdk.Edits, error) {
	if d.trouble {
		d.trouble = false
		return sdk.Edits{}, sdk.Unavailable
	}
	var e sdk.Edits
	for _, id := range ids {
		if d.gone[id] {
			return sdk.Edits{}, sdk.NotFound
		}
		e.Devices = append(e.Devices, sdk.HostDevice{HostPath: "/dev/" + id})
	}
	return e, nil
}

func (d *simDevices) Stats(context.Context, []string) ([]sdk.DeviceStats, error) { return nil, nil }

// given checks what an attempt is started with against what it asks for, what
// is on record, and what others have.
func (r *simRuntime) given(a sdk.Attempt, nodes []sdk.HostDevice) []string {
	var ids []string
	for _, n := range nodes {
		ids = append(ids, strings.TrimPrefix(n.HostPath, "/dev/"))
	}
	if on := r.journal.devices(a); !slices.Equal(on, ids) {
		r.violate("%s was given %v with %v on record", a, ids, on)
	}
	wants := 0
	for _, c := range r.journal.assignments[a.Task].GetSpec().GetContainers() {
		for _, q := range c.GetDeviceRequests() {
			if c.GetName() == a.Container {
				wants += int(q.GetCount())
			}
		}
	}
	if len(ids) != wants && r.journal.assignments[a.Task] != nil {
		r.violate("%s asks for %d devices and was given %v", a, wants, ids)
	}
	for _, id := range ids {
		if n := r.users(id); n >= simShares[id] {
			r.violate("%s was given %s, which %d containers have", a, id, n)
		}
	}
	return ids
}

// users counts what is there, running or not, and has a device.
func (r *simRuntime) users(id string) (n int) {
	for _, c := range r.containers {
		if slices.Contains(c.devices, id) {
			n++
		}
	}
	return n
}

// devices are those of the attempt's latest record.
func (j *simJournal) devices(a sdk.Attempt) (ids []string) {
	for _, r := range j.records {
		if r.Task == a.Task && r.Attempt != nil && r.Attempt.Container == a.Container && r.Attempt.Number == a.Number {
			ids = nil
			for _, d := range r.Attempt.Devices {
				ids = append(ids, d.ID)
			}
		}
	}
	return ids
}

// requests makes up what a container asks for.
func (s *simulation) requests(c *wire.Container) {
	if rapid.IntRange(0, 2).Draw(s.t, "devices") == 0 {
		return
	}
	c.DeviceRequests = append(c.DeviceRequests, &wire.DeviceRequest{
		Kind: rapid.SampledFrom([]string{"gpu", "gpu", "tpu"}).Draw(s.t, "kind"), Count: 1,
	})
	if q := c.DeviceRequests[0]; q.Kind == "gpu" {
		switch rapid.IntRange(0, 3).Draw(s.t, "which") {
		case 0:
			q.Count = 2
		case 1:
			q.Where = "id == 'gpu-1'"
		}
	}
}

// waits says that a task which does not run waits for devices that others have.
func (s *simulation) waits(t *Task) bool {
	for _, c := range t.Containers {
		for _, q := range c.Spec.GetDeviceRequests() {
			free := 0
			for id, shares := range simShares {
				if strings.HasPrefix(id, q.GetKind()) && (q.GetWhere() == "" || id == "gpu-1") && s.runtime.users(id) < shares {
					free++
				}
			}
			if c.Phase != phaseRunning && free < int(q.GetCount()) {
				return true
			}
		}
	}
	return false
}

func (s *simulation) devicesHostile() map[string]func(*rapid.T) {
	id := func() string {
		return rapid.SampledFrom([]string{"gpu-0", "gpu-1", "tpu-0"}).Draw(s.t, "device")
	}
	look := func() { s.state.refound(s.devices.Inventory(), s.clock.now) }
	return map[string]func(*rapid.T){
		"a device is unplugged or plugged in": func(*rapid.T) {
			n := id()
			s.devices.gone[n] = !s.devices.gone[n]
			if rapid.Bool().Draw(s.t, "seen") {
				look()
			}
		},
		"a device falls ill or recovers": func(*rapid.T) {
			n := id()
			s.devices.sick[n] = !s.devices.sick[n]
			look()
		},
		"the device plugin dies or comes back": func(*rapid.T) {
			s.devices.down = !s.devices.down
			look()
		},
		"the device plugin fails once": func(*rapid.T) { s.devices.trouble = true },
		"the inventory is looked at":   func(*rapid.T) { look() },
	}
}

func (d *simDevices) heal() {
	d.down, d.trouble, d.gone, d.sick = false, false, map[string]bool{}, map[string]bool{}
}

func (d *simDevices) String() string {
	return fmt.Sprintf("down %t, gone %v, sick %v", d.down, d.gone, d.sick)
}
