package host

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// endSession kills what a plugin that has ended left running in its session:
// helpers that nobody would end any more. A program the plugin put into a
// session of its own is meant to outlive it and is left alone, and so is
// everything below that one.
func endSession(leader int) {
	for range 20 { // whoever forks while we look is found the next time
		left := sessionOf(leader)
		if len(left) == 0 {
			return
		}
		for _, pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// sessionOf finds the processes of a session whose leader has ended. While
// there are any, the kernel gives the leader's number to nobody else: somebody
// who has it came later, and nothing was left.
func sessionOf(leader int) (pids []int) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + name + "/stat")
		if err != nil {
			continue
		}
		// The name, in parentheses, may hold anything; state, parent, process
		// group and session follow.
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) < 4 || f[3] != strconv.Itoa(leader) {
			continue
		}
		if pid == leader {
			return nil
		}
		if f[0] != "Z" && f[0] != "X" {
			pids = append(pids, pid)
		}
	}
	return pids
}
