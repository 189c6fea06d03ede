// Package nvidia is the device plugin for NVIDIA GPUs: cards, instances of
// divided cards (MIG), and the GPUs inside Jetsons. What the kernel says is
// read below a root path; what only the driver knows comes from NVML, through
// an interface, so that everything but the link to the library itself builds
// and is tested without cgo. It runs on any device: without a GPU it finds
// none, without a driver it lists what is there and why it is of no use.
//
// A GPU is named by its place on the bus. Its UUID, which is an attribute, is
// known only once the driver runs: a device that is named by it would have one
// name in the first seconds after a boot and another one after.
package nvidia

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/sysfs"
)

// Name of the plugin.
const Name = "nvidia"

type config struct {
	Root string        `json:"root" help:"read /sys, /proc and /dev below this directory (recorded trees); NVML is then not used" default:"/"`
	Scan time.Duration `json:"scan" help:"how often to look for changes" default:"3s" min:"0.1" max:"4"`
	CDI  bool          `json:"cdi" help:"use the CDI specs of NVIDIA's toolkit where they name a GPU" default:"true"`
}

// Plugin implements sdk.DevicePlugin.
type Plugin struct {
	version string
	library func(recorded bool) Library
	fs      sysfs.FS
	scan    time.Duration
	cdi     bool

	// turn is held while NVML is used. A channel, for a GPU that hangs must
	// not keep a caller past the end of its context.
	turn chan struct{}
	nvml session
}

var (
	_ sdk.DevicePlugin = (*Plugin)(nil)
	_ sdk.Configurable = (*Plugin)(nil)
	_ sdk.Devices      = (*Plugin)(nil)
)

// New makes the plugin. library makes its NVML: recorded says that it reads a
// tree of another machine, which this machine's NVML knows nothing of.
func New(version string, library func(recorded bool) Library) *Plugin {
	return &Plugin{version: version, library: library, turn: make(chan struct{}, 1)}
}

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
	p.fs, p.scan, p.cdi = sysfs.New(o.Root), o.Scan, o.CDI
	p.nvml.library = p.library(p.fs.Recorded())
	return nil
}

// Devices implements sdk.DevicePlugin.
func (p *Plugin) Devices() sdk.Devices { return p }

// gpu is a GPU or instance as it was found a moment ago.
type gpu struct {
	sdk.Device
	handle GPU // nil when NVML does not list it
	uuid   string
	driver string       // its version
	nodes  []sysfs.Node // that a container must have
	own    []string     // paths of those of nodes that are this device's alone
	tegra  bool         // inside a Jetson
}

// inTurn runs f while nobody else uses NVML.
func (p *Plugin) inTurn(ctx context.Context, f func()) error {
	select {
	case p.turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-p.turn }()
	f()
	return nil
}

// Watch implements sdk.Devices. It polls.
func (p *Plugin) Watch(ctx context.Context, f func([]sdk.Device)) error {
	tick := time.NewTicker(p.scan)
	defer tick.Stop()
	var told []sdk.Device
	for first := true; ; first = false {
		var found []gpu
		if err := p.inTurn(ctx, func() { found = p.find() }); err != nil {
			return nil
		}
		if first || !slices.EqualFunc(found, told, func(g gpu, d sdk.Device) bool { return same(g.Device, d) }) {
			told = told[:0]
			now := make([]sdk.Device, 0, len(found))
			for _, g := range found {
				told = append(told, g.Device)
				g.Attributes = maps.Clone(g.Attributes)
				now = append(now, g.Device)
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
func choose(op string, found []gpu, ids []string) ([]gpu, error) {
	chosen := make([]gpu, 0, len(ids))
	for _, id := range ids {
		i := slices.IndexFunc(found, func(g gpu) bool { return g.ID == id })
		if i >= 0 {
			chosen = append(chosen, found[i])
			continue
		}
		// Instances are known once the driver of their GPU runs.
		parent, _, instance := strings.Cut(id, "/")
		if i := slices.IndexFunc(found, func(g gpu) bool { return g.ID == parent }); instance && i >= 0 && found[i].handle == nil {
			return nil, sdk.Errorf(sdk.Unavailable, op, "instance %s is not known yet: %s", id, found[i].Reason)
		}
		return nil, sdk.Errorf(sdk.NotFound, op, "there is no GPU %s", id).WithHint("is it plugged in where it was, and divided as it was?")
	}
	return chosen, nil
}

// Edits implements sdk.Devices.
func (p *Plugin) Edits(ctx context.Context, ids []string) (sdk.Edits, error) {
	const op = "give GPUs to a container"
	var found []gpu
	if err := p.inTurn(ctx, func() { found = p.find() }); err != nil {
		return sdk.Edits{}, err
	}
	chosen, err := choose(op, found, ids)
	if err != nil {
		return sdk.Edits{}, err
	}
	for _, g := range chosen {
		if !g.Ready {
			return sdk.Edits{}, sdk.Errorf(sdk.Unavailable, op, "%s is not ready: %s", g.ID, g.Reason)
		}
	}
	return p.edits(chosen), nil
}

// Stats implements sdk.Devices. What NVML does not tell of a device is absent.
func (p *Plugin) Stats(ctx context.Context, ids []string) ([]sdk.DeviceStats, error) {
	var stats []sdk.DeviceStats
	var err error
	if e := p.inTurn(ctx, func() {
		chosen := p.find()
		if len(ids) > 0 {
			if chosen, err = choose("measure GPUs", chosen, ids); err != nil {
				return
			}
		}
		for _, g := range chosen {
			if s, told := p.measure(g); told {
				stats = append(stats, s)
			}
		}
	}); e != nil {
		return nil, e
	}
	return stats, err
}

func (p *Plugin) measure(g gpu) (sdk.DeviceStats, bool) {
	s := sdk.DeviceStats{ID: g.ID}
	if g.handle != nil {
		measure(&s, g.handle)
	}
	if g.tegra {
		p.measureTegra(&s)
	}
	return s, s.UtilizationPercent != nil || s.MemoryTotalBytes != nil || s.MemoryUsedBytes != nil || s.TemperatureCelsius != nil || s.PowerWatts != nil
}

// measure asks NVML, one thing at a time: each may be unsupported on its own.
func measure(s *sdk.DeviceStats, h GPU) {
	if percent, err := h.Utilization(); err == nil && percent >= 0 && percent <= 100 {
		s.UtilizationPercent = new(float64(percent))
	}
	if used, total, err := h.Memory(); err == nil && total > 0 { // 0: shares the board's (HARDWARE 1)
		s.MemoryUsedBytes, s.MemoryTotalBytes = &used, &total
	}
	if celsius, err := h.Temperature(); err == nil {
		s.TemperatureCelsius = new(float64(celsius))
	}
	if milliwatts, err := h.Power(); err == nil {
		s.PowerWatts = new(float64(milliwatts) / 1000)
	}
}

// attributes leaves out what is not told, and what is too long to be true.
type attributes map[string]string

func (a attributes) set(name, value string) {
	if value != "" && len(value) <= sdk.MaxDeviceText {
		a[name] = value
	}
}

func (a attributes) setf(name, format string, args ...any) { a.set(name, fmt.Sprintf(format, args...)) }
