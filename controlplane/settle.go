package controlplane

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"
)

// settlement is a request to settle an instance's conflict.
type settlement struct{ ID string }

// AdoptInstance takes over what the device of an instance in conflict has:
// tasks that only the device knows become tasks, those it has ended, or never
// had, are STOPPED. id may be a unique prefix.
func (p *Plane) AdoptInstance(ctx context.Context, token, id string) (InstanceView, int64, error) {
	return p.settleInstance(ctx, "adopting what a device has", token, id, func(id string) error {
		e, err := p.instance(id)
		if err != nil {
			return err
		}
		if !e.V.Divergence.Reported {
			return Errorf(Precondition, "the device of instance %s has not told what it holds since the store was restored: it must connect once, with an agent that can tell; \"belay instance drop\" needs no answer", id)
		}
		for more := true; more; {
			if more, err = p.adoptSome(ctx, id); err != nil {
				return err
			}
		}
		return nil
	})
}

// DropInstance makes the device of an instance in conflict follow the store:
// it ends what the store does not know, and starts what it should run.
func (p *Plane) DropInstance(ctx context.Context, token, id string) (InstanceView, int64, error) {
	return p.settleInstance(ctx, "dropping what only a device has", token, id, func(id string) error {
		return p.keepStrays(ctx, id, true, nil)
	})
}

// settleInstance prepares the end of a conflict, in as many transactions as it
// takes, each of which leaves a conflict that can be settled either way, and
// ends it in a last one.
func (p *Plane) settleInstance(ctx context.Context, operation, token, id string, prepare func(id string) error) (v InstanceView, revision int64, err error) {
	if id, err = p.findInstance(id); err != nil {
		return InstanceView{}, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, operationTimeout)
	defer cancel()
	request := settlement{id}
	repeated, err := p.repeated(ctx, operation, token, request)
	if err != nil {
		return InstanceView{}, 0, err
	}
	for tries := 0; ; tries++ {
		e, err := p.instance(id)
		if err != nil {
			return InstanceView{}, 0, err
		}
		if !repeated && e.V.Divergence == nil {
			return InstanceView{}, 0, Errorf(Precondition, "instance %s has no conflict: there is nothing to settle", id)
		}
		if !repeated {
			if err := prepare(id); err != nil {
				return InstanceView{}, 0, err
			}
		}
		var left int
		_, revision, err = mutate(ctx, p, operation, token, request, func() (*change, struct{}, error) {
			var e entry[Instance]
			var b entry[Bindings]
			p.state.read(func(r *records, _ int64) {
				e, b = r.instances[id], r.bindings[id]
				left = len(r.strays[id])
			})
			if e.V.Divergence == nil {
				return nil, struct{}{}, Errorf(Precondition, "instance %s has no conflict any more: somebody else has settled it", id)
			}
			if left > 0 {
				return nil, struct{}{}, nil // the device told again meanwhile
			}
			i := e.V
			i.settle(&b.V)
			c := &change{}
			c.compare(instanceKey(id), e.Mod)
			c.compare(bindingsKey(id), b.Mod)
			if err := c.put(instanceKey(id), i); err != nil {
				return nil, struct{}{}, err
			}
			return c, struct{}{}, c.put(bindingsKey(id), b.V)
		})
		if err != nil {
			return InstanceView{}, 0, err
		}
		if left == 0 || repeated {
			break
		}
		if tries == maxTries {
			return InstanceView{}, 0, Errorf(Conflict, "%s: the device kept telling anew what it holds: try again", operation)
		}
	}
	p.state.read(func(r *records, _ int64) { v = r.view(r.instances[id].V) })
	p.connection(&v)
	return v, revision, nil
}

// repeated tells whether a call with the token was answered before.
func (p *Plane) repeated(ctx context.Context, operation, token string, request any) (bool, error) {
	if token == "" {
		return false, nil
	}
	body, err := json.Marshal(request)
	if err != nil {
		return false, fmt.Errorf("encoding the request: %w", err)
	}
	_, _, found, err := replay[struct{}](ctx, p, token, &tokenRecord{Operation: operation, Request: hash([]byte(operation), body)})
	return found, err
}

// adoptSome moves a batch of an instance's strays and ghosts to where they
// are in agreement with the device.
func (p *Plane) adoptSome(ctx context.Context, id string) (more bool, err error) {
	_, _, err = mutate(ctx, p, "adopting tasks", "", nil, func() (*change, struct{}, error) {
		var e entry[Instance]
		var b entry[Bindings]
		var strays []entry[Stray]
		var ghosts []entry[Task]
		p.state.read(func(r *records, _ int64) {
			e, b = r.instances[id], r.bindings[id]
			for _, task := range slices.Sorted(maps.Keys(r.strays[id])) {
				strays = append(strays, r.strays[id][task])
			}
			d := e.V.Divergence
			if d == nil {
				return
			}
			for _, task := range d.Ghosts {
				if t, ok := r.tasks[task]; ok && t.V.LastStatus != StatusStopped && d.withheld(t.V) {
					ghosts = append(ghosts, t)
				}
			}
		})
		if e.V.Divergence == nil || len(strays)+len(ghosts) == 0 {
			more = false
			return nil, struct{}{}, nil
		}
		more = len(strays) > settleBatch || len(ghosts) > settleBatch
		strays, ghosts = strays[:min(len(strays), settleBatch)], ghosts[:min(len(ghosts), settleBatch)]
		c := &change{}
		b.V.Tasks = maps.Clone(b.V.Tasks)
		if b.V.Tasks == nil {
			b.V.Tasks = map[string]Demand{}
		}
		b.V.Sequence++
		for _, s := range strays {
			t := s.V.Task
			t.Sequence = b.V.Sequence
			t.Version++
			if t.LastStatus != StatusStopped {
				b.V.Tasks[t.ID], _ = s.V.Demand.choose(t.Containers)
			}
			c.compare(taskKey(t.ID), 0)
			c.compare(strayKey(id, t.ID), s.Mod)
			c.delete(strayKey(id, t.ID))
			c.ops = append(c.ops, Put(taskSpecKey(t.ID), s.V.Spec))
			if err := c.put(taskKey(t.ID), t); err != nil {
				return nil, struct{}{}, err
			}
		}
		for _, g := range ghosts {
			t := g.V
			t.end(p.now(), b.V.Sequence, StopCodeUser, ghostReason)
			delete(b.V.Tasks, t.ID)
			c.compare(taskKey(t.ID), g.Mod)
			if err := c.put(taskKey(t.ID), t); err != nil {
				return nil, struct{}{}, err
			}
		}
		c.compare(instanceKey(id), e.Mod)
		c.compare(bindingsKey(id), b.Mod)
		return c, struct{}{}, c.put(bindingsKey(id), b.V)
	})
	return more, err
}

// end makes a task STOPPED without its device.
func (t *Task) end(now time.Time, sequence uint64, code, reason string) {
	now = t.notBefore(now)
	t.DesiredStatus, t.LastStatus, t.StopCode, t.StoppedReason = StatusStopped, StatusStopped, code, reason
	t.Sequence, t.StoppedAt, t.Note = sequence, now, ""
	t.Version++
	if t.StoppingAt.IsZero() {
		t.StoppingAt = now
	}
}
