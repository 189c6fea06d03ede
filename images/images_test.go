package images

import (
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestDeterministic: the same source gives the same digests.
func TestDeterministic(t *testing.T) {
	names := []string{Workload, Configured, Foreign, ForeignSingle}
	o := Options{Root: "..", HostOnly: true}
	first, err := Layout(t.Context(), filepath.Join(t.TempDir(), "a"), o, names...)
	if err != nil {
		t.Fatal(err)
	}
	second, err := Layout(t.Context(), filepath.Join(t.TempDir(), "b"), o, names...)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(first, second); d != "" {
		t.Errorf("the same images have other digests (-first +second):\n%s", d)
	}
	if first[Workload] == first[Configured] {
		t.Error("two images are one")
	}
}

func TestPlatforms(t *testing.T) {
	if testing.Short() {
		t.Skip("compiles for three architectures")
	}
	idx, err := Build(t.Context(), Workload, Options{Root: ".."})
	if err != nil {
		t.Fatal(err)
	}
	m, err := idx.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range m.Manifests {
		got = append(got, d.Platform.String())
		img, err := idx.Image(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		cfg, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if cfg.Platform().String() != d.Platform.String() {
			t.Errorf("index says %s, configuration %s", d.Platform, cfg.Platform())
		}
	}
	if d := cmp.Diff([]string{"linux/amd64", "linux/arm64", "linux/arm/v7"}, got); d != "" {
		t.Error(d)
	}
}

func TestBuildErrors(t *testing.T) {
	if _, err := Build(t.Context(), "nothing", Options{Root: ".."}); err == nil {
		t.Error("an unknown image was built")
	}
	if _, err := Build(t.Context(), Shell, Options{Root: "..", Busybox: "/no/such/busybox"}); err == nil {
		t.Error("a shell without a busybox was built")
	}
}

// TestWorkloadRuns: what is put into images works outside of them too.
func TestWorkloadRuns(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "workload")
	if out, err := exec.Command("go", "build", "-o", bin, "./workload").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for name, c := range map[string]struct {
		args []string
		code int
		out  string
	}{
		"print":   {[]string{"print", "a", "b"}, 0, "a b\n"},
		"exit":    {[]string{"exit", "3"}, 3, ""},
		"tick":    {[]string{"tick", "1ms", "2"}, 0, "tick 1\ntick 2\n"},
		"unknown": {[]string{"nothing"}, 2, ""},
		"none":    {nil, 2, ""},
	} {
		cmd := exec.Command(bin, c.args...)
		out, _ := cmd.Output()
		if code := cmd.ProcessState.ExitCode(); code != c.code || string(out) != c.out {
			t.Errorf("%s on %s: exit %d, %q; want %d, %q", name, runtime.GOARCH, code, out, c.code, c.out)
		}
	}
}
