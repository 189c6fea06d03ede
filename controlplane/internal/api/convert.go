package api

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/belay-edge/belay/controlplane"
	apiv1 "github.com/belay-edge/belay/controlplane/internal/api/v1"
)

func freshness(r *apiv1.Read) controlplane.Freshness {
	min := r.GetMinRevision()
	if min > math.MaxInt64 {
		min = math.MaxInt64
	}
	return controlplane.Freshness{MinRevision: int64(min), Consistent: r.GetConsistent()}
}

func page(p *apiv1.Page) controlplane.Page {
	return controlplane.Page{Limit: int(p.GetLimit()), Token: p.GetToken()}
}

// stamp writes a time; "" for one that has not come.
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z07:00")
}

// each converts a list.
func each[A, B any](as []A, f func(A) B) []B {
	bs := make([]B, len(as))
	for i, a := range as {
		bs[i] = f(a)
	}
	return bs
}

func attributes(of ...map[string]string) []*apiv1.Attribute {
	all := map[string]string{}
	for _, m := range of {
		maps.Copy(all, m)
	}
	return each(slices.Sorted(maps.Keys(all)), func(name string) *apiv1.Attribute {
		return &apiv1.Attribute{Name: name, Value: all[name]}
	})
}

func attributeMap(as []*apiv1.Attribute) (map[string]string, error) {
	m := make(map[string]string, len(as))
	for _, a := range as {
		if _, twice := m[a.GetName()]; twice {
			return nil, controlplane.Errorf(controlplane.InvalidArgument, "attribute %q is given twice", a.GetName())
		}
		m[a.GetName()] = a.GetValue()
	}
	return m, nil
}

func (s *server) activation(a controlplane.Activation) *apiv1.Activation {
	return &apiv1.Activation{
		Id: a.ID, Cluster: a.Cluster, Limit: uint32(a.Limit), Used: uint32(a.Used),
		CreatedAt: stamp(a.CreatedAt), ExpiresAt: stamp(a.ExpiresAt), Expired: s.plane.Expired(a),
		Attributes: attributes(a.Attributes), Description: a.Description,
	}
}

func cluster(c controlplane.ClusterView) *apiv1.Cluster {
	return &apiv1.Cluster{
		Name: c.Name, Status: "ACTIVE", CreatedAt: stamp(c.CreatedAt), RegisteredInstances: uint32(c.Instances),
		ConnectedInstances: uint32(c.Connected), RunningTasks: uint32(c.Running), PendingTasks: uint32(c.Pending),
	}
}

func instance(v controlplane.InstanceView) *apiv1.Instance {
	cpu, memory := v.Remaining()
	i := &apiv1.Instance{
		Id: v.ID, Cluster: v.Cluster, Status: v.Status, Connected: v.Connected, LastSeenAt: stamp(v.LastSeen),
		RegisteredAt: stamp(v.RegisteredAt), AgentVersion: v.AgentVersion, Hostname: v.Hostname,
		// What an operator set never hides what the device tells.
		Attributes: attributes(v.Attributes, v.Facts.Attributes),
		Resources: &apiv1.InstanceResources{
			Registered: &apiv1.Resources{Cpu: uint32(v.Facts.CPU), Memory: uint32(v.Facts.MemoryMiB)},
			Remaining: &apiv1.Resources{Cpu: uint32(cpu), Memory: uint32(memory), Ports: each(v.Used.Ports, func(k controlplane.PortKey) string {
				return fmt.Sprintf("%d/%s", k.Port, k.Protocol)
			})},
		},
		RunningTasks: uint32(v.Running), PendingTasks: uint32(v.Pending), ActivationId: v.ActivationID,
		Plugins: each(v.Facts.Plugins, func(p controlplane.PluginInfo) *apiv1.Plugin {
			return &apiv1.Plugin{
				Name: p.Name, Version: p.Version, Kinds: p.Kinds, State: p.State,
				LastError: p.LastError, Checksum: p.Checksum, Restarts: uint32(p.Restarts),
				ProtocolVersion: uint32(p.Protocol), MemoryBytes: p.MemoryBytes, MemoryMaxBytes: p.MemoryMaxBytes, ProtectionsMissing: p.Missing,
			}
		}),
	}
	i.Devices = each(v.Devices, func(d controlplane.DeviceView) *apiv1.Device {
		return &apiv1.Device{
			Plugin: d.Plugin, Id: d.ID, Kind: d.Kind, Ready: d.Ready, Health: d.Health, Reason: d.Reason,
			Shares: uint32(d.Shares), Attributes: attributes(d.Attributes),
			UsedBy: each(d.UsedBy, func(u controlplane.DeviceUse) *apiv1.DeviceUse {
				return &apiv1.DeviceUse{Task: u.Task, Container: u.Container}
			}),
		}
	})
	if c := v.Conflict; c != nil {
		i.Conflict = &apiv1.Conflict{
			Since: stamp(c.Since), Reported: c.Reported,
			OnlyOnDevice: each(c.OnlyOnDevice, conflictTask), OnlyInStore: each(c.OnlyInStore, conflictTask),
		}
	}
	if d := v.Duplicate; d != nil {
		i.Duplicate = &apiv1.Duplicate{Hostname: d.Hostname, Address: d.Address, FirstSeenAt: stamp(d.FirstSeen), LastSeenAt: stamp(d.LastSeen)}
	}
	if v.Connected {
		i.Transport, i.ConnectedAt = v.Session.Transport, stamp(v.Session.ConnectedAt)
	}
	return i
}

func conflictTask(t controlplane.Task) *apiv1.ConflictTask {
	return &apiv1.ConflictTask{
		Id: t.ID, TaskDefinition: fmt.Sprintf("%s:%d", t.Family, t.Revision), LastStatus: t.LastStatus, DesiredStatus: t.DesiredStatus,
	}
}

func taskDefinition(d controlplane.TaskDefinitionRecord) *apiv1.TaskDefinition {
	return &apiv1.TaskDefinition{
		Family: d.Family, Revision: uint32(d.Revision), Status: d.Status, RegisteredAt: stamp(d.RegisteredAt),
		Document: string(d.Document), Warnings: d.Warnings,
	}
}

func (s *server) task(t controlplane.Task) *apiv1.Task {
	reason := t.StoppedReason
	if reason == "" {
		reason = t.StopReason
	}
	return &apiv1.Task{
		Id: t.ID, Cluster: t.Cluster, TaskDefinition: fmt.Sprintf("%s:%d", t.Family, t.Revision), Group: t.Group,
		Instance: t.Instance, LastStatus: t.LastStatus, DesiredStatus: t.DesiredStatus, HealthStatus: t.Health,
		StopCode: t.StopCode, StoppedReason: reason, CreatedAt: stamp(t.CreatedAt), StartedAt: stamp(t.StartedAt),
		StoppingAt: stamp(t.StoppingAt), StoppedAt: stamp(t.StoppedAt), StartedBy: t.StartedBy,
		Containers: each(t.Containers, container), Note: t.Note, Version: uint32(t.Version), Runtime: t.Runtime,
		InstanceConnected: s.plane.Connected(t.Instance),
	}
}

func container(c controlplane.ContainerStatus) *apiv1.Container {
	o := &apiv1.Container{
		Name: c.Name, LastStatus: c.LastStatus, Reason: c.Reason, Image: c.Image, ImageDigest: c.ImageDigest,
		RuntimeId: c.RuntimeID, Pid: uint32(c.PID), Attempt: uint32(c.Attempt), Restarts: uint32(c.Restarts),
		HealthStatus: c.Health, Ip: c.IP, Essential: c.Essential,
		NetworkBindings: each(c.Ports, func(p controlplane.PortBinding) *apiv1.PortMapping {
			return &apiv1.PortMapping{Name: p.Name, Protocol: p.Protocol, ContainerPort: uint32(p.ContainerPort), HostPort: uint32(p.HostPort)}
		}),
	}
	o.Devices = each(c.Devices, func(k controlplane.DeviceKey) *apiv1.DeviceRef {
		return &apiv1.DeviceRef{Plugin: k.Plugin, Id: k.ID}
	})
	if c.ExitCode != nil {
		code := int32(*c.ExitCode)
		o.ExitCode = &code
	}
	if p := c.Pull; p != nil {
		o.Pull = &apiv1.PullProgress{Layers: uint32(p.Layers), LayersDone: uint32(p.LayersDone), Kib: uint32(p.Bytes >> 10), KibDone: uint32(p.BytesDone >> 10)}
	}
	return o
}
