package system

import (
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const fixtures = "../../../hw-tests/fixtures"

// Every golden value cites its source in the fixture's SOURCE file.
func TestReadFixtures(t *testing.T) {
	boards, err := filepath.Glob(filepath.Join(fixtures, "*", "facts.json"))
	if err != nil || len(boards) < 6 {
		t.Fatalf("want the fixtures of at least six boards, found %v (%v)", boards, err)
	}
	for _, golden := range boards {
		dir := filepath.Dir(golden)
		t.Run(filepath.Base(dir), func(t *testing.T) {
			b, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			var want Facts
			if err := json.Unmarshal(b, &want); err != nil {
				t.Fatal(err)
			}
			got, err := Read(t.Context(), filepath.Join(dir, "root"), Options{Arch: want.Attributes["belay.arch"]})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("facts (-want +got):\n%s", diff)
			}
			if _, err := os.Stat(filepath.Join(dir, "SOURCE")); err != nil {
				t.Errorf("no word on where the values come from: %v", err)
			}
		})
	}
}

// plant writes a tree of files for one test.
func plant(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func read(t *testing.T, files map[string]string, o Options) Facts {
	t.Helper()
	f, err := Read(t.Context(), plant(t, files), o)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestReadTellsWhatFilesSay(t *testing.T) {
	const dt = "sys/firmware/devicetree/base/"
	v1 := map[string]string{"sys/fs/cgroup/memory/tasks": "", "sys/fs/cgroup/cpu/tasks": ""}
	with := func(base map[string]string, more ...string) map[string]string {
		m := map[string]string{}
		for k, v := range base {
			m[k] = v
		}
		for i := 0; i < len(more); i += 2 {
			m[more[i]] = more[i+1]
		}
		return m
	}
	on := "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t5\t70\t1\n"
	off := "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t0\t70\t0\n"
	for _, c := range []struct {
		name  string
		arch  string
		files map[string]string
		want  map[string]string // "": must be absent
	}{
		{"cgroup v1", "", with(v1, "proc/cgroups", on), map[string]string{"belay.cgroup": "v1", "belay.cgroup.memory": "on"}},
		{"cgroup v1, memory disabled at boot", "", with(v1, "proc/cgroups", off), map[string]string{"belay.cgroup": "v1", "belay.cgroup.memory": "off"}},
		{"cgroup hybrid", "", with(v1, "proc/cgroups", on, "sys/fs/cgroup/unified/cgroup.controllers", ""), map[string]string{"belay.cgroup": "hybrid", "belay.cgroup.memory": "on"}},
		{"no cgroups", "", nil, map[string]string{"belay.cgroup": "", "belay.cgroup.memory": ""}},
		{"quoted os-release", "", map[string]string{"etc/os-release": "# x\nID=\"debian\"\nVERSION_ID='12'\nbroken\n"}, map[string]string{"belay.os": "debian", "belay.os.version": "12"}},
		{"os-release of /usr/lib", "", map[string]string{"usr/lib/os-release": "ID=alpine\n"}, map[string]string{"belay.os": "alpine", "belay.os.version": ""}},
		{"other init", "", map[string]string{"proc/1/comm": "busybox\n"}, map[string]string{"belay.init": "busybox"}},
		{"systemd", "", map[string]string{"proc/1/comm": "init\n", "run/systemd/system/x": ""}, map[string]string{"belay.init": "systemd"}},
		{"custom carrier", "arm64", map[string]string{dt + "compatible": "acme,carrier\x00nvidia,p3767-0000\x00nvidia,tegra234\x00"}, map[string]string{"belay.board": "acme,carrier", "belay.board.family": "jetson", "belay.board.module": "orin-nx"}},
		{"super mode", "arm64", map[string]string{dt + "compatible": "nvidia,p3768-0000+p3767-0003-super\x00"}, map[string]string{"belay.board.module": "orin-nano", "belay.board.soc": "tegra234"}},
		{"Orin on JetPack 5 names no exact SoC", "arm64", map[string]string{dt + "compatible": "acme,x\x00nvidia,tegra23x\x00", "sys/module/tegra_fuse/parameters/tegra_chip_id": "35\n"}, map[string]string{"belay.board.family": "jetson", "belay.board.soc": "tegra234", "belay.board.module": ""}},
		{"release with one component", "arm64", map[string]string{"etc/nv_tegra_release": "# R36 (release), REVISION: 5, GCID: 1\n"}, map[string]string{"belay.l4t": "36.5", "belay.jetpack": "6.2.2"}},
		{"release of no known JetPack", "arm64", map[string]string{"etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 1\n"}, map[string]string{"belay.l4t": "38.2.0", "belay.jetpack": ""}},
		{"device tree of an unknown board", "arm64", map[string]string{dt + "compatible": "radxa,rock-5b\x00rockchip,rk3588\x00"}, map[string]string{"belay.board": "radxa,rock-5b", "belay.board.family": "", "belay.board.soc": ""}},
		{"device tree in /proc only", "arm64", map[string]string{"proc/device-tree/compatible": "raspberrypi,400\x00brcm,bcm2711\x00"}, map[string]string{"belay.board": "raspberrypi,400", "belay.board.soc": "bcm2711"}},
		{"old NUC", "amd64", map[string]string{"sys/class/dmi/id/sys_vendor": "Intel Corporation\n", "sys/class/dmi/id/product_name": "NUC8i5BEH\n"}, map[string]string{"belay.board.family": "nuc", "belay.board": "NUC8i5BEH"}},
		{"product filler, board named", "amd64", map[string]string{"sys/class/dmi/id/product_name": "Default string\n", "sys/class/dmi/id/board_name": "X1\n"}, map[string]string{"belay.board": "X1"}},
		{"first Pi", "arm", map[string]string{"proc/cpuinfo": "model name\t: ARMv6-compatible processor rev 7 (v6l)\nCPU architecture: 7\n"}, map[string]string{"belay.arch": "arm", "belay.arch.variant": "v6"}},
		{"32-bit on 64-bit", "arm", map[string]string{"proc/cpuinfo": "CPU architecture: 8\n"}, map[string]string{"belay.arch.variant": "v7"}},
		{"virtual machine", "amd64", map[string]string{"proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu hypervisor lm\n"}, map[string]string{"belay.virtualization": "vm", "belay.cpus": "1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := read(t, c.files, Options{Arch: c.arch}).Attributes
			for k, want := range c.want {
				if got[k] != want {
					t.Errorf("%s = %q, want %q", k, got[k], want)
				}
			}
		})
	}
}

func TestReserveIsSubtracted(t *testing.T) {
	files := map[string]string{
		"proc/cpuinfo": "processor\t: 0\nmodel name\t: N100\n\nprocessor\t: 1\nmodel name\t: N100\n",
		"proc/meminfo": "MemTotal:         524288 kB\nMemFree:  1024 kB\n",
	}
	for _, c := range []struct {
		name        string
		reserve     Reserve
		cpu, memory uint64
	}{
		{"none", Reserve{}, 2048, 512},
		{"default", Reserve{CPUPercent: 5, MemoryMiB: 128}, 1946, 384},
		{"more than there is", Reserve{CPUPercent: 90, MemoryMiB: 4096}, 205, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := read(t, files, Options{Reserve: c.reserve})
			if f.CPU != c.cpu || f.MemoryMiB != c.memory {
				t.Errorf("cpu %d memory %d, want %d and %d", f.CPU, f.MemoryMiB, c.cpu, c.memory)
			}
			if f.Attributes["belay.memory_mib"] != "512" || f.Attributes["belay.cpus"] != "2" || f.Attributes["belay.cpu.model"] != "N100" {
				t.Errorf("attributes tell of the whole machine: %v", f.Attributes)
			}
		})
	}
}

func TestMachineIDTellsClonesApart(t *testing.T) {
	const serial = "proc/device-tree/serial-number"
	id := func(files map[string]string) string { return tree(plant(t, files)).machineID() }
	a := id(map[string]string{"etc/machine-id": "0123\n", serial: "100000001\x00"})
	b := id(map[string]string{"etc/machine-id": "0123\n", serial: "100000002\x00"})
	bare := id(map[string]string{"etc/machine-id": "0123\n"})
	filler := id(map[string]string{"etc/machine-id": "0123\n", "sys/class/dmi/id/board_serial": "Default string\n"})
	if len(a) != 64 || a == b || a == bare {
		t.Errorf("clones of one card are not told apart: %q %q %q", a, b, bare)
	}
	if filler != bare {
		t.Errorf("a filler counts as a serial number")
	}
	if got := id(map[string]string{"etc/machine-id": "uninitialized\n"}); got != "" {
		t.Errorf("an image before its first boot has id %q", got)
	}
	if got := id(nil); got != "" {
		t.Errorf("a device with nothing to tell has id %q", got)
	}
}

func TestReadThisMachine(t *testing.T) {
	f, err := Read(t.Context(), "/", Options{})
	if err != nil {
		t.Fatal(err)
	}
	if f.CPU == 0 || f.MemoryMiB == 0 || f.BootID == "" || f.Attributes["belay.kernel"] == "" || f.Attributes["belay.arch"] != runtime.GOARCH {
		t.Errorf("incomplete facts of this machine: %+v", f)
	}
	w := f.Wire(map[string]string{"site": "7", "belay.arch": "mine"})
	if w.Attributes["site"] != "7" || w.Attributes["belay.arch"] != runtime.GOARCH {
		t.Errorf("operator's attributes must be kept and never hide the device's: %v", w.Attributes)
	}
	if _, err := Read(t.Context(), "facts_test.go", Options{}); err == nil {
		t.Error("a file was taken for a device")
	}
}
