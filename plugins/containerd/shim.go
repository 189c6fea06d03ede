package containerd

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

const (
	// shimPatience is how long a shim that was to be removed may still run.
	// containerd gives it 5 s to end an abandoned start. From 1.7 on it may
	// then forget the shim, which was busy, and which runs on for ever.
	shimPatience = 8 * time.Second
	// runcState is where shims of runc keep it, below by namespace.
	runcState = "/run/containerd/runc"
)

// awaitShims waits until no shim of a container runs that was to be removed:
// one that is still being ended would take the directory of its successor
// with it. One that containerd has forgotten is killed.
func (r *Runtime) awaitShims(ctx context.Context, id string, atMost time.Duration) error {
	timeout := time.NewTimer(atMost)
	defer timeout.Stop()
	patience := time.NewTimer(shimPatience)
	defer patience.Stop()
	tick := time.NewTicker(50 * time.Millisecond) // containerd itself has a little to do afterwards
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timeout.C:
			return nil // the next try will say what is wrong
		case <-patience.C:
			r.killShims(ctx, id)
		case <-tick.C:
		}
		if len(r.shims(id)) == 0 {
			return nil
		}
	}
}

// shims are the processes that are a shim of ours for this container.
func (r *Runtime) shims(id string) (pids []int) {
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range found {
		b, err := os.ReadFile(f)
		if err != nil || !isShim(b, r.cfg.Namespace, id) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// isShim reads a command line as the kernel shows it. Ids are random enough
// to tell one containerd's from another's.
func isShim(cmdline []byte, namespace, id string) bool {
	return bytes.Contains(cmdline, []byte("\x00-namespace\x00"+namespace+"\x00")) && bytes.Contains(cmdline, []byte("\x00-id\x00"+id+"\x00"))
}

// killShims ends shims that nobody will end any more, and what runc has for
// them: a process that waits to be started, and its state.
func (r *Runtime) killShims(ctx context.Context, id string) {
	pids := r.shims(id)
	if len(pids) == 0 {
		return
	}
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	ctx, cancel := context.WithTimeout(ctx, lastWord)
	defer cancel()
	out, err := exec.CommandContext(ctx, "runc", "--root", filepath.Join(runcState, r.cfg.Namespace), "delete", "--force", id).CombinedOutput()
	r.log.Warn("killed a shim that containerd has forgotten", "container", id, "pids", pids, "runc", clip(string(out)), "err", err)
}
