package process

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/belay-edge/belay/plugins/process/internal/record"
	"github.com/belay-edge/belay/plugins/sdk"
)

// tick is the unit of CPU time in /proc: USER_HZ is 100 on every Linux port.
const tick = 10 * time.Millisecond

// Stats measures the attempt's cgroup, or the processes of its session.
func (r *Runtime) Stats(ctx context.Context, id sdk.Attempt) (sdk.Stats, error) {
	op := "measure " + id.String()
	a, o, err := r.find(ctx, op, id)
	if err != nil {
		return sdk.Stats{}, err
	}
	if o.phase != phaseRunning {
		return sdk.Stats{}, sdk.Errorf(sdk.NotFound, op, "it is not running")
	}
	g := r.own.group(a)
	if a.meta.Mode == ModeSystemd {
		g = unitGroup(o.pid, a.meta.Unit)
	}
	s := measureGroup(g)
	if s.CPUNanos > 0 && s.MemoryBytes > 0 && s.Pids > 0 {
		return s, nil
	}
	// No cgroup, or not all of its controllers.
	walked, err := measureSession(o.pid)
	if err != nil {
		return s, sortOut(op, err)
	}
	for _, f := range []struct{ from, to *uint64 }{
		{&walked.CPUNanos, &s.CPUNanos}, {&walked.MemoryBytes, &s.MemoryBytes}, {&walked.Pids, &s.Pids},
	} {
		if *f.to == 0 {
			*f.to = *f.from
		}
	}
	return s, nil
}

func measureGroup(g cgroup) sdk.Stats {
	var s sdk.Stats
	for _, d := range g {
		if d.v2 {
			s.CPUNanos = max(s.CPUNanos, 1000*keyed(d.path, "cpu.stat", "usage_usec"))
		}
		for _, c := range d.controllers {
			switch {
			case c == "cpuacct":
				s.CPUNanos = number(d.path, "cpuacct.usage")
			case c == "memory" && d.v2:
				s.MemoryBytes = sub(number(d.path, "memory.current"), keyed(d.path, "memory.stat", "inactive_file"))
				s.MemoryLimitBytes = number(d.path, "memory.max") // "max" reads as 0
			case c == "memory":
				s.MemoryBytes = sub(number(d.path, "memory.usage_in_bytes"), keyed(d.path, "memory.stat", "total_inactive_file"))
				if l := number(d.path, "memory.limit_in_bytes"); l < 1<<60 {
					s.MemoryLimitBytes = l
				}
			case c == "pids":
				s.Pids = number(d.path, "pids.current")
			}
		}
	}
	return s
}

func sub(a, b uint64) uint64 {
	if b > a {
		return 0
	}
	return a - b
}

func number(dir, file string) uint64 {
	raw, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 64)
	return n
}

func keyed(dir, file, key string) uint64 {
	raw, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(raw)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok && k == key {
			n, _ := strconv.ParseUint(v, 10, 64)
			return n
		}
	}
	return 0
}

// measureSession adds up the program's session and everything descended from
// it. The time of children that nobody waited for yet is missing.
func measureSession(program int) (sdk.Stats, error) {
	all, err := record.Processes()
	if err != nil {
		return sdk.Stats{}, err
	}
	mine := map[int]bool{program: true}
	for grown := true; grown; {
		grown = false
		for _, p := range all {
			if !mine[p.PID] && (p.SID == program || mine[p.PPID]) {
				mine[p.PID], grown = true, true
			}
		}
	}
	var s sdk.Stats
	for _, p := range all {
		if mine[p.PID] {
			s.Pids++
			s.CPUNanos += p.CPUTicks * uint64(tick)
			s.MemoryBytes += p.RSSPages * uint64(os.Getpagesize())
		}
	}
	return s, nil
}

// unitGroup finds the directories systemd made for a unit that pid is in. In
// hierarchies it does not manage, the process is in somebody else's cgroup.
func unitGroup(pid int, unit string) cgroup {
	groups, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return nil
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var g cgroup
	for _, h := range parseMounts(string(mounts)) {
		for line := range strings.Lines(string(groups)) {
			f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
			if len(f) != 3 {
				continue
			}
			in := f[1] == "" && h.v2
			for c := range strings.SplitSeq(f[1], ",") {
				in = in || !h.v2 && slices.Contains(h.controllers, c)
			}
			path := filepath.Join(h.mount, f[2])
			if !in || filepath.Base(path) != unit || !isDir(path) || slices.ContainsFunc(g, func(d cgroupDir) bool { return d.path == path }) {
				continue
			}
			if h.v2 {
				raw, _ := os.ReadFile(filepath.Join(path, "cgroup.controllers"))
				h.controllers = strings.Fields(string(raw))
			}
			g = append(g, cgroupDir{h, path})
		}
	}
	return g
}
