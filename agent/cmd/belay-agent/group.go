package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// group runs the agent's long-lived parts. The first that ends, or the end of
// ctx, ends all of them; one that does not end in time is named.
type group struct {
	ctx    context.Context
	cancel context.CancelCauseFunc

	mu      sync.Mutex
	running map[string]int
	changed chan struct{} // closed and replaced whenever a part ends
}

func newGroup(ctx context.Context) *group {
	g := &group{running: map[string]int{}, changed: make(chan struct{})}
	g.ctx, g.cancel = context.WithCancelCause(ctx)
	return g
}

// start runs a part. It is to return nil once its context ends.
func (g *group) start(name string, part func(context.Context) error) {
	g.mu.Lock()
	g.running[name]++
	g.mu.Unlock()
	go func() {
		err := part(g.ctx)
		if err == nil && g.ctx.Err() == nil {
			err = fmt.Errorf("ended without being told to")
		}
		if err != nil && g.ctx.Err() == nil {
			g.cancel(fmt.Errorf("%s: %w", name, err))
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.running[name]--; g.running[name] == 0 {
			delete(g.running, name)
		}
		close(g.changed)
		g.changed = make(chan struct{})
	}()
}

// wait returns once every part has ended, or within the deadline after the
// first end: then the error names what is stuck. It returns why the group
// ended, nil when it was told to.
func (g *group) wait(deadline time.Duration) error {
	<-g.ctx.Done()
	timer := time.NewTimer(deadline)
	defer timer.Stop()
	for {
		g.mu.Lock()
		stuck, changed := slices.Sorted(maps.Keys(g.running)), g.changed
		g.mu.Unlock()
		if len(stuck) == 0 {
			return g.cause()
		}
		select {
		case <-changed:
		case <-timer.C:
			err := fmt.Errorf("stopping took longer than %s: still running: %s", deadline, strings.Join(stuck, ", "))
			if cause := g.cause(); cause != nil {
				err = fmt.Errorf("%w; %w", cause, err)
			}
			return err
		}
	}
}

// cause is nil for a plain cancellation.
func (g *group) cause() error {
	if err := context.Cause(g.ctx); err != context.Canceled {
		return err
	}
	return nil
}
