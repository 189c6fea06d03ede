package system

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// SmallPages keeps this process and what it starts in small pages, where the
// kernel gives huge ones to everybody: a heap of one or two MiB would otherwise
// be charged up to two more, in the agent and in each plugin. The heap must not
// be there yet, so the program is executed anew, once; it returns where that is
// not needed or not possible. Programs of tasks get huge pages back, from the
// plugins that start them.
func SmallPages() {
	b, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled")
	if err != nil || !strings.Contains(string(b), "[always]") {
		return
	}
	if off, err := unix.PrctlRetInt(unix.PR_GET_THP_DISABLE, 0, 0, 0, 0); err != nil || off != 0 {
		return
	}
	if unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0) == nil {
		_ = unix.Exec("/proc/self/exe", os.Args, os.Environ())
	}
}
