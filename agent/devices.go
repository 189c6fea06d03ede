package agent

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/allot"
	"github.com/belay-edge/belay/plugins/sdk"
)

// How a container comes to its devices: plan chooses among what is usable and
// nobody holds, all that wait together, so that one does not take what another
// needs when there is something else for it. The choice is part of the attempt
// and on record before the plugin is asked what the container must be given;
// from then on it holds them, until it is proven gone and will not be started
// again.

// pluginGrace is how long after the agent's start a plugin that is not there
// yet is waited for before its devices count as gone.
const pluginGrace = 30 * time.Second

// deviceRequests reads what a container asks for. It was checked when the
// definition was registered, by a control plane that may know more words.
func deviceRequests(c *wire.Container) ([]allot.Request, error) {
	var out []allot.Request
	for _, r := range c.GetDeviceRequests() {
		where, err := allot.Where(r.GetWhere())
		if err != nil {
			return nil, fmt.Errorf("device request %q: %w", r.GetWhere(), err)
		}
		if r.GetCount() > allot.MaxCount || len(out) == allot.MaxRequests {
			return nil, fmt.Errorf("it asks for more than %d devices at a time or in more than %d requests", allot.MaxCount, allot.MaxRequests)
		}
		out = append(out, allot.Request{Kind: r.GetKind(), Count: int(max(1, r.GetCount())), Where: where})
	}
	return out, nil
}

func refs(devices []DeviceRef) []allot.Ref {
	out := make([]allot.Ref, len(devices))
	for i, d := range devices {
		out[i] = allot.Ref(d)
	}
	return out
}

// inventory is what the plugins found, in the words of package allot.
func (s *State) inventory() []allot.Device {
	var out []allot.Device
	for _, p := range s.devices {
		for _, d := range p.Devices {
			a := allot.Device{
				Ref: allot.Ref{Plugin: p.Plugin, ID: d.ID}, Kind: d.Kind, Shares: d.Shares, Attributes: d.Attributes,
				Usable: p.Ready && usable(d), Reason: cmp.Or(d.Reason, "it is not healthy"),
			}
			if !p.Ready {
				a.Reason = p.Error
			}
			out = append(out, a)
		}
	}
	return out
}

func usable(d sdk.Device) bool { return d.Ready && d.Health != sdk.HealthUnhealthy }

// presence of a chosen device.
type presence int

const (
	present presence = iota // usable
	poorly                  // there, and not usable
	absent
	unheard // nobody knows: its plugin is away
)

// look says what is known of a device, and why it is not usable.
func (s *State) look(ref DeviceRef) (presence, string) {
	for _, p := range s.devices {
		if p.Plugin != ref.Plugin {
			continue
		}
		if !p.Ready {
			return unheard, p.Error
		}
		for _, d := range p.Devices {
			switch {
			case d.ID != ref.ID:
			case usable(d):
				return present, ""
			default:
				return poorly, cmp.Or(d.Reason, "it is not healthy")
			}
		}
		return absent, "it is gone"
	}
	return absent, fmt.Sprintf("this device has no plugin %q", ref.Plugin)
}

// kept says whether a container goes on with the devices it has: it waits for
// a plugin that is away, and chooses anew once one of them is known to be
// unusable.
func (p *planner) kept(c *Container) (keep, ready bool) {
	ready = true
	for _, ref := range c.Devices {
		switch is, _ := p.s.look(ref); is {
		case present:
		case unheard:
			return true, false
		default:
			if !slices.ContainsFunc(p.s.devices, func(d PluginDevices) bool { return d.Plugin == ref.Plugin }) && !p.due(p.s.began+pluginGrace) {
				return true, false
			}
			ready = false
		}
	}
	return ready && len(c.Devices) > 0, ready
}

// freed says that a container's devices are nobody's: what had them is proven
// gone, and nothing of it will be started again.
func (t *Task) freed(c *Container) bool { return c.busy == "" && c.Removed && !t.again(c) }

// wantsDevices says that the container's next start needs a choice of devices.
func (p *planner) wantsDevices(t *Task, c *Container) bool {
	if len(c.requests) == 0 || t.Stop != nil || t.unwanted() || t.unsure || t.Status == Stopped || c.busy != "" || c.failure != "" {
		return false
	}
	switch c.Phase {
	case phaseNone:
		return true
	case phaseRecorded:
	case phaseExited:
		if !c.Removed || !t.again(c) {
			return false
		}
	default:
		return false
	}
	keep, _ := p.kept(c)
	return !keep
}

// pool is what there is and what is held of it.
func (s *State) pool() *allot.Pool {
	pool := allot.NewPool(s.inventory())
	for _, t := range s.Tasks {
		for _, c := range t.Containers {
			switch {
			case t.freed(c):
			case len(c.Devices) > 0:
				pool.Take(refs(c.Devices))
			case len(c.requests) > 0 && c.Number > 0 && c.Phase != phaseRecorded:
				// Its record was lost, or an older agent wrote it without them.
				pool.Block(c.requests)
			}
		}
	}
	for _, rt := range s.Runtimes {
		for a := range rt.strays {
			t := s.task(a.Task)
			if t == nil || t.container(a.Container) == nil {
				pool.BlockAll()
				continue
			}
			pool.Block(t.container(a.Container).requests)
		}
	}
	return pool
}

// choice is which devices the containers get that need a choice; those that
// cannot be served now are not in it.
func (p *planner) choice() map[*Container][]DeviceRef {
	if p.chosen != nil {
		return p.chosen
	}
	p.chosen = map[*Container][]DeviceRef{}
	type waiting struct {
		t *Task
		c *Container
	}
	var all []waiting
	for _, t := range p.s.Tasks {
		for _, c := range t.Containers {
			if p.wantsDevices(t, c) {
				all = append(all, waiting{t, c})
			}
		}
	}
	if len(all) == 0 {
		return p.chosen
	}
	// Those that could start come first. The others only have their say in
	// which of several devices those get.
	late := func(w waiting) int {
		if w.t.ready(w.c) {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(all, func(a, b waiting) int {
		return cmp.Or(cmp.Compare(late(a), late(b)), cmp.Compare(a.t.Assignment.GetSequence(), b.t.Assignment.GetSequence()))
	})
	pool := p.s.pool()
	served := make([]bool, len(all))
	for i, w := range all {
		had := refs(w.c.Devices)
		if w.t.freed(w.c) {
			had = nil
		}
		pool.Release(had)
		if served[i] = pool.Add(w.c.requests, had); !served[i] {
			pool.Take(had)
		}
	}
	for i, w := range all {
		if !served[i] {
			continue
		}
		for _, r := range pool.Given(i) {
			p.chosen[w.c] = append(p.chosen[w.c], DeviceRef(r))
		}
	}
	return p.chosen
}

// devices says what the next attempt of a container is given; false: it has to
// wait.
func (p *planner) devices(c *Container) ([]DeviceRef, bool) {
	if len(c.requests) == 0 {
		return nil, true
	}
	if c.Phase != phaseNone {
		if keep, ready := p.kept(c); keep {
			return c.Devices, ready
		}
	}
	given, ok := p.choice()[c]
	return given, ok
}

// refound takes in what the plugins found.
func (s *State) refound(devices []PluginDevices, now time.Duration) {
	s.devices = devices
	for _, t := range s.Tasks {
		for _, c := range t.Containers {
			if c.deviceRetry.failures > 0 {
				c.deviceRetry.at = min(c.deviceRetry.at, now+retryBase)
			}
		}
	}
}

// deviceNote says what of its devices a container waits for; "" when nothing.
func (p *planner) deviceNote(t *Task, c *Container) string {
	waits := c.Phase == phaseNone || c.Phase == phaseRecorded || c.Phase == phaseExited && c.Removed && t.again(c)
	if len(c.requests) == 0 || t.Stop != nil || t.Status == Stopped || !waits || c.busy != "" || !t.ready(c) {
		return ""
	}
	if c.Phase == phaseRecorded && c.deviceRetry.failures > 0 {
		return "waiting for its devices, will try again: " + c.deviceRetry.err
	}
	if _, ok := p.devices(c); ok {
		return ""
	}
	var lost []string
	for _, ref := range c.Devices {
		if is, why := p.s.look(ref); is != present {
			lost = append(lost, fmt.Sprintf("device %s of %s: %s", ref.ID, ref.Plugin, why))
		}
	}
	if c.Phase != phaseNone && len(lost) > 0 {
		return "waiting for " + strings.Join(lost, "; ")
	}
	if a, ok := p.s.orphan(); ok {
		return fmt.Sprintf("waiting for devices: container %s, which belongs to no known task, may hold them", a)
	}
	pool := p.s.pool()
	if pool.Add(c.requests, nil) {
		return "waiting for devices: others were first to ask for those that are free"
	}
	return "waiting for devices: " + pool.Explain(c.requests)
}

// orphan is a container that may hold any device.
func (s *State) orphan() (sdk.Attempt, bool) {
	for _, rt := range s.Runtimes {
		for _, a := range strayAttempts(rt) {
			if t := s.task(a.Task); t == nil || t.container(a.Container) == nil {
				return a, true
			}
		}
	}
	return sdk.Attempt{}, false
}

// damped is a text that may change as often as an inventory does, told no more
// often than the longer it goes on: 3 s, then up to a minute.
type damped struct {
	text     string
	at, wait time.Duration
}

const dampedLeast, dampedMost = 3 * time.Second, time.Minute

// say takes a new text; wake is when to come again with one that is held back.
func (d *damped) say(text string, now time.Duration) (wake time.Duration) {
	switch {
	case text == d.text:
		return never
	case text == "": // it waits no longer: said at once
		d.text = ""
		return never
	case d.wait > 0 && now < d.at+d.wait:
		return d.at + d.wait
	case d.wait > 0 && now < d.at+4*d.wait:
		d.wait = min(2*d.wait, dampedMost)
	default:
		d.wait = dampedLeast
	}
	d.text, d.at = text, now
	return never
}

// awaits brings up to date what a task says of the devices it waits for.
func (p *planner) awaits(t *Task) (wake time.Duration) {
	var notes []string
	for _, c := range t.Containers {
		if n := p.deviceNote(t, c); n != "" {
			notes = append(notes, c.Spec.GetName()+": "+n)
		}
	}
	return t.awaited.say(strings.Join(notes, "; "), p.now)
}

// editsTimeout bounds what one plugin takes to say what its devices need.
const editsTimeout = 30 * time.Second

// edits asks the plugins what the container must be given to use its devices.
func (h *hands) edits(ctx context.Context, devices []DeviceRef) (sdk.Edits, error) {
	var all sdk.Edits
	ids := map[string][]string{}
	var plugins []string
	for _, d := range devices {
		if ids[d.Plugin] == nil {
			plugins = append(plugins, d.Plugin)
		}
		ids[d.Plugin] = append(ids[d.Plugin], d.ID)
	}
	for _, name := range plugins {
		if h.devices == nil {
			return sdk.Edits{}, sdk.Errorf(sdk.NotFound, "find device plugin "+name, "this agent has no device plugins")
		}
		p, err := h.devices.Device(name)
		if err != nil {
			return sdk.Edits{}, err
		}
		ctx, cancel := context.WithTimeout(ctx, editsTimeout)
		e, err := p.Edits(ctx, ids[name])
		cancel()
		if err != nil {
			return sdk.Edits{}, err
		}
		all.Devices = append(all.Devices, e.Devices...)
		all.Mounts = append(all.Mounts, e.Mounts...)
		all.Env = append(all.Env, e.Env...)
		all.CDIDevices = append(all.CDIDevices, e.CDIDevices...)
		all.Hooks = append(all.Hooks, e.Hooks...)
		all.AdditionalGIDs = append(all.AdditionalGIDs, e.AdditionalGIDs...)
		all.DeviceRules = append(all.DeviceRules, e.DeviceRules...)
	}
	return all, nil
}

// apply adds to a container what comes with its devices. A variable of the
// container's own wins over one of a plugin, which is only its plugin's
// default; a mount or node of a plugin wins over one on the same path, without
// which the device would not work.
func apply(s *sdk.ContainerSpec, e sdk.Edits) {
	name := func(variable string) string { n, _, _ := strings.Cut(variable, "="); return n }
	own := map[string]bool{}
	for _, v := range s.Env {
		own[name(v)] = true
	}
	var env []string
	for _, v := range e.Env {
		if !own[name(v)] {
			env = append(env, v)
		}
	}
	s.Env = append(env, s.Env...)
	s.Mounts = slices.DeleteFunc(s.Mounts, func(m sdk.Mount) bool {
		return slices.ContainsFunc(e.Mounts, func(o sdk.Mount) bool { return o.Target == m.Target })
	})
	s.Mounts = append(s.Mounts, e.Mounts...)
	path := func(d sdk.HostDevice) string { return cmp.Or(d.ContainerPath, d.HostPath) }
	s.Devices = slices.DeleteFunc(s.Devices, func(d sdk.HostDevice) bool {
		return slices.ContainsFunc(e.Devices, func(o sdk.HostDevice) bool { return path(o) == path(d) })
	})
	s.Devices = append(s.Devices, e.Devices...)
	s.CDIDevices = append(s.CDIDevices, e.CDIDevices...)
	s.Hooks = append(s.Hooks, e.Hooks...)
	s.DeviceRules = append(s.DeviceRules, e.DeviceRules...)
	s.AdditionalGIDs = append(s.AdditionalGIDs, e.AdditionalGIDs...)
	slices.Sort(s.AdditionalGIDs)
	s.AdditionalGIDs = slices.Compact(s.AdditionalGIDs)
}
