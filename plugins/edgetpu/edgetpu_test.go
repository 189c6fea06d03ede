package edgetpu

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/plugins/sdk"
)

// plant writes files into a tree; a content of "-> x" is a link to x, "" of a
// name that ends in / nothing but the directory.
func plant(t *testing.T, root string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, link := strings.CutPrefix(content, "-> "); link {
			err = os.Symlink(target, p)
		} else {
			err = os.WriteFile(p, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func open(t *testing.T, root string) *Plugin {
	t.Helper()
	p := New("test")
	if err := p.Configure(t.Context(), sdk.Config{JSON: json.RawMessage(fmt.Sprintf(`{"root":%q,"scan":"100ms"}`, root))}); err != nil {
		t.Fatal(err)
	}
	return p
}

// usbTree is a Coral on a port; controller and bus may be numbered anew.
func usbTree(controller string, bus, dev int, port, vendor, product, speed string) map[string]string {
	hub := fmt.Sprintf("sys/devices/pci0000:00/%s/usb%d", controller, bus)
	name := fmt.Sprintf("%d-%s", bus, port)
	d := hub + "/" + name
	return map[string]string{
		hub + "/speed": speed + "\n", d + "/idVendor": vendor + "\n", d + "/idProduct": product + "\n", d + "/speed": speed + "\n",
		d + "/busnum": fmt.Sprintf("%d\n", bus), d + "/devnum": fmt.Sprintf("%d\n", dev), d + "/dev": fmt.Sprintf("189:%d\n", (bus-1)*128+dev-1),
		fmt.Sprintf("sys/bus/usb/devices/usb%d", bus): fmt.Sprintf("-> ../../../devices/pci0000:00/%s/usb%d", controller, bus),
		"sys/bus/usb/devices/" + name:                 fmt.Sprintf("-> ../../../devices/pci0000:00/%s/usb%d/%s", controller, bus, name),
		"dev.list":                                    fmt.Sprintf("c 189 %d 0660 root 46 /dev/bus/usb/%03d/%03d\n", (bus-1)*128+dev-1, bus, dev),
	}
}

func TestUSBKeepsItsID(t *testing.T) {
	const want = "usb-0000:00:14.0-1.4"
	for name, tree := range map[string]map[string]string{
		"fresh":                      usbTree("0000:00:14.0", 1, 5, "1.4", "1a6e", "089a", "480"),
		"after first use":            usbTree("0000:00:14.0", 1, 6, "1.4", "18d1", "9302", "480"),
		"as a SuperSpeed device":     usbTree("0000:00:14.0", 2, 2, "1.4", "18d1", "9302", "5000"),
		"buses found in other order": usbTree("0000:00:14.0", 3, 5, "1.4", "1a6e", "089a", "480"),
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			plant(t, root, tree)
			found := open(t, root).find()
			if len(found) != 1 || found[0].ID != want || !found[0].Ready {
				t.Fatalf("found %+v, want one that is ready, %s", found, want)
			}
		})
	}
}

// Controllers on a chip: the number behind xhci-hcd is that of the probing.
func TestUSBKeepsItsIDOnBoards(t *testing.T) {
	for _, number := range []string{"0", "1.auto"} {
		root := t.TempDir()
		plant(t, root, usbTree("1f00200000.usb/xhci-hcd."+number, 1, 5, "2", "1a6e", "089a", "480"))
		if found := open(t, root).find(); len(found) != 1 || found[0].ID != "usb-1f00200000.usb-2" {
			t.Errorf("xhci-hcd.%s: found %+v, want usb-1f00200000.usb-2", number, found)
		}
	}
}

func TestUSBTwoOnPortsOfOneNumber(t *testing.T) {
	root := t.TempDir()
	slow, fast := usbTree("0000:00:14.0", 1, 5, "1", "1a6e", "089a", "480"), usbTree("0000:00:14.0", 2, 5, "1", "1a6e", "089a", "5000")
	nodes := slow["dev.list"] + fast["dev.list"]
	delete(slow, "dev.list")
	fast["dev.list"] = nodes
	plant(t, root, slow)
	plant(t, root, fast)
	p := open(t, root)
	var ids []string
	for _, f := range p.find() {
		ids = append(ids, f.ID+" on "+f.Attributes["bus_id"])
	}
	if diff := cmp.Diff([]string{"usb-0000:00:14.0-1-usb2 on 1-1", "usb-0000:00:14.0-1 on 2-1"}, ids); diff != "" {
		t.Error(diff)
	}
	// Two need no more than one: the directory and the rule are there once.
	e, err := p.Edits(t.Context(), []string{"usb-0000:00:14.0-1", "usb-0000:00:14.0-1-usb2"})
	if err != nil {
		t.Fatal(err)
	}
	want := sdk.Edits{
		Mounts:      []sdk.Mount{{Type: "bind", Source: "/dev/bus/usb", Target: "/dev/bus/usb", ReadOnly: true}},
		DeviceRules: []sdk.DeviceRule{{Type: "c", Major: 189, Permissions: "rw"}}, AdditionalGIDs: []uint32{46},
	}
	if diff := cmp.Diff(want, e); diff != "" {
		t.Error(diff)
	}
}

func TestUSBNotReady(t *testing.T) {
	for name, c := range map[string]struct {
		change map[string]string // "" removes
		reason string
	}{
		"no node":          {map[string]string{"dev.list": ""}, "/dev/bus/usb/001/005 is missing"},
		"another device's": {map[string]string{"dev.list": "c 189 77 0660 root 46 /dev/bus/usb/001/005\n"}, "or another device's"},
		"not authorised":   {map[string]string{"sys/devices/pci0000:00/0000:00:14.0/usb1/1-1/authorized": "0\n"}, "authorized is 0"},
		"number not told":  {map[string]string{"sys/devices/pci0000:00/0000:00:14.0/usb1/1-1/devnum": ""}, "which node"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			tree := usbTree("0000:00:14.0", 1, 5, "1", "1a6e", "089a", "480")
			for k, v := range c.change {
				tree[k] = v
			}
			plant(t, root, tree)
			p := open(t, root)
			found := p.find()
			if len(found) != 1 || found[0].Ready || !strings.Contains(found[0].Reason, c.reason) {
				t.Fatalf("found %+v, want one that is not ready: %s", found, c.reason)
			}
			if _, err := p.Edits(t.Context(), []string{found[0].ID}); sdk.KindOf(err) != sdk.Unavailable {
				t.Errorf("edits: %v, want unavailable", err)
			}
		})
	}
}

func TestUSBOthersAreLeftAlone(t *testing.T) {
	root := t.TempDir()
	plant(t, root, usbTree("0000:00:14.0", 1, 5, "1", "18d1", "4ee7", "480")) // a phone of the same vendor
	if found := open(t, root).find(); len(found) != 0 {
		t.Errorf("found %+v", found)
	}
}

func pcieTree(driver, status, numbers, nodes string) map[string]string {
	const d = "sys/devices/pci0000:00/0000:01:00.0"
	m := map[string]string{
		d + "/vendor": "0x1ac1\n", d + "/device": "0x089a\n", "sys/bus/pci/devices/0000:01:00.0": "-> ../../../devices/pci0000:00/0000:01:00.0", "dev.list": nodes,
	}
	if driver != "" {
		m["sys/bus/pci/drivers/"+driver+"/x"] = ""
		m[d+"/driver"] = "-> ../../../bus/pci/drivers/" + driver
	}
	if driver == "apex" {
		m[d+"/apex/apex_0/status"] = status
		m[d+"/apex/apex_0/dev"] = numbers
		m["sys/class/apex/apex_0"] = "-> ../../devices/pci0000:00/0000:01:00.0/apex/apex_0"
	}
	return m
}

func TestPCIe(t *testing.T) {
	const node = "c 120 0 0660 root 1001 /dev/apex_0\n"
	for name, c := range map[string]struct {
		tree   map[string]string
		ready  bool
		health sdk.Health
		reason string
	}{
		"alive":              {pcieTree("apex", "ALIVE\n", "120:0\n", node), true, sdk.HealthHealthy, ""},
		"does not tell":      {pcieTree("apex", "", "120:0\n", node), true, sdk.HealthUnknown, ""},
		"numbers not told":   {pcieTree("apex", "ALIVE\n", "", node), true, sdk.HealthHealthy, ""},
		"lamed":              {pcieTree("apex", "LAMED\n", "120:0\n", node), true, sdk.HealthUnhealthy, "LAMED"},
		"dead":               {pcieTree("apex", "DEAD\n", "120:0\n", node), false, sdk.HealthUnhealthy, "DEAD"},
		"no node":            {pcieTree("apex", "ALIVE\n", "120:0\n", ""), false, sdk.HealthHealthy, "/dev/apex_0 is missing"},
		"node of another":    {pcieTree("apex", "ALIVE\n", "120:0\n", "c 120 1 0660 root 1001 /dev/apex_0\n"), false, sdk.HealthHealthy, "missing"},
		"given to a machine": {pcieTree("vfio-pci", "", "", node), false, sdk.HealthUnknown, "vfio-pci is not apex"},
		"no driver":          {pcieTree("", "", "", node), false, sdk.HealthUnknown, "no driver"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			plant(t, root, c.tree)
			found := open(t, root).find()
			if len(found) != 1 {
				t.Fatalf("found %+v, want one", found)
			}
			f := found[0]
			if f.ID != "pci-0000:01:00.0" || f.Ready != c.ready || f.Health != c.health || !strings.Contains(f.Reason, c.reason) || c.reason == "" && f.Reason != "" {
				t.Errorf("got %+v, want ready %t, %s, reason with %q", f.Device, c.ready, c.health, c.reason)
			}
			if err := sdk.CheckInventory([]sdk.Device{f.Device}); err != nil {
				t.Error(err)
			}
		})
	}
}

// A device that comes, changes by its first use and goes is told of each time,
// and not when nothing changed.
func TestWatchTellsOfChanges(t *testing.T) {
	root := t.TempDir()
	p := open(t, root)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	told := make(chan []sdk.Device, 16)
	done := make(chan error, 1)
	go func() { done <- p.Watch(ctx, func(all []sdk.Device) { told <- all }) }()
	next := func(what string) []sdk.Device {
		t.Helper()
		select {
		case all := <-told:
			return all
		case <-ctx.Done():
			t.Fatalf("not told of %s", what)
			return nil
		}
	}
	if all := next("the beginning"); len(all) != 0 {
		t.Fatalf("found %+v in an empty tree", all)
	}
	// Complete trees are swapped in, as a device appears all at once.
	swap := func(tree map[string]string) {
		t.Helper()
		staged := t.TempDir()
		plant(t, staged, tree)
		for _, name := range []string{"dev.list", "sys"} {
			if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range []string{"dev.list", "sys"} {
			if err := os.Rename(filepath.Join(staged, name), filepath.Join(root, name)); err != nil && len(tree) > 0 {
				t.Fatal(err)
			}
		}
	}
	settle := func(what string, want func([]sdk.Device) bool) {
		t.Helper()
		for !want(next(what)) {
		}
	}
	swap(usbTree("0000:00:14.0", 1, 5, "1", "1a6e", "089a", "480"))
	settle("a new device", func(all []sdk.Device) bool {
		return len(all) == 1 && all[0].Ready && all[0].Attributes["firmware"] == "not loaded"
	})
	swap(usbTree("0000:00:14.0", 1, 6, "1", "18d1", "9302", "480"))
	settle("its first use", func(all []sdk.Device) bool {
		return len(all) == 1 && all[0].Ready && all[0].Attributes["firmware"] == "loaded"
	})
	swap(nil)
	settle("its end", func(all []sdk.Device) bool { return len(all) == 0 })
	cancel()
	if err := <-done; err != nil {
		t.Errorf("watch ended with %v", err)
	}
}

func TestWatchIsQuietWhenNothingChanges(t *testing.T) {
	root := t.TempDir()
	plant(t, root, usbTree("0000:00:14.0", 1, 5, "1", "1a6e", "089a", "480"))
	p := open(t, root)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second) // ten scans
	defer cancel()
	n := 0
	if err := p.Watch(ctx, func([]sdk.Device) { n++ }); err != nil || n != 1 {
		t.Errorf("told %d times (%v), want once", n, err)
	}
}

func TestConfigureRefusesWhatItDoesNotKnow(t *testing.T) {
	for _, c := range []string{`{"scan":"5s"}`, `{"scan":"0s"}`, `{"rot":"/"}`, `[]`} {
		if err := New("test").Configure(t.Context(), sdk.Config{JSON: json.RawMessage(c)}); sdk.KindOf(err) != sdk.Invalid {
			t.Errorf("%s: %v, want invalid", c, err)
		}
	}
}

// What a scan costs a machine that has none: run it on a board.
func BenchmarkScan(b *testing.B) {
	p := New("test")
	if err := p.Configure(b.Context(), sdk.Config{}); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		p.find()
	}
}
