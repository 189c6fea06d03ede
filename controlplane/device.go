package controlplane

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/belay-edge/belay/controlplane/wire"
)

// ReportTask implements Devices. A report that changes nothing writes nothing.
func (p *Plane) ReportTask(ctx context.Context, instance string, s *wire.TaskStatus) error {
	if rank(s.GetLastStatus()) < 0 {
		return Errorf(InvalidArgument, "task %s: %q is no status of a task", s.GetTaskId(), s.GetLastStatus())
	}
	boundStatus(s)
	if size := proto.Size(s); size > maxReport || len(s.Containers) > maxReported {
		return Errorf(InvalidArgument, "task %s: a status of %d bytes and %d containers: at most %d and %d are stored", s.TaskId, size, len(s.Containers), maxReport, maxReported)
	}
	_, _, err := mutate(ctx, p, "storing a task's status", "", nil, func() (*change, struct{}, error) {
		e, err := p.task(s.TaskId)
		if errors.Is(err, NotFound) {
			err = p.confirmGone(ctx, s.TaskId, err)
		}
		if err == nil && e.V.Instance != instance {
			err = Errorf(NotFound, "instance %s has no task %s", instance, s.TaskId)
		}
		if errors.Is(err, NotFound) {
			c, err := p.reportUnknown(ctx, instance, s, err)
			return c, struct{}{}, err
		}
		if err != nil {
			return nil, struct{}{}, err
		}
		t, what := merge(e.V, s, p.now())
		switch what {
		case unchanged:
			return nil, struct{}{}, nil
		case transient:
			p.state.setTransient(t, e.Mod)
			return nil, struct{}{}, nil
		}
		c := &change{}
		c.compare(taskKey(t.ID), e.Mod)
		if err := c.put(taskKey(t.ID), t); err != nil {
			return nil, struct{}{}, err
		}
		if t.LastStatus == StatusStopped {
			err = p.release(c, t)
		} else {
			err = p.chosen(c, t)
		}
		return c, struct{}{}, err
	})
	return err
}

// boundStatus cuts the texts of a status to what is worth storing.
func boundStatus(s *wire.TaskStatus) {
	for _, text := range []*string{&s.StopCode, &s.StoppedReason, &s.Note} {
		*text = bounded(*text)
	}
	for _, c := range s.Containers {
		if c != nil {
			c.Reason = bounded(c.Reason)
		}
	}
}

// confirmGone asks the store whether it lacks a task as memory does. A device
// that is told NotFound removes the task, which may be running: memory that is
// behind, or could not read the record, is not enough for that.
func (p *Plane) confirmGone(ctx context.Context, id string, notFound error) error {
	kv, err := p.store.Get(ctx, taskKey(id))
	switch {
	case err != nil:
		return err
	case kv.ModRevision == 0:
		return notFound
	}
	return Errorf(Unavailable, "task %s is in the store but not in memory: the log says why, if it stays so", id)
}

// release gives back the room of a stopped task.
func (p *Plane) release(c *change, t Task) error {
	var b entry[Bindings]
	p.state.read(func(r *records, _ int64) { b = r.bindings[t.Instance] })
	if _, ok := b.V.Tasks[t.ID]; !ok {
		return nil
	}
	b.V.Tasks = maps.Clone(b.V.Tasks)
	delete(b.V.Tasks, t.ID)
	c.compare(bindingsKey(t.Instance), b.Mod)
	return c.put(bindingsKey(t.Instance), b.V)
}

// chosen binds the devices that the agent chose, so that placement, which
// compares the bindings, counts with them.
func (p *Plane) chosen(c *change, t Task) error {
	var b entry[Bindings]
	p.state.read(func(r *records, _ int64) { b = r.bindings[t.Instance] })
	d, changed := b.V.Tasks[t.ID].choose(t.Containers)
	if !changed {
		return nil
	}
	b.V.Tasks = maps.Clone(b.V.Tasks)
	b.V.Tasks[t.ID] = d
	c.compare(bindingsKey(t.Instance), b.Mod)
	return c.put(bindingsKey(t.Instance), b.V)
}

// maxReport bounds what is stored of one thing that a device tells: a task's
// status, its facts. Honest ones are a tenth of it.
const maxReport = 256 << 10

// bounded cuts a text of a device's to what is worth storing.
func bounded(s string) string {
	const most = 4096
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}

// Assignments implements Devices. A set is read from memory at one moment, so
// that it holds everything up to its sequence. A whole set names stopped tasks
// too, without their specification, while they are kept: the device that has
// them keeps their output for as long, one that has not need do nothing.
func (p *Plane) Assignments(ctx context.Context, instance, incarnation string, sequence uint64) (AssignmentSet, error) {
	if err := ctx.Err(); err != nil {
		return AssignmentSet{}, err
	}
	var set AssignmentSet
	var err error
	p.state.read(func(r *records, _ int64) {
		i, ok := r.instances[instance]
		if !ok || i.V.Status != InstanceActive {
			err = Errorf(NotFound, "no instance %s", instance)
			return
		}
		set.Sequence = r.bindings[instance].V.Sequence
		// What is not in a whole set stops on the device: in conflict that is
		// for an operator to decide.
		d := i.V.Divergence
		set.Settled = d == nil && sequence < i.V.Settled
		set.Full = d == nil && (set.Settled || incarnation != p.incarnation || sequence > set.Sequence)
		for id := range r.onInstance[instance] {
			t := r.tasks[id].V
			if !set.Full && t.Sequence <= sequence || d.withheld(t) {
				continue
			}
			a := &wire.Assignment{Sequence: t.Sequence, TaskId: t.ID, Desired: t.DesiredStatus, StopReason: t.StopReason}
			// A device that is told of the wish to stop may never have heard of
			// the task, or may have lost it while its containers run on.
			if t.LastStatus != StatusStopped {
				a.Spec = r.specs[id]
			}
			set.Set = append(set.Set, a)
		}
	})
	slices.SortFunc(set.Set, func(a, b *wire.Assignment) int {
		if a.Sequence != b.Sequence {
			return int(a.Sequence) - int(b.Sequence)
		}
		return strings.Compare(a.TaskId, b.TaskId)
	})
	return set, err
}

// WatchInstance implements Devices. f is called once at the start, too: what
// changed before the watch began is then not missed.
func (p *Plane) WatchInstance(ctx context.Context, instance string, f func()) error {
	sub, end := p.state.subscribe(instanceTopic(instance))
	defer end()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-sub.wake:
			f()
		}
	}
}
