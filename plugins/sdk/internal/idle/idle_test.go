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
	type look struct {
		faults int64
		want   bool
	}
	const no, yes = false, true
	for name, looks := range map[string][]look{
		"start-up over":    {{2000, no}, {2003, yes}},
		"still starting":   {{2000, no}, {2100, no}, {2500, no}, {2501, yes}},
		"came back in use": {{2000, no}, {2003, yes}, {2103, no}, {2103, no}, {2104, no}, {2105, no}, {2105, no}, {2105, no}, {2105, no}, {2105, no}},
		"drifts up":        {{2000, no}, {2000, yes}, {2100, no}, {2105, no}, {2110, no}, {2115, no}, {2120, no}, {2125, no}, {2130, no}, {2135, yes}},
		"rests":            {{2000, no}, {2000, yes}, {2000, no}, {2900, no}, {2900, no}, {2900, no}, {2900, no}, {2900, no}, {2900, yes}},
		"a burst later":    {{2000, no}, {2000, yes}, {2060, no}, {2060, no}, {2060, no}, {2060, no}, {2060, no}, {2060, no}, {2900, no}, {2900, yes}},
		"nothing to give":  {{30, no}, {31, no}, {31, no}},
		"not readable":     {{0, no}, {0, no}},
	} {
		t.Run(name, func(t *testing.T) {
			var w watch
			for i, l := range looks {
				if got := w.due(l.faults); got != l.want {
					t.Fatalf("look %d, %d faults: due %t, want %t", i, l.faults, got, l.want)
				}
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
