// Package containerd is the runtime plugin that runs containers through a
// containerd on the same device, version 1.6 or newer. It keeps nothing in
// memory that containerd, its shims or the plugin's two directories do not
// have as well: it may be killed at any moment and its successor sees it all.
package containerd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Plugin talks to one containerd.
type Plugin struct {
	version string
	log     *slog.Logger

	cfg      Config
	stateDir string // tasks/<id>: what PrepareTask was told
	runDir   string // containers/<id>, netns/<id>: what a reboot undoes
	owner    string // told apart from other agents' containers by it
	bootID   string
	cgroups  cgroups

	client *client.Client
	cni    *bridge
	ports  portTable
	pulls  keyedMutex

	mu       sync.Mutex
	snapshot string                 // chosen snapshotter, once known
	attempts map[string]sdk.Attempt // by container id, for events
}

var (
	_ sdk.Plugin  = (*Plugin)(nil)
	_ sdk.Runtime = (*Plugin)(nil)
)

// New makes a plugin that calls itself by this version.
func New(version string) *Plugin {
	return &Plugin{version: version, log: slog.Default(), attempts: map[string]sdk.Attempt{}}
}

// Plugin implements sdk.Plugin: its name is "containerd".

// Info implements both sdk.Plugin and, through Runtime, sdk.Runtime.
func (p *Plugin) describe() sdk.Info {
	return sdk.Info{Name: "containerd", Version: p.version, Kinds: []sdk.Kind{sdk.KindRuntime}}
}
