//go:build cgo

package gonvml

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/NVIDIA/go-nvml/pkg/nvml"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/dgxa100"
	"github.com/NVIDIA/go-nvml/pkg/nvml/mock/server"

	"github.com/belay-edge/belay/plugins/nvidia"
	"github.com/belay-edge/belay/plugins/sdk"
)

// plant writes files into a tree.
func plant(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

const control = "c 195 255 0666 root root /dev/nvidiactl\nc 510 0 0666 root root /dev/nvidia-uvm\n"

// plantCard makes the tree of a card whose driver is bound.
func plantCard(t *testing.T, bdf string) string {
	t.Helper()
	dir := "sys/bus/pci/devices/" + bdf
	root := plant(t, map[string]string{dir + "/vendor": "0x10de\n", dir + "/class": "0x030000\n", "dev.list": "c 195 0 0666 root root /dev/nvidia0\n" + control})
	if err := os.Symlink("../../drivers/nvidia", filepath.Join(root, dir, "driver")); err != nil {
		t.Fatal(err)
	}
	return root
}

// tree has the nodes of all cards.
func tree(t *testing.T, s *server.Server) string {
	t.Helper()
	nodes := control
	n, _ := s.DeviceGetCount()
	for i := range n {
		nodes += fmt.Sprintf("c 195 %d 0666 root root /dev/nvidia%d\n", i, i)
	}
	return plant(t, map[string]string{"dev.list": nodes})
}

func inventory(t *testing.T, s *server.Server) []sdk.Device {
	t.Helper()
	p := nvidia.New("test", func(bool) nvidia.Library { return Of(s) })
	if err := p.Configure(t.Context(), sdk.Config{JSON: json.RawMessage(fmt.Sprintf(`{"root":%q}`, tree(t, s)))}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got []sdk.Device
	if err := p.Watch(ctx, func(all []sdk.Device) { got = all; cancel() }); err != nil {
		t.Fatal(err)
	}
	return got
}

// quiet gives the mock answers it has none for.
func quiet(s *server.Server) {
	s.ExtensionsFunc = func() nvml.ExtendedInterface {
		return &mock.ExtendedInterface{LookupSymbolFunc: func(f string) error {
			if strings.Contains(f, "RemappedRows") || strings.Contains(f, "RetiredPages") {
				return errors.New("no such symbol")
			}
			return nil
		}}
	}
	n, _ := s.DeviceGetCount()
	for i := range n {
		h, _ := s.DeviceGetHandleByIndex(i)
		var pci nvml.PciInfo
		for j, c := range fmt.Sprintf("00000000:%02X:00.0", 7+8*i) {
			pci.BusId[j] = int8(c)
		}
		h.(*server.Device).GetPciInfoFunc = func() (nvml.PciInfo, nvml.Return) { return pci, nvml.SUCCESS }
		h.(*server.Device).GetTemperatureFunc = func(nvml.TemperatureSensors) (uint32, nvml.Return) { return 0, nvml.ERROR_NOT_SUPPORTED }
	}
}

func TestDGXA100(t *testing.T) {
	s := dgxa100.New()
	quiet(s)
	all := inventory(t, s)
	if len(all) != 8 {
		t.Fatalf("found %d GPUs of 8: %+v", len(all), all)
	}
	for _, d := range all {
		a := d.Attributes
		if !d.Ready || d.Health != sdk.HealthHealthy || a["model"] != "NVIDIA A100-SXM4-40GB" && a["model"] != "Mock NVIDIA A100-SXM4-40GB" || a["memory_mib"] != "40960" || a["compute_capability"] != "8.0" ||
			a["driver_version"] != "550.54.15" || a["cuda_version"] != "12.4" || !strings.HasPrefix(a["uuid"], "GPU-") || !regexp.MustCompile("^pci-0000:[0-9a-f]{2}:00.0$").MatchString(d.ID) {
			t.Errorf("%+v", d)
		}
	}
}

func TestLostGPU(t *testing.T) {
	s := dgxa100.New()
	quiet(s)
	h, _ := s.DeviceGetHandleByIndex(3)
	h.(*server.Device).GetMemoryInfoFunc = func() (nvml.Memory, nvml.Return) { return nvml.Memory{}, nvml.ERROR_GPU_IS_LOST }
	all := inventory(t, s)
	for i, d := range all {
		if bad := d.Health == sdk.HealthUnhealthy; bad != (i == 3) {
			t.Errorf("GPU %d: %+v", i, d)
		}
	}
}

func TestErrors(t *testing.T) {
	for ret, want := range map[nvml.Return]error{
		nvml.SUCCESS: nil, nvml.ERROR_LIBRARY_NOT_FOUND: nvidia.ErrNoLibrary, nvml.ERROR_DRIVER_NOT_LOADED: nvidia.ErrNoDriver,
		nvml.ERROR_NOT_SUPPORTED: nvidia.ErrNotSupported, nvml.ERROR_GPU_IS_LOST: nvidia.ErrLost, nvml.ERROR_RESET_REQUIRED: nvidia.ErrResetRequired,
	} {
		if got := explain(ret); !errors.Is(got, want) {
			t.Errorf("%d: %v, want %v", ret, got, want)
		}
	}
	if err := explain(nvml.ERROR_UNKNOWN); err == nil {
		t.Error("an unknown error is none")
	}
}

// Without a driver the real library answers cleanly, and again.
func TestThisMachine(t *testing.T) {
	l := New()
	for range 2 {
		err := l.Init()
		if err == nil {
			l.Shutdown()
			t.Log("there is a driver here")
			continue
		}
		if !errors.Is(err, nvidia.ErrNoLibrary) && !errors.Is(err, nvidia.ErrNoDriver) {
			t.Errorf("Init: %v", err)
		}
	}
}
