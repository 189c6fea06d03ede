package main

import (
	"cmp"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/agent/internal/host"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// What a device tells of its devices is bounded, whatever its plugins find:
// the control plane keeps a little more.
const (
	maxFacts      = 512
	maxFactsBytes = 128 << 10
)

// inventory is what the control plane is told of the devices. Past the bounds
// the last ones are left out.
func (d *device) inventory() []*wire.DeviceFact {
	facts, left := deviceFacts(d.runtimes.Inventory())
	d.leftOut(left)
	return facts
}

// heard says that every device plugin that is up has told what it found.
func (d *device) heard() bool {
	up := map[string]bool{}
	for _, s := range d.runtimes.Status() {
		up[s.Name] = s.State == host.Ready
	}
	return !slices.ContainsFunc(d.runtimes.Inventory(), func(p agent.PluginDevices) bool { return up[p.Plugin] && !p.Ready })
}

func deviceFacts(plugins []agent.PluginDevices) (facts []*wire.DeviceFact, left int) {
	size := 0
	for _, p := range plugins {
		for _, found := range p.Devices {
			f := &wire.DeviceFact{
				Plugin: p.Plugin, Id: found.ID, Kind: found.Kind, Ready: found.Ready && p.Ready,
				Health: string(cmp.Or(found.Health, sdk.HealthUnknown)), Reason: found.Reason,
				Shares: uint32(max(1, found.Shares)), Attributes: found.Attributes,
			}
			if !p.Ready {
				f.Reason = short(p.Error)
			}
			size += proto.Size(f)
			if len(facts) == maxFacts || size > maxFactsBytes {
				left++
				continue
			}
			facts = append(facts, f)
		}
	}
	return facts, left
}

// short keeps a reason to what a device's own may have.
func short(s string) string {
	if len(s) > sdk.MaxDeviceText {
		s = s[:sdk.MaxDeviceText-3] + "..."
	}
	return s
}

// leftOut says in the log, when it changes, how many devices are not told of.
func (d *device) leftOut(n int) {
	d.untold.Lock()
	defer d.untold.Unlock()
	if n > 0 && n != d.untold.n {
		d.log.Warn("the control plane is not told of all devices: there are too many, or they have too many attributes",
			"left out", n, "most", maxFacts, "most bytes", maxFactsBytes)
	}
	d.untold.n = n
}

// allowance is how many changes of plugins are told at once: a plugin that was
// relaunched is wanted, one that crashes in a loop is not worth the traffic.
type allowance struct {
	left int
	at   time.Time // when left was right
}

// mostAtOnce is one replacement of every plugin, and more.
const mostAtOnce = 8

func newAllowance(now time.Time) *allowance { return &allowance{mostAtOnce, now} }

// take uses up one, if there is one. They come back one each factsInterval.
func (a *allowance) take(now time.Time) bool {
	back := int(now.Sub(a.at) / factsInterval)
	if a.left += back; a.left >= mostAtOnce {
		a.left, a.at = mostAtOnce, now
	} else {
		a.at = a.at.Add(time.Duration(back) * factsInterval)
	}
	if a.left == 0 {
		return false
	}
	a.left--
	return true
}

// spacing is how long changes of devices wait until they are told: the first
// not at all, then 3 s, and while they do not stop ever longer, up to a minute.
type spacing struct {
	last time.Time
	gap  time.Duration
}

const (
	deviceGapLeast = 3 * time.Second
	deviceGapMost  = time.Minute
)

func newSpacing(now time.Time) *spacing {
	return &spacing{last: now.Add(-deviceGapMost), gap: deviceGapLeast}
}

// next notes a change and says when it may be told.
func (s *spacing) next(now time.Time) time.Duration {
	if now.Sub(s.last) >= 2*s.gap {
		s.gap = deviceGapLeast
	} else {
		defer func() { s.gap = min(2*s.gap, deviceGapMost) }()
	}
	wait := max(0, s.last.Add(s.gap).Sub(now))
	s.last = now.Add(wait)
	return wait
}
