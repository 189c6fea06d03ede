package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/plugins/sdk"
)

func TestDeviceFactsSayWhatThePluginsFound(t *testing.T) {
	got, left := deviceFacts([]agent.PluginDevices{
		{Plugin: "a", Ready: true, Devices: []sdk.Device{{ID: "1", Kind: "gpu", Ready: true, Attributes: map[string]string{"x": "y"}}}},
		{Plugin: "b", Error: "plugin b is down: " + strings.Repeat("e", 300), Devices: []sdk.Device{{ID: "1", Kind: "tpu", Ready: true, Health: sdk.HealthHealthy, Shares: 2}}},
	})
	want := []*wire.DeviceFact{
		{Plugin: "a", Id: "1", Kind: "gpu", Ready: true, Health: "unknown", Shares: 1, Attributes: map[string]string{"x": "y"}},
		{Plugin: "b", Id: "1", Kind: "tpu", Health: "healthy", Shares: 2, Reason: "plugin b is down: " + strings.Repeat("e", 235) + "..."},
	}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" || left != 0 {
		t.Errorf("%d left out (-want +got):\n%s", left, d)
	}
}

func TestDeviceFactsAreBounded(t *testing.T) {
	many := agent.PluginDevices{Plugin: "a", Ready: true}
	for n := range 2000 {
		many.Devices = append(many.Devices, sdk.Device{ID: fmt.Sprint(n), Kind: "gpu", Ready: true})
	}
	if got, left := deviceFacts([]agent.PluginDevices{many}); len(got) != maxFacts || left != 2000-maxFacts {
		t.Errorf("%d told, %d left out", len(got), left)
	}
	for n := range many.Devices {
		many.Devices[n].Attributes = map[string]string{"x": strings.Repeat("y", 4096)}
	}
	if got, left := deviceFacts([]agent.PluginDevices{many}); len(got) > maxFactsBytes/4096 || len(got)+left != 2000 {
		t.Errorf("%d told, %d left out", len(got), left)
	}
}

// An inventory that changes every second for an hour is told of 65 times.
func TestChangesOfDevicesAreSpaced(t *testing.T) {
	now := time.Unix(1000, 0)
	s := newSpacing(now)
	told, until := 0, now.Add(time.Hour)
	var waits []time.Duration
	for now.Before(until) {
		wait := s.next(now)
		waits = append(waits, wait)
		told++
		now = now.Add(wait + time.Second) // the next change, taken in once this one is told
	}
	if waits[0] != 0 || told > 70 || told < 50 {
		t.Errorf("told %d times, waits %v", told, waits[:min(8, len(waits))])
	}
	now = now.Add(10 * time.Minute)
	if wait := s.next(now); wait != 0 {
		t.Errorf("after a quiet while it waits %v", wait)
	}
}

func TestAllowanceComesBack(t *testing.T) {
	now := time.Unix(0, 0)
	a := newAllowance(now)
	taken := func() (n int) {
		for a.take(now) {
			n++
		}
		return n
	}
	if n := taken(); n != mostAtOnce {
		t.Fatalf("%d at once", n)
	}
	if now = now.Add(factsInterval - 1); taken() != 0 {
		t.Error("one came back early")
	}
	if now = now.Add(2); taken() != 1 {
		t.Error("none came back")
	}
	if now = now.Add(time.Hour); taken() != mostAtOnce {
		t.Error("not all came back")
	}
}
