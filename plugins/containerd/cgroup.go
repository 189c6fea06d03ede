package containerd

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// cgroups is the hierarchy of this host: one (v2), or one a controller (v1).
// Paths given to its methods are those in it, such as "/belay/<task>".
type cgroups struct {
	root    string            // of v2
	mounts  map[string]string // of v1: controller to mount point
	unified bool
}

// findCgroups looks at what is mounted at root, as runc does: v2 when it is a
// cgroup2 file system itself, even where a hybrid host has one elsewhere.
func findCgroups(root string) cgroups {
	if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err == nil {
		return cgroups{root: root, unified: true}
	}
	g := cgroups{root: root, mounts: map[string]string{}}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return g
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		before, behind, ok := strings.Cut(s.Text(), " - ")
		left, right := strings.Fields(before), strings.Fields(behind)
		if !ok || len(left) < 5 || len(right) < 3 || !strings.HasPrefix(left[4], root+"/") {
			continue
		}
		if right[0] == "cgroup2" {
			// A hybrid host's second tree has no controllers, yet runc makes
			// every cgroup there too.
			g.mounts["unified"] = left[4]
		}
		if right[0] != "cgroup" {
			continue
		}
		for _, o := range strings.Split(right[2], ",") {
			switch o {
			case "rw", "ro", "xattr", "clone_children":
			default:
				g.mounts[o] = left[4]
			}
		}
	}
	return g
}

func (g cgroups) name() string {
	if g.unified {
		return "v2"
	}
	return "v1"
}

// has tells whether limits of this controller can be set.
func (g cgroups) has(controller string) bool {
	if !g.unified {
		_, ok := g.mounts[controller]
		return ok
	}
	b, err := os.ReadFile(filepath.Join(g.root, "cgroup.controllers"))
	return err == nil && strings.Contains(" "+strings.TrimSpace(string(b))+" ", " "+controller+" ")
}

// check refuses limits this kernel cannot keep, by name.
func (g cgroups) check(l sdk.Limits) error {
	lacks := func(what, controller, hint string) error {
		return sdk.Errorf(sdk.Unsupported, "", "%s cannot be limited: this kernel has no %s cgroup controller", what, controller).WithHint(hint)
	}
	switch {
	case (l.MemoryBytes > 0 || l.MemoryReservation > 0 || l.MemorySwap != nil || l.Swappiness != nil) && !g.has("memory"):
		return lacks("memory", "memory", "on a Raspberry Pi add cgroup_enable=memory to the kernel's command line and reboot")
	case (l.CPUShares > 0 || l.CPUQuota > 0) && !g.has("cpu"):
		return lacks("cpu", "cpu", "enable CONFIG_CGROUP_SCHED and CONFIG_CFS_BANDWIDTH in the kernel")
	case l.Pids > 0 && !g.has("pids"):
		return lacks("the number of processes", "pids", "enable CONFIG_CGROUP_PIDS in the kernel")
	case l.CPUQuota > 0 && l.CPUQuota < 1000:
		return sdk.Errorf(sdk.Invalid, "", "a CPU quota of %d µs is below the kernel's minimum of 1000 µs in 100 ms", l.CPUQuota)
	case l.Swappiness != nil && g.unified:
		return sdk.Errorf(sdk.Unsupported, "", "swappiness cannot be set: cgroup v2 has no such setting").WithHint("leave it out, or limit swap")
	case l.MemorySwap != nil && !g.canLimitSwap() && hostSwap() > 0:
		return sdk.Errorf(sdk.Unsupported, "", "swap cannot be limited: this kernel does not account for it").WithHint("boot with swapaccount=1")
	}
	return nil
}

// canLimitSwap tells whether the files of swap limits are there.
func (g cgroups) canLimitSwap() bool {
	if g.unified {
		m, _ := filepath.Glob(filepath.Join(g.root, "*", "memory.swap.max"))
		return len(m) > 0
	}
	_, err := os.Stat(filepath.Join(g.mounts["memory"], "memory.memsw.limit_in_bytes"))
	return err == nil
}

// hostSwap is the host's swap space in KiB.
func hostSwap() uint64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "SwapTotal:"); ok {
			n, _ := strconv.ParseUint(strings.Fields(v)[0], 10, 64)
			return n
		}
	}
	return 0
}

// make creates the cgroup of a task with its limits, or changes those of the
// one that is there. Controllers without a limit are left to runc.
func (g cgroups) make(path string, l sdk.Limits) error {
	if err := g.check(l); err != nil {
		return err
	}
	if g.unified {
		return g.makeUnified(path, l)
	}
	if l.CPUShares > 0 || l.CPUQuota > 0 {
		dir := filepath.Join(g.mounts["cpu"], path)
		err := errors.Join(os.MkdirAll(dir, 0o755),
			set(dir, "cpu.shares", orDefault(l.CPUShares, 1024)),
			set(dir, "cpu.cfs_period_us", 100000),
			setSigned(dir, "cpu.cfs_quota_us", orMinus(l.CPUQuota)))
		if err != nil {
			return err
		}
	}
	if l.MemoryBytes > 0 || l.MemoryReservation > 0 || l.MemorySwap != nil || l.Swappiness != nil {
		dir := filepath.Join(g.mounts["memory"], path)
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return err
		}
		// Before Linux 5.11 a parent's limit binds its children only if told so.
		_ = set(filepath.Dir(dir), "memory.use_hierarchy", 1)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		_ = set(dir, "memory.use_hierarchy", 1)
		if err := g.setMemory(dir, l); err != nil {
			return err
		}
	}
	if l.Pids > 0 {
		dir := filepath.Join(g.mounts["pids"], path)
		return errors.Join(os.MkdirAll(dir, 0o755), setSigned(dir, "pids.max", l.Pids))
	}
	return nil
}

// setMemory writes v1's memory limits: memory alone first and with swap
// second, in the order the kernel accepts whatever was set before.
func (g cgroups) setMemory(dir string, l sdk.Limits) error {
	swap := int64(-1)
	if l.MemorySwap != nil && *l.MemorySwap >= 0 && l.MemoryBytes > 0 {
		swap = int64(l.MemoryBytes) + *l.MemorySwap
	}
	if g.canLimitSwap() {
		_ = setSigned(dir, "memory.memsw.limit_in_bytes", -1)
	}
	err := setSigned(dir, "memory.limit_in_bytes", orMinus(l.MemoryBytes))
	if g.canLimitSwap() && swap > 0 {
		err = errors.Join(err, setSigned(dir, "memory.memsw.limit_in_bytes", swap))
	}
	if l.MemoryReservation > 0 {
		err = errors.Join(err, set(dir, "memory.soft_limit_in_bytes", l.MemoryReservation))
	}
	if l.Swappiness != nil {
		err = errors.Join(err, set(dir, "memory.swappiness", *l.Swappiness))
	}
	return err
}

func (g cgroups) makeUnified(path string, l sdk.Limits) error {
	// Every level above the task must hand the controllers down. One that
	// cannot is noticed below, when its limit's file is missing.
	at := g.root
	for part := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		for _, c := range []string{"cpu", "cpuset", "io", "memory", "pids"} {
			_ = write(at, "cgroup.subtree_control", "+"+c)
		}
		at = filepath.Join(at, part)
		if err := os.Mkdir(at, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	var err error
	if l.CPUShares > 0 {
		err = errors.Join(err, set(at, "cpu.weight", weight(l.CPUShares)))
	}
	if l.CPUQuota > 0 {
		err = errors.Join(err, write(at, "cpu.max", fmt.Sprintf("%d 100000", l.CPUQuota)))
	}
	if l.MemoryBytes > 0 {
		err = errors.Join(err, set(at, "memory.max", l.MemoryBytes))
	}
	if l.MemoryReservation > 0 {
		err = errors.Join(err, set(at, "memory.low", l.MemoryReservation))
	}
	if l.MemorySwap != nil && *l.MemorySwap >= 0 && g.canLimitSwap() {
		err = errors.Join(err, setSigned(at, "memory.swap.max", *l.MemorySwap))
	}
	if l.Pids > 0 {
		err = errors.Join(err, setSigned(at, "pids.max", l.Pids))
	}
	return err
}

// weight maps v1's shares (2..262144) to v2's weight (1..10000), as runc does.
func weight(shares uint64) uint64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}

// remove deletes the cgroup and what is below it in every hierarchy, and
// kills what is still in there.
func (g cgroups) remove(path string) error {
	roots := map[string]bool{g.root: true}
	if !g.unified {
		roots = map[string]bool{}
		for _, m := range g.mounts {
			roots[m] = true
		}
	}
	var errs error
	for root := range roots {
		errs = errors.Join(errs, removeTree(filepath.Join(root, path)))
	}
	return errs
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	// A cgroup is busy until the last of its processes is reaped.
	for deadline := time.Now().Add(2 * time.Second); ; {
		procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		for _, f := range strings.Fields(string(procs)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
		err := os.Remove(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup: %w", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// stats reads the use of one container's cgroup.
func (g cgroups) stats(path string) (sdk.Stats, error) {
	var s sdk.Stats
	if g.unified {
		dir := filepath.Join(g.root, path)
		if _, err := os.Stat(dir); err != nil {
			return s, err
		}
		s.CPUNanos = field(dir, "cpu.stat", "usage_usec") * 1000
		s.MemoryBytes = number(dir, "memory.current")
		if cache := field(dir, "memory.stat", "inactive_file"); cache < s.MemoryBytes {
			s.MemoryBytes -= cache
		}
		s.MemoryLimitBytes = number(dir, "memory.max")
		s.Pids = number(dir, "pids.current")
		return s, nil
	}
	memory, pids := filepath.Join(g.mounts["memory"], path), filepath.Join(g.mounts["pids"], path)
	cpu := filepath.Join(g.mounts["cpuacct"], path)
	if _, err := os.Stat(cpu); err != nil {
		return s, err
	}
	s.CPUNanos = number(cpu, "cpuacct.usage")
	s.MemoryBytes = number(memory, "memory.usage_in_bytes")
	if cache := field(memory, "memory.stat", "total_inactive_file"); cache < s.MemoryBytes {
		s.MemoryBytes -= cache
	}
	// The kernel says "no limit" as the largest number of pages.
	if limit := number(memory, "memory.limit_in_bytes"); limit < 1<<62 {
		s.MemoryLimitBytes = limit
	}
	s.Pids = number(pids, "pids.current")
	return s, nil
}

// oomKills is how many processes of the cgroup the kernel killed for memory.
func (g cgroups) oomKills(path string) uint64 {
	if g.unified {
		return field(filepath.Join(g.root, path), "memory.events", "oom_kill")
	}
	return field(filepath.Join(g.mounts["memory"], path), "memory.oom_control", "oom_kill")
}

func number(dir, name string) uint64 {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64) // "max" is no number
	return n
}

func field(dir, name, key string) uint64 {
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == key {
			n, _ := strconv.ParseUint(f[1], 10, 64)
			return n
		}
	}
	return 0
}

func write(dir, name, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

func set(dir, name string, v uint64) error { return write(dir, name, strconv.FormatUint(v, 10)) }

func setSigned(dir, name string, v int64) error { return write(dir, name, strconv.FormatInt(v, 10)) }

func orDefault(v, d uint64) uint64 {
	if v == 0 {
		return d
	}
	return v
}

func orMinus(v uint64) int64 {
	if v == 0 {
		return -1
	}
	return int64(v)
}
