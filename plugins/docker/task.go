package docker

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
)

func (r *Runtime) taskFile(task string) string { return filepath.Join(r.tasksDir(), task+".json") }

// PrepareTask implements sdk.Runtime: the cgroup of a task with limits, and a
// file that remembers the task across reboots.
func (r *Runtime) PrepareTask(ctx context.Context, t sdk.TaskSpec) error {
	op := "prepare task " + t.ID
	if !isTaskID(t.ID) {
		return sdk.Errorf(sdk.Invalid, op, "task id %q is not 32 lower-case hex digits", t.ID)
	}
	switch t.PIDMode {
	case "", "host":
	case "task":
		return sdk.Errorf(sdk.Unsupported, op, "pidMode task is not supported: containers of a task cannot share a PID namespace yet").WithHint("use pidMode host, or leave it out")
	default:
		return sdk.Errorf(sdk.Invalid, op, "there is no pidMode %q", t.PIDMode)
	}
	switch t.IPCMode {
	case "", "host", "none":
	case "task":
		return sdk.Errorf(sdk.Unsupported, op, "ipcMode task is not supported: Docker shares an IPC namespace only with a container that runs").WithHint("use ipcMode host, or the runtime containerd")
	default:
		return sdk.Errorf(sdk.Invalid, op, "there is no ipcMode %q", t.IPCMode)
	}
	if err := r.checkNetwork(ctx, t.Network); err != nil {
		return r.fail(op, err)
	}
	unlock, err := r.names.lock(ctx, t.ID)
	if err != nil {
		return r.fail(op, err)
	}
	defer unlock()
	d, err := r.daemon(ctx, false)
	if err != nil {
		return r.fail(op, err)
	}
	if err := checkLimits(t.Limits, d); err != nil {
		return r.fail(op, err)
	}
	if limited(t.Limits) {
		if err := r.makeParent(ctx, d, t); err != nil {
			return r.fail(op, errors.Join(err, r.removeParents(ctx, t.ID)))
		}
	}
	return r.fail(op, save(r.taskFile(t.ID), t))
}

// checkNetwork refuses a network the daemon does not have.
func (r *Runtime) checkNetwork(ctx context.Context, mode string) error {
	switch mode {
	case sdk.NetworkHost, sdk.NetworkNone:
		return nil
	case sdk.NetworkBridge:
		_, err := r.engine.network(ctx, r.cfg.Network)
		if isStatus(err, http.StatusNotFound) {
			return sdk.Errorf(sdk.Unsupported, "", "the Docker daemon has no network %q", r.cfg.Network).
				WithHint("see bridge in /etc/docker/daemon.json, or set network to one that docker network ls shows")
		}
		return err
	}
	return sdk.Errorf(sdk.Unsupported, "", "there is no network mode %q", mode)
}

// RemoveTask implements sdk.Runtime.
func (r *Runtime) RemoveTask(ctx context.Context, task string) error {
	op := "remove task " + task
	if !isTaskID(task) {
		return sdk.Errorf(sdk.Invalid, op, "task id %q is not 32 lower-case hex digits", task)
	}
	unlock, err := r.names.lock(ctx, task)
	if err != nil {
		return r.fail(op, err)
	}
	defer unlock()
	// Containers that the daemon may still be making for a process of this
	// plugin that was killed.
	half, err := filepath.Glob(filepath.Join(r.copier.outputs(), namePrefix(task)+"*"))
	if err != nil {
		return r.fail(op, err)
	}
	for _, dir := range half {
		if err := r.removeUnstarted(ctx, filepath.Base(dir)); err != nil {
			return r.fail(op, err)
		}
	}
	held, err := r.engine.list(ctx, labelOwner+"="+r.owner, labelTask+"="+task)
	if err != nil {
		return r.fail(op, err)
	}
	if len(held) > 0 {
		return sdk.Errorf(sdk.Conflict, op, "%d of its containers are not removed", len(held))
	}
	if err := r.removeParents(ctx, task); err != nil {
		return r.fail(op, err)
	}
	if err := os.Remove(r.taskFile(task)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r.fail(op, err)
	}
	return nil
}

// taskSpec is what PrepareTask was told.
func (r *Runtime) taskSpec(task string) (sdk.TaskSpec, error) {
	var t sdk.TaskSpec
	b, err := os.ReadFile(r.taskFile(task))
	if errors.Is(err, fs.ErrNotExist) {
		return t, sdk.Errorf(sdk.Invalid, "", "task %s is not prepared", task)
	} else if err != nil {
		return t, err
	}
	return t, json.Unmarshal(b, &t)
}

// preparedTasks lists the tasks that RemoveTask has not removed.
func (r *Runtime) preparedTasks() ([]string, error) {
	entries, err := os.ReadDir(r.tasksDir())
	if err != nil {
		return nil, err
	}
	var all []string
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), ".json"); ok && isTaskID(id) {
			all = append(all, id)
		}
	}
	return all, nil
}

// save writes a small file whole or not at all. A task forgotten by a power
// cut is prepared again by the agent, so it is not synced. An unchanged file
// is not written: flash wears.
func save(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(path); err == nil && string(old) == string(b) {
		return nil
	}
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return os.Rename(tmp, path)
}
