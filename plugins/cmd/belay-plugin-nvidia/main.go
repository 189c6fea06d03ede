//go:build cgo

// Command belay-plugin-nvidia is the plugin for NVIDIA GPUs. It is a program of
// its own because it loads NVIDIA's library, which needs cgo.
package main

import (
	"github.com/belay-edge/belay/plugins/nvidia"
	"github.com/belay-edge/belay/plugins/nvidia/gonvml"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

// version is set by the build: -ldflags "-X main.version=1.2.3".
var version = "dev"

func main() {
	serve.Main(nvidia.New(version, func(recorded bool) nvidia.Library {
		if recorded {
			return nvidia.NoLibrary{}
		}
		return gonvml.New()
	}))
}
