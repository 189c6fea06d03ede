package sdk_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/plugins/sdk"
)

type settings struct {
	Address string                    `json:"address" help:"socket of the daemon" default:"/run/d.sock"`
	Scan    time.Duration             `json:"scan" default:"5s" min:"1" max:"60"`
	Mode    string                    `json:"mode" enum:"fast,safe" required:"true"`
	Retries int                       `json:"retries" default:"3" min:"0"`
	Share   float64                   `json:"share"`
	Loud    bool                      `json:"loud"`
	Only    []string                  `json:"only" default:"[\"a\"]"`
	Hosts   map[string]map[string]any `json:"hosts"`
}

func TestDecodeConfig(t *testing.T) {
	for _, c := range []struct {
		name, json string
		want       settings
	}{
		{"defaults", `{"mode":"fast"}`, settings{Address: "/run/d.sock", Scan: 5 * time.Second, Mode: "fast", Retries: 3, Only: []string{"a"}}},
		{"all", `{"mode":"safe","address":"x","scan":"1m","retries":0,"share":0.5,"loud":true,"only":[],"hosts":{"h":{"plain":true}}}`,
			settings{Address: "x", Scan: time.Minute, Mode: "safe", Share: 0.5, Loud: true, Only: []string{}, Hosts: map[string]map[string]any{"h": {"plain": true}}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got settings
			if err := sdk.DecodeConfig(sdk.Config{JSON: json.RawMessage(c.json)}, &got); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
		})
	}
}

func TestWrongConfigIsNamedWhole(t *testing.T) {
	for _, c := range []struct {
		json  string
		words []string
	}{
		{``, []string{"mode is missing (a string of fast, safe)"}},
		{`[]`, []string{"no table"}},
		{`{"mode":"slow","scan":"100ms","retries":1.5,"loud":"yes","only":[1],"hosts":3,"adress":"x"}`, []string{
			`mode: "slow" is wrong, want a string of fast, safe`, `scan: "100ms" is wrong, want a duration such as "30s", at least 1 s, at most 60 s`,
			"retries: 1.5 is wrong, want a whole number, at least 0", `loud: "yes" is wrong, want true or false`, "only: [1] is wrong",
			"hosts: 3 is wrong, want a table", "adress is not known (known: address, scan, mode"}},
		{`{"mode":null}`, []string{"mode: null is wrong"}},
		{`{"mode":"fast","scan":5}`, []string{"scan: 5 is wrong"}},
	} {
		err := sdk.CheckConfig(sdk.OptionsOf(settings{}), json.RawMessage(c.json))
		if !errors.Is(err, sdk.Invalid) {
			t.Errorf("%s: %v", c.json, err)
			continue
		}
		for _, w := range c.words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: lacks %q: %v", c.json, w, err)
			}
		}
	}
}

func TestCheckInventory(t *testing.T) {
	good := sdk.Device{ID: "pci-0000:01:00.0", Kind: sdk.DeviceGPU, Ready: true, Attributes: map[string]string{"memory_mib": "8192"}}
	with := func(change func(*sdk.Device)) []sdk.Device {
		d := good
		change(&d)
		return []sdk.Device{d}
	}
	for name, c := range map[string]struct {
		devices []sdk.Device
		words   string
	}{
		"none":         {nil, ""},
		"good":         {[]sdk.Device{good}, ""},
		"twice":        {[]sdk.Device{good, good}, "two devices"},
		"too many":     {make([]sdk.Device, sdk.MaxDevices+1), "257 devices"},
		"no id":        {with(func(d *sdk.Device) { d.ID = "" }), "0 bytes"},
		"kind":         {with(func(d *sdk.Device) { d.Kind = "G P U" }), `"G P U"`},
		"health":       {with(func(d *sdk.Device) { d.Health = "fine" }), `"fine"`},
		"shares":       {with(func(d *sdk.Device) { d.Shares = -1 }), "-1 shares"},
		"no reason":    {with(func(d *sdk.Device) { d.Ready = false }), "no reason"},
		"long reason":  {with(func(d *sdk.Device) { d.Reason = strings.Repeat("x", 300) }), "300 bytes"},
		"attribute":    {with(func(d *sdk.Device) { d.Attributes = map[string]string{"Memory": "1"} }), `"Memory"`},
		"long value":   {with(func(d *sdk.Device) { d.Attributes = map[string]string{"a": strings.Repeat("x", 300)} }), "300 bytes"},
		"only present": {with(func(d *sdk.Device) { d.Ready, d.Reason = false, "no driver" }), ""},
	} {
		err := sdk.CheckInventory(c.devices)
		if c.words == "" && err != nil || c.words != "" && (!errors.Is(err, sdk.Invalid) || !strings.Contains(err.Error(), c.words)) {
			t.Errorf("%s: %v, want %q", name, err, c.words)
		}
	}
}
