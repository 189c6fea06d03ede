//go:build !cgo

// Package gonvml is NVML, NVIDIA's management library, through its Go bindings.
// They need cgo, which this build has not.
package gonvml
