// Package idle gives back the memory that starting, or a burst of work, left
// with a process that has gone quiet.
//
// Two kinds go. The heap's free pages return to the kernel at once, which the
// runtime would do by and by. And the pages of the executable are unmapped:
// the kernel maps 64 KiB around every page a process touches, so a process
// that ran its start-up once has all of its code and tables mapped for ever,
// and is charged for it. Unmapping frees nothing by itself; the pages stay in
// the page cache as long as the kernel has room, and now leave first where it
// has not. What is used again is mapped again by a minor fault of about a
// microsecond for 64 KiB, or is read from disk if it did leave. So what the
// process is charged with from then on is what it uses when idle.
//
// Only read-only mappings of the executable without a private page are
// unmapped: dropping a private page would lose what was written to it, by a
// dynamic linker's relocation or a debugger's breakpoint. Every failure means
// that a mapping stays as it is, which is always right.
package idle

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A page mapped is a fault counted, so faults say both that a process is busy
// in a new way and what there may be to give back. What it does now and then
// comes back each time, so the pauses between one time and the next grow until
// there is a burst of something else.
const (
	interval = 5 * time.Second
	quiet    = 16  // faults in an interval: nothing new is happening
	worth    = 32  // faults since last time, up to 64 KiB each: 2 MiB
	burst    = 100 // faults in an interval: not idling
	pause    = 6   // intervals from one time to the next, doubled up to
	maxPause = 120
)

// Run gives memory back each time the process has gone quiet, until ctx ends.
func Run(ctx context.Context) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	w := watch{pause: pause}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if w.due(faults()) {
				Trim()
			}
		}
	}
}

// watch decides when memory is given back.
type watch struct {
	last, base  int64 // faults at the last look, and when memory was given back last
	wait, pause int   // looks to let pass now, and after the next time
}

func (w *watch) due(now int64) bool {
	since, cameBack := now-w.last, w.last == w.base
	w.last = now
	if since >= burst && !cameBack {
		w.wait, w.pause = min(w.wait, pause), pause
	}
	if w.wait > 0 {
		w.wait--
		return false
	}
	if since > quiet || now-w.base < worth {
		return false
	}
	w.base, w.wait, w.pause = now, w.pause, min(w.pause*2, maxPause)
	return true
}

func faults() int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return int64(u.Minflt) + int64(u.Majflt)
}

// collect is a heap worth collecting: the collector's own tables cost as much
// as it finds in one that is smaller, as a plugin's is after start-up.
const collect = 5 << 20

// heap is what the heap holds of the machine's memory, used or not, in bytes.
func heap() (sum uint64) {
	s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/unused:bytes"}, {Name: "/memory/classes/heap/free:bytes"}}
	metrics.Read(s)
	for _, m := range s {
		if m.Value.Kind() == metrics.KindUint64 {
			sum += m.Value.Uint64()
		}
	}
	return sum
}

// Trim gives back what can be, now.
func Trim() {
	if heap() > collect {
		runtime.GC() // what pools kept goes at the second collection
		debug.FreeOSMemory()
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return
	}
	defer f.Close()
	for _, m := range unwritten(f, exe) {
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED)
	}
}

type mapping struct{ start, end uintptr }

// unwritten lists the mappings of file that cannot be written and hold
// nothing but what is in the file.
func unwritten(smaps io.Reader, file string) (list []mapping) {
	var m mapping
	candidate := false
	for s := bufio.NewScanner(smaps); s.Scan(); {
		line := s.Text()
		var perms, offset, dev, inode string
		var next mapping
		if n, _ := fmt.Sscanf(line, "%x-%x %s %s %s %s", &next.start, &next.end, &perms, &offset, &dev, &inode); n == 6 {
			m, candidate = next, (perms == "r-xp" || perms == "r--p") && strings.HasSuffix(line, " "+file)
			continue
		}
		if kib, ok := strings.CutPrefix(line, "Anonymous:"); ok && candidate && strings.TrimSpace(kib) == "0 kB" {
			list = append(list, m)
		}
	}
	return list
}
