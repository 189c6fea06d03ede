package edgetpu

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sysfs"
)

// Ids of a Coral on USB (HARDWARE 3.2, EDG): as it is powered on, and once the
// first program to use it has loaded its firmware.
const (
	freshVendor, freshProduct = 0x1a6e, 0x089a
	usedVendor, usedProduct   = 0x18d1, 0x9302
	usbMajor                  = 189
)

// usbNodes is given whole to a container with a Coral on USB, and the right to
// use every USB device: the library that drives it loads the firmware each time
// it opens it, after which it is a new device with a new node. One node, that
// of before, would be that of a device that is gone.
const usbNodes = "/dev/bus/usb"

func findUSB(fs sysfs.FS) []tpu {
	var found []tpu
	for _, name := range fs.List("/sys/bus/usb/devices") {
		// "1-1.4" is a device, "1-1.4:1.0" an interface of one, "usb1" a root hub.
		if !strings.Contains(name, "-") || strings.Contains(name, ":") {
			continue
		}
		dir := "/sys/bus/usb/devices/" + name
		vendor, ok := fs.Hex(dir + "/idVendor")
		if !ok || vendor != freshVendor && vendor != usedVendor {
			continue
		}
		product, ok := fs.Hex(dir + "/idProduct")
		fresh := vendor == freshVendor && product == freshProduct
		if !ok || !fresh && (vendor != usedVendor || product != usedProduct) {
			continue
		}
		found = append(found, usb(fs, dir, name, fresh))
	}
	tellApart(fs, found)
	return found
}

func usb(fs sysfs.FS, dir, name string, fresh bool) tpu {
	a := attributes{"vendor": "google", "model": "Coral USB Accelerator", "bus": "usb", "bus_id": name, "firmware": "loaded"}
	if fresh {
		a["firmware"] = "not loaded"
	}
	t := tpu{Device: sdk.Device{ID: usbID(fs, dir, name), Kind: sdk.DeviceTPU, Health: sdk.HealthUnknown, Attributes: a}}
	serial, ok := fs.String(dir + "/serial")
	a.set("serial", serial, ok)
	speed, ok := fs.String(dir + "/speed")
	a.set("usb_speed_mbps", speed, ok)

	bus, ok1 := fs.Int(dir + "/busnum")
	dev, ok2 := fs.Int(dir + "/devnum")
	if allowed, ok := fs.Int(dir + "/authorized"); ok && allowed == 0 {
		t.Reason = "the kernel is told not to use it (authorized is 0)"
		return t
	}
	if !ok1 || !ok2 {
		t.Reason = "the kernel does not say which node it has: is it being unplugged?"
		return t
	}
	node, ok := fs.Node(fmt.Sprintf("/dev/bus/usb/%03d/%03d", bus, dev))
	major, minor, told := fs.Numbers(dir + "/dev")
	if !ok || node.Type != 'c' || node.Major != usbMajor || told && (node.Major != major || node.Minor != minor) {
		t.Reason = fmt.Sprintf("the node /dev/bus/usb/%03d/%03d is missing or another device's", bus, dev)
		return t
	}
	t.node, t.Ready = node, true
	return t
}

// usbID names the port: the controller's place and the ports on the way. The
// number of the bus is left out: it is that of the order in which controllers
// were found, and a device changes from the bus of USB 2 to that of USB 3 of
// one controller as it changes speed.
func usbID(fs sysfs.FS, dir, name string) string {
	_, ports, _ := strings.Cut(name, "-")
	real, err := fs.Real(dir)
	if err != nil {
		return "usb-" + name
	}
	// .../pci0000:00/0000:00:14.0/usb1/1-1/1-1.4
	parts := strings.Split(path.Dir(real), "/")
	hub := slices.IndexFunc(parts, func(s string) bool { return strings.HasPrefix(s, "usb") && len(s) > 3 && s[3] >= '0' && s[3] <= '9' })
	// On boards the driver makes a device of its own below the controller,
	// numbered in the order of their probing: what is above has the address.
	controller := hub - 1
	for controller > 0 && strings.HasPrefix(parts[controller], "xhci-hcd.") {
		controller--
	}
	if controller < 1 {
		return "usb-" + name
	}
	return "usb-" + parts[controller] + "-" + ports
}

// tellApart names those on port N of the USB 2 bus of a controller that has
// another Coral on port N of its USB 3 bus: rare, but on some controllers
// these are not the same socket.
func tellApart(fs sysfs.FS, found []tpu) {
	for i := range found {
		for j := range found {
			if i != j && found[i].ID == found[j].ID {
				slower := i
				if a, b := busSpeed(fs, found[i]), busSpeed(fs, found[j]); a > b || a == b && i < j {
					slower = j
				}
				found[slower].ID += "-usb2"
			}
		}
	}
}

func busSpeed(fs sysfs.FS, t tpu) int64 {
	bus, _, _ := strings.Cut(t.Attributes["bus_id"], "-")
	n, _ := fs.Int("/sys/bus/usb/devices/usb" + bus + "/speed")
	return n
}
