package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/sdk"
)

func (r *Runtime) cgroupOf(task string) string { return path.Join(r.cfg.CgroupParent, task) }

func (r *Runtime) taskFile(task string) string { return filepath.Join(r.tasksDir(), task+".json") }

// PrepareTask implements sdk.Runtime: the task's cgroup, its shared IPC
// namespace if it wants one, and a file that remembers it across reboots.
func (r *Runtime) PrepareTask(ctx context.Context, t sdk.TaskSpec) error {
	op := "prepare task " + t.ID
	if !isTaskID(t.ID) {
		return sdk.Errorf(sdk.Invalid, op, "task id %q is not 32 lower-case hex digits", t.ID)
	}
	switch t.Network {
	case sdk.NetworkHost, sdk.NetworkNone:
	case sdk.NetworkBridge:
		if err := r.bridge.usable(); err != nil {
			return r.fail(op, err)
		}
	default:
		return sdk.Errorf(sdk.Unsupported, op, "there is no network mode %q", t.Network)
	}
	switch t.PIDMode {
	case "", "host":
	case "task":
		return sdk.Errorf(sdk.Unsupported, op, "pidMode task is not supported: containers of a task cannot share a PID namespace yet").WithHint("use pidMode host, or leave it out")
	default:
		return sdk.Errorf(sdk.Invalid, op, "there is no pidMode %q", t.PIDMode)
	}
	switch t.IPCMode {
	case "", "host", "none", "task":
	default:
		return sdk.Errorf(sdk.Invalid, op, "there is no ipcMode %q", t.IPCMode)
	}
	unlock, err := r.tasks.lock(ctx, t.ID)
	if err != nil {
		return r.fail(op, err)
	}
	defer unlock()
	if err := r.cgroups.make(r.cgroupOf(t.ID), t.Limits); err != nil {
		return r.fail(op, errors.Join(err, r.cgroups.remove(r.cgroupOf(t.ID))))
	}
	if t.IPCMode == "task" {
		if err := makeIPC(r.ipcDir(t.ID)); err != nil {
			return r.fail(op, fmt.Errorf("make the task's IPC namespace: %w", err))
		}
	}
	if err := save(r.taskFile(t.ID), t); err != nil {
		return r.fail(op, err)
	}
	return nil
}

// RemoveTask implements sdk.Runtime.
func (r *Runtime) RemoveTask(ctx context.Context, task string) error {
	op := "remove task " + task
	if !isTaskID(task) {
		return sdk.Errorf(sdk.Invalid, op, "task id %q is not 32 lower-case hex digits", task)
	}
	unlock, err := r.tasks.lock(ctx, task)
	if err != nil {
		return r.fail(op, err)
	}
	defer unlock()
	held, err := r.client.Containers(r.in(ctx), labelIs(labelTask, task))
	if err != nil {
		return r.fail(op, err)
	}
	if len(held) > 0 {
		return sdk.Errorf(sdk.Conflict, op, "%d of its containers are not removed", len(held))
	}
	if err := r.clearHalfMade(r.in(ctx), task); err != nil {
		return r.fail(op, err)
	}
	if err := removeIPC(r.ipcDir(task)); err != nil {
		return r.fail(op, err)
	}
	if err := r.cgroups.remove(r.cgroupOf(task)); err != nil {
		return r.fail(op, err)
	}
	if err := os.Remove(r.taskFile(task)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r.fail(op, err)
	}
	return nil
}

// clearHalfMade removes what starts of a task have left that were interrupted
// before containerd knew of their containers: nobody else knows of them.
func (r *Runtime) clearHalfMade(ctx context.Context, task string) error {
	found, err := filepath.Glob(filepath.Join(r.containersDir(), task+"-*")) // made first, removed last
	if err != nil || len(found) == 0 {
		return err
	}
	if _, err := r.chooseSnapshotter(ctx); err != nil { // discard looks there
		return err
	}
	for _, dir := range found {
		if err := r.clearIfUnknown(ctx, filepath.Base(dir)); err != nil {
			return err
		}
	}
	return nil
}

func (r *Runtime) clearIfUnknown(ctx context.Context, id string) error {
	unlock, err := r.tasks.lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	switch _, err := r.client.ContainerService().Get(ctx, id); {
	case err == nil:
		return sdk.Errorf(sdk.Conflict, "", "container %s is not removed", id)
	case !errdefs.IsNotFound(err):
		return err
	}
	return r.discard(ctx, id, nil)
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

func (r *Runtime) ipcDir(task string) string { return filepath.Join(r.runDir, "ipc", task) }

// makeIPC makes an IPC namespace held by a bind mount, and the tmpfs that is
// /dev/shm of every container in it.
func makeIPC(dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, "shm"), 0o700); err != nil {
		return err
	}
	if !isMount(filepath.Join(dir, "shm")) {
		if err := unix.Mount("shm", filepath.Join(dir, "shm"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777,size=64m"); err != nil {
			return err
		}
	}
	return makeNamespace(filepath.Join(dir, "ns"), unix.CLONE_NEWIPC, "ipc", nil)
}

func removeIPC(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return errors.Join(unmount(filepath.Join(dir, "shm")), unmount(filepath.Join(dir, "ns")), os.RemoveAll(dir))
}

// makeNamespace makes a namespace that lives as long as the bind mount at
// path. inside, if given, runs in it. One that is there is kept.
func makeNamespace(path string, flag int, name string, inside func() error) error {
	if isMount(path) {
		return nil
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and no other
		// goroutine ever runs in the wrong namespace.
		runtime.LockOSThread()
		done <- func() error {
			if err := unix.Unshare(flag); err != nil {
				return fmt.Errorf("unshare: %w", err)
			}
			if inside != nil {
				if err := inside(); err != nil {
					return err
				}
			}
			return unix.Mount(fmt.Sprintf("/proc/%d/task/%d/ns/%s", os.Getpid(), unix.Gettid(), name), path, "", unix.MS_BIND, "")
		}()
	}()
	if err := <-done; err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// unmount detaches a mount; none is no error.
func unmount(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH)
	if err == unix.EINVAL || err == unix.ENOENT {
		return nil
	}
	return err
}

// isMount tells whether something is mounted at path itself.
func isMount(path string) bool {
	var at, above unix.Stat_t
	if unix.Stat(path, &at) != nil || unix.Stat(filepath.Dir(path), &above) != nil {
		return false
	}
	return at.Dev != above.Dev
}
