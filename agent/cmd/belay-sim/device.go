package main

import (
	"context"
	"fmt"
	"sync"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/agent/internal/link"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

// device is a simulated one: what the tunnel asks of an agent, answered from
// memory. A task runs the moment it is assigned and stops when it is told to.
type device struct {
	number int
	fleet  *fleet
	link   *link.Link

	mu          sync.Mutex
	incarnation string
	sequence    uint64
	tasks       map[string]*wire.Assignment
	said        uint64
	mark        agent.Mark
	welcomed    bool // by a session of which nothing was told yet
}

// Held implements agent.Downlink.
func (d *device) Held() (incarnation string, sequence uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.incarnation, d.sequence
}

// Assign implements agent.Downlink.
func (d *device) Assign(_ context.Context, incarnation string, full bool, set []*wire.Assignment, sequence uint64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if full {
		named := map[string]bool{}
		for _, a := range set {
			named[a.GetTaskId()] = true
		}
		for id := range d.tasks {
			if !named[id] {
				delete(d.tasks, id)
			}
		}
	}
	for _, a := range set {
		id := a.GetTaskId()
		if a.GetRemoved() {
			delete(d.tasks, id)
			d.link.ForgetTask(id)
			continue
		}
		held := d.tasks[id]
		if held != nil && held.GetDesired() == a.GetDesired() {
			continue
		}
		if held != nil && a.GetSpec() == nil {
			a.Spec = held.GetSpec()
		}
		d.tasks[id] = a
		d.said++
		d.link.TaskStatus(statusOf(a, d.said))
	}
	d.incarnation, d.sequence = incarnation, sequence
	return nil
}

func statusOf(a *wire.Assignment, sequence uint64) *wire.TaskStatus {
	s := &wire.TaskStatus{Sequence: sequence, TaskId: a.GetTaskId(), LastStatus: "RUNNING", Health: "UNKNOWN"}
	if a.GetDesired() == "STOPPED" {
		s.LastStatus, s.StopCode, s.StoppedReason = "STOPPED", "UserInitiated", a.GetStopReason()
	}
	for _, c := range a.GetSpec().GetContainers() {
		one := &wire.ContainerStatus{Name: c.GetName(), LastStatus: s.LastStatus, Attempt: 1, Pid: 1000, Image: c.GetImage(), Health: "UNKNOWN"}
		if s.LastStatus == "STOPPED" {
			zero := int32(0)
			one.ExitCode, one.Pid = &zero, 0
		}
		s.Containers = append(s.Containers, one)
	}
	return s
}

// Acked implements agent.Downlink.
func (d *device) Acked(id string, _ uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if a := d.tasks[id]; a.GetDesired() == "STOPPED" {
		delete(d.tasks, id)
	}
}

// Connected implements agent.Downlink.
func (d *device) Connected(up bool) { d.fleet.connected(d, up) }

// Mark implements agent.Witness.
func (d *device) Mark() agent.Mark {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mark
}

// Welcomed implements agent.Witness. A session that takes the place of another
// is told of as well: the one before may have been dead.
func (d *device) Welcomed(m agent.Mark, _ bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mark, d.welcomed = m, true
}

// Saw implements agent.Witness.
func (d *device) Saw(m agent.Mark) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m.Life == d.mark.Life {
		m.Revision = max(m.Revision, d.mark.Revision)
	}
	d.mark = m
	if d.welcomed {
		d.welcomed = false
		d.fleet.moved(d)
	}
	return true
}

// AssignSettled implements agent.Witness.
func (d *device) AssignSettled(ctx context.Context, incarnation string, set []*wire.Assignment, sequence uint64) error {
	return d.Assign(ctx, incarnation, true, set, sequence)
}

// Logs implements agent.Downlink.
func (d *device) Logs(context.Context, *wire.LogsRequest, func(string, []byte) error) error {
	return sdk.Errorf(sdk.Unsupported, "logs", "a simulated device keeps no output")
}

// facts are those of a small board.
func facts(number int) *wire.Facts {
	return &wire.Facts{
		Attributes: map[string]string{
			"belay.arch": "arm64", "belay.os": "linux", "belay.hostname": fmt.Sprintf("sim-%05d", number), "belay.simulated": "true",
		},
		Cpu: 4096, MemoryMib: 4096,
		Plugins: []*wire.PluginInfo{{
			Name: "process", Version: "sim", Kinds: []string{"runtime"}, State: "ready", Networks: []string{"host"}, ProtocolVersion: 2,
		}},
	}
}
