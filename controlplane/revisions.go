package controlplane

import (
	"context"
	"fmt"
)

// Statuses of a task definition.
const (
	DefinitionActive   = "ACTIVE"
	DefinitionInactive = "INACTIVE"
)

// definition is the latest ACTIVE revision of a family, or the one named.
func (p *Plane) definition(ref string) (e entry[TaskDefinitionRecord], err error) {
	family, revision, err := ParseTaskDefinitionRef(ref)
	if err != nil {
		return e, err
	}
	var known bool
	p.state.read(func(r *records, _ int64) {
		revisions, ok := r.taskdefs[family]
		known = ok
		if revision > 0 {
			e = revisions[revision]
			return
		}
		for n, d := range revisions {
			if d.V.Status == DefinitionActive && n > e.V.Revision {
				e = d
			}
		}
	})
	switch {
	case e.Mod != 0:
		return e, nil
	case !known:
		return e, Errorf(NotFound, "no task definition family %q: belay taskdef list shows those there are", family)
	case revision == 0:
		return e, Errorf(NotFound, "task definition family %q has no ACTIVE revision: register one", family)
	}
	return e, Errorf(NotFound, "task definition family %q has no revision %d", family, revision)
}

// RegisterTaskDefinition makes the document the next revision of its family.
func (p *Plane) RegisterTaskDefinition(ctx context.Context, token string, document []byte) (TaskDefinitionRecord, int64, error) {
	td, warnings, err := DecodeTaskDefinition(document)
	if err != nil {
		return TaskDefinitionRecord{}, 0, err
	}
	if !isName(td.Family) {
		return TaskDefinitionRecord{}, 0, Errorf(InvalidArgument, "family: %q: want 1 to 255 letters, digits, hyphens and underscores", td.Family)
	}
	return mutate(ctx, p, "registering a task definition", token, document, func() (*change, TaskDefinitionRecord, error) {
		last := 0
		p.state.read(func(r *records, _ int64) {
			for n := range r.taskdefs[td.Family] {
				last = max(last, n)
			}
		})
		d := TaskDefinitionRecord{
			Family: td.Family, Revision: last + 1, Status: DefinitionActive,
			RegisteredAt: p.now(), Document: td.Canonical(), Warnings: warnings,
		}
		c, key := &change{}, taskDefinitionKey(d.Family, d.Revision)
		c.compare(key, 0)
		return c, d, c.put(key, d)
	})
}

// ListTaskDefinitions returns the revisions that are ACTIVE, or those that
// are not, of a family ("": of all), in order.
func (p *Plane) ListTaskDefinitions(ctx context.Context, f Freshness, family string, inactive bool, page Page) (ds []TaskDefinitionRecord, next string, revision int64, err error) {
	if err := p.fresh(ctx, f); err != nil {
		return nil, "", 0, err
	}
	p.state.read(func(r *records, at int64) {
		revision = at
		for name, revisions := range r.taskdefs {
			if family != "" && name != family {
				continue
			}
			for _, d := range revisions {
				if (d.V.Status != DefinitionActive) == inactive {
					ds = append(ds, d.V)
				}
			}
		}
	})
	ds, next, err = paginate(ds, page, func(d TaskDefinitionRecord) string { return fmt.Sprintf("%s:%010d", d.Family, d.Revision) })
	return ds, next, revision, err
}

// DescribeTaskDefinition returns family:revision, or a family's latest ACTIVE.
func (p *Plane) DescribeTaskDefinition(ctx context.Context, f Freshness, ref string) (TaskDefinitionRecord, int64, error) {
	if err := p.fresh(ctx, f); err != nil {
		return TaskDefinitionRecord{}, 0, err
	}
	e, err := p.definition(ref)
	return e.V, p.state.at(), err
}

// DeregisterTaskDefinition makes a revision INACTIVE: no new tasks of it.
func (p *Plane) DeregisterTaskDefinition(ctx context.Context, token, ref string) (TaskDefinitionRecord, int64, error) {
	_, revision, err := ParseTaskDefinitionRef(ref)
	if err == nil && revision == 0 {
		err = Errorf(InvalidArgument, "task definition %q: name the revision to deregister, as family:revision", ref)
	}
	if err != nil {
		return TaskDefinitionRecord{}, 0, err
	}
	return mutate(ctx, p, "deregistering a task definition", token, ref, func() (*change, TaskDefinitionRecord, error) {
		e, err := p.definition(ref)
		if err != nil || e.V.Status != DefinitionActive {
			return nil, e.V, err
		}
		d, c, key := e.V, &change{}, taskDefinitionKey(e.V.Family, e.V.Revision)
		d.Status = DefinitionInactive
		c.compare(key, e.Mod)
		return c, d, c.put(key, d)
	})
}
