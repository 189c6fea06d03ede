package agent

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

const (
	// reportEvery bounds how often progress alone is worth a message, and a
	// write to the control plane.
	reportEvery = 500 * time.Millisecond
	// settleWait is how long after its start the agent keeps quiet about a
	// container it has not found yet: what it said before still stands.
	settleWait = 5 * time.Second
)

// report is what was last said about a task.
type report struct {
	last *wire.TaskStatus
	at   time.Duration
}

// reports says what there is to tell the control plane now, in the order of
// sequence numbers taken from next, and when to look again.
func (s *State) reports(now, started time.Duration, when func() *wire.When, next func() uint64) ([]*wire.TaskStatus, time.Duration) {
	var out []*wire.TaskStatus
	wake := never
	later := func(at time.Duration) {
		if wake == never || at < wake {
			wake = at
		}
	}
	p := &planner{s: s, now: now, wake: never}
	for _, t := range s.Tasks {
		if t.removed() || t.Status == Stopped && t.Acked {
			continue
		}
		if now < started+settleWait && t.unsettled() {
			later(started + settleWait)
			continue
		}
		if at := p.awaits(t); at != never {
			later(at)
		}
		st := s.taskStatus(t)
		if t.report.last != nil {
			if sameReport(st, t.report.last, false) {
				continue
			}
			if sameReport(st, t.report.last, true) && now < t.report.at+reportEvery {
				later(t.report.at + reportEvery)
				continue
			}
		}
		st.Sequence, st.At = next(), when()
		t.report = report{last: st, at: now}
		t.Acked = t.Acked || bug("lost-ack") && t.Status == Stopped
		out = append(out, st)
	}
	return out, wake
}

// unsettled says that nothing is known yet about a container that may run.
func (t *Task) unsettled() bool {
	for _, c := range t.Containers {
		if c.Phase == phaseUnknown {
			return true
		}
	}
	return false
}

// sameReport compares what two statuses say; loosely leaves out what changes
// all the time while an image is pulled, and what a start decides on its way
// to RUNNING, which says it again a moment later.
func sameReport(a, b *wire.TaskStatus, loosely bool) bool {
	a, b = proto.CloneOf(a), proto.CloneOf(b)
	starting := a.GetLastStatus() == Pending && b.GetLastStatus() == Pending
	for _, s := range []*wire.TaskStatus{a, b} {
		s.Sequence, s.At = 0, nil
		if loosely {
			s.Note = ""
			for _, c := range s.GetContainers() {
				c.Pull = nil
				if starting && c.GetLastStatus() == Pending {
					c.Attempt, c.ImageDigest, c.Devices = 0, "", nil
				}
			}
		}
	}
	return proto.Equal(a, b)
}

// taskStatus is the level: everything observed about a task.
func (s *State) taskStatus(t *Task) *wire.TaskStatus {
	st := &wire.TaskStatus{TaskId: t.ID, LastStatus: t.Status, Health: t.healthStatus(), Note: s.note(t)}
	if bug("status-back") && t.Status == Running && t.wantsStart() {
		st.LastStatus = Pending
	}
	if t.Stop != nil {
		st.StopCode, st.StoppedReason = t.Stop.code, t.Stop.reason
	}
	for _, c := range t.Containers {
		st.Containers = append(st.Containers, c.status(t, s.BootID))
	}
	return st
}

func (c *Container) status(t *Task, boot string) *wire.ContainerStatus {
	st := &wire.ContainerStatus{
		Name: c.Spec.GetName(), LastStatus: Pending, Attempt: uint32(c.Number),
		Image: c.Spec.GetImage(), ImageDigest: c.Digest, RuntimeId: c.RuntimeID,
		Health: c.healthStatus(), Pull: c.progress, Reason: c.Reason,
	}
	if c.Number > 1 {
		st.Restarts = uint32(c.Number - 1)
	}
	switch {
	case c.Phase == phaseUnknown && c.Started && c.BootID != boot:
		// Its exit is not known yet, and may stay so while the runtime is
		// away; that it no longer runs needs no runtime to tell.
		st.LastStatus, st.Reason = Stopped, reasonRebooted
	case c.Phase == phaseRunning, c.Phase == phaseUnknown && c.Started:
		st.LastStatus = Running
		st.Pid, st.Ip = uint32(c.PID), c.IP
		mapped := c.Ports
		if len(mapped) == 0 {
			mapped = ports(c.Spec, c.HostPorts)
		}
		for _, p := range mapped {
			st.Ports = append(st.Ports, &wire.PortMapping{
				Name: p.Name, Protocol: p.Protocol, ContainerPort: uint32(p.ContainerPort), HostPort: uint32(p.HostPort),
			})
		}
	case c.Phase == phaseExited:
		st.LastStatus = Stopped
		if c.ExitCode != nil {
			code := int32(*c.ExitCode)
			st.ExitCode = &code
		}
	case t.Status == Stopped:
		st.LastStatus = Stopped
	}
	if c.failure != "" {
		st.Reason = c.failure
	}
	for _, d := range c.Devices {
		st.Devices = append(st.Devices, &wire.DeviceRef{Plugin: d.Plugin, Id: d.ID})
	}
	return st
}

func (c *Container) healthStatus() string {
	if c.Spec.GetHealthCheck() == nil || c.Phase != phaseRunning || c.health.status == "" {
		return HealthUnknown
	}
	return c.health.status
}

// healthStatus of a task is that of its essential containers with a check.
func (t *Task) healthStatus() string {
	all := HealthUnknown
	for _, c := range t.Containers {
		if !c.Spec.GetEssential() || c.Spec.GetHealthCheck() == nil {
			continue
		}
		switch c.healthStatus() {
		case HealthUnhealthy:
			return HealthUnhealthy
		case HealthHealthy:
			if all == HealthUnknown {
				all = HealthHealthy
			}
		default:
			all = "" // healthy only when every one is known to be
		}
	}
	if all == "" {
		return HealthUnknown
	}
	return all
}

// note tells a person what the task does or waits for.
func (s *State) note(t *Task) string {
	var notes []string
	if t.Status != Stopped {
		rt := s.runtime(t.runtimeName())
		switch {
		case rt.missing:
			notes = append(notes, fmt.Sprintf("this device has no runtime plugin %q", rt.name))
		case !rt.known && rt.retry.failures > 0:
			notes = append(notes, fmt.Sprintf("waiting for runtime %s: %s", rt.name, rt.retry.err))
		}
		if s.journal.failures > 0 {
			notes = append(notes, "nothing new is started while the agent's state cannot be written: "+s.journal.err)
		}
		if t.retry.failures > 0 {
			notes = append(notes, "will try again: "+t.retry.err)
		}
		if t.unsure {
			notes = append(notes, "saved state was damaged and does not tell whether it ran already: waiting for the control plane")
		}
		for _, c := range t.Containers {
			if n := c.note(t); n != "" {
				notes = append(notes, c.Spec.GetName()+": "+n)
			}
		}
		if t.awaited.text != "" {
			notes = append(notes, t.awaited.text)
		}
	}
	return strings.Join(notes, "; ")
}

func (c *Container) note(t *Task) string {
	switch {
	case c.pullRetry.failures > 0 && c.failure == "" && t.Stop == nil:
		return "image pull failed, will try again: " + c.pullRetry.err
	case c.pulling:
		return "pulling " + c.Spec.GetImage()
	case c.retry.failures > 0:
		return "will try again: " + c.retry.err
	case t.Stop != nil:
		return ""
	case c.Phase == phaseNone || c.Phase == phaseRecorded:
		for _, d := range c.Spec.GetDependsOn() {
			if !t.met(d) {
				return fmt.Sprintf("waiting for %s to be %s", d.GetContainer(), d.GetCondition())
			}
		}
	case c.Phase == phaseRunning && c.health.why != "":
		return "its health check failed: " + c.health.why
	case c.Phase == phaseExited && t.again(c):
		return "exited, will be started again"
	}
	return ""
}

// Snapshot is a copy of what the agent knows, for its local API.
type Snapshot struct {
	Incarnation string
	Sequence    uint64
	Connected   bool
	Tasks       []TaskSnapshot
	Runtimes    []RuntimeSnapshot
	// Problems are damaged records found at start, strays that are left
	// alone because of them, and a journal that cannot be written.
	Problems []string
}

// TaskSnapshot is one task.
type TaskSnapshot struct {
	ID       string
	Family   string
	Revision uint32
	Cluster  string
	Group    string
	Runtime  string
	Desired  string
	Status   *wire.TaskStatus
	Names    []ContainerName
}

// ContainerName tells which containers a task has.
type ContainerName struct {
	Name      string
	Essential bool
	Attempt   int
}

// RuntimeSnapshot is one runtime plugin as the loop sees it.
type RuntimeSnapshot struct {
	Name  string
	Known bool // listed since it was last seen down
	Error string
	// Images is nil while nothing is known of them, or where there are none.
	Images *ImagesSnapshot
}

func (s *State) snapshot() Snapshot {
	out := Snapshot{Incarnation: s.Applied.Incarnation, Sequence: s.Applied.Sequence}
	out.Problems = append(out.Problems, s.Problems...)
	if s.journal.failures > 0 {
		out.Problems = append(out.Problems, "state cannot be written: "+s.journal.err)
	}
	for _, t := range s.Tasks {
		desired := Running
		if t.unwanted() {
			desired = Stopped
		}
		ts := TaskSnapshot{
			ID: t.ID, Family: t.Spec.GetFamily(), Revision: t.Spec.GetRevision(), Cluster: t.Spec.GetCluster(),
			Group: t.Spec.GetGroup(), Runtime: t.runtimeName(), Desired: desired, Status: s.taskStatus(t),
		}
		for _, c := range t.Containers {
			ts.Names = append(ts.Names, ContainerName{c.Spec.GetName(), c.Spec.GetEssential(), c.Number})
		}
		out.Tasks = append(out.Tasks, ts)
	}
	for name, rt := range s.Runtimes {
		out.Runtimes = append(out.Runtimes, RuntimeSnapshot{Name: name, Known: rt.known, Error: rt.retry.err, Images: s.imagesSnapshot(rt)})
		for _, a := range strayAttempts(rt) {
			if !s.trusted && s.task(a.Task) == nil {
				out.Problems = append(out.Problems, fmt.Sprintf(
					"container %s of runtime %s belongs to no known task and is left alone, because saved state was damaged", a, name))
			}
		}
	}
	return out
}

// latest resolves which attempt's output a request for logs means.
func (s *State) latest(r *wire.LogsRequest) (sdk.Attempt, error) {
	t := s.task(r.GetTaskId())
	if t == nil {
		return sdk.Attempt{}, sdk.Errorf(sdk.NotFound, "read logs", "this device holds no task %s", r.GetTaskId())
	}
	name := r.GetContainer()
	if name == "" {
		for _, c := range t.Containers {
			if c.Spec.GetEssential() || len(t.Containers) == 1 {
				name = c.Spec.GetName()
				break
			}
		}
	}
	c := t.container(name)
	if c == nil {
		return sdk.Attempt{}, sdk.Errorf(sdk.NotFound, "read logs", "task %s has no container %q", t.ID, name)
	}
	a := t.attempt(c)
	if n := int(r.GetAttempt()); n > 0 {
		a.Number = n
	}
	if a.Number == 0 {
		return a, sdk.Errorf(sdk.NotFound, "read logs", "container %s of task %s has not started yet", name, t.ID)
	}
	return a, nil
}
