package docker

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// cgroupRoot is where cgroups are mounted.
const cgroupRoot = "/sys/fs/cgroup"

// limited tells whether a task has limits for all its containers together:
// only then there is a cgroup for it.
func limited(l sdk.Limits) bool {
	return l.CPUShares > 0 || l.CPUQuota > 0 || l.MemoryBytes > 0 || l.MemoryReservation > 0 || l.MemorySwap != nil || l.Swappiness != nil || l.Pids > 0
}

// slice is the task's cgroup where the daemon has systemd make cgroups.
func slice(task string) string { return "belay-docker-" + task + ".slice" }

// parentOf is what the daemon calls the cgroup that the task's containers are
// made in; "" is the daemon's own.
func (r *Runtime) parentOf(d *daemonInfo, t sdk.TaskSpec) string {
	switch {
	case !limited(t.Limits):
		return ""
	case d.CgroupDriver == "systemd":
		return slice(t.ID)
	}
	return path.Join(r.cfg.CgroupParent, t.ID)
}

// makeParent makes the task's cgroup with its limits, or changes those of the
// one that is there.
func (r *Runtime) makeParent(ctx context.Context, d *daemonInfo, t sdk.TaskSpec) error {
	if d.CgroupDriver == "systemd" {
		return systemctl(ctx, append([]string{"set-property", "--runtime", slice(t.ID)}, sliceProperties(t.Limits, d.cgroupVersion() == "2")...)...)
	}
	at := path.Join(r.cfg.CgroupParent, t.ID)
	if unified() {
		return makeUnified(at, t.Limits)
	}
	return makeV1(at, t.Limits)
}

// sliceProperties are limits as systemd.resource-control(5) names them. On v1
// it knows neither reservations nor swap.
func sliceProperties(l sdk.Limits, v2 bool) []string {
	var p []string
	add := func(set bool, format string, v any) {
		if set {
			p = append(p, fmt.Sprintf(format, v))
		}
	}
	add(l.CPUQuota > 0, "CPUQuota=%d%%", max(l.CPUQuota/1000, 1))
	add(l.Pids > 0, "TasksMax=%d", l.Pids)
	if !v2 {
		add(l.CPUShares > 0, "CPUShares=%d", max(l.CPUShares, 2))
		add(l.MemoryBytes > 0, "MemoryLimit=%d", l.MemoryBytes)
		return p
	}
	add(l.CPUShares > 0, "CPUWeight=%d", weight(l.CPUShares))
	add(l.MemoryBytes > 0, "MemoryMax=%d", l.MemoryBytes)
	add(l.MemoryReservation > 0, "MemoryLow=%d", l.MemoryReservation)
	add(l.MemorySwap != nil && *l.MemorySwap >= 0, "MemorySwapMax=%d", value(l.MemorySwap))
	return p
}

func systemctl(ctx context.Context, args ...string) error {
	if out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, clip(string(out)))
	}
	return nil
}

// removeParents deletes the task's cgroup, of whichever driver: the daemon may
// have had another one when it was made.
func (r *Runtime) removeParents(ctx context.Context, task string) error {
	var errs error
	if dirs, _ := filepath.Glob("/run/systemd/system.control/" + slice(task) + ".d"); len(dirs) > 0 {
		errs = errors.Join(systemctl(ctx, "revert", slice(task)), systemctl(ctx, "stop", slice(task)))
	}
	at := path.Join(r.cfg.CgroupParent, task)
	roots := []string{cgroupRoot}
	if !unified() {
		roots = roots[:0]
		for _, m := range controllers() {
			roots = append(roots, m)
		}
	}
	for _, root := range roots {
		errs = errors.Join(errs, removeEmpty(filepath.Join(root, at)))
	}
	return errs
}

// removeEmpty deletes a cgroup without processes. It is busy until the last
// of them is reaped.
func removeEmpty(dir string) error {
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := syscall.Rmdir(dir)
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist):
			return nil
		case !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline):
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
}

func unified() bool {
	_, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers"))
	return err == nil
}

// controllers maps v1's controllers to where each is mounted.
func controllers() map[string]string {
	all := map[string]string{}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return all
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		before, behind, ok := strings.Cut(s.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(behind)
		if !ok || len(left) < 5 || len(right) < 3 || !strings.HasPrefix(left[4], cgroupRoot+"/") {
			continue
		}
		if right[0] == "cgroup2" {
			all["unified"] = left[4] // a hybrid host's: runc makes cgroups there too
		}
		if right[0] != "cgroup" {
			continue
		}
		for _, o := range strings.Split(right[2], ",") {
			switch o {
			case "rw", "ro", "xattr", "clone_children":
			default:
				all[o] = left[4]
			}
		}
	}
	return all
}

// makeV1 makes cgroups in the hierarchies of what is limited; the others are
// left to runc.
func makeV1(at string, l sdk.Limits) error {
	mounts := controllers()
	if l.CPUShares > 0 || l.CPUQuota > 0 {
		shares, quota := int64(1024), int64(-1)
		if l.CPUShares > 0 {
			shares = int64(max(l.CPUShares, 2))
		}
		if l.CPUQuota > 0 {
			quota = int64(l.CPUQuota)
		}
		dir := filepath.Join(mounts["cpu"], at)
		err := errors.Join(os.MkdirAll(dir, 0o755),
			set(dir, "cpu.shares", shares), set(dir, "cpu.cfs_period_us", 100000), set(dir, "cpu.cfs_quota_us", quota))
		if err != nil {
			return err
		}
	}
	if l.MemoryBytes > 0 || l.MemoryReservation > 0 || l.MemorySwap != nil || l.Swappiness != nil {
		dir := filepath.Join(mounts["memory"], at)
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return err
		}
		// Before Linux 5.11 a parent's limit binds its children only if told so.
		_ = set(filepath.Dir(dir), "memory.use_hierarchy", 1)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		_ = set(dir, "memory.use_hierarchy", 1)
		if err := setMemoryV1(dir, l); err != nil {
			return err
		}
	}
	if l.Pids > 0 {
		dir := filepath.Join(mounts["pids"], at)
		return errors.Join(os.MkdirAll(dir, 0o755), set(dir, "pids.max", l.Pids))
	}
	return nil
}

// setMemoryV1 writes the limits in the order the kernel accepts whatever was
// set before: memory with swap may never be below memory alone.
func setMemoryV1(dir string, l sdk.Limits) error {
	_, noSwap := os.Stat(filepath.Join(dir, "memory.memsw.limit_in_bytes"))
	if noSwap == nil {
		_ = set(dir, "memory.memsw.limit_in_bytes", -1)
	}
	var errs error
	if l.MemoryBytes > 0 {
		errs = set(dir, "memory.limit_in_bytes", int64(l.MemoryBytes))
		if noSwap == nil && l.MemorySwap != nil && *l.MemorySwap >= 0 {
			errs = errors.Join(errs, set(dir, "memory.memsw.limit_in_bytes", int64(l.MemoryBytes)+*l.MemorySwap))
		}
	}
	if l.MemoryReservation > 0 {
		errs = errors.Join(errs, set(dir, "memory.soft_limit_in_bytes", int64(l.MemoryReservation)))
	}
	if l.Swappiness != nil {
		errs = errors.Join(errs, set(dir, "memory.swappiness", int64(*l.Swappiness)))
	}
	return errs
}

func makeUnified(at string, l sdk.Limits) error {
	// Every level above the containers must hand the controllers down. One
	// that cannot is noticed below, when its limit's file is missing.
	dir := cgroupRoot
	for part := range strings.SplitSeq(strings.Trim(at, "/"), "/") {
		for _, c := range []string{"cpu", "memory", "pids"} {
			_ = write(dir, "cgroup.subtree_control", "+"+c)
		}
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	var errs error
	if l.CPUShares > 0 {
		errs = errors.Join(errs, set(dir, "cpu.weight", weight(l.CPUShares)))
	}
	if l.CPUQuota > 0 {
		errs = errors.Join(errs, write(dir, "cpu.max", fmt.Sprintf("%d 100000", l.CPUQuota)))
	}
	if l.MemoryBytes > 0 {
		errs = errors.Join(errs, set(dir, "memory.max", int64(l.MemoryBytes)))
	}
	if l.MemoryReservation > 0 {
		errs = errors.Join(errs, set(dir, "memory.low", int64(l.MemoryReservation)))
	}
	if l.MemorySwap != nil && *l.MemorySwap >= 0 {
		if _, err := os.Stat(filepath.Join(dir, "memory.swap.max")); err == nil || hostSwap() {
			errs = errors.Join(errs, set(dir, "memory.swap.max", *l.MemorySwap))
		}
	}
	if l.Pids > 0 {
		errs = errors.Join(errs, set(dir, "pids.max", l.Pids))
	}
	return errs
}

// weight turns v1's shares (2 to 262144) into v2's weight (1 to 10000), as
// runc does.
func weight(shares uint64) int64 {
	s := int64(min(max(shares, 2), 262144))
	return 1 + (s-2)*9999/262142
}

func value(p *int64) int64 {
	if p == nil {
		return 0
	}
	return *p
}

func set(dir, name string, v int64) error { return write(dir, name, strconv.FormatInt(v, 10)) }

func write(dir, name, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
