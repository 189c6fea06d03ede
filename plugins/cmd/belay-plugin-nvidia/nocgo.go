//go:build !cgo

// Command belay-plugin-nvidia is the plugin for NVIDIA GPUs. Built without cgo
// it cannot load NVIDIA's library: it says what it can see without.
package main

import (
	"github.com/belay-edge/belay/plugins/nvidia"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

// version is set by the build: -ldflags "-X main.version=1.2.3".
var version = "dev"

func main() {
	serve.Main(nvidia.New(version+"+nocgo", func(recorded bool) nvidia.Library {
		if recorded {
			return nvidia.NoLibrary{}
		}
		return nvidia.NoLibrary{Why: nvidia.ErrNotBuilt}
	}))
}
