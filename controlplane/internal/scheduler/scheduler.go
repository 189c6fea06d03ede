// Package scheduler chooses instances for tasks: those that cannot take a task
// are filtered out of a snapshot, and one of the others is taken at random. It
// is pure; binding what it chose, against others who chose too, is the caller's.
package scheduler

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/belay-edge/belay/controlplane"
	"github.com/belay-edge/belay/controlplane/wire"
)

// maxFailures bounds the explanation of a failed placement.
const maxFailures = 100

// archAttribute is what a device says its architecture is, as GOARCH.
const archAttribute = "belay.arch"

// Place is a controlplane.PlaceFunc.
func Place(p controlplane.Placement, r *rand.Rand) (instances []string, failures []controlplane.PlacementFailure) {
	candidates := slices.Clone(p.Candidates)
	fit := make([]int, 0, len(candidates))
	for i := range candidates {
		if unsuitable(&candidates[i], p) == nil && refuse(&candidates[i], p.Demand) == nil {
			fit = append(fit, i)
		}
	}
	for len(instances) < p.Count && len(fit) > 0 {
		at := r.IntN(len(fit))
		c := &candidates[fit[at]]
		instances = append(instances, c.ID)
		take(c, p.Demand)
		if refuse(c, p.Demand) != nil {
			fit[at] = fit[len(fit)-1]
			fit = fit[:len(fit)-1]
		}
	}
	if len(instances) == p.Count {
		return instances, nil
	}
	if len(candidates) == 0 {
		return nil, []controlplane.PlacementFailure{{
			Reason: controlplane.ReasonMissing,
			Detail: nobody(p.Cluster, p.Elsewhere),
		}}
	}
	for i := range candidates {
		f := unsuitable(&candidates[i], p)
		if f == nil {
			f = refuse(&candidates[i], p.Demand)
		}
		if f != nil && len(failures) < maxFailures {
			failures = append(failures, *f)
		}
	}
	return instances, failures
}

// unsuitable says which of the placement's constraints does not hold for c; nil:
// all do. No task that is placed changes that.
func unsuitable(c *controlplane.Candidate, p controlplane.Placement) *controlplane.PlacementFailure {
	lookup := c.Lookup()
	for _, e := range p.Constraints {
		if !e.Match(lookup) {
			return &controlplane.PlacementFailure{Reason: controlplane.ReasonConstraint, Instance: c.ID, Detail: e.Explain(lookup)}
		}
	}
	return nil
}

// nobody says that a cluster has no instances, and where there are some: who
// names no cluster gets the default one.
func nobody(cluster string, elsewhere []string) string {
	const most = 5
	switch n := len(elsewhere); {
	case n == 0:
		return fmt.Sprintf("cluster %s has no instances: enrol a device with an activation for it", cluster)
	case n > most:
		elsewhere = append(slices.Clone(elsewhere[:most]), fmt.Sprintf("%d more", n-most))
	}
	return fmt.Sprintf("cluster %s has no instances, there are some in %s: choose one with --cluster, or enrol a device with an activation for %[1]s",
		cluster, strings.Join(elsewhere, ", "))
}

func take(c *controlplane.Candidate, d controlplane.Demand) {
	c.Used.CPU += d.CPU
	c.Used.MemoryMiB += d.MemoryMiB
	c.Used.Ports = append(slices.Clone(c.Used.Ports), d.Ports...)
	c.Used.Devices = append(slices.Clone(c.Used.Devices), d.Devices...)
}

// refuse says why c cannot take d; nil: it can.
func refuse(c *controlplane.Candidate, d controlplane.Demand) *controlplane.PlacementFailure {
	no := func(reason, format string, args ...any) *controlplane.PlacementFailure {
		return &controlplane.PlacementFailure{Reason: reason, Instance: c.ID, Detail: fmt.Sprintf(format, args...)}
	}
	if !c.Connected {
		return no(controlplane.ReasonAgent, "its agent is not connected")
	}
	if reason := refuseRuntime(c.Facts.Plugins, d); reason != "" {
		return no(controlplane.ReasonRuntime, "%s", reason)
	}
	if arch := c.Facts.Attributes[archAttribute]; d.Arch != "" && arch != d.Arch {
		return no(controlplane.ReasonAttribute, "it is %s, the task is for %s", cmp.Or(arch, "of unknown architecture"), d.Arch)
	}
	if free := c.Facts.CPU - c.Used.CPU; d.CPU > 0 && d.CPU > free {
		return no(controlplane.ReasonCPU, "the task needs %d CPU units, %d of its %d are free", d.CPU, max(0, free), c.Facts.CPU)
	}
	if free := c.Facts.MemoryMiB - c.Used.MemoryMiB; d.MemoryMiB > 0 && d.MemoryMiB > free {
		return no(controlplane.ReasonMemory, "the task needs %d MiB, %d of its %d MiB are free", d.MemoryMiB, max(0, free), c.Facts.MemoryMiB)
	}
	var taken []string
	for _, port := range d.Ports {
		if slices.Contains(c.Used.Ports, port) || slices.Contains(c.Facts.ReservedPorts, port) {
			taken = append(taken, fmt.Sprintf("%d/%s", port.Port, port.Protocol))
		}
	}
	if len(taken) > 0 {
		return no(controlplane.ReasonPorts, "the task needs host port %s, already taken there", strings.Join(taken, ", "))
	}
	if d.StopsAway && !slices.Contains(c.Capabilities, wire.CapabilityDisconnect) {
		return no(controlplane.ReasonAttribute, "its agent is too old to stop the task when it is disconnected, as belay.disconnect asks: update it")
	}
	if len(d.Devices) > 0 {
		if !slices.Contains(c.Capabilities, wire.CapabilityDevices) {
			return no(deviceReason(d), "its agent is too old to give devices to containers: update it")
		}
		if why := controlplane.RefuseDevices(c.Facts.Devices, c.Used.Devices, d.Devices); why != "" {
			return no(deviceReason(d), "%s", why)
		}
	}
	return nil
}

// deviceReason is ECS's word where the task asks for GPUs only.
func deviceReason(d controlplane.Demand) string {
	for _, container := range d.Devices {
		for _, r := range container.Requests {
			if r.Kind != "gpu" {
				return controlplane.ReasonDevices
			}
		}
	}
	return controlplane.ReasonGPU
}

// refuseRuntime says why none of the plugins runs the task; "": one does.
func refuseRuntime(plugins []controlplane.PluginInfo, d controlplane.Demand) string {
	for _, pl := range plugins {
		if pl.Name != d.Runtime || !slices.Contains(pl.Kinds, "runtime") {
			continue
		}
		// A plugin that was up is being relaunched and the device waits for it: a
		// crash a moment ago is no reason to refuse. One that never was, or that
		// keeps crashing, is.
		up := pl.State == "ready" || len(pl.Networks) > 0 && pl.State != "quarantined"
		switch {
		case !up && pl.LastError != "":
			return fmt.Sprintf("its runtime plugin %q is %s: %s", pl.Name, pl.State, pl.LastError)
		case !up:
			return fmt.Sprintf("its runtime plugin %q is %s", pl.Name, pl.State)
		case len(pl.Networks) == 0:
			// Every runtime has one, and tells as soon as its daemon answers.
			return fmt.Sprintf("its runtime plugin %q is up, but what it works with is not there or does not answer", pl.Name)
		case d.Network != "" && !slices.Contains(pl.Networks, d.Network):
			return fmt.Sprintf("its runtime plugin %q does networks %s, not %q", pl.Name, strings.Join(pl.Networks, ", "), d.Network)
		}
		return ""
	}
	return fmt.Sprintf("it has no runtime plugin %q", d.Runtime)
}
