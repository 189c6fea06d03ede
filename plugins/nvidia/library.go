package nvidia

import (
	"errors"
	"fmt"
)

// Library is what this plugin needs of NVML, NVIDIA's management library.
// Implementations return the errors below, wrapped or not, and anything else
// for the rest. Calls come from one goroutine at a time.
type Library interface {
	// Init loads the library and finds the GPUs; it may be called again after
	// an error, and after Shutdown.
	Init() error
	Shutdown()
	DriverVersion() (string, error)
	CUDAVersion() (int, error) // 12060 is 12.6
	// GPUs leaves out those that cannot be talked to at all.
	GPUs() ([]GPU, error)
}

// GPU is a GPU or, of a divided one, an instance.
type GPU interface {
	UUID() (string, error)
	Name() (string, error)
	BusID() (string, error) // "0000:06:00.0"
	Minor() (int, error)    // of its node
	Memory() (used, total uint64, err error)
	ComputeCapability() (major, minor int, err error)
	// MIG says whether the GPU is divided, and the instances there are.
	MIG() (on bool, instances []GPU, err error)
	// Instance is an instance's place in its GPU.
	Instance() (gpu, compute int, err error)
	Utilization() (percent int, err error)
	Temperature() (celsius int, err error)
	Power() (milliwatts int, err error)
	// Check is ErrLost, ErrResetRequired or nil: anything that does not say
	// the hardware is bad is nil.
	Check() error
}

// Errors of a Library.
var (
	ErrNoLibrary     = errors.New("its management library libnvidia-ml.so.1 is not installed, or not for this process")
	ErrNotBuilt      = errors.New("this build of the plugin cannot load its management library: it was made without cgo")
	ErrNoDriver      = errors.New("the driver is not loaded")
	ErrNotSupported  = errors.New("not supported")
	ErrLost          = errors.New("the GPU has fallen off the bus or cannot be reached")
	ErrResetRequired = errors.New("the GPU must be reset before it can be used again")
)

// NoLibrary is the Library of a machine, or a build, without NVML.
type NoLibrary struct {
	Why error // nil: ErrNoLibrary
}

var _ Library = NoLibrary{}

// Init implements Library.
func (n NoLibrary) Init() error {
	if n.Why != nil {
		return n.Why
	}
	return ErrNoLibrary
}

// Shutdown implements Library.
func (NoLibrary) Shutdown() {}

// DriverVersion implements Library.
func (NoLibrary) DriverVersion() (string, error) { return "", ErrNoLibrary }

// CUDAVersion implements Library.
func (NoLibrary) CUDAVersion() (int, error) { return 0, ErrNoLibrary }

// GPUs implements Library.
func (NoLibrary) GPUs() ([]GPU, error) { return nil, ErrNoLibrary }

// session keeps a Library initialised while there is a driver, and begins anew
// when the GPUs the kernel has changed: NVML lists those of its Init.
type session struct {
	library Library
	open    bool
	of      string // the GPUs the driver had at Init
}

// gpus lists what NVML knows. present names the GPUs that the driver has.
func (s *session) gpus(present string) ([]GPU, error) {
	if s.open && s.of != present {
		s.close()
	}
	if !s.open {
		if err := s.library.Init(); err != nil {
			return nil, err
		}
		s.open, s.of = true, present
	}
	all, err := s.library.GPUs()
	if err != nil {
		s.close()
		return nil, fmt.Errorf("list the GPUs: %w", err)
	}
	return all, nil
}

func (s *session) close() {
	if s.open {
		s.library.Shutdown()
		s.open = false
	}
}
