package sdk

import (
	"context"
	"fmt"
	"strings"
	"time"
)

// DevicePlugin is a Plugin of kind device. Devices is asked once, before
// Configure; its calls come after.
type DevicePlugin interface {
	Plugin
	Devices() Devices
}

// Devices finds accelerators, cameras, serial ports and the like, and says
// what a container needs to use them. It holds no state: the control plane
// counts, the agent chooses which container gets which and remembers it.
//
// Every call may be made at the same time as every other, again after an
// error, and by a new process that never saw the Watch of the one before.
type Devices interface {
	// Watch calls f with everything that is there, at once and again whenever
	// it changed, until ctx ends, which is no error. It calls from one
	// goroutine; f is quick and keeps what it is given, so every call gets its
	// own slice and maps. A device that appears or goes away is expected to be
	// reported within five seconds. Nothing found is an empty inventory, not
	// an error; a driver that is not installed is not one either. Errors end
	// the watch and are shown to the operator; the agent tries again.
	Watch(ctx context.Context, f func([]Device)) error

	// Edits says what a container must be given to use exactly these devices
	// and no other. Asked after the agent recorded that the container has
	// them, before every start of it, so paths and numbers are those of now
	// even when they changed since. Errors: NotFound (no such device),
	// Unavailable (it is not ready; the agent tries again).
	Edits(ctx context.Context, ids []string) (Edits, error)

	// Stats measures devices, in any order; one that cannot be measured is
	// left out. No ids means all. Errors: NotFound, Unsupported.
	Stats(ctx context.Context, ids []string) ([]DeviceStats, error)
}

// Limits of an inventory. The agent takes no inventory that breaks them.
const (
	MaxDevices          = 256 // of one plugin
	MaxDeviceAttributes = 64
	MaxDeviceText       = 256 // bytes of an id, a reason, an attribute's name or value
)

// Kinds of device with a common meaning. A plugin may use others of the form
// [a-z][a-z0-9-]{0,31}.
const (
	DeviceGPU    = "gpu"
	DeviceNPU    = "npu"
	DeviceTPU    = "tpu"
	DeviceVPU    = "vpu"
	DeviceCamera = "camera"
	DeviceSerial = "serial"
)

// Health of a device.
type Health string

// The healths. A device is given to containers unless it is unhealthy.
const (
	HealthHealthy   Health = "healthy"
	HealthUnhealthy Health = "unhealthy"
	HealthUnknown   Health = "unknown" // the hardware does not tell
)

// Device is one thing a container may ask for.
type Device struct {
	// ID is the same across reboots, re-plugging into the same place and
	// renumbering: a serial number, a UUID, else the bus address. Unique
	// within the plugin. Node names such as "apex_0" are none.
	ID   string
	Kind string // DeviceGPU, DeviceTPU, ...
	// Ready means a container could use it now: its driver is bound and its
	// nodes are there. A device that is merely present is listed, not ready,
	// with the reason.
	Ready  bool
	Health Health // "" is HealthUnknown
	Reason string // why it is not ready or not healthy, for a person
	// Shares is how many containers may have it at a time; 0 is 1, exclusive.
	Shares int
	// Attributes are facts for placement: "vendor", "model", "memory_mib",
	// "driver_version", "bus_id", ... A fact the device does not tell is
	// absent, never guessed. Names are [a-z][a-z0-9_.]*.
	Attributes map[string]string
}

// Edits is what a container is given with its devices.
type Edits struct {
	Devices        []HostDevice
	Mounts         []Mount
	Env            []string // NAME=value
	CDIDevices     []string // fully qualified: "nvidia.com/gpu=0"
	Hooks          []Hook
	AdditionalGIDs []uint32 // groups that may open the nodes
	// DeviceRules are for nodes that only come while the container runs, in a
	// directory that is mounted. They give more than the device asked for:
	// for hardware that leaves no choice.
	DeviceRules []DeviceRule
}

// DeviceRule lets a container use every node of one major number that it can
// see, those that are not there yet too.
type DeviceRule struct {
	Type        string // "c" or "b"
	Major       uint32
	Permissions string // subset of "rwm"; "": all
}

// Hook is a program run at a point of a container's life, in the words of the
// OCI runtime specification.
type Hook struct {
	Point   string // "createRuntime", "createContainer", "startContainer", "poststart" or "poststop"
	Path    string // absolute
	Args    []string
	Env     []string
	Timeout time.Duration // 0: none
}

// DeviceStats measures one device. What it does not tell is nil.
type DeviceStats struct {
	ID                 string
	UtilizationPercent *float64 // 0..100
	MemoryUsedBytes    *uint64
	MemoryTotalBytes   *uint64
	TemperatureCelsius *float64
	PowerWatts         *float64
}

const lower = "abcdefghijklmnopqrstuvwxyz"

// startsLower tells whether s is one of a-z and then only these or what is in
// more. A regular expression would be compiled, and kept, in every plugin.
func startsLower(s, more string) bool {
	return s != "" && strings.Contains(lower, s[:1]) && strings.Trim(s, lower+more) == ""
}

// CheckInventory says what of an inventory breaks the contract; an error of
// kind Invalid. The agent refuses such an inventory whole and keeps the one
// before.
func CheckInventory(devices []Device) error {
	invalid := func(format string, args ...any) error {
		return Errorf(Invalid, "read the inventory", "%s", fmt.Sprintf(format, args...)).WithHint("this is a defect of the plugin")
	}
	if len(devices) > MaxDevices {
		return invalid("it has %d devices, at most %d are allowed", len(devices), MaxDevices)
	}
	seen := make(map[string]bool, len(devices))
	for _, d := range devices {
		switch {
		case d.ID == "" || len(d.ID) > MaxDeviceText:
			return invalid("device id %.40q has %d bytes, want 1 to %d", d.ID, len(d.ID), MaxDeviceText)
		case seen[d.ID]:
			return invalid("two devices have the id %q", d.ID)
		case !startsLower(d.Kind, "0123456789-") || len(d.Kind) > 32:
			return invalid("device %q is of kind %.40q, want a-z, then at most 31 of a-z, 0-9 and -", d.ID, d.Kind)
		case d.Health != "" && d.Health != HealthHealthy && d.Health != HealthUnhealthy && d.Health != HealthUnknown:
			return invalid("device %q has health %.40q, want %s, %s or %s", d.ID, d.Health, HealthHealthy, HealthUnhealthy, HealthUnknown)
		case d.Shares < 0:
			return invalid("device %q has %d shares", d.ID, d.Shares)
		case !d.Ready && d.Reason == "":
			return invalid("device %q is not ready and gives no reason", d.ID)
		case len(d.Reason) > MaxDeviceText:
			return invalid("device %q gives a reason of %d bytes, at most %d are allowed", d.ID, len(d.Reason), MaxDeviceText)
		case len(d.Attributes) > MaxDeviceAttributes:
			return invalid("device %q has %d attributes, at most %d are allowed", d.ID, len(d.Attributes), MaxDeviceAttributes)
		}
		seen[d.ID] = true
		for name, value := range d.Attributes {
			if !startsLower(name, "0123456789_.") || len(name) > MaxDeviceText || len(value) > MaxDeviceText {
				return invalid("device %q has the attribute %.40q of %d bytes: want a name of a-z, 0-9, _ and . and at most %d bytes", d.ID, name, len(value), MaxDeviceText)
			}
		}
	}
	return nil
}
