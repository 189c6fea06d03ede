package idle

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestReadOnly(t *testing.T) {
	const maps = `00400000-00aa3000 r-xp 00000000 fe:00 100                      /opt/be lay
00aa3000-01238000 r--p 006a3000 fe:00 100                      /opt/be lay
01238000-012a8000 rw-p 00e38000 fe:00 100                      /opt/be lay
012a8000-032ee000 r--p 00000000 00:00 0
7f42-7f43 r--s 00000000 fe:00 100                      /opt/be lay
7f43-7f44 r--p 00000000 fe:00 101                      /lib/x86_64-linux-gnu/libc.so.6
7f45-7f44 r--p 00000000 fe:00 100                      /opt/be lay
no-sense r--p 00000000 fe:00 100                      /opt/be lay
7f4250fa0000-7f4250fa1000 r-xp 00000000 00:00 0                [vdso]

`
	want := []mapping{{0x400000, 0xaa3000}, {0xaa3000, 0x1238000}}
	if d := cmp.Diff(want, readOnly([]byte(maps), "/opt/be lay"), cmp.AllowUnexported(mapping{})); d != "" {
		t.Error(d)
	}
}

// A private page, such as one a relocation wrote to, keeps its mapping.
func TestScan(t *testing.T) {
	page := os.Getpagesize()
	f := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(f, make([]byte, 600*page), 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(f, unix.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	b, err := unix.Mmap(fd, 0, 600*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	pagemap, err := unix.Open("/proc/self/pagemap", unix.O_RDONLY, 0)
	if err != nil {
		t.Skipf("this kernel does not tell what is mapped: %v", err)
	}
	defer unix.Close(pagemap)
	start := uintptr(unsafe.Pointer(&b[0]))
	m, buf := mapping{start, start + uintptr(len(b))}, make([]byte, 96)
	sum := byte(0)
	for i := 0; i < len(b); i += page {
		sum += b[i]
	}
	if mapped, private := scan(pagemap, m, buf); mapped != len(b) || private {
		t.Errorf("only read (%d): %d bytes of %d mapped, private %t", sum, mapped, len(b), private)
	}
	b[599*page] = 1
	if _, private := scan(pagemap, m, buf); !private {
		t.Error("the last page was written to, which is not seen")
	}
	if _, private := scan(-1, m, buf); !private {
		t.Error("unreadable, and said to hold nothing private")
	}
}

func TestLook(t *testing.T) {
	const ms = time.Millisecond
	type step struct {
		after  time.Duration // since the step before
		faults int64         // in that time
		cpu    time.Duration // in that time
		due    bool
		again  time.Duration
	}
	for name, steps := range map[string][]step{
		"start-up over":       {{interval, 2000, 90 * ms, false, interval}, {interval, 3, ms, true, interval}, {interval, 0, ms, false, interval}},
		"work now and then":   {{interval, 100, ms, true, interval}, {10 * time.Second, 100, ms, true, interval}},
		"always busy":         {{interval, 100, busy + 1, false, interval}, {interval, 100, busy + 1, false, interval}},
		"nothing new":         {{interval, 100, ms, true, interval}, {interval, 0, ms, false, interval}},
		"no twice in a row":   {{interval, 100, ms, true, interval}, {settle, 100, ms, false, rest - settle}, {rest - settle, 0, 0, true, interval}},
		"usage is not to get": {{interval, 0, 0, false, interval}},
	} {
		t.Run(name, func(t *testing.T) {
			w, at, now := watch{}, time.Unix(1000, 0), usage{}
			for i, s := range steps {
				at, now = at.Add(s.after), usage{now.faults + s.faults, now.cpu + s.cpu}
				again, due := w.look(at, now)
				if again != s.again || due != s.due {
					t.Fatalf("step %d: due %t, again in %v", i, due, again)
				}
				if due {
					w.gave(at, now)
				}
			}
		})
	}
}

var written = [4096]byte{1} // in the executable's writable data

func TestTrim(t *testing.T) {
	if use().faults == 0 || use().cpu == 0 {
		t.Error("no faults or no time counted")
	}
	written[0] = 2
	before := mapped(t)
	Trim()
	after := mapped(t)
	if after >= before*3/4 {
		t.Errorf("code and tables mapped: %d KiB before, %d after", before, after)
	}
	if written[0] != 2 {
		t.Error("written data was lost")
	}
}

// mapped is what of the executable's read-only mappings is mapped, in KiB.
func mapped(t *testing.T) (kib int) {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Skipf("this kernel does not tell what is mapped: %v", err)
	}
	re := regexp.MustCompile(`(?m)^[0-9a-f]+-[0-9a-f]+ r-[x-]p .* ` + regexp.QuoteMeta(exe) + `\n(?:[A-Z].*\n)*?Rss: +(\d+) kB`)
	for _, m := range re.FindAllStringSubmatch(string(smaps), -1) {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		kib += n
	}
	if kib == 0 {
		t.Fatal("nothing of the executable is mapped")
	}
	return kib
}

func BenchmarkTrim(b *testing.B) {
	t := newTrimmer()
	for b.Loop() {
		t.trim()
	}
}
