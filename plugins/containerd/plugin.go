// Package containerd is the runtime plugin that runs containers through a
// containerd on the same device, version 1.6 or newer. It keeps nothing in
// memory that containerd, its shims or the plugin's two directories do not
// have as well: it may be killed at any moment and its successor sees it all.
package containerd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Plugin is the sdk.RuntimePlugin called "containerd".
type Plugin struct {
	version string
	rt      Runtime
}

// Name is what task definitions and operators call this plugin.
const Name = "containerd"

// New makes a plugin that calls itself by this version.
func New(version string) *Plugin {
	return &Plugin{version: version, rt: Runtime{attempts: map[string]sdk.Attempt{}}}
}

// Info implements sdk.Plugin.
func (p *Plugin) Info() sdk.Info {
	return sdk.Info{Name: Name, Version: p.version, Kinds: []sdk.Kind{sdk.KindRuntime}}
}

var _ sdk.ImageStore = (*Runtime)(nil)

// Runtime implements sdk.RuntimePlugin.
func (p *Plugin) Runtime() sdk.Runtime { return &p.rt }

// Configure implements sdk.Plugin. It does not need containerd to be up.
func (p *Plugin) Configure(ctx context.Context, c sdk.Config) error { return p.rt.configure(c) }

// Runtime talks to one containerd. Use it only after Plugin.Configure.
type Runtime struct {
	log *slog.Logger

	cfg      Config
	stateDir string // tasks/<id>.json: what PrepareTask was told
	runDir   string // containers/<id>/, netns/<id>: what a reboot undoes
	owner    string // tells this agent's containers from another's
	bootID   string
	cgroups  cgroups

	client     *client.Client
	bridge     *bridge
	known      knowledge
	registries transports
	ports      portTable
	pulls      keyedMutex
	tasks      keyedMutex
	attempts   map[string]sdk.Attempt // by container id, for events; guarded by mu

	bridgeless sync.Once // said that there is no bridge network; Info is asked again and again

	mu          sync.Mutex
	snapshotter string // chosen, once known
	snapshots   string // the directory it keeps them in, if containerd says
}

func (r *Runtime) configure(c sdk.Config) error {
	cfg, err := parseConfig(c.JSON)
	if err != nil {
		return err
	}
	r.cfg, r.stateDir, r.runDir = cfg, c.StateDir, c.RunDir
	r.log = slog.Default()
	// containerd's libraries narrate every request on a logger of their own.
	_ = log.SetLevel("error")
	sum := sha256.Sum256([]byte(filepath.Clean(c.StateDir)))
	r.owner = hex.EncodeToString(sum[:8])
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return sdk.Errorf(sdk.Internal, "configure containerd", "read the boot id: %w", err)
	}
	r.bootID = strings.TrimSpace(string(boot))
	// Left from commands whose caller died with an earlier process.
	_ = os.RemoveAll(filepath.Join(r.runDir, "exec"))
	for _, d := range []string{r.tasksDir(), r.containersDir(), filepath.Join(r.runDir, "exec")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return sdk.Errorf(sdk.Internal, "configure containerd", "%w", err)
		}
	}
	r.cgroups = findCgroups("/sys/fs/cgroup")
	r.bridge = newBridge(cfg, r.runDir)
	// Where images are looked into for a moment: what a killed process of this
	// plugin had mounted there goes.
	if err := mount.SetTempMountLocation(filepath.Join(r.runDir, "mounts")); err != nil {
		return sdk.Errorf(sdk.Internal, "configure containerd", "%w", err)
	}
	if problems, err := mount.CleanupTempMounts(unix.MNT_DETACH); err != nil || problems != nil {
		r.log.Warn("a mount is left from an earlier process", "err", errors.Join(append(problems, err)...))
	}
	r.client, err = client.New(cfg.Address, client.WithTimeout(2*time.Second), client.WithDefaultNamespace(cfg.Namespace))
	if err != nil {
		return sdk.Errorf(sdk.Invalid, "configure containerd", "%w", err)
	}
	return nil
}

func (r *Runtime) tasksDir() string              { return filepath.Join(r.stateDir, "tasks") }
func (r *Runtime) containersDir() string         { return filepath.Join(r.runDir, "containers") }
func (r *Runtime) containerDir(id string) string { return filepath.Join(r.containersDir(), id) }
func (r *Runtime) in(c context.Context) context.Context {
	return namespaces.WithNamespace(c, r.cfg.Namespace)
}

// Info implements sdk.Runtime.
func (r *Runtime) Info(ctx context.Context) (sdk.RuntimeInfo, error) {
	const op = "ask containerd for its version"
	// containerd's client waits for a socket that is not there to appear.
	if _, err := os.Stat(r.cfg.Address); errors.Is(err, fs.ErrNotExist) {
		return sdk.RuntimeInfo{}, sdk.Errorf(sdk.Unavailable, op, "%w", err).WithHint(r.daemonHint("no such file"))
	}
	v, err := r.client.Version(r.in(ctx))
	if err != nil {
		return sdk.RuntimeInfo{}, r.fail(op, err)
	}
	s, err := r.chooseSnapshotter(r.in(ctx))
	if err != nil {
		return sdk.RuntimeInfo{}, r.fail(op, err)
	}
	i := sdk.RuntimeInfo{
		Version: v.Version, Images: true, Exec: true, Stats: true,
		Attributes: map[string]string{
			"containerd.version":     v.Version,
			"containerd.snapshotter": s,
			"containerd.cgroups":     r.cgroups.name(),
		},
	}
	if err := r.bridge.usable(); err == nil {
		i.Networks = append(i.Networks, sdk.NetworkBridge)
	} else {
		r.bridgeless.Do(func() { r.log.Warn("no bridge network", "reason", err) })
	}
	i.Networks = append(i.Networks, sdk.NetworkHost, sdk.NetworkNone)
	return i, nil
}

// after is a context for cleaning up when the caller's may have ended.
func after(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
}

// keyedMutex locks by name. The zero value is ready.
type keyedMutex struct {
	mu    sync.Mutex
	locks map[string]chan struct{}
}

// lock waits for the name, or for the context to end.
func (k *keyedMutex) lock(ctx context.Context, name string) (unlock func(), err error) {
	for {
		k.mu.Lock()
		held, ok := k.locks[name]
		if !ok {
			if k.locks == nil {
				k.locks = map[string]chan struct{}{}
			}
			mine := make(chan struct{})
			k.locks[name] = mine
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				delete(k.locks, name)
				k.mu.Unlock()
				close(mine)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-held:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
