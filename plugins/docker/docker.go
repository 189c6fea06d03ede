// Package docker is the runtime plugin that runs containers through a Docker
// daemon on the same device: for boards whose vendor sets Docker up. What must
// be known of a container is in its labels, so the plugin may be killed at any
// moment. The daemon cannot write output to files of ours, so it keeps it in a
// log of its own, and a process that outlives the plugin copies it from there:
// see output.go and copier.go.
package docker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Name is what task definitions and operators call this plugin.
const Name = "docker"

// Plugin is the sdk.RuntimePlugin called "docker".
type Plugin struct {
	version string
	rt      Runtime
}

// New makes a plugin that calls itself by this version.
func New(version string) *Plugin { return &Plugin{version: version} }

// Info implements sdk.Plugin.
func (p *Plugin) Info() sdk.Info {
	return sdk.Info{Name: Name, Version: p.version, Kinds: []sdk.Kind{sdk.KindRuntime}}
}

// Runtime implements sdk.RuntimePlugin.
func (p *Plugin) Runtime() sdk.Runtime { return &p.rt }

// Configure implements sdk.Plugin. It does not need the daemon to be up.
func (p *Plugin) Configure(_ context.Context, c sdk.Config) error { return p.rt.configure(c) }

// Runtime talks to one Docker daemon. Use it only after Plugin.Configure.
type Runtime struct {
	log      *slog.Logger
	cfg      Config
	stateDir string // tasks/<id>.json: what PrepareTask was told; images/: what indexes meant; pulled/: what is ours
	runDir   string // outputs/<name>/: how far output is copied; emptied by a reboot
	owner    string // tells this agent's containers from another's
	bootID   string

	engine *engine
	copier copier
	names  keyedMutex // container names, task ids
	pulls  keyedMutex

	fetching atomic.Int64 // pulls that may be about to have an image

	mu      sync.Mutex
	ability *daemonInfo // what the daemon said it can do
	asked   time.Time
}

func (r *Runtime) configure(c sdk.Config) error {
	const op = "configure docker"
	cfg, err := parseConfig(c.JSON)
	if err != nil {
		return err
	}
	r.cfg, r.stateDir, r.runDir, r.log = cfg, c.StateDir, c.RunDir, slog.Default()
	sum := sha256.Sum256([]byte(filepath.Clean(c.StateDir)))
	r.owner = hex.EncodeToString(sum[:8])
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return sdk.Errorf(sdk.Internal, op, "read the boot id: %w", err)
	}
	r.bootID = strings.TrimSpace(string(boot))
	r.engine = newEngine(cfg.Address)
	r.copier = copier{runDir: c.RunDir, socket: cfg.Address, log: r.log}
	for _, d := range []string{r.tasksDir(), r.imagesDir(), r.pulledDir(), r.copier.outputs()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return sdk.Errorf(sdk.Internal, op, "%w", err)
		}
	}
	r.copier.watch()
	return nil
}

func (r *Runtime) tasksDir() string  { return filepath.Join(r.stateDir, "tasks") }
func (r *Runtime) imagesDir() string { return filepath.Join(r.stateDir, "images") }
func (r *Runtime) pulledDir() string { return filepath.Join(r.stateDir, "pulled") }

var _ sdk.ImageStore = (*Runtime)(nil)

// Info implements sdk.Runtime.
func (r *Runtime) Info(ctx context.Context) (sdk.RuntimeInfo, error) {
	const op = "ask the Docker daemon what it can do"
	d, err := r.daemon(ctx, true)
	if err != nil {
		return sdk.RuntimeInfo{}, r.fail(op, err)
	}
	i := sdk.RuntimeInfo{
		Version: d.ServerVersion, Images: true, Exec: true, Stats: true,
		Attributes: map[string]string{
			"docker.version": d.ServerVersion,
			"docker.cgroups": "v" + d.cgroupVersion(),
			"docker.runtime": d.DefaultRuntime,
		},
	}
	if r.cfg.Runtime != "" {
		i.Attributes["docker.runtime"] = r.cfg.Runtime
	}
	switch _, err := r.engine.network(ctx, r.cfg.Network); {
	case err == nil:
		i.Networks = append(i.Networks, sdk.NetworkBridge)
	case !isStatus(err, 404): // a daemon without one runs the rest
		return sdk.RuntimeInfo{}, r.fail(op, err)
	}
	i.Networks = append(i.Networks, sdk.NetworkHost, sdk.NetworkNone)
	return i, nil
}

// daemon is what the daemon says of itself, asked again when that is old.
func (r *Runtime) daemon(ctx context.Context, fresh bool) (*daemonInfo, error) {
	r.mu.Lock()
	known, asked := r.ability, r.asked
	r.mu.Unlock()
	if known != nil && !fresh && time.Since(asked) < time.Minute {
		return known, nil
	}
	d, err := r.engine.info(ctx)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.ability, r.asked = d, time.Now()
	r.mu.Unlock()
	return d, nil
}

// after is a context for what must be finished when the caller's has ended.
func after(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), 60*time.Second)
}

// pause waits, or says why not.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
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
