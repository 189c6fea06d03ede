// Package host keeps the device's plugins running: it finds executables in a
// directory, launches each, watches it, launches it again when it dies, and
// gives the agent runtimes by name that survive all of this.
//
// Every plugin has a goroutine of its own, so that a bad one cannot hold up
// another. What a plugin leaves in its session ends with it; what a runtime
// started for tasks is in sessions and groups of its own and outlives every
// process here.
package host

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// Config of a Host.
type Config struct {
	// Dir holds the plugins' executables. A file's name is the plugin's name;
	// symbolic links are followed.
	Dir string
	// StateDir and RunDir get one directory for each plugin. The path of
	// RunDir must be short: sockets are made below it.
	StateDir, RunDir string
	// Settings reads the configuration of a plugin as it is now: at every
	// launch, and every Timing.Scan while it runs. An error means that it
	// cannot be used; nil: no plugin has any.
	Settings func(name string) (Settings, error)
	// LimitGroup is the cgroup, a path below the mount, in which plugins get
	// one each with their limits; under systemd, the slice, with slashes for
	// dashes. "": they are not limited.
	LimitGroup string
	// Stage is the program, with its first arguments, that calls Stage: plugins
	// that are only detectors are run through it. Nil: they are not confined.
	Stage []string
	// Logger gets what happens to plugins and what they write to stderr; nil:
	// slog's default.
	Logger *slog.Logger
	// Watch has a loop watched until done is called: it receives from pulse
	// whenever it waits, and is stuck when it has not for deadline. Nil: none is.
	Watch func(name string, deadline time.Duration) (pulse <-chan struct{}, done func())
	// Mind has a loop watched that waits in calls: it says when it is busy, and
	// is stuck when one piece of work takes longer than deadline. Nil: none is.
	Mind func(name string, deadline time.Duration) (busy func(bool), done func())
	// Timing changes how patient the host is; zero fields keep the defaults.
	Timing Timing
}

// Settings are the configuration of one plugin.
type Settings struct {
	// Source is where it is written, for messages; "" when nowhere.
	Source string
	// JSON is handed to the plugin.
	JSON json.RawMessage
	// Disabled plugins are not launched.
	Disabled bool
	// SHA256 the executable must have, hex; "": any.
	SHA256 string
	// MemoryMax in bytes and CPUMax in percent of one CPU, 0 being no limit;
	// nil: the default of the plugin's kind.
	MemoryMax *uint64
	CPUMax    *int
	// Profile is "", ProfileAuto, ProfileDevice or ProfileNone.
	Profile string
}

// Timing of supervision.
type Timing struct {
	Start      time.Duration // 20 s: from launch to configured
	Close      time.Duration // 4 s: from being asked to end to being killed
	Ping       time.Duration // 10 s: between health checks
	PingAnswer time.Duration // 10 s: for an answer; two missing ones are a hang
	MinBackoff time.Duration // 100 ms: before the second relaunch; the first is at once
	MaxBackoff time.Duration // 30 s
	Window     time.Duration // 10 min: crashes in it count
	Crashes    int           // 5: so many in a window quarantine a plugin
	Quarantine time.Duration // 5 min: between attempts from then on
	Scan       time.Duration // 5 s: between looks at the plugins' files
	Drain      time.Duration // 10 s: for calls under way when a plugin is replaced
	Inventory  time.Duration // 1 s: at least, between two changes of a plugin's devices
	WatchRetry time.Duration // 1 s: before devices are watched again; doubles to MaxBackoff
}

func (t *Timing) fill() {
	for _, f := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&t.Start, 20 * time.Second}, {&t.Close, 4 * time.Second},
		{&t.Ping, 10 * time.Second}, {&t.PingAnswer, 10 * time.Second},
		{&t.MinBackoff, 100 * time.Millisecond}, {&t.MaxBackoff, 30 * time.Second},
		{&t.Window, 10 * time.Minute}, {&t.Quarantine, 5 * time.Minute}, {&t.Scan, 5 * time.Second}, {&t.Drain, 10 * time.Second},
		{&t.Inventory, time.Second}, {&t.WatchRetry, time.Second},
	} {
		if *f.field == 0 {
			*f.field = f.value
		}
	}
	if t.Crashes == 0 {
		t.Crashes = 5
	}
}

// State of a plugin.
type State string

// States.
const (
	Starting    State = "starting"
	Ready       State = "ready"
	Failed      State = "failed"      // down; launched again after a while
	Quarantined State = "quarantined" // crashed too often; launched again after a long while
	Disabled    State = "disabled"    // by its configuration
)

// Status is what operators see of a plugin.
type Status struct {
	Name     string
	Path     string
	Version  string     // "" until it was up once
	Kinds    []sdk.Kind // nil until it was up once
	Protocol int        // version it speaks; 0 until it was up once
	State    State
	Error    string // why it is down, or what else is wrong with it
	LastDown string // why it last went down by itself; "" when it has not
	Restarts int    // launches after it went down by itself
	SHA256   string // of the executable that was last launched, hex
	PID      int    // 0 unless it runs

	Memory    uint64   // bytes it takes now; 0: not known
	MemoryMax uint64   // its limit; 0: none
	CPUMax    int      // percent of one CPU; 0: none
	Missing   []string // protections this device cannot give, one sentence each

	// Of runtimes, as last heard.
	RuntimeVersion string
	Images         bool
	Networks       []string
	Attributes     map[string]string
}

// Host supervises plugins. Make one with New.
type Host struct {
	config  Config
	log     *slog.Logger
	changes chan string
	devices chan struct{} // some inventory changed

	mu      sync.Mutex
	plugins map[string]*plugin

	unsettled atomic.Int64 // of those found by New
	settled   chan struct{}
}

// New looks for plugins, so that RuntimeNames is right from the start, and
// launches none: Run does.
func New(c Config) (*Host, error) {
	c.Timing.fill()
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	h := &Host{config: c, log: c.Logger, changes: make(chan string, 64), devices: make(chan struct{}, 1), plugins: map[string]*plugin{}, settled: make(chan struct{})}
	// That below StateDir is made for each launch as well: a disk that is full
	// or read-only must not keep the agent from starting.
	if err := os.MkdirAll(c.StateDir, 0o700); err != nil {
		c.Logger.Error("plugins cannot keep state", "error", err)
	}
	if err := os.MkdirAll(c.RunDir, 0o700); err != nil {
		return nil, fmt.Errorf("make plugin directory: %w", err)
	}
	if _, err := h.scan(); err != nil {
		return nil, err
	}
	h.unsettled.Store(int64(len(h.plugins)))
	if len(h.plugins) == 0 {
		close(h.settled)
	}
	for _, p := range h.plugins {
		p.settle = sync.OnceFunc(func() {
			if h.unsettled.Add(-1) == 0 {
				close(h.settled)
			}
		})
	}
	return h, nil
}

// Run launches the plugins and keeps them running until ctx ends; then it ends
// them, which takes no longer than Timing.Close and a little.
func (h *Host) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	start := func(plugins []*plugin) {
		for _, p := range plugins {
			wg.Go(func() {
				p.run(ctx)
				if ctx.Err() == nil {
					h.forget(p)
				}
			})
		}
	}
	h.mu.Lock()
	found := slices.Collect(maps.Values(h.plugins))
	h.mu.Unlock()
	start(found)

	pulse, unwatch := h.watch("plugin directory", time.Minute)
	defer unwatch()
	tick := time.NewTicker(h.config.Timing.Scan)
	defer tick.Stop()
	for complained := ""; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-pulse:
			continue
		case <-tick.C:
		}
		added, err := h.scan()
		if err != nil {
			if err.Error() != complained {
				h.log.Error("cannot look for plugins", "err", err)
				complained = err.Error()
			}
			continue
		}
		complained = ""
		start(added)
	}
}

func (h *Host) watch(name string, deadline time.Duration) (pulse <-chan struct{}, done func()) {
	if h.config.Watch == nil {
		return nil, func() {}
	}
	return h.config.Watch(name, deadline)
}

func (h *Host) mind(name string, deadline time.Duration) (busy func(bool), done func()) {
	if h.config.Mind == nil {
		return func(bool) {}, func() {}
	}
	return h.config.Mind(name, deadline)
}

// scan adds plugins that are new in the directory and returns them, and has
// all others look after their own files.
func (h *Host) scan() ([]*plugin, error) {
	entries, err := os.ReadDir(h.config.Dir)
	if err != nil {
		return nil, fmt.Errorf("read the plugin directory: %w", err)
	}
	var added []*plugin
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range entries {
		name := e.Name()
		if ignored(e) || h.plugins[name] != nil {
			continue
		}
		p := newPlugin(h, name, filepath.Join(h.config.Dir, name))
		h.plugins[name] = p
		added = append(added, p)
	}
	for _, p := range h.plugins {
		p.poke()
	}
	return added, nil
}

func (h *Host) forget(p *plugin) {
	h.mu.Lock()
	if h.plugins[p.name] == p {
		delete(h.plugins, p.name)
	}
	h.mu.Unlock()
	h.changed(p.name)
	h.devicesChanged()
}

// settings of a plugin, as they are now.
func (h *Host) settings(name string) (Settings, error) {
	if h.config.Settings == nil {
		return Settings{}, nil
	}
	s, err := h.config.Settings(name)
	if err != nil {
		return Settings{}, sdk.Errorf(sdk.Invalid, "read the configuration", "%w", err)
	}
	return s, nil
}

func (h *Host) changed(name string) {
	select {
	case h.changes <- name:
	default: // a hint; whoever reads looks at everything anyway
	}
}

func (h *Host) all() []*plugin {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.SortedFunc(maps.Values(h.plugins), func(a, b *plugin) int { return cmp.Compare(a.name, b.name) })
}

// Status of every plugin, by name.
func (h *Host) Status() []Status {
	var out []Status
	for _, p := range h.all() {
		s := p.status()
		s.Memory = memoryOf(s.PID)
		out = append(out, s)
	}
	return out
}

// Changes receives the name of a plugin when it came up or went down, or what
// its Status says otherwise changed. A full channel drops.
func (h *Host) Changes() <-chan string { return h.changes }

// Settled is closed once every plugin found by New has been up or has failed.
func (h *Host) Settled() <-chan struct{} { return h.settled }

// RuntimeNames lists the plugins that are runtimes, up or down, and those that
// may turn out to be.
func (h *Host) RuntimeNames() []string {
	var names []string
	for _, p := range h.all() {
		if p.mayBeRuntime() {
			names = append(names, p.name)
		}
	}
	return names
}

// Runtime returns the runtime of that name. It stays good when the plugin's
// process is replaced: calls while there is none fail with sdk.Unavailable.
// Errors: sdk.NotFound when there is no such runtime, sdk.Unavailable while it
// is down.
func (h *Host) Runtime(name string) (sdk.Runtime, error) {
	h.mu.Lock()
	p := h.plugins[name]
	h.mu.Unlock()
	if p == nil {
		return nil, sdk.Errorf(sdk.NotFound, "find runtime "+name, "this device has no plugin of that name").
			WithHint("install it into " + h.config.Dir)
	}
	r := runtime{p}
	if _, err := r.now(); err != nil {
		return nil, err
	}
	return r, nil
}

// errStopped is the cause of contexts of a host that is being ended.
var errStopped = errors.New("the agent is stopping")
