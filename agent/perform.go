package agent

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/belay-edge/belay/plugins/sdk"
)

// How long calls may take before their outcome is looked for in List instead.
const (
	listTimeout    = 30 * time.Second
	prepareTimeout = time.Minute
	startTimeout   = 2 * time.Minute
	removeTimeout  = time.Minute
	imagesTimeout  = 5 * time.Minute  // a slow disk, a large image
	haltMargin     = 30 * time.Second // past the grace
	probeMargin    = 5 * time.Second  // past the check's own timeout
	// pullStall ends a pull that makes no progress at all for so long.
	pullStall = 5 * time.Minute
)

// hands make the calls that the loop decides on. They share nothing with it.
type hands struct {
	runtimes Runtimes
	outputs  Outputs
	volumes  Volumes
	devices  Devices // nil: none
	clock    Clock
	instance string
	progress func(sdk.Attempt, sdk.PullProgress)
}

// perform makes one call and says what became of it.
func (h *hands) perform(ctx context.Context, j job) result {
	r := result{job: j}
	if j.Verb == callForget {
		if r.err = h.outputs.Forget(j.Attempt.Task); r.err == nil {
			r.err = h.volumes.Forget(j.Attempt.Task)
		}
		return r
	}
	rt, err := h.runtimes.Runtime(j.Runtime)
	if err != nil {
		r.err = err
		if j.Verb != callList {
			// Whatever is the matter, only a List makes it known again.
			r.err = &sdk.Error{Kind: sdk.Unavailable, Op: "find runtime " + j.Runtime, Message: err.Error(), Err: err}
		}
		return r
	}
	within := func(d time.Duration) (context.Context, context.CancelFunc) { return context.WithTimeout(ctx, d) }
	var cancel context.CancelFunc
	switch j.Verb {
	case callList:
		ctx, cancel = within(listTimeout)
		defer cancel()
		if r.info, r.err = rt.Info(ctx); r.err == nil {
			r.inventory, r.err = rt.List(ctx)
		}
	case callImages, callDiscard:
		store, ok := rt.(sdk.ImageStore)
		if !ok {
			r.err = sdk.Errorf(sdk.Unsupported, "look after images", "runtime %s keeps no account of them", j.Runtime)
			return r
		}
		ctx, cancel = within(imagesTimeout)
		defer cancel()
		if j.Verb == callDiscard {
			r.err = store.RemoveImage(ctx, j.Image)
		} else {
			r.images, r.err = store.Images(ctx)
		}
	case callPrepare:
		ctx, cancel = within(prepareTimeout)
		defer cancel()
		r.err = rt.PrepareTask(ctx, j.withinTask)
	case callUnprepare:
		ctx, cancel = within(removeTimeout)
		defer cancel()
		r.err = rt.RemoveTask(ctx, j.Attempt.Task)
	case callPull:
		r.image, r.err = h.pull(ctx, rt, j)
	case callStart:
		ctx, cancel = within(startTimeout)
		defer cancel()
		var edits sdk.Edits
		if edits, r.err = h.edits(ctx, j.devices); r.err != nil {
			r.withheld = true
			return r
		}
		r.found, r.err = h.start(ctx, rt, j, edits)
	case callHalt:
		ctx, cancel = within(j.Grace + haltMargin)
		defer cancel()
		r.found, r.err = rt.Stop(ctx, j.Attempt, j.Grace)
	case callRemove:
		ctx, cancel = within(removeTimeout)
		defer cancel()
		r.err = rt.Remove(ctx, j.Attempt)
	case callProbe:
		check := j.container.GetHealthCheck()
		timeout := seconds(check.GetTimeoutS(), 5)
		ctx, cancel = within(timeout + probeMargin)
		defer cancel()
		r.exec, r.err = rt.Exec(ctx, sdk.ExecRequest{
			Attempt: j.Attempt, Command: healthCommand(check), Timeout: timeout, MaxOutput: 4096,
		})
	}
	return r
}

// pull fetches an image, for as long as it makes progress.
func (h *hands) pull(ctx context.Context, rt sdk.Runtime, j job) (sdk.Image, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var moved atomic.Int64 // when it last made progress
	moved.Store(int64(h.clock.Now()))
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		// One timer at a time: progress comes many times a second.
		for left := pullStall; left > 0; left = time.Duration(moved.Load()) + pullStall - h.clock.Now() {
			select {
			case <-ctx.Done():
				return
			case <-h.clock.After(left):
			}
		}
		cancel(sdk.Errorf(sdk.Deadline, "pull "+j.image, "no progress for %s", pullStall))
	}()
	var last sdk.PullProgress
	img, err := rt.Pull(ctx, sdk.PullRequest{
		Task: j.Attempt.Task, Image: j.image, Platform: platform(j.task.GetPlatform()),
	}, func(p sdk.PullProgress) {
		if p == last {
			return
		}
		last = p
		moved.Store(int64(h.clock.Now()))
		if h.progress != nil {
			h.progress(j.Attempt, p)
		}
	})
	if err != nil && ctx.Err() != nil && sdk.KindOf(context.Cause(ctx)) == sdk.Deadline {
		err = context.Cause(ctx)
	}
	cancel(nil)
	<-watched
	return img, err
}

// start makes the files and directories an attempt needs and starts it.
func (h *hands) start(ctx context.Context, rt sdk.Runtime, j job, edits sdk.Edits) (sdk.Container, error) {
	mounts, err := h.mounts(j)
	if err != nil {
		return sdk.Container{}, kept(err, "make the volumes of "+j.Attempt.String())
	}
	req := startRequest(j, h.instance, mounts)
	apply(&req.Spec, edits)
	req.Stdout, req.Stderr, err = h.outputs.Open(j.Attempt)
	if err != nil {
		return sdk.Container{}, kept(err, "open the output files of "+j.Attempt.String())
	}
	return rt.Start(ctx, req)
}

// kept gives an error of the agent's own storage a kind that is retried: a
// disk that is full now may not be later.
func kept(err error, op string) error {
	kind := sdk.KindOf(err)
	if kind == sdk.Internal {
		kind = sdk.Exhausted
	}
	return &sdk.Error{Kind: kind, Op: op, Message: err.Error(), Err: err}
}

func (h *hands) mounts(j job) ([]sdk.Mount, error) {
	var out []sdk.Mount
	for _, m := range mountPoints(j.task, j.container) {
		source := ""
		for _, v := range j.task.GetVolumes() {
			if v.GetName() != m.volume {
				continue
			}
			var err error
			if source = v.GetHostPath(); source != "" {
				err = h.volumes.Host(source)
			} else {
				source, err = h.volumes.Dir(j.Attempt.Task, v.GetName(), v.GetShared())
			}
			if err != nil {
				return nil, err
			}
		}
		if source == "" {
			return nil, sdk.Errorf(sdk.Invalid, "mount "+m.target, "the task has no volume %q", m.volume)
		}
		out = append(out, sdk.Mount{Type: "bind", Source: source, Target: m.target, ReadOnly: m.readOnly})
	}
	return out, nil
}
