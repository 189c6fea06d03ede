// Package nvidiatest gives tests an NVML whose answers are written down: those
// of boards nobody has at hand.
package nvidiatest

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/belay-edge/belay/plugins/nvidia"
)

// Library answers as recorded. What is nil is not supported.
type Library struct {
	Err    error `json:"-"` // of Init
	Driver string
	CUDA   *int
	Cards  []*GPU `json:"GPUs"`

	Inits, Shutdowns int `json:"-"`
}

// GPU answers as recorded. What is nil is not supported.
type GPU struct {
	NameIs     *string `json:"Name"`
	UUIDIs     *string `json:"UUID"`
	BusIDIs    *string `json:"BusID"`
	MinorIs    *int    `json:"Minor"`
	Used       *uint64
	Total      *uint64
	Capability []int
	MIGOn      *bool
	Instances  []*GPU
	GI, CI     *int
	Percent    *int
	Celsius    *int
	Milliwatts *int
	Bad        error `json:"-"` // of Check
}

var (
	_ nvidia.Library = (*Library)(nil)
	_ nvidia.GPU     = (*GPU)(nil)
)

// Read reads a library from a JSON file.
func Read(file string) (*Library, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var l Library
	if err := json.Unmarshal(b, &l); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return &l, nil
}

func told[T any](v *T) (T, error) {
	if v == nil {
		var none T
		return none, nvidia.ErrNotSupported
	}
	return *v, nil
}

// Init implements nvidia.Library.
func (l *Library) Init() error { l.Inits++; return l.Err }

// Shutdown implements nvidia.Library.
func (l *Library) Shutdown() { l.Shutdowns++ }

// DriverVersion implements nvidia.Library.
func (l *Library) DriverVersion() (string, error) {
	if l.Driver == "" {
		return "", nvidia.ErrNotSupported
	}
	return l.Driver, nil
}

// CUDAVersion implements nvidia.Library.
func (l *Library) CUDAVersion() (int, error) { return told(l.CUDA) }

// GPUs implements nvidia.Library.
func (l *Library) GPUs() ([]nvidia.GPU, error) { return gpus(l.Cards), nil }

func gpus(all []*GPU) []nvidia.GPU {
	list := make([]nvidia.GPU, 0, len(all))
	for _, g := range all {
		list = append(list, g)
	}
	return list
}

// Name implements nvidia.GPU.
func (g *GPU) Name() (string, error) { return told(g.NameIs) }

// UUID implements nvidia.GPU.
func (g *GPU) UUID() (string, error) { return told(g.UUIDIs) }

// BusID implements nvidia.GPU.
func (g *GPU) BusID() (string, error) { return told(g.BusIDIs) }

// Minor implements nvidia.GPU.
func (g *GPU) Minor() (int, error) { return told(g.MinorIs) }

// Memory implements nvidia.GPU.
func (g *GPU) Memory() (used, total uint64, err error) {
	if total, err = told(g.Total); err == nil {
		used, err = told(g.Used)
	}
	return used, total, err
}

// ComputeCapability implements nvidia.GPU.
func (g *GPU) ComputeCapability() (major, minor int, err error) {
	if len(g.Capability) != 2 {
		return 0, 0, nvidia.ErrNotSupported
	}
	return g.Capability[0], g.Capability[1], nil
}

// MIG implements nvidia.GPU.
func (g *GPU) MIG() (bool, []nvidia.GPU, error) {
	on, err := told(g.MIGOn)
	return on, gpus(g.Instances), err
}

// Instance implements nvidia.GPU.
func (g *GPU) Instance() (gi, ci int, err error) {
	if gi, err = told(g.GI); err == nil {
		ci, err = told(g.CI)
	}
	return gi, ci, err
}

// Utilization implements nvidia.GPU.
func (g *GPU) Utilization() (int, error) { return told(g.Percent) }

// Temperature implements nvidia.GPU.
func (g *GPU) Temperature() (int, error) { return told(g.Celsius) }

// Power implements nvidia.GPU.
func (g *GPU) Power() (int, error) { return told(g.Milliwatts) }

// Check implements nvidia.GPU.
func (g *GPU) Check() error { return g.Bad }
