package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/belay-edge/belay/agent"
	"github.com/belay-edge/belay/agent/internal/config"
	"github.com/belay-edge/belay/agent/internal/host"
	"github.com/belay-edge/belay/agent/internal/identity"
	"github.com/belay-edge/belay/agent/internal/link"
	"github.com/belay-edge/belay/agent/internal/localapi"
	"github.com/belay-edge/belay/agent/internal/state"
	"github.com/belay-edge/belay/agent/internal/system"
	"github.com/belay-edge/belay/agent/internal/watchdog"
	"github.com/belay-edge/belay/controlplane/wire"
	"github.com/belay-edge/belay/controlplane/wire/carrier"
	pluginhost "github.com/belay-edge/belay/plugins/sdk/host"
)

// Shutdown: the loop ends its calls, then the plugins end. The unit's
// TimeoutStopSec is longer than all of it.
const (
	loopStop  = 8 * time.Second
	finalStop = 15 * time.Second
	// leastEnd is for what comes after the parts, when one was stuck.
	leastEnd = 5 * time.Second
)

// forEver stands for "never give up" where a duration is asked for: it can
// still be added to a time since boot.
const forEver = 100 * 365 * 24 * time.Hour

func runCommand(t terminal) *cobra.Command {
	var o options
	c := &cobra.Command{
		Use:   "run",
		Short: "Run the agent: keep this device's tasks running",
		Long: `Run the agent: keep this device's tasks running.

It ends on SIGTERM or Ctrl-C and leaves the tasks running; the next start
takes them over. The device must be enrolled first.`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			return runAgent(c.Context(), cfg, logger(cfg.Log, t.err))
		},
	}
	o.addConfig(c.Flags())
	o.addStateDir(c.Flags())
	o.addRunDir(c.Flags())
	o.addPlugins(c.Flags())
	o.addTransport(c.Flags())
	o.addLog(c.Flags())
	return c
}

// runAgent puts the parts together and runs them until ctx ends.
func runAgent(ctx context.Context, cfg config.Config, log *slog.Logger) (err error) {
	id, unknown := identity.Load(cfg.StateDir)
	if errors.Is(unknown, identity.ErrNotEnrolled) && !holdsTasks(cfg.StateDir) {
		return fmt.Errorf("%w: %s holds no identity: make an activation with \"belay activation create\", then run: belay-agent enroll --state-dir %s --activation CODE",
			unknown, cfg.StateDir, cfg.StateDir)
	}
	if unknown == nil {
		if id.Damage != "" {
			log.Error("this device's identity was damaged and is read from its copy", "problem", id.Damage)
		}
		if err := identity.Secure(cfg.StateDir, id); err != nil {
			log.Warn("there is no good copy of this device's identity", "error", err)
		}
	}
	journal, saved, err := state.Open(cfg.StateDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, journal.Close()) }()
	clock, err := system.NewClock()
	if err != nil {
		return err
	}
	defer clock.Close()
	facts, err := system.Read(ctx, "/", factOptions(cfg))
	if err != nil {
		return err
	}
	feeding, err := feedEvery()
	if err != nil {
		return err
	}
	dog := watchdog.New(log, feeding)
	plugins, err := newHost(cfg, dog, log)
	if err != nil {
		return err
	}
	d := &device{
		dog: dog, cfg: cfg, id: id, facts: facts, log: log, startedAt: time.Now().UTC(),
		runtimes: newRuntimes(plugins), ready: make(chan struct{}),
	}
	if unknown == nil {
		d.link, unknown = newLink(d, clock)
	}
	var uplink agent.Uplink = d.link
	if unknown != nil {
		d.link, d.alone = nil, unknown
		uplink = nobody{}
		log.Error("this device cannot tell who it is: it keeps its tasks running and hears no control plane",
			"error", unknown, "do", enrolAnew(cfg.StateDir))
	}
	d.agent, err = agent.New(agent.Config{
		Runtimes: d.runtimes, Devices: d.runtimes, Journal: journal, Saved: saved, Uplink: uplink,
		Outputs: state.NewOutputs(cfg.StateDir), Volumes: state.NewVolumes(cfg.StateDir),
		Clock: clock, Logger: log, InstanceID: id.ID,
		PullGiveUp:       orElse(time.Duration(cfg.PullGiveUp), forEver),
		KeepStopped:      orElse(time.Duration(cfg.KeepStopped), time.Nanosecond),
		KeepStoppedTasks: cfg.KeepStoppedTasks,
		ShutdownWait:     loopStop,
		Watch:            dog.Watch,
		Mind:             dog.Mind,
		Images: &agent.ImagePolicy{
			KeepUnused: time.Duration(cfg.Images.KeepUnused), MinAge: time.Duration(cfg.Images.MinAge),
			HighPercent: cfg.Images.HighPercent, LowPercent: cfg.Images.LowPercent,
		},
	})
	if err != nil {
		return err
	}
	if d.link != nil {
		d.link.Attach(d.agent)
	}
	api, err := localapi.Listen(cfg.RunDir, d, log)
	if err != nil {
		return err
	}
	var done func()
	api.Pulse, done = dog.Watch("local API", passOn)
	defer done()
	return d.run(ctx, api, plugins)
}

func orElse(d, zero time.Duration) time.Duration {
	if d == 0 {
		return zero
	}
	return d
}

func newHost(cfg config.Config, dog *watchdog.Dog, log *slog.Logger) (*host.Host, error) {
	h, err := host.New(host.Config{
		Dir:        cfg.PluginDir,
		StateDir:   filepath.Join(cfg.StateDir, "plugins"),
		RunDir:     filepath.Join(cfg.RunDir, "plugins"),
		Settings:   func(name string) (host.Settings, error) { return pluginSettings(cfg, name) },
		Stage:      []string{"/proc/self/exe", stageArg},
		LimitGroup: limitGroup(cfg.RunDir),
		Logger:     log,
		Watch:      dog.Watch,
		Mind:       dog.Mind,
	})
	if err != nil {
		return nil, fmt.Errorf("%w: name where the plugins are with --plugin-dir", err)
	}
	for _, name := range cfg.PluginNames() {
		if _, err := os.Stat(filepath.Join(cfg.PluginDir, name)); errors.Is(err, fs.ErrNotExist) {
			log.Warn("there is configuration for a plugin that is not there", "plugin", name, "dir", cfg.PluginDir)
		}
	}
	return h, nil
}

// pluginSettings reads what the host is to know of a plugin's configuration.
func pluginSettings(cfg config.Config, name string) (host.Settings, error) {
	p, err := cfg.Plugin(name)
	if err != nil {
		return host.Settings{}, err
	}
	s := host.Settings{
		Source: p.Source, JSON: p.JSON, SHA256: p.SHA256, Disabled: p.Enabled != nil && !*p.Enabled,
	}
	s.Profile = p.Profile
	if p.MemoryMax != nil {
		bytes := uint64(*p.MemoryMax)
		s.MemoryMax = &bytes
	}
	if p.CPUMax != nil {
		percent := int(*p.CPUMax)
		s.CPUMax = &percent
	}
	return s, nil
}

// limitGroup is the cgroup of this agent's plugins: one machine may run
// several agents with run directories of their own.
func limitGroup(runDir string) string {
	if runDir == config.Default().RunDir {
		return "belay/plugins"
	}
	sum := sha256.Sum256([]byte(runDir))
	return "belay/plugins-" + hex.EncodeToString(sum[:4])
}

func newLink(d *device, clock *system.Clock) (*link.Link, error) {
	key, err := carrier.ParseKey(d.id.Key)
	if err != nil {
		return nil, fmt.Errorf("the device's key is damaged: %w", err)
	}
	pin, err := wire.ParsePin(d.id.Pin)
	if err != nil {
		return nil, fmt.Errorf("the device's identity is damaged: %w", err)
	}
	proxy, err := proxyOf(d.cfg)
	if err != nil {
		return nil, err
	}
	return link.New(link.Config{
		InstanceID: d.id.ID, Key: key, Pins: []wire.Pin{pin}, Addresses: d.id.Addresses, Transport: d.cfg.Transport,
		AgentVersion: agentVersion(), HashedMachineID: d.facts.MachineID,
		Capabilities: []string{wire.CapabilityDevices, wire.CapabilityDisconnect, wire.CapabilityReconcile},
		Facts:        d.told(), Clock: clock, Logger: d.log, Proxy: proxy, Watch: d.dog.Watch, Mind: d.dog.Mind,
		ProbeFirst: time.Duration(d.cfg.Tunnel.ProbeFirst), ProbeMost: time.Duration(d.cfg.Tunnel.ProbeMost),
		Known: known(d.cfg.StateDir), Resolved: remember(d.cfg.StateDir, d.log),
		Remember: func(addresses []string) {
			if err := identity.SetAddresses(d.cfg.StateDir, addresses); err != nil {
				d.log.Warn("the control plane's new addresses are not remembered", "error", err)
			}
		},
	})
}

// run runs the parts until ctx ends or one fails.
func (d *device) run(ctx context.Context, api *localapi.Server, plugins *host.Host) error {
	g := newGroup(ctx)
	// Plugins go last: the loop may still be ending its calls to them.
	loopEnded := make(chan struct{})
	g.start("task loop", func(ctx context.Context) error {
		defer close(loopEnded)
		return d.agent.Run(ctx)
	})
	g.start("plugins", func(ctx context.Context) error {
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		defer cancel()
		go func() { <-loopEnded; cancel() }()
		return plugins.Run(ctx)
	})
	g.start("tunnel", d.tunnel)
	g.start("network changes", d.watchNetwork)
	g.start("reach", d.watchReach)
	g.start("plugin changes", func(ctx context.Context) error { return d.runtimes.run(ctx, d.dog) })
	g.start("facts", d.keepFacts)
	g.start("local API", api.Run)
	g.start("memory", func(ctx context.Context) error {
		pulse, done := d.dog.Watch("memory", 2*time.Minute)
		defer done()
		pluginhost.GiveBackMemoryAsked(ctx, pulse)
		return nil
	})
	g.start("watchdog", func(ctx context.Context) error { return d.beReady(ctx) })
	<-g.ctx.Done()
	notify(d.log, daemon.SdNotifyStopping)
	d.log.Info("stopping; tasks keep running")
	return g.wait(finalStop)
}

// beReady tells systemd once the task loop answers, and from then on that
// every watched loop turns. One that does not ends the agent, with or without systemd.
func (d *device) beReady(ctx context.Context) error {
	if _, err := d.agent.Snapshot(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	notify(d.log, daemon.SdNotifyReady)
	d.log.Info("agent is running", "version", agentVersion(), "instance", d.id.ID, "cluster", d.id.Cluster,
		"pid", os.Getpid(), "board", d.facts.Attributes["belay.board"])
	err := d.dog.Run(ctx, func() {
		notify(d.log, daemon.SdNotifyWatchdog)
		pluginhost.Worked() // the loops have answered, with pages of code that nothing else needs
	})
	if err != nil {
		// What is stuck may hold up the end in ways that nobody thought of.
		time.AfterFunc(finalStop+leastEnd, func() { os.Exit(exitFailure) })
	}
	return err
}
