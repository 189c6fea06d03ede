package docker

import (
	"context"
	"fmt"
	"net/http"
	"os"

	"github.com/belay-edge/belay/plugins/sdk"
)

// held is a container of ours as the daemon has it.
type held struct {
	name      string
	record    *inspected
	container sdk.Container
}

// List implements sdk.Runtime.
func (r *Runtime) List(ctx context.Context) (sdk.Inventory, error) {
	const op = "list containers"
	ids, err := r.engine.list(ctx, labelOwner+"="+r.owner)
	if err != nil {
		return sdk.Inventory{}, r.fail(op, err)
	}
	var inv sdk.Inventory
	for _, id := range ids {
		c, err := r.engine.inspect(ctx, id)
		if isStatus(err, http.StatusNotFound) {
			continue // removed meanwhile
		} else if err != nil {
			return sdk.Inventory{}, r.fail(op, err)
		}
		h, err := r.view(c)
		if err != nil {
			return sdk.Inventory{}, r.fail(op, fmt.Errorf("container %s: %w", id, err))
		}
		if err := r.copyOut(h); err != nil {
			r.log.Warn("output is not copied", "container", h.name, "err", err)
		}
		inv.Containers = append(inv.Containers, h.container)
	}
	if inv.Tasks, err = r.preparedTasks(); err != nil {
		return sdk.Inventory{}, r.fail(op, err)
	}
	return inv, nil
}

// copyOut sees to it that a container's output is being copied.
func (r *Runtime) copyOut(h *held) error {
	if h.container.State == sdk.StateCreated || r.copier.finished(h.name) {
		return nil
	}
	if !r.copier.has(h.name) {
		// A reboot has emptied the run directory. What a FIFO has been given
		// is not known any more, and its reader is another one.
		j := jobOf(h.name, h.record.Config.Labels)
		for _, t := range []target{j.Stdout, j.Stderr} {
			if info, err := os.Stat(t.Path); err != nil || !info.Mode().IsRegular() {
				return nil
			}
		}
		if err := r.copier.plan(j); err != nil {
			return err
		}
	}
	return r.copier.ensure()
}

// find returns one attempt; nil when the daemon has none.
func (r *Runtime) find(ctx context.Context, a sdk.Attempt) (*held, error) {
	c, err := r.engine.inspect(ctx, containerName(a))
	if isStatus(err, http.StatusNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if owner := c.Config.Labels[labelOwner]; owner != r.owner {
		return nil, sdk.Errorf(sdk.Conflict, "", "container %s belongs to another agent (owner %q)", c.Name, owner)
	}
	return r.view(c)
}

// must is find for calls about an attempt that has to be there.
func (r *Runtime) must(ctx context.Context, op string, a sdk.Attempt) (*held, error) {
	if err := validAttempt(op, a); err != nil {
		return nil, err
	}
	h, err := r.find(ctx, a)
	if err != nil {
		return nil, r.fail(op, err)
	}
	if h == nil {
		return nil, sdk.Errorf(sdk.NotFound, op, "the Docker daemon knows no attempt %s", a)
	}
	return h, nil
}

// lostCode is what the daemon says of a container that was running before it
// started and does not any more.
const lostCode = 255

// view puts the daemon's words into the contract's.
func (r *Runtime) view(c *inspected) (*held, error) {
	a, err := attemptOf(c.Config.Labels)
	if err != nil {
		return nil, err
	}
	ports, err := portsFrom(c.Config.Labels)
	if err != nil {
		return nil, err
	}
	h := &held{name: containerName(a), record: c, container: sdk.Container{
		Attempt: a, RuntimeID: c.ID, ImageDigest: c.Config.Labels[labelDigest], Ports: ports,
	}}
	v := &h.container
	if n, ok := c.NetworkSettings.Networks[r.cfg.Network]; ok {
		v.IP = n.IPAddress
	}
	switch {
	case c.State.Running || c.State.Paused:
		v.State, v.PID = sdk.StateRunning, c.State.Pid
	case !c.started():
		v.State = sdk.StateCreated
	case c.Config.Labels[labelBoot] != r.bootID && c.State.ExitCode == lostCode:
		v.State, v.Reason = sdk.StateExited, "the device restarted: nobody saw the exit"
	default:
		code := c.State.ExitCode
		v.State, v.ExitCode, v.OOMKilled, v.Reason = sdk.StateExited, &code, c.State.OOMKilled, clip(c.State.Error)
		v.RanFor = c.ran()
	}
	return h, nil
}
