package hwtests

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/belay-edge/belay/plugins/edgetpu"
	"github.com/belay-edge/belay/plugins/nvidia"
	"github.com/belay-edge/belay/plugins/nvidia/nvidiatest"
	"github.com/belay-edge/belay/plugins/sdk"
)

const fixtures = "fixtures"

// inventory is what a plugin says of a board, in the form of golden.json.
type inventory struct {
	Devices []device         `json:"devices"`
	Edits   map[string]edits `json:"edits"` // of the devices that are ready, one at a time
	Stats   []stats          `json:"stats"`
}

type device struct {
	ID         string            `json:"id"`
	Kind       string            `json:"kind"`
	Ready      bool              `json:"ready"`
	Health     string            `json:"health"`
	Reason     string            `json:"reason"`
	Attributes map[string]string `json:"attributes"`
}

type edits struct {
	Devices []string `json:"devices"` // "path permissions"
	Mounts  []string `json:"mounts"`  // "source:target:ro"
	Rules   []string `json:"rules"`   // "c 189:* rw"
	Env     []string `json:"env"`
	CDI     []string `json:"cdi"`
	GIDs    []uint32 `json:"gids"`
}

type stats struct {
	ID                 string   `json:"id"`
	UtilizationPercent *float64 `json:"utilizationPercent,omitempty"`
	MemoryUsedBytes    *uint64  `json:"memoryUsedBytes,omitempty"`
	MemoryTotalBytes   *uint64  `json:"memoryTotalBytes,omitempty"`
	TemperatureCelsius *float64 `json:"temperatureCelsius,omitempty"`
	PowerWatts         *float64 `json:"powerWatts,omitempty"`
}

// golden is a golden.json: an inventory for each plugin, and for "nvidia+nvml",
// which is nvidia with the answers of NVML in nvml.json.
type golden struct {
	Inventories map[string]inventory
	// Source says where each value comes from: "PLUGIN ID FIELD", in which *
	// stands for any text, or "PLUGIN none" for one that finds nothing.
	Source map[string]string
}

func readGolden(t *testing.T, board string) golden {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(fixtures, board, "golden.json"))
	if err != nil {
		t.Fatal(err)
	}
	var raw map[string]json.RawMessage
	g := golden{Inventories: map[string]inventory{}}
	if err := json.Unmarshal(b, &raw); err != nil {
		t.Fatal(err)
	}
	for name, v := range raw {
		var into any = &g.Source
		var i inventory
		if name != "source" {
			into = &i
		}
		d := json.NewDecoder(strings.NewReader(string(v)))
		d.DisallowUnknownFields()
		if err := d.Decode(into); err != nil {
			t.Fatalf("%s: %s: %v", board, name, err)
		}
		if name != "source" {
			g.Inventories[name] = i
		}
	}
	return g
}

// boards are the fixtures.
func boards(t *testing.T) []string {
	t.Helper()
	dirs, err := filepath.Glob(filepath.Join(fixtures, "*", "golden.json"))
	if err != nil || len(dirs) < 14 {
		t.Fatalf("want the fixtures of 14 boards at least, found %v (%v)", dirs, err)
	}
	var names []string
	for _, d := range dirs {
		names = append(names, filepath.Base(filepath.Dir(d)))
	}
	return names
}

// look asks devices for everything there is to a golden.json.
func look(t *testing.T, d sdk.Devices) inventory {
	t.Helper()
	ctx := t.Context()
	var i inventory
	found := firstInventory(t, d)
	if err := sdk.CheckInventory(found); err != nil {
		t.Error(err)
	}
	i.Edits = map[string]edits{}
	for _, f := range found {
		health := f.Health
		if health == "" {
			health = sdk.HealthUnknown
		}
		i.Devices = append(i.Devices, device{f.ID, f.Kind, f.Ready, string(health), f.Reason, f.Attributes})
		e, err := d.Edits(ctx, []string{f.ID})
		switch {
		case f.Ready && err != nil:
			t.Errorf("edits of %s: %v", f.ID, err)
		case f.Ready:
			i.Edits[f.ID] = flat(e)
		case sdk.KindOf(err) != sdk.Unavailable:
			t.Errorf("edits of %s, which is not ready: %v, want an error of kind unavailable", f.ID, err)
		}
	}
	if _, err := d.Edits(ctx, []string{"no such device"}); sdk.KindOf(err) != sdk.NotFound {
		t.Errorf("edits of a device that is not there: %v, want not-found", err)
	}
	measured, err := d.Stats(ctx, nil)
	if err != nil {
		t.Errorf("stats: %v", err)
	}
	for _, s := range measured {
		i.Stats = append(i.Stats, stats(s))
	}
	return i
}

func flat(e sdk.Edits) edits {
	f := edits{Env: e.Env, CDI: e.CDIDevices, GIDs: e.AdditionalGIDs}
	for _, d := range e.Devices {
		f.Devices = append(f.Devices, d.HostPath+" "+d.Permissions)
	}
	for _, m := range e.Mounts {
		mode := "rw"
		if m.ReadOnly {
			mode = "ro"
		}
		f.Mounts = append(f.Mounts, m.Source+":"+m.Target+":"+mode)
	}
	for _, r := range e.DeviceRules {
		f.Rules = append(f.Rules, fmt.Sprintf("%s %d:* %s", r.Type, r.Major, r.Permissions))
	}
	return f
}

// plugin makes one that reads a board's tree.
func plugin(t *testing.T, name, board string) sdk.Devices {
	t.Helper()
	var p sdk.DevicePlugin
	switch name {
	case "edgetpu":
		p = edgetpu.New("test")
	case "nvidia":
		p = nvidia.New("test", func(bool) nvidia.Library { return nvidia.NoLibrary{} })
	case "nvidia+nvml":
		l, err := nvidiatest.Read(filepath.Join(fixtures, board, "nvml.json"))
		if err != nil {
			t.Fatal(err)
		}
		p = nvidia.New("test", func(bool) nvidia.Library { return l })
	default:
		t.Fatalf("there is no plugin %s", name)
	}
	if err := p.Configure(t.Context(), sdk.Config{JSON: treeConfig(t, board)}); err != nil {
		t.Fatal(err)
	}
	return p.Devices()
}

// treeConfig is a plugin's configuration to read a board's tree.
func treeConfig(t *testing.T, board string) json.RawMessage {
	t.Helper()
	root, err := filepath.Abs(filepath.Join(fixtures, board, "root"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(map[string]string{"root": root})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func compare(t *testing.T, want, got inventory) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("inventory (-golden +got):\n%s", diff)
	}
}

// Every fixture yields its golden inventory. It needs nothing of the machine it
// runs on: built for another architecture, it shows that the plugins work there.
func TestGolden(t *testing.T) {
	for _, board := range boards(t) {
		g := readGolden(t, board)
		for name, want := range g.Inventories {
			t.Run(board+"/"+name, func(t *testing.T) { compare(t, want, look(t, plugin(t, name, board))) })
		}
	}
}

// Every value of a golden.json names its source, and no source is left over.
func TestGoldenValuesHaveSources(t *testing.T) {
	form := regexp.MustCompile(`^(\d(\.\d)?(, \d(\.\d)?)*(, table)?|plugin|made up): `)
	for _, board := range boards(t) {
		t.Run(board, func(t *testing.T) {
			g := readGolden(t, board)
			var values []string
			for name, i := range g.Inventories {
				values = append(values, fields(name, i)...)
			}
			used := map[string]bool{}
			for _, v := range values {
				covered := false
				for s := range g.Source {
					if pattern(s).MatchString(v) {
						covered, used[s] = true, true
					}
				}
				if !covered {
					t.Errorf("%s has no source", v)
				}
			}
			for s, text := range g.Source {
				if !form.MatchString(text) {
					t.Errorf(`source of %s: %q: want it to begin with the section of HARDWARE.md, "plugin" or "made up", and a colon`, s, text)
				}
				if !used[s] {
					t.Errorf("%s: no value has this source", s)
				}
			}
			if _, err := os.Stat(filepath.Join(fixtures, board, "SOURCE")); err != nil {
				t.Errorf("no word on where the tree comes from: %v", err)
			}
		})
	}
}

func pattern(s string) *regexp.Regexp {
	return regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(s), `\*`, `\S*`) + "$")
}

// fields names every value of an inventory as sources do.
func fields(name string, i inventory) []string {
	if len(i.Devices) == 0 {
		return []string{name + " none"}
	}
	var all []string
	for _, d := range i.Devices {
		at := name + " " + d.ID + " "
		all = append(all, at+"id", at+"kind", at+"ready", at+"health")
		if d.Reason != "" {
			all = append(all, at+"reason")
		}
		for k := range d.Attributes {
			all = append(all, at+"attributes."+k)
		}
		e := i.Edits[d.ID]
		for field, n := range map[string]int{"devices": len(e.Devices), "mounts": len(e.Mounts), "rules": len(e.Rules), "env": len(e.Env), "cdi": len(e.CDI), "gids": len(e.GIDs)} {
			if n > 0 {
				all = append(all, at+"edits."+field)
			}
		}
	}
	for _, s := range i.Stats {
		at := name + " " + s.ID + " stats."
		for field, told := range map[string]bool{
			"utilizationPercent": s.UtilizationPercent != nil, "memoryUsedBytes": s.MemoryUsedBytes != nil, "memoryTotalBytes": s.MemoryTotalBytes != nil,
			"temperatureCelsius": s.TemperatureCelsius != nil, "powerWatts": s.PowerWatts != nil,
		} {
			if told {
				all = append(all, at+field)
			}
		}
	}
	slices.Sort(all)
	return all
}
