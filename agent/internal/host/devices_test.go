package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/plugins/sdk"
)

// detector finds what its configuration says.
type detector struct {
	name   string
	config detectorConfig
}

type detectorConfig struct {
	Flood int    `json:"flood" default:"0"` // inventories a second, each another
	Fail  int    `json:"fail" default:"0"`  // so many processes' first watch fails
	Pad   int    `json:"pad" default:"0"`   // attributes of each device
	Mood  string `json:"mood" default:""`
}

func (d *detector) Info() sdk.Info {
	return sdk.Info{Name: d.name, Version: "1", Kinds: []sdk.Kind{sdk.KindDevice}}
}
func (d *detector) Devices() sdk.Devices  { return d }
func (d *detector) Options() []sdk.Option { return sdk.OptionsOf(detectorConfig{}) }
func (d *detector) Configure(_ context.Context, c sdk.Config) error {
	switch {
	case strings.HasSuffix(d.name, "hog"):
		go hog()
	case strings.HasSuffix(d.name, "floods"):
		go flood()
	}
	if err := sdk.DecodeConfig(c, &d.config); err != nil || d.config.Mood != "curious" {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(c.StateDir, "mine"), nil, 0o600),
		os.WriteFile("/dev/null", []byte("x"), 0),
		os.WriteFile(filepath.Join(c.StateDir, "tried"), []byte(fmt.Sprint(
			os.WriteFile(filepath.Join(filepath.Dir(c.StateDir), "not-mine"), nil, 0o600), "; ",
			syscall.Mknod(filepath.Join(c.StateDir, "node"), syscall.S_IFCHR, 1<<8|3))), 0o600))
}

func (d *detector) Watch(ctx context.Context, f func([]sdk.Device)) error {
	if d.config.Fail > 0 {
		d.config.Fail--
		return sdk.Errorf(sdk.Unavailable, "watch", "the bus is on fire")
	}
	tell := func(n int) {
		devices := []sdk.Device{{ID: "b", Kind: "tpu", Ready: true}, {ID: "a", Kind: "tpu", Ready: true, Attributes: map[string]string{"n": strconv.Itoa(n)}}}
		for i := range d.config.Pad {
			devices[1].Attributes[fmt.Sprint("pad", i)] = strings.Repeat("x", 200)
		}
		f(devices)
	}
	tell(0)
	for n := 1; d.config.Flood > 0 && ctx.Err() == nil; n++ {
		tell(n)
		time.Sleep(time.Second / time.Duration(d.config.Flood))
	}
	<-ctx.Done()
	return nil
}

func (d *detector) Edits(_ context.Context, ids []string) (sdk.Edits, error) {
	return sdk.Edits{Env: ids}, nil
}

func (d *detector) Stats(context.Context, []string) ([]sdk.DeviceStats, error) {
	return nil, sdk.Errorf(sdk.Unsupported, "stats", "no")
}

// inventory waits until what is known of a plugin's devices pleases ok.
func (f fixture) inventory(t *testing.T, plugin string, ok func(agent.PluginDevices) bool) agent.PluginDevices {
	t.Helper()
	deadline := time.After(patience())
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		var last agent.PluginDevices
		for _, d := range f.Inventory() {
			if last = d; d.Plugin == plugin && ok(d) {
				return d
			}
		}
		select {
		case <-deadline:
			t.Fatalf("the inventory of %s stays %+v", plugin, last)
		case <-tick.C:
		}
	}
}

func ready(d agent.PluginDevices) bool { return d.Ready }

func TestDevicesSurviveARelaunchAndEndWithTheFile(t *testing.T) {
	f := newFixture(t, Timing{Scan: 20 * time.Millisecond, Quarantine: time.Hour}, nil, "dev", "good")
	f.start(t)
	want := agent.PluginDevices{Plugin: "dev", Ready: true, Devices: []sdk.Device{
		{ID: "a", Kind: "tpu", Ready: true, Attributes: map[string]string{"n": "0"}}, {ID: "b", Kind: "tpu", Ready: true}}}
	if d := cmp.Diff(want, f.inventory(t, "dev", ready)); d != "" {
		t.Error(d)
	}
	select {
	case <-f.DeviceChanges():
	case <-time.After(5 * time.Second):
		t.Error("no change was announced")
	}
	device, err := f.Device("dev")
	if err != nil {
		t.Fatal(err)
	}
	pid := f.wait(t, "dev", is(Ready)).PID
	// It can run again, but not at once.
	if err := os.Chmod(filepath.Join(f.dir, "."), 0o757); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	want.Ready = false
	down := f.inventory(t, "dev", func(d agent.PluginDevices) bool { return strings.Contains(d.Error, "0757") })
	if d := cmp.Diff(want.Devices, down.Devices); d != "" || down.Ready {
		t.Errorf("while it is down, ready %t: %s", down.Ready, d)
	}
	if _, err := device.Edits(t.Context(), nil); !errors.Is(err, sdk.Unavailable) {
		t.Errorf("edits while it is down: %v", err)
	}
	if err := os.Chmod(f.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(f.dir, "dev")); err != nil {
		t.Fatal(err)
	}
	deadline := time.After(patience())
	for len(f.Inventory()) > 0 {
		select {
		case <-deadline:
			t.Fatalf("devices of a removed plugin stay: %+v", f.Inventory())
		case <-f.DeviceChanges():
		}
	}
	f.link(t, "dev")
	f.inventory(t, "dev", ready)
	device, err = f.Device("dev")
	if err != nil {
		t.Fatal(err)
	}
	if e, err := device.Edits(t.Context(), []string{"b"}); err != nil || len(e.Env) != 1 || e.Env[0] != "b" {
		t.Errorf("edits: %+v, %v", e, err)
	}
	if _, err := f.Device("good"); !errors.Is(err, sdk.NotFound) && !errors.Is(err, sdk.Unavailable) {
		t.Errorf("a runtime's devices: %v", err)
	}
	if _, err := f.Device("other"); !errors.Is(err, sdk.NotFound) {
		t.Errorf("devices of no plugin: %v", err)
	}
}

func TestAWatchThatFailsIsShownAndTriedAgain(t *testing.T) {
	f := newFixture(t, Timing{WatchRetry: 50 * time.Millisecond, Inventory: 50 * time.Millisecond},
		map[string]json.RawMessage{"dev": json.RawMessage(`{"fail":3}`)}, "dev")
	f.start(t)
	f.inventory(t, "dev", func(d agent.PluginDevices) bool { return strings.Contains(d.Error, "the bus is on fire") })
	f.inventory(t, "dev", ready)
	if s := f.wait(t, "dev", func(s Status) bool { return s.State == Ready && s.Error == "" }); s.Restarts != 0 {
		t.Errorf("it was relaunched: %+v", s)
	}
}

// 10,000 changes a minute come to the agent's loop as one a second.
func TestInventoryFloodIsCoalesced(t *testing.T) {
	f := newFixture(t, Timing{Inventory: 200 * time.Millisecond}, map[string]json.RawMessage{"dev": json.RawMessage(`{"flood":1000,"pad":60}`)}, "dev", "good")
	f.start(t)
	f.inventory(t, "dev", ready)
	const look = 2 * time.Second
	end := time.After(look)
	changes, seen := 0, map[string]bool{}
	for done := false; !done; {
		select {
		case <-f.DeviceChanges():
			changes++
			seen[f.inventory(t, "dev", ready).Devices[0].Attributes["n"]] = true
		case <-end:
			done = true
		}
	}
	if most := int(look/(200*time.Millisecond)) + 3; changes > most || len(seen) < 3 {
		t.Errorf("%d changes, %d inventories in %s, want at most %d and several", changes, len(seen), look, most)
	}
	if s := f.wait(t, "good", is(Ready)); s.Restarts != 0 {
		t.Errorf("the other plugin was disturbed: %+v", s)
	}
}
