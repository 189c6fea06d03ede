package record

import (
	"strconv"
	"strings"
	"syscall"
)

// Process is what /proc says about a process.
type Process struct {
	PID, PPID, PGID, SID int
	State                byte   // 'Z' is dead and waits for its parent
	Start                uint64 // clock ticks since boot
	CPUTicks             uint64 // user and system, waited-for children included
	RSSPages             uint64
}

// Alive says whether the process still executes.
func (p Process) Alive() bool { return p.State != 'Z' && p.State != 'X' }

// ReadProcess reads /proc/PID/stat; syscall.ENOENT or ESRCH: no such process.
func ReadProcess(pid int) (Process, error) {
	b, err := ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return Process{}, err
	}
	p, ok := parseStat(string(b))
	if !ok {
		return Process{}, syscall.ESRCH
	}
	return p, nil
}

// parseStat reads a line of proc_pid_stat(5). The command, in parentheses, may
// hold anything, parentheses and newlines included: the last one ends it.
func parseStat(s string) (p Process, ok bool) {
	open, end := strings.IndexByte(s, '('), strings.LastIndexByte(s, ')')
	if open < 1 || end < open {
		return p, false
	}
	pid, err := strconv.Atoi(strings.TrimSpace(s[:open]))
	f := strings.Fields(s[end+1:]) // f[0] is field 3
	if err != nil || len(f) < 22 {
		return p, false
	}
	num := func(field int) uint64 {
		n, _ := strconv.ParseUint(f[field-3], 10, 64)
		return n
	}
	return Process{
		PID: pid, State: f[0][0], PPID: int(num(4)), PGID: int(num(5)), SID: int(num(6)),
		CPUTicks: num(14) + num(15) + num(16) + num(17),
		Start:    num(22), RSSPages: num(24),
	}, true
}

// Processes lists every process there is.
func Processes() ([]Process, error) {
	fd, err := open("/proc", syscall.O_RDONLY|syscall.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer syscall.Close(fd)
	var all []Process
	buf := make([]byte, 8192)
	for {
		n, err := syscall.ReadDirent(fd, buf)
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return all, nil
		}
		_, _, names := syscall.ParseDirent(buf[:n], -1, nil)
		for _, name := range names {
			pid, err := strconv.Atoi(name)
			if err != nil {
				continue
			}
			if p, err := ReadProcess(pid); err == nil {
				all = append(all, p)
			}
		}
	}
}

// BootID identifies this boot of the kernel; "" when /proc does not say.
func BootID() string {
	b, err := ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// CgroupPIDs lists the processes directly in a cgroup.
func CgroupPIDs(dir string) []int {
	b, err := ReadFile(dir + "/cgroup.procs")
	if err != nil {
		return nil
	}
	var pids []int
	for _, f := range strings.Fields(string(b)) {
		if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// OOMKills reads the oom_kill count of a cgroup's memory.events (v2) or
// memory.oom_control (v1).
func OOMKills(path string) uint64 {
	b, err := ReadFile(path)
	if err != nil {
		return 0
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		if k, v, ok := strings.Cut(line, " "); ok && k == "oom_kill" {
			n, _ := strconv.ParseUint(v, 10, 64)
			return n
		}
	}
	return 0
}
