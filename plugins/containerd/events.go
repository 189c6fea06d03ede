package containerd

import (
	"context"
	"errors"
	"fmt"

	eventsapi "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Events implements sdk.Runtime over containerd's own event stream.
func (r *Runtime) Events(ctx context.Context, f func(sdk.Attempt)) error {
	const op = "watch containers"
	ctx, cancel := context.WithCancel(r.in(ctx))
	defer cancel()
	var filters []string
	for _, topic := range []string{"exit", "start", "oom", "delete"} {
		filters = append(filters, fmt.Sprintf("namespace==%q,topic==%q", r.cfg.Namespace, "/tasks/"+topic))
	}
	ch, errs := r.client.Subscribe(ctx, filters...)
	for {
		select {
		case e := <-ch:
			if a, ok := r.concerns(ctx, e); ok {
				f(a)
			}
		case err := <-errs:
			if ctx.Err() != nil {
				return nil
			}
			if err == nil {
				err = errors.New("containerd ended its event stream")
			}
			if e := r.fail(op, err); sdk.KindOf(e) != sdk.Internal {
				return e
			}
			return sdk.Errorf(sdk.Unavailable, op, "%w", err).WithHint(r.daemonHint(""))
		case <-ctx.Done():
			return nil
		}
	}
}

// concerns finds the attempt an event is about.
func (r *Runtime) concerns(ctx context.Context, e *events.Envelope) (sdk.Attempt, bool) {
	if e == nil || e.Event == nil {
		return sdk.Attempt{}, false
	}
	msg, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		return sdk.Attempt{}, false
	}
	var id string
	switch m := msg.(type) {
	case *eventsapi.TaskExit:
		if m.ID != m.ContainerID {
			return sdk.Attempt{}, false // a command inside, not the container
		}
		id = m.ContainerID
	case *eventsapi.TaskStart:
		id = m.ContainerID
	case *eventsapi.TaskDelete:
		if m.ID != "" && m.ID != m.ContainerID {
			return sdk.Attempt{}, false
		}
		id = m.ContainerID
	case *eventsapi.TaskOOM:
		id = m.ContainerID
		// Kernels before 4.13 count no kills in the cgroup.
		if r.marked(id, "started") {
			_ = r.mark(id, "oom")
		}
	default:
		return sdk.Attempt{}, false
	}
	r.mu.Lock()
	a, ok := r.attempts[id]
	r.mu.Unlock()
	if ok {
		return a, true
	}
	rec, err := r.client.ContainerService().Get(ctx, id)
	if err != nil {
		if !errdefs.IsNotFound(err) {
			r.log.Debug("an event of a container that cannot be read", "container", id, "err", err)
		}
		return sdk.Attempt{}, false
	}
	if rec.Labels[labelOwner] != r.owner {
		return sdk.Attempt{}, false
	}
	a, err = attemptOf(rec.Labels)
	return a, err == nil
}
