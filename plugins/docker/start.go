package docker

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// settleTime is how long the daemon gets to finish what a process of this
// plugin asked for that was killed.
const settleTime = 15 * time.Second

// Start implements sdk.Runtime.
func (r *Runtime) Start(ctx context.Context, q sdk.StartRequest) (sdk.Container, error) {
	op := "start " + q.Attempt.String()
	if err := validAttempt(op, q.Attempt); err != nil {
		return sdk.Container{}, err
	}
	name := containerName(q.Attempt)
	unlock, err := r.names.lock(ctx, name)
	if err != nil {
		return sdk.Container{}, r.fail(op, err)
	}
	defer unlock()
	for deadline := time.Now().Add(settleTime); ; {
		h, err := r.find(ctx, q.Attempt)
		if err != nil {
			return sdk.Container{}, r.fail(op, err)
		}
		if h == nil {
			// A name that is taken by what cannot be found yet: the daemon is
			// still making it.
			if err := r.create(ctx, name, q); isStatus(err, http.StatusConflict) && time.Now().Before(deadline) {
				if err := pause(ctx, 50*time.Millisecond); err != nil {
					return sdk.Container{}, r.fail(op, err)
				}
			} else if err != nil {
				return sdk.Container{}, r.fail(op, errors.Join(err, r.dropJob(ctx, name)))
			}
			continue
		}
		if h.container.State == sdk.StateCreated {
			if h, err = r.run(ctx, name, q.Attempt); err != nil {
				return sdk.Container{}, r.fail(op, err)
			}
		}
		if err := r.copyOut(h); err != nil {
			r.log.Warn("output is not copied", "container", name, "err", err)
		}
		if h.container.State == sdk.StateExited {
			if err := r.copier.complete(ctx, r.engine, name); err != nil {
				return sdk.Container{}, r.fail(op, err)
			}
		}
		return h.container, nil
	}
}

// dropJob forgets where output goes when there is no container for sure.
func (r *Runtime) dropJob(ctx context.Context, name string) error {
	if ctx.Err() != nil {
		return nil
	}
	if _, err := r.engine.inspect(ctx, name); isStatus(err, http.StatusNotFound) {
		return r.copier.forget(name)
	}
	return nil
}

// create makes the container, which does not run yet.
func (r *Runtime) create(ctx context.Context, name string, q sdk.StartRequest) error {
	t, err := r.taskSpec(q.Attempt.Task)
	if err != nil {
		return err
	}
	network := q.Network
	if network == "" {
		network = t.Network
	}
	if err := r.checkNetwork(ctx, network); err != nil {
		return err
	}
	d, err := r.daemon(ctx, false)
	if err != nil {
		return err
	}
	var by handed
	if q.Spec, by, err = r.resolve(q.Spec, d); err != nil {
		return err
	}
	if err := check(q, t, d, network); err != nil {
		return err
	}
	var to [2]target
	for i, path := range []string{q.Stdout, q.Stderr} {
		if !filepath.IsAbs(path) {
			return sdk.Errorf(sdk.Invalid, "", "output path %q is not absolute", path)
		}
		info, err := os.Stat(path)
		if err != nil {
			return sdk.Errorf(sdk.Invalid, "", "output: %w", err)
		}
		if to[i].Path = path; info.Mode().IsRegular() {
			to[i].Base = info.Size()
		}
	}
	// Noted first: by it a successor knows that the daemon may be at it.
	if err := r.copier.plan(job{Name: name, Stdout: to[0], Stderr: to[1]}); err != nil {
		return err
	}
	err = r.engine.create(ctx, name, r.request(q, t, d, by, network, to[0], to[1]))
	if isStatus(err, http.StatusNotFound) {
		return sdk.Errorf(sdk.NotFound, "", "image %s is not on this device: %w", pinned(q.Spec.Image, q.Spec.Digest), err).WithHint("pull it first")
	}
	return err
}

// run starts a container that was made. From there on the program may run: if
// the caller goes away it stays, where undoing it would run it twice.
func (r *Runtime) run(ctx context.Context, name string, a sdk.Attempt) (*held, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ctx, cancel := after(ctx)
	defer cancel()
	failed := r.engine.start(ctx, name)
	h, err := r.find(ctx, a)
	switch {
	case err != nil:
		return nil, errors.Join(failed, err)
	case h != nil && h.container.State != sdk.StateCreated:
		return h, nil
	case failed == nil:
		return nil, errors.New("the Docker daemon lost the container it just started")
	}
	// It has not run: nothing of it is left, but for a daemon that went away.
	if err := r.discard(ctx, name); err != nil {
		r.log.Error("a failed start left something behind", "container", name, "err", err)
	}
	return nil, failed
}

// discard removes a container that does not run, and what is known of it.
func (r *Runtime) discard(ctx context.Context, name string) error {
	err := r.engine.remove(ctx, name)
	for isStatus(err, http.StatusConflict) { // being removed already
		if _, e := r.engine.inspect(ctx, name); isStatus(e, http.StatusNotFound) {
			err = nil
			break
		}
		if e := pause(ctx, 50*time.Millisecond); e != nil {
			return errors.Join(err, e)
		}
		err = r.engine.remove(ctx, name)
	}
	if err != nil && !isStatus(err, http.StatusNotFound) {
		return err
	}
	return r.copier.forget(name)
}

// removeUnstarted clears away what an interrupted start may have left, or may
// yet make: the daemon finishes what it was asked.
func (r *Runtime) removeUnstarted(ctx context.Context, name string) error {
	for {
		c, err := r.engine.inspect(ctx, name)
		switch {
		case err == nil && c.started():
			return sdk.Errorf(sdk.Conflict, "", "container %s is not removed", name)
		case err == nil:
			return r.discard(ctx, name)
		case !isStatus(err, http.StatusNotFound):
			return err
		}
		const soon = 2 * time.Second
		info, err := os.Stat(r.copier.dir(name))
		if err != nil || time.Since(info.ModTime()).Abs() > soon {
			return r.copier.forget(name)
		}
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}
