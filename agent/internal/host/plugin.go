package host

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
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
	wake chan struct{} // look after the files

	settle func() // called once it was up or failed; may be called again

	mu      sync.Mutex
	st      Status
	runtime sdk.Runtime   // of the running process; nil otherwise
	device  sdk.Devices   // of the running process; nil otherwise
	calls   *calls        // of the running process
	found   found         // what it last told
	swap    chan struct{} // closed when a replacement is over; nil: none is under way
	invalid bool          // the last launch failed for good
	notes   notes

	// The goroutine's own.
	crashes     []time.Time // the latest last
	quarantined bool
	files       files
	group       *group  // nil: not limited
	limits      *limits // in force; nil: none yet
	lacks       []string
	killed      uint64 // for memory, when the process was launched
	pulse       <-chan struct{}
}

// notes are what is wrong with files that are not in use, with what a runtime
// works with, and with answers that are not taken.
type notes struct{ executable, configuration, info, list string }

func newPlugin(h *Host, name, path string) *plugin {
	return &plugin{host: h, name: name, path: path, wake: make(chan struct{}, 1), settle: func() {},
		st: Status{Name: name, Path: path, State: Starting}}
}

// pluginDeadline is more than a replacement takes when every part of it takes
// as long as it may: the trial of the new one, the drain and end of the old
// one, the launch.
const pluginDeadline = 3 * time.Minute

// Why a life is over without anything being wrong.
var (
	errGone     = errors.New("its executable was removed")
	errDisabled = errors.New("disabled by its configuration")
)

// replaced is why a process made room for the next.
type replaced struct{ what string }

func (r replaced) Error() string { return r.what + " was replaced" }

// run launches the process again and again, until ctx ends or the executable
// is gone.
func (p *plugin) run(ctx context.Context) {
	log := p.host.log.With("plugin", p.name)
	var unwatch func()
	p.pulse, unwatch = p.host.watch("plugin "+p.name, pluginDeadline)
	defer unwatch()
	defer p.settle()
	defer p.swapped()
	defer func() {
		if p.group != nil {
			p.group.remove()
		}
	}()
	for restarts := 0; ctx.Err() == nil; {
		p.update(func(s *Status) { s.State, s.Restarts = Starting, restarts })
		begun := time.Now()
		err := p.live(ctx)
		var r replaced
		switch {
		case ctx.Err() != nil:
			p.update(func(s *Status) { s.State, s.Error = Failed, errStopped.Error() })
			return
		case errors.Is(err, errGone):
			log.Info("plugin removed")
			return
		case errors.As(err, &r):
			log.Info("plugin is launched anew", "why", r)
			p.crashes, p.quarantined = nil, false
			continue
		case errors.Is(err, errDisabled):
			p.swapped()
			p.update(func(s *Status) { s.State, s.Error = Disabled, errDisabled.Error() })
			p.settle()
			log.Info("plugin is disabled", "by", p.files.running.Source)
			if p.wait(ctx, 0) == errGone {
				return
			}
			continue
		}
		p.swapped()
		delay, state := p.judge(err, time.Since(begun), time.Now())
		p.update(func(s *Status) { s.State, s.Error, s.LastDown = state, err.Error(), cut(err.Error()) })
		p.settle()
		log.Error("plugin is down", "err", err, "state", state, "next", delay.Round(time.Millisecond))
		restarts++
		if delay == 0 {
			continue
		}
		switch why := p.wait(ctx, delay); {
		case errors.Is(why, errGone):
			log.Info("plugin removed")
			return
		case why != nil:
			p.crashes, p.quarantined = nil, false
			log.Info("plugin is tried again", "why", why)
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

// wait waits for d, 0 being for ever, or less long when a file changed: then
// it says what.
func (p *plugin) wait(ctx context.Context, d time.Duration) error {
	var over <-chan time.Time
	if d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		over = timer.C
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-over:
			return nil
		case <-p.pulse:
		case <-p.wake:
			if why := p.lookWhileDown(); why != nil {
				return why
			}
		}
	}
}

// live is the life of one process; the error says why it is over.
func (p *plugin) live(ctx context.Context) error {
	process, err := p.launch(ctx)
	if err != nil {
		p.sweep(0)
		return p.explainKill(err)
	}
	defer p.sweep(0)
	defer process.Close(context.Background()) // bounded by Timing.Close
	defer p.down()
	p.up(ctx, process)
	p.lacks = slices.Concat(process.Missing(), lacksOf(process.Info().Kinds))
	p.relimit(p.files.running, process.Info().Kinds)
	defer p.followDevices(ctx)()
	err = p.watch(ctx, process)
	if errors.As(err, new(replaced)) || errors.Is(err, errGone) {
		p.drain(ctx, process)
		return err
	}
	return p.explainKill(err)
}

// up makes a launched process the plugin.
func (p *plugin) up(ctx context.Context, process *sdkhost.Plugin) {
	info := process.Info()
	runtime, _ := process.Runtime()
	device, _ := process.Devices()
	p.mu.Lock()
	p.runtime, p.device, p.calls = runtime, device, newCalls()
	if device == nil {
		p.found = found{}
	}
	p.found.heard, p.found.err = false, ""
	p.mu.Unlock()
	p.note(func(n *notes) { n.info, n.list = "", "" })
	// Not for long: a runtime whose daemon hangs is up all the same.
	p.askRuntime(ctx, runtime, min(2*time.Second, p.host.config.Timing.PingAnswer))
	p.update(func(s *Status) {
		s.State, s.Error, s.PID = Ready, "", process.PID()
		s.Version, s.Kinds, s.Protocol = info.Version, info.Kinds, process.ProtocolVersion()
	})
	p.swapped()
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
	p.told(info, err)
	return err == nil
}

// told takes in what a runtime says it can do, or why it cannot say. The agent
// asks often, so what is shown is not old.
func (p *plugin) told(info sdk.RuntimeInfo, err error) {
	switch kind := sdk.KindOf(err); {
	case err == nil:
		p.note(func(n *notes) { n.info = "" })
		p.update(func(s *Status) {
			s.RuntimeVersion, s.Images, s.Networks, s.Attributes = info.Version, info.Images, info.Networks, info.Attributes
		})
	case kind != sdk.Canceled:
		p.host.log.Debug("runtime does not say what it can do", "plugin", p.name, "err", err)
		p.note(func(n *notes) { n.info = cmp.Or(nonsense(err), err.Error()) })
	}
}

// watch returns when the process is dead, hangs or is to be replaced, or ctx
// ended.
func (p *plugin) watch(ctx context.Context, process *sdkhost.Plugin) error {
	t := p.host.config.Timing
	runtime, _ := process.Runtime()
	known := p.status().RuntimeVersion != ""
	tick := time.NewTicker(t.Ping)
	defer tick.Stop()
	var settled <-chan time.Time // when a file that changed is looked at again
	missed := 0
	for beat := 1; ; beat++ {
		var look bool
		select {
		case <-ctx.Done():
			return errStopped
		case <-process.Exited():
			return sdk.Errorf(sdk.Unavailable, "run plugin "+p.name, "the process ended: %s", process.ExitReason())
		case <-p.wake:
			look = true
		case <-settled:
			look = true
		case <-p.pulse:
			beat--
			continue
		case <-tick.C:
		}
		if look {
			beat--
			again, why := p.lookWhileUp(ctx, process)
			if why != nil {
				return why
			}
			if settled = nil; again {
				settled = time.After(t.Scan / 4)
			}
			sdkhost.Worked()
			continue
		}
		p.limitAgain(process)
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
	p.st.Error = cut(p.st.Error)
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
	if s.State != Ready {
		return s
	}
	var wrong []string
	for _, w := range []string{s.Error, p.found.err, p.notes.executable, p.notes.configuration, p.notes.info, p.notes.list} {
		if w != "" {
			wrong = append(wrong, w)
		}
	}
	s.Error = cut(strings.Join(wrong, "; "))
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

func (p *plugin) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}
