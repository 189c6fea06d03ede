package controlplane

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/allot"
)

// DeviceFact is a device of an instance, as its agent told.
type DeviceFact struct {
	Plugin     string            `json:"plugin"`
	ID         string            `json:"id"`
	Kind       string            `json:"kind"`
	Ready      bool              `json:"ready"`
	Health     string            `json:"health,omitempty"`
	Reason     string            `json:"reason,omitempty"`
	Shares     int               `json:"shares,omitempty"` // less than 1: 1
	Attributes map[string]string `json:"attributes,omitempty"`
}

// DeviceKey names a device of an instance.
type DeviceKey struct {
	Plugin string `json:"plugin"`
	ID     string `json:"id"`
}

// DeviceDemand is what one container asks for.
type DeviceDemand struct {
	Container string          `json:"container"`
	Requests  []DeviceRequest `json:"requests"`
	// Chosen by the agent, once it has reported it. A choice stands for as
	// long as the task does.
	Chosen []DeviceKey `json:"chosen,omitempty"`
}

// DeviceUse is a container that has a device.
type DeviceUse struct{ Task, Container string }

// DeviceView is a device with who uses it.
type DeviceView struct {
	DeviceFact
	UsedBy []DeviceUse
}

// maxDevices bounds what is kept of one instance's inventory.
const maxDevices = 1024

// allotted turns requests into the words of package allot. What was accepted
// once parses; what does not, because the store was edited, fits nothing.
func (d *DeviceDemand) allotted() []allot.Request {
	out := make([]allot.Request, 0, len(d.Requests))
	for _, r := range d.Requests {
		where, err := allot.Where(r.Where)
		if err != nil {
			r.Kind = ""
		}
		out = append(out, allot.Request{Kind: r.Kind, Count: r.Count, Where: where})
	}
	return out
}

// RefuseDevices says why an instance cannot give a task the devices it asks
// for beside what the tasks in used have or wait for; "" when it can. Choices
// that agents made stand; a task that waits for devices that are not there
// reserves those it could have.
func RefuseDevices(facts []DeviceFact, used, wanted []DeviceDemand) string {
	if len(wanted) == 0 {
		return ""
	}
	devices := make([]allot.Device, 0, len(facts))
	for _, f := range facts {
		d := allot.Device{
			Ref: allot.Ref{Plugin: f.Plugin, ID: f.ID}, Kind: f.Kind, Usable: f.Ready && f.Health != "unhealthy",
			Reason: cmp.Or(f.Reason, "it is not ready"), Shares: f.Shares, Attributes: f.Attributes,
		}
		devices = append(devices, d)
	}
	pool := allot.NewPool(devices)
	for _, u := range used {
		for _, k := range u.Chosen {
			pool.Take([]allot.Ref{{Plugin: k.Plugin, ID: k.ID}})
		}
	}
	for _, u := range used {
		if len(u.Chosen) == 0 {
			pool.AddWhatFits(u.allotted())
		}
	}
	for _, w := range wanted {
		requests := w.allotted()
		if !pool.Add(requests, nil) {
			return pool.Explain(requests)
		}
	}
	return ""
}

// devicesUsed lists what the tasks of an instance ask for, oldest name first.
func (b Bindings) devicesUsed() (out []DeviceDemand) {
	for _, id := range slices.Sorted(maps.Keys(b.Tasks)) {
		out = append(out, b.Tasks[id].Devices...)
	}
	return out
}

// devicesOf joins an instance's inventory with who uses what. A device that is
// in use and no longer in the inventory is shown all the same.
func devicesOf(i Instance, b Bindings) []DeviceView {
	users := map[DeviceKey][]DeviceUse{}
	kinds := map[DeviceKey]string{}
	for _, id := range slices.Sorted(maps.Keys(b.Tasks)) {
		for _, d := range b.Tasks[id].Devices {
			for _, k := range d.Chosen {
				users[k] = append(users[k], DeviceUse{Task: id, Container: d.Container})
				if len(d.Requests) == 1 {
					kinds[k] = d.Requests[0].Kind
				}
			}
		}
	}
	var out []DeviceView
	for _, f := range i.Facts.Devices {
		key := DeviceKey{f.Plugin, f.ID}
		f.Shares = max(1, f.Shares)
		out = append(out, DeviceView{DeviceFact: f, UsedBy: users[key]})
		delete(users, key)
	}
	for key, by := range users {
		out = append(out, DeviceView{UsedBy: by, DeviceFact: DeviceFact{
			Plugin: key.Plugin, ID: key.ID, Kind: kinds[key], Health: "unknown", Shares: 1,
			Reason: "it is no longer in the device's inventory: unplugged, or its plugin is gone",
		}})
	}
	slices.SortFunc(out, func(a, b DeviceView) int {
		return cmp.Or(strings.Compare(a.Plugin, b.Plugin), strings.Compare(a.ID, b.ID))
	})
	return out
}

// choose notes in the bindings which devices a report says were chosen; false
// when that is nothing new.
func (d Demand) choose(containers []ContainerStatus) (Demand, bool) {
	changed := false
	devices := slices.Clone(d.Devices)
	for n, want := range devices {
		i := slices.IndexFunc(containers, func(c ContainerStatus) bool { return c.Name == want.Container })
		if i < 0 || len(containers[i].Devices) == 0 || slices.Equal(containers[i].Devices, want.Chosen) {
			continue
		}
		devices[n].Chosen, changed = containers[i].Devices, true
	}
	d.Devices = devices
	return d, changed
}

// maxChosen bounds what a report says one container was given.
const maxChosen = allot.MaxRequests * allot.MaxCount

func chosenFrom(refs []*wire.DeviceRef) (out []DeviceKey) {
	for _, r := range refs[:min(len(refs), maxChosen)] {
		out = append(out, DeviceKey{Plugin: bounded(r.GetPlugin()), ID: bounded(r.GetId())})
	}
	return out
}

// bound cuts an inventory to what is worth storing.
func (f *Facts) bound() {
	f.Devices = f.Devices[:min(len(f.Devices), maxDevices)]
	for i := range f.Devices {
		f.Devices[i].Reason = bounded(f.Devices[i].Reason)
	}
}
