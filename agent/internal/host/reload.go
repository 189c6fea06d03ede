package host

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	sdkhost "github.com/belay-edge/belay/plugins/sdk/host"
)

// files are what a plugin's goroutine knows of its executable and its
// configuration.
type files struct {
	executable identity // as last considered: launched, refused or found unchanged
	candidate  identity // another one, seen once: it may still be being written
	missing    int      // looks at which there was none
	sum        string   // of the executable that was last launched

	onDisk   Settings // as last considered
	err      string   // why onDisk could not be read; "" when it could
	running  Settings // of the last launch
	accepted *Settings
}

func (f *files) consider(s Settings, err error) (changed bool) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	changed = text != f.err || !s.same(f.onDisk)
	f.onDisk, f.err = s, text
	return changed
}

// lookWhileDown says what changed since the last launch; nil: nothing.
func (p *plugin) lookWhileDown() error {
	if p.isGone() {
		return errGone
	}
	file, err := identify(p.path)
	if settings, serr := p.host.settings(p.name); p.files.consider(settings, serr) {
		return replaced{"its configuration"}
	}
	if err == nil && file != p.files.executable {
		return replaced{"its executable"}
	}
	return nil
}

// isGone is true once the executable was missing twice: an installer may
// remove it and put another in its place.
func (p *plugin) isGone() bool {
	if _, err := os.Lstat(p.path); !errors.Is(err, fs.ErrNotExist) {
		p.files.missing = 0
		return false
	}
	p.files.missing++
	return p.files.missing > 1
}

// lookWhileUp says why the process must make room for another; nil: it need
// not. again: a file may still be changing.
func (p *plugin) lookWhileUp(ctx context.Context, process *sdkhost.Plugin) (again bool, why error) {
	if p.isGone() {
		return false, errGone
	}
	if p.files.missing > 0 {
		return true, nil
	}
	settings, err := p.host.settings(p.name)
	if p.files.consider(settings, err) {
		switch {
		case err == nil && settings.same(p.files.running):
			p.note(func(n *notes) { n.configuration = "" })
		case err == nil && settings.Disabled:
			return false, replaced{"its configuration"}
		case err == nil:
			if options, known := process.Options(); known {
				err = sdk.CheckConfig(options, settings.JSON)
			}
			if err == nil {
				return false, replaced{"its configuration"}
			}
			fallthrough
		default:
			p.refuse(err)
		}
	}
	file, err := identify(p.path)
	switch {
	case err != nil || file == p.files.executable:
		p.files.candidate = identity{}
		return false, nil // what it links to may be being installed
	case file != p.files.candidate:
		p.files.candidate = file
		return true, nil
	}
	return false, p.considerExecutable(ctx, process)
}

// considerExecutable tries whether the file is a plugin that could take over.
// If not, the running process goes on.
func (p *plugin) considerExecutable(ctx context.Context, process *sdkhost.Plugin) error {
	sum, err := p.check(p.files.running)
	if err == nil && sum == p.files.sum {
		p.note(func(n *notes) { n.executable = "" })
		return nil // touched, or the one before again
	}
	if err == nil {
		var o sdkhost.Options
		if o, err = p.options(p.files.running); err == nil {
			dctx, cancel := context.WithCancel(ctx)
			defer cancel()
			go func() {
				select {
				case <-process.Exited(): // there is nothing left to spare
					cancel()
				case <-dctx.Done():
				}
			}()
			err = p.describe(dctx, o, sum)
		}
	}
	if err == nil {
		return replaced{"its executable"}
	}
	select {
	case <-process.Exited():
		return nil
	default:
	}
	p.host.log.Error("the plugin's new executable is not taken; the process of the one before goes on", "plugin", p.name, "err", err)
	p.note(func(n *notes) {
		n.executable = "the new executable is not taken, the process of the one before goes on: " + err.Error()
	})
	return nil
}

// describe asks an executable what it is, beside a process that runs.
func (p *plugin) describe(ctx context.Context, o sdkhost.Options, sum string) error {
	if err := p.confine(ctx, &o, p.files.running, sum); err != nil {
		return err
	}
	_, err := sdkhost.Describe(ctx, o)
	return err
}

// refuse reports a configuration that is not taken.
func (p *plugin) refuse(err error) {
	p.host.log.Error("the plugin's new configuration is not taken; it goes on with the one before", "plugin", p.name,
		"configuration", p.files.onDisk.Source, "err", err)
	where := ""
	if s := p.files.onDisk.Source; s != "" {
		where = " in " + s
	}
	p.note(func(n *notes) {
		n.configuration = "the new configuration" + where + " is not taken, it goes on with the one before: " + err.Error()
	})
}

func (p *plugin) note(f func(*notes)) {
	p.mu.Lock()
	before := p.notes
	f(&p.notes)
	same := p.notes == before
	p.mu.Unlock()
	if !same {
		p.host.changed(p.name)
	}
}

// calls counts those under way in one process.
type calls struct {
	mu   sync.Mutex
	n    int
	idle chan struct{} // closed when n falls to 0 while somebody waits
}

func newCalls() *calls { return &calls{} }

func (c *calls) add() {
	c.mu.Lock()
	c.n++
	c.mu.Unlock()
}

func (c *calls) done() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n--; c.n == 0 && c.idle != nil {
		close(c.idle)
		c.idle = nil
	}
}

func (c *calls) wait() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	idle := make(chan struct{})
	if c.n == 0 {
		close(idle)
	} else {
		c.idle = idle
	}
	return idle
}

// drain holds new calls back until the replacement is up and gives those
// under way some time. What takes longer is cut off, as by a crash, and is
// asked for again: a runtime's Start adopts what was begun.
func (p *plugin) drain(ctx context.Context, process *sdkhost.Plugin) {
	p.mu.Lock()
	if p.swap == nil {
		p.swap = make(chan struct{})
	}
	calls := p.calls
	p.mu.Unlock()
	timer := time.NewTimer(p.host.config.Timing.Drain)
	defer timer.Stop()
	select {
	case <-calls.wait():
	case <-process.Exited():
	case <-ctx.Done():
	case <-timer.C:
		p.host.log.Warn("calls to the plugin are cut off: it is being replaced", "plugin", p.name)
	}
}

// swapped lets the calls go on that waited for a replacement, whether it is up
// or not.
func (p *plugin) swapped() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.swap != nil {
		close(p.swap)
		p.swap = nil
	}
}

// enter waits for a replacement that is under way, and counts a call.
func (p *plugin) enter(ctx context.Context, what string, kind sdk.Kind) (done func(), r sdk.Runtime, d sdk.Devices, err error) {
	p.mu.Lock()
	for p.swap != nil {
		swap := p.swap
		p.mu.Unlock()
		select {
		case <-swap:
		case <-ctx.Done():
			return nil, nil, nil, sdk.Errorf(sdk.KindOf(ctx.Err()), "reach "+what+" "+p.name, "plugin %s is being replaced: %w", p.name, ctx.Err())
		}
		p.mu.Lock()
	}
	defer p.mu.Unlock()
	if kind == sdk.KindRuntime && p.runtime == nil || kind == sdk.KindDevice && p.device == nil {
		return nil, nil, nil, p.away(what, kind)
	}
	c := p.calls
	c.add()
	return c.done, p.runtime, p.device, nil
}
