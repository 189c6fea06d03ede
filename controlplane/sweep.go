package controlplane

import (
	"context"
	"encoding/json"
	"errors"
	"time"
)

const (
	sweepEvery = time.Minute
	sweepBatch = 50                     // objects a transaction
	sweepMost  = 1000                   // objects a pass, so that a pass is short
	sweepPause = 100 * time.Millisecond // between passes while there is more
	keepTokens = 24 * time.Hour
)

// sweepLoop deletes what is kept for a time only.
func (p *Plane) sweepLoop(ctx context.Context) error {
	for {
		if err := p.sweep(ctx); err != nil && ctx.Err() == nil {
			p.log.Warn("deleting what is no longer kept failed, to be tried again", "error", err, "in", sweepEvery)
		}
		if !wait(ctx, sweepEvery) {
			return nil
		}
	}
}

// sweep goes through everything once.
func (p *Plane) sweep(ctx context.Context) error {
	cursor := ""
	tokens := func(ctx context.Context) (more bool, err error) {
		cursor, err = p.sweepTokens(ctx, cursor)
		return cursor != "", err
	}
	return errors.Join(passes(ctx, p.sweepTasks), passes(ctx, tokens))
}

// passes repeats a pass while there is more to do.
func passes(ctx context.Context, pass func(context.Context) (more bool, err error)) error {
	for {
		if more, err := pass(ctx); err != nil || !more || !wait(ctx, sweepPause) {
			return err
		}
	}
}

// sweepTasks deletes tasks stopped long ago, some of them when there are more,
// and finishes deregistrations that a crash cut short.
func (p *Plane) sweepTasks(ctx context.Context) (more bool, err error) {
	now := p.now()
	var old []entry[Task]
	orphaned, settled := map[string]bool{}, map[string]bool{}
	p.state.read(func(r *records, _ int64) {
		for id := range r.strays {
			settled[id] = r.instances[id].V.Divergence == nil
		}
		for _, e := range r.tasks {
			switch {
			case e.V.LastStatus != StatusStopped:
				if r.instances[e.V.Instance].V.Status != InstanceActive {
					orphaned[e.V.Instance] = true
				}
			case now.Sub(e.V.StoppedAt) < keepStopped:
			case len(old) == sweepMost:
				more = true
			default:
				old = append(old, e)
			}
		}
	})
	for id := range orphaned {
		if _, err := p.abandon(ctx, id); err != nil {
			return more, err
		}
	}
	for id, done := range settled {
		if !done {
			continue
		}
		if err := p.keepStrays(ctx, id, false, nil); err != nil {
			return more, err
		}
	}
	for len(old) > 0 {
		n := min(sweepBatch, len(old))
		c := &change{}
		for _, e := range old[:n] {
			c.compare(taskKey(e.V.ID), e.Mod)
			c.delete(taskKey(e.V.ID))
			c.delete(taskSpecKey(e.V.ID))
		}
		old = old[n:]
		// A lost race leaves them to the next pass.
		if _, _, err := p.store.Txn(ctx, c.compares, c.ops); err != nil {
			return more, err
		}
	}
	return more, nil
}

// sweepTokens deletes expired client tokens of the next sweepMost after
// cursor, and returns where to go on: "" from the beginning.
func (p *Plane) sweepTokens(ctx context.Context, cursor string) (next string, err error) {
	kvs, _, err := p.store.List(ctx, tokensPrefix, cursor, sweepMost)
	if err != nil {
		return cursor, err
	}
	if len(kvs) == sweepMost {
		next = kvs[len(kvs)-1].Key
	}
	c := &change{}
	for i, kv := range kvs {
		var r tokenRecord
		if err := json.Unmarshal(kv.Value, &r); err != nil || p.now().Sub(r.CreatedAt) >= keepTokens {
			c.compare(kv.Key, kv.ModRevision)
			c.delete(kv.Key)
		}
		if len(c.ops) == sweepBatch || i == len(kvs)-1 && len(c.ops) > 0 {
			if _, _, err := p.store.Txn(ctx, c.compares, c.ops); err != nil {
				return cursor, err
			}
			c = &change{}
		}
	}
	return next, nil
}
