package containerd

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/platforms"
	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"pgregory.net/rapid"

	"github.com/belay-edge/belay/plugins/sdk"
)

var task = strings.Repeat("0123456789abcdef", 2)

// TestContainerID: containerd takes every id, and no two attempts share one.
func TestContainerID(t *testing.T) {
	seen := map[string]sdk.Attempt{}
	rapid.Check(t, func(t *rapid.T) {
		a := sdk.Attempt{Task: task, Container: rapid.StringMatching(`[a-zA-Z0-9_.-]{1,255}`).Draw(t, "name"), Number: rapid.IntRange(1, 1<<31).Draw(t, "number")}
		id := containerID(a)
		if len(id) > maxIDChars || !isPlainName(id) {
			t.Fatalf("containerd would refuse %q", id)
		}
		if other, ok := seen[id]; ok && other != a {
			t.Fatalf("%v and %v are both %q", a, other, id)
		}
		seen[id] = a
	})
}

func TestLabelsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ports := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) sdk.PortMapping {
			return sdk.PortMapping{
				Protocol: rapid.SampledFrom([]string{"tcp", "udp"}).Draw(t, "protocol"), HostIP: rapid.SampledFrom([]string{"", "127.0.0.1", "::1"}).Draw(t, "ip"),
				HostPort: rapid.IntRange(1, 65535).Draw(t, "host"), ContainerPort: rapid.IntRange(1, 65535).Draw(t, "container"), Name: rapid.String().Draw(t, "name"),
			}
		}), 0, 12).Draw(t, "ports")
		labels := map[string]string{}
		for i, m := range ports {
			labels[labelPort+strconv.Itoa(i)] = portLabel(m)
		}
		got, err := portsFrom(labels)
		if err != nil {
			t.Fatal(err)
		}
		if len(ports) > 0 && cmp.Diff(ports, got) != "" {
			t.Fatal(cmp.Diff(ports, got))
		}
	})
}

func TestStopSignal(t *testing.T) {
	for s, want := range map[string]syscall.Signal{
		"": syscall.SIGTERM, "SIGTERM": syscall.SIGTERM, "SIGUSR1": syscall.SIGUSR1, "usr2": syscall.SIGUSR2, "HUP": syscall.SIGHUP,
		"3": syscall.SIGQUIT, "SIGRTMIN+3": 37, "RTMIN": 34, "SIGRTMAX-1": 63, "0": syscall.SIGTERM, "99": syscall.SIGTERM, "NOPE": syscall.SIGTERM, "SIGRTMIN+99": syscall.SIGTERM,
	} {
		if got := stopSignal(s); got != want {
			t.Errorf("%q is %d, want %d", s, got, want)
		}
	}
}

func TestCommand(t *testing.T) {
	image := ocispec.ImageConfig{Entrypoint: []string{"/entry"}, Cmd: []string{"default"}}
	for name, c := range map[string]struct {
		spec  sdk.ContainerSpec
		image ocispec.ImageConfig
		want  []string
	}{
		"the image's":                     {sdk.ContainerSpec{}, image, []string{"/entry", "default"}},
		"own command":                     {sdk.ContainerSpec{Command: []string{"a", "b"}}, image, []string{"/entry", "a", "b"}},
		"own entry point drops the other": {sdk.ContainerSpec{EntryPoint: []string{"/own"}}, image, []string{"/own"}},
		"both":                            {sdk.ContainerSpec{EntryPoint: []string{"/own"}, Command: []string{"x"}}, image, []string{"/own", "x"}},
		"nothing":                         {sdk.ContainerSpec{}, ocispec.ImageConfig{}, nil},
	} {
		got, err := command(c.spec, c.image)
		if (err != nil) != (c.want == nil) || cmp.Diff(c.want, got) != "" {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.want)
		}
	}
}

func TestChoosePlatform(t *testing.T) {
	manifest := func(arch, variant string) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Annotations: map[string]string{"is": arch + variant}, Platform: &ocispec.Platform{OS: "linux", Architecture: arch, Variant: variant}}
	}
	all := []ocispec.Descriptor{manifest("amd64", ""), manifest("arm", "v6"), manifest("arm", "v7"), manifest("arm64", "v8")}
	for want, c := range map[string]ocispec.Platform{
		"amd64": {OS: "linux", Architecture: "amd64"}, "arm64v8": {OS: "linux", Architecture: "arm64"},
		"armv7": {OS: "linux", Architecture: "arm", Variant: "v7"}, "armv6": {OS: "linux", Architecture: "arm", Variant: "v6"},
		"": {OS: "linux", Architecture: "riscv64"},
	} {
		p := &pull{op: "pull x", want: c, match: platforms.Only(c)}
		got, err := p.choose(all)
		if want == "" {
			if sdk.KindOf(err) != sdk.NotFound || !strings.Contains(err.Error(), "linux/arm/v6") {
				t.Errorf("riscv64: %v", err)
			}
		} else if err != nil || got.Annotations["is"] != want {
			t.Errorf("%v: got %v, %v", c, got.Annotations, err)
		}
	}
}

// TestView covers what cannot be had on a build machine: a reboot.
func TestView(t *testing.T) {
	r := &Runtime{runDir: t.TempDir(), bootID: "this-boot", attempts: map[string]sdk.Attempt{}, cgroups: cgroups{root: "/nonexistent", unified: true}}
	r.cfg = defaultConfig()
	a := sdk.Attempt{Task: task, Container: "web", Number: 3}
	id := containerID(a)
	record := func(boot string) containers.Container {
		return containers.Container{ID: id, Labels: map[string]string{labelTask: a.Task, labelContainer: a.Container, labelAttempt: "3", labelBoot: boot}}
	}
	code := 7
	for _, c := range []struct {
		name    string
		boot    string
		started bool
		process *tasktypes.Process
		want    sdk.Container
	}{
		{"never started", "this-boot", false, nil, sdk.Container{State: sdk.StateCreated}},
		{"created", "this-boot", true, &tasktypes.Process{Status: tasktypes.Status_CREATED}, sdk.Container{State: sdk.StateCreated}},
		{"running", "this-boot", true, &tasktypes.Process{Status: tasktypes.Status_RUNNING, Pid: 42}, sdk.Container{State: sdk.StateRunning, PID: 42}},
		{"paused by somebody", "this-boot", true, &tasktypes.Process{Status: tasktypes.Status_PAUSED, Pid: 42}, sdk.Container{State: sdk.StateRunning, PID: 42}},
		{"exited", "this-boot", true, &tasktypes.Process{Status: tasktypes.Status_STOPPED, Pid: 42, ExitStatus: 7}, sdk.Container{State: sdk.StateExited, ExitCode: &code}},
		{"rebooted", "last-boot", false, nil, sdk.Container{State: sdk.StateExited, Reason: "the device restarted: nobody saw the exit"}},
		{"shim killed", "this-boot", true, nil, sdk.Container{State: sdk.StateExited, Reason: "containerd lost the container, its shim was killed or it ended while containerd was down: nobody saw the exit"}},
	} {
		if err := os.RemoveAll(r.containerDir(id)); err != nil {
			t.Fatal(err)
		}
		if c.started {
			if err := os.MkdirAll(r.containerDir(id), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := r.mark(id, "started"); err != nil {
				t.Fatal(err)
			}
		}
		c.want.Attempt, c.want.RuntimeID = a, id
		got, err := r.view(record(c.boot), c.process)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
		} else if d := cmp.Diff(c.want, got.container); d != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, d)
		}
	}
	if _, err := r.view(containers.Container{ID: "x", Labels: map[string]string{}}, nil); err == nil {
		t.Error("a container without our labels was taken for an attempt")
	}
}

// TestUnifiedLimits writes limits into a tree that looks like cgroup v2.
func TestUnifiedLimits(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "belay", task)
	for path, files := range map[string]map[string]string{
		root: {"cgroup.controllers": "cpuset cpu io memory pids\n", "cgroup.subtree_control": ""},
		dir: {"cpu.weight": "", "cpu.max": "", "memory.max": "", "memory.low": "", "memory.swap.max": "", "pids.max": "",
			"cpu.stat": "usage_usec 12\nuser_usec 1\n", "memory.current": "5000\n", "memory.stat": "inactive_file 1000\n", "pids.current": "3\n", "memory.events": "oom 4\noom_kill 2\n"},
	} {
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(path, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	g := findCgroups(root)
	if !g.unified {
		t.Fatal("not recognised as v2")
	}
	if err := g.make("/belay/"+task, sdk.Limits{CPUShares: 1024, CPUQuota: 50000, MemoryBytes: 64 << 20, MemoryReservation: 32 << 20, Pids: 100}); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, f := range []string{"cpu.weight", "cpu.max", "memory.max", "memory.low", "pids.max"} {
		b, err := os.ReadFile(filepath.Join(dir, f))
		if err != nil {
			t.Fatal(err)
		}
		got[f] = string(b)
	}
	want := map[string]string{"cpu.weight": "39", "cpu.max": "50000 100000", "memory.max": "67108864", "memory.low": "33554432", "pids.max": "100"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("limits (-want +got):\n%s", d)
	}
	st, err := g.stats("/belay/" + task)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(sdk.Stats{CPUNanos: 12000, MemoryBytes: 4000, MemoryLimitBytes: 64 << 20, Pids: 3}, st); d != "" {
		t.Errorf("stats (-want +got):\n%s", d)
	}
	if n := g.oomKills("/belay/" + task); n != 2 {
		t.Errorf("%d kills for memory, want 2", n)
	}
	swappiness := uint64(10)
	if err := g.check(sdk.Limits{Swappiness: &swappiness}); sdk.KindOf(err) != sdk.Unsupported {
		t.Errorf("swappiness on v2: %v", err)
	}
	if err := (cgroups{root: root, mounts: map[string]string{}}).check(sdk.Limits{MemoryBytes: 1 << 30}); sdk.KindOf(err) != sdk.Unsupported {
		t.Errorf("memory without its controller: %v", err)
	}
}
