package controlplane

import (
	"context"
	"errors"
	"maps"
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/controlplane/wire"
)

// Mark is a moment of a store's history, see wire.Mark.
type Mark struct {
	Life     string `json:"life,omitempty"`
	Revision int64  `json:"revision,omitempty"`
}

// Position is how far a device says it has come with its control plane.
type Position struct {
	Incarnation string `json:"incarnation,omitempty"`
	Sequence    uint64 `json:"sequence,omitempty"`
	Mark        Mark   `json:"mark,omitzero"`
}

// Divergence is kept of an instance whose device relies on what the store has
// lost, from when it was noticed until an operator settles it. Meanwhile the
// device is sent wishes to stop and tasks made since, and nothing else.
type Divergence struct {
	Since time.Time `json:"since"`
	// From is where the device was when it was noticed.
	From Position `json:"from"`
	// Sequence is that of the instance's assignments then: tasks of later ones
	// were made since, and the device cannot have had them before.
	Sequence uint64 `json:"sequence"`
	// Reported: the device has told what it holds.
	Reported bool `json:"reported,omitempty"`
	// Ghosts are tasks that should run as far as the store knows, and that the
	// device has ended, or never had.
	Ghosts []string `json:"ghosts,omitempty"`
}

// Stray is a task that a device holds and the store does not know.
type Stray struct {
	Task   Task   `json:"task"`
	Demand Demand `json:"demand"`
	Spec   []byte `json:"spec"` // wire.TaskSpec, protobuf
}

// ConflictView is a Divergence for an operator.
type ConflictView struct {
	Since        time.Time
	Reported     bool
	OnlyOnDevice []Task // by id
	OnlyInStore  []Task
}

// Greeting is how a device is met, see Devices.Meet.
type Greeting struct {
	Reconcile bool
	Sequence  uint64
}

const (
	// maxStrays bounds what is kept of one device; one that holds more is not
	// honest, or has been alone for too long to be adopted.
	maxStrays = 1000
	// settleBatch is how many tasks one transaction of a settlement moves.
	settleBatch = 25

	ghostReason = "the device had ended this task, or never had it, when the control plane was restored from a backup"
)

// lost tells whether a device relies on what the store does not have.
func (p *Plane) lost(instance string, at Position) bool {
	switch {
	case at.Incarnation != "" && at.Incarnation != p.incarnation:
		return true
	case at.Mark.Life != "":
		return !p.lives.has(at.Mark, p.state.at())
	case at.Incarnation == "":
		return false // a new device
	}
	// An agent that knows no marks.
	var have uint64
	p.state.read(func(r *records, _ int64) { have = r.bindings[instance].V.Sequence })
	return at.Sequence > have
}

// Meet implements Devices.
func (p *Plane) Meet(ctx context.Context, instance string, at Position, reconciles bool) (Greeting, error) {
	e, err := p.instance(instance)
	if err != nil {
		return Greeting{}, err
	}
	switch d := e.V.Divergence; {
	case !p.lost(instance, at):
		return Greeting{Reconcile: d != nil && !d.Reported && reconciles, Sequence: at.Sequence}, nil
	case d == nil && e.V.Settled > 0 && at == e.V.SettledFrom:
		return Greeting{}, nil // settled, which it has not heard of yet
	case d != nil && d.From == at:
		return Greeting{Reconcile: !d.Reported && reconciles}, nil
	}
	_, revision, err := mutate(ctx, p, "noting what the store has lost", "", nil, func() (*change, struct{}, error) {
		e, err := p.instance(instance)
		if err != nil {
			return nil, struct{}{}, err
		}
		var b entry[Bindings]
		p.state.read(func(r *records, _ int64) { b = r.bindings[instance] })
		i := e.V
		i.Divergence = &Divergence{Since: p.now(), From: at, Sequence: b.V.Sequence}
		if e.V.Divergence != nil {
			i.Divergence.Since = e.V.Divergence.Since
		}
		c := &change{}
		c.compare(instanceKey(instance), e.Mod)
		c.compare(bindingsKey(instance), b.Mod)
		return c, struct{}{}, c.put(instanceKey(instance), i)
	})
	if err != nil {
		return Greeting{}, err
	}
	p.log.Warn("a device relies on what the store has lost: was the store restored from a backup? Nothing on the device is stopped or started for it until it is settled with \"belay instance adopt\" or \"belay instance drop\"",
		"instance", instance)
	// Memory that lags would take the device's tasks for ones to be removed.
	return Greeting{Reconcile: reconciles}, p.caughtUp(ctx, revision)
}

// withheld tells whether a task is kept from a device in conflict.
func (d *Divergence) withheld(t Task) bool {
	return d != nil && t.DesiredStatus != StatusStopped && t.Sequence <= d.Sequence
}

// reportUnknown takes a status of a task that the store does not have: of one
// in conflict it is kept for the operator's decision, of others notFound is
// the answer.
func (p *Plane) reportUnknown(ctx context.Context, instance string, s *wire.TaskStatus, notFound error) (*change, error) {
	i, err := p.readInstance(ctx, instance) // from the store: a task may depend on it
	if err != nil {
		return nil, err
	}
	d := i.Divergence
	if d == nil {
		return nil, notFound
	}
	var e entry[Stray]
	var known bool
	p.state.read(func(r *records, _ int64) { e, known = r.strays[instance][s.TaskId] })
	switch {
	case known:
	case !d.Reported && slices.Contains(i.Capabilities, wire.CapabilityReconcile):
		return nil, Errorf(Unavailable, "task %s: the device has yet to tell what it holds", s.TaskId)
	default:
		return nil, nil // over before it was told, or nobody could tell
	}
	t, what := merge(e.V.Task, s, p.now())
	if what != changed {
		return nil, nil
	}
	stray := e.V
	stray.Task = t
	c, key := &change{}, strayKey(instance, t.ID)
	c.compare(key, e.Mod)
	return c, c.put(key, stray)
}

// strayOf makes a record of what a device holds; nil when it cannot be one.
func (p *Plane) strayOf(i Instance, h *wire.Holding) *Stray {
	spec := h.GetSpec()
	if len(h.GetTaskId()) != 32 || !isHex(h.GetTaskId()) || !isName(spec.GetFamily()) || len(spec.GetGroup()) > 255 ||
		spec.GetRevision() > math.MaxInt32 || len(spec.GetContainers()) > maxReported || proto.Size(h) > maxReport {
		return nil
	}
	b, err := proto.Marshal(spec)
	if err != nil {
		return nil
	}
	d := demandOf(spec)
	t := Task{
		ID: h.TaskId, Cluster: i.Cluster, Family: spec.Family, Revision: int(spec.Revision), Group: spec.Group,
		Instance: i.ID, Runtime: d.Runtime, DesiredStatus: StatusRunning, LastStatus: StatusProvisioning,
		CreatedAt: p.now(), Version: 1, Containers: planned(spec),
	}
	if h.Desired == StatusStopped {
		t.DesiredStatus, t.StopCode, t.StopReason = StatusStopped, StopCodeUser, bounded(h.StopReason)
	}
	if s := h.GetStatus(); s != nil {
		boundStatus(s)
		t, _ = merge(t, s, p.now())
		t.Version = 1
	}
	return &Stray{Task: t, Demand: d, Spec: b}
}

// ReportHoldings implements Devices.
func (p *Plane) ReportHoldings(ctx context.Context, instance string, hs []*wire.Holding) error {
	e, err := p.instance(instance)
	if err != nil || e.V.Divergence == nil {
		return err
	}
	held := map[string]bool{}
	fresh := map[string]*Stray{}
	for _, h := range hs {
		held[h.GetTaskId()] = true
		if h.GetStatus().GetLastStatus() == StatusStopped {
			continue // over: nothing to decide
		}
		t, err := p.task(h.GetTaskId())
		if errors.Is(err, NotFound) {
			err = p.confirmGone(ctx, h.GetTaskId(), err)
		}
		switch {
		case errors.Is(err, NotFound):
		case err != nil:
			return err
		case t.V.Instance != instance:
			p.log.Warn("a device holds a task of another instance", "instance", instance, "task", h.GetTaskId(), "of", t.V.Instance)
			continue
		default:
			continue
		}
		if s := p.strayOf(e.V, h); s != nil && len(fresh) < maxStrays {
			fresh[h.GetTaskId()] = s
		} else {
			p.log.Warn("a task that only the device knows cannot be kept", "instance", instance, "task", h.GetTaskId())
		}
	}
	if err := p.keepStrays(ctx, instance, true, fresh); err != nil {
		return err
	}
	_, _, err = mutate(ctx, p, "noting what a device holds", "", nil, func() (*change, struct{}, error) {
		e, err := p.instance(instance)
		if err != nil || e.V.Divergence == nil {
			return nil, struct{}{}, err
		}
		i, d := e.V, *e.V.Divergence
		var b entry[Bindings]
		d.Reported, d.Ghosts = true, nil
		p.state.read(func(r *records, _ int64) {
			b = r.bindings[instance]
			for id := range r.onInstance[instance] {
				if t := r.tasks[id].V; t.LastStatus != StatusStopped && d.withheld(t) && !held[id] {
					d.Ghosts = append(d.Ghosts, id)
				}
			}
		})
		slices.Sort(d.Ghosts)
		c := &change{}
		c.compare(instanceKey(instance), e.Mod)
		c.compare(bindingsKey(instance), b.Mod)
		if i.Divergence = &d; len(d.Ghosts) == 0 && len(fresh) == 0 {
			// What was lost was seen to have left nothing to decide.
			i.settle(&b.V)
			if err := c.put(bindingsKey(instance), b.V); err != nil {
				return nil, struct{}{}, err
			}
		}
		return c, struct{}{}, c.put(instanceKey(instance), i)
	})
	return err
}

// keepStrays replaces the strays of an instance, if it is in conflict, or not
// in conflict, when the change is made.
func (p *Plane) keepStrays(ctx context.Context, instance string, conflict bool, fresh map[string]*Stray) error {
	var gone []string
	p.state.read(func(r *records, _ int64) {
		for id := range r.strays[instance] {
			if fresh[id] == nil {
				gone = append(gone, id)
			}
		}
	})
	ids := append(slices.Sorted(maps.Keys(fresh)), gone...)
	for batch := range slices.Chunk(ids, settleBatch) {
		_, _, err := mutate(ctx, p, "keeping what only a device knows", "", nil, func() (*change, struct{}, error) {
			var e entry[Instance]
			p.state.read(func(r *records, _ int64) { e = r.instances[instance] })
			if (e.V.Divergence != nil) != conflict {
				return nil, struct{}{}, nil
			}
			c := &change{}
			c.compare(instanceKey(instance), e.Mod)
			for _, id := range batch {
				if s := fresh[id]; s == nil {
					c.delete(strayKey(instance, id))
				} else if err := c.put(strayKey(instance, id), s); err != nil {
					return nil, struct{}{}, err
				}
			}
			return c, struct{}{}, nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// settle ends a divergence: from this sequence on the store speaks for all
// that the device holds.
func (i *Instance) settle(b *Bindings) {
	b.Sequence++
	i.Settled, i.SettledFrom, i.Divergence = b.Sequence, i.Divergence.From, nil
}

// conflict is what an operator is shown; nil without one.
func (r *records) conflict(i Instance) *ConflictView {
	d := i.Divergence
	if d == nil {
		return nil
	}
	v := &ConflictView{Since: d.Since, Reported: d.Reported}
	for _, id := range slices.Sorted(maps.Keys(r.strays[i.ID])) {
		v.OnlyOnDevice = append(v.OnlyOnDevice, r.strays[i.ID][id].V.Task)
	}
	for _, id := range d.Ghosts {
		if t, ok := r.tasks[id]; ok && t.V.LastStatus != StatusStopped && d.withheld(t.V) {
			v.OnlyInStore = append(v.OnlyInStore, t.V)
		}
	}
	return v
}

// demandOf is the room that a task takes whose definition is not here.
func demandOf(s *wire.TaskSpec) Demand {
	amount := func(n uint64) int { return int(min(n, math.MaxInt32)) }
	d := Demand{Runtime: s.GetRuntime(), Network: s.GetNetwork(), Arch: s.GetPlatform().GetArchitecture()}
	for _, c := range s.GetContainers() {
		d.CPU += amount(c.GetCpu())
		if r := c.GetMemoryReservationMib(); r != 0 {
			d.MemoryMiB += amount(r)
		} else {
			d.MemoryMiB += amount(c.GetMemoryMib())
		}
		for _, m := range c.GetPorts() {
			if m.GetHostPort() != 0 {
				d.Ports = append(d.Ports, PortKey{Protocol: m.GetProtocol(), Port: amount(uint64(m.GetHostPort()))})
			}
		}
		if rs := c.GetDeviceRequests(); len(rs) > 0 {
			dd := DeviceDemand{Container: c.GetName()}
			for _, r := range rs {
				dd.Requests = append(dd.Requests, DeviceRequest{Kind: r.GetKind(), Count: amount(uint64(r.GetCount())), Where: r.GetWhere()})
			}
			d.Devices = append(d.Devices, dd)
		}
	}
	if s.GetCpu() != 0 {
		d.CPU = amount(s.GetCpu())
	}
	if s.GetMemoryMib() != 0 {
		d.MemoryMiB = amount(s.GetMemoryMib())
	}
	return d
}
