package containerd

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/belay-edge/belay/plugins/sdk"
)

const (
	progressEvery = 250 * time.Millisecond
	stallAfter    = 90 * time.Second
)

var errStalled = errors.New("nothing has arrived for 90 seconds")

// tracker counts what a pull fetches. It learns the layers from the handlers
// and their offsets from the content store.
type tracker struct {
	store    content.Store
	progress func(sdk.PullProgress)

	mu     sync.Mutex
	layers map[digest.Digest]*tracked
}

type tracked struct {
	desc ocispec.Descriptor
	ref  string
	done bool
	at   int64
}

func newTracker(store content.Store, progress func(sdk.PullProgress)) *tracker {
	return &tracker{store: store, progress: progress, layers: map[digest.Digest]*tracked{}}
}

// wrap notes the layers of every manifest that is read.
func (t *tracker) wrap(h images.Handler) images.Handler {
	return images.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		children, err := h.Handle(ctx, desc)
		t.mu.Lock()
		defer t.mu.Unlock()
		for _, c := range children {
			if images.IsLayerType(c.MediaType) && t.layers[c.Digest] == nil {
				t.layers[c.Digest] = &tracked{desc: c, ref: remotes.MakeRefKey(ctx, c)}
			}
		}
		return children, err
	})
}

// watch reports a few times a second until stop returns, and ends the context
// it returns when nothing arrives for long. Unpacking is not fetching: once
// every layer is here there is no stalling.
func (t *tracker) watch(ctx context.Context) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	over, finished := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(finished)
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		var last sdk.PullProgress
		moved := time.Now()
		for {
			select {
			case <-over:
				if now, ok := t.look(ctx); ok && now != last {
					t.progress(now)
				}
				return
			case <-tick.C:
			}
			now, ok := t.look(ctx)
			switch {
			case !ok:
			case now != last:
				last, moved = now, time.Now()
				t.progress(now)
			case now.Layers == now.LayersDone:
				moved = time.Now()
			case time.Since(moved) > stallAfter:
				cancel(errStalled)
			}
		}
	}()
	return ctx, func() {
		close(over)
		<-finished
		cancel(nil)
	}
}

// look counts; false when containerd did not say.
func (t *tracker) look(ctx context.Context) (sdk.PullProgress, bool) {
	active, err := t.store.ListStatuses(ctx)
	if err != nil {
		return sdk.PullProgress{}, false
	}
	at := make(map[string]int64, len(active))
	for _, s := range active {
		at[s.Ref] = s.Offset
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var p sdk.PullProgress
	for _, l := range t.layers {
		if !l.done {
			if offset, ok := at[l.ref]; ok {
				l.at = max(l.at, offset)
			} else if _, err := t.store.Info(ctx, l.desc.Digest); err == nil {
				l.done, l.at = true, l.desc.Size
			}
		}
		p.Layers++
		p.Bytes += uint64(l.desc.Size)
		p.BytesDone += uint64(l.at)
		if l.done {
			p.LayersDone++
		}
	}
	return p, true
}
