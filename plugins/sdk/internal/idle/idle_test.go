package idle

import (
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestUnwritten(t *testing.T) {
	const smaps = `00400000-00aa3000 r-xp 00000000 fe:00 100                      /opt/be lay
Rss:                6668 kB
Anonymous:             0 kB
00aa3000-01238000 r--p 006a3000 fe:00 100                      /opt/be lay
Anonymous:             4 kB
01238000-012a8000 rw-p 00e38000 fe:00 100                      /opt/be lay
Anonymous:             0 kB
012a8000-032ee000 r--p 00000000 00:00 0
Anonymous:             0 kB
7f42-7f43 r--s 00000000 fe:00 100                      /opt/be lay
Anonymous:             0 kB
7f43-7f44 r--p 00000000 fe:00 101                      /lib/x86_64-linux-gnu/libc.so.6
Anonymous:             0 kB
50f97000-50f99000 r--p 00000000 fe:00 100                      /opt/be lay
AnonHugePages:         0 kB
Anonymous:             0 kB
7f4250fa0000-7f4250fa1000 r-xp 00000000 00:00 0                [vdso]
Anonymous:             0 kB
`
	want := []mapping{{0x400000, 0xaa3000}, {0x50f97000, 0x50f99000}}
	got := unwritten(strings.NewReader(smaps), "/opt/be lay")
	if d := cmp.Diff(want, got, cmp.AllowUnexported(mapping{})); d != "" {
		t.Error(d)
	}
	if got := unwritten(strings.NewReader("no\nsuch-file r-xp\n\nAnonymous: 0 kB\n"), "/opt/belay"); got != nil {
		t.Errorf("of nonsense: %v", got)
	}
}

func TestDue(t *testing.T) {
	// Each step is looks that see so many more faults each.
	type step struct {
		looks  int
		faults int64
	}
	for name, c := range map[string]struct {
		steps []step
		want  []int // the looks at which memory is given back
	}{
		"start-up over":   {[]step{{1, 2000}, {1, 3}}, []int{1}},
		"still starting":  {[]step{{4, 200}, {1, 0}}, []int{4}},
		"all in use":      {[]step{{1, 2000}, {1, 0}, {1, 20}, {200, 0}}, []int{1}},
		"comes back":      {[]step{{1, 400}, {1, 0}, {300, 8}}, []int{1, 8, 21, 46, 95, 192}},
		"at once, always": {[]step{{1, 400}, {1, 0}, {1, 400}, {6, 0}, {1, 400}, {12, 0}, {1, 400}, {30, 0}}, []int{1, 8, 21, 46}},
		"a burst later":   {[]step{{1, 2000}, {1, 0}, {40, 5}, {1, 900}, {20, 0}}, []int{1, 8, 21, 46}},
		"never quiet":     {[]step{{100, 17}}, nil},
		"nothing to give": {[]step{{1, 31}, {10, 0}}, nil},
		"not readable":    {[]step{{10, 0}}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			w, look, now := watch{pause: pause}, 0, int64(0)
			var got []int
			for _, s := range c.steps {
				for range s.looks {
					now += s.faults
					if w.due(now) {
						got = append(got, look)
					}
					look++
				}
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

var written = [4096]byte{1} // in the executable's writable data

func TestTrim(t *testing.T) {
	if faults() == 0 {
		t.Error("no faults counted")
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
