package controlplane

import (
	"bytes"
	"context"
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/belay-edge/belay/controlplane/wire"
)

// InstanceView is an instance with what is known of it beside its record.
type InstanceView struct {
	Instance
	Connected        bool
	Session          Session   // of a connected one
	LastSeen         time.Time // zero: not since this process started
	Used             Demand    // by its tasks; ports include those the device reserves
	Running, Pending int
	Devices          []DeviceView // by plugin and id
	Conflict         *ConflictView
}

// Remaining is the room left on it.
func (v *InstanceView) Remaining() (cpu, memoryMiB int) {
	return max(0, v.Facts.CPU-v.Used.CPU), max(0, v.Facts.MemoryMiB-v.Used.MemoryMiB)
}

// used sums up what an instance's tasks take, those that only the device knows
// of among them, and the ports its device keeps.
func used(i Instance, b Bindings, strays map[string]entry[Stray]) Demand {
	var d Demand
	d.Ports = slices.Clone(i.Facts.ReservedPorts)
	d.Devices = b.devicesUsed()
	add := func(t Demand) {
		d.CPU += t.CPU
		d.MemoryMiB += t.MemoryMiB
		d.Ports = append(d.Ports, t.Ports...)
	}
	for _, t := range b.Tasks {
		add(t)
	}
	for _, id := range slices.Sorted(maps.Keys(strays)) {
		if s := strays[id].V; s.Task.LastStatus != StatusStopped {
			add(s.Demand)
			d.Devices = append(d.Devices, s.Demand.Devices...)
		}
	}
	slices.SortFunc(d.Ports, func(a, b PortKey) int {
		if a.Port != b.Port {
			return a.Port - b.Port
		}
		return bytes.Compare([]byte(a.Protocol), []byte(b.Protocol))
	})
	d.Ports = slices.Compact(d.Ports)
	return d
}

// view makes the view but for the session: no call out with records held.
func (r *records) view(i Instance) InstanceView {
	v := InstanceView{Instance: i, Used: used(i, r.bindings[i.ID].V, r.strays[i.ID]), Devices: devicesOf(i, r.bindings[i.ID].V), Conflict: r.conflict(i)}
	for id := range r.onInstance[i.ID] {
		running, pending := r.tasks[id].V.phase()
		v.Running += running
		v.Pending += pending
	}
	return v
}

func (p *Plane) connection(v *InstanceView) {
	if v.Status == InstanceActive {
		v.Session, v.Connected = p.tunnels.Session(v.ID)
	}
	v.LastSeen = p.tunnels.LastSeen(v.ID)
}

// ListInstances returns the ACTIVE instances of a cluster ("": of all).
func (p *Plane) ListInstances(ctx context.Context, f Freshness, cluster string, page Page) (vs []InstanceView, next string, revision int64, err error) {
	if err := p.fresh(ctx, f); err != nil {
		return nil, "", 0, err
	}
	var known bool
	p.state.read(func(r *records, at int64) {
		revision = at
		_, known = r.clusters[cluster]
		for _, e := range r.instances {
			if e.V.Status == InstanceActive && (cluster == "" || e.V.Cluster == cluster) {
				vs = append(vs, InstanceView{Instance: e.V})
			}
		}
	})
	if cluster != "" && !known {
		return nil, "", 0, noCluster(cluster)
	}
	if vs, next, err = paginate(vs, page, func(v InstanceView) string { return byTime(v.RegisteredAt, v.ID) }); err != nil {
		return nil, "", 0, err
	}
	p.state.read(func(r *records, _ int64) {
		for i := range vs {
			vs[i] = r.view(vs[i].Instance)
		}
	})
	for i := range vs {
		p.connection(&vs[i])
	}
	return vs, next, revision, nil
}

// DescribeInstance returns one instance, also a deregistered one. id may be a
// unique prefix.
func (p *Plane) DescribeInstance(ctx context.Context, f Freshness, id string) (v InstanceView, revision int64, err error) {
	if err := p.fresh(ctx, f); err != nil {
		return InstanceView{}, 0, err
	}
	if id, err = p.findInstance(id); err != nil {
		return InstanceView{}, 0, err
	}
	p.state.read(func(r *records, at int64) { v, revision = r.view(r.instances[id].V), at })
	p.connection(&v)
	return v, revision, nil
}

func (p *Plane) findInstance(id string) (string, error) {
	return p.find("instance", id, func(r *records) []string { return matching(maps.Keys(r.instances), id) })
}

func (p *Plane) readInstance(ctx context.Context, id string) (Instance, error) {
	kv, err := p.store.Get(ctx, instanceKey(id))
	if err != nil {
		return Instance{}, err
	}
	if kv.ModRevision == 0 {
		return Instance{}, Errorf(NotFound, "no instance %s here: was the device enrolled with another control plane, or this one restored from a backup?", id)
	}
	var i Instance
	if err := json.Unmarshal(kv.Value, &i); err != nil {
		return Instance{}, fmt.Errorf("reading instance %s: %w", id, err)
	}
	return i, nil
}

// Authenticate implements Devices. It asks the store: a revocation counts
// from the moment it is written.
func (p *Plane) Authenticate(ctx context.Context, instance, keyFingerprint string) (Instance, error) {
	if len(instance) != 32 || !isHex(instance) {
		return Instance{}, Errorf(InvalidArgument, "an instance id is 32 hex digits")
	}
	ctx, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	i, err := p.readInstance(ctx, instance)
	if err != nil {
		return Instance{}, err
	}
	if subtle.ConstantTimeCompare([]byte(i.KeyFingerprint), []byte(keyFingerprint)) != 1 {
		return Instance{}, Errorf(Unauthenticated, "instance %s has another key than this device: enrol the device again", instance)
	}
	if i.Status != InstanceActive {
		return Instance{}, Errorf(Denied, "instance %s was deregistered: remove the device's identity and enrol it again, if it should come back", instance)
	}
	return i, nil
}

// bound cuts what a device tells of itself to what is worth storing, and
// refuses what is no description of a device.
func (h *Hello) bound() error {
	for _, text := range []*string{&h.AgentVersion, &h.Hostname, &h.HashedMachineID} {
		*text = bounded(*text)
	}
	for i := range h.Facts.Plugins {
		h.Facts.Plugins[i].LastError = bounded(h.Facts.Plugins[i].LastError)
	}
	h.Capabilities = h.Capabilities[:min(len(h.Capabilities), maxCapabilities)]
	for i := range h.Capabilities {
		h.Capabilities[i] = bounded(h.Capabilities[i])
	}
	h.Facts.bound()
	b, err := json.Marshal(h)
	for err == nil && len(b) > maxReport && len(h.Facts.Devices) > 0 {
		// An inventory that is too large costs its devices, not the session.
		h.Facts.Devices = h.Facts.Devices[:len(h.Facts.Devices)/2]
		b, err = json.Marshal(h)
	}
	if err != nil {
		return fmt.Errorf("encoding what a device tells of itself: %w", err)
	}
	if len(b) > maxReport {
		return Errorf(InvalidArgument, "what the device tells of itself has %d bytes, at most %d are stored: does a plugin tell too much?", len(b), maxReport)
	}
	return nil
}

// ReportFacts implements Devices.
func (p *Plane) ReportFacts(ctx context.Context, instance string, h Hello) error {
	if err := h.bound(); err != nil {
		return err
	}
	_, _, err := mutate(ctx, p, "storing what a device tells of itself", "", nil, func() (*change, struct{}, error) {
		e, err := p.instance(instance)
		if err != nil {
			return nil, struct{}{}, err
		}
		i := e.V
		i.AgentVersion, i.Hostname, i.HashedMachineID, i.Facts = h.AgentVersion, h.Hostname, h.HashedMachineID, h.Facts
		i.Capabilities = h.Capabilities
		before, err := json.Marshal(e.V)
		if err != nil {
			return nil, struct{}{}, err
		}
		after, err := json.Marshal(i)
		if err != nil {
			return nil, struct{}{}, err
		}
		if bytes.Equal(before, after) {
			return nil, struct{}{}, nil // no write when nothing changed
		}
		c := &change{}
		c.compare(instanceKey(instance), e.Mod)
		return c, struct{}{}, c.put(instanceKey(instance), i)
	})
	return err
}

// maxCapabilities bounds how many an agent may tell.
const maxCapabilities = 64

func (p *Plane) instance(id string) (e entry[Instance], err error) {
	var ok bool
	p.state.read(func(r *records, _ int64) { e, ok = r.instances[id] })
	if !ok {
		return e, Errorf(NotFound, "no instance %s", id)
	}
	return e, nil
}

// deregisteredReason is why tasks of a deregistered instance are STOPPED.
const deregisteredReason = "instance deregistered"

// DeregisterInstance revokes an instance at once: its session ends, its key
// is refused from now on, and its tasks count as STOPPED, although the device
// may go on running them. With tasks on it, that takes force.
func (p *Plane) DeregisterInstance(ctx context.Context, token, id string, force bool) (v InstanceView, revision int64, err error) {
	if id, err = p.findInstance(id); err != nil {
		return InstanceView{}, 0, err
	}
	type request struct {
		ID    string
		Force bool
	}
	_, revision, err = mutate(ctx, p, "deregistering an instance", token, request{id, force}, func() (*change, struct{}, error) {
		var e entry[Instance]
		var bindings entry[Bindings]
		var tasks int
		p.state.read(func(r *records, _ int64) {
			e, bindings = r.instances[id], r.bindings[id]
			for t := range r.onInstance[id] {
				if r.tasks[t].V.LastStatus != StatusStopped {
					tasks++
				}
			}
		})
		if e.V.Status != InstanceActive {
			return nil, struct{}{}, nil
		}
		if tasks > 0 && !force {
			return nil, struct{}{}, Errorf(Precondition, "instance %s has %d task(s) that are not STOPPED: stop them first, or force it", id, tasks)
		}
		e.V.Status, e.V.Divergence, e.V.Duplicate = InstanceInactive, nil, nil
		c := &change{}
		c.compare(instanceKey(id), e.Mod)
		c.compare(bindingsKey(id), bindings.Mod) // nobody places a task meanwhile
		return c, struct{}{}, c.put(instanceKey(id), e.V)
	})
	if err != nil {
		return InstanceView{}, 0, err
	}
	p.tunnels.Disconnect(id, wire.CodeDenied, fmt.Sprintf("instance %s was deregistered", id))
	if at, err := p.abandon(ctx, id); err != nil {
		// The sweep goes on with it: the instance itself is revoked.
		p.log.Warn("marking the tasks of a deregistered instance failed, to be tried again", "instance", id, "error", err)
	} else {
		revision = max(revision, at)
	}
	p.state.read(func(r *records, _ int64) { v = r.view(r.instances[id].V) })
	p.connection(&v)
	return v, revision, nil
}

// abandon marks the tasks of a deregistered instance STOPPED, in batches.
func (p *Plane) abandon(ctx context.Context, id string) (revision int64, err error) {
	for more := true; more; {
		_, revision, err = mutate(ctx, p, "stopping tasks of a deregistered instance", "", nil, func() (*change, struct{}, error) {
			more = false
			c := &change{}
			var bindings entry[Bindings]
			var tasks []entry[Task]
			p.state.read(func(r *records, _ int64) {
				bindings = r.bindings[id]
				for t := range r.onInstance[id] {
					if r.tasks[t].V.LastStatus != StatusStopped {
						tasks = append(tasks, r.tasks[t])
					}
				}
			})
			if len(tasks) > 50 {
				tasks, more = tasks[:50], true
			}
			if len(tasks) == 0 && len(bindings.V.Tasks) == 0 {
				return nil, struct{}{}, nil
			}
			b := bindings.V
			b.Sequence++
			b.Tasks = maps.Clone(b.Tasks)
			if !more {
				b.Tasks = nil
			}
			for _, e := range tasks {
				t := e.V
				t.DesiredStatus, t.LastStatus, t.StopCode, t.StoppedReason = StatusStopped, StatusStopped, StopCodeInstanceGone, deregisteredReason
				t.Sequence, t.StoppedAt, t.Note = b.Sequence, t.notBefore(p.now()), ""
				t.Version++
				if t.StoppingAt.IsZero() {
					t.StoppingAt = t.StoppedAt
				}
				delete(b.Tasks, t.ID)
				c.compare(taskKey(t.ID), e.Mod)
				if err := c.put(taskKey(t.ID), t); err != nil {
					return nil, struct{}{}, err
				}
			}
			c.compare(bindingsKey(id), bindings.Mod)
			return c, struct{}{}, c.put(bindingsKey(id), b)
		})
		if err != nil {
			return 0, err
		}
	}
	return revision, nil
}
