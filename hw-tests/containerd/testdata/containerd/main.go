// Command containerd is the containerd plugin alone in a process, for tests.
package main

import (
	"github.com/belay-edge/belay/plugins/containerd"
	"github.com/belay-edge/belay/plugins/sdk/serve"
)

func main() { serve.Main(containerd.New("test")) }
