package docker

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Stop implements sdk.Runtime.
func (r *Runtime) Stop(ctx context.Context, a sdk.Attempt, grace time.Duration) (sdk.Container, error) {
	op := "stop " + a.String()
	h, err := r.must(ctx, op, a)
	if err != nil {
		return sdk.Container{}, err
	}
	switch h.container.State {
	case sdk.StateExited:
		return r.stopped(ctx, op, a)
	case sdk.StateCreated:
		// Never ran: there is no exit to report but that it was ended.
		cctx, cancel := after(ctx)
		defer cancel()
		if err := r.discard(cctx, h.name); err != nil {
			return sdk.Container{}, r.fail(op, err)
		}
		h.container.State, h.container.Reason = sdk.StateExited, "stopped before it ran"
		return h.container, nil
	}
	// Asked before the signal, so that the exit cannot be missed.
	wctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended, err := r.engine.wait(wctx, h.name)
	if err != nil {
		return sdk.Container{}, r.fail(op, err)
	}
	if grace > 0 {
		signal := h.record.Config.StopSignal
		if signal == "" {
			signal = "SIGTERM"
		}
		err := r.kill(ctx, h.name, signal)
		if isStatus(err, http.StatusBadRequest) || err != nil && strings.Contains(err.Error(), "nvalid signal") {
			err = r.kill(ctx, h.name, "SIGTERM")
		}
		if err != nil {
			return sdk.Container{}, r.fail(op, err)
		}
		timer := time.NewTimer(grace)
		defer timer.Stop()
		select {
		case err := <-ended:
			if err != nil {
				return sdk.Container{}, r.fail(op, err)
			}
			return r.stopped(ctx, op, a)
		case <-ctx.Done():
			return sdk.Container{}, r.fail(op, context.Cause(ctx))
		case <-timer.C:
		}
	}
	if err := r.kill(ctx, h.name, "SIGKILL"); err != nil {
		return sdk.Container{}, r.fail(op, err)
	}
	select {
	case err := <-ended:
		if err != nil {
			return sdk.Container{}, r.fail(op, err)
		}
		return r.stopped(ctx, op, a)
	case <-ctx.Done():
		return sdk.Container{}, r.fail(op, context.Cause(ctx))
	}
}

// stopped is the exit of an attempt, its output complete.
func (r *Runtime) stopped(ctx context.Context, op string, a sdk.Attempt) (sdk.Container, error) {
	h, err := r.must(ctx, op, a)
	if err != nil {
		return sdk.Container{}, err
	}
	if h.container.State != sdk.StateExited {
		return sdk.Container{}, sdk.Errorf(sdk.Unavailable, op, "the Docker daemon reports an exit and a running container: ask again")
	}
	if err := r.copyOut(h); err != nil {
		r.log.Warn("output is not copied", "container", h.name, "err", err)
	}
	if err := r.copier.complete(ctx, r.engine, h.name); err != nil {
		return sdk.Container{}, r.fail(op, err)
	}
	return h.container, nil
}

// kill signals the first process. One that is gone is no error.
func (r *Runtime) kill(ctx context.Context, name, signal string) error {
	if err := r.engine.kill(ctx, name, signal); err != nil && !isStatus(err, http.StatusConflict) && !isStatus(err, http.StatusNotFound) {
		return err
	}
	return nil
}

// Remove implements sdk.Runtime.
func (r *Runtime) Remove(ctx context.Context, a sdk.Attempt) error {
	op := "remove " + a.String()
	if err := validAttempt(op, a); err != nil {
		return err
	}
	name := containerName(a)
	unlock, err := r.names.lock(ctx, name)
	if err != nil {
		return r.fail(op, err)
	}
	defer unlock()
	h, err := r.find(ctx, a)
	switch {
	case err != nil:
		return r.fail(op, err)
	case h == nil && !r.copier.has(name):
		return nil
	case h == nil:
		return r.fail(op, r.removeUnstarted(ctx, name))
	case h.container.State == sdk.StateRunning:
		return sdk.Errorf(sdk.Conflict, op, "it is running").WithHint("stop it first")
	case h.container.State == sdk.StateExited:
		if err := r.copyOut(h); err != nil {
			r.log.Warn("output is not copied", "container", name, "err", err)
		}
		if err := r.copier.complete(ctx, r.engine, name); err != nil {
			return r.fail(op, err)
		}
	}
	return r.fail(op, r.discard(ctx, name))
}

// Stats implements sdk.Runtime.
func (r *Runtime) Stats(ctx context.Context, a sdk.Attempt) (sdk.Stats, error) {
	op := "measure " + a.String()
	h, err := r.must(ctx, op, a)
	if err != nil {
		return sdk.Stats{}, err
	}
	if h.container.State != sdk.StateRunning {
		return sdk.Stats{}, sdk.Errorf(sdk.NotFound, op, "it is not running")
	}
	s, err := usage(h.container.PID)
	if err != nil {
		return sdk.Stats{}, sdk.Errorf(sdk.NotFound, op, "its cgroup is gone: %w", err)
	}
	return s, nil
}
