package sdktest

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/host"
)

// DeviceOptions say which device plugin to check and what it needs.
type DeviceOptions struct {
	// Executable is the built plugin. Its file name must be the plugin's name.
	Executable string
	// Config is the plugin's own configuration.
	Config json.RawMessage
	// Change makes the hardware that the plugin sees change, if the test can:
	// an inventory that differs is expected within five seconds. It is called
	// once, at the end. nil skips that rule.
	Change func() error
	// Exists tells whether a path that edits name is there; nil asks this
	// machine. For plugins that are shown a tree of recorded files.
	Exists func(path string) bool
	// Slow stretches the suite's patience; 0: what SlowEnv says, or 1.
	Slow int
}

// The rules that others build on.
const (
	ruleInventory  = "a watch sends an inventory within five seconds"
	ruleContract   = "the inventory keeps the contract"
	ruleTwoWatches = "two watches run beside each other"
	ruleIDs        = "ids are the same in a new process"
	ruleEdits      = "the edits of a ready device are complete"
)

// Device runs the conformance suite of device plugins as subtests of t, a
// *testing.T, one after the other.
//
// It needs no hardware: what nothing was found for is skipped. Rules about
// devices want at least one, from a tree of recorded files if need be.
func Device[S Subtests[S]](t S, o DeviceOptions) {
	t.Helper()
	deviceSuite(t, o).runIn(t, under(t))
}

func deviceSuite(t T, o DeviceOptions) suite {
	r := &deviceRig{opts: o, bench: newBench(t, benchOptions{executable: o.Executable, config: o.Config, slow: o.Slow})}
	t.Cleanup(func() { r.sweep(r.marked()) })
	s := suite{kill: r.kill}
	for _, c := range []struct {
		name string
		test func(T, *deviceRig)
	}{
		{ruleLaunch, testDeviceLaunch},
		{ruleByHand, inDevice(testByHand)},
		{ruleDescription, inDevice(testDescription)},
		{"calls before Configure are refused", testBeforeConfigure},
		{ruleConfig, inDevice(testWrongConfig)},
		{ruleInventory, testFirstInventory},
		{ruleContract, testInventoryContract},
		{"a watch is silent while nothing changes", testWatchSilent},
		{ruleTwoWatches, testTwoWatches},
		{"the end of one watch leaves another alone", testWatchesIndependent},
		{ruleIDs, testIDsStable},
		{ruleEdits, testEdits},
		{"the edits of a device that is not ready are unavailable", testEditsNotReady},
		{"the edits of an unknown device are not found", testEditsUnknown},
		{"edits are the same in a new process that never watched", testEditsStable},
		{"stats are plausible", testStatsPlausible},
		{"stats asked of one device are of that device", testStatsOfOne},
		{"the stats of an unknown device are not found", testStatsUnknown},
		{"calls run beside each other", testDeviceConcurrent},
		{"it answers pings while it is watched", testPing},
		{ruleEnds, inDevice(testEnds)},
		{"a watch ends when it is asked to", testWatchEnds},
		{ruleHostDies, inDevice(testHostDies)},
		{"killed while it is watched, it leaves no process behind", testKilledLeavesNothing},
		{"a change is reported within five seconds", testChange},
	} {
		s.rules = append(s.rules, r.rule(c.name, func(t T) { c.test(t, r) }))
	}
	return s
}

func inDevice(f func(T, *bench)) func(T, *deviceRig) {
	return func(t T, r *deviceRig) { f(t, r.bench) }
}

// deviceRig is a device plugin. Most rules launch a process of their own.
type deviceRig struct {
	*bench
	opts DeviceOptions
}

// devices launches the plugin for the rest of the rule.
func (r *deviceRig) devices(t T) (*host.Plugin, sdk.Devices) {
	t.Helper()
	p := r.launch(t)
	t.Cleanup(func() { r.over(p) }) // rules about its end ask it to
	d, ok := p.Devices()
	if !ok {
		t.Fatalf("expected a plugin of kind device, it says %v (protocol %d)", p.Info().Kinds, p.ProtocolVersion())
	}
	return p, d
}

func testDeviceLaunch(t T, r *deviceRig) {
	p, _ := r.devices(t)
	if p.Info().Version == "" {
		t.Error("expected a version in Info, it is empty")
	}
}

// watch is one call of Watch.
type watch struct {
	got   chan []sdk.Device
	ended chan error
	stop  context.CancelFunc
}

func (r *deviceRig) watch(t T, d sdk.Devices) *watch {
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	w := &watch{got: make(chan []sdk.Device, 64), ended: make(chan error, 1), stop: cancel}
	go func() {
		w.ended <- d.Watch(ctx, func(devices []sdk.Device) {
			select {
			case w.got <- devices:
			default: // a flood; the rule about it has its fill
			}
		})
	}()
	return w
}

// next waits for one more inventory; err says why there is none.
func (w *watch) next(within time.Duration) (devices []sdk.Device, err error) {
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case devices = <-w.got:
		slices.SortFunc(devices, func(a, b sdk.Device) int { return cmp.Compare(a.ID, b.ID) })
		return devices, nil
	case err := <-w.ended:
		w.ended <- err
		return nil, fmt.Errorf("the watch ended: %w", orNil(err))
	case <-timer.C:
		return nil, fmt.Errorf("nothing came for %s", within)
	}
}

var errNoError = errors.New("without an error")

func orNil(err error) error {
	if err == nil {
		return errNoError
	}
	return err
}

// inventory is what the plugin first finds.
func (r *deviceRig) inventory(t T, d sdk.Devices) []sdk.Device {
	t.Helper()
	if r.told(ruleInventory) {
		r.missing(t, ruleInventory, "")
	}
	w := r.watch(t, d)
	defer w.stop()
	devices, err := w.next(r.patience(5 * time.Second))
	if err != nil {
		if badInventory(err) {
			r.missing(t, ruleContract, "expected an inventory: %v", err)
		}
		r.missing(t, ruleInventory, "expected an inventory: %v", err)
	}
	return devices
}

// badInventory tells an inventory that was sent, and refused.
func badInventory(err error) bool {
	e := sdk.CheckInventory(make([]sdk.Device, sdk.MaxDevices+1))
	return sdk.KindOf(err) == sdk.Invalid && hasOp(err, e)
}

// pick returns the ids of the devices that are ready, or that are not.
func pick(devices []sdk.Device, ready bool) []string {
	var ids []string
	for _, d := range devices {
		if d.Ready == ready {
			ids = append(ids, d.ID)
		}
	}
	return ids
}

// readyIDs are the devices a container could have now; without any the rule
// cannot be tried.
func (r *deviceRig) readyIDs(t T, d sdk.Devices) []string {
	t.Helper()
	ids := pick(r.inventory(t, d), true)
	if len(ids) == 0 {
		t.Skip("no device is ready here")
	}
	return ids
}
