package host

import (
	"cmp"
	"context"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/plugins/sdk"
)

// found is what a device plugin last told.
type found struct {
	told    bool         // at least once
	heard   bool         // by the process that runs now
	err     string       // why the watch ended, while it is not on again
	devices []sdk.Device // by id; replaced, never changed
}

// Inventory implements agent.Devices.
func (h *Host) Inventory() []agent.PluginDevices {
	var out []agent.PluginDevices
	for _, p := range h.all() {
		if d, ok := p.inventory(); ok {
			out = append(out, d)
		}
	}
	return out
}

func (p *plugin) inventory() (agent.PluginDevices, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := agent.PluginDevices{Plugin: p.name, Devices: p.found.devices}
	switch {
	case !p.found.told && !slices.Contains(p.st.Kinds, sdk.KindDevice):
		return d, false
	case p.device == nil:
		d.Error = "plugin " + p.name + " is " + string(p.st.State)
		if p.st.Error != "" {
			d.Error += ": " + p.st.Error
		}
	case p.found.err != "":
		d.Error = p.found.err
	case !p.found.heard:
		d.Error = "plugin " + p.name + " has not told its devices yet"
	default:
		d.Ready = true
	}
	return d, true
}

// DeviceChanges implements agent.Devices.
func (h *Host) DeviceChanges() <-chan struct{} { return h.devices }

func (h *Host) devicesChanged() {
	select {
	case h.devices <- struct{}{}:
	default:
	}
}

// Device implements agent.Devices.
func (h *Host) Device(name string) (sdk.Devices, error) {
	h.mu.Lock()
	p := h.plugins[name]
	h.mu.Unlock()
	if p == nil {
		return nil, sdk.Errorf(sdk.NotFound, "find device plugin "+name, "this device has no plugin of that name").
			WithHint("install it into " + h.config.Dir)
	}
	d := devices{p}
	if _, err := d.now(); err != nil {
		return nil, err
	}
	return d, nil
}

// readEvery bounds what a plugin that never stops telling costs the agent. It
// is more often than any honest one tells; past it, the plugin waits.
const readEvery = 5 * time.Millisecond

// told is what a watch brings: an inventory, or why it ended.
type told struct {
	devices []sdk.Device
	err     error
}

// followDevices watches the devices of the process that is up and keeps the
// latest inventory. The function it returns ends that and waits for the end.
func (p *plugin) followDevices(ctx context.Context) (stop func()) {
	p.mu.Lock()
	d := p.device
	p.mu.Unlock()
	if d == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	latest := make(chan told, 1)
	var wg sync.WaitGroup
	wg.Go(func() { p.watchDevices(ctx, d, latest) })
	wg.Go(func() { p.keepDevices(ctx, latest) })
	return func() { cancel(); wg.Wait() }
}

// devicesDeadline is more than the followers of devices ever pause.
const devicesDeadline = 3 * time.Minute

// watchDevices reads inventories as fast as they come and leaves the latest
// where keepDevices finds it: what is not the latest is of no use to anyone.
func (p *plugin) watchDevices(ctx context.Context, d sdk.Devices, latest chan told) {
	put := func(t told) {
		select {
		case <-latest:
		default:
		}
		latest <- t // room for sure: nobody else puts
	}
	// The wait for the plugin may take for ever: its process is pinged, and its
	// end ends the wait.
	busy, unwatch := p.host.mind("devices of "+p.name, devicesDeadline)
	defer unwatch()
	t := p.host.config.Timing
	for pause := t.WatchRetry; ; pause = min(2*pause, t.MaxBackoff) {
		begun, last := time.Now(), time.Time{}
		busy(false)
		err := d.Watch(ctx, func(devices []sdk.Device) {
			busy(true)
			defer busy(false)
			put(told{devices: devices})
			if wait := readEvery - time.Since(last); wait > 0 {
				select {
				case <-ctx.Done():
				case <-time.After(wait):
				}
			}
			last = time.Now()
		})
		busy(true)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			err = sdk.Errorf(sdk.Unavailable, "watch devices (plugin "+p.name+")", "the watch ended")
		}
		put(told{err: err})
		if time.Since(begun) > t.MaxBackoff {
			pause = t.WatchRetry
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// keepDevices takes over the first inventory at once and from then on no more
// than one in every Timing.Inventory.
func (p *plugin) keepDevices(ctx context.Context, latest <-chan told) {
	pulse, unwatch := p.host.watch("inventory of "+p.name, devicesDeadline)
	defer unwatch()
	for {
		select {
		case <-ctx.Done():
			return
		case <-pulse:
			continue
		case t := <-latest:
			if !p.keep(t) {
				continue
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(p.host.config.Timing.Inventory):
		}
	}
}

// keep takes over what was told; false when it says nothing new.
func (p *plugin) keep(t told) bool {
	p.mu.Lock()
	before := p.found
	if t.err != nil {
		p.found.err = t.err.Error()
	} else {
		slices.SortFunc(t.devices, func(a, b sdk.Device) int { return cmp.Compare(a.ID, b.ID) })
		p.found = found{told: true, heard: true, devices: t.devices}
		if before.told && reflect.DeepEqual(before.devices, t.devices) {
			p.found.devices = before.devices
		}
	}
	same := before.told == p.found.told && before.heard == p.found.heard && before.err == p.found.err &&
		(t.err != nil || reflect.DeepEqual(before.devices, t.devices))
	now := p.found
	p.mu.Unlock()
	if same {
		return false
	}
	switch {
	case now.err != "":
		p.host.log.Warn("the plugin's devices are not known for now", "plugin", p.name, "err", now.err)
	case before.err != "":
		p.host.log.Info("the plugin tells its devices again", "plugin", p.name)
	}
	if now.err != before.err {
		p.host.changed(p.name)
	}
	p.host.devicesChanged()
	return true
}

// devices is an sdk.Devices that goes to whatever process the plugin has now.
type devices struct{ p *plugin }

var (
	_ sdk.Devices   = devices{}
	_ agent.Devices = (*Host)(nil)
)

func (d devices) now() (sdk.Devices, error) {
	d.p.mu.Lock()
	defer d.p.mu.Unlock()
	if d.p.device != nil {
		return d.p.device, nil
	}
	return nil, d.p.away("device plugin", sdk.KindDevice)
}

// Watch implements sdk.Devices. It ends with the process.
func (d devices) Watch(ctx context.Context, f func([]sdk.Device)) error {
	now, err := d.now()
	if err != nil {
		return err
	}
	return now.Watch(ctx, f)
}

// Edits implements sdk.Devices.
func (d devices) Edits(ctx context.Context, ids []string) (sdk.Edits, error) {
	done, _, now, err := d.p.enter(ctx, "device plugin", sdk.KindDevice)
	if err != nil {
		return sdk.Edits{}, err
	}
	defer done()
	return now.Edits(ctx, ids)
}

// Stats implements sdk.Devices.
func (d devices) Stats(ctx context.Context, ids []string) ([]sdk.DeviceStats, error) {
	done, _, now, err := d.p.enter(ctx, "device plugin", sdk.KindDevice)
	if err != nil {
		return nil, err
	}
	defer done()
	return now.Stats(ctx, ids)
}
