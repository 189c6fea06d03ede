package docker

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
)

// usage reads what a container uses from the cgroups of its first process. The
// daemon's own numbers are not had where a v1 hierarchy that the kernel has is
// not mounted (20.10 with containerd 1.6, measured), and take it a second.
func usage(pid int) (sdk.Stats, error) {
	var s sdk.Stats
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return s, err
	}
	paths := map[string]string{}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 {
			for _, c := range strings.Split(f[1], ",") {
				paths[c] = f[2]
			}
		}
	}
	if unified() {
		dir := filepath.Join(cgroupRoot, paths[""])
		s.CPUNanos = field(dir, "cpu.stat", "usage_usec") * 1000
		s.MemoryBytes = number(dir, "memory.current")
		if cache := field(dir, "memory.stat", "inactive_file"); cache < s.MemoryBytes {
			s.MemoryBytes -= cache
		}
		s.MemoryLimitBytes = number(dir, "memory.max")
		s.Pids = number(dir, "pids.current")
		return s, nil
	}
	mounts := controllers()
	memory := filepath.Join(mounts["memory"], paths["memory"])
	s.CPUNanos = number(filepath.Join(mounts["cpuacct"], paths["cpuacct"]), "cpuacct.usage")
	s.MemoryBytes = number(memory, "memory.usage_in_bytes")
	if cache := field(memory, "memory.stat", "total_inactive_file"); cache < s.MemoryBytes {
		s.MemoryBytes -= cache
	}
	// The kernel says "no limit" as the largest number of pages.
	if limit := number(memory, "memory.limit_in_bytes"); limit < 1<<62 {
		s.MemoryLimitBytes = limit
	}
	s.Pids = number(filepath.Join(mounts["pids"], paths["pids"]), "pids.current")
	return s, nil
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
