package host

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	sdkhost "github.com/belay-edge/belay/plugins/sdk/host"
)

// What a plugin may use when its configuration does not say.
const (
	runtimeMemory = 256 << 20
	deviceMemory  = 64 << 20
	anyCPU        = 100 // percent of one CPU
)

// cpuPeriod is the wall time, in microseconds, a CPU quota is given for.
const cpuPeriod = 100_000

// limitsFor a plugin of these kinds; nil kinds are not known yet. 0 is none.
func limitsFor(s Settings, kinds []sdk.Kind) (memory uint64, cpu int) {
	memory, cpu = runtimeMemory, anyCPU
	if len(kinds) > 0 && !slices.Contains(kinds, sdk.KindRuntime) {
		memory = deviceMemory
	}
	if s.MemoryMax != nil {
		memory = *s.MemoryMax
	}
	if s.CPUMax != nil {
		cpu = *s.CPUMax
	}
	return memory, cpu
}

// maxTasks is how many processes and threads a plugin may have.
const maxTasks = 1024

// controller is where one resource of one plugin is limited; the zero value is
// nowhere.
type controller struct {
	dir string
	v2  bool
}

// group limits the processes of one plugin: cgroups of the agent's own or,
// where systemd has them, systemd's. What a runtime plugin starts for a task
// moves into groups of its own and is not counted here.
type group struct {
	memory, cpu, pids controller // with units: in the slice, known once something is in it
	units             *units     // nil: without systemd
	slice             controller // where systemd keeps the processes; known once something is in it
	lacks             []string   // what cannot be limited, and why
	joined            error      // of the last process
	unheeded          []string   // limits that systemd took and does not apply
}

// limited is what groups are made for.
func (g *group) limited() []namedController {
	return []namedController{{"memory", &g.memory}, {"cpu", &g.cpu}, {"pids", &g.pids}}
}

type namedController struct {
	name string
	at   *controller
}

// openGroup makes the cgroup of a plugin, version 1 or 2, below parent, or has
// systemd make it.
func openGroup(parent, name string) *group {
	_, err := os.Stat("/run/systemd/system")
	return makeGroup(parent, name, err == nil)
}

func makeGroup(parent, name string, systemd bool) *group {
	g := &group{}
	lack := func(why string) *group {
		g.lacks = []string{"memory and cpu limits: " + why}
		return g
	}
	if os.Geteuid() != 0 {
		return lack("they take root")
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return lack(err.Error())
	}
	if systemd {
		g.units = newUnits(parent, name)
	}
	for _, c := range g.limited() {
		at, ok := findController(string(mounts), c.name)
		if !ok {
			g.lacks = append(g.lacks, c.name+" limit: this kernel has no usable "+c.name+" controller")
			continue
		}
		if g.units != nil {
			continue
		}
		if err := at.descend(filepath.Join(parent, name), c.name); err != nil {
			g.lacks = append(g.lacks, c.name+" limit: "+err.Error())
			continue
		}
		*c.at = at
	}
	return g
}

// findController finds the mount of a cgroup controller in a mountinfo file.
func findController(mountinfo, name string) (controller, bool) {
	for _, m := range cgroupMounts(mountinfo) {
		if slices.Contains(m.controllers, name) {
			return controller{m.mount, false}, true
		}
		b, _ := os.ReadFile(filepath.Join(m.mount, "cgroup.controllers")) // version 2
		if slices.Contains(m.controllers, "") && slices.Contains(strings.Fields(string(b)), name) {
			return controller{m.mount, true}, true
		}
	}
	return controller{}, false
}

// descend makes the directories of path and goes there.
func (c *controller) descend(path, name string) error {
	for part := range strings.SplitSeq(path, "/") {
		if c.v2 {
			if err := os.WriteFile(filepath.Join(c.dir, "cgroup.subtree_control"), []byte("+"+name), 0); err != nil {
				return fmt.Errorf("hand the controller down: %w", err)
			}
		}
		c.dir = filepath.Join(c.dir, part)
		if err := os.Mkdir(c.dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	return nil
}

func (c controller) write(file, value string) error {
	return os.WriteFile(filepath.Join(c.dir, file), []byte(value), 0)
}

// limit sets the limits, of running processes too.
func (g *group) limit(memory uint64, cpu int) error {
	if g.units != nil {
		return g.units.limit(memory, cpu)
	}
	var all []error
	if c := g.memory; c.dir != "" && c.v2 {
		value := "max"
		if memory > 0 {
			value = strconv.FormatUint(memory, 10)
		}
		all = append(all, c.write("memory.max", value))
		_ = c.write("memory.swap.max", map[bool]string{true: "0", false: "max"}[memory > 0]) // without swap there is no such file
	} else if c.dir != "" {
		value := "-1"
		if memory > 0 {
			value = strconv.FormatUint(memory, 10)
		}
		_ = c.write("memory.memsw.limit_in_bytes", "-1") // with swap accounting it may not be the lower of the two
		all = append(all, c.write("memory.limit_in_bytes", value))
		_ = c.write("memory.memsw.limit_in_bytes", value)
	}
	if c := g.cpu; c.dir != "" && c.v2 {
		value := "max"
		if cpu > 0 {
			value = strconv.Itoa(cpu * cpuPeriod / 100)
		}
		all = append(all, c.write("cpu.max", fmt.Sprint(value, " ", cpuPeriod)))
	} else if c.dir != "" {
		value := "-1"
		if cpu > 0 {
			value = strconv.Itoa(cpu * cpuPeriod / 100)
		}
		all = append(all, c.write("cpu.cfs_period_us", strconv.Itoa(cpuPeriod)), c.write("cpu.cfs_quota_us", value))
	}
	if c := g.pids; c.dir != "" {
		all = append(all, c.write("pids.max", strconv.Itoa(maxTasks)))
	}
	return errors.Join(all...)
}

// join puts a process into the group.
func (g *group) join(pid int) error {
	if g.units == nil {
		var all []error
		for _, c := range g.limited() {
			if c.at.dir != "" {
				all = append(all, c.at.write("cgroup.procs", strconv.Itoa(pid)))
			}
		}
		g.joined = errors.Join(all...)
		return g.joined
	}
	var paths map[string]string
	if paths, g.joined = g.units.join(pid, "memory", "cpu", "pids"); g.joined != nil {
		return g.joined
	}
	return g.place(paths)
}

// place notes where systemd keeps the processes, and what it does not limit.
func (g *group) place(paths map[string]string) error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	g.unheeded, g.slice = nil, controller{}
	for _, m := range cgroupMounts(string(mounts)) {
		for _, c := range m.controllers {
			if c == "" && paths[c] != "" || c == "name=systemd" && paths[c] != "" {
				g.slice = controller{filepath.Join(m.mount, paths[c]), c == ""}
			}
		}
	}
	for _, c := range g.limited() {
		*c.at = controller{}
		at, ok := findController(string(mounts), c.name)
		path := paths[c.name]
		if at.v2 {
			path = paths[""]
		}
		switch {
		case !ok: // known from the start
		case path == "":
			g.unheeded = append(g.unheeded, c.name+" limit: systemd has set it and does not apply it: it has no "+c.name+" controller to itself")
		default:
			*c.at = controller{filepath.Join(at.dir, path), at.v2}
		}
	}
	return err
}

// kills counts the processes that the kernel killed for the memory limit.
// sure: it is no more than how often the limit was met, which a process may
// survive.
func (g *group) kills() (n uint64, sure bool) {
	if g.memory.dir == "" {
		return 0, false
	}
	// A slice's counts are those of all that is in it, but for version 1.
	if g.memory.v2 || g.units == nil {
		file := "memory.oom_control"
		if g.memory.v2 {
			file = "memory.events"
		}
		b, _ := os.ReadFile(filepath.Join(g.memory.dir, file))
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == "oom_kill" {
				n, _ = strconv.ParseUint(f[1], 10, 64)
				return n, true
			}
		}
	}
	b, _ := os.ReadFile(filepath.Join(g.memory.dir, "memory.failcnt")) // before Linux 4.13 there is no better one
	n, _ = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return n, false
}

// remove deletes the group unless something is left in it, and then the one
// it is in unless other plugins are.
func (g *group) remove() {
	if g.units != nil {
		if g.slice.dir != "" && len(g.processes()) == 0 { // stopping it would kill them
			_ = g.units.stop()
		}
		return
	}
	for _, c := range g.limited() {
		if c.at.dir == "" {
			continue
		}
		// A process that has just been reaped may keep it busy for a moment.
		for try := 0; syscall.Rmdir(c.at.dir) == syscall.EBUSY && try < 20; try++ {
			time.Sleep(5 * time.Millisecond)
		}
		_ = syscall.Rmdir(filepath.Dir(c.at.dir))
	}
}

// fence makes the plugin's group with the limits of these settings; nil
// without limits.
func (p *plugin) fence(s Settings) *group {
	if p.host.config.LimitGroup == "" {
		return nil
	}
	if p.group == nil || p.group.units == nil && (p.group.memory.dir == "" || p.group.cpu.dir == "") {
		p.group = openGroup(p.host.config.LimitGroup, p.name)
	}
	// A slice keeps its limits, and systemd takes its time to answer.
	if _, err := os.Stat(p.group.slice.dir); p.group.units == nil || err != nil {
		p.limits = nil
	}
	p.lacks = nil
	p.relimit(s, p.status().Kinds)
	p.killed, _ = p.group.kills()
	return p.group
}

// limits are those in force; failed is why some are not.
type limits struct {
	memory uint64
	cpu    int
	failed error
}

// relimit sets the limits for what the plugin has turned out to be.
func (p *plugin) relimit(s Settings, kinds []sdk.Kind) {
	if p.group == nil {
		p.update(func(st *Status) { st.Missing = p.lacks })
		return
	}
	memory, cpu := limitsFor(s, kinds)
	if p.limits == nil || p.limits.failed != nil || p.limits.memory != memory || p.limits.cpu != cpu {
		p.limits = &limits{memory, cpu, p.group.limit(memory, cpu)}
	}
	lacks := slices.Concat(p.group.lacks, p.group.unheeded)
	if err := errors.Join(p.limits.failed, p.group.joined); err != nil {
		lacks = append(lacks, "limits: "+err.Error())
	}
	lacks = append(lacks, p.lacks...)
	p.update(func(st *Status) { st.MemoryMax, st.CPUMax, st.Missing = memory, cpu, lacks })
}

// limitAgain repeats what systemd had no time for when the process was
// launched, as in the rush of a boot.
func (p *plugin) limitAgain(process *sdkhost.Plugin) {
	if p.group == nil {
		return
	}
	switch before := len(p.group.unheeded); {
	case p.group.joined != nil || p.limits != nil && p.limits.failed != nil:
		_ = p.group.join(process.PID()) // the status says why not
	case before == 0:
		return
	default:
		// It may have moved the process in some hierarchies of version 1 since.
		paths, err := p.group.units.now(process.PID())
		if err != nil || p.group.place(paths) != nil || len(p.group.unheeded) == before {
			return
		}
	}
	p.killed, _ = p.group.kills()
	p.relimit(p.files.running, process.Info().Kinds)
	if p.group.joined == nil && p.limits.failed == nil {
		p.host.log.Info("the plugin's limits hold now", "plugin", p.name)
	}
}

// explainKill tells a process that the kernel killed for its memory limit from
// others that ended.
func (p *plugin) explainKill(err error) error {
	if err == nil || p.group == nil {
		return err
	}
	kills, sure := p.group.kills()
	if kills == p.killed || !sure && !strings.Contains(err.Error(), "(SIGKILL)") {
		return err
	}
	return sdk.Errorf(sdk.Unavailable, "run plugin "+p.name, "killed: out of memory (limit %d MiB): %v", p.status().MemoryMax>>20, err).
		WithHint("raise memory_max in the table [belay] of its configuration if it needs more")
}

// memoryOf is what a process takes of the device's memory, its share of what
// it has in common with others; 0: not known.
func memoryOf(pid int) uint64 {
	if pid == 0 {
		return 0
	}
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "Pss:" {
			n, _ := strconv.ParseUint(f[1], 10, 64)
			return n << 10
		}
	}
	return 0
}
