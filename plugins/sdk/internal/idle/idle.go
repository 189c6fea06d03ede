// Package idle gives back the memory that starting, or a burst of work, left
// with a process that has gone quiet.
//
// Two kinds go. Garbage is collected and the heap's free pages return to the
// kernel, which the runtime would do by and by. And the pages of the executable
// are unmapped: the kernel maps 64 KiB around every page a process touches, so
// a process that ran its start-up once has all of its code and tables mapped
// for ever, and is charged for it. Unmapping frees nothing by itself; the pages
// stay in the page cache as long as the kernel has room, and now leave first
// where it has not. What is used again is mapped again by a minor fault of
// about a microsecond for 64 KiB, or is read from disk if it did leave. So what
// the process is charged with from then on is what it uses when idle.
//
// Only read-only mappings of the executable without a private page are
// unmapped: dropping a private page would lose what was written to it, by a
// dynamic linker's relocation or a debugger's breakpoint. Every failure means
// that a mapping stays as it is, which is always right.
package idle

import (
	"bytes"
	"context"
	"encoding/binary"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Giving back costs about as much as answering a call: it is done soon after
// each piece of work, but not in the middle of much.
const (
	interval = 2 * time.Second        // between looks, with nothing to tell that there was work
	settle   = 200 * time.Millisecond // after work
	rest     = 500 * time.Millisecond // after each time
	busy     = interval / 100         // processor time since the last look: not idling
	worth    = 3 << 19                // bytes of the executable that are mapped
)

var worked = make(chan struct{}, 1)

// Worked says that a piece of work is done: a process that knows gives memory
// back sooner than one that is only looked at now and then.
func Worked() {
	select {
	case worked <- struct{}{}:
	default:
	}
}

// Run gives memory back each time the process has gone quiet, until ctx ends.
// It receives from pulse whenever it waits.
func Run(ctx context.Context, pulse <-chan struct{}) {
	next := time.NewTimer(interval)
	defer next.Stop()
	t, w := newTrimmer(), watch{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-pulse:
			continue
		case <-worked:
			next.Reset(settle)
			continue
		case <-next.C:
		}
		again, due := w.look(time.Now(), use())
		if due {
			t.trim()
			w.gave(time.Now(), use())
		}
		next.Reset(again)
	}
}

// usage is what the process has used of the machine so far.
type usage struct {
	faults int64
	cpu    time.Duration
}

func use() usage {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		return usage{}
	}
	return usage{
		faults: int64(u.Minflt) + int64(u.Majflt),
		cpu:    time.Duration(u.Utime.Nano() + u.Stime.Nano()),
	}
}

// watch decides when memory is given back.
type watch struct {
	last usage     // at the last look
	base int64     // faults when memory was given back last
	at   time.Time // of that
}

// look tells whether to give memory back now, and when to look again. A page
// that was mapped is a fault that was counted: without any, there is nothing.
func (w *watch) look(at time.Time, now usage) (again time.Duration, due bool) {
	spent := now.cpu - w.last.cpu
	w.last = now
	if spent > busy || now.faults == w.base {
		return interval, false
	}
	if resting := rest - at.Sub(w.at); resting > 0 {
		return resting, false
	}
	return interval, true
}

// gave notes that memory was given back; now is after it.
func (w *watch) gave(at time.Time, now usage) { w.last, w.base, w.at = now, now.faults, at }

// collect is how many bytes of new objects are worth a collection.
const collect = 1 << 19

type trimmer struct {
	code      []mapping // read-only, of the executable
	heap      runtime.MemStats
	collected uint64 // bytes ever allocated when garbage was collected last
	pages     []byte
}

func newTrimmer() *trimmer {
	t := &trimmer{pages: make([]byte, 2<<10)}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return t
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return t
	}
	t.code = readOnly(maps, exe)
	return t
}

// Trim gives back what can be, now.
func Trim() { newTrimmer().trim() }

func (t *trimmer) trim() {
	runtime.ReadMemStats(&t.heap) // runtime/metrics would keep more than this
	if t.heap.TotalAlloc-t.collected >= collect {
		t.collected = t.heap.TotalAlloc
		runtime.GC() // what pools kept goes at the second collection: up to 500 KiB
		debug.FreeOSMemory()
	}
	// With bare calls: what runs from here on is mapped again at once.
	pagemap, err := unix.Open("/proc/self/pagemap", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	var clean []mapping
	sum := 0
	for _, m := range t.code {
		if mapped, private := scan(pagemap, m, t.pages); !private {
			clean, sum = append(clean, m), sum+mapped
		}
	}
	if sum >= worth {
		for _, m := range clean {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED)
		}
	}
	_ = unix.Close(pagemap)
}

type mapping struct{ start, end uintptr }

// readOnly lists the mappings of file that cannot be written.
func readOnly(maps []byte, file string) (list []mapping) {
	for line := range bytes.Lines(maps) {
		line = bytes.TrimSuffix(line, []byte("\n"))
		addresses, rest, _ := bytes.Cut(line, []byte(" "))
		if !bytes.HasPrefix(rest, []byte("r-xp ")) && !bytes.HasPrefix(rest, []byte("r--p ")) || !bytes.HasSuffix(line, []byte(" "+file)) {
			continue
		}
		low, high, _ := bytes.Cut(addresses, []byte("-"))
		start, err := strconv.ParseUint(string(low), 16, strconv.IntSize)
		if err != nil {
			continue
		}
		end, err := strconv.ParseUint(string(high), 16, strconv.IntSize)
		if err != nil || end <= start {
			continue
		}
		list = append(list, mapping{uintptr(start), uintptr(end)})
	}
	return list
}

// Bits of an entry of /proc/self/pagemap, see the kernel's
// Documentation/admin-guide/mm/pagemap.rst.
const (
	pagePresent = 1 << 63
	pageSwapped = 1 << 62
	pageOfFile  = 1 << 61
)

// scan tells how many bytes of a mapping of a file are mapped, and whether one
// of its pages is not the file's, or this cannot be found out. buf is for its
// use and holds a multiple of 8 bytes.
func scan(pagemap int, m mapping, buf []byte) (mapped int, private bool) {
	page := uintptr(os.Getpagesize())
	offset, left := uint64(m.start/page)*8, uint64((m.end-m.start)/page)*8
	for left > 0 {
		b := buf[:min(left, uint64(len(buf)))]
		if offset > math.MaxInt64 {
			return 0, true
		}
		n, err := unix.Pread(pagemap, b, int64(offset))
		if n &^= 7; err != nil || n <= 0 {
			return 0, true
		}
		for i := 0; i < n; i += 8 {
			e := binary.NativeEndian.Uint64(b[i:])
			if e&pageSwapped != 0 || e&pagePresent != 0 && e&pageOfFile == 0 {
				return 0, true
			}
			if e&pagePresent != 0 {
				mapped += int(page)
			}
		}
		offset, left = offset+uint64(n), left-uint64(n)
	}
	return mapped, false
}
