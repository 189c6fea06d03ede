package record

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestLaunchRoundTrip(t *testing.T) {
	for name, fields := range map[string][]Field{
		"empty": nil,
		"all kinds of values": {
			{Arg, "/bin/sh"}, {Arg, ""}, {Arg, "a=b\nc"}, {Env, "A=x=y"}, {Dir, "/tmp dir"}, {Arg, "\xff\xfe"}, {end + "x", "1"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := EncodeLaunch(fields)
			got, ok := DecodeLaunch(b)
			if !ok || !cmp.Equal(got, fields) {
				t.Errorf("got %q, %t, want %q", got, ok, fields)
			}
			for n := range b {
				if _, ok := DecodeLaunch(b[:n]); ok {
					t.Errorf("%q, cut to %d bytes, passes for whole", b, n)
				}
			}
		})
	}
}

func TestExitAndStartedRoundTrip(t *testing.T) {
	for _, e := range []Exit{{}, {Code: 255}, {Code: -1, Reason: "nobody saw it"}, {Code: 137, OOM: true, Reason: "a=b"}, {Code: 1, RanFor: 1500}} {
		if got, ok := DecodeExit(e.Encode()); !ok || got != e {
			t.Errorf("got %+v, %t, want %+v", got, ok, e)
		}
	}
	s := Started{PID: 12, Start: 1 << 63, Boot: "b"}
	if got, ok := DecodeStarted(s.Encode()); !ok || got != s {
		t.Errorf("got %+v, %t, want %+v", got, ok, s)
	}
	for _, damaged := range []string{"", "pid=1\nstart=2\n", "pid=x\nstart=2\nboot=b\n", "pid=-1\nstart=2\nboot=b\n", "\x00\x00\x00"} {
		if got, ok := DecodeStarted([]byte(damaged)); ok {
			t.Errorf("%q reads as %+v", damaged, got)
		}
	}
	for _, damaged := range []string{"", "code=\n", "code=1", "oom=1\n", "\x00\x00"} {
		if got, ok := DecodeExit([]byte(damaged)); ok {
			t.Errorf("%q reads as %+v", damaged, got)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(EncodeLaunch([]Field{{Arg, "/bin/true"}, {Env, "A=1"}}))
	f.Add(Exit{Code: 3, Reason: "x"}.Encode())
	f.Add(Started{PID: 1, Start: 2, Boot: "b"}.Encode())
	f.Add([]byte("1 (a) b) R 1 1 1 0 -1 4194560 1 1 0 0 7 8 9 10 20 0 1 0 1234 100 55 1"))
	f.Add([]byte{0, '=', 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		if fields, ok := DecodeLaunch(b); ok {
			if again, ok := DecodeLaunch(EncodeLaunch(fields)); !ok || !cmp.Equal(again, fields) {
				t.Errorf("%q does not survive: %q", fields, again)
			}
		}
		if e, ok := DecodeExit(b); ok {
			if again, ok := DecodeExit(e.Encode()); !ok || again != e {
				t.Errorf("%+v does not survive: %+v", e, again)
			}
		}
		if s, ok := DecodeStarted(b); ok {
			if again, ok := DecodeStarted(s.Encode()); !ok || again != s {
				t.Errorf("%+v does not survive: %+v", s, again)
			}
		}
		parseStat(string(b))
	})
}

func TestParseStat(t *testing.T) {
	const rest = " S 10 11 12 0 -1 4194560 1 1 0 0 7 8 9 10 20 0 1 0 1234 100 55 1"
	want := Process{PID: 42, PPID: 10, PGID: 11, SID: 12, State: 'S', Start: 1234, CPUTicks: 34, RSSPages: 55}
	for _, name := range []string{"sh", "a b", "a) R 1 (b", "\n)("} {
		if got, ok := parseStat("42 (" + name + ")" + rest); !ok || got != want {
			t.Errorf("command %q: got %+v, %t, want %+v", name, got, ok, want)
		}
	}
	for _, s := range []string{"", "42", "42 (sh", "42 (sh)", "42 (sh) S 1 2"} {
		if got, ok := parseStat(s); ok {
			t.Errorf("%q reads as %+v", s, got)
		}
	}
	self, err := ReadProcess(os.Getpid())
	if err != nil || self.PPID != os.Getppid() || !self.Alive() || self.Start == 0 {
		t.Errorf("this process: %+v, %v", self, err)
	}
}

func TestWriteFileLeavesNothingElse(t *testing.T) {
	dir := t.TempDir()
	for _, content := range []string{"one", "two"} {
		if err := WriteFile(dir, "f", []byte(content)); err != nil {
			t.Fatal(err)
		}
		got, err := ReadFile(filepath.Join(dir, "f"))
		if err != nil || string(got) != content {
			t.Errorf("got %q, %v, want %q", got, err, content)
		}
	}
	if err := WriteFile(filepath.Join(dir, "no"), "f", nil); err == nil {
		t.Error("a file in a missing directory was written")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("directory has %v, %v", entries, err)
	}
}

// The supervisor must stay small: these packages would cost each task memory.
func TestSupervisorLinksLittle(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "../../cmd/belay-supervise").Output()
	if err != nil {
		t.Skipf("go list: %v", err)
	}
	for pkg := range strings.FieldsSeq(string(out)) {
		switch pkg {
		case "os", "fmt", "time", "encoding/json", "log/slog", "net", "context":
			t.Errorf("belay-supervise links %s", pkg)
		}
	}
}
