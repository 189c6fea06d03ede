//go:build cgo

// Package gonvml is NVML, NVIDIA's management library, through its Go bindings.
// The library is loaded when it is first needed and may be missing.
package gonvml

import (
	"errors"
	"fmt"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"github.com/belay-edge/belay/plugins/nvidia"
)

// Library implements nvidia.Library.
type Library struct {
	api nvml.Interface
	// has says whether this version of the library has a function: calling
	// one that it lacks would end the process.
	has func(function string) bool
}

var _ nvidia.Library = (*Library)(nil)

// New returns the library of this machine.
func New() *Library { return Of(nvml.New()) }

// Of returns a library with these bindings.
func Of(api nvml.Interface) *Library {
	return &Library{api: api, has: func(f string) bool { return api.Extensions().LookupSymbol(f) == nil }}
}

// Init implements nvidia.Library.
func (l *Library) Init() error { return explain(l.api.Init()) }

// Shutdown implements nvidia.Library.
func (l *Library) Shutdown() { _ = l.api.Shutdown() }

// DriverVersion implements nvidia.Library.
func (l *Library) DriverVersion() (string, error) {
	v, ret := l.api.SystemGetDriverVersion()
	return v, explain(ret)
}

// CUDAVersion implements nvidia.Library.
func (l *Library) CUDAVersion() (int, error) {
	if !l.has("nvmlSystemGetCudaDriverVersion") {
		return 0, nvidia.ErrNotSupported
	}
	v, ret := l.api.SystemGetCudaDriverVersion()
	return v, explain(ret)
}

// GPUs implements nvidia.Library. One that cannot be talked to has no handle.
func (l *Library) GPUs() ([]nvidia.GPU, error) {
	n, ret := l.api.DeviceGetCount()
	if err := explain(ret); err != nil {
		return nil, err
	}
	all := make([]nvidia.GPU, 0, n)
	for i := range n {
		if d, ret := l.api.DeviceGetHandleByIndex(i); ret == nvml.SUCCESS {
			all = append(all, &gpu{l: l, d: d})
		}
	}
	return all, nil
}

// gpu implements nvidia.GPU.
type gpu struct {
	l *Library
	d nvml.Device
}

func (g *gpu) UUID() (string, error) {
	v, ret := g.d.GetUUID()
	return v, explain(ret)
}

func (g *gpu) Name() (string, error) {
	v, ret := g.d.GetName()
	return v, explain(ret)
}

func (g *gpu) BusID() (string, error) {
	info, ret := g.d.GetPciInfo()
	if err := explain(ret); err != nil {
		return "", err
	}
	var b []byte
	for _, c := range info.BusId {
		if c == 0 {
			break
		}
		b = append(b, byte(c))
	}
	if len(b) == 0 {
		return "", nvidia.ErrNotSupported
	}
	return string(b), nil
}

func (g *gpu) Minor() (int, error) {
	v, ret := g.d.GetMinorNumber()
	return v, explain(ret)
}

func (g *gpu) Memory() (used, total uint64, err error) {
	m, ret := g.d.GetMemoryInfo()
	return m.Used, m.Total, explain(ret)
}

func (g *gpu) ComputeCapability() (major, minor int, err error) {
	if !g.l.has("nvmlDeviceGetCudaComputeCapability") {
		return 0, 0, nvidia.ErrNotSupported
	}
	major, minor, ret := g.d.GetCudaComputeCapability()
	return major, minor, explain(ret)
}

func (g *gpu) MIG() (bool, []nvidia.GPU, error) {
	if !g.l.has("nvmlDeviceGetMigMode") {
		return false, nil, nvidia.ErrNotSupported
	}
	mode, _, ret := g.d.GetMigMode()
	if err := explain(ret); err != nil || mode != nvml.DEVICE_MIG_ENABLE {
		return false, nil, err
	}
	n, ret := g.d.GetMaxMigDeviceCount()
	if err := explain(ret); err != nil {
		return true, nil, nil // divided, into what it does not say
	}
	var all []nvidia.GPU
	for i := range n {
		// Numbers that are not taken say NOT_FOUND or INVALID_ARGUMENT.
		if d, ret := g.d.GetMigDeviceHandleByIndex(i); ret == nvml.SUCCESS {
			all = append(all, &gpu{l: g.l, d: d})
		}
	}
	return true, all, nil
}

func (g *gpu) Instance() (gi, ci int, err error) {
	gi, ret := g.d.GetGpuInstanceId()
	if err := explain(ret); err != nil {
		return 0, 0, err
	}
	ci, ret = g.d.GetComputeInstanceId()
	return gi, ci, explain(ret)
}

func (g *gpu) Utilization() (int, error) {
	v, ret := g.d.GetUtilizationRates()
	return int(v.Gpu), explain(ret)
}

func (g *gpu) Temperature() (int, error) {
	v, ret := g.d.GetTemperature(nvml.TEMPERATURE_GPU)
	return int(v), explain(ret)
}

func (g *gpu) Power() (int, error) {
	v, ret := g.d.GetPowerUsage()
	return int(v), explain(ret)
}

// Check asks things that a GPU which is lost cannot answer, and whether memory
// went bad that only a reset, or a new GPU, repairs.
func (g *gpu) Check() error {
	_, _, memory := g.Memory()
	_, temperature := g.Temperature()
	for _, err := range []error{memory, temperature} {
		if errors.Is(err, nvidia.ErrLost) || errors.Is(err, nvidia.ErrResetRequired) {
			return err
		}
	}
	if g.l.has("nvmlDeviceGetRemappedRows") {
		switch _, _, pending, failed, ret := g.d.GetRemappedRows(); {
		case ret != nvml.SUCCESS:
		case failed:
			return errors.New("its memory is worn: a bad row could not be replaced, exchange the GPU")
		case pending:
			return fmt.Errorf("a bad row of its memory is waiting to be replaced: %w", nvidia.ErrResetRequired)
		}
	}
	if g.l.has("nvmlDeviceGetRetiredPagesPendingStatus") {
		if pending, ret := g.d.GetRetiredPagesPendingStatus(); ret == nvml.SUCCESS && pending == nvml.FEATURE_ENABLED {
			return fmt.Errorf("a bad page of its memory is waiting to be retired: %w", nvidia.ErrResetRequired)
		}
	}
	return nil
}

// explain turns NVML's codes into the plugin's errors.
func explain(ret nvml.Return) error {
	switch ret {
	case nvml.SUCCESS:
		return nil
	case nvml.ERROR_LIBRARY_NOT_FOUND:
		return nvidia.ErrNoLibrary
	case nvml.ERROR_DRIVER_NOT_LOADED:
		return nvidia.ErrNoDriver
	case nvml.ERROR_NOT_SUPPORTED, nvml.ERROR_FUNCTION_NOT_FOUND, nvml.ERROR_INVALID_ARGUMENT, nvml.ERROR_NOT_FOUND, nvml.ERROR_NO_PERMISSION:
		return nvidia.ErrNotSupported
	case nvml.ERROR_GPU_IS_LOST:
		return nvidia.ErrLost
	case nvml.ERROR_RESET_REQUIRED:
		return nvidia.ErrResetRequired
	case nvml.ERROR_LIB_RM_VERSION_MISMATCH:
		return errors.New("the driver and its libraries are of different versions, as after an update without a reboot: reboot")
	}
	return fmt.Errorf("NVML: %s (%d)", ret, int32(ret))
}
