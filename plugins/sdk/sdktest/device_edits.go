package sdktest

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/belay-edge/belay/plugins/sdk"
)

const noSuchDevice = "sdktest-no-such-device"

func testEdits(t T, r *deviceRig) {
	_, d := r.devices(t)
	ids := r.readyIDs(t, d)
	all := make([][]string, 0, len(ids)+1)
	for _, id := range ids {
		all = append(all, []string{id})
	}
	if len(ids) > 1 {
		all = append(all, ids)
	}
	for _, ids := range all {
		e, err := d.Edits(r.ctx(t), ids)
		if err != nil {
			t.Errorf("Edits of %q: %v", ids, err)
			continue
		}
		for _, bad := range r.checkEdits(e) {
			t.Errorf("edits of %q: %s", ids, bad)
		}
	}
}

var cdiName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_.-]*/[A-Za-z][A-Za-z0-9_-]*=[A-Za-z0-9][A-Za-z0-9_.:-]*$`)

// checkEdits lists what a runtime could not apply.
func (r *deviceRig) checkEdits(e sdk.Edits) (wrong []string) {
	there := r.opts.Exists
	if there == nil {
		there = func(path string) bool { _, err := os.Stat(path); return !errors.Is(err, fs.ErrNotExist) }
	}
	bad := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	for _, d := range e.Devices {
		st, err := os.Stat(d.HostPath)
		switch {
		case !filepath.IsAbs(d.HostPath):
			bad("device path %q is not absolute", d.HostPath)
		case !there(d.HostPath):
			bad("device %s does not exist; nodes that come later are named by DeviceRules", d.HostPath)
		case r.opts.Exists == nil && err == nil && st.Mode()&os.ModeDevice == 0:
			bad("%s is no device node but of mode %s", d.HostPath, st.Mode())
		}
		if d.ContainerPath != "" && !filepath.IsAbs(d.ContainerPath) {
			bad("path %q of a device in the container is not absolute", d.ContainerPath)
		}
		if !permissions(d.Permissions) {
			bad("device %s has permissions %q, want letters of rwm", d.HostPath, d.Permissions)
		}
	}
	for _, m := range e.Mounts {
		if !filepath.IsAbs(m.Target) {
			bad("mount target %q is not absolute", m.Target)
		}
		if m.Type == "tmpfs" {
			continue
		}
		if !filepath.IsAbs(m.Source) {
			bad("mount source %q is not absolute", m.Source)
		} else if !there(m.Source) {
			bad("mount source %s does not exist", m.Source)
		}
	}
	for _, kv := range e.Env {
		if name, _, ok := strings.Cut(kv, "="); !ok || name == "" {
			bad("environment %q is not NAME=value", kv)
		}
	}
	for _, c := range e.CDIDevices {
		if !cdiName.MatchString(c) {
			bad("CDI device %q is not fully qualified, as vendor.com/class=name is", c)
		}
	}
	for _, h := range e.Hooks {
		if !slices.Contains([]string{"createRuntime", "createContainer", "startContainer", "poststart", "poststop"}, h.Point) {
			bad("hook point %q is none of the OCI runtime specification", h.Point)
		}
		if !filepath.IsAbs(h.Path) {
			bad("hook path %q is not absolute", h.Path)
		} else if h.Point != "startContainer" && !there(h.Path) {
			bad("hook %s does not exist", h.Path)
		}
		if h.Timeout < 0 {
			bad("hook %s has a timeout of %s", h.Path, h.Timeout)
		}
	}
	for _, rule := range e.DeviceRules {
		if rule.Type != "c" && rule.Type != "b" {
			bad("device rule for major %d is of type %q, want c or b", rule.Major, rule.Type)
		}
		if !permissions(rule.Permissions) {
			bad("device rule for major %d has permissions %q, want letters of rwm", rule.Major, rule.Permissions)
		}
	}
	return wrong
}

func permissions(p string) bool { return strings.Trim(p, "rwm") == "" }

func testEditsNotReady(t T, r *deviceRig) {
	_, d := r.devices(t)
	ids := pick(r.inventory(t, d), false)
	if len(ids) == 0 {
		t.Skip("every device is ready here")
	}
	for _, id := range ids {
		_, err := d.Edits(r.ctx(t), []string{id})
		wantKind(t, fmt.Sprintf("Edits of %q, which is not ready", id), err, sdk.Unavailable)
	}
}

func testEditsUnknown(t T, r *deviceRig) {
	_, d := r.devices(t)
	_, err := d.Edits(r.ctx(t), []string{noSuchDevice})
	wantKind(t, "Edits of a device that is not there", err, sdk.NotFound)
	if ids := pick(r.inventory(t, d), true); len(ids) > 0 {
		_, err := d.Edits(r.ctx(t), []string{ids[0], noSuchDevice})
		wantKind(t, "Edits of one that is there and one that is not", err, sdk.NotFound)
	}
}

func testEditsStable(t T, r *deviceRig) {
	p, d := r.devices(t)
	ids := r.readyIDs(t, d)
	before := make([]sdk.Edits, len(ids))
	var err error
	for i, id := range ids {
		if before[i], err = d.Edits(r.ctx(t), []string{id}); err != nil {
			r.missing(t, ruleEdits, "Edits of %q: %v", id, err)
		}
	}
	r.over(p) // kill -9
	_, d = r.devices(t)
	for i, id := range ids {
		after, err := d.Edits(r.ctx(t), []string{id})
		if err != nil && r.told(ruleIDs) {
			r.missing(t, ruleIDs, "")
		}
		if err != nil {
			t.Errorf("expected the same edits of %q from a new process that nobody watched: %v", id, err)
		} else if !reflect.DeepEqual(before[i], after) {
			t.Errorf("expected the same edits of %q from a new process: before %+v, after %+v", id, before[i], after)
		}
	}
}

// stats measures; without that ability the rule cannot be tried.
func (r *deviceRig) stats(t T, d sdk.Devices, ids []string) []sdk.DeviceStats {
	t.Helper()
	s, err := d.Stats(r.ctx(t), ids)
	if errors.Is(err, sdk.Unsupported) {
		t.Skip("it measures nothing")
	}
	if err != nil {
		t.Fatalf("Stats of %q: %v", ids, err)
	}
	return s
}

func testStatsPlausible(t T, r *deviceRig) {
	_, d := r.devices(t)
	known := map[string]bool{}
	for _, dev := range r.inventory(t, d) {
		known[dev.ID] = true
	}
	for _, s := range r.stats(t, d, nil) {
		if !known[s.ID] {
			t.Errorf("stats of %q: no such device is in the inventory, or it was measured twice", s.ID)
		}
		delete(known, s.ID)
		within := func(what string, v *float64, low, high float64) {
			if v != nil && (math.IsNaN(*v) || *v < low || *v > high) {
				t.Errorf("stats of %q: %s is %g, want %g to %g or nothing", s.ID, what, *v, low, high)
			}
		}
		within("utilization", s.UtilizationPercent, 0, 100)
		within("temperature", s.TemperatureCelsius, -100, 300)
		within("power", s.PowerWatts, 0, 100000)
		if s.MemoryUsedBytes != nil && s.MemoryTotalBytes != nil && *s.MemoryUsedBytes > *s.MemoryTotalBytes {
			t.Errorf("stats of %q: %d bytes used of %d", s.ID, *s.MemoryUsedBytes, *s.MemoryTotalBytes)
		}
	}
}

func testStatsOfOne(t T, r *deviceRig) {
	_, d := r.devices(t)
	ids := r.readyIDs(t, d)
	for _, id := range ids {
		for _, s := range r.stats(t, d, []string{id}) {
			if s.ID != id {
				t.Errorf("asked for stats of %q, got those of %q too", id, s.ID)
			}
		}
	}
}

func testStatsUnknown(t T, r *deviceRig) {
	_, d := r.devices(t)
	r.stats(t, d, nil)
	_, err := d.Stats(r.ctx(t), []string{noSuchDevice})
	wantKind(t, "Stats of a device that is not there", err, sdk.NotFound)
}

// testDeviceConcurrent makes many calls at once and wants what each gives
// alone.
func testDeviceConcurrent(t T, r *deviceRig) {
	_, d := r.devices(t)
	ids := pick(r.inventory(t, d), true)
	var want sdk.Edits
	if len(ids) > 0 {
		var err error
		if want, err = d.Edits(r.ctx(t), ids[:1]); err != nil {
			r.missing(t, ruleEdits, "Edits of %q: %v", ids[0], err)
		}
	}
	ctx := r.ctx(t)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if len(ids) > 0 {
				if e, err := d.Edits(ctx, ids[:1]); err != nil {
					t.Errorf("Edits beside other calls: %v", err)
				} else if !reflect.DeepEqual(e, want) {
					t.Errorf("Edits beside other calls are %+v, alone %+v", e, want)
				}
			}
			if _, err := d.Stats(ctx, nil); err != nil && !errors.Is(err, sdk.Unsupported) {
				t.Errorf("Stats beside other calls: %v", err)
			}
		})
	}
	wg.Wait()
}
