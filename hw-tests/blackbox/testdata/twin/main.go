// Command twin is a device plugin for tests: every file NAME.device of a
// directory is a device, exclusive and ready, or not for the reason in it.
package main

import (
	"context"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

type config struct {
	Dir string `json:"dir" default:""`
	// Nodes gives the containers DIR/NAME.node as /dev/twin-NAME.
	Nodes bool `json:"nodes" default:"false"`
	// CDI names the devices to whoever has a specification, instead.
	CDI bool `json:"cdi" default:"false"`
}

type twin struct{ config config }

func main() { serve.Main(&twin{}) }

func (t *twin) Info() sdk.Info {
	return sdk.Info{Name: "twin", Version: "1", Kinds: []sdk.Kind{sdk.KindDevice}}
}
func (t *twin) Devices() sdk.Devices { return t }
func (t *twin) Configure(_ context.Context, c sdk.Config) error {
	return sdk.DecodeConfig(c, &t.config)
}

func (t *twin) look() []sdk.Device {
	found := []sdk.Device{}
	files, _ := filepath.Glob(filepath.Join(t.config.Dir, "*.device"))
	for _, f := range files {
		id := strings.TrimSuffix(filepath.Base(f), ".device")
		reason, _ := os.ReadFile(f)
		found = append(found, sdk.Device{ID: id, Kind: "twin", Ready: len(reason) == 0, Reason: string(reason),
			Attributes: map[string]string{"name": id}})
	}
	return found
}

func (t *twin) Watch(ctx context.Context, f func([]sdk.Device)) error {
	last := t.look()
	f(last)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if now := t.look(); !reflect.DeepEqual(now, last) {
			last = now
			f(t.look())
		}
	}
}

func (t *twin) Edits(_ context.Context, ids []string) (sdk.Edits, error) {
	e := sdk.Edits{Env: []string{"TWIN=" + strings.Join(ids, ",")}}
	for _, id := range ids {
		if _, err := os.Stat(filepath.Join(t.config.Dir, id+".device")); err != nil {
			return sdk.Edits{}, sdk.Errorf(sdk.NotFound, "edits", "there is no %s", id)
		}
		switch {
		case t.config.CDI:
			e.CDIDevices = append(e.CDIDevices, "example.com/twin="+id)
		case t.config.Nodes:
			e.Devices = append(e.Devices, sdk.HostDevice{HostPath: filepath.Join(t.config.Dir, id+".node"), ContainerPath: "/dev/twin-" + id, Permissions: "rw"})
		}
	}
	return e, nil
}

func (t *twin) Stats(context.Context, []string) ([]sdk.DeviceStats, error) {
	return nil, sdk.Errorf(sdk.Unsupported, "stats", "nothing to measure")
}
