package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// units is a plugin's part of systemd's tree: a slice with its limits, which
// stays, and in it a scope for each of its processes. The slice also remembers
// that memory ran out when the scope is gone with its process.
//
// systemd is asked through busctl, which comes with it: a connection to the
// bus would cost the agent memory for good, for a few questions a day.
type units struct {
	slice string // "belay-plugins-nvidia.slice"
	scope string // what names of scopes begin with
	// partial: systemd does not use all that is wanted, as in some containers.
	partial bool
	ask     func(ctx context.Context, method, signature string, args ...string) error
}

// unitPatience bounds a question to systemd, and how long a process may take
// to be in its scope.
const unitPatience = 8 * time.Second

func newUnits(parent, name string) *units {
	var parts []string
	for part := range strings.SplitSeq(parent, "/") {
		parts = append(parts, escape(part))
	}
	return &units{
		slice: strings.Join(append(parts, escape(name)), "-") + ".slice",
		scope: strings.ReplaceAll(parent, "/", "-") + "-" + name + "-",
		ask:   askSystemd,
	}
}

// escape makes a word one level of a slice's name, in which dashes separate
// levels.
func escape(s string) string { return strings.ReplaceAll(s, "-", `\x2d`) }

// unlimited is how systemd calls no limit.
const unlimited = "18446744073709551615"

// properties are a's(sv)': the count, then name, signature and value of each.
func properties(memory uint64, cpu int) []string {
	max, swap, quota := unlimited, unlimited, unlimited
	if memory > 0 {
		max, swap = strconv.FormatUint(memory, 10), "0"
	}
	if cpu > 0 {
		quota = strconv.Itoa(cpu * 10_000) // microseconds a second
	}
	return []string{"7",
		"MemoryAccounting", "b", "true", "CPUAccounting", "b", "true", "TasksAccounting", "b", "true",
		"MemoryMax", "t", max, "MemorySwapMax", "t", swap, "CPUQuotaPerSecUSec", "t", quota, "TasksMax", "t", strconv.Itoa(maxTasks)}
}

// limit makes the slice, or gives the one that is there other limits.
func (u *units) limit(memory uint64, cpu int) error {
	ctx, cancel := context.WithTimeout(context.Background(), unitPatience)
	defer cancel()
	p := properties(memory, cpu)
	args := append([]string{u.slice, "fail"}, p...)
	first := u.ask(ctx, "StartTransientUnit", "ssa(sv)a(sa(sv))", append(args, "0")...)
	if first == nil || ctx.Err() != nil {
		return first
	}
	// There is one, of before or of an agent before.
	if err := u.ask(ctx, "SetUnitProperties", "sba(sv)", append([]string{u.slice, "true"}, p...)...); err != nil {
		return errors.Join(first, err)
	}
	return nil
}

// join puts a process into a scope of the slice and returns the slice's path
// below each mount of cgroups, by controller: "" for version 2. On version 1
// it may be missing for a wanted one, which then has no effect.
func (u *units) join(pid int, want ...string) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), unitPatience)
	defer cancel()
	scope := u.scope + strconv.Itoa(pid) + ".scope"
	if err := u.ask(ctx, "StartTransientUnit", "ssa(sv)a(sa(sv))", scope, "fail",
		"4", "PIDs", "au", "1", strconv.Itoa(pid), "Slice", "s", u.slice,
		"Description", "s", "Belay plugin, process "+strconv.Itoa(pid),
		// One that ended badly is not kept for people to look at: the agent
		// tells them.
		"CollectMode", "s", "inactive-or-failed", "0"); err != nil && !errors.Is(err, errUnitExists) {
		return nil, err
	}
	// The answer comes before the process has moved, and of version 1's
	// hierarchies systemd's own is the first.
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	var tracked time.Time
	for {
		groups, err := groupsOf(pid)
		if err != nil {
			return nil, err // it has ended
		}
		paths := u.find(groups, scope)
		_, v1 := groups["name=systemd"]
		switch {
		case !v1 && paths[""] != "":
			return paths, nil
		case v1 && paths["name=systemd"] != "" && tracked.IsZero():
			tracked = time.Now()
		}
		if !tracked.IsZero() {
			whole := !slices.ContainsFunc(want, func(c string) bool { return groups[c] != "" && paths[c] == "" })
			if whole || u.partial || time.Since(tracked) > time.Second {
				u.partial = !whole
				return paths, nil
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("systemd has not put process %d into %s within %s", pid, scope, unitPatience)
		case <-tick.C:
		}
	}
}

// now is where a process of the slice is at this moment.
func (u *units) now(pid int) (map[string]string, error) {
	groups, err := groupsOf(pid)
	if err != nil {
		return nil, err
	}
	return u.find(groups, u.scope+strconv.Itoa(pid)+".scope"), nil
}

// find says where the slice is in each hierarchy, for a process in the scope.
// In one that nothing is asked of for the scope itself, version 1 has the
// process in the slice.
func (u *units) find(groups map[string]string, scope string) map[string]string {
	paths := map[string]string{}
	for controller, path := range groups {
		if path = strings.TrimSuffix(path, "/"+scope); strings.HasSuffix(path, "/"+u.slice) {
			paths[controller] = path
		}
	}
	return paths
}

// stop forgets the slice; nothing may be in it.
func (u *units) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), unitPatience)
	defer cancel()
	return u.ask(ctx, "StopUnit", "ss", u.slice, "replace")
}

// errUnitExists: an earlier question, whose answer was not waited for, made it.
var errUnitExists = errors.New("there is such a unit")

// askSystemd calls a method of systemd's manager.
func askSystemd(ctx context.Context, method, signature string, args ...string) error {
	const bus = "org.freedesktop.systemd1"
	c := exec.CommandContext(ctx, "busctl", append([]string{"--system", "--quiet", "call", bus, "/org/freedesktop/systemd1", bus + ".Manager", method, signature}, args...)...)
	c.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
	out, err := c.CombinedOutput()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return errors.New("there is no busctl to ask systemd with: it comes with systemd")
	case ctx.Err() != nil:
		return fmt.Errorf("systemd does not answer: %w", ctx.Err())
	case err != nil && strings.Contains(string(out), "already"):
		return fmt.Errorf("%w: %s", errUnitExists, strings.TrimSpace(string(out)))
	case err != nil:
		return fmt.Errorf("ask systemd to %s %s: %w: %s", method, args[0], err, strings.TrimSpace(string(out)))
	}
	return nil
}

// groupsOf reads which cgroup a process is in, by controller: "" is version 2.
func groupsOf(pid int) (map[string]string, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
	if err != nil {
		return nil, err
	}
	groups := map[string]string{}
	for line := range strings.Lines(string(b)) { // number:controllers:path
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) < 3 {
			continue
		}
		for c := range strings.SplitSeq(f[1], ",") {
			groups[c] = f[2]
		}
	}
	return groups, nil
}
