package nvidia_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/plugins/nvidia"
	"github.com/belay-edge/belay/plugins/nvidia/nvidiatest"
	"github.com/belay-edge/belay/plugins/sdk"
)

const (
	pciDir  = "sys/devices/pci0000:00/0000:06:00.0"
	control = "c 195 255 0666 root root /dev/nvidiactl\nc 510 0 0666 root root /dev/nvidia-uvm\n"
	uuid    = "GPU-edfee158-11c1-52b8-0517-92f30e7fac88"
)

// tree is a machine with one card, its driver bound.
func tree(more map[string]string) map[string]string {
	m := map[string]string{
		pciDir + "/vendor": "0x10de\n", pciDir + "/class": "0x030000\n", pciDir + "/driver": "-> ../../../bus/pci/drivers/nvidia",
		"sys/bus/pci/drivers/nvidia/x": "", "sys/bus/pci/devices/0000:06:00.0": "-> ../../../devices/pci0000:00/0000:06:00.0",
		"dev.list": "c 195 0 0660 root 44 /dev/nvidia0\n" + control,
	}
	for k, v := range more {
		if m[k] = v; v == "-" {
			delete(m, k)
		}
	}
	return m
}

func plant(t *testing.T, root string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, link := strings.CutPrefix(content, "-> "); link {
			err = os.Symlink(target, p)
		} else {
			err = os.WriteFile(p, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func open(t *testing.T, root string, l nvidia.Library, more string) *nvidia.Plugin {
	t.Helper()
	p := nvidia.New("test", func(bool) nvidia.Library { return l })
	if err := p.Configure(t.Context(), sdk.Config{JSON: json.RawMessage(fmt.Sprintf(`{"root":%q,"scan":"100ms"%s}`, root, more))}); err != nil {
		t.Fatal(err)
	}
	return p
}

func library(cards ...*nvidiatest.GPU) *nvidiatest.Library {
	return &nvidiatest.Library{Driver: "550.54.15", CUDA: new(12060), Cards: cards}
}

func card() *nvidiatest.GPU {
	return &nvidiatest.GPU{NameIs: new("NVIDIA T4"), UUIDIs: new(uuid), BusIDIs: new("00000000:06:00.0"), MinorIs: new(0), Total: new(uint64(16 << 30)), Used: new(uint64(1 << 30)), Percent: new(7)}
}

// first is what a watch says at once.
func first(t *testing.T, p *nvidia.Plugin) []sdk.Device {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []sdk.Device
	if err := p.Watch(ctx, func(all []sdk.Device) { got = all; cancel() }); err != nil {
		t.Fatal(err)
	}
	if err := sdk.CheckInventory(got); err != nil {
		t.Error(err)
	}
	return got
}

func TestCard(t *testing.T) {
	with := func(change func(*nvidiatest.GPU)) *nvidiatest.Library {
		c := card()
		change(c)
		return library(c)
	}
	for name, c := range map[string]struct {
		tree   map[string]string
		nvml   nvidia.Library
		ready  bool
		health sdk.Health
		reason string
	}{
		"healthy":                {tree(nil), library(card()), true, sdk.HealthHealthy, ""},
		"without the library":    {tree(nil), nvidia.NoLibrary{}, false, sdk.HealthUnknown, "libnvidia-ml.so.1 is not installed"},
		"driver being loaded":    {tree(nil), &nvidiatest.Library{Err: nvidia.ErrNoDriver}, false, sdk.HealthUnknown, "not loaded"},
		"without a driver":       {tree(map[string]string{pciDir + "/driver": "-"}), library(), false, sdk.HealthUnknown, "no driver is bound"},
		"the free driver":        {tree(map[string]string{pciDir + "/driver": "-> ../../../bus/pci/drivers/nouveau", "sys/bus/pci/drivers/nouveau/x": ""}), library(), false, sdk.HealthUnknown, "nouveau"},
		"fallen off the bus":     {tree(nil), library(), false, sdk.HealthUnhealthy, "fallen off the bus"},
		"lost":                   {tree(nil), with(func(g *nvidiatest.GPU) { g.Bad = nvidia.ErrLost }), true, sdk.HealthUnhealthy, "fallen off the bus"},
		"wants a reset":          {tree(nil), with(func(g *nvidiatest.GPU) { g.Bad = nvidia.ErrResetRequired }), true, sdk.HealthUnhealthy, "reset"},
		"no control nodes":       {tree(map[string]string{"dev.list": "c 195 0 0666 root root /dev/nvidia0\n"}), library(card()), false, sdk.HealthHealthy, "/dev/nvidiactl is missing"},
		"no node of its own":     {tree(map[string]string{"dev.list": control}), library(card()), false, sdk.HealthHealthy, "/dev/nvidia0 is missing"},
		"tells little":           {tree(nil), with(func(g *nvidiatest.GPU) { *g = nvidiatest.GPU{BusIDIs: g.BusIDIs, MinorIs: g.MinorIs} }), true, sdk.HealthHealthy, ""},
		"does not tell its node": {tree(nil), with(func(g *nvidiatest.GPU) { g.MinorIs = nil }), false, sdk.HealthHealthy, "which node"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			plant(t, root, c.tree)
			all := first(t, open(t, root, c.nvml, ""))
			if len(all) != 1 || all[0].ID != "pci-0000:06:00.0" {
				t.Fatalf("found %+v, want the card", all)
			}
			d := all[0]
			if d.Ready != c.ready || d.Health != c.health || !strings.Contains(d.Reason, c.reason) || c.reason == "" && d.Reason != "" {
				t.Errorf("got %+v, want ready %t, %s, reason with %q", d, c.ready, c.health, c.reason)
			}
		})
	}
}

func TestOtherFunctionsAreLeftAlone(t *testing.T) {
	root := t.TempDir()
	plant(t, root, tree(map[string]string{pciDir + "/class": "0x040300\n", "dev.list": "-"})) // the audio of a card
	l := library()
	if all := first(t, open(t, root, l, "")); len(all) != 0 {
		t.Errorf("found %+v", all)
	}
	if l.Inits != 0 {
		t.Error("loaded NVML on a machine without a GPU")
	}
}

// A container may be given a GPU and see nothing of it in /sys.
func TestCardThatSysDoesNotShow(t *testing.T) {
	root := t.TempDir()
	plant(t, root, map[string]string{"dev.list": tree(nil)["dev.list"]})
	all := first(t, open(t, root, library(card()), ""))
	if len(all) != 1 || all[0].ID != "pci-0000:06:00.0" || !all[0].Ready {
		t.Errorf("found %+v, want the card, ready", all)
	}
}

func TestStatsLeaveOutWhatIsNotTold(t *testing.T) {
	root := t.TempDir()
	plant(t, root, tree(nil))
	g := card()
	p := open(t, root, library(g), "")
	got, err := p.Stats(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []sdk.DeviceStats{{ID: "pci-0000:06:00.0", UtilizationPercent: new(7.0), MemoryUsedBytes: new(uint64(1 << 30)), MemoryTotalBytes: new(uint64(16 << 30))}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	g.Total, g.Percent = new(uint64(0)), nil // memory that is the board's
	if got, err := p.Stats(t.Context(), nil); err != nil || len(got) != 0 {
		t.Errorf("of a GPU that tells nothing: %+v, %v", got, err)
	}
	if _, err := p.Stats(t.Context(), []string{"pci-x"}); sdk.KindOf(err) != sdk.NotFound {
		t.Errorf("of one that is not there: %v", err)
	}
}

// A driver that is loaded after the plugin started is noticed, and one that
// comes to know another card asked anew.
func TestDriverComesLater(t *testing.T) {
	root := t.TempDir()
	plant(t, root, tree(map[string]string{pciDir + "/driver": "-", "dev.list": "-"}))
	l := library(card())
	p := open(t, root, l, "")
	if all := first(t, p); all[0].Ready || l.Inits != 0 {
		t.Fatalf("before: %+v, %d inits", all, l.Inits)
	}
	id := first(t, p)[0].ID
	plant(t, root, map[string]string{pciDir + "/driver": "-> ../../../bus/pci/drivers/nvidia", "dev.list": tree(nil)["dev.list"]})
	l.Err = nvidia.ErrNoDriver
	if all := first(t, p); all[0].Ready {
		t.Fatalf("while it loads: %+v", all)
	}
	l.Err = nil
	if all := first(t, p); !all[0].Ready || all[0].ID != id {
		t.Fatalf("after: %+v, want %s, ready", all, id)
	}
	first(t, p)
	if l.Inits != 2 || l.Shutdowns != 0 {
		t.Errorf("%d inits, %d shutdowns, want 2 (one failed) and 0", l.Inits, l.Shutdowns)
	}
	const second = "sys/devices/pci0000:00/0000:0a:00.0"
	plant(t, root, map[string]string{second + "/vendor": "0x10de\n", second + "/class": "0x030200\n", second + "/driver": "-> ../../../bus/pci/drivers/nvidia",
		"sys/bus/pci/devices/0000:0a:00.0": "-> ../../../devices/pci0000:00/0000:0a:00.0"})
	if all := first(t, p); len(all) != 2 || l.Inits != 3 || l.Shutdowns != 1 {
		t.Errorf("a second card: %+v, %d inits, %d shutdowns", all, l.Inits, l.Shutdowns)
	}
}

func TestInstances(t *testing.T) {
	root := t.TempDir()
	plant(t, root, tree(map[string]string{
		"proc/driver/nvidia-caps/mig-minors": "config 1\ngpu0/gi2/access 21\ngpu0/gi2/ci0/access 22\n",
		"dev.list":                           tree(nil)["dev.list"] + "c 235 21 0444 root root /dev/nvidia-caps/nvidia-cap21\nc 235 22 0444 root root /dev/nvidia-caps/nvidia-cap22\n",
	}))
	g := card()
	g.MIGOn = new(true)
	g.Instances = []*nvidiatest.GPU{{NameIs: new("NVIDIA T4 MIG 1c.2g.10gb+me"), UUIDIs: new("MIG-1"), GI: new(2), CI: new(0)}, {NameIs: new("tells no place")}}
	l := library(g)
	p := open(t, root, l, "")
	const id = "pci-0000:06:00.0/gi2/ci0"
	all := first(t, p)
	if len(all) != 2 || all[0].Ready || all[1].ID != id || !all[1].Ready || all[1].Attributes["mig_profile"] != "1c.2g.10gb+me" {
		t.Fatalf("found %+v", all)
	}
	e, err := p.Edits(t.Context(), []string{id})
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, d := range e.Devices {
		paths = append(paths, d.HostPath)
	}
	if diff := cmp.Diff([]string{"/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-caps/nvidia-cap21", "/dev/nvidia-caps/nvidia-cap22"}, paths); diff != "" {
		t.Error(diff)
	}
	// At boot a task may want its instance before the driver is up: it must
	// try again, and not be told that there is none.
	l.Err = nvidia.ErrNoDriver
	fresh := open(t, root, l, "")
	if _, err := fresh.Edits(t.Context(), []string{id}); sdk.KindOf(err) != sdk.Unavailable {
		t.Errorf("before the driver is up: %v, want unavailable", err)
	}
	l.Err = nil
	if _, err := p.Edits(t.Context(), []string{"pci-0000:06:00.0/gi9/ci0"}); sdk.KindOf(err) != sdk.NotFound {
		t.Errorf("an instance that is no more: %v, want not-found", err)
	}
}

func spec(entries, mount string) string {
	return "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n" + entries + "containerEdits:\n  mounts:\n  - hostPath: " + mount + "\n    containerPath: /x\n"
}

func TestCDI(t *testing.T) {
	entry := func(name string, nodes ...string) string {
		s := "- name: \"" + name + "\"\n  containerEdits:\n    deviceNodes:\n"
		for _, n := range nodes {
			s += "    - path: " + n + "\n"
		}
		return s
	}
	const lib = "/usr/lib/libcuda.so.550.54.15"
	for name, c := range map[string]struct {
		files  map[string]string
		config string
		want   []string
	}{
		"by UUID":             {files: map[string]string{"etc/cdi/nvidia.yaml": spec(entry("0", "/dev/nvidia0")+entry(uuid, "/dev/nvidia0"), lib)}, want: []string{"nvidia.com/gpu=" + uuid}},
		"by its node":         {files: map[string]string{"var/run/cdi/nvidia.yaml": spec(entry("0", "/dev/nvidia1")+entry("1", "/dev/nvidia0"), lib)}, want: []string{"nvidia.com/gpu=1"}},
		"in JSON":             {files: map[string]string{"etc/cdi/n.json": `{"cdiVersion":"0.5.0","kind":"nvidia.com/gpu","devices":[{"name":"` + uuid + `","containerEdits":{}}],"containerEdits":{}}`}, want: []string{"nvidia.com/gpu=" + uuid}},
		"only all":            {files: map[string]string{"etc/cdi/nvidia.yaml": spec(entry("all", "/dev/nvidia0"), lib)}},
		"another card's":      {files: map[string]string{"etc/cdi/nvidia.yaml": spec(entry("0", "/dev/nvidia1"), lib)}},
		"an instance of it":   {files: map[string]string{"etc/cdi/nvidia.yaml": spec(entry("0:0", "/dev/nvidia0", "/dev/nvidia-caps/nvidia-cap3"), lib)}},
		"of another driver":   {files: map[string]string{"etc/cdi/nvidia.yaml": spec(entry(uuid, "/dev/nvidia0"), "/usr/lib/libcuda.so.535")}},
		"another kind":        {files: map[string]string{"etc/cdi/amd.yaml": strings.ReplaceAll(spec(entry(uuid, "/dev/nvidia0"), lib), "nvidia.com/gpu", "amd.com/gpu")}},
		"that cannot be read": {files: map[string]string{"etc/cdi/nvidia.yaml": "kind: nvidia.com/gpu\n\tdevices: [\n"}},
		"switched off":        {files: map[string]string{"etc/cdi/nvidia.yaml": spec(entry(uuid, "/dev/nvidia0"), lib)}, config: `,"cdi":false`},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			plant(t, root, tree(c.files))
			plant(t, root, map[string]string{lib: ""})
			e, err := open(t, root, library(card()), c.config).Edits(t.Context(), []string{"pci-0000:06:00.0"})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, e.CDIDevices); diff != "" {
				t.Error(diff)
			}
			// One or the other, never both.
			if nodes := len(e.Devices) > 0 && len(e.Env) > 0; nodes != (c.want == nil) {
				t.Errorf("edits %+v", e)
			}
		})
	}
}

// cache is what ldconfig would write of these libraries.
func cache(flags int32, libraries ...[2]string) []byte {
	const header, record = 48, 24
	head := append([]byte("glibc-ld.so.cache1.1"), make([]byte, header-20)...)
	binary.NativeEndian.PutUint32(head[20:], uint32(len(libraries)))
	var entries, text []byte
	base := uint32(header + record*len(libraries))
	for _, l := range libraries {
		e := make([]byte, record)
		binary.NativeEndian.PutUint32(e, uint32(flags))
		for i, s := range l {
			binary.NativeEndian.PutUint32(e[4+4*i:], base+uint32(len(text)))
			text = append(append(text, s...), 0)
		}
		entries = append(entries, e...)
	}
	return append(append(head, entries...), text...)
}

func TestNodesAndLibraries(t *testing.T) {
	root := t.TempDir()
	const dir = "/usr/lib/x86_64-linux-gnu/"
	libraries := [][2]string{{"libcuda.so.1", dir + "libcuda.so.1"}, {"libcuda.so", dir + "libcuda.so"}, {"libnvidia-ml.so.1", dir + "libnvidia-ml.so.1"}, {"libGLX_nvidia.so.0", dir + "libGLX_nvidia.so.0"}, {"libc.so.6", dir + "libc.so.6"}, {"libnvidia-encode.so.1", dir + "libnvidia-encode.so.1"}}
	flags := nvidia.Machine()
	plant(t, root, tree(map[string]string{
		"etc/ld.so.cache":    string(cache(flags, libraries...)),
		dir + "libcuda.so.1": "-> libcuda.so.550.54.15", dir + "libcuda.so": "-> libcuda.so.1", dir + "libcuda.so.550.54.15": "x",
		dir + "libnvidia-ml.so.1": "-> " + dir + "libnvidia-ml.so.550.54.15", dir + "libnvidia-ml.so.550.54.15": "x",
		dir + "libnvidia-encode.so.1": "-> libnvidia-encode.so.535.1", dir + "libnvidia-encode.so.535.1": "of another driver",
		dir + "libc.so.6": "x",
	}))
	e, err := open(t, root, library(card()), "").Edits(t.Context(), []string{"pci-0000:06:00.0"})
	if err != nil {
		t.Fatal(err)
	}
	var want []sdk.Mount
	for _, l := range [][2]string{{"libcuda.so.1", "libcuda.so.550.54.15"}, {"libcuda.so", "libcuda.so.550.54.15"}, {"libnvidia-ml.so.1", "libnvidia-ml.so.550.54.15"}} {
		for _, at := range []string{dir, "/usr/local/nvidia/lib64/"} {
			want = append(want, sdk.Mount{Type: "bind", Source: dir + l[1], Target: at + l[0], ReadOnly: true})
		}
	}
	if diff := cmp.Diff(want, e.Mounts); diff != "" {
		t.Errorf("mounts:\n%s", diff)
	}
	if diff := cmp.Diff([]uint32{44}, e.AdditionalGIDs); diff != "" {
		t.Errorf("groups:\n%s", diff)
	}
	if diff := cmp.Diff([]string{"NVIDIA_VISIBLE_DEVICES=void"}, e.Env); diff != "" {
		t.Errorf("env:\n%s", diff)
	}
}

func FuzzReadCache(f *testing.F) {
	f.Add(cache(0x300, [2]string{"libcuda.so.1", "/usr/lib/libcuda.so.1"}))
	f.Add(append([]byte("ld.so-1.7.0\x00\xff\xff\xff\xff"), 1, 2, 3))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _ = nvidia.ReadCache(b) })
}

// The cache of this machine is read as ldconfig reads it.
func TestReadCacheOfThisMachine(t *testing.T) {
	b, err := os.ReadFile("/etc/ld.so.cache")
	if err != nil {
		t.Skipf("no cache to read: %v", err)
	}
	n, err := nvidia.ReadCache(b)
	if err != nil || n == 0 {
		t.Errorf("read %d entries, %v", n, err)
	}
}

// hung is an NVML that does not return, as of a GPU that hangs.
type hung struct {
	nvidia.NoLibrary
	in, out chan struct{}
}

func (h hung) Init() error { close(h.in); <-h.out; return nvidia.ErrNoDriver }

func TestHungLibraryKeepsNobody(t *testing.T) {
	root := t.TempDir()
	plant(t, root, tree(nil))
	h := hung{in: make(chan struct{}), out: make(chan struct{})}
	p := open(t, root, h, "")
	done := make(chan struct{})
	go func() { defer close(done); _, _ = p.Stats(context.Background(), nil) }()
	<-h.in
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := p.Edits(ctx, []string{"x"}); sdk.KindOf(err) != sdk.Deadline {
		t.Errorf("got %v, want the end of the context", err)
	}
	close(h.out)
	<-done
}
