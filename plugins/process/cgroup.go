package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
)

// cpuPeriod is the wall time, in microseconds, a CPU quota is given for.
const cpuPeriod = 100_000

// wantedControllers are the version 1 hierarchies an attempt gets a cgroup in.
var wantedControllers = []string{"cpu", "cpuacct", "memory", "pids"}

// hierarchy is one mounted cgroup tree: all of version 2, or some controllers
// of version 1.
type hierarchy struct {
	mount       string
	v2          bool
	controllers []string
}

// cgroups makes cgroups below parent in every hierarchy that allows it. Nil:
// there is none, or we are not root.
//
//	<mount>/<cgroup_parent>/<tag>/supervisors         the belay-supervise processes
//	<mount>/<cgroup_parent>/<tag>/<task>              limits of the task
//	<mount>/<cgroup_parent>/<tag>/<task>/<container>.<number>
type cgroups struct {
	hierarchies []hierarchy
	parent      string
}

func findCgroups(parent, tag string) *cgroups {
	if os.Geteuid() != 0 {
		return nil
	}
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	c := &cgroups{parent: filepath.Join(parent, tag)}
	for _, h := range parseMounts(string(raw)) {
		if h.v2 {
			b, _ := os.ReadFile(filepath.Join(h.mount, "cgroup.controllers"))
			h.controllers = strings.Fields(string(b))
		}
		probe := &cgroups{hierarchies: []hierarchy{h}, parent: c.parent}
		if _, err := probe.make("supervisors"); err == nil {
			c.hierarchies = append(c.hierarchies, h)
		}
	}
	if len(c.hierarchies) == 0 {
		return nil
	}
	return c
}

// parseMounts finds the cgroup mounts worth using in a mountinfo file, the
// version 2 one first.
func parseMounts(mountinfo string) []hierarchy {
	var found []hierarchy
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 5 || len(g) < 3 {
			continue
		}
		mount := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\134`, `\`).Replace(f[4])
		switch g[0] {
		case "cgroup2":
			found = slices.Insert(found, 0, hierarchy{mount: mount, v2: true})
		case "cgroup":
			var has []string
			for o := range strings.SplitSeq(g[2], ",") {
				if slices.Contains(wantedControllers, o) {
					has = append(has, o)
				}
			}
			if has != nil {
				found = append(found, hierarchy{mount: mount, controllers: has})
			}
		}
	}
	return found
}

func (c *cgroups) describe() string {
	if c == nil {
		return "none"
	}
	version := "none"
	for _, h := range c.hierarchies {
		if h.v2 && slices.Contains(h.controllers, "memory") {
			return "v2"
		}
		if !h.v2 {
			version = "v1"
		} else if version == "none" {
			version = "v2"
		}
	}
	return version
}

// cgroup is one group: a directory in each hierarchy.
type cgroup []cgroupDir

type cgroupDir struct {
	hierarchy
	path string
}

// make creates the group called name below the parent; existing is fine.
func (c *cgroups) make(name string) (cgroup, error) {
	g := c.group(name)
	for _, d := range g {
		if err := os.MkdirAll(d.path, 0o755); err != nil {
			return nil, err
		}
		rel, _ := filepath.Rel(d.mount, filepath.Dir(d.path))
		at := d.mount
		for _, part := range strings.Split("./"+rel, "/") {
			at = filepath.Join(at, part)
			if d.v2 {
				// One by one: a refused one must not cost the others. What is
				// still missing is told when a limit needs it.
				for _, ctl := range []string{"+cpu", "+memory", "+pids"} {
					_ = os.WriteFile(filepath.Join(at, "cgroup.subtree_control"), []byte(ctl), 0)
				}
			} else if at != d.mount && slices.Contains(d.controllers, "memory") {
				// Kernels before 5.11 count children apart unless told.
				_ = os.WriteFile(filepath.Join(at, "memory.use_hierarchy"), []byte("1"), 0)
			}
		}
	}
	return g, nil
}

// group names the directories without making them.
func (c *cgroups) group(name string) cgroup {
	if c == nil {
		return nil
	}
	var g cgroup
	for _, h := range c.hierarchies {
		g = append(g, cgroupDir{h, filepath.Join(h.mount, c.parent, name)})
	}
	return g
}

// with finds the directory that has a controller.
func (g cgroup) with(controller string) (cgroupDir, bool) {
	for _, d := range g {
		if slices.Contains(d.controllers, controller) {
			return d, true
		}
	}
	return cgroupDir{}, false
}

// setting is one file to write for a limit.
type setting struct{ limit, file, value string }

// settings translates a limit into files of one hierarchy's version.
func settings(l sdk.Limits, controller string, v2 bool) ([]setting, error) {
	var s []setting
	add := func(limit string, set bool, v1File, v2File string, v1, v2Value any) {
		switch {
		case !set:
		case v2:
			s = append(s, setting{limit, v2File, fmt.Sprint(v2Value)})
		default:
			s = append(s, setting{limit, v1File, fmt.Sprint(v1)})
		}
	}
	switch controller {
	case "cpu":
		add("cpu shares", l.CPUShares > 0, "cpu.shares", "cpu.weight", max(l.CPUShares, 2), weightOf(l.CPUShares))
		if !v2 {
			add("cpu quota", l.CPUQuota > 0, "cpu.cfs_period_us", "", cpuPeriod, nil)
		}
		quota := max(l.CPUQuota, 1000) // the kernel's smallest
		add("cpu quota", l.CPUQuota > 0, "cpu.cfs_quota_us", "cpu.max", quota, fmt.Sprint(quota, " ", cpuPeriod))
	case "memory":
		add("memory", l.MemoryBytes > 0, "memory.limit_in_bytes", "memory.max", l.MemoryBytes, l.MemoryBytes)
		add("memory reservation", l.MemoryReservation > 0, "memory.soft_limit_in_bytes", "memory.low", l.MemoryReservation, l.MemoryReservation)
		if l.MemorySwap != nil {
			v1, v2Value := "-1", "max"
			if *l.MemorySwap >= 0 {
				if l.MemoryBytes == 0 && !v2 {
					return nil, sdk.Errorf(sdk.Invalid, "limit memory swap", "swap is limited together with memory here: give a memory limit too")
				}
				v1 = strconv.FormatUint(l.MemoryBytes+uint64(*l.MemorySwap), 10)
				v2Value = strconv.FormatInt(*l.MemorySwap, 10)
			}
			add("memory swap", true, "memory.memsw.limit_in_bytes", "memory.swap.max", v1, v2Value)
		}
		if l.Swappiness != nil {
			if v2 {
				return nil, sdk.Errorf(sdk.Unsupported, "limit swappiness", "cgroup version 2 has no swappiness")
			}
			add("swappiness", true, "memory.swappiness", "", *l.Swappiness, nil)
		}
	case "pids":
		add("pids", l.Pids > 0, "pids.max", "pids.max", l.Pids, l.Pids)
	}
	return s, nil
}

// leastShares is the least weight the kernel knows.
const leastShares = 2

// weightOf maps shares (2..262144, 1024 a core) to a version 2 weight
// (1..10000, 100 the default), as the OCI runtimes do.
func weightOf(shares uint64) uint64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}

// limit applies limits; what this machine cannot do is Unsupported by name.
func (g cgroup) limit(l sdk.Limits) error {
	if _, weighted := g.with("cpu"); !weighted && l.CPUShares <= leastShares {
		// What everyone gets who asks for no CPU: without weights, it is not
		// a limit that is missed.
		l.CPUShares = 0
	}
	if names := limitNames(l); len(g) == 0 && len(names) > 0 {
		return noCgroups(names)
	}
	for _, controller := range []string{"cpu", "memory", "pids"} {
		d, found := g.with(controller)
		todo, err := settings(l, controller, d.v2)
		if err != nil {
			return err
		}
		for _, s := range todo {
			if !found {
				return sdk.Errorf(sdk.Unsupported, "limit "+s.limit, "this kernel has no usable %s controller", controller).
					WithHint("enable it (cgroup_enable=" + controller + " on the kernel's command line) or drop the limit")
			}
			err := os.WriteFile(filepath.Join(d.path, s.file), []byte(s.value), 0)
			switch {
			case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
				return sdk.Errorf(sdk.Unsupported, "limit "+s.limit, "%w", err)
			case err != nil:
				return sdk.Errorf(sdk.Invalid, "limit "+s.limit, "write %s: %w", s.value, err)
			}
		}
	}
	return nil
}

func noCgroups(names []string) error {
	return sdk.Errorf(sdk.Unsupported, "limit "+strings.Join(names, ", "), "no cgroup can be made: that takes root and a writable /sys/fs/cgroup").
		WithHint("run the agent as root or drop the limits")
}

// limitNames lists the limits that are asked for.
func limitNames(l sdk.Limits) []string {
	var names []string
	for _, n := range []struct {
		set  bool
		name string
	}{
		{l.CPUShares > 0, "cpu shares"}, {l.CPUQuota > 0, "cpu quota"}, {l.MemoryBytes > 0, "memory"},
		{l.MemoryReservation > 0, "memory reservation"}, {l.MemorySwap != nil, "memory swap"},
		{l.Swappiness != nil, "swappiness"}, {l.Pids > 0, "pids"},
	} {
		if n.set {
			names = append(names, n.name)
		}
	}
	return names
}

// joins are the cgroup.procs files a process writes itself into.
func (g cgroup) joins() []string {
	var files []string
	for _, d := range g {
		files = append(files, filepath.Join(d.path, "cgroup.procs"))
	}
	return files
}

// oomFile counts OOM kills of the group; "" when nothing does.
func (g cgroup) oomFile() string {
	d, ok := g.with("memory")
	switch {
	case !ok:
		return ""
	case d.v2:
		return filepath.Join(d.path, "memory.events")
	}
	return filepath.Join(d.path, "memory.oom_control")
}

// kill ends every process of the group, its own subgroups included, and says
// whether there was one.
func (g cgroup) kill() (any bool) {
	if len(g) == 0 {
		return false
	}
	_ = filepath.WalkDir(g[0].path, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		for _, pid := range record.CgroupPIDs(path) {
			any = syscall.Kill(pid, syscall.SIGKILL) == nil || any
		}
		return nil
	})
	return any
}

// remove deletes the group and its subgroups. Dying processes keep it busy for
// a moment.
func (g cgroup) remove() error {
	var last error
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		last = nil
		for _, d := range g {
			if err := removeTree(d.path); err != nil {
				last = err
			}
		}
		if last == nil || time.Now().After(deadline) {
			return last
		}
	}
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := syscall.Rmdir(dir); err != nil && err != syscall.ENOENT {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}
