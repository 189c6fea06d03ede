package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/agent/internal/config"
	"github.com/belay-edge/belay/agent/internal/host"
	"github.com/belay-edge/belay/agent/internal/identity"
	"github.com/belay-edge/belay/agent/internal/link"
	"github.com/belay-edge/belay/agent/internal/localapi"
	"github.com/belay-edge/belay/agent/internal/system"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// device is the running agent's parts, and what is told of them: facts to the
// control plane, status to the local API.
type device struct {
	cfg       config.Config
	id        identity.Identity
	facts     system.Facts
	log       *slog.Logger
	startedAt time.Time

	agent    *agent.Agent
	link     *link.Link
	runtimes *runtimes
	ready    chan struct{} // closed once there are facts to dial with

	untold struct { // devices that were too many to be told of
		sync.Mutex
		n int
	}
}

// tunnel dials once there is something to tell.
func (d *device) tunnel(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-d.ready:
	}
	return d.link.Run(ctx)
}

// runtimes passes the host on to the agent and doubles its hints: the facts
// want them too.
type runtimes struct {
	*host.Host
	forAgent chan string
	forFacts chan struct{}
	// The same of the devices they found.
	devicesForAgent, devicesForFacts chan struct{}
}

func newRuntimes(h *host.Host) *runtimes {
	return &runtimes{Host: h, forAgent: make(chan string, 64), forFacts: make(chan struct{}, 1),
		devicesForAgent: make(chan struct{}, 1), devicesForFacts: make(chan struct{}, 1)}
}

// Changes implements agent.Runtimes.
func (r *runtimes) Changes() <-chan string { return r.forAgent }

// DeviceChanges implements agent.Devices.
func (r *runtimes) DeviceChanges() <-chan struct{} { return r.devicesForAgent }

func (r *runtimes) run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.Host.DeviceChanges():
			for _, c := range []chan struct{}{r.devicesForAgent, r.devicesForFacts} {
				select {
				case c <- struct{}{}:
				default:
				}
			}
		case name := <-r.Host.Changes():
			select {
			case r.forAgent <- name:
			default: // hints: one that waits already says look again
			}
			select {
			case r.forFacts <- struct{}{}:
			default:
			}
		}
	}
}

// Plugins come up within moments of each other, and one that crashes again and
// again must not cost traffic each time.
const (
	factsSettle   = 100 * time.Millisecond
	factsInterval = 10 * time.Second
	// settleLimit is how long the tunnel waits for the plugins at the start.
	settleLimit = 3 * time.Second
)

// keepFacts tells the control plane of changes of plugins.
func (d *device) keepFacts(ctx context.Context) error {
	// What is told first has the plugins as they are, not as starting: tasks
	// would be refused until the next word. A slow one is not waited for.
	settling := time.NewTimer(settleLimit)
	defer settling.Stop()
	select {
	case <-ctx.Done():
		return nil
	case <-d.runtimes.Settled():
		// Nor should the devices look unplugged until the second word.
		for heard := d.heard(); !heard; heard = heard || d.heard() {
			select {
			case <-ctx.Done():
				return nil
			case <-d.runtimes.devicesForFacts:
			case <-settling.C:
				heard = true
			}
		}
	case <-settling.C:
	}
	last := d.told()
	d.link.SetFacts(last)
	close(d.ready)
	// The first few changes are the start; from then on they are spaced, those
	// of devices by themselves: a plugin's state does not wait for them.
	spare, devices := 5, newSpacing(time.Now())
	var at time.Time // when the next ones are told; zero: nothing is to be told
	var timer <-chan time.Time
	within := func(wait time.Duration) {
		if due := time.Now().Add(wait); at.IsZero() || due.Before(at) {
			at, timer = due, time.After(wait)
		}
	}
	plugins, found := false, false // wait to be told
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-d.runtimes.forFacts:
			if plugins {
				continue
			}
			plugins = true
			if spare--; spare >= 0 {
				within(factsSettle)
			} else {
				within(factsInterval)
			}
		case <-d.runtimes.devicesForFacts:
			if !found {
				found = true
				within(max(factsSettle, devices.next(time.Now())))
			}
		case <-timer:
			at, timer, plugins, found = time.Time{}, nil, false, false
			if now := d.told(); !sameFacts(last, now) {
				d.link.SetFacts(now)
				last = now
			}
		}
	}
}

// memoryStep is how much a plugin's memory must change to be worth a message.
const memoryStep = 16 << 20

// sameFacts compares what is told, but for small changes of memory.
func sameFacts(a, b *wire.Facts) bool {
	a, b = proto.CloneOf(a), proto.CloneOf(b)
	for _, f := range []*wire.Facts{a, b} {
		for _, p := range f.GetPlugins() {
			p.MemoryBytes /= memoryStep
		}
	}
	return proto.Equal(a, b)
}

// told is what the control plane is told of the device now.
func (d *device) told() *wire.Facts {
	f := describe(d.facts, d.cfg)
	for _, s := range d.runtimes.Status() {
		f.Plugins = append(f.Plugins, &wire.PluginInfo{
			Name: s.Name, Version: s.Version, Kinds: kinds(s.Kinds), State: string(s.State),
			LastError: lastError(s), Checksum: s.SHA256, Restarts: uint32(max(s.Restarts, 0)), Networks: s.Networks,
			ProtocolVersion: uint32(s.Protocol), MemoryBytes: s.Memory, MemoryMaxBytes: s.MemoryMax, Missing: s.Missing,
		})
		for name, value := range s.Attributes {
			if !strings.HasPrefix(name, "belay.") { // those are the agent's
				f.Attributes[name] = value
			}
		}
	}
	f.Devices = d.inventory()
	return f
}

// lastError is what is wrong with a plugin or, when nothing is, why it last
// went down: the control plane sees a device too seldom to catch it down.
func lastError(s host.Status) string {
	if s.Error == "" && s.State == host.Ready && s.LastDown != "" {
		return "up again after: " + s.LastDown
	}
	return s.Error
}

func kinds(list []sdk.Kind) []string {
	var out []string
	for _, k := range list {
		out = append(out, string(k))
	}
	return out
}

// snapshotTime bounds how long the local API waits for the loop.
const snapshotTime = 2 * time.Second

func (d *device) snapshot() (agent.Snapshot, error) {
	ctx, cancel := context.WithTimeout(context.Background(), snapshotTime)
	defer cancel()
	return d.agent.Snapshot(ctx)
}

// Status implements localapi.Source.
func (d *device) Status() localapi.Status {
	l := d.link.Status()
	s := localapi.Status{
		Version: agentVersion(), Instance: d.id.ID, Cluster: d.id.Cluster,
		PID: os.Getpid(), StartedAt: d.startedAt,
		Link: localapi.Link{
			Connected: l.State == link.StateConnected, Transport: l.Transport, Address: l.Address,
			Since: l.Since.UTC(), LastError: l.LastError,
		},
		Tasks: map[string]int{}, Attributes: d.facts.Attributes, CPU: d.facts.CPU, MemoryMiB: d.facts.MemoryMiB,
	}
	snap, err := d.snapshot()
	if err != nil {
		s.Problems = append(s.Problems, "the task loop does not answer: "+err.Error())
	}
	for _, t := range snap.Tasks {
		s.Tasks[t.Status.GetLastStatus()]++
	}
	s.Problems = append(s.Problems, snap.Problems...)
	slices.SortFunc(snap.Runtimes, func(a, b agent.RuntimeSnapshot) int { return strings.Compare(a.Name, b.Name) })
	for _, rt := range snap.Runtimes {
		i := rt.Images
		if i == nil {
			continue
		}
		if s.Images == nil {
			s.Images = map[string]localapi.Images{}
		}
		s.Images[rt.Name] = localapi.Images{
			Count: i.Count, Bytes: i.Bytes, Unused: i.Unused, UnusedBytes: i.UnusedBytes,
			DiskTotalBytes: i.Disk.TotalBytes, DiskFreeBytes: i.Disk.FreeBytes, Removed: i.Removed, FreedBytes: i.FreedBytes,
		}
		switch {
		case i.Stuck:
			s.Problems = append(s.Problems, fmt.Sprintf("the disk with the images of %s is %d %% full and no unused image is left to remove: make room on it",
				rt.Name, usedPercent(i.Disk.TotalBytes, i.Disk.FreeBytes)))
		case i.Error != "":
			s.Problems = append(s.Problems, "the images of "+rt.Name+" cannot be looked after: "+i.Error)
		}
	}
	for _, p := range d.runtimes.Status() {
		if p.State == host.Failed || p.State == host.Quarantined {
			s.Problems = append(s.Problems, "plugin "+p.Name+" is "+string(p.State)+": "+p.Error)
		}
	}
	return s
}

// Tasks implements localapi.Source.
func (d *device) Tasks() ([]localapi.Task, error) {
	snap, err := d.snapshot()
	if err != nil {
		return nil, fmt.Errorf("the task loop does not answer: %w", err)
	}
	var out []localapi.Task
	for _, t := range snap.Tasks {
		task := localapi.Task{
			ID: t.ID, Family: t.Family, Revision: t.Revision, Runtime: t.Runtime,
			LastStatus: t.Status.GetLastStatus(), DesiredStatus: t.Desired,
			StopCode: t.Status.GetStopCode(), StoppedReason: t.Status.GetStoppedReason(), Note: t.Status.GetNote(),
			Containers: []localapi.Container{},
		}
		for _, c := range t.Status.GetContainers() {
			one := localapi.Container{
				Name: c.GetName(), LastStatus: c.GetLastStatus(), Attempt: int(c.GetAttempt()), Reason: c.GetReason(),
				RuntimeID: c.GetRuntimeId(), PID: int(c.GetPid()), Image: c.GetImage(), Digest: c.GetImageDigest(), Health: c.GetHealth(),
			}
			for _, d := range c.GetDevices() {
				one.Devices = append(one.Devices, d.GetPlugin()+"/"+d.GetId())
			}
			if c.ExitCode != nil {
				code := int(c.GetExitCode())
				one.ExitCode = &code
			}
			task.Containers = append(task.Containers, one)
		}
		out = append(out, task)
	}
	return out, nil
}

// Plugins implements localapi.Source.
func (d *device) Plugins() []localapi.Plugin {
	var out []localapi.Plugin
	for _, p := range d.runtimes.Status() {
		k := kinds(p.Kinds)
		if k == nil {
			k = []string{}
		}
		out = append(out, localapi.Plugin{
			Name: p.Name, Version: p.Version, Kinds: k, State: string(p.State), LastError: p.Error, LastDown: p.LastDown,
			PID: p.PID, Restarts: p.Restarts, Path: p.Path, Checksum: p.SHA256,
			Protocol: p.Protocol, MemoryBytes: p.Memory, MemoryMaxBytes: p.MemoryMax, CPUMaxPercent: p.CPUMax, ProtectionsMissing: p.Missing,
		})
	}
	return out
}

func usedPercent(total, free uint64) uint64 {
	if total == 0 {
		return 0
	}
	return uint64(float64(total-min(free, total)) / float64(total) * 100)
}
