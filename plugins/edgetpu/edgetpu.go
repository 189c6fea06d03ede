// Package edgetpu is the device plugin for Google Coral Edge TPUs, on PCIe
// (M.2 and mini PCIe cards, one or two chips each) and on USB. It only reads:
// sysfs, and the attributes of device nodes.
//
// A Coral is named by where it is plugged in, because nothing else holds all
// the time: a chip on PCIe tells its unique id only while its driver is bound,
// and one on USB tells no serial number and is another device, by its ids and
// its node, after its first use.
package edgetpu

import (
	"context"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sysfs"
)

// Name of the plugin.
const Name = "edgetpu"

type config struct {
	Root string        `json:"root" help:"read /sys and /dev below this directory (recorded trees)" default:"/"`
	Scan time.Duration `json:"scan" help:"how often to look for changes" default:"2s" min:"0.1" max:"4"`
}

// Plugin implements sdk.DevicePlugin.
type Plugin struct {
	version string
	fs      sysfs.FS
	scan    time.Duration
}

var (
	_ sdk.DevicePlugin = (*Plugin)(nil)
	_ sdk.Configurable = (*Plugin)(nil)
	_ sdk.Devices      = (*Plugin)(nil)
)

// New makes the plugin.
func New(version string) *Plugin { return &Plugin{version: version} }

// Info implements sdk.Plugin.
func (p *Plugin) Info() sdk.Info {
	return sdk.Info{Name: Name, Version: p.version, Kinds: []sdk.Kind{sdk.KindDevice}}
}

// Options implements sdk.Configurable.
func (p *Plugin) Options() []sdk.Option { return sdk.OptionsOf(config{}) }

// Configure implements sdk.Plugin.
func (p *Plugin) Configure(_ context.Context, c sdk.Config) error {
	var o config
	if err := sdk.DecodeConfig(c, &o); err != nil {
		return err
	}
	p.fs, p.scan = sysfs.New(o.Root), o.Scan
	return nil
}

// Devices implements sdk.DevicePlugin.
func (p *Plugin) Devices() sdk.Devices { return p }

// tpu is a Coral as it was found a moment ago.
type tpu struct {
	sdk.Device
	node  sysfs.Node
	class string // "/sys/class/apex/apex_0"; "" without one
}

// find looks at everything anew: nothing is kept between calls.
func (p *Plugin) find() []tpu {
	found := append(findPCIe(p.fs), findUSB(p.fs)...)
	if len(found) > sdk.MaxDevices {
		found = found[:sdk.MaxDevices]
	}
	return found
}

// Watch implements sdk.Devices. It polls: a scan opens one file for each PCI
// and USB device, and what the kernel announces of Corals comes before their
// nodes have their group.
func (p *Plugin) Watch(ctx context.Context, f func([]sdk.Device)) error {
	tick := time.NewTicker(p.scan)
	defer tick.Stop()
	var told []sdk.Device
	for first := true; ; first = false {
		found := p.find()
		if first || !slices.EqualFunc(found, told, func(t tpu, d sdk.Device) bool { return same(t.Device, d) }) {
			told = told[:0]
			now := make([]sdk.Device, 0, len(found))
			for _, t := range found {
				told = append(told, t.Device)
				t.Attributes = maps.Clone(t.Attributes)
				now = append(now, t.Device)
			}
			f(now)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func same(a, b sdk.Device) bool {
	return a.ID == b.ID && a.Kind == b.Kind && a.Ready == b.Ready && a.Health == b.Health && a.Reason == b.Reason &&
		a.Shares == b.Shares && maps.Equal(a.Attributes, b.Attributes)
}

// choose finds the devices with these ids.
func (p *Plugin) choose(op string, ids []string) ([]tpu, error) {
	found := p.find()
	chosen := make([]tpu, 0, len(ids))
	for _, id := range ids {
		i := slices.IndexFunc(found, func(t tpu) bool { return t.ID == id })
		if i < 0 {
			return nil, sdk.Errorf(sdk.NotFound, op, "there is no Edge TPU %s", id).WithHint("is it plugged in where it was?")
		}
		chosen = append(chosen, found[i])
	}
	return chosen, nil
}

// Edits implements sdk.Devices: the nodes of this moment.
func (p *Plugin) Edits(_ context.Context, ids []string) (sdk.Edits, error) {
	const op = "give Edge TPUs to a container"
	chosen, err := p.choose(op, ids)
	if err != nil {
		return sdk.Edits{}, err
	}
	var e sdk.Edits
	for _, t := range chosen {
		if !t.Ready {
			return sdk.Edits{}, sdk.Errorf(sdk.Unavailable, op, "%s is not ready: %s", t.ID, t.Reason)
		}
		if gid, ok := t.node.Group(); ok && !slices.Contains(e.AdditionalGIDs, gid) {
			e.AdditionalGIDs = append(e.AdditionalGIDs, gid)
		}
		if t.node.Major == usbMajor {
			// One bind and one rule, however many there are.
			if len(e.DeviceRules) == 0 {
				e.Mounts = append(e.Mounts, sdk.Mount{Type: "bind", Source: usbNodes, Target: usbNodes, ReadOnly: true})
				e.DeviceRules = append(e.DeviceRules, sdk.DeviceRule{Type: "c", Major: usbMajor, Permissions: "rw"})
			}
			continue
		}
		if !slices.ContainsFunc(e.Devices, func(d sdk.HostDevice) bool { return d.HostPath == t.node.Path }) {
			e.Devices = append(e.Devices, sdk.HostDevice{HostPath: t.node.Path, Permissions: "rw"})
		}
	}
	return e, nil
}

// Stats implements sdk.Devices. Corals tell no more than their temperature,
// and those on USB not even that.
func (p *Plugin) Stats(_ context.Context, ids []string) ([]sdk.DeviceStats, error) {
	chosen := p.find()
	if len(ids) > 0 {
		var err error
		if chosen, err = p.choose("measure Edge TPUs", ids); err != nil {
			return nil, err
		}
	}
	var stats []sdk.DeviceStats
	for _, t := range chosen {
		if milli, ok := p.fs.Int(t.class + "/temp"); ok && t.class != "" {
			celsius := float64(milli) / 1000
			stats = append(stats, sdk.DeviceStats{ID: t.ID, TemperatureCelsius: &celsius})
		}
	}
	return stats, nil
}

// attributes leaves out what is not told, and what is too long to be true.
type attributes map[string]string

func (a attributes) set(name, value string, told bool) {
	if told && value != "" && len(value) <= sdk.MaxDeviceText {
		a[name] = value
	}
}

func (a attributes) setInt(name string, value int64, told bool) {
	a.set(name, strconv.FormatInt(value, 10), told)
}
