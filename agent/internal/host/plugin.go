package host

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	sdkhost "github.com/belay-edge/belay/plugins/sdk/host"
)

// plugin supervises one executable. Its goroutine runs run; the mutex guards
// what others read.
type plugin struct {
	host *Host
	name string
	path string
	wake chan struct{} // the executable was replaced, or is gone

	settle func() // called once it was up or failed; may be called again

	mu      sync.Mutex
	st      Status
	runtime sdk.Runtime // of the running process; nil otherwise
	device  sdk.Devices // of the running process; nil otherwise
	found   found       // what it last told
	file    identity    // of the last launch
	invalid bool        // the last launch failed for good
	gone    bool        // no longer in the directory

	crashes     []time.Time // goroutine only; the latest last
	quarantined bool        // goroutine only
}

func newPlugin(h *Host, name, path string) *plugin {
	return &plugin{host: h, name: name, path: path, wake: make(chan struct{}, 1), settle: func() {},
		st: Status{Name: name, Path: path, State: Starting}}
}

// run launches the process again and again, until ctx ends or the executable
// is gone.
func (p *plugin) run(ctx context.Context) {
	log := p.host.log.With("plugin", p.name)
	defer p.settle()
	for launches := 0; ctx.Err() == nil; launches++ {
		p.update(func(s *Status) { s.State, s.Restarts = Starting, launches })
		begun := time.Now()
		err := p.live(ctx)
		if ctx.Err() != nil {
			p.update(func(s *Status) { s.State, s.Error = Failed, errStopped.Error() })
			return
		}
		if p.isGone() {
			log.Info("plugin removed")
			return
		}
		delay, state := p.judge(err, time.Since(begun), time.Now())
		p.update(func(s *Status) { s.State, s.Error = state, err.Error() })
		p.settle()
		log.Error("plugin is down", "err", err, "state", state, "next", delay.Round(time.Millisecond))
		if !p.wait(ctx, delay) {
			p.crashes, p.quarantined = nil, false
			log.Info("plugin's executable was replaced")
		}
	}
}

// judge decides how long to wait after a process that was up for that long.
func (p *plugin) judge(err error, up time.Duration, now time.Time) (time.Duration, State) {
	t := p.host.config.Timing
	if up >= t.Window {
		p.crashes, p.quarantined = nil, false
	}
	p.mu.Lock()
	p.invalid = sdk.KindOf(err) == sdk.Invalid
	invalid := p.invalid
	p.mu.Unlock()
	if invalid {
		// Trying again cannot help before a file changes, which wakes us; the
		// slow retry is for what cannot be watched.
		return t.Quarantine, Failed
	}
	p.crashes = append(p.crashes, now)
	p.crashes = slices.DeleteFunc(p.crashes, func(c time.Time) bool { return now.Sub(c) > t.Window })
	if p.quarantined || len(p.crashes) >= t.Crashes {
		p.quarantined = true
		return t.Quarantine, Quarantined
	}
	return backoff(len(p.crashes), t), Failed
}

// backoff is nothing after the first crash, then doubles, with jitter: several
// plugins that lost the same daemon should not all start at once.
func backoff(crashes int, t Timing) time.Duration {
	if crashes <= 1 {
		return 0
	}
	d := t.MaxBackoff
	if shift := crashes - 2; shift < 20 {
		d = min(d, t.MinBackoff<<shift)
	}
	return d/2 + rand.N(d/2+1)
}

// wait returns false when it was woken.
func (p *plugin) wait(ctx context.Context, d time.Duration) bool {
	if d == 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-p.wake:
		return false
	}
	return true
}

// live is the life of one process; the error says why it is over.
func (p *plugin) live(ctx context.Context) error {
	process, err := p.launch(ctx)
	if err != nil {
		return err
	}
	defer process.Close(context.Background()) // bounded by Timing.Close
	defer p.down()
	p.up(ctx, process)
	defer p.followDevices(ctx)()
	return p.watch(ctx, process)
}

func (p *plugin) launch(ctx context.Context) (*sdkhost.Plugin, error) {
	if !validName.MatchString(p.name) {
		return nil, sdk.Errorf(sdk.Invalid, "check plugin "+p.path, "a plugin's file name has only a-z, 0-9 and -, and at most 63 of them").
			WithHint("rename it, or move what is no plugin out of the plugin directory")
	}
	file, err := identify(p.path)
	p.mu.Lock()
	p.file = file
	p.mu.Unlock()
	if err != nil {
		kind := sdk.Unavailable
		if errors.Is(err, fs.ErrNotExist) {
			kind = sdk.Invalid
		}
		return nil, sdk.Errorf(kind, "check plugin "+p.path, "%w", err)
	}
	if err := checkTrust(p.path); err != nil {
		return nil, err
	}
	if file.mode.IsRegular() {
		sum, err := checksum(p.path)
		if err != nil {
			return nil, sdk.Errorf(sdk.Unavailable, "check plugin "+p.path, "%w", err)
		}
		p.update(func(s *Status) { s.SHA256 = sum })
	}
	c := sdk.Config{
		StateDir: filepath.Join(p.host.config.StateDir, p.name),
		RunDir:   filepath.Join(p.host.config.RunDir, p.name),
		JSON:     p.host.config.Plugins[p.name],
	}
	for _, d := range []string{c.StateDir, c.RunDir} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, sdk.Errorf(sdk.Unavailable, "prepare plugin "+p.name, "%w", err)
		}
		if err := os.Chmod(d, 0o700); err != nil {
			return nil, sdk.Errorf(sdk.Unavailable, "prepare plugin "+p.name, "%w", err)
		}
	}
	// Sockets of an agent that was killed.
	sdkhost.RemoveSockets(c.RunDir)
	t := p.host.config.Timing
	return sdkhost.Launch(ctx, sdkhost.Options{
		Path: p.path, Name: p.name, SocketDir: c.RunDir, Config: c,
		Logger: p.host.log, StartTimeout: t.Start, CloseTimeout: t.Close,
	})
}

// up makes a launched process the plugin.
func (p *plugin) up(ctx context.Context, process *sdkhost.Plugin) {
	info := process.Info()
	runtime, _ := process.Runtime()
	device, _ := process.Devices()
	p.mu.Lock()
	p.runtime, p.device = runtime, device
	if device == nil {
		p.found = found{}
	}
	p.found.heard, p.found.err = false, ""
	p.mu.Unlock()
	// Not for long: a runtime whose daemon hangs is up all the same.
	p.askRuntime(ctx, runtime, min(2*time.Second, p.host.config.Timing.PingAnswer))
	p.update(func(s *Status) {
		s.State, s.Error, s.PID = Ready, "", process.PID()
		s.Version, s.Kinds = info.Version, info.Kinds
	})
	p.settle()
	p.host.log.Info("plugin is up", "plugin", p.name, "version", info.Version, "pid", process.PID())
}

func (p *plugin) down() {
	p.mu.Lock()
	p.runtime, p.device = nil, nil
	p.mu.Unlock()
	p.update(func(s *Status) { s.State, s.PID = Failed, 0 })
	p.host.devicesChanged()
}

// askRuntime learns what a runtime can do; false when it did not say.
func (p *plugin) askRuntime(ctx context.Context, r sdk.Runtime, timeout time.Duration) bool {
	if r == nil {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	info, err := r.Info(ctx)
	if err != nil {
		p.host.log.Debug("runtime does not say what it can do", "plugin", p.name, "err", err)
		return false
	}
	p.update(func(s *Status) {
		s.RuntimeVersion, s.Images, s.Networks, s.Attributes = info.Version, info.Images, info.Networks, info.Attributes
	})
	return true
}

// watch returns when the process is dead, hangs, or ctx ended.
func (p *plugin) watch(ctx context.Context, process *sdkhost.Plugin) error {
	t := p.host.config.Timing
	runtime, _ := process.Runtime()
	known := p.status().RuntimeVersion != ""
	tick := time.NewTicker(t.Ping)
	defer tick.Stop()
	missed := 0
	for beat := 1; ; beat++ {
		select {
		case <-ctx.Done():
			return errStopped
		case <-process.Exited():
			return sdk.Errorf(sdk.Unavailable, "run plugin "+p.name, "the process ended: %s", process.ExitReason())
		case <-tick.C:
		}
		pctx, cancel := context.WithTimeout(ctx, t.PingAnswer)
		err := process.Ping(pctx)
		cancel()
		switch {
		case err == nil:
			missed = 0
		case ctx.Err() != nil:
			continue
		case errors.Is(err, sdk.Deadline):
			// One may be lost to a device that swaps; a second is a hang.
			if missed++; missed < 2 {
				p.host.log.Warn("plugin does not answer", "plugin", p.name, "err", err)
				continue
			}
			process.Kill()
			return sdk.Errorf(sdk.Unavailable, "run plugin "+p.name, "it hangs: no answer to two pings within %s each; it was killed", t.PingAnswer)
		default:
			select {
			case <-process.Exited():
				continue
			case <-time.After(100 * time.Millisecond):
			}
			process.Kill()
			return sdk.Errorf(sdk.Unavailable, "run plugin "+p.name, "it failed a health check and was killed: %v", err)
		}
		// The daemon behind a runtime may come up, or be replaced, later.
		if missed == 0 && (!known || beat%30 == 0) {
			known = p.askRuntime(ctx, runtime, t.PingAnswer)
		}
	}
}

// update changes the status and tells whoever listens.
func (p *plugin) update(f func(*Status)) {
	p.mu.Lock()
	before := p.st
	f(&p.st)
	same := reflect.DeepEqual(before, p.st)
	p.mu.Unlock()
	if !same {
		p.host.changed(p.name)
	}
}

func (p *plugin) status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.st
	if s.State == Ready && s.Error == "" {
		s.Error = p.found.err
	}
	return s
}

func (p *plugin) mayBeRuntime() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.st.Kinds == nil {
		return !p.invalid
	}
	return slices.Contains(p.st.Kinds, sdk.KindRuntime)
}

// replaced wakes a plugin that is down when its executable is another now.
func (p *plugin) replaced() {
	file, err := identify(p.path)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone = false
	if err == nil && file != p.file && (p.st.State == Failed || p.st.State == Quarantined) {
		p.poke()
	}
}

// unlinked lets a plugin go once it is down.
func (p *plugin) unlinked() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone = true
	p.poke()
}

func (p *plugin) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

func (p *plugin) isGone() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.gone
}
