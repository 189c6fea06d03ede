package controlplane

import (
	"reflect"
	"slices"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// rank orders the statuses; -1 for one that is none.
func rank(status string) int {
	return slices.Index([]string{
		StatusProvisioning, StatusPending, StatusActivating, StatusRunning,
		StatusDeactivating, StatusStopping, StatusDeprovisioning, StatusStopped,
	}, status)
}

// merged says what a report did to a task.
type merged int

const (
	unchanged merged = iota
	transient        // only what is not worth a write: progress of a pull
	changed
)

// merge puts an observed status into a task, never backwards: a report of an
// earlier status is an old one, and a stopped task changes no more.
func merge(t Task, s *wire.TaskStatus, now time.Time) (Task, merged) {
	before := t
	now = t.notBefore(now)
	at := rank(s.LastStatus)
	if at < 0 || at < rank(t.LastStatus) || t.LastStatus == StatusStopped {
		return t, unchanged
	}
	t.LastStatus, t.Health, t.Note = s.LastStatus, s.Health, s.Note
	if at >= rank(StatusRunning) && t.StartedAt.IsZero() && ran(s) {
		t.StartedAt = now
	}
	if at > rank(StatusRunning) && t.StoppingAt.IsZero() {
		t.StoppingAt = now
	}
	if s.StoppedReason != "" {
		t.StoppedReason = s.StoppedReason
	}
	if s.StopCode != "" && t.StopCode == "" {
		t.StopCode = s.StopCode
	}
	if at == rank(StatusStopped) {
		// Whatever was wished, nobody shall start it again.
		t.DesiredStatus, t.StoppedAt, t.Note = StatusStopped, now, ""
		if t.StoppedReason == "" {
			t.StoppedReason = t.StopReason
		}
	}
	t.Containers = mergeContainers(t.Containers, s.Containers)
	switch {
	case reflect.DeepEqual(before, t):
		return before, unchanged
	case reflect.DeepEqual(durable(before), durable(t)):
		t.Version++
		return t, transient
	}
	t.Version++
	return t, changed
}

// notBefore is now, or the latest of the task's times when the clock has been
// set back since: none of what follows comes before what went before it.
func (t Task) notBefore(now time.Time) time.Time {
	for _, past := range []time.Time{t.CreatedAt, t.StartedAt, t.StoppingAt} {
		if past.After(now) {
			now = past
		}
	}
	return now
}

// ran tells whether any container was started.
func ran(s *wire.TaskStatus) bool {
	return s.LastStatus == StatusRunning || slices.ContainsFunc(s.Containers, func(c *wire.ContainerStatus) bool {
		return c.ExitCode != nil || c.Pid != 0 || c.RuntimeId != ""
	})
}

// durable is a task without what need not survive a restart.
func durable(t Task) Task {
	t.Containers = slices.Clone(t.Containers)
	for i := range t.Containers {
		t.Containers[i].Pull = nil
	}
	return t
}

// maxReported bounds what a device can make of a task, whose definition has
// far fewer.
const maxReported = 64

// mergeContainers takes over what is reported of the containers a task has,
// and of any other, at the end. An attempt is never followed by an earlier
// one, and within one no status by an earlier one; an exit code once known of
// an attempt stays known.
func mergeContainers(have []ContainerStatus, report []*wire.ContainerStatus) []ContainerStatus {
	out := slices.Clone(have)
	for _, r := range report {
		if r == nil {
			continue
		}
		n := containerFrom(r)
		i := slices.IndexFunc(out, func(c ContainerStatus) bool { return c.Name == n.Name })
		if i < 0 {
			if len(out) < maxReported {
				out = append(out, n)
			}
			continue
		}
		old := out[i]
		if n.Attempt < old.Attempt || n.Attempt == old.Attempt && rank(n.LastStatus) < rank(old.LastStatus) {
			continue
		}
		n.Essential = old.Essential
		if n.Image == "" {
			n.Image = old.Image
		}
		if n.ImageDigest == "" {
			n.ImageDigest = old.ImageDigest
		}
		if n.Attempt == old.Attempt && n.ExitCode == nil {
			n.ExitCode = old.ExitCode
		}
		out[i] = n
	}
	return out
}

func containerFrom(r *wire.ContainerStatus) ContainerStatus {
	c := ContainerStatus{
		Name: r.Name, LastStatus: r.LastStatus, Reason: r.Reason, Image: r.Image, ImageDigest: r.ImageDigest,
		RuntimeID: r.RuntimeId, PID: int(r.Pid), Attempt: int(r.Attempt), Restarts: int(r.Restarts), Health: r.Health, IP: r.Ip,
	}
	if r.ExitCode != nil {
		code := int(*r.ExitCode)
		c.ExitCode = &code
	}
	for _, p := range r.Ports {
		c.Ports = append(c.Ports, PortBinding{Name: p.Name, Protocol: p.Protocol, ContainerPort: int(p.ContainerPort), HostPort: int(p.HostPort)})
	}
	c.Devices = chosenFrom(r.Devices)
	if p := r.Pull; p != nil {
		c.Pull = &PullProgress{Layers: int(p.Layers), LayersDone: int(p.LayersDone), Bytes: int64(p.Bytes), BytesDone: int64(p.BytesDone)}
	}
	return c
}
