package edgetpu

import (
	"path"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sysfs"
)

// Facts of the gasket driver (HARDWARE 3.2, GAS).
const (
	pciVendor  = 0x1ac1
	pciProduct = 0x089a
	apexMajor  = 120
)

// findPCIe finds the chips on PCIe; a card with two is two devices.
func findPCIe(fs sysfs.FS) []tpu {
	var found []tpu
	for _, bdf := range fs.List("/sys/bus/pci/devices") {
		dir := "/sys/bus/pci/devices/" + bdf
		if vendor, ok := fs.Hex(dir + "/vendor"); !ok || vendor != pciVendor {
			continue
		}
		if product, ok := fs.Hex(dir + "/device"); !ok || product != pciProduct {
			continue
		}
		found = append(found, pcie(fs, dir, bdf))
	}
	return found
}

func pcie(fs sysfs.FS, dir, bdf string) tpu {
	a := attributes{"vendor": "google", "model": "Coral Edge TPU", "bus": "pcie", "bus_id": bdf}
	t := tpu{Device: sdk.Device{ID: "pci-" + bdf, Kind: sdk.DeviceTPU, Health: sdk.HealthUnknown, Attributes: a}}
	driver, bound := fs.LinkBase(dir + "/driver")
	a.set("driver", driver, bound)
	t.class = apexClass(fs, dir, bdf)
	switch {
	case !bound:
		t.Reason = "no driver is bound to it: install the gasket and apex modules for this kernel"
		return t
	case t.class == "":
		t.Reason = "its driver " + driver + " is not apex, or has not set it up: see the kernel's log"
		return t
	}
	for attribute, file := range map[string]string{
		"unique_id": "unique_id", "driver_version": "driver_version", "framework_version": "framework_version",
	} {
		s, ok := fs.String(t.class + "/" + file)
		a.set(attribute, s, ok)
	}
	trip, ok := fs.Int(t.class + "/trip_point0_temp")
	a.setInt("trip_point_millicelsius", trip, ok)

	node, there := apexNode(fs, t.class)
	status, told := fs.String(t.class + "/status")
	switch {
	case !there:
		t.Reason = "the node /dev/" + path.Base(t.class) + " is missing: is udev running?"
	default:
		t.node, t.Ready = node, true
	}
	switch {
	case !told:
	case status == "ALIVE":
		t.Health = sdk.HealthHealthy
	default: // DEAD, LAMED
		t.Health = sdk.HealthUnhealthy
		t.Reason = "the driver says it is " + clip(status) + ": reset it or power the device off and on"
		// A dead chip answers no program that opens it.
		t.Ready = t.Ready && status != "DEAD"
	}
	return t
}

// apexClass finds the class directory of a PCI device. The number in its name
// is that of the order in which chips were found.
func apexClass(fs sysfs.FS, dir, bdf string) string {
	for _, name := range fs.List(dir + "/apex") {
		return "/sys/class/apex/" + name
	}
	// The driver also says which chip is which.
	for _, class := range fs.Glob("/sys/class/apex/*") {
		if address, ok := fs.String(class + "/pci_address"); ok && address == bdf {
			return class
		}
	}
	return ""
}

// apexNode is the node, if it is that of this chip: a file left over from a
// driver loaded before is not.
func apexNode(fs sysfs.FS, class string) (sysfs.Node, bool) {
	n, ok := fs.Node("/dev/" + path.Base(class))
	if !ok || n.Type != 'c' {
		return sysfs.Node{}, false
	}
	if major, minor, told := fs.Numbers(class + "/dev"); told {
		return n, n.Major == major && n.Minor == minor
	}
	return n, n.Major == apexMajor
}

func clip(s string) string {
	if len(s) > 40 {
		s = s[:40]
	}
	return s
}
