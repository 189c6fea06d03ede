package system

import (
	"regexp"
	"slices"
	"strings"
)

// board sets the attributes that say what hardware this is:
//
//	belay.board           stable name: first "compatible" of the device tree, or DMI product
//	belay.board.model     for people; changes between firmware releases
//	belay.board.family    jetson, raspberry-pi, nuc
//	belay.board.module    Jetson: orin-nano, agx-xavier, ...
//	belay.board.soc       bcm2712, tegra234, ...
//	belay.board.revision  Raspberry Pi: revision code, hex
//	belay.l4t             Jetson: release of the board support package, 36.4.0
//	belay.jetpack         Jetson: the JetPack that release belongs to, where it is known
func (t tree) board(a attributes) {
	if t.jetson(a) || t.raspberryPi(a) {
		return
	}
	if c := t.compatible(); len(c) > 0 {
		a.set("belay.board", c[0])
		a.set("belay.board.model", t.deviceTree("model"))
		return
	}
	t.dmi(a)
}

// deviceTree reads one property. The kernel keeps the tree in sysfs;
// /proc/device-tree is a link to it (HARDWARE 7) that some containers hide.
func (t tree) deviceTree(property string) string {
	if v := t.read("sys/firmware/devicetree/base/" + property); v != "" {
		return v
	}
	return t.read("proc/device-tree/" + property)
}

// compatible lists the device tree's names of the board, most specific first.
func (t tree) compatible() []string {
	var list []string
	for _, s := range strings.Split(t.deviceTree("compatible"), "\x00") {
		if s = strings.TrimSpace(s); s != "" {
			list = append(list, s)
		}
	}
	return list
}

// jetsonModules maps module part numbers, and the names used before those, to
// the module and its SoC (HARDWARE 2.1, table). A name matches a whole part of
// a "compatible" element, parts being joined by "+", or that part up to a
// "-super" suffix; a number ending in "-" matches every variant of the module.
var jetsonModules = []struct {
	names       []string
	module, soc string
}{
	{[]string{"p3450-0000", "p3450-0002", "jetson-nano"}, "nano", "tegra210"},
	{[]string{"p3636-0001"}, "tx2-nx", "tegra186"},
	{[]string{"p2771-0000", "quill", "lightning", "storm"}, "tx2", "tegra186"},
	{[]string{"p2972-0000", "jetson-xavier", "jetson-xavier-industrial", "galen-industrial"}, "agx-xavier", "tegra194"},
	{[]string{"p3668-"}, "xavier-nx", "tegra194"},
	{[]string{"p3701-"}, "agx-orin", "tegra234"},
	{[]string{"p3767-0000", "p3767-0001"}, "orin-nx", "tegra234"},
	{[]string{"p3767-0003", "p3767-0004", "p3767-0005"}, "orin-nano", "tegra234"},
	{[]string{"p4071-0000", "p3834-", "p3971-"}, "agx-thor", "tegra264"},
}

// tegraChips maps the chip id, for carriers with names of their own (HARDWARE 2.1).
var tegraChips = map[string]string{"33": "tegra210", "24": "tegra186", "25": "tegra194", "35": "tegra234"}

var l4tLine = regexp.MustCompile(`^# R(\d+) \(release\), REVISION: ([\d.]+)`) // HARDWARE 2.1

// jetson recognises a Jetson the way NVIDIA's own tools do (HARDWARE 2.1): by
// its release file or the SoC's family, or by a device tree that names a module.
func (t tree) jetson(a attributes) bool {
	compatible := t.compatible()
	module, soc := jetsonModule(compatible)
	release := t.raw("etc/nv_tegra_release")
	family := strings.ToLower(t.read("sys/devices/soc0/family"))
	tegra := slices.ContainsFunc(compatible, func(s string) bool { return strings.HasPrefix(s, "nvidia,tegra") })
	if module == "" && release == nil && !tegra && !strings.HasPrefix(family, "tegra") {
		return false
	}
	if soc == "" {
		id := t.read("sys/module/tegra_fuse/parameters/tegra_chip_id")
		if id == "" {
			id = t.read("sys/devices/soc0/soc_id")
		}
		soc = tegraChips[id]
	}
	a.set("belay.board.family", "jetson")
	a.set("belay.board.module", module)
	a.set("belay.board.soc", soc)
	if len(compatible) > 0 {
		a.set("belay.board", compatible[0])
	}
	a.set("belay.board.model", t.deviceTree("model"))
	if m := l4tLine.FindSubmatch(release); m != nil {
		l4t := string(m[1]) + "." + strings.Trim(string(m[2]), ".")
		a.set("belay.l4t", l4t)
		a.set("belay.jetpack", jetpack(l4t))
	}
	return true
}

func jetsonModule(compatible []string) (module, soc string) {
	for _, element := range compatible {
		name, ok := strings.CutPrefix(element, "nvidia,")
		if !ok {
			continue
		}
		for _, part := range strings.Split(strings.TrimSuffix(name, "-super"), "+") {
			for _, m := range jetsonModules {
				for _, n := range m.names {
					if part == n || strings.HasSuffix(n, "-") && strings.HasPrefix(part, n) {
						return m.module, m.soc
					}
				}
			}
		}
	}
	return "", ""
}

// jetpacks maps releases to JetPack versions (HARDWARE 2.1); others are not
// told, and 38 is two JetPacks.
var jetpacks = map[string]string{
	"32.7.1": "4.6.1", "32.7.2": "4.6.2", "32.7.3": "4.6.3", "32.7.4": "4.6.4", "32.7.5": "4.6.5", "32.7.6": "4.6.6",
	"35.4.1": "5.1.2", "35.6.4": "5.1.6",
	"36.3": "6.0", "36.4": "6.1", "36.4.3": "6.2", "36.4.7": "6.2.1", "36.5": "6.2.2",
	"39.2": "7.2",
}

func jetpack(l4t string) string {
	if v, ok := jetpacks[l4t]; ok {
		return v
	}
	return jetpacks[strings.TrimSuffix(l4t, ".0")]
}

// raspberryPi recognises a Pi by its device tree (HARDWARE 3).
func (t tree) raspberryPi(a attributes) bool {
	compatible := t.compatible()
	i := slices.IndexFunc(compatible, func(s string) bool { return strings.HasPrefix(s, "raspberrypi,") })
	if i < 0 {
		return false
	}
	a.set("belay.board", compatible[i])
	a.set("belay.board.family", "raspberry-pi")
	a.set("belay.board.model", t.deviceTree("model"))
	for _, s := range compatible {
		if soc, ok := strings.CutPrefix(s, "brcm,"); ok {
			a.set("belay.board.soc", soc)
			break
		}
	}
	a.set("belay.board.revision", t.field("proc/cpuinfo", "Revision"))
	return true
}

// dmi reads what the firmware of a PC says (HARDWARE 7).
func (t tree) dmi(a attributes) {
	vendor, product := t.dmiField("sys_vendor"), t.dmiField("product_name")
	if product == "" {
		product = t.dmiField("board_name")
	}
	if product == "" {
		return
	}
	a.set("belay.board", product)
	a.set("belay.board.model", strings.TrimSpace(vendor+" "+product))
	// sys_vendor is "Intel(R) Client Systems", on older ones "Intel Corporation".
	if strings.HasPrefix(product, "NUC") && strings.HasPrefix(vendor, "Intel") {
		a.set("belay.board.family", "nuc")
	}
}

// dmiField reads a DMI string; the fillers that board makers leave count as empty.
func (t tree) dmiField(name string) string {
	v := t.read("sys/class/dmi/id/" + name)
	switch strings.ToLower(v) {
	case "default string", "to be filled by o.e.m.":
		return ""
	}
	return v
}
