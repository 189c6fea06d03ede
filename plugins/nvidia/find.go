package nvidia

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sysfs"
)

// Facts of HARDWARE 1.
const (
	vendor     = 0x10de
	classVGA   = 0x0300 // without the programming interface
	class3D    = 0x0302
	nodePrefix = "/dev/nvidia"
)

// function is a GPU on the PCI bus, as the kernel has it.
type function struct {
	bdf, driver string
}

// scan finds NVIDIA's GPUs without its driver (NVL). Their audio and USB
// functions are of other classes.
func scan(fs sysfs.FS) []function {
	var found []function
	for _, bdf := range fs.List("/sys/bus/pci/devices") {
		dir := "/sys/bus/pci/devices/" + bdf
		if v, ok := fs.Hex(dir + "/vendor"); !ok || v != vendor {
			continue
		}
		class, ok := fs.Hex(dir + "/class")
		if class >>= 8; !ok || class != classVGA && class != class3D {
			continue
		}
		driver, _ := fs.LinkBase(dir + "/driver")
		found = append(found, function{bdf: bdf, driver: driver})
	}
	return found
}

// find looks at everything anew. It is called in turn.
func (p *Plugin) find() []gpu {
	functions := scan(p.fs)
	tegra := isTegra(p.fs)
	var present strings.Builder // those NVML can know
	for _, f := range functions {
		if f.driver == "nvidia" {
			present.WriteString(f.bdf + " ")
		}
	}
	// Loading NVML costs memory, so it is asked only where it may know
	// something: a container may hide /sys of a GPU it was given.
	var handles []GPU
	err := ErrNoDriver
	if present.Len() > 0 || tegra || p.fs.Exists("/proc/driver/nvidia") || p.fs.Exists("/dev/nvidiactl") {
		handles, err = p.nvml.gpus(present.String())
	} else {
		p.nvml.close()
	}
	var system attributes
	if err == nil {
		system = p.system()
	}

	byBus := map[string]GPU{}
	var rest []GPU
	for _, h := range handles {
		if bus, err := h.BusID(); err == nil && !integrated(h, bus, tegra) {
			byBus[normalBDF(bus)] = h
			continue
		}
		rest = append(rest, h)
	}
	var found []gpu
	for _, f := range functions {
		if tegra && isTegraFunction(f.bdf) {
			continue // the integrated one
		}
		found = append(found, p.card(f, byBus[f.bdf], err, system)...)
		delete(byBus, f.bdf)
	}
	for _, h := range handles { // in NVML's order, those that /sys does not show
		bus, _ := h.BusID()
		if _, hidden := byBus[normalBDF(bus)]; hidden {
			found = append(found, p.card(function{bdf: normalBDF(bus), driver: "nvidia"}, h, nil, system)...)
		}
	}
	if tegra {
		var h GPU
		if len(rest) > 0 {
			h = rest[0]
		}
		found = append(found, p.tegra(h, system))
	} else {
		for _, h := range rest { // with unified memory, on no bus: GB10
			found = append(found, p.card(function{driver: "nvidia"}, h, nil, system)...)
		}
	}
	found = named(found)
	if len(found) > sdk.MaxDevices {
		found = found[:sdk.MaxDevices]
	}
	return found
}

// named leaves out what has no name of its own: without one it could not be
// told from another.
func named(found []gpu) []gpu {
	seen := map[string]bool{}
	kept := found[:0]
	for _, g := range found {
		if g.ID != "" && !seen[g.ID] {
			seen[g.ID] = true
			kept = append(kept, g)
		}
	}
	return kept
}

// system are the attributes all GPUs share.
func (p *Plugin) system() attributes {
	a := attributes{}
	if v, err := p.nvml.library.DriverVersion(); err == nil {
		a.set("driver_version", v)
	}
	if v, err := p.nvml.library.CUDAVersion(); err == nil && v > 0 {
		a.setf("cuda_version", "%d.%d", v/1000, v%1000/10)
	}
	return a
}

// card describes a GPU on the bus and, when it is divided, its instances. h is
// nil when NVML does not list it, err then says why NVML lists nothing.
func (p *Plugin) card(f function, h GPU, err error, system attributes) []gpu {
	a := attributes{"vendor": "nvidia"}
	g := gpu{Device: sdk.Device{Kind: sdk.DeviceGPU, Health: sdk.HealthUnknown, Attributes: a}, handle: h}
	if f.bdf != "" {
		g.ID = "pci-" + f.bdf
		a.set("bus_id", f.bdf)
	}
	a.set("driver", f.driver)
	// What the driver's own files say holds without NVML too.
	minor := -1
	if f.bdf != "" {
		information := "/proc/driver/nvidia/gpus/" + f.bdf + "/information"
		model, _ := p.fs.Field(information, "Model")
		a.set("model", model)
		if uuid, ok := p.fs.Field(information, "GPU UUID"); ok && !strings.Contains(uuid, "?") {
			g.uuid = uuid
		}
		if n, ok := p.fs.Field(information, "Device Minor"); ok {
			minor = number(n)
		}
	}
	switch {
	case h != nil: // its driver drives it, whatever /sys shows of that
	case f.driver == "":
		g.Reason = "no driver is bound to it: install NVIDIA's driver for this kernel"
	case f.driver != "nvidia":
		g.Reason = "it is bound to the driver " + f.driver + ", not to NVIDIA's"
	case err != nil:
		g.Reason = clip("NVIDIA's driver is bound to it, but " + err.Error())
	default:
		g.Health = sdk.HealthUnhealthy
		g.Reason = "NVIDIA's driver is bound to it but does not list it: it may have fallen off the bus, see the kernel's log for NVRM and Xid"
	}
	if h == nil {
		a.set("uuid", g.uuid)
		return []gpu{g}
	}

	describe(a, h, system)
	g.driver = system["driver_version"]
	if uuid, err := h.UUID(); err == nil {
		g.uuid = uuid
	}
	a.set("uuid", g.uuid)
	if g.ID == "" {
		g.ID = g.uuid
	}
	if n, err := h.Minor(); err == nil {
		minor = n
	}
	g.Health = sdk.HealthHealthy
	if err := h.Check(); err != nil {
		g.Health, g.Reason = sdk.HealthUnhealthy, clip(err.Error())
	}
	g.ready(p.fs, minor)

	on, instances, err := h.MIG()
	if err != nil || !on {
		return []gpu{g}
	}
	a["mig"] = "enabled"
	all := []gpu{g}
	for _, i := range instances {
		if inst, ok := p.instance(g, i, minor, system); ok {
			all = append(all, inst)
		}
	}
	if g.Ready {
		all[0].Ready, all[0].Reason = false, fmt.Sprintf("it is divided by MIG, into %d instances now: ask for one of those", len(all)-1)
	}
	return all
}

// describe adds what NVML tells of a GPU or an instance.
func describe(a attributes, h GPU, system attributes) {
	for k, v := range system {
		a[k] = v
	}
	if name, err := h.Name(); err == nil {
		a.set("model", name)
	}
	// None in total is memory shared with the CPUs (HARDWARE 1, NVTOP).
	if _, total, err := h.Memory(); err == nil && total > 0 {
		a.setf("memory_mib", "%d", total>>20)
	}
	if major, minor, err := h.ComputeCapability(); err == nil && major > 0 {
		a.setf("compute_capability", "%d.%d", major, minor)
	}
}

// ready sets the nodes of a card and says what is missing.
func (g *gpu) ready(fs sysfs.FS, minor int) {
	if minor < 0 {
		g.Reason = first(g.Reason, "the driver does not say which node it has")
		return
	}
	own := fmt.Sprintf("%s%d", nodePrefix, minor)
	g.own = []string{own}
	for _, name := range []string{own, "/dev/nvidiactl", "/dev/nvidia-uvm"} {
		n, ok := fs.Node(name)
		if !ok {
			g.Reason = first(g.Reason, "the node "+name+" is missing: run nvidia-ctk system create-device-nodes --control-devices --load-kernel-modules, or nvidia-smi, as root")
			return
		}
		g.nodes = append(g.nodes, n)
	}
	for _, name := range []string{"/dev/nvidia-uvm-tools", "/dev/nvidia-modeset"} {
		if n, ok := fs.Node(name); ok {
			g.nodes = append(g.nodes, n)
		}
	}
	g.Ready = true
}

var profile = regexp.MustCompile(`\bMIG (\d+c\.)?(\d+g\.[0-9a-z.+]+)`)

// instance describes one part of a divided GPU.
func (p *Plugin) instance(parent gpu, h GPU, minor int, system attributes) (gpu, bool) {
	gi, ci, err := h.Instance()
	if err != nil {
		return gpu{}, false
	}
	a := attributes{"vendor": "nvidia"}
	describe(a, h, system)
	for _, k := range []string{"bus_id", "driver"} {
		a.set(k, parent.Attributes[k])
	}
	if a["compute_capability"] == "" {
		a.set("compute_capability", parent.Attributes["compute_capability"])
	}
	g := gpu{handle: h, driver: parent.driver, Device: sdk.Device{
		ID: fmt.Sprintf("%s/gi%d/ci%d", parent.ID, gi, ci), Kind: sdk.DeviceGPU, Health: parent.Health, Reason: parent.Reason, Attributes: a,
	}}
	if uuid, err := h.UUID(); err == nil {
		g.uuid = uuid
	}
	a.set("uuid", g.uuid)
	a.set("parent", parent.ID)
	a.setf("gpu_instance", "%d", gi)
	a.setf("compute_instance", "%d", ci)
	if m := profile.FindStringSubmatch(a["model"]); m != nil {
		a.set("mig_profile", m[1]+m[2])
	}
	if !parent.Ready {
		return g, true
	}
	g.nodes, g.own = append(g.nodes, parent.nodes...), append(g.own, parent.own...)
	for _, access := range []string{fmt.Sprintf("gpu%d/gi%d/access", minor, gi), fmt.Sprintf("gpu%d/gi%d/ci%d/access", minor, gi, ci)} {
		n, ok := capability(p.fs, access)
		if !ok {
			g.Reason = first(g.Reason, "the node of its capability "+access+" is missing below /dev/nvidia-caps: run nvidia-modprobe, or nvidia-smi, as root")
			return g, true
		}
		g.nodes, g.own = append(g.nodes, n), append(g.own, n.Path)
	}
	g.Ready = true
	return g, true
}

// capability finds the node that stands for the right to use a part of a
// GPU; the driver tells its number in lines "gpu0/gi0/access 3" (CTK).
func capability(fs sysfs.FS, access string) (sysfs.Node, bool) {
	for _, line := range fs.Lines("/proc/driver/nvidia-caps/mig-minors") {
		if name, minor, ok := strings.Cut(line, " "); ok && name == access {
			return fs.Node("/dev/nvidia-caps/nvidia-cap" + strings.TrimSpace(minor))
		}
	}
	return sysfs.Node{}, false
}

// normalBDF makes NVML's "00000000:06:00.0" the kernel's "0000:06:00.0".
func normalBDF(bus string) string {
	bus = strings.ToLower(bus)
	if domain, rest, ok := strings.Cut(bus, ":"); ok && len(domain) == 8 && strings.HasPrefix(domain, "0000") {
		return domain[4:] + ":" + rest
	}
	return bus
}

func number(s string) int {
	n := -1
	if _, err := fmt.Sscanf(s, "%d", &n); err != nil {
		return -1
	}
	return n
}

func first(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func clip(s string) string {
	if len(s) > sdk.MaxDeviceText {
		s = s[:sdk.MaxDeviceText]
	}
	return s
}
