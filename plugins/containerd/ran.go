package containerd

import (
	"os"
	"strconv"
	"strings"
	"time"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"golang.org/x/sys/unix"
)

// bootTime is how long ago the device booted: a clock that nobody sets.
func bootTime() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// ran is how long a container ran that has exited; 0: not known. Its start is
// that of its mark, in both clocks; of its end the shim told the wall clock.
func (r *Runtime) ran(id string, proc *tasktypes.Process) time.Duration {
	mark, err := os.Stat(r.file(id, "started"))
	if err != nil || proc.GetExitedAt() == nil {
		return 0
	}
	text, err := os.ReadFile(r.file(id, "started"))
	if err != nil {
		return 0
	}
	begun, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return 0 // of an earlier version: it noted no time
	}
	return runTime(mark.ModTime(), proc.GetExitedAt().AsTime(), time.Now(), bootTime()-time.Duration(begun))
}

// clockDrift is how far a wall clock may be from boot time without having been
// set: a time service moves it, too, but by little.
const clockDrift = time.Second

// runTime is how long something ran, of which the wall clock's start and end
// are known, and how long ago it really started. A clock that was set since then
// was so before the end or after it: of what can be, the least counts, for a
// container that runs long enough is not made to wait before the next start.
func runTime(started, exited, now time.Time, ago time.Duration) time.Duration {
	set := now.Sub(started) - ago
	least := time.Duration(0)
	can := []time.Duration{exited.Sub(started)}
	if set.Abs() > clockDrift {
		can = append(can, can[0]-set)
	}
	for _, d := range can {
		if d > 0 && d <= ago+clockDrift && (least == 0 || d < least) {
			least = d
		}
	}
	return least
}
