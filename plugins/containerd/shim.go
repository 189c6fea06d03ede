package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
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

// killShims ends shims that nobody will end any more, and what runc and
// containerd have for them: a process that waits to be started, its state, and
// the bundle, which would keep the name taken until containerd is restarted.
func (r *Runtime) killShims(ctx context.Context, id string) {
	pids := r.shims(id)
	if len(pids) == 0 {
		return
	}
	var bundles []string
	for _, pid := range pids {
		// containerd starts a shim in its bundle.
		if b, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err == nil && r.isBundle(b, id) {
			bundles = append(bundles, b)
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	ctx, cancel := context.WithTimeout(ctx, lastWord)
	defer cancel()
	out, err := exec.CommandContext(ctx, "runc", "--root", filepath.Join(runcState, r.cfg.Namespace), "delete", "--force", id).CombinedOutput()
	for _, b := range bundles {
		err = errors.Join(err, clearBundle(ctx, b))
	}
	r.log.Warn("killed a shim that containerd has forgotten", "container", id, "pids", pids, "runc", clip(string(out)), "err", err)
}

// bundleTaken finds the bundle in containerd's word that it is there already.
var bundleTaken = regexp.MustCompile(`mkdir (/\S+): file exists`)

// forgottenBundle is the bundle that a failed start met, "" if none: containerd
// may forget one whose shim did not end in time, and then refuses the name for
// as long as it runs itself.
func (r *Runtime) forgottenBundle(err error, id string) string {
	if err == nil || len(r.shims(id)) > 0 {
		return ""
	}
	if m := bundleTaken.FindStringSubmatch(err.Error()); m != nil && r.isBundle(m[1], id) {
		return m[1]
	}
	return ""
}

// isBundle tells whether a path is where containerd keeps the bundle of a
// container of ours.
func (r *Runtime) isBundle(path, id string) bool {
	return filepath.IsAbs(path) && strings.HasSuffix(filepath.Clean(path), "/io.containerd.runtime.v2.task/"+r.cfg.Namespace+"/"+id)
}

// bundlePatience is how long containerd gets to clear a bundle away itself
// when its shim has died.
const bundlePatience = 2 * time.Second

// clearBundle removes a bundle without a shim as containerd does: the root file
// system is unmounted, never emptied. What runc made in its place when it was
// no longer mounted goes.
func clearBundle(ctx context.Context, bundle string) error {
	patience := time.NewTimer(bundlePatience)
	defer patience.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for waiting := true; waiting; {
		if _, err := os.Lstat(bundle); os.IsNotExist(err) {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-patience.C:
			waiting = false
		case <-tick.C:
		}
	}
	rootfs := filepath.Join(bundle, "rootfs")
	for range 8 { // more than one start may have mounted it
		if err := unix.Unmount(rootfs, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			break // EINVAL: no mount, ENOENT: no directory
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("clear the bundle: %w", err)
	}
	if bytes.Contains(mounts, []byte(" "+bundle+"/")) {
		return fmt.Errorf("clear the bundle: something is still mounted in %s", bundle)
	}
	if work, err := os.Readlink(filepath.Join(bundle, "work")); err == nil && filepath.Base(work) == filepath.Base(bundle) {
		if err := os.RemoveAll(work); err != nil {
			return fmt.Errorf("clear the bundle: %w", err)
		}
	}
	if b, err := os.ReadFile(filepath.Join(bundle, "address")); err == nil {
		if socket, ok := strings.CutPrefix(strings.TrimSpace(string(b)), "unix://"); ok && strings.HasPrefix(filepath.Clean(socket), "/run/containerd/s/") {
			_ = os.Remove(socket) // nobody listens there
		}
	}
	return os.RemoveAll(bundle)
}
