//go:build cgo

package gonvml

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/google/go-cmp/cmp"

	"github.com/belay-edge/belay/plugins/nvidia"
	"github.com/belay-edge/belay/plugins/sdk"
)

// The library of an old driver, loaded as the real one is, lacks functions:
// calling one would end the process, so they are left out, and what remains is
// told.
func TestLibraryOfAnOldDriver(t *testing.T) {
	cc, err := exec.LookPath("gcc")
	if err != nil {
		t.Skip("no gcc to build the stand-in with")
	}
	so := filepath.Join(t.TempDir(), "libnvidia-ml.so.1")
	if out, err := exec.Command(cc, "-shared", "-fPIC", "-o", so, "testdata/old.c").CombinedOutput(); err != nil {
		t.Fatalf("build the stand-in: %v\n%s", err, out)
	}
	l := Of(nvml.New(nvml.WithLibraryPath(so)))
	for range 2 { // and again, as when a driver goes and comes
		if err := l.Init(); err != nil {
			t.Fatal(err)
		}
		if v, err := l.CUDAVersion(); !errors.Is(err, nvidia.ErrNotSupported) {
			t.Errorf("CUDA %d, %v", v, err)
		}
		all, err := l.GPUs()
		if err != nil || len(all) != 1 {
			t.Fatalf("%d GPUs, %v; want the one that is not lost", len(all), err)
		}
		g := all[0]
		bus, err := g.BusID()
		if bus != "00000000:0A:00.0" || err != nil {
			t.Errorf("bus id %q, %v", bus, err)
		}
		if _, _, err := g.MIG(); !errors.Is(err, nvidia.ErrNotSupported) {
			t.Errorf("MIG: %v", err)
		}
		if _, _, err := g.ComputeCapability(); !errors.Is(err, nvidia.ErrNotSupported) {
			t.Errorf("compute capability: %v", err)
		}
		if _, err := g.Power(); !errors.Is(err, nvidia.ErrNotSupported) {
			t.Errorf("power: %v", err)
		}
		if err := g.Check(); err != nil {
			t.Errorf("check: %v", err)
		}
		l.Shutdown()
	}

	p := nvidia.New("test", func(bool) nvidia.Library { return l })
	root := plantCard(t, "0000:0a:00.0")
	if err := p.Configure(t.Context(), sdk.Config{JSON: json.RawMessage(fmt.Sprintf(`{"root":%q}`, root))}); err != nil {
		t.Fatal(err)
	}
	stats, err := p.Stats(t.Context(), []string{"pci-0000:0a:00.0"})
	want := []sdk.DeviceStats{{ID: "pci-0000:0a:00.0", UtilizationPercent: new(12.0), MemoryUsedBytes: new(uint64(1 << 30)), MemoryTotalBytes: new(uint64(2 << 30)), TemperatureCelsius: new(40.0)}}
	if diff := cmp.Diff(want, stats); diff != "" || err != nil {
		t.Errorf("stats (-want +got): %v\n%s", err, diff)
	}
}
