package nvidia

import (
	"path"
	"slices"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sysfs"
)

// The GPU of a Jetson is part of its chip (HARDWARE 2): it has no place on a
// bus, shares the board's memory, and NVML knows it from JetPack 6 on, and
// little of it.

const tegraID = "tegra-gpu"

// isTegra is NVIDIA's own test (2.1, NVL).
func isTegra(fs sysfs.FS) bool {
	if fs.IsFile("/etc/nv_tegra_release") {
		return true
	}
	family, _ := fs.String("/sys/devices/soc0/family")
	return strings.HasPrefix(strings.ToLower(family), "tegra")
}

// isTegraFunction: Thor has its GPU at 0:1:0 (2.3).
func isTegraFunction(bdf string) bool { return bdf == "0000:01:00.0" }

// integrated tells the chip's own GPU from a card (2.3, NVL, CTK).
func integrated(h GPU, bus string, tegra bool) bool {
	if !tegra {
		return false
	}
	name, _ := h.Name()
	return strings.Contains(name, "(nvgpu)") || strings.Contains(name, "NVIDIA Thor") || isTegraFunction(normalBDF(bus))
}

// capabilities of the chips, for the releases without NVML (2.1, table).
var capabilities = map[string]string{"tegra210": "5.3", "tegra186": "6.2", "tegra194": "7.2", "tegra234": "8.7", "tegra264": "11.0"}

// chips by the number that a kernel tells whose device tree names none (2.1).
var chips = map[string]string{"33": "tegra210", "24": "tegra186", "25": "tegra194", "35": "tegra234"}

func chip(fs sysfs.FS) string {
	for _, c := range fs.Strings("/sys/firmware/devicetree/base/compatible") {
		if name, ok := strings.CutPrefix(c, "nvidia,"); ok && capabilities[name] != "" {
			return name
		}
	}
	for _, file := range []string{"/sys/module/tegra_fuse/parameters/tegra_chip_id", "/sys/devices/soc0/soc_id"} {
		if id, ok := fs.String(file); ok {
			return chips[id]
		}
	}
	return ""
}

// tegra describes the GPU of a Jetson; h is nil where NVML knows none. No
// single thing that NVML does not support makes it less of a GPU.
func (p *Plugin) tegra(h GPU, system attributes) gpu {
	a := attributes{"vendor": "nvidia", "memory_unified": "true"}
	g := gpu{tegra: true, handle: h, Device: sdk.Device{ID: tegraID, Kind: sdk.DeviceGPU, Health: sdk.HealthUnknown, Attributes: a}}
	soc := chip(p.fs)
	a.set("soc", soc)
	a.set("compute_capability", capabilities[soc])
	if total, ok := p.memory("MemTotal"); ok {
		a.setf("memory_mib", "%d", total>>20)
	}
	serial, _ := p.fs.String("/sys/firmware/devicetree/base/serial-number")
	a.set("serial", serial)
	if h != nil {
		own := attributes{}
		describe(own, h, system)
		delete(own, "memory_mib") // the board's, whatever NVML says
		for k, v := range own {
			a.set(k, v)
		}
		if uuid, err := h.UUID(); err == nil {
			g.uuid = uuid
			a.set("uuid", uuid)
		}
		if err := h.Check(); err != nil {
			g.Health, g.Reason = sdk.HealthUnhealthy, clip(err.Error())
		}
	}
	g.nodes = tegraNodes(p.fs)
	has := func(patterns ...string) bool {
		return slices.ContainsFunc(g.nodes, func(n sysfs.Node) bool {
			return slices.ContainsFunc(patterns, func(pattern string) bool {
				ok, _ := path.Match(pattern, n.Path)
				return ok
			})
		})
	}
	if g.Ready = has("/dev/nvmap") && has("/dev/nvhost-gpu", "/dev/nvhost-ctrl-gpu", "/dev/nvgpu/igpu0/ctrl"); !g.Ready {
		g.Reason = first(g.Reason, "its nodes, /dev/nvmap and /dev/nvhost-*gpu or /dev/nvgpu/igpu0, are missing: is the nvgpu module loaded?")
	}
	return g
}

// tegraPatterns are the nodes that CUDA needs, of JetPack 4 to 7 (2.4, CTK,
// MT). Those of video and deep learning engines are among them: no program
// finds a use for one without the other.
var tegraPatterns = []string{
	"/dev/nvmap", "/dev/nvhost-*", "/dev/host1x", "/dev/host1x-fence", "/dev/nvgpu/igpu0/*", "/dev/nvsciipc",
	"/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-modeset", "/dev/v4l2-nvdec", "/dev/v4l2-nvenc",
}

func tegraNodes(fs sysfs.FS) []sysfs.Node {
	var nodes []sysfs.Node
	for _, pattern := range tegraPatterns {
		for _, name := range fs.Glob(pattern) {
			if n, ok := fs.Node(name); ok {
				nodes = append(nodes, n)
			}
		}
	}
	return nodes
}

// tegraFiles are the mounts that NVIDIA lists for containers (2.4, CTK): lines
// "lib, /usr/lib/...", globs allowed, what is missing skipped. Nodes are
// chosen by tegraPatterns and not from there: those lists hold displays too.
func tegraFiles(fs sysfs.FS) []sdk.Mount {
	var mounts []sdk.Mount
	seen := map[string]bool{}
	add := func(name string) {
		if seen[name] || len(mounts) >= maxMounts {
			return
		}
		seen[name] = true
		mounts = append(mounts, sdk.Mount{Type: "bind", Source: name, Target: name, ReadOnly: true})
	}
	for _, list := range fs.Glob("/etc/nvidia-container-runtime/host-files-for-container.d/*.csv") {
		for _, line := range fs.Lines(list) {
			kind, name, ok := strings.Cut(line, ",")
			kind, name = strings.TrimSpace(kind), strings.TrimSpace(name)
			// "sym" names links; mounted, they are the file they lead to.
			if !ok || !path.IsAbs(name) || kind != "lib" && kind != "dir" && kind != "sym" {
				continue
			}
			for _, match := range fs.Glob(name) {
				add(match)
			}
		}
	}
	if fs.IsFile("/etc/nv_tegra_release") {
		add("/etc/nv_tegra_release")
	}
	return mounts
}

// memory reads a line of /proc/meminfo, in bytes.
func (p *Plugin) memory(key string) (uint64, bool) {
	v, ok := p.fs.Field("/proc/meminfo", key)
	if n := number(v); ok && n >= 0 && strings.HasSuffix(v, "kB") {
		return uint64(n) << 10, true
	}
	return 0, false
}

// engines are what the GPU is called in the device tree (2.2, JS).
var engines = []string{"gv11b", "gp10b", "ga10b", "gb10b"}

// measureTegra adds what the kernel tells and NVML does not.
func (p *Plugin) measureTegra(s *sdk.DeviceStats) {
	for _, dev := range p.fs.Glob("/sys/class/devfreq/*/device") {
		name, ok := p.fs.String(dev + "/of_node/name")
		if !ok || !slices.Contains(engines, name) && !strings.Contains(name, "gpu") {
			continue
		}
		if load, ok := p.fs.Int(dev + "/load"); ok && load >= 0 && load <= 1000 && s.UtilizationPercent == nil {
			s.UtilizationPercent = new(float64(load) / 10)
		}
	}
	// The total alone would be a guess that nothing is used.
	if used, ok := p.memory("NvMapMemUsed"); ok {
		if total, ok := p.memory("MemTotal"); ok {
			s.MemoryUsedBytes, s.MemoryTotalBytes = &used, &total
		}
	}
	for _, zone := range p.fs.Glob("/sys/class/thermal/thermal_zone*") {
		if kind, _ := p.fs.String(zone + "/type"); kind != "GPU-therm" && kind != "gpu-thermal" {
			continue
		}
		if milli, ok := p.fs.Int(zone + "/temp"); ok && s.TemperatureCelsius == nil {
			s.TemperatureCelsius = new(float64(milli) / 1000)
		}
	}
}
