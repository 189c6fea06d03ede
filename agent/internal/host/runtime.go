package host

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
	sdkhost "github.com/belay-edge/belay/plugins/sdk/host"
)

// runtime is an sdk.Runtime that goes to whatever process the plugin has now.
type runtime struct{ p *plugin }

var (
	_ sdk.Runtime    = runtime{}
	_ sdk.ImageStore = runtime{} // answers Unsupported when the plugin is none
)

func (r runtime) now() (sdk.Runtime, error) {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	if r.p.runtime != nil {
		return r.p.runtime, nil
	}
	return nil, r.p.away("runtime", sdk.KindRuntime)
}

// away says why nothing can be asked of a plugin; p.mu is held.
func (p *plugin) away(what string, kind sdk.Kind) error {
	s := p.st
	switch {
	case s.Kinds != nil && !slices.Contains(s.Kinds, kind):
		return sdk.Errorf(sdk.NotFound, "find "+what+" "+p.name, "plugin %s is not a %s", p.name, what)
	case s.Error != "":
		return sdk.Errorf(sdk.Unavailable, "reach "+what+" "+p.name, "plugin %s is %s: %s", p.name, s.State, s.Error)
	}
	return sdk.Errorf(sdk.Unavailable, "reach "+what+" "+p.name, "plugin %s is %s", p.name, s.State)
}

// Info implements sdk.Runtime.
func (r runtime) Info(ctx context.Context) (sdk.RuntimeInfo, error) {
	done, rt, _, err := r.p.enter(ctx, "runtime", sdk.KindRuntime)
	if err != nil {
		return sdk.RuntimeInfo{}, err
	}
	defer done()
	info, err := rt.Info(ctx)
	r.p.told(info, err)
	return info, err
}

// PrepareTask implements sdk.Runtime.
func (r runtime) PrepareTask(ctx context.Context, t sdk.TaskSpec) error {
	done, rt, _, err := r.p.enter(ctx, "runtime", sdk.KindRuntime)
	if err != nil {
		return err
	}
	defer done()
	return rt.PrepareTask(ctx, t)
}

// RemoveTask implements sdk.Runtime.
func (r runtime) RemoveTask(ctx context.Context, task string) error {
	done, rt, _, err := r.p.enter(ctx, "runtime", sdk.KindRuntime)
	if err != nil {
		return err
	}
	defer done()
	return rt.RemoveTask(ctx, task)
}

// Pull implements sdk.Runtime.
func (r runtime) Pull(ctx context.Context, q sdk.PullRequest, progress func(sdk.PullProgress)) (sdk.Image, error) {
	done, rt, _, err := r.p.enter(ctx, "runtime", sdk.KindRuntime)
	if err != nil {
		return sdk.Image{}, err
	}
	defer done()
	return rt.Pull(ctx, q, progress)
}

// Start implements sdk.Runtime.
func (r runtime) Start(ctx context.Context, q sdk.StartRequest) (sdk.Container, error) {
	done, rt, _, err := r.p.enter(ctx, "runtime", sdk.KindRuntime)
	if err != nil {
		return sdk.Container{}, err
	}
	defer done()
	return rt.Start(ctx, q)
}

// Stop implements sdk.Runtime.
func (r runtime) Stop(ctx context.Context, a sdk.Attempt, grace time.Duration) (sdk.Container, error) {
	done, rt, _, err := r.p.enter(ctx, "runtime", sdk.KindRuntime)
	if err != nil {
		return sdk.Container{}, err
	}
	defer done()
	return rt.Stop(ctx, a, grace)
}

// Remove implements sdk.Runtime.
func (r runtime) Remove(ctx context.Context, a sdk.Attempt) error {
	done, rt, _, err := r.p.enter(ctx, "runtime", sdk.KindRuntime)
	if err != nil {
		return err
	}
	defer done()
	return rt.Remove(ctx, a)
}

// List implements sdk.Runtime.
func (r runtime) List(ctx context.Context) (sdk.Inventory, error) {
	done, rt, _, err := r.p.enter(ctx, "runtime", sdk.KindRuntime)
	if err != nil {
		return sdk.Inventory{}, err
	}
	defer done()
	inv, err := rt.List(ctx)
	r.p.note(func(n *notes) { n.list = nonsense(err) })
	return inv, err
}

// nonsense is why an answer is not taken that breaks the contract; "" for
// other errors and none. The plugin is not relaunched for it: it runs, and
// would only say it again.
func nonsense(err error) string {
	if !errors.Is(err, sdkhost.ErrNonsense) {
		return ""
	}
	return "an answer of it is not taken: " + err.Error()
}

// What a runtime may tell without waiting: more than any honest one does.
const (
	eventBurst = 500
	eventRate  = 200 // a second, in the long run
)

// Events implements sdk.Runtime. The stream ends with the process.
func (r runtime) Events(ctx context.Context, f func(sdk.Attempt)) error {
	rt, err := r.now()
	if err != nil {
		return err
	}
	left, last := float64(eventBurst), time.Now()
	return rt.Events(ctx, func(a sdk.Attempt) {
		f(a)
		now := time.Now()
		left = min(eventBurst, left+now.Sub(last).Seconds()*eventRate) - 1
		if last = now; left < 0 {
			select {
			case <-ctx.Done():
			case <-time.After(time.Second / eventRate):
			}
		}
	})
}

// Stats implements sdk.Runtime.
func (r runtime) Stats(ctx context.Context, a sdk.Attempt) (sdk.Stats, error) {
	done, rt, _, err := r.p.enter(ctx, "runtime", sdk.KindRuntime)
	if err != nil {
		return sdk.Stats{}, err
	}
	defer done()
	return rt.Stats(ctx, a)
}

// Exec implements sdk.Runtime.
func (r runtime) Exec(ctx context.Context, q sdk.ExecRequest) (sdk.ExecResult, error) {
	done, rt, _, err := r.p.enter(ctx, "runtime", sdk.KindRuntime)
	if err != nil {
		return sdk.ExecResult{}, err
	}
	defer done()
	return rt.Exec(ctx, q)
}

// Images implements sdk.ImageStore.
func (r runtime) Images(ctx context.Context) (sdk.ImageInventory, error) {
	done, rt, _, err := r.p.enter(ctx, "runtime", sdk.KindRuntime)
	if err != nil {
		return sdk.ImageInventory{}, err
	}
	defer done()
	if store, ok := rt.(sdk.ImageStore); ok {
		return store.Images(ctx)
	}
	return sdk.ImageInventory{}, sdk.Errorf(sdk.Unsupported, "list images of "+r.p.name, "it is no image store")
}

// RemoveImage implements sdk.ImageStore.
func (r runtime) RemoveImage(ctx context.Context, digest string) error {
	done, rt, _, err := r.p.enter(ctx, "runtime", sdk.KindRuntime)
	if err != nil {
		return err
	}
	defer done()
	if store, ok := rt.(sdk.ImageStore); ok {
		return store.RemoveImage(ctx, digest)
	}
	return sdk.Errorf(sdk.Unsupported, "remove an image of "+r.p.name, "it is no image store")
}
