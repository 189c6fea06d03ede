package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/belay-edge/belay/plugins/sdk"
)

// held is a container of ours as containerd has it.
type held struct {
	id        string
	record    containers.Container
	process   *tasktypes.Process // nil: containerd has a record, and no task
	container sdk.Container
}

func (h held) mine(r *Runtime) bool { return h.record.Labels[labelOwner] == r.owner }

func labelIs(key, value string) string { return fmt.Sprintf("labels.%q==%q", key, value) }

// List implements sdk.Runtime.
func (r *Runtime) List(ctx context.Context) (sdk.Inventory, error) {
	const op = "list containers"
	all, err := r.snapshotAll(r.in(ctx), labelIs(labelOwner, r.owner))
	if err != nil {
		return sdk.Inventory{}, r.fail(op, err)
	}
	var inv sdk.Inventory
	for _, h := range all {
		inv.Containers = append(inv.Containers, h.container)
	}
	if inv.Tasks, err = r.preparedTasks(); err != nil {
		return sdk.Inventory{}, r.fail(op, err)
	}
	return inv, nil
}

// snapshotAll reads the containers a filter selects, with their tasks.
func (r *Runtime) snapshotAll(ctx context.Context, filter string) ([]held, error) {
	records, err := r.client.ContainerService().List(ctx, filter)
	if err != nil || len(records) == 0 {
		return nil, err
	}
	// One call for all; it leaves out tasks whose shim did not answer, which
	// are asked for again one by one.
	resp, err := r.client.TaskService().List(ctx, &tasksapi.ListTasksRequest{})
	if err != nil {
		return nil, errgrpc.ToNative(err)
	}
	processes := make(map[string]*tasktypes.Process, len(resp.Tasks))
	for _, t := range resp.Tasks {
		// 1.6 fills ID, newer ones ContainerID as well.
		processes[t.ID] = t
	}
	all := make([]held, 0, len(records))
	for _, rec := range records {
		proc := processes[rec.ID]
		if proc == nil {
			if proc, err = r.process(ctx, rec.ID); err != nil {
				return nil, err
			}
		}
		h, err := r.view(rec, proc)
		if err != nil {
			return nil, fmt.Errorf("container %s: %w", rec.ID, err)
		}
		all = append(all, h)
	}
	return all, nil
}

// process asks for one task; nil when there is none.
func (r *Runtime) process(ctx context.Context, id string) (*tasktypes.Process, error) {
	resp, err := r.client.TaskService().Get(ctx, &tasksapi.GetRequest{ContainerID: id})
	if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	return resp.Process, nil
}

// find returns one attempt; nil when containerd has no record of it.
func (r *Runtime) find(ctx context.Context, a sdk.Attempt) (*held, error) {
	rec, err := r.client.ContainerService().Get(ctx, containerID(a))
	if errdefs.IsNotFound(err) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if owner := rec.Labels[labelOwner]; owner != r.owner {
		return nil, sdk.Errorf(sdk.Conflict, "", "container %s belongs to another agent (owner %q)", rec.ID, owner).
			WithHint("give each agent on one containerd its own namespace")
	}
	proc, err := r.process(ctx, rec.ID)
	if err != nil {
		return nil, err
	}
	h, err := r.view(rec, proc)
	return &h, err
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
		return nil, sdk.Errorf(sdk.NotFound, op, "containerd knows no attempt %s", a)
	}
	return h, nil
}

// view puts together what the record, the task and the plugin's files say.
func (r *Runtime) view(rec containers.Container, proc *tasktypes.Process) (held, error) {
	h := held{id: rec.ID, record: rec, process: proc}
	a, err := attemptOf(rec.Labels)
	if err != nil {
		return h, err
	}
	ports, err := portsFrom(rec.Labels)
	if err != nil {
		return h, err
	}
	c := sdk.Container{Attempt: a, RuntimeID: rec.ID, ImageDigest: rec.Labels[labelDigest], Ports: ports}
	if b, err := os.ReadFile(r.file(rec.ID, "ip")); err == nil {
		c.IP = strings.TrimSpace(string(b))
	}
	switch {
	case proc == nil && rec.Labels[labelBoot] != r.bootID:
		c.State, c.Reason = sdk.StateExited, "the device restarted: nobody saw the exit"
	case proc == nil && r.marked(rec.ID, "started"):
		c.State, c.Reason = sdk.StateExited, "containerd lost the container, its shim was killed or it ended while containerd was down: nobody saw the exit"
	case proc == nil:
		c.State = sdk.StateCreated
	default:
		switch proc.Status {
		case tasktypes.Status_CREATED:
			c.State = sdk.StateCreated
		case tasktypes.Status_RUNNING, tasktypes.Status_PAUSED, tasktypes.Status_PAUSING:
			c.State, c.PID = sdk.StateRunning, int(proc.Pid)
		case tasktypes.Status_STOPPED:
			code := int(proc.ExitStatus)
			c.State, c.ExitCode = sdk.StateExited, &code
			c.OOMKilled = r.marked(rec.ID, "oom") || r.cgroups.oomKills(r.cgroupOf(a.Task)+"/"+leafName(a)) > 0
			c.RanFor = r.ran(rec.ID, proc)
		default:
			return h, fmt.Errorf("its shim says %s: %w", proc.Status, errdefs.ErrUnavailable)
		}
	}
	r.mu.Lock()
	r.attempts[rec.ID] = a
	r.mu.Unlock()
	h.container = c
	return h, nil
}

// file is a file of the plugin's about a container, gone after a reboot.
func (r *Runtime) file(id, name string) string { return filepath.Join(r.containerDir(id), name) }

func (r *Runtime) marked(id, name string) bool {
	_, err := os.Stat(r.file(id, name))
	return err == nil
}

// mark notes that something has happened, and when by boot time.
func (r *Runtime) mark(id, name string) error {
	f, err := os.OpenFile(r.file(id, name), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, _ = fmt.Fprintln(f, int64(bootTime())) // where there is no room, that it happened is enough
	return errors.Join(f.Close())
}
