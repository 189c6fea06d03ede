package main

import (
	"context"
	"errors"
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
	late    []error       // of parts that failed to stop well
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
		told := g.ctx.Err() != nil
		if err == nil && !told {
			err = errors.New("ended without being told to")
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
		if !told {
			g.cancel(err)
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		if err != nil && told {
			g.late = append(g.late, err)
		}
		if g.running[name]--; g.running[name] == 0 {
			delete(g.running, name)
		}
		close(g.changed)
		g.changed = make(chan struct{})
	}()
}

// wait returns once every part has ended, or within the deadline after the
// first end: then the error names what is stuck. It is nil when the group was
// told to end and every part ended well.
func (g *group) wait(deadline time.Duration) error {
	<-g.ctx.Done()
	timer := time.NewTimer(deadline)
	defer timer.Stop()
	for {
		g.mu.Lock()
		stuck, changed, errs := slices.Sorted(maps.Keys(g.running)), g.changed, slices.Clone(g.late)
		g.mu.Unlock()
		if len(stuck) == 0 {
			return errors.Join(append(errs, g.cause())...)
		}
		select {
		case <-changed:
		case <-timer.C:
			return errors.Join(append(errs, g.cause(),
				fmt.Errorf("stopping took longer than %s: still running: %s", deadline, strings.Join(stuck, ", ")))...)
		}
	}
}

// cause is why the group ended, nil for a plain cancellation.
func (g *group) cause() error {
	if err := context.Cause(g.ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}
