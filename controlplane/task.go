package controlplane

import (
	"context"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/controlplane/wire"
)

// MaxRunCount is how many tasks one call may start.
const MaxRunCount = 10

// phase counts a task as running or, before that, pending.
func (t Task) phase() (running, pending int) {
	switch t.LastStatus {
	case StatusProvisioning, StatusPending, StatusActivating:
		return 0, 1
	case StatusRunning:
		return 1, 0
	}
	return 0, 0
}

// NewTasks asks for tasks to be run.
type NewTasks struct {
	Token          string `json:"-"`
	Cluster        string `json:"cluster"`        // "": default
	TaskDefinition string `json:"taskDefinition"` // family or family:revision
	Count          int    `json:"count"`          // 0: 1
	Instance       string `json:"instance"`       // "": any; may be a unique prefix
	Group          string `json:"group"`          // "": family:<family>
	StartedBy      string `json:"startedBy"`
}

func (n *NewTasks) validate() error {
	switch {
	case !isName(n.Cluster):
		return badClusterName(n.Cluster)
	case n.Count < 1 || n.Count > MaxRunCount:
		return Errorf(InvalidArgument, "count: %d, want 1 to %d", n.Count, MaxRunCount)
	case len(n.StartedBy) > 128:
		return Errorf(InvalidArgument, "startedBy: %d bytes, at most 128 are allowed", len(n.StartedBy))
	case len(n.Group) > 255:
		return Errorf(InvalidArgument, "group: %d bytes, at most 255 are allowed", len(n.Group))
	}
	return nil
}

// RunTask places tasks and binds them to their instances, in one transaction.
// What could not be placed is explained in failures; with none placed nothing
// is written.
func (p *Plane) RunTask(ctx context.Context, n NewTasks) (tasks []Task, failures []PlacementFailure, revision int64, err error) {
	if n.Cluster == "" {
		n.Cluster = DefaultCluster
	}
	if n.Count == 0 {
		n.Count = 1
	}
	if err := n.validate(); err != nil {
		return nil, nil, 0, err
	}
	type result struct {
		IDs      []string           `json:"ids"`
		Failures []PlacementFailure `json:"failures"`
	}
	var made map[string]Task
	r, revision, err := mutate(ctx, p, "running tasks", n.Token, n, func() (*change, result, error) {
		made = map[string]Task{}
		c, ts, fs, err := p.place(n)
		r := result{Failures: fs}
		for _, t := range ts {
			r.IDs = append(r.IDs, t.ID)
			made[t.ID] = t
		}
		return c, r, err
	})
	if err != nil {
		return nil, nil, 0, err
	}
	p.state.read(func(rs *records, _ int64) {
		for _, id := range r.IDs {
			t, ok := rs.tasks[id]
			if !ok {
				if t.V, ok = made[id]; !ok {
					// The answer to an earlier call, whose task is no longer kept.
					t.V = Task{ID: id, Cluster: n.Cluster, DesiredStatus: StatusStopped, LastStatus: StatusStopped, StoppedReason: "stopped, and no longer kept"}
				}
			}
			tasks = append(tasks, t.V)
		}
	})
	return tasks, r.Failures, revision, nil
}

// place chooses instances from memory and makes the change that binds them:
// it compares every instance and its bindings with what was looked at.
func (p *Plane) place(n NewTasks) (*change, []Task, []PlacementFailure, error) {
	d, err := p.definition(n.TaskDefinition)
	if err != nil {
		return nil, nil, nil, err
	}
	if d.V.Status != DefinitionActive {
		return nil, nil, nil, Errorf(Precondition, "task definition %s:%d is %s: register it anew, or run another revision", d.V.Family, d.V.Revision, d.V.Status)
	}
	td, _, err := DecodeTaskDefinition(d.V.Document)
	if err != nil {
		return nil, nil, nil, Errorf(Precondition, "task definition %s:%d is not valid for this version, register it anew: %w", d.V.Family, d.V.Revision, err)
	}
	instances, bindings, running, err := p.snapshot(n)
	if err != nil {
		return nil, nil, nil, err
	}
	demand := td.Demand()
	want := Placement{Demand: demand, Count: n.Count, Cluster: n.Cluster}
	if want.Constraints, err = td.Constraints(); err != nil {
		return nil, nil, nil, err
	}
	if len(instances) == 0 {
		want.Elsewhere = p.populated()
	}
	for id, e := range instances {
		_, connected := p.tunnels.Session(id)
		var strays map[string]entry[Stray]
		p.state.read(func(r *records, _ int64) { strays = maps.Clone(r.strays[id]) })
		want.Candidates = append(want.Candidates, Candidate{
			ID: id, Connected: connected, Facts: e.V.Facts, Used: used(e.V, bindings[id].V, strays), Capabilities: e.V.Capabilities,
			Attributes: e.V.Attributes, AgentVersion: e.V.AgentVersion, RegisteredAt: e.V.RegisteredAt, Running: running[id],
		})
	}
	// In a fixed order, so that the choice depends on nothing but the dice.
	slices.SortFunc(want.Candidates, func(a, b Candidate) int {
		if a.ID < b.ID {
			return -1
		}
		return 1
	})
	dice, err := p.newRand()
	if err != nil {
		return nil, nil, nil, err
	}
	chosen, failures := p.cfg.Place(want, dice)
	c := &change{}
	spec := td.Spec()
	spec.Family, spec.Revision, spec.Cluster, spec.Group = d.V.Family, uint32(d.V.Revision), n.Cluster, n.Group
	if n.Group == "" {
		spec.Group = "family:" + d.V.Family
	}
	specBytes, err := proto.Marshal(spec)
	if err != nil {
		return nil, nil, nil, Errorf(InvalidArgument, "task definition %s:%d cannot be sent to a device: %w", d.V.Family, d.V.Revision, err)
	}
	var tasks []Task
	bound := map[string]Bindings{}
	for _, instance := range chosen {
		id, err := p.newID()
		if err != nil {
			return nil, nil, nil, err
		}
		b, ok := bound[instance]
		if !ok {
			b = bindings[instance].V
			b.Tasks = maps.Clone(b.Tasks)
			if b.Tasks == nil {
				b.Tasks = map[string]Demand{}
			}
		}
		b.Sequence++
		b.Tasks[id] = demand
		bound[instance] = b
		t := Task{
			ID: id, Cluster: n.Cluster, Family: d.V.Family, Revision: d.V.Revision, Group: spec.Group, StartedBy: n.StartedBy,
			Instance: instance, Runtime: demand.Runtime, DesiredStatus: StatusRunning, LastStatus: StatusProvisioning,
			Sequence: b.Sequence, CreatedAt: p.now(), Version: 1, Containers: planned(spec),
		}
		tasks = append(tasks, t)
		if err := c.put(taskKey(id), t); err != nil {
			return nil, nil, nil, err
		}
		c.ops = append(c.ops, Put(taskSpecKey(id), specBytes))
	}
	for id, b := range bound {
		c.compare(instanceKey(id), instances[id].Mod)
		c.compare(bindingsKey(id), bindings[id].Mod)
		if err := c.put(bindingsKey(id), b); err != nil {
			return nil, nil, nil, err
		}
	}
	return c, tasks, failures, nil
}

// planned is what is known of a task's containers before anything ran.
func planned(spec *wire.TaskSpec) (cs []ContainerStatus) {
	for _, c := range spec.Containers {
		cs = append(cs, ContainerStatus{Name: c.Name, Essential: c.Essential, Image: c.Image, LastStatus: StatusPending})
	}
	return cs
}

// snapshot is the instances the tasks may go to, with their bindings and how
// many tasks are running there.
func (p *Plane) snapshot(n NewTasks) (instances map[string]entry[Instance], bindings map[string]entry[Bindings], running map[string]int, err error) {
	if _, ok := p.cluster(n.Cluster); !ok {
		return nil, nil, nil, noCluster(n.Cluster)
	}
	only := ""
	if n.Instance != "" {
		if only, err = p.findInstance(n.Instance); err != nil {
			return nil, nil, nil, err
		}
	}
	instances, bindings, running = map[string]entry[Instance]{}, map[string]entry[Bindings]{}, map[string]int{}
	p.state.read(func(r *records, _ int64) {
		for id, e := range r.instances {
			switch {
			case only != "" && id != only:
				continue
			case only != "" && e.V.Status != InstanceActive:
				err = Errorf(Precondition, "instance %s was deregistered", id)
				return
			case only != "" && e.V.Cluster != n.Cluster:
				err = Errorf(InvalidArgument, "instance %s is in cluster %q, not in %q: name its cluster", id, e.V.Cluster, n.Cluster)
				return
			case e.V.Status == InstanceActive && e.V.Cluster == n.Cluster:
				instances[id], bindings[id] = e, r.bindings[id]
				for task := range r.onInstance[id] {
					is, _ := r.tasks[task].V.phase()
					running[id] += is
				}
			}
		}
	})
	return instances, bindings, running, err
}

// populated are the clusters that have ACTIVE instances, in order.
func (p *Plane) populated() []string {
	clusters := map[string]bool{}
	p.state.read(func(r *records, _ int64) {
		for _, e := range r.instances {
			if e.V.Status == InstanceActive {
				clusters[e.V.Cluster] = true
			}
		}
	})
	return slices.Sorted(maps.Keys(clusters))
}

// StopTask wishes a task stopped. The device does it; the answer does not
// wait for it. A task that is stopped, or stopping, is returned as it is.
func (p *Plane) StopTask(ctx context.Context, token, id, reason string) (Task, int64, error) {
	if len(reason) > 1024 {
		return Task{}, 0, Errorf(InvalidArgument, "reason: %d bytes, at most 1024 are allowed", len(reason))
	}
	if reason == "" {
		reason = "stopped by the user"
	}
	type request struct{ ID, Reason string }
	// The answer is only the id: the task as it is now is more useful to a
	// caller who asks again.
	id, revision, err := mutate(ctx, p, "stopping a task", token, request{id, reason}, func() (*change, string, error) {
		id, err := p.findTask(id)
		if err != nil {
			return nil, "", err
		}
		var e entry[Task]
		var b entry[Bindings]
		p.state.read(func(r *records, _ int64) { e = r.tasks[id]; b = r.bindings[e.V.Instance] })
		t, c := e.V, &change{}
		if t.DesiredStatus == StatusStopped || t.LastStatus == StatusStopped {
			return nil, id, nil
		}
		b.V.Sequence++
		t.DesiredStatus, t.StopCode, t.StopReason = StatusStopped, StopCodeUser, reason
		t.Sequence, t.StoppingAt = b.V.Sequence, t.notBefore(p.now())
		t.Version++
		c.compare(taskKey(id), e.Mod)
		c.compare(bindingsKey(t.Instance), b.Mod)
		if err := c.put(taskKey(id), t); err != nil {
			return nil, "", err
		}
		return c, id, c.put(bindingsKey(t.Instance), b.V)
	})
	if err != nil {
		return Task{}, 0, err
	}
	t, err := p.task(id)
	return t.V, revision, err
}

func (p *Plane) findTask(id string) (string, error) {
	return p.find("task", id, func(r *records) []string { return matching(maps.Keys(r.tasks), id) })
}

func (p *Plane) task(id string) (e entry[Task], err error) {
	var ok bool
	p.state.read(func(r *records, _ int64) { e, ok = r.tasks[id] })
	if !ok {
		return e, Errorf(NotFound, "no task %s: stopped tasks are kept for %s", id, keepStopped)
	}
	return e, nil
}

// DescribeTask returns one task. id may be a unique prefix.
func (p *Plane) DescribeTask(ctx context.Context, f Freshness, id string) (Task, int64, error) {
	if err := p.fresh(ctx, f); err != nil {
		return Task{}, 0, err
	}
	id, err := p.findTask(id)
	if err != nil {
		return Task{}, 0, err
	}
	e, err := p.task(id)
	return e.V, p.state.at(), err
}

// TaskFilter selects tasks; empty fields select all.
type TaskFilter struct {
	Cluster, Instance, Family, DesiredStatus, LastStatus string
}

// ListTasks returns tasks, oldest first.
func (p *Plane) ListTasks(ctx context.Context, f Freshness, filter TaskFilter, page Page) (ts []Task, next string, revision int64, err error) {
	if err := p.fresh(ctx, f); err != nil {
		return nil, "", 0, err
	}
	if filter.Instance != "" {
		if filter.Instance, err = p.findInstance(filter.Instance); err != nil {
			return nil, "", 0, err
		}
	}
	if filter.Cluster != "" {
		if _, ok := p.cluster(filter.Cluster); !ok {
			return nil, "", 0, noCluster(filter.Cluster)
		}
	}
	is := func(want, have string) bool { return want == "" || want == have }
	p.state.read(func(r *records, at int64) {
		revision = at
		for _, e := range r.tasks {
			t := &e.V
			if is(filter.Cluster, t.Cluster) && is(filter.Instance, t.Instance) && is(filter.Family, t.Family) &&
				is(filter.DesiredStatus, t.DesiredStatus) && is(filter.LastStatus, t.LastStatus) {
				ts = append(ts, *t)
			}
		}
	})
	ts, next, err = paginate(ts, page, func(t Task) string { return byTime(t.CreatedAt, t.ID) })
	return ts, next, revision, err
}

// Connected tells whether an instance has a live tunnel.
func (p *Plane) Connected(instance string) bool {
	_, ok := p.tunnels.Session(instance)
	return ok
}

// WatchTasks calls f with each task as it is, then whenever one changed, until
// all are STOPPED or gone, f fails or ctx ends (nil).
func (p *Plane) WatchTasks(ctx context.Context, f Freshness, ids []string, send func(Task, int64) error) error {
	if len(ids) == 0 || len(ids) > 100 {
		return Errorf(InvalidArgument, "ids: %d, want 1 to 100", len(ids))
	}
	if err := p.fresh(ctx, f); err != nil {
		return err
	}
	topics := make([]string, len(ids))
	seen := make(map[string]uint64, len(ids))
	ids = slices.Clone(ids)
	for i, id := range ids {
		id, err := p.findTask(id)
		if err != nil {
			return err
		}
		ids[i], topics[i] = id, taskTopic(id)
	}
	sub, end := p.state.subscribe(topics...)
	defer end()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-sub.wake:
		}
		var changed []Task
		var revision int64
		open := false
		p.state.read(func(r *records, at int64) {
			revision = at
			for _, id := range ids {
				e, ok := r.tasks[id]
				if !ok {
					continue
				}
				open = open || e.V.LastStatus != StatusStopped
				if e.V.Version != seen[id] {
					seen[id] = e.V.Version
					changed = append(changed, e.V)
				}
			}
		})
		for _, t := range changed {
			if err := send(t, revision); err != nil {
				return err
			}
		}
		if !open {
			return nil
		}
	}
}

// Logs reads a container's output from the device that runs its task.
func (p *Plane) Logs(ctx context.Context, r *wire.LogsRequest, chunk func(*wire.Chunk) error) error {
	id, err := p.findTask(r.TaskId)
	if err != nil {
		return err
	}
	t, err := p.task(id)
	if err != nil {
		return err
	}
	r.TaskId = id
	if r.Container != "" && !slices.ContainsFunc(t.V.Containers, func(c ContainerStatus) bool { return c.Name == r.Container }) {
		return Errorf(NotFound, "task %s has no container %q", id, r.Container)
	}
	if !p.Connected(t.V.Instance) {
		return Errorf(Unavailable, "instance %s, which has the output of task %s, is not connected: try again when it is", t.V.Instance, id)
	}
	return p.tunnels.Logs(ctx, t.V.Instance, r, chunk)
}

// keepStopped is how long a stopped task is kept.
const keepStopped = time.Hour
